"""From live bytes to what is reported: torch's allocated and reserved, and the device as its driver (nvidia-smi) sees it.

    allocated = r live + workspaces
    reserved  = g allocated + gathered + reduced          (buffers on streams of their own, in pools that no other stream reuses)
    device    = reserved + communicators + context

r is rounding, g the gap that fragmentation leaves in the compute stream's pool. Each line is affine in live bytes with a positive
slope, at p50 and at p95, so that a capacity turns into the live bytes that fit: `coefficients` and `live_that_fits`, which the search
calls with arrays. Constants, each with its source: allocator.yaml. `CachingAllocator` replays a list of allocations instead.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from meshwright.profiling.cluster import Device

FILE = Path(__file__).with_name("allocator.yaml")
MIB = 2**20
Bytes = float | np.ndarray
Range = tuple[Bytes, Bytes]  # p50, p95

# c10/cuda/CUDACachingAllocator: sizes are multiples of MIN_BLOCK; up to SMALL share segments of SMALL_BUFFER, up to MIN_LARGE share
# segments of LARGE_BUFFER, and larger ones have a segment of their own, a multiple of ROUND_LARGE
MIN_BLOCK, SMALL, SMALL_BUFFER, MIN_LARGE, LARGE_BUFFER, ROUND_LARGE = 512, MIB, 2 * MIB, 10 * MIB, 20 * MIB, 2 * MIB


@dataclass(frozen=True)
class DeviceBytes:
    """Bytes of one device at the peak of a step, each as (p50, p95)."""

    allocated: Range
    reserved: Range
    device: Range


class Line(NamedTuple):
    """bytes = slope x live + fixed."""

    slope: float
    fixed: Bytes

    def at(self, live: Bytes) -> Bytes:
        return self.slope * live + self.fixed


class Coefficients(NamedTuple):
    """The three figures as lines over live bytes, each at (p50, p95)."""

    allocated: tuple[Line, Line]
    reserved: tuple[Line, Line]
    device: tuple[Line, Line]


@dataclass(frozen=True)
class Constants:
    """Content of allocator.yaml: each (p50, p95), factors or bytes."""

    rounding: tuple[float, float]
    gap: dict[bool, tuple[float, float]]  # by whether segments are expandable
    tight: float
    closed_form: tuple[float, float]
    workspace: dict[bool, tuple[float, float]]  # by whether the device is Hopper or later
    context: dict[bool, tuple[float, float]]  # by whether kernels are loaded lazily
    communicator: tuple[float, float]
    lazy_since: float
    usable: float


@lru_cache
def constants() -> Constants:
    data: dict[str, Any] = yaml.safe_load(FILE.read_text())

    def pair(entry: dict[str, Any], scale: float = 1.0) -> tuple[float, float]:
        low, high = entry["value"]
        return low * scale, high * scale

    g, w, c = data["gap"], data["workspace"], data["context"]
    return Constants(
        pair(data["rounding"]), {True: pair(g["expandable"]), False: pair(g["fixed"])}, float(data["tight"]), pair(data["closed_form"]),
        {True: pair(w["hopper"], MIB), False: pair(w["before_hopper"], MIB)}, {True: pair(c["lazy"], MIB), False: pair(c["eager"], MIB)},
        pair(data["communicator"], MIB), float(data["lazy_since"]), float(data["usable"]),
    )  # fmt: skip


def coefficients(
    *,
    gathered_bytes: Bytes = 0.0,
    reduced_bytes: Bytes = 0.0,
    communicators: Bytes = 0.0,
    hopper: bool = True,
    year: float = 2025.0,
    expandable: bool = False,
) -> Coefficients:
    """What each figure is as a line over live bytes, none of it depending on them.

    `gathered_bytes`: buffers that an all-gather stream keeps beyond what is live at the peak; `reduced_bytes`: what a reduce-scatter
    stream keeps (under FSDP the sharded fp32 gradients, even while they are freed). `communicators`: groups of more than one rank.
    `hopper`: compute capability 9.0 or later. `year` of the software, for how CUDA loads kernels. `expandable`: run with
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.
    """
    c = constants()
    lines: dict[str, list[Line]] = {"allocated": [], "reserved": [], "device": []}
    for i in (0, 1):
        allocated = Line(c.rounding[i], c.workspace[hopper][i])
        gap = c.gap[expandable][i]
        reserved = Line(gap * allocated.slope, gap * allocated.fixed + gathered_bytes + reduced_bytes)
        outside = communicators * c.communicator[i] + c.context[year >= c.lazy_since][i]
        lines["allocated"].append(allocated)
        lines["reserved"].append(reserved)
        lines["device"].append(Line(reserved.slope, reserved.fixed + outside))
    return Coefficients(*((low, high) for low, high in lines.values()))


def device_bytes(live: Bytes, **surroundings: Any) -> DeviceBytes:
    """What is reported for so many live bytes. `surroundings` as in `coefficients`."""
    c = coefficients(**surroundings)
    return DeviceBytes(*((low.at(live), high.at(live)) for low, high in (c.allocated, c.reserved, c.device)))


def live_that_fits(capacity_bytes: Bytes, **surroundings: Any) -> Range:
    """Live bytes at which a device of so much nominal memory is full, at (p50, p95): the second is what a plan may use."""
    low, high = coefficients(**surroundings).device
    usable = capacity_bytes * constants().usable
    return (usable - low.fixed) / low.slope, (usable - high.fixed) / high.slope


def needed(found: DeviceBytes, *, expandable: bool = False) -> float:
    """Bytes (p50) below which the device runs out: allocated, the part of the gap that cannot be given back, communicators, context."""
    c = constants()
    outside = float(found.device[0]) - float(found.reserved[0])
    return float(found.allocated[0]) * (1 + c.tight * (c.gap[expandable][0] - 1)) + outside


@dataclass
class _Block:
    """A piece of a segment: free, or given out."""

    segment: int
    offset: int
    nbytes: int
    free: bool = True


class CachingAllocator:
    """PyTorch's CUDA caching allocator, without the device: where `malloc` would put each tensor and what it would ask of the driver.

    A free block is found by best fit in the pool of its stream and class (small or large), and split when what remains is at least 512
    bytes (small) or more than 1 MiB (large); freed neighbours merge. Nothing found: a new segment (cudaMalloc). Beyond `capacity` the
    segments that are wholly free are given back, then MemoryError. Expandable segments and roundup settings are not modelled.
    `allocated`, `reserved` and their peaks are bytes.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._segments: dict[int, tuple[int, int, bool]] = {}  # bytes, stream, small
        self._blocks: dict[int, list[_Block]] = {}  # of each segment, in address order
        self._pools: dict[tuple[int, bool], list[tuple[int, int, int]]] = {}  # free blocks by (bytes, segment, offset)
        self._given: dict[int, _Block] = {}
        self._next_segment = self._next_handle = 0

    def malloc(self, nbytes: int, stream: int = 0) -> int:
        """A handle for `nbytes`. MemoryError if the capacity does not hold them."""
        size = max(MIN_BLOCK, -(-nbytes // MIN_BLOCK) * MIN_BLOCK)
        small = size <= SMALL
        pool = self._pools.setdefault((stream, small), [])
        at = bisect_left(pool, (size, -1, -1))
        if at == len(pool):
            self._grow(size, stream, small)
            at = bisect_left(pool, (size, -1, -1))
        _, segment, offset = pool.pop(at)
        blocks = self._blocks[segment]
        i = next(j for j, b in enumerate(blocks) if b.offset == offset)
        block = blocks[i]
        rest = block.nbytes - size
        if rest >= MIN_BLOCK if small else rest > SMALL:
            block.nbytes = size
            blocks.insert(i + 1, _Block(segment, offset + size, rest))
            insort(pool, (rest, segment, offset + size))
        block.free = False
        self.allocated += block.nbytes
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self._next_handle += 1
        self._given[self._next_handle] = block
        return self._next_handle

    def free(self, handle: int) -> None:
        """Returns a handle's block to its pool, merged with free neighbours."""
        block = self._given.pop(handle)
        self.allocated -= block.nbytes
        blocks = self._blocks[block.segment]
        _, stream, small = self._segments[block.segment]
        pool = self._pools[stream, small]
        i = blocks.index(block)
        for j in (i + 1, i - 1):
            if 0 <= j < len(blocks) and blocks[j].free:
                other = blocks[j]
                pool.remove((other.nbytes, other.segment, other.offset))
                block.offset, block.nbytes = min(block.offset, other.offset), block.nbytes + other.nbytes
                blocks.remove(other)
        block.free = True
        insort(pool, (block.nbytes, block.segment, block.offset))

    def empty_cache(self) -> None:
        """Gives segments that are wholly free back to the driver."""
        for segment, blocks in list(self._blocks.items()):
            if len(blocks) == 1 and blocks[0].free:
                nbytes, stream, small = self._segments.pop(segment)
                self._pools[stream, small].remove((nbytes, segment, 0))
                del self._blocks[segment]
                self.reserved -= nbytes

    def _grow(self, size: int, stream: int, small: bool) -> None:
        nbytes = SMALL_BUFFER if small else LARGE_BUFFER if size < MIN_LARGE else -(-size // ROUND_LARGE) * ROUND_LARGE
        if self.capacity is not None and self.reserved + nbytes > self.capacity:
            self.empty_cache()
            if self.reserved + nbytes > self.capacity:
                raise MemoryError(f"{nbytes} bytes beside {self.reserved} reserved are more than {self.capacity}")
        self._next_segment += 1
        self._segments[self._next_segment] = (nbytes, stream, small)
        self._blocks[self._next_segment] = [_Block(self._next_segment, 0, nbytes)]
        insort(self._pools.setdefault((stream, small), []), (nbytes, self._next_segment, 0))
        self.reserved += nbytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)


class Event(NamedTuple):
    """A storage made (+1) or freed (-1) at a time, on a stream."""

    time: float
    storage: int
    nbytes: int
    sign: int
    stream: int = 0


def replay(events: Iterable[Event], capacity: int | None = None) -> CachingAllocator:
    """The allocator after the events, in their order of time; at one time, frees come first. Storages of no bytes are left out."""
    allocator = CachingAllocator(capacity)
    held: dict[int, int] = {}
    for e in sorted(events, key=lambda e: (e.time, e.sign)):
        if e.sign > 0 and e.nbytes > 0:
            held[e.storage] = allocator.malloc(e.nbytes, e.stream)
        elif e.sign < 0 and e.storage in held:
            allocator.free(held.pop(e.storage))
    return allocator


def surroundings(device: Device, *, communicators: Bytes, gathered_bytes: Bytes = 0.0, reduced_bytes: Bytes = 0.0) -> Coefficients:
    """The three figures over live bytes for a device: as it was measured, where it says so; for a CPU, live bytes themselves.

    Runs are taken to have expandable segments, as the scripts that are emitted set them.
    """
    if device.reserved_bytes is not None or device.allocator_overhead is not None:
        nothing = 0.0 * np.asarray(communicators, float)
        fixed, overhead = (device.reserved_bytes or 0.0) + nothing, 1 + (device.allocator_overhead or 0.0)
        inside = (Line(1.0, nothing), Line(overhead, nothing))
        return Coefficients(inside, inside, (Line(1.0, fixed), Line(overhead, fixed)))
    if device.kind == "cpu":
        same = (Line(1.0, 0.0 * np.asarray(communicators, float)),) * 2
        return Coefficients(same, same, same)
    return coefficients(
        gathered_bytes=gathered_bytes, reduced_bytes=reduced_bytes, communicators=communicators, expandable=True,
        hopper=(device.compute_capability or 9.0) >= 9,
    )  # fmt: skip
