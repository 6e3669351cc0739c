"""What a program holds in memory, storage by storage: live bytes by category, the peak's moment and its call site, the collectives.

A dispatch mode sees every operator below autograd. An output's storage counts from then on until its last reference dies, whatever
views share it; a storage that FSDP resizes counts with the size that it has. Temporaries inside a kernel are not seen. Operators on a
DTensor count by their local result, so that what its sharding propagation makes for shapes alone does not.

What a storage is for is decided after the run, from what became of it: made by forward and read by backward is an activation.
"""

from __future__ import annotations

import bisect
import os
import site
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

_TORCH = os.path.dirname(torch.__file__) + os.sep
_ROOTS = tuple(p + os.sep for p in sorted({os.path.dirname(_TORCH.rstrip(os.sep)), *site.getsitepackages()}, key=len, reverse=True))
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_OWN = tuple(os.path.join(os.path.dirname(__file__), f"{name}.py") for name in ("tracker", "measured", "fake", "dryrun", "dryrun_script"))
HOST = "meta"  # the device that stands for the host's memory, where a run on a CPU offloads to it: what lies there is counted apart
CATEGORIES = ("parameters", "gradients", "optimizer", "gathered", "activations", "communication", "inputs", "temporaries")
_NAMED = "meshwright module"
_GROUPED = torch.ops.aten._grouped_mm.default
_WAIT = torch.ops._c10d_functional.wait_tensor.default
_LIFT = torch.ops.aten.lift_fresh.default  # of a tensor that Python just made


@dataclass(slots=True)
class Lifetime:
    """One storage: `changes` are (time, bytes from then on); the last is 0 bytes once it has died."""

    op: str
    phase: str  # "setup", "forward", "recompute", "backward", "weights", "optimizer", or "step": what stands around them, like the loss
    module: str
    changes: list[tuple[int, int]]
    resized: bool = False
    sent: bool = False  # a collective read or wrote it
    kind: str = ""  # what it is, where someone told

    @property
    def born(self) -> int:
        return self.changes[0][0]


@dataclass(frozen=True)
class Moment:
    """Where a program is: its phase, the module (of the forward, whose backward runs), the operator and the line."""

    time: int
    live_bytes: int
    phase: str
    module: str
    op: str
    site: str


@dataclass(frozen=True)
class Failure:
    """The last operator that raised: its name, the module, the shapes of its tensors."""

    error: Exception
    op: str
    module: str
    shapes: tuple[tuple[int, ...], ...]


@dataclass
class Collective:
    """One kind of communication: the operator, the group's name and size, bytes of one call (its larger side), and how often."""

    op: str
    group: str
    ranks: int
    nbytes: int
    phase: str
    count: int = 0


def storages_of(x: Any) -> Iterable[torch.UntypedStorage]:
    """The storages behind every tensor in a structure, a subclass's inner tensors included."""
    return (storage for storage, _ in _placed(x))


def _placed(x: Any) -> Iterable[tuple[torch.UntypedStorage, str]]:
    """Storages with the device type that each is on."""
    for t in tree_leaves(x):
        if not isinstance(t, Tensor):
            continue
        if is_traceable_wrapper_subclass(t):
            names, _ = t.__tensor_flatten__()
            for n in names:
                yield from _placed(getattr(t, n))
        elif t.layout == torch.strided:
            yield t.untyped_storage(), t.device.type


class Tracker(TorchDispatchMode):
    """Follows storages while it is entered. `groups` maps a process group's name to what to call it.

    `phase` and `module` are set by watch(), which hooks a module tree; `told` marks what storages are for.
    """

    def __init__(self, groups: Callable[[str], tuple[str, int]] | None = None) -> None:
        super().__init__()
        self.lifetimes: list[Lifetime] = []
        self.collectives: dict[tuple[Any, ...], Collective] = {}
        self.live_bytes = self.host_bytes = 0
        self.peaks: dict[tuple[str, str], Moment] = {}  # the fullest moment by phase and module
        self.backwards: list[int] = []  # times at which a backward began
        self.optimizing = False
        self.paused = False
        self.failure: Failure | None = None
        self._time = 0
        self._modules: list[str] = []
        self._behind = ""  # the module whose backward runs
        self.weights = ""  # the module whose weight's gradient runs, apart from the backward
        self._held: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._task = -1
        self._groups = groups or (lambda name: (name, 0))
        self._hooks: list[Any] = []
        self._resize: Any = None

    # -- where the program is

    @property
    def phase(self) -> str:
        if self.optimizing:
            return "optimizer"
        if self.weights:
            return "weights"
        if torch._C._current_graph_task_id() == -1:
            return "forward" if self._modules else "step"
        return "recompute" if self._modules else "backward"

    @property
    def module(self) -> str:
        if self.weights:
            return self.weights
        return self._modules[-1] if self._modules else self._behind if torch._C._current_graph_task_id() != -1 else ""

    def watch(self, root: nn.Module) -> None:
        """Names what runs after the modules of `root`."""
        for name, m in root.named_modules():
            self._hooks.append(m.register_forward_pre_hook(self._enter(name), prepend=True))
            self._hooks.append(m.register_forward_hook(self._leave(name), always_call=True))

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._modules.append(name)

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def reached(grad: Tensor) -> None:
            self._behind = name

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._modules and self._modules[-1] == name:
                self._modules.pop()
            for t in tree_leaves(output):
                # a module that returns what its last child returned leaves it the child's
                if isinstance(t, Tensor) and t.grad_fn is not None:
                    kept: Any = t.grad_fn.metadata
                    if kept.setdefault(_NAMED, name) == name:
                        t.register_hook(reached)

        return hook

    # -- what is told from outside

    def tell(self, kind: str, tensors: Any) -> None:
        """Says what the storages of some tensors are for; unknown ones are taken up, alive from now on."""
        for storage, device in _placed(tensors):
            if device != HOST:
                self._take(storage, "", "setup").kind = kind

    # -- events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _WAIT and isinstance(args[0], FakeTensor):
            return args[0]  # what waiting returns; the fake kernel makes a new tensor
        try:
            out = func(*args, **(kwargs or {})) if func is not _GROUPED else _grouped_mm(func, args, kwargs or {})
        except Exception as e:
            shapes = tuple(tuple(t.shape) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            self.failure = Failure(e, str(func), self.module, shapes)
            raise
        if self.paused:
            return out
        if func.namespace in ("c10d", "_c10d_functional"):
            self._communicate(func, args, out)
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            if task != -1:
                self.backwards.append(self._time)
        for storage, device in _placed(out):
            # what the operator only passes on, and nobody told of, was there before: a device mesh's ranks, a backend's own buffer
            if storage._cdata not in self._held and (func is _LIFT or not any(storage._cdata == s._cdata for s in storages_of((args, kwargs)))):
                self._take(storage, str(func), device=device)
        return out

    def _take(self, storage: torch.UntypedStorage, op: str, phase: str = "", device: str = "") -> Lifetime:
        """The Lifetime of a storage, begun now if it is new."""
        key = storage._cdata
        if key in self._held:
            return self.lifetimes[self._held[key][0]]
        number, nbytes = len(self.lifetimes), storage.nbytes()
        found = Lifetime(op, phase or self.phase, self.module, [(self._time, 0)], kind="host" if device == HOST else "")
        self.lifetimes.append(found)
        self._held[key] = (number, weakref.ref(storage, lambda _: self._die(key, number)))
        self._change(found, nbytes)
        return found

    def _site(self) -> str:
        """Where the program is: autograd's node in backward, else the line."""
        if self.phase == "backward":
            node = torch._C._current_autograd_node()
            return "" if node is None else str(node.name())
        return "" if self.phase == "optimizer" else _line()

    def _change(self, lifetime: Lifetime, nbytes: int) -> None:
        self._time += 1
        grown = nbytes - lifetime.changes[-1][1]
        lifetime.changes.append((self._time, nbytes))
        if lifetime.kind == "host":
            self.host_bytes += grown
            return
        self.live_bytes += grown
        if grown > 0:
            where = (self.phase, self.module)
            if where not in self.peaks or self.live_bytes > self.peaks[where].live_bytes:
                self.peaks[where] = Moment(self._time, self.live_bytes, *where, lifetime.op, self._site())

    def _die(self, key: int, number: int) -> None:
        if self._held.get(key, (-1,))[0] == number:
            del self._held[key]
        if self.lifetimes[number].changes[-1][1]:
            self._change(self.lifetimes[number], 0)

    def _communicate(self, func: Any, args: Any, out: Any) -> None:
        op = str(func._schema.name).partition("::")[2].strip("_")
        if op in ("wait_tensor", "barrier", "monitored_barrier"):
            return
        nbytes = 0
        for t in tree_leaves((args, out)):
            if isinstance(t, Tensor):
                nbytes = max(nbytes, t.numel() * t.element_size())
                for storage in storages_of(t):
                    held = self._held.get(storage._cdata)
                    if held is not None:
                        self.lifetimes[held[0]].sent = True
        names = [a for a in tree_leaves(args) if isinstance(a, str)] + [_group_name(a) for a in tree_leaves(args)]
        group, ranks = self._groups(next((n for n in reversed(names) if n and n not in ("sum", "avg", "max")), ""))
        key = (op, group, nbytes, self.phase)
        self.collectives.setdefault(key, Collective(op, group, ranks, nbytes, self.phase)).count += 1

    def __enter__(self) -> Tracker:
        self._resize = resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            made = resize(storage, size)
            if not self.paused:
                lifetime = self._take(storage, "resize_")
                lifetime.resized = True
                self._change(lifetime, int(size))
            return made

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        for hook in self._hooks:
            hook.remove()

    def restart(self) -> None:
        """Forgets the peaks and collectives so far: what counts begins now. Storages stay known."""
        self.peaks.clear()
        self.collectives.clear()
        self.backwards.clear()

    # -- what it was

    def peak(self) -> Moment:
        return max(self.peaks.values(), key=lambda m: m.live_bytes)

    def by_category(self, times: Sequence[int]) -> list[dict[str, float]]:
        """Live bytes at each of some times, by what each storage is for."""
        found: list[Counter[str]] = [Counter() for _ in times]
        order = sorted(range(len(times)), key=lambda i: times[i])
        sorted_times = [times[i] for i in order]
        for x in self.lifetimes:
            if x.kind == "host":
                continue
            category = self.category(x)
            for (begin, nbytes), (end, _) in zip(x.changes, [*x.changes[1:], (self._time + 1, 0)], strict=True):
                if nbytes:
                    for i in range(bisect.bisect_left(sorted_times, begin), bisect.bisect_left(sorted_times, end)):
                        found[order[i]][category] += nbytes
        return [{c: float(f[c]) for c in CATEGORIES if f[c]} for f in found]

    def category(self, x: Lifetime) -> str:
        if x.kind:
            return x.kind
        if x.resized:
            return "gathered"
        if x.sent and x.phase == "step":  # what a pipeline receives into
            return "communication"
        born, died = x.born, x.changes[-1][0] if x.changes[-1][1] == 0 else self._time + 1
        later = bisect.bisect_right(self.backwards, born)
        read = x.phase in ("forward", "step") and later < len(self.backwards) and self.backwards[later] < died
        if read or x.phase == "recompute":
            return "activations"
        return "communication" if x.sent else "temporaries"


def _group_name(x: Any) -> str:
    if isinstance(x, dist.ProcessGroup):
        return str(x.group_name)
    if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()):
        return str(dist.ProcessGroup.unbox(x).group_name)
    return ""


def _grouped_mm(func: Any, args: Any, kwargs: Any) -> Any:
    """The grouped product; its fake kernel refuses fp32, which the real one takes."""
    if not isinstance(args[0], FakeTensor) or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    made = func(*(a.bfloat16() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args), **kwargs)
    return torch.empty_like(made, dtype=args[0].dtype)


def _line() -> str:
    """The nearest line outside torch and this package, else the nearest of this package but its dry run."""
    frame: FrameType | None = sys._getframe(1)
    ours = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE):
            if not ours and name not in _OWN:
                ours = f"{shown(name)}:{frame.f_lineno}"
            if name in _OWN and frame.f_code.co_name == "track":
                break
        elif not name.startswith((_TORCH, "<")):
            return f"{shown(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return ours


def shown(path: str) -> str:
    """A path from the current folder, or from where packages are installed."""
    for root in (*_ROOTS, os.getcwd() + os.sep):
        if path.startswith(root):
            return path[len(root) :]
    return path
