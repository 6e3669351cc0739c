"""Optimizers over parameters of several meshes, with their state in the host's memory or in a narrower type between steps."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Make = Callable[..., torch.optim.Optimizer]


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups: one optimizer call takes tensors of one mesh only."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
    return [{"params": g} for g in groups.values()]


class Streamed:
    """Steps a torch optimizer parameter by parameter; its state comes to the parameter for the update and goes back after it.

    `make(parameters)` builds the optimizer of one parameter. Between steps state lies on `device` ("cpu": the host) and in `dtype`,
    where they are given; numbers that are no moments (the count of steps) stay as they are.
    """

    def __init__(self, make: Make, parameters: Iterable[nn.Parameter], *, dtype: torch.dtype | None = None, device: str | None = None) -> None:
        self.each = [(p, make([p])) for p in parameters]
        self.dtype, self.device = dtype, device

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Any]]:
        return {p: o.state[p] for p, o in self.each}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [g for _, o in self.each for g in o.param_groups]

    def zero_grad(self) -> None:
        for _, o in self.each:
            o.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        for p, o in self.each:
            if p.grad is not None:
                self._move(o.state.get(p, {}), p, p.device, p.dtype)
                o.step()
                self._move(o.state[p], p, torch.device(self.device or p.device), self.dtype or p.dtype)

    def _move(self, state: dict[str, Any], p: nn.Parameter, device: torch.device, dtype: torch.dtype) -> None:
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.dim() > 0:
                state[name] = value.to(device=device, dtype=dtype)


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], most: float, ranks: int, *, shared: Iterable[nn.Parameter] = (), apart: Iterable[nn.Parameter] = (),
    ep: int = 1,
) -> Tensor:  # fmt: skip
    """Scales gradients to a norm of at most `most` over all stages; returns the norm that they had. Collective over all ranks.

    `ranks` hold one stage; a gradient counts once, however many of them hold the same part of it. `shared`: parameters that another stage
    holds too and counts. `apart`: parameters of listed experts, of which each of `ep` ranks has its own.
    """
    parameters = [p for p in parameters if p.grad is not None]
    skipped, alone = {id(p) for p in shared}, {id(p) for p in apart}
    total = torch.zeros((), device=parameters[0].device if parameters else None)
    for p in parameters:
        g = p.grad
        assert g is not None
        local, held = (g.to_local(), _parts(g)) if isinstance(g, DTensor) else (g, 1)
        if id(p) not in skipped:
            total += local.float().square().sum() * (held * (ep if id(p) in alone else 1) / ranks)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    norm = total.sqrt()
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    for p in parameters:
        assert p.grad is not None
        (p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad).mul_(scale)
    return norm


def _parts(g: DTensor) -> int:
    """Ranks that each hold another part of a sharded tensor."""
    n = 1
    for i, placement in enumerate(g.placements):
        n *= 1 if placement.is_replicate() else g.device_mesh.size(i)
    return n
