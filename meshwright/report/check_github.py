"""A report as workflow commands: GitHub shows them as annotations at the check's line in the configuration."""

from __future__ import annotations

import os
from pathlib import Path

from meshwright.planner.check import RULES, CheckReport, CheckResult
from meshwright.profiling.errors import InputError
from meshwright.report import check_text as say
from meshwright.report.check_markdown import render_markdown

PER_STEP = 10  # annotations of one kind that GitHub shows for a step
SUMMARY_MOST = 1_000_000  # bytes; GitHub drops a step's summary above 1 MiB


def render_github(report: CheckReport) -> str:
    """An annotation for each failure and warning, then one line that sums up."""
    commands: dict[str, list[str]] = {"error": [], "warning": [], "notice": []}
    for r in report.results:
        for level, title, message in _annotations(r):
            commands[level].append(command(level, message, file=r.file, line=str(r.line), title=title))
    for w in report.warnings:
        commands["warning"].append(command("warning", w.text, file=report.file, title=f"{w.rule} {RULES[w.rule][0]}"))
    lines = []
    for level, made in commands.items():
        lines += made[:PER_STEP]
        if len(made) > PER_STEP:
            lines.append(f"and {say.plural(len(made) - PER_STEP, level)} more, of which GitHub would show no annotation")
    return "\n".join([*lines, f"meshwright check: {say.summary(report.summary)}"]) + "\n"


def _annotations(r: CheckResult) -> list[tuple[str, str, str]]:
    """(level, title, message) of everything that one check has to tell."""
    out = []
    failure = "notice" if r.informational else "error"
    if r.status == "does_not_fit":
        best = f"\nNearest that fits: {r.nearest[0].change}, {say.setting(r.nearest[0])}" if r.nearest else ""
        changed = f"\nChanged: {say.why(r)}" if say.why(r) else ""
        out.append((failure, f"MEM001 {r.name} does not fit", f"{say.headline(r)}\nPeak in the {say.peak(r)}{changed}{best}"))
    elif r.status == "grew":
        out.append((failure, f"MEM002 {r.name} grew too much", f"{say.headline(r)}\nChanged: {say.why(r) or 'nothing that is known'}"))
    elif r.status == "error":
        out.append((failure, f"{r.name} could not be evaluated", r.error))
    out += [("notice" if r.informational else "warning", f"{w.rule} {RULES[w.rule][0]}: {r.name}", w.text) for w in r.warnings]
    return out


def command(level: str, message: str, **properties: str) -> str:
    """`::error file=a,line=1,title=b::message`, escaped as GitHub's toolkit does (actions/toolkit, core/src/command.ts)."""
    told = ",".join(f"{key}={escape_property(value)}" for key, value in properties.items() if value)
    return f"::{level} {told}::{escape_data(message)}"


def escape_data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    return escape_data(text).replace(":", "%3A").replace(",", "%2C")


def append_summary(report: CheckReport, path: str | None = None) -> None:
    """Adds the report to the page of the workflow run, where there is one ($GITHUB_STEP_SUMMARY)."""
    target = path if path is not None else os.environ.get("GITHUB_STEP_SUMMARY", "")
    if not target:
        return
    data = render_markdown(report).encode()
    try:
        size = Path(target).stat().st_size if Path(target).exists() else 0
        if size + len(data) <= SUMMARY_MOST:
            handle = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, data)
            finally:
                os.close(handle)
    except OSError as e:
        raise InputError(f"GITHUB_STEP_SUMMARY {target} cannot be written: {e.strerror}") from None
