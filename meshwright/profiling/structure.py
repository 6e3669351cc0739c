"""Which modules of a model repeat: the layer lists that are walked in order, and a shortened model with two of each kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Chain:
    """A list of layers that the model calls once each, in order, each taking the tensor that the one before it returned.

    `kinds[i]` is the structural class of layer i.
    """

    path: str
    kinds: tuple[int, ...]

    def kept(self, copies: int) -> tuple[int, ...]:
        """The layers that a shortened model keeps: the first `copies` of each class (0: all of them)."""
        return tuple(i for i, kind in enumerate(self.kinds) if not copies or self.kinds[:i].count(kind) < copies)


def find_chains(model: nn.Module, args: Sequence[Tensor], kwargs: dict[str, Tensor]) -> tuple[Chain, ...]:
    """Runs the model once (on meta) and returns its layer chains, outermost first, none inside another."""
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1}
    calls: dict[int, list[tuple[int, set[int], set[int]]]] = {id(m): [] for m in lists.values()}
    keep_alive: list[Any] = []
    with ExitStack() as stack:
        for container in lists.values():
            log = calls[id(container)]
            for i, child in enumerate(container):

                def hook(_: nn.Module, a: Any, k: Any, out: Any, log: Any = log, i: int = i) -> None:
                    ins, outs = tree_leaves((a, k)), tree_leaves(out)
                    keep_alive.extend((ins, outs))
                    log.append((i, _ids(ins), _ids(outs)))

                stack.callback(child.register_forward_hook(hook, with_kwargs=True).remove)
        with torch.no_grad():
            model(*args, **kwargs)
    found: list[Chain] = []
    for path, container in lists.items():
        log = calls[id(container)]
        in_order = [i for i, _, _ in log] == list(range(len(container)))
        linked = all(a[2] & b[1] for a, b in zip(log, log[1:], strict=False))
        nested = any(path.startswith(c.path + ".") for c in found)
        if in_order and linked and not nested and any(True for _ in container.parameters()):
            kinds = kinds_of(list(container))
            if len(set(kinds)) < len(kinds):
                found.append(Chain(path, kinds))
    return tuple(found)


def _ids(leaves: list[Any]) -> set[int]:
    return {id(t) for t in leaves if isinstance(t, Tensor)}


def kinds_of(layers: list[nn.Module]) -> tuple[int, ...]:
    """Structural class of each layer: equal classes have equal submodules, parameter shapes and settings.

    A setting that is the layer's own position in every layer (layer_idx) does not make a class.
    """
    parts = [_describe(layer) for layer in layers]
    common = set.intersection(*(set(settings) for _, settings in parts))
    positional = {k for k in common for base in (0, 1) if all(s[k] == i + base for i, (_, s) in enumerate(parts))}
    numbers: dict[Any, int] = {}
    keys = [(structure, tuple((k, s[k]) for k in sorted(s) if k not in positional)) for structure, s in parts]
    return tuple(numbers.setdefault(key, len(numbers)) for key in keys)


def _describe(layer: nn.Module) -> tuple[Any, dict[str, Any]]:
    """Submodules with their parameter shapes, and every plain setting by path."""
    structure, settings = [], {}
    for name, m in layer.named_modules():
        shapes = tuple((n, tuple(p.shape), p.dtype) for n, p in m.named_parameters(recurse=False))
        structure.append((name, type(m).__qualname__, shapes))
        for key, value in vars(m).items():
            if isinstance(value, bool | str | float | int) and not key.startswith("_"):
                settings[f"{name}.{key}"] = repr(value) if isinstance(value, bool | str) else value
    return tuple(structure), settings


@contextmanager
def shortened(model: nn.Module, chains: Sequence[Chain], copies: int) -> Iterator[nn.Module]:
    """While it is open, each chain of `model` holds only its `kept(copies)` layers, and configuration lists with them."""
    with ExitStack() as stack:
        config = getattr(model, "config", None)
        for chain in chains:
            parent, _, name = chain.path.rpartition(".")
            owner = model.get_submodule(parent)
            full = getattr(owner, name)
            setattr(owner, name, type(full)(*_as_init(full, chain.kept(copies))))
            stack.callback(setattr, owner, name, full)
            for key, value in list(vars(config).items()) if config is not None else ():
                if isinstance(value, list) and len(value) == len(chain.kinds):
                    stack.enter_context(mock.patch.dict(vars(config), {key: [value[i] for i in chain.kept(copies)]}))
        yield model


def _as_init(container: Any, kept: Sequence[int]) -> tuple[Any, ...]:
    layers = [container[i] for i in kept]
    return tuple(layers) if isinstance(container, nn.Sequential) else (layers,)
