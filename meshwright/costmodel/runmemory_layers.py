"""What one layer of a published run leaves for backward and needs while backward runs, in bytes per token of a tensor-parallel rank.

The counts are those of Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1), op by op, for today's layers too: with h the hidden
size, q and k the widths of all query and all key heads, f the width of the MLP, 16-bit values, two norms and two residual branches,

    engines with fused kernels         input and output of two norms 8h, queries 2q, keys and values 4k, attention 2q,
                                       MLP 6f (gate, up, product) or 4f (before and after GeLU), dropout masks 2h
    eager modules with an RMSNorm      the fp32 copy 4h, the scaled 2h and the output 2h of each norm; the gate's activation 2f more
    repeated keys and values           4q for 4k

so that a GPT layer keeps 34 h, as in that paper, and 5 bytes a score beside where scores are kept. Queries, keys, values and the MLP
divide by tensor-parallel ranks; norms, residuals and masks only under sequence parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.costmodel.layers import Layer
from meshwright.costmodel.rowmodel import Dims
from meshwright.costmodel.runs import Run

SCORE_B = 5.0  # bytes kept per attention score: 16-bit scores and softmax, dropout mask (Korthikanti et al. 2022, section 4.1)


@dataclass(frozen=True)
class Kept:
    """Bytes per token of one layer on one rank. `stays`: until its microbatch's backward, under the run's recompute. `whole`: the same
    without any recompute, what backward of one layer needs at once. `backward`: gradients beside them while one branch runs."""

    stays: float
    whole: float
    backward: float


def kept(run: Run, layer: Layer, light: bool = False) -> Kept:
    """What a layer of a run keeps. `light`: norms and activation functions are recomputed, where the engine can."""
    d, e = run.dims, run.engine
    h, q, k, f = d.hidden, d.heads * d.head_dim, d.kv_heads * d.head_dim, _width(d, layer)
    split, apart = 1.0 / run.tp, 1.0 / (run.tp if run.sp else 1)
    repeated = q if e.repeats_kv and e.attention != "unfused" else k
    wide = e.fusion == "eager" and d.gated and not d.experts
    norms = 16.0 * h if wide else 8.0 * h
    masks = 2.0 * h if e.masks else 0.0
    mlp = (8.0 if wide else 6.0 if d.gated else 4.0) * f
    attention = 4.0 * q + 4.0 * repeated
    scores = SCORE_B * d.heads * run.seq / run.tp / run.cp if e.attention == "unfused" else 0.0
    routed = layer.kept_routed * split
    if d.latent:  # as traced: low-rank projections and their norms; the residual inputs of both norms beside them
        norms, attention = layer.kept_whole + 4.0 * h, max(0.0, layer.kept_split - 6.0 * f)
    whole = (norms + masks) * apart + (attention + mlp) * split + scores + routed
    entry = 2.0 * h * apart
    backward = 4.0 * h * apart + (6.0 if d.gated else 4.0) * max(f, q) * split + (4.0 / SCORE_B) * scores + 0.5 * routed
    # 8-bit engines keep the 8-bit copies of norm outputs and of the MLP's product, and the attention's output in both
    saved = (4.0 * h * apart + 2.0 * f * split - q * split * 2) / 2 if run.low and e.cast_B <= 4 and not wide else 0.0
    whole -= max(0.0, saved)
    if run.recompute == "full":
        return Kept(entry, whole, backward)
    if run.recompute == "selective":
        if e.selective == "every second":
            return Kept(min(whole, entry + _every_second(run, layer)), whole, backward)
        return Kept(whole - scores, whole, backward)
    if light and e.light:  # outputs of two norms, the MLP's product and as much of the routed rows
        return Kept(whole - 4.0 * h * apart - (2.0 * f + layer.kept_routed / 3) * split, whole, backward)
    return Kept(whole, whole, backward)


def _width(d: Dims, layer: Layer) -> float:
    """Width of the MLP that every token takes: the dense one, or the shared experts."""
    if layer.expert_products:
        return float(d.shared * d.moe_ffn)
    return float(d.ffn)


def _every_second(run: Run, layer: Layer) -> float:
    """Outputs that the op policy saves: of the first, third, ... product of a layer, and of attention; without a compiler also the
    last product's, which nothing in backward reads (torchtitan, apply_ac: MUST_SAVE on every second aten.mm)."""
    outputs = [2.0 * p.n / (run.tp if p.split == "columns" or run.sp else 1) for p in layer.products]
    if run.engine.fusion == "compiled":
        outputs[-1] = 0.0
    return sum(outputs[::2]) + 2.0 * run.dims.heads * run.dims.head_dim / run.tp + layer.kept_routed / run.tp / 2
