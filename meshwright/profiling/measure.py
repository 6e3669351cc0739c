"""measure: samples of the ops and links of this machine, into a HardwareProfile.

One process measures the ops of its device. Under torchrun, rank 0 leads: it says what comes next, and it alone writes the file.
Ops run on rank 0 alone while the other GPUs are idle; ranks that share one CPU run every op at once, since that is what a step sees.
Classes take turns so that each gets an equal part of the budget, coarse shapes first.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from meshwright.profiling.errors import InputError
from meshwright.profiling.hardware import CLASSES, TEXT, HardwareProfile, read_profile, write_profile
from meshwright.profiling.measure_host import device_facts, device_name, free_bytes, host, invocation
from meshwright.profiling.measure_links import Team, collective, half_ack, join, make_groups, round_trip
from meshwright.profiling.measure_ops import Pool, build, calibrate, import_lazily
from meshwright.profiling.measure_progress import Progress, progress_bar
from meshwright.profiling.measure_shapes import LINK_CLASSES, OP_CLASSES, Key, Scale, link_samples, samples
from meshwright.profiling.measure_timing import Call, Clock, Repeats, Timing, repeats_for, summarise
from meshwright.version import __version__

SAMPLE_SHARE = 0.02  # of the budget, at most, for one sample
WRITE_EVERY_S = 5.0
WEIGHTS = {"gemm": 3.0, "collective": 4.0, "attention_context": 1.5, "attention_backward": 1.5}
WAIT_BEYOND_S = 900.0
MOST_NOTES = 50
Task = tuple[str, Key]


def measure(
    output: Path,
    budget_s: float,
    classes: Sequence[str] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    *,
    flush: bool = False,
) -> HardwareProfile:
    """Measures this machine for about `budget_s` seconds and writes the profile; a file that is already there is continued.

    `classes` are names of hardware.CLASSES (default: all that can be measured here); `device` is auto, cuda or cpu; `flush` empties a
    GPU's L2 before each call. Returns the profile, on every rank. Raises InputError for bad input; under torchrun on rank 0 only, the
    other ranks exit with 2.
    """
    started = time.monotonic()
    try:
        where = _device(device)
        chosen = _classes(classes)
        if not (budget_s > 0 and math.isfinite(budget_s)):
            raise InputError(f"the budget must be above 0 seconds, not {budget_s:g}")
        if not output.absolute().parent.is_dir():
            raise InputError(f"the folder {output.parent} does not exist")
        team = join(where, budget_s + WAIT_BEYOND_S)
        try:
            return _Run(output, budget_s, chosen, where, team, progress or (lambda *_: None), flush, started, strict=classes is not None).run()
        finally:
            team.close()
    except InputError:
        if int(os.environ.get("RANK", "0")):
            raise SystemExit(2) from None
        raise


def parse_budget(text: str) -> float:
    """Seconds of "120s", "5m", "1h" or "90". InputError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|h|min)?\s*", text)
    if not match or not float(match[1]):
        raise InputError(f"the budget {text!r} is not a time like 120s, 5m or 1h")
    return float(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[match[2] or "s"]


def _device(name: str) -> torch.device:
    if name not in ("auto", "cuda", "cpu"):
        raise InputError(f"device {name!r} is not known: it is auto, cuda or cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: torch finds no GPU here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise InputError(f"local rank {index} has no GPU of its own: this machine has {torch.cuda.device_count()}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _classes(wanted: Sequence[str] | None) -> tuple[str, ...]:
    known = (*OP_CLASSES, *LINK_CLASSES)
    for name in wanted or ():
        if name not in known:
            why = "is only imported, not measured" if name in CLASSES else "is not a class of op"
            raise InputError(f"{name!r} {why}; the classes are {', '.join(known)}")
    return tuple(k for k in known if not wanted or k in wanted)


class _Run:
    """One run of measure(): what is left to do, and what was found."""

    def __init__(
        self, output: Path, budget_s: float, classes: Sequence[str], device: torch.device, team: Team, progress: Progress, flush: bool,
        started: float, strict: bool,
    ) -> None:  # fmt: skip
        self.output, self.budget_s, self.device, self.team, self.say, self.started = output, budget_s, device, team, progress, started
        self.clock = Clock(device, flush)
        self.together = device.type == "cpu" and team.world > 1
        if strict and team.world == 1 and set(classes) & set(LINK_CLASSES):
            raise InputError("collective and pair need more than one rank: start with torchrun --nproc-per-node=N")
        self.classes = [k for k in classes if team.world > 1 or k in OP_CLASSES]
        self.fresh: dict[str, list[dict[str, Any]]] = {k: [] for k in self.classes}
        self.spent: dict[str, float] = dict.fromkeys(self.classes, 0.0)
        self.count = 0
        self.worked: set[tuple[str, ...]] = set()
        self.unable: dict[tuple[str, ...], str] = {}
        self.notes: list[str] = []
        self.written = -WRITE_EVERY_S  # the first sample is written at once
        self.profile = self._open(flush)
        self.log: dict[str, Any] = {**invocation(), "budget_s": budget_s}
        self.profile.provenance.setdefault("runs", []).append(self.log)

    # --- the file ------------------------------------------------------------------------------------------------------

    def _open(self, flush: bool) -> HardwareProfile:
        """The profile so far. InputError on rank 0, and an exit of the others, if the file was measured elsewhere or otherwise."""
        made = HardwareProfile(device_name(self.device), device_facts(self.device), {"measured_by": f"meshwright {__version__}"})
        made.provenance |= {
            **host(self.device), "ranks": self.team.world, "nodes": self.team.nodes, "backend": self.team.backend or "none",
            "ops": f"all {self.team.world} ranks at once" if self.together else "one rank alone", "flush_l2": flush,
        }  # fmt: skip
        wrong = ""
        if self.team.rank == 0 and self.output.exists():
            try:
                old = read_profile(self.output)
                wrong = _differs(old, made)
                made.tables = old.tables
                made.provenance = {k: old.provenance[k] for k in ("runs", "skipped") if k in old.provenance} | made.provenance
            except InputError as e:
                wrong = str(e)
        wrong = self.team.share(wrong)
        if wrong:
            raise InputError(wrong if self.output.name in wrong else f"{self.output}: {wrong}; choose another file with -o")
        return made

    def _write(self) -> None:
        if self.team.rank:
            return
        for kind, rows in self.fresh.items():
            self.profile.add(kind, rows)
            rows.clear()
        self.log |= {"samples": self.count, "seconds": round(time.monotonic() - self.started, 1)}
        skipped = {*self.profile.provenance.get("skipped", ()), *self.notes}
        if skipped:
            self.profile.provenance["skipped"] = sorted(skipped)
        write_profile(self.profile, self.output)
        self.written = time.monotonic()

    # --- what comes next -----------------------------------------------------------------------------------------------

    def run(self) -> HardwareProfile:
        self.say(0.0, "calibrating")
        self._prepare()
        try:
            while True:
                task = self._next() if self.team.rank == 0 else None
                alone = task is not None and task[0] in OP_CLASSES and not self.together
                if not alone:
                    task = self.team.share(task)
                if task is None:
                    break
                self._measure(task, alone)
                if self.team.rank == 0 and time.monotonic() - self.written > WRITE_EVERY_S:
                    self._write()
        finally:
            self._write()
        return self.team.share(self.profile)  # type: ignore[no-any-return]

    def _prepare(self) -> None:
        """Calibrates, sizes the pool, makes the groups, and queues the samples that the file does not have."""
        dtypes = _dtypes(self.device)
        if "optimizer" in self.classes:
            import_lazily()
        self.team.barrier()
        flops, bandwidth = calibrate(self.device, tuple(d for level in dtypes for d in level))
        sharers = self.team.hosts.count(self.team.hosts[self.team.rank]) if self.device.type == "cpu" else 1
        memory = min(0.3 * free_bytes(self.device) / sharers, 64e9 if self.device.type == "cuda" else 1.5e9)
        scale = self.team.share(Scale(self.device.type, dtypes, flops, bandwidth, memory, SAMPLE_SHARE * self.budget_s))
        most = 4e9 if self.device.type == "cuda" else 64e6
        self.pool = Pool(self.device, min(most, scale.memory_bytes / 4, scale.bandwidth_Bps * scale.sample_s))
        rates = {**scale.flops, "bandwidth_Bps": scale.bandwidth_Bps}
        self.log["calibrated"] = {name: float(f"{rate:.3g}") for name, rate in rates.items()}
        places: list[tuple[int, int]] = []
        links = scale
        if self.team.world > 1 and set(self.classes) & set(LINK_CLASSES):
            make_groups(self.team)
            places = list(self.team.groups)
            links = self.team.share(replace(scale, bandwidth_Bps=self._link_bandwidth()))
        self.queues: dict[str, deque[Key]] = {}
        for kind in self.classes if self.team.rank == 0 else ():
            found = samples(kind, scale) if kind in OP_CLASSES else link_samples(kind, links, self.team.backend, places, self.team.world)
            done = _done(self.profile, kind)
            self.queues[kind] = deque(k for k in found if _identity(kind, k) not in done)

    def _link_bandwidth(self) -> float:
        """Bytes/s of an all_reduce over all ranks: what sizes the messages."""
        size = (64 if self.device.type == "cuda" else 1) << 20
        box = torch.zeros(size // 4, device=self.device)
        seconds = [self.clock.once(lambda: dist.all_reduce(box)) for _ in range(3)]
        return size / max(self.team.most([min(seconds)])[0], 1e-9)

    def _next(self) -> Task | None:
        """The next sample of the class that has had the least of the budget; None when the budget or the samples are used up."""
        while time.monotonic() - self.started < self.budget_s:
            waiting = [k for k in self.classes if self.queues[k]]
            if not waiting:
                return None
            kind = min(waiting, key=lambda k: self.spent[k] / WEIGHTS.get(k, 1.0))
            key = self.queues[kind].popleft()
            if _family(kind, key) not in self.unable:
                return kind, key
        return None

    # --- one sample ----------------------------------------------------------------------------------------------------

    def _measure(self, task: Task, alone: bool) -> None:
        kind, key = task
        start = time.monotonic()
        try:
            timing = self._timing(kind, key, alone)
        except torch.OutOfMemoryError:
            timing = None
            torch.cuda.empty_cache()
        except _Unable as e:
            timing = None
            self._note(kind, key, str(e))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        used = time.monotonic() - start
        self.spent[kind] += used
        if timing is not None and self.team.rank == 0:
            self.count += 1
            self.worked.add(_family(kind, key))
            self.fresh[kind].append({**key, "seconds": timing.seconds, "spread": timing.spread, "runs": timing.runs})
            self.say((time.monotonic() - self.started) / self.budget_s, f"{self.count} samples, {describe(kind, key)}: {timing.seconds * 1e6:.4g} us")

    def _note(self, kind: str, key: Key, why: str) -> None:
        """Leaves a family of ops out if none of it has worked yet, else this sample alone."""
        family = _family(kind, key)
        if family not in self.worked:
            self.unable[family] = why
            self.notes.append(f"{' '.join(family)}: {why}")
        elif len(self.notes) < MOST_NOTES:
            self.notes.append(f"{describe(kind, key)}: {why}")

    def _timing(self, kind: str, key: Key, alone: bool) -> Timing | None:
        link, cuda = kind in LINK_CLASSES, self.device.type == "cuda"
        limit = min(SAMPLE_SHARE * self.budget_s, 0.05 if cuda else 0.1)
        window = 1e-3 if cuda else 8e-3 if self.together else 2e-3  # ranks that share cores take turns of a few milliseconds
        error = ""
        call: Call = _nothing
        try:
            call = self._call(kind, key)
            if not link:
                self.clock.once(call)
        except (RuntimeError, TypeError, ValueError) as e:
            if alone and isinstance(e, torch.OutOfMemoryError):
                raise
            error = f"{str(e).strip().splitlines()[0][:160] if str(e).strip() else type(e).__name__}"
        if alone:
            if error:
                raise _Unable(error)
            return summarise(self.clock.windows(call, repeats_for(self.clock.estimate(call, limit), limit, window, 15)))
        self._agree(error)
        seconds = math.inf
        for _ in range(3):  # ranks must agree on how often they call
            try:
                took = self.clock.once(call)
            except RuntimeError as e:
                error, took = str(e).strip().splitlines()[0][:160], 0.0
            self._agree(error)
            seconds = min(seconds, self.team.most([took])[0])
            if seconds > limit / 4:
                break
        repeats = self.team.share(repeats_for(seconds, limit, window, 7))
        windows = self._windows(call, repeats)
        if kind != "pair":
            return summarise(self.team.most(windows) if link else self.team.mean(windows))
        half = half_ack(key, self.team, self.clock, self._windows)
        return summarise([max(w - half, w / 2) for w in self.team.most(windows)])

    def _call(self, kind: str, key: Key) -> Call:
        if kind == "collective":
            return collective(key, self.team, self.device)
        return round_trip(key, self.team, self.device) if kind == "pair" else build(kind, key, self.pool)

    def _windows(self, call: Call, repeats: Repeats) -> list[float]:
        self.team.barrier()
        return self.clock.windows(call, repeats, hide_launch=False)

    def _agree(self, error: str) -> None:
        """Raises on all ranks if one has an error."""
        if self.team.most([float(bool(error))])[0]:
            raise _Unable(error or "failed on another rank")


class _Unable(Exception):
    """This op does not exist here for this dtype."""


def _nothing() -> None:
    pass


def _dtypes(device: torch.device) -> tuple[tuple[str, ...], ...]:
    if device.type == "cpu":
        return (("fp32",), ("bf16",))
    fp8 = ("fp8",) if torch.cuda.get_device_capability(device) >= (8, 9) else ()
    return (("bf16",), ("fp32", "fp16", *fp8))


def _identity(kind: str, row: Key) -> tuple[Any, ...]:
    return tuple(str(row[c]) if c in TEXT else float(row[c]) for c in CLASSES[kind])


def _done(profile: HardwareProfile, kind: str) -> set[tuple[Any, ...]]:
    """The samples that the profile has."""
    table = profile.tables.get(kind)
    return set(zip(*(table[c].tolist() for c in CLASSES[kind]))) if table is not None else set()


def _family(kind: str, key: Key) -> tuple[str, ...]:
    """What stands or falls together when an op is missing."""
    return (kind, *(str(key[c]) for c in ("op", "kernel", "dtype") if key.get(c)))


def _differs(old: HardwareProfile, new: HardwareProfile) -> str:
    """Why samples of two runs do not belong into one file, or an empty string."""
    names = ["device_name", "flush_l2", *(("ranks", "threads") if new.device == "cpu" else ())]
    for name in names:
        before, now = old.provenance.get(name), new.provenance.get(name)
        if before != now:
            return f"its samples have {name.replace('_', ' ')} {before}, this run has {now}"
    return ""


def describe(kind: str, key: Key) -> str:
    """A sample in a few words, like "gemm fp32 m=64 n=64 k=64"."""
    named = [str(key[c]) for c in ("op", "dtype") if c in key]
    return " ".join([kind, *named, *(f"{c}={key[c]}" for c in CLASSES[kind] if c in key and c not in TEXT)])


def main(arguments: Sequence[str] | None = None) -> None:
    """python -m meshwright.profiling.measure: `meshwright profile measure` where the command line's libraries are missing."""
    parser = argparse.ArgumentParser(prog="python -m meshwright.profiling.measure")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the profile to write, or to continue")
    parser.add_argument("--budget", default="120s", help="how long, like 120s, 5m or 1h")
    parser.add_argument("--classes", default="", help=f"comma-separated, of {', '.join((*OP_CLASSES, *LINK_CLASSES))}")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--flush-l2", action="store_true", help="overwrite the L2 before each call")
    args = parser.parse_args(arguments)
    leads = os.environ.get("RANK", "0") == "0"
    try:
        wanted = [c.strip() for c in args.classes.split(",") if c.strip()] or None
        with progress_bar() as say:
            found = measure(args.output, parse_budget(args.budget), wanted, args.device, say if leads else None, flush=args.flush_l2)
    except InputError as e:
        sys.exit(f"measure: {e}")
    if leads:
        print("\n".join(summary(found)))


def summary(profile: HardwareProfile) -> list[str]:
    """What a profile holds, a line per class: samples, and the spread of the median one."""
    lines = [f"{profile.device}: {profile.rows()} samples"]
    for kind, table in profile.tables.items():
        spread = table.get("spread")
        note = f", spread {float(torch.tensor(spread).nanmedian()):.1%}" if spread is not None else ""
        lines.append(f"  {kind}: {len(table['seconds'])}, {table['seconds'].min() * 1e6:.3g} us to {table['seconds'].max() * 1e3:.3g} ms{note}")
    return lines + [f"  not here: {x}" for x in profile.provenance.get("skipped", ())]


if __name__ == "__main__":
    main()
