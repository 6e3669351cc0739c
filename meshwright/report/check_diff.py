"""Two reports beside each other: what each check needed in the base and needs now, and by which kind of memory."""

from __future__ import annotations

import json
import re
import textwrap
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

from meshwright.planner.check import CheckReport, CheckResult, what_changed
from meshwright.report.check_markdown import text
from meshwright.report.check_text import plural, signed
from meshwright.report.terminal import WIDTH, gib

SCHEMA: Final = "meshwright.diff/1"
SIGNS = {"changed": "~", "added": "+", "removed": "-"}
FORMATS = ("text", "json", "markdown")


class Row(BaseModel):
    """One check in both reports. Bytes are p95 of the fullest rank, but by kind, which adds up to p50; 0 where it is not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    change: Literal["changed", "added", "removed", "same", "not evaluated"]
    past_bytes: float = 0.0
    now_bytes: float = 0.0
    by_kind: dict[str, tuple[float, float]] = {}
    changed: tuple[str, ...] = ()
    error: str = ""

    @property
    def diff_bytes(self) -> float:
        return self.now_bytes - self.past_bytes


def rows(base: CheckReport, now: CheckReport) -> list[Row]:
    """Every check of either report, those of `now` first."""
    out = [_row(r.name, base.result(r.name), r) for r in now.results]
    return out + [_row(r.name, r, None) for r in base.results if now.result(r.name) is None]


def _row(name: str, was: CheckResult | None, now: CheckResult | None) -> Row:
    a, b = was.figures if was else None, now.figures if now else None
    broken = next((r.error for r in (now, was) if r is not None and r.error), "")
    kinds = {k: (a.by_kind.get(k, 0.0) if a else 0.0, b.by_kind.get(k, 0.0) if b else 0.0) for k in {**(a.by_kind if a else {}),
             **(b.by_kind if b else {})}}  # fmt: skip
    changed = tuple(what_changed(a, b)) if a and b else ()
    if broken:
        return Row(name=name, change="not evaluated", error=broken)  # in neither sum: half a difference says nothing
    change: Any = "added" if was is None else "removed" if now is None else "changed" if changed else "same"
    past, new = a.peak.p95 if a else 0.0, b.peak.p95 if b else 0.0
    return Row(name=name, change=change, past_bytes=past, now_bytes=new, by_kind=kinds, changed=changed)


def render_diff(base: CheckReport, now: CheckReport, format_: str = "text") -> str:
    """The difference as text, json or markdown."""
    made = rows(base, now)
    return {"text": _text, "json": _json, "markdown": _markdown}[format_](made, base, now)


def amount(made: list[Row]) -> str:
    """ "+1.2 GiB (74.9 GiB -> 76.1 GiB)", summed over the checks."""
    past, now = sum(r.past_bytes for r in made), sum(r.now_bytes for r in made)
    return f"{signed(now - past)} ({gib(past)} -> {gib(now)})"


def _text(made: list[Row], base: CheckReport, now: CheckReport) -> str:
    lines = ["Memory of the fullest rank (p95), the base against now", f"Key: {', '.join(f'{s} {w}' for w, s in SIGNS.items())}", ""]
    for r in made:
        if r.change == "not evaluated":
            lines += [f"! {r.name}"[:WIDTH], *_wrapped(r.error), ""]
        if r.change not in SIGNS:
            continue
        lines += [f"{SIGNS[r.change]} {r.name}"[:WIDTH], f"  {_difference(r.past_bytes, r.now_bytes)}"]
        for kind, (a, b) in sorted(r.by_kind.items(), key=lambda x: -abs(x[1][1] - x[1][0])):
            if abs(b - a) >= 2**20:
                sign = "~" if a and b else "+" if b else "-"
                lines.append(f"    {sign} {kind.replace('_', ' '):<14}{_difference(a, b)}")
        facts = [c for c in r.changed if not re.match(r"\w[\w ]* [+-]\d", c)]  # kinds of memory are told above
        lines += [f"    {line}" for c in facts for line in _wrapped(c, "~ ")]
        lines.append("")
    quiet = sum(r.change == "same" for r in made)
    if quiet:
        lines += [f"{plural(quiet, 'check')} did not change", ""]
    if base.created_by != now.created_by:
        lines += ["The base was made with other versions of the software.", ""]
    lines.append(f"Amount: {amount(made)}")
    return "\n".join(lines) + "\n"


def _difference(a: float, b: float) -> str:
    return f"{signed(b - a)} ({_size(a)} -> {_size(b)})"


def _size(nbytes: float) -> str:
    return gib(nbytes) if nbytes else "0"


def _wrapped(raw: str, head: str = "  ") -> list[str]:
    return textwrap.wrap(raw, WIDTH - 4, initial_indent=head, subsequent_indent="  ")


def _json(made: list[Row], base: CheckReport, now: CheckReport) -> str:
    past, new = sum(r.past_bytes for r in made), sum(r.now_bytes for r in made)
    document = {
        "schema": SCHEMA, "base_versions": base.created_by.model_dump(), "versions": now.created_by.model_dump(),
        "checks": [r.model_dump(mode="json") | {"diff_bytes": r.diff_bytes} for r in made],
        "past_total_bytes": past, "total_bytes": new, "diff_total_bytes": new - past,
    }  # fmt: skip
    return json.dumps(document, indent=2) + "\n"


def _markdown(made: list[Row], base: CheckReport, now: CheckReport) -> str:
    lines = [f"#### GPU memory: {amount(made)}", "", "| | check | base | now | change | what changed |", "|---|---|---:|---:|---:|---|"]
    for r in made:
        if r.change != "same":
            told = r.error or "; ".join(r.changed)
            sign = SIGNS.get(r.change, "!")
            share = f" ({r.diff_bytes / r.past_bytes:+.1%})" if r.past_bytes and r.now_bytes else ""
            lines.append(f"| {sign} | {text(r.name)} | {_size(r.past_bytes)} | {_size(r.now_bytes)} | {signed(r.diff_bytes)}{share} | {text(told)} |")
    quiet = sum(r.change == "same" for r in made)
    if quiet:
        lines += ["", f"{plural(quiet, 'check')} did not change."]
    return "\n".join(lines) + "\n"
