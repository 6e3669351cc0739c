"""A check as sentences, and a report as text of at most 100 columns. The first line is the whole answer."""

from __future__ import annotations

import textwrap
from collections import Counter

from meshwright.planner.check import GIB, RULES, CheckReport, CheckResult, Setting, Summary
from meshwright.profiling.graph import Coverage
from meshwright.report.terminal import WIDTH, count, gib, seconds

MARKS = {"fits": "ok", "does_not_fit": "x", "grew": "x", "error": "!"}


# --- sentences that every format uses ------------------------------------------------------------------------------------


def answer(report: CheckReport) -> str:
    """ "1 of 3 checks no longer fits": the whole answer in one clause. Informational checks are counted apart."""
    failed = {s: [r for r in report.results if r.status == s and r.failed] for s in ("does_not_fit", "grew", "error")}
    fitted = bool(failed["does_not_fit"]) and all(r.growth and r.growth.base_status == "fits" for r in failed["does_not_fit"])
    words = {
        "does_not_fit": ("no longer fits", "no longer fit") if fitted else ("does not fit", "do not fit"),
        "grew": ("grew too much",) * 2, "error": ("could not be evaluated",) * 2,
    }  # fmt: skip
    parts = [f"{len(rs)} {words[s][len(rs) > 1]}" for s, rs in failed.items() if rs]
    told = sum(r.informational and r.status != "fits" for r in report.results)
    n = len(report.results)
    if parts:
        first, _, rest = parts[0].partition(" ")
        parts[0] = f"{first} of {plural(n, 'check')} {rest}"
    else:
        whole = "the check fits" if n == 1 else "both checks fit" if n == 2 else f"all {n} checks fit"
        parts = [f"{n - told} of {plural(n, 'check')} {'fits' if n - told == 1 else 'fit'}" if told else whole]
    return ", ".join([*parts, f"{told} informational {'fails' if told == 1 else 'fail'}"] if told else parts)


def headline(r: CheckResult) -> str:
    """One check in one sentence: what it needs, what it may, and by how much that is too much."""
    f = r.figures
    if f is None:
        return r.error
    if r.status == "does_not_fit":
        text = f"{gib(f.peak.p95)} (p95) > {gib(f.limit_bytes)} limit on {f.inputs.cluster}: {gib(f.over_bytes)} too much"
    elif r.status == "grew" and r.growth is not None and r.growth.allowed_bytes is not None:
        text = f"{gib(f.peak.p95)} (p95) fits, but it may grow by {gib(r.growth.allowed_bytes)} at most"
    else:
        text = f"{gib(f.peak.p95)} (p95) of {gib(f.limit_bytes)} on {f.inputs.cluster}: {gib(-f.over_bytes)} free"
    return f"{text} ({change(r)})" if r.growth is not None else text


def change(r: CheckResult) -> str:
    """ "+8.0 GiB, +10.5% against the base", or that there is no base."""
    if r.growth is None:
        return "new"
    if abs(r.growth.bytes) < 2**19:
        return "as in the base"
    return f"{signed(r.growth.bytes)}, {r.growth.share:+.1%} against the base"


def peak(r: CheckResult) -> str:
    """Where the peak is and what it is made of, the largest first."""
    f = r.figures
    if f is None:
        return ""
    unit, size = ("", GIB) if f.peak.p50 >= GIB else ("in MiB: ", 2**20)
    largest = sorted(((k, v) for k, v in f.by_kind.items() if v >= 0.005 * f.peak.p50), key=lambda x: -x[1])
    parts = unit + ", ".join(f"{kind.replace('_', ' ')} {v / size:.1f}" for kind, v in largest)
    stage = f"stage {f.peak_stage}, " if f.layout.pp > 1 else ""
    return f"{stage}{f.peak_event}: {gib(f.peak.p50)} expected, {gib(f.peak.p95)} at p95 ({parts})"


def layout(r: CheckResult) -> str:
    """The layout that was checked, and its step."""
    f = r.figures
    if f is None:
        return ""
    if f.step_s is None:
        return f"tp={f.layout.tp} pp={f.layout.pp}, {plural(f.layout.dp, 'replica')} of {plural(f.layout.micro_batch, 'sequence')}"
    return f"{f.layout}, {seconds(f.step_s)} a step"


def asked(r: CheckResult) -> str:
    """What was asked: the model, batch, sequence, precision."""
    f = r.figures
    if f is None:
        return ""
    i = f.inputs
    return f"{i.model} ({count(i.numel)} parameters), batch {i.batch}, sequence {i.seq}, {i.precision}, {r.mode}; plan: {r.plan}"


def setting(s: Setting) -> str:
    """ "57.0 GiB, +18% step": a setting that fits, and its price."""
    price = "" if s.slower is None else ", the same step" if abs(s.slower) < 0.0005 else f", {s.slower:+.1%} step"
    return f"{gib(s.peak_bytes)} (p95){price}"


def why(r: CheckResult) -> str:
    """What changed against the base, in one sentence, or ""."""
    return "; ".join(r.growth.changed) if r.growth is not None else ""


def where(r: CheckResult) -> str:
    return f"{r.file}:{r.line}"


def summary(s: Summary) -> str:
    """The last line of a report."""
    parts = [f"{s.fits} {'fits' if s.fits == 1 else 'fit'}", f"{s.does_not_fit} {'does' if s.does_not_fit == 1 else 'do'} not fit"]
    parts += [f"{s.grew} grew too much"] if s.grew else []
    parts += [plural(s.error, "error"), plural(s.warnings, "warning")]
    return f"{plural(s.checks, 'check')}: {', '.join(parts)}"


def coverage(report: CheckReport) -> str:
    """How many ops of all the checks are modelled, and which are not."""
    told = [r.coverage for r in report.results if r.coverage is not None]
    unknown: Counter[str] = Counter()
    for c in told:
        unknown.update(c.unknown)
    whole = Coverage(
        ops=sum(c.ops for c in told), modelled=sum(c.modelled for c in told), free=sum(c.free for c in told), unknown=dict(unknown)
    )
    return str(whole) if told else ""


def versions(report: CheckReport) -> str:
    v = report.created_by
    hf = f", transformers {v.transformers}" if v.transformers else ""
    return f"meshwright {v.meshwright}, torch {v.torch}{hf}"


def signed(size: float) -> str:
    """A difference of bytes for a reader."""
    return f"{'-' if size < 0 else '+'}{gib(abs(size))}"


def plural(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


# --- text ----------------------------------------------------------------------------------------------------------------


def render_text(report: CheckReport) -> str:
    """A report for a reader. Checks that fit take a line; others say where the peak is, what changed and what would fit."""
    lines = textwrap.wrap(f"Check  {answer(report)}", WIDTH, subsequent_indent=" " * 7)
    for r in report.results:
        lines += render_result(r)
    for name in report.missing:
        lines += _row("-", name, "in the base, but no longer configured")
    for w in report.warnings:
        lines += textwrap.wrap(f"warning  {w.rule} {RULES[w.rule][0]}: {w.text}", WIDTH, subsequent_indent=" " * 9)
    if any(r.status == "does_not_fit" for r in report.results):
        lines.append("A limit holds for p95 of the prediction; docs/check.md says how far to trust it.")
    if coverage(report):
        lines += textwrap.wrap(f"Coverage: {coverage(report)}", WIDTH, subsequent_indent=" " * 10)
    lines.append(summary(report.summary))
    return "\n".join(lines) + "\n"


def render_result(r: CheckResult) -> list[str]:
    """One check as lines."""
    mark = MARKS[r.status]
    told = headline(r) if not r.informational or r.status == "fits" else f"{headline(r)} (informational)"
    lines = _row(mark, r.name, told)
    if r.status != "fits":
        for head, text in (("asked", asked(r)), ("layout", layout(r)), ("peak", peak(r)), ("metrics", metrics(r)), ("changed", why(r))):
            if text:
                lines += _part(head, text)
        if r.status == "does_not_fit":
            lines += _nearest(r)
        lines += _part("where", where(r))
    elif r.growth is not None and r.growth.changed:
        lines += _part("changed", why(r))
    for note in r.notes if r.status != "fits" else ():
        lines += _part("note", note)
    for w in r.warnings:
        lines += _part("warning", f"{w.rule} {RULES[w.rule][0]}: {w.text}")
    return lines


def metrics(r: CheckResult) -> str:
    """p95 as each tool would measure it, where the cost model tells."""
    told = r.figures.by_metric if r.figures is not None else {}
    return ", ".join(f"{k} {gib(v)}" for k, v in told.items())


def _nearest(r: CheckResult) -> list[str]:
    if not r.nearest:
        return _part("nearest", "nothing was found that fits, with one part of the layout changed or with more nodes of the same kind")
    width = min(max(len(s.change) for s in r.nearest), 40)
    out = []
    for i, s in enumerate(r.nearest):
        extra = f", with {s.layout}" if s.change == "plan = auto" else ""
        out += _part("nearest" if i == 0 else "", f"{s.change:<{width}}  {setting(s)}{extra}", width + 2)
    return out


def _row(mark: str, name: str, text: str) -> list[str]:
    return textwrap.wrap(f"{mark:<2} {name}  {text}", WIDTH, subsequent_indent=" " * 5, break_on_hyphens=False)


def _part(head: str, text: str, hang: int = 0) -> list[str]:
    first, rest = f"     {head:<10}", " " * (15 + hang)
    body = text if hang else " ".join(text.split())
    return textwrap.wrap(body, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, drop_whitespace=True)
