"""How far predictions are from published training runs, each source judged by constants fitted on the others.

    python benchmarks/accuracy.py --runs runs.csv [--where split=calib] [--ablate] [--write-constants PATH]
    python benchmarks/accuracy.py --ops TREE      # errors of compiled cost models on ops held out, for each GPU of the tree

A source is a value of `source_key`. A job is the runs that share source, model, GPU, GPUs, sequence, precision and batch, with three
layouts or more; within it, Spearman rank correlation of predicted and published time, and regret: published time of the layout
predicted fastest over the best, minus 1.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

import numpy as np
from op_accuracy import report_ops
from rich.console import Console
from rich.table import Table

from meshwright.costmodel import constants
from meshwright.costmodel.features import features
from meshwright.costmodel.fitting import fit, job_scores, leave_one_out
from meshwright.costmodel.runmemory import peak_bytes
from meshwright.costmodel.runs import Run, parse_all, read_rows
from meshwright.costmodel.training import NAMES, Batch, step_parts
from meshwright.profiling.errors import InputError
from meshwright.profiling.files import write_atomically

INGREDIENTS = ("recompute", "tensor parallel", "data parallel", "bubble", "head", "misalignment", "launches", "expert parallel", "casts",
               "accumulation", "optimizer", "sends")  # fmt: skip
console = Console(width=150)


def load(path: Path, where: str) -> tuple[Batch, np.ndarray, np.ndarray]:
    """Runs that publish a step time, that time in seconds, and their sources."""
    column, _, value = where.partition("=")
    parsed = parse_all(read_rows(path), path, keep=lambda row: not where or (row.get(column) or "") == value)
    runs = [r for _, r in parsed if isinstance(r, Run)]
    timed = [r for r in runs if r.measured_s and "seq_len" not in r.assumed]
    refused = len(parsed) - len(runs)
    console.print(f"{len(parsed)} rows, {refused} without an answer ({refused / max(1, len(parsed)):.1%}), {len(timed)} with a published step time")
    if not timed:
        raise InputError(f"{path} has no row with canon_step_s or canon_tokens_per_s_per_gpu")
    rows = []
    for i, run in enumerate(timed):
        print(f"\rtracing and pricing {i + 1} of {len(timed)}", end="", file=sys.stderr, flush=True)
        rows.append(features(run))
    print(file=sys.stderr)
    return Batch(timed, rows), np.array([r.measured_s for r in timed]), np.array([r.source for r in timed])


def percentiles(error: np.ndarray) -> list[str]:
    return [f"{x:.1f}" for x in (np.median(error), error.mean(), np.quantile(error, 0.9))]


def report(batch: Batch, seconds: np.ndarray, source: np.ndarray, predicted: np.ndarray, theta: np.ndarray, worst: int) -> None:
    error, log = np.abs(predicted / seconds - 1) * 100, np.log(predicted / seconds)
    everything = np.ones(len(seconds), bool)
    jobs = job_scores(batch, predicted, seconds, everything)
    mixture = np.array([bool(r.dims.experts) for r in batch.runs])
    table = Table(
        "source",
        "runs",
        "median %",
        "mean %",
        "p90 %",
        "bias (log)",
        "jobs",
        "Spearman",
        "regret %",
        title="each source by constants fitted on the others",
    )
    for name, rows in [(s, source == s) for s in sorted(set(source))] + [("dense", ~mixture), ("mixture of experts", mixture), ("all", everything)]:
        if rows.any():
            mine = [j for j in jobs if j.source == name] if name in set(source) else jobs if name == "all" else []
            score = [f"{np.mean([j.spearman for j in mine]):.2f}", f"{100 * np.mean([j.regret for j in mine]):.1f}"] if mine else ["", ""]
            table.add_row(name, str(rows.sum()), *percentiles(error[rows]), f"{log[rows].mean():+.2f}", str(len(mine)), *score)
    console.print(table)
    within = Table("job", "layouts", "Spearman", "regret %", title="within each job")
    for j in jobs:
        within.add_row(", ".join(x for x in j.job if x), str(j.layouts), f"{j.spearman:.2f}", f"{100 * j.regret:.1f}")
    console.print(within)
    _, parts = step_parts(batch, theta)
    total = sum(parts.values())
    table = Table("run", "layout", "published s", "predicted s", "log", "largest parts of the prediction; what was assumed", title="worst runs")
    for i in np.argsort(-np.abs(log))[:worst]:
        r = batch.runs[i]
        largest = sorted(parts, key=lambda k: -parts[k][i])[:3]
        why = ", ".join(f"{k} {100 * parts[k][i] / total[i]:.0f} %" for k in largest) + ("; assumed " + ", ".join(r.assumed) if r.assumed else "")
        layout = f"{r.n_gpus} x {r.device.name} {r.precision} tp{r.tp} pp{r.pp} v{r.vpp} cp{r.cp} ep{r.ep}"
        layout += f" mb{r.micro_batch:g} m{r.microbatches:g} {r.recompute}"
        table.add_row(f"{r.id} {r.model}", layout, f"{seconds[i]:.3g}", f"{predicted[i]:.3g}", f"{log[i]:+.2f}", why)
    console.print(table)


def memory(batch: Batch) -> None:
    rows = [(r, peak_bytes(r) / 2**30) for r in batch.runs if r.measured_GiB]
    if not rows:
        return
    table = Table("metric", "runs", "median %", "mean %", "p90 %", "bias (log)", title="peak memory")
    metrics = sorted({r.memory_metric for r, _ in rows})
    for metric in [*metrics, ""]:
        pairs = np.array([(p, r.measured_GiB) for r, p in rows if not metric or r.memory_metric == metric])
        table.add_row(
            metric or "all",
            str(len(pairs)),
            *percentiles(np.abs(pairs[:, 0] / pairs[:, 1] - 1) * 100),
            f"{np.log(pairs[:, 0] / pairs[:, 1]).mean():+.2f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, help="a table of published runs (CSV)")
    parser.add_argument("--ops", type=Path, help="a tree of operator tables, the folder that holds systems/")
    parser.add_argument("--where", default="", help="keep the rows where a column has a value, like split=calib")
    parser.add_argument("--worst", type=int, default=20, help="how many of the worst runs to show")
    parser.add_argument("--ablate", action="store_true", help="leave out one ingredient after another")
    parser.add_argument("--write-constants", type=Path, help="write the constants fitted on all rows")
    args = parser.parse_args()
    if args.runs is None and args.ops is None:
        parser.error("name a table of runs (--runs runs.csv) or a tree of operator tables (--ops TREE)")
    try:
        if args.ops:
            report_ops(args.ops, [], 950.0, console)
        if args.runs:
            run(args)
    except InputError as e:
        sys.exit(f"accuracy: {e}")


def calibrated(batch: Batch, seconds: np.ndarray, predicted: np.ndarray) -> None:
    """Errors after one measured step scales the others: of the same source, model and GPU, each run by the one listed before it."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for i, r in enumerate(batch.runs):
        groups.setdefault((r.source, r.model, r.device.name), []).append(i)
    errors = []
    for rows in groups.values():
        for i, by in zip(rows, [rows[-1], *rows[:-1]]):
            if i != by:
                errors.append(abs(predicted[i] * seconds[by] / predicted[by] / seconds[i] - 1) * 100)
    if errors:
        median, mean, p90 = percentiles(np.array(errors))
        console.print(f"scaled by one measured step of its source, model and GPU: median {median} %, mean {mean} %, p90 {p90} % ({len(errors)} runs)")


def run(args: argparse.Namespace) -> None:
    batch, seconds, source = load(args.runs, args.where)
    everything = np.ones(len(seconds), bool)
    predicted, folds = leave_one_out(batch, seconds, source, everything)
    theta = fit(batch, seconds, source, everything)
    report(batch, seconds, source, predicted, theta, args.worst)
    calibrated(batch, seconds, predicted)
    memory(batch)
    ranges = np.array(list(folds.values()))
    table = Table("constant", "fitted on all", "range over folds", title="constants")
    for i, name in enumerate(NAMES):
        table.add_row(name, f"{theta[i]:.3g}", f"{ranges[:, i].min():.3g} to {ranges[:, i].max():.3g}")
    console.print(table)
    if args.ablate:
        table = Table("without", "median %", "mean %", "p90 %", "Spearman", "regret %", title="ablations, refitted and left out again")
        for off in ("", *INGREDIENTS):
            p, _ = leave_one_out(batch, seconds, source, everything, off=(off,))
            jobs = job_scores(batch, p, seconds, everything)
            score = (f"{np.mean([j.spearman for j in jobs]):.2f}", f"{100 * np.mean([j.regret for j in jobs]):.1f}") if jobs else ("", "")
            table.add_row(off or "nothing", *percentiles(np.abs(p / seconds - 1) * 100), *score)
        console.print(table)
    if args.write_constants:
        mixture = np.array([bool(r.dims.experts) for r in batch.runs])
        ratio = seconds / predicted
        spread = {kind: tuple(np.quantile(ratio[rows], (0.05, 0.95))) for kind, rows in (("dense", ~mixture), ("mixture", mixture)) if rows.any()}
        provenance = {"runs": len(seconds), "sources": len(set(source)), "fitted": datetime.date.today().isoformat()}
        write_atomically(args.write_constants, constants.text(theta, folds, spread, provenance))
        console.print(f"wrote {args.write_constants}")


if __name__ == "__main__":
    main()
