"""Seconds of a sharded block's ops: from a compiled cost model where the class was measured, from the device's figures else."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from meshwright.costmodel import constants
from meshwright.costmodel.compute import IN_STEP, OpTable, backward_table, forward_table, op_seconds
from meshwright.costmodel.model import CostModel
from meshwright.costmodel.opprices import misaligned
from meshwright.costmodel.sharded import ShardedBlock
from meshwright.profiling.cluster import Device
from meshwright.profiling.graph import Op

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# Backward of fused attention has five matrix products for the forward's two, at about 85 % of its rate (Dao 2023, figure 5).
ATTENTION_BACKWARD = 2.5 / 0.85
# The operator tables hold each device's native attention kernel. torch's scaled_dot_product_attention runs FlashAttention-2, which
# reaches about 60 % of that on Hopper and later (Shah et al. 2024, figure 5).
FLASH2_ON_HOPPER = 0.60
HOPPER_FLOPS = 6e14  # a device with more 16-bit FLOP/s than this is Hopper or later


# Tensor cores lose speed on sizes that 64 does not divide: (1 + c log2(64 / g) / 3) with g the largest power of two that divides
# both the width and the reduction. Fitted to published training steps; operator tables hold round sizes only. A published scan saw
# 14,400 columns take 41 % longer than 13,824 for 8.5 % more work.
MISALIGNED = constants.value("misalign")


@dataclass
class Priced:
    """Seconds of every op at every microbatch, and what they rest on. [batches, ops]"""

    forward: np.ndarray
    backward: np.ndarray
    basis: dict[str, str] = field(default_factory=dict)  # kind of op -> "fitted" or "datasheet"


def price_ops(sharded: ShardedBlock, device: Device, batches: np.ndarray, costs: CostModel | None) -> Priced:
    """Prices one rank's share of a block. Without a cost model every op is priced by the device's figures."""
    forward = op_seconds(forward_table(sharded), device, batches)
    backward = op_seconds(backward_table(sharded), device, batches)
    out = Priced(forward, backward)
    if costs is None:
        return out
    for kind, price in (("matmul", _products), ("attention", _attention), ("experts", _experts)):
        picked = [i for i, op in enumerate(sharded.block.ops) if op.kind == kind]
        if picked:
            price(out, picked, sharded, device, np.asarray(batches, float), costs)
    _traffic(out, sharded, device, np.asarray(batches, float), costs)
    return out


def _local(op: Op, sharded: ShardedBlock) -> tuple[float, float, float, float]:
    """Parts of groups, m, n and k that one rank computes, from where the result is placed: partial sums divide k, a result
    split in its last dimension n, in an earlier one m (or the groups of a batched product)."""
    if op.name not in sharded.divided:
        return 1.0, 1.0, 1.0, 1.0
    share = 1.0 / sharded.ranks
    state = sharded.states.get(op.name, "I")
    if state == "P":
        return 1.0, 1.0, 1.0, share
    dim = int(state[1:].partition("x")[0]) if state.startswith("S") else 0  # "S1x3": inside each of three pieces
    rank = len(op.outputs[0].shape)
    if dim == rank - 1:
        return 1.0, 1.0, share, 1.0
    if op.dims.get("groups", 1) > 1 and dim < rank - 2:
        return share, 1.0, 1.0, 1.0
    return 1.0, share, 1.0, 1.0


def _in_step(device: Device, dtype: str) -> float:
    return IN_STEP if device.kind == "cuda" and dtype in ("bf16", "fp16") else 1.0


def misalignment(device: Device, dtype: str, n: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Factor on the seconds of a product for sizes that no table has seen; below eight there is no tensor core to lose more."""
    if device.kind != "cuda" or dtype not in ("bf16", "fp16"):
        return np.ones(len(n))
    return 1 + MISALIGNED * misaligned(n, k)


def _grown(op: Op, name: str, b: np.ndarray) -> np.ndarray:
    size = float(op.dims.get(name, 1))
    return b * size if op.batched == name else np.full(len(b), size)


def _products(out: Priced, picked: list[int], sharded: ShardedBlock, device: Device, b: np.ndarray, costs: CostModel) -> None:
    """Matrix products: forward [m, k] x [k, n]; backward the gradients of both operands, [m, n] x [n, k] and [n, m] x [m, k]."""
    for i in picked:
        op = sharded.block.ops[i]
        dtype = DTYPES.get(op.dtype, "")
        part = _local(op, sharded)
        g, m, n, k = (np.maximum(1.0, _grown(op, name, b) * p) for name, p in zip(("groups", "m", "n", "k"), part))
        single = op.dims.get("groups", 1) == 1
        kind = "gemm" if single else "batched_gemm"
        basis = costs.basis(kind, dtype=dtype)
        out.basis[kind] = basis
        if basis == "datasheet":
            continue
        batch: dict[str, Any] = {} if single else {"b": g}
        rate = _in_step(device, dtype) / misalignment(device, dtype, n, k)
        out.forward[:, i] = costs.seconds(kind, dtype=dtype, m=m, n=n, k=k, **batch) / rate
        ratio = op.backward.flops.at(1) / max(op.forward.flops.at(1), 1.0)
        both: Any = costs.seconds(kind, dtype=dtype, m=n, n=k, k=m, **batch) if ratio > 0.5 else 0.0
        if ratio > 1.5:
            both = both + costs.seconds(kind, dtype=dtype, m=m, n=k, k=n, **batch)
        out.backward[:, i] = both / rate


def _attention(out: Priced, picked: list[int], sharded: ShardedBlock, device: Device, b: np.ndarray, costs: CostModel) -> None:
    for i in picked:
        op = sharded.block.ops[i]
        dtype, d = DTYPES.get(op.dtype, ""), op.dims
        basis = costs.basis("attention_context", dtype=dtype, kv_dtype=dtype) if d.get("causal") else "datasheet"
        out.basis["attention"] = basis
        if basis == "datasheet":
            continue
        share = 1.0 / sharded.ranks if op.name in sharded.divided else 1.0
        head = (d["head_dim"] + d.get("v_head_dim", d["head_dim"])) / 2
        shape: dict[str, Any] = {
            "dtype": dtype, "batch": b * d.get("batch", 1), "q": float(d["q"]), "kv": float(d["kv"]), "heads": max(1.0, d["heads"] * share),
            "kv_heads": max(1.0, d.get("kv_heads", d["heads"]) * share), "head_dim": float(head),
        }  # fmt: skip
        native = device.kind != "cuda" or device.peak_flops.get("bf16", 0) < HOPPER_FLOPS or "torch" in str(costs.provenance.get("attention", ""))
        forward = costs.seconds("attention_context", **shape) / (1.0 if native else FLASH2_ON_HOPPER)
        out.forward[:, i] = forward
        if not op.backward.flops.at(1):
            out.backward[:, i] = 0.0
        elif costs.basis("attention_backward", dtype=dtype, kv_dtype=dtype) == "fitted":
            out.backward[:, i] = costs.seconds("attention_backward", **shape)
        else:
            out.backward[:, i] = forward * ATTENTION_BACKWARD


def _experts(out: Priced, picked: list[int], sharded: ShardedBlock, device: Device, b: np.ndarray, costs: CostModel) -> None:
    found = expert_seconds(sharded, device, b, costs)
    out.basis |= found.basis
    out.forward[:, picked], out.backward[:, picked] = found.forward[:, picked], found.backward[:, picked]


def expert_seconds(
    sharded: ShardedBlock, device: Device, batches: np.ndarray, costs: CostModel | None, ep: int = 1, etp: int = 1,
    tables: tuple[OpTable, OpTable] | None = None,
) -> Priced:  # fmt: skip
    """Grouped products of experts on one rank, other ops zero: with balanced routing as many rows over 1 / ep of the experts, or, with
    expert tensor parallelism, `etp` times the rows over a part of each expert. Where only dense products were measured, as dense ones
    of the mean expert's size. `tables` are the block's forward and backward, if they are at hand. [batches, ops]"""
    b, ops = np.asarray(batches, float), sharded.block.ops
    picked = [i for i, op in enumerate(ops) if op.kind == "experts"]
    out = Priced(np.zeros((len(b), len(ops))), np.zeros((len(b), len(ops))))
    for seconds, table in zip((out.forward, out.backward), tables or (forward_table(sharded), backward_table(sharded))):
        local = np.array([1.0 / (ep * etp), float(1)])  # weights are the constant part of what is moved
        seconds[:, picked] = op_seconds(replace(table, bytes=table.bytes * local), device, b)[:, picked]
    if costs is None:
        return out
    for i in picked:
        op = ops[i]
        dtype = DTYPES.get(op.dtype, "")
        part = list(_local(op, sharded))
        part[1] *= etp
        part[2 if i == picked[0] else 3] /= etp
        m, n, k = (np.maximum(1.0, _grown(op, name, b) * p) for name, p in zip(("m", "n", "k"), part[1:]))
        basis = costs.basis("grouped_gemm", dtype=dtype)
        out.basis["grouped_gemm"] = basis
        if basis == "datasheet":
            continue
        experts = max(1.0, float(op.dims.get("experts", 1)) / ep)
        forward = costs.seconds("grouped_gemm", dtype=dtype, groups=experts, m=m, n=n, k=k) / _in_step(device, dtype)
        ratio = op.backward.flops.at(1) / max(op.forward.flops.at(1), 1.0)
        out.forward[:, i], out.backward[:, i] = forward, forward * ratio
    return out


def _traffic(out: Priced, sharded: ShardedBlock, device: Device, b: np.ndarray, costs: CostModel) -> None:
    """What only moves bytes, as a measured pointwise op of the same traffic and kernels."""
    basis = out.basis["norms and pointwise"] = costs.basis("pointwise", op="add", dtype="fp32")
    if basis == "datasheet":
        return
    moved = {"matmul", "attention", "experts", "conv", "view", "constant"}
    picked = np.array([i for i, op in enumerate(sharded.block.ops) if op.kind not in moved], int)
    if not picked.size:
        return
    for seconds, table in ((out.forward, forward_table(sharded)), (out.backward, backward_table(sharded))):
        launches = np.maximum(table.launches[picked], 1)
        nbytes = table.bytes[None, picked, 0] + b[:, None] * table.bytes[None, picked, 1]
        each = nbytes / launches / 12.0  # an addition in fp32 moves twelve bytes an element
        one = costs.seconds("pointwise", op="add", dtype="fp32", inputs=2.0, elements=np.maximum(each, 1.0).ravel()).reshape(each.shape)
        seconds[:, picked] = np.where(nbytes > 0, one * launches, 0.0)
