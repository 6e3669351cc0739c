"""The program that apply builds, run as one rank of N on one CPU: fake tensors and a fake process group, real shapes and bytes.

Layers of a kind are alike, so a stage with many runs with four and with five of each kind, and a pipeline with just enough
microbatches to be full; what grows linearly is extrapolated to the whole.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict
from torch import float32, nn, no_grad
from torch._subclasses.fake_tensor import FakeTensorMode

from meshwright.codegen.apply import LossFn, apply
from meshwright.codegen.fake import build, make_examples, materialise, own_loss, with_layers, world
from meshwright.codegen.measured import Measured, explained, program_of, track
from meshwright.codegen.shortened import FEW, Cut, Length, enough_microbatches, shortened, spans_of
from meshwright.planner.plan import Plan
from meshwright.profiling.errors import InputError


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
    """What one rank of a plan holds and sends in a training step. Bytes are live bytes, before the allocator's rounding.

    `layers`: first and last (not included) of the rank's first chunk, `chunks` of each. `host_bytes`: optimizer state that is offloaded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: str
    rank: int
    stage: int
    layers: tuple[int, int]
    chunks: tuple[tuple[int, int], ...]
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
    host_bytes: float = 0.0
    seconds: float
    script: str = ""  # the emitted folder that was run

    @property
    def layers_held(self) -> int:
        return sum(last - first for first, last in self.chunks)


def dry_run(
    plan: Plan, rank: int | None = None, *, whole: bool = False, progress: Callable[[str], None] | None = None,
    model: nn.Module | None = None, loss: LossFn | None = None,
) -> DryRun:  # fmt: skip
    """Runs a training step of `plan` as `rank` (by default the first of the fullest stage), without its memory and without peers.

    `model`, on meta in fp32, and its own `loss` stand for the plan's source, where the model is not in a file.
    `whole` runs every layer and microbatch of the stage instead of extrapolating. Raises InputError if the plan has no such rank, a
    process group exists already, the model cannot be built, or the program does not run, as where shapes do not fit: it names the module.
    """
    say = progress or (lambda _: None)
    started = time.perf_counter()
    rank, stage = rank_and_stage(plan, rank)
    m, on_cpu = plan.microbatches, plan.cluster.device.kind == "cpu"
    few, fewer = (m, m) if whole else enough_microbatches(plan.layout, m, on_cpu=on_cpu)
    held = sum(last - first for first, last in spans_of(plan.solution.stages[stage]))

    with world(rank, plan.layout.devices, on_cpu=on_cpu):
        model = build(plan) if model is None else model
        loss = loss or own_loss(plan)
        cut = Cut(plan, stage, model) if plan.solution.program is not None and not whole else None

        def run(longer: Length | None, microbatches: int) -> Measured:
            kept = cut.keep(longer) if cut is not None else None
            short, paths = shortened(plan, stage, kept, microbatches)
            layers = held if kept is None else sum(map(len, kept))
            say(f"rank {rank} of {plan.layout.devices}: running {layers} of {held} layers, {microbatches} of {m} microbatches")
            made = with_layers(model, plan, paths)
            numel = sum(p.numel() for p in made.parameters())
            with explained(f"the plan's program does not run as rank {rank}"):
                return run_fake(short.model_copy(update={"model": short.model.model_copy(update={"numel": numel})}), made, loss)

        result = extrapolated(run, cut.long if cut is not None else [], m, few, fewer, in_flight=plan.layout.schedule == "gpipe")
    layers_run = held if cut is None else sum(map(len, cut.keep()))
    return summary(plan, rank, result, few, layers_run, time.perf_counter() - started)


def extrapolated(run: Callable[[Length | None, int], Measured], long: Sequence[Length], m: int, few: int, fewer: int, *, in_flight: bool) -> Measured:
    """A step of m microbatches and all layers, from runs with `few` and `fewer` of them and with one more layer of each `long` length.

    `in_flight`: every microbatch is at once, and what a layer holds grows with them.
    """
    found = result = run(None, few)
    longer = {x: run(x, few) for x in long}
    for (_, n), more in ((x, longer[x]) for x in long):
        result = result.plus(found, more, n - FEW)
    if few == m:
        return result
    times, layered, short = (m - few) / (few - fewer), result, run(None, fewer)
    result = result.plus(short, found, times)
    if not in_flight:
        return result.repeated(short, found, layered, (m - few) / few)
    for x, more in longer.items():
        corner = run(x, fewer)
        result = result.plus(found, more, times * (x[1] - FEW)).plus(short, corner, -times * (x[1] - FEW))
    return result


def run_fake(plan: Plan, model: nn.Module, loss: LossFn | None = None) -> Measured:
    """A training step on fake tensors as this rank of the fake process group, tracked. `model`, on meta, is consumed."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    template = copy.deepcopy(model) if plan.layout.pp > 1 else model
    with fake:
        materialise(model, float32)
    parallel = apply(plan, model, loss=loss, device="cpu")
    if plan.layout.pp > 1:
        with fake, no_grad():
            examples = make_examples(plan, template, parallel.mesh)
        parallel.schedule = parallel.make_schedule(examples)
    return track(program_of(parallel, fake), fake, on_cpu=plan.cluster.device.kind == "cpu")


def rank_and_stage(plan: Plan, rank: int | None) -> tuple[int, int]:
    """A rank, by default the first of the fullest stage, and its stage. InputError if there is none such."""
    x = plan.layout
    per_stage = x.devices // x.pp
    rank = plan.prediction.memory_bytes.peak_stage * per_stage if rank is None else rank
    if not 0 <= rank < x.devices:
        raise InputError(f"the plan has no rank {rank}: its {x.devices} ranks are 0 to {x.devices - 1}")
    return rank, rank // per_stage


def summary(plan: Plan, rank: int, found: Measured, microbatches: int, layers: int, seconds: float, script: str = "") -> DryRun:
    """What was measured of a rank, with `microbatches` and `layers` of it run."""
    rank, stage = rank_and_stage(plan, rank)
    spans, (peak, by_kind) = spans_of(plan.solution.stages[stage]), found.peak
    return DryRun(
        plan=plan.inputs_hash, rank=rank, stage=stage, layers=spans[0], chunks=spans, layers_run=layers, script=script,
        microbatches=plan.microbatches, microbatches_run=microbatches, peak_bytes=sum(by_kind.values()),
        by_kind={k: v for k, v in by_kind.items() if v}, host_bytes=found.host_bytes,
        phase=peak.phase, module=peak.module.removeprefix("model."), op=peak.op, site=peak.site, by_phase=found.by_phase, seconds=seconds,
        collectives=tuple(
            Traffic(op=op, group=group, ranks=ranks, nbytes=nbytes, phase=phase, count=count)
            for (op, group, ranks, nbytes, phase), count in sorted(found.traffic.items(), key=lambda c: (-c[0][3] * c[1], c[0]))
        ),
    )  # fmt: skip
