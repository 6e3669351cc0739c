"""Which part of a whole tensor a rank holds, as boxes; and how ranks agree to stop.

A rank's shard of a tensor that is sharded in one piece is one box of the whole tensor. Of a packed tensor (q, k and v in one weight) it is a
box of each piece. Boxes name places in the model's own order, so that files written from them do not depend on the layout.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .pipeline import reshard

Packed = Mapping[str, tuple[int, int]]  # by full name: the dimension that is sharded inside pieces, and their number
Range = tuple[int, int]  # [start, stop) of one dimension
CUT_FIRST = ("tp", "etp", "ep")  # mesh dimensions that cut a tensor before FSDP does; tp and etp cut inside pieces


class Refused(RuntimeError):
    """What a user gave cannot be used. The text is one sentence; rank 0 raises it, for all ranks."""


class Box(NamedTuple):
    """A block of a whole tensor, and where it lies in a rank's local one."""

    whole: tuple[slice, ...]
    local: tuple[slice, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        return tuple(s.start for s in self.whole)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for s in self.whole)


def boxes(t: Tensor, packed: tuple[int, int] | None = None) -> list[Box]:
    """The boxes of a whole tensor that this rank holds of `t`, a plain tensor or a DTensor; none if its shard is empty.

    `packed`: dimension and number of pieces, where `t` is sharded inside pieces.
    """
    held: list[list[Range]] = [[(0, n)] for n in t.shape]
    if isinstance(t, DTensor):
        mesh, names = t.device_mesh, t.device_mesh.mesh_dim_names or ("",) * t.device_mesh.ndim
        for i in sorted(range(mesh.ndim), key=lambda i: names[i] not in CUT_FIRST):
            if t.placements[i].is_replicate():
                continue
            dim = t.placements[i].dim  # type: ignore[attr-defined]
            pieces = packed[1] if packed is not None and dim == packed[0] and names[i] in ("tp", "etp") else 1
            parts = [_part(held[dim], pieces, j) for j in range(pieces)]
            held[dim] = [r for p in parts for r in _part(p, mesh.size(i), mesh.get_local_rank(i))]
    return [_box(rows) for rows in itertools.product(*(list(_placed(_joined(ranges))) for ranges in held))]


def _part(ranges: Sequence[Range], parts: int, which: int) -> list[Range]:
    """The part of some ranges, laid end to end, that torch.chunk would give."""
    size = -(-sum(b - a for a, b in ranges) // parts)
    first, last, at, found = which * size, (which + 1) * size, 0, []
    for a, b in ranges:
        start, stop = max(first - at, 0), min(last - at, b - a)
        if start < stop:
            found.append((a + start, a + stop))
        at += b - a
    return found


def _joined(ranges: Sequence[Range]) -> list[Range]:
    found: list[Range] = []
    for a, b in ranges:
        if found and found[-1][1] == a:
            a = found.pop()[0]
        found.append((a, b))
    return found


def _placed(ranges: Sequence[Range]) -> Iterator[tuple[slice, slice]]:
    """Each range, with its place in the local tensor."""
    at = 0
    for a, b in ranges:
        if a < b:
            yield slice(a, b), slice(at, at + b - a)
        at += b - a


def _box(rows: Sequence[tuple[slice, slice]]) -> Box:
    return Box(tuple(w for w, _ in rows), tuple(x for _, x in rows))


def local(t: Tensor) -> Tensor:
    """The memory that this rank holds of a plain tensor or a DTensor."""
    t = t.detach()
    return t.to_local() if isinstance(t, DTensor) else t


def named_tensors(stage: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a stage, or of a module of several stages, under the model's own names; tied ones once.

    To be called between steps, when FSDP holds nothing gathered.
    """
    reshard(stage)
    found: dict[str, Tensor] = dict(stage.named_parameters())
    for path, module in stage.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = buffer
    return {re.sub(r"^(parts\.)?(\d+\.)?model\.", "", name): t for name, t in found.items()}


def canonical(name: str, tied: Sequence[Sequence[str]]) -> str:
    """The one name, of those of a tied tensor, under which it is written."""
    return next((group[0] for group in tied if name in group), name)


def gather_objects(mine: Any) -> list[Any]:
    """`mine` of every rank, on rank 0; nothing elsewhere. Collective."""
    if not dist.is_initialized():
        return [mine]
    found: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(mine, found or None)
    return found


def from_first(value: Any) -> Any:
    """Rank 0's value on every rank. Collective."""
    if dist.is_initialized():
        held = [value]
        dist.broadcast_object_list(held)
        value = held[0]
    return value


def is_first() -> bool:
    """Whether this process writes for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def stop_where(problem: str | None, error: type[Refused]) -> None:
    """Raises `error` with the sentence on rank 0, where rank 0 has one; the other ranks then leave quietly. Collective."""
    problem = from_first(problem)
    if problem:
        raise error(problem) if is_first() else SystemExit(0)
