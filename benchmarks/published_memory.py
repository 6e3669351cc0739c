"""How far predicted peak memory is from published runs, by source and metric, and whether runs that ran out of memory are told apart.

    python benchmarks/published_memory.py --runs runs.csv [--where split=calib]

A source is a value of `source_key`. Live bytes hold no fitted constant; the allocator's gap (costmodel/allocator.yaml) does, and each
source is judged by the gap fitted on the others: the median over sources of the median of (published - pools - communicators - context)
over allocated. Rows that ran are all those whose `oom` is not true, with or without a figure for memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from meshwright.costmodel.allocator import constants
from meshwright.costmodel.runmemory import GIB, Peak, fits, peak
from meshwright.costmodel.runs import Run, parse_all, read_rows
from meshwright.profiling.errors import InputError

console = Console(width=150)


@dataclass(frozen=True)
class Case:
    """A run, its predicted peak, and whether it ran out of memory."""

    run: Run
    peak: Peak
    oom: bool

    @property
    def published(self) -> float:
        return (self.run.measured_GiB or 0.0) * GIB

    @property
    def pools(self) -> float:
        r, c = self.peak.reported, constants()
        return float(r.reserved[0]) - c.gap[self.run.engine.expandable][0] * float(r.allocated[0])

    @property
    def outside(self) -> float:
        r = self.peak.reported
        return float(r.device[0]) - float(r.reserved[0]) if self.peak.metric == "device" else 0.0

    @property
    def gap(self) -> float:
        """What the published figure says of the gap."""
        return (self.published - self.pools - self.outside) / float(self.peak.reported.allocated[0])

    def with_gap(self, gap: float) -> float:
        """The prediction with another gap, bytes."""
        if self.peak.metric == "allocated":
            return self.peak.p50
        return gap * float(self.peak.reported.allocated[0]) + self.pools + self.outside


def load(path: Path, where: str) -> list[Case]:
    column, _, value = where.partition("=")
    parsed = parse_all(read_rows(path), path, keep=lambda row: not where or (row.get(column) or "") == value)
    cases = []
    for i, (row, run) in enumerate(parsed):
        print(f"\r{i + 1} of {len(parsed)}", end="", file=sys.stderr, flush=True)
        if isinstance(run, Run):
            cases.append(Case(run, peak(run, schedule=row.get("schedule") or ""), (row.get("oom") or "").strip().lower() in ("true", "1", "yes")))
    print(file=sys.stderr)
    if not any(c.published for c in cases):
        raise InputError(f"{path} has no row with measured_peak_mem_GiB")
    return cases


def gaps(cases: Sequence[Case], q: float = 0.5) -> dict[bool, dict[str, float]]:
    """By whether segments are expandable, the gap that each source's rows say."""
    found: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}
    for c in cases:
        if c.published and c.peak.metric != "allocated":
            found[c.run.engine.expandable].setdefault(c.run.source, []).append(c.gap)
    return {kind: {source: float(np.quantile(v, q)) for source, v in by.items()} for kind, by in found.items()}


def held_out(case: Case, by: dict[bool, dict[str, float]]) -> float:
    """The gap of the other sources; those of the same kind if there are any, else of both."""
    same = [g for source, g in by[case.run.engine.expandable].items() if source != case.run.source]
    both = [g for kind in by.values() for source, g in kind.items() if source != case.run.source]
    return float(np.median(same or both or [constants().gap[case.run.engine.expandable][0]]))


def errors(predicted: Sequence[float], cases: Sequence[Case]) -> list[str]:
    ratio = np.array(predicted) / np.array([c.published for c in cases])
    off = np.abs(ratio - 1) * 100
    return [str(len(cases)), f"{np.median(off):.1f}", f"{np.quantile(off, 0.9):.1f}", f"{100 * (np.median(ratio) - 1):+.1f}"]


def report(cases: list[Case]) -> None:
    known = [c for c in cases if c.published]
    by = gaps(cases)
    head = ("rows", "median %", "p90 %", "bias %", "left out: rows", "median %", "p90 %", "bias %", "below p95 %")
    table = Table("source", "metric", "read as", *head, title="peak memory: shipped constants, and with the gap of the other sources")
    groups = [(f"{source}|{metric}", [c for c in known if (c.run.source, c.run.memory_metric) == (source, metric)])
              for source, metric in sorted({(c.run.source, c.run.memory_metric) for c in known})]  # fmt: skip
    for kind in ("allocated", "reserved", "device"):
        groups.append((f"all {kind}|", [c for c in known if c.peak.metric == kind]))
    groups.append(("all torch metrics|", [c for c in known if c.peak.metric != "device"]))
    for name, mine in groups:
        if mine:
            source, _, metric = name.partition("|")
            below = 100 * np.mean([c.published <= c.peak.p95 for c in mine])
            left = errors([c.with_gap(held_out(c, by)) for c in mine], mine)
            read = mine[0].peak.metric if metric else ""
            table.add_row(source, metric, read, *errors([c.peak.p50 for c in mine], mine), *left, f"{below:.0f}")
    console.print(table)
    torch = [c for c in known if c.peak.metric != "device"]
    medians = [np.median([abs(c.with_gap(held_out(c, by)) / c.published - 1) * 100 for c in torch if c.run.source == s])
               for s in sorted({c.run.source for c in torch})]  # fmt: skip
    console.print(f"torch metrics, median over {len(medians)} sources of their medians: {np.median(medians):.1f} %")


def report_oom(cases: list[Case]) -> None:
    table = Table("source", "ran out", "caught", "ran", "false alarms", title="out of memory: fits or not, against the device")
    total = np.zeros(4, int)
    for source in sorted({c.run.source for c in cases}):
        mine = [c for c in cases if c.run.source == source]
        row = [sum(c.oom for c in mine), sum(c.oom and not fits(c.run, c.peak) for c in mine), sum(not c.oom for c in mine),
               sum(not c.oom and not fits(c.run, c.peak) for c in mine)]  # fmt: skip
        total += row
        table.add_row(source, *map(str, row))
    table.add_row("all", *map(str, total))
    console.print(table)
    recall = f"recall {total[1] / total[0]:.2f}, " if total[0] else ""
    console.print(f"{recall}false alarms {100 * total[3] / max(1, total[2]):.1f} %")
    for c in cases:
        if c.oom and fits(c.run, c.peak):
            assumed = f"; assumed {', '.join(c.run.assumed)}" if c.run.assumed else ""
            low, high = (float(x) / GIB for x in c.peak.reported.device)
            console.print(f"  missed: {c.run.id} {c.run.model}, device {low:.0f} to {high:.0f} of {c.run.device.memory_GiB:g} GiB{assumed}")


def report_rows(cases: list[Case], model: str, engine: str) -> None:
    """Row by row, where the bytes are."""
    mine = [c for c in cases if c.published and c.run.engine.name == engine and model in c.run.model.lower()]
    if not mine:
        return
    head = ("run", "GPUs", "seq", "batch", "cp", "precision", "recompute", "compiled", "GiB", "predicted", "p95", "off %", "parts (GiB)")
    table = Table(*head, title=f"{mine[0].run.model}, {engine}")
    for c in mine:
        r = c.run
        parts = ", ".join(f"{k} {v / GIB:.1f}" for k, v in c.peak.parts.items() if v)
        compiled = "yes" if r.engine.fusion == "compiled" else "no"
        layout = (r.id, str(r.n_gpus), str(r.seq), f"{r.micro_batch:g}", str(r.cp), r.precision, r.recompute, compiled)
        figures = [f"{x / GIB:.1f}" for x in (c.published, c.peak.p50, c.peak.p95)]
        table.add_row(*layout, *figures, f"{100 * (c.peak.p50 / c.published - 1):+.1f}", parts)
    console.print(table)


def report_fit(cases: list[Case]) -> None:
    c = constants()
    table = Table("constant", "shipped p50, p95", "sources: p50 (p95)", title="what is fitted")
    low, high = gaps(cases), gaps(cases, 0.95)
    for kind, name in ((False, "gap, fixed segments"), (True, "gap, expandable segments")):
        said = ", ".join(f"{s} {g:.2f} ({high[kind][s]:.2f})" for s, g in low[kind].items())
        table.add_row(name, f"{c.gap[kind][0]:.2f}, {c.gap[kind][1]:.2f}", said)
    told: dict[str, list[float]] = {}
    for x in cases:
        if x.published and x.peak.metric == "allocated":
            told.setdefault(x.run.source, []).append(x.published / float(x.peak.reported.allocated[0]))
    said = ", ".join(f"{s} {np.median(v):.2f} ({np.quantile(v, 0.95):.2f})" for s, v in told.items())
    table.add_row("closed form, published over predicted", f"{c.closed_form[0]:.2f}, {c.closed_form[1]:.2f}", said)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="a table of published runs (CSV)")
    parser.add_argument("--where", default="", help="keep the rows where a column has a value, like split=calib")
    args = parser.parse_args()
    try:
        cases = load(args.runs, args.where)
    except InputError as e:
        sys.exit(f"published_memory: {e}")
    report(cases)
    report_oom(cases)
    report_rows(cases, "8b", "fsdp2")
    report_fit(cases)


if __name__ == "__main__":
    main()
