"""A training step under the tracker: the fullest moments by what ran then, what was sent, and sums of such runs."""

from __future__ import annotations

import contextlib
import gc
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.distributed.fsdp import FSDPModule

from meshwright.codegen.apply import Parallel, make_optimizer
from meshwright.codegen.fake import fused_attention, group_of, make_inputs
from meshwright.codegen.runtime.experts import balanced_routing
from meshwright.codegen.runtime.optimizer import Streamed
from meshwright.codegen.stage import ProgramStage
from meshwright.codegen.tracker import HOST, Failure, Moment, Tracker, shown
from meshwright.profiling.errors import InputError
from meshwright.profiling.loading import one_line

PHASES = ("forward", "step", "backward", "recompute", "weights", "optimizer")
Label = tuple[str, str]  # phase, and module with its layer counted from the nearer end of its chunk
Sent = tuple[str, str, int, int, str]  # operator, group, ranks, bytes, phase


@dataclass(frozen=True)
class Program:
    """What trains on a rank: its chunks, one step's forward and backward, its optimizer, the tensors that it is fed.

    `layers`: the paths of each chunk's layers below it, where a shortened run labels moments by them.
    """

    parts: Sequence[nn.Module]
    train: Callable[[], Any]
    optimizer: torch.optim.Optimizer | Streamed
    inputs: Any = ()
    layers: Sequence[Sequence[str]] = ()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list({id(p): p for part in self.parts for p in part.parameters()}.values())


@dataclass
class Measured:
    """One tracked run: the fullest moment of each label with its bytes by category, the communication, what offloading keeps on the host."""

    moments: dict[Label, tuple[Moment, dict[str, float]]]
    traffic: dict[Sent, float] = field(default_factory=dict)
    host_bytes: float = 0.0

    @property
    def peak(self) -> tuple[Moment, dict[str, float]]:
        return max(self.moments.values(), key=lambda x: sum(x[1].values()))

    @property
    def by_phase(self) -> dict[str, float]:
        """Bytes of the fullest moment of each phase, in the order of a step."""
        found = {p: max((sum(k.values()) for (q, _), (_, k) in self.moments.items() if p == q), default=0.0) for p in PHASES}
        return {p: v for p, v in found.items() if v}

    def plus(self, less: Measured, more: Measured, times: float) -> Measured:
        """This run and `times` the difference of two others, where all three were."""
        moments = {}
        for label, (moment, kinds) in self.moments.items():
            if label in less.moments and label in more.moments:
                a, b = less.moments[label][1], more.moments[label][1]
                moments[label] = (moment, {k: kinds.get(k, 0.0) + times * (b.get(k, 0.0) - a.get(k, 0.0)) for k in {*kinds, *a, *b}})
        grown = {k: more.traffic.get(k, 0.0) - less.traffic.get(k, 0.0) for k in {*less.traffic, *more.traffic}}
        traffic = {k: self.traffic.get(k, 0.0) + times * grown.get(k, 0.0) for k in {*self.traffic, *grown}}
        return Measured(moments, traffic, self.host_bytes + times * (more.host_bytes - less.host_bytes))

    def repeated(self, fewer: Measured, base: Measured, longer: Measured, times: float) -> Measured:
        """This run with the traffic of the layers that `longer` has over `base` `times` more, if it grows with microbatches at all."""
        traffic = dict(self.traffic)
        for k, n in longer.traffic.items():
            if base.traffic.get(k, 0.0) != fewer.traffic.get(k, 0.0):
                traffic[k] += times * (n - base.traffic.get(k, 0.0))
        return Measured(self.moments, traffic, self.host_bytes)


def program_of(parallel: Parallel, fake: FakeTensorMode | None = None) -> Program:
    """What apply made, with inputs of a step and the plan's optimizer. Parameters are fake tensors of `fake`, or real ones."""
    plan = parallel.plan
    with fake or contextlib.nullcontext():
        inputs, labels = make_inputs(plan, plan.microbatches * plan.layout.micro_batch)
        optimizer = make_optimizer(plan, parallel.stage)

    def train() -> None:
        with balanced_routing() if plan.solution.experts else contextlib.nullcontext():
            parallel.train_step(inputs, labels)

    spans = [[f"model.{p}" for p in s.program.layers[slice(*s.span)]] if isinstance(s, ProgramStage) else [] for s in parallel.parts]
    return Program(parallel.parts, train, optimizer, [inputs, labels], spans)


def track(program: Program, fake: FakeTensorMode | None = None, *, on_cpu: bool = True) -> Measured:
    """A training step, tracked, after a first one. Parameters are fake tensors of `fake`, or real ones; fake ones may stand for a GPU's.

    With fake tensors the first step is the optimizer's alone: what a step leaves behind is its state. Raises InputError, which names the
    module, where an operator does not run on them.
    """
    tracker, optimizer = Tracker(group_of), program.optimizer
    if fake is not None and isinstance(optimizer, Streamed) and optimizer.device is not None:
        optimizer.device = HOST  # device and host are one in a run on a CPU
    tracker.tell("parameters", [t for part in program.parts for t in (*part.parameters(), *part.buffers())])
    tracker.tell("inputs", program.inputs)
    for part in program.parts:
        tracker.watch(part)

    def step(compute: Callable[[], Any]) -> None:
        gc.collect()
        tracker.restart()
        compute()
        tracker.optimizing = True
        optimizer.step()
        tracker.optimizing = False
        tracker.tell("optimizer", list(optimizer.state.values()))
        optimizer.zero_grad()

    def only_gradients() -> None:
        for p in program.parameters:
            p.grad = torch.zeros_like(p)

    kernels = contextlib.nullcontext() if on_cpu else fused_attention()
    with fake or contextlib.nullcontext(), kernels, tracker, _told_of_gradients(program, tracker), _no_garbage_collection():
        step(only_gradients if fake is not None else program.train)
        try:
            step(program.train)
        except Exception as e:
            if fake is None or tracker.failure is None or tracker.failure.error not in _chain(e):
                raise
            raise InputError(f"the plan's program does not run as rank {dist.get_rank()}: {_where(tracker.failure)}") from e
    return _measured(tracker, program.layers)


def _measured(tracker: Tracker, layers: Sequence[Sequence[str]]) -> Measured:
    moments: dict[Label, tuple[Moment, dict[str, float]]] = {}
    for moment in tracker.peaks.values():
        label = (moment.phase, _anchored(moment.module, layers))
        if label not in moments or moment.live_bytes > moments[label][0].live_bytes:
            moments[label] = (moment, {})
    found = tracker.by_category([m.time for m, _ in moments.values()])
    for (_, kinds), by_kind in zip(moments.values(), found, strict=True):
        kinds.update(by_kind)
    traffic: Counter[Sent] = Counter()
    for c in tracker.collectives.values():
        traffic[c.op, c.group, c.ranks, c.nbytes, c.phase] += c.count
    return Measured(moments, dict(traffic), float(tracker.host_bytes))


def _anchored(module: str, layers: Sequence[Sequence[str]]) -> str:
    """A module's path with its layer's number among its chunk's: layer[0] and layer[1], the others counted from the end to layer[-1]."""
    for chunk, paths in enumerate(layers):
        for i, path in enumerate(paths):
            if module == path or module.startswith(path + "."):
                return f"chunk[{chunk}].layer[{i if i < 2 else i - len(paths)}]{module[len(path) :]}"
    return module.removeprefix("model.")


def _where(failure: Failure) -> str:
    """What an operator did not take, in one sentence."""
    shapes = ", ".join(str(list(s)) for s in failure.shapes[:6]) or "no tensors"
    if isinstance(failure.error, DataDependentOutputException | DynamicOutputShapeException):
        why = "what it returns depends on values, which a dry run has not"
    elif isinstance(failure.error, UnsupportedOperatorException):
        why = "it has no fake kernel, so a dry run cannot run it"
    else:
        why = one_line(failure.error)
    return f"{failure.module.removeprefix('model.') or 'outside the modules'}: {failure.op} of {shapes}: {why}"


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Raises as one InputError what is not one already, with the line outside torch that it came through."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        raise InputError(f"{what}: {_why(e)}") from e


def _why(error: BaseException) -> str:
    first = _chain(error)[-1]
    lines = [f for f in traceback.extract_tb(first.__traceback__) if f"{os.sep}torch{os.sep}" not in f.filename and not f.filename.startswith("<")]
    return one_line(first) + (f", at {shown(lines[-1].filename)}:{lines[-1].lineno}" if lines else "")


def _chain(error: BaseException) -> list[BaseException]:
    """An exception and what caused it, the first cause last."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found:
        found.append(cause)
    return found


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Memory in reference cycles then lives through the step, in every run alike."""
    was = gc.isenabled()
    gc.disable()
    gc.freeze()  # what there was is not looked through between the steps
    try:
        yield
    finally:
        gc.unfreeze()
        if was:
            gc.enable()


@contextlib.contextmanager
def _told_of_gradients(program: Program, tracker: Tracker) -> Iterator[None]:
    """Tells the tracker after every backward, or its half that makes them, which storages are gradients."""
    parameters = program.parameters
    sharded = [m for part in program.parts for m in part.modules() if isinstance(m, FSDPModule)]

    def told(run: Callable[..., Any]) -> Callable[..., None]:
        def wrapped(*args: Any, **kwargs: Any) -> None:
            run(*args, **kwargs)
            tracker.tell("gradients", [p.grad for p in parameters if p.grad is not None])
            for m in sharded:
                tracker.tell("gradients", _unreduced(m))

        return wrapped

    names = {id(m): name for part in program.parts for name, m in part.named_modules()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.autograd, "backward", told(torch.autograd.backward)))
        for apart in {type(w) for part in program.parts if (w := getattr(part, "weight_gradients", None)) is not None}:
            stack.enter_context(mock.patch.object(apart, "_compute", told(_named(apart._compute, names, tracker))))
        yield


def _named(compute: Callable[..., None], names: Mapping[int, str], tracker: Tracker) -> Callable[..., None]:
    """What computes a weight's gradient apart from the backward, telling the tracker whose."""

    def wrapped(gradients: Any, module: nn.Module, *args: Any) -> None:
        tracker.weights = names[id(module)]
        try:
            compute(gradients, module, *args)
        finally:
            tracker.weights = ""

    return wrapped


def _unreduced(module: FSDPModule) -> list[Tensor]:
    """Gradients that FSDP accumulates whole, before it reduces them."""
    state: Any = module._get_fsdp_state()  # type: ignore[attr-defined]
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    held = [getattr(p, "unsharded_accumulated_grad", None) for g in groups if g is not None for p in g.fsdp_params]
    return [g for g in held if g is not None]
