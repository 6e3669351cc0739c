"""The script that emit wrote, run as one rank of N on one CPU: its own Trainer, on fake tensors and a fake process group."""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meshwright.codegen.apply import make_optimizer
from meshwright.codegen.dryrun import DryRun, rank_and_stage, summary
from meshwright.codegen.fake import build, make_examples, materialise, with_layers, world
from meshwright.codegen.measured import Measured, Program, explained, track
from meshwright.codegen.script import module_name
from meshwright.codegen.shortened import enough_microbatches, shortened, spans_of
from meshwright.planner.plan import Plan
from meshwright.profiling.errors import InputError


def dry_run_script(folder: str | Path, rank: int | None = None, *, whole: bool = False, progress: Callable[[str], None] | None = None) -> DryRun:
    """Runs a training step of the script in `folder`, which emit wrote, as `rank` (by default the first of the fullest stage).

    All layers of the rank are run, and the microbatches that fill the pipeline, or all with `whole`. Filling the weights and reading a file of
    tokens are left out; the optimizer is the plan's. Raises InputError as dry_run does, and where the folder has no script.
    """
    folder, say = Path(folder), progress or (lambda _: None)
    for name in ("train.py", "plan.json"):
        if not (folder / name).exists():
            raise InputError(f"{folder} has no {name}: name a folder that `meshwright emit` wrote")
    started = time.perf_counter()
    plan = _from_folder(Plan.load(folder / "plan.json"), folder)
    rank, stage = rank_and_stage(plan, rank)
    m, on_cpu = plan.microbatches, plan.cluster.device.kind == "cpu"
    few, fewer = (m, m) if whole else enough_microbatches(plan.layout, m, on_cpu=on_cpu)
    layers = sum(last - first for first, last in spans_of(plan.solution.stages[stage]))
    with world(rank, plan.layout.devices, on_cpu=on_cpu), _imported(folder) as script:
        model = build(plan)

        def run(microbatches: int) -> Measured:
            say(f"{folder / 'train.py'} as rank {rank} of {plan.layout.devices}: {layers} layers, {microbatches} of {m} microbatches")
            with explained(f"{folder / 'train.py'} does not run as rank {rank}"):
                return _run(script, shortened(plan, stage, None, microbatches)[0], model)

        result = run(few)
        if few < m:
            result = result.plus(run(fewer), result, (m - few) / (few - fewer))
    return summary(plan, rank, result, few, layers, time.perf_counter() - started, str(folder))


def _run(script: ModuleType, plan: Plan, model: nn.Module) -> Measured:
    """A step of the script's Trainer with the plan's microbatches, tracked. `model` is on meta."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    device = torch.device("cpu")

    def made_fake(of: nn.Module) -> nn.Module:
        with fake:
            materialise(of, torch.float32)
        return of

    def blank(of: nn.Module) -> nn.Module:  # called when the script has its model on meta
        template = copy.deepcopy(of)
        made_fake(of)
        return template

    def pipeline(kind: Any, parts: Any, places: Any, mesh: Any, *given: Any, **named: Any) -> Any:
        around = with_layers(model, plan, ())
        with fake, torch.no_grad():
            examples = make_examples(plan, around, mesh)  # what the other ranks would tell
        return steps_pipeline(kind, parts, places, mesh, *given, examples=examples, **named)

    steps_pipeline: Any = getattr(script, "pipeline", None)  # of a script with stages
    changed: dict[str, Any] = {
        "GLOBAL_BATCH": plan.workload.global_batch, "MICROBATCHES": plan.microbatches, "pipeline": pipeline, "blank": blank,
        "allocate": _nothing, "fill": _nothing, "build": lambda: made_fake(copy.deepcopy(model)),
    }  # fmt: skip
    with _changed(script, {k: v for k, v in changed.items() if hasattr(script, k)}):
        trainer = script.Trainer(device, 0)
        with fake:
            optimizer = make_optimizer(plan, nn.ModuleList(trainer.parts))

        def train() -> None:
            routed = sys.modules["runtime.experts"].balanced_routing() if plan.solution.experts else contextlib.nullcontext()
            with routed:
                trainer.step(0)

        return track(Program(trainer.parts, train, optimizer), fake, on_cpu=plan.cluster.device.kind == "cpu")


def _nothing(*given: Any, **named: Any) -> None:
    """Stands for what gives weights memory and numbers."""


def _from_folder(plan: Plan, folder: Path) -> Plan:
    """The plan with its model's source in the folder, where emit copied it."""
    ref = plan.model
    where, _, name = ref.source.rpartition(":")
    source = ref.source
    if ref.origin == "hf":
        source = str(folder / "config.json")
    elif where.endswith(".py"):
        source = f"{folder / module_name(where)}.py:{name}"
    return plan.model_copy(update={"model": ref.model_copy(update={"source": source})})


@contextlib.contextmanager
def _changed(module: ModuleType, values: dict[str, Any]) -> Iterator[None]:
    before = {k: getattr(module, k) for k in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


@contextlib.contextmanager
def _imported(folder: Path) -> Iterator[ModuleType]:
    """The folder's train.py as a module; afterwards what it imported from the folder is forgotten, and other modules of its names are back."""
    names = {p.stem for p in folder.glob("*.py")} | {"runtime"}
    before = {k: sys.modules.pop(k) for k in list(sys.modules) if k.partition(".")[0] in names}
    sys.path.insert(0, str(folder.absolute()))
    importlib.invalidate_caches()
    try:
        with explained(f"{folder / 'train.py'} cannot be imported"):
            script = importlib.import_module("train")
        yield script
    finally:
        sys.path.remove(str(folder.absolute()))
        for k in [k for k in sys.modules if k.partition(".")[0] in names]:
            del sys.modules[k]
        sys.modules.update(before)
