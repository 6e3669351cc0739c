"""What the ranks of a layout cost: seconds and memory of the layers that each holds, and the choices of recompute they pick from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from meshwright.costmodel.chunkmemory import least_times
from meshwright.costmodel.stagememory import Place, StageMemory
from meshwright.planner.stagealike import _Bank, _kinds
from meshwright.planner.stageproblem import FULL, NONE, SAME, SELECTIVE, Choice, Chunks, Cut, StageCost, StageProblem


@dataclass(frozen=True)
class _Options:
    """Choices of recompute for things that a rank may hold, sorted by `of` and then by how much is recomputed."""

    of: np.ndarray  # [options] which thing
    mode: np.ndarray
    layers: np.ndarray
    c: np.ndarray  # [pp, options] seconds
    live: np.ndarray  # [pp, options] bytes

    def least(self, cost: np.ndarray, things: int) -> np.ndarray:
        """[pp, things] the least of `cost` [pp, options] over each thing's options; infinite where it has none."""
        found = np.full((len(cost), things), np.inf)
        if len(self.of):
            starts = np.flatnonzero(np.diff(self.of, prepend=-1))
            found[:, self.of[starts]] = np.minimum.reduceat(cost, starts, axis=1)
        return found

    def fitting(self, capacity: np.ndarray, things: int) -> np.ndarray:
        """[pp, things] seconds of the cheapest option that fits."""
        return self.least(np.where(self.live <= capacity[:, None], self.c, np.inf), things)


def _joins(chunks: Chunks) -> int:
    """How many chunks follow on the one before, where a V turns: nothing is sent between them."""
    return sum(a[1] == b[0] for a, b in itertools.pairwise(chunks))


def _cheapest(options: Sequence[_Options], thing: int, rank: int, capacity: float) -> tuple[Choice, float]:
    """The cheapest choice that fits, and its live bytes; of equal ones that which recomputes least."""
    found = []
    for o in options:
        for i in range(*np.searchsorted(o.of, [thing, thing + 1]).tolist()):
            if o.live[rank, i] <= capacity:
                found.append((float(o.c[rank, i]), Choice(int(o.mode[i]), int(o.layers[i])), float(o.live[rank, i])))
    least = min(found)[0]
    return min(((choice, live) for c, choice, live in found if c <= least + SAME * abs(least)), key=lambda x: x[0])


class Ranks:
    """What a rank of one layout holds, and what that costs: seconds and memory of layers as any stage, under any choice."""

    def __init__(self, problem: StageProblem) -> None:
        p = self.p = problem
        if not p.modes or not set(p.modes) <= {NONE, SELECTIVE, FULL}:
            raise ValueError(f"no such recompute modes: {p.modes}")
        if p.microbatches < p.ratio:
            raise ValueError(f"{p.microbatches} microbatches are fewer than the bubble ratio {p.ratio}")
        if p.v_shape and p.vpp != 2:
            raise ValueError("a V has two chunks a rank")
        self.types = np.asarray(p.types, int)
        self.capacity = np.asarray(p.capacity, float)
        self.weight = p.microbatches - p.ratio
        self.modes = tuple(sorted(set(p.modes)))
        self.partial = p.partial and NONE in self.modes and FULL in self.modes
        zero = np.zeros((*p.c.shape[:2], 1))
        self._c = np.concatenate([zero, np.cumsum(p.c, axis=2)], axis=2)
        self._e = np.concatenate([zero[:, 0], np.cumsum(p.e, axis=1)], axis=1)

    @cached_property
    def _kinds(self) -> np.ndarray:
        return _kinds(self.p)

    @cached_property
    def _bank(self) -> _Bank:
        return _Bank(self.p, self._kinds)

    # -- what a rank holds

    def chunks(self, ends: Sequence[int], rank: int) -> Chunks:
        """Layers that a rank holds."""
        p = self.p
        held = (rank, 2 * p.pp - 1 - rank) if p.v_shape else range(rank, p.pp * p.vpp, p.pp)
        return tuple((ends[k - 1] if k else 0, ends[k]) for k in held)

    def _outside(self, chunks: Chunks, kind: int, types: np.ndarray) -> np.ndarray:
        """What stands before and after the layers, and transfers; [types] seconds of a microbatch (0) or once a step (1)."""
        p = self.p
        stem, head = chunks[0][0] == 0, chunks[-1][1] == p.layers
        links = 2 * (len(chunks) - _joins(chunks)) - stem - head
        return np.asarray(p.before[types, kind] * stem + p.after[types, kind] * head + links * p.send_s * (kind == 0))

    def _seconds(self, chunks: Chunks, choice: Choice, types: np.ndarray) -> np.ndarray:
        """[types] seconds of a microbatch."""
        left, total = choice.layers, self._outside(chunks, 0, types)
        for first, last in chunks:
            k = min(left, last - first)
            total = total + self._between(first, first + k, last, choice.mode, types)
            left -= k
        return total

    def _between(self, first: int, border: int, last: int, mode: int, types: np.ndarray) -> np.ndarray:
        done, rest = self._c[types, mode], self._c[types, NONE]
        return np.asarray(done[:, border] - done[:, first] + (rest[:, last] - rest[:, border] if border < last else 0.0))

    def _once(self, chunks: Chunks, types: np.ndarray) -> np.ndarray:
        """[types] seconds once a step."""
        return np.asarray(sum((self._e[types, last] - self._e[types, first] for first, last in chunks), self._outside(chunks, 1, types)))

    def _memory(self, held: Sequence[tuple[Chunks, Choice]], like: bool) -> StageMemory:
        """One memory of all the ranks that hold `held`, one behind another."""
        bank, index = self._bank, list[np.ndarray]()
        for chunks, choice in held:
            left = choice.layers
            for first, last in chunks:
                k = min(left, last - first)
                left -= k
                border = first + k if 0 < k < last - first else None
                index += bank.pick(*bank.blocks(first, last), choice.mode if k else NONE, border, like)
        return bank.joined(index)

    def _placed(self, memory: StageMemory, held: Sequence[Chunks]) -> tuple[np.ndarray, np.ndarray, Place]:
        """Where each of the ranks begins and ends that stand in a memory one behind another, and its place in the pipeline."""
        of_chunk = np.array([(*self._bank.blocks(a, b), a == 0, b == self.p.layers) for chunks in held for a, b in chunks])
        ends = np.cumsum(of_chunk[:, 1] - of_chunk[:, 0])
        begins = np.append(0, ends[:-1])
        borders = np.concatenate([begins.reshape(len(held), -1).T, ends.reshape(len(held), -1)[:, -1:].T])
        # chunks that follow on each other, where a V turns, are one but for their borders
        follows = np.array([i > 0 and chunks[i - 1][1] == chunks[i][0] for chunks in held for i in range(len(chunks))])
        many = len(held[0]) - follows.reshape(len(held), -1).sum(axis=1)
        first, last = np.flatnonzero(~follows), np.flatnonzero(~np.append(follows[1:], False))
        stem, head = of_chunk[first, 2] > 0, of_chunk[last, 3] > 0
        until = np.cumsum(many)
        since = until - many
        returned = np.add.reduceat(memory.returned(begins[first], ends[last], stem, head), since)
        return begins[first][since], ends[last][until - 1], Place(stem[since], head[until - 1], many, returned, borders)

    def _times(self, memory: StageMemory, chunks: Chunks, ranks: np.ndarray) -> np.ndarray:
        """[ranks, layers] how often the lower bound on live bytes counts what each layer of `chunks` keeps."""
        sizes = [last - first for first, last in chunks]
        if memory.by_chunk:
            return np.repeat(least_times(memory.x, self.p.vpp, ranks), sizes, axis=1)
        return np.repeat(memory.flying(ranks)[:, None], sum(sizes), axis=1)

    def cost(self, ends: Sequence[int], choices: Sequence[Choice]) -> tuple[StageCost, ...]:
        """What each rank of a cut costs under its choice."""
        held = [(self.chunks(ends, r), choice) for r, choice in enumerate(choices)]
        memory = self._memory(held, like=False)
        return self._costs(ends, choices, memory.live_at(*self._placed(memory, [x for x, _ in held]), np.arange(self.p.pp)))

    def _costs(self, ends: Sequence[int], choices: Sequence[Choice], live: Sequence[float] | np.ndarray) -> tuple[StageCost, ...]:
        found = []
        for r, choice in enumerate(choices):
            chunks, types = self.chunks(ends, r), self.types[r : r + 1]
            c, e = self._seconds(chunks, choice, types)[0], self._once(chunks, types)[0]
            found.append(StageCost(float(c), float(e), float(live[r]), choice))
        return tuple(found)

    def step(self, costs: Sequence[StageCost]) -> float:
        """Step seconds of a cut with these ranks."""
        c = [x.c for x in costs]
        return float(self.weight * max(c) + self.p.ratio * sum(c) + max(x.e for x in costs))

    def peak(self, ends: Sequence[int], choices: Sequence[Choice], rank: int) -> tuple[str, int, dict[str, float]]:
        """The moment at which a rank of a cut peaks, in which of the model's blocks, and its bytes by category."""
        if not self.p.layers:
            return self.p.memory(np.zeros(0, int)).peak(0, 0, 0)
        chunks = self.chunks(ends, rank)
        memory = self._memory([(chunks, choices[rank])], like=False)
        begin, end, place = self._placed(memory, [chunks])
        borders = place.borders[:, 0]
        one = Place(bool(place.stem[0]), bool(place.head[0]), int(place.chunks[0]), float(place.returned[0]), borders)
        name, at, parts = memory.peak_at(begin[0], end[0], one, rank)
        return name, int(np.concatenate([np.arange(*self._bank.blocks(a, b)) for a, b in chunks])[at]), parts

    def _cut(self, ends: tuple[int, ...], picked: Sequence[tuple[Choice, float]]) -> Cut:
        choices = tuple(choice for choice, _ in picked)
        costs = self._costs(ends, choices, [live for _, live in picked])
        return Cut(self.step(costs), ends, choices, costs)

    def _least_cut(
        self, ends: tuple[int, ...], options: Sequence[_Options], things: Sequence[int] | np.ndarray, over: float
    ) -> tuple[float, Cut]:
        """The cut with each rank's cheapest choice that is at most `over` bytes above its capacity; and by how much the fullest is."""
        above = [replace(o, live=o.live - self.capacity[:, None]) for o in options]
        choices = tuple(_cheapest(above, int(thing), r, over)[0] for r, thing in enumerate(things))
        costs = self.cost(ends, choices)
        most = max(x.live_bytes - float(c) for x, c in zip(costs, self.capacity, strict=True))
        return most, Cut(self.step(costs), ends, choices, costs)

    def _no_layers(self) -> Cut:
        """The only cut of a model that is no sequence of layers."""
        memory, kind = self.p.memory(np.zeros(0, int)), int(self.types[0])
        c, e = (float(self.p.before[kind, i] + self.p.after[kind, i]) for i in (0, 1))
        cost = StageCost(c, e, float(memory.live(0, 0, 0)), Choice(NONE, 0))
        return Cut(self.step([cost]), (0,), (cost.choice,), (cost,))
