"""Exact stage cuts against brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_memory import memories

from meshwright.costmodel.stagememory import Blocks, Shape, StageMemory
from meshwright.planner.stages import StageProblem, Stages


@st.composite
def problems(draw: st.DrawFn) -> StageProblem:
    """Up to eight layers of random seconds, bytes and parameters on up to four stages."""
    memory = draw(memories())
    layers = len(memory.at)

    def numbers(high: int) -> np.ndarray:
        return np.array(draw(st.lists(st.integers(0, high), min_size=layers, max_size=layers)), float)

    def end() -> tuple[float, float]:
        return float(draw(st.integers(0, 30))), float(draw(st.integers(0, 30)))

    return StageProblem(
        c=numbers(20) + 1, e=numbers(9), before=end(), after=end(), pp=memory.x.pp, microbatches=memory.x.microbatches,
        send_s=float(draw(st.integers(0, 20))), memory=memory,
    )  # fmt: skip


def priced(p: StageProblem, edges: list[int]) -> tuple[float, float]:
    """(step seconds, live bytes of the fullest stage) of a cut, straight from the layers."""
    cs, es, lives = [], [], []
    for s, (a, b) in enumerate(zip(edges, edges[1:])):
        ends = ([p.before] if s == 0 else []) + ([p.after] if s == p.pp - 1 else [])
        neighbours = (s > 0) + (s < p.pp - 1)
        cs.append(p.c[a:b].sum() + sum(x[0] for x in ends) + neighbours * p.send_s)
        es.append(p.e[a:b].sum() + sum(x[1] for x in ends))
        lives.append(float(p.memory.live(a, b, s)))
    return float((p.microbatches - 1) * max(cs) + sum(cs) + max(es)), max(lives)


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
    assert live == min(m for _, m, _ in every_cut(problem))
    assert live == priced(problem, [0, *ends])[1]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=problems())
def test_every_cut_costs_what_its_layers_cost(problem: StageProblem) -> None:
    """A stage's price is the sum of its layers, its ends and its transfers, for every cut."""
    stages = Stages(problem)
    for step, live, ends in every_cut(problem):
        assert stages.step(ends) == pytest.approx(step, rel=1e-12)
        assert max(x.live_bytes for x in stages.costs(ends)) == live


def test_a_middle_stage_that_pays_two_transfers_is_not_left_the_heavy_layer() -> None:
    """The best cut is found where the first stage must take fewer layers than fit it."""
    none = np.zeros(4)
    nothing = Blocks(
        layer=none == 0, kept=none, forward=none, backward=none, saved=none, carry=none, numel=none, padded=none, buffers=none, incoming=none,
        keeps_result=none > 0, last_numel=none, tied=none,
    )  # fmt: skip
    memory = StageMemory(nothing, Shape(pp=3, microbatches=3, zero=0, dp=1, compute_bytes=4.0, mixed=False))
    problem = StageProblem(
        c=np.array([1.0, 1.0, 4.0, 1.0]), e=none, before=(0.0, 0.0), after=(0.0, 0.0), pp=3, microbatches=3, send_s=3.0, memory=memory
    )
    assert Stages(problem).best(1.0) == (2 * 8.0 + 19.0, [1, 2, 4])
