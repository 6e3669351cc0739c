"""A class constructed without its memory, and its weights made shard by shard.

The constructor runs on fake tensors while every operator that it calls is recorded. A parameter's value is then what the operators that
led to it give when they run again, each random one from a seed of its own: whatever a constructor does, the weights depend on the
seed and not on which rank holds what. A rank has one whole tensor at a time.
"""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from meshwright.codegen.apply import Parallel, packed_parameters
from meshwright.codegen.runtime.weights import allocate, copy_shard
from meshwright.profiling.errors import InputError
from meshwright.profiling.live import without_cache
from meshwright.profiling.loading import one_line

_trunc_normal_: Callable[..., Tensor] = nn.init._no_grad_trunc_normal_


@dataclass(frozen=True)
class Ref:
    """A tensor as it was when it was recorded. It keeps its storage, so that no two have one address."""

    storage: Any
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    real: bool

    @classmethod
    def of(cls, t: Tensor) -> Ref:
        return cls(t.untyped_storage(), t.dtype, int(t.storage_offset()), tuple(t.shape), t.stride(), not isinstance(t, FakeTensor))

    @property
    def key(self) -> int:
        return int(self.storage._cdata)


@dataclass(frozen=True)
class Call:
    """What a constructor called: an operator, or a function that is one here, with a Ref for every tensor.

    `changed`: what it writes in place; `draw`: how many random ones came before it, None where it is not random.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Ref]
    changed: list[Ref]
    draw: int | None

    @property
    def reads(self) -> set[int]:
        return {r.key for r in tree_leaves((self.args, self.kwargs)) if isinstance(r, Ref)}

    @property
    def writes(self) -> set[int]:
        """Storages that it makes or changes; none for a view."""
        return {r.key for r in self.changed} | ({r.key for r in self.results} - self.reads)


class Recorder(TorchDispatchMode):
    """Keeps every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.draws = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        taken = _refs((args, kwargs))
        out = func(*args, **kwargs)
        declared = func._schema.arguments
        named = {a.name: v for a, v in zip(declared, taken[0], strict=False)} | taken[1]
        changed = [named.get(a.name) for a in declared if a.alias_info is not None and a.alias_info.is_write]
        self._keep(func, taken[0], taken[1], _flat(_refs(out)), _flat(changed), torch.Tag.nondeterministic_seeded in func.tags)
        return out

    def trunc_normal_(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """torch's own draws again what falls outside, until nothing does: on fake tensors it is one operator."""
        own = Ref.of(tensor)
        self._keep(_trunc_normal_, (own, *args), kwargs, [own], [own], True)
        return tensor

    def _keep(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[Ref], changed: list[Ref], random: bool
    ) -> None:  # fmt: skip
        self.calls.append(Call(func, args, kwargs, results, changed, self.draws if random else None))
        self.draws += random


class Construction:
    """A constructed module: `template` has its tensors on meta, value() makes one of them."""

    def __init__(self, template: nn.Module, calls: list[Call]) -> None:
        self.template, self.calls = template, calls
        self._writers: dict[int, list[int]] = defaultdict(list)
        for i, call in enumerate(calls):
            for s in call.writes:
                self._writers[s].append(i)
        self._made: dict[str, Ref] = {}
        self.attributes: list[tuple[str, str]] = []  # tensors that are neither parameters nor buffers: module and name
        on_meta: dict[int, Any] = {}
        for path, module in template.named_modules():
            for held in (module._parameters, module._buffers, vars(module)):
                for name, t in held.items():
                    if isinstance(t, Tensor):
                        self._made[f"{path}.{name}" if path else name] = Ref.of(t)
                        held[name] = on_meta.setdefault(id(t), _blank(t))  # type: ignore[index]
                        if held is vars(module):
                            self.attributes.append((path, name))

    @torch.no_grad()
    def value(self, name: str, seed: int) -> Tensor:
        """The whole of a parameter, buffer or attribute, by its path, as the constructor leaves it."""
        wanted = self._made[name]
        needed, left = set[int](), [wanted.key]
        found: set[int] = set(left)
        while left:
            for i in self._writers[left.pop()]:
                if i not in needed:
                    needed.add(i)
                    fresh = self.calls[i].reads - found
                    found |= fresh
                    left += fresh
        held: dict[int, torch.UntypedStorage] = {}
        with kept_rng():
            for i in sorted(needed):
                _run(self.calls[i], held, seed)
        return _real(wanted, held)


def construct(make: Callable[[], nn.Module], name: str) -> Construction:
    """Runs a constructor on fake tensors. InputError where it needs the values that these have not."""
    recorder = Recorder()
    try:
        drawn = mock.patch.object(nn.init, "_no_grad_trunc_normal_", recorder.trunc_normal_)
        with kept_rng(), drawn, FakeTensorMode(allow_non_fake_inputs=True), recorder:
            made = make()
    except InputError:
        raise
    except Exception as e:
        raise InputError(f"{name} cannot be constructed without its memory: {one_line(e)}; decorate an instance of it instead") from None
    without_cache(made)
    return Construction(made, recorder.calls)


@torch.no_grad()
def materialise(parallel: Parallel, made: Construction, seed: int) -> None:
    """Gives a sharded model on meta its memory and weights. Tensors are made one at a time, on the CPU, and cut to this rank's part."""
    packed = packed_parameters(parallel.plan)
    device = torch.device("cuda", torch.cuda.current_device()) if parallel.mesh.device_type == "cuda" else torch.device("cpu")
    for part in parallel.parts:
        allocate(part, device)
        for name, t in (*part.named_parameters(), *part.named_buffers()):
            path = name.removeprefix("model.")
            copy_shard(t, made.value(path, seed).to(device), packed.get(path))


@contextlib.contextmanager
def kept_rng() -> Iterator[None]:
    """Leaves the random streams of torch, numpy and Python as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _refs(tree: Any) -> Any:
    return tree_map_only(Tensor, Ref.of, tree)


def _flat(tree: Any) -> list[Ref]:
    return [r for r in tree_leaves(tree) if isinstance(r, Ref)]


def _blank(t: Tensor) -> Tensor:
    made = torch.empty(t.shape, dtype=t.dtype, device="meta")
    return nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made


def _real(r: Ref, held: dict[int, torch.UntypedStorage]) -> Tensor:
    """The tensor over the storage that stands for the recorded one."""
    if r.key not in held:
        if not r.real:
            raise InputError(f"a tensor of shape {r.size} was made outside of torch's operators: decorate an instance instead of the class")
        held[r.key] = r.storage.clone()  # was there before, or came from numpy
    made = torch.empty(0, dtype=r.dtype, device=held[r.key].device)
    return made.set_(held[r.key], r.offset, r.size, r.stride)  # type: ignore[arg-type]


def _run(call: Call, held: dict[int, torch.UntypedStorage], seed: int) -> None:
    args, kwargs = tree_map_only(Ref, lambda r: _real(r, held), (call.args, call.kwargs))
    if call.draw is not None:
        own = kwargs.pop("generator", None)
        torch.manual_seed(_seed(seed if own is None else own.initial_seed(), call.draw))
    out = call.func(*args, **kwargs)
    made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    for ref, real in zip(call.results, made, strict=True):
        if ref.key not in held:
            if "empty" in str(call.func):
                real.zero_()  # what no initialisation reaches is equal on all ranks
            held[ref.key] = real.untyped_storage()


def _seed(seed: int, draw: int) -> int:
    return (seed * 1_000_003 + draw) % 2**63
