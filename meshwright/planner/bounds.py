"""Lower bounds on the step of a layout, over every way to cut it into stages and every recompute that fits.

The simple bound knows that the slowest stage takes at least the mean, a layer, or an end of the model with its layer. The other one
relaxes a stage to a mixture of layers: stage s, with f microbatches in flight, holds x_r layers of recompute mode r (fractions allowed),

    sum_r c_r x_r <= T        sum_r (held + f kept_r) x_r <= memory        n_s(T) = max sum_r x_r

and no cut whose slowest stage takes T exists unless the n_s(T), rounded down, add up to the model's layers. The least such T is a bound. A
stage recomputes nothing, selectively, or its first layers in full, so that there are at most two modes in it and n_s(T) is the largest of
a few closed forms. While its last layer runs backward, what that takes beyond what it keeps comes on top (`Peaks`). Layers of unlike kinds are
bounded kind by kind, since leaving the others out only makes room, and all together as if each were the least of its kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from meshwright.costmodel.layouts import FREE, LOSS_CHUNKS, LOSSES, RECOMPUTE, SCHEDULES, SPLIT, V_SHAPED, Layouts
from meshwright.costmodel.memory import MASTER, REDUCED
from meshwright.costmodel.schedules import mean_held
from meshwright.costmodel.step import Bound, Priced, in_flight
from meshwright.planner.stageproblem import spreads

Array = np.ndarray
HALVINGS = 14
SLACK = 1e-6  # of a layer
V_SHAPES = [SCHEDULES.index(name) for name in V_SHAPED]
SPLITS = [SCHEDULES.index(name) for name in SPLIT]


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


@dataclass(frozen=True)
class Peaks:
    """Bytes while a block runs backward beyond what it keeps: of each block by recompute mode, and of the loss. Nothing where a step has so
    few microbatches that gathered parameters may be gone by then."""

    block: Array  # [layouts, 3, blocks]
    head: Array  # [layouts]

    def take(self, rows: Array) -> Peaks:
        return Peaks(self.block[rows], self.head[rows])


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

    def peaks(self, x: Layouts, p: Priced) -> Peaks:
        """From the exact liveness of each block, worked out once for each microbatch, degree and loss."""
        block, head = np.zeros((len(x), 3, len(self.bound.counts))), np.zeros(len(x))
        keys = np.stack([p.sharding, x.micro_batch, x.cp, x.ep * x.etp, x.loss, x.ulysses], axis=1)
        for key in np.unique(keys, axis=0):
            rows = np.flatnonzero((keys == key).all(axis=1))
            t, batch, cp, ep, loss, ulysses = (int(v) for v in key)
            for u in {*self.kinds.tolist(), *self.ends.after.tolist()}:
                m = self.bound.tables.memory(t, u, float(batch), cp, ep, LOSS_CHUNKS if LOSSES[loss] == "chunked" else 1, bool(ulysses))
                backward = float((m.backward if self.bound.compute_bytes < MASTER else m.backward_in_place)[0])
                if u in self.kinds:
                    beyond = [max(backward + float((m.again(r) - m.kept(r))[0]), 0.0) for r in RECOMPUTE]
                    block[rows, :, u] = beyond
                else:
                    head[rows] = np.maximum(head[rows], backward)
        many = (x.microbatches > 2) | (x.pp > 1)
        block = block + np.where(x.zero == 3, self.bound.compute_bytes, 0.0)[:, None, None] * (p.dense + p.experts)[:, None, :]  # gathered to run
        return Peaks(block * many[:, None, None], head * many)

    def relaxed(
        self, x: Layouts, p: Priced, capacity: Array, slowest: Array, ceiling: Array | None = None, peaks: Peaks | None = None
    ) -> Array:
        """The least seconds that the slowest stage may take by the relaxation, at least `slowest`; infinite if nothing fits. Where it is at
        or above `ceiling`, that is what is returned. [layouts]"""
        out = slowest.copy()
        top = np.full(len(x), np.inf) if ceiling is None else ceiling
        for pp in np.unique(x.pp):
            rows = np.flatnonzero(x.pp == pp)
            own = peaks.take(rows) if peaks is not None else None
            out[rows] = self._relaxed(x.take(rows), p.take(rows), capacity[rows], slowest[rows], top[rows], int(pp), own)
        return out

    def _flying(self, x: Layouts, flying: Array, pp: int, kinds: Array) -> Array:
        """`flying` where backward is split and no layer is recomputed: what layers of these kinds hold on average, not what every chunk does."""
        out, mine = flying.copy(), np.isin(self.ends.layers, kinds)
        for i in np.flatnonzero(np.isin(x.schedule, SPLITS) & (x.vpp > 1)):
            v = int(x.vpp[i])
            out[i] = mean_held(SCHEDULES[int(x.schedule[i])], pp, int(x.microbatches[i]), v, _sizes(mine.tobytes(), pp * v))
        return np.where(np.isfinite(out), out, flying)

    def _relaxed(
        self, x: Layouts, p: Priced, capacity: Array, slowest: Array, ceiling: Array, pp: int, peaks: Peaks | None
    ) -> Array:
        n = len(x)
        free = x.schedule == FREE
        schedule = np.where(free, 0, x.schedule)  # no schedule of the space holds less than 1F1B
        flying = np.array([
            in_flight(SCHEDULES[s], pp, int(v), int(m)) for s, v, m in zip(schedule, x.vpp, x.microbatches)
        ])  # fmt: skip
        ends, apart = self.ends, np.isin(x.schedule, SPLITS) & (pp > 1)
        tied = self.bound.tied_numel(x) * (MASTER + REDUCED + self.bound.compute_bytes + 8.0) if pp == 1 else np.zeros(n)
        room = np.repeat((capacity + p.carry + tied)[:, None], pp, axis=1) + flying * p.carry[:, None]
        first = np.where(free, 0.0, p.held[:, ends.before].sum(axis=1) + p.held[:, ends.between].sum(axis=1))
        last = np.where(free, 0.0, p.held[:, ends.after].sum(axis=1))
        v = np.isin(x.schedule, V_SHAPES)
        at_last = np.where(v, 0, pp - 1)
        room -= np.where(free, 0.0, x.microbatches * p.carry)[:, None] * _links(pp, x.vpp, v)  # receive buffers
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
            cost = [whole[:, r, kinds].min(axis=1) for r in range(3)]  # [n]
            held = p.held[:, kinds].min(axis=1)[:, None]
            kept = [p.kept[:, r, kinds].min(axis=1)[:, None] for r in range(3)]
            for r in (1, 2):  # a schedule that splits backward recomputes nothing
                cost[r], kept[r] = np.where(apart, cost[0], cost[r]), np.where(apart[:, None], kept[0], kept[r])
            of_kind = self._flying(x, flying, pp, kinds)
            memory = [held + of_kind * k for k in kept]  # [n, pp]
            last_of = np.zeros((n, pp))
            beyond = [last_of] * 3
            if peaks is not None:
                last_of[np.arange(n), at_last] = peaks.head
                beyond = [np.maximum(last_of, np.where(apart, 0.0, peaks.block[:, r, kinds].min(axis=1))[:, None]) for r in range(3)]

            def enough(
                t: Array, rows: Array, cost: list[Array] = cost, memory: list[Array] = memory, kept: list[Array] = kept, layers: float = layers,
                last_of: Array = last_of, beyond: list[Array] = beyond,
            ) -> Array:  # fmt: skip
                time, space = t[:, None] - busy[rows], room[rows]
                c, m = [y[rows] for y in cost], [y[rows] for y in memory]

                def most(extra: Array, modes: tuple[int, ...], memory: list[Array] = m) -> Array:
                    return _most(time, space - extra[rows], [c[r] for r in modes], [memory[r] for r in modes])

                found = [most(beyond[r], (r,)) for r in self.modes if peaks is not None or r == 1 or len(self.modes) == 1]
                if len(self.modes) == 3:
                    mixed = most(last_of, (2, 0))
                    if peaks is not None:  # while the last layer that recomputes runs backward, those behind it are done
                        mixed = np.minimum(mixed, most(beyond[2], (2, 0), [m[0] - kept[0][rows], m[1], m[2]]))
                    found.append(mixed)
                return np.asarray(np.floor(np.max(found, axis=0) + SLACK).sum(axis=1) >= layers)

            rows = np.arange(n)
            most_s = (layers + 1) * np.max([cost[r] for r in self.modes], axis=0) + busy.sum(axis=1) + 2 * low  # one stage could hold all
            possible &= enough(most_s, rows)
            rows = rows[possible]
            rows = rows[~enough(low[rows], rows)]
            above = np.minimum(most_s, np.maximum(ceiling, low))[rows]
            far = ~enough(above, rows)
            low[rows[far]] = above[far]
            rows, above = rows[~far], above[~far]
            for _ in range(HALVINGS if len(rows) else 0):
                middle = 0.5 * (low[rows] + above)
                ok = enough(middle, rows)
                above = np.where(ok, middle, above)
                low[rows] = np.where(ok, low[rows], middle)
        return np.where(possible, low, np.inf)


@lru_cache(maxsize=1024)
def _sizes(mine: bytes, virtual: int) -> tuple[tuple[int, ...], ...]:
    """How many of some layers each virtual stage of every cut has."""
    before = np.concatenate([[0], np.cumsum(np.frombuffer(mine, bool))])
    return tuple(dict.fromkeys(tuple(np.diff(before[[0, *ends]]).tolist()) for ends in spreads(len(before) - 1, virtual)))


def _links(pp: int, vpp: Array, v: Array) -> Array:
    """Transfers into each rank for a microbatch, forward and backward. [layouts, pp]"""
    if pp == 1:
        return np.zeros((len(vpp), 1))
    out = np.repeat(2.0 * vpp[:, None], pp, axis=1)
    out[:, 0] -= np.where(v, 2, 1)
    out[:, -1] -= np.where(v, 2, 1)
    return out


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
