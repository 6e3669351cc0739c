"""The stage problem of one layout and what answers it: layers as arrays, a choice of recompute, a cut into stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from meshwright.costmodel.stagememory import StageMemory

MODES = ("none", "selective", "full")  # in the order of costmodel.step.RECOMPUTE
NONE, SELECTIVE, FULL = range(3)
SAME = 1e-12  # steps that differ by less, relatively, are one

Chunks = tuple[tuple[int, int], ...]  # layers [first, last) of the parts that a rank holds, in the model's order


@dataclass(frozen=True, order=True)
class Choice:
    """Recompute of one rank: `mode` (of MODES) in its first `layers` layers, none in the others."""

    mode: int
    layers: int


@dataclass(frozen=True)
class StageProblem:
    """One layout's layers as arrays, with what stands before the first layer and after the last.

    A stage with modes (2,) must use full in all of its layers; one with (0,) recomputes none.
    """

    c: np.ndarray  # [types, 3, layers] seconds of one microbatch, by device type and recompute mode
    e: np.ndarray  # [types, layers] seconds once a step
    before: np.ndarray  # [types, 2] (c, e) of what stands before the first layer
    after: np.ndarray  # [types, 2] of what stands after the last
    pp: int
    microbatches: int
    ratio: float  # bubble of the schedule over that of 1F1B
    send_s: float  # one transfer between neighbours; a chunk pays it on each side that has one on another rank
    capacity: np.ndarray  # [pp] live bytes that each rank's devices may hold
    types: np.ndarray  # [pp] device type of each rank
    memory: Callable[[np.ndarray], StageMemory]  # recompute mode of each layer -> memory of any layers as any stage
    kinds: np.ndarray  # [layers] equal numbers: equal layers
    modes: tuple[int, ...] = (0, 1, 2)  # that may be used
    partial: bool = True  # full recompute of only the first k layers of a rank may be chosen (needs modes 0 and 2)
    vpp: int = 1  # chunks of a rank
    v_shape: bool = False  # rank r holds virtual stages r and 2 pp - 1 - r; else chunk c of rank r is virtual stage c pp + r

    @property
    def layers(self) -> int:
        return int(self.c.shape[2])


@dataclass(frozen=True)
class StageCost:
    """One rank: seconds of a microbatch (transfers included), seconds once a step, live bytes at its peak, its recompute."""

    c: float
    e: float
    live_bytes: float
    choice: Choice


@dataclass(frozen=True)
class Cut:
    """Layers to ranks: end layer of each of the pp * vpp virtual stages; choice and cost of each rank."""

    step_s: float
    ends: tuple[int, ...]
    choices: tuple[Choice, ...]
    costs: tuple[StageCost, ...]


def spreads(layers: int, virtual: int) -> list[tuple[int, ...]]:
    """The cuts into virtual stages that several chunks a rank are chosen from, in order.

    For x in 0..2 and y in 0..3, layers + x + y are spread evenly over the virtual stages, one more in each of the last ones where they do
    not divide; then the first stage gives up x and the last y. Cuts with an empty stage are left out.
    """
    found = set()
    for x in range(3):
        for y in range(4):
            size, rest = divmod(layers + x + y, virtual)
            held = np.full(virtual, size) + (np.arange(virtual) >= virtual - rest)
            held[0] -= x
            held[-1] -= y
            if held.min() > 0:
                found.add(tuple(int(n) for n in np.cumsum(held)))
    return sorted(found)
