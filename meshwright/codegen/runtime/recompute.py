"""Activation recompute of a layer: everything, or everything but products, attention and what was reduced across ranks."""

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .context import in_ring, keeping

_KEPT_NAMES = (
    "aten.mm aten.addmm aten.bmm aten.baddbmm aten.convolution aten._grouped_mm aten._scaled_dot_product_flash_attention "
    "aten._scaled_dot_product_flash_attention_for_cpu aten._scaled_dot_product_efficient_attention "
    "aten._scaled_dot_product_cudnn_attention _c10d_functional.all_reduce _c10d_functional.reduce_scatter_tensor "
    "_c10d_functional.reduce_scatter_single _c10d_functional.all_to_all_single"
)


def _kept() -> set[Any]:
    """The operators whose results selective recompute keeps."""
    found = set()
    for name in _KEPT_NAMES.split():
        namespace, _, op = name.partition(".")
        packet = getattr(getattr(torch.ops, namespace), op, None)
        if packet is not None:
            found.add(packet.default)
    return found


def recompute(layer: nn.Module, mode: str) -> None:
    """Makes `layer` recompute its activations in backward: "none", "selective" or "full"."""
    if mode == "none":
        return
    extra: dict[str, Any] = {}
    if mode == "selective":
        kept = _kept()

        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if op in kept and not in_ring() else CheckpointPolicy.PREFER_RECOMPUTE

        extra["context_fn"] = lambda: keeping(create_selective_checkpoint_contexts(policy))
    layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, **extra)  # type: ignore[method-assign]
