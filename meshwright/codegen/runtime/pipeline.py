"""Pipeline stages: what a stage leaves out, ZeRO inside a schedule, tensors that the first and the last stage share."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule


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


def first_last_pair(mesh: DeviceMesh) -> Any:
    """The group of this rank's counterparts on the first and the last stage. Every rank must call it."""
    ranks = mesh.mesh.reshape(mesh["pp"].size(), -1)  # [stages, ranks of a stage]
    pairs = [dist.new_group([int(a), int(b)]) for a, b in zip(ranks[0], ranks[-1], strict=True)]
    return pairs[int((ranks == dist.get_rank()).nonzero()[0, 1])]


def mean_over_ranks(total: Tensor, mesh: DeviceMesh) -> Tensor:
    """The mean over data-parallel ranks of a number that the last stage has, on every rank."""
    for name in ("replicate", "shard"):
        if mesh[name].size() > 1:
            dist.all_reduce(total, group=mesh[name].get_group())
            total /= mesh[name].size()
    if mesh["pp"].size() > 1:
        group = mesh["pp"].get_group()
        dist.broadcast(total, dist.get_global_rank(group, mesh["pp"].size() - 1), group)
    return total


def add_tied_gradients(model: nn.Module, tied: Sequence[Sequence[str]], pair: Any) -> None:
    """Adds the gradients of tensors that the first and the last stage each hold, under any of their names."""
    held = dict(model.named_parameters())
    for names in tied:
        for p in [held[n] for n in names if n in held][:1]:
            if p.grad is not None:
                dist.all_reduce(p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad, group=pair)
