"""The program that apply builds, run as one rank of N on one CPU: fake tensors and a fake process group, real shapes and bytes.

Layers of a kind are alike, so a stage with many runs with four and with five of each kind, and a pipeline with just enough
microbatches to be full; what grows linearly is extrapolated to the whole.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import schedules

from meshwright.codegen.apply import LossFn, Parallel, ProgramStage, apply, make_optimizer, shard_modules
from meshwright.codegen.runtime.pipeline import leave_out
from meshwright.codegen.tracker import Failure, Moment, Tracker, shown
from meshwright.planner.plan import Plan
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelInput
from meshwright.profiling.loading import build_factory, build_hf, import_target, one_line
from meshwright.profiling.structure import kinds_of

PHASES = ("forward", "step", "backward", "recompute", "optimizer")
FEW, MORE = 4, 5  # layers of a kind that a shortened stage keeps: two at each end, where it can peak, and one between
Label = tuple[str, str]  # phase, and module with its layer counted from the nearer end


class Traffic(BaseModel):
    """Calls of one kind of communication in a step: the collective, its group and size, bytes of one call's larger side."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    op: str
    group: str
    ranks: int
    nbytes: int
    phase: str
    count: float


class DryRun(BaseModel):
    """What one rank of a plan holds and sends in a training step. Bytes are live bytes, before the allocator's rounding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: str
    rank: int
    stage: int
    layers: tuple[int, int]
    layers_run: int
    microbatches: int
    microbatches_run: int
    peak_bytes: float
    by_kind: dict[str, float]
    phase: str
    module: str
    op: str
    site: str  # autograd's node in backward, else a line of Python
    by_phase: dict[str, float]  # the fullest moment of each phase
    collectives: tuple[Traffic, ...]
    seconds: float


@dataclass
class Measured:
    """One tracked run: the fullest moment of each label with its bytes by category, and the communication."""

    moments: dict[Label, tuple[Moment, dict[str, float]]]
    traffic: dict[tuple[str, str, int, int, str], float] = field(default_factory=dict)

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
        return Measured(moments, {k: self.traffic.get(k, 0.0) + times * grown.get(k, 0.0) for k in {*self.traffic, *grown}})

    def repeated(self, fewer: Measured, base: Measured, longer: Measured, times: float) -> Measured:
        """This run with the traffic of the layers that `longer` has over `base` `times` more, if it grows with microbatches at all."""
        traffic = dict(self.traffic)
        for k, n in longer.traffic.items():
            if base.traffic.get(k, 0.0) != fewer.traffic.get(k, 0.0):
                traffic[k] += times * (n - base.traffic.get(k, 0.0))
        return Measured(self.moments, traffic)


def dry_run(plan: Plan, rank: int | None = None, *, whole: bool = False, progress: Callable[[str], None] | None = None) -> DryRun:
    """Runs a training step of `plan` as `rank` (by default the first of the fullest stage), without its memory and without peers.

    `whole` runs every layer and microbatch of the stage instead of extrapolating. Raises InputError if the plan has no such rank, a
    process group exists already, the model cannot be built, or the program does not run, as where shapes do not fit: it names the module.
    """
    say = progress or (lambda _: None)
    plan.check_runs()
    x = plan.layout
    per_stage = x.devices // x.pp
    rank = plan.prediction.memory_bytes.peak_stage * per_stage if rank is None else rank
    if not 0 <= rank < x.devices:
        raise InputError(f"the plan has no rank {rank}: its {x.devices} ranks are 0 to {x.devices - 1}")
    if dist.is_initialized():
        raise InputError("a dry run makes a process group of its own: run it where torch.distributed is not initialised")
    started = time.perf_counter()
    stage = rank // per_stage
    first, last = plan.solution.stages[stage].layers
    model = build(plan)
    m = plan.microbatches
    on_cpu = plan.cluster.device.kind == "cpu"
    # with one less, the pipeline is still full, has gradients of an earlier one, and on gloo keeps what it sent last while it filled
    few = m if whole else min(m, max(x.pp + (4 if on_cpu else 2), 4))
    short = plan.solution.program is not None and not whole
    own = plan.solution.stages[stage]
    alike = kinds_of([model.get_submodule(p) for p in plan.model.layer_paths])[first:last] if short else ()
    kinds = tuple((k, own.recompute_of(i)) for i, k in enumerate(alike))  # layers that recompute otherwise are of another kind
    counts = Counter(kinds)
    base = {k: min(n, FEW) for k, n in counts.items()}

    with _world(rank, x.devices, on_cpu=on_cpu):

        def run(keep: Mapping[tuple[int, str], int], microbatches: int) -> Measured:
            kept = [first + i for i, k in enumerate(kinds) if kinds[i:].count(k) <= keep[k]] if short else None
            cut, paths = shortened(plan, stage, kept, microbatches)
            layers = last - first if kept is None else len(kept)
            say(f"rank {rank} of {x.devices}: running {layers} of {last - first} layers, {microbatches} of {m} microbatches")
            held = fake_model(model, plan, paths)
            numel = sum(p.numel() for p in held.parameters())
            try:
                return run_fake(cut.model_copy(update={"model": cut.model.model_copy(update={"numel": numel})}), held)
            except InputError:
                raise
            except Exception as e:
                raise InputError(f"the plan's program does not run as rank {rank}: {_why(e)}") from e

        found = result = run(base, few)
        longer = {k: run({**base, k: min(n, MORE)}, few) for k, n in counts.items() if n > FEW}
        for k, more in longer.items():
            result = result.plus(found, more, (counts[k] - FEW) / (min(counts[k], MORE) - FEW))
        if few < m:
            fewer, layered = run(base, few - 1), result
            result = result.plus(fewer, found, m - few)
            if x.schedule == "1f1b":
                result = result.repeated(fewer, found, layered, (m - few) / few)
            else:  # every microbatch is in flight: what a layer holds grows with them
                for k, more in longer.items():
                    times = (m - few) * (counts[k] - FEW) / (min(counts[k], MORE) - FEW)
                    corner = run({**base, k: min(counts[k], MORE)}, few - 1)
                    result = result.plus(found, more, times).plus(fewer, corner, -times)
    peak, by_kind = result.peak
    return DryRun(
        plan=plan.inputs_hash, rank=rank, stage=stage, layers=(first, last), layers_run=sum(base.values()) if short else last - first,
        microbatches=m, microbatches_run=few, peak_bytes=sum(by_kind.values()), by_kind={k: v for k, v in by_kind.items() if v},
        phase=peak.phase, module=peak.module.removeprefix("model."), op=peak.op, site=peak.site, by_phase=result.by_phase,
        seconds=time.perf_counter() - started,
        collectives=tuple(
            Traffic(op=op, group=group, ranks=ranks, nbytes=nbytes, phase=phase, count=count)
            for (op, group, ranks, nbytes, phase), count in sorted(result.traffic.items(), key=lambda c: (-c[0][3] * c[1], c[0]))
        ),
    )  # fmt: skip


# --- one run -----------------------------------------------------------------------------------------------------------


def run_fake(plan: Plan, model: nn.Module) -> Measured:
    """A training step on fake tensors as this rank of the fake process group, tracked."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    template = copy.deepcopy(model) if plan.layout.pp > 1 else model
    with fake:
        _materialise(model, torch.float32)
    parallel = apply(plan, model, loss=_own_loss(plan), device="cpu")
    if plan.layout.pp > 1:
        with fake, torch.no_grad():
            carry, output = _examples(plan, template, parallel)
        inputs = tuple(_inputs(plan, plan.layout.micro_batch)[0].values()) if parallel.is_first else (carry,)
        parallel.schedule = parallel.make_schedule(inputs, (output if parallel.is_last else carry,))
    return track(parallel, fake)


def track(parallel: Parallel, fake: FakeTensorMode | None = None) -> Measured:
    """A training step, tracked, after a first one. Parameters are fake tensors of `fake`, or real ones.

    With fake tensors the first step is the optimizer's alone: what a step leaves behind is its state.
    """
    plan, tracker = parallel.plan, Tracker(_group)
    inside: Any = fake or contextlib.nullcontext()
    with inside:
        inputs, labels = _inputs(plan, plan.microbatches * plan.layout.micro_batch)
        optimizer = make_optimizer(plan, parallel.stage)
    tracker.tell("parameters", [*parallel.stage.parameters(), *parallel.stage.buffers()])
    tracker.tell("inputs", [inputs, labels])
    tracker.watch(parallel.stage)

    def step(compute: Callable[[], Any]) -> None:
        gc.collect()
        tracker.restart()
        compute()
        tracker.optimizing = True
        optimizer.step()
        tracker.optimizing = False
        tracker.tell("optimizer", list(optimizer.state.values()))
        optimizer.zero_grad()

    def train() -> None:
        parallel.train_step(inputs, labels)

    def only_gradients() -> None:
        for p in parallel.stage.parameters():
            p.grad = torch.zeros_like(p)

    with inside, tracker, _told_of_gradients(parallel.stage, tracker), _no_garbage_collection():
        step(only_gradients if fake is not None else train)
        try:
            step(train)
        except Exception as e:
            if fake is None or tracker.failure is None or tracker.failure.error not in _chain(e):
                raise
            raise InputError(f"the plan's program does not run as rank {dist.get_rank()}: {_where(tracker.failure)}") from e
    return _measured(tracker, _layers_of(parallel))


def _measured(tracker: Tracker, layers: Sequence[str]) -> Measured:
    moments: dict[Label, tuple[Moment, dict[str, float]]] = {}
    for moment in tracker.peaks.values():
        label = (moment.phase, _anchored(moment.module, layers))
        if label not in moments or moment.live_bytes > moments[label][0].live_bytes:
            moments[label] = (moment, {})
    found = tracker.by_category([m.time for m, _ in moments.values()])
    for (_, kinds), by_kind in zip(moments.values(), found, strict=True):
        kinds.update(by_kind)
    traffic: Counter[tuple[str, str, int, int, str]] = Counter()
    for c in tracker.collectives.values():
        traffic[c.op, c.group, c.ranks, c.nbytes, c.phase] += c.count
    return Measured(moments, dict(traffic))


def _layers_of(parallel: Parallel) -> list[str]:
    stage = parallel.stage
    return [f"model.{p}" for p in stage.program.layers[slice(*stage.span)]] if isinstance(stage, ProgramStage) else []


def _anchored(module: str, layers: Sequence[str]) -> str:
    """A module's path with its layer's number among the stage's: layer[0] and layer[1], the others counted from the end to layer[-1]."""
    for i, path in enumerate(layers):
        if module == path or module.startswith(path + "."):
            return f"layer[{i if i < 2 else i - len(layers)}]{module[len(path) :]}"
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


def _why(error: BaseException) -> str:
    """An exception in one sentence, with the line outside torch that it came through."""
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
def _told_of_gradients(stage: nn.Module, tracker: Tracker) -> Iterator[None]:
    """Tells the tracker after every backward which storages are gradients."""
    backward = torch.autograd.backward

    def wrapped(*args: Any, **kwargs: Any) -> None:
        backward(*args, **kwargs)
        tracker.tell("gradients", [p.grad for p in stage.parameters() if p.grad is not None])
        for m in stage.modules():
            if isinstance(m, FSDPModule):
                tracker.tell("gradients", _unreduced(m))

    with mock.patch.object(torch.autograd, "backward", wrapped):
        yield


def _unreduced(module: FSDPModule) -> list[Tensor]:
    """Gradients that FSDP accumulates whole, before it reduces them."""
    state: Any = module._get_fsdp_state()  # type: ignore[attr-defined]
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    held = [getattr(p, "unsharded_accumulated_grad", None) for g in groups if g is not None for p in g.fsdp_params]
    return [g for g in held if g is not None]


def _inputs(plan: Plan, samples: int) -> tuple[dict[str, Tensor], Tensor | None]:
    def make(i: ModelInput) -> Tensor:
        shape = list(i.spec.shape)
        shape[i.spec.batch_dim or 0] *= samples
        return torch.zeros(shape, dtype=getattr(torch, i.spec.dtype))

    return {i.name: make(i) for i in plan.model.inputs}, None if plan.model.labels is None else make(plan.model.labels)


def _examples(plan: Plan, model: nn.Module, parallel: Parallel) -> tuple[Tensor, Tensor]:
    """What stages hand on, and what the last one returns: the code around the layers, run without them."""
    program = plan.solution.program
    assert program is not None
    _materialise(model, torch.bfloat16 if plan.workload.precision == "bf16" else torch.float32)
    leave_out(model, program.layers)
    bare = program.model_copy(update={"layers": ()})
    around = ProgramStage(model, bare, 0, 0, parallel.mesh)
    if plan.layout.tp > 1:
        shard_modules(plan, model, 0, 0, parallel.mesh)
    handed: list[Tensor] = []
    output = around(*_inputs(plan, plan.layout.micro_batch)[0].values(), seen=handed.append)
    return handed[0].detach().requires_grad_(), output.detach().requires_grad_()


# --- the model and the world -------------------------------------------------------------------------------------------


def build(plan: Plan) -> nn.Module:
    """The plan's model on meta, in fp32, ready for training. InputError if its source is not what it was."""
    ref = plan.model
    model = build_hf(Path(ref.source), "fp32")[0] if ref.origin == "hf" else build_factory(ref.source)[0].float().train()
    numel = sum(p.numel() for p in model.parameters())
    if numel != ref.numel:
        raise InputError(f"the plan is for {ref.name} with {ref.numel:,} parameters; {ref.source} now has {numel:,}: plan again")
    return model


def _own_loss(plan: Plan) -> LossFn | None:
    """The loss of the model's own file, where the plan was made with it."""
    return getattr(import_target(plan.model.source)[0], "loss", None) if plan.model.objective == "custom" else None


def fake_model(model: nn.Module, plan: Plan, paths: Sequence[str]) -> nn.Module:
    """A copy of a model on meta that holds, of its layers, those at `paths`."""
    absent = [p for p in plan.model.layer_paths if p not in set(paths)]
    held = {p: model.get_submodule(p) for p in absent}
    leave_out(model, absent)
    made = copy.deepcopy(model)
    for path, layer in held.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return made


def _materialise(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives every tensor on meta a storage of the mode that is on; parameters that are one stay one."""
    made: dict[int, nn.Parameter] = {}
    for m in model.modules():
        for name, p in m._parameters.items():
            if p is not None:
                if id(p) not in made:
                    kind = dtype if p.is_floating_point() else p.dtype
                    made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=kind, device="cpu"), p.requires_grad)
                m._parameters[name] = made[id(p)]
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cpu")


def shortened(plan: Plan, stage: int, kept: Sequence[int] | None, microbatches: int) -> tuple[Plan, tuple[str, ...]]:
    """The plan with `microbatches` and, of this stage's layers, those that are `kept`, of every other stage's its first."""
    x, s = plan.layout, plan.solution
    workload = plan.workload.model_copy(update={"global_batch": microbatches * x.dp * x.micro_batch})
    if kept is None:
        return plan.model_copy(update={"workload": workload}), plan.model.layer_paths
    chosen = [list(kept) if i == stage else [other.layers[0]] for i, other in enumerate(s.stages)]
    flat = [layer for layers in chosen for layer in layers]
    at = {layer: i for i, layer in enumerate(flat)}
    ends = [sum(len(c) for c in chosen[: i + 1]) for i in range(len(chosen))]
    partly = [(o.layers[0], o.recompute_layers, c) for o, c in zip(s.stages, chosen, strict=True)]
    covered = [None if k is None else sum(i - first < k for i in c) for first, k, c in partly]
    stages = [
        o.model_copy(update={"layers": (e - len(c), e), "recompute_layers": k}) for o, c, e, k in zip(s.stages, chosen, ends, covered, strict=True)
    ]
    groups = [g.model_copy(update={"layers": tuple(at[i] for i in g.layers if i in at)}) for g in s.layer_shardings]
    paths = tuple(plan.model.layer_paths[i] for i in flat)
    assert s.program is not None
    program = s.program.model_copy(update={"layers": paths})
    solution = s.model_copy(update={"stages": tuple(stages), "layer_shardings": tuple(g for g in groups if g.layers), "program": program})
    model = plan.model.model_copy(update={"layers": len(flat), "layer_paths": paths})
    return plan.model_copy(update={"workload": workload, "solution": solution, "model": model}), paths


@contextlib.contextmanager
def _world(rank: int, ranks: int, *, on_cpu: bool = False) -> Iterator[None]:
    """A process group whose collectives return at once.

    `on_cpu`: it stands for gloo, whose sends keep what they sent until the schedule forgets them; NCCL's let go when waited for.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def settled(self: Any, stages: Any, *args: Any, **kwargs: Any) -> None:
        for s in stages:  # examples were given; the real vote on it reads a number off the wire
            s._inference_mode = schedules.InferenceMode.STATIC

    send: Any = getattr(schedules, "_batch_p2p", None)

    def keeping(ops: Any, *args: Any, **kwargs: Any) -> Any:
        works = _Works(send(ops, *args, **kwargs))
        works.sent = [op.tensor for op in ops]
        return works

    owner = next((c for c in vars(schedules).values() if isinstance(c, type) and "_warmup_p2p" in vars(c)), None)
    patch: Any = mock.patch.object(owner, "_warmup_p2p", settled) if owner else contextlib.nullcontext()
    keep: Any = mock.patch.object(schedules, "_batch_p2p", keeping) if on_cpu and send else contextlib.nullcontext()
    level, hook = logging.root.manager.disable, sys.excepthook
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        logging.disable(logging.ERROR)  # torch logs what an operator's fake kernel raises
        with warnings.catch_warnings(), patch, keep:
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        sys.excepthook = hook  # which init_process_group replaced
        dist.destroy_process_group()


class _Works(list[Any]):
    """Pending sends, with what they hold."""

    sent: list[Tensor]


def _group(name: str) -> tuple[str, int]:
    """What a process group is called, and its size."""
    try:
        found = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except (ValueError, RuntimeError, LookupError):
        return name, 0
    return str(getattr(found, "group_desc", "") or name).removeprefix("mesh_"), found.size()
