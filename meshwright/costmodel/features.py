"""What one run computes, moves and launches, once per run: the numbers that the step model combines with its constants.

Seconds are those of isolated ops on the run's device (opprices). A microbatch has `T` tokens on each tensor-parallel rank; a layer is
the mean over the model's layers. Backward is split into input gradients (dgrad) and weight gradients (wgrad).
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import lru_cache

import numpy as np

from meshwright.costmodel.layers import Layer, Product
from meshwright.costmodel.opprices import OpPrices, granularity, misaligned
from meshwright.costmodel.rowmodel import RowModel, build
from meshwright.costmodel.runs import Run

ATTENTION_BACKWARD = 2.5 / 0.85  # five products for two (Dao 2023, arXiv:2307.08691), at 0.85 of the forward rate
FA1 = 0.62  # FlashAttention-1 over FlashAttention-2 (Dao 2023, figure 4)
BEFORE_HOPPER = 0.60  # FlashAttention-2 over FlashAttention-3 on Hopper (Shah et al. 2024, arXiv:2407.08608, figure 5)
# bytes per attention score beside the products: softmax reads and writes it, and its backward reads two and writes one; dropout adds
# the same and a mask
SOFTMAX_B, DROPOUT_B = (4.0, 6.0), (5.0, 5.0)
NODE_LATENCY_S, RANK_LATENCY_S = 8e-6, 1.2e-6  # one ring step across nodes; per rank of a collective
LOW_EXPERTS = {"A100": 1.0, "H100": 1.35, "B200": 1.6}
EMBEDDING_PASSES = 4  # gather, add and their backward


@lru_cache(maxsize=256)
def _prices(device) -> OpPrices:  # type: ignore[no-untyped-def]
    return OpPrices(device)


def features(run: Run) -> dict[str, float]:
    """All numbers of one run, by name. InputError if its dimensions make no model."""
    model = build(run.dims)
    f: dict[str, float] = defaultdict(float)
    for layer, count in ((model.dense, model.dense_layers), (model.sparse, model.sparse_layers)):
        if layer is not None and count:
            for name, value in _layer(run, layer).items():
                f[name] += value * count / run.dims.layers
    f |= _head(run, model)
    f |= _stages(run)
    f |= _traffic(run, model)
    f |= {"layers": run.dims.layers, "pp": run.pp, "vpp": run.vpp, "microbatches": run.microbatches, "tokens": run.tokens}
    return dict(f)


def _layer(run: Run, layer: Layer) -> dict[str, float]:
    d, e, o = run.device, run.engine, _prices(run.device)
    f: dict[str, float] = defaultdict(float)
    tp, tokens = run.tp, run.tokens
    weights = 0.0 if run.frozen else 1.0
    kernels = float(layer.traffic[e.fusion].kernels)
    routed_kernels = 0.0
    for p in layer.products:
        narrow = p.split == "none" and p.n == run.dims.experts  # a router stays in 16 bits
        _product(f, o, run, tokens, p, tp if not narrow else 1, run.rate if not narrow else 1.0, weights)
        if run.low and not narrow:
            kernels += 3  # casts of the input and of its transpose, and their scales
    if layer.expert_products:
        routed_kernels = float(layer.traffic[e.fusion].routed_kernels)
        kernels -= routed_kernels
        routed_kernels += _experts(f, o, run, layer, weights)
    _attention(f, o, run, layer)
    t = layer.traffic[e.fusion]
    spread = tp if run.sp else 1
    back = layer.backward_over_forward if e.fusion == "eager" else 2.0
    heavy = len(layer.products) + 1
    f["pointwise_f"] = tokens * (t.whole / spread + t.split / tp) / d.memory_Bps + max(0, t.kernels - t.routed_kernels - heavy) * o.launch_s
    f["pointwise_e_f"] = tokens * t.routed / tp / d.memory_Bps + max(0, t.routed_kernels - len(layer.expert_products)) * o.launch_s
    f["pointwise_b"], f["pointwise_e_b"] = f["pointwise_f"] * back, f["pointwise_e_f"] * back
    f["kernels_f"], f["kernels_e_f"] = kernels, routed_kernels
    f["row_products"] = layer.row_products
    if tp > 1:
        latency, seconds = _tensor_parallel(run, o, tokens * run.dims.hidden * 2)
        f["tp"], f["tp_calls"] = layer.row_products * (seconds + latency), layer.row_products
    _context(f, run, layer)
    return f


def _product(f: dict[str, float], o: OpPrices, run: Run, tokens: float, p: Product, tp: int, rate: float, weights: float) -> None:
    """One product forward, dgrad and wgrad: isolated seconds, and what misalignment adds at a constant of 1."""
    n, k = p.n / (tp if p.split == "columns" else 1), p.k / (tp if p.split == "rows" else 1)
    m, nn, kk = np.array([tokens, tokens, n]), np.array([n, k, k]), np.array([k, n, tokens])
    seconds = o.gemm(m, nn, kk, rate) * np.array([1, 1, weights])
    off = misaligned(nn, kk)
    for phase, s, x in zip("fdw", seconds, seconds * off, strict=True):
        f[f"gemm_{phase}"] += s
        f[f"off_{phase}"] += x
    if p.split == "rows":
        f["last_f"] = float(seconds[0])  # what a checkpoint that stops early does not repeat
    if rate > 1:
        f["cast_f"] += run.engine.cast_B * tokens * k / run.device.memory_Bps
        f["cast_b"] += run.engine.cast_B * tokens * n / run.device.memory_Bps


def _experts(f: dict[str, float], o: OpPrices, run: Run, layer: Layer, weights: float) -> float:
    """Grouped products of the local experts, dispatch and combine. Returns the kernels of one forward."""
    d, e = run.dims, run.engine
    local = max(1.0, d.experts / run.ep)
    mine = run.tokens * run.etp / run.tp  # tensor-parallel ranks share the tokens of the experts' part
    rows = max(1.0, mine * d.top_k / local)
    grouped = e.grouped_experts == "yes" or (e.grouped_experts == "blackwell" and run.device.table == "B200" and run.low)
    # without a grouped kernel of its own, a low precision gains less: fused MoE operators reach 1.35 (Hopper) and 1.6 (Blackwell)
    # times their 16-bit rate at 8 bits (same operator tables as opprices)
    rate = run.rate if grouped else min(run.rate, LOW_EXPERTS[run.device.table] * max(1.0, run.rate / 2))
    for p in layer.expert_products:
        n, k = (p.n / run.etp, float(p.k)) if p.n != d.hidden else (float(p.n), p.k / run.etp)
        # tiles of all experts fill the device together: one grouped kernel, or a GEMM per expert on several streams
        m, nn, kk = np.array([rows * local, rows * local, n * local]), np.array([n, k, k]), np.array([k, n, rows])
        seconds = o.gemm(m, nn, kk, rate, launch=False) * np.array([1, 1, weights])
        for phase, s in zip("fdw", seconds, strict=True):
            f[f"grouped_{phase}" if grouped else f"experts_{phase}"] += float(s)
        if run.low:
            fused = grouped and p.k != d.hidden  # quantised where the activation is computed
            f["cast_e_f"] += 0.0 if fused else e.cast_B * rows * local * k / run.device.memory_Bps
            f["cast_e_b"] += 0.0 if fused else e.cast_B * rows * local * n / run.device.memory_Bps
    if run.ep > 1:
        latency, bandwidth = o.bus("all_to_all", 8)
        sent = mine * d.hidden * (3.0 if run.low else 4.0)  # dispatch in 8 bits where compute is, combine in 16
        ranks = run.ep * (1 - (1 - 1 / run.ep) ** d.top_k)  # distinct ranks that a token's experts are on
        ranks = ranks if e.sends_once else float(d.top_k)
        nodes = max(1.0, run.ep * run.etp / run.per_node)
        away = nodes * (1 - (1 - 1 / nodes) ** d.top_k) * (nodes - 1) / nodes
        f["a2a_node"] = ranks * (run.ep - 1) / run.ep * sent / bandwidth * (run.device.node_link_Bps / run.node_link_Bps)
        f["a2a_net"] = away * sent / run.network_Bps
        f["a2a_latency"] = 2 * latency
    if grouped:
        return 0.0
    blocks = "mx" in run.precision or "4" in run.precision or run.device.table == "H100"  # scales per block: two layouts and their scales
    each_expert = 2.0 * (1 + (0 if not run.low else 3 if blocks else 1))
    return local * each_expert


def _attention(f: dict[str, float], o: OpPrices, run: Run, layer: Layer) -> None:
    d, e = run.device, run.engine
    width = (layer.qk_dim + layer.v_dim) / 2
    heads = max(1.0, layer.heads / run.tp)
    flops = 2 * run.micro_batch * heads * float(run.seq) ** 2 * width / run.cp  # the causal half of 4 S^2 d
    tiles = float(granularity(np.array(layer.qk_dim)))
    if e.attention == "unfused":
        scores = run.micro_batch * heads * float(run.seq) ** 2 / run.cp
        slow = 8.0 if tiles < 8 else 1.0  # off the tensor cores
        compute = 2 * flops / d.peak_flops
        memory = scores * 4 / d.memory_Bps
        f["scores_c_f"], f["scores_c_b"] = compute * slow + memory, 2 * (compute * slow + memory)
        f["scores_off_f"], f["scores_off_b"] = (
            (0.0, 0.0) if tiles < 8 else (compute * math.log2(64 / tiles) / 3, 2 * compute * math.log2(64 / tiles) / 3)
        )
        for phase, softmax, dropout in zip("fb", SOFTMAX_B, DROPOUT_B, strict=True):
            f[f"scores_m_{phase}"] = scores * (softmax + dropout * e.dropout) / d.memory_Bps
        return
    era = (FA1 if e.attention == "fa1" else 1.0) * (BEFORE_HOPPER if e.attention in ("fa1", "fa2") and d.table != "A100" else 1.0)
    f["flash_f"] = o.attention(flops / era, run.seq, layer.qk_dim)
    f["flash_b"] = f["flash_f"] * ATTENTION_BACKWARD
    f["flash_f"], f["flash_b"] = f["flash_f"] / d.softmax[0], f["flash_b"] / d.softmax[1]


def _tensor_parallel(run: Run, o: OpPrices, nbytes: float) -> tuple[float, float]:
    """(latency, seconds) of one all-reduce, or of its reduce-scatter and all-gather, of `nbytes`."""
    tp = run.tp
    latency, bandwidth = o.bus("all_reduce", tp)
    bandwidth *= run.node_link_Bps / run.device.node_link_Bps
    if tp > run.per_node:
        bandwidth = min(bandwidth, run.per_node * run.network_Bps)
    return latency, nbytes * 2 * (tp - 1) / tp / bandwidth


def _context(f: dict[str, float], run: Run, layer: Layer) -> None:
    """Keys and values go round the ring of context-parallel ranks beside attention (Liu et al. 2023, arXiv:2310.01889)."""
    if run.cp == 1:
        return
    moved = 2 * 2 * layer.kv_heads * layer.v_dim / run.tp * run.tokens * (run.cp - 1)
    inside = run.tp * run.cp <= run.per_node
    f["cp_node" if inside else "cp_net"] = moved / (run.node_link_Bps * 0.7 if inside else run.network_Bps)


def _head(run: Run, model: RowModel) -> dict[str, float]:
    """The language-model head, its loss and the embedding, forward and backward."""
    d, o, tokens = run.dims, _prices(run.device), run.tokens
    f: dict[str, float] = defaultdict(float)
    g: dict[str, float] = defaultdict(float)
    _product(g, o, run, tokens, Product(d.vocab, d.hidden, "columns"), run.tp, 1.0, 0.0 if run.frozen else 1.0)
    f["head_f"], f["head_b"] = g["gemm_f"], g["gemm_d"] + g["gemm_w"]
    f["head_off_f"], f["head_off_b"] = g["off_f"], g["off_d"] + g["off_w"]
    passes = tokens * d.vocab / run.tp * 4 * run.engine.loss_passes / run.device.memory_Bps
    f["loss_f"], f["loss_b"] = 0.35 * passes, 0.65 * passes
    f["embedding"] = tokens * d.hidden * 2 * EMBEDDING_PASSES / run.device.memory_Bps
    return f


def _stages(run: Run) -> dict[str, float]:
    """Layers of the first, a middle and the last stage. Where the layers do not divide, embedding and head count as a
    layer each if they then do; else stages are filled from the front and the last, with the head, takes what is left (the greedy
    partition that minimises the largest stage, as deepspeed.runtime.utils.partition_balanced)."""
    layers, slots = run.dims.layers, run.pp * run.vpp
    if run.pp == 1:
        return {"first": layers, "middle": layers, "last": layers}
    middle: float = math.ceil(layers / slots - 1e-9) * run.vpp
    if layers % slots == 0:
        return {"first": middle, "middle": middle, "last": middle}
    if (layers + 2) % slots == 0:
        return {"first": middle - 1, "middle": middle, "last": middle - 1}
    if (layers + 1) % slots == 0:
        return {"first": middle, "middle": middle, "last": middle - 1}
    if run.vpp > 1:
        return {"first": layers / run.pp, "middle": layers / run.pp, "last": layers / run.pp}
    return {"first": middle, "middle": middle, "last": max(0.0, layers - (run.pp - 1) * middle)}


def _traffic(run: Run, model: RowModel) -> dict[str, float]:
    """Parameters of a rank, and seconds of the data-parallel collectives at the links' full rate."""
    d, tp, pp = run.dims, run.tp, run.pp
    f: dict[str, float] = {}
    dense = experts = 0.0
    for layer, count in ((model.dense, model.dense_layers), (model.sparse, model.sparse_layers)):
        if layer is not None:
            dense += count * (layer.split_params / tp + layer.whole_params)
            experts += count * layer.expert_params
    dense = (dense + model.embedding_params / tp) / pp
    experts = experts / (run.ep * run.etp * pp)
    if run.schedule == "dualpipe":
        dense, experts = 2 * dense, 2 * experts
    ranks = run.dp * run.cp
    expert_ranks = max(1.0, run.n_gpus / (run.etp * run.ep * pp))
    frozen = 0.0 if run.frozen else 1.0
    f["params"], f["expert_params"] = dense, experts
    gradient = run.engine.gradient_B * frozen
    latency = _ring_latency(run, ranks)
    f["gather"] = 2 * (_ring(run, dense, ranks, tp) + _ring(run, experts, expert_ranks, run.ep * run.etp))
    f["gather_net"] = 2 * (_ring(run, dense, ranks, tp, True) + _ring(run, experts, expert_ranks, run.ep * run.etp, True))
    f["reduce"] = gradient / 2 * f["gather"]
    f["reduce_net"] = gradient / 2 * f["gather_net"]
    f["ring_latency"] = latency
    group = run.shard_group if run.shard else 1.0
    f["shard"], f["group"], f["ranks"] = run.shard, group, ranks
    f["group_gather_node"] = 2 * dense / run.node_link_Bps / 0.7 if 1 < group < ranks and group <= run.per_node else 0.0
    shards = group if run.shard else 1.0
    expert_shards = min(group, expert_ranks) if run.shard else 1.0
    f["optimizer"] = (dense / shards + experts / expert_shards) * run.engine.optimizer_B * frozen / run.device.memory_Bps
    f["accumulate"] = (dense + experts) * frozen / run.device.memory_Bps  # seconds per byte and parameter
    hop_inside = tp * run.cp * run.dp * pp <= run.per_node
    part = run.tokens * d.hidden * 2 / (tp if run.sp else 1)
    f["hop_node"], f["hop_net"] = (part / run.node_link_Bps / 0.7, 0.0) if hop_inside else (0.0, part / run.network_Bps)
    return f


def _ring(run: Run, params: float, ranks: float, inner: int, network: bool = False) -> float:
    """Seconds per byte of an element to send `params` elements round `ranks`, of which the devices of a node share its links.

    Inside a node at the NCCL rate of its link, across nodes at the sum of the node's network ports."""
    if ranks <= 1:
        return 0.0
    per_node = min(max(1.0, run.per_node // inner), ranks)
    spans = ranks > max(1, run.per_node // inner)
    if network:
        return params * (ranks - 1) / ranks / (per_node * run.network_Bps) if spans else 0.0
    _, bandwidth = _prices(run.device).bus("all_gather", 8)
    bandwidth *= run.node_link_Bps / run.device.node_link_Bps
    return params * (ranks - 1) / ranks / bandwidth if per_node > 1 else 0.0


def _ring_latency(run: Run, ranks: float) -> float:
    if ranks <= 1:
        return 0.0
    per_node = min(max(1, run.per_node // run.tp), ranks)
    return math.ceil(ranks / per_node) * NODE_LATENCY_S + ranks * RANK_LATENCY_S
