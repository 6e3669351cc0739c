"""One training step from a run's features and a few constants: layers, stages, schedule, data parallelism, optimiser.

`step` prices all runs at once. The constants say what share of its isolated rate an op keeps inside a step; they are the same for
all runs and are kept in constants.yaml.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.costmodel.features import features
from meshwright.costmodel.runs import Run

Array = np.ndarray


@dataclass(frozen=True)
class Constant:
    """A fitted constant: its physical start, bounds, and how far in log it may drift before the prior holds it."""

    start: float
    low: float
    high: float
    sigma: float
    meaning: str


CONSTANTS: dict[str, Constant] = {
    "gemm16": Constant(0.90, 0.4, 1.2, 0.35, "16-bit matrix products in a step over isolated: clocks under power, neighbours, launch gaps"),
    "gemm8": Constant(0.75, 0.2, 1.2, 0.35, "the same for 8- and 4-bit products"),
    "pointwise": Constant(0.9, 0.2, 1.0, 0.35, "share of memory bandwidth that pointwise kernels reach"),
    "overlap": Constant(0.80, 0.02, 0.98, 0.35, "share of traffic hidden where the engine overlaps it"),
    "intra": Constant(0.85, 0.3, 1.0, 0.35, "collectives inside a node over isolated NCCL"),
    "inter": Constant(0.75, 0.2, 1.0, 0.35, "share of network bandwidth that collectives reach"),
    "launch_us": Constant(15.0, 0.5, 30.0, 1.0, "host time per kernel, microseconds: an op of a Python module, with its autograd node"),
    "step_ms": Constant(20.0, 0.1, 500.0, 1.0, "fixed time per step, milliseconds: data, logging, gradient norm, synchronisation"),
    "misalign": Constant(0.35, 0.001, 3.0, 1.0, "extra time of a product on 8-element granularity over 64"),
    "sync_us": Constant(300.0, 1.0, 3000.0, 0.35, "ranks waiting for each other before a collective or send that nothing hides, microseconds"),
    "grouped": Constant(0.75, 0.1, 1.2, 0.35, "products of experts over dense ones: fused MoE operators reach 0.75 of linear on H100"),
}
NAMES = tuple(CONSTANTS)
START = np.array([c.start for c in CONSTANTS.values()])
FLASH_REFERENCE = 0.9  # attention is derated with products below this
ACCUMULATE_B = 6.0  # a 16-bit gradient is read, added to what is kept, and written
UNFUSED_EFFICIENCY = 0.6  # batched products of attention over dense ones


class Batch:
    """Features of many runs as arrays of length n, with the engine facts that the step reads."""

    def __init__(self, runs: Sequence[Run], rows: Sequence[dict[str, float]] | None = None) -> None:
        self.runs = list(runs)
        rows = [features(r) for r in runs] if rows is None else rows
        names = sorted({name for row in rows for name in row})
        self.f = {name: np.array([row.get(name, 0.0) for row in rows]) for name in names}
        for name in ALL:
            self.f.setdefault(name, np.zeros(len(self.runs)))

        def fact(get) -> Array:  # type: ignore[no-untyped-def]
            return np.array([get(r) for r in self.runs])

        self.low = fact(lambda r: r.low)
        self.overlap_dp = fact(lambda r: float(r.engine.overlap_dp))
        self.overlap_tp = fact(lambda r: float(r.engine.overlap_tp))
        self.overlap_p2p = fact(lambda r: float(r.engine.overlap_p2p))
        self.overlap_ep = fact(lambda r: float(r.engine.overlap_ep and (r.vpp > 1 or r.schedule.startswith("dualpipe"))))
        self.full = fact(lambda r: r.recompute == "full")
        self.every_second = fact(lambda r: r.recompute == "selective" and r.engine.selective == "every second")
        self.again_attention = fact(lambda r: r.recompute == "selective" and r.engine.selective == "attention")
        self.early = fact(lambda r: float(r.engine.stops_early and not r.dims.experts))
        self.broadcast = fact(lambda r: r.engine.broadcast_parameters)
        self.gathers_per_microbatch = fact(lambda r: r.shard == 3 or (r.shard == 2 and r.engine.zero == "zero3"))
        self.balanced = fact(lambda r: r.balanced)
        self.schedule = fact(lambda r: r.schedule)
        self.v_shape = fact(lambda r: r.schedule in ("v-half", "v-min", "zb-v", "dualpipe-v"))

    def __len__(self) -> int:
        return len(self.runs)


ALL = tuple(  # features that a run may not have
    "gemm_f gemm_d gemm_w off_f off_d off_w last_f cast_f cast_b experts_f experts_d experts_w a2a_node a2a_net a2a_latency flash_f flash_b "  # noqa: SIM905
    "scores_c_f scores_c_b scores_off_f scores_off_b scores_m_f scores_m_b pointwise_f pointwise_b kernels_f tp tp_calls cp_node cp_net "
    "grouped_f grouped_d grouped_w cast_e_f cast_e_b pointwise_e_f pointwise_e_b kernels_e_f".split()
)


def step(b: Batch, theta: Array, off: Sequence[str] = ()) -> Array:
    """Seconds of one step of each run. `off` names ingredients to leave out, for ablations."""
    return step_parts(b, theta, off)[0]


def step_parts(b: Batch, theta: Array, off: Sequence[str] = ()) -> tuple[Array, dict[str, Array]]:
    """Seconds of one step of each run, and where they go on the slowest stage."""
    c = dict(zip(NAMES, theta, strict=True))
    f, on = b.f, (lambda name: 0.0 if name in off else 1.0)
    g = np.where(b.low, c["gemm8"], c["gemm16"])
    mis = c["misalign"] * on("misalignment")
    pw = c["pointwise"]

    # one layer: forward, input gradients, weight gradients
    experts = {p: (f[f"experts_{p}"] / c["grouped"] + f[f"grouped_{p}"]) / g for p in "fdw"}
    gemm = {p: (f[f"gemm_{p}"] + mis * f[f"off_{p}"]) / g for p in "fdw"}
    derate = min(1.0, c["gemm16"] / FLASH_REFERENCE)
    attention = {
        p: f[f"flash_{p}"] / derate + (f[f"scores_c_{p}"] + mis * f[f"scores_off_{p}"]) / (c["gemm16"] * UNFUSED_EFFICIENCY) + f[f"scores_m_{p}"] / pw
        for p in "fb"
    }
    moved = {p: (f[f"pointwise_{p}"] + f[f"cast_{p}"] * on("casts")) / pw for p in "fb"}
    moved_e = {p: (f[f"pointwise_e_{p}"] + f[f"cast_e_{p}"] * on("casts")) / pw for p in "fb"}
    ring = f["cp_node"] / c["intra"] + f["cp_net"] / c["inter"]
    cp_f = _hidden(ring, attention["f"], c["overlap"])
    cp_b = _hidden(2 * ring, attention["b"], c["overlap"])
    # the host runs ahead of the device, but waits for the token counts before each layer's experts: two sections
    launch = c["launch_us"] * 1e-6 * on("launches")
    compute_f, routed_f = gemm["f"] + attention["f"] + moved["f"] + cp_f, experts["f"] + moved_e["f"]
    compute_b, routed_b = gemm["d"] + gemm["w"] + attention["b"] + moved["b"] + cp_b, experts["d"] + experts["w"] + moved_e["b"]
    layer_f = _floor(compute_f, f["kernels_f"] * launch) + _floor(routed_f, f["kernels_e_f"] * launch)
    layer_b = _floor(compute_b, 2 * f["kernels_f"] * launch) + _floor(routed_b, 2 * f["kernels_e_f"] * launch)
    compute_f, compute_b = compute_f + routed_f, compute_b + routed_b
    gemm = {p: gemm[p] + experts[p] for p in "fdw"}
    moved = {p: moved[p] + moved_e[p] for p in "fb"}
    tp = (f["tp"] / c["intra"] + f["tp_calls"] * c["sync_us"] * 1e-6) * (1 - c["overlap"] * b.overlap_tp) * on("tensor parallel")
    a2a = f["a2a_latency"] + np.maximum(f["a2a_node"] / c["intra"], f["a2a_net"] / c["inter"])
    a2a = a2a * (1 - c["overlap"] * b.overlap_ep) * on("expert parallel")
    comm = tp + a2a
    layer_f, layer_b = layer_f + comm, layer_b + comm
    early = b.early * f["last_f"] / g
    again = np.where(b.full, layer_f - early, 0.0)
    again = np.where(b.every_second, 0.5 * gemm["f"] + moved["f"], again)
    again = np.where(b.again_attention, attention["f"], again) * on("recompute")
    layer_b = layer_b + again

    # stages
    head_f = (f["head_f"] + mis * f["head_off_f"]) / c["gemm16"] + f["loss_f"] / pw
    head_b = (f["head_b"] + mis * f["head_off_b"]) / c["gemm16"] + f["loss_b"] / pw
    head, embedding = (head_f + head_b) * on("head"), 2 * f["embedding"] / pw
    layer = layer_f + layer_b
    pp, v, m = f["pp"], f["vpp"], f["microbatches"]
    single = pp == 1
    middle = f["middle"] * layer
    first = np.where(b.v_shape, (f["first"] + f["last"] - f["middle"]) * layer + head + embedding, f["first"] * layer + embedding)
    last = np.where(b.v_shape, middle, f["last"] * layer + head)
    total = f["layers"] * layer + head + embedding
    slowest = np.maximum(middle, np.maximum(first, last))
    level = np.maximum(np.ceil((f["layers"] * layer + head) / (pp * layer) - 1e-9) * layer, head)  # whole layers moved until they balance
    slowest = np.where(b.balanced, np.minimum(level, slowest), slowest)
    around = np.where(b.balanced, np.minimum(total, slowest * pp), first + last + np.maximum(0, pp - 2) * middle)
    fill = (around - slowest) * _fill(b, layer_f, layer_b, gemm["w"]) / v * on("bubble")
    hop = np.where(pp > 1, f["hop_node"] / c["intra"] + f["hop_net"] / c["inter"] + c["sync_us"] * 1e-6, 0.0)
    send = hop * 2 * v * (m * (1 - c["overlap"] * b.overlap_p2p) + pp / v) * on("sends")
    alone_f = f["layers"] * layer_f + head_f + f["embedding"] / pw
    alone_b = f["layers"] * layer_b + head_b + f["embedding"] / pw
    pipeline = np.where(single, m * (alone_f + alone_b), m * slowest + fill) + send

    # data parallelism and the optimiser
    data = _data_parallel(b, c, np.where(single, alone_f, slowest / 3), np.where(single, alone_b, slowest * 2 / 3)) * on("data parallel")
    once = f["optimizer"] / pw * on("optimizer") + c["step_ms"] * 1e-3
    accumulate = m * f["accumulate"] * ACCUMULATE_B / pw * on("accumulation")
    seconds = pipeline + data + once + accumulate
    times = m * np.where(single, f["layers"], slowest / layer)
    where = {
        "products": times * (gemm["f"] + gemm["d"] + gemm["w"]), "attention": times * (attention["f"] + attention["b"]),
        "pointwise": times * (moved["f"] + moved["b"]), "recompute": times * again, "tensor parallel": times * 2 * tp,
        "expert parallel": times * 2 * a2a, "context parallel": times * (cp_f + cp_b),
        "launches": times * (layer - again - 2 * comm - compute_f - compute_b),
        "head": m * head, "bubble": np.where(single, 0, fill), "sends": send, "data parallel": data, "optimizer": once + accumulate,
    }  # fmt: skip
    return seconds, where


def _floor(compute: Array, launches: Array) -> Array:
    """Device time, or host time where that is longer, with a soft corner."""
    return np.asarray(np.hypot(compute, launches))


def _hidden(traffic: Array, behind: Array, overlap: float | Array) -> Array:
    """What stays exposed of traffic beside compute: all that is longer, and the share of the rest that does not overlap."""
    return np.asarray(np.maximum(traffic - behind, 0) + (1 - overlap) * np.minimum(traffic, behind))


def _fill(b: Batch, forward: Array, backward: Array, weights: Array) -> Array:
    """The bubble of a schedule over that of 1F1B, (pp - 1)(F + B) with B the whole backward.

    ZB-1p: F + B - 2W; ZB-2p and ZB-V: none (Qi et al. 2023, arXiv:2401.10241). V-Half and V-Min: Qi et al. 2024
    (arXiv:2405.15362). DualPipe: (pp/2 - 1)(F&B + B - 3W) (DeepSeek-V3, table 2)."""
    whole = forward + backward
    zb1 = np.clip((whole - 2 * weights) / whole, 0, 1)
    dual = np.clip((np.maximum(forward, backward) + backward - 3 * weights) / whole / 2, 0, 1)
    table = {"zb-1p": zb1, "zb-2p": 0 * zb1, "zb-v": 0 * zb1, "v-half": 0.5 * zb1, "v-min": 0.67 * zb1 + 0.33, "dualpipe": dual, "dualpipe-v": dual}
    out = np.ones(len(b))
    for name, share in table.items():
        out = np.where(b.schedule == name, share, out)
    return out


def _data_parallel(b: Batch, c: dict[str, float], forward: Array, backward: Array) -> Array:
    """Exposed gathering of parameters and reduction of gradients. Fully sharded engines pay per microbatch; the others once, where
    only the last backward can hide the reduction and the next first forward the gathering."""
    f, m, layers = b.f, b.f["microbatches"], b.f["layers"]
    gather = np.maximum(f["gather"] / c["intra"], f["gather_net"] / c["inter"])
    reduce = np.maximum(f["reduce"] / c["intra"], f["reduce_net"] / c["inter"])
    latency = f["ring_latency"]
    share = c["overlap"] * b.overlap_dp
    often = b.gathers_per_microbatch
    gather_b = np.where(f["shard"] == 3, gather + layers / f["pp"] * latency, 0.0)
    one_f = gather + layers / f["pp"] * latency
    one_b = gather_b + reduce + layers / f["pp"] * latency
    per_microbatch = m * (_hidden(one_f, forward, share) + _hidden(one_b, backward, share))
    group, ranks = f["group"], f["ranks"]
    calls = np.where(b.broadcast, group, layers) * np.where(group < ranks, group / np.maximum(ranks, 1), 1.0)
    inside = f["group_gather_node"] > 0
    regather = np.where(f["shard"] >= 1, np.where(inside, f["group_gather_node"] / c["intra"], gather) + calls * latency, gather)
    reduction = reduce + latency * layers / 2
    once = _hidden(reduction, backward, share) + _hidden(regather, forward, share)
    return np.where(often, per_microbatch, once)
