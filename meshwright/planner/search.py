"""Branch and bound over layouts: every layout is evaluated, bounded away or shown not to fit, and the certificate counts which."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.costmodel.allocator import DeviceBytes
from meshwright.costmodel.memory import MASTER, OPTIMIZERS, REDUCED
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
        self.bound = Bound(space.graph, space.cluster, space.shardings, [x.micro_batch for x in self.layouts], space.costs, space.workload.optimizer)
        self.priced = self.bound.price(self.arrays)
        self.limit_bytes = limit_bytes
        self.reported = self.bound.reported(self.arrays)
        tight = self.reported.device[1]
        self.capacity = (limit_bytes - np.asarray(tight.fixed)) / tight.slope  # of live bytes, of each layout
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
        numel = self._sums(p.numel) - self.bound.tied_numel(a)
        shards = np.where(a.zero > 0, a.dp, 1)
        held = (MASTER + OPTIMIZERS[self.space.workload.optimizer].state_bytes) * numel / shards / a.pp
        fsdp = (a.dp > 1) | (self.bound.compute_bytes < MASTER)
        gathered = np.where(fsdp & (a.zero < 3), self.bound.compute_bytes * numel / a.pp, 0.0)
        many = a.microbatches > 1
        gradients = np.where(many, REDUCED * numel / np.where(a.zero < 2, 1, shards) / a.pp, 0.0)
        return np.asarray(held + gathered + gradients + self._sums(p.kept) / a.pp)

    # -- exact

    def stages(self, i: int) -> Stages:
        """The stage problem of layout i."""
        p, a, layers = self.priced, self.arrays, self._layers
        c, e = p.per_microbatch[i], p.once[i]
        before = np.concatenate([self._before, np.array(self._between, int)]).astype(int)
        return Stages(
            StageProblem(
                c=c[layers], e=e[layers], before=(float(c[before].sum()), float(e[before].sum())),
                after=(float(c[self._after].sum()), float(e[self._after].sum())), pp=int(a.pp[i]), microbatches=int(a.microbatches[i]),
                send_s=float(p.send[i]), memory=self.bound.stage_memory(a, i),
            )
        )  # fmt: skip

    def memory_of(self, i: int, ends: Sequence[int], stage: int) -> tuple[str, str, dict[str, float]]:
        """The moment at which a stage of a cut of layout i peaks, in what (a layer, the embedding, the loss), and its bytes by category."""
        memory = self.bound.stage_memory(self.arrays, i)
        name, at, parts = memory.peak(ends[stage - 1] if stage else 0, ends[stage], stage)
        before = len(memory.at) > 0 and at < memory.at[0]
        return name, "a layer" if memory.b.layer[at] else "the embedding" if before else "the loss", parts

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
            found = stages.best(float(self.capacity[i]))
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
        small = self.memory_bounds[rows] <= self.capacity[rows]
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
        """The layout (of the rows `among`) whose fullest rank takes least of its device (p95): its index, live bytes and stage ends."""
        rows = np.arange(len(self.layouts)) if among is None else np.asarray(among)
        bounds = self.memory_bounds - self.capacity  # over the limit by so many live bytes at least: what a layout reserves counts
        best: tuple[float, int, float, list[int]] | None = None
        for i in rows[np.argsort(bounds[rows], kind="stable")]:
            if best is not None and bounds[i] >= best[0]:
                break
            live, ends = self.stages(int(i)).least_memory()
            over = live - float(self.capacity[i])
            if best is None or over < best[0]:
                best = (over, int(i), live, ends)
        assert best is not None
        return best[1:]

    def too_large(self) -> np.ndarray:
        """The rows that are known not to fit: by their bound, or evaluated."""
        exact = np.array([i in self._exact and self._exact[i] is None for i in range(len(self.layouts))])
        return np.flatnonzero((self.memory_bounds > self.capacity) | exact)

    def device_bytes(self, i: int, live: float) -> DeviceBytes:
        """What the device of a rank of layout i reports for `live` bytes, by metric."""
        lines = [[float(line.slope * live + np.broadcast_to(line.fixed, len(self.layouts))[i]) for line in pair] for pair in self.reported]
        return DeviceBytes(*((low, high) for low, high in lines))

    def reserved_bytes(self, i: int, live: float) -> tuple[float, float]:
        """p50 and p95 of what a rank of layout i takes of its device for `live` bytes."""
        low, high = self.device_bytes(i, live).device
        return float(low), float(high)
