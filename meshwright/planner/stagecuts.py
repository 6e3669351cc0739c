"""The best cut where a rank has one chunk: every contiguous cut, as a shortest path over stages under thresholds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.costmodel.stagememory import Place
from meshwright.planner.stageproblem import FULL, NONE, SAME, Cut
from meshwright.planner.stageranks import Ranks, _cheapest, _Options

MOST = 4_000_000  # peaks worked out at once
MANY = 200  # choices from which on it pays to rule some out by a bound first

Lengths = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # least and most layers: the first stage, those between, the last


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


class _Contiguous:
    """Every contiguous cut: a dynamic program over stages."""

    def __init__(self, stages: Ranks) -> None:
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
