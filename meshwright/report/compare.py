"""A measured step beside the predicted one, by the plan's own categories.

Every moment of a step counts once: as compute where a rank computes, whatever it sends meanwhile; else as the communication that it waits
for; else as idle. So what compute hides is in no row, as in the prediction, and the rows add up to the step.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from meshwright.planner.plan import Plan
from meshwright.profiling.errors import InputError
from meshwright.profiling.intervals import Intervals, clip, length, subtract, union
from meshwright.profiling.torchtrace import Event, Trace
from meshwright.report.terminal import _paragraph, _table, _text, seconds, span

PIPELINE, OTHER = "pipeline and idle", "other communication"
# Rows of the comparison, and the categories of Prediction.time_s in each: a trace does not tell recompute and accumulation from backward.
ROWS: dict[str, tuple[str, ...]] = {
    "forward": ("forward",), "backward": ("backward", "recompute", "accumulation"), "optimizer": ("optimizer",),
    "tensor parallel": ("tensor_parallel",), "context parallel": ("context_parallel",), "expert parallel": ("expert_parallel",),
    "data parallel": ("data_parallel", "reduce_and_gather"), OTHER: (), PIPELINE: ("pipeline_transfers", "pipeline_bubble", "mixed_devices"),
}  # fmt: skip
COMPUTE = ("optimizer", "backward", "forward")
DIMENSIONS = {
    "tp": "tensor parallel", "cp": "context parallel", "ep": "expert parallel", "etp": "expert parallel", "pp": PIPELINE,
    "shard": "data parallel", "replicate": "data parallel", "dp": "data parallel", "edp": "data parallel",
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One rank's median step, in seconds: rows that add up to it, communication that compute hid by row, and compute by kind."""

    path: str
    rank: int | None
    device: str
    steps: int
    step_s: float
    rows: dict[str, float]
    hidden: dict[str, float]
    kinds: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """The prediction by row, and every rank that was measured; `slowest` is the one whose step is longest."""

    plan: Plan
    predicted: dict[str, float]
    ranks: tuple[Measured, ...]

    @property
    def slowest(self) -> Measured:
        return max(self.ranks, key=lambda r: r.step_s)


def compare(plan: Plan, traces: Sequence[Trace], steps: int | None = None) -> Comparison:
    """The plan beside traces of its ranks. `steps` is how many a trace without annotations covers. InputError where a trace is of
    another run, or has no steps."""
    seen: dict[int, str] = {}
    for t in traces:
        if t.world is not None and t.world != plan.layout.devices:
            raise InputError(f"{t.path} is of a run on {t.world} ranks, the plan is for {plan.layout.devices}")
        if t.rank is not None and t.rank in seen:
            raise InputError(f"{t.path} and {seen[t.rank]} are both of rank {t.rank}: give one trace a rank")
        seen |= {t.rank: t.path} if t.rank is not None else {}
    times = plan.prediction.time_s
    predicted = {row: sum(times.get(k, 0.0) for k in keys) for row, keys in ROWS.items()}
    return Comparison(plan, predicted, tuple(measure(plan, t, steps) for t in traces))


def measure(plan: Plan, trace: Trace, steps: int | None = None) -> Measured:
    """The median step of a trace; with `steps`, the mean of so many in the whole of it."""
    if steps is not None:
        windows = [(min(e.start for e in trace.events), max(e.end for e in trace.events))]
    elif trace.steps:
        windows = list(zip(trace.steps[:-1], trace.steps[1:], strict=True))
    else:
        raise InputError(f"{trace.path} has no ProfilerStep# annotations (call the profiler's step()): say how many steps it covers with --steps")
    share = 1.0 / (steps or 1)
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for e in trace.events:
        spans[_row(e, plan) if e.phase == "communication" else e.phase].append((e.start, e.end))
        if e.phase != "communication":
            kinds[e.kind].append((e.start, e.end))
    busy = {row: union(s) for row, s in spans.items()}
    by_kind = {kind: union(s) for kind, s in kinds.items()}
    middle = statistics.median_low(b - a for a, b in windows)
    start, end = next(w for w in windows if w[1] - w[0] == middle)
    rows, hidden = _rows({row: clip(s, start, end) for row, s in busy.items()}, start, end)
    return Measured(
        trace.path, trace.rank, trace.device, steps or len(windows), middle * share, {k: v * share for k, v in rows.items()},
        {k: v * share for k, v in hidden.items() if v > 0}, {k: length(clip(s, start, end)) * share for k, s in by_kind.items()},
    )  # fmt: skip


def _rows(busy: dict[str, Intervals], start: float, end: float) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each row between two times, each moment in the first row that has it, and seconds of communication behind compute."""
    out, hidden, taken = {}, {}, union(())
    for row in (*COMPUTE, *(r for r in ROWS if r not in COMPUTE)):
        own = busy.get(row, [])
        left = subtract(own, taken)
        out[row] = length(left)
        if row not in COMPUTE and own:
            hidden[row] = length(own) - length(left)
        taken = union([*taken, *left])
    out[PIPELINE] += (end - start) - length(taken)
    return {row: out[row] for row in ROWS}, hidden


def _row(e: Event, plan: Plan) -> str:
    """The row of a collective: by its group's dimension or ranks, else by what asked for it, else the only group that there is."""
    x = plan.layout
    for name in (e.dimension, *e.dimension.split("_")):
        if name in DIMENSIONS:
            return DIMENSIONS[name]
    dimension = _dimension(e.ranks, plan.solution.mesh)
    if dimension in DIMENSIONS:
        return DIMENSIONS[dimension]
    if e.kind == "send_recv":
        return PIPELINE if x.pp > 1 else "context parallel" if x.cp > 1 else OTHER
    if e.kind == "all_to_all":
        return "expert parallel" if x.ep > 1 else "context parallel" if x.cp > 1 else OTHER
    if e.within.startswith("FSDP::"):
        return "data parallel"
    if e.within.startswith("_c10d_functional") and x.tp > 1:
        return "tensor parallel"
    groups = [row for row, n in (("tensor parallel", x.tp), ("context parallel", x.cp), ("data parallel", x.dp)) if n > 1]
    return groups[0] if len(groups) == 1 and x.pp == 1 else OTHER


def _dimension(ranks: tuple[int, ...], mesh: dict[str, int]) -> str:
    """The dimension of the mesh along which these ranks lie, empty if it is none."""
    sizes = list(mesh.values())
    for i, (name, size) in enumerate(mesh.items()):
        stride = prod(sizes[i + 1 :])
        if size > 1 and len(ranks) == size and all(b - a == stride for a, b in zip(ranks, ranks[1:], strict=False)):
            return name
    return ""


# --- shown -------------------------------------------------------------------------------------------------------------


def compare_document(found: Comparison) -> dict[str, Any]:
    """The comparison as JSON. Seconds; errors are shares of what was measured."""
    slowest, step = found.slowest, found.plan.prediction.step_s
    rows = []
    for row in _shown(found):
        measured = [r.rows[row] for r in found.ranks]
        told = {"category": row, "predicted_s": found.predicted[row], "measured_s": slowest.rows[row]}
        told |= {"error": _error(found.predicted[row], slowest.rows[row]), "least_s": min(measured), "most_s": max(measured)}
        rows.append(told | {"hidden_s": slowest.hidden.get(row, 0.0)})
    return {
        "step_s": {"measured": slowest.step_s, "predicted": step.p50, "p05": step.p05, "p95": step.p95, "error": step.p50 / slowest.step_s - 1},
        "slowest": {"trace": slowest.path, "rank": slowest.rank, "steps": slowest.steps, "compute_by_kind_s": slowest.kinds},
        "categories": rows,
        "ranks": [{"trace": r.path, "rank": r.rank, "step_s": r.step_s} for r in found.ranks],
    }  # fmt: skip


def render_comparison(found: Comparison) -> str:
    """The comparison for a reader: the answer, a row for each category, compute by kind."""
    slowest, step = found.slowest, found.plan.prediction.step_s
    inside = "inside" if step.p05 <= slowest.step_s <= step.p95 else "outside"
    error = step.p50 / slowest.step_s - 1
    wide = f"{inside} the predicted {span(step.p05, step.p95)}"
    lines = [f"Step  {seconds(slowest.step_s)} measured, {seconds(step.p50)} predicted ({error:+.1%}), {wide}"]
    who = f"rank {slowest.rank}, " if slowest.rank is not None else ""
    of = f"the slowest of {len(found.ranks)}: " if len(found.ranks) > 1 else ""
    times = f"median of {slowest.steps} steps" if slowest.steps > 1 else "one step"
    lines += _paragraph(f"{of}{who}{times} in {slowest.path}, on a {'GPU' if slowest.device == 'cuda' else 'CPU'}; {found.plan.layout}", "      ")
    several = len(found.ranks) > 1
    table = _table(
        ("category", "left"), ("predicted", "right"), ("measured", "right"), ("error", "right"), ("of the step", "right"),
        *([("over ranks", "right")] if several else []), ("hidden", "right"),
    )  # fmt: skip
    for row in _shown(found):
        p, m = found.predicted[row], slowest.rows[row]
        wrong, among = _error(p, m), [r.rows[row] for r in found.ranks]
        table.add_row(
            row, seconds(p), seconds(m), f"{wrong:+.0%}" if wrong is not None else "-", f"{m / slowest.step_s:.0%}",
            *([span(min(among), max(among))] if several else []), seconds(slowest.hidden[row]) if row in slowest.hidden else "",
        )  # fmt: skip
    total = sum(slowest.kinds.values())
    kinds = ", ".join(f"{k} {v / total:.0%}" for k, v in sorted(slowest.kinds.items(), key=lambda x: -x[1]) if v >= 0.005 * total)
    lines += [_text(table), *_paragraph(f"Compute measured: {kinds}", "")]
    note = "hidden: communication behind compute, in no row; waiting for other ranks is part of a collective's time"
    return "\n".join([*lines, *_paragraph(note, "")])


def _shown(found: Comparison) -> list[str]:
    """Rows that are predicted or measured at all."""
    return [row for row in ROWS if found.predicted[row] > 0 or any(r.rows[row] > 0 or row in r.hidden for r in found.ranks)]


def _error(predicted: float, measured: float) -> float | None:
    return predicted / measured - 1 if measured > 0 else None
