"""A dry run as text of at most 100 columns, and as JSON, beside what the plan expects. The first line is the whole answer."""

from __future__ import annotations

from typing import Any

from meshwright.codegen.dryrun import DryRun
from meshwright.planner.explain import GIB
from meshwright.planner.plan import Plan
from meshwright.report.terminal import _paragraph, _table, _text, gib

# the rows of the waterfall: what it is called, the dry run's categories, the plan's
ROWS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("parameters", ("parameters", "gathered"), ("parameters", "gathered")),
    ("gradients", ("gradients",), ("gradients",)),
    ("optimizer", ("optimizer",), ("optimizer",)),
    ("activations", ("activations", "inputs"), ("activations", "inputs")),
    ("temporaries", ("temporaries",), ("temporaries",)),
    ("communication", ("communication",), ("communication",)),
)
OPS = {
    "allreduce": "all_reduce", "allreduce_coalesced": "all_reduce", "allgather": "all_gather", "allgather_base": "all_gather",
    "all_gather_into_tensor": "all_gather", "all_gather_single": "all_gather", "reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter", "reduce_scatter_single": "reduce_scatter", "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all", "alltoall": "all_to_all",
}  # fmt: skip
PHASES = {"step": "outside the modules", "weights": "gradients of weights"}
MOST = 16  # collectives shown


def reserved_bytes(plan: Plan, stage: int) -> float:
    """What the plan sets aside on a rank of a stage for the driver and the allocator, which a dry run does not see."""
    s = plan.solution.stages[stage]
    return s.peak_bytes - s.live_bytes if s.live_bytes else plan.prediction.memory_bytes.by_kind.get("reserved", 0.0)


def dry_run_document(plan: Plan, found: DryRun) -> dict[str, Any]:
    """The dry run as JSON, with the device's memory and the plan's own prediction. Bytes."""
    m = plan.prediction.memory_bytes
    predicted = plan.solution.stages[found.stage].peak_bytes
    needed = found.peak_bytes + reserved_bytes(plan, found.stage)
    return {
        **found.model_dump(mode="json"),
        "reserved_bytes": reserved_bytes(plan, found.stage), "capacity_bytes": m.capacity, "limit_bytes": m.limit, "fits": needed <= m.limit,
        "predicted_bytes": predicted, "predicted_by_kind": m.by_kind if found.stage == m.peak_stage else {},
        "difference": needed / predicted - 1 if predicted else None,
    }  # fmt: skip


def render_dry_run(plan: Plan, found: DryRun, saved: str = "") -> str:
    """A dry run for a reader: the answer, the waterfall beside the plan's, peaks by phase, collectives."""
    parts = [_answer(plan, found), _waterfall(plan, found), _phases(found), _collectives(found), f"Saved {saved}" if saved else ""]
    return "\n".join(p for p in parts if p)


def _answer(plan: Plan, found: DryRun) -> str:
    x, m = plan.layout, plan.prediction.memory_bytes
    needed = found.peak_bytes + reserved_bytes(plan, found.stage)
    if needed <= m.limit:
        fits = f"fits: {gib(m.limit - needed)} below the limit of {gib(m.limit)}"
    elif needed <= m.capacity:
        fits = f"over the limit of {gib(m.limit)} by {gib(needed - m.limit)}, within the device's {gib(m.capacity)}"
    else:
        fits = f"does not fit: {gib(needed - m.capacity)} more than the device's {gib(m.capacity)}"
    where = f"in {PHASES.get(found.phase, found.phase)} of {found.module}" if found.module else PHASES.get(found.phase, f"in {found.phase}")
    site = f", {found.site}" if found.site else ""
    held = found.layers_held
    layers = f"layers {', '.join(_span(c) for c in found.chunks)}" if held else "no layers"
    ran = "every layer and microbatch was run"
    if found.layers_run < held or found.microbatches_run < found.microbatches:
        ran = f"run with {found.layers_run} of {held} layers and {found.microbatches_run} of {found.microbatches} microbatches, extrapolated"
    host = f"besides {gib(found.host_bytes)} of optimizer state in the host's memory" if found.host_bytes else ""
    script = f"the script {found.script}/train.py" if found.script else ""
    lines = [f"Peak  {gib(found.peak_bytes)} live on rank {found.rank} of {x.devices}; {fits}"]
    reserved = reserved_bytes(plan, found.stage)
    for text in (
        f"with the {gib(reserved)} that the plan reserves for driver and allocator: {gib(needed)}" if reserved else "",
        host,
        script,
        f"{where}: {found.op}{site}",
        f"{plan.model.name}, stage {found.stage} of {x.pp}, {layers}; {x}",
        f"{ran}; {found.seconds:.1f} s",
    ):
        lines += _paragraph(text, "      ") if text else []
    return "\n".join(lines)


def _span(chunk: tuple[int, int]) -> str:
    return f"{chunk[0]}" if chunk[1] == chunk[0] + 1 else f"{chunk[0]} to {chunk[1] - 1}"


def _waterfall(plan: Plan, found: DryRun) -> str:
    m = plan.prediction.memory_bytes
    alike = found.stage == m.peak_stage
    largest = max(found.by_kind.values(), default=1.0) or 1.0
    unit, scale = ("GiB", GIB) if found.peak_bytes >= 0.1 * GIB else ("MiB", 2**20)
    rows = [(name, sum(found.by_kind.get(k, 0.0) for k in ours), sum(m.by_kind.get(k, 0.0) for k in theirs)) for name, ours, theirs in ROWS]
    known = {k for _, _, theirs in ROWS for k in theirs}
    rows += [(k, reserved_bytes(plan, found.stage) if k == "reserved" else 0.0, v) for k, v in m.by_kind.items() if k not in known]
    table = _table(("memory at the peak", "left"), (f"dry run {unit}", "right"), (f"plan {unit}", "right"), ("difference", "right"), ("", "left"))
    for name, ours, theirs in rows:
        if not ours and not theirs:
            continue
        given = "reserved" if name == "reserved" else ""
        bar = "#" * max(round(24 * ours / largest), 1) if ours and not given else "taken from the plan" if given else ""
        table.add_row(
            name,
            f"{ours / scale:,.2f}",
            f"{theirs / scale:,.2f}" if alike else "",
            f"{(ours - theirs) / scale:+,.2f}" if alike and not given else "",
            bar,
        )
    total, predicted = found.peak_bytes + reserved_bytes(plan, found.stage), plan.solution.stages[found.stage].peak_bytes
    off = f"{total / predicted - 1:+.1%}" if predicted else ""
    table.add_row("sum", f"{total / scale:,.2f}", f"{predicted / scale:,.2f}", f"{(total - predicted) / scale:+,.2f}", off)
    return _text(table)


def _phases(found: DryRun) -> str:
    text = ", ".join(f"{PHASES.get(p, p)} {gib(v)}" for p, v in found.by_phase.items())
    return "\n".join(_paragraph(text, "Fullest moment by phase  "))


def _collectives(found: DryRun) -> str:
    if not found.collectives:
        return "Collectives  none"
    table = _table(
        ("collective", "left"),
        ("group", "left"),
        ("ranks", "right"),
        ("MiB a call", "right"),
        ("calls", "right"),
        ("GiB", "right"),
        ("phase", "left"),
    )
    for c in found.collectives[:MOST]:
        each = c.nbytes / 2**20
        size = f"{each:,.1f}" if each >= 0.1 else f"{c.nbytes:,} B"
        table.add_row(
            OPS.get(c.op, c.op), c.group, str(c.ranks), size, f"{c.count:,.0f}", f"{c.nbytes * c.count / GIB:,.2f}", PHASES.get(c.phase, c.phase)
        )
    lines = [_text(table)]
    if len(found.collectives) > MOST:
        lines.append(f"and {len(found.collectives) - MOST} kinds more, which --json lists")
    return "\n".join(lines)
