"""Which layers are alike, and the memory of a model's layers under every choice of recompute, of alike ones once."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, lru_cache

import numpy as np

from meshwright.costmodel.stagememory import StageMemory, joined
from meshwright.planner.stageproblem import FULL, NONE, StageProblem


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
