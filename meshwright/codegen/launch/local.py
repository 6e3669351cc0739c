"""Runs an emitted folder on this machine and reads what its log says."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.codegen.launch.torchrun import shape
from meshwright.planner.plan import Plan
from meshwright.profiling.errors import InputError

LOG = "log.jsonl"
KEPT = 2000  # last lines of output that are searched for who died
GRACE_S = 30.0  # ranks have so long to end when they are told to
# what a rank says whose peer is gone
FOLLOWS = re.compile(r"Connection closed by peer|Connection reset|Broken pipe|ncclRemoteError|ncclSystemError|[Tt]imed out|SIGTERM")


@dataclass(frozen=True)
class Step:
    index: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Ran:
    """A run that ended: its steps, and the most that each rank reserved on its GPU, in bytes (None on CPUs)."""

    steps: tuple[Step, ...]
    peak_bytes: tuple[float, ...] | None

    @property
    def warm(self) -> tuple[Step, ...]:
        """The steps after the first fifth, in which kernels are loaded and memory is allocated."""
        return self.steps[min(max(len(self.steps) // 5, 1), len(self.steps) - 1) :]

    @property
    def step_s(self) -> float:
        """Median of the warm steps."""
        return statistics.median(s.seconds for s in self.warm)


@dataclass(frozen=True)
class Died:
    """The rank that ended a run (None where torchrun names none), its exit code, and its last words."""

    rank: int | None
    exitcode: int
    words: str

    def __str__(self) -> str:
        who = f"rank {self.rank}" if self.rank is not None else "the run"
        how = f"was killed by {_signal(-self.exitcode)}" if self.exitcode < 0 else f"ended with exit code {self.exitcode}"
        return f"{who} {how}{f': {self.words}' if self.words else ''}"


def check_here(plan: Plan, folder: Path) -> None:
    """InputError where this machine has not the plan's ranks, with what to run instead."""
    nodes, per_node = shape(plan, "run")
    if nodes > 1:
        each = f"NODE_RANK=0 MASTER_ADDR=... bash {folder}/launch.sh, with NODE_RANK from 0 to {nodes - 1}"
        raise InputError(f"the plan is for {nodes} nodes, and run starts one: emit it, then on each of them {each}")
    if plan.cluster.device.kind == "cuda":
        import torch

        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found < per_node:
            raise InputError(f"the plan needs {per_node} GPUs on this machine, which has {found}: plan with --cluster {per_node}xcpu to try it here")


def check_folder(folder: Path) -> Plan:
    """The plan of a folder that emit wrote. InputError for any other."""
    if (folder / "plan.json").is_file() and (folder / "run.sh").is_file():
        raise InputError(f"{folder} is for another engine, which has its own log: start it with bash {folder}/run.sh")
    for name in ("plan.json", "launch.sh"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} was not written by emit: it has no {name}")
    return Plan.load(folder / "plan.json")


def run(plan: Plan, folder: Path, steps: int | None, echo: Callable[[str], None]) -> Ran | Died:
    """Starts launch.sh, hands its output line by line to `echo`, and reads the log that it wrote, which replaces that of an earlier run.
    InputError if it wrote none."""
    log = folder / LOG
    log.unlink(missing_ok=True)
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])}
    if plan.cluster.device.kind == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    arguments = ["--steps", str(steps)] if steps is not None else []
    last: deque[str] = deque(maxlen=KEPT)
    process = subprocess.Popen(
        ["bash", str(folder / "launch.sh"), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line.rstrip("\n"))
            echo(last[-1])
        code = process.wait()
    except BaseException:
        _end(process)
        raise
    return died(list(last), code) if code else read_log(log)


def _end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_log(path: Path) -> Ran:
    """The steps and peaks that rank 0 of train.py wrote: a line {"step", "loss", "seconds"} each, then one with "peak_bytes"."""
    if not path.exists():
        raise InputError(f"the run wrote no {path}: emit the plan again")
    lines = path.read_text(errors="replace").splitlines()
    steps, peaks = [], None
    for number, line in enumerate(lines, 1):
        try:
            row: dict[str, Any] = json.loads(line)
            if "step" in row:
                steps.append(Step(int(row["step"]), float(row["loss"]), float(row["seconds"])))
            elif row.get("peak_bytes") is not None:
                peaks = tuple(float(b) for b in row["peak_bytes"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path}: line {number} of the run is not a step of train.py: {line[:80]!r}") from None
    if not steps:
        raise InputError(f"{path}: the run ended without a step")
    return Ran(tuple(steps), peaks)


def died(lines: list[str], code: int) -> Died:
    """Who died first, from torchrun's summary and the last words of each rank."""
    ranks = [int(m[1]) for line in lines if (m := re.match(r"\s*rank\s*: (\d+)", line))]
    codes = [int(m[1]) for line in lines if (m := re.match(r"\s*exitcode\s*: (-?\d+)", line))]
    found = list(zip(ranks, codes, strict=False))
    if not found:
        return Died(None, code, _words(lines, None))
    # torchrun names first whom it saw first, which may be a rank that lost its peer
    own = [(r, c) for r, c in found if c != -signal.SIGTERM]
    killed = [(r, c) for r, c in own if c < 0]
    first = [(r, c) for r, c in own if not FOLLOWS.search(_words(lines, r))]
    rank, exitcode = (killed or first or own or found)[-1]
    return Died(rank, exitcode, _words(lines, rank))


def _words(lines: list[str], rank: int | None) -> str:
    """The last error that a rank printed; torch puts [rank1]: before its lines."""
    error = re.compile(r"(?:\[rank(\d+)\]:\s*)?((?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception|Exit|Interrupt|OutOfMemory\w*)\b:?.*)")
    said = [(m[1], m[2]) for line in lines if (m := error.match(line.strip())) and "ChildFailedError" not in line]
    mine = [text for who, text in said if rank is not None and who == str(rank)]
    anyone = [text for who, text in said if who is None]
    return (mine or anyone or [""])[-1].strip()[:300]


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
