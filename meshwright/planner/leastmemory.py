"""The layouts that need least memory: best first under memory bounds, exact, and the same on every run.

What a layout needs is the least limit under which some cut of it fits: p95 of what its fullest rank takes of its device (of a mixed
cluster, as the share of that device times the least memory in the cluster). Degrees are bounded all at once, as arrays. In the order
of their bounds they are given their details, which are bounded again, closer; what comes first of all that is left has its cut
solved (stages.py), until nothing is left whose bound is below the best.

The closer bound is that of bounds.py without time: stage s holds at most n_s layers in its room, and the n_s must add up to the model's
layers. From the room of each stage goes what a peak holds beside (costmodel/stagememory.py), and each rank has at least the first two:
the backward of its last layer, the reduction of that layer's gradients, the receive buffers of a pipeline, and at the end of the model the
backward of the loss. A layer may stand beside one that holds its input already: a carry is left out of every stage for that.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from meshwright.costmodel.layouts import FREE, LOSS_CHUNKS, LOSSES, RECOMPUTE, SCHEDULES, SPLIT, V_SHAPED, Layouts
from meshwright.costmodel.memory import MASTER, REDUCED
from meshwright.costmodel.step import in_flight
from meshwright.planner.plan import Certificate

if TYPE_CHECKING:
    from meshwright.planner.search import Candidate, Search

Array = np.ndarray
TIE = 1e-9  # relative: layouts that need the same but for rounding
HALVINGS = 40
SLACK = 1e-6  # of a layer
FIRST, MORE = 8, 512  # rows of degrees that are given details at once: at first, and later


@dataclass(frozen=True)
class Need:
    """A layout and what it needs: bytes (p95) that its fullest rank takes of its device."""

    bytes: float
    candidate: Candidate


@dataclass(frozen=True)
class LeastMemory:
    """The layouts that need least, in order, of equal ones the faster first; and the proof, whose bound is in bytes."""

    best: tuple[Need, ...]
    certificate: Certificate


class LeastMemorySearch:
    """One search for the `top` layouts that need least, whatever the limit of `search` is; the certificate counts what is above that."""

    def __init__(self, search: Search, top: int = 1, progress: Callable[[int, int], None] | None = None, max_seconds: float | None = None) -> None:
        self.s, self.top, self.progress, self.max_seconds = search, top, progress, max_seconds
        self.started = time.perf_counter()
        bound = search.bound
        self.bound, self.ends = bound, search.ends
        self.modes = list(search.modes)
        self.layers = len(self.ends.layers)
        self.kinds = np.unique(self.ends.layers)
        self.best: list[Need] = []
        self.heap: list[tuple[float, int, int, int]] = []  # bound, order of arrival, part, row
        self.parts: list[Layouts] = []
        self.over = self.under = self.priced = self.evaluated = self.too_much = self.arrived = 0

    # -- bounds

    def fixed_bytes(self, x: Layouts) -> tuple[float, Array]:
        """(slope, what a device takes whatever is live): p95 of the device is slope x live bytes + that, or above where zero is FREE."""
        line = self.bound.reported(x).device[1]
        least = np.broadcast_to(np.asarray(line.fixed, float), len(x))
        if (x.zero == FREE).any():  # the least of nothing gathered and of everything sharded
            sides = [x.with_columns(zero=np.full(len(x), zero)) for zero in (0, 3)]
            least = np.min([np.broadcast_to(self.bound.reported(y).device[1].fixed, len(x)) for y in sides], axis=0)
        return float(line.slope), np.asarray(least)

    def cheap(self, x: Layouts, any_loss: bool = True) -> Array:
        """A lower bound on the bytes that each layout needs, by its mean rank; `any_loss`: whatever its loss. [layouts]"""
        held, kept, _ = self._tables(x)
        each = held + kept[:, self.modes].min(axis=1)
        each[:, self.ends.after] -= np.where(self._chunked(x, any_loss)[:, None], kept[:, 0, self.ends.after], 0.0)  # keeps no logits
        pipeline, first = self._pipeline(x), self._first_carry(x)
        live = (each @ self.bound.counts - self._tied(x) + (pipeline - first).sum(axis=1)) / x.pp
        slope, fixed = self.fixed_bytes(x)
        return np.asarray(slope * np.maximum(live, 0.0) / self.s._most_memory + fixed)

    def close(self, x: Layouts, any_loss: bool) -> Array:
        """The closer bound, of layouts whose zero is chosen. [layouts]"""
        out = self.cheap(x, any_loss)
        if not self.layers:
            return out
        slope, fixed = self.fixed_bytes(x)
        for pp in np.unique(x.pp):
            rows = np.flatnonzero(x.pp == pp)
            live = self._least_live(x.take(rows), int(pp), False)
            if any_loss:
                live = np.minimum(live, self._least_live(x.take(rows), int(pp), True))
            out[rows] = np.maximum(out[rows], slope * live / self.s._most_memory + fixed[rows])
        return out

    def _chunked(self, x: Layouts, any_loss: bool) -> Array:
        """Whether the loss is, or with `any_loss` may be, computed in chunks."""
        return np.asarray((x.loss == LOSSES.index("chunked")) | (any_loss & (x.tp == 1)))

    def _tables(self, x: Layouts) -> tuple[Array, Array, Array]:
        """Bytes held [layouts, blocks], bytes kept by recompute mode [layouts, 3, blocks], local parameters [layouts, blocks]."""
        tab, t, k = self.bound.tables, self.bound.sharding_of(x), self._batch(x)
        dense = tab.numel[t]
        experts = np.where(tab.expert_numel > 0, tab.expert_numel / (x.ep * x.etp)[:, None], 0.0)
        held, c = self.bound._held(x, dense, experts), self.bound.compute_bytes
        # what is outside the layers of one chunk stays gathered under every ZeRO stage, which `held` knows where the stage is chosen
        gathered = (x.zero == FREE) & ((x.dp * x.cp > 1) | (c < MASTER)) & ((x.pp == 1) | (x.schedule != FREE) & (x.vpp == 1))
        held = held + np.where(gathered[:, None] & ~self.bound.repeated, c * (dense + experts), 0.0)
        return held, tab.kept[t, :, :, k], dense + experts

    def _batch(self, x: Layouts) -> Array:
        return np.searchsorted(self.bound.batches, x.micro_batch / x.cp)

    def _tied(self, x: Layouts) -> Array:
        return np.where(x.pp == 1, self.bound.tied_numel(x) * (MASTER + REDUCED + self.bound.compute_bytes + 8.0), 0.0)

    def _carry(self, x: Layouts) -> Array:
        tab = self.bound.tables
        return np.asarray(tab.carry[self.bound.sharding_of(x), :, self._batch(x)][:, self.bound.repeated].max(axis=1, initial=0.0))

    def _flying(self, x: Layouts) -> Array:
        """Microbatches in flight on each rank; where the schedule is FREE those of 1F1B, which are the fewest. [layouts, ranks of the longest]"""
        names = [SCHEDULES[max(int(s), 0)] for s in x.schedule]
        of = [in_flight(n, int(p), int(v), int(m)) for n, p, v, m in zip(names, x.pp, x.vpp, x.microbatches, strict=True)]
        out = np.zeros((len(x), int(x.pp.max(initial=1))))
        for row, found in zip(out, of, strict=True):
            row[: len(found)] = found
        return out

    def _ranks(self, x: Layouts) -> tuple[Array, Array, Array, Array]:
        """Whether each rank is there, is the first, holds the end of the model, and its chunks. [layouts, ranks]"""
        rank = np.arange(int(x.pp.max(initial=1)))[None, :]
        pp = x.pp[:, None]
        v = np.isin(x.schedule, [SCHEDULES.index(n) for n in V_SHAPED])[:, None]
        head = np.where(v, rank == 0, rank == pp - 1)
        chunks = np.where(v & (rank == pp - 1), 1, x.vpp[:, None])
        return rank < pp, np.broadcast_to(rank == 0, head.shape), head, np.asarray(chunks)

    def _pipeline(self, x: Layouts) -> Array:
        """Least bytes of receive buffers on each rank, beyond what of them stands for kept inputs and an incoming gradient. [layouts, ranks]"""
        there, stem, head, chunks = self._ranks(x)
        m, carry = x.microbatches[:, None], self._carry(x)[:, None]
        into, back = chunks - stem, chunks - head
        room = into * np.maximum(m - self._flying(x), 0.0) + np.maximum(back * m - 1, 0.0)
        return np.asarray(np.where(there & (x.pp > 1)[:, None], room * carry, 0.0))

    def _first_carry(self, x: Layouts) -> Array:
        """What layers behind a block of another kind may not keep because that does. [layouts, ranks]"""
        there, stem, *_ = self._ranks(x)
        times = stem + float(len(self.ends.between))
        return np.asarray(np.where(there, times * self._flying(x) * self._carry(x)[:, None], 0.0))

    def _least_live(self, x: Layouts, pp: int, any_loss: bool) -> Array:
        """A lower bound on live bytes of the fullest rank, where all layouts have `pp` stages. [layouts]"""
        held, kept, numel = self._tables(x)
        ends, modes, flying = self.ends, self.modes, self._flying(x)
        _, stem, head, _ = self._ranks(x)
        beside, loss = self._beside(x, kept, numel, flying, any_loss)
        before = np.concatenate([ends.before, ends.between]).astype(int)
        free = self._pipeline(x) - self._first_carry(x) - self._tied(x)[:, None]
        some = (x.schedule != FREE)[:, None]
        kept_before = kept[:, 0, before].sum(axis=1)[:, None]
        low = free + np.where(stem & some, held[:, before].sum(axis=1)[:, None] + flying * kept_before, 0.0)
        low = low + np.where(head & some, held[:, ends.after].sum(axis=1)[:, None], 0.0)
        low = low + np.where(head & some, np.maximum(beside[:, None], loss), beside[:, None])
        out = np.zeros(len(x))
        groups = [self.kinds[i : i + 1] for i in range(len(self.kinds))] + ([self.kinds] if len(self.kinds) > 1 else [])
        for kinds in groups:
            layers = float(np.isin(ends.layers, kinds).sum())
            least_kept = kept[:, modes][:, :, kinds].min(axis=(1, 2))[:, None]
            layer = np.maximum(held[:, kinds].min(axis=1)[:, None] + flying * least_kept, 1e-9)

            def enough(live: Array, layer: Array = layer, layers: float = layers) -> Array:
                return np.asarray(np.floor(np.maximum(live[:, None] - low, 0.0) / layer + SLACK).sum(axis=1) >= layers)

            below = np.zeros(len(x))
            above = (low + layers * layer).max(axis=1)
            for _ in range(HALVINGS):
                middle = 0.5 * (below + above)
                ok = enough(middle)
                above, below = np.where(ok, middle, above), np.where(ok, below, middle)
            out = np.maximum(out, below)
        return out

    def _beside(self, x: Layouts, kept: Array, numel: Array, flying: Array, any_loss: bool) -> tuple[Array, Array]:
        """Least bytes at a rank's peak beyond what its layers hold and keep for all its microbatches [layouts]; and at the backward of the
        loss, [layouts, ranks]. What a layer keeps is among the bytes of its backward."""
        kinds, c = self.kinds, self.bound.compute_bytes
        columns = np.stack([self.bound.sharding_of(x), x.micro_batch, x.cp, x.ep * x.etp, self._chunked(x, any_loss), x.ulysses], axis=1)
        unique, which = np.unique(columns, axis=0, return_inverse=True)
        rows = [self._blocks(*(int(v) for v in row)) for row in unique]
        which = which.ravel()
        backward, later, loss = (np.array([row[i] for row in rows])[which] for i in range(3))
        pp1, fsdp = x.pp == 1, (x.dp * x.cp > 1) | (c < MASTER)
        # under ZeRO 3 a layer is gathered while it runs; where gradients are reduced in every backward, one layer's lie in fp32 beside
        # themselves, and the layer is gathered still, but in the last backwards of one stage
        runs = backward + np.where(x.zero == 3, 1.0, 0.0)[:, None, None] * c * numel[:, None, kinds]
        reduces = fsdp & ((x.zero >= 2) | (x.microbatches == 1))
        frees = pp1 & (x.zero < 3) & (x.microbatches <= 2)
        reduced = np.where(reduces[:, None], (REDUCED + c * ~frees[:, None]) * numel[:, kinds] + self._carry(x)[:, None], 0.0)
        beside = np.maximum(runs, reduced[:, None])[:, self.modes] - kept[:, :, kinds][:, self.modes]
        # the first half of a backward that is split makes fewer gradients
        least = np.where(np.isin(x.schedule, [SCHEDULES.index(name) for name in SPLIT]), 0.0, beside.min(axis=(1, 2)))
        return least, loss[:, None] + np.maximum(flying - 1, 0.0) * later[:, None]

    def _blocks(self, t: int, batch: int, cp: int, ep: int, chunked: int, ulysses: int) -> tuple[Array, float, float]:
        """Bytes of each kind of layer at its backward [3, kinds], of what is behind the layers for backward, and at its fullest backward."""
        kinds, after = self.kinds.tolist(), self.ends.after.tolist()
        of = [self.bound.tables.memory(t, u, float(batch), cp, ep, LOSS_CHUNKS if chunked else 1, bool(ulysses)) for u in (*kinds, *after)]
        least = [float(np.minimum(m.backward, m.backward_in_place)[0]) for m in of]
        # an incoming gradient that is larger than what is handed on is in no receive buffer
        larger = [max(float(m.incoming[0] - m.carry[0]), 0.0) for m in of]
        layers = list(zip(of, least, larger))[: len(kinds)]
        runs = np.array([[b + float(m.again(mode)[0]) - more for m, b, more in layers] for mode in RECOMPUTE]).reshape(3, len(kinds))
        kept, most = 0.0, 0.0
        for m, b in list(zip(of, least))[len(kinds) :]:
            most, kept = max(most, kept + b), kept + float(m.saved[0])
        return runs, kept, most

    # -- exact

    def need(self, row: Layouts, most: float = np.inf) -> Need:
        """What a layout (one row) needs, exactly; if that is at most `most`, with the fastest cut that needs no more."""
        s = self.s
        slope, fixed = self.fixed_bytes(row)
        _, share = s._types(int(row.pp[0]))
        p = s.bound.price(row)

        def bytes_of(cut: Any) -> float:
            live = np.array([c.live_bytes for c in cut.costs])
            return float((slope * live / share).max() + fixed[0])

        limit = s.limit_bytes
        while True:  # once for equal devices; for unlike ones the limit falls or rises to where the cut that is least over it is not over it
            _, cut = s._stages(row, p, (limit - float(fixed[0])) / slope).least_memory()
            found = bytes_of(cut)
            if len(s.bound.devices) == 1 or abs(found - limit) <= TIE * found:
                break
            limit = found
        quick = s._stages(row, p, (found * (1 + TIE) - float(fixed[0])) / slope).best() if found <= most else None
        return Need(found, s.candidate(row, quick if quick is not None else cut))

    # -- search

    @property
    def threshold(self) -> float:
        return self.best[-1].bytes * (1 + TIE) if len(self.best) == self.top else np.inf

    @property
    def late(self) -> bool:
        return self.max_seconds is not None and bool(self.best) and time.perf_counter() - self.started + self.s.setup_s > self.max_seconds

    def go(self) -> LeastMemory:
        s, x = self.s, self.s.degrees
        bounds = self.cheap(x)
        self.priced += len(x)
        order = np.argsort(bounds, kind="stable")
        at, chunk = 0, FIRST
        while True:
            first = float(bounds[order[at]]) if at < len(order) else np.inf
            then = self.heap[0][0] if self.heap else np.inf
            if min(first, then) > self.threshold or (at >= len(order) and not self.heap) or self.late:
                break
            if first <= then:
                self._add(order[at : at + chunk])
                at, chunk = min(at + chunk, len(order)), min(2 * chunk, MORE)
            else:
                self._take()
            if self.progress is not None:
                self.progress(self.evaluated, len(order) - at)
        late = min(first, then) <= self.threshold and self.late
        rest = order[at:]
        left = int(s.children[rest].sum()) + len(self.heap)
        if not late:
            self._count(bounds[rest], s.children[rest])
            self._count(np.array([b for b, *_ in self.heap]), np.ones(len(self.heap), int))
        return self._outcome(min(first, then), left if late else 0)

    def _count(self, bounds: Array, layouts: Array) -> None:
        """Layouts that are left out: those that need more than the limit, and those that need more than the best."""
        over = bounds > self.s.limit_bytes
        self.over += int(layouts[over].sum())
        self.under += int(layouts[~over].sum())

    def _add(self, rows: Array) -> None:
        s = self.s
        x, origin, below = s.expand(rows)
        if not len(x):
            return
        bounds = self.close(x, any_loss=True)
        self.priced += len(x)
        good = bounds <= self.threshold
        self._count(bounds[~good], below[~good])
        if not good.any():
            return
        x = s.finish(x.take(np.flatnonzero(good)), origin[good])
        if not len(x):
            return
        bounds = self.close(x, any_loss=False)
        self.priced += len(x)
        good = bounds <= self.threshold
        self._count(bounds[~good], np.ones(int((~good).sum()), int))
        part = len(self.parts)
        self.parts.append(x)
        for i in np.flatnonzero(good).tolist():
            heapq.heappush(self.heap, (float(bounds[i]), self.arrived, part, i))
            self.arrived += 1

    def _take(self) -> None:
        from meshwright.planner.search import order_of

        _, _, part, i = heapq.heappop(self.heap)
        found = self.need(self.parts[part].take(slice(i, i + 1)), self.threshold)
        self.evaluated += 1
        self.too_much += found.bytes > self.s.limit_bytes
        known = sorted([*self.best, found], key=lambda n: n.bytes)
        # what is equal but for rounding is put in the order of its seconds
        groups: list[list[Need]] = []
        for n in known:
            if groups and n.bytes <= groups[-1][0].bytes * (1 + TIE):
                groups[-1].append(n)
            else:
                groups.append([n])
        self.best = [n for g in groups for n in sorted(g, key=lambda n: (n.candidate.step_s, order_of(n.candidate.layout)))][: self.top]

    def _outcome(self, next_bound: float, still_open: int) -> LeastMemory:
        least = self.best[0].bytes if self.best else 0.0
        bound = min(least, next_bound)
        fits = bool(self.best) and least <= self.s.limit_bytes
        return LeastMemory(
            tuple(self.best),
            Certificate(
                status="time limit" if still_open else "optimal" if fits else "infeasible", gap=max(least / bound - 1, 0.0) if bound > 0 else 0.0,
                bound_s=bound, seconds=self.s.setup_s + time.perf_counter() - self.started, space=self.s.size, pruned_by_memory=self.over,
                pruned_by_bound=self.under, evaluated=self.evaluated, infeasible=self.too_much, priced=self.priced, open=still_open,
            ),
        )  # fmt: skip


def least_memory(search: Search, top: int = 1, progress: Callable[[int, int], None] | None = None, max_seconds: float | None = None) -> LeastMemory:
    """The `top` layouts that need least memory, proved, or, when `max_seconds` are over, the best so far with the gap."""
    return LeastMemorySearch(search, top, progress, max_seconds).go()
