"""The allocator: hand-computed segments and splits, and lines from live bytes to the device that a search can invert."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.costmodel.allocator import (
    CachingAllocator,
    Event,
    coefficients,
    constants,
    device_bytes,
    live_that_fits,
    needed,
    replay,
    surroundings,
)
from meshwright.profiling.cluster import load_device

KIB, MIB = 2**10, 2**20


# --- the simulator ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 11 * MIB, 12 * MIB),  # what remains of 12 MiB is 1 MiB, which is not split off, so the block is all of it
        (13 * MIB + 1, 14 * MIB, 14 * MIB),
    ],
)
def test_the_first_block_of_each_size(nbytes: int, allocated: int, reserved: int) -> None:
    """512-byte multiples; segments of 2 MiB up to 1 MiB, of 20 MiB below 10 MiB, else the size in multiples of 2 MiB."""
    a = CachingAllocator()
    a.malloc(nbytes)
    assert a.reserved == reserved
    assert a.allocated == (reserved if nbytes == 11 * MIB else allocated)


def test_small_blocks_share_a_segment_and_merge_when_freed() -> None:
    """Four of 512 KiB fill 2 MiB; with the middle two freed, 1 MiB fits between without another segment."""
    a = CachingAllocator()
    handles = [a.malloc(512 * KIB) for _ in range(4)]
    assert (a.allocated, a.reserved) == (2 * MIB, 2 * MIB)
    a.free(handles[1])
    a.free(handles[2])
    a.malloc(MIB)
    assert (a.allocated, a.reserved, a.peak_allocated) == (2 * MIB, 2 * MIB, 2 * MIB)
    a.malloc(512)
    assert a.reserved == 4 * MIB


def test_fragments_cannot_serve_a_larger_tensor() -> None:
    """Two 20 MiB tensors freed in two segments do not make 40 MiB: the gap between reserved and allocated."""
    a = CachingAllocator()
    handles = [a.malloc(20 * MIB) for _ in range(2)]
    for handle in handles:
        a.free(handle)
    a.malloc(40 * MIB)
    assert (a.allocated, a.reserved) == (40 * MIB, 80 * MIB)


def test_the_best_fit_is_the_smallest_free_block_that_is_large_enough() -> None:
    """Of free 64 and 32 MiB, a 30 MiB tensor takes the 32 and leaves 2 MiB of it."""
    a = CachingAllocator()
    for handle in [a.malloc(64 * MIB), a.malloc(32 * MIB)]:
        a.free(handle)
    a.malloc(30 * MIB)
    a.malloc(64 * MIB)
    a.malloc(2 * MIB)
    assert (a.allocated, a.reserved) == (96 * MIB, 96 * MIB)


def test_streams_do_not_share_blocks() -> None:
    """What one stream freed, another cannot use: FSDP's gathering stream keeps its own pool."""
    a = CachingAllocator()
    a.free(a.malloc(32 * MIB, stream=1))
    a.malloc(32 * MIB, stream=0)
    assert (a.allocated, a.reserved) == (32 * MIB, 64 * MIB)


def test_free_segments_go_back_when_memory_is_short() -> None:
    """At a capacity of 64 MiB, a cached segment of another stream is given back; what is in use is not."""
    a = CachingAllocator(capacity=64 * MIB)
    a.free(a.malloc(32 * MIB, stream=1))
    a.malloc(40 * MIB)
    assert (a.reserved, a.peak_reserved) == (40 * MIB, 40 * MIB)
    with pytest.raises(MemoryError):
        a.malloc(32 * MIB)


def test_a_trace_is_replayed_in_order_of_time() -> None:
    """A tensor freed when the next is made leaves its block; one stream peaks at 48 MiB, two keep a pool each."""

    def trace(stream: int) -> list[Event]:
        return [Event(0, 1, 32 * MIB, 1), Event(0, 2, 16 * MIB, 1), Event(2, 3, 32 * MIB, 1, stream), Event(2, 1, 32 * MIB, -1), Event(3, 9, 0, 1)]

    same, other = replay(trace(0)), replay(trace(1))
    assert (same.peak_allocated, same.peak_reserved) == (48 * MIB, 48 * MIB)
    assert (other.peak_allocated, other.peak_reserved) == (48 * MIB, 80 * MIB)


# --- the lines --------------------------------------------------------------------------------------------------------------


def test_figures_are_lines_over_live_bytes() -> None:
    """Each figure is affine and rising in live bytes, the same for numbers and arrays, and p95 is not below p50."""
    around = {"gathered_bytes": 2e9, "reduced_bytes": 1e9, "communicators": 3.0}
    live = np.array([0.0, 1e9, 2e9, 7e10])
    found = device_bytes(live, **around)
    for metric in ("allocated", "reserved", "device"):
        low, high = getattr(found, metric)
        assert np.all(np.diff(low) > 0)
        assert np.all(high >= low)
        assert (low[2] - low[1]) == pytest.approx(low[1] - low[0])
        assert getattr(device_bytes(7e10, **around), metric)[1] == pytest.approx(high[3])
    assert np.all(found.allocated[0] < found.reserved[0])
    assert np.all(found.reserved[0] < found.device[0])


def test_the_lines_are_what_the_constants_say() -> None:
    """Live 10 GB on two communicators with a 1 GB pool, by hand."""
    c = constants()
    found = device_bytes(1e10, gathered_bytes=1e9, communicators=2.0, hopper=True, year=2025)
    reserved = (1e10 * c.rounding[1] + c.workspace[True][1]) * c.gap[False][1] + 1e9
    assert found.reserved[1] == pytest.approx(reserved)
    assert found.device[1] == pytest.approx(reserved + 2 * c.communicator[1] + c.context[True][1])


def test_a_capacity_is_inverted() -> None:
    """The live bytes that fit give back the capacity that the driver leaves, for arrays of surroundings too."""
    around = {"communicators": np.array([1.0, 4.0]), "reduced_bytes": np.array([0.0, 5e9])}
    capacity = 80 * 2.0**30
    low, high = live_that_fits(capacity, **around)
    assert np.all(high < low)
    assert device_bytes(high, **around).device[1] == pytest.approx(np.full(2, capacity * constants().usable))
    slope, fixed = coefficients(**around).device[1]
    assert slope * high + fixed == pytest.approx(np.full(2, capacity * constants().usable))


def test_what_is_needed_lies_between_allocated_and_the_device() -> None:
    """Cached segments can be given back, communicators and context cannot; growing segments leave smaller gaps."""
    fixed, growing = (device_bytes(6e10, communicators=2.0, expandable=x) for x in (False, True))
    outside = fixed.device[0] - fixed.reserved[0]
    assert fixed.allocated[0] + outside < needed(fixed) < fixed.device[0]
    assert needed(growing, expandable=True) < needed(fixed)
    assert growing.reserved[1] < fixed.reserved[1]


def test_older_software_loads_all_kernels() -> None:
    """The context is larger before lazy loading."""
    assert device_bytes(0.0, year=2021).device[0] > device_bytes(0.0, year=2024).device[0]


# --- of a device ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "overhead", "fixed"),
    [({"reserved_bytes": 3e9, "allocator_overhead": 0.1}, 1.1, 3e9), ({"reserved_bytes": 2e9}, 1.0, 2e9), ({"allocator_overhead": 0.2}, 1.2, 0.0)],
)
def test_a_measured_device_is_as_it_was_measured(measured: dict[str, float], overhead: float, fixed: float) -> None:
    """What was measured stands in place of every constant: p95 has the overhead, the device what is taken before the first tensor."""
    device = load_device("H100-SXM").model_copy(update=measured)
    lines = surroundings(device, communicators=3.0, gathered_bytes=5e9, reduced_bytes=5e9)
    assert [line.at(1e10) for line in lines.reserved] == [1e10, overhead * 1e10]
    assert [line.at(1e10) for line in lines.device] == [1e10 + fixed, overhead * 1e10 + fixed]
    assert lines.allocated == lines.reserved


def test_a_cpu_takes_live_bytes() -> None:
    """A CPU has no caching allocator, no context and no communicators: each figure is the live bytes, for arrays too."""
    groups = np.array([0.0, 3.0])
    lines = surroundings(load_device("H100-SXM").model_copy(update={"kind": "cpu"}), communicators=groups, gathered_bytes=1e9)
    for pair in lines:
        assert [line.at(7.0).tolist() for line in pair] == [[7.0, 7.0], [7.0, 7.0]]


def test_a_gpu_is_priced_by_its_generation_with_expandable_segments() -> None:
    """The workspace is that of the compute capability, segments are expandable, and pools and groups are those of the layout."""
    hopper = load_device("H100-SXM")
    around = {"communicators": 2.0, "gathered_bytes": 2e9, "reduced_bytes": 1e9}
    assert hopper.reserved_bytes is None
    assert surroundings(hopper, **around) == coefficients(hopper=True, expandable=True, **around)
    ampere = surroundings(load_device("A100-SXM-80GB"), **around)
    assert ampere == coefficients(hopper=False, expandable=True, **around)
    assert ampere.allocated[0].fixed < surroundings(hopper, **around).allocated[0].fixed
