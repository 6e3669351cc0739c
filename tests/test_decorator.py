"""parallelize: every row of its table of behaviour, in one process, as a dry run, and on forked and torchrun's ranks."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent / "parity"))
from harness import run

from meshwright import DoesNotFit, InputError, Plan, Workload, parallelize, plan, trace
from meshwright.codegen.apply import PlanMismatch
from meshwright.planner.solve import Infeasible
from meshwright.profiling.graph import ModelGraph
from meshwright.report.terminal import render_infeasible

SEQ, BATCH, CLASSES = 16, 16, 64
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 5e-6
LLAMA = transformers.LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, vocab_size=CLASSES,
    max_position_embeddings=32, tie_word_embeddings=True,
)  # fmt: skip
for _name in ("torch.distributed.tensor._redistribute", "transformers"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks between an embedding and a projection, with initial weights of its own and a buffer. ids [batch, tokens] -> logits"""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Embedding(CLASSES, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, CLASSES)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, width))
        self.shift = torch.linspace(-0.1, 0.1, width)
        for name, p in self.named_parameters():
            if name.endswith("down.weight"):
                nn.init.normal_(p, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * self.scale + self.shift
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Scored(Net):
    """The same with a loss of its own."""

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, -2), labels.flatten(), label_smoothing=0.1)


def _batch() -> dict[str, Tensor]:
    """A whole optimizer step of Net, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return {k: torch.randint(0, CLASSES, (BATCH, SEQ), generator=generator) for k in ("ids", "labels")}


def _net(cls: type[Net] = Net) -> Net:
    torch.manual_seed(0)
    return cls()


def _loss(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), labels.flatten())


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}


def _plan(model: nn.Module, world: int, **fix: Any) -> Plan:
    graph = trace(model, seq=SEQ, precision="fp32", sample=_batch() if isinstance(model, Net) else None)
    made = plan(graph, f"{world}xcpu", global_batch=BATCH, seq=SEQ, fix=fix)
    assert isinstance(made, Plan)
    return made


@contextmanager
def _logged() -> Iterator[list[logging.LogRecord]]:
    """What meshwright logs meanwhile."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = found.append  # type: ignore[method-assign]
    log = logging.getLogger("meshwright")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


# --- one process -------------------------------------------------------------------------------------------------------


def test_an_instance_in_one_process_computes_bit_for_bit_what_it_did() -> None:
    """Output, gradients, buffers and the random stream are the plain model's; the plan is trivial and told in one line."""
    plain, sample = _net(), _batch()
    before, stream = copy.deepcopy(plain.state_dict()), torch.get_rng_state()
    with _logged() as said:
        made = parallelize(plain, sample=sample)

    assert torch.equal(torch.get_rng_state(), stream)
    assert (made.plan.layout.devices, [r.levelname for r in said]) == (1, ["INFO"])
    out, expected = made(sample["ids"]), plain(ids=sample["ids"])
    assert torch.equal(out, expected)
    for output in (out, expected):
        _loss(output, sample["labels"]).backward()
    found = _gradients(made)
    assert list(found) == list(_gradients(plain))
    assert all(torch.equal(g, found[n]) for n, g in _gradients(plain).items())
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in before.items())
    with torch.no_grad():
        made.get_parameter("head.weight").zero_()
    assert torch.equal(plain.head.weight, before["head.weight"])  # the argument is not touched


def test_a_class_in_one_process_constructs_exactly_what_it_does_undecorated() -> None:
    """The same parameters from the same seed, and the random stream goes on as it would."""
    plain = _net()
    stream = torch.get_rng_state()

    @parallelize(sample=_batch())
    class Wide(Net):
        pass

    torch.manual_seed(0)
    made = Wide(32, depth=4)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(p, dict(made.named_parameters())[n]) for n, p in plain.named_parameters())
    assert torch.equal(made(_batch()["ids"]), plain(_batch()["ids"]))


def test_bare_on_a_class_of_transformers_needs_no_sample() -> None:
    """@parallelize alone: the class says what it takes; the output is the model's own."""
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(LLAMA)
    torch.manual_seed(0)
    made = parallelize(transformers.LlamaForCausalLM)(LLAMA)
    ids = _batch()["ids"]

    assert torch.equal(made(input_ids=ids, labels=ids).loss, plain(input_ids=ids, labels=ids).loss)
    assert list(made.state_dict()) == list(plain.state_dict())
    assert made.config is made._whole.config
    assert made.config.use_cache == plain.config.use_cache
    assert (made.plan.workload.seq, made.plan.workload.global_batch) == (32, 8)


def test_train_step_in_one_process_leaves_the_gradients_of_the_whole_batch() -> None:
    """Inputs by name, in order or as one tensor; a loss of the model's own is used."""
    sample = _batch()
    for cls in (Net, Scored):
        plain = _net(cls)
        loss = getattr(plain, "loss", _loss)
        made = parallelize(plain, sample=sample)
        expected = loss(plain(sample["ids"]), sample["labels"])
        expected.backward()
        for inputs in (sample["ids"], (sample["ids"],), {"ids": sample["ids"]}):
            made.zero_grad()
            torch.testing.assert_close(made.train_step(inputs, sample["labels"]), expected.detach())
            for n, g in _gradients(made).items():
                torch.testing.assert_close(g, plain.get_parameter(n).grad)


def test_the_result_is_a_module_with_the_models_own_names() -> None:
    """Attributes, submodules, train and eval, state in and out."""
    plain = _net()
    made = parallelize(plain.eval(), sample=_batch())
    assert isinstance(made, nn.Module)
    assert (made.width, made.blocks[1].norm.normalized_shape) == (32, (32,))
    assert not made.blocks[0].training
    assert made.train().blocks[0].training
    assert [n for n, _ in made.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [n for n, _ in made.named_buffers()] == ["scale"]
    other = Net()
    made.load_state_dict(other.state_dict())
    assert torch.equal(made.head.weight, other.head.weight)
    with pytest.raises(AttributeError, match="no_such"):
        _ = made.no_such


def test_explain_says_why_and_prices_another_choice() -> None:
    """Without a question, the plan as the command line shows it; with one, the answer of a search."""
    made = parallelize(_net(), sample=_batch())
    assert made.explain().startswith("Plan  tp=1 pp=1 dp=1")
    assert made.explain("micro_batch=4").startswith("Why not micro_batch=4")
    assert made.explain(made.plan.layout.model_copy(update={"micro_batch": 2})).startswith("Why not micro_batch=2")
    assert made.explain({"tp": 2}).startswith("Why not tp=2  impossible")
    with pytest.raises(InputError, match="it is tp=1 pp=1"):
        made.explain(made.plan.layout)


def test_disabled_by_the_environment_it_returns_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """MESHWRIGHT_DISABLE=1 is the identity, bare or with arguments."""
    monkeypatch.setenv("MESHWRIGHT_DISABLE", "1")
    model = _net()
    assert parallelize(model, cluster="8xH100-SXM") is model
    assert parallelize(Net) is Net
    assert parallelize(cluster="8xH100-SXM")(Net) is Net


# --- nothing fits ------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_as_on_the_command_line() -> None:
    """By how much, the least that is needed and what would fit: the text of `meshwright plan`."""
    with pytest.raises(DoesNotFit) as refused:
        parallelize(_net(), sample=_batch(), memory_limit="100KB")

    graph = trace(_net(), seq=SEQ, precision="fp32", sample=_batch())
    expected = plan(graph, "1xcpu", global_batch=BATCH, seq=SEQ, limit="100KB")
    assert isinstance(expected, Infeasible)
    alike = refused.value.refusal.model_copy(update={"solver": expected.solver})
    assert alike == expected
    assert str(refused.value) == render_infeasible(refused.value.refusal)


def test_with_warn_the_plain_module_goes_on() -> None:
    """The refusal is logged, and the model computes as it did."""
    plain, sample = _net(), _batch()
    with _logged() as said:
        made = parallelize(plain, sample=sample, memory_limit="100KB", on_infeasible="warn")
    assert ([r.levelname for r in said], made.plan) == (["WARNING"], None)
    assert made.explain() == said[0].getMessage()
    assert torch.equal(made(sample["ids"]), plain(sample["ids"]))
    torch.testing.assert_close(made.train_step(sample["ids"], sample["labels"]), _loss(plain(sample["ids"]), sample["labels"]).detach())


# --- a dry run ---------------------------------------------------------------------------------------------------------


def test_a_cluster_without_its_ranks_is_a_dry_run() -> None:
    """Outputs are fake tensors of the right shapes; dry_run says what a rank holds and sends."""
    sample = _batch()
    wanted = _plan(_net(), 4, tp=2, dp=2, pp=1, zero=2)
    made = parallelize(_net(), sample=sample, cluster="4xcpu", plan=wanted)
    mine = sample["ids"][: BATCH // 2]
    out, loss = made(mine), made.train_step(mine, sample["labels"][: BATCH // 2])

    assert type(out).__name__ == type(loss).__name__ == "FakeTensor"
    assert (out.shape, loss.shape) == ((BATCH // 2, SEQ, CLASSES), ())
    record = made.dry_run()
    assert record.by_kind["parameters"] < 4 * sum(p.numel() for p in _net().parameters())
    assert {t.group for t in record.collectives} >= {"tp"}
    assert not dist.is_initialized()


def test_a_class_that_no_machine_holds_is_planned_from_its_construction() -> None:
    """Nothing of it is allocated: 10 G parameters on 16 GPUs that are not here."""
    before = torch.get_rng_state()
    made = parallelize(Net, sample=_batch(), cluster="2x8xH100-SXM")(16384, 9)
    assert sum(p.numel() for p in made.parameters()) > 9e9
    assert all(p.is_meta for p in made.parameters())
    assert (made.plan.layout.devices, made.plan.workload.precision) == (16, "bf16")
    assert torch.equal(torch.get_rng_state(), before)


# --- mistakes ----------------------------------------------------------------------------------------------------------


def test_a_plan_for_other_ranks_is_a_mismatch_with_the_way_out(tiny_llama: ModelGraph) -> None:
    """What was needed, what was found and what to run; a plan for another model says so too."""
    with pytest.raises(PlanMismatch, match=r"needs 4 ranks, found 1. Re-plan: .*--cluster 1xcpu"):
        parallelize(_net(), plan=_plan(_net(), 4, tp=2, dp=2))
    from_file = plan(tiny_llama, "4xcpu", global_batch=8, seq=32, fix={"tp": 1, "pp": 1, "dp": 4})
    assert isinstance(from_file, Plan)
    with pytest.raises(PlanMismatch, match=r"meshwright plan \S+llama.json --cluster 1xcpu --global-batch 8 --seq 32 -o plan.json"):
        parallelize(_net(), plan=from_file)
    with pytest.raises(PlanMismatch, match="the plan is for Net with"):
        parallelize(Net(width=64), plan=_plan(_net(), 1))


class NeedsValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.norm = float(self.weight.norm())


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"module": 3}, "takes an nn.Module or a class of them, not int"),
    ({"module": len}, "not len"),
    ({"plan": 3}, "plan is \"auto\", the path of a saved plan, or a Plan, not int"),
    ({"plan": "no-such.json"}, "plan no-such.json does not exist"),
    ({"sample": None}, "Net needs a sample of its inputs"),
    ({"sample": 3}, "sample is example tensors, a function"),
    ({"sample": {}}, "sample has no inputs"),
    ({"sample": {"ids": [1, 2]}}, "ids is list"),
    ({"sample": {"ids": torch.zeros(4, 8, dtype=torch.long), "labels": torch.zeros(5, 8, dtype=torch.long)}}, "the same one: found ids of shape"),
    ({"sample": torch.zeros(4, 8)}, "the model does not run on its sample"),
    ({"sample": lambda batch, seq: None}, "needs defaults: they are the global batch"),
    ({"sample": Workload(global_batch=4, seq=8)}, "Net needs a sample of its inputs"),
    ({"cluster": 8}, "cluster is like '8xH100-SXM', a YAML file or a Cluster, not int"),
    ({"cluster": "8xH1000"}, "unknown device 'H1000'"),
    ({"objective": "speed"}, "objective 'speed' is not known"),
    ({"memory_limit": 1.5}, "is not a share of the device"),
    ({"memory_limit": "much"}, "memory limit 'much' is neither"),
    ({"memory_limit": None}, "memory_limit is a share like 0.95"),
    ({"kernels": 3}, "kernels is 'auto', 'on', 'off' or a tuple of names"),
    ({"on_infeasible": "ignore"}, "on_infeasible 'ignore' is not known"),
    ({"module": NeedsValues, "sample": torch.zeros(4, 4)}, "NeedsValues cannot be constructed without its memory"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "says"), MISTAKES, ids=[says[:40] for _, says in MISTAKES])
def test_a_mistake_is_one_sentence(wrong: dict[str, Any], says: str) -> None:
    """What was wrong, and what would be right."""
    given = {"module": _net(), "sample": _batch(), **wrong}
    module = given.pop("module")
    with pytest.raises(InputError) as refused:
        parallelize(module, **given)() if isinstance(module, type) else parallelize(module, **given)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_wrong_calls_of_the_result_are_sentences() -> None:
    """Samples of another step, inputs that were not planned, no labels, parallel twice, derived from."""
    sample = _batch()
    made = parallelize(_net(), sample=sample)
    calls: list[tuple[Any, str]] = [
        (lambda: made.train_step(sample["ids"][:3], sample["labels"][:3]), "takes the 16 samples of this rank"),
        (lambda: made.train_step(sample["ids"]), "train_step needs labels"),
        (lambda: made.train_step({"images": sample["ids"]}, sample["labels"]), "Net takes ids"),
        (lambda: made.explain("tp"), "write one of"),
        (lambda: made.explain(3), "explain takes a choice"),
        (lambda: parallelize(made), "a module that is parallel already"),
        (lambda: type("Sub", (parallelize(Net, sample=sample),), {}), "decorate Sub and leave Net plain"),
    ]
    for call, says in calls:
        with pytest.raises(InputError, match=says):
            call()


# --- ranks -------------------------------------------------------------------------------------------------------------

Found = tuple[float, dict[str, Tensor], Tensor]  # loss, gradients by name, and the whole output


def _reference(model: nn.Module) -> Found:
    sample = _batch()
    out = model(sample["ids"])
    out = out if isinstance(out, Tensor) else out.logits
    loss = model.loss(out, sample["labels"]) if isinstance(model, Scored) else _loss(out, sample["labels"])
    loss.backward()
    return loss.item(), _gradients(model), out.detach()


def _parity(model: nn.Module, made: Plan, wanted: Found) -> tuple[float, float, float]:
    """On a rank: errors of loss, gradients and forward's output; the group that was there is used and stays."""
    group = dist.group.WORLD
    parallel = parallelize(model, plan=made)
    count = BATCH // made.layout.dp
    mine = slice(parallel.data_parallel_rank * count, (parallel.data_parallel_rank + 1) * count)
    sample = {k: v[mine] for k, v in _batch().items()}
    loss = parallel.train_step((sample["ids"],), sample["labels"]).item()
    gradients = parallel.parallel.full_gradients()
    floor = 1e-3 * max(float(g.abs().max()) for g in wanted[1].values())
    worst = max(float((g - wanted[1][n]).abs().max()) / max(float(wanted[1][n].abs().max()), floor) for n, g in gradients.items())
    off = 0.0
    if made.layout.pp == 1:
        out = parallel(sample["ids"])
        off = float(((out if isinstance(out, Tensor) else out.logits) - wanted[2][mine]).abs().max())
    else:
        with pytest.raises(InputError, match="call train_step"):
            parallel(sample["ids"])
    assert dist.group.WORLD is group
    assert {n for n, _ in parallel.named_parameters()} <= {n for n, _ in model.named_parameters(remove_duplicate=False)}
    return abs(loss - wanted[0]) / wanted[0], worst, off


LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("net", 2, {"dp": 2, "zero": 2}), ("net", 2, {"tp": 2}), ("net", 4, {"tp": 2, "sp": True, "dp": 2, "zero": 3}),
    ("net", 4, {"pp": 2, "dp": 2, "zero": 1}),
    ("scored", 2, {"dp": 2, "zero": 3}), ("llama", 2, {"tp": 2}), ("llama", 4, {"pp": 2, "tp": 2}),
]  # fmt: skip


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(LLAMA).train() if name == "llama" else _net(Scored if name == "scored" else Net)


@pytest.mark.parametrize(("name", "world", "fix"), LAYOUTS, ids=[f"{n}-{'-'.join(f'{k}{v}' for k, v in f.items())}" for n, _, f in LAYOUTS])
def test_ranks_compute_what_one_process_does(name: str, world: int, fix: dict[str, Any]) -> None:
    """Loss and gradients of a step, and where a rank has it the output, for an instance that every rank has."""
    made = _plan(_model(name), world, **{"tp": 1, "pp": 1, "dp": 1, "cp": 1, **fix})
    for loss, gradient, output in run(world, _parity, _model(name), made, _reference(_model(name))):
        assert loss <= LOSS_TOLERANCE
        assert gradient <= GRADIENT_TOLERANCE
        assert output <= 1e-5


def _fused(made: Plan) -> dict[str, tuple[tuple[str, ...], float]]:
    """On a rank: the kernels in the plan, and the loss with them, by what was asked for."""
    found = {}
    for kernels in ("off", "on", "auto"):
        parallel = parallelize(_model("llama"), plan=made, kernels=kernels)
        count = BATCH // made.layout.dp
        mine = slice(parallel.data_parallel_rank * count, (parallel.data_parallel_rank + 1) * count)
        sample = {k: v[mine] for k, v in _batch().items()}
        loss = parallel.train_step((sample["ids"],), sample["labels"]).item()
        found[kernels] = tuple(k.name for k in parallel.plan.solution.kernels), loss
    return found


def test_kernels_are_those_that_were_asked_for() -> None:
    """None with "off", those that the cost model chooses with "on", those of the plan with "auto"; the loss is the same."""
    made = _plan(_model("llama"), 2, tp=2, sp=True)
    for found in run(2, _fused, made):
        assert found["off"] == found["auto"]
        assert found["off"][0] == ()
        assert {"swiglu", "vocab"} <= {n.partition("_")[0] for n in found["on"][0]}
        assert found["on"][1] == pytest.approx(found["off"][1], rel=1e-6)


def _constructed(name: str, made: Plan | None, seed: int) -> dict[str, Any]:
    """On a rank: the weights of a class, whole, as far as this rank's stage has them, and the loss that they give."""
    torch.manual_seed(seed)
    stream = torch.get_rng_state()
    cls: Any = transformers.LlamaForCausalLM if name == "llama" else Net
    parallel = parallelize(cls, plan=made or "auto", sample=_batch() if name == "net" else None)(*([LLAMA] if name == "llama" else []))
    assert torch.equal(torch.get_rng_state(), stream)
    assert not any(t.is_meta for t in (*parallel.parameters(), *parallel.buffers()))
    return {n: p.numpy() for n, p in parallel.parallel.full_parameters().items()}


@pytest.mark.parametrize("name", ["net", "llama"])
def test_a_class_has_the_same_weights_on_any_layout(name: str) -> None:
    """They depend on the seed alone, not on the ranks, and no rank held the model."""
    found = []
    for world, fix in ((2, {"tp": 2}), (4, {"pp": 2, "dp": 2, "zero": 3}), (2, {"pp": 2})):
        made = _plan(_model(name), world, **{"tp": 1, "pp": 1, "dp": 1, **fix})
        found.append({n: p for rank in run(world, _constructed, name, made, 7) for n, p in rank.items()})
    first = found[0]
    names = {n for n, _ in _model(name).named_parameters()}
    for other in found:
        assert names <= set(other)
        assert all((other[n] == first[n]).all() for n in names)
    assert float(first["head.weight" if name == "net" else "model.embed_tokens.weight"].std()) > 0.01


def _from_state(made: Plan) -> bool:
    """On a rank: a whole state and its own state fill it alike."""
    whole = _net().state_dict()
    parallel = parallelize(Net, plan=made, sample=_batch())()
    parallel.load_state_dict(whole)
    right = all(torch.equal(p, whole[n]) for n, p in parallel.parallel.full_parameters().items())
    held = {n: t.clone() for n, t in parallel.state_dict().items()}
    with torch.no_grad():
        for p in parallel.parameters():
            p.zero_()
    parallel.load_state_dict(held)
    with pytest.raises(InputError, match="the state has no head.weight, which Net needs"):
        parallel.load_state_dict({n: t for n, t in whole.items() if n != "head.weight"})
    return right and all(torch.equal(p, whole[n]) for n, p in parallel.parallel.full_parameters().items())


def test_a_state_fills_ranks() -> None:
    """From whole tensors of a plain model, and from what state_dict gave."""
    assert all(run(4, _from_state, _plan(_net(), 4, tp=2, dp=2, zero=3, pp=1)))


def _refusals(made: Plan) -> list[str]:
    """On a rank: what is raised here of mistakes that one rank, or all, make."""
    rank, told = dist.get_rank(), []
    attempts: list[dict[str, Any]] = [
        {"module": _net(), "plan": made},
        {"module": Net(width=32 + 32 * rank), "sample": _batch()},
        {"module": _net(), "sample": _batch(), "memory_limit": "100KB"},
        {"module": _net(), "sample": _batch() if rank else torch.zeros(4, 4)},
        {"module": _net(), "sample": _batch(), "plan": "auto" if rank else made},
    ]
    for given in attempts:
        try:
            parallelize(given.pop("module"), **given)
            told.append("")
        except Exception as e:
            told.append(f"{type(e).__name__}: {e}")
    return told


def test_what_one_rank_does_wrong_all_ranks_say() -> None:
    """Another world, another model on one rank, nothing that fits, a sample that only rank 0 has wrong, another plan on one rank."""
    ranks = run(2, _refusals, _plan(_net(), 4, tp=2, dp=2))
    heads = (
        "PlanMismatch: the plan needs 4 ranks, found 2", "PlanMismatch: rank 1 has another model than rank 0",
        "DoesNotFit: No plan  Net does not fit", "InputError: ", "PlanMismatch: rank 1 was given another plan",
    )  # fmt: skip
    for told in ranks:
        assert [t.startswith(h) for t, h in zip(told, heads, strict=True)] == [True] * len(heads), told
    assert [t.partition("; proven")[0] for t in ranks[0]] == [t.partition("; proven")[0] for t in ranks[1]]


SCRIPT = '''
import torch
from torch import nn
from meshwright import parallelize
from test_decorator import Net, _batch

@parallelize(sample=_batch())
class Model(Net):
    pass

torch.manual_seed(0)
model = Model()
optimizer = model.make_optimizer(lr=1e-2)
sample = {k: v[: len(v) // model.plan.layout.dp] for k, v in _batch().items()}
losses = []
for _ in range(3):
    losses.append(model.train_step({"ids": sample["ids"]}, sample["labels"]).item())
    model.clip_gradients(1.0)
    optimizer.step()
    optimizer.zero_grad()
ranks = torch.distributed.get_world_size()
print(f"ranks={ranks} backend={torch.distributed.get_backend()} devices={model.plan.layout.devices} falls={losses[2] < losses[0]}", flush=True)
torch.distributed.destroy_process_group()
'''


def test_under_torchrun_it_joins_the_group_that_the_environment_describes(tmp_path: Path) -> None:
    """A script that says nothing of ranks trains on two."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ranks=2 backend=gloo devices=2 falls=True") == 2
