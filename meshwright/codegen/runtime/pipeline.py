"""Pipeline stages: what a stage leaves out, ZeRO inside a schedule, tensors that the first and the last stage share."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .mesh import Mesh


def leave_out(model: nn.Module, paths: Iterable[str]) -> None:
    """Replaces submodules that belong to other stages, so that names and the model's own code stay as they are."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())


class PerMicrobatch(nn.Module):
    """Hides FSDP from the schedule, which would put off every reduction to the end of the step (ZeRO 2 and 3)."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.stage(*inputs)  # type: ignore[no-any-return]


def reshard(stage: nn.Module) -> None:
    """Frees what FSDP kept gathered through the step."""
    for m in stage.modules():
        if isinstance(m, FSDPModule):
            m.reshard()


def first_last_pair(mesh: Mesh, last: int) -> Any:
    """The group of this rank's counterparts on the pipeline ranks 0 and `last`, None where they are one. Every rank must call it."""
    if last == 0:
        return None
    ranks = mesh.compute.mesh.reshape(mesh["pp"].size(), -1)  # [pipeline ranks, ranks of a stage]
    pairs = [dist.new_group([int(a), int(b)]) for a, b in zip(ranks[0], ranks[last], strict=True)]
    return pairs[int((ranks == dist.get_rank()).nonzero()[0, 1])]


def mean_over_ranks(total: Tensor, mesh: Mesh, last: int = -1) -> Tensor:
    """The mean over the ranks that read other data of a number that the pipeline rank `last` has, on every rank."""
    for name in ("replicate", "shard", "cp"):
        if mesh[name].size() > 1:
            dist.all_reduce(total, group=mesh[name].get_group())
            total /= mesh[name].size()
    if mesh["pp"].size() > 1:
        group = mesh["pp"].get_group()
        dist.broadcast(total, dist.get_global_rank(group, last % mesh["pp"].size()), group)
    return total


def held_twice(parts: Sequence[Any], tied: Sequence[Sequence[str]]) -> list[nn.Parameter]:
    """Parameters of the last stage, where this rank has it, that the first stage has too."""
    last = [p for p in parts if p.is_last and not p.is_first]
    names = {n for group in tied for n in group}
    return [p for part in last for n, p in part.named_parameters() if n.removeprefix("model.") in names]


def add_tied_gradients(parts: Iterable[nn.Module], tied: Sequence[Sequence[str]], pair: Any) -> None:
    """Adds the gradients of tensors that the first and the last stage each hold, under any of their names; `parts` are this rank's stages."""
    held = [{n.removeprefix("model."): p for n, p in part.named_parameters()} for part in parts]
    for names in tied:
        found = [next(p for n, p in one.items() if n in names) for one in held if any(n in names for n in one)]
        gradients = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in found if p.grad is not None]
        if len(gradients) == 2:
            gradients[0] += gradients[1]
            gradients[1].copy_(gradients[0])
        elif gradients and pair is not None:
            dist.all_reduce(gradients[0], group=pair)
