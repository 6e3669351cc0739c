"""Seconds and bytes of every unique block, sharded every way, at every microbatch: the tables that pricing a layout looks up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from meshwright.costmodel import collectives
from meshwright.costmodel.compute import backward_table, forward_table
from meshwright.costmodel.layouts import RECOMPUTE
from meshwright.costmodel.memory import SAVED_KINDS, BlockMemory, block_memory, last_needed, of_logits
from meshwright.costmodel.model import CostModel
from meshwright.costmodel.pricing import expert_seconds, price_ops
from meshwright.costmodel.sharded import ShardedBlock
from meshwright.profiling.cluster import Device, Group
from meshwright.profiling.graph import DTYPE_BYTES, Op

Array = np.ndarray


@dataclass(frozen=True)
class BlockSeconds:
    """One block on one rank of one device, by microbatch. All [batches] but `again` [3, batches]: what recompute adds.

    `weights`: the part of backward that computes gradients of parameters. `attention_forward`, `attention_backward`: what attention
    takes. `chunked`: what a loss in chunks computes again. Experts' products are left out: they depend on expert parallelism.
    """

    forward: Array
    backward: Array
    again: Array
    weights: Array
    attention_forward: Array
    attention_backward: Array
    chunked: Array


@dataclass(frozen=True)
class BlockBytes:
    """What one rank exchanges for a block, bytes of a microbatch: keys and values, queries and results, rows sent to experts (and the
    same for what comes back). [batches]. `late`: the experts' result is not needed again when the layer is recomputed."""

    keys_values: Array
    queries: Array
    rows_out: Array
    rows_back: Array
    late: bool


def block_seconds(sharded: ShardedBlock, device: Device, batches: Array, costs: CostModel | None, basis: dict[str, str]) -> BlockSeconds:
    """Prices one block; `basis` is told what the prices rest on."""
    priced = price_ops(sharded, device, batches, costs)
    basis.update(priced.basis)
    ops = sharded.block.ops
    dense = np.array([op.kind != "experts" for op in ops], bool)
    forward, backward = priced.forward * dense, priced.backward * dense
    last = last_needed(sharded.block)
    again = np.array([i <= last for i in range(len(ops))], bool)
    cheap = again & np.array([op.kind not in SAVED_KINDS for op in ops], bool)
    attention = np.array([op.kind == "attention" for op in ops], bool)
    weighted = np.array([op.kind in ("matmul", "conv") and any(v.startswith("param:") for v in op.inputs) for op in ops], bool)
    both = np.array([op.backward.flops.at(1) > 1.5 * op.forward.flops.at(1) for op in ops], bool)
    loss = next((op for op in ops if op.kind == "cross_entropy"), None)
    parts = {loss.name, *(op.name for op in of_logits(sharded.block, loss))} if loss is not None else set()
    logits = np.array([op.name in parts for op in ops], bool)
    none = np.zeros(len(batches))
    return BlockSeconds(
        forward=forward.sum(1), backward=backward.sum(1), again=np.array([none, forward[:, cheap].sum(1), forward[:, again].sum(1)]),
        weights=(backward * np.where(both, 0.5, 1.0))[:, weighted].sum(1),
        attention_forward=forward[:, attention].sum(1), attention_backward=backward[:, attention].sum(1), chunked=forward[:, logits].sum(1),
    )  # fmt: skip


def tp_seconds(sharded: ShardedBlock, group: Group, batches: Array, costs: CostModel | None) -> tuple[Array, Array, Array]:
    """Seconds of the tensor-parallel collectives of a block: forward, backward [batches]; what recompute repeats [3, batches]."""
    order = {op.name: i for i, op in enumerate(sharded.block.ops)}
    last = last_needed(sharded.block)
    comm = {"forward": np.zeros(len(batches)), "backward": np.zeros(len(batches))}
    again = np.zeros((3, len(batches)))
    for c in sharded.collectives:
        t = collectives.seconds(c.op, c.amount.const + batches * c.amount.per_sample, group, costs)
        comm[c.phase] = comm[c.phase] + t
        if c.phase == "forward" and order.get(c.value.partition(":")[0], -1) <= last:
            again[2] += t
            if c.op == "all_gather":  # selective recompute keeps what was reduced
                again[1] += t
    return comm["forward"], comm["backward"], again


def block_bytes(sharded: ShardedBlock, batches: Array) -> BlockBytes:
    """What context and expert parallelism exchange for a block."""
    keys_values, queries, out, back = (np.zeros(len(batches)) for _ in range(4))
    products = [op for op in sharded.block.ops if op.kind == "experts"]
    for op in sharded.block.ops:
        width = DTYPE_BYTES.get(op.dtype, 4)
        if op.kind == "attention":
            share = 1 / sharded.ranks if op.name in sharded.divided else 1.0
            d = op.dims
            n = d.get("batch", 1)
            per_head = (d["head_dim"] + d.get("v_head_dim", d["head_dim"])) * width * share
            keys_values += batches * n * d["kv"] * d["kv_heads"] * per_head
            queries += batches * n * d["q"] * d["heads"] * per_head
        elif products and op in (products[0], products[-1]):
            share = 1 / sharded.ranks if op.name in sharded.divided else 1.0
            if op is products[0]:
                out += batches * op.dims["m"] * op.dims["k"] * width * share
            if op is products[-1]:
                back += batches * op.dims["m"] * op.dims["n"] * width * share
    names = [op.name for op in sharded.block.ops]
    late = bool(products) and names.index(products[-1].name) > last_needed(sharded.block)
    return BlockBytes(keys_values, queries, out, back, late)


def expert_params(sharded: ShardedBlock) -> set[str]:
    """Names of the parameters of a block's experts."""
    return {v[6:] for op in sharded.block.ops if op.kind == "experts" for v in _params(sharded, op)}


def expert_numel(sharded: ShardedBlock) -> float:
    """Parameters of a block's experts, all of them."""
    names = expert_params(sharded)
    return float(sum(p.numel for p in sharded.block.params if p.name in names))


def _params(sharded: ShardedBlock, op: Op) -> list[str]:
    found = []
    for v in op.inputs:
        source = sharded.block.by_name.get(v.partition(":")[0])
        if v.startswith("param:"):
            found.append(v)
        elif source is not None and source.kind in ("view", "copy"):
            found += _params(sharded, source)
    return found


class Tables:
    """The blocks of a model, sharded each way `shardings` lists, at `batches` (microbatch over cp). Arrays [shardings, blocks, batches],
    with a leading axis of device types where the device matters, and an axis of 3 recompute modes before the blocks."""

    def __init__(
        self, shardings: Mapping[tuple[int, bool], Sequence[ShardedBlock]], devices: Sequence[tuple[Device, CostModel | None]], batches: Array,
        tp_group: Mapping[int, Group], repeated: Array,
    ) -> None:  # fmt: skip
        self.shardings, self.devices, self.batches = list(shardings.values()), devices, batches
        self.basis: dict[str, str] = {}
        seconds = [[[block_seconds(s, d, batches, costs, self.basis) for s in row] for row in self.shardings] for d, costs in devices]

        def stack(pick: str) -> Array:
            return np.array([[[getattr(x, pick) for x in row] for row in table] for table in seconds])

        self.forward, self.backward, self.weights, self.chunked = (stack(n) for n in ("forward", "backward", "weights", "chunked"))
        self.attention_forward, self.attention_backward = stack("attention_forward"), stack("attention_backward")
        self.again = np.swapaxes(stack("again"), 2, 3)  # [types, shardings, 3, blocks, batches]
        comm = [[tp_seconds(s, tp_group[s.ranks], batches, devices[0][1]) for s in row] for row in self.shardings]
        self.comm_forward, self.comm_backward = (np.array([[c[i] for c in row] for row in comm]) for i in (0, 1))
        self.comm_again = np.swapaxes(np.array([[c[2] for c in row] for row in comm]), 1, 2)
        moved = [[block_bytes(s, batches) for s in row] for row in self.shardings]
        self.keys_values, self.queries, self.rows_out, self.rows_back = (
            np.array([[getattr(x, n) for x in row] for row in moved]) for n in ("keys_values", "queries", "rows_out", "rows_back")
        )
        self.late = np.array([x.late for x in moved[0]], bool) if moved else np.zeros(0, bool)
        self.again[:, :, :, ~repeated] = 0.0  # stem and head are not checkpointed
        self.comm_again[:, :, ~repeated] = 0.0
        memory = [[block_memory(s, batches) for s in row] for row in self.shardings]
        self.kept = np.array([[[m.kept(RECOMPUTE[0] if not again else r) for m, again in zip(row, repeated)] for r in RECOMPUTE] for row in memory])
        self.carry = np.array([[m.carry for m in row] for row in memory])
        self.expert_numel = np.array([expert_numel(s) for s in self.shardings[0]]) if self.shardings else np.zeros(0)
        self.numel = np.array([[m.numel for m in row] for row in memory]) - self.expert_numel  # of what is not an expert's
        self.expert_params = [expert_params(s) for s in self.shardings[0]] if self.shardings else []
        self.shapes = [[m.shapes for m in row] for row in memory]
        self.op_tables = lru_cache(maxsize=None)(lambda t, u: (forward_table(self.shardings[t][u]), backward_table(self.shardings[t][u])))
        self.expert_seconds = lru_cache(maxsize=None)(self._expert_seconds)
        self.memory = lru_cache(maxsize=None)(self._memory)

    def _expert_seconds(self, ep: int, etp: int) -> tuple[Array, Array]:
        """Seconds of the experts' products, forward and backward. [types, shardings, blocks, batches]"""
        found: dict[tuple[int, int, int], tuple[Array, Array]] = {}
        forward, backward = np.zeros_like(self.forward), np.zeros_like(self.backward)
        for d, (device, costs) in enumerate(self.devices):
            for t, row in enumerate(self.shardings):
                for u, s in enumerate(row):
                    if not self.expert_numel[u]:
                        continue
                    divided = s.ranks if any(op.kind == "experts" and op.name in s.divided for op in s.block.ops) else 1
                    if (d, u, divided) not in found:
                        p = expert_seconds(s, device, self.batches, costs, ep, etp, self.op_tables(t, u))
                        self.basis.update(p.basis)
                        found[d, u, divided] = p.forward.sum(1), p.backward.sum(1)
                    forward[d, t, u], backward[d, t, u] = found[d, u, divided]
        return forward, backward

    def _memory(self, t: int, u: int, batch: float, cp: int, ep: int, chunks: int, ulysses: bool) -> BlockMemory:
        """Exact liveness of one block for one layout. Fields hold arrays of one."""
        return block_memory(self.shardings[t][u], np.array([batch]), cp=cp, ep=ep, loss_chunks=chunks, ulysses=ulysses)
