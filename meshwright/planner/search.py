"""Branch and bound over layouts: every one is evaluated, bounded away or shown not to fit, and the certificate counts which.

The tree has three levels. Degrees (space.py) are all priced at once, each under the cheapest details that it might have. In the
order of their bounds they are given ZeRO stage and replicas, then schedule, loss and optimizer state, and every level is priced as arrays
and pruned against the best layout so far. What is left is bounded once more with memory (bounds.py), then its cut into stages with
recompute is solved exactly (stages.py). Memory bounds prune at each level in the same way.
"""

from __future__ import annotations

import bisect
import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from meshwright.costmodel.allocator import DeviceBytes
from meshwright.costmodel.layouts import RECOMPUTE, SCHEDULES, SPLIT, V_SHAPED, Layouts
from meshwright.costmodel.step import Bound, Priced
from meshwright.planner.bounds import Bounds, Ends
from meshwright.planner.leastmemory import least_memory
from meshwright.planner.plan import Certificate, Layout
from meshwright.planner.space import Space, layout_of, runs_together, to_arrays
from meshwright.planner.stages import Choice, Cut, StageProblem, Stages
from meshwright.profiling.errors import InputError

TIE = 1e-12  # relative
AGAIN = 64  # layouts on the heap that are bounded once more at a time
FIRST, MORE = 8, 512  # rows of degrees that are given details at once: at first, and later


@dataclass(frozen=True)
class Candidate:
    """A layout with its best cut into stages."""

    layout: Layout
    step_s: float
    cut: Cut
    row: Layouts = field(compare=False, repr=False)

    @property
    def ends(self) -> tuple[int, ...]:
        return self.cut.ends

    @property
    def live_bytes(self) -> float:
        """Of the fullest rank."""
        return max(x.live_bytes for x in self.cut.costs)

    @property
    def fullest(self) -> int:
        """The rank that holds most."""
        return max(range(len(self.cut.costs)), key=lambda s: self.cut.costs[s].live_bytes)


@dataclass(frozen=True)
class Outcome:
    """What a search found: the best layouts in order (empty if nothing fits) and the proof."""

    best: tuple[Candidate, ...]
    certificate: Certificate


@dataclass
class _Counts:
    memory: int = 0
    bound: int = 0
    evaluated: int = 0
    infeasible: int = 0
    priced: int = 0


class Search:
    """A space priced on a cluster. `limit_bytes` bounds p95 of the memory that a rank may reserve, on the device with least memory."""

    def __init__(self, space: Space, limit_bytes: float, bound: Bound | None = None) -> None:
        started = time.perf_counter()
        self.space, self.limit_bytes = space, limit_bytes
        self.degrees = space.degrees
        batches = np.unique(self.degrees.micro_batch / self.degrees.cp)
        self.bound = bound or Bound(space.graph, space.cluster, space.shardings, list(batches), space.costs, space.workload.optimizer)
        recompute = space.fixed.get("recompute", "by stage")
        self.modes = (0, 1, 2) if recompute == "by stage" else (RECOMPUTE.index(recompute),)
        if not len(space.graph.layers):
            self.modes = (0,)
        self.bounds = Bounds(self.bound, self.modes)
        self._host_bytes = space.cluster.host.memory_bytes if space.cluster.host is not None else 0.0
        memories = [d.memory_bytes for d in self.bound.devices]
        self._most_memory = max(memories) / min(memories)
        self._details, self._which = space.details_of(self.degrees)
        self.children = np.array([d.count for d in self._details])[self._which]  # layouts under each row of degrees
        if not self.size:
            raise InputError(space.nothing())
        self.setup_s = time.perf_counter() - started

    @property
    def size(self) -> int:
        """Layouts in the space."""
        return int(self.children.sum())

    @cached_property
    def ends(self) -> Ends:
        return self.bounds.ends

    # -- what a layout may hold

    def capacity(self, x: Layouts) -> np.ndarray:
        """Live bytes that a rank of each layout may have; none where the host has no room for what is offloaded to it."""
        tight = self.bound.reported(x).device[1]
        room = np.asarray((self.limit_bytes - np.asarray(tight.fixed)) / tight.slope)
        return np.where(self.bound.host_bytes(x) > self._host_bytes, -1.0, room)

    def device_bytes(self, x: Layouts, live: float) -> DeviceBytes:
        """What the device of a rank of a layout (one row) reports for `live` bytes, by metric."""
        reported = self.bound.reported(x)
        lines = [[float((line.slope * live + np.broadcast_to(line.fixed, 1))[0]) for line in pair] for pair in reported]
        return DeviceBytes(*((low, high) for low, high in lines))

    def reserved_bytes(self, x: Layouts, live: float) -> tuple[float, float]:
        """p50 and p95 of what a rank of a layout (one row) takes of its device for `live` bytes."""
        low, high = self.device_bytes(x, live).device
        return float(low), float(high)

    # -- exact

    def stages(self, x: Layouts, modes: tuple[int, ...] | None = None, unlimited: bool = False) -> Stages:
        """The stage problem of a layout (one row)."""
        p = self.bound.price(x)
        return self._stages(x, p, float(self.capacity(x)[0]) if not unlimited else np.inf, modes)

    def _stages(self, x: Layouts, p: Priced, capacity: float, modes: tuple[int, ...] | None = None) -> Stages:
        ends, pp = self.ends, int(x.pp[0])
        modes = modes or ((0,) if SCHEDULES[int(x.schedule[0])] in SPLIT else self.modes)  # recompute beside gradients that wait is not modelled
        c = p.c[:, 0][:, None] + p.again[:, 0]  # [types, 3, blocks]
        e = p.once[:, 0]
        first = np.concatenate([ends.before, ends.between]).astype(int)
        groups, share = self._types(pp)  # which types a stage has, and its share of the least memory
        c = np.array([c[list(g)].max(axis=0) for g in groups[0]])
        e = np.array([e[list(g)].max(axis=0) for g in groups[0]])
        memory: dict[bytes, Any] = {}

        def of(chosen: np.ndarray) -> Any:
            key = np.asarray(chosen, np.int8).tobytes()
            if key not in memory:
                memory[key] = self.bound.stage_memory(x, 0, chosen)
            return memory[key]

        return Stages(
            StageProblem(
                c=c[:, :, ends.layers], e=e[:, ends.layers], before=np.stack([c[:, 0, first].sum(1), e[:, first].sum(1)], 1),
                after=np.stack([c[:, 0, ends.after].sum(1), e[:, ends.after].sum(1)], 1), pp=pp, microbatches=int(x.microbatches[0]),
                ratio=float(p.ratio[0]), send_s=float(p.send[0]), capacity=capacity * share, types=np.array(groups[1]), memory=of,
                kinds=ends.layers, modes=modes, partial=modes == (0, 1, 2), vpp=int(x.vpp[0]), v_shape=SCHEDULES[int(x.schedule[0])] in V_SHAPED,
            )
        )  # fmt: skip

    def _types(self, pp: int) -> tuple[tuple[list[tuple[int, ...]], list[int]], np.ndarray]:
        """Of a mixed cluster, the kinds of device in each of `pp` stages: distinct sets, which set a stage has, and its least memory over
        that of the cluster. Ranks are numbered node by node, so that a stage has a run of nodes."""
        devices = self.bound.devices
        if len(devices) == 1:
            return ([(0,)], [0] * pp), np.ones(pp)
        nodes = [n for n in self.space.cluster.nodes for _ in range(n.count)]
        kind = np.array([devices.index(n.spec) for n in nodes])[self.space.cluster.node_of].reshape(pp, -1)
        sets = [tuple(np.unique(row).tolist()) for row in kind]
        unique = list(dict.fromkeys(sets))
        least = min(d.memory_bytes for d in devices)
        share = np.array([min(devices[i].memory_bytes for i in s) / least for s in sets])
        return (unique, [unique.index(s) for s in sets]), share

    def evaluate(self, x: Layouts, cutoff: float = np.inf, p: Priced | None = None) -> Candidate | None:
        """A layout (one row) with its cheapest cut that fits and takes less than `cutoff`, or None; `p` if it is priced already."""
        p = p or self.bound.price(x)
        cut = self._stages(x, p, float(self.capacity(x)[0])).best(cutoff)
        return None if cut is None else self.candidate(x, cut)

    def candidate(self, x: Layouts, cut: Cut) -> Candidate:
        return Candidate(layout_of(x, 0, recompute_of(cut, SCHEDULES[int(x.schedule[0])] in V_SHAPED)), cut.step_s, cut, x)

    def row(self, layout: Layout) -> Layouts:
        return to_arrays([layout], self.space.workload)

    def priced(self, c: Candidate) -> Priced:
        """What the cost model says of a candidate's layout: arrays of one layout."""
        return self.bound.price(c.row)

    def chunks(self, c: Candidate) -> list[list[tuple[int, int]]]:
        """The layers [first, last) of each chunk of each rank of a candidate."""
        return chunks_of(c.ends, c.layout.pp, c.layout.schedule in V_SHAPED)

    def rank_blocks(self, c: Candidate, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks that a rank of a candidate holds, and the recompute mode of each (0 outside the layers)."""
        ends, chunks, choice = self.ends, self.chunks(c)[rank], c.cut.choices[rank]
        layers = np.concatenate([ends.layers[a:b] for a, b in chunks]) if len(ends.layers) else np.zeros(0, int)
        modes = np.where(np.arange(len(layers)) < choice.layers, choice.mode, 0)
        first, last = chunks[0][0] == 0, chunks[-1][1] == len(ends.layers)
        outside = [*([ends.before, ends.between] if first else []), *([ends.after] if last else [])]
        extra = np.concatenate(outside).astype(int) if outside else np.zeros(0, int)
        return np.concatenate([extra, layers]).astype(int), np.concatenate([np.zeros(len(extra), int), modes]).astype(int)

    def sides(self, c: Candidate, rank: int) -> int:
        """Transfers that a rank pays for a microbatch: one on each side of a chunk that has a neighbour on another rank."""
        x = c.layout
        if x.pp == 1:
            return 0
        total, virtual = 0, x.pp * x.vpp
        for k in [rank, 2 * x.pp - 1 - rank] if x.schedule in V_SHAPED else range(rank, virtual, x.pp):
            for other in (k - 1, k + 1):
                turn = x.schedule in V_SHAPED and {k, other} == {x.pp - 1, x.pp}
                total += 0 <= other < virtual and not turn
        return total

    def device_type(self, c: Candidate, rank: int) -> list[int]:
        """Kinds of device (of Bound.devices) in a stage."""
        (sets, which), _ = self._types(c.layout.pp)
        return list(sets[which[rank]])

    def memory_of(self, c: Candidate, rank: int) -> tuple[str, str, dict[str, float]]:
        """The moment at which a rank of a candidate peaks, in what (a layer, the embedding, the loss), and its bytes by category."""
        name, block, parts = self.stages(c.row).peak(c.ends, c.cut.choices, rank)
        layers = np.flatnonzero(self.bound.repeated[self.bound.order])
        before = len(layers) > 0 and block < layers[0]
        return name, "a layer" if len(layers) and self.bound.repeated[self.bound.order[block]] else "the embedding" if before else "the loss", parts

    def holding(self, fix: dict[str, Any]) -> Search:
        """The search of this space with more of the layout held. Raises InputError where the space has no such layout."""
        space = self.space.holding(fix)
        return Search(space, self.limit_bytes, self.bound)

    # -- search

    def run(
        self, top: int = 1, progress: Callable[[int, int], None] | None = None, max_seconds: float | None = None, cutoff: float = np.inf
    ) -> Outcome:
        """The `top` cheapest layouts that fit, proved, or, when `max_seconds` are over, the best so far with the gap. Layouts at or above
        `cutoff` seconds do not count."""
        return _Run(self, top, progress, max_seconds, cutoff).go()

    def expand(self, rows: np.ndarray) -> tuple[Layouts, np.ndarray, np.ndarray]:
        """Rows of degrees with every ZeRO stage and replicas; the row of degrees that each comes from, and its layouts below."""
        parts, origin, below = [], [], []
        for which in np.unique(self._which[rows]):
            d = self._details[which]
            mine = rows[self._which[rows] == which]
            n = len(d.sharding)
            x = self.degrees.take(np.repeat(mine, n))
            zero, replicas = np.tile(d.sharding, (len(mine), 1)).T
            parts.append(x.with_columns(zero=zero, replicas=replicas))
            origin.append(np.repeat(mine, n))
            below.append(np.tile(d.below, len(mine)))
        return Layouts.join(parts), np.concatenate(origin), np.concatenate(below)

    def finish(self, x: Layouts, origin: np.ndarray) -> Layouts:
        """What `expand` gave with every schedule, loss and optimizer state."""
        parts = []
        for which in np.unique(self._which[origin]):
            d = self._details[which]
            mine = np.flatnonzero(self._which[origin] == which)
            both = [np.concatenate([a, b]) for a in d.schedule for b in d.rest]
            columns = np.tile(np.array(both, np.int64).reshape(-1, 5), (len(mine), 1)).T
            names = ("schedule", "vpp", "loss", "state", "offload")
            every = x.take(np.repeat(mine, len(both))).with_columns(**dict(zip(names, columns)))
            parts.append(every.take(np.flatnonzero(runs_together(every.zero, every.schedule))))
        return Layouts.join(parts)

    def least_memory(self) -> tuple[float, Candidate]:
        """The layout and cut whose fullest rank is least over what it may hold: by how many live bytes, and the candidate.

        Over a space this is a search of its own, by memory bounds alone (leastmemory.py)."""
        found = least_memory(self).best[0]
        return (found.bytes - self.limit_bytes) / self.bound.reported(found.candidate.row).device[1].slope, found.candidate


def chunks_of(ends: Sequence[int], pp: int, v_shape: bool) -> list[list[tuple[int, int]]]:
    """The layers [first, last) of each chunk of each rank."""
    spans = list(zip((0, *ends[:-1]), ends))
    v = len(spans) // pp
    if v_shape:
        return [[spans[r], spans[2 * pp - 1 - r]] for r in range(pp)]
    return [[spans[c * pp + r] for c in range(v)] for r in range(pp)]


def recompute_of(cut: Cut, v_shape: bool) -> str:
    """The recompute of every stage, or "by stage" where they differ."""
    lengths = [sum(b - a for a, b in chunks) for chunks in chunks_of(cut.ends, len(cut.choices), v_shape)]
    found = {RECOMPUTE[c.mode] if c.layers == n or c.mode == 0 else "by stage" for c, n in zip(cut.choices, lengths)}
    return found.pop() if len(found) == 1 else "by stage"


class _Run:
    """One search: a heap of layouts under their bounds, filled from degrees in the order of theirs."""

    def __init__(self, search: Search, top: int, progress: Any, max_seconds: float | None, cutoff: float) -> None:
        self.s, self.top, self.progress, self.max_seconds, self.cutoff = search, top, progress, max_seconds, cutoff
        self.started = time.perf_counter()
        self.n = _Counts()
        self.best: list[Candidate] = []
        self.heap: list[tuple[float, int, int]] = []  # bound, whether with peaks, order of arrival
        self.rows: list[Layouts] = []  # in order of arrival, in parts
        self.starts: list[int] = [0]
        self.ready: dict[int, Priced] = {}  # by order of arrival, of those that are about to be evaluated

    @property
    def threshold(self) -> float:
        return self.best[-1].step_s if len(self.best) == self.top else self.cutoff

    @property
    def reach(self) -> float:
        """Steps up to here count: those as long as the best too, so that of equal layouts the plainest is found."""
        return self.threshold * (1 + TIE)

    @property
    def late(self) -> bool:
        return self.max_seconds is not None and time.perf_counter() - self.started + self.s.setup_s > self.max_seconds and bool(self.best)

    def go(self) -> Outcome:
        s, n = self.s, self.n
        x = s.degrees
        self.ratio = s.bound.least_ratio(x, s.space.schedules)
        bounds, fits = self._bounds(x, refine=True, ratio=self.ratio)
        n.memory += int(s.children[~fits].sum())
        order = np.flatnonzero(fits)
        order = order[np.argsort(bounds[order], kind="stable")]
        at, chunk = 0, FIRST
        while True:
            next_degrees = float(bounds[order[at]]) if at < len(order) else np.inf
            next_heap = self.heap[0][0] if self.heap else np.inf
            if min(next_degrees, next_heap) > self.reach or (at >= len(order) and not self.heap) or self.late:
                break
            if next_degrees <= next_heap:
                rows = order[at : at + chunk]
                rows = rows[bounds[rows] <= self.reach]
                self._add(rows)
                at += len(rows)
                chunk = min(2 * chunk, MORE)
            else:
                self._take()
            if self.progress is not None:
                self.progress(n.evaluated, len(order) - at)
        rest = order[at:]
        left = int(s.children[rest].sum()) + len(self.heap)
        bound = min(next_degrees, next_heap)
        late = bool(self.best) and bound < self.threshold * (1 - TIE) and self.late
        if not late:
            n.bound += left
        return self._outcome(bound, left if late else 0)

    def _bounds(self, x: Layouts, refine: bool, ratio: np.ndarray | None = None, peaks: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Bounds on the step of each layout, and whether it may fit; `peaks`: with the exact liveness of its blocks."""
        s = self.s
        p = self.priced = s.bound.price(x, ratio)
        self.n.priced += 0 if peaks else len(x)
        step, slowest, rest = s.bounds.step(x, p)
        capacity = s.capacity(x) * s._most_memory
        fits = s.bounds.live(x, p) <= capacity
        rows = np.flatnonzero(fits & (step <= self.reach))
        if refine and len(rows):
            per = (x.microbatches - p.ratio)[rows]
            ceiling = np.where(per > 0, (self.reach * (1 + TIE) - rest[rows]) / np.maximum(per, 1e-30), np.inf)  # beyond, it is pruned
            y, q = x.take(rows), p.take(rows)
            found = s.bounds.relaxed(y, q, capacity[rows], slowest[rows], ceiling, s.bounds.peaks(y, q) if peaks else None)
            fits[rows] &= np.isfinite(found)
            step[rows] = np.where(np.isfinite(found), per * np.where(np.isfinite(found), found, 0.0) + rest[rows], step[rows])
        return step, fits

    def _add(self, rows: np.ndarray) -> None:
        """Gives degrees their details, prices and prunes them, and puts what is left on the heap."""
        s, n = self.s, self.n
        if not len(rows):
            return
        x, origin, below = s.expand(rows)
        if not len(x):
            return
        bounds, fits = self._bounds(x, refine=True, ratio=self.ratio[origin])
        n.memory += int(below[~fits].sum())
        good = fits & (bounds <= self.reach)
        n.bound += int(below[fits & ~good].sum())
        if not good.any():
            return
        x = s.finish(x.take(np.flatnonzero(good)), origin[good])
        bounds, fits = self._bounds(x, refine=True)
        n.memory += int((~fits).sum())
        good = fits & (bounds <= self.reach)
        n.bound += int((fits & ~good).sum())
        kept = np.flatnonzero(good)
        self.heap += [(bound, 0, self.starts[-1] + i) for i, bound in enumerate(bounds[kept].tolist())]
        heapq.heapify(self.heap)
        self.rows.append(x.take(kept))
        self.starts.append(self.starts[-1] + len(kept))

    def _arrived(self, order: int) -> Layouts:
        """The layout that came as the `order`-th, one row."""
        part = bisect.bisect_right(self.starts, order) - 1
        at = order - self.starts[part]
        return self.rows[part].take(slice(at, at + 1))

    def _take(self) -> None:
        """Evaluates the first layout on the heap, or bounds the first ones once more."""
        if not self.heap[0][1]:
            taken: list[tuple[float, int, int]] = []
            while self.heap and len(taken) < AGAIN:
                taken.append(heapq.heappop(self.heap))
            first = [t for t in taken if not t[1]]
            for t in taken:
                if t[1]:
                    heapq.heappush(self.heap, t)
            x = Layouts.join([self._arrived(t[2]) for t in first])
            bounds, fits = self._bounds(x, refine=True, peaks=True)
            self.n.memory += int((~fits).sum())
            self.n.bound += int((fits & (bounds > self.reach)).sum())
            for i in np.flatnonzero(fits & (bounds <= self.reach)):
                heapq.heappush(self.heap, (max(float(bounds[i]), first[i][0]), 1, first[i][2]))
                self.ready[first[i][2]] = self.priced.take(np.array([i]))
            return
        order = heapq.heappop(self.heap)[2]
        row = self._arrived(order)
        self.n.evaluated += 1
        found = self.s.evaluate(row, self.reach, self.ready.pop(order))
        if found is None:
            self.n.infeasible += 1
        else:
            self.best = sorted([*self.best, found], key=lambda c: (c.step_s, order_of(c.layout)))[: self.top]

    def _outcome(self, next_bound: float, still_open: int) -> Outcome:
        n, best = self.n, self.best
        bound_s = min(best[0].step_s, next_bound) if best else 0.0
        status = "time limit" if still_open else "optimal" if best else "infeasible"
        gap = best[0].step_s / bound_s - 1 if best and bound_s > 0 else 0.0
        return Outcome(
            tuple(best),
            Certificate(
                status=status, gap=max(gap, 0.0), bound_s=bound_s, seconds=self.s.setup_s + time.perf_counter() - self.started,  # type: ignore[arg-type]
                space=self.s.size, pruned_by_memory=n.memory, pruned_by_bound=n.bound, evaluated=n.evaluated, infeasible=n.infeasible,
                priced=n.priced, open=still_open,
            ),
        )  # fmt: skip


def order_of(x: Layout) -> tuple[Any, ...]:
    """Of layouts that take equally long, the plainer first."""
    schedule = SCHEDULES.index(x.schedule)
    return (x.cp, x.etp, x.offload, x.loss == "chunked", x.vpp, schedule, x.replicas, x.tp, x.sp, x.ep, x.pp, x.zero, x.micro_batch)


__all__ = ["Candidate", "Choice", "Outcome", "Search", "chunks_of", "order_of", "recompute_of"]
