"""Layers to pipeline stages, exactly: contiguous, possibly uneven, under each stage's own memory.

A step costs (m - 1) max c + sum c + max e over the stages (costmodel/step.py), and sum c does not depend on the cut. The least
max over cuts is a dynamic program over stages (as for the linear partition problem). For each value T that c can take, from
the least on, the least max e over cuts with c <= T gives a candidate; the best of them is the best cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from meshwright.costmodel.stagememory import StageMemory


@dataclass(frozen=True)
class StageProblem:
    """One layout's layers as arrays, with what stands before the first layer and after the last.

    `c` and `e` are per layer; `before` and `after` hold both of the stem and the head. `send_s` is one transfer between stages.
    `memory` says what any interval of layers holds as any stage.
    """

    c: np.ndarray
    e: np.ndarray
    before: tuple[float, float]
    after: tuple[float, float]
    pp: int
    microbatches: int
    send_s: float
    memory: StageMemory

    @property
    def layers(self) -> int:
        return len(self.c)


@dataclass(frozen=True)
class StageCost:
    """One stage: seconds of a microbatch (transfers included), seconds once a step, live bytes at its peak."""

    c: float
    e: float
    live_bytes: float


class Stages:
    """Costs of any interval of layers as any stage, from prefix sums."""

    def __init__(self, problem: StageProblem) -> None:
        self.p = problem
        self._sum = {k: np.concatenate([[0.0], np.cumsum(getattr(problem, k))]) for k in ("c", "e")}
        self._prefix = {k: v.tolist() for k, v in self._sum.items()}

    def cost(self, first: int, last: int, stage: int) -> StageCost:
        """Layers [first, last) as `stage`."""
        p = self.p
        ends = [p.before] * (stage == 0) + [p.after] * (stage == p.pp - 1)
        c = self._between("c", first, last) + sum(x[0] for x in ends) + p.send_s * ((stage > 0) + (stage < p.pp - 1))
        e = self._between("e", first, last) + sum(x[1] for x in ends)
        known = "_matrices" in self.__dict__  # then every interval is there
        return StageCost(c, e, float(self._matrices[2][stage][first, last] if known else p.memory.live(first, last, stage)))

    def _between(self, key: str, first: int, last: int) -> float:
        return self._prefix[key][last] - self._prefix[key][first]

    @cached_property
    def _matrices(self) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """c, e and live bytes of layers [first, last) as each stage: [stage][first, last], infinite where last <= first."""
        p, n = self.p, self.p.layers
        none = np.tri(n + 1, dtype=bool)  # last <= first: no layers
        between = {k: v[None, :] - v[:, None] for k, v in self._sum.items()}
        first, last = np.nonzero(~none)
        seconds: dict[tuple[bool, bool], tuple[np.ndarray, np.ndarray]] = {}  # the stages between are alike
        c, e, live = [], [], []
        held_by_stage = p.memory.live_of_stages(first, last)
        for stage in range(p.pp):
            kind = (stage == 0, stage == p.pp - 1)
            if kind not in seconds:
                ends = [p.before] * kind[0] + [p.after] * kind[1]
                transfers = (not kind[0]) + (not kind[1])
                seconds[kind] = (
                    np.where(none, np.inf, between["c"] + sum(x[0] for x in ends) + p.send_s * transfers),
                    np.where(none, np.inf, between["e"] + sum(x[1] for x in ends)),
                )
            held = np.full((n + 1, n + 1), np.inf)
            held[first, last] = held_by_stage[stage]
            c.append(seconds[kind][0])
            e.append(seconds[kind][1])
            live.append(held)
        return c, e, live

    def _least_largest(self, cost: list[np.ndarray]) -> tuple[float, list[int]]:
        """The cut whose largest `cost[stage][first, last]` is least, and that cost; infinite if every cut has an infinite one."""
        best = np.full(self.p.layers + 1, np.inf)
        best[0] = -np.inf
        came_from = []
        for of_stage in cost:
            through = np.maximum(best[:, None], of_stage)  # [first, last]
            came_from.append(through.argmin(axis=0))
            best = through[came_from[-1], np.arange(len(best))]
        ends = [self.p.layers]
        for of_stage in reversed(came_from[1:]):
            ends.append(int(of_stage[ends[-1]]))
        return float(best[-1]), ends[::-1]

    def best(self, capacity: float) -> tuple[float, list[int]] | None:
        """The cheapest cut that fits `capacity` bytes a rank: its step seconds and stage ends; None if none fits."""
        p = self.p
        if p.pp == 1:
            ends = [p.layers]
            return (self.step(ends), ends) if self.costs(ends)[0].live_bytes <= capacity else None
        c, e, live = self._matrices
        fits = [x <= capacity for x in live]
        c = [np.where(ok, x, np.inf) for ok, x in zip(fits, c, strict=True)]
        e = [np.where(ok, x, np.inf) for ok, x in zip(fits, e, strict=True)]
        least_c, ends = self._least_largest(c)
        if not np.isfinite(least_c):
            return None
        least_e, _ = self._least_largest(e)
        total = float(p.c.sum()) + p.before[0] + p.after[0] + 2 * (p.pp - 1) * p.send_s
        found = (self.step(ends), ends)
        values = np.unique(np.concatenate([x[np.isfinite(x)] for x in c]))
        for t in values[values >= least_c]:
            if (p.microbatches - 1) * t + total + least_e >= found[0]:
                break
            _, ends = self._least_largest([np.where(x <= t, y, np.inf) for x, y in zip(c, e, strict=True)])
            step = self.step(ends)
            if step < found[0]:
                found = (step, ends)
        return found

    def step(self, ends: list[int]) -> float:
        """Step seconds of a cut."""
        costs = self.costs(ends)
        c = np.array([x.c for x in costs])
        return float((self.p.microbatches - 1) * c.max() + c.sum() + max(x.e for x in costs))

    def costs(self, ends: list[int]) -> list[StageCost]:
        return [self.cost(first, last, i) for i, (first, last) in enumerate(zip([0, *ends[:-1]], ends, strict=True))]

    def least_memory(self) -> tuple[float, list[int]]:
        """The cut whose fullest rank holds least, and how many live bytes that is."""
        ends = [self.p.layers] if self.p.pp == 1 else self._least_largest(self._matrices[2])[1]
        return max(x.live_bytes for x in self.costs(ends)), ends
