"""Plans, refusals, traces and devices as text of at most 100 columns. The first line is the whole answer."""

from __future__ import annotations

import io
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from meshwright.planner.explain import GIB, WORDS
from meshwright.planner.plan import Layout, Plan
from meshwright.planner.solve import Infeasible, stage_events
from meshwright.profiling.cluster import Device
from meshwright.profiling.graph import ModelGraph

WIDTH = 100


def render_plan(plan: Plan, saved: str = "") -> str:
    """A plan for a reader: the answer, the next best, why not the others, memory, timeline, what to do next."""
    parts = [
        _answer(plan),
        _alternatives(plan),
        _why_not(plan),
        _step(plan),
        _memory(plan),
        _stages(plan),
        _timeline(plan),
        _costs(plan),
        _notes(plan),
        _next(saved, plan),
    ]
    return "\n".join(p for p in parts if p)


def render_infeasible(refusal: Infeasible) -> str:
    """Why nothing fits: by how much, what is nearest to fitting, and which constraints excluded what."""
    over = refusal.needs_bytes - refusal.limit_bytes
    w, c = refusal.workload, refusal.solver
    lines = [
        f"No plan  {refusal.model} does not fit on {refusal.cluster}: {gib(over)} too much on a rank",
        f"         {gib(refusal.needs_bytes)} needed at best, {gib(refusal.limit_bytes)} allowed",
        f"         global batch {w.global_batch}, sequence {w.seq}, {w.precision}; none of {c.space:,} layouts fits, proven in {c.seconds:.1f} s",
        "Least",
        *_paragraph(refusal.least, "  "),
    ]
    lines.append("Nearest that would fit")
    for n in refusal.nearest:
        lines += _paragraph(f"{n.change}: {n.layout}, {gib(n.peak_bytes)} (p95), {n.step_s:.3g} s a step", "  ")
    if not refusal.nearest:
        lines.append("  none was found with more nodes of the same kind")
    lines += ["Excluded", *_rejected((r.constraint, r.count, r.example) for r in refusal.rejected)]
    return "\n".join(lines)


def render_trace(graph: ModelGraph) -> str:
    """What a trace found: parameters, FLOPs of one sample, each unique block, ops by kind and what is not modelled."""
    forward, backward = graph.flops(1), graph.flops(1, backward=True)
    coverage = graph.coverage()
    lines = [
        f"{graph.name}  {graph.numel:,} parameters, {flops(forward)} forward and {flops(backward)} backward a sample of {graph.seq}",
        f"{len(graph.layers)} layers of {sum(b.repeated for b in graph.blocks)} kinds; {graph.precision}; loss: {graph.objective}",
    ]
    table = _table(
        ("block", "left"), ("times", "right"), ("parameters", "right"), ("GFLOP forward", "right"), ("saved MiB", "right"), ("ops", "right")
    )
    times = Counter(o.block for o in graph.sequence)
    for block in graph.blocks:
        cells = [block.name, str(times[block.id]), f"{block.numel:,}", f"{block.flops(1) / 1e9:,.2f}", f"{block.saved_bytes(1) / 2**20:,.2f}"]
        table.add_row(*cells, str(len(block.ops)))
    lines.append(_text(table))
    kinds: Counter[str] = Counter()
    for o in graph.sequence:
        kinds.update(op.kind for op in graph.blocks[o.block].ops)
    lines += ["Ops", *_paragraph(", ".join(f"{k} {n}" for k, n in kinds.most_common()), "  ")]
    lines += _paragraph(str(coverage), "  ")
    if graph.no_program:
        lines += ["Pipeline", *_paragraph(f"not possible: {graph.no_program}", "  ")]
    lines += [line for note in graph.notes for line in _paragraph(note, "Note  ")]
    return "\n".join(lines)


def render_devices(devices: Sequence[Device]) -> str:
    """The devices as a table, and the source of each."""
    table = _table(
        ("device", "left"), ("memory GiB", "right"), ("GB/s", "right"), ("bf16 TFLOP/s", "right"), ("a node", "right"),
        ("node GB/s", "right"), ("network GB/s", "right"),
    )  # fmt: skip
    for d in devices:
        bf16 = d.peak_flops.get("bf16") or d.peak_flops["fp32"]
        table.add_row(
            d.name, f"{d.memory_bytes / GIB:.1f}", f"{d.memory_bandwidth_Bps / 1e9:,.0f}", f"{bf16 / 1e12:,.4g}", str(d.devices_per_node),
            f"{d.node_link.bandwidth_Bps / 1e9:,.0f}", f"{d.network_link.bandwidth_Bps / 1e9:,.4g}",
        )  # fmt: skip
    lines = [_text(table), "Sources"]
    for d in devices:
        lines += _paragraph(f"{d.name}: {d.source}; efficiencies {d.achieved.provenance}", "  ")
    return "\n".join(lines)


def gib(bytes_: float) -> str:
    """Bytes for a reader."""
    return f"{bytes_ / GIB:.1f} GiB" if bytes_ >= 0.1 * GIB else f"{bytes_ / 2**20:.1f} MiB"


def count(n: int) -> str:
    """A number of parameters for a reader."""
    return f"{n / 1e9:.4g} B" if n >= 1e9 else f"{n / 1e6:.4g} M"


def flops(n: float) -> str:
    """Floating point operations for a reader."""
    return f"{n / 1e12:.4g} TFLOP" if n >= 1e11 else f"{n / 1e9:.4g} GFLOP"


def seconds(s: float) -> str:
    """Seconds for a reader."""
    return f"{s:.3g} s" if s >= 0.1 else f"{s * 1e3:.3g} ms"


def span(low: float, high: float) -> str:
    """A range of seconds for a reader, in the unit of its upper end."""
    return f"{low:.3g}-{high:.3g} s" if high >= 0.1 else f"{low * 1e3:.3g}-{high * 1e3:.3g} ms"


# --- the parts of a plan ---------------------------------------------------------------------------------------------


def _layout(x: Layout) -> str:
    return str(x)


def _answer(plan: Plan) -> str:
    p, m, s = plan.prediction, plan.prediction.memory_bytes, plan.solver
    step = p.step_s
    rest = plan.alternatives[0].bottleneck if plan.alternatives else "compute"
    w = plan.workload
    proof = f"optimum proven (gap {s.gap:.1%})" if s.status == "optimal" else f"{s.status} (gap {s.gap:.1%}, {s.open:,} open)"
    figures = (
        f"step {seconds(step.p50)} [{span(step.p05, step.p95)}]", f"{p.tokens_per_s:,.0f} tokens/s", f"MFU {p.mfu:.0%}",
        f"peak {gib(m.peak.p50)} of {gib(m.capacity)} [p95 {gib(m.peak.p95)}]",
    )  # fmt: skip
    search = f"{s.space:,} layouts, {s.pruned_by_memory:,} do not fit, {proof}, {s.seconds:.1f} s; bound by {rest}"
    asked = f"{plan.model.name} ({count(plan.model.numel)} parameters) on {plan.cluster.name}; batch {w.global_batch}, sequence {w.seq}"
    lines = [f"Plan  {_layout(plan.layout)}"]
    for text in ("  ".join(figures), search, f"{asked}, {w.precision}"):
        lines += _paragraph(text, "      ")
    return "\n".join(lines)


def _alternatives(plan: Plan) -> str:
    layouts = [a.layout for a in plan.alternatives]
    cp, ep = any(x.cp > 1 for x in layouts), any(x.ep * x.etp > 1 for x in layouts)
    pipes = any(x.schedule not in ("1f1b", "gpipe") for x in layouts)
    table = _table(
        ("#", "right"), ("dp", "right"), ("zero", "right"), ("tp", "right"), *([("cp", "right")] * cp), *([("ep", "right")] * ep), ("pp", "right"),
        *([("schedule", "left")] * pipes), ("mb", "right"), ("recompute", "left"), ("step", "right"), ("vs best", "right"), ("peak", "right"),
        *([] if pipes or cp + ep > 1 else [("bound", "left")]),
    )  # fmt: skip
    for i, a in enumerate(plan.alternatives):
        x = a.layout
        table.add_row(
            f"{'> ' if i == 0 else ''}{i + 1}", str(x.dp) if x.replicas == 1 else f"{x.replicas}x{x.shard}", str(x.zero),
            f"{x.tp}{'+sp' if x.sp else ''}", *([f"{x.cp}{'u' * (x.cp > 1 and x.cp_kind == 'ulysses')}"] if cp else []),
            *([f"{x.ep}{f'x{x.etp}' if x.etp > 1 else ''}"] if ep else []), str(x.pp),
            *([f"{x.schedule}{f' x{x.vpp}' if x.vpp > 1 else ''}"] if pipes else []), str(x.micro_batch),
            x.recompute, seconds(a.step_s), f"{a.slower:+.1%}" if i else "-", gib(a.peak_bytes), *([] if pipes or cp + ep > 1 else [a.bottleneck]),
        )  # fmt: skip
    return _text(table)


def _stages(plan: Plan) -> str:
    """Which layers a stage holds and what it recomputes, equal neighbours in one line."""
    stages = plan.solution.stages
    if len(stages) == 1 and plan.layout.recompute != "by stage":
        return ""
    rows: list[list[int | str]] = []
    for i, s in enumerate(stages):
        layers = sum(b - a for a, b in s.chunks or (s.layers,))
        chunks = f" in {len(s.chunks)} chunks" if s.chunks else ""
        covered = f" in its first {s.recompute_layers}" if s.recompute_layers is not None else ""
        text = f"{layers} layer{'s' * (layers > 1)}{chunks}, recompute {s.recompute}{covered}"
        if rows and rows[-1][2] == text:
            rows[-1][1] = i
        else:
            rows.append([i, i, text])
    lines = [f"  {f'{a}' if a == b else f'{a} to {b}':<10}{text}" for a, b, text in rows]
    shown = lines if len(lines) <= 12 else [*lines[:11], f"  and {len(lines) - 11} more lines, in the JSON"]
    return "\n".join(["Stages", *shown])


def _why_not(plan: Plan) -> str:
    lines = []
    for w in plan.why_not:
        price = f"{w.slower:+.1%}: " if w.fits and w.slower is not None else "does not fit: " if w.reason.startswith("needs") else ""
        lines += _hanging(w.fix, price + w.reason)
    return "\n".join(["Why not", *lines]) if lines else ""


def _step(plan: Plan) -> str:
    total = plan.prediction.step_s.p50
    parts = sorted(plan.prediction.time_s.items(), key=lambda x: -x[1])
    text = ", ".join(f"{WORDS[k]} {seconds(v)} ({v / total:.0%})" for k, v in parts)
    check = f"the event simulator says {seconds(plan.prediction.simulated_step_s)}"
    return "\n".join(["Step", *_paragraph(f"{text}; {check}", "  ")])


def _memory(plan: Plan) -> str:
    m = plan.prediction.memory_bytes
    stage = f"stage {m.peak_stage}, " if plan.layout.pp > 1 else ""
    lines = [f"Memory ({stage}peak in the {m.peak_event})"]
    largest = max(m.by_kind.values())
    for kind, size in m.by_kind.items():
        lines.append(f"  {kind:<14}{gib(size):>10}  {'#' * max(round(40 * size / largest), 1)}")
    lines.append(f"  {'limit':<14}{gib(m.limit):>10}  p95 {gib(m.peak.p95)}, so {gib(m.limit - m.peak.p95)} free")
    return "\n".join(lines)


def _timeline(plan: Plan, columns: int = 72, most: int = 8) -> str:
    """The schedule of one step as a picture; a long one is drawn with fewer microbatches, which is said."""
    pp = plan.layout.pp
    if pp == 1:
        return ""
    shown = min(plan.microbatches, max(2 * pp, 4))
    events = stage_events(plan, shown)
    end = max(e.end_s for e in events)
    note = "" if shown == plan.microbatches else f", drawn with {shown} of {plan.microbatches} microbatches"
    lines = [f"Timeline (1 step{note})"]
    for stage in [*range(pp)][:most]:
        row = ["."] * columns
        for e in events:
            if e.stage == stage:
                a, b = int(e.start_s / end * columns), max(int(e.end_s / end * columns), int(e.start_s / end * columns) + 1)
                row[a:b] = [e.kind[0].upper()] * (min(b, columns) - a)
        busy = sum(e.end_s - e.start_s for e in events if e.stage == stage)
        lines.append(f"  stage {stage:<3}|{''.join(row)}| idle {1 - busy / end:.0%}")
    if pp > most:
        lines.append(f"  and {pp - most} more stages")
    return "\n".join(lines)


def _costs(plan: Plan) -> str:
    lines = [line for source in plan.prediction.provenance for line in _paragraph(source, "  ")]
    return "\n".join(["Costs", *lines]) if lines else ""


def _notes(plan: Plan) -> str:
    lines = [line for note in plan.notes for line in _paragraph(note, "  ")]
    if plan.coverage.unknown:
        lines += _paragraph(f"not priced, for want of a model: {plan.coverage}", "  ")
    return "\n".join(["Notes", *lines]) if lines else ""


def _next(saved: str, plan: Plan) -> str:
    if saved:
        return f"Saved {saved}    Next: meshwright emit {saved} -o run"
    return "Next: add -o plan.json, then: meshwright emit plan.json -o run"


# --- text --------------------------------------------------------------------------------------------------------------


def _rejected(rows: Iterable[tuple[str, int, str]]) -> list[str]:
    lines = []
    for constraint, count, example in rows:
        lines += _hanging(f"{count:,}", f"{constraint} ({example})" if example else constraint)
    return lines


def _hanging(head: str, text: str, indent: int = 16) -> list[str]:
    gap = " " * indent
    return textwrap.wrap(text, WIDTH, initial_indent=f"  {head}".ljust(indent - 1) + " ", subsequent_indent=gap, break_long_words=False)


def _paragraph(text: str, head: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    return table


def _text(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=WIDTH, force_terminal=False, no_color=True, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
