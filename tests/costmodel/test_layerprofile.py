"""A plan of layers under a layer profile: its seconds and MB by hand, and the laws that they keep."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodel import pipeline
from meshwright.costmodel.layerprofile import CONTEXT_MB, EXACT, GALVATRON, Account, Pricer, closed_form, makespan, zero_share
from meshwright.profiling.errors import InputError
from meshwright.profiling.layerprofile import LayerPlan, Strategy
from tests.costmodel.made_layers import profile

LIMIT = 16 * 1024.0


def plan(*layers: Strategy, cut: tuple[int, ...] | None = None, vocab: Strategy, microbatches: int = 2, batch: int = 8) -> LayerPlan:
    return LayerPlan(cut or (len(layers),), microbatches, batch, layers, vocab)


def test_one_device_is_forward_and_backward_of_everything() -> None:
    """4 layers and the ends at 4 samples, twice: three forwards each, and a fourth where a layer is checkpointed."""
    one = Strategy(1, 1)
    pricer = Pricer(profile(1), 1, 8, LIMIT, EXACT)
    ends = 4 * 0.002
    assert pricer.price(plan(one, one, one, one, vocab=one)).step_s == pytest.approx(2 * 3 * (4 * 0.017 + ends))
    again = pricer.price(plan(one, one, one, replace(one, checkpoint=True), vocab=one))
    assert again.step_s == pytest.approx(2 * (3 * (4 * 0.017 + ends) + 0.017))
    plain = 4 * (4 * 200 + 4 * 100) + 400 + 4 * 40 + CONTEXT_MB
    assert [s.memory_MB for s in pricer.price(plan(one, one, one, one, vocab=one)).stages] == [plain]
    assert [s.memory_MB for s in again.stages] == [plain - 4 * 100 + 4 * 10]


def test_replicas_reduce_gradients_behind_the_backward() -> None:
    """2 (n - 1) / n of bf16 gradients over the bus; it is hidden, and slows the backward of one microbatch by the overlap."""
    pricer = Pricer(profile(2), 2, 8, LIMIT, EXACT)
    cost = pricer.layer(Strategy(1, 2, zero=2), 1, 2)
    reduced = 2 * 1 / 2 * 100 / 50e3
    assert cost.sync_s == pytest.approx(0.1 * reduced)
    slow = Pricer(profile(2).model_copy(update={"clusters": [profile(2).clusters[0].model_copy(update={"consecutive_GBps": {2: 0.5}})]}), 2, 8, LIMIT)
    reduced, backward = 100 / 500, 2 * 0.009
    assert slow.layer(Strategy(1, 2, zero=2), 1, 2).sync_s == pytest.approx(reduced + 0.1 * backward - backward)


@pytest.mark.parametrize(("account", "gathers"), [(GALVATRON, 1), (EXACT, 2)])
def test_zero3_gathers_parameters(account: Account, gathers: int) -> None:
    """(n - 1) / n of the bf16 parameters, once in Galvatron's account, and for forward and backward in the exact one."""
    pricer = Pricer(profile(2), 2, 8, LIMIT, account)
    two, three = (pricer.layer(Strategy(1, 2, zero=z), 1, 2) for z in (2, 3))
    assert three.seconds - two.seconds == pytest.approx(gathers * 0.5 * 100 / 50e3)


def test_tensor_parallelism_and_ulysses_exchange_activations() -> None:
    """Half all-reduces or all-to-alls of samples x sequence x hidden, from the table; a checkpointed layer's forward repeats its own."""
    pricer = Pricer(profile(2), 2, 8, LIMIT, EXACT)
    half, exchange = (0.0001 + 4 * 5e-5) / 2, 0.0001 + 4 * 2e-5  # 4 samples are 4 MB
    compute = 3 * (4 * 0.004 / 2 + 0.001)
    assert pricer.layer(Strategy(2, 1), 1, 2).seconds == pytest.approx(compute + 8 * half)
    assert pricer.layer(Strategy(2, 1, checkpoint=True), 1, 2).seconds == pytest.approx(compute * 4 / 3 + 12 * half)
    assert pricer.layer(Strategy(2, 1, ulysses=True), 1, 2).seconds == pytest.approx(compute + 8 * exchange)
    whole = pricer.layer(Strategy(2, 1, ulysses=True), 1, 2).states_MB
    assert (pricer.layer(Strategy(2, 1), 1, 2).states_MB, whole) == (400, 800)


def test_between_sizes_of_a_table_is_its_line() -> None:
    """3 samples are 3 MB, which was not measured."""
    pricer = Pricer(profile(2), 2, 3, LIMIT, EXACT)
    assert pricer.layer(Strategy(2, 1), 1, 1).seconds == pytest.approx(3 * (3 * 0.004 / 2 + 0.001) + 8 * (0.0001 + 3 * 5e-5) / 2)


def test_stages_hold_the_microbatches_in_flight() -> None:
    """The first of two holds two, the last one; each holds its own end; the cache takes a fifth of a limit of more than 20 GB."""
    one = Strategy(1, 1)
    priced = Pricer(profile(2), 2, 8, 24 * 1024.0, EXACT).price(plan(one, one, one, one, cut=(3, 1), vocab=one))
    assert [s.memory_MB for s in priced.stages] == [3 * (800 + 2 * 400) + 400 + 2 * 160 + CONTEXT_MB, 800 + 400 + 400 + 160 + CONTEXT_MB]
    assert priced.reserve_MB == int(24 * 1024 * 0.2)
    assert priced.fits
    assert not Pricer(profile(2), 2, 8, 6000.0, EXACT).price(plan(one, one, one, one, cut=(3, 1), vocab=one)).fits
    hop = 2 * 4 / 20e3 / 4
    assert priced.stages[1].forward_s == pytest.approx(0.017 + hop + 4 * 0.001)


def test_a_change_of_degree_moves_activations() -> None:
    """Half of the wider degree's activation, there and back, in every microbatch; none where the degree stays."""
    mixed = plan(Strategy(1, 2, zero=2), Strategy(1, 2, zero=3), Strategy(2, 1), Strategy(2, 1, ulysses=True), vocab=Strategy(1, 2, zero=2))
    pricer = Pricer(profile(2), 2, 8, LIMIT, EXACT)
    assert pricer.reshard_s(mixed.layers[1], mixed.layers[2], 1, 2) == pytest.approx(2 * 0.5 * 4 / 50e3)
    apart = sum(pricer.layer(s, 1, 2).seconds for s in mixed.layers) + pricer.vocab(mixed.vocab, 1, 2)[0].seconds
    stage = pricer.price(mixed).stages[0]
    assert stage.forward_s + stage.backward_s == pytest.approx(apart + 2 * 0.5 * 4 / 50e3)


def test_ascending_degree_is_the_cheapest_order() -> None:
    """The search lays layers so: no other order of the same layers takes less."""
    layers = (Strategy(1, 4, zero=2), Strategy(2, 2, zero=2), Strategy(4, 1), Strategy(2, 2, zero=2))
    for seed in range(5):
        pricer = Pricer(profile(4, seed=seed), 4, 8, LIMIT, EXACT)
        steps = {o: pricer.price(plan(*o, vocab=Strategy(1, 4, zero=2))).step_s for o in set(itertools.permutations(layers))}
        assert steps[tuple(sorted(layers, key=lambda s: s.degree))] == pytest.approx(min(steps.values()))


@pytest.mark.parametrize(("zero", "microbatches", "share"), [(0, 4, 1.0), (2, 1, 7 / 8 * 0.253 + 1 / 8), (3, 1, 0.253), (3, 4, 0.253 * 1.25)])
def test_shares_of_zero(zero: int, microbatches: int, share: float) -> None:
    assert zero_share(zero, 4, microbatches) == pytest.approx(share)
    assert zero_share(zero, 1, microbatches) == 1.0


def test_1f1b_is_that_of_the_simulator() -> None:
    """The same makespan as the event simulator of schedules, whatever the stages take."""
    rng = random.Random(0)
    for _ in range(60):
        p = rng.randint(1, 5)
        m = p + rng.randint(0, 6)
        f, b = ([rng.uniform(0.1, 1) for _ in range(p)] for _ in range(2))
        assert makespan(f, b, [0.0] * p, m) == pytest.approx(pipeline.makespan(pipeline.simulate(f, b, 0.0, m)))


def test_equal_stages_make_both_forms_one() -> None:
    """(m + p - 1) times a stage; a reduction adds to the stage that ends last."""
    assert makespan([1.0] * 3, [2.0] * 3, [0.5, 0.0, 0.0], 6) == pytest.approx(8 * 3.0 + 0.5)
    assert closed_form([3.0] * 3, 6) == pytest.approx(8 * 3.0)
    assert makespan([1.0] * 3, [2.0] * 3, [0.0, 0.0, 0.5], 6) == pytest.approx(8 * 3.0)


def test_what_cannot_be_priced_is_said() -> None:
    one = Strategy(1, 1)
    with pytest.raises(InputError, match="lacks bandwidths"):
        Pricer(profile(2).model_copy(update={"clusters": []}), 2, 8, LIMIT)
    with pytest.raises(InputError, match="no bandwidths of 8 devices"):
        Pricer(profile(2), 8, 8, LIMIT)
    pricer = Pricer(profile(2), 2, 8, LIMIT)
    with pytest.raises(InputError, match="does not divide 2 devices"):
        pricer.layer(one, 1, 2)
    with pytest.raises(InputError, match="do not fill 2 stages"):
        pricer.price(plan(one, one, one, one, cut=(2, 2), vocab=one, microbatches=1))
    with pytest.raises(InputError, match="does not fit the 4 and 8 here"):
        pricer.price(plan(one, vocab=one))
    with pytest.raises(InputError, match="no activation of a layer at 4"):
        Pricer(profile(2).model_copy(update={"clusters": profile(4).clusters}), 4, 8, LIMIT).layer(Strategy(4, 1), 1, 1)


def test_more_memory_in_flight_and_more_work_never_cost_less() -> None:
    """A checkpoint saves MB and costs seconds, a microbatch more holds no fewer of them."""
    for seed in range(10):
        pricer = Pricer(profile(4, seed=seed), 4, 8, LIMIT)
        for s in (Strategy(1, 4, zero=2), Strategy(2, 2, zero=3), Strategy(4, 1), Strategy(2, 2, ulysses=True, zero=3)):
            plain, again = pricer.layer(s, 1, 2), pricer.layer(replace(s, checkpoint=True), 1, 2)
            assert again.seconds > plain.seconds
            assert again.forward_s == plain.forward_s
            held = [math_ceil(pricer, s, n) for n in (1, 2, 3)]
            assert np.all(np.diff(held) > 0)


def math_ceil(pricer: Pricer, strategy: Strategy, in_flight: int) -> float:
    return pricer.memory_MB([pricer.layer(strategy, 1, 2)], [], in_flight, 0.0)
