"""Layers to pipeline stages, exactly: contiguous, possibly uneven, under each stage's own memory.

A step costs (m - 1) max c + sum c + max e over the stages (costmodel/step.py), and sum c does not depend on the cut. For bounds T
on c and E on e, filling each stage with as many layers as T, E and its memory allow finds a cut if there is one: what a stage
holds only grows with its layers, so taking more never hurts the rest. The best cut is found over the finitely many T and E.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.costmodel.memory import persistent_bytes
from meshwright.costmodel.pipeline import in_flight


@dataclass(frozen=True)
class StageProblem:
    """One layout's layers as arrays, with what stands before the first layer and after the last.

    `c`, `e`, `kept`, `working`, `numel` are per layer; `before` and `after` hold the same five of the stem and the head.
    `send_s` and `carry_bytes` are of one transfer between stages.
    """

    c: np.ndarray
    e: np.ndarray
    kept: np.ndarray
    working: np.ndarray
    numel: np.ndarray
    before: tuple[float, float, float, float, float]
    after: tuple[float, float, float, float, float]
    pp: int
    microbatches: int
    send_s: float
    carry_bytes: float
    zero: int
    dp: int
    compute_bytes: float

    @property
    def layers(self) -> int:
        return len(self.c)


@dataclass(frozen=True)
class StageCost:
    """One stage: seconds of a microbatch (transfers included), seconds once a step, live bytes by category."""

    c: float
    e: float
    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    temporaries: float

    @property
    def live_bytes(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.buffers + self.activations + self.temporaries


class Stages:
    """Costs of any interval of layers as any stage, from prefix sums."""

    def __init__(self, problem: StageProblem) -> None:
        self.p = problem
        self._sum = {k: np.concatenate([[0.0], np.cumsum(getattr(problem, k))]) for k in ("c", "e", "kept", "numel")}
        self._prefix = {k: v.tolist() for k, v in self._sum.items()}
        self._extra = (problem.working - problem.kept).tolist()
        self._numel = problem.numel.tolist()

    def cost(self, first: int, last: int, stage: int) -> StageCost:
        """Layers [first, last) as `stage`."""
        p = self.p
        ends = [p.before] * (stage == 0) + [p.after] * (stage == p.pp - 1)
        c = self._between("c", first, last) + sum(x[0] for x in ends) + p.send_s * ((stage > 0) + (stage < p.pp - 1))
        e = self._between("e", first, last) + sum(x[1] for x in ends)
        kept = self._between("kept", first, last) + sum(x[2] for x in ends)
        extra = max([0.0, *self._extra[first:last], *(x[3] - x[2] for x in ends)])
        root = sum(x[4] for x in ends)
        numel = self._between("numel", first, last) + root
        layer = max(self._numel[first:last], default=root)
        held = persistent_bytes(numel, layer, root, zero=p.zero, dp=p.dp, compute_bytes=p.compute_bytes, accumulates=p.microbatches > 1)
        flying = in_flight(p.pp, stage, p.microbatches)
        held_carries = p.carry_bytes * ((stage > 0) + (stage < p.pp - 1))  # what came in and went out waits for backward
        return StageCost(c, e, *held, activations=flying * (kept + held_carries), temporaries=extra)

    def _between(self, key: str, first: int, last: int) -> float:
        return self._prefix[key][last] - self._prefix[key][first]

    def fill(self, t: float, e: float, capacity: float) -> list[int] | None:
        """Ends of the stages when each takes as many layers as c <= t, e <= e and its memory allow; None if layers remain."""
        p, at, ends = self.p, 0, []
        for stage in range(p.pp):
            most = p.layers - (p.pp - 1 - stage)  # one layer at least for each later stage
            low = at + 1 if p.layers else at
            if stage == p.pp - 1:
                low = p.layers
            if low > most or not self._fits(at, low, stage, t, e, capacity):
                return None
            high = most
            while low < high:
                middle = (low + high + 1) // 2
                if self._fits(at, middle, stage, t, e, capacity):
                    low = middle
                else:
                    high = middle - 1
            ends.append(low)
            at = low
        return ends

    def _fits(self, first: int, last: int, stage: int, t: float, e: float, capacity: float) -> bool:
        x = self.cost(first, last, stage)
        return x.c <= t * (1 + 1e-12) and x.e <= e * (1 + 1e-12) and x.live_bytes <= capacity

    def values(self, key: str) -> np.ndarray:
        """Every value that c or e of a stage can take, ascending."""
        p, index = self.p, 0 if key == "c" else 1
        prefix = self._sum[key]
        inner = (prefix[None, :] - prefix[:, None])[np.triu_indices(p.layers + 1, 1)]
        send = p.send_s if key == "c" else 0.0
        first = prefix[1:] + p.before[index]
        last = prefix[-1] - prefix[:-1] + p.after[index]
        if p.pp == 1:
            return np.array([prefix[-1] + p.before[index] + p.after[index]])
        found = np.concatenate([inner + 2 * send if p.pp > 2 else [], first + send, last + send])
        return np.unique(np.round(found, 15))

    def best(self, capacity: float) -> tuple[float, list[int]] | None:
        """The cheapest cut that fits `capacity` bytes a rank: its step seconds and stage ends; None if none fits."""
        p = self.p
        cs, es = self.values("c") * (1 + 1e-9), self.values("e") * (1 + 1e-9)
        total = float(p.c.sum()) + p.before[0] + p.after[0] + 2 * (p.pp - 1) * p.send_s
        low = _first(cs, lambda t: self.fill(t, float("inf"), capacity) is not None)
        if low is None:
            return None
        found: tuple[float, list[int]] | None = None
        least_e = max(float(p.e.max(initial=0.0)), (float(p.e.sum()) + p.before[1] + p.after[1]) / p.pp)
        for t in cs[low:]:
            if found is not None and (p.microbatches - 1) * t / (1 + 1e-9) + total + least_e >= found[0]:
                break
            at = _first(es, lambda e, t=t: self.fill(t, e, capacity) is not None)
            ends = self.fill(t, es[at], capacity) if at is not None else None
            if ends is not None:
                step = self.step(ends)
                if found is None or step < found[0]:
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
        low, high = 0.0, max(self.cost(0, self.p.layers, s).live_bytes for s in range(self.p.pp))
        ends = self.fill(float("inf"), float("inf"), high)
        assert ends is not None
        for _ in range(50):
            middle = (low + high) / 2
            tried = self.fill(float("inf"), float("inf"), middle)
            if tried is None:
                low = middle
            else:
                high, ends = middle, tried
            if high - low <= 1e-4 * high:
                break
        return max(x.live_bytes for x in self.costs(ends)), ends


def _first(values: np.ndarray, works) -> int | None:  # type: ignore[no-untyped-def]
    """Index of the smallest value for which `works`, which holds from some value on."""
    if not len(values) or not works(values[-1]):
        return None
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if works(values[middle]):
            high = middle
        else:
            low = middle + 1
    return low
