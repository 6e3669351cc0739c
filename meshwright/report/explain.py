"""Explanations as text of at most 100 columns: the price of another choice, or the constraint that forbids it."""

from __future__ import annotations

import textwrap

from meshwright.planner.explain import WORDS
from meshwright.planner.explainrun import Answer, Explanation, Side
from meshwright.planner.plan import Certificate, WhyNot
from meshwright.report.terminal import WIDTH, _hanging, _paragraph, _table, _text, gib, seconds


def render_explanation(e: Explanation) -> str:
    """The answers; or, where nothing was asked, what the plan rests on. Then what was asked for beside."""
    lines = []
    if not e.answers:
        lines += _reasons(e)
    for a in e.answers:
        lines += [*_answer(e, a), ""]
    if e.constraints:
        lines += ["Constraints", *(line for c in e.constraints for line in _hanging(c.name, c.says + (" [binds]" if c.binds else ""), indent=18))]
    if e.notes:
        lines += ["Notes", *(line for note in e.notes for line in _paragraph(note, "  "))]
    if e.blocks:
        lines += ["", "Op sharding, an integer programme a block", *(line for text in e.blocks.splitlines() for line in _wrapped(text))]
    return "\n".join(lines).rstrip()


def proof(c: Certificate, objective: str = "throughput") -> str:
    """A certificate in words."""
    what = {"memory": "need less", "cost": "cost less"}.get(objective, "be faster")
    parts = [
        f"{c.pruned_by_memory:,} do not fit however they are cut into stages and recompute" if c.pruned_by_memory else "",
        f"{c.pruned_by_bound:,} cannot {what}, by bounds that hold for every cut" if c.pruned_by_bound else "",
        f"{c.evaluated:,} were solved exactly" + (f", {c.infeasible:,} of them with no cut that fits and would {what}" if c.infeasible else ""),
        f"{c.open:,} are left open" if c.open else "none is left open",
    ]
    gap = f"gap {c.gap:.1%}" + ("" if c.open else ": the optimum of the cost model")
    return f"of {c.space:,} layouts {'; '.join(p for p in parts if p)}; {gap}; {c.seconds:.1f} s"


def _reasons(e: Explanation) -> list[str]:
    p = e.plan
    lines = [
        *_paragraph(f"{p.layout}", "Why  "),
        *_paragraph(f"{p.step_s:.4g} s a step of {e.model} on {e.cluster}, objective {e.objective}", "     "),
    ]
    lines += ["Proof", *_paragraph(proof(e.solver, e.objective), "  ")]
    if e.why_not:
        lines += ["Why not (as solved with the plan)", *(line for w in e.why_not for line in _hanging(w.fix, _price(w) + w.reason, indent=24))]
    total = sum(p.time_s.values())
    parts = sorted(p.time_s.items(), key=lambda x: -x[1])
    lines += ["Step", *_paragraph(", ".join(f"{WORDS[k]} {seconds(v)} ({v / total:.0%})" for k, v in parts), "  ")]
    held = sorted(p.memory_bytes.items(), key=lambda x: -x[1])
    lines += ["Memory of the fullest rank", *_paragraph(", ".join(f"{k} {gib(v)}" for k, v in held) + f"; p95 {gib(p.peak_bytes)}", "  ")]
    return lines


def _price(w: WhyNot) -> str:
    return f"{w.slower:+.1%}: " if w.fits and w.slower is not None else "does not fit: " if w.reason.startswith("needs") and not w.fits else ""


def _answer(e: Explanation, a: Answer) -> list[str]:
    head = f"Why not {a.fix}  "
    if a.verdict == "has it":
        return _paragraph(a.reason, head)
    if a.verdict == "impossible":
        lines = _paragraph(f"impossible: {a.reason}", head)
        return [*lines, *(line for p in a.possible for line in _paragraph(p, "  "))]
    assert a.other is not None
    if a.verdict == "costs":
        assert a.slower is not None
        text = (
            f"{a.other.step_s:.4g} s a step instead of {e.plan.step_s:.4g} s: {a.slower:+.1%}" if abs(a.slower) >= 5e-5 else "costs nothing: as fast"
        )
        lines = [*_paragraph(text, head), *_paragraph(f"plan  {e.plan.layout}", "  "), *_paragraph(f"then  {a.other.layout}", "  ")]
        return [*lines, *_compared(e.plan, a.other, a.fix, times=True)]
    assert a.needs_bytes is not None
    assert a.limit_bytes is not None
    over = gib(a.needs_bytes - a.limit_bytes)
    text = f"does not fit: {gib(a.needs_bytes)} (p95) needed at best on the fullest rank, {gib(a.limit_bytes)} allowed, so {over} too much"
    lines = [*_paragraph(text, head), *_paragraph(f"plan   {e.plan.layout}", "  "), *_paragraph(f"least  {a.other.layout}", "  ")]
    lines += _compared(e.plan, a.other, a.fix, times=False)
    lines += [f"Smallest changes with which {a.fix} fits, each solved"]
    for n in a.nearest:
        lines += _paragraph(f"{n.change}: {n.layout}, {gib(n.peak_bytes)} (p95), {n.step_s:.3g} s a step", "  ")
    if not a.nearest:
        lines += ["  none was found"]
    return lines


def _compared(plan: Side, other: Side, fix: str, times: bool) -> list[str]:
    """Two tables side by side: where the time goes and what the fullest rank holds."""
    lines = []
    if times:
        table = _table(("seconds", "left"), ("plan", "right"), (fix, "right"), ("difference", "right"))
        for key in WORDS:
            ours, theirs = plan.time_s.get(key, 0.0), other.time_s.get(key, 0.0)
            if max(ours, theirs) >= 5e-5 * plan.step_s:
                table.add_row(WORDS[key], f"{ours:.4f}", f"{theirs:.4f}", f"{theirs - ours:+.4f}")
        table.add_row("step", f"{plan.step_s:.4f}", f"{other.step_s:.4f}", f"{other.step_s - plan.step_s:+.4f}")
        lines.append(_text(table))
    table = _table(("GiB of the fullest rank", "left"), ("plan", "right"), (fix if times else f"{fix}, least", "right"), ("difference", "right"))
    names = dict.fromkeys([*plan.memory_bytes, *other.memory_bytes])
    rows = {k: (plan.memory_bytes.get(k, 0.0) / 2**30, other.memory_bytes.get(k, 0.0) / 2**30) for k in names}
    for key, (a, b) in rows.items():
        if max(a, b) >= 0.005:
            table.add_row(key, f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}")
    a, b = plan.peak_bytes / 2**30, other.peak_bytes / 2**30
    table.add_row("p95", f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}")
    return [*lines, _text(table)]


def _wrapped(text: str) -> list[str]:
    """A line of the programmes, its own indentation kept."""
    if len(text) <= WIDTH:
        return [text]
    head = text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(text.strip(), WIDTH, initial_indent=head, subsequent_indent=head + "      ")
