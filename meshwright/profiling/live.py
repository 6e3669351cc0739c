"""A module that lives in this process, ready to trace: a copy on meta, and inputs made from a sample of them."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.profiling.errors import InputError
from meshwright.profiling.loading import DTYPES, Loaded, call_sample, loaded_hf, loaded_module

# sample(batch, seq), or example tensors with the batch first: one, several in order, or by name with "labels" among them
Sample = Callable[..., Any] | Mapping[str, Tensor] | tuple[Tensor, ...] | Tensor


def on_meta(module: nn.Module) -> nn.Module:
    """A deep copy of a module whose tensors are on meta; the module itself is neither changed nor copied in memory.

    Tensors that are plain attributes become buffers, which a trace knows."""
    memo: dict[int, Any] = {}
    for m in module.modules():
        for p in m._parameters.values():
            if p is not None and id(p) not in memo:
                memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for t in (*m._buffers.values(), *vars(m).values()):
            if isinstance(t, Tensor) and id(t) not in memo:
                memo[id(t)] = torch.empty_like(t, device="meta")
    made = copy.deepcopy(module, memo)
    for m in made.modules():
        for name in [n for n, t in vars(m).items() if isinstance(t, Tensor)]:
            m.register_buffer(name, vars(m).pop(name), persistent=False)
    without_cache(made)
    return made


def without_cache(module: nn.Module) -> None:
    """A transformers model trains without a key-value cache."""
    if is_hf(module) and hasattr(module.config, "use_cache"):
        module.config.use_cache = False


def is_hf(module: nn.Module) -> bool:
    """Whether the module is a model of transformers, without importing that."""
    return "transformers" in sys.modules and isinstance(module, sys.modules["transformers"].PreTrainedModel)


def own_loss(module: nn.Module) -> Callable[[Any, Any], Tensor] | None:
    """loss(output, labels): the module's own method, or the function of that name in the file of its class."""
    if is_hf(module):
        return None
    found = getattr(module, "loss", None) or getattr(sys.modules.get(type(module).__module__), "loss", None)
    return found if callable(found) and not isinstance(found, nn.Module) else None


def load_live(module: nn.Module, sample: Sample | None, *, batch: int, seq: int, precision: str) -> Loaded:
    """A copy of `module` on meta with inputs for `batch` samples, as `sample` makes or shows them.

    Of a model of transformers the class says what it takes; a sample may only say less. InputError where the sample is none.
    """
    if precision not in DTYPES:
        raise InputError(f"unknown precision {precision!r}: it is one of {', '.join(DTYPES)}")
    built = on_meta(module)
    cls = type(module)
    source = f"{cls.__module__}:{cls.__qualname__}"
    if sample is None and not is_hf(module):
        raise InputError(f"{cls.__name__} needs a sample of its inputs: sample=example tensors, batch first, or a function sample(batch, seq)")
    if callable(sample) and not isinstance(sample, Tensor):
        with torch.device("meta"):
            made = call_sample(sample, "sample", batch, seq)
    else:
        made = _stretched(sample, batch) if sample is not None else ((), {}, None)
    if is_hf(module):
        return _loaded_hf(built, made, source, batch=batch, seq=seq, precision=precision)
    home = SimpleNamespace(loss=own_loss(built)) if own_loss(built) else SimpleNamespace()
    loaded = loaded_module(built, home, cls.__name__, source, "sample", made, batch=batch, precision=precision, notes=[])
    loaded.sample_source = ""
    return loaded


def _loaded_hf(built: nn.Module, made: tuple[Any, dict[str, Any], Any], source: str, *, batch: int, seq: int, precision: str) -> Loaded:
    for p in built.parameters():
        p.data = p.data.to(DTYPES[precision])
    name = type(built).__name__
    loaded = loaded_hf(built.train(), built.config, name, source, batch=batch, seq=seq, precision=precision)
    loaded.origin = "module"  # there is no config.json to read again
    extra = next((k for k in made[1] if k not in loaded.kwargs), None)
    if extra is not None:
        takes = ", ".join(loaded.kwargs)
        raise InputError(f"{name} is planned with {takes} and labels alone; its sample has {extra} too: leave it out, and train on whole samples")
    return loaded


def size_of(sample: Sample) -> tuple[int, int]:
    """Samples and sequence length of a sample: its first dimension, and the second of its first input (1 where that has no such
    dimension, or is an image). A function says both as the defaults of its two parameters. InputError where they are not to be had."""
    if callable(sample) and not isinstance(sample, Tensor):
        defaults = [p.default for p in inspect.signature(sample).parameters.values()][:2]
        if not defaults or not all(isinstance(d, int) and d >= 1 for d in defaults):
            raise InputError("sample(batch, seq) needs defaults: they are the global batch and the sequence length, like sample(batch=64, seq=2048)")
        return defaults[0], defaults[1] if len(defaults) > 1 else 1
    tensors = _by_name(sample)
    first = next((t for name, t in tensors.items() if name != "labels"), None)
    if first is None:
        raise InputError("sample has no inputs: it is a tensor, a tuple of tensors, or a dict of them by argument, batch first")
    sizes = {name: int(t.shape[0]) if t.ndim else 0 for name, t in tensors.items()}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        told = ", ".join(f"{name} of shape {tuple(tensors[name].shape)}" for name in sizes)
        raise InputError(f"the tensors of a sample have the batch as their first dimension, and the same one: found {told}")
    tokens = first.ndim == 3 or (first.ndim == 2 and not first.is_floating_point())
    return int(first.shape[0]), int(first.shape[1]) if tokens else 1


def _by_name(sample: Any) -> dict[str, Tensor]:
    held = dict(sample) if isinstance(sample, Mapping) else sample if isinstance(sample, tuple | list) else (sample,)
    named = held if isinstance(held, dict) else {f"input {i}": t for i, t in enumerate(held)}
    for name, t in named.items():
        if not isinstance(t, Tensor):
            where = "it" if isinstance(sample, Tensor) or t is sample else name
            raise InputError(f"sample holds tensors, batch first, or is a function sample(batch, seq): {where} is {type(t).__name__}")
    return named


def _stretched(sample: Sample, batch: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor], Tensor | None]:
    """Inputs like those of `sample`, for `batch` samples on meta."""
    named = {name: torch.zeros(batch, *t.shape[1:], dtype=t.dtype, device="meta") for name, t in _by_name(sample).items()}
    if isinstance(sample, Mapping):
        labels = named.pop("labels", None)
        return (), named, labels
    return tuple(named.values()), {}, None
