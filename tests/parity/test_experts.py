"""Experts on several ranks compute what one process computes: whole models, and bare modules in every corner of routing."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

sys.path.insert(0, str(Path(__file__).parent))
from harness import announce, run
from models import build, write_models

from meshwright.codegen.apply import apply
from meshwright.codegen.runtime import experts as runtime
from meshwright.codegen.runtime.experts import balanced_routing, fully_shard_layer, place_experts
from meshwright.codegen.runtime.mesh import Mesh
from meshwright.codegen.runtime.recompute import recompute
from meshwright.codegen.runtime.weights import gather_full
from meshwright.planner.expert_tables import NotExperts, expert_tables, why_not
from meshwright.planner.plan import Layout, Plan
from meshwright.planner.solve import plan
from meshwright.profiling import ops
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.loading import import_target
from meshwright.profiling.trace import trace

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 5e-6
GATED = {"gate_up_proj": "S1x2", "down_proj": "S2"}
BIASED = {"gate_up_proj": "S2", "gate_up_proj_bias": "S1", "down_proj": "S1", "down_proj_bias": "P"}
BATCH, SEQ, TOKENS, WIDTH, INNER, EXPERTS = 8, 16, 24, 8, 16, 4
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")

# (degrees, recompute, model) by number of ranks; edp is what they leave
TRAINED: dict[int, list[tuple[dict[str, int], str, str]]] = {
    2: [
        ({"shard": 2, "ep": 2, "zero": 3}, "none", "mixtral"), ({"shard": 2, "etp": 2, "zero": 2}, "full", "qwen3-moe"),
        ({"replicate": 2, "ep": 2}, "selective", "deepseek"), ({"shard": 2, "etp": 2, "zero": 3}, "selective", "deepseek"),
    ],
    4: [
        ({"shard": 4, "ep": 4, "zero": 3}, "none", "mixtral"), ({"shard": 4, "ep": 2, "etp": 2, "zero": 3}, "full", "deepseek"),
        ({"shard": 4, "ep": 2, "zero": 3}, "selective", "deepseek"), ({"replicate": 2, "shard": 2, "ep": 2, "zero": 2}, "full", "qwen3-moe"),
        ({"replicate": 4, "ep": 2}, "full", "qwen3-moe"), ({"replicate": 2, "shard": 2, "etp": 2, "zero": 3}, "none", "mixtral"),
    ],
    8: [({"shard": 8, "ep": 2, "etp": 2, "zero": 3}, "selective", "qwen3-moe"), ({"shard": 8, "ep": 4, "zero": 1}, "none", "mixtral")],
}  # fmt: skip


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _worst(module: nn.Module, reference: dict[str, Tensor], packed: dict[str, tuple[int, int]]) -> float:
    """The worst error of a gradient, gathered whole."""
    held = {n: p.grad for n, p in module.named_parameters()}
    assert set(held) == set(reference)
    return max(float((gather_full(g, packed.get(n.rpartition(".")[2])) - reference[n]).abs().max()) for n, g in held.items())


def _trained(models: dict[str, tuple[str, ModelGraph]], cases: list[tuple[dict[str, int], str, str]]) -> list[tuple[float, float]]:
    """Error of the loss and the worst error of a gradient, for each case. Experts are placed as the model's tables say."""
    ids = torch.randint(0, 64, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    ranks, found = dist.get_world_size(), []
    for degrees, mode, name in cases:
        announce(f"{name} {degrees} {mode}")
        source, graph = models[name]
        whole = build(source)
        wanted = _loss(whole, ids)
        wanted.backward()
        reference = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
        model, mesh = build(source), Mesh("cpu", **degrees)
        tables = expert_tables(graph, Layout(dp=ranks, ep=mesh["ep"].size(), etp=mesh["etp"].size()))
        for i, o in enumerate(graph.layers):
            layer = model.get_submodule(o.path)
            mine = [t for t in tables if i in t.layers]
            placed = [layer.get_submodule(t.module) for t in mine]
            for t, e in zip(mine, placed, strict=True):
                place_experts(e, mesh, experts=t.experts, params=t.params, sizes=t.sizes, listed=t.listed)
            recompute(layer, mode)
            fully_shard_layer(layer, placed, mesh)
        fully_shard_layer(model, [], mesh)
        loss = _loss(model, ids.chunk(ranks)[dist.get_rank()])
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        found.append((abs(float(mean) / ranks - float(wanted)), _worst(model, reference, {"gate_up_proj": (1, 2)} if mesh["etp"].size() > 1 else {})))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ModelGraph]]:
    sources = write_models(tmp_path_factory.mktemp("models"))
    return {name: (sources[name], trace(sources[name], seq=SEQ)) for name in ("mixtral", "qwen3-moe", "deepseek")}


@pytest.mark.parametrize("ranks", TRAINED)
def test_models_with_experts_on_several_ranks_train_as_on_one(models: dict[str, tuple[str, ModelGraph]], ranks: int) -> None:
    """Mixtral, Qwen3-MoE and DeepSeek-V3 with ep, etp and copies of experts, with FSDP and recompute."""
    for errors in run(ranks, _trained, models, TRAINED[ranks]):
        for case, (loss, gradient) in zip(TRAINED[ranks], errors, strict=True):
            assert loss < LOSS_TOLERANCE, case
            assert gradient < GRADIENT_TOLERANCE, case


# (degrees, module, routing, tokens of a rank, experts of a token, dtype, with FSDP)
Bare = tuple[dict[str, int], str, str, int, int, torch.dtype, bool]
FP32, BF16 = torch.float32, torch.bfloat16
BARE: dict[int, list[Bare]] = {
    2: [
        ({"shard": 2, "ep": 2, "zero": 3}, "mixtral", "to the first", TOKENS, 2, FP32, False),  # the second rank gets no row
        ({"shard": 2, "ep": 2, "zero": 3}, "mixtral", "to the first", TOKENS, 2, FP32, True),
        ({"shard": 2, "ep": 2, "zero": 3}, "mixtral", "spread", 1, 2, FP32, False),
        ({"shard": 2, "ep": 2, "zero": 3}, "mixtral", "spread", TOKENS, 4, FP32, True),  # more than a rank has
        ({"shard": 2, "ep": 2, "zero": 3}, "mixtral", "spread", TOKENS, 2, BF16, False),
        ({"shard": 2, "etp": 2, "zero": 3}, "gpt-oss", "spread", TOKENS, 2, FP32, True),
        ({"tp": 2}, "mixtral", "spread", TOKENS, 2, FP32, True), ({"tp": 2, "ep": 2}, "mixtral", "spread", TOKENS, 2, FP32, True),
        ({"tp": 2, "etp": 2}, "mixtral", "spread", TOKENS, 2, FP32, False), ({"cp": 2, "ep": 2}, "mixtral", "spread", TOKENS, 2, FP32, False),
        ({"shard": 2, "ep": 2, "zero": 3}, "listed", "spread", TOKENS, 2, FP32, False),
        ({"shard": 2, "etp": 2, "zero": 3}, "listed", "spread", TOKENS, 2, FP32, True), ({"tp": 2}, "listed", "to the first", 1, 1, FP32, True),
    ],
    4: [
        ({"tp": 2, "shard": 2, "ep": 2, "zero": 3}, "gpt-oss", "spread", TOKENS, 2, FP32, True),
        ({"tp": 2, "cp": 2, "ep": 2, "etp": 2}, "gpt-oss", "spread", TOKENS, 2, FP32, False),
        ({"tp": 2, "shard": 2, "zero": 3}, "mixtral", "to the first", TOKENS, 2, FP32, True),
        ({"shard": 4, "ep": 4, "zero": 3}, "mixtral", "to the first", 1, 2, FP32, True),
        ({"shard": 4, "ep": 2, "zero": 3}, "listed", "to the first", TOKENS, 2, FP32, True),
        ({"tp": 2, "shard": 2, "ep": 2, "etp": 2}, "listed", "spread", TOKENS, 2, FP32, False),
    ],
}  # fmt: skip


class _Layer(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *args: Tensor) -> Tensor:
        return self.experts(*args)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))  # type: ignore[no-any-return]


class ListedExperts(nn.Module):
    """What a user writes: one module for each expert, and a loop over those that have tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(Mlp() for _ in range(EXPERTS))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for i, mlp in enumerate(self.mlps):
            token, choice = torch.where(top_k_index == i)
            if len(token):
                out = out.index_add(0, token, mlp(hidden[token]) * top_k_weights[token, choice, None])
        return out


LISTED = {"up.weight": "S0", "up.bias": "S0", "down.weight": "S1", "down.bias": "P"}


def _module(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_local_experts": EXPERTS}
    if kind == "listed":
        return ListedExperts().to(dtype)
    made: nn.Module = GptOssExperts(GptOssConfig(**sizes)) if kind == "gpt-oss" else MixtralExperts(MixtralConfig(**sizes))
    made.config._experts_implementation = "grouped_mm" if dtype == FP32 else "eager"  # type: ignore[union-attr]
    for p in made.parameters():
        nn.init.normal_(p, std=0.5)
    return made.to(dtype)


def _place(module: nn.Module, kind: str, mesh: Mesh) -> None:
    if kind == "listed":
        place_experts(module, mesh, experts=EXPERTS, params=LISTED, listed="mlps")
    else:
        params = BIASED if kind == "gpt-oss" else GATED
        place_experts(module, mesh, experts=EXPERTS, params=params, sizes={"num_experts": EXPERTS // mesh["ep"].size()})


def _routed(how: str, tokens: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the experts of each ("spread", or the first k), and their weights."""
    torch.manual_seed(2)
    chosen = torch.stack([torch.randperm(EXPERTS)[:k] for _ in range(tokens)])
    return torch.randn(tokens, WIDTH), chosen if how == "spread" else torch.arange(k).repeat(tokens, 1), torch.rand(tokens, k)


def _error(found: Tensor, wanted: Tensor) -> float:
    """The worst error over the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))


def _ran(cases: list[Bare], one_unit: bool) -> list[float]:
    """The worst error of output and gradients. A rank's loss is the sum over its own tokens."""
    if not one_unit:
        runtime._fsdp = None
    ranks, rank, found = dist.get_world_size(), dist.get_rank(), []
    for degrees, kind, how, tokens, k, dtype, fsdp in cases:
        announce(f"{kind} {degrees} {how} {tokens} tokens {dtype}")
        hidden, index, weights = _routed(how, tokens * ranks, k)
        target, whole = torch.randn(tokens * ranks, WIDTH), _module(kind, dtype)
        full = [x.to(dtype).requires_grad_() for x in (hidden, weights)]
        wanted = whole(full[0], index, full[1])
        losses = degrees.get("replicate", 1) * degrees.get("shard", 1) * degrees.get("cp", 1)
        ((wanted.float() * target).sum() / losses).backward()
        reference = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
        mesh, layer = Mesh("cpu", **degrees), _Layer(_module(kind, dtype))
        _place(layer.experts, kind, mesh)
        if fsdp:
            fully_shard_layer(layer, [layer.experts], mesh)
        mine = [x.detach().chunk(ranks)[rank].requires_grad_() for x in full]
        out = layer(mine[0], index.chunk(ranks)[rank], mine[1])
        (out.float() * target.chunk(ranks)[rank]).sum().backward()
        errors = [_error(out, wanted.chunk(ranks)[rank])]
        errors += [_error(x.grad, y.grad.chunk(ranks)[rank] * losses) for x, y in zip(mine, full, strict=True)]  # type: ignore[arg-type, union-attr]
        packed = {"gate_up_proj": (1, 2)} if kind == "mixtral" and mesh["etp"].size() > 1 else {}
        for name, p in layer.experts.named_parameters():
            assert p.grad is not None, name
            whole_gradient = gather_full(p.grad, packed.get(name))
            errors.append(_error(whole_gradient, reference[name] if name in reference else torch.zeros_like(whole_gradient)))
        found.append(max(errors))
    return found


@pytest.mark.parametrize("one_unit", [True, False], ids=["one unit of FSDP", "experts as a unit of their own"])
@pytest.mark.parametrize("ranks", BARE)
def test_experts_take_any_routing_on_any_mesh(ranks: int, one_unit: bool) -> None:
    """No rows for a rank, one token, more experts a token than a rank has, bf16, biases, lists; tensor- and context-parallel ranks."""
    for errors in run(ranks, _ran, BARE[ranks], one_unit):
        for case, error in zip(BARE[ranks], errors, strict=True):
            assert error < (2e-2 if case[5] == BF16 else 2e-6), case


@pytest.mark.parametrize("degrees", [{"ep": 64}, {"ep": 8, "etp": 2}])
def test_deepseek_experts_of_full_size_run_on_fake_tensors(degrees: dict[str, int]) -> None:
    """A rank of 64 with DeepSeek-V3's shapes: as many rows for every rank, forward and backward, without a number being read."""
    dist.init_process_group("fake", rank=5, world_size=64, store=FakeStore())
    try:
        mesh = Mesh("cpu", shard=64, zero=3, **degrees)
        config = DeepseekV3Config()
        config._experts_implementation = "grouped_mm"
        with FakeTensorMode(allow_non_fake_inputs=True), balanced_routing():
            torch.set_default_dtype(torch.bfloat16)
            module = DeepseekV3Experts(config)
            place_experts(module, mesh, experts=256, params=GATED, sizes={"num_experts": 256 // degrees["ep"]})
            hidden = torch.randn(4096, 7168, dtype=torch.bfloat16, requires_grad=True)
            index, weights = torch.zeros(4096, 8, dtype=torch.int64), torch.rand(4096, 8, requires_grad=True)
            out = module(hidden, index, weights)
            assert (out.shape, out.dtype) == (hidden.shape, hidden.dtype)
            out.sum().backward()
            assert None not in (hidden.grad, weights.grad)
            part = 2 * 2048 // degrees.get("etp", 1)
            assert module.gate_up_proj.to_local().shape == (256 // degrees["ep"], part, 7168)  # type: ignore[operator, union-attr]
            assert module.gate_up_proj.grad.to_local().shape == module.gate_up_proj.to_local().shape  # type: ignore[operator, union-attr]
    finally:
        torch.set_default_dtype(torch.float32)
        dist.destroy_process_group()


def test_tables_say_how_an_expert_is_split(models: dict[str, tuple[str, ModelGraph]]) -> None:
    """Packed gate and up by pieces, experts of a rank as the module's own size, and a reason where a degree is impossible."""
    graph = models["mixtral"][1]
    (table,) = expert_tables(graph, Layout(dp=4, ep=2, etp=2))
    assert (table.module, table.layers, table.experts) == ("mlp.experts", (0, 1, 2, 3), 4)
    assert (table.params, table.sizes) == (GATED, {"num_experts": 2})
    (table,) = expert_tables(graph, Layout(tp=2, sp=True))
    assert (set(table.params.values()), table.sizes) == ({"I"}, {})
    assert expert_tables(graph, Layout(dp=4)) == ()
    assert [t.layers for t in expert_tables(models["deepseek"][1], Layout(dp=4, ep=4))] == [(1, 2, 3)]
    with pytest.raises(NotExperts, match="4 experts of mlp.experts are not divisible by 3"):
        expert_tables(graph, Layout(dp=3, ep=3))
    assert "no multiple of 8" in why_not(models["qwen3-moe"][1], tp=1, ep=1, etp=4)
    assert why_not(graph, tp=1, ep=4, etp=2) == ""


PLAIN = """
import sys

sys.path.insert(0, {folder!r})
from test_experts import WIDTH, EXPERTS, ListedExperts, nn, torch


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.router, self.experts = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, EXPERTS), ListedExperts()

    def forward(self, x):
        h = self.norm(x).flatten(0, 1)
        weights, index = self.router(h).softmax(-1).topk(2)
        return x + self.experts(h, index, weights).view(x.shape)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Block() for _ in range(3)), nn.Linear(WIDTH, 4)

    def forward(self, input):
        input = self.embed(input)
        for block in self.blocks:
            input = block(input)
        return self.head(input)


def build():
    return Model()


def sample(batch, seq):
    return {{"input": torch.randn(batch, 16, WIDTH)}}
"""


def test_a_list_of_experts_is_traced_as_grouped_products(tmp_path: Path) -> None:
    """Its loop over experts is data-dependent; the graph has its two products, every expert's parameters, and how to split them."""
    (tmp_path / "plain_experts.py").write_text(PLAIN.format(folder=str(Path(__file__).parent)))
    graph = trace(f"{tmp_path / 'plain_experts.py'}:build", seq=SEQ)
    block = next(b for b in graph.blocks if b.repeated)
    first, last = [op for op in block.ops if op.kind == "experts"]
    assert first.dims == {"m": 2 * SEQ, "n": INNER, "k": WIDTH, "experts": EXPERTS}
    assert last.forward.flops.per_sample == 2 * 2 * SEQ * INNER * WIDTH
    assert sum(v.startswith("param:") for v in (*first.inputs, *last.inputs)) == 4 * EXPERTS
    (table,) = expert_tables(graph, Layout(dp=4, ep=2, etp=2))
    assert (table.module, table.listed, table.params) == ("experts", "mlps", LISTED)


def test_the_traced_list_of_experts_computes_what_the_module_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for the module while tracing, with its grouped linear layers computed."""

    def grouped(layers: list[nn.Linear], offs: Tensor, x: Tensor) -> Tensor:
        ends = [int(e) for e in offs]
        return torch.cat([F.linear(x[a:b], m.weight, m.bias) for m, a, b in zip(layers, [0, *ends], ends, strict=False)])

    monkeypatch.setattr(ops, "_grouped", grouped)
    module = ListedExperts()
    hidden, index, weights = _routed("spread", TOKENS, 2)
    wanted = module(hidden, index, weights)
    with ops.grouped_experts(module):
        assert _error(module(hidden, index, weights), wanted) < 1e-6


def test_only_equal_experts_behind_the_boundary_are_a_list() -> None:
    """Experts of unlike shapes, parameters beside them, or other arguments: the module is traced as it is written."""
    unlike, beside = ListedExperts(), ListedExperts()
    unlike.mlps[0].up = nn.Linear(WIDTH, 2 * INNER)
    beside.scale = nn.Parameter(torch.ones(1))
    assert ops.expert_list(ListedExperts()) is not None
    assert [ops.expert_list(m) for m in (unlike, beside, Mlp(), nn.Sequential(Mlp(), Mlp()))] == [None] * 4


def _listed(made: Plan, source: str) -> tuple[float, float, float, set[str]]:
    """On a rank: errors of the loss, of the worst gradient and of the norm of a planned model with a list of experts, and what it has."""
    build, whole = import_target(source)[1], torch.randn(BATCH, SEQ, WIDTH, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = build()
    torch.manual_seed(0)
    parallel = apply(made, build())
    wanted = model(whole).square().mean()
    wanted.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    count, rank = BATCH // made.layout.dp, parallel.data_parallel_rank
    loss = parallel.train_step({made.model.inputs[0].name: whole[rank * count : (rank + 1) * count]})
    found = parallel.full_gradients()
    worst = max(_error(g, gradients[n]) for n, g in found.items() if gradients[n] is not None)
    norm = sum(float(g.square().sum()) for g in gradients.values() if g is not None) ** 0.5
    return _error(loss, wanted), worst, abs(float(parallel.clip_gradients(1.0)) / norm - 1), set(found)


@pytest.mark.parametrize(
    "fix",
    [
        {"dp": 2, "ep": 2, "zero": 1}, {"dp": 4, "ep": 2, "etp": 2, "zero": 0}, {"dp": 2, "tp": 2, "sp": True, "ep": 2, "zero": 3},
        {"dp": 2, "pp": 2, "ep": 2, "zero": 2, "schedule": "1f1b"},
    ],
    ids=lambda fix: "-".join(f"{k}{v}" for k, v in fix.items()),
)  # fmt: skip
def test_a_list_of_experts_runs_as_planned(fix: dict[str, Any], tmp_path: Path) -> None:
    """Each rank keeps its own experts under their own names; loss, gradients and their norm are those of one process."""
    source = f"{tmp_path / 'plain_experts.py'}:build"
    (tmp_path / "plain_experts.py").write_text(PLAIN.format(folder=str(Path(__file__).parent)))
    world = fix.get("dp", 1) * fix.get("tp", 1) * fix.get("pp", 1)
    made = plan(trace(source, seq=SEQ, precision="fp32"), f"{world}xcpu", global_batch=BATCH, seq=SEQ, fix={"tp": 1, "pp": 1, "cp": 1, **fix})
    assert isinstance(made, Plan), made
    ranks = run(world, _listed, made, source)

    assert all(loss <= 1e-6 and gradient <= 5e-6 and norm <= 1e-6 for loss, gradient, norm, _ in ranks), ranks
    every = {f"blocks.{i}.experts.mlps.{e}.up.weight" for i in range(3) for e in range(EXPERTS)}
    held = [names & every for *_, names in ranks]
    assert set().union(*held) == every
    assert all(len(names) <= len(every) // 2 for names in held)
