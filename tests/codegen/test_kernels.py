"""Generated kernels compute their recipe: forward and every gradient, in Triton's interpreter (on the GPU where there is one)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
sys.path.insert(0, str(Path(__file__).parent))
from harness import run
from kernel_recipes import add_rms_norm, gated, layer_norm, leaves, norm_rope, rows, steps, weight

from meshwright.codegen.kernels.generate import generate, traffic
from meshwright.codegen.kernels.load import load
from meshwright.codegen.kernels.lowering import lower
from meshwright.codegen.kernels.recipe import SAVES, Recipe, Step
from meshwright.codegen.kernels.vocab_parallel import available

EPS = {"float32": 1e-5, "float16": 1e-3}
GOLDEN = Path(__file__).parent / "goldens" / "add_rms_norm.py.txt"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 2
_TORCH: dict[str, Any] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b, "pow": lambda a, n: a**n,
    "cast": lambda a: a, "neg": lambda a: -a, "mean": lambda a: a.mean(-1, keepdim=True), "sum": lambda a: a.sum(-1, keepdim=True),
    "low": lambda a: a[..., : a.shape[-1] // 2], "high": lambda a: a[..., a.shape[-1] // 2 :], "cat": lambda a, b: torch.cat((a, b), -1),
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"), "relu": F.relu, "erf": torch.erf,
    "rsqrt": torch.rsqrt, "sqrt": torch.sqrt, "exp": torch.exp, "log": torch.log, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    assert available(), "set TRITON_INTERPRET=1 before torch is imported, or run on a GPU"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("kernels")))
        yield


def eager(recipe: Recipe, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The recipe in plain torch, in the tensors' own dtype."""
    env: dict[str, Tensor] = {x.name: t for x, t in zip(recipe.inputs, tensors, strict=True)}
    for s in recipe.steps:
        env[s.name] = _TORCH[s.op](*(env[a] if isinstance(a, str) else a for a in s.args))
    return tuple(env[o.value] for o in recipe.outputs)


def make_inputs(recipe: Recipe) -> list[Tensor]:
    """Random inputs in the recipe's dtypes and layouts, BATCH samples."""
    torch.manual_seed(0)
    made = []
    for x in recipe.inputs:
        shape = (BATCH * x.shape[0], *x.shape[1:]) if x.over == "rows" and x.batched else x.shape
        made.append(torch.empty_strided(shape, x.strides, dtype=torch.float32).normal_().to(getattr(torch, x.dtype)).to(DEVICE))
    return made


def results(recipe: Recipe, function: Any, dtype: torch.dtype | None) -> list[Tensor]:
    """Outputs, then gradients of every input that has one, for fixed random gradients of the outputs."""
    tensors = [t.to(dtype or t.dtype).requires_grad_(x.gradient) for x, t in zip(recipe.inputs, make_inputs(recipe), strict=True)]
    out = function(*tensors)
    out = out if isinstance(out, tuple) else (out,)
    torch.manual_seed(1)
    grads = [torch.randn(o.shape).to(getattr(torch, d.dtype)).to(DEVICE).to(o.dtype) for o, d in zip(out, recipe.outputs, strict=True)]
    torch.autograd.backward(out, grads)
    return [o.detach() for o in out] + [t.grad for t in tensors if t.grad is not None]


def check(recipe: Recipe) -> None:
    """The error against fp64 is at most twice eager's, and a second run gives the same bits."""
    kernel = getattr(load(recipe), recipe.label)
    exact = results(recipe, lambda *t: eager(recipe, list(t)), torch.float64)
    plain = results(recipe, lambda *t: eager(recipe, list(t)), None)
    made, again = results(recipe, kernel, None), results(recipe, kernel, None)
    assert len(made) == len(exact)
    for k, (a, b, e, r) in enumerate(zip(made, again, plain, exact, strict=True)):
        assert torch.equal(a, b)
        error, bound = (a.double() - r).abs().max(), 2 * (e.double() - r).abs().max() + EPS[recipe.dtype]
        assert error <= bound, f"{recipe.name} result {k}: error {error:.2e}, bound {bound:.2e}"


MADE = {
    "add_rms_norm": add_rms_norm, "layer_norm": layer_norm, "swiglu": gated, "norm_rope": norm_rope,
    "geglu_erf": lambda dtype, save: gated(dtype, save, "gelu", 64), "geglu_tanh": lambda dtype, save: gated(dtype, save, "gelu_tanh", 32),
}  # fmt: skip


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", MADE)
def test_a_kernel_is_as_exact_as_eager(name: str, save: Any, dtype: str) -> None:
    """Forward and every gradient, whatever is kept for backward, at widths that are powers of two and that are not."""
    check(MADE[name](dtype, save))


def test_long_rows_without_a_reduction_are_worked_on_in_tiles() -> None:
    """2,500 columns in tiles of 1,024, the last one ragged."""
    check(gated("float32", "inputs", "silu", 2500))


def test_gradients_of_weights_sum_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs walk over the rows that they share: here two of them over five tiles."""
    monkeypatch.setattr("meshwright.codegen.kernels.kerneltext.PROGRAMS", 2)
    monkeypatch.setattr("meshwright.codegen.kernels.optext.PROGRAMS", 2)
    kernel = load(add_rms_norm("float32", "inputs", 8)).add_rms_norm
    a = torch.randn(300, 8, device=DEVICE)
    w = torch.ones(8, device=DEVICE, requires_grad=True)
    _, y = kernel(a, torch.zeros_like(a), w)
    y.sum().backward()
    wanted = (a.double() * torch.rsqrt(a.double().square().mean(-1, keepdim=True) + 1e-5)).sum(0)
    assert w.grad is not None
    assert torch.allclose(w.grad.double(), wanted, rtol=1e-5, atol=1e-4)


def test_other_layouts_and_shapes_are_right_too() -> None:
    """A tensor that lies otherwise is copied; rows of another width take the formula."""
    recipe = norm_rope("float32")
    module = load(recipe)
    x, cos, sin, w = make_inputs(recipe)
    assert torch.equal(module.norm_rope(x.contiguous(), cos, sin, w), module.norm_rope(x, cos, sin, w))
    short = (x[:, :, :4], cos[:, :4], sin[:, :4], w)
    assert torch.allclose(module.norm_rope(*short), module.formula(*short))


def test_kernels_pass_through_fake_tensors_export_and_meta() -> None:
    """Shapes, dtypes and strides without data; export sees one op."""
    recipe = add_rms_norm("float16", "statistics")
    module = load(recipe)

    class Model(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            return module.add_rms_norm(a, b, w)  # type: ignore[no-any-return]

    with FakeTensorMode():
        tensors = [torch.empty(2, 6, 48, dtype=torch.float16, requires_grad=True) for _ in "ab"]
        w = torch.empty(48, dtype=torch.float16, requires_grad=True)
        _, y = module.add_rms_norm(*tensors, w)
        y.sum().backward()
        assert tensors[0].grad is not None
        assert w.grad is not None
        assert (tensors[0].grad.shape, w.grad.shape, y.dtype) == ((2, 6, 48), (48,), torch.float16)
    meta = [torch.empty(2, 6, 48, dtype=torch.float16, device="meta"), torch.empty(2, 6, 48, dtype=torch.float16, device="meta")]
    exported = torch.export.export(Model(), (*meta, torch.empty(48, dtype=torch.float16, device="meta")), strict=False)
    called = [str(n.target) for n in exported.graph.nodes if n.op == "call_function" and "meshwright_kernels" in str(n.target)]
    assert called == [f"meshwright_kernels.{recipe.name}.default"]


def test_the_saved_set_is_a_choice_with_a_price() -> None:
    """Residual + RMSNorm keeps both its inputs, or their sum and a number a row, or all that backward reads."""
    n, width = 6, 48
    kept = {save: lower(add_rms_norm("float16", save)) for save in SAVES}
    assert kept["inputs"].saved_bytes == 2 * n * width * 2
    assert kept["statistics"].saved_bytes == n * width * 2 + n * 4
    assert kept["statistics"].kept_outputs == ["h"]
    assert kept["all"].saved_bytes > kept["statistics"].saved_bytes
    assert lower(gated("float16", "statistics")).saved_bytes == lower(gated("float16", "inputs")).saved_bytes
    assert traffic(add_rms_norm("float16", "inputs")) == (4 * n * width * 2, 6 * n * width * 2)


def test_equal_recipes_give_equal_text_that_is_the_golden() -> None:
    """The file of residual + RMSNorm at 4,096, as a reader finds it. To renew: print(generate(recipe)) into the golden."""
    recipe = add_rms_norm("bfloat16", "statistics", 4096)
    assert generate(recipe) == generate(Recipe.model_validate_json(recipe.model_dump_json()))
    assert generate(recipe) == GOLDEN.read_text()


def test_a_file_imports_torch_and_triton_alone() -> None:
    text = generate(norm_rope("float32"))
    imports = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imports == {"torch", "triton"}
    assert max(len(line) for line in text.splitlines()) <= 150


def test_rows_that_no_program_holds_are_refused_by_their_length() -> None:
    with pytest.raises(ValueError, match="131072 elements are longer than the 65536"):
        generate(add_rms_norm("bfloat16", "inputs", 131072))


SAFE = ("neg", "sigmoid", "silu", "gelu", "gelu_tanh", "tanh", "erf", "relu")


@st.composite
def regions(draw: st.DrawFn) -> Recipe:
    """Random pointwise steps over two tensors, a weight and constants, with one reduction of the row and one norm-like scaling."""
    width = draw(st.sampled_from((8, 12)))
    known, said = ["x", "z", "weight"], list[Step]()

    def step(op: str, *args: str | float) -> str:
        said.append(Step(name=f"s{len(said)}", op=op, args=args))
        return said[-1].name

    def wide() -> str:
        return draw(st.sampled_from([n for n in known if n != "weight"]))

    reduced = draw(st.integers(0, 3))
    for i in range(4):
        if i == reduced:
            mean = step("mean", step("mul", (a := wide()), a))
            known.append(step("mul", a, step("rsqrt", step("add", mean, 0.5))))
        op = draw(st.sampled_from((*SAFE, "add", "sub", "mul", "pow")))
        if op == "pow":
            known.append(step("mul", step("tanh", wide()), step("pow", step("sigmoid", wide()), draw(st.sampled_from((2.0, 3.0, 0.5, 1.5))))))
        elif op in SAFE:
            known.append(step(op, wide()))
        else:
            known.append(step(op, wide(), draw(st.sampled_from(known) | st.sampled_from((0.5, 2.0)))))
    last = step("add", step("mul", known[-1], "weight"), step("div", "z", 2.0))
    final = Step(name="y", op="cast", args=(last,))
    inputs = (rows("x", width, "float32"), rows("z", width, "float32"), weight("weight", width, "float32"))
    return Recipe(label="drawn", shape=(1, 6, width), inputs=inputs, steps=(*said, final), outputs=(leaves("y", width, "float32"),),
                  save=draw(st.sampled_from(SAVES)))  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(regions())
def test_any_region_is_differentiated_as_autograd_does(recipe: Recipe) -> None:
    """Derived backwards against torch's own in fp64."""
    kernel = load(recipe).drawn
    made = results(recipe, kernel, None)
    exact = results(recipe, lambda *t: eager(recipe, list(t)), torch.float64)
    assert len(made) == len(exact)
    for a, r in zip(made, exact, strict=True):
        assert torch.isfinite(a).all()
        assert (a.double() - r).abs().max() <= 2e-5 * max(1.0, r.abs().max().item()), recipe.formula()


def test_a_step_without_a_rule_is_named() -> None:
    bad = add_rms_norm("float32").model_copy(update={"steps": steps(("h", "low", "a"), ("y", "add", "h", "b"))})
    with pytest.raises(ValueError, match="mixes whole rows and halves"):
        lower(bad)


def on_rank(recipe: Recipe) -> tuple[list[str], float]:
    """Placements of the output and of the gradients of a batch-sharded call, and the largest relative error to the whole."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    kernel = load(recipe).add_rms_norm
    torch.manual_seed(0)
    whole = [torch.randn(4, 6, 48), torch.randn(4, 6, 48), torch.randn(48)]
    plain = [t.clone().requires_grad_() for t in whole]
    kernel(*plain)[1].square().sum().backward()
    places = (Shard(0), Shard(0), Replicate())
    sharded = [distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in zip(whole, places, strict=True)]
    _, y = kernel(*sharded)
    y.square().sum().backward()
    grads = [t.grad for t in sharded]
    assert all(g is not None for g in grads)
    error = max(((g.full_tensor() - p.grad).abs().max() / p.grad.abs().max()).item() for g, p in zip(grads, plain, strict=True))  # type: ignore
    return [str(t.placements[0]) for t in (y, grads[0])], error  # type: ignore[union-attr]


def test_dtensors_keep_their_samples_apart() -> None:
    """Sharded over the batch, outputs and gradients stay so; a weight's gradient is the sum over ranks."""
    for places, error in run(2, on_rank, add_rms_norm("float32")):
        assert places == ["S(0)", "S(0)"]
        assert error <= 1e-6
