"""Branch and bound over layouts: every layout is evaluated, bounded away or shown not to fit, and the certificate counts which."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from meshwright.costmodel.memory import persistent_bytes
from meshwright.costmodel.step import Bound, Layouts, Priced
from meshwright.planner.plan import Certificate, Layout
from meshwright.planner.space import Space, to_arrays
from meshwright.planner.stages import StageProblem, Stages


@dataclass(frozen=True)
class Candidate:
    """A layout with its best cut into stages."""

    index: int
    layout: Layout
    step_s: float
    ends: tuple[int, ...]
    live_bytes: float


@dataclass(frozen=True)
class Outcome:
    """What a search found: the best layouts in order (empty if nothing fits) and the proof."""

    best: tuple[Candidate, ...]
    certificate: Certificate


class Search:
    """A space priced on a cluster. `limit_bytes` bounds p95 of the memory that a rank may reserve."""

    def __init__(self, space: Space, limit_bytes: float) -> None:
        started = time.perf_counter()
        self.space = space
        self.layouts = space.layouts()
        self.arrays = to_arrays(self.layouts, space.workload)
        self.bound = Bound(space.graph, space.cluster, space.shardings, [x.micro_batch for x in self.layouts], space.costs)
        self.priced = self.bound.price(self.arrays)
        device = space.cluster.device
        self.limit_bytes = limit_bytes
        self.reserved, self.overhead = device.reserved_bytes, device.allocator_overhead
        self.capacity = (limit_bytes - self.reserved) / (1 + self.overhead)  # of live bytes
        blocks = np.array([o.block for o in space.graph.sequence])
        repeated = np.flatnonzero(self.bound.repeated[blocks])
        self._layers = blocks[repeated]
        first, last = (repeated[0], repeated[-1]) if len(repeated) else (len(blocks), len(blocks))
        self._before, self._after = blocks[:first], blocks[last + 1 :]
        self._between = [b for b in blocks[first : last + 1] if not self.bound.repeated[b]]
        self.step_bounds = self._step_bounds(self.priced, self.arrays)
        self.memory_bounds = self._memory_bounds(self.priced, self.arrays)
        self._exact: dict[int, Candidate | None] = {}
        self.setup_s = time.perf_counter() - started

    # -- bounds

    def _sums(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(x @ self.bound.counts)

    def _step_bounds(self, p: Priced, a: Layouts) -> np.ndarray:
        """A lower bound on the step of each layout over every cut into stages; exact for one stage."""
        c, e = p.per_microbatch, p.once
        total = self._sums(c) + 2 * (a.pp - 1) * p.send
        slowest = total / a.pp
        ends = [c[:, part].sum(axis=1) for part in (self._before, self._after)]
        if len(self._layers):
            slowest = np.maximum(slowest, c[:, np.unique(self._layers)].max(axis=1))
            many = a.pp > 1
            for outer, layer in zip(ends, (self._layers[0], self._layers[-1]), strict=True):
                slowest = np.maximum(slowest, np.where(many, outer + c[:, layer] + p.send, 0.0))
        once = np.maximum(self._sums(e) / a.pp, e[:, np.unique(self._layers)].max(axis=1) if len(self._layers) else 0.0)
        return np.asarray((a.microbatches - 1) * slowest + total + once)

    def _memory_bounds(self, p: Priced, a: Layouts) -> np.ndarray:
        """A lower bound on the live bytes of the fullest rank over every cut: what the average stage holds."""
        numel = self._sums(p.numel)
        least = persistent_bytes(
            numel / a.pp, np.zeros(len(a)), np.zeros(len(a)), zero=a.zero, dp=a.dp, compute_bytes=self.bound.compute_bytes,
            accumulates=a.microbatches > 1,
        )  # fmt: skip
        return np.asarray(least.total + self._sums(p.kept) / a.pp)

    # -- exact

    def stages(self, i: int) -> Stages:
        """The stage problem of layout i."""
        p, a, layers = self.priced, self.arrays, self._layers
        c, e = p.per_microbatch[i], p.once[i]

        def outside(blocks: np.ndarray) -> tuple[float, float, float, float, float]:
            extra = max((p.working[i, b] - p.kept[i, b] for b in blocks), default=0.0)
            kept = float(p.kept[i, blocks].sum()) if len(blocks) else 0.0
            return (float(c[blocks].sum()), float(e[blocks].sum()), kept, kept + float(extra), float(p.numel[i, blocks].sum()))

        before = np.concatenate([self._before, np.array(self._between, int)]).astype(int)
        return Stages(
            StageProblem(
                c=c[layers], e=e[layers], kept=p.kept[i, layers], working=p.working[i, layers], numel=p.numel[i, layers],
                before=outside(before), after=outside(self._after), pp=int(a.pp[i]), microbatches=int(a.microbatches[i]),
                send_s=float(p.send[i]), carry_bytes=float(p.carry[i]), zero=int(a.zero[i]), dp=int(a.dp[i]),
                compute_bytes=self.bound.compute_bytes,
            )
        )  # fmt: skip

    def stage_blocks(self, ends: list[int], stage: int) -> np.ndarray:
        """Block index of everything that a stage of a cut holds, in order."""
        first = ends[stage - 1] if stage else 0
        parts = [self._layers[first : ends[stage]]]
        if stage == 0:
            parts = [self._before, np.array(self._between, int), *parts]
        if stage == len(ends) - 1:
            parts.append(self._after)
        return np.concatenate(parts).astype(int)

    def evaluate(self, i: int) -> Candidate | None:
        """Layout i with its cheapest cut that fits, or None."""
        if i not in self._exact:
            stages = self.stages(i)
            found = stages.best(self.capacity)
            self._exact[i] = None
            if found is not None:
                step, ends = found
                live = max(x.live_bytes for x in stages.costs(ends))
                self._exact[i] = Candidate(i, self.layouts[i], step, tuple(ends), live)
        return self._exact[i]

    def run(self, top: int = 1, among: np.ndarray | None = None, progress: Callable[[int, int], None] | None = None) -> Outcome:
        """The `top` cheapest layouts that fit (of the rows `among`), proved: ties go to the smaller index."""
        started = time.perf_counter()
        rows = np.arange(len(self.layouts)) if among is None else np.asarray(among)
        small = self.memory_bounds[rows] <= self.capacity
        pruned_by_memory = int((~small).sum())
        order = rows[small][np.argsort(self.step_bounds[rows[small]], kind="stable")]
        best: list[Candidate] = []
        evaluated = infeasible = 0
        next_bound = float("inf")
        for n, i in enumerate(order):
            if len(best) == top and self.step_bounds[i] >= best[-1].step_s:
                next_bound = float(self.step_bounds[i])
                break
            if progress is not None and n % 16 == 0:
                progress(n, len(order))
            evaluated += 1
            candidate = self.evaluate(int(i))
            if candidate is None:
                infeasible += 1
                continue
            best = sorted([*best, candidate], key=lambda x: (x.step_s, x.index))[:top]
        bound_s = min(best[0].step_s, next_bound) if best else 0.0
        return Outcome(
            tuple(best),
            Certificate(
                status="optimal" if best else "infeasible", gap=0.0, bound_s=bound_s, seconds=self.setup_s + time.perf_counter() - started,
                space=len(rows), pruned_by_memory=pruned_by_memory, pruned_by_bound=len(order) - evaluated, evaluated=evaluated,
                infeasible=infeasible,
            ),
        )  # fmt: skip

    def least_memory(self, among: np.ndarray | None = None) -> tuple[int, float, list[int]]:
        """The layout (of the rows `among`) whose fullest rank holds least: its index, live bytes and stage ends."""
        rows = np.arange(len(self.layouts)) if among is None else np.asarray(among)
        best: tuple[float, int, list[int]] | None = None
        for i in rows[np.argsort(self.memory_bounds[rows], kind="stable")]:
            if best is not None and self.memory_bounds[i] >= best[0]:
                break
            live, ends = self.stages(int(i)).least_memory()
            if best is None or live < best[0]:
                best = (live, int(i), ends)
        assert best is not None
        return best[1], best[0], best[2]

    def too_large(self) -> np.ndarray:
        """The rows that are known not to fit: by their bound, or evaluated."""
        exact = np.array([i in self._exact and self._exact[i] is None for i in range(len(self.layouts))])
        return np.flatnonzero((self.memory_bounds > self.capacity) | exact)

    def loss_is_peak(self, i: int) -> bool:
        """Whether the last stage's memory peaks in the blocks after the layers (the loss) rather than in a layer."""
        extra = self.priced.working[i] - self.priced.kept[i]
        after = max((extra[b] for b in self._after), default=0.0)
        return bool(after >= max((extra[b] for b in self._layers), default=0.0))

    def reserved_bytes(self, live: float) -> tuple[float, float]:
        """p50 and p95 of what a rank reserves for `live` bytes."""
        return live + self.reserved, live * (1 + self.overhead) + self.reserved
