"""Peak memory of a published run, closed form: states, activations in flight, logits and working buffers of the worst stage.

Activations per token come from the traced layer (rowmodel): what engines with fused kernels keep for backward. For a dense GPT layer
that is 34 bytes x hidden, plus 5 x heads x sequence bytes where scores are kept (Korthikanti et al. 2022, arXiv:2205.05198, eq. 1).
"""

from __future__ import annotations

import math

from meshwright.costmodel.features import features
from meshwright.costmodel.layers import Layer
from meshwright.costmodel.rowmodel import RowModel, build
from meshwright.costmodel.runs import Run

GIB = 2.0**30
SCORE_B = 5.0  # bytes kept per attention score: fp16 scores and softmax, dropout mask
LOGIT_B = 10.0  # 16-bit logits, fp32 copy and its gradient; 4 where the loss is chunked
WORK_B = 1.0 * GIB  # workspaces, communication buffers, fragmentation of a run that reports its own allocations
CONTEXT_B = 1.9 * GIB  # CUDA context and communicators, which only the driver sees
# what stays when norms, activation functions and up-projections of latent attention are recomputed, which costs little time: the
# inputs of products (Megatron Core, recompute_modules); taken where a run does not say and would not fit without
LIGHT_RECOMPUTE = 0.6
EIGHT_BIT_INPUTS = 0.6  # TransformerEngine keeps the 8-bit copies of the products' inputs
RESERVED = 1.2  # reserved by the caching allocator over allocated: 1.05 to 1.4 in published runs


def peak_bytes(run: Run, f: dict[str, float] | None = None) -> float:
    """Bytes that the run's own metric would show: allocated by the framework, or seen by the driver (nvidia-smi)."""
    f = features(run) if f is None else f
    allocated = _allocated(run, build(run.dims), f)
    if "recompute" in run.assumed and run.recompute == "none" and not fits(run, allocated + WORK_B):
        allocated = _allocated(run, build(run.dims), f, LIGHT_RECOMPUTE)
    driver = "smi" in run.memory_metric.lower() or "not stated" in run.memory_metric.lower()
    return allocated * RESERVED + CONTEXT_B if driver else allocated + WORK_B


def fits(run: Run, peak: float) -> bool:
    """Whether the run fits the device: half of the working buffers can be returned when memory is short."""
    return peak - WORK_B * 0.5 < run.device.memory_GiB * GIB


def _allocated(run: Run, model: RowModel, f: dict[str, float], share: float = 1.0) -> float:
    e, d = run.engine, run.dims
    kept, whole = (share * x for x in _kept(run, model))
    shards = f["group"] if run.shard else 1.0
    per_param = _state_bytes(run, shards)
    embedding = d.vocab * d.hidden / run.tp
    layer_params = max(0.0, (f["params"] * run.pp - model.embedding_params / run.tp) / d.layers + f["expert_params"] * run.pp / d.layers)
    flight = _in_flight(run)
    tokens = run.tokens
    logits = tokens * d.vocab / run.tp * (4.0 if e.loss_passes <= 4 else LOGIT_B)
    working = (whole * tokens if run.recompute == "full" else 0.0) + tokens * d.hidden * 8
    if run.shard == 3 and run.dp > 1:
        working += 2 * layer_params * 6  # two gathered layers: 16-bit weights, fp32 gradients before they are scattered
    single = run.pp == 1
    tables = 1.0 if d.tied else 2.0

    def stage(layers: float, table: float, share: float, loss: float) -> float:
        return (layers * layer_params + table * embedding) * per_param + share * layers * kept * tokens + loss + working

    if single:
        return stage(d.layers, tables, 1.0, logits)
    v_shape = run.schedule in ("v-half", "v-min", "zb-v", "dualpipe-v")
    first = stage(f["first"], 1.0 + v_shape, flight, logits if v_shape else 0.0)
    last = stage(f["last"], 0.0 if v_shape else 1.0, flight if v_shape else 1.0, 0.0 if v_shape else logits)
    second = stage(f["middle"], 0.0, max(1.0, flight * (1 - 1 / run.pp)), 0.0) if run.pp > 2 else 0.0
    return max(first, second, last)


def _state_bytes(run: Run, shards: float) -> float:
    """Bytes per local parameter: weights, gradients and optimiser states (Rajbhandari et al. 2020, section 5)."""
    e = run.engine
    if run.frozen:
        return (0.6 if run.quantised else e.weight_B) / (shards if run.shard == 3 else 1.0)
    if run.shard == 3:
        return (4.0 + 12.0 if e.state_B >= 12 else e.weight_B + e.gradient_store_B + e.state_B) / shards
    state = 0.0 if run.offload else e.state_B / shards
    return e.weight_B + e.gradient_store_B / (shards if run.shard == 2 else 1.0) + state


def _kept(run: Run, model: RowModel) -> tuple[float, float]:
    """Bytes per token of a mean layer that stay until backward, under the run's recompute and without any."""
    total = 0.0
    for layer, count in ((model.dense, model.dense_layers), (model.sparse, model.sparse_layers)):
        if layer is not None:
            total += _whole(run, layer) * count / run.dims.layers
    scores = SCORE_B * run.dims.heads * run.seq / run.tp / run.cp if run.engine.attention == "unfused" else 0.0
    whole = total + scores
    if run.low and run.engine.cast_B <= 4:
        whole *= EIGHT_BIT_INPUTS
    entry = 2 * run.dims.hidden / (run.tp if run.sp else 1)
    if run.recompute == "full":
        return entry, whole
    if run.recompute == "selective":
        return (0.5 * total if run.engine.selective == "every second" else total), whole
    return whole, whole


def _whole(run: Run, layer: Layer) -> float:
    return layer.kept_whole / (run.tp if run.sp else 1) + (layer.kept_split + layer.kept_routed) / run.tp


def _in_flight(run: Run) -> float:
    """Microbatches whose activations the first stage holds at once, in whole stages."""
    pp, m = run.pp, run.microbatches
    if run.schedule == "gpipe":
        return m
    if run.schedule == "zb-2p":
        return min(m, 2 * pp - 1)
    if run.schedule == "v-half":
        return min(m, math.ceil(0.55 * pp))
    if run.schedule == "v-min":
        return min(m, math.ceil(pp / 3) + 1)
    if run.schedule.startswith("dualpipe"):
        return min(m, pp + 1)
    if run.vpp > 1:
        return min(m, pp) * (1 + (pp - 1) / (pp * run.vpp))
    return min(m, pp)
