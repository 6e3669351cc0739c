"""Attention of some queries to some keys with its log-sum-exp, so that blocks can be merged, and its backward with that of all blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_aten = torch.ops.aten


def _kernel(q: Tensor) -> str:
    if q.device.type == "cpu":
        return "cpu"
    return "flash" if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) else "math"


def block(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, ...]:
    """softmax(q k^T scale) v with its log-sum-exp [B, H, S] in fp32, and what else the backward takes. q [B, H, S, D], k and v [B, K, T, .]."""
    kernel, width = _kernel(q), v.shape[-1]
    if kernel == "math":
        return _math(q, k, v, causal, scale)
    q, k, v = _same_width(kernel, q, k, v)
    if kernel == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out[..., :width], lse
    out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out[..., :width], lse, seed, offset


def block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: Sequence[Tensor], causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's part of the gradients of q, k and v; `out`, `lse` and `grad` are those of all blocks, `state` is of any."""
    kernel, widths = _kernel(q), (q.shape[-1], k.shape[-1], v.shape[-1])
    if kernel == "math":
        return _math_backward(grad, q, k, v, out, lse, causal, scale)
    q, k, v, grad, out = _same_width(kernel, q, k, v, grad, out)
    if kernel == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
    else:
        sizes = (None, None, q.shape[2], k.shape[2])
        lse = lse.contiguous()
        grads = _aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, out, lse, *sizes, 0.0, causal, *state, scale=scale)
    dq, dk, dv = (g[..., :width] for g, width in zip(grads, widths, strict=True))
    return dq, dk, dv


def _same_width(kernel: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Padded with zeros to one width, which changes no product; the GPU's kernel wants a multiple of 8."""
    width = max(x.shape[-1] for x in tensors)
    width += -width % 8 if kernel == "flash" else 0
    return tuple(x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores


def _math(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    repeats = q.shape[1] // k.shape[1]
    q, k, v = q.float(), k.float().repeat_interleave(repeats, 1), v.float().repeat_interleave(repeats, 1)
    scores = _scores(q, k, causal, scale)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _math_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads = k.shape[1]
    repeats = q.shape[1] // heads
    q, k, v = q.float(), k.float().repeat_interleave(repeats, 1), v.float().repeat_interleave(repeats, 1)
    grad, out = grad.float(), out.float()
    p = (_scores(q, k, causal, scale) - lse.unsqueeze(-1)).exp()
    ds = p * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * scale
    dk, dv = (x.unflatten(1, (heads, repeats)).sum(2) for x in (ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad))
    return ds @ k, dk, dv
