"""The best cut where a rank has several chunks, or there is one rank: every cut of `spreads` in turn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from meshwright.costmodel.stagememory import joined
from meshwright.planner.stageproblem import FULL, NONE, SAME, Choice, Chunks, Cut, spreads
from meshwright.planner.stageranks import Ranks, _cheapest, _joins, _Options

AT_ONCE = 12  # numbers of layers of one thing that are tried at once, from the cheapest on


class _Spread:
    """Every cut in turn: what a rank holds decides its cost whatever the others choose."""

    def __init__(self, stages: Ranks) -> None:
        self.s, p = stages, stages.p
        self.cuts = spreads(p.layers, p.pp * p.vpp) if p.pp * p.vpp > 1 else [(p.layers,)]
        kinds = stages._bank.alike.kinds
        number: dict[tuple[bool, bool, int, tuple[bytes, ...]], int] = {}
        self.things: list[Chunks] = []
        self.of = np.zeros((len(self.cuts), p.pp), int)  # thing that each rank of each cut holds
        for i, ends in enumerate(self.cuts):
            for r in range(p.pp):
                chunks = stages.chunks(ends, r)
                key = (chunks[0][0] == 0, chunks[-1][1] == p.layers, _joins(chunks), tuple(kinds[a:b].tobytes() for a, b in chunks))
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
        times = s._times(memory, chunks, self.ranks)
        held = self.least[:, thing, None] + first(kept[1:] * times, kept[:1] * times) - kept[0, -1]
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
