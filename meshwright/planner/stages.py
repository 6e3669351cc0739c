"""Layers to pipeline stages with recompute of each stage's own, exactly: which layers a rank holds, and which of them it runs again.

A step costs (m - ratio) max C + ratio sum C + max E over the ranks (costmodel/step.py): C seconds of a microbatch, E seconds once a
step. One chunk a rank: every cut into contiguous, possibly uneven stages and every choice of recompute. Recompute changes C and memory
only, so a stage takes the cheapest choice that fits its memory, whatever the others do. What is left is a shortest path over stages for
every pair of thresholds (T, U) on max C and max E: the least sum C with C <= T and E <= U. Pairs are bounded in boxes: the sum at a
box's upper corner with the thresholds at its lower corner is a lower bound of all that lies in it. Nothing is rounded away or sampled,
and no memory is assumed to grow or fall with the layers recomputed.

Several chunks a rank: the cuts are those of `spreads`, and each rank takes the cheapest choice that fits.

What a layer holds may depend on the modes of its neighbours (a layer that keeps what goes in beside one that keeps what comes out),
not on layers further off; and layers of one kind hold alike wherever they stand between the first and the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from meshwright.costmodel.stagememory import Place, StageMemory, joined

MODES = ("none", "selective", "full")  # in the order of costmodel.step.RECOMPUTE
NONE, SELECTIVE, FULL = range(3)
SAME = 1e-12  # steps that differ by less, relatively, are one
MOST = 4_000_000  # peaks worked out at once
MANY = 200  # choices from which on it pays to rule some out by a bound first
AT_ONCE = 12  # numbers of layers of one thing that are tried at once, from the cheapest on

Chunks = tuple[tuple[int, int], ...]  # layers [first, last) of the parts that a rank holds, in the model's order
Lengths = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # least and most layers: the first stage, those between, the last


@dataclass(frozen=True, order=True)
class Choice:
    """Recompute of one rank: `mode` (of MODES) in its first `layers` layers, none in the others."""

    mode: int
    layers: int


@dataclass(frozen=True)
class StageProblem:
    """One layout's layers as arrays, with what stands before the first layer and after the last.

    A stage with modes (2,) must use full in all of its layers; one with (0,) recomputes none.
    """

    c: np.ndarray  # [types, 3, layers] seconds of one microbatch, by device type and recompute mode
    e: np.ndarray  # [types, layers] seconds once a step
    before: np.ndarray  # [types, 2] (c, e) of what stands before the first layer
    after: np.ndarray  # [types, 2] of what stands after the last
    pp: int
    microbatches: int
    ratio: float  # bubble of the schedule over that of 1F1B
    send_s: float  # one transfer between neighbours; a chunk pays it on each side that has one on another rank
    capacity: np.ndarray  # [pp] live bytes that each rank's devices may hold
    types: np.ndarray  # [pp] device type of each rank
    memory: Callable[[np.ndarray], StageMemory]  # recompute mode of each layer -> memory of any layers as any stage
    kinds: np.ndarray  # [layers] equal numbers: equal layers
    modes: tuple[int, ...] = (0, 1, 2)  # that may be used
    partial: bool = True  # full recompute of only the first k layers of a rank may be chosen (needs modes 0 and 2)
    vpp: int = 1  # chunks of a rank
    v_shape: bool = False  # rank r holds virtual stages r and 2 pp - 1 - r; else chunk c of rank r is virtual stage c pp + r

    @property
    def layers(self) -> int:
        return int(self.c.shape[2])


@dataclass(frozen=True)
class StageCost:
    """One rank: seconds of a microbatch (transfers included), seconds once a step, live bytes at its peak, its recompute."""

    c: float
    e: float
    live_bytes: float
    choice: Choice


@dataclass(frozen=True)
class Cut:
    """Layers to ranks: end layer of each of the pp * vpp virtual stages; choice and cost of each rank."""

    step_s: float
    ends: tuple[int, ...]
    choices: tuple[Choice, ...]
    costs: tuple[StageCost, ...]


def spreads(layers: int, virtual: int) -> list[tuple[int, ...]]:
    """The cuts into virtual stages that several chunks a rank are chosen from, in order.

    For x in 0..2 and y in 0..3, layers + x + y are spread evenly over the virtual stages, one more in each of the last ones where they do
    not divide; then the first stage gives up x and the last y. Cuts with an empty stage are left out.
    """
    found = set()
    for x in range(3):
        for y in range(4):
            size, rest = divmod(layers + x + y, virtual)
            held = np.full(virtual, size) + (np.arange(virtual) >= virtual - rest)
            held[0] -= x
            held[-1] -= y
            if held.min() > 0:
                found.add(tuple(int(n) for n in np.cumsum(held)))
    return sorted(found)


# --- layers that are alike --------------------------------------------------------------------------------------------------


class _Alike:
    """Which intervals of layers hold equal layers in equal order. Intervals between the first layer and the last, without them."""

    def __init__(self, kinds: np.ndarray) -> None:
        self.kinds = kinds
        self._all = [kinds]  # by length - 1, of every start
        self._middle: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._near: dict[int, np.ndarray] = {}
        self.stands: dict[int, int] = {}  # which of `together` a border is in

    def middle(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """For length n: a start of each class of intervals, and the class of each start in 1 .. layers - 1 - n."""
        if n not in self._middle:
            while len(self._all) < n:
                last = self._all[-1]
                if not last.any():  # all alike
                    self._all.append(last[:-1])
                else:
                    key = last[:-1] * (len(self.kinds) + 1) + self.kinds[len(self._all) :]
                    self._all.append(np.unique(key, return_inverse=True)[1])
            inside = self._all[n - 1][1 : len(self.kinds) - n]
            _, starts, of = np.unique(inside, return_index=True, return_inverse=True)
            self._middle[n] = starts + 1, of
        return self._middle[n]

    def near(self, n: int) -> np.ndarray:
        """[classes, n - 1]: start of the interval of each class and length n whose border between its first k layers and the others is
        nearest to the middle of the model, so that many share one; k = 1 .. n - 1."""
        if n not in self._near:
            starts, of = self.middle(n)
            goal = len(self.kinds) // 2 - np.arange(1, n)
            if len(starts) == len(of):
                self._near[n] = np.repeat(starts[:, None], n - 1, axis=1)
            else:
                rows = []
                for i in range(len(starts)):
                    at = np.flatnonzero(of == i) + 1
                    above = np.clip(np.searchsorted(at, goal), 0, len(at) - 1)
                    below = np.maximum(above - 1, 0)
                    rows.append(np.where(abs(at[above] - goal) < abs(at[below] - goal), at[above], at[below]))
                self._near[n] = np.array(rows)
        return self._near[n]

    @cached_property
    def borders(self) -> np.ndarray:
        """[layers] for a border below each layer but the first, one with equal layers on both sides, as near to the middle as there is."""
        n = len(self.kinds)
        key = np.empty(n, int)
        key[1:] = self.kinds[:-1] * (n + 1) + self.kinds[1:]
        key[0], key[1 : 2 if n > 2 else 1], key[n - 1 :] = -1, -2, -3  # those at the ends are alone
        order = np.argsort(np.abs(np.arange(n) - n // 2), kind="stable")
        _, first, of = np.unique(key[order], return_index=True, return_inverse=True)
        found = np.empty(n, int)
        found[order] = order[first[of]]
        return found

    @cached_property
    def together(self) -> list[np.ndarray]:
        """Modes of the layers in which every border of `borders` stands once, so far from the next that no layer is beside two."""
        found: list[np.ndarray] = []
        last: list[int] = []
        for border in np.unique(self.borders[1:]).tolist():
            i = next((i for i, other in enumerate(last) if border - other >= 4), len(found))
            if i == len(found):
                found.append(np.full(len(self.kinds), NONE))
                last.append(border)
            found[i][max(border - 2, 0) : border] = FULL
            last[i] = border
            self.stands[border] = i
        return found


@lru_cache(maxsize=64)
def _alike(kinds: bytes) -> _Alike:
    return _Alike(np.frombuffer(kinds, int))


def _kinds(p: StageProblem) -> np.ndarray:
    """Kinds counted from 0; layers of one kind that cost differently are of two."""
    _, first, kinds = np.unique(p.kinds, return_index=True, return_inverse=True)
    of = first[kinds]
    if not (np.array_equal(p.c, p.c[:, :, of]) and np.array_equal(p.e, p.e[:, of])):
        columns = np.concatenate([kinds[None], p.c.reshape(-1, p.layers), p.e])
        kinds = np.unique(columns, axis=1, return_inverse=True)[1].ravel()
    return np.ascontiguousarray(kinds, int)


# --- memory -----------------------------------------------------------------------------------------------------------------


class _Bank:
    """Memory of the layers under every mode that was asked for, one behind another, block by block."""

    def __init__(self, p: StageProblem, kinds: np.ndarray) -> None:
        self.p = p
        self.memories: list[StageMemory] = []
        self._offset: dict[tuple[int, ...], int] = {}
        first = self.uniform(p.modes[0])
        self.at = self.memories[first].at
        self.n = len(self.memories[first].b.layer)
        if len(self.at) != p.layers:
            raise ValueError(f"the memory has {len(self.at)} layers, not {p.layers}")
        # blocks between layers: none are alike
        self.alike = _alike((kinds if self.at[-1] - self.at[0] == p.layers - 1 else np.arange(p.layers)).tobytes())

    def _add(self, key: tuple[int, ...], modes: np.ndarray) -> int:
        if key not in self._offset:
            memory = self.p.memory(modes)
            self._offset[key] = len(self.memories) * len(memory.b.layer)
            self.memories.append(memory)
        return self._offset[key]

    def uniform(self, mode: int) -> int:
        """Where the blocks begin of which every layer has one mode."""
        return self._add((mode,), np.full(self.p.layers, mode))

    def border(self, at: int) -> int:
        """Where the blocks begin of which layers below `at` are recomputed in full and the others not."""
        return self._add((FULL, at), np.where(np.arange(self.p.layers) < at, FULL, NONE))

    def border_like(self, at: int) -> tuple[int, int]:
        """Where the blocks begin that hold a border with equal layers on both sides, and where in them it is."""
        other = int(self.alike.borders[at])
        modes = self.alike.together
        which = self.alike.stands[other]
        return self._add((-1, which), modes[which]), other

    def blocks(self, first: int, last: int) -> tuple[int, int]:
        """Blocks [begin, end) of layers [first, last), with all that stands before the layers or behind them."""
        return int(self.at[first]) if first else 0, int(self.at[last - 1]) + 1 if last < self.p.layers else self.n

    def pick(self, begin: int, end: int, mode: int, border: int | None, like: bool) -> list[np.ndarray]:
        """Blocks [begin, end) under one mode, or in full below a border; `like`: around it, those of a border with equal layers."""
        if border is None:
            return [self.uniform(mode) + np.arange(begin, end)]
        if not like:
            return [self.border(border) + np.arange(begin, end)]
        blocks, other = self.border_like(border)
        low, high = int(self.at[border - 1]), int(self.at[border])
        return [
            self.uniform(FULL) + np.arange(begin, low),
            blocks + np.arange(self.at[other - 1], self.at[other] + 1),
            self.uniform(NONE) + np.arange(high + 1, end),
        ]

    def joined(self, index: list[np.ndarray]) -> StageMemory:
        return joined(self.memories, np.concatenate(index))

    @cached_property
    def least(self) -> tuple[StageMemory, np.ndarray]:
        """The least that each block has under none, under full or beside a border between them; and what layers keep more than that
        at least under none and under full, summed from the model's start: [2, layers + 1]."""
        off, full, borders = self.uniform(NONE), self.uniform(FULL), self.alike.borders
        start = np.array([self.border_like(b)[0] for b in range(1, self.p.layers)], int)
        rows = [x + np.arange(self.n) for x in (off, off, full, full)]
        rows[1][self.at[1:]] = start + self.at[borders[1:]]  # the layer behind a border
        rows[3][self.at[:-1]] = start + self.at[borders[1:] - 1]  # the layer before it
        b = self.joined(rows).b
        less = {name: getattr(b, name).reshape(4, -1).min(axis=0) for name in ("kept", "forward", "numel", "padded", "buffers")}
        more = {name: getattr(b, name).reshape(4, -1).any(axis=0) for name in ("keeps_result", "recomputes")}
        kept = b.kept.reshape(2, 2, -1).min(axis=1)[:, self.at] - less["kept"][self.at]
        memory = StageMemory(replace(self.memories[0].b, **less, **more), self.memories[0].x)
        return memory, np.concatenate([np.zeros((2, 1)), np.cumsum(kept, axis=1)], axis=1)


# --- choices ----------------------------------------------------------------------------------------------------------------


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


def _cheapest(options: Sequence[_Options], thing: int, rank: int, capacity: float) -> tuple[Choice, float]:
    """The cheapest choice that fits, and its live bytes; of equal ones that which recomputes least."""
    found = []
    for o in options:
        for i in range(*np.searchsorted(o.of, [thing, thing + 1]).tolist()):
            if o.live[rank, i] <= capacity:
                found.append((float(o.c[rank, i]), Choice(int(o.mode[i]), int(o.layers[i])), float(o.live[rank, i])))
    least = min(found)[0]
    return min(((choice, live) for c, choice, live in found if c <= least + SAME * abs(least)), key=lambda x: x[0])


@dataclass(frozen=True)
class _Table:
    """Intervals of layers that a stage may hold, those that are alike once, and what they cost each stage; infinite what does not fit."""

    a: np.ndarray  # [intervals] first layer
    n: np.ndarray  # [intervals] layers
    group: np.ndarray  # [intervals] 0 for the first stage, 1 for those between, 2 for the last
    lengths: Lengths  # least and most layers of each group
    where: np.ndarray  # [lengths of group 1, layers + 1] interval of each length and start; where there is none, the last
    then: np.ndarray  # [lengths of group 1, layers + 1] where it ends, or the model
    e: np.ndarray  # [pp, intervals + 1]


def _distinct(x: np.ndarray) -> np.ndarray:
    """Finite values in order; of those that are one but for rounding, the largest."""
    x = np.unique(x[np.isfinite(x)])
    return x[np.append(np.diff(x) > SAME / 10 * np.abs(x[1:]), True)] if len(x) else x


class Stages:
    """The stage problem of one layout."""

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
        """Layers that a rank holds; chunks that follow on each other are one."""
        p = self.p
        held = (rank, 2 * p.pp - 1 - rank) if p.v_shape else range(rank, p.pp * p.vpp, p.pp)
        found: list[tuple[int, int]] = []
        for k in held:
            first, last = (ends[k - 1] if k else 0), ends[k]
            if found and found[-1][1] == first:
                found[-1] = found[-1][0], last
            else:
                found.append((first, last))
        return tuple(found)

    def _outside(self, chunks: Chunks, kind: int, types: np.ndarray) -> np.ndarray:
        """What stands before and after the layers, and transfers; [types] seconds of a microbatch (0) or once a step (1)."""
        p = self.p
        stem, head = chunks[0][0] == 0, chunks[-1][1] == p.layers
        links = 2 * len(chunks) - stem - head
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
        stem, head = of_chunk[:, 2] > 0, of_chunk[:, 3] > 0
        many = np.array([len(chunks) for chunks in held])
        until = np.cumsum(many)
        since = until - many
        returned = np.add.reduceat(memory.returned(begins, ends, stem, head), since)
        return begins[since], ends[until - 1], Place(stem[since], head[until - 1], many, returned)

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
        one = Place(bool(place.stem[0]), bool(place.head[0]), int(place.chunks[0]), float(place.returned[0]))
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

    # -- the two ways

    def best(self, cutoff: float = np.inf) -> Cut | None:
        """The cheapest cut that fits and takes less than `cutoff` seconds; None if there is none. Of equal ones that with the smaller ends,
        in order; each rank with its cheapest choice that fits, of equal ones that with less recompute."""
        if self.p.layers == 0 and self.p.pp == 1:
            cut = self._no_layers()
            return cut if cut.costs[0].live_bytes <= self.capacity[0] and cut.step_s < cutoff else None
        if self.p.layers < self.p.pp * self.p.vpp:
            return None
        found = _Spread(self).best(cutoff) if self.p.vpp > 1 or self.p.pp == 1 else _Contiguous(self).best(cutoff)
        return found if found is not None and found.step_s < cutoff else None

    def least_memory(self) -> tuple[float, Cut]:
        """The cut whose fullest rank is least over its own capacity, each rank as cheap as that allows, and by how many bytes it is."""
        if self.p.layers == 0 and self.p.pp == 1:
            cut = self._no_layers()
            return cut.costs[0].live_bytes - float(self.capacity[0]), cut
        if self.p.layers < self.p.pp * self.p.vpp:
            raise ValueError(f"{self.p.layers} layers cannot be cut into {self.p.pp * self.p.vpp} stages")
        return _Spread(self).least_memory() if self.p.vpp > 1 or self.p.pp == 1 else _Contiguous(self).least_memory()


# --- several chunks a rank, or one rank -------------------------------------------------------------------------------------


class _Spread:
    """Every cut in turn: what a rank holds decides its cost whatever the others choose."""

    def __init__(self, stages: Stages) -> None:
        self.s, p = stages, stages.p
        self.cuts = spreads(p.layers, p.pp * p.vpp) if p.pp * p.vpp > 1 else [(p.layers,)]
        kinds = stages._bank.alike.kinds
        number: dict[tuple[bool, bool, tuple[bytes, ...]], int] = {}
        self.things: list[Chunks] = []
        self.of = np.zeros((len(self.cuts), p.pp), int)  # thing that each rank of each cut holds
        for i, ends in enumerate(self.cuts):
            for r in range(p.pp):
                chunks = stages.chunks(ends, r)
                key = (chunks[0][0] == 0, chunks[-1][1] == p.layers, tuple(kinds[a:b].tobytes() for a, b in chunks))
                self.of[i, r] = number.setdefault(key, len(self.things))
                if self.of[i, r] == len(self.things):
                    self.things.append(chunks)
        self.ranks = np.arange(p.pp)
        self.e = np.stack([stages._once(x, stages.types) for x in self.things], axis=1)
        self.size = np.array([sum(b - a for a, b in x) for x in self.things])

    def options(self, wanted: Sequence[tuple[int, Choice]]) -> _Options:
        """Seconds and bytes of choices for things, in the order of `wanted`."""
        s, held = self.s, [(self.things[i], choice) for i, choice in wanted]
        c = np.stack([s._seconds(*x, s.types) for x in held], axis=1)
        memory = s._memory(held, like=True)
        live = memory.live_at(*s._placed(memory, [x for x, _ in held]), self.ranks[:, None])
        of, mode, layers = np.array([(i, x.mode, x.layers) for i, x in wanted]).T
        return _Options(of, mode, layers, c, live)

    def uniform(self) -> _Options:
        return self.options([(i, Choice(m, int(n) if m else 0)) for i, n in enumerate(self.size) for m in self.s.modes])

    def some(self, below: np.ndarray, limit: np.ndarray, all_: bool = False) -> list[_Options]:
        """Full recompute of the first layers of things, where that costs no more than `below` [pp, things], where a thing might hold no
        more than `limit` [pp] and, but for `all_`, until the cheapest that does is found."""
        found = list[_Options]()
        left = [self.light(i, below[:, i], limit) for i in range(len(self.things))]
        while any(len(k) for k, _ in left):
            found.append(self.options([(i, Choice(FULL, int(k))) for i, (ks, _) in enumerate(left) for k in ks[:AT_ONCE]]))
            if not all_:
                below = np.minimum(below, found[-1].fitting(limit, len(self.things)))
            for i, (ks, c) in enumerate(left):
                cheap = (c[:, AT_ONCE:] <= below[:, i, None] * (1 + SAME)).any(axis=0)
                left[i] = ks[AT_ONCE:][cheap], c[:, AT_ONCE:][:, cheap]
        return found

    @cached_property
    def least(self) -> np.ndarray:
        """[pp, things] a lower bound on live bytes, whatever is recomputed in full."""
        bank = self.s._bank
        index = [np.arange(*bank.blocks(a, b)) for chunks in self.things for a, b in chunks]
        memory = joined([bank.least[0]], np.concatenate(index))
        return np.asarray(memory.least_at(*self.s._placed(memory, self.things), self.ranks[:, None]))

    def light(self, thing: int, below: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of first layers of a thing whose full recompute costs no more than `below` [pp] and that might hold no more than `limit`
        [pp], from the cheapest on; and their seconds, [pp, numbers]."""
        s, chunks = self.s, self.things[thing]
        if not (below > -np.inf).any() or self.size[thing] < 2:
            return np.zeros(0, int), np.zeros((s.p.pp, 0))
        memory, more = s._bank.least
        layers = np.concatenate([np.arange(a, b) for a, b in chunks])

        def first(done: np.ndarray, rest: np.ndarray) -> np.ndarray:
            """Sums of `done` in the first k layers and `rest` in the others, k = 1 .. layers - 1."""
            return np.asarray(np.cumsum(done[:, :-1], axis=1) + np.cumsum(rest[:, :0:-1], axis=1)[:, ::-1])

        c = s.p.c[s.types][:, :, layers]
        seconds = first(c[:, FULL], c[:, NONE]) + s._outside(chunks, 0, s.types)[:, None]
        kept = np.diff(more)[:, layers]
        held = self.least[:, thing, None] + memory.flying(self.ranks)[:, None] * first(kept[1:], kept[:1]) - kept[0, -1]
        worth = np.flatnonzero(((seconds <= below[:, None] * (1 + SAME)) & (held <= limit[:, None])).any(axis=0))
        worth = worth[np.argsort(seconds[:, worth].min(axis=0), kind="stable")]
        return worth + 1, seconds[:, worth]

    def steps(self, c: np.ndarray) -> np.ndarray:
        """[cuts] step seconds where each thing costs each rank so much."""
        of_rank = c[self.ranks, self.of]
        fits = np.isfinite(of_rank).all(axis=1)
        x = np.where(fits[:, None], of_rank, 0.0)
        step = self.s.weight * x.max(axis=1) + self.s.p.ratio * x.sum(axis=1) + self.e[self.ranks, self.of].max(axis=1)
        return np.where(fits, step, np.inf)

    def best(self, cutoff: float) -> Cut | None:
        s, n = self.s, len(self.things)
        if not self.cuts:
            return None
        options = [self.uniform()]
        c = options[0].fitting(s.capacity, n)
        step = self.steps(c)
        if s.partial:
            layers = [np.concatenate([np.arange(a, b) for a, b in x]) for x in self.things]
            free = np.stack([s.p.c[s.types].min(axis=1)[:, x].sum(axis=1) for x in layers], axis=1)
            free = free + np.stack([s._outside(x, 0, s.types) for x in self.things], axis=1)
            open_ = self.steps(np.minimum(free, c)) <= min(float(step.min()), cutoff) * (1 + SAME)
            held = np.zeros(c.shape, bool)
            held[np.broadcast_to(self.ranks, self.of[open_].shape), self.of[open_]] = True
            options += self.some(np.where(held, c, -np.inf), s.capacity)
            for more in options[1:]:
                c = np.minimum(c, more.fitting(s.capacity, n))
            step = self.steps(c)
        least = float(step.min())
        if not np.isfinite(least):
            return None
        i = int(np.argmax(step <= least + SAME * abs(least)))
        return s._cut(self.cuts[i], [_cheapest(options, int(self.of[i, r]), r, float(s.capacity[r])) for r in range(s.p.pp)])

    def least_memory(self) -> tuple[float, Cut]:
        s, n = self.s, len(self.things)
        if not self.cuts:
            raise ValueError(f"{s.p.layers} layers are spread over {s.p.pp * s.p.vpp} virtual stages in no way")
        options = [self.uniform()]

        def most() -> np.ndarray:
            over = np.min([o.least(o.live - s.capacity[:, None], n) for o in options], axis=0)
            return np.asarray(over[self.ranks, self.of].max(axis=1))

        if s.partial:
            held = np.zeros((s.p.pp, n), bool)
            held[np.broadcast_to(self.ranks, self.of.shape), self.of] = True
            options += self.some(np.where(held, np.inf, -np.inf), s.capacity + float(most().min()), all_=True)
        over = most()
        i = int(over.argmin())
        return s._least_cut(self.cuts[i], options, self.of[i], float(over[i]))


# --- one chunk a rank -------------------------------------------------------------------------------------------------------


class _Contiguous:
    """Every contiguous cut: a dynamic program over stages."""

    def __init__(self, stages: Stages) -> None:
        self.s, self.p = stages, stages.p
        p, s = self.p, stages
        pp, types = p.pp, s.types
        ends = np.zeros((pp, 2))
        ends[0] += p.before[types[0]]
        ends[-1] += p.after[types[-1]]
        ends[:, 0] += p.send_s * (2 - (np.arange(pp) == 0) - (np.arange(pp) == pp - 1))
        self.ends = ends  # [pp, 2] what a stage has besides its layers
        self.free = p.c[:, list(s.modes)].min(axis=1)  # [types, layers] whatever fits
        used = np.unique(types)
        self.least_sum = float(self.free[used].min(axis=0).sum() + ends[:, 0].sum())
        once = p.e[used].min(axis=0)
        self.least_once = float(max((once.sum() + ends[:, 1].sum()) / pp, once.max(), ends[:, 1].max()))
        self.least_c = float(max(self.least_sum / pp, self.free[used].min(axis=0).max()))
        self.free_sum = np.concatenate([np.zeros((len(p.c), 1)), np.cumsum(self.free, axis=1)], axis=1)
        self.group = np.repeat([0, 1, 2], [1, pp - 2, 1])  # of each stage

    # -- the intervals that matter

    def cap(self, step: float) -> float:
        """The most that C may be in a cut that takes no longer than `step`."""
        if not np.isfinite(step) or self.s.weight == 0:
            return np.inf
        return float((step - self.p.ratio * self.least_sum - self.least_once) / self.s.weight * (1 + SAME))

    def lengths(self, cap: float) -> Lengths | None:
        """Least and most layers of the first stage, of one between and of the last, of any cut with C <= cap; None if there is none."""
        p, n = self.p, self.p.layers
        most = [0, 0, 0]
        longest = n - p.pp + 1
        for g in (0, 1, 2):
            for t in np.unique(self.s.types[self.group == g]):
                room = cap - self.ends[self.group == g, 0].min()
                sums = self.free_sum[t]
                starts = np.arange(1, n - 1) if g == 1 else np.arange(n - longest, n) if g == 2 else np.array([0])
                if g == 2:
                    held = n - starts[sums[n] - sums[starts] <= room]
                else:
                    held = np.searchsorted(sums, sums[starts] + room, side="right") - 1 - starts if np.isfinite(room) else n - starts
                most[g] = max(most[g], int(held.max(initial=0)))
        most = [min(x, longest) for x in most]
        between = p.pp - 2
        if between == 0:
            most[1] = 0
        if min(most[0], most[2]) < 1 or (between and most[1] < 1):
            return None
        whole = most[0] + between * most[1] + most[2]
        if whole < n:
            return None
        first, middle, last = ((max(min(1, x), n - (whole - x)), x) for x in most)
        return first, middle, last

    def table(self, lengths: Lengths) -> _Table:
        """The intervals of these lengths."""
        n = self.p.layers
        (f0, f1), (m0, m1), (l0, l1) = lengths
        first, last = np.arange(f0, f1 + 1), np.arange(l0, l1 + 1)
        a, size = [np.zeros(len(first), int), n - last], [first, last]
        group = [np.zeros(len(first), int), np.full(len(last), 2)]
        count = len(first) + len(last)
        between = np.arange(m0, m1 + 1) if m1 else np.zeros(0, int)
        found = [self.s._bank.alike.middle(int(k)) for k in between]
        total = count + sum(len(starts) for starts, _ in found)
        where = np.full((len(between), n + 1), total)
        for i, (k, (starts, of)) in enumerate(zip(between, found, strict=True)):
            where[i, 1 : n - k] = count + of
            a.append(starts)
            size.append(np.full(len(starts), k))
            group.append(np.ones(len(starts), int))
            count += len(starts)
        a_, n_, g_ = (np.concatenate(x) for x in (a, size, group))
        e = np.full((self.p.pp, total + 1), np.inf)
        sums = self.s._e[:, a_ + n_] - self.s._e[:, a_]
        e[:, :-1] = np.where(self.group[:, None] == g_, sums[self.s.types] + self.ends[:, 1:], np.inf)
        return _Table(a_, n_, g_, lengths, where, np.minimum(between[:, None] + np.arange(n + 1), n), e)

    def options(
        self, t: _Table, of: np.ndarray, mode: np.ndarray, layers: np.ndarray, index: list[np.ndarray], begin: np.ndarray, end: np.ndarray
    ) -> _Options:
        """Choices for intervals, whose blocks are [begin, end) of those of the bank that `index` names."""
        s = self.s
        memory = s._bank.joined(index)
        stem, head = t.group[of] == 0, t.group[of] == 2
        live = np.empty((self.p.pp, len(of)))
        ranks = np.arange(self.p.pp)[:, None]
        size = max(1, MOST // self.p.pp)
        for i in range(0, len(of), size):
            part = slice(i, i + size)
            x, y, first, last = begin[part], end[part], stem[part], head[part]
            live[:, part] = memory.live_at(x, y, Place(first, last, 1, memory.returned(x, y, first, last)), ranks)
        return _Options(of, mode, layers, self.seconds(t, of, mode, layers), live)

    def seconds(self, t: _Table, of: np.ndarray, mode: np.ndarray, layers: np.ndarray) -> np.ndarray:
        """[pp, options] seconds of a microbatch; infinite for stages of another group."""
        a, last = t.a[of], (t.a + t.n)[of]
        border = np.where(mode == NONE, last, a + layers)
        sums = self.s._c
        c = sums[:, mode, border] - sums[:, mode, a] + sums[:, NONE, last] - sums[:, NONE, border]
        return np.where(self.group[:, None] == t.group[of], c[self.s.types] + self.ends[:, :1], np.inf)

    def uniform(self, t: _Table) -> _Options:
        """Each mode in all layers."""
        bank, modes = self.s._bank, self.s.modes
        of = np.repeat(np.arange(len(t.a)), len(modes))
        mode = np.tile(modes, len(t.a))
        index = [bank.uniform(m) + np.arange(bank.n) for m in modes]
        begin, end = self.blocks(t, of, t.a[of])
        offset = np.tile(np.arange(len(modes)) * bank.n, len(t.a))
        return self.options(t, of, mode, np.where(mode == NONE, 0, t.n[of]), index, begin + offset, end + offset)

    def blocks(self, t: _Table, of: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Blocks [begin, end) of intervals that begin at layers `a`."""
        bank = self.s._bank
        begin = np.where(t.group[of] == 0, 0, bank.at[a])
        return begin, np.where(t.group[of] == 2, bank.n, bank.at[a + t.n[of] - 1] + 1)

    def some(self, t: _Table, below: np.ndarray, limit: np.ndarray, cap: float = np.inf) -> _Options | None:
        """Full recompute of the first layers only, where it costs no more than `below` [pp, intervals] and no more than `cap`, and where
        the interval can hold no more than `limit` [pp] as some stage; None if that is nowhere."""
        many = t.n - 1
        of = np.repeat(np.arange(len(t.a)), many)
        k = np.arange(len(of)) - np.repeat(np.cumsum(many) - many, many) + 1
        c = self.seconds(t, of, np.full(len(of), FULL), k)
        wanted = (np.isfinite(c) & (c <= below[:, of] * (1 + SAME)) & (c <= cap)).any(axis=0)
        of, k = of[wanted], k[wanted]
        if len(of) > MANY:
            wanted = self.light(t, of, k, limit)
            of, k = of[wanted], k[wanted]
        if not len(of):
            return None
        # an interval like it, whose border others share
        a = t.a[of]
        for n in np.unique(t.n[of[t.group[of] == 1]]):
            rows = np.flatnonzero((t.group[of] == 1) & (t.n[of] == n))
            first = int(np.flatnonzero((t.group == 1) & (t.n == n))[0])
            a[rows] = self.s._bank.alike.near(int(n))[of[rows] - first, k[rows] - 1]
        begin, end = self.blocks(t, of, a)
        order = np.lexsort((begin, a + k))
        border, starts = np.unique((a + k)[order], return_index=True)
        low = np.minimum.reduceat(begin[order], starts)
        high = np.maximum.reduceat(end[order], starts)
        spans = zip(low.tolist(), high.tolist(), border.tolist(), strict=True)
        index = [x for i, j, b in spans for x in self.s._bank.pick(i, j, FULL, b, True)]
        offset = np.cumsum(high - low) - high
        at = np.repeat(offset, np.diff(np.append(starts, len(order))))
        found = self.options(t, of[order], np.full(len(of), FULL), k[order], index, begin[order] + at, end[order] + at)
        back = np.argsort(order)
        return _Options(found.of[back], found.mode, found.layers[back], found.c[:, back], found.live[:, back])

    def light(self, t: _Table, of: np.ndarray, k: np.ndarray, limit: np.ndarray) -> np.ndarray:
        """[options] whether some stage might hold interval `of` with its first `k` layers recomputed in `limit` [pp] bytes."""
        least, more = self.s._bank.least
        begin, end = self.blocks(t, np.arange(len(t.a)), t.a)
        stem, head = t.group == 0, t.group == 2
        place = Place(stem, head, 1, least.returned(begin, end, stem, head))
        ranks = np.arange(self.p.pp)[:, None]
        room = limit[:, None] - least.least_at(begin, end, place, ranks)
        room = np.where(self.group[:, None] == t.group, room, -np.inf)
        a, end = t.a[of], (t.a + t.n)[of]
        kept = more[1, a + k] - more[1, a] + more[0, end] - more[0, a + k]
        last = more[0, end] - more[0, end - 1]
        return np.asarray((least.flying(ranks) * kept - last <= room[:, of]).any(axis=0))

    def narrow(self, t: _Table, options: _Options, lengths: Lengths) -> tuple[_Table, _Options]:
        """The same of fewer lengths."""
        low, high = np.array(lengths).T
        kept = (t.n >= low[t.group]) & (t.n <= high[t.group])
        new, some = np.cumsum(kept) - 1, kept[options.of]
        fewer = _Options(new[options.of[some]], options.mode[some], options.layers[some], options.c[:, some], options.live[:, some])
        return self.table(lengths), fewer

    # -- the shortest path over stages

    def sweep(self, t: _Table, cost: np.ndarray, join: np.ufunc) -> list[np.ndarray]:
        """The least sum or maximum (`join`) of `cost` [problems, pp, intervals + 1] over the stages from each on: [problems, layers + 1] by
        the first layer that is left to them. Of the first stage by its length, [problems, lengths]."""
        n, pp = self.p.layers, self.p.pp
        (f0, f1), (m0, m1), (l0, l1) = t.lengths
        firsts = f1 - f0 + 1
        left = np.full((len(cost), n + 1), np.inf)
        left[:, n - l1 : n - l0 + 1] = cost[:, -1, firsts : firsts + l1 - l0 + 1][:, ::-1]
        found = [left]
        for stage in range(pp - 2, 0, -1):
            low = max(f0 + (stage - 1) * m0, n - l1 - (pp - 1 - stage) * m1)
            high = min(f1 + (stage - 1) * m1, n - l0 - (pp - 1 - stage) * m0)
            these = slice(low, high + 1)
            through = join(cost[:, stage][:, t.where[:, these]], left[:, t.then[:, these]])
            left = np.full((len(cost), n + 1), np.inf)
            left[:, these] = through.min(axis=1)
            found.append(left)
        found.append(join(cost[:, 0, :firsts], left[:, f0 : f1 + 1]))
        return found[::-1]

    def trace(self, t: _Table, swept: list[np.ndarray], problem: int, cost: np.ndarray, join: np.ufunc, most: float) -> list[int]:
        """Interval of each stage of the cut with the smallest ends, in order, that costs `most` at most; `cost` [pp, intervals + 1]."""
        n, firsts = self.p.layers, t.lengths[0][1] - t.lengths[0][0] + 1
        thing = int(np.argmax(swept[0][problem] <= most))
        found, at, spent = [thing], int(t.n[thing]), float(cost[0, thing])
        for stage in range(1, self.p.pp - 1):
            things = t.where[:, at]
            through = join(spent, join(cost[stage, things], swept[stage + 1][problem, t.then[:, at]]))
            thing = int(things[np.argmax(through <= most)])
            found.append(thing)
            at, spent = at + int(t.n[thing]), float(join(spent, cost[stage, thing]))
        return [*found, firsts + n - at - t.lengths[2][0]]

    def quick(self, t: _Table, c: np.ndarray) -> float:
        """Step seconds of a cut with the least max C; infinite if none fits."""
        swept = self.sweep(t, c[None], np.maximum)
        least = float(swept[0].min())
        if not np.isfinite(least):
            return np.inf
        things = self.trace(t, swept, 0, c, np.maximum, least)
        of_stage = c[np.arange(self.p.pp), things]
        return float(self.s.weight * least + self.p.ratio * of_stage.sum() + t.e[np.arange(self.p.pp), things].max())

    def solve(self, t: _Table, c: np.ndarray, bound: float, cutoff: float) -> list[int] | None:
        """Interval of each stage of the cheapest cut, if it takes less than `cutoff`; `bound` is no less than what it takes."""
        ratio, weight = self.p.ratio, self.s.weight
        e = np.where(np.isfinite(c), t.e, np.inf)
        sum_of = np.where(np.isfinite(c), ratio * np.where(np.isfinite(c), c, 0.0), np.inf)

        def over(values: np.ndarray) -> np.ndarray:
            """What the maximum of a cut may be: values from the least on that some cut does not exceed."""
            least = self.sweep(t, values[None], np.maximum)[0].min()
            known = _distinct(values)
            return known[np.searchsorted(known, least) :]

        cs, es = over(c), over(e)
        if not len(cs):
            return None
        if weight == 0:
            cs = cs[-1:]

        def masked(i: np.ndarray, j: np.ndarray) -> np.ndarray:
            return np.where((c <= cs[i][:, None, None]) & (e <= es[j][:, None, None]), sum_of, np.inf)

        # boxes of thresholds: least and most index of C and of E, and the least sum at the most
        box = np.array([[0, len(cs) - 1, 0, len(es) - 1]])
        sums = self.sweep(t, masked(box[:, 1], box[:, 3]), np.add)[0].min(axis=1)
        closed = box[:0]
        closed_at = np.zeros(0)
        while len(box):
            low = weight * cs[box[:, 0]] + es[box[:, 2]] + sums
            high = weight * cs[box[:, 1]] + es[box[:, 3]] + sums
            bound = min(bound, float(high.min()))
            slack = SAME * abs(bound) if np.isfinite(bound) else 0.0
            kept = (low <= bound + slack) & (low < cutoff) & np.isfinite(low)
            done = kept.copy()
            done[kept] = high[kept] - low[kept] <= slack
            closed, closed_at = np.concatenate([closed, box[done]]), np.append(closed_at, high[done])
            box, sums = box[kept & ~done], sums[kept & ~done]
            if not len(box):
                break
            parts, known = self.split(box, sums, weight * cs, es)
            new = np.isnan(known)
            known[new] = self.sweep(t, masked(parts[new, 1], parts[new, 3]), np.add)[0].min(axis=1)
            box, sums = parts, known
        closed = closed[closed_at <= bound + SAME * abs(bound)]
        if not len(closed):
            return None
        cost = masked(closed[:, 1], closed[:, 3])
        swept = self.sweep(t, cost, np.add)
        most = (swept[0].min(axis=1) + SAME * abs(bound)).tolist()
        cuts = [self.trace(t, swept, i, cost[i], np.add, x) for i, x in enumerate(most)]
        return min(cuts, key=lambda things: np.cumsum(t.n[things]).tolist())

    def split(self, box: np.ndarray, sums: np.ndarray, cs: np.ndarray, es: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Parts of boxes, across the longer side, and the sums of those that have their box's upper corner; the others' are not numbers."""
        pieces = max(2, 16 // len(box))
        found, known = [], []
        for (i0, i1, j0, j1), of_box in zip(box.tolist(), sums.tolist(), strict=True):
            across = cs[i1] - cs[i0] >= es[j1] - es[j0]
            low, high = (i0, i1) if across else (j0, j1)
            # the least alone: it is often the best
            ends = np.unique(np.append(low, np.linspace(low, high, pieces + 1)[1:].astype(int))).tolist()
            for a, b in zip([low, *(x + 1 for x in ends)], ends):
                found.append([a, b, j0, j1] if across else [i0, i1, a, b])
                known.append(of_box if b == high else np.nan)
        return np.array(found), np.array(known)

    # -- answers

    def best(self, cutoff: float) -> Cut | None:
        s = self.s
        top = self.cap(cutoff)
        if top < self.least_c * (1 - SAME):
            return None
        trial, bound = min(top, 1.6 * self.least_c), np.inf
        while True:
            lengths = self.lengths(trial)
            if lengths is not None:
                t = self.table(lengths)
                options = [self.uniform(t)]
                c = options[0].fitting(s.capacity, len(t.a) + 1)
                bound = min(bound, self.quick(t, c) * (1 + SAME))
                need = min(top, self.cap(bound))
                if need <= trial or trial == top:
                    break
                trial = need
            elif trial == top:
                return None
            else:
                trial = top
        fewer = self.lengths(min(need, trial))
        if fewer is None:
            return None
        if fewer != lengths:
            t, options[0] = self.narrow(t, options[0], fewer)
            c = options[0].fitting(s.capacity, len(t.a) + 1)
        if s.partial:
            more = self.some(t, c, s.capacity, min(need, trial))
            if more is not None:
                options.append(more)
                c = np.minimum(c, more.fitting(s.capacity, len(t.a) + 1))
        things = self.solve(t, c, bound, cutoff)
        if things is None:
            return None
        ends = tuple(int(n) for n in np.cumsum(t.n[things]))
        return s._cut(ends, [_cheapest(options, thing, r, float(s.capacity[r])) for r, thing in enumerate(things)])

    def least_memory(self) -> tuple[float, Cut]:
        s = self.s
        lengths = self.lengths(np.inf)
        assert lengths is not None
        t = self.table(lengths)
        options = [self.uniform(t)]

        def above(o: _Options) -> np.ndarray:
            return o.least(np.where(np.isfinite(o.c), o.live - s.capacity[:, None], np.inf), len(t.a) + 1)

        over = above(options[0])
        swept = self.sweep(t, over[None], np.maximum)
        if s.partial:
            more = self.some(t, np.full(over.shape, np.inf), s.capacity + float(swept[0].min()))
            if more is not None:
                options.append(more)
                over = np.minimum(over, above(more))
                swept = self.sweep(t, over[None], np.maximum)
        least = float(swept[0].min())
        things = self.trace(t, swept, 0, over, np.maximum, least)
        return s._least_cut(tuple(int(n) for n in np.cumsum(t.n[things])), options, things, least)
