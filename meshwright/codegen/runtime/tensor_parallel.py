"""Tensor parallelism: modules that compute on their shard, with the collectives between them written out.

A value on a tensor-parallel group of t ranks is in one of these states, its gradient in the state that belongs to it:

    S<d>      sharded on dimension d                 gradient sharded the same way
    S<d>x<q>  sharded on d inside each of q pieces    (q, k and v packed in one weight)
    I         replicated                             gradient replicated
    R         replicated                             gradient a partial sum on every rank
    P         a partial sum on every rank            gradient replicated

"P>S1" converts: the collective forward, its dual backward. A parameter is stored as S<d> or replicated; "R" or "P" says how a
replicated one is used (its gradient is summed over the group; it is added by one rank only).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional as F

Move = Callable[[Tensor, Any], Tensor]
# the names since torch 2.13, or before
_all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_reduce_scatter = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor


def _keep(x: Tensor, group: Any) -> Tensor:
    return x


def _reduce(x: Tensor, group: Any) -> Tensor:
    return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", group))


def _gather(x: Tensor, group: Any, dim: int) -> Tensor:
    return funcol.wait_tensor(_all_gather(x.contiguous(), dim, group))


def _scatter(x: Tensor, group: Any, dim: int) -> Tensor:
    return funcol.wait_tensor(_reduce_scatter(x.contiguous(), "sum", dim, group))


def _slice(x: Tensor, group: Any, dim: int) -> Tensor:
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()


def _once(x: Tensor, group: Any) -> Tensor:
    return x if dist.get_rank(group) == 0 else torch.zeros_like(x)


def moves(conversion: str) -> tuple[Move, Move]:
    """The collectives of a conversion, forward and backward."""
    source, target = conversion.split(">")
    dim = next((int(s[1:]) for s in (source, target) if s[0] == "S"), 0)
    gather: Move = functools.partial(_gather, dim=dim)
    scatter: Move = functools.partial(_scatter, dim=dim)
    cut: Move = functools.partial(_slice, dim=dim)
    return {
        "S>R": (gather, scatter),
        "S>I": (gather, cut),
        "P>S": (scatter, gather),
        "I>S": (cut, gather),
        "I>R": (_keep, _reduce),
        "P>I": (_reduce, _keep),
        "P>R": (_reduce, _reduce),
        "I>P": (_once, _keep),
    }[f"{source[0]}>{target[0]}"]


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, conversion: str, group: Any) -> Tensor:
        there, ctx.back = moves(conversion)
        ctx.group = group
        return there(x.view_as(x), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.back(grad, ctx.group), None, None


class _OwnGradient(torch.autograd.Function):
    """x; its gradient in memory of its own. Autograd may hand one tensor, or a part of it, to two parameters (a + b), and keeps both without a
    copy where they are DTensors: what is added to one later would be added to the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clone()


def convert(x: Tensor, conversion: str, mesh: DeviceMesh) -> Tensor:
    """Converts the local value x from one state to another over the mesh, e.g. "P>S1"."""
    return _Convert.apply(x, conversion, mesh.get_group())  # type: ignore[no-any-return]


def pack(x: Tensor, dim: int, pieces: int, ranks: int) -> Tensor:
    """Reorders a packed dimension (q, k, v) so that an even split over the ranks gives every rank its part of each piece."""
    return torch.cat([p.chunk(ranks, dim)[r] for r in range(ranks) for p in x.chunk(pieces, dim)], dim)


def unpack(x: Tensor, dim: int, pieces: int, ranks: int) -> Tensor:
    """The inverse of pack, for a gathered tensor."""
    return torch.cat([r.chunk(pieces, dim)[p] for p in range(pieces) for r in x.chunk(ranks, dim)], dim)


class Local(ParallelStyle):
    """Runs a module's own forward on local tensors.

    `params`: state of each parameter that the forward reads ("S0", "S1x3", "I", "R", "P"), by path. `inputs`: conversions of
    arguments, by position ("0") or name. `outputs`: of results, "" for a bare tensor, "0" for the first of a tuple. `sizes`:
    attributes that hold a size, set to the local one.
    """

    def __init__(
        self,
        params: dict[str, str] | None = None,
        inputs: dict[str, str] | None = None,
        outputs: dict[str, str] | None = None,
        sizes: dict[str, int] | None = None,
    ) -> None:
        self.params, self.inputs, self.outputs, self.sizes = params or {}, inputs or {}, outputs or {}, sizes or {}

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for path, state in self.params.items():
            owner, name = _owner(module, path)
            p = owner._parameters[name]
            if p is not None and not isinstance(p, DTensor):
                owner.register_parameter(name, shard_parameter(p, state, device_mesh))
        for name, size in self.sizes.items():
            setattr(module, name, size)
        module.forward = functools.partial(self._forward, module, module.forward, device_mesh)  # type: ignore[method-assign]
        return module

    def _forward(self, module: nn.Module, forward: Any, mesh: DeviceMesh, *args: Any, **kwargs: Any) -> Any:
        if self.inputs:
            args = tuple(self._converted(self.inputs, str(i), a, mesh) for i, a in enumerate(args))
            kwargs = {k: self._converted(self.inputs, k, v, mesh) for k, v in kwargs.items()}
        stored: list[Any] = []
        try:
            for path, state in self.params.items():
                owner, name = _owner(module, path)
                p = owner._parameters[name]
                assert isinstance(p, DTensor)
                stored.append((owner, name, p))
                local = p.to_local()
                if not type(module).__module__.startswith("torch.nn."):  # whose gradients are new tensors
                    local = _OwnGradient.apply(local)
                owner._parameters[name] = convert(local, f"I>{state}", mesh) if state in ("R", "P") else local  # type: ignore[assignment]
            if isinstance(module, nn.Embedding) and self.params.get("weight") == "S0":
                out = _vocab_parallel_embedding(module, args[0], mesh)
            else:
                out = forward(*args, **kwargs)
        finally:
            for owner, name, p in stored:
                owner._parameters[name] = p  # type: ignore[assignment]
        if isinstance(out, tuple):
            return tuple(self._converted(self.outputs, str(i), o, mesh) for i, o in enumerate(out))
        return self._converted(self.outputs, "", out, mesh)

    def _converted(self, where: dict[str, str], key: str, value: Any, mesh: DeviceMesh) -> Any:
        return convert(value, where[key], mesh) if key in where else value


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The submodule that holds a parameter, and its name there."""
    parent, _, name = path.rpartition(".")
    return module.get_submodule(parent), name


def _vocab_parallel_embedding(module: nn.Embedding, ids: Tensor, mesh: DeviceMesh) -> Tensor:
    """Rows of the local part of the vocabulary, zero for the rest: a partial sum. ids [...] -> [..., width]"""
    rows = module.weight.shape[0]
    first = mesh.get_local_rank() * rows
    mine = (ids >= first) & (ids < first + rows)
    padding = None if module.padding_idx is None else module.padding_idx - first
    if padding is not None and not 0 <= padding < rows:
        padding = None
    return F.embedding((ids - first).masked_fill(~mine, 0), module.weight, padding) * mine.unsqueeze(-1)


def shard_parameter(p: nn.Parameter, state: str, mesh: DeviceMesh) -> nn.Parameter:
    """A parameter as a DTensor in the given state. Every rank holds the same full value (or it is on meta)."""
    if state[0] != "S":
        return nn.Parameter(DTensor.from_local(p.data, mesh, [Replicate()], run_check=False), requires_grad=p.requires_grad)
    dim, _, pieces = state[1:].partition("x")
    full = pack(p.data, int(dim), int(pieces), mesh.size()) if pieces else p.data
    local = full.chunk(mesh.size(), int(dim))[mesh.get_local_rank()].clone()
    sharded = DTensor.from_local(local, mesh, [Shard(int(dim))], run_check=False)
    return nn.Parameter(sharded, requires_grad=p.requires_grad)
