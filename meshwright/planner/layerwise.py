"""The exact best LayerPlan under a layer profile: a strategy for each layer, the cut into stages, microbatches and the ends' strategy.

Layers are alike, so a stage is a multiset of strategies: an integer program over counts, not a table over MB and layers.

1. Stages, microbatches and the ends' strategy are enumerated. A bound of each comes from a relaxation: any fraction of a layer may take
   any strategy, so that n layers in M MB take no less than n times the lower convex hull of (MB, seconds) at M / n.
2. In ascending order of that bound, cuts are enumerated from the last stage to the first, and left as soon as the bound of a step with
   the stages so far (`_bound`) is no better than the best plan known.
3. In a cut, the fastest multiset of each stage gives a plan and a tighter bound. Where these two differ, the multisets that could
   still win are enumerated, strategy after strategy; those that another beats in MB and in every kind of seconds are dropped.

Nothing is left out but for a plan that is as good, or for a bound that is no better than the best plan, so that plan is optimal and
`Certificate.gap` zero. One case is open: the closed account lets a stage's reduction wait for the stages before it, so with three stages
or more a slower stage can shorten that wait. Where it could, `bound_s` leaves the wait out, and the gap says how much is open.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from meshwright.costmodel.layerprofile import Price, Pricer, closed_form
from meshwright.planner.layerwisefront import _Fronts, _Hulls, _Option, _Stage, _Tally, _undominated, _weight
from meshwright.profiling.errors import InputError
from meshwright.profiling.layerprofile import LayerPlan, Strategy

EPSILON = 1e-12  # relative: plans nearer than this are equally good


@dataclass(frozen=True)
class Certificate:
    """What became of the space. `bound_s`: no plan of it is faster. `outer`: choices of stages, microbatches and the ends' strategy."""

    plans_log10: float
    outer: int
    pruned: int  # of these, by their bound alone
    cuts: int  # that were looked into
    evaluated: int  # stages' multisets and steps that were priced
    bound_s: float
    gap: float
    seconds: float


@dataclass(frozen=True)
class Found:
    """The best plan, or None if nothing fits, and the proof."""

    plan: LayerPlan | None
    price: Price | None
    certificate: Certificate


def strategies(pricer: Pricer, stages: int, microbatches: int, own: bool = False, ends: bool = False) -> list[Strategy]:
    """Strategies that divide the ranks and the batch and were measured. `own`: those of Galvatron's search, powers of two, with ZeRO-2
    or 3 over replicas alone; else every degree, and ZeRO over Ulysses ranks too. `ends`: of embedding and head, without checkpoints."""
    out = []
    for degree, data in ((k, pricer.devices // stages // k) for k in _divisors(pricer.devices // stages)):
        if own and degree & (degree - 1):
            continue
        for ulysses in (False, True) if degree > 1 else (False,):
            shards = data * (degree if ulysses else 1)
            zeros = ((2, 3) if data > 1 else (0,)) if own else ((0, 2, 3) if shards > 1 else (0,))
            for zero in zeros:
                for checkpoint in (False,) if ends else (False, True):
                    s = Strategy(degree, data, ulysses, zero, checkpoint)
                    if pricer.samples(s, stages, microbatches):
                        try:
                            (pricer.vocab if ends else pricer.layer)(s, stages, microbatches)
                        except InputError:  # not measured
                            continue
                        out.append(s)
    return out


def search(pricer: Pricer, microbatches: Sequence[int] | None = None, own: bool = False) -> Found:
    """The best plan of a pricer's profile, devices, batch and limit. `microbatches`: only these, else every divisor of the batch;
    `own`: the space of Galvatron's search, with even cuts. InputError for the closed account on cuts that it cannot price."""
    if pricer.account.pipeline == "closed" and not own:
        raise InputError("the closed account counts the first and the last stage only, so it prices even cuts alone: own=True")
    return _Search(pricer, microbatches, own).run()


class _Search:
    def __init__(self, pricer: Pricer, microbatches: Sequence[int] | None, own: bool) -> None:
        self.pricer, self.own = pricer, own
        given = _divisors(pricer.batch) if microbatches is None else microbatches
        self.microbatches = [m for m in given if m > 0 and pricer.batch % m == 0]
        self.best_s = math.inf
        self.plan: LayerPlan | None = None
        self.tally = _Tally()

    def run(self) -> Found:
        started = time.perf_counter()
        outer: list[tuple[float, int, _Outer]] = []
        pricer, tally = self.pricer, self.tally
        count, plans = 0, -math.inf
        for p in _divisors(pricer.devices):
            if p > pricer.layers or (p > 1 and pricer.links is not None and p not in pricer.links.p2p_GBps):
                continue
            for m in self.microbatches:
                if m < p or not (options := strategies(pricer, p, m, self.own)):
                    continue
                ends = strategies(pricer, p, m, self.own, ends=True)
                cuts = 1 if self.own else math.comb(pricer.layers - 1, p - 1)
                if ends:
                    plans = _log10_sum(plans, math.log10(len(ends)) + math.log10(cuts) + pricer.layers * math.log10(len(options)))
                kept = _undominated([_Option(s, c, _weight(c, p, m, pricer.account)) for s in options for c in [pricer.layer(s, p, m)]])
                held = [[math.ceil(o.cost.states_MB + o.cost.activation_MB * (p - i)) for o in kept] for i in range(p)]
                hulls: _Hulls = {}
                for vocab in ends:
                    one = _Outer(self, p, m, vocab, kept, held, hulls)
                    outer.append((one.bound_s, count, one))
                    count += 1
        for bound, _, one in sorted(outer, key=lambda x: x[:2]):
            if bound >= self.best_s * (1 - EPSILON):
                tally.pruned += 1
                continue
            one.solve()
        price = pricer.price(self.plan) if self.plan else None
        bound_s = min(self.best_s, tally.open_s)
        gap = 0.0 if price is None else (self.best_s - bound_s) / self.best_s
        certificate = Certificate(plans, count, tally.pruned, tally.cuts, tally.evaluated, bound_s, gap, time.perf_counter() - started)
        return Found(self.plan, price, certificate)


class _Outer(_Fronts):
    """One choice of stages, microbatches and the ends' strategy: what its stages may hold, and their bounds."""

    def __init__(
        self, search: _Search, stages: int, microbatches: int, vocab: Strategy, options: list[_Option], held: list[list[int]], hulls: _Hulls
    ) -> None:
        """`held`: MB of a layer by stage and option; `hulls` are those of these, made as they are asked for."""
        super().__init__(search.pricer, search.tally, stages, microbatches, vocab, options, held, hulls)
        self.search = search
        self.most = self.pricer.layers - stages + 1
        every = tuple(range(len(options)))
        whole = [self._hull(i, every) for i in range(stages)]
        self.least = [
            [math.inf] + [n * h.at(c / n) + e for n in range(1, self.most + 1)] for h, c, e in zip(whole, self.capacity, self.ends_weight)
        ]
        self.even = self._even()
        self.bound_s = self._outer_bound()

    def _even(self) -> tuple[int, ...]:
        each, rest = divmod(self.pricer.layers, self.p)
        return tuple(each + (rest if i == self.p - 1 else 0) for i in range(self.p))

    def _outer_bound(self) -> float:
        if self.search.own:
            return self._bound([self.least[i][n] for i, n in enumerate(self.even)])
        self.head = self._heads()
        return _shared_bound(self.head[-1][self.pricer.layers], self.p, self.m)

    def _heads(self) -> list[list[float]]:
        """[i][n]: least sum of seconds of stages 0 to i, if they hold n layers. Each stage's least is convex in its layers, so that giving
        one layer at a time to the stage where it costs least is best."""
        out, layers = [], self.pricer.layers
        steps: list[float] = []
        base = 0.0
        for i in range(self.p):
            least = self.least[i]
            base += least[1]
            steps = sorted(steps + [b - a for a, b in zip(least[1:], least[2:]) if b < math.inf])
            row, total = [math.inf] * (layers + 1), base
            for n in range(i + 1, layers + 1):
                row[n] = total
                if n - i - 1 >= len(steps):
                    break
                total += steps[n - i - 1]
            out.append(row)
        return out

    def _bound(self, weights: Sequence[float]) -> float:
        return closed_form(weights, self.m) if self.pricer.account.pipeline == "closed" else step_bound(weights, self.m)

    def solve(self) -> None:
        for cut in [self.even] if self.search.own else self._cuts():
            least = [self.least[i][n] for i, n in enumerate(cut)]
            if self._bound(least) < self._known():
                self.search.tally.cuts += 1
                self._solve_cut(cut, least)

    def _known(self) -> float:
        return self.search.best_s * (1 - EPSILON)

    def _cuts(self) -> Iterator[tuple[int, ...]]:
        """Cuts whose bound beats the best plan, from the last stage to the first; those near to the balanced one come first."""
        p, m, layers = self.p, self.m, self.pricer.layers

        def down(i: int, left: int, weights: list[float], cut: list[int]) -> Iterator[tuple[int, ...]]:
            if i < 0:
                yield tuple(cut)
                return
            sizes = [left] if i == 0 else range(1, left - i + 1)
            for n in sorted(sizes, key=lambda n: abs(n - left / (i + 1))):
                mine = self.least[i][n] if n <= self.most else math.inf
                before = self.head[i - 1][left - n] if i else 0.0
                total = before + mine + sum(weights)
                if _cases([mine, *weights], total, m) < self._known():
                    yield from down(i - 1, left - n, [mine, *weights], [n, *cut])

        yield from down(p - 1, layers, [], [])

    def _solve_cut(self, cut: tuple[int, ...], least: list[float]) -> None:
        fastest = []
        for i, n in enumerate(cut):
            made = self._fastest(i, n)
            if made is None:
                return
            fastest.append(made)
        if self._bound([s.weight for s in fastest]) >= self._known():
            return
        self._offer(cut, fastest)
        least = [s.weight for s in fastest]
        if self._bound(least) >= self._known():
            return
        if self.pricer.account.pipeline == "closed" and self.p > 2:
            self.search.tally.open_s = min(self.search.tally.open_s, self._bound(least))
        rows = []
        for i, n in enumerate(cut):
            rows.append(sorted(self._front(i, n, self._limit(least, i), full=True), key=lambda s: (s.weight, s.sync_s)))
            if not rows[-1]:
                return
        self._combine(cut, rows, [], least)

    def _limit(self, least: list[float], stage: int) -> float:
        """Seconds of a stage's microbatch from which the step is no better than the best, whatever the other stages do."""
        low, high = least[stage], max(2 * least[stage], self._known() / max(1, self.m - 1))
        for _ in range(60):
            middle = (low + high) / 2
            trial = [*least[:stage], middle, *least[stage + 1 :]]
            low, high = (middle, high) if self._bound(trial) < self._known() else (low, middle)
        return high

    def _combine(self, cut: tuple[int, ...], rows: list[list[_Stage]], chosen: list[_Stage], least: list[float]) -> None:
        i = len(chosen)
        if i == len(rows):
            self._offer(cut, chosen)
            return
        for made in rows[i]:
            if self._bound([*(c.weight for c in chosen), made.weight, *least[i + 1 :]]) >= self._known():
                return  # rows ascend by weight, and the bound with it
            self._combine(cut, rows, [*chosen, made], least)

    def _offer(self, cut: tuple[int, ...], stages: Sequence[_Stage]) -> None:
        """Prices a plan, and keeps it if it is the best."""
        self.search.tally.evaluated += 1
        step = self.pricer.step_s(
            [s.forward_s for s in stages], [s.backward_s for s in stages], [s.sync_s for s in stages],
            [e.seconds for e in self.ends], self.m,
        )  # fmt: skip
        if step < self._known():
            layers = [s for made in stages for s in self._laid(made.counts)]
            self.search.best_s = step
            self.search.plan = LayerPlan(cut, self.m, self.pricer.batch, tuple(layers), self.vocab)

    def _laid(self, counts: tuple[int, ...]) -> list[Strategy]:
        """The layers of a stage: in ascending degree, so that the activation changes its degree as seldom as it can."""
        used = (o.strategy for o, n in zip(self.options, counts) for _ in range(n))
        return sorted(used, key=lambda s: (s.degree, s.ulysses, s.zero, s.checkpoint))


def step_bound(stage_s: Sequence[float], microbatches: int) -> float:
    """Seconds that a 1F1B step takes at least, if stage i takes stage_s[i] for forward and backward of a microbatch.

    Stage i starts after the stages before it ran a forward, and they run a backward after its last: sum over j <= i + (m - 1) of its own.
    And its first backward waits for a forward of every stage and a backward of those after it; from there to its last forward it
    runs m - p + i of both; then the last microbatch goes on to the last stage and back to the first.
    """
    return _cases(stage_s, sum(stage_s), microbatches)


def _cases(stage_s: Sequence[float], total: float, microbatches: int) -> float:
    """The largest of both sums over the last stages, where all the stages' seconds sum to `total`."""
    after, worst = 0.0, 0.0
    for place, mine in enumerate(reversed(stage_s)):  # 0 is the last stage
        steady = microbatches - 1 - place
        if steady > 0:
            worst = max(worst, total + after + steady * mine)
        worst = max(worst, total - after + (microbatches - 1) * mine)
        after += mine
    return worst


def _log10_sum(a: float, b: float) -> float:
    low, high = sorted((a, b))
    return high if low == -math.inf else high + math.log10(1 + 10 ** (low - high))


def _shared_bound(total: float, p: int, m: int) -> float:
    """The least `step_bound` of stages that sum to `total`: shares of its cases that weigh every stage alike."""
    if m > p:
        return total * (m + p - 1) / p
    return total / (1 - (1 - 1 / m) ** p)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
