"""Vocab-parallel cross-entropy: three passes over the logits and one collective of three numbers a row.

Forward reads a rank's logits [rows, classes / t] once (16 or 32 bits, arithmetic in fp32) and keeps, of each row, the running maximum,
the sum of exponentials under it, and the target's logit where the target is this rank's. Backward reads the logits again and writes
the gradient over them, in their own dtype. Eager needs a maximum over the group before it can take exponentials, hence two rounds; here
each rank takes its own maximum and sums are brought to the common one afterwards (online softmax: Milakov and Gimelshein 2018), so that
one all_gather of [3, rows] is all that crosses the group.

Without a GPU the kernels run where TRITON_INTERPRET=1 was set before Python imported torch; elsewhere the same formula runs eagerly.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

NAMESPACE = "meshwright_kernels"
BLOCK = 8192  # columns that one program reads at a time
INTERPRETED = type(tl.sum).__name__ == "InterpretedFunction"
_all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor


def available() -> bool:
    """Whether Triton kernels run in this process: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1 before torch is imported)."""
    return INTERPRETED or torch.cuda.is_available()


def _runs(x: Tensor) -> bool:
    return x.is_cuda or INTERPRETED


@triton.jit
def _statistics_kernel(logits, labels, out, first, rows, classes: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of one row: maximum, sum of exp(x - maximum), and the target's logit (0 where another rank has it)."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * classes
    top = float("-inf")
    total = 0.0
    for i in range(0, classes, block):
        column = i + tl.arange(0, block)
        x = tl.load(logits + start + column, mask=column < classes, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    target = tl.load(labels + row) - first
    mine = (target >= 0) & (target < classes)
    tl.store(out + row, top)
    tl.store(out + rows + row, total)
    tl.store(out + 2 * rows + row, tl.load(logits + start + target, mask=mine, other=0.0).to(tl.float32))


@triton.jit
def _gradient_kernel(logits, out, labels, top, of_sum, of_target, first, classes: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of one row and one block of columns: exp(x - top) of_sum, and of_target more at the target. `out` may be `logits`."""
    row = tl.program_id(0)
    column = tl.program_id(1) * block + tl.arange(0, block)
    at = row.to(tl.int64) * classes + column
    x = tl.load(logits + at, mask=column < classes, other=float("-inf")).to(tl.float32)
    grad = tl.exp(x - tl.load(top + row)) * tl.load(of_sum + row)
    grad += tl.where(column == tl.load(labels + row) - first, tl.load(of_target + row), 0.0)
    tl.store(out + at, grad, mask=column < classes)


def _block(classes: int) -> int:
    return min(BLOCK, triton.next_power_of_2(classes))


def _write_gradient(logits: Tensor, out: Tensor, labels: Tensor, statistics: Tensor, grad: Tensor, first: int) -> None:
    rows, classes = logits.shape
    top, _, _ = statistics
    _, of_sum, of_target = grad.contiguous()
    if _runs(logits):
        block = _block(classes)
        _gradient_kernel[(rows, triton.cdiv(classes, block))](
            logits, out, labels, top, of_sum, of_target, first, classes=classes, block=block, num_warps=8
        )  # fmt: skip
        return
    dense = (logits.float() - top.unsqueeze(-1)).exp_().mul_(of_sum.unsqueeze(-1))
    mine = (labels >= first) & (labels < first + classes)
    dense.scatter_add_(-1, (labels - first).masked_fill(~mine, 0).unsqueeze(-1), (of_target * mine).unsqueeze(-1))
    out.copy_(dense)


@torch.library.custom_op(f"{NAMESPACE}::vocab_statistics", mutates_args=())
def vocab_statistics(logits: Tensor, labels: Tensor, first: int, consume: bool) -> Tensor:
    """[3, rows] in fp32: maximum, sum of exp(x - maximum) and target logit of each row of logits [rows, classes]; labels [rows].

    `first` is the class of the first column; a label outside has target 0. The maximum is a shift that the loss does not depend on:
    its gradient is not used. With `consume`, backward writes the gradient over the logits.
    """
    rows, classes = logits.shape
    logits = logits.contiguous()
    out = logits.new_empty((3, rows), dtype=torch.float32)
    if _runs(logits):
        _statistics_kernel[(rows,)](logits, labels, out, first, rows, classes=classes, block=_block(classes), num_warps=8)
        return out
    x = logits.float()
    top = x.amax(-1)
    mine = (labels >= first) & (labels < first + classes)
    target = x.gather(-1, (labels - first).masked_fill(~mine, 0).unsqueeze(-1)).squeeze(-1)
    return torch.stack([top, (x - top.unsqueeze(-1)).exp().sum(-1), torch.where(mine, target, 0.0)], out=out)


@vocab_statistics.register_fake
def _(logits: Tensor, labels: Tensor, first: int, consume: bool) -> Tensor:
    return logits.new_empty((3, logits.shape[0]), dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::vocab_gradient_", mutates_args={"logits"})
def vocab_gradient_(logits: Tensor, labels: Tensor, statistics: Tensor, grad: Tensor, first: int) -> None:
    """Writes the gradient of vocab_statistics over contiguous logits [rows, classes]; statistics and grad are [3, rows]."""
    _write_gradient(logits, logits, labels, statistics, grad, first)


@torch.library.custom_op(f"{NAMESPACE}::vocab_gradient", mutates_args=())
def vocab_gradient(logits: Tensor, labels: Tensor, statistics: Tensor, grad: Tensor, first: int) -> Tensor:
    """The gradient of vocab_statistics in a tensor of its own; shapes as in vocab_gradient_."""
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    _write_gradient(logits, out, labels, statistics, grad, first)
    return out


@vocab_gradient.register_fake
def _(logits: Tensor, labels: Tensor, statistics: Tensor, grad: Tensor, first: int) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, labels, ctx.first, ctx.consume = inputs
    ctx.save_for_backward(logits, labels, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    logits, labels, statistics = ctx.saved_tensors
    # autograd counts versions: whoever saved the logits too is told so, and does not read gradients in their place
    if ctx.consume and logits.is_contiguous():
        logits = logits.detach()
        vocab_gradient_(logits, labels, statistics, grad, ctx.first)
        return logits, None, None, None
    return vocab_gradient(logits, labels, statistics, grad, ctx.first), None, None, None


vocab_statistics.register_autograd(_backward, setup_context=_setup)


@register_sharding(torch.ops.meshwright_kernels.vocab_statistics.default)  # type: ignore[untyped-decorator]
def _shard_statistics(logits: Any, labels: Any, first: int, consume: bool) -> list[Any]:
    """Rows may be sharded; classes may not, for which of them a rank has is an argument."""
    return [([Replicate()], [Replicate(), Replicate(), None, None]), ([Shard(1)], [Shard(0), Shard(0), None, None])]


@register_sharding(torch.ops.meshwright_kernels.vocab_gradient.default)  # type: ignore[untyped-decorator]
def _shard_gradient(logits: Any, labels: Any, statistics: Any, grad: Any, first: int) -> list[Any]:
    whole = [Replicate(), Replicate(), Replicate(), Replicate(), None]
    return [([Replicate()], whole), ([Shard(0)], [Shard(0), Shard(0), Shard(1), Shard(1), None])]


class _Merge(torch.autograd.Function):
    """Statistics [3, rows] of every rank to the loss of each row [rows]. Every rank has the whole loss, so backward needs no collective."""

    @staticmethod
    def forward(ctx: Any, statistics: Tensor, group: Any) -> Tensor:
        top, total, target = statistics
        if group is not None and dist.get_world_size(group) > 1:
            parts = funcol.wait_tensor(_all_gather(statistics.unsqueeze(0).contiguous(), 0, group))  # [t, 3, rows]
            highest = parts[:, 0].amax(0)
            total = (parts[:, 1] * (parts[:, 0] - highest).exp()).sum(0)
            target = parts[:, 2].sum(0)
        else:
            highest = top
        ctx.save_for_backward((top - highest).exp() / total)
        return highest + total.log() - target

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (share,) = ctx.saved_tensors
        return torch.stack([torch.zeros_like(grad), grad * share, -grad]), None


def vocab_parallel_cross_entropy(output: Tensor, labels: Tensor, mesh: DeviceMesh | None, consume: bool = True) -> Tensor:
    """Mean cross-entropy of an output whose last dimension is sharded over the mesh. output [..., classes / t], labels [...]

    `mesh` None or of one rank: a plain fused cross-entropy. `consume`: backward writes the gradient over the output's own memory, which
    nobody may read after the loss; autograd refuses a second backward then. False takes a second tensor for it.
    """
    group = None if mesh is None else mesh.get_group()
    logits = output.flatten(0, -2)
    first = 0 if group is None else dist.get_rank(group) * logits.shape[-1]
    statistics = vocab_statistics(logits, labels.flatten(), first, consume)
    return _Merge.apply(statistics, group).mean()  # type: ignore[no-any-return]


def cross_entropy(output: Tensor, labels: Tensor, consume: bool = True) -> Tensor:
    """Mean cross-entropy of whole logits, as vocab_parallel_cross_entropy on one rank. output [..., classes], labels [...]"""
    return vocab_parallel_cross_entropy(output, labels, None, consume)
