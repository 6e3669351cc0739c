"""Initial weights that do not depend on the layout: each layer, and each module outside the layers, from its own seed.

A rank holds one layer whole at a time, fills it as the model's own code would, and copies out its shard.
"""

import copy
import zlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .shards import boxes, local
from .tensor_parallel import unpack


def blank(model: nn.Module) -> nn.Module:
    """A copy of a model on meta, to fill from after the model itself was cut up."""
    return copy.deepcopy(model)


def allocate(stage: nn.Module, device: torch.device) -> None:
    """Gives every tensor of `stage` memory, not yet filled; parameters that were one stay one."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in stage.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    stage.to_empty(device=device)
    for first, *others in names.values():
        for name in others:
            owner, _, leaf = name.rpartition(".")
            setattr(stage.get_submodule(owner), leaf, stage.get_parameter(first))


@torch.no_grad()
def fill(
    stage: nn.Module, template: nn.Module, units: Iterable[str], init: Callable[[nn.Module], None], seed: int, device: torch.device,
    packed: dict[str, tuple[int, int]] | None = None, ties: dict[str, tuple[str, str]] | None = None,
) -> None:  # fmt: skip
    """Fills the parameters and buffers of `stage` (sharded, allocated) under the paths `units`.

    `template` has the whole model on meta; `init` initialises one module. `packed` gives dimension and pieces of parameters
    that are sharded inside pieces. `ties` gives, of a parameter that is tied to one of another unit, that unit and its name there.
    """
    own = {**dict(stage.named_parameters()), **dict(stage.named_buffers())}

    def made(unit: str) -> nn.Module:
        whole = copy.deepcopy(template.get_submodule(unit)).to_empty(device=device)
        torch.manual_seed(seed + zlib.crc32(unit.encode()))
        return whole.apply(init)

    for unit in units:
        whole = made(unit)
        for name, value in (*whole.named_parameters(), *whole.named_buffers()):
            path = f"{unit}.{name}" if unit else name
            if path in own:
                copy_shard(own[path], value.data, (packed or {}).get(path))
    for path, (unit, name) in (ties or {}).items():
        if path in own:
            copy_shard(own[path], made(unit).get_parameter(name), (packed or {}).get(path))


@torch.no_grad()
def remake_buffers(stage: nn.Module, template: nn.Module, init: Callable[[nn.Module], None], device: torch.device) -> None:
    """Fills the buffers of `stage` (the model's own paths, allocated) that no file holds, such as rotary frequencies, as the model's code does.

    `template` has the whole model on meta; `init` initialises one module.
    """
    for path, module in stage.named_modules():
        names = [n for n in module._non_persistent_buffers_set if module._buffers.get(n) is not None]
        if names:
            made = copy.deepcopy(template.get_submodule(path)).to_empty(device=device).apply(init)
            for name in names:
                copy_shard(module.get_buffer(name), made.get_buffer(name))


@torch.no_grad()
def copy_shard(target: Tensor, full: Tensor, packed: tuple[int, int] | None = None) -> None:
    """Copies this rank's part of `full` into `target`, a plain tensor or a DTensor."""
    into = local(target)
    for box in boxes(target, packed):
        into[box.local].copy_(full[box.whole])


@torch.no_grad()
def gather_full(p: Tensor, packed: tuple[int, int] | None = None) -> Tensor:
    """The whole of a parameter or gradient in the model's own order. Collective over the tensor's mesh."""
    if not isinstance(p, DTensor):
        return p.detach()
    mesh = p.device_mesh
    full: Tensor = p.detach().full_tensor()  # type: ignore[attr-defined]
    for i, name in enumerate(mesh.mesh_dim_names or ()):
        if packed is not None and name in ("tp", "etp") and p.placements[i].is_shard(packed[0]):
            full = unpack(full, *packed, mesh.size(i))
    return full
