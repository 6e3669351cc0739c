"""A model's dimensions from the cells of a run; what is missing is inferred from the rest, or from its number of parameters."""

from __future__ import annotations

import re
from dataclasses import replace

from meshwright.costmodel.rowmodel import Dims
from meshwright.costmodel.spellings import Cells
from meshwright.profiling.errors import InputError


def dimensions(c: Cells, where: str, assumed: list[str]) -> Dims:
    """The model's dimensions; where they are missing, a model of usual proportions with as many parameters."""
    layers, hidden = c.count("layers"), c.count("hidden")
    total, active = _parameters(c)
    experts = c.count("n_experts") or 0
    if layers is None or hidden is None:
        if not total:
            raise InputError(f"{where}: the model's layers and hidden size are missing, and so is its number of parameters")
        assumed.append("dimensions")
        if not active and (c.count("ep") or 1) > 1:
            active = total / 10  # experts, of which large models since 2024 use 4 to 27 % a token
        return _of_size(total, active or total, c.count("vocab"))
    heads = c.count("heads") or max(1, hidden // 128)
    head_dim = c.count("head_dim") or max(1, hidden // heads)
    kv = c.count("kv_heads") or heads
    gated = c.flag("gated_mlp")
    if gated is None:
        ffn_cell = c.count("ffn_hidden")
        gated = bool(experts) or (ffn_cell is not None and ffn_cell != 4 * hidden)
        assumed.append("gated_mlp")
    ffn = c.count("ffn_hidden") or (c.count("moe_ffn_hidden") or 0 if experts else 0) or (4 * hidden if not gated else _round(8 * hidden / 3, 256))
    vocab = c.count("vocab")
    if vocab is None:
        assumed.append("vocab")
        vocab = 50304 if not gated else 32000
    tied = c.flag("tied_embeddings")
    d = Dims(layers, hidden, ffn, heads, kv if heads % kv == 0 else heads, head_dim, vocab, gated, bool(tied if tied is not None else not gated))
    if not experts:
        return d
    top_k = c.count("top_k") or 2
    # Latent attention has no key-value heads of its own: many experts, and as many key-value heads as heads.
    latent = experts >= 64 and kv == heads and heads >= 32
    d = replace(d, experts=experts, top_k=min(top_k, experts), moe_ffn=c.count("moe_ffn_hidden") or ffn, latent=latent)
    return _mixture(d, total, active)


def _mixture(d: Dims, total: float | None, active: float | None) -> Dims:
    """Shared experts and first dense layers, from the published counts of parameters (whole numbers that fit them best)."""
    expert = 3 * d.hidden * d.moe_ffn
    attention = _latent_params(d) if d.latent else d.hidden * d.head_dim * (2 * d.heads + 2 * d.kv_heads)
    base = d.vocab * d.hidden * (1 if d.tied else 2) + d.layers * attention
    shared = dense = 0
    if d.latent:
        shared = 1
    elif active:
        shared = min(4, max(0, round((active - base - d.layers * d.top_k * expert) / (d.layers * expert) - 0.25)))
    if total and d.ffn != d.moe_ffn:
        whole = base + d.layers * (d.experts + shared) * expert
        saved = (d.experts + shared) * expert - 3 * d.hidden * d.ffn
        dense = min(4, max(0, round((whole - total) / max(saved, 1)))) if abs(whole - total) < 0.2 * total else 0
    return replace(d, shared=shared, dense_first=dense)


def _latent_params(d: Dims) -> float:
    """DeepSeek-V3's attention: ranks 1536 and 512, 128 + 64 dimensions a head."""
    return d.hidden * (1536 + 576) + 1536 * d.heads * 192 + 512 * d.heads * 256 + d.heads * 128 * d.hidden


def _parameters(c: Cells) -> tuple[float | None, float | None]:
    """Total and active parameters from their cells, or from a name like "30B-A3B"."""
    total, active = c.number("n_params_total"), c.number("n_params_active")
    match = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)\s*([bm])(?![a-z])(?:-a(\d+(?:\.\d+)?)b)?", c.text("model").lower())
    if match:
        unit = 1e9 if match[2] == "b" else 1e6
        total = total or float(match[1]) * unit
        active = active or (float(match[3]) * 1e9 if match[3] else None)
    return total or None, active or None


def _round(x: float, to: int) -> int:
    return max(to, round(x / to) * to)


def _of_size(total: float, active: float, vocab: int | None) -> Dims:
    """A gated decoder with `active` parameters (hidden = 128 x layers), and experts for the rest. Hoffmann et al. 2022, table A9."""
    words = vocab or 128256
    best = min(
        (Dims(n, 128 * n, _round(128 * n * 3.5, 256), n, max(1, n // 4) if n % 4 == 0 else n, 128, words, True, False) for n in range(8, 161)),
        key=lambda d: abs(dense_parameters(d) - active),
    )  # fmt: skip
    if not 0.5 < dense_parameters(best) / active < 2:
        raise InputError(f"no decoder of {total:.3g} parameters is like the known ones: give the model's layers and hidden size")
    if total < 1.3 * active:
        return best
    width = _round(best.hidden / 2.5, 128)
    top_k = max(1, round(best.ffn / width))
    return replace(best, experts=max(top_k, round((total - active) / (3 * best.hidden * width * best.layers)) + top_k), top_k=top_k, moe_ffn=width)


def dense_parameters(d: Dims) -> float:
    """Parameters of a dense model."""
    layer = d.hidden * d.head_dim * (2 * d.heads + 2 * d.kv_heads) + (3 if d.gated else 2) * d.hidden * d.ffn
    return d.layers * layer + d.vocab * d.hidden * (1 if d.tied else 2)
