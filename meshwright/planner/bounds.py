"""Lower bounds on the step of a layout, over every way to cut it into stages and every recompute that fits.

The simple bound knows that the slowest stage takes at least the mean, a layer, or an end of the model with its layer. The other one
relaxes a stage to a mixture of layers: stage s, with f microbatches in flight, holds x_r layers of recompute mode r (fractions allowed),

    sum_r c_r x_r <= T        sum_r (held + f kept_r) x_r <= memory        n_s(T) = max sum_r x_r

and no cut whose slowest stage takes T exists unless the n_s(T), rounded down, add up to the model's layers. The least such T is a bound. The
optimum of the two-row programme has at most two modes, so that n_s(T) is the largest of six closed forms. Layers of unlike kinds are
bounded kind by kind, since leaving the others out only makes room, and all together as if each were the least of its kinds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.costmodel.layouts import FREE, SCHEDULES, V_SHAPED, Layouts
from meshwright.costmodel.memory import MASTER, REDUCED
from meshwright.costmodel.step import Bound, Priced, in_flight

Array = np.ndarray
HALVINGS = 20
SLACK = 1e-6  # of a layer
V_SHAPES = [SCHEDULES.index(name) for name in V_SHAPED]


@dataclass(frozen=True)
class Ends:
    """Blocks of the model: before the first layer, after the last, between layers; and the first and last layer itself."""

    before: Array
    after: Array
    between: Array
    layers: Array

    @classmethod
    def of(cls, bound: Bound) -> Ends:
        repeated = np.flatnonzero(bound.repeated[bound.order])
        first, last = (repeated[0], repeated[-1]) if len(repeated) else (len(bound.order), len(bound.order))
        inside = bound.order[first : last + 1]
        return cls(bound.order[:first], bound.order[last + 1 :], inside[~bound.repeated[inside]], bound.order[repeated])


class Bounds:
    """Bounds for layouts of one model. `modes` are the recompute modes that stages may use."""

    def __init__(self, bound: Bound, modes: tuple[int, ...]) -> None:
        self.bound, self.modes, self.ends = bound, modes, Ends.of(bound)
        self.kinds = np.unique(self.ends.layers)

    def transfers(self, x: Layouts) -> Array:
        """Transfers of a microbatch, all ranks together: each border between ranks is paid on both sides."""
        v = np.isin(x.schedule, V_SHAPES)
        return np.where(x.pp > 1, 2 * (x.pp * x.vpp - 1 - v), 0)

    def step(self, x: Layouts, p: Priced) -> tuple[Array, Array, Array]:
        """(bound on the step, on the slowest stage, what is added to (m - ratio) times the slowest). [layouts]"""
        least = min(self.modes, key=lambda r: float(p.again[:, :, r].sum())) if 0 not in self.modes else 0
        c, e = (p.c + p.again[:, :, least]).min(axis=0), p.once.min(axis=0)
        counts, ends = self.bound.counts, self.ends
        total = c @ counts + self.transfers(x) * p.send
        slowest = total / x.pp
        many = x.pp > 1
        if len(ends.layers):
            slowest = np.maximum(slowest, c[:, self.kinds].max(axis=1))
            slowest = np.maximum(slowest, np.where(many, c[:, ends.before].sum(axis=1) + c[:, ends.layers[0]] + p.send, 0.0))
            # in the V shape the first rank holds both ends
            slowest = np.maximum(slowest, np.where(many, c[:, ends.after].sum(axis=1) + c[:, ends.layers[-1]] + p.send, 0.0))
        once = np.maximum(e @ counts / x.pp, e[:, self.kinds].max(axis=1) if len(self.kinds) else 0.0)
        rest = p.ratio * total + once
        return (x.microbatches - p.ratio) * slowest + rest, slowest, rest

    def live(self, x: Layouts, p: Priced) -> Array:
        """A lower bound on the live bytes of the fullest rank: what the mean rank holds, with one microbatch in flight."""
        kept = p.kept[:, list(self.modes)].min(axis=1) * self.bound.repeated  # a loss in chunks keeps next to nothing
        tied = self.bound.tied_numel(x) * (MASTER + REDUCED + self.bound.compute_bytes + 8.0)
        return np.asarray(((p.held + kept) @ self.bound.counts - tied) / x.pp - p.carry)

    def relaxed(self, x: Layouts, p: Priced, capacity: Array, slowest: Array) -> Array:
        """The least seconds that the slowest stage may take by the relaxation, at least `slowest`; infinite if nothing fits. [layouts]"""
        out = slowest.copy()
        for pp in np.unique(x.pp):
            rows = np.flatnonzero(x.pp == pp)
            out[rows] = self._relaxed(x.take(rows), p.take(rows), capacity[rows], slowest[rows], int(pp))
        return out

    def _relaxed(self, x: Layouts, p: Priced, capacity: Array, slowest: Array, pp: int) -> Array:
        n = len(x)
        free = x.schedule == FREE
        schedule = np.where(free, 0, x.schedule)  # no schedule of the space holds less than 1F1B
        flying = np.array([
            in_flight(SCHEDULES[s], pp, int(v), int(m)) for s, v, m in zip(schedule, x.vpp, x.microbatches)
        ])  # fmt: skip
        ends = self.ends
        tied = self.bound.tied_numel(x) * (MASTER + REDUCED + self.bound.compute_bytes + 8.0) if pp == 1 else np.zeros(n)
        room = np.repeat((capacity + p.carry + tied)[:, None], pp, axis=1) + flying * p.carry[:, None]
        first = np.where(free, 0.0, p.held[:, ends.before].sum(axis=1) + p.held[:, ends.between].sum(axis=1))
        last = np.where(free, 0.0, p.held[:, ends.after].sum(axis=1))
        v = np.isin(x.schedule, V_SHAPES)
        at_last = np.where(v, 0, pp - 1)
        room[:, 0] -= first
        room[np.arange(n), at_last] -= last
        c = p.c.min(axis=0)
        busy = np.zeros((n, pp))
        busy[:, 0] += np.where(free, 0.0, c[:, ends.before].sum(axis=1) + c[:, ends.between].sum(axis=1))
        busy[np.arange(n), at_last] += np.where(free, 0.0, c[:, ends.after].sum(axis=1))
        again = p.again.min(axis=0)
        low, possible = slowest.copy(), np.ones(n, bool)
        whole = c[:, None] + again  # [n, 3, blocks]
        for kinds in [self.kinds[i : i + 1] for i in range(len(self.kinds))] + ([self.kinds] if len(self.kinds) > 1 else []):
            layers = float(np.isin(ends.layers, kinds).sum())
            cost = [whole[:, r, kinds].min(axis=1) for r in self.modes]  # [n]
            held = p.held[:, kinds].min(axis=1)[:, None]
            memory = [held + flying * p.kept[:, r, kinds].min(axis=1)[:, None] for r in self.modes]  # [n, pp]

            def enough(t: Array, cost: list[Array] = cost, memory: list[Array] = memory, layers: float = layers) -> Array:
                return np.asarray(np.floor(_most(t[:, None] - busy, room, cost, memory) + SLACK).sum(axis=1) >= layers)

            below, above = low, (layers + 1) * np.max(cost, axis=0) + busy.sum(axis=1) + 2 * low
            possible &= enough(above)
            tight = ~enough(below)
            for _ in range(HALVINGS if (tight & possible).any() else 0):
                middle = 0.5 * (below + above)
                ok = enough(middle)
                above, below = np.where(ok, middle, above), np.where(ok, below, middle)
            low = np.where(tight, below, low)
        return np.where(possible, low, np.inf)


def _most(time: Array, room: Array, cost: list[Array], memory: list[Array]) -> Array:
    """Most layers, fractions allowed, in `time` and `room` [n, stages], of modes with a cost [n] and memory [n, stages] each."""
    time, room = np.where(np.isfinite(time), np.maximum(time, 0.0), np.inf), np.maximum(room, 0.0)
    cost = [np.maximum(c, 1e-30)[:, None] for c in cost]
    memory = [np.maximum(m, 1e-9) for m in memory]
    best = np.zeros(np.broadcast_shapes(time.shape, room.shape))
    for c, m in zip(cost, memory):
        best = np.maximum(best, np.minimum(time / c, room / m))
    for i in range(len(cost)):
        for j in range(i + 1, len(cost)):
            det = cost[i] * memory[j] - cost[j] * memory[i]
            safe = np.where(det == 0, 1.0, det)
            a, b = (time * memory[j] - room * cost[j]) / safe, (room * cost[i] - time * memory[i]) / safe
            best = np.where((det != 0) & (a >= 0) & (b >= 0), np.maximum(best, a + b), best)
    return best
