"""Peak bytes of a stage: arrays against single intervals, parts against totals, and the closed form against a step walked event by event."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_memory import Pick, made_blocks, made_shape, memories
from made_walk import Step

from meshwright.costmodel.moments import RangeMax
from meshwright.costmodel.stagememory import CATEGORIES, Blocks, Shape, StageMemory

WALKED = {
    "no FSDP": {"zero": 0, "dp": 1, "mixed": False},
    "bf16 on one rank": {"zero": 0, "dp": 1, "mixed": True},
    "ZeRO 0": {"zero": 0, "dp": 4, "mixed": True},
    "ZeRO 1": {"zero": 1, "dp": 4, "mixed": True},
    "ZeRO 2": {"zero": 2, "dp": 4, "mixed": True},
    "ZeRO 3": {"zero": 3, "dp": 4, "mixed": True},
    "ZeRO 0 in fp32": {"zero": 0, "dp": 2, "mixed": False},
    "ZeRO 1 in fp32": {"zero": 1, "dp": 2, "mixed": False},
    "ZeRO 2 in fp32": {"zero": 2, "dp": 2, "mixed": False},
    "ZeRO 3 in fp32": {"zero": 3, "dp": 2, "mixed": False},
}


def picker(seed: int) -> Pick:
    rng = np.random.default_rng(seed)
    return lambda low, high: int(rng.integers(low, high + 1))


def shape(microbatches: int, *, zero: int, dp: int, mixed: bool) -> Shape:
    return Shape(pp=1, microbatches=microbatches, zero=zero, dp=dp, compute_bytes=2.0 if mixed else 4.0, mixed=mixed)


def whole(memory: StageMemory) -> float:
    return float(memory.live(0, len(memory.at), 0))


# --- one closed form, however it is asked -----------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(values=st.lists(st.integers(-50, 50), min_size=1, max_size=20))
def test_the_maximum_of_every_range(values: list[int]) -> None:
    """The table gives numpy's maximum of every range, for arrays of ranges at once, and minus infinity for an empty one."""
    n = len(values)
    a, b = (x.ravel() for x in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
    expected = [max(values[i:j], default=-np.inf) for i, j in zip(a, b)]
    assert RangeMax(np.array(values, float))(a, b).tolist() == expected


@pytest.mark.parametrize("seed", range(150))
def test_arrays_are_what_their_elements_are(seed: int) -> None:
    """All intervals of layers at once have the bytes of each interval alone, as every stage, all stages together
    too, and their categories add up to them."""
    pick = picker(seed)
    layers = pick(1, 9)
    x = made_shape(pick, min(layers, 4))
    memory = StageMemory(made_blocks(pick, x, layers), x)
    first, last = np.nonzero(np.triu(np.ones((layers + 1, layers + 1)), 1))
    together = memory.live_of_stages(first, last)
    assert len(together) == x.pp
    for stage in range(x.pp):
        found = memory.live(first, last, stage)
        assert found.tolist() == together[stage].tolist()
        assert found.tolist() == [float(memory.live(int(a), int(b), stage)) for a, b in zip(first, last)]
        for a, b, total in zip(first, last, found):
            name, at, parts = memory.peak(int(a), int(b), stage)
            begin, end = memory.span(int(a), int(b), stage)
            assert sum(parts.values()) == total
            assert set(parts) == set(CATEGORIES)
            assert name in ("forward", "backward", "reduction", "accumulation")
            assert begin <= at < end


# --- against a step, event by event -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatches", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", WALKED)
def test_the_peak_is_that_of_a_walk_through_the_step(mode: str, microbatches: int) -> None:
    """One stage peaks at the byte at which a step peaks that makes and frees everything in turn, for 50 random models."""
    x = shape(microbatches, **WALKED[mode])
    pick = picker(microbatches)
    for n in range(50):
        blocks = made_blocks(pick, x, pick(1, 8), roomy=True, params=(5, 30, 200)[n % 3])
        account = Step(blocks, x).run()
        memory = StageMemory(blocks, x)
        assert whole(memory) == account.peak, (
            f"draw {n}: the walk peaks at {account.when} with {account.at}, the closed form at "
            f"{memory.peak(0, len(memory.at), 0)}\n{blocks}"
        )


def test_two_layers_by_hand() -> None:
    """Embedding, two layers and a head of 8 parameters each on 2 ranks under ZeRO 3 in bf16, one microbatch: the backward of the lower layer."""
    n = np.zeros(4)
    blocks = Blocks(
        layer=np.array([False, True, True, False]), kept=n + 10, forward=n + 20, backward=np.array([20.0, 100.0, 50.0, 40.0]), saved=n + 10,
        carry=n + 4, numel=n + 8, padded=n + 8, buffers=n, incoming=n, keeps_result=n > 0, last_numel=n + 2, tied=n,
    )  # fmt: skip
    name, at, parts = StageMemory(blocks, shape(1, zero=3, dp=2, mixed=True)).peak(0, 2, 0)
    assert (name, at) == ("backward", 1)
    assert parts == {
        "parameters": 4 * 32 / 2,
        "gathered": 2 * 16 + 2 * 8,  # the embedding and the head, and the layer that runs
        "gradients": 4 * 8 / 2,  # of the upper layer, reduced
        "optimizer": 8 * 32 / 2,
        "activations": 10 + 10,  # of the embedding and of this layer
        "communication": 4 * 8,  # what the reduction of the upper layer reads
        "inputs": 0,
        "temporaries": 90 + 2 * 8,  # the rest of its backward, and the head's gradients
    }


# --- laws -------------------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(memory=memories(), more=st.integers(1, 20), data=st.data())
def test_a_larger_microbatch_never_holds_less(memory: StageMemory, more: int, data: st.DataObject) -> None:
    """What a microbatch takes in any block, on any stage of any cut, does not lower the peak when it grows."""
    b, at = memory.b, data.draw(st.integers(0, len(memory.b.layer) - 1))
    grown = {name: getattr(b, name) + more * (np.arange(len(b.layer)) == at) for name in ("kept", "saved", "forward", "backward")}
    larger = StageMemory(replace(b, **grown), memory.x)
    layers = len(memory.at)
    first, last = np.nonzero(np.triu(np.ones((layers + 1, layers + 1)), 1))
    for stage in range(memory.x.pp):
        assert (larger.live(first, last, stage) >= memory.live(first, last, stage)).all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(memory=memories())
def test_no_stage_holds_less_than_its_parameters_and_state(memory: StageMemory) -> None:
    """At the peak everything that stays is there, and no category is negative."""
    layers = len(memory.at)
    for stage in range(memory.x.pp):
        _, _, parts = memory.peak(0, layers, stage)
        assert min(parts.values()) >= 0, parts
        padded = memory.b.padded[slice(*map(int, memory.span(0, layers, stage)))].sum()
        assert parts["parameters"] >= 4 * padded / memory.x.shards
        assert parts["optimizer"] == 8 * padded / memory.x.shards


@pytest.mark.parametrize("microbatches", [3, 6])
@pytest.mark.parametrize("seed", range(20))
def test_each_stage_of_zero_holds_less_of_the_model(seed: int, microbatches: int) -> None:
    """What a rank holds of the model at every moment, parameters, gradients, optimizer and gathered, falls from ZeRO 0 to ZeRO 3."""
    pick = picker(seed)
    x = shape(microbatches, zero=1, dp=4, mixed=bool(pick(0, 1)))
    blocks = made_blocks(pick, x, pick(1, 8))
    blocks = replace(blocks, numel=blocks.padded)  # so that all pad alike
    held = []
    for zero in range(4):
        memory = StageMemory(blocks, replace(x, zero=zero))
        base = memory.base(0, len(blocks.layer), 0)
        held.append(sum(base[k] for k in ("parameters", "gathered", "gradients", "optimizer")))
    assert held == sorted(held, reverse=True)


@pytest.mark.parametrize("seed", range(20))
def test_padding_is_held_and_sent(seed: int) -> None:
    """Rows that FSDP adds, so that ranks get equal shares, count wherever whole shards are: a padded model holds no less."""
    pick = picker(seed)
    x = shape(3, zero=pick(1, 3), dp=4, mixed=True)
    blocks = made_blocks(pick, x, pick(1, 8))
    even = replace(blocks, padded=blocks.numel)
    added = (blocks.padded - blocks.numel).sum()
    padded, plain = (StageMemory(b, x) for b in (blocks, even))
    assert whole(padded) >= whole(plain) + 12 * added / 4
    assert padded.base(0, len(blocks.layer), 0)["optimizer"] == 8 * blocks.padded.sum() / 4
