"""Plans compute what one process computes: loss and gradients of every kind of layout, through apply and as an emitted script."""

from __future__ import annotations

import gc
import importlib
import logging
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from harness import run
from models import SEQ, build, make_batch, write_models

from meshwright.codegen.apply import apply, packed_parameters
from meshwright.codegen.emit import emit
from meshwright.codegen.runtime.weights import gather_full
from meshwright.planner.plan import Plan
from meshwright.planner.solve import plan
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.loading import main_output
from meshwright.profiling.trace import trace
from tests.made_plans import recomputing

BATCH = 16
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 5e-6
SEED = 3
PER_FORK = 8  # cases that share forked ranks
for _name in ("torch.distributed.tensor._redistribute", "transformers"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore")


@dataclass(frozen=True)
class Case:
    """A model and the layout that its plan must have."""

    model: str
    tp: int = 1
    sp: bool = False
    pp: int = 1
    dp: int = 1
    zero: int = 0
    recompute: str = "none"
    stages: tuple[tuple[str, int], ...] = ()  # recompute of each stage, and in how many of its first layers

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def fix(self) -> dict[str, Any]:
        """What the planner must not choose. Every pipeline is full, and data-parallel ranks accumulate over microbatches."""
        fixed: dict[str, Any] = {"tp": self.tp, "sp": self.sp, "pp": self.pp, "dp": self.dp, "zero": self.zero, "recompute": self.recompute}
        if self.pp > 1 or self.dp > 1:
            fixed["micro_batch"] = BATCH // self.dp // (2 * self.pp)
        return fixed

    def __str__(self) -> str:
        degrees = [f"tp{self.tp}{'sp' if self.sp else ''}"] * (self.tp > 1) + [f"pp{self.pp}"] * (self.pp > 1)
        degrees += [f"dp{self.dp}-zero{self.zero}"] * (self.dp > 1)
        recompute = [f"{mode}{layers}" for mode, layers in self.stages] or [self.recompute]
        return "-".join([self.model, f"{self.world}ranks", *degrees, *recompute])


# every kind of layout, on the fewest ranks that have it
KINDS: list[dict[str, Any]] = [
    *({"dp": 2, "zero": z} for z in range(4)), {"tp": 2}, {"tp": 2, "sp": True}, {"pp": 2}, {"tp": 2, "dp": 2, "zero": 2},
    {"pp": 2, "dp": 2, "zero": 1}, {"pp": 2, "tp": 2, "sp": True, "dp": 2, "zero": 3},
]  # fmt: skip
WIDER: list[dict[str, Any]] = [
    {"dp": 4, "zero": 1}, {"dp": 4, "zero": 3}, {"tp": 4}, {"tp": 4, "sp": True}, {"pp": 4}, {"tp": 2, "sp": True, "dp": 2, "zero": 3},
    {"pp": 2, "dp": 2, "zero": 3}, {"dp": 8, "zero": 0}, {"dp": 8, "zero": 2}, {"tp": 4, "sp": True, "dp": 2, "zero": 1},
    {"pp": 4, "dp": 2, "zero": 2}, *({"pp": 2, "tp": 2, "dp": 2, "zero": z} for z in range(3)),
]  # fmt: skip
# stages that recompute differently, or only some of their layers
BY_STAGE: list[tuple[dict[str, Any], tuple[tuple[str, int], ...]]] = [
    ({}, (("full", 2),)), ({"dp": 2, "zero": 3}, (("full", 1),)), ({"pp": 2}, (("full", 1), ("none", 0))),
    ({"pp": 2}, (("selective", 2), ("none", 0))), ({"pp": 2, "dp": 2, "zero": 2}, (("none", 0), ("full", 1))),
    ({"pp": 2, "tp": 2, "sp": True}, (("full", 1), ("selective", 2))),
]  # fmt: skip


def _cases() -> list[Case]:
    """Every kind of layout for every model with and without recompute; wider ones with each recompute in turn, all of them for Llama;
    recompute by stage in pipelines for every model."""
    found = []
    for turn, model in enumerate(("llama", "qwen3", "gpt2", "mixer")):
        found += [Case(model, **layout, recompute=r) for layout in KINDS for r in ("none", "full")]
        for i, layout in enumerate(WIDER):
            if turn == 0 or i % 3 == turn - 1:
                found.append(Case(model, **layout, recompute=("selective", "none", "full")[(i + turn) % 3]))
        found += [Case(model, **layout, stages=stages) for layout, stages in BY_STAGE if turn == 0 or len(stages) > 1 and "tp" not in layout]
    return found


CASES = _cases()
Found = tuple[float, dict[str, Tensor]]  # loss, and gradients by name
Errors = tuple[float, dict[str, float]]  # of the loss, and of gradients by name


def _errors(found: Found, wanted: Found) -> Errors:
    """The relative error of the loss, and of each gradient relative to its largest value (or to a thousandth of the model's)."""
    floor = 1e-3 * max(float(g.abs().max()) for g in wanted[1].values())
    errors = {n: float((g - wanted[1][n]).abs().max()) / max(float(wanted[1][n].abs().max()), floor) for n, g in found[1].items()}
    return abs(found[0] - wanted[0]) / abs(wanted[0]), errors


def _named_gradients(stage: nn.Module, packed: Mapping[str, tuple[int, int]], duplicates: bool) -> dict[str, Tensor]:
    held = {n.removeprefix("model."): p for n, p in stage.named_parameters(remove_duplicate=not duplicates)}
    return {n: gather_full(p.grad, packed.get(n)) for n, p in held.items() if p.grad is not None}


def _one_process(source: str, graph: ModelGraph) -> Found:
    """Loss and gradients of the plain model."""
    model = build(source)
    inputs, labels = make_batch(graph, BATCH)
    out = main_output(model(**inputs))
    assert out is not None
    loss = F.cross_entropy(out.flatten(0, -2).float(), labels.flatten())
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}


def _applied(made: Plan, source: str, graph: ModelGraph) -> Found:
    """Loss and this rank's gradients through apply."""
    parallel = apply(made, build(source))
    inputs, labels = make_batch(graph, BATCH)
    count = BATCH // made.layout.dp
    mine = slice(parallel.data_parallel_rank * count, (parallel.data_parallel_rank + 1) * count)
    loss = parallel.train_step({k: v[mine] for k, v in inputs.items()}, labels[mine]).item()
    return loss, parallel.full_gradients()


def _scripted(made: Plan, folder: Path, duplicates: bool = False) -> Found:
    """Loss and this rank's gradients of step 0 of an emitted script."""
    for name in [n for n in sys.modules if n.split(".")[0] in ("train", "tables", "runtime", "tiny_mixer")]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        trainer = importlib.import_module("train").Trainer(torch.device("cpu"), SEED)
    finally:
        sys.path.remove(str(folder))
    loss = trainer.step(0).item()
    return loss, _named_gradients(trainer.stage, packed_parameters(made), duplicates)


def _references(source: str, graph: ModelGraph, made: Plan, folder: Path) -> list[tuple[float, dict[str, Any]]]:
    """On one rank: the plain model, and the script of a plan for one device."""
    both = [_one_process(source, graph), _scripted(made, folder, duplicates=True)]
    return [(loss, {n: g.numpy() for n, g in gradients.items()}) for loss, gradients in both]


def _on_rank(work: list[tuple[Plan, Path]], source: str, graph: ModelGraph, plain: Found, script: Found) -> list[tuple[Errors, Errors]]:
    """On every rank: the errors of each plan through apply and as a script."""
    found = []
    for made, folder in work:
        found.append((_errors(_applied(made, source, graph), plain), _errors(_scripted(made, folder), script)))
        gc.collect()
    return found


class Bench:
    """Plans, emits and runs cases, several in one fork; keeps what came out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources = write_models(folder)
        self.graphs = {name: trace(source, seq=SEQ, precision="fp32") for name, source in self.sources.items()}
        self._references: dict[str, list[Found]] = {}
        self._found: dict[Case, list[tuple[Errors, Errors]] | str] = {}

    def references(self, model: str) -> list[Found]:
        """Loss and gradients of one process: of the plain model, and of the one-device script."""
        if model not in self._references:
            made, folder = self.emitted(Case(model))
            [both] = run(1, _references, self.sources[model], self.graphs[model], made, folder)
            self._references[model] = [(loss, {n: torch.from_numpy(g) for n, g in gradients.items()}) for loss, gradients in both]
        return self._references[model]

    def emitted(self, case: Case) -> tuple[Plan, Path]:
        """The planner's own plan of a case, and the folder of its script."""
        made = plan(self.graphs[case.model], f"{case.world}xcpu", global_batch=BATCH, seq=SEQ, fix=case.fix, runnable=True)
        assert isinstance(made, Plan), made
        assert all(getattr(made.layout, k) == v for k, v in case.fix.items())
        if case.stages:
            assert all(n <= s.layers[1] - s.layers[0] for (_, n), s in zip(case.stages, made.solution.stages, strict=True))
            made = recomputing(made, [{"recompute": mode, "recompute_layers": n if mode != "none" else None} for mode, n in case.stages])
        folder = self.folder / str(case)
        emit(made, folder)
        return made, folder

    def errors(self, case: Case) -> list[tuple[Errors, Errors]]:
        """Every rank's errors through apply and as a script; raises what the case raised."""
        if case not in self._found:
            alike = [c for c in CASES if (c.model, c.world) == (case.model, case.world) and c not in self._found]
            group = [case, *(c for c in alike if c != case)][:PER_FORK]
            try:
                self._run(group)
            except Exception:  # of which case, only running them alone tells
                for c in group:
                    try:
                        self._run([c])
                    except Exception as e:
                        self._found[c] = str(e)
        found = self._found[case]
        assert not isinstance(found, str), found
        return found

    def _run(self, group: list[Case]) -> None:
        model = group[0].model
        work = [self.emitted(c) for c in group]
        ranks = run(group[0].world, _on_rank, work, self.sources[model], self.graphs[model], *self.references(model))
        for i, c in enumerate(group):
            self._found[c] = [cast("tuple[Errors, Errors]", r[i]) for r in ranks]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("parity"))


def _check(bench: Bench, case: Case, through: int) -> None:
    ranks = [r[through] for r in bench.errors(case)]
    assert max(loss for loss, _ in ranks) <= LOSS_TOLERANCE
    wrong = {n: e for _, errors in ranks for n, e in errors.items() if not e <= GRADIENT_TOLERANCE}
    assert not wrong
    seen = {n for _, errors in ranks for n in errors}
    seen |= {n for names in bench.graphs[case.model].tied if seen & set(names) for n in names}
    assert seen == set(bench.references(case.model)[through][1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_apply(bench: Bench, case: Case) -> None:
    """A model that apply sharded has the loss and every gradient of the plain model in one process."""
    _check(bench, case, 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_script(bench: Bench, case: Case) -> None:
    """An emitted script starts from the weights, and has the loss and every gradient, of the script for one device."""
    _check(bench, case, 1)
