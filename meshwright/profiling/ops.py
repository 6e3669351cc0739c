"""Opaque ops for tracing: attention and the selective scan each as one node, whatever backend a real run picks.

On meta tensors torch decomposes attention into batched products and a softmax that saves a sequence x sequence matrix, and
transformers' Mamba unrolls its scan over the sequence. Neither is what runs. These ops carry shapes, what is saved for
backward, and nothing else: calling one with real data is an error.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "meshwright"
HF_ATTENTION = "meshwright_traced"


def _only_shapes(name: str) -> RuntimeError:
    return RuntimeError(f"{NAMESPACE}::{name} stands for shapes while tracing and computes nothing")


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> tuple[Tensor, Tensor]:
    """softmax(q k^T) v for q [b, h, s, d], k [b, g, t, d], v [b, g, t, e]: output [b, h, s, e] and log-sum-exp [b, h, s]."""
    raise _only_shapes("attention")


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> tuple[Tensor, Tensor]:
    # Flash kernels write [b, s, h, e]; the transpose back is a view, so that the model's own .contiguous() copies nothing.
    out = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3], v.shape[-1])).transpose(-3, -2)
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raise _only_shapes("attention_backward")


@attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_mask = torch.empty_like(mask) if mask is not None and mask.is_floating_point() else q.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), of_mask


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.causal, _ = inputs
    ctx.save_for_backward(q, k, v, mask, *output)


def _attention_autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, mask, out, lse = ctx.saved_tensors
    dq, dk, dv, dmask = attention_backward(grad, q, k, v, mask, out, lse, ctx.causal)
    return dq, dk, dv, dmask if mask is not None and mask.is_floating_point() else None, None, None


attention.register_autograd(_attention_autograd, setup_context=_attention_setup)


@torch.library.custom_op(f"{NAMESPACE}::selective_scan", mutates_args=())
def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Mamba's scan for x, dt [batch, d, length], a [d, n], b, c [batch, n, length]: output [batch, d, length]."""
    raise _only_shapes("selective_scan")


@selective_scan.register_fake
def _(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(f"{NAMESPACE}::selective_scan_backward", mutates_args=())
def selective_scan_backward(grad: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    raise _only_shapes("selective_scan_backward")


@selective_scan_backward.register_fake
def _(grad: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(dt), torch.empty_like(a), torch.empty_like(b), torch.empty_like(c)


def _scan_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _scan_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return selective_scan_backward(grad, *ctx.saved_tensors)


selective_scan.register_autograd(_scan_autograd, setup_context=_scan_setup)


@torch.library.custom_op(f"{NAMESPACE}::nll", mutates_args=())
def nll(log_probs: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood for log_probs [n, classes, ...]. torch's own has no gradient on meta tensors."""
    raise _only_shapes("nll")


@nll.register_fake
def _(log_probs: Tensor, target: Tensor) -> Tensor:
    return log_probs.new_empty(())


@torch.library.custom_op(f"{NAMESPACE}::nll_backward", mutates_args=())
def nll_backward(grad: Tensor, log_probs: Tensor, target: Tensor) -> Tensor:
    raise _only_shapes("nll_backward")


@nll_backward.register_fake
def _(grad: Tensor, log_probs: Tensor, target: Tensor) -> Tensor:
    return torch.empty_like(log_probs)


def _nll_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _nll_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return nll_backward(grad, *ctx.saved_tensors), None


nll.register_autograd(_nll_autograd, setup_context=_nll_setup)


@torch.library.custom_op(f"{NAMESPACE}::grouped_linear", mutates_args=())
def grouped_linear(input: Tensor, weights: list[Tensor], biases: list[Tensor], offs: Tensor) -> Tensor:
    """The linear layers [n, k] of as many experts on rows [m, k] that are sorted by expert, which end at `offs`: output [m, n]."""
    raise _only_shapes("grouped_linear")


@grouped_linear.register_fake
def _(input: Tensor, weights: list[Tensor], biases: list[Tensor], offs: Tensor) -> Tensor:
    return input.new_empty(input.shape[0], weights[0].shape[0])


@torch.library.custom_op(f"{NAMESPACE}::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(
    grad: Tensor, input: Tensor, weights: list[Tensor], biases: list[Tensor], offs: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    raise _only_shapes("grouped_linear_backward")


@grouped_linear_backward.register_fake
def _(
    grad: Tensor, input: Tensor, weights: list[Tensor], biases: list[Tensor], offs: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return torch.empty_like(input), [torch.empty_like(w) for w in weights], [torch.empty_like(b) for b in biases]


def _grouped_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weights, biases, offs = inputs
    ctx.experts = len(weights)
    ctx.save_for_backward(input, offs, *weights, *biases)


def _grouped_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, offs, *params = ctx.saved_tensors
    weights, biases = params[: ctx.experts], params[ctx.experts :]
    return *grouped_linear_backward(grad, input, weights, biases, offs), None


grouped_linear.register_autograd(_grouped_autograd, setup_context=_grouped_setup)


@register_flop_formula([torch.ops.meshwright.grouped_linear])
def _grouped_linear_flops(input: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    """Every row meets one expert."""
    return int(2 * input[0] * weights[0][0] * weights[0][1])


@register_flop_formula([torch.ops.meshwright.grouped_linear_backward])
def _grouped_linear_backward_flops(grad: Any, input: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _grouped_linear_flops(input, weights)


@register_flop_formula([torch.ops.meshwright.attention])
def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """Two products over the full (not causal) score matrix, as torch counts scaled_dot_product_attention."""
    b, h, s, d = q
    t, e = v[-2], v[-1]
    return int(2 * b * h * s * t * (d + e))


@register_flop_formula([torch.ops.meshwright.attention_backward])
def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """The scores again, then the gradients of p, v, q and k: five products (three of width d, two of width e)."""
    b, h, s, d = q
    t, e = v[-2], v[-1]
    return int(2 * b * h * s * t * (3 * d + 2 * e))


@register_flop_formula([torch.ops.meshwright.selective_scan])
def _scan_flops(x: Any, dt: Any, a: Any, *args: Any, **kwargs: Any) -> int:
    """The contraction of the state [d, n] with c at each step; the recurrence itself is elementwise."""
    batch, d, length = x
    return int(2 * batch * d * a[-1] * length)


@register_flop_formula([torch.ops.meshwright.selective_scan_backward])
def _scan_backward_flops(grad: Any, x: Any, dt: Any, a: Any, *args: Any, **kwargs: Any) -> int:
    batch, d, length = x
    return int(4 * batch * d * a[-1] * length)


def hf_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers: one scaled_dot_product_attention node, causal without a mask tensor.

    Registered with no mask function, so that transformers neither probes the batch for packed sequences nor makes a
    sequence x sequence mask.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if position_bias is not None:  # T5: a learned bias is a mask of its own, with causality written into it
        lower = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        lowest = torch.finfo(query.dtype).min
        bias = torch.where(lower, position_bias, lowest) if causal else position_bias
        attention_mask = bias if attention_mask is None else bias + attention_mask
    out = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=attention_mask is None and query.shape[2] > 1 and causal,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


def _traced_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **_: Any,
) -> Tensor:
    """transformers' mamba_selective_scan with its loop over the sequence as one op."""
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = nn.functional.softplus(dt)
    out = torch.ops.meshwright.selective_scan(x, dt, a, b, c)
    if D is not None:
        out = out + x * D[None, :, None]
    return out if z is None else out * nn.functional.silu(z)


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """While it is open, a model takes the paths that can be traced on meta tensors.

    Lists of experts as grouped products; in transformers models attention as one op, experts as grouped products in any dtype, Mamba's
    scan as one op. Other modules are untouched.
    """
    with ExitStack() as stack:
        stack.enter_context(grouped_experts(model))
        if not hasattr(model, "set_attn_implementation"):
            yield
            return
        for patch in _experts_patches() + _scan_patches(model):
            stack.enter_context(patch)
        stack.callback(_use_traced_attention(model))
        yield


def expert_list(module: nn.Module) -> nn.ModuleList | None:
    """The equal experts of a module forward(hidden [T, H], top_k_index [T, k], top_k_weights [T, k]) -> [T, H]; None for another one.

    They are all that it has parameters in, and theirs are those of linear layers. What it computes is, for each token, the sum of its
    experts' results by weight.
    """
    names = [p.name for p in inspect.signature(module.forward).parameters.values()]
    lists = [m for m in module.children() if isinstance(m, nn.ModuleList) and len(m) > 1]
    if names[1:] != ["top_k_index", "top_k_weights"] or len(lists) != 1:
        return None
    experts = lists[0]
    shapes = [[(type(e), n, p.shape) for n, p in e.named_parameters()] for e in experts]
    linear = sum(p.numel() for m in experts.modules() if isinstance(m, nn.Linear) for p in m.parameters())
    alike = all(s == shapes[0] for s in shapes) and sum(p.numel() for p in module.parameters()) == linear > 0
    return experts if alike else None


@contextmanager
def grouped_experts(model: nn.Module) -> Iterator[None]:
    """While it is open, lists of experts (expert_list) are grouped products, whose shapes do not depend on the router."""
    with ExitStack() as stack:
        for module in model.modules():
            experts = expert_list(module)
            if experts is not None:
                stack.enter_context(mock.patch.object(module, "forward", partial(_grouped_experts, experts)))
        yield


def _grouped_experts(experts: nn.ModuleList, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Tokens sorted by expert, one expert's own code on all of them with its linear layers grouped, and the weighted sum."""
    ids, order = top_k_index.reshape(-1).sort()
    counts = torch.histc(ids.float(), bins=len(experts), min=0, max=len(experts) - 1)
    offs = counts.cumsum(0, dtype=torch.int32)
    with ExitStack() as stack:
        # no calls of submodules: all ops belong to the module of the experts
        stack.enter_context(mock.patch.object(nn.Module, "__call__", lambda m, *args, **kwargs: m.forward(*args, **kwargs)))
        for path, m in experts[0].named_modules():
            if isinstance(m, nn.Linear):
                every = [e.get_submodule(path) for e in experts]
                stack.enter_context(mock.patch.object(m, "forward", partial(_grouped, every, offs)))
        out = experts[0].forward(hidden[order // top_k_index.shape[-1]])
    out = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    return out[back].view(*top_k_index.shape, hidden.shape[-1]).sum(1).to(hidden.dtype)


def _grouped(layers: list[Any], offs: Tensor, x: Tensor) -> Tensor:
    biases = [m.bias for m in layers if m.bias is not None]
    return torch.ops.meshwright.grouped_linear(x, [m.weight for m in layers], biases, offs)  # type: ignore[no-any-return]


def _use_traced_attention(model: Any) -> Callable[[], None]:
    from transformers import AttentionInterface

    AttentionInterface.register(HF_ATTENTION, hf_attention)
    before = model.config._attn_implementation
    if not getattr(model, "_supports_sdpa", False):
        return lambda: None  # no attention to trace (Mamba), or only its own code, which is traced as it is
    model.set_attn_implementation(HF_ATTENTION)
    return lambda: model.set_attn_implementation(before)


def _experts_patches() -> list[Any]:
    """transformers' grouped product refuses float32 on meta; its fallback op takes any dtype and has the same shapes."""
    try:
        from transformers.integrations import moe
    except ImportError:
        return []
    if not hasattr(moe, "_can_use_grouped_mm"):
        return []
    return [mock.patch.object(moe, "_can_use_grouped_mm", return_value=False)]


def _scan_patches(model: nn.Module) -> list[Any]:
    import sys

    modules = {sys.modules[type(m).__module__] for m in model.modules()}
    return [mock.patch.object(module, "mamba_selective_scan", _traced_scan) for module in modules if hasattr(module, "mamba_selective_scan")]


def _register_grouped_flops() -> None:
    """FLOPs of transformers' grouped product, which torch's counter knows nothing of: every row meets one expert."""

    def formula(rows: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
        return int(2 * rows[0] * weight[-2] * weight[-1])

    def backward(rows: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * formula(rows, weight)

    from torch.utils.flop_counter import flop_registry

    ops: list[tuple[Any, Any]] = [(getattr(torch.ops.aten, "_grouped_mm", None), formula)]
    namespace = torch.ops.transformers
    ops.append((getattr(namespace, "grouped_mm_fallback", None), formula))
    ops.append((getattr(namespace, "grouped_mm_fallback_backward", None), backward))
    for packet, f in ops:
        if packet is not None and packet not in flop_registry:
            register_flop_formula([packet])(f)


def register_flops() -> None:
    """Adds the formulas that torch's FlopCounterMode lacks (grouped products of experts)."""
    with contextlib.suppress(ImportError):
        import transformers.integrations.moe  # noqa: F401
    _register_grouped_flops()
