"""What of a step is enough to know all of it: a few layers of a kind, and the microbatches that fill the pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from meshwright.planner.plan import Layout, Plan, Stage
from meshwright.profiling.structure import kinds_of

FEW, MORE = 4, 5  # layers of a kind that a shortened chunk keeps: two at each end, where it can peak, and one between
Kind = tuple[int, str]  # of layer, and what it recomputes
Length = tuple[Kind, int]  # chunks with equally many layers of a kind grow together


def spans_of(stage: Stage) -> tuple[tuple[int, int], ...]:
    """First and last layer of each chunk of a stage, the last not included."""
    return stage.chunks or (stage.layers,)


def enough_microbatches(x: Layout, m: int, *, on_cpu: bool = False) -> tuple[int, int]:
    """Two numbers of microbatches from the smaller of which on the pipeline is full: a step grows linearly from there. (m, m) if m is smaller.

    `on_cpu`: gloo keeps what it sent last while the pipeline filled.
    """
    late = 2 if on_cpu else 0
    if x.vpp > 1 and x.schedule in ("interleaved", "zero-bubble"):  # in whole rounds, until every chunk has gradients and one more
        rounds = 4 if x.schedule == "zero-bubble" else 3  # it puts them off
        fewer, few = rounds * x.pp, (rounds + 1) * x.pp
    elif x.schedule in ("zbv", "dualpipev"):  # full with 2 pp (costmodel/schedules.py)
        fewer, few = 2 * x.pp + 1 + late, 2 * x.pp + 2 + late
    elif x.schedule == "zero-bubble":
        fewer, few = [n for n in range(x.pp + 2 + late, 4 * x.pp + 8) if n % max(1, n // x.pp) == 0][:2]  # torch takes no others
    else:
        few = max(x.pp + 2 + late, 4)
        fewer = few - 1
    return (few, fewer) if few < m else (m, m)


class Cut:
    """The layers of a stage, by chunk and kind, and which of them a run keeps."""

    def __init__(self, plan: Plan, stage: int, model: nn.Module) -> None:
        own = plan.solution.stages[stage]
        self.spans = spans_of(own)
        alike = kinds_of([model.get_submodule(p) for p in plan.model.layer_paths])
        layers = [i for span in self.spans for i in range(*span)]
        recompute = {i: own.recompute_of(n) for n, i in enumerate(layers)}  # layers that recompute otherwise are of another kind
        self.kinds: list[list[Kind]] = [[(alike[i], recompute[i]) for i in range(*span)] for span in self.spans]
        self.lengths: set[Length] = {(k, n) for kinds in self.kinds for k, n in Counter(kinds).items()}

    @property
    def long(self) -> list[Length]:
        """Which are shortened."""
        return sorted((x for x in self.lengths if x[1] > FEW), key=str)

    def keep(self, longer: Length | None = None) -> list[list[int]]:
        """The layers of each chunk that a short run keeps; of those of one length it keeps one more."""
        most: Mapping[Length, int] = {x: min(x[1], MORE if x == longer else FEW) for x in self.lengths}
        return [
            [span[0] + i for i, k in enumerate(kinds) if kinds[i:].count(k) <= most[k, kinds.count(k)]]
            for span, kinds in zip(self.spans, self.kinds, strict=True)
        ]


def shortened(plan: Plan, stage: int, kept: Sequence[Sequence[int]] | None, microbatches: int) -> tuple[Plan, tuple[str, ...]]:
    """The plan with `microbatches` and, of this stage's layers, those of each chunk that are `kept`, of every other chunk its first.

    Returns the paths of the layers that are left as well.
    """
    x, s = plan.layout, plan.solution
    workload = plan.workload.model_copy(update={"global_batch": microbatches * x.dp * x.micro_batch})
    if kept is None:
        return plan.model_copy(update={"workload": workload}), plan.model.layer_paths
    chosen = [[list(c) for c in kept] if i == stage else [[first] for first, _ in spans_of(other)] for i, other in enumerate(s.stages)]
    flat = sorted(layer for chunks in chosen for chunk in chunks for layer in chunk)
    at = {layer: i for i, layer in enumerate(flat)}
    stages = [_with_layers(o, c, at) for o, c in zip(s.stages, chosen, strict=True)]
    groups = [g.model_copy(update={"layers": tuple(at[i] for i in g.layers if i in at)}) for g in s.layer_shardings]
    experts = [e.model_copy(update={"layers": tuple(at[i] for i in e.layers if i in at)}) for e in s.experts]
    paths = tuple(plan.model.layer_paths[i] for i in flat)
    assert s.program is not None
    program = s.program.model_copy(update={"layers": paths})
    held = {"stages": tuple(stages), "program": program, "layer_shardings": tuple(g for g in groups if g.layers), "experts": tuple(experts)}
    model = plan.model.model_copy(update={"layers": len(flat), "layer_paths": paths})
    return plan.model_copy(update={"workload": workload, "solution": s.model_copy(update=held), "model": model}), paths


def _with_layers(stage: Stage, chosen: Sequence[Sequence[int]], at: Mapping[int, int]) -> Stage:
    """A stage whose chunks have the layers `chosen`, renumbered by `at`."""
    spans = tuple((at[chunk[0]], at[chunk[-1]] + 1) for chunk in chosen)
    covered = stage.recompute_layers
    if covered is not None:
        layers = [i for span in spans_of(stage) for i in range(*span)][:covered]
        covered = sum(i in layers for chunk in chosen for i in chunk)
    return stage.model_copy(update={"layers": spans[0], "chunks": spans if stage.chunks else (), "recompute_layers": covered})
