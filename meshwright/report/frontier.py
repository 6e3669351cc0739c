"""A sweep over cluster sizes as text of at most 100 columns. The first line is the whole answer."""

from __future__ import annotations

from meshwright.planner.frontier import Frontier, Point, TooSlow, duration, tokens_text
from meshwright.report.terminal import _hanging, _paragraph, _table, _text, seconds


def render_frontier(f: Frontier) -> str:
    """The answer, the table of sizes, what each holds, and why some hold nothing."""
    w, some = f.workload, [p for p in f.points if p.step_s is not None]
    about = f"{f.model} on {f.device}; global batch {w.global_batch}, sequence {w.seq}, {w.precision}"
    lines = [*_paragraph(_sentence(f, some), "Sweep  "), *_paragraph(about, "       ")]
    if some:
        lines += [_sizes(f, some), f"{'Device-hours are' if f.price is None else 'Cost is'} for {tokens_text(f.tokens)} tokens."]
        lines += _paragraph("Frontier: no size with as few devices (size), or that costs as little (cost), is faster.", "")
        lines += ["Layouts", *(line for p in some for line in _hanging(str(p.devices), _held(p), indent=9))]
    none = [p for p in f.points if p.step_s is None]
    if none:
        lines += ["No plan", *(line for p in none for line in _hanging(str(p.devices), p.why, indent=9))]
    if f.deadline_s is not None:
        lines.append("Next: every size, not only those swept: --objective gpus (the fewest) or --objective cost")
    return "\n".join(lines)


def render_too_slow(t: TooSlow) -> str:
    """That no size meets the deadline, and by how much."""
    w = t.workload
    steps = t.tokens / (w.global_batch * w.seq)
    lines = _paragraph(
        f"{t.model} on {t.cluster}: {tokens_text(t.tokens)} tokens take {duration(t.takes_s)} at best on all {t.devices} devices, "
        f"{duration(t.deadline_s)} are allowed; no smaller size does it either",
        "No plan  ",
    )
    return "\n".join([*lines, *_paragraph(f"{steps:,.0f} steps of {seconds(t.step_s)}, with {t.layout}", "         ")])


def _sentence(f: Frontier, some: list[Point]) -> str:
    if not some:
        return f"{f.model} fits none of the {len(f.points)} sizes"
    cheapest = min(some, key=lambda p: (p.device_hours or 0.0, p.devices))
    fastest = min(some, key=lambda p: (p.step_s or 0.0, p.devices))
    least = (
        f"{cheapest.devices:,} devices cost least ({_spent(f, cheapest)}), {fastest.devices:,} are fastest ({seconds(fastest.step_s or 0.0)} a step)"
    )
    if cheapest is fastest:
        least = f"{cheapest.devices:,} devices cost least and are fastest ({_spent(f, cheapest)}, {seconds(fastest.step_s or 0.0)} a step)"
    if f.deadline_s is None:
        return least
    asked = f"{tokens_text(f.tokens)} tokens in {duration(f.deadline_s)}"
    if f.smallest is None:
        return f"No size swept does {asked}: the fastest, {fastest.devices:,} devices, takes {duration(fastest.takes_s or 0.0)}; {least}"
    chosen = next(p for p in some if p.devices == f.smallest)
    return f"{chosen.devices:,} devices are the fewest swept that do {asked}: {duration(chosen.takes_s or 0.0)}, {_spent(f, chosen)}; {least}"


def _spent(f: Frontier, p: Point) -> str:
    hours = f"{p.device_hours or 0.0:,.0f} device-hours"
    return hours if p.cost is None else f"{p.cost:,.0f} for {hours}"


def _sizes(f: Frontier, some: list[Point]) -> str:
    columns = [("devices", "right"), ("step", "right"), ("tokens/s", "right"), ("MFU", "right"), ("p95 GiB", "right")]
    columns += [("hours" if f.price is None else "cost", "right")]
    columns += [("takes", "right")] if f.asked else []
    columns += [("in time", "left")] if f.deadline_s is not None else []
    table = _table(*columns, ("frontier", "left"))
    for p in some:
        spent = p.device_hours if p.cost is None else p.cost
        cells = [f"{p.devices:,}", seconds(p.step_s or 0.0), f"{p.tokens_per_s:,.0f}", f"{p.mfu:.1%}", f"{(p.peak_bytes or 0.0) / 2**30:.1f}"]
        cells += [f"{spent:,.0f}"]
        cells += [duration(p.takes_s or 0.0)] if f.asked else []
        cells += ["yes" if p.meets else "no"] if f.deadline_s is not None else []
        on = [name for name, told in (("size", p.frontier_step), ("cost", p.frontier_cost)) if told]
        table.add_row(*cells, " ".join(on) or "-")
    return _text(table)


def _held(p: Point) -> str:
    late = p.solver is not None and p.solver.status == "time limit"
    return f"{p.layout}{f' (time limit, gap {p.solver.gap:.1%})' if late and p.solver is not None else ''}"
