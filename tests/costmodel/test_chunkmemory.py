"""Ranks with several chunks: what each chunk holds at an action, and live bytes that add up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_memory import Pick, made_blocks, made_shape

from meshwright.costmodel import schedules
from meshwright.costmodel.chunkmemory import NONE, WHOLE, fewest, fullest, held, least_times
from meshwright.costmodel.stagememory import Place, StageMemory


def picker(seed: int) -> Pick:
    rng = np.random.default_rng(seed)
    return lambda low, high: int(rng.integers(low, high + 1))


@pytest.mark.parametrize(("pp", "vpp", "rounds"), [(2, 2, 1), (2, 6, 4), (4, 3, 2), (3, 2, 7)])
def test_chunks_in_flight_are_those_of_the_schedule(pp: int, vpp: int, rounds: int) -> None:
    """The most chunks in flight are what the schedule says; with one round the last chunk runs backward where others have no gradients."""
    m = pp * rounds
    for rank in range(pp):
        of = fullest("interleaved", pp, m, vpp, rank, True)
        assert of.flying.sum(axis=1).max() == vpp * schedules.find("interleaved").in_flight(pp, rank, m, vpp)
        assert (of.gathered.sum(axis=1) <= 3).all()
        last = [i for i, k in enumerate(of.kind) if "backward" in k and of.chunk[i] == vpp - 1]
        assert ((of.gradients[last] == WHOLE).all(axis=1)).any() == (rounds > 1)
        assert any((of.gradients[i, : vpp - 1] == NONE).all() for i in last)
        assert fewest("interleaved", pp, m, vpp)[rank] >= 1


@pytest.mark.parametrize("seed", range(30))
def test_the_peak_of_chunks_adds_up(seed: int) -> None:
    """The peak by category adds up to the live bytes, which are no less than the bound, nor than the optimizer and the parameters take."""
    pick = picker(seed)
    x = made_shape(pick, 4)
    vpp, pp = pick(2, 4), max(x.pp, 2)
    x = replace(x, pp=pp, vpp=vpp, schedule="interleaved", microbatches=pp * pick(1, 3))
    memory = StageMemory(made_blocks(pick, x, vpp * pick(1, 3)), x)
    n, at = len(memory.b.layer), memory.at
    borders = [0, *(int(at[i]) for i in sorted(np.random.default_rng(seed).choice(np.arange(1, len(at)), vpp - 1, replace=False))), n]
    for rank in range(pp):
        place = Place(rank == 0, rank == pp - 1, vpp, 0.0, borders)
        live = float(memory.live_at(0, n, place, rank))
        name, block, parts = memory.peak_at(0, n, place, rank)
        assert sum(parts.values()) == pytest.approx(live)
        assert 0 <= block < n
        assert name
        assert memory.least_at(0, n, place, rank) <= live * (1 + 1e-12)
        assert (least_times(x, vpp, np.array([rank]))[0] <= held(x, vpp, rank).flying.max(axis=0)).all()
