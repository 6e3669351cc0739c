"""Random blocks and layouts for the memory of pipeline stages: whole numbers of bytes, so that sums are exact in any order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from meshwright.costmodel.stagememory import Blocks, Shape, StageMemory

Pick = Callable[[int, int], int]  # a whole number from the first to the second


def made_shape(pick: Pick, most_pp: int = 1, most: int = 12) -> Shape:
    """A layout, with at least as many microbatches as stages."""
    pp, mixed, dp = pick(1, most_pp), bool(pick(0, 1)), (1, 2, 4)[pick(0, 2)]
    zero = pick(0, 3) if dp > 1 else 0
    return Shape(pp=pp, microbatches=pick(pp, most), zero=zero, dp=dp, compute_bytes=2.0 if mixed else 4.0, mixed=mixed)


def made_blocks(pick: Pick, x: Shape, layers: int, *, roomy: bool = False, params: int = 30) -> Blocks:
    """`layers` layers and up to two blocks on either side, as far as one rank of the layout holds them.

    `roomy`: as in models, a block's backward takes its forward's bytes, the gradient that comes in and two copies of its parameters
    besides, the last of a block's parameters is at most half of them, and one block makes the output.
    """
    before, after = pick(0, 2), 1 if roomy else pick(0, 2)
    n = before + layers + after

    def numbers(high: int) -> np.ndarray:
        return np.array([pick(0, high) for _ in range(n)], float)

    layer = np.array([before <= i < before + layers for i in range(n)])
    recomputes = bool(pick(0, 1))
    carry = float(pick(0, 6))
    numel, kept = numbers(params), numbers(50)
    incoming = np.where(np.arange(n) == n - 1, 0.0, carry)
    kept = np.where(layer & recomputes, np.maximum(kept, carry), kept)
    padded = np.ceil(numel / x.shards) * x.shards
    forward = kept + numbers(40)
    saved = np.where(layer & recomputes, kept + numbers(30), kept)
    backward = np.maximum(saved + numbers(60), incoming)
    last = np.minimum(numel, numbers(params))
    tied = np.zeros(n)
    if x.pp == 1 and before == 1 and after and pick(0, 3) == 0:
        tied[-1] = float(pick(0, int(numel[0])))
    if roomy:
        last = np.minimum(last, np.floor(numel / 2))
        backward = np.maximum(backward, forward) + incoming + 2 * x.compute_bytes * (padded + tied)
    return Blocks(
        layer=layer, kept=kept, forward=forward, backward=backward, saved=saved, carry=np.full(n, carry), numel=numel, padded=padded,
        buffers=numbers(5), incoming=incoming, keeps_result=numbers(1) > 0, last_numel=last, tied=tied, recomputes=recomputes,
        side=float(pick(0, 4)), output=float(pick(0, 20)), inputs=float(pick(0, 9)), handed=carry,
    )  # fmt: skip


@st.composite
def memories(draw: st.DrawFn, most_layers: int = 8, most_pp: int = 4) -> StageMemory:
    """Stage memory of up to eight layers on up to four stages."""

    def pick(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    layers = pick(1, most_layers)
    x = made_shape(pick, min(most_pp, layers))
    return StageMemory(made_blocks(pick, x, layers), x)
