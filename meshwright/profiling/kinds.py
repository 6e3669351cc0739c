"""What each aten op is to the cost model: its kind, and the dimensions that cost it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meshwright.profiling.graph import Kind

# By operator name, without namespace and overload. Anything tagged pointwise by torch is pointwise without being listed.
NAMES: dict[Kind, str] = {
    "matmul": "linear matmul mm addmm bmm baddbmm einsum bilinear",
    "attention": "scaled_dot_product_attention attention",
    "experts": "_grouped_mm grouped_mm_fallback grouped_linear",
    "conv": "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d _convolution",
    "norm": "layer_norm native_layer_norm rms_norm _fused_rms_norm group_norm native_group_norm batch_norm instance_norm "
    "_native_batch_norm_legit native_batch_norm",
    "softmax": "softmax _softmax log_softmax _log_softmax",
    "pointwise": "dropout native_dropout gelu silu relu tanh sigmoid to _to_copy type_as float where masked_fill masked_fill_ "
    "softplus floor_divide clamp clamp_min clamp_max leaky_relu hardswish mish glu elu selu prelu bernoulli bernoulli_",
    "reduction": "mean sum var std amax amin max min any all argmax argmin cumsum topk sort histc bincount norm "
    "linalg_vector_norm prod avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d max_pool2d max_pool1d "
    "max_pool2d_with_indices logsumexp one_hot tril triu",
    "embedding": "embedding",
    "cross_entropy": "cross_entropy_loss nll_loss nll_loss_forward nll_loss_nd mse_loss binary_cross_entropy_with_logits "
    "l1_loss smooth_l1_loss huber_loss",
    "scan": "selective_scan",
    "copy": "contiguous clone cat stack index index_select index_add index_add_ index_put index_put_ gather scatter scatter_ "
    "scatter_add scatter_add_ copy_ repeat repeat_interleave roll flip tile pad constant_pad_nd upsample_nearest2d "
    "upsample_bilinear2d interpolate fill_ zero_ zeros_like ones_like full_like empty_like new_zeros new_ones new_empty "
    "new_full rand_like randn_like pixel_shuffle im2col col2im masked_select",
    "view": "view reshape flatten unflatten transpose permute t unsqueeze squeeze expand expand_as slice select split "
    "split_with_sizes chunk unbind alias detach detach_ view_as movedim swapaxes numpy_T mT narrow diagonal "
    "broadcast_to broadcast_tensors unfold lift_fresh_copy lift_fresh tensor_split as_strided unsafe_split _unsafe_view view_as_real "
    "view_as_complex real imag",
    "constant": "arange zeros ones full empty eye linspace scalar_tensor wrap_with_set_grad_enabled",
}
_BY_NAME: dict[str, Kind] = {name: kind for kind, names in NAMES.items() for name in names.split()}


def op_name(target: Any) -> str:
    """ "linear" for aten.linear.default."""
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    return str(getattr(target, "__name__", target)).split(".")[-1]


def kind_of(target: Any) -> Kind:
    """The kind of an op; "unknown" if it is in no table."""
    name = op_name(target)
    if name in _BY_NAME:
        return _BY_NAME[name]
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return "pointwise"
    return "unknown"


def dims_of(kind: Kind, name: str, tensors: dict[str, Tensor], args: dict[str, Any], out: Tensor, prime: int) -> tuple[dict[str, int], str]:
    """The dimensions that cost an op, of one sample, and the one that the batch multiplies."""
    sizes: dict[str, int] = {}
    if kind == "matmul" and name in ("linear", "mm", "addmm", "matmul", "bmm", "baddbmm"):
        a, b = (tensors[r] for r in _OPERANDS[name])
        k = a.shape[-1]
        n = b.shape[0] if name == "linear" else b.shape[-1] if b.ndim > 1 else 1
        groups = 1
        if name != "linear" and b.ndim > 2:
            groups = int(torch.Size(out.shape[:-2]).numel())
        sizes = {"groups": groups, "m": out.numel() // max(n * groups, 1), "n": n, "k": k}
    elif kind == "attention":
        q, kk, v = tensors["query"], tensors["key"], tensors["value"]
        sizes = {
            "batch": int(torch.Size(q.shape[:-3]).numel()), "heads": q.shape[-3], "kv_heads": kk.shape[-3], "q": q.shape[-2],
            "kv": kk.shape[-2], "head_dim": q.shape[-1], "v_head_dim": v.shape[-1], "causal": int(bool(args.get("is_causal"))),
        }  # fmt: skip
    elif kind == "experts":
        rows, weight = tensors.get("input", tensors.get("self")), tensors.get("weight", tensors.get("mat2"))
        if rows is not None and "weights.0" in tensors:  # one [n, k] for each expert
            n, k = tensors["weights.0"].shape
            sizes = {"m": rows.shape[0], "n": n, "k": k, "experts": sum(role.startswith("weights.") for role in tensors)}
        if rows is not None and weight is not None:
            sizes = {"m": rows.shape[0], "n": weight.shape[-1], "k": weight.shape[-2], "experts": weight.shape[0]}
    elif kind == "embedding":
        w = tensors["weight"]
        sizes = {"rows": out.numel() // w.shape[-1], "vocab": w.shape[0], "width": w.shape[-1]}
    elif kind == "cross_entropy" and "self" in tensors and tensors["self"].ndim >= 2:
        sizes = {"rows": tensors["self"].shape[0], "classes": tensors["self"].shape[1]}
    batched = ""
    for key, size in sizes.items():
        if size and size % prime == 0:
            sizes[key], batched = size // prime, key
            break
    return {k: int(v) for k, v in sizes.items()}, batched


_OPERANDS = {
    "linear": ("input", "weight"), "mm": ("self", "mat2"), "addmm": ("mat1", "mat2"), "matmul": ("self", "other"),
    "bmm": ("self", "mat2"), "baddbmm": ("batch1", "batch2"),
}  # fmt: skip
