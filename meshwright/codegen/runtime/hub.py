"""Weights in the Hugging Face hub's layout (safetensors), into and out of any sharding.

Reading, a rank reads only the slices that it holds. Writing, one whole parameter at a time exists on the ranks of its stage, and on rank 0
also the file that is being filled. Where transformers keeps a model under other names than the hub does, or stacks what the hub keeps apart
(experts), its own table of conversions says how. Buffers that no file holds are not touched (weights.remake_buffers).
"""

import copy
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .shards import Packed, Refused, boxes, canonical, from_first, gather_objects, is_first, local, stop_where
from .weights import gather_full

GB = 10**9
FLOATS = {"F64", "F32", "F16", "BF16"}
Slices = tuple[slice, ...]


class WeightsMismatch(Refused):
    """The files lack a tensor of the model, hold it in another shape, or cannot be read or written."""


class _Files:
    """The tensors of a safetensors file, or of a folder of them."""

    def __init__(self, source: str | Path) -> None:
        path = Path(source)
        index = path / "model.safetensors.index.json"
        self.name = path
        self.opened: dict[Path, Any] = {}
        self.where: dict[str, Path] = {}
        if index.exists():
            self.name = index
            self.where = {k: path / f for k, f in json.loads(index.read_text())["weight_map"].items()}
            return
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            if file.exists():
                self.where.update(dict.fromkeys(self._open(file).keys(), file))

    def _open(self, file: Path) -> Any:
        from safetensors import safe_open

        if file not in self.opened:
            self.opened[file] = safe_open(file, framework="pt")
        return self.opened[file]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._open(self.where[key]).get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        return str(self._open(self.where[key]).get_slice(key).get_dtype())

    def read(self, key: str, which: Slices) -> Tensor:
        opened = self._open(self.where[key])
        found: Tensor = opened.get_slice(key)[which] if which else opened.get_tensor(key)
        return found


@dataclass
class _Source:
    """Where a tensor of the model lies in the files: `parts` laid end to end along `dim`, each one tensor, or several stacked first."""

    files: _Files
    parts: list[list[str]]
    dim: int = 0
    stacked: bool = False

    def shape(self) -> tuple[int, ...]:
        shapes = [self._part_shape(p) for p in self.parts]
        return tuple(sum(s[d] for s in shapes) if d == self.dim else n for d, n in enumerate(shapes[0]))

    def _part_shape(self, keys: Sequence[str]) -> tuple[int, ...]:
        return (len(keys),) * self.stacked + self.files.shape(keys[0])

    def read(self, which: Slices) -> Tensor:
        """A box of the tensor."""
        if len(self.parts) == 1:
            return self._read_part(self.parts[0], which)
        found, at, wanted = [], 0, which[self.dim]
        for keys in self.parts:
            n = self._part_shape(keys)[self.dim]
            inside = slice(max(wanted.start - at, 0), min(wanted.stop - at, n))
            if inside.start < inside.stop:
                found.append(self._read_part(keys, (*which[: self.dim], inside, *which[self.dim + 1 :])))
            at += n
        return torch.cat(found, self.dim)

    def _read_part(self, keys: Sequence[str], which: Slices) -> Tensor:
        if not self.stacked:
            return self.files.read(keys[0], which)
        return torch.stack([self.files.read(k, which[1:]) for k in keys[which[0]]])


@torch.no_grad()
def load_safetensors(
    source: str | Path, tensors: Mapping[str, Tensor], *, model: nn.Module | None = None, packed: Packed | None = None,
    tied: Sequence[Sequence[str]] = (),
) -> None:  # fmt: skip
    """Fills a rank's tensors (shards.named_tensors) from a safetensors file, or a folder with several and their index. Collective.

    `model`: the transformers model, on any device and however cut up, so that the hub's names and separate experts are read. `packed` and
    `tied` as for checkpoint.save. Raises WeightsMismatch on rank 0 where a tensor is missing or has another shape.
    """
    from safetensors import SafetensorError

    wanted = {name: next((g for g in tied if name in g), (name,)) for name in tensors}
    try:
        files = _Files(source)
        sources = _sources(files, model, {n for names in wanted.values() for n in names})
        found = {name: next((sources[n] for n in (name, *names) if n in sources), None) for name, names in wanted.items()}
        problem = next((p for name, t in tensors.items() if (p := _problem(files, name, t, found[name]))), None)
    except WeightsMismatch as e:
        problem = str(e)
    except (OSError, SafetensorError) as e:
        problem = f"{source} cannot be read: {e}"
    stop_where(next((p for p in gather_objects(problem) if p), None), WeightsMismatch)
    for name, t in tensors.items():
        into, held = local(t), found[name]
        assert held is not None
        for box in boxes(t, (packed or {}).get(name)):
            into[box.local].copy_(held.read(box.whole))


def _problem(files: _Files, name: str, t: Tensor, found: _Source | None) -> str | None:
    if found is None or len({len(keys) for keys in found.parts}) > 1:
        return f"{files.name} has no tensor {name}" if files.where else f"{files.name} holds no safetensors file"
    shape, kinds = found.shape(), {files.dtype(keys[0]) for keys in found.parts}
    if shape != t.shape:
        return f"{name} is {list(shape)} in {files.name} and {list(t.shape)} in the model"
    if t.is_floating_point() and not kinds <= FLOATS:
        return f"{name} is {' and '.join(sorted(kinds))} in {files.name}: quantised weights must be converted to floating point first"
    return None


def _conversions(model: Any, legacy: bool = True) -> tuple[list[Any], list[Any]]:
    """What transformers does to the hub's tensors of this model: names that it changes, tensors that it puts together."""
    if not hasattr(model, "base_model_prefix"):
        return [], []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    found = get_model_conversion_mapping(model, add_legacy=legacy)
    return [c for c in found if not isinstance(c, WeightConverter)], [c for c in found if isinstance(c, WeightConverter)]


def _sources(files: _Files, model: Any, wanted: set[str]) -> dict[str, _Source]:
    """Where each of the wanted names lies in the files."""
    renamings, converters = _conversions(model)
    prefix = getattr(model, "base_model_prefix", "") + "."
    sources: dict[str, _Source] = {}
    for key in sorted(files.where, key=_natural):
        name, part, converter = key, None, None
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        for converter in converters:
            name, part = converter.rename_source_key(name)
            if part is not None:
                break
        # files of the model without its head leave out the first word of names, or the model here is the one without
        name = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in wanted), name)
        if name not in wanted:
            continue
        if part is None:
            sources[name] = _Source(files, [[key]])
            continue
        assert converter is not None
        stacked, dim = _understood(converter, files, name)
        held = sources.setdefault(name, _Source(files, [[] for _ in converter.source_patterns], dim, stacked))
        held.parts[converter.source_patterns.index(part)].append(key)
    return sources


def _understood(converter: Any, files: _Files, name: str) -> tuple[bool, int]:
    """Whether the parts of a tensor are stacked, and the dimension along which parts are joined."""
    ops = {type(op).__name__: op.dim for op in converter.operations if hasattr(op, "dim")}
    if len(ops) < len(converter.operations) or not set(ops) <= {"MergeModulelist", "Concatenate"} or ops.get("MergeModulelist", 0) != 0:
        names = ", ".join(type(op).__name__ for op in converter.operations)
        raise WeightsMismatch(f"{files.name} holds {name} in a form that cannot be read in slices ({names}): save it once with transformers 5")
    return "MergeModulelist" in ops, ops.get("Concatenate", 0)


def _natural(key: str) -> list[tuple[int, str]]:
    """A sort key that puts experts.10 after experts.9."""
    return [(int(x), "") if x.isdigit() else (-1, x) for x in re.split(r"(\d+)", key)]


@torch.no_grad()
def save_safetensors(
    folder: str | Path, tensors: Mapping[str, Tensor], *, model: nn.Module | None = None, packed: Packed | None = None,
    tied: Sequence[Sequence[str]] = (), dtype: torch.dtype | None = None, shard_bytes: int = 5 * GB,
) -> None:  # fmt: skip
    """Writes the whole model as the hub keeps it: safetensors files of about `shard_bytes`, their index, and config.json. Collective.

    Arguments as for load_safetensors. `dtype`: what floating-point tensors are written in, else their own. The folder appears whole or not
    at all; it must not exist. A file is longer than `shard_bytes` where one parameter is.
    """
    folder = Path(folder)
    problem = f"{folder} exists: name a new folder" if is_first() and folder.exists() else None
    for converter in _conversions(model)[1]:
        if len(converter.target_patterns) > 1:
            problem = f"the hub keeps {' and '.join(converter.target_patterns)} as one tensor: save a checkpoint, and write it in one process"
    stop_where(problem, WeightsMismatch)
    partial = folder.with_name(f"{folder.name}.partial")
    writer = _Writer(partial, model, shard_bytes) if is_first() else None
    for name, full in _whole_tensors(tensors, packed or {}, tied, dtype):
        if writer is not None:
            writer.add(name, full)
    if writer is not None:
        writer.finish()
        partial.rename(folder)
    from_first(None)


def _whole_tensors(
    tensors: Mapping[str, Tensor], packed: Packed, tied: Sequence[Sequence[str]], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Each tensor of the model once, whole: on rank 0, and before that on the ranks that hold it."""
    mine = {canonical(n, tied): (n, t) for n, t in tensors.items()}
    held = gather_objects([(n, tuple(t.shape), t.dtype) for n, (_, t) in mine.items()])
    first = {n: (rank, shape, kind) for rank, names in reversed(list(enumerate(held))) for n, shape, kind in names}
    order = [n for names in held for n, _, _ in names]
    rank = dist.get_rank() if dist.is_initialized() else 0
    for name, (owner, shape, kind) in from_first({n: first[n] for n in order}).items():
        into = dtype if dtype is not None and kind.is_floating_point else kind
        full = None
        if name in mine:
            own, t = mine[name]
            full = gather_full(t.detach().to(into), packed.get(own)).contiguous()
        if rank == 0 and owner != 0:
            full = torch.empty(shape, dtype=into, device=_device(tensors))
            dist.recv(full, owner)
        elif rank == owner and owner != 0:
            assert full is not None
            dist.send(full, 0)
        if rank == 0:
            assert full is not None
            yield name, full.cpu()


def _device(tensors: Mapping[str, Tensor]) -> torch.device:
    return next((local(t).device for t in tensors.values()), torch.device("cpu"))


class _Writer:
    """Fills files one after the other; names them when their number is known."""

    def __init__(self, folder: Path, model: Any, most: int) -> None:
        self.folder, self.model, self.most = folder, model, most
        self.renamed = any(_conversions(model, legacy=False))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.held: dict[str, Tensor] = {}
        self.files: list[dict[str, int]] = []  # of each file: bytes by name
        self.dtype: torch.dtype | None = None

    def add(self, name: str, full: Tensor) -> None:
        for key, value in (_as_on_hub(self.model, name, full) if self.renamed else {name: full}).items():
            if self.held and sum(t.nbytes for t in self.held.values()) + value.nbytes > self.most:
                self._write()
            self.held[key] = value.clone()
            self.dtype = self.dtype or (value.dtype if value.is_floating_point() else None)

    def _write(self) -> None:
        from safetensors.torch import save_file

        save_file(self.held, self.folder / f"{len(self.files)}.safetensors", metadata={"format": "pt"})
        self.files.append({k: t.nbytes for k, t in self.held.items()})
        self.held = {}

    def finish(self) -> None:
        self._write()
        n = len(self.files)
        names = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" if n > 1 else "model.safetensors" for i in range(n)]
        for i, name in enumerate(names):
            (self.folder / f"{i}.safetensors").rename(self.folder / name)
        if n > 1:
            where = {key: name for name, keys in zip(names, self.files, strict=True) for key in keys}
            index = {"metadata": {"total_size": sum(sum(f.values()) for f in self.files)}, "weight_map": where}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if hasattr(self.model, "config"):
            config = copy.deepcopy(self.model.config)
            config.dtype = self.dtype
            config.architectures = config.architectures or [type(self.model).__name__]
            config.save_pretrained(self.folder)


def _as_on_hub(model: Any, name: str, full: Tensor) -> dict[str, Tensor]:
    """One tensor under the hub's name, or taken apart as the hub keeps it."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(model, {name: full})
    return found
