"""Memory of a bound model: bytes that layouts take of a rank and of its host, and the live bytes of their stages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meshwright.costmodel.allocator import Coefficients, surroundings
from meshwright.costmodel.blockcosts import Tables
from meshwright.costmodel.chunkmemory import one_round
from meshwright.costmodel.layouts import FREE, LOSS_CHUNKS, LOSSES, OFFLOADS, RECOMPUTE, SCHEDULES, SPLIT, STATE_DTYPES, Layouts
from meshwright.costmodel.memory import MASTER, OPTIMIZERS, REDUCED
from meshwright.costmodel.schedules import GATHERED
from meshwright.costmodel.stagememory import Blocks, Shape, StageMemory
from meshwright.profiling.cluster import Cluster
from meshwright.profiling.graph import ModelGraph

Array = np.ndarray


def _tied_twice(graph: ModelGraph) -> dict[int, set[str]]:
    """Parameters of blocks outside the layers that an earlier block holds already, under a tied name: names by block."""
    found: dict[int, set[str]] = {}
    for group in graph.tied:
        holders = [(b.id, p.name) for b in graph.blocks if not b.repeated for p in b.params if p.name in group]
        for block, name in holders[1:]:
            found.setdefault(block, set()).add(name)
    return found


class BoundMemory:
    """What a Bound says of memory."""

    graph: ModelGraph
    cluster: Cluster
    optimizer: str
    index: dict[tuple[int, bool], int]
    compute_bytes: float
    counts: Array
    repeated: Array
    order: Array
    tables: Tables
    _twice: dict[int, set[str]]

    def sharding_of(self, x: Layouts) -> Array:
        """Index of each layout's sharding."""
        lookup = np.full(2 * int(max(tp for tp, _ in self.index)) + 2, -1)
        for (tp, sp), i in self.index.items():
            lookup[2 * tp + sp] = i
        return lookup[2 * x.tp + x.sp]

    def state_bytes(self, x: Layouts) -> Array:
        """Bytes per parameter of the optimizer's moments."""
        return OPTIMIZERS[self.optimizer].state_bytes * np.where(x.state == STATE_DTYPES.index("bf16"), 0.5, 1.0)

    def _held(self, x: Layouts, dense: Array, experts: Array) -> Array:
        """Least bytes of each block's parameters, gradients and optimizer state on a rank; where zero is FREE, all of it sharded."""
        zero, free = x.zero[:, None], (x.zero == FREE)[:, None]
        shards, eshards = np.where(x.zero == 0, 1, x.shards)[:, None], np.where(x.zero == 0, 1, x.expert_shards)[:, None]
        shards, eshards = np.where(free, (x.dp * x.cp)[:, None], shards), np.where(free, x.edp[:, None], eshards)
        local, numel = dense / shards + experts / eshards, dense + experts
        state = np.where(x.offload == OFFLOADS.index("none"), self.state_bytes(x), 0.0)[:, None]
        fsdp = (x.dp * x.cp > 1)[:, None] | (self.compute_bytes < MASTER)
        whole = ~free & (zero < 3)
        # several chunks below ZeRO 2 are not all gathered at once; nor have they all gradients while they hold activations, with one round
        several = ((x.pp > 1) & ((x.schedule == FREE) | (x.vpp > 1)))[:, None]
        once = several & one_round(x.schedule == SCHEDULES.index("looped-bfs"), x.pp, x.microbatches)[:, None]
        some = several & (zero < 2) & (once | (x.schedule == FREE)[:, None] | (x.vpp > GATHERED)[:, None])
        outside = ~self.repeated & ~free  # ZeRO 3 keeps what is outside the layers gathered too
        gathered = np.where(fsdp & (whole | outside) & ~some, self.compute_bytes * numel, 0.0)
        many = (x.microbatches[:, None] > 1) & ~once
        gradients = np.where(many, REDUCED * np.where(~free & (zero < 2), numel, local), 0.0)
        return np.asarray((MASTER + state) * local + gathered + gradients)

    def host_bytes(self, x: Layouts) -> Array:
        """Bytes of optimizer state that the host of a node holds, its devices together, taking the stages as equal. [layouts]"""
        t = self.sharding_of(x)
        shards, eshards = np.where(x.zero == 0, 1, x.shards), np.where(x.zero == 0, 1, x.expert_shards)
        dense, experts = self.tables.numel[t] @ self.counts, float(self.tables.expert_numel @ self.counts) / (x.ep * x.etp)
        held = self.cluster.devices_per_node * self.state_bytes(x) * (dense / shards + experts / eshards) / x.pp
        return np.where(x.offload == OFFLOADS.index("optimizer"), held, 0.0)

    def tied_numel(self, x: Layouts) -> Array:
        """Parameters that blocks count twice where one rank holds both, of each layout."""
        twice = [
            sum(
                rows * row
                for block, names in self._twice.items()
                for name, (rows, row) in self.tables.shapes[t][block].items()
                if name in names
            )
            for t in range(len(self.index))
        ]
        return np.array(twice, float)[self.sharding_of(x)]

    def reported(self, x: Layouts) -> Coefficients:
        """What the device reports over live bytes, of each layout: what its other streams keep, and its communicators."""
        t = self.sharding_of(x)
        experts = self.tables.expert_numel / (x.ep * x.etp)[:, None]
        numel = self.tables.numel[t] + experts
        over = x.dp * x.cp
        fsdp = (over > 1) | (self.compute_bytes < MASTER)
        sharded = (over > 1) & (x.zero > 0)
        outside = np.where(self.repeated, 0.0, numel)
        root = np.where(x.pp > 1, outside.max(axis=1, initial=0.0), outside.sum(axis=1))
        layer = np.where(self.repeated, numel, 0.0).max(axis=1, initial=0.0)
        gathered = np.where(sharded, self.compute_bytes * (root + 2 * layer), 0.0)
        # where ZeRO is FREE, what the choice that takes least would take
        shards, eshards = np.where(x.zero == 0, 1, x.shards), np.where(x.zero == 0, 1, x.expert_shards)
        local = (self.tables.numel[t] @ self.counts / shards + experts @ self.counts / eshards) / x.pp
        reduced = np.where(fsdp & (x.microbatches == 1), REDUCED * local, 0.0)
        groups = sum((y > 1).astype(int) for y in (x.tp, x.pp, over, x.cp, x.ep, x.etp, x.replicas))
        return surroundings(self.cluster.device, communicators=groups, gathered_bytes=gathered, reduced_bytes=reduced)

    def stage_memory(self, x: Layouts, i: int, modes: Array) -> StageMemory:
        """Live bytes of the stages of layout i; `modes` [layers] indexes RECOMPUTE."""
        zero, schedule = int(x.zero[i]), SCHEDULES[int(x.schedule[i])]
        shards, eshards = (int(x.shards[i]), int(x.expert_shards[i])) if zero else (1, 1)
        shape = Shape(
            pp=int(x.pp[i]), microbatches=int(x.microbatches[i]), zero=zero, dp=shards if zero else int(x.dp[i] * x.cp[i]),
            compute_bytes=self.compute_bytes, mixed=self.compute_bytes < MASTER, schedule=schedule, vpp=int(x.vpp[i]),
            copies=int(x.replicas[i]) if zero else 1,
            state_bytes=0.0 if x.offload[i] == OFFLOADS.index("optimizer") else float(self.state_bytes(x.take(slice(i, i + 1)))[0]),
        )  # fmt: skip
        t, batch, cp, ep = int(self.sharding_of(x)[i]), float(x.micro_batch[i]), int(x.cp[i]), int(x.ep[i] * x.etp[i])
        chunks = LOSS_CHUNKS if LOSSES[int(x.loss[i])] == "chunked" else 1
        unique = [self.tables.memory(t, u, batch, cp, ep, chunks, bool(x.ulysses[i])) for u in range(len(self.counts))]
        order, layer = self.order, self.repeated[self.order]
        r = np.zeros(len(order), int)
        r[layer] = modes

        def each(values: Sequence[float]) -> Array:
            return np.array(values, float)[order]

        names = ["saved", "forward", "backward", "backward_in_place", "carry", "output", "side", "incoming"]
        names += ["waits", "halved", "late"] if schedule in SPLIT else []
        of = {name: each([float(getattr(m, name)[0]) for m in unique]) for name in names}
        kept = np.array([[float(m.kept(mode)[0]) for m in unique] for mode in RECOMPUTE])[r, order]
        again = np.array([[float(m.again(mode)[0]) for m in unique] for mode in RECOMPUTE])[r, order]
        # FSDP pads the rows of a parameter to its shards; of experts, which shard over ranks of their own, what is left can be split
        # elsewhere
        of_experts = [
            sum(rows * row for name, (rows, row) in m.shapes.items() if name in names)
            for m, names in zip(unique, self.tables.expert_params)
        ]
        others = [
            sum(np.ceil(rows / shape.shards) * shape.shards * row for name, (rows, row) in m.shapes.items() if name not in names)
            for m, names in zip(unique, self.tables.expert_params)
        ]
        held, padded = each([m.numel for m in unique]), each(others) + each(of_experts)
        tied = np.zeros(len(order))
        if shape.pp == 1:  # a tied parameter is one tensor
            for block, which in self._twice.items():
                at, shapes = order == block, [s for name, s in unique[block].shapes.items() if name in which]
                tied[at] = sum(rows * row for rows, row in shapes)
                held[at] -= sum(rows * row for rows, row in shapes)
                padded[at] -= sum(np.ceil(rows / shape.shards) * shape.shards * row for rows, row in shapes)
        local = (padded - each(of_experts)) / shape.shards + each(of_experts) / eshards
        adds = (not shape.fsdp and shape.microbatches > 1) or (shape.fsdp and shape.sums_whole and not shape.mixed)
        backward, backward_first = of["backward_in_place" if adds else "backward"] + again, of["backward"] + again
        saved, forward, keeps = of["saved"] + again, of["forward"].copy(), np.array([m.keeps_result for m in unique], bool)[order]
        # layers that recompute keep what goes in instead of what comes out: a neighbour may hold the same tensor, or need another
        same = np.flatnonzero((r[:-1] == 0) & (r[1:] > 0) & keeps[:-1]) + 1
        more = np.flatnonzero((r[:-1] > 0) & (r[1:] == 0) & keeps[:-1]) + 1
        for values in (kept, backward, backward_first, saved):
            values[same] -= of["carry"][same]
            values[more] += of["carry"][more - 1]
        forward[more] += of["carry"][more - 1]
        halves: dict[str, Array] = {}
        if schedule in SPLIT:
            passed = each([m.passes_on for m in unique]) * of["incoming"]
            halves = {"waits": of["waits"] + passed, "halved": of["halved"], "late": of["late"]}
        samples = x.microbatches[i] * x.micro_batch[i] / x.cp[i]
        inputs = [*self.graph.inputs, *([self.graph.labels] if self.graph.labels else [])]
        return StageMemory(
            Blocks(
                layer=layer, kept=kept, forward=forward, backward=backward, saved=saved, carry=of["carry"], numel=held, padded=padded,
                local=local, buffers=each([m.buffers for m in unique]), side=float(of["side"][layer].max(initial=0.0)),
                output=float(of["output"].sum()), inputs=float(sum(y.spec.amount.at(samples) for y in inputs)),
                handed=float(of["carry"][layer].max(initial=0.0)), incoming=of["incoming"], keeps_result=keeps & (r == 0), recomputes=r > 0,
                tied=tied, backward_first=backward_first, **halves,
                last_numel=each([next((rows * row for rows, row in reversed(m.shapes.values())), 0.0) for m in unique]),
            ),
            shape,
        )  # fmt: skip
