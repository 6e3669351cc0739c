"""What a stage of a LayerPlan may hold: the multisets of strategies that fit and that no other beats, and bounds on them."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.costmodel.layerprofile import CONTEXT_MB, Account, Cost, Pricer
from meshwright.profiling.layerprofile import Strategy


@dataclass(frozen=True, slots=True)
class _Option:
    """A strategy of a layer: its place in the order, its cost, and the seconds that bounds go by."""

    strategy: Strategy
    cost: Cost
    weight: float


@dataclass(frozen=True, slots=True)
class _Stage:
    """A multiset of strategies on a stage, with the ends on it."""

    weight: float
    forward_s: float
    backward_s: float
    sync_s: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Palette:
    """Options (by index) that a stage may use, and what using several degrees, or tensor parallelism, adds to it."""

    use: tuple[int, ...]
    moves_s: float
    buffer_MB: float


_State = tuple[float, float, tuple[float, ...], tuple[int, ...]]  # weight, MB, seconds by part, counts so far


class _Hull:
    """Least seconds of a layer in so many MB, if fractions of it may differ: the lower convex hull of the options."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        kept: list[tuple[float, float]] = []
        for x, y in sorted(points):
            if kept and y >= kept[-1][1]:
                continue
            while len(kept) > 1 and (kept[-1][1] - kept[-2][1]) * (x - kept[-2][0]) >= (y - kept[-2][1]) * (kept[-1][0] - kept[-2][0]):
                kept.pop()
            kept.append((x, y))
        self.x, self.y = [k[0] for k in kept], [k[1] for k in kept]

    def at(self, each: float) -> float:
        if not self.x or each < self.x[0]:
            return math.inf
        if each >= self.x[-1]:
            return self.y[-1]
        i = bisect.bisect_right(self.x, each)
        share = (each - self.x[i - 1]) / (self.x[i] - self.x[i - 1])
        return self.y[i - 1] + share * (self.y[i] - self.y[i - 1])


_Hulls = dict[tuple[int, tuple[int, ...]], _Hull]  # by stage and the options that are left


@dataclass
class _Tally:
    pruned: int = 0
    cuts: int = 0
    evaluated: int = 0
    open_s: float = math.inf  # bound of what the closed account leaves open


class _Fronts:
    """What the stages may hold under one choice of stages, microbatches and the ends' strategy."""

    def __init__(
        self, pricer: Pricer, tally: _Tally, stages: int, microbatches: int, vocab: Strategy, options: list[_Option], held: list[list[int]],
        hulls: _Hulls,
    ) -> None:  # fmt: skip
        """`held`: MB of a layer by stage and option; `hulls` are those of these, made as they are asked for."""
        self.pricer, self.tally, self.p, self.m, self.vocab, self.options = pricer, tally, stages, microbatches, vocab, options
        first, last = pricer.vocab(vocab, stages, microbatches)
        nothing = Cost(0.0, 0.0, 0.0, 0.0, 0.0)
        self.ends = [first if i == 0 else last if i == stages - 1 else nothing for i in range(stages)]
        self.ends_weight = [_weight(e, stages, microbatches, pricer.account) for e in self.ends]
        self.held, self.hulls = held, hulls
        self.capacity = [
            pricer.budget_MB - math.ceil(e.states_MB + e.activation_MB * (stages - i) + CONTEXT_MB) for i, e in enumerate(self.ends)
        ]
        self.palettes: dict[bool, list[_Palette]] = {}
        self.fastest: dict[tuple[int, int], _Stage | None] = {}

    def _fastest(self, stage: int, n: int) -> _Stage | None:
        """The multiset of fewest seconds that fits, or None."""
        if (stage, n) not in self.fastest:
            found = self._round(stage, n)
            for made in self._front(stage, n, math.inf if found is None else found.weight, full=False):
                if found is None or made.weight < found.weight:
                    found = made
            self.fastest[stage, n] = found
        return self.fastest[stage, n]

    def _palettes_of(self, stage: int) -> list[_Palette]:
        """Every set of degrees that a stage may mix, and how wide its tensor parallelism may be: with these go resharding and buffer. A
        multiset that uses less than a palette allows is in the palette of what it uses, at its own price."""
        ends = stage in (0, self.p - 1)
        if ends not in self.palettes:
            made, degrees = [], sorted({o.strategy.degree for o in self.options})
            for size in range(1, len(degrees) + 1):
                for some in itertools.combinations(degrees, size):
                    one = {d: next(o.strategy for o in self.options if o.strategy.degree == d) for d in some}
                    moves = sum(self.pricer.reshard_s(one[a], one[b], self.p, self.m) for a, b in zip(some, some[1:]))
                    widths = sorted({o.strategy.tensor for o in self.options if o.strategy.degree in some} | {1})
                    for width in widths:
                        use = [k for k, o in enumerate(self.options) if o.strategy.degree in some and o.strategy.tensor <= width]
                        wide = [o.strategy for o in self.options if o.strategy.tensor == width][:1] + ([self.vocab] if ends else [])
                        made.append(_Palette(tuple(use), moves, self.pricer.buffer_MB(wide, self.p, self.m)))
            self.palettes[ends] = [x for x in made if x.use]
        return self.palettes[ends]

    def _front(self, stage: int, n: int, limit: float, full: bool) -> list[_Stage]:
        """Multisets of n layers that fit and take less than `limit` seconds a microbatch, without those that another beats: in seconds, or
        (`full`) in forward, backward and reduction. Options are taken one after the other; what has as many layers left, and is beaten
        in MB too, is dropped, and so is what the hull of the options to come cannot bring below the limit."""
        out: list[_Stage] = []
        end, held = self.ends[stage], self.held[stage]
        for palette in self._palettes_of(stage):
            use = palette.use
            start = self.ends_weight[stage] + palette.moves_s
            capacity = self.capacity[stage] - palette.buffer_MB
            if capacity < 0 or start + n * self._hull(stage, use).at(capacity / n) >= limit:
                continue
            empty = (0.0,) * (3 if full else 0)
            states: dict[int, list[_State]] = {n: [(start, 0.0, empty, ())]}
            for j, k in enumerate(use):
                o, rest = self.options[k], self._hull(stage, use[j + 1 :])
                each = (o.cost.forward_s, o.cost.backward_s, o.cost.sync_s)
                grown: dict[int, list[_State]] = {}
                for left, some in states.items():
                    for weight, mb, parts, counts in some:
                        for c in range(left + 1):
                            over, room = weight + c * o.weight, capacity - mb - c * held[k]
                            more = left - c
                            if room < 0 or over >= limit:
                                break
                            if more == 0 or over + more * rest.at(room / more) < limit:
                                sums = tuple(a + c * b for a, b in zip(parts, each)) if full else ()
                                grown.setdefault(more, []).append((over, mb + c * held[k], sums, (*counts, c)))
                states = {left: _unbeaten(some, left == 0) for left, some in grown.items()}
                self.tally.evaluated += sum(map(len, states.values()))
            for weight, _, _, counts in states.get(0, []):
                used = [(c, self.options[k]) for c, k in zip(counts, use) if c]
                every = [0] * len(self.options)
                for c, k in zip(counts, use):
                    every[k] = c
                out.append(
                    _Stage(
                        weight,
                        sum(c * o.cost.forward_s for c, o in used) + end.forward_s + palette.moves_s / 2,
                        sum(c * o.cost.backward_s for c, o in used) + end.backward_s + palette.moves_s / 2,
                        sum(c * o.cost.sync_s for c, o in used) + end.sync_s,
                        tuple(every),
                    )
                )
        return out

    def _hull(self, stage: int, use: tuple[int, ...]) -> _Hull:
        if (stage, use) not in self.hulls:
            self.hulls[stage, use] = _Hull([(self.held[stage][k], self.options[k].weight) for k in use])
        return self.hulls[stage, use]

    def _round(self, stage: int, n: int) -> _Stage | None:
        """A multiset of at most two strategies of one palette, for a first bar."""
        best: tuple[float, _Palette, int, int, int] | None = None
        for palette in self._palettes_of(stage):
            start = self.ends_weight[stage] + palette.moves_s
            capacity = self.capacity[stage] - palette.buffer_MB
            for a in palette.use:
                for b in palette.use:
                    heavy, light = self.held[stage][a], self.held[stage][b]
                    if heavy < light or n * light > capacity:
                        continue
                    fit = n if n * heavy <= capacity else int((capacity - n * light) // (heavy - light))
                    weight = start + fit * self.options[a].weight + (n - fit) * self.options[b].weight
                    if best is None or weight < best[0]:
                        best = weight, palette, a, b, fit
        if best is None:
            return None
        weight, palette, a, b, fit = best
        counts = [0] * len(self.options)
        counts[a] += fit
        counts[b] += n - fit
        end, pair = self.ends[stage], ((fit, self.options[a].cost), (n - fit, self.options[b].cost))
        return _Stage(
            weight,
            sum(c * o.forward_s for c, o in pair) + end.forward_s + palette.moves_s / 2,
            sum(c * o.backward_s for c, o in pair) + end.backward_s + palette.moves_s / 2,
            sum(c * o.sync_s for c, o in pair) + end.sync_s,
            tuple(counts),
        )


def _unbeaten(states: list[_State], complete: bool) -> list[_State]:
    """Without states that another beats in MB and every sum of seconds (MB of a complete one no longer matter)."""
    out: list[_State] = []
    for s in sorted(states, key=lambda s: s[:3]):
        if not any((complete or o[1] <= s[1]) and o[0] <= s[0] and all(a <= b for a, b in zip(o[2], s[2])) for o in out):
            out.append(s)
    return out


def _weight(cost: Cost, stages: int, microbatches: int, account: Account) -> float:
    """Seconds of a microbatch that bounds go by. On one stage the exact account adds the reduction to the step, so it is shared out."""
    alone = stages == 1 and account.pipeline == "exact"
    return cost.seconds + (cost.sync_s / microbatches if alone else 0.0)


def _undominated(options: list[_Option]) -> list[_Option]:
    """Without those that another of their degree beats in every respect; the fastest first."""

    def beats(a: _Option, b: _Option) -> bool:
        x, y = a.cost, b.cost
        better = (
            x.forward_s <= y.forward_s, x.backward_s <= y.backward_s, x.sync_s <= y.sync_s, x.states_MB <= y.states_MB,
            x.activation_MB <= y.activation_MB, a.strategy.tensor == 1 or b.strategy.tensor > 1,
        )  # fmt: skip
        return a.strategy.degree == b.strategy.degree and all(better)

    out: list[_Option] = []
    for o in sorted(options, key=lambda o: (o.weight, o.cost.states_MB, o.cost.activation_MB)):
        if not any(beats(kept, o) for kept in out):
            out = [kept for kept in out if not beats(o, kept)] + [o]
    return out
