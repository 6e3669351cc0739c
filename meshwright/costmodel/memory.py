"""Bytes of one rank: what lives through the step, what a microbatch leaves behind, and the peak of the work in between.

Persistent bytes are those of FSDP2 as the runtime applies it (a parameter is stored in fp32, sharded; it is used in the compute
dtype, gathered; gradients are reduced in fp32):

    parameters   4 P / shard  +  c P while gathered (always for ZeRO 0 to 2, two layers and the root for ZeRO 3)
    gradients    4 P (accumulated whole, ZeRO 0 and 1) or 4 P / shard, and c + 4 bytes for the layer being reduced
    optimizer    8 P / shard  (AdamW: two moments in fp32)

with c the bytes of the compute dtype and shard = dp (1 for ZeRO 0). Activations come from the traced joint graph: a storage that
forward makes and backward reads. Rajbhandari et al. 2020; Korthikanti et al. 2022 for what recompute keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from meshwright.costmodel.sharded import ShardedBlock
from meshwright.profiling.graph import Op, Storage

MASTER, MOMENTS, REDUCED = 4.0, 8.0, 4.0  # bytes per parameter: fp32 parameter, two fp32 moments, fp32 gradient
PREFETCHED = 2  # layers whose parameters are gathered at once under ZeRO 3: the one that computes and the next
SAVED_KINDS = frozenset(("matmul", "attention", "experts", "conv"))  # what selective recompute keeps


@dataclass(frozen=True)
class BlockMemory:
    """Bytes of one block on one rank, for each microbatch of an array. All [batches].

    `saved`: what forward leaves for backward. `kept_selective`, `kept_full`: the same under recompute. `peak`: the most that is
    alive while the block runs forward or backward, its saved tensors included. `carry`: the block's input.
    """

    saved: np.ndarray
    kept_selective: np.ndarray
    kept_full: np.ndarray
    peak: np.ndarray
    carry: np.ndarray
    numel: float

    def kept(self, recompute: str) -> np.ndarray:
        return {"none": self.saved, "selective": self.kept_selective, "full": self.kept_full}[recompute]

    def working(self, recompute: str) -> np.ndarray:
        """Most that is alive while the block runs, what it keeps included."""
        if recompute == "none":
            return np.maximum(self.peak, self.saved)
        return np.maximum(self.peak, self.kept(recompute)) + self.carry


def block_memory(sharded: ShardedBlock, batches: np.ndarray) -> BlockMemory:
    """Liveness of a block's joint program on one tensor-parallel rank."""
    block = sharded.block
    b = np.asarray(batches, float)
    shares = np.array([_storage_share(s, block.by_name[s.op], sharded) for s in block.storages])
    size = np.array([[s.amount.const, s.amount.per_sample] for s in block.storages], float).reshape(-1, 2) * shares[:, None]
    nbytes = size[:, 0][None, :] + b[:, None] * size[:, 1][None, :]  # [batches, storages]
    born = np.array([s.born for s in block.storages], int)
    dies = np.array([s.dies for s in block.storages], int)
    steps = int(dies.max(initial=0)) + 2
    change = np.zeros((len(b), steps))
    np.add.at(change.T, born, nbytes.T)
    np.subtract.at(change.T, dies + 1, nbytes.T)
    peak = np.cumsum(change, axis=1).max(axis=1)
    saved = nbytes[:, [s.saved for s in block.storages]].sum(axis=1) if block.storages else np.zeros(len(b))
    carry = sum((_value_bytes(f"in:{i}", sharded, b) for i, x in enumerate(block.inputs) if x.role == "carry"), np.zeros(len(b)))
    outputs = sum((_output_bytes(op, sharded, b) for op in block.ops if op.kind in SAVED_KINDS), np.zeros(len(b)))
    for c in sharded.collectives:
        if c.phase == "forward" and c.op in ("all_reduce", "reduce_scatter"):
            outputs = outputs + (c.amount.const + b * c.amount.per_sample) / (sharded.ranks if c.op == "reduce_scatter" else 1)
    return BlockMemory(saved, np.minimum(outputs + carry, saved + carry), carry, peak, carry, sharded.numel)


def _value_bytes(v: str, sharded: ShardedBlock, b: np.ndarray) -> np.ndarray:
    a = sharded.block.spec_of(v).amount
    return (a.const + b * a.per_sample) * sharded.share(v)


def _output_bytes(op: Op, sharded: ShardedBlock, b: np.ndarray) -> np.ndarray:
    names = [op.name if len(op.outputs) == 1 else f"{op.name}:{i}" for i in range(len(op.outputs))]
    total = sum((_value_bytes(v, sharded, b) for v in names), np.zeros(len(b)))
    if op.kind == "attention":  # the log-sum-exp of each row, in fp32
        total = total + 4.0 * b * op.dims["batch"] * op.dims["heads"] * op.dims["q"] * sharded.share(names[0])
    return total


def _storage_share(s: Storage, op: Op, sharded: ShardedBlock) -> float:
    """The part of an allocation that one rank makes."""
    t = sharded.ranks
    if t == 1:
        return 1.0
    if op.kind == "cross_entropy":
        return 1 / t if op.name in sharded.divided else 1.0
    out = op.name if len(op.outputs) == 1 else f"{op.name}:0"
    if s.backward:
        # a gradient has the size of the operand or parameter that it belongs to
        for v, state in zip(op.inputs, sharded.operands.get(op.name, ()), strict=False):
            a = sharded.block.spec_of(v).amount
            if (a.const, a.per_sample) == (s.amount.const, s.amount.per_sample):
                return 1 / t if state.startswith("S") else 1.0
    elif s.saved and out in sharded.gathered:
        return 1.0  # the gathered copy is what its consumers keep
    return sharded.share(out)


class Persistent(NamedTuple):
    """Bytes that one stage holds through the step, by category, as a function of its parameters (numbers or arrays)."""

    parameters: Any
    gradients: Any
    optimizer: Any
    buffers: Any

    @property
    def total(self) -> Any:
        return self.parameters + self.gradients + self.optimizer + self.buffers


def persistent_bytes(numel: Any, largest: Any, root: Any, *, zero: Any, dp: Any, compute_bytes: float, accumulates: Any) -> Persistent:
    """Persistent bytes of a stage with `numel` local parameters, of which `root` in no layer and `largest` in its largest one.

    `accumulates`: more than one microbatch. FSDP is on when dp > 1 or the compute dtype is not fp32; without it there is one
    copy of parameters and gradients. Arguments are numbers or arrays of one shape, and so are the results.
    """
    shard = 1 + (dp - 1) * (zero > 0)
    fsdp = 1 - (dp == 1) * (compute_bytes == MASTER)
    whole = _least(numel, root + PREFETCHED * largest)
    gathered = (numel + (whole - numel) * (zero == 3)) * compute_bytes * fsdp
    sums = REDUCED * numel / shard
    gradients = sums + (REDUCED * numel - sums) * ((zero < 2) & accumulates)
    buffers = fsdp * _least(numel, largest) * (compute_bytes + 2 * REDUCED)  # a layer's gradients, two reduce-scatter inputs
    return Persistent(MASTER * numel / shard + gathered, gradients, MOMENTS * numel / shard, buffers)


def _least(a: Any, b: Any) -> Any:
    return (a + b - abs(a - b)) / 2
