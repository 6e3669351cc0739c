"""Checkpoints that any layout reads: parameters, optimizer state and the step, by the model's own names and in its own order.

torch.distributed.checkpoint writes the boxes of whole tensors that each rank holds (shards.py), and reads those that another layout needs:
no rank sends or holds more than its shard. A checkpoint is written as step-000010.partial and renamed by rank 0 once every rank has
finished, so that what is named step-000010 is whole, whenever a rank dies. All ranks must see the same folder.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from .shards import Box, Packed, Refused, boxes, canonical, from_first, gather_objects, is_first, local, stop_where

Tied = Sequence[Sequence[str]]  # groups of names of one tensor
WHOLE = re.compile(r"step-(\d+)")


class CheckpointMismatch(Refused):
    """The checkpoint is of another model or optimizer."""


class _Held(NamedTuple):
    """What a rank holds of a whole tensor of some shape: its memory, and the boxes that lie in it."""

    memory: Tensor
    boxes: list[Box]
    shape: torch.Size

    def chunks(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.sizes)) for b in self.boxes]

    def at(self, offsets: Sequence[int]) -> Tensor:
        """The memory of the box that starts there."""
        return next(self.memory[b.local] for b in self.boxes if b.offsets == tuple(offsets))


class _Saving(DefaultSavePlanner):
    """Writes the boxes of each _Held; of equal boxes on several ranks, one is written."""

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, held in self.state_dict.items():
            about = TensorProperties.create_from_tensor(held.memory)
            for chunk in held.chunks():
                data = TensorWriteData(chunk=chunk, properties=about, size=held.shape)
                items.append(WriteItem(index=MetadataIndex(name, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.state_dict[index.fqn].at(index.offset)  # type: ignore[no-any-return]


class _Loading(DefaultLoadPlanner):
    """Reads the boxes of each _Held, from what was written under the name that `stored_as` gives."""

    def __init__(self, stored_as: Mapping[str, str]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.stored_as = stored_as

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, held in self.state_dict.items():
            stored = self.stored_as[name]
            about = self.metadata.state_dict_metadata[stored]
            assert isinstance(about, TensorStorageMetadata)
            for item in create_read_items_for_chunk_list(stored, about, held.chunks()):
                items.append(replace(item, dest_index=replace(item.dest_index, fqn=name)))
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.state_dict[index.fqn].at(index.offset)  # type: ignore[no-any-return]


def latest(folder: str | Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None."""
    found = _whole(Path(folder))
    return found[max(found)] if found else None


def save(
    folder: str | Path, step: int, tensors: Mapping[str, Tensor], optimizer: Any = None, *, packed: Packed | None = None, tied: Tied = (),
    keep: int = 2,
) -> Path:  # fmt: skip
    """Writes folder/step-<step> and removes all but the newest `keep`; returns its path. Collective.

    `tensors` are this rank's, by the model's own names (shards.named_tensors); `step` is the number of steps done. `packed`: dimension and
    number of pieces of parameters that are sharded inside pieces. `tied`: the model's groups of names of one tensor. Raises
    CheckpointMismatch on rank 0 if the folder holds a later step.
    """
    folder = Path(folder)
    target, partial = folder / f"step-{step:06d}", folder / f"step-{step:06d}.partial"
    newest = max(_whole(folder), default=-1) if is_first() else -1
    stop_where(f"{folder} already holds step {newest}: resume from it, or name a new folder" if newest > step else None, CheckpointMismatch)
    if is_first():
        for left in folder.glob("step-*.partial"):
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    _barrier()
    held: dict[str, _Held] = {}
    for name, t in tensors.items():
        stored, how = canonical(name, tied), (packed or {}).get(name)
        held.setdefault(f"model.{stored}", _Held(local(t), boxes(t, how), t.shape))
        for key, value in _state(optimizer, t).items():
            if isinstance(value, Tensor):
                held.setdefault(f"optimizer.{stored}.{key}", _like(value, t, how))
    planner = _Saving(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.save(held, storage_writer=dcp.FileSystemWriter(partial), planner=planner, no_dist=not dist.is_initialized())
    if is_first():
        _commit(partial, target, {"step": step, "optimizer": _kind(optimizer)}, keep)
    _barrier()
    return target


def load(
    folder: str | Path, tensors: Mapping[str, Tensor], optimizer: Any = None, *, packed: Packed | None = None, tied: Tied = ()
) -> int | None:  # fmt: skip
    """Fills tensors and optimizer state from the newest whole checkpoint in `folder`; the number of steps done, or None. Collective.

    Arguments as for save, of any layout of the same model. Raises CheckpointMismatch on rank 0 if names or shapes differ.
    """
    path = from_first(latest(folder) if is_first() else None)
    if path is None:
        return None
    info = json.loads((path / "step.json").read_text())
    about: Mapping[str, Any] = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    _check(path, about, tensors, tied, None if optimizer is None else (_kind(optimizer), info["optimizer"]))
    states: dict[str, list[str]] = {}
    for name in about:
        parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
        if name.startswith("optimizer."):
            states.setdefault(parameter, []).append(key)
    held: dict[str, _Held] = {}
    stored_as: dict[str, str] = {}
    for name, t in tensors.items():
        stored, how = canonical(name, tied), (packed or {}).get(name)
        held[f"model.{name}"], stored_as[f"model.{name}"] = _Held(local(t), boxes(t, how), t.shape), f"model.{stored}"
        for key in states.get(stored, []) if optimizer is not None else ():
            ours, theirs = f"optimizer.{name}.{key}", f"optimizer.{stored}.{key}"
            held[ours], stored_as[ours] = _like(_made(optimizer, t, key, about[theirs]), t, how), theirs
    dcp.load(held, storage_reader=dcp.FileSystemReader(path), planner=_Loading(stored_as), no_dist=not dist.is_initialized())
    return int(info["step"])


def _whole(folder: Path) -> dict[int, Path]:
    return {int(m[1]): d for d in folder.glob("step-*") if (m := WHOLE.fullmatch(d.name))}


def _commit(partial: Path, target: Path, info: dict[str, Any], keep: int) -> None:
    """Gives a finished checkpoint its name, and removes old ones."""
    with (partial / "step.json").open("w") as f:
        json.dump(info, f)
        f.flush()
        os.fsync(f.fileno())
    if target.exists():
        target.rename(target.with_name(f"{target.name}.old.partial"))
    partial.rename(target)
    old = sorted(_whole(target.parent).items())[:-keep]
    for path in [*(path for _, path in old), *target.parent.glob("step-*.old.partial")]:
        shutil.rmtree(path)


def _check(path: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor], tied: Tied, kinds: tuple[str | None, str | None] | None) -> None:
    """Raises CheckpointMismatch on rank 0 if any rank's tensors differ from those that were written, or the optimizers do."""
    problem, names = None, {f"model.{canonical(n, tied)}": (n, t) for n, t in tensors.items()}
    for stored, (name, t) in names.items():
        if stored not in about:
            problem = problem or f"it has no tensor {name}"
        elif about[stored].size != t.shape:
            problem = problem or f"{name} is {list(about[stored].size)} there and {list(t.shape)} here"
    found = gather_objects((problem, set(names)))
    sentence = next((f"{path} is a checkpoint of another model: {p}" for p, _ in found if p), None)
    if found and sentence is None:
        ours = set().union(*(held for _, held in found))
        extra = next((n.removeprefix("model.") for n in about if n.startswith("model.") and n not in ours), None)
        if extra:
            sentence = f"{path} is a checkpoint of another model: it has a tensor {extra}, which this one has not"
        elif kinds is not None and kinds[0] != kinds[1]:
            sentence = f"{path} holds the state of {kinds[1] or 'no optimizer'}, this run uses {kinds[0]}: use that, or load without an optimizer"
    stop_where(sentence, CheckpointMismatch)


def _owner(optimizer: Any, t: Tensor) -> torch.optim.Optimizer | None:
    """The torch optimizer that updates a parameter: one for all, or one for each (optimizer.Streamed)."""
    each = getattr(optimizer, "each", None)
    return next((o for p, o in each if p is t), None) if each is not None else optimizer


def _kind(optimizer: Any) -> str | None:
    inner = optimizer.each[0][1] if getattr(optimizer, "each", None) else optimizer
    return None if inner is None else type(inner).__name__


def _state(optimizer: Any, t: Tensor) -> dict[str, Any]:
    owner = _owner(optimizer, t)
    return owner.state.get(t, {}) if owner is not None else {}


def _like(value: Tensor, t: Tensor, packed: tuple[int, int] | None) -> _Held:
    """A moment is held as its parameter is; a count of steps whole, by every rank."""
    memory = local(value)
    same = memory.shape == local(t).shape
    return _Held(memory, boxes(t, packed) if same else boxes(value), t.shape if same else value.shape)


def _made(optimizer: Any, t: Tensor, key: str, about: TensorStorageMetadata) -> Tensor:
    """The state of that name of a parameter, made if it has none yet."""
    owner = _owner(optimizer, t)
    assert owner is not None
    state = owner.state[t]
    if not isinstance(state.get(key), Tensor):
        if about.size == t.shape:
            dtype, device = getattr(optimizer, "dtype", None), getattr(optimizer, "device", None)
            state[key] = torch.zeros_like(t, dtype=dtype, device=device, requires_grad=False)
        else:  # where torch keeps the count of steps
            on_device = owner.defaults.get("fused") or owner.defaults.get("capturable")
            state[key] = torch.zeros(about.size, dtype=about.properties.dtype, device=t.device if on_device else "cpu")
    made: Tensor = state[key]
    return made


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
