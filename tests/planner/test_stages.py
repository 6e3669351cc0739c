"""Exact stage cuts against brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.costmodel.memory import persistent_bytes
from meshwright.planner.stages import StageProblem, Stages

End = tuple[float, float, float, float, float]


@st.composite
def problems(draw: st.DrawFn) -> StageProblem:
    """Up to eight layers of random seconds, bytes and parameters on up to four stages."""
    layers = draw(st.integers(1, 8))
    pp = draw(st.integers(1, min(4, layers)))

    def numbers(high: int) -> np.ndarray:
        return np.array(draw(st.lists(st.integers(0, high), min_size=layers, max_size=layers)), float)

    def end() -> End:
        c, e, kept, extra, numel = (float(draw(st.integers(0, 30))) for _ in range(5))
        return c, e, kept, kept + extra, numel

    kept = numbers(50)
    return StageProblem(
        c=numbers(20) + 1, e=numbers(9), kept=kept, working=kept + numbers(40), numel=numbers(10), before=end(), after=end(), pp=pp,
        microbatches=draw(st.integers(pp, 12)), send_s=float(draw(st.integers(0, 20))), carry_bytes=float(draw(st.integers(0, 5))),
        zero=draw(st.integers(0, 3)), dp=draw(st.sampled_from([1, 2, 4])), compute_bytes=draw(st.sampled_from([2.0, 4.0])),
    )  # fmt: skip


def priced(p: StageProblem, edges: list[int]) -> tuple[float, float]:
    """(step seconds, live bytes of the fullest stage) of a cut, straight from the layers."""
    cs, es, lives = [], [], []
    for s, (a, b) in enumerate(zip(edges, edges[1:])):
        ends = ([p.before] if s == 0 else []) + ([p.after] if s == p.pp - 1 else [])
        neighbours = (s > 0) + (s < p.pp - 1)
        cs.append(p.c[a:b].sum() + sum(x[0] for x in ends) + neighbours * p.send_s)
        es.append(p.e[a:b].sum() + sum(x[1] for x in ends))
        kept = p.kept[a:b].sum() + sum(x[2] for x in ends) + neighbours * p.carry_bytes
        extra = max([*(p.working - p.kept)[a:b], *(x[3] - x[2] for x in ends)])
        root = sum(x[4] for x in ends)
        held = persistent_bytes(
            p.numel[a:b].sum() + root, p.numel[a:b].max(), root, zero=p.zero, dp=p.dp, compute_bytes=p.compute_bytes,
            accumulates=p.microbatches > 1,
        )  # fmt: skip
        lives.append(held.total + min(p.microbatches, p.pp - s) * kept + extra)
    return float((p.microbatches - 1) * max(cs) + sum(cs) + max(es)), float(max(lives))


def every_cut(p: StageProblem) -> list[tuple[float, float, list[int]]]:
    return [(*priced(p, [0, *cut, p.layers]), [*cut, p.layers]) for cut in combinations(range(1, p.layers), p.pp - 1)]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(problem=problems(), tightness=st.floats(0, 1))
def test_best_cut_is_the_best_of_all_that_fit(problem: StageProblem, tightness: float) -> None:
    """The chosen cut is as fast as the fastest cut that fits in memory, and it is found whenever one fits."""
    cuts = every_cut(problem)
    lives = sorted(live for _, live, _ in cuts)
    capacity = lives[min(int(tightness * len(lives)), len(lives) - 1)] + 1e-6
    step, ends = Stages(problem).best(capacity)  # type: ignore[misc]
    assert step == pytest.approx(min(s for s, live, _ in cuts if live <= capacity), rel=1e-9)
    own_step, own_live = priced(problem, [0, *ends])
    assert own_step == pytest.approx(step, rel=1e-9)
    assert own_live <= capacity
    assert Stages(problem).best(lives[0] * 0.999 - 1e-6) is None


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=problems())
def test_least_memory_is_the_least_of_all_cuts(problem: StageProblem) -> None:
    """The memory that an infeasible plan is said to need at least is what the smallest of all cuts needs."""
    live, ends = Stages(problem).least_memory()
    assert live == pytest.approx(min(m for _, m, _ in every_cut(problem)), rel=2e-4, abs=1e-6)
    assert live == pytest.approx(priced(problem, [0, *ends])[1])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=problems())
def test_every_cut_costs_what_its_layers_cost(problem: StageProblem) -> None:
    """A stage's price is the sum of its layers, its ends and its transfers, for every cut."""
    stages = Stages(problem)
    for step, live, ends in every_cut(problem):
        assert stages.step(ends) == pytest.approx(step, rel=1e-12)
        assert max(x.live_bytes for x in stages.costs(ends)) == pytest.approx(live, rel=1e-12)


def test_a_middle_stage_that_pays_two_transfers_is_not_left_the_heavy_layer() -> None:
    """The best cut is found where the first stage must take fewer layers than fit it."""
    none = np.zeros(4)
    end = (0.0, 0.0, 0.0, 0.0, 0.0)
    problem = StageProblem(
        c=np.array([1.0, 1.0, 4.0, 1.0]), e=none, kept=none, working=none, numel=none, before=end, after=end, pp=3, microbatches=3, send_s=3.0,
        carry_bytes=0.0, zero=0, dp=1, compute_bytes=4.0,
    )  # fmt: skip
    assert Stages(problem).best(1.0) == (2 * 8.0 + 19.0, [1, 2, 4])
