"""The layerwise search against brute force over every cut, every multiset of strategies and every choice of the ends."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest

from meshwright.costmodel.layerprofile import EXACT, GALVATRON, Account, Pricer, makespan
from meshwright.planner.layerwise import _shared_bound, search, step_bound, strategies
from meshwright.planner.layerwisefront import _Hull
from meshwright.profiling.errors import InputError
from meshwright.profiling.layerprofile import LayerPlan
from tests.costmodel.made_layers import profile


def brute(pricer: Pricer, own: bool, microbatches: Sequence[int]) -> float:
    """The least step of all plans that fit; inf if none does."""
    best, layers = math.inf, pricer.layers
    for p in (d for d in range(1, min(pricer.devices, layers) + 1) if pricer.devices % d == 0):
        even = [tuple(layers // p + (layers % p if i == p - 1 else 0) for i in range(p))]
        cuts = even if own else [c for c in itertools.product(range(1, layers + 1), repeat=p) if sum(c) == layers]
        for m in (m for m in microbatches if m >= p):
            options = sorted(strategies(pricer, p, m, own), key=lambda s: s.degree)
            for vocab in strategies(pricer, p, m, own, ends=True):
                for cut in cuts:
                    for stages in itertools.product(*(itertools.combinations_with_replacement(options, n) for n in cut)):
                        priced = pricer.price(LayerPlan(cut, m, pricer.batch, tuple(itertools.chain(*stages)), vocab))
                        if priced.fits and priced.step_s < best:
                            best = priced.step_s
    return best


SIZES = [(2, 3, (1, 2, 4)), (2, 4, (2,)), (2, 2, (2, 4, 8)), (1, 5, (1, 4)), (4, 2, (2, 4)), (4, 5, (4,))]  # devices, layers, microbatches
CASES = [(account, seed) for account in (EXACT, GALVATRON) for seed in range(36)]


def case(account: Account, seed: int) -> tuple[Pricer, tuple[int, ...], bool]:
    """A made-up profile with a limit between one under which hardly anything fits and one under which all does."""
    devices, layers, microbatches = SIZES[seed % len(SIZES)]
    limit = 1024 + 600 + layers * random.Random(seed).uniform(200, 1200) * (2 if devices == 1 else 1)
    return Pricer(profile(devices, layers, seed, 500.0), devices, max(microbatches), limit, account), microbatches, account is GALVATRON


@pytest.mark.parametrize(("account", "seed"), CASES)
def test_the_best_plan_is_that_of_brute_force(account: Account, seed: int) -> None:
    pricer, microbatches, own = case(account, seed)
    found = search(pricer, microbatches, own)
    best = brute(pricer, own, microbatches)
    if best == math.inf:
        assert found.plan is None
        return
    assert found.price is not None
    assert found.price.fits
    assert found.price.step_s == pytest.approx(best, rel=1e-9)
    assert found.certificate.bound_s <= best * (1 + 1e-9)
    assert found.certificate.gap == pytest.approx(1 - found.certificate.bound_s / best, abs=1e-9)
    if account is EXACT:
        assert found.certificate.gap == pytest.approx(0, abs=1e-9)


def test_the_cases_are_not_all_alike() -> None:
    """Among them plans mix strategies, have several stages and cut unevenly, and for some nothing fits."""
    found = [search(*case(*c)) for c in CASES]
    plans = [f.plan for f in found if f.plan is not None]
    assert 0 < len(found) - len(plans) < len(CASES) / 2
    assert sum(len(set(p.layers)) > 1 for p in plans) > 15
    assert sum(p.stages > 1 for p in plans) > 4
    assert sum(len(set(p.cut)) > 1 for p in plans) > 3
    assert sum(p.microbatches < max(m) for p, m in ((f.plan, case(*c)[1]) for f, c in zip(found, CASES)) if p is not None) > 5


def test_a_wider_space_is_never_slower() -> None:
    """Uneven cuts, and ZeRO over Ulysses ranks, only add plans."""
    for seed in range(8):
        pricer = Pricer(profile(4, 6, seed=seed), 4, 8, 4500.0, EXACT)
        own, ours = search(pricer, own=True), search(pricer)
        if own.price is not None:
            assert ours.price is not None
            assert ours.price.step_s <= own.price.step_s * (1 + 1e-9)
            assert ours.certificate.plans_log10 > own.certificate.plans_log10


def test_more_memory_is_never_slower() -> None:
    steps = []
    for limit in (2500.0, 4000.0, 6000.0, 12000.0):
        found = search(Pricer(profile(4, 8, seed=3), 4, 8, limit, EXACT))
        steps.append(math.inf if found.price is None else found.price.step_s)
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < math.inf


def test_every_choice_is_pruned_or_looked_into() -> None:
    found = search(Pricer(profile(4, 8, seed=1), 4, 8, 6000.0, EXACT))
    c = found.certificate
    assert 0 < c.pruned < c.outer
    assert c.cuts >= c.outer - c.pruned - 1
    assert c.plans_log10 > 5


def test_bounds_are_below_the_step() -> None:
    """`step_bound` never exceeds a 1F1B step, nor the bound by the sum alone the bound by the stages."""
    rng = random.Random(1)
    tight = 0
    for _ in range(500):
        p = rng.randint(1, 6)
        m = p + rng.randint(0, 8)
        f = [rng.uniform(0.1, 1) for _ in range(p)]
        b = [rng.uniform(1, 3) * x for x in f]
        stage_s = [x + y for x, y in zip(f, b)]
        step = makespan(f, b, [0.0] * p, m)
        assert step_bound(stage_s, m) <= step * (1 + 1e-12)
        assert _shared_bound(sum(stage_s), p, m) <= step_bound(stage_s, m) * (1 + 1e-12)
        tight += step_bound(stage_s, m) > 0.95 * step
    assert tight > 100
    assert _shared_bound(4.0, 4, 8) == pytest.approx(step_bound([1.0] * 4, 8))
    assert step_bound([1.0] * 4, 8) == pytest.approx(11.0)


def test_the_hull_is_below_every_mix() -> None:
    rng = random.Random(2)
    for _ in range(50):
        points = [(rng.randint(1, 50), rng.uniform(1, 9)) for _ in range(rng.randint(1, 6))]
        hull = _Hull(points)
        for _ in range(20):
            mix = [rng.choice(points) for _ in range(rng.randint(1, 5))]
            n = len(mix)
            assert n * hull.at(sum(x for x, _ in mix) / n) <= sum(y for _, y in mix) + 1e-9
        assert hull.at(min(x for x, _ in points) - 1) == math.inf


def test_the_closed_account_is_not_asked_about_uneven_cuts() -> None:
    with pytest.raises(InputError, match="prices even cuts alone"):
        search(Pricer(profile(2), 2, 8, 4000.0, GALVATRON))
