"""One training step: a model bound to a cluster becomes arrays, and any number of layouts is priced at once.

Everything that a layout costs adds up over the blocks that a pipeline stage holds:

    c[u]   seconds of one microbatch in block u: forward, backward, recompute, the tensor-parallel collectives between them,
           and what per-microbatch data-parallel traffic its own compute does not hide
    e[u]   seconds once per step: gathering, reducing, the optimizer

so that a step is (m - 1) max c + sum c + max e over the stages (pipeline.step_1f1b), and a bound for any way to cut the model
into stages follows from the sums and the largest block alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from meshwright.costmodel import collectives, constants
from meshwright.costmodel.allocator import Coefficients, surroundings
from meshwright.costmodel.memory import MASTER, OPTIMIZERS, REDUCED, SAVED_KINDS, BlockMemory, block_memory, last_needed
from meshwright.costmodel.model import CostModel
from meshwright.costmodel.pricing import price_ops
from meshwright.costmodel.sharded import ShardedBlock
from meshwright.costmodel.stagememory import Blocks, Shape, StageMemory
from meshwright.profiling.cluster import Cluster
from meshwright.profiling.graph import ModelGraph

RECOMPUTE = ("none", "selective", "full")
SCHEDULES = ("1f1b", "gpipe")  # GPipe takes as long and holds more: only where it is asked for
# Share of traffic that hides behind compute where there is enough of it, fitted to published runs (constants.yaml).
OVERLAP = constants.value("overlap")
ACCUMULATE_BYTES = 10.0  # per parameter and microbatch: reads a 16-bit gradient, reads and writes an fp32 sum
# Nine of ten uncalibrated predictions of published runs by models of this kind were within this factor.
SPREAD = 1.3


@dataclass(frozen=True)
class Layouts:
    """Layouts as arrays of one length. `recompute` indexes RECOMPUTE, `schedule` SCHEDULES."""

    tp: np.ndarray
    sp: np.ndarray
    pp: np.ndarray
    dp: np.ndarray
    zero: np.ndarray
    micro_batch: np.ndarray
    microbatches: np.ndarray
    recompute: np.ndarray
    schedule: np.ndarray

    def __len__(self) -> int:
        return len(self.tp)

    def take(self, index: np.ndarray | slice) -> Layouts:
        return Layouts(*(getattr(self, f)[index] for f in self.__dataclass_fields__))


@dataclass(frozen=True)
class BlockCost:
    """Seconds of one block on one rank for each microbatch size: compute and tensor-parallel communication, by phase."""

    forward: np.ndarray
    backward: np.ndarray
    recompute: np.ndarray  # [3, batches]: none, selective, full
    comm_forward: np.ndarray
    comm_backward: np.ndarray
    comm_recompute: np.ndarray  # [3, batches]
    memory: BlockMemory


@dataclass(frozen=True)
class Priced:
    """What `Bound.price` says of each layout and each unique block. All [layouts, blocks] but `send`."""

    forward: np.ndarray
    backward: np.ndarray
    once: np.ndarray
    parts: dict[str, np.ndarray]  # what forward + backward add up from, by name
    optimizer: np.ndarray  # of `once`
    kept: np.ndarray
    numel: np.ndarray
    send: np.ndarray  # [layouts]
    carry: np.ndarray  # [layouts] bytes

    @property
    def per_microbatch(self) -> np.ndarray:
        return self.forward + self.backward


def _tied_twice(graph: ModelGraph) -> dict[int, set[str]]:
    """Parameters of blocks outside the layers that an earlier block holds already, under a tied name: names by block."""
    found: dict[int, set[str]] = {}
    for group in graph.tied:
        holders = [(b.id, p.name) for b in graph.blocks if not b.repeated for p in b.params if p.name in group]
        for block, name in holders[1:]:
            found.setdefault(block, set()).add(name)
    return found


class Bound:
    """A ModelGraph bound to a Cluster: prices arrays of layouts.

    `shardings[tp, sp]` are the graph's blocks sharded that way, in block order; `micro_batches` the sizes that may occur.
    """

    def __init__(
        self, graph: ModelGraph, cluster: Cluster, shardings: Mapping[tuple[int, bool], Sequence[ShardedBlock]],
        micro_batches: Sequence[int], costs: CostModel | None = None, optimizer: str = "adamw",
    ) -> None:  # fmt: skip
        self.graph, self.cluster, self.costs, self.optimizer = graph, cluster, costs, optimizer
        self.basis: dict[str, str] = {}  # kind of op -> "fitted" or "datasheet"
        self.shardings = dict(shardings)
        self.batches = np.array(sorted(set(micro_batches)))
        self.index = {key: i for i, key in enumerate(self.shardings)}
        self.compute_bytes = 2.0 if graph.precision == "bf16" else 4.0
        self.counts = np.bincount([o.block for o in graph.sequence], minlength=len(graph.blocks))
        self.repeated = np.array([b.repeated for b in graph.blocks])
        self._groups: dict[tuple[int, int, int], tuple[object, object]] = {}
        rows = [[self._block_cost(s) for s in blocks] for blocks in self.shardings.values()]

        def stack(pick: str) -> np.ndarray:  # [shardings, blocks, ..., batches]
            return np.array([[getattr(c, pick) for c in row] for row in rows])

        self._f, self._b, self._cf, self._cb = (stack(n) for n in ("forward", "backward", "comm_forward", "comm_backward"))
        self._r, self._cr = stack("recompute"), stack("comm_recompute")
        memory = [[c.memory for c in row] for row in rows]
        self._memory = memory
        self._kept = np.array([[[m.kept(r) for r in RECOMPUTE] for m in row] for row in memory])
        self._again = np.array([[[m.again(r) for r in RECOMPUTE] for m in row] for row in memory])
        fields = ("saved", "forward", "backward", "backward_in_place", "carry", "output", "side", "incoming")
        self._bytes = {name: np.array([[getattr(m, name) for m in row] for row in memory]) for name in fields}  # [shardings, blocks, batches]
        self._carry = self._bytes["carry"]
        self._numel = np.array([[m.numel for m in row] for row in memory])
        self._buffers = np.array([m.buffers for m in memory[0]]) if memory else np.zeros(0)
        self._keeps_result = np.array([[m.keeps_result for m in row] for row in memory])
        self._twice = _tied_twice(graph)
        # stem and head are not checkpointed: recompute of theirs is as none
        for i in np.flatnonzero(~self.repeated):
            for table in (self._kept, self._again):
                table[:, i, 1:] = table[:, i, :1]
            self._r[:, i] = 0.0
            self._cr[:, i] = 0.0

    def _block_cost(self, sharded: ShardedBlock) -> BlockCost:
        priced = price_ops(sharded, self.cluster.device, self.batches, self.costs)
        self.basis.update(priced.basis)
        forward, backward = priced.forward, priced.backward
        ops = sharded.block.ops
        last = last_needed(sharded.block)
        again = np.array([i <= last for i in range(len(ops))])
        cheap = again & np.array([op.kind not in SAVED_KINDS for op in ops])
        zero = np.zeros(len(self.batches))
        recompute = np.array([zero, forward[:, cheap].sum(1), forward[:, again].sum(1)])
        order = {op.name: i for i, op in enumerate(ops)}
        tp = self._tp_group(sharded.ranks)
        comm = {"forward": zero, "backward": zero}
        comm_again = [zero, zero, zero]
        for c in sharded.collectives:
            t = collectives.seconds(c.op, c.amount.const + self.batches * c.amount.per_sample, tp, self.costs)
            comm[c.phase] = comm[c.phase] + t
            if c.phase == "forward" and order.get(c.value.partition(":")[0], -1) <= last:
                comm_again[2] = comm_again[2] + t
                if c.op == "all_gather":  # selective recompute keeps what was reduced
                    comm_again[1] = comm_again[1] + t
        return BlockCost(
            forward.sum(1), backward.sum(1), recompute, comm["forward"], comm["backward"], np.array(comm_again),
            block_memory(sharded, self.batches),
        )  # fmt: skip

    def _tp_group(self, tp: int):  # type: ignore[no-untyped-def]
        return self.cluster.group(np.arange(self.cluster.size // tp * tp).reshape(-1, tp))

    def groups(self, tp: int, pp: int, dp: int):  # type: ignore[no-untyped-def]
        """Data-parallel and pipeline-neighbour groups, ranks ordered pp, dp, tp with tp innermost."""
        key = (tp, pp, dp)
        if key not in self._groups:
            ranks = np.arange(tp * pp * dp).reshape(pp, dp, tp)
            across = ranks.transpose(0, 2, 1).reshape(-1, dp)
            pairs = np.stack([ranks[:-1].ravel(), ranks[1:].ravel()], axis=1) if pp > 1 else ranks.reshape(-1)[:1, None]
            self._groups[key] = (self.cluster.group(across), self.cluster.group(pairs))
        return self._groups[key]

    def price(self, layouts: Layouts) -> Priced:
        """Prices every layout. Work is array arithmetic but for one lookup of groups per distinct (tp, pp, dp)."""
        k = np.searchsorted(self.batches, layouts.micro_batch)
        keys = layouts.tp * 2 + layouts.sp
        lookup = {tp * 2 + sp: i for (tp, sp), i in self.index.items()}
        t = np.array([lookup[key] for key in keys], int)
        r = layouts.recompute
        crowd = self._crowding(layouts)[:, None]
        compute_f, compute_b, again = (crowd * x for x in (self._f[t, :, k], self._b[t, :, k], self._r[t, :, r, k]))
        comm_f, comm_b, comm_again = (crowd * x for x in (self._cf[t, :, k], self._cb[t, :, k], self._cr[t, :, r, k]))
        forward = compute_f + comm_f
        backward = compute_b + again + comm_b + comm_again
        numel = self._numel[t]
        carry = self._carry[t, :, k][:, self.repeated].max(axis=1) if self.repeated.any() else np.zeros(len(t))
        gather, scatter, reduce, send = self._data_parallel(layouts, numel, carry)
        memory_Bps = self.cluster.device.memory_bandwidth_Bps * self.cluster.device.achieved.memory
        zero, dp, pp = (x[:, None] for x in (layouts.zero, layouts.dp, layouts.pp))
        many = layouts.microbatches[:, None] > 1

        # on a CPU the cores that would compute move the traffic, so nothing hides
        hidden = OVERLAP if self.cluster.device.kind == "cuda" else 0.0

        def exposed(traffic: np.ndarray, behind: np.ndarray) -> np.ndarray:
            return np.maximum(traffic - hidden * behind, 0.0)

        per_forward = np.where(zero == 3, exposed(gather, forward), 0.0)
        regather = np.where(self.repeated, gather, 0.0)  # the root stays gathered between forward and backward
        per_backward = np.where(zero == 3, exposed(regather + scatter, backward), np.where(zero == 2, exposed(scatter, backward), 0.0))
        accumulation = np.where((zero < 2) & many, ACCUMULATE_BYTES * numel / memory_Bps, 0.0)
        # torch's pipeline schedules reduce after the last backward, with nothing left to hide behind
        alone = pp > 1
        reduced = np.where(zero == 0, reduce, np.where(zero == 1, scatter, 0.0))
        once = np.where(alone, reduced, exposed(reduced, backward))
        once = once + np.where((zero == 1) | (zero == 2), exposed(gather, forward), 0.0)
        optimizer = OPTIMIZERS[self.optimizer].traffic_bytes * numel / np.where(zero > 0, dp, 1) / memory_Bps
        parts = {
            "forward": compute_f, "backward": compute_b, "recompute": again,
            "tensor_parallel": comm_f + comm_b + comm_again,
            "data_parallel": per_forward + per_backward,
            "accumulation": accumulation,
        }  # fmt: skip
        return Priced(
            forward=forward + per_forward, backward=backward + per_backward + accumulation, once=once + optimizer, parts=parts, optimizer=optimizer,
            kept=self._kept[t, :, r, k], numel=numel, send=send, carry=carry,
        )  # fmt: skip

    def tied_numel(self, layouts: Layouts) -> np.ndarray:
        """Parameters that blocks count twice where one rank holds both, of each layout."""
        twice = {
            t: sum(rows * row for block, names in self._twice.items() for name, (rows, row) in self._memory[t][block].shapes.items() if name in names)
            for t in self.index.values()
        }
        return np.array([twice[self.index[int(tp), bool(sp)]] for tp, sp in zip(layouts.tp, layouts.sp, strict=True)], float)

    def reported(self, layouts: Layouts) -> Coefficients:
        """What the device reports over live bytes, of each layout: what its other streams keep, and its communicators."""
        keys = [self.index[int(tp), bool(sp)] for tp, sp in zip(layouts.tp, layouts.sp, strict=True)]
        numel = self._numel[keys]
        fsdp = (layouts.dp > 1) | (self.compute_bytes < MASTER)
        sharded = (layouts.dp > 1) & (layouts.zero > 0)
        outside = np.where(self.repeated, 0.0, numel)
        root = np.where(layouts.pp > 1, outside.max(axis=1, initial=0.0), outside.sum(axis=1))
        layer = np.where(self.repeated, numel, 0.0).max(axis=1, initial=0.0)
        gathered = np.where(sharded, self.compute_bytes * (root + 2 * layer), 0.0)
        local = np.asarray(numel @ self.counts) / layouts.pp / np.where(layouts.zero > 0, layouts.dp, 1)
        reduced = np.where(fsdp & (layouts.microbatches == 1), REDUCED * local, 0.0)
        groups = (layouts.tp > 1).astype(int) + (layouts.pp > 1) + (layouts.dp > 1)
        return surroundings(self.cluster.device, communicators=groups, gathered_bytes=gathered, reduced_bytes=reduced)

    def stage_memory(self, layouts: Layouts, i: int, recompute: str | None = None) -> StageMemory:
        """Live bytes of the stages of layout i of some layouts; `recompute` instead of the layout's, for a stage that has its own."""
        x = Shape(
            pp=int(layouts.pp[i]), microbatches=int(layouts.microbatches[i]), zero=int(layouts.zero[i]), dp=int(layouts.dp[i]),
            compute_bytes=self.compute_bytes, mixed=self.compute_bytes < MASTER, schedule=SCHEDULES[int(layouts.schedule[i])],
            state_bytes=OPTIMIZERS[self.optimizer].state_bytes,
        )  # fmt: skip
        k = int(np.searchsorted(self.batches, layouts.micro_batch[i]))
        t, r = self.index[int(layouts.tp[i]), bool(layouts.sp[i])], int(layouts.recompute[i])
        r = r if recompute is None else RECOMPUTE.index(recompute)
        order = np.array([o.block for o in self.graph.sequence])
        layer = self.repeated[order]
        held, padded = self._numel[t][order], np.array([m.padded(x.shards) for m in self._memory[t]])[order]
        tied = np.zeros(len(order))
        if x.pp == 1:  # a tied parameter is one tensor
            for block, names in self._twice.items():
                memory, at = self._memory[t][block], order == block
                tied[at] = sum(rows * row for name, (rows, row) in memory.shapes.items() if name in names)
                held[at] -= sum(rows * row for name, (rows, row) in memory.shapes.items() if name in names)
                padded[at] -= sum(np.ceil(rows / x.shards) * x.shards * row for name, (rows, row) in memory.shapes.items() if name in names)
        of = {name: table[t, :, k][order] for name, table in self._bytes.items()}
        adds = (not x.fsdp and x.microbatches > 1) or (x.fsdp and x.sums_whole and not x.mixed)
        backward = of["backward_in_place" if adds else "backward"] + self._again[t, :, r, k][order]
        backward_first = of["backward"] + self._again[t, :, r, k][order]
        kept = self._kept[t, :, r, k][order]
        keeps = self._keeps_result[t][order]
        if r and layer.any():  # layers keep what goes in instead of what comes out: neighbours may hold the same tensor, or need another
            first, last = int(np.argmax(layer)), len(layer) - 1 - int(np.argmax(layer[::-1]))
            twice = of["carry"][first] * (first > 0 and keeps[first - 1])
            kept[first] -= twice
            backward[first] -= twice
            backward_first[first] -= twice
            of["saved"][first] -= twice
            for name in ("saved", "forward", "backward"):
                of[name][last + 1 : last + 2] += of["carry"][last] * keeps[last]
            kept[last + 1 : last + 2] += of["carry"][last] * keeps[last]
            backward[last + 1 : last + 2] += of["carry"][last] * keeps[last]
            backward_first[last + 1 : last + 2] += of["carry"][last] * keeps[last]
        samples = layouts.microbatches[i] * layouts.micro_batch[i]
        inputs = [*self.graph.inputs, *([self.graph.labels] if self.graph.labels else [])]
        return StageMemory(
            Blocks(
                layer=layer, kept=kept, forward=of["forward"], backward=backward, saved=of["saved"] + self._again[t, :, r, k][order],
                carry=of["carry"], numel=held, padded=padded, buffers=self._buffers[order], side=float(of["side"][layer].max(initial=0.0)),
                output=float(of["output"].sum()), inputs=float(sum(i.spec.amount.at(samples) for i in inputs)),
                handed=float(of["carry"][layer].max(initial=0.0)), incoming=of["incoming"],
                keeps_result=keeps & (r == 0), recomputes=bool(r), tied=tied, backward_first=backward_first,
                last_numel=np.array([next((rows * row for rows, row in reversed(m.shapes.values())), 0.0) for m in self._memory[t]])[order],
            ),
            x,
        )  # fmt: skip

    def _crowding(self, layouts: Layouts) -> np.ndarray:
        """Factor on the seconds of a CPU's ops where ranks outnumber its cores: how many ranks compute at once, over cores. A rank
        that waits in a pipeline's bubble leaves its core to another. Measured costs hold the crowd that they were measured in."""
        cores, ranks = self.cluster.device.cores, self.cluster.size
        if not cores:
            return np.ones(len(layouts))
        active = ranks * layouts.microbatches / (layouts.microbatches + layouts.pp - 1)
        measured = float(self.costs.provenance.get("ranks", 1)) if self.costs is not None else 1.0
        return np.asarray(np.maximum(1.0, active / cores) / max(1.0, measured / cores))

    def _data_parallel(self, layouts: Layouts, numel: np.ndarray, carry: np.ndarray) -> tuple[np.ndarray, ...]:
        """Seconds to gather a block's parameters, reduce-scatter and all-reduce its gradients; seconds to send the carry."""
        gather, scatter, reduce = np.zeros_like(numel), np.zeros_like(numel), np.zeros_like(numel)
        send = np.zeros(len(layouts))
        memory_Bps = self.cluster.device.memory_bandwidth_Bps * self.cluster.device.achieved.memory
        shape = np.stack([layouts.tp, layouts.pp, layouts.dp], axis=1)
        for tp, pp, dp in np.unique(shape, axis=0):
            rows = (shape == (tp, pp, dp)).all(axis=1)
            across, pairs = self.groups(int(tp), int(pp), int(dp))
            if dp > 1:
                n = numel[rows]
                # each collective also copies into and out of its flat buffer
                gather[rows] = collectives.seconds("all_gather", self.compute_bytes * n, across, self.costs) + 2 * self.compute_bytes * n / memory_Bps
                scatter[rows] = collectives.seconds("reduce_scatter", 4.0 * n, across, self.costs) + (self.compute_bytes + 4.0) * n / memory_Bps
                reduce[rows] = collectives.seconds("all_reduce", 4.0 * n, across, self.costs) + (self.compute_bytes + 4.0) * n / memory_Bps
            if pp > 1:
                send[rows] = collectives.send_seconds(carry[rows], pairs)
        return gather, scatter, reduce, send

    @cached_property
    def flops_per_sample(self) -> float:
        """Model FLOPs of one sample: three times the forward (attention in full), recompute not counted, as MFU is defined."""
        return 3 * self.graph.flops(1)

    def mfu(self, step_s: float, global_batch: int, devices: int) -> float:
        """Model FLOPs utilisation against the peak of the compute dtype (Chowdhery et al. 2022, appendix B)."""
        peak = self.cluster.device.peak_flops.get(self.graph.precision, self.cluster.device.peak_flops["fp32"])  # type: ignore[call-overload]
        return float(self.flops_per_sample * global_batch / step_s / (peak * devices))
