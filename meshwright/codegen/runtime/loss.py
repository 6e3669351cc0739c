"""Losses: the model's own on whole outputs, and cross-entropy on logits whose classes are sharded."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def cross_entropy(output: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in fp32 over every position. output [..., classes], labels [...]"""
    return F.cross_entropy(output.float().flatten(0, -2), labels.flatten())


def chunked_cross_entropy(hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, chunks: int) -> Tensor:
    """cross_entropy of head(hidden) over parts of the rows, each computed again in backward, so that logits exist for one part at a time.

    hidden [..., width], labels [...] of whole numbers; head [rows, width] -> [rows, classes].
    """

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), wanted, reduction="sum")

    rows, wanted = hidden.flatten(0, -2), labels.flatten()
    parts = zip(rows.chunk(chunks), wanted.chunk(chunks), strict=True)
    return torch.stack([checkpoint(part, r, w, use_reentrant=False) for r, w in parts]).sum() / len(wanted)


def mse(output: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error in fp32."""
    return F.mse_loss(output.float(), labels.float())


def square(output: Tensor, labels: None) -> Tensor:
    """Mean square of the output: a stand-in for a model that has neither labels nor a loss."""
    return output.float().square().mean()


class _VocabParallel(torch.autograd.Function):
    """Cross-entropy of rows whose classes are split over a group: three numbers a row cross it (maximum, sum, target)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: Any) -> Tensor:
        classes = logits.shape[-1]  # [rows, classes / t]
        first = dist.get_rank(group) * classes
        mine = (labels >= first) & (labels < first + classes)
        local = (labels - first).masked_fill(~mine, 0)
        top = logits.amax(-1)
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
        shifted = logits - top.unsqueeze(-1)
        target = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1) * mine
        dist.all_reduce(target, group=group)
        exp = shifted.exp_()
        total = exp.sum(-1)
        dist.all_reduce(total, group=group)
        ctx.save_for_backward(exp.div_(total.unsqueeze(-1)), local, mine)
        return (total.log() - target).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        softmax, local, mine = ctx.saved_tensors
        softmax.scatter_add_(-1, local.unsqueeze(-1), -mine.unsqueeze(-1).to(softmax.dtype))
        return softmax.mul_(grad / len(local)), None, None


def vocab_parallel_cross_entropy(output: Tensor, labels: Tensor, mesh: DeviceMesh) -> Tensor:
    """cross_entropy of an output whose last dimension is sharded over the mesh. output [..., classes / t], labels [...]"""
    return _VocabParallel.apply(output.float().flatten(0, -2), labels.flatten(), mesh.get_group())  # type: ignore[no-any-return]
