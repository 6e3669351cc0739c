"""A report as SARIF 2.1.0 (OASIS): a result a failure or warning, at the check's line. Checks that broke are notifications."""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from meshwright.planner.check import RULES, CheckReport, CheckResult
from meshwright.report import check_text as say

MOST = 5_000  # results that GitHub reads of a run
ORDER = list(RULES)


def render_sarif(report: CheckReport) -> str:
    """The report as one run. Fingerprints are made of the rule and the check's name, so that moving a check keeps its alert."""
    results = [made for r in report.results for made in _results(r)]
    whole = CheckResult(name=report.file, status="fits", file=report.file, warnings=report.warnings)  # what is of no one check
    results += _results(whole)
    broken = [r for r in report.results if r.status == "error"]
    run = {
        "tool": {
            "driver": {
                "name": "meshwright", "version": report.created_by.meshwright,
                "rules": [
                    {
                        "id": rule, "name": "".join(w.capitalize() for w in name.split("-")), "shortDescription": {"text": text},
                        "help": {"text": "docs/check.md: how to read a failure, and how far to trust it."},
                        "defaultConfiguration": {"level": "error" if rule in ("MEM001", "MEM002") else "warning"},
                    }
                    for rule, (name, text) in RULES.items()
                ],
            }
        },
        "invocations": [
            {
                "executionSuccessful": not broken, "exitCode": report.exit_code,
                "toolExecutionNotifications": [
                    {"level": "note" if r.informational else "error", "message": {"text": f"{r.name}: {r.error}"}, "locations": [_place(r)]}
                    for r in broken
                ],
            }
        ],
        "columnKind": "unicodeCodePoints",
        "results": results[:MOST],
    }  # fmt: skip
    log = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=2, ensure_ascii=False) + "\n"


def _results(r: CheckResult) -> list[dict[str, Any]]:
    out = []
    level = "note" if r.informational else "error"
    if r.status == "does_not_fit":
        best = f" Nearest that fits: {r.nearest[0].change}, {say.setting(r.nearest[0])}." if r.nearest else ""
        out.append(_result(r, "MEM001", level, f"{r.name}: {say.headline(r)}. Peak in the {say.peak(r)}.{best}"))
    elif r.status == "grew":
        out.append(_result(r, "MEM002", level, f"{r.name}: {say.headline(r)}. Changed: {say.why(r) or 'nothing that is known'}."))
    for w in r.warnings:
        out.append(_result(r, w.rule, "note" if r.informational else "warning", f"{r.name}: {w.text}."))
    return out


def _result(r: CheckResult, rule: str, level: str, text: str) -> dict[str, Any]:
    made: dict[str, Any] = {
        "ruleId": rule, "ruleIndex": ORDER.index(rule), "level": level, "message": {"text": text}, "locations": [_place(r)],
        "partialFingerprints": {"meshwrightCheck/v1": hashlib.sha256(f"{rule}\n{r.name}\n{text if rule > 'MEM002' else ''}".encode()).hexdigest()},
    }  # fmt: skip
    f = r.figures
    if f is not None:
        made["properties"] = {"peak_p95_bytes": f.peak.p95, "limit_bytes": f.limit_bytes, "peak_event": f.peak_event}
    return made


def _place(r: CheckResult) -> dict[str, Any]:
    path = PurePosixPath(r.file)
    uri = f"file://{quote(r.file)}" if path.is_absolute() else quote(r.file)
    return {"physicalLocation": {"artifactLocation": {"uri": uri}, "region": {"startLine": r.line}}}
