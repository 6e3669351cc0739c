"""Plans compute what one process computes: loss and every gradient of layouts drawn from the planner's own space, through apply and as an
emitted script."""

from __future__ import annotations

import gc
import importlib
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from harness import RankError, announce, run
from matrix import BATCH, FULL, SMALL, WORLDS, Case, Matrix, cluster_of, spaces
from models import MODELS, SEQ, build, make_batch, write_models

from meshwright.codegen.apply import apply, packed_parameters
from meshwright.codegen.emit import emit
from meshwright.codegen.runtime.weights import gather_full
from meshwright.planner.plan import Layout, Plan, Stage
from meshwright.planner.solve import plan
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.loading import main_output
from meshwright.profiling.trace import trace
from tests.made_plans import recomputing

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 5e-6
SEED = 3
PER_FORK = 6  # cases that share forked ranks
for _name in ("torch.distributed.tensor._redistribute", "transformers"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore")

Found = tuple[float, dict[str, Tensor]]  # loss, and gradients by name
Errors = tuple[float, dict[str, float]]  # of the loss, and of gradients by name


def _errors(found: Found, wanted: Found) -> Errors:
    """The relative error of the loss, and of each gradient relative to its largest value (or to a thousandth of the model's)."""
    floor = 1e-3 * max(float(g.abs().max()) for g in wanted[1].values())
    errors = {n: float((g - wanted[1][n]).abs().max()) / max(float(wanted[1][n].abs().max()), floor) for n, g in found[1].items()}
    return abs(found[0] - wanted[0]) / abs(wanted[0]), errors


def _named_gradients(parts: Sequence[nn.Module], packed: Mapping[str, tuple[int, int]], duplicates: bool) -> dict[str, Tensor]:
    held = {n.removeprefix("model."): p for part in parts for n, p in part.named_parameters(remove_duplicate=not duplicates)}
    return {n: gather_full(p.grad, packed.get(n)) for n, p in held.items() if p.grad is not None}


def _one_process(source: str, graph: ModelGraph) -> Found:
    """Loss and gradients of the plain model."""
    model = build(source)
    inputs, labels = make_batch(graph, BATCH)
    out = main_output(model(**inputs))
    assert out is not None
    loss = F.mse_loss(out, labels) if labels.is_floating_point() else F.cross_entropy(out.flatten(0, -2).float(), labels.flatten())
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
    for name in [n for n in sys.modules if n.split(".")[0] in ("train", "tables", "runtime") or n.startswith("tiny_")]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        trainer = importlib.import_module("train").Trainer(torch.device("cpu"), SEED)
    finally:
        sys.path.remove(str(folder))
    loss = trainer.step(0).item()
    return loss, _named_gradients(trainer.parts, packed_parameters(made), duplicates)


def _references(source: str, graph: ModelGraph, made: Plan, folder: Path) -> list[tuple[float, dict[str, Any]]]:
    """On one rank: the plain model, and the script of a plan for one device."""
    both = [_one_process(source, graph), _scripted(made, folder, duplicates=True)]
    return [(loss, {n: g.numpy() for n, g in gradients.items()}) for loss, gradients in both]


def _on_rank(work: list[tuple[str, Plan, Path]], source: str, graph: ModelGraph, plain: Found, script: Found) -> list[tuple[Errors, Errors]]:
    """On every rank: the errors of each plan through apply and as a script."""
    found = []
    for name, made, folder in work:
        announce(f"{name} through apply")
        through_apply = _errors(_applied(made, source, graph), plain)
        announce(f"{name} as a script")
        found.append((through_apply, _errors(_scripted(made, folder), script)))
        gc.collect()
    return found


class Bench:
    """Draws, plans, emits and runs cases, several in one fork; keeps what came out."""

    def __init__(self, folder: Path, whole: bool) -> None:
        self.folder = folder
        self.sources = write_models(folder)
        self.graphs = {name: trace(source, seq=SEQ, precision="fp32") for name, source in self.sources.items()}
        self.matrix = Matrix(spaces(self.graphs))
        self.cases = self.matrix.full() if whole else self.matrix.small()
        self._references: dict[str, list[Found]] = {}

    def references(self, model: str) -> list[Found]:
        """Loss and gradients of one process: of the plain model, and of the one-device script."""
        if model not in self._references:
            made, folder = self.emitted(Case(model, Layout(micro_batch=BATCH)))
            [both] = run(1, _references, self.sources[model], self.graphs[model], made, folder)
            self._references[model] = [(loss, {n: torch.from_numpy(g) for n, g in gradients.items()}) for loss, gradients in both]
        return self._references[model]

    def emitted(self, case: Case) -> tuple[Plan, Path]:
        """The planner's own plan of a case, and the folder of its script."""
        made = plan(self.graphs[case.model], cluster_of(case.world), global_batch=BATCH, seq=SEQ, fix=case.fix)
        assert isinstance(made, Plan), made
        assert all(getattr(made.layout, k) == v for k, v in case.fix.items())
        if case.stages:
            made = recomputing(made, [_recompute(s, *own) for s, own in zip(made.solution.stages, case.stages, strict=True)])
        folder = self.folder / str(case)
        emit(made, folder)
        return made, folder

    def wrong(self, model: str, world: int) -> dict[str, str]:
        """Runs a model's cases on so many ranks; what is wrong with each that does not compute what one process does."""
        wrong: dict[str, str] = {}
        references = self.references(model)
        left = {str(c): c for c in self.cases if (c.model, c.world) == (model, world)}
        while left:
            group = dict(list(left.items())[:PER_FORK])
            work = [(name, *self.emitted(c)) for name, c in group.items()]
            try:
                ranks = run(world, _on_rank, work, self.sources[model], self.graphs[model], *references)
            except RankError as e:
                broken = next(name for name in group if e.doing.startswith(f"{name} "))
                wrong[broken] = str(e)
                del left[broken]  # and the others of its fork once more
                continue
            for i, name in enumerate(group):
                said = filter(None, (self._compared(model, through, [r[i] for r in ranks]) for through in (0, 1)))
                wrong |= {name: "; ".join(words)} if (words := list(said)) else {}
                del left[name]
        return wrong

    def _compared(self, model: str, through: int, ranks: list[tuple[Errors, Errors]]) -> str:
        """What differs from one process, on any rank: the loss, gradients by name, or which gradients there are."""
        way = ("through apply", "as a script")[through]
        wanted = set(self.references(model)[through][1])
        found = [r[through] for r in ranks]
        if not max(loss for loss, _ in found) <= LOSS_TOLERANCE:
            return f"{way}: loss differs by {max(loss for loss, _ in found):.2g}"
        off = {n: e for _, errors in found for n, e in errors.items() if not e <= GRADIENT_TOLERANCE}
        if off:
            return f"{way}: gradients differ: {', '.join(f'{n} {e:.2g}' for n, e in off.items())}"
        seen = {n for _, errors in found for n in errors}
        seen |= {n for names in self.graphs[model].tied if seen & set(names) for n in names}
        return f"{way}: gradients of {sorted(seen ^ wanted)} are missing or too many" if seen != wanted else ""


def _recompute(stage: Stage, mode: str, count: int) -> dict[str, Any]:
    layers = sum(b - a for a, b in stage.chunks or (stage.layers,))
    return {"recompute": mode, "recompute_layers": None if mode == "none" else layers if count < 0 else min(count, layers)}


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Bench:
    return Bench(tmp_path_factory.mktemp("parity"), request.config.getoption("--parity-full"))


def test_cases_cover_the_space(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """All cases have every pair of choices that some layout has; the few have every family with tensor, data and, where it has a sequence of
    layers, pipeline parallelism at once. They are the same at every run."""
    few, every = bench.matrix.small(), bench.matrix.full()
    assert bench.matrix.coverage(every) == 1.0
    assert len(few) == SMALL
    assert len(set(map(str, every))) == len(every) >= FULL
    for model, graph in bench.graphs.items():
        layouts = [c.layout for c in few if c.model == model]
        assert any(x.tp > 1 and x.dp > 1 and (x.pp > 1 or graph.program is None) for x in layouts), model
    two = {name: bench.graphs[name] for name in ("vit", "unet")}
    assert Matrix(spaces(two)).full() == Matrix(spaces(two)).full()
    with capsys.disabled():
        print(f"\nparity: {len(few)} cases cover {bench.matrix.coverage(few):.1%} of {bench.matrix.coverable} pairs, {len(every)} cover all")


@pytest.mark.parametrize("world", WORLDS, ids="{}ranks".format)
@pytest.mark.parametrize("model", MODELS)
def test_parity(bench: Bench, model: str, world: int) -> None:
    """Every layout drawn has the loss and every gradient of one process: a model that apply sharded, those of the plain model; an emitted
    script, those of the script for one device, from whose weights it starts."""
    wrong = bench.wrong(model, world)
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())
