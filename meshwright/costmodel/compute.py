"""Seconds of ops: a roofline per kernel, evaluated for arrays of ops and microbatches at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.costmodel import constants
from meshwright.costmodel.sharded import ShardedBlock
from meshwright.profiling.cluster import Device
from meshwright.profiling.graph import Op, TensorSpec, Work

PRODUCTS = frozenset(("matmul", "experts", "conv"))
FREE = frozenset(("view", "constant"))


@dataclass(frozen=True)
class OpTable:
    """Ops of one phase as arrays of length n: what one rank computes and moves for microbatch b is const + b * per_sample.

    `rate` is the kind of peak that bounds an op's FLOPs: 0 matrix products, 1 attention, 2 none. `half` is 1 where products run
    in 16 bits. `launches` are kernels.
    """

    flops: np.ndarray  # [n, 2]
    bytes: np.ndarray  # [n, 2]
    launches: np.ndarray  # [n]
    rate: np.ndarray  # [n]
    half: np.ndarray  # [n]


def forward_table(sharded: ShardedBlock) -> OpTable:
    """The forward ops of a block, in its own order."""
    return _table([(op, op.forward) for op in sharded.block.ops], sharded)


def backward_table(sharded: ShardedBlock) -> OpTable:
    """The backward work of each op of a block, in the order of its forward ops."""
    return _table([(op, op.backward) for op in sharded.block.ops], sharded)


def _table(rows: list[tuple[Op, Work]], sharded: ShardedBlock) -> OpTable:
    flops, moved, launches, rate, half = [], [], [], [], []
    for op, work in rows:
        share = 1 / sharded.ranks if op.name in sharded.divided else 1.0
        causal = 0.5 if op.dims.get("causal") else 1.0  # half of the score matrix is computed
        flops.append([work.flops.const * share * causal, work.flops.per_sample * share * causal])
        fixed, grows = _byte_shares(op, sharded)
        moved.append([work.bytes.const * fixed, work.bytes.per_sample * grows])
        launches.append(work.launches)
        rate.append(0 if op.kind in PRODUCTS else 1 if op.kind == "attention" else 2 if not work.flops.at(1) else 0)
        half.append(op.dtype in ("bfloat16", "float16"))
    shape = (len(rows), 2)
    return OpTable(
        np.array(flops).reshape(shape), np.array(moved).reshape(shape), np.array(launches, float), np.array(rate), np.array(half, bool)
    )  # fmt: skip


def _byte_shares(op: Op, sharded: ShardedBlock) -> tuple[float, float]:
    """Parts of an op's traffic that one rank has, for what the batch does not multiply and for what it does."""
    if sharded.ranks == 1:
        return 1.0, 1.0
    block = sharded.block
    states = sharded.operands.get(op.name, ())
    whole, local = [0.0, 0.0], [0.0, 0.0]

    def count(spec: TensorSpec, share: float) -> None:
        grows = spec.batch_dim is not None
        whole[grows] += spec.nbytes
        local[grows] += spec.nbytes * share

    for v, state in zip(op.inputs, states, strict=False):
        count(block.spec_of(v), 1 / sharded.ranks if state.startswith("S") else 1.0)
    for i, spec in enumerate(op.outputs):
        count(spec, sharded.share(op.name if len(op.outputs) == 1 else f"{op.name}:{i}"))
    ratio = [part / total if total else 1.0 for part, total in zip(local, whole, strict=True)]
    return ratio[0], ratio[1]


# Sixteen-bit products inside a training step reach this share of their isolated rate: fitted to published runs, each source left
# out in turn (constants.yaml). Sustained power and clocks are the likely cause.
IN_STEP = constants.value("gemm16")


def op_seconds(table: OpTable, device: Device, batches: np.ndarray) -> np.ndarray:
    """Seconds of every op at every microbatch: launch latency plus the slower of arithmetic and memory. [batches, ops]

    The roofline of Williams et al. 2009, with the share of each peak that `device.achieved` states, inside a step (IN_STEP).
    """
    a = device.achieved
    b = np.asarray(batches, float)[:, None]
    flops = table.flops[None, :, 0] + b * table.flops[None, :, 1]
    moved = table.bytes[None, :, 0] + b * table.bytes[None, :, 1]
    fast = device.peak_flops.get("bf16", device.peak_flops["fp32"])
    in_step = IN_STEP if device.kind == "cuda" else 1.0
    peak = np.where(table.half, fast * np.where(table.rate == 0, in_step, 1.0), device.peak_flops["fp32"])
    peak = peak * np.choose(table.rate, [a.matmul, a.attention, 1.0])
    seconds = np.maximum(flops / peak, moved / (device.memory_bandwidth_Bps * a.memory))
    return np.asarray(seconds + table.launches * a.launch_s)
