"""What is written for another engine, and the words that go with it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from meshwright.codegen.launch.torchrun import slurm
from meshwright.planner.plan import Plan
from meshwright.profiling.errors import InputError

NAMES = ("torchtitan", "megatron", "deepspeed")


@dataclass(frozen=True)
class Engine:
    """An engine's own files for a plan, run.sh that starts them, and what is lost: a sentence for each part of the plan that the engine
    cannot express or does otherwise, "tp=2: ..." where it is a part of the layout."""

    name: str
    release: str
    files: dict[str, str]
    command: str
    lost: tuple[str, ...]


def configure(plan: Plan, name: str) -> Engine:
    """The plan for "torchtitan", "megatron" or "deepspeed". InputError where that engine cannot run it."""
    from meshwright.codegen.launch import deepspeed, megatron, torchtitan

    engines: dict[str, Callable[[Plan], Engine]] = {
        "torchtitan": torchtitan.configure, "megatron": megatron.configure, "deepspeed": deepspeed.configure,
    }  # fmt: skip
    if name not in engines:
        raise InputError(f"--for {name!r} is not known: it is {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    return engines[name](plan)


def write(plan: Plan, engine: Engine, folder: str | Path) -> list[Path]:
    """Writes the engine's files, run.sh, slurm.sh and plan.json into `folder`; returns the files written.

    The folder appears whole or not at all; an existing one is replaced only if it holds a plan, as everything that emit writes does.
    """
    folder = Path(folder)
    parent = folder.absolute().parent
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "plan.json").exists())):
        raise InputError(f"{folder} exists and was not written by emit: name a new folder")
    if not parent.is_dir():
        raise InputError(f"the folder {parent} does not exist")
    scratch = Path(tempfile.mkdtemp(dir=parent, prefix=f".{folder.name}"))
    try:
        scratch.chmod(0o755)
        for name, text in {**engine.files, "slurm.sh": slurm(plan, "run.sh"), "plan.json": plan.to_json()}.items():
            (scratch / name).write_text(text)
            if name.endswith(".sh"):
                (scratch / name).chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return sorted(p for p in folder.rglob("*") if p.is_file())


def lost_everywhere(plan: Plan, engine: str) -> Iterator[str]:
    """What no other engine takes over: the rank map, our kernels, placements of single modules."""
    s = plan.solution
    if s.rank_map:
        yield f"rank map: {engine} numbers ranks node by node, the plan lays them over the measured links"
    if s.kernels:
        yield f"kernels: {engine} has its own, the plan counts on {', '.join(k.name for k in s.kernels)}"
    if plan.layout.tp > 1:
        yield f"shardings: which weights are split over tensor-parallel ranks, and where, is {engine}'s own, not the plan's table"


def chunks(plan: Plan) -> list[tuple[int, int]]:
    """Layers of each virtual stage, in the model's order."""
    return sorted(span for s in plan.solution.stages for span in (s.chunks or (s.layers,)))


def covered(plan: Plan) -> list[tuple[str, int]]:
    """Of each stage: what it recomputes, and in how many of its first layers."""
    out: list[tuple[str, int]] = []
    for s in plan.solution.stages:
        layers = sum(b - a for a, b in s.chunks or (s.layers,))
        out.append((s.recompute, layers if s.recompute_layers is None else s.recompute_layers))
    return out
