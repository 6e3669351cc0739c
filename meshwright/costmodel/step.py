"""One training step: a model bound to a cluster becomes arrays, and any number of layouts is priced at once.

Everything that a layout costs adds up over the blocks that a pipeline rank holds:

    c[u]   seconds of one microbatch in block u: forward, backward, recompute, the collectives of tensor, context and expert
           parallelism inside it, and what per-microbatch data-parallel traffic its own compute does not hide
    e[u]   seconds once per step: gathering, reducing, the optimizer

and a step is (m - r) max c + r sum c + max e over the ranks, with r the schedule's bubble over that of 1F1B: 1F1B exactly, for equal
ranks; the others from the closed forms of costmodel/pipeline.py at the model's mean forward, backward and weight gradient.

Context parallelism (Liu et al. 2023, arXiv 2310.01889): each rank has 1 / cp of a sample's tokens, so that a block costs as one with
1 / cp of the samples; keys and values go round the ring behind attention, or queries, keys, values and results change from tokens
to heads and back by all-to-all (Jacobs et al. 2023, arXiv 2309.14509). Expert parallelism sends each token to its experts and
back, twice a layer, forward and backward (Lepikhin et al. 2020, arXiv 2006.16668), with balanced routing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from meshwright.costmodel import chunkmemory, collectives, constants, schedules
from meshwright.costmodel.blockcosts import Tables
from meshwright.costmodel.boundmemory import BoundMemory, _tied_twice
from meshwright.costmodel.groups import Progressions, by_group
from meshwright.costmodel.layouts import FREE, LOSSES, OFFLOADS, SCHEDULES, SPLIT, Layouts
from meshwright.costmodel.memory import REDUCED
from meshwright.costmodel.model import CostModel, for_device
from meshwright.costmodel.pipeline import RAMPS, Ramp
from meshwright.costmodel.sharded import ShardedBlock
from meshwright.profiling.cluster import Cluster
from meshwright.profiling.graph import ModelGraph

# Share of traffic that hides behind compute, where there is enough of that, fitted to published runs (constants.yaml).
OVERLAP = constants.value("overlap")
ACCUMULATE_BYTES = 10.0  # per parameter and microbatch: reads a 16-bit gradient, reads and writes an fp32 sum
UPDATE_BYTES = 12.0  # per parameter: a fused step reads it and its gradient and writes it, in fp32; the state comes on top
# Nine of ten uncalibrated predictions of published runs by models of this kind were within this factor.
SPREAD = 1.3
Array = np.ndarray


@dataclass(frozen=True)
class Priced:
    """What `Bound.price` says of each layout. [types, layouts, blocks] unless said otherwise: types of device differ in speed."""

    forward: Array
    backward: Array
    again: Array  # [types, layouts, 3, blocks]: what each recompute mode adds to a backward
    once: Array
    optimizer: Array  # of `once`
    parts: dict[str, Array]  # what forward + backward add up from, by name
    ratio: Array  # [layouts] bubble of the schedule over that of 1F1B
    send: Array  # [layouts] seconds of one transfer between stages
    sharding: Array  # [layouts] index of the sharding
    batch: Array  # [layouts] index of microbatch over cp
    dense: Array  # [layouts, blocks] parameters on a rank that are not an expert's
    experts: Array  # [layouts, blocks] parameters of experts on a rank
    held: Array  # [layouts, blocks] least bytes of parameters, gradients and optimizer on a rank
    kept: Array  # [layouts, 3, blocks] bytes that a microbatch leaves for backward, by recompute mode
    carry: Array  # [layouts] bytes between layers

    @property
    def c(self) -> Array:
        """Seconds of a microbatch without recompute."""
        return self.forward + self.backward

    def take(self, rows: Array) -> Priced:
        out: dict[str, Any] = {}
        for f in fields(self):
            x = getattr(self, f.name)
            if isinstance(x, dict):
                out[f.name] = {k: v[:, rows] for k, v in x.items()}
            else:
                out[f.name] = x[:, rows] if f.name in ("forward", "backward", "again", "once", "optimizer") else x[rows]
        return Priced(**out)


class Bound(BoundMemory):
    """A ModelGraph bound to a Cluster: prices arrays of layouts.

    `shardings[tp, sp]` are the graph's blocks sharded that way, in block order; `batches` the values of microbatch over cp that may
    occur. `costs` is the cost model of the cluster's device; of a mixed cluster each device has its own.
    """

    def __init__(
        self, graph: ModelGraph, cluster: Cluster, shardings: Mapping[tuple[int, bool], Sequence[ShardedBlock]],
        batches: Sequence[float], costs: CostModel | None = None, optimizer: str = "adamw",
    ) -> None:  # fmt: skip
        self.graph, self.cluster, self.costs, self.optimizer = graph, cluster, costs, optimizer
        self.index = {key: i for i, key in enumerate(shardings)}
        self.batches = np.array(sorted(set(batches)), float)
        self.compute_bytes = 2.0 if graph.precision == "bf16" else 4.0
        self.counts = np.bincount([o.block for o in graph.sequence], minlength=len(graph.blocks))
        self.repeated = np.array([b.repeated for b in graph.blocks], bool)
        self.order = np.array([o.block for o in graph.sequence])
        self.groups = Progressions(cluster)
        self.devices = [cluster.device]
        if cluster.mixed:
            specs = [n.spec for n in cluster.nodes]
            self.devices = [d for i, d in enumerate(specs) if d not in specs[:i]]
        priced_by = [(d, for_device(d.name) if cluster.mixed and costs is not None else costs) for d in self.devices]
        tp_group = {tp: self.groups.group(tp, 1) for tp in {tp for tp, _ in shardings}}
        self.tables = Tables(shardings, priced_by, self.batches, tp_group, self.repeated)
        self.basis = self.tables.basis  # kind of op -> "fitted" or "datasheet"
        self._twice = _tied_twice(graph)
        self._moe = bool(self.tables.expert_numel.any())

    # -- time

    def price(self, x: Layouts, ratio: Array | None = None) -> Priced:
        """Prices every layout. Work is array arithmetic but for one question per distinct group of ranks. Where `zero` or `schedule` is
        FREE the price is that of the cheapest choice, or below; `ratio` is then the least bubble, 0 if not given."""
        tab = self.tables
        t, k = self.sharding_of(x), np.searchsorted(self.batches, x.micro_batch / x.cp)
        crowd = self._crowding(x)[None, :, None]

        def look(table: Array) -> Array:  # [types, shardings, blocks, batches] -> [types, layouts, blocks]
            return np.asarray(crowd * table[:, t, :, k].swapaxes(0, 1))

        compute_f, compute_b = look(tab.forward), look(tab.backward)
        weights, attention_f, attention_b = look(tab.weights), look(tab.attention_forward), look(tab.attention_backward)
        chunked = np.where((x.loss == LOSSES.index("chunked"))[None, :, None], look(tab.chunked), 0.0)
        again = crowd[..., None] * tab.again[:, t, :, :, k].swapaxes(0, 1)
        comm_f, comm_b = (crowd[0] * table[t, :, k] for table in (tab.comm_forward, tab.comm_backward))
        comm_again = crowd[0][:, None] * tab.comm_again[t, :, :, k]
        ep_f = np.zeros_like(comm_f)
        if self._moe:
            xf, xb = self._experts(x, t, k)
            xf, xb = crowd * xf, crowd * xb
            compute_f, compute_b, weights = compute_f + xf, compute_b + xb, weights + 0.5 * xb
            late = tab.late
            again[:, :, 2] += xf * ~late
            ep_f = self._dispatch(x, t, k)
            comm_again[:, 2] += ep_f * np.where(late, 0.5, 1.0)
        cp_f, cp_b = self._context(x, t, k, attention_f, attention_b)
        again[:, :, 2] += cp_f
        forward, backward = compute_f + comm_f + ep_f + cp_f, compute_b + comm_b + ep_f + cp_b
        again = again + comm_again
        compute_b, whole = compute_b + chunked, backward
        backward = backward + chunked
        dense = tab.numel[t]
        experts = np.where(tab.expert_numel > 0, tab.expert_numel / (x.ep * x.etp)[:, None], 0.0)
        carry = tab.carry[t, :, k][:, self.repeated].max(axis=1, initial=0.0)
        per_forward, per_backward, accumulation, once, optimizer = self._data_parallel(x, dense, experts, forward, backward)
        # a schedule's bubble is taken at the plain loss, so that it does not depend on later choices
        times = [np.asarray(y.max(axis=0) @ self.counts) for y in (forward, whole, weights)]
        ratio = self._ratio(x, *times) if ratio is None else np.where(x.schedule == FREE, ratio, self._ratio(x, *times))
        send = by_group(x.pp, x.stage, lambda n, stride, rows: collectives.send_seconds(carry[rows], self.groups.border(stride)), carry)
        parts = {
            "forward": compute_f, "backward": compute_b, "tensor_parallel": np.broadcast_to(comm_f + comm_b, compute_f.shape),
            "context_parallel": cp_f + cp_b, "expert_parallel": np.broadcast_to(2 * ep_f, compute_f.shape),
            "data_parallel": per_forward + per_backward, "accumulation": accumulation,
        }  # fmt: skip
        return Priced(
            forward=forward + per_forward, backward=backward + per_backward + accumulation, again=again, once=once + optimizer,
            optimizer=optimizer, parts=parts, ratio=ratio, send=send, sharding=t, batch=k, dense=dense, experts=experts,
            held=self._held(x, dense, experts), kept=tab.kept[t, :, :, k], carry=carry,
        )  # fmt: skip

    def _experts(self, x: Layouts, t: Array, k: Array) -> tuple[Array, Array]:
        """Seconds of the experts' products. [types, layouts, blocks]"""
        forward = np.zeros((len(self.devices), len(x), len(self.counts)))
        backward = np.zeros_like(forward)
        for ep, etp in np.unique(np.stack([x.ep, x.etp], 1), axis=0):
            rows = np.flatnonzero((x.ep == ep) & (x.etp == etp))
            f, b = self.tables.expert_seconds(int(ep), int(etp))
            forward[:, rows], backward[:, rows] = (y[:, t[rows], :, k[rows]].swapaxes(0, 1) for y in (f, b))
        return forward, backward

    def _dispatch(self, x: Layouts, t: Array, k: Array) -> Array:
        """Seconds to send tokens to their experts and back, once; with expert tensor parallelism they are gathered and reduced too."""
        out, back = self.tables.rows_out[t, :, k], self.tables.rows_back[t, :, k]

        def sent(n: int, stride: int, rows: Array) -> Array:
            group = self.groups.group(n, stride)
            return sum(collectives.seconds("all_to_all", y[rows], group, self.costs) for y in (out, back))  # type: ignore[return-value]

        def shared(n: int, stride: int, rows: Array) -> Array:
            group = self.groups.group(n, stride)
            gathered = collectives.seconds("all_gather", n * out[rows], group, self.costs)
            return np.asarray(gathered + collectives.seconds("reduce_scatter", n * back[rows], group, self.costs))

        return (by_group(x.ep, x.etp, sent, out) + by_group(x.etp, np.ones_like(x.etp), shared, out)) * (out > 0)

    def _context(self, x: Layouts, t: Array, k: Array, attention_f: Array, attention_b: Array) -> tuple[Array, Array]:
        """Seconds that context parallelism adds, forward and backward. [types, layouts, blocks]

        Ring: keys and values pass every rank, and in backward their gradients too, behind attention as far as it hides them. Ulysses:
        queries, keys, values and results change places by all-to-all, which nothing hides."""
        kv, q = self.tables.keys_values[t, :, k], self.tables.queries[t, :, k]
        if not (x.cp > 1).any():
            return np.zeros_like(attention_f), np.zeros_like(attention_b)

        def ring(n: int, stride: int, rows: Array) -> Array:
            return collectives.seconds("all_gather", n * kv[rows], self.groups.group(n, stride), self.costs)

        def turned(n: int, stride: int, rows: Array) -> Array:
            group = self.groups.group(n, stride)
            return sum(2 * collectives.seconds("all_to_all", y[rows] / 2, group, self.costs) for y in (kv, q))  # type: ignore[return-value]

        around, across = (by_group(x.cp, x.tp, f, kv) * (kv > 0) for f in (ring, turned))
        hidden = OVERLAP if self.cluster.device.kind == "cuda" else 0.0
        ulysses = (x.ulysses == 1)[:, None]
        forward = np.where(ulysses, across, unhidden(around, attention_f, hidden))
        backward = np.where(ulysses, across, unhidden(2 * around, attention_b, hidden))
        return forward, backward

    def _data_parallel(self, x: Layouts, dense: Array, experts: Array, forward: Array, backward: Array) -> tuple[Array, ...]:
        """Exposed seconds of a microbatch's forward and backward, of accumulation, once a step, and of the optimizer in that.

        [types, layouts, blocks]. Parameters that are not experts' are sharded over cp too; experts' over the ranks that hold the same.
        """
        zero = x.zero[:, None]
        free = zero == FREE
        stage, tp = x.stage, x.tp
        shards = np.where(x.zero > 0, x.shards, 1)
        eshards = np.where(x.zero > 0, x.expert_shards, 1)
        estride = x.ep * x.etp
        moved_Bps = np.array([d.memory_bandwidth_Bps * d.achieved.memory for d in self.devices])[:, None, None]

        def over(op: collectives.Op, numel: Array, width: float, size: Array, stride: Array) -> Array:
            def seconds(n: int, s: int, rows: Array) -> Array:
                return collectives.seconds(op, width * numel[rows], self.groups.group(n, s), self.costs)

            return by_group(size, stride, seconds, numel) * (numel > 0)  # what a block has not costs no latency

        def both(op: collectives.Op, width: float, n: Array, en: Array) -> Array:
            """Over the ranks that share a copy."""
            out = over(op, dense, width, n, tp)
            return out + over(op, experts, width, en, estride) if self._moe else out

        def copies(width: float, n: Array, en: Array) -> Array:  # into and out of the collective's flat buffer
            return (dense * (n > 1)[:, None] + experts * (en > 1)[:, None]) * width / moved_Bps

        w = self.compute_bytes
        gather = both("all_gather", w, shards, eshards) + copies(2 * w, shards, eshards)
        scatter = both("reduce_scatter", REDUCED, shards, eshards) + copies(w + REDUCED, shards, eshards)
        across = over("all_reduce", dense / np.maximum(shards, 1)[:, None], REDUCED, x.replicas, tp * shards)
        if self._moe:
            across = across + over("all_reduce", experts / np.maximum(eshards, 1)[:, None], REDUCED, x.replicas, estride * eshards)
        n, en = np.where(x.zero == 0, stage // tp, 1), np.where(x.zero == 0, x.edp, 1)
        reduce = both("all_reduce", REDUCED, n, en) + copies(w + REDUCED, n, en)

        # on a CPU the cores that would compute move the traffic, so nothing hides
        hidden = OVERLAP if self.cluster.device.kind == "cuda" else 0.0

        def exposed(traffic: Array, behind: Array) -> Array:
            return unhidden(traffic, behind, hidden)

        numel = dense + experts
        local = dense / shards[:, None] + experts / eshards[:, None]
        local = np.where(free, dense / x.stage[:, None] * tp[:, None] + experts / np.maximum(x.edp, 1)[:, None], local)
        regather = np.where(self.repeated, gather, 0.0)  # the root stays gathered between forward and backward
        scatter = scatter + across
        per_forward = np.where(zero == 3, exposed(gather, forward), 0.0)
        per_backward = np.where(zero == 3, exposed(regather + scatter, backward), np.where(zero == 2, exposed(scatter, backward), 0.0))
        many = x.microbatches[:, None] > 1
        accumulation = np.where((zero < 2) & many & ~free, ACCUMULATE_BYTES * numel / moved_Bps, 0.0)
        # torch's pipeline schedules reduce after the last backward, with nothing left to hide behind
        reduced = np.where(zero == 0, reduce, np.where(zero == 1, scatter, 0.0))
        once = np.where(x.pp[:, None] > 1, reduced, exposed(reduced, backward))
        once = once + np.where((zero == 1) | (zero == 2), exposed(gather, forward), 0.0)
        state = self.state_bytes(x)[:, None]
        host = self.host_Bps
        here = 2 * state * local / moved_Bps
        there = 2 * state * local / host if host else np.full_like(local, np.inf)
        offload = x.offload[:, None]
        optimizer = UPDATE_BYTES * local / moved_Bps
        moved = np.where(offload == OFFLOADS.index("optimizer"), there, here)
        optimizer = optimizer + np.where(offload == FREE, np.minimum(here, there), moved)
        once = np.where(free, 0.0, once)
        return per_forward, per_backward, accumulation, once, optimizer

    @property
    def host_Bps(self) -> float:
        """Bytes a second between a device and its host, 0 where the cluster does not say."""
        return self.cluster.host.bandwidth_Bps if self.cluster.host is not None else 0.0

    @staticmethod
    def _ratio(x: Layouts, f: Array, whole: Array, w: Array) -> Array:
        """Bubble of each layout's schedule over that of 1F1B, both at the mean of the model's blocks; `f`, `whole`, `w` are seconds of
        the model's forward, backward, and of the weight gradients in that. 0 where the schedule is FREE."""
        out = np.ones(len(x))
        out[x.schedule == FREE] = 0.0
        for i, name in enumerate(SCHEDULES):
            rows = np.flatnonzero((x.schedule == i) & (x.pp > 1))
            if not len(rows) or name in ("1f1b", "gpipe"):
                continue
            for p, v in np.unique(np.stack([x.pp[rows], x.vpp[rows]], 1), axis=0):
                at = rows[(x.pp[rows] == p) & (x.vpp[rows] == v)]
                out[at] = bubble(name, int(p), int(v), x.microbatches[at], f[at], whole[at], w[at])
        return out

    def least_ratio(self, x: Layouts, choices: Callable[[int, int], list[tuple[int, int]]]) -> Array:
        """The least bubble over that of 1F1B of the schedules that a layout may have; `choices(pp, microbatches)`: (schedule, chunks)."""
        tab, t, k = self.tables, self.sharding_of(x), np.searchsorted(self.batches, x.micro_batch / x.cp)
        p = self.price(x)
        f, whole = (np.asarray(y.max(axis=0) @ self.counts) for y in (p.forward, p.backward))
        w = tab.weights[:, t, :, k].swapaxes(0, 1)
        if self._moe:
            w = w + 0.5 * self._experts(x, t, k)[1]
        w = self._crowding(x) * np.asarray(w.max(axis=0) @ self.counts)
        out = np.ones(len(x))
        order = np.lexsort((x.microbatches, x.pp))
        pp, m = x.pp[order], x.microbatches[order]
        starts = np.flatnonzero(np.concatenate([[True], (np.diff(pp) != 0) | (np.diff(m) != 0)]))
        for a, b in zip(starts, [*starts[1:], len(order)]):
            rows, n, batches = order[a:b], int(pp[a]), int(m[a])
            found = [
                np.ones(len(rows))
                if SCHEDULES[s] in ("1f1b", "gpipe")
                else bubble(SCHEDULES[s], n, v, batches, f[rows], whole[rows], w[rows])
                for s, v in (choices(n, batches) if n > 1 else [])
            ]
            if found:
                out[rows] = np.min(found, axis=0)
        return out

    def weight_seconds(self, x: Layouts) -> Array:
        """Seconds of each block's gradients of weights, for one layout. [types, blocks]"""
        t, k = self.sharding_of(x), np.searchsorted(self.batches, x.micro_batch / x.cp)
        w = self.tables.weights[:, t, :, k].swapaxes(0, 1)[:, 0]
        w = w + (0.5 * self._experts(x, t, k)[1][:, 0] if self._moe else 0.0)
        return np.asarray(self._crowding(x)[0] * w)

    def _crowding(self, x: Layouts) -> Array:
        """Factor on the seconds of a CPU's ops where ranks outnumber its cores: how many ranks compute at once, over cores. A rank
        that waits in a pipeline's bubble leaves its core to another. Measured costs hold the crowd that they were measured in."""
        cores, ranks = self.cluster.device.cores, self.cluster.size
        if not cores:
            return np.ones(len(x))
        active = ranks * x.microbatches / (x.microbatches + x.pp - 1)
        measured = float(self.costs.provenance.get("ranks", 1)) if self.costs is not None else 1.0
        return np.asarray(np.maximum(1.0, active / cores) / max(1.0, measured / cores))

    # -- figures

    @cached_property
    def flops_per_sample(self) -> float:
        """Model FLOPs of one sample: three times the forward (attention in full), recompute not counted, as MFU is defined."""
        return 3 * self.graph.flops(1)

    def mfu(self, step_s: float, global_batch: int, devices: int) -> float:
        """Model FLOPs utilisation against the peak of the compute dtype (Chowdhery et al. 2022, appendix B)."""
        peaks = self.cluster.device.peak_flops
        peak = peaks.get(self.graph.precision, peaks["fp32"])  # type: ignore[call-overload]
        return float(self.flops_per_sample * global_batch / step_s / (peak * devices))


def unhidden(traffic: Array, behind: Array, overlap: float) -> Array:
    """What stays exposed of traffic beside compute: all that is longer, and of the rest the share that does not overlap, as `overlap` was
    fitted (training.py)."""
    return np.asarray(np.maximum(traffic - behind, 0.0) + (1 - overlap) * np.minimum(traffic, behind))


def bubble(schedule: str, p: int, v: int, microbatches: Array | int, f: Array, whole: Array, w: Array) -> Array:
    """Bubble of a schedule of `p` ranks and `v` chunks over that of 1F1B; the model's forward, backward and weight gradients [layouts]."""
    chunks = float(p * v)
    w = np.minimum(w, whole)
    ramp = Ramp(p, v, np.asarray(microbatches), f / chunks, (whole - w) / chunks, w / chunks, 0.0 * f)
    idle = np.max([np.broadcast_to(form, len(f)) for form in RAMPS[schedules.find(schedule).name](ramp)], axis=0)
    return np.asarray(np.maximum(idle, 0.0) / ((p - 1) * (f + whole) / p))


@lru_cache(maxsize=65536)
def in_flight(schedule: str, pp: int, vpp: int, microbatches: int) -> tuple[float, ...]:
    """Microbatches whose activations each rank holds at its peak, for all but the first of a step's backwards; of several chunks and where
    backward is split, those that every chunk holds at one moment."""
    if schedule in SPLIT and pp > 1:
        return tuple(max(0.0, float(n)) for n in schedules.fewest(schedule, pp, microbatches, vpp))
    if vpp > 1:
        return tuple(float(n) for n in chunkmemory.fewest(schedule, pp, microbatches, vpp))
    s = schedules.find(schedule)
    m = microbatches if microbatches == 1 else microbatches - 1
    return tuple(float(s.in_flight(pp, r, m, vpp)) for r in range(pp))
