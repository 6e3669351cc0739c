"""The comment under a pull request. Its first two lines stand alone, for they are all that a notification shows."""

from __future__ import annotations

import re
from collections.abc import Sequence

from meshwright.planner.check import GIB, RULES, CheckReport, CheckResult
from meshwright.report import check_text as say
from meshwright.report.terminal import gib

MOST = 65_536  # characters of a comment on GitHub
LONGEST = 2_000  # of one text inside of it
STATES = {"fits": "fits", "does_not_fit": ":x: does not fit", "grew": ":x: grew too much", "error": ":warning: not evaluated"}
# markup anywhere, an underscore beside a word, what starts a heading, a list or a quotation
_MARKUP = re.compile(r"[\\`*|\[\]~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[#>+-]")
FOOTER = "This comment is updated when the code changes."


def hidden_tag(tag: str = "") -> str:
    """The HTML comment by which an earlier comment is found again."""
    return f"<!-- meshwright-check{':' + re.sub(r'[^A-Za-z0-9_.-]', '-', tag) if tag else ''} -->"


def render_markdown(report: CheckReport, tag: str = "", most: int = MOST) -> str:
    """A report as the comment of a pull request, of at most `most` characters: what is too much is left out of the middle."""
    told = sorted(report.results, key=lambda r: r.status == "fits")  # what fails first; sorted is stable
    first = text(f"{told[0].name}: {say.headline(told[0])}") if told else ""
    head = f"#### GPU memory: {say.answer(report)}\n{first}\n\n"
    columns = ["check", "limit", "base", "this change", "change", ""] if report.base else ["check", "limit", "this change", ""]
    table = f"| {' | '.join(columns)} |\n|---{'|---:' * (len(columns) - 2)}|---|\n"
    rows = [_row(r, bool(report.base)) for r in told]
    rows += [f"| {text(name)} | | | removed | | |\n" for name in report.missing]
    sections = [_section(r) for r in told if r.status != "fits" or r.warnings or (r.growth and r.growth.changed)]
    sections += [f"\n{w.rule} {RULES[w.rule][0]}: {text(w.text)}.\n" for w in report.warnings]
    told_ops = f"{say.coverage(report)}." if say.coverage(report) else ""
    foot = f"\n<sub>{FOOTER} {text(say.versions(report))}; limits hold for p95 of the prediction. {text(told_ops)}</sub>\n{hidden_tag(tag)}\n"
    room = most - len(head) - len(table) - len(foot)
    body = _within(rows, room // 2, "| ... {} more | | |\n")
    return head + table + body + _within(sections, room - len(body), "\n*{} more checks are left out here.*\n") + foot


def _row(r: CheckResult, against: bool) -> str:
    f = r.figures
    state = STATES[r.status] + (" (informational)" if r.informational and r.status != "fits" else "")
    cells = [text(r.name), gib(f.limit_bytes) if f else ""]
    if against:
        cells.append(gib(r.growth.base.peak.p95) if r.growth else "")
    cells.append(gib(f.peak.p95) if f else "")
    if against:
        cells.append(_change(r))
    return f"| {' | '.join([*cells, state])} |\n"


def _change(r: CheckResult) -> str:
    if r.growth is None:
        return "" if r.error else "new"
    return f"{say.signed(r.growth.bytes)} ({r.growth.share:+.1%})" if r.growth.bytes else "0"


def _section(r: CheckResult) -> str:
    lines = [f"\n**{text(r.name)}** ({text(say.where(r))})\n"]
    if r.error:
        lines.append(f"{text(r.error)}\n")
    if say.why(r):
        lines.append(f"Why: {text(say.why(r))}.\n")
    f = r.figures
    if f is not None and r.status != "fits":
        lines.append(f"Peak in the {text(say.peak(r))}.\n")
    if r.status == "does_not_fit":
        lines.append("Nearest that fits:\n" if r.nearest else "Nothing was found that fits with one thing changed.\n")
        if r.nearest:
            lines.append("| change | peak (p95) | step |\n|---|---:|---:|")
            for s in r.nearest:
                change = f"{s.change}: {s.layout}" if s.change == "plan = auto" else s.change
                lines.append(f"| {text(change)} | {gib(s.peak_bytes)} | {'' if s.slower is None else f'{s.slower:+.1%}'} |")
    if r.warnings:
        lines.append("")
    lines += [f"- {w.rule} {RULES[w.rule][0]}: {text(w.text)}" for w in r.warnings]
    if f is not None and r.status != "fits":
        lines += ["", "<details><summary>Memory by kind, what was asked, coverage</summary>\n"]
        old = r.growth.base.by_kind if r.growth else None
        lines.append(f"| kind | {'base GiB | ' if old is not None else ''}GiB |\n|---|---:|{'---:|' if old is not None else ''}")
        for kind in {**(old or {}), **f.by_kind}:
            base = f"{old.get(kind, 0.0) / GIB:.1f} | " if old is not None else ""
            lines.append(f"| {text(kind.replace('_', ' '))} | {base}{f.by_kind.get(kind, 0.0) / GIB:.1f} |")
        lines += ["", f"Asked: {text(say.asked(r))}.", f"Layout: {text(say.layout(r))}.", f"Coverage: {text(str(r.coverage))}.", "", "</details>"]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip("\n") + "\n"


def text(raw: str) -> str:
    """Foreign text in a line or a cell: no markup, no mentions, no end of the cell."""
    line = _MARKUP.sub(r"\\\g<0>", " ".join(raw.split())[:LONGEST])
    return line.replace("&", "&amp;").replace("<", "&lt;").replace("@", "&#64;")


def _within(parts: Sequence[str], room: int, note: str) -> str:
    """The parts, or as many of the first and the last of them as there is room for."""
    if sum(map(len, parts)) <= room:
        return "".join(parts)
    room -= len(note) + 8
    first: list[str] = []
    last: list[str] = []
    left = list(parts)
    while left:
        part = left[0] if len(first) <= len(last) else left[-1]
        if len(part) > room:
            break
        room -= len(part)
        if len(first) <= len(last):
            first.append(left.pop(0))
        else:
            last.append(left.pop())
    return "".join([*first, note.format(len(left)), *reversed(last)])
