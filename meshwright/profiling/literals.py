"""Which attribute of a module a size in its code comes from.

A user's attention writes `x.view(b, s, self.heads, -1)`. Sharded over tensor-parallel ranks the code is still right if
`heads` is set to the local number, and only then. To know which attribute a size follows, the module's forward is run again
on meta with that attribute doubled: a size that doubles is proportional to it. The call itself is made with the sizes of
the first run, so that the rest of the forward goes on as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

UNSETTABLE = "!"  # before an attribute that a size follows but that cannot be set to a local value
SIZED = frozenset(("view", "reshape", "split", "split_with_sizes", "expand", "unflatten"))
FILLED = frozenset(("zeros", "ones", "empty"))  # made of sizes alone
COUNTED = {"histc": "bins", "bincount": "minlength", "one_hot": "num_classes"}  # how many classes are counted (experts): an argument each


@dataclass
class Call:
    """One call that takes sizes: the function and its integer arguments in order."""

    name: str
    sizes: tuple[int, ...]
    follows: dict[int, str] = field(default_factory=dict)  # position among `sizes` -> attribute, UNSETTABLE + attribute


class _Recorder(TorchFunctionMode):
    """Records calls that take sizes; replays them with the sizes of `baseline` if one is given."""

    def __init__(self, baseline: list[Call] | None = None) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.baseline = baseline

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if isinstance(kwargs.get(COUNTED.get(name)), int):
            self.calls.append(Call(name, (kwargs[COUNTED[name]],)))
            return func(*args, **kwargs)
        if name not in FILLED and (name not in SIZED or not args or not isinstance(args[0], Tensor)):
            return func(*args, **kwargs)
        given = args[:1] if name in SIZED else ()
        rest, sizes = _numbers(args[len(given) :], kwargs)
        i = len(self.calls)
        self.calls.append(Call(name, tuple(sizes)))
        if self.baseline is not None and i < len(self.baseline) and len(self.baseline[i].sizes) == len(sizes):
            new_args, new_kwargs = _with_numbers(rest, list(self.baseline[i].sizes))
            return func(*given, *new_args, **new_kwargs)
        return func(*args, **kwargs)


def _numbers(args: Any, kwargs: Any) -> tuple[Any, list[int]]:
    from torch.utils._pytree import tree_flatten

    leaves, spec = tree_flatten((tuple(tuple(a) if isinstance(a, torch.Size) else a for a in args), dict(kwargs)))
    return (leaves, spec), [x for x in leaves if isinstance(x, int) and not isinstance(x, bool)]


def _with_numbers(rest: Any, sizes: list[int]) -> Any:
    from torch.utils._pytree import tree_unflatten

    leaves, spec = rest
    it = iter(sizes)
    return tree_unflatten([next(it) if isinstance(x, int) and not isinstance(x, bool) else x for x in leaves], spec)


def probe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
    """The sized calls of a module's forward (and its submodules'), each with the attributes of `module` that it follows."""
    with torch.no_grad():
        with _Recorder() as first:
            module.forward(*args, **kwargs)
        for name in attributes_read(type(module)):
            value = vars(module).get(name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 2:
                continue
            # the attribute may be more than a size; what was recorded before it failed still counts
            with mock.patch.object(module, name, 2 * value), _Recorder(first.calls) as again, contextlib.suppress(Exception):
                module.forward(*args, **kwargs)
            moved = [
                (call, i, y == 2 * x)
                for call, after in zip(first.calls, again.calls, strict=False)
                if call.name == after.name and len(call.sizes) == len(after.sizes)
                for i, (x, y) in enumerate(zip(call.sizes, after.sizes, strict=True))
                if x != y
            ]
            # an attribute that also moves other sizes in another way (heads in width // heads) has no local value
            settable = all(doubled for _, _, doubled in moved)
            for call, i, doubled in moved:
                if doubled:
                    call.follows.setdefault(i, name if settable else UNSETTABLE + name)
    return first.calls


_READ: dict[type, tuple[str, ...]] = {}


def attributes_read(cls: type) -> tuple[str, ...]:
    """Names that the methods of a class (but its constructor) mention, in a fixed order."""
    if cls not in _READ:
        names: set[str] = set()
        for base in cls.__mro__:
            if base in (nn.Module, object):
                continue
            for key, fn in vars(base).items():
                while hasattr(fn, "__wrapped__"):
                    fn = fn.__wrapped__
                if key != "__init__" and hasattr(fn, "__code__"):
                    names.update(fn.__code__.co_names)
        _READ[cls] = tuple(sorted(names))
    return _READ[cls]


def probe_all(model: nn.Module, args: Iterable[Tensor], kwargs: dict[str, Tensor]) -> tuple[dict[str, list[Call]], frozenset[str]]:
    """Runs the model once on meta and probes every module that is called once.

    Returns the sized calls of each one's forward, its submodules' included, by path, and the paths that are called once.
    """
    seen: dict[str, list[tuple[Any, Any]]] = {}
    handles = []
    for path, m in model.named_modules():
        if path == "":
            continue
        handles.append(m.register_forward_pre_hook(lambda _, a, k, path=path: seen.setdefault(path, []).append((a, dict(k))), with_kwargs=True))
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for h in handles:
            h.remove()
    found = {}
    for path, calls in seen.items():
        if len(calls) == 1 and path:
            try:
                found[path] = probe(model.get_submodule(path), *calls[0])
            except Exception:
                continue  # a forward that does not run twice tells nothing
    return found, frozenset(path for path, calls in seen.items() if len(calls) == 1)
