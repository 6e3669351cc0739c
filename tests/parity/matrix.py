"""Cases that together hold every pair of choices that the planner's space has: a greedy covering array over the layouts themselves."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.plan import Layout
from meshwright.planner.solve import prepare
from meshwright.planner.space import CHOICES, FIXABLE, Space
from meshwright.profiling.cluster import Cluster, Host, parse_cluster
from meshwright.profiling.graph import ModelGraph

WORLDS = (2, 4, 8)
ASKED_WORLD = 4  # on so many ranks also what a layout has only where it is asked for
BATCH = 16
SMALL, FULL = 60, 200
COST = 0.5  # of a rank, in cases: eight ranks take far longer than two, and hold more pairs
# What cases are drawn over. `micro_batch` is left out: it only says how many microbatches there are.
CHOSEN = (
    "tp", "sp", "cp", "cp_kind", "ep", "etp", "dp", "zero", "replicas", "pp", "vpp", "schedule", "recompute", "loss", "offload", "state_dtype",
)  # fmt: skip
MODES = ("none", "selective", "full")
COLUMNS = {key: i for i, key in enumerate(("model", *CHOSEN))}
Value = tuple[str, Any]


@dataclass(frozen=True)
class Case:
    """A model and the layout that its plan must have; `stages` is what each stage recomputes, in how many of its first layers (-1: all)."""

    model: str
    layout: Layout
    stages: tuple[tuple[str, int], ...] = ()

    @property
    def world(self) -> int:
        return self.layout.devices

    @property
    def fix(self) -> dict[str, Any]:
        """What the planner must not choose: all of the layout, but for recompute by stage, which it is given afterwards."""
        fixed = {k: getattr(self.layout, k) for k in FIXABLE}
        return {k: "none" if v == "by stage" else v for k, v in fixed.items()}

    @property
    def values(self) -> tuple[Value, ...]:
        """The choices that the case makes; those that mean nothing in its layout are left out."""
        x = self.layout
        moot = {"cp_kind": x.cp == 1, "schedule": x.pp == 1, "vpp": x.pp == 1, "sp": x.tp == 1, "zero": x.dp * x.cp == 1, "replicas": x.zero == 0}
        return (("model", self.model), *((k, getattr(x, k)) for k in CHOSEN if not moot.get(k)))

    def __str__(self) -> str:
        x = self.layout
        parts = [self.model, f"tp{x.tp}{'sp' if x.sp else ''}"] + [f"{x.cp_kind}{x.cp}"] * (x.cp > 1)
        parts += [f"ep{x.ep}etp{x.etp}"] * (x.ep * x.etp > 1) + [f"pp{x.pp}v{x.vpp}", x.schedule] * (x.pp > 1)
        parts += [f"dp{x.dp // x.replicas}x{x.replicas}" if x.replicas > 1 else f"dp{x.dp}", f"zero{x.zero}", f"mb{x.micro_batch}", x.loss]
        parts += ["offload"] * (x.offload != "none") + ["bf16state"] * (x.state_dtype != "fp32")
        recompute = [f"{mode}{n if n >= 0 else ''}" for mode, n in self.stages] or [x.recompute]
        return "-".join([*parts, *recompute])


def cluster_of(world: int) -> Cluster:
    """So many CPU ranks of a host with memory of its own, to which optimizer state may go."""
    return parse_cluster(f"{world}xcpu").model_copy(update={"host": Host(memory_bytes=2**36, bandwidth_Bps=1e9)})


def spaces(graphs: Mapping[str, ModelGraph], worlds: Iterable[int] = WORLDS) -> Iterator[tuple[str, Space]]:
    """The planner's space of each model on so many CPU ranks; blocks are sharded once for all of them."""
    for model, graph in graphs.items():
        known: dict[Any, Any] = {}
        for world in worlds:
            asked = prepare(graph, cluster_of(world), global_batch=BATCH, seq=graph.seq)
            yield model, Space(graph, asked.cluster, asked.workload, {}, asked.costs, known=known)


class Matrix:
    """Cases drawn from spaces in an order in which each adds the most pairs that no earlier one has. The same for the same seed."""

    def __init__(self, found: Iterable[tuple[str, Space]], seed: int = 0) -> None:
        draw = random.Random(seed)
        self.candidates = _candidates(found, draw)
        ids: dict[Value, int] = {}
        rows = np.full((len(self.candidates), 1 + len(CHOSEN)), -1)
        for row, case in zip(rows, self.candidates, strict=True):
            for key, value in case.values:
                row[COLUMNS[key]] = ids.setdefault((key, value), len(ids))
        pairs = [np.where((x < 0) | (y < 0), -1, x * len(ids) + y) for x, y in combinations(rows.T, 2)]
        # [candidates, pairs of columns] numbers of the pairs that each has; 0 where one of the two means nothing
        known, held = np.unique(np.append(np.stack(pairs, 1), -1), return_inverse=True)
        self._held, self.coverable = held[:-1].reshape(len(rows), -1).astype(np.int32), len(known) - 1
        self._cost = np.array([1 + COST * c.world for c in self.candidates])
        self.cases = self._drawn()

    def full(self) -> list[Case]:
        """Every coverable pair, and at least FULL cases."""
        return self.cases

    def small(self) -> list[Case]:
        """The SMALL cases that add the most."""
        return self.cases[:SMALL]

    def coverage(self, cases: Iterable[Case]) -> float:
        """Share of the coverable pairs that cases have."""
        return len({p for c in cases for p in combinations(c.values, 2)}) / self.coverable

    def _drawn(self) -> list[Case]:
        picked: list[int] = []
        left = self._uncovered()
        for row in self._together():
            picked.append(self._best(left, picked, row))
            left[self._held[picked[-1]]] = False
        complete = False
        while len(picked) < min(FULL, len(self.candidates)) or not complete:
            if not left.any():  # every pair once more, in other cases
                complete, left = True, self._uncovered()
                continue
            best = self._best(left, picked)
            if not left[self._held[best]].any():
                complete, left = True, self._uncovered()
                best = self._best(left, picked)
            picked.append(best)
            left[self._held[best]] = False
        return [self.candidates[i] for i in picked]

    def _uncovered(self) -> NDArray[np.bool_]:
        return np.append(False, np.ones(self.coverable, bool))

    def _best(self, left: NDArray[np.bool_], picked: list[int], among: NDArray[np.bool_] | None = None) -> int:
        """The candidate with the most pairs that are left for what its ranks cost; the first of equals."""
        gain = left[self._held].sum(1) / self._cost
        gain[picked] = -1
        return int(np.argmax(gain if among is None else np.where(among, gain, -1)))

    def _together(self) -> Iterator[NDArray[np.bool_]]:
        """For each model, its candidates with as many as there are of tensor, data and pipeline parallelism at once."""
        for model in dict.fromkeys(c.model for c in self.candidates):
            kinds = np.array([(c.model == model) * ((c.layout.tp > 1) + (c.layout.dp > 1) + (c.layout.pp > 1)) for c in self.candidates])
            yield kinds == kinds.max()


def _candidates(found: Iterable[tuple[str, Space]], draw: random.Random) -> list[Case]:
    """Every layout with each way to recompute, fewest ranks first, else in random order; one microbatch size of each, drawn among those with
    few microbatches: gloo takes long over many, and two of each stage fill and drain a pipeline."""
    cases = []
    for model, space in found:
        alike: dict[tuple[Layout, tuple[str, ...]], list[Layout]] = {}
        usual = _layouts(space)
        for x, modes in (*usual.items(), *(_asked(space, usual) if space.cluster.size == ASKED_WORLD else ())):
            alike.setdefault((x.model_copy(update={"micro_batch": 1}), modes), []).append(x)
        for (_, modes), sizes in alike.items():
            few = [x for x in sizes if BATCH // (x.dp * x.micro_batch) <= 2 * x.pp * x.vpp] or sizes
            for mode in (*modes, *(["by stage"] if modes == MODES else [])):
                x = draw.choice(few).model_copy(update={"recompute": mode})
                cases.append(Case(model, x, _by_stage(x.pp, draw) if mode == "by stage" else ()))
    draw.shuffle(cases)
    return sorted(cases, key=lambda c: c.world)


def _layouts(space: Space) -> dict[Layout, tuple[str, ...]]:
    """Every layout, and the ways in which its stages may recompute."""
    found: dict[Layout, tuple[str, ...]] = {}
    for mode in MODES if space.graph.layers else MODES[:1]:
        for x in space.holding({"recompute": mode}).layouts():
            found[x] = (*found.get(x, ()), mode)
    return found


def _asked(space: Space, usual: Iterable[Layout]) -> Iterator[tuple[Layout, tuple[str, ...]]]:
    """Layouts with the choices that are made only where they are asked for, each alone."""
    seen = {(key, getattr(x, key)) for x in usual for key in CHOICES}
    for key in (k for k in CHOICES if k != "recompute"):
        for name in CHOICES[key]:
            if (key, name) not in seen:
                yield from ((x, modes) for x, modes in _layouts(space.holding({key: name})).items() if getattr(x, key) == name)


def _by_stage(stages: int, draw: random.Random) -> tuple[tuple[str, int], ...]:
    """What each stage recomputes, in one layer or in all; not nothing everywhere, nor all of one stage alone."""
    modes = draw.choices(MODES, k=stages)
    modes[draw.randrange(stages)] = draw.choice(MODES[1:])
    return tuple((m, 0 if m == "none" else draw.choice((1, -1)) if stages > 1 else 1) for m in modes)
