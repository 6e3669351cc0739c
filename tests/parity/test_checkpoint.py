"""Checkpoints hold the model's own tensors: what one layout wrote, another reads bit for bit and trains on from."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent))
from harness import run
from models import SEQ, build, make_batch, write_models

from meshwright.codegen.apply import Parallel, apply, make_optimizer, packed_parameters
from meshwright.codegen.runtime import checkpoint
from meshwright.codegen.runtime.experts import place_experts
from meshwright.codegen.runtime.mesh import Mesh
from meshwright.codegen.runtime.optimizer import Streamed
from meshwright.codegen.runtime.shards import named_tensors
from meshwright.codegen.runtime.weights import gather_full
from meshwright.planner.plan import Plan
from meshwright.planner.solve import plan
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.trace import trace

BATCH, STEPS = 16, 3
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
Arrays = dict[str, np.ndarray[Any, Any]]
FSDP4 = {"dp": 4, "zero": 3}
TP2_FSDP2 = {"tp": 2, "dp": 2, "zero": 2}
PP2_TP2 = {"pp": 2, "tp": 2}
ZBV: dict[str, Any] = {"pp": 2, "vpp": 2, "schedule": "zbv"}  # the first rank holds both ends of the model
ONE: dict[str, Any] = {}


class Model:
    """A tiny model: what the planner reads, and plans of given layouts."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.graph: ModelGraph = trace(source, seq=SEQ, precision="fp32")

    def plan(self, **layout: Any) -> Plan:
        ranks = layout.get("dp", 1) * layout.get("tp", 1) * layout.get("pp", 1)
        micro = {"micro_batch": BATCH // layout.get("dp", 1) // (2 * layout.get("pp", 1))} if ranks > 1 else {}
        fixed = {"tp": 1, "pp": 1, "dp": 1, "zero": 0, "recompute": "none", **micro, **layout}
        made = plan(self.graph, f"{ranks}xcpu", global_batch=BATCH, seq=SEQ, fix=fixed)
        assert isinstance(made, Plan), made
        return made


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Tiny models by name."""
    sources = write_models(tmp_path_factory.mktemp("models"))
    made: dict[str, Model] = {}

    def find(name: str) -> Model:
        if name not in made:
            made[name] = Model(sources[name])
        return made[name]

    return find


class Run:
    """A model that trains on this rank."""

    def __init__(self, model: Model, made: Plan) -> None:
        self.model, self.made = model, made
        self.parallel: Parallel = apply(made, build(model.source))
        self.optimizer = make_optimizer(made, self.parallel.stage, lr=1e-2)
        self.options: dict[str, Any] = {"packed": packed_parameters(made), "tied": made.model.tied}

    def step(self) -> float:
        inputs, labels = make_batch(self.model.graph, BATCH)
        count = BATCH // self.made.layout.dp
        mine = slice(self.parallel.data_parallel_rank * count, (self.parallel.data_parallel_rank + 1) * count)
        loss = self.parallel.train_step({k: v[mine] for k, v in inputs.items()}, labels[mine]).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def save(self, folder: Path, step: int) -> None:
        checkpoint.save(folder, step, named_tensors(self.parallel.stage), self.optimizer, **self.options)

    def load(self, folder: Path) -> int | None:
        return checkpoint.load(folder, named_tensors(self.parallel.stage), self.optimizer, **self.options)

    def state(self) -> Arrays:
        """Parameters and optimizer state of this rank's stages, whole, by canonical name."""
        found = {}
        for name, p in self.parallel.named_parameters():
            own = next((g[0] for g in self.made.model.tied if name in g), name)
            found[own] = gather_full(p, self.options["packed"].get(name)).numpy().copy()
            for key, value in self.optimizer.state[p].items():
                whole = gather_full(value, self.options["packed"].get(name)) if value.dim() else value
                found[f"{own}:{key}"] = whole.numpy().copy()
        return found


def _train_and_save(model: Model, made: Plan, folder: Path) -> tuple[Arrays, float]:
    """The state after some steps, which is saved, and the loss of the next step."""
    trained = Run(model, made)
    for _ in range(STEPS):
        trained.step()
    trained.save(folder, STEPS)
    return trained.state(), trained.step()


def _load_and_save(model: Model, made: Plan, folder: Path, onward: Path) -> tuple[Arrays, float]:
    """The state after loading, which is saved again, and the loss of the next step."""
    resumed = Run(model, made)
    assert resumed.load(folder) == STEPS
    resumed.save(onward, STEPS)
    return resumed.state(), resumed.step()


def _merged(ranks: list[tuple[Arrays, float]]) -> tuple[Arrays, float]:
    """The state of all stages; ranks that hold the same tensor hold the same values."""
    found: Arrays = {}
    for state, _ in ranks:
        for name, value in state.items():
            assert np.array_equal(found.setdefault(name, value), value), name
    return found, ranks[0][1]


@pytest.mark.parametrize(
    ("name", "chain"),
    [
        ("llama", (FSDP4, TP2_FSDP2, PP2_TP2, ONE)),
        ("gpt2", (PP2_TP2, ZBV, TP2_FSDP2, ONE)),
        ("mixtral", ({"dp": 2, "zero": 3}, ONE, {"pp": 2})),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_any_layout_reads_what_another_wrote(models: Any, tmp_path: Path, name: str, chain: tuple[dict[str, Any], ...]) -> None:
    """Handed on from layout to layout, parameters and AdamW's state stay the same to the bit, and the next step has the same loss."""
    model = models(name)
    made = [model.plan(**layout) for layout in chain]
    wanted, loss = _merged(run(made[0].layout.devices, _train_and_save, model, made[0], tmp_path / "0"))
    assert {n.partition(":")[2] for n in wanted} == {"", "exp_avg", "exp_avg_sq", "step"}
    assert {n for n in wanted if ":" not in n} == {n for n, _ in build(model.source).named_parameters()}
    for i, p in enumerate(made[1:]):
        found, next_loss = _merged(run(p.layout.devices, _load_and_save, model, p, tmp_path / f"{i}", tmp_path / f"{i + 1}"))
        assert set(found) == set(wanted)
        assert not [n for n in wanted if not np.array_equal(found[n], wanted[n])]
        assert abs(next_loss - loss) <= 1e-6 * loss


def _losses(model: Model, made: Plan, folder: Path, steps: int, doomed: int | None = None) -> dict[int, float]:
    """Losses by step, from the newest checkpoint on, with one every two steps; in the middle of the one at `doomed` the last rank dies."""
    trained = Run(model, made)
    losses = {}
    for step in range(trained.load(folder) or 0, steps):
        losses[step] = trained.step()
        if step + 1 == doomed and made.layout.devices == torch.distributed.get_rank() + 1:
            _die_after_writing()
        if step % 2:
            trained.save(folder, step + 1)
    return losses


def _die_after_writing() -> None:
    written = checkpoint.dcp.FileSystemWriter.write_data

    def write_data(*args: Any) -> NoReturn:
        written(*args)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    checkpoint.dcp.FileSystemWriter.write_data = write_data  # type: ignore[method-assign]


def test_a_rank_killed_while_saving_costs_only_the_steps_since_the_last_whole_checkpoint(models: Any, tmp_path: Path) -> None:
    """What is half written is never read: another layout resumes from the checkpoint before it, with the losses of an unbroken run."""
    model = models("llama")
    [unbroken] = run(1, _losses, model, model.plan(), tmp_path / "unbroken", 6)
    assert sorted(p.name for p in (tmp_path / "unbroken").iterdir()) == ["step-000004", "step-000006"]
    folder = tmp_path / "broken"
    with pytest.raises(RuntimeError):
        run(4, _losses, model, model.plan(**PP2_TP2), folder, 6, 4)
    assert sorted(p.name for p in folder.iterdir()) == ["step-000002", "step-000004.partial"]
    assert checkpoint.latest(folder) == folder / "step-000002"
    resumed = run(4, _losses, model, model.plan(**FSDP4), folder, 6)[0]
    assert sorted(resumed) == [2, 3, 4, 5]
    assert all(abs(resumed[s] - unbroken[s]) <= 1e-5 * unbroken[s] for s in resumed)
    assert sorted(p.name for p in folder.iterdir()) == ["step-000004", "step-000006"]


def _stepped(model: nn.Module) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
    """A model after a step of AdamW whose gradients are the weights themselves."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    for p in model.parameters():
        p.grad = p.detach().clone()
    optimizer.step()
    return dict(model.named_parameters()), optimizer


def _save_experts(source: str, folder: Path, ep: int, etp: int) -> None:
    """On a rank: fused experts over ep and etp, with FSDP over the ranks that share them; one step, and a checkpoint."""
    model: Any = build(source)
    mesh = Mesh("cpu", shard=4, ep=ep, etp=etp, zero=3)
    packed = {}
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            packed[f"{path}.gate_up_proj"] = (1, 2)
            place_experts(module, mesh, experts=module.num_experts, params={"gate_up_proj": "S1x2", "down_proj": "S2"})
            fully_shard(module, mesh=mesh.expert_state())
    fully_shard(model, mesh=mesh.state())
    checkpoint.save(folder, 1, *_stepped(model), packed=packed)


@pytest.mark.parametrize(("ep", "etp"), [(2, 2), (2, 1), (1, 2)])
def test_experts_are_written_whole(models: Any, tmp_path: Path, ep: int, etp: int) -> None:
    """Fused experts over expert and expert-tensor ranks are read by one process as they would be there, with their moments."""
    source = models("mixtral").source
    run(4, _save_experts, source, tmp_path, ep, etp)
    (ours, optimizer), other = _stepped(build(source)), build(source)
    again = torch.optim.AdamW(other.parameters())
    assert checkpoint.load(tmp_path, dict(other.named_parameters()), again) == 1
    for name, p in other.named_parameters():
        assert torch.equal(p, ours[name]), name
        assert all(torch.equal(value, optimizer.state[ours[name]][key]) for key, value in again.state[p].items()), name


class _Net(nn.Module):
    """Parameters of several sizes, and a buffer that is saved."""

    def __init__(self, width: int = 6, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, width) for _ in range(layers))
        self.norm = nn.BatchNorm1d(width)


def _tensors(net: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def test_one_process_needs_no_process_group(tmp_path: Path) -> None:
    """Without torch.distributed, tensors, buffers and SGD's momentum come back as they were, and nothing is found in an empty folder."""
    torch.manual_seed(1)
    net, other = _Net(), _Net()
    ours, theirs = (torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9) for n in (net, other))
    assert checkpoint.load(tmp_path, _tensors(other), theirs) is None
    net.norm(net.layers[1](net.layers[0](torch.randn(4, 6)))).square().sum().backward()
    ours.step()
    checkpoint.save(tmp_path, 1, _tensors(net), ours)
    assert checkpoint.load(tmp_path, _tensors(other), theirs) == 1
    assert all(torch.equal(a, b) for a, b in zip(_tensors(net).values(), _tensors(other).values(), strict=True))
    moments = [[o.state[p]["momentum_buffer"] for p in n.parameters()] for o, n in ((ours, net), (theirs, other))]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


def test_narrower_state_on_the_host_is_kept_and_read_as_such(tmp_path: Path) -> None:
    """An optimizer that streams bf16 moments writes what any AdamW reads, which keeps them in its own type."""
    torch.manual_seed(1)
    net = _Net()
    streamed = Streamed(functools.partial(torch.optim.AdamW, lr=0.1), net.parameters(), dtype=torch.bfloat16, device="cpu")
    net.norm(net.layers[1](net.layers[0](torch.randn(4, 6)))).square().sum().backward()
    streamed.step()
    checkpoint.save(tmp_path, 1, _tensors(net), streamed)
    wanted = [streamed.state[p] for p in net.parameters()]
    again = Streamed(functools.partial(torch.optim.AdamW, lr=0.1), net.parameters(), dtype=torch.bfloat16, device="cpu")
    plain = torch.optim.AdamW(net.parameters(), lr=0.1)
    for optimizer, dtype in ((again, torch.bfloat16), (plain, torch.float32)):
        assert checkpoint.load(tmp_path, _tensors(net), optimizer) == 1
        found = [optimizer.state[p] for p in net.parameters()]
        assert all(f[k].dtype == dtype for f in found for k in ("exp_avg", "exp_avg_sq"))
        assert all(torch.equal(f[k].float(), w[k].float()) for f, w in zip(found, wanted, strict=True) for k in w)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: _Net(layers=3), "is a checkpoint of another model: it has no tensor layers.2.weight"),
        (lambda: _Net(layers=1), "is a checkpoint of another model: it has a tensor layers.1.weight, which this one has not"),
        (lambda: _Net(width=7), r"is a checkpoint of another model: layers.0.weight is \[6, 6\] there and \[7, 6\] here"),
    ],
    ids=["more", "fewer", "wider"],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, other: Callable[[], nn.Module], words: str) -> None:
    """One sentence names the first tensor that differs."""
    checkpoint.save(tmp_path, 1, _tensors(_Net()))
    with pytest.raises(checkpoint.CheckpointMismatch, match=words):
        checkpoint.load(tmp_path, _tensors(other()))


def test_another_optimizer_and_an_older_step_are_refused(tmp_path: Path) -> None:
    """State of SGD is no state of AdamW, and a folder that is further on is not written back in time."""
    net = _Net()
    checkpoint.save(tmp_path, 5, _tensors(net), torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(checkpoint.CheckpointMismatch, match="holds the state of SGD, this run uses AdamW"):
        checkpoint.load(tmp_path, _tensors(net), torch.optim.AdamW(net.parameters()))
    with pytest.raises(checkpoint.CheckpointMismatch, match="already holds step 5"):
        checkpoint.save(tmp_path, 4, _tensors(net))


def _refused(folder: Path) -> str:
    """What a rank raises: the last rank has another shape, so every rank must stop."""
    net = _Net(width=7 if torch.distributed.get_rank() == 1 else 6)
    try:
        checkpoint.load(folder, _tensors(net))
    except (checkpoint.CheckpointMismatch, SystemExit) as e:
        return f"{type(e).__name__}: {e}"
    return "went on"


def test_the_first_rank_speaks_for_all(tmp_path: Path) -> None:
    """What is wrong on another rank is said by rank 0, and the other ranks leave without a word."""
    checkpoint.save(tmp_path, 1, _tensors(_Net()))
    said = run(2, _refused, tmp_path)
    assert said[0].startswith("CheckpointMismatch: ")
    assert "layers.0.weight is [6, 6] there and [7, 6] here" in said[0]
    assert said[1] == "SystemExit: 0"


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """Older checkpoints make room once a newer one is whole."""
    net = _Net()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, _tensors(net), keep=2)
    checkpoint.save(tmp_path, 3, _tensors(net), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]
