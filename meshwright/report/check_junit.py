"""A report as JUnit XML: one test case a check. A check that does not fit is a failure, one that broke an error."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from meshwright.planner.check import CheckReport, CheckResult
from meshwright.report import check_text as say

# What XML 1.0 allows (section 2.2); anything else would make the file unreadable.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
KINDS = {"does_not_fit": "MEM001", "grew": "MEM002", "error": "error"}


def render_junit(report: CheckReport) -> str:
    """The report as one test suite."""
    counts = {
        "tests": len(report.results),
        "failures": sum(r.failed and r.status != "error" for r in report.results),
        "errors": sum(r.failed and r.status == "error" for r in report.results),
    }
    skipped = sum(r.informational and r.status != "fits" for r in report.results)
    numbers = {k: str(v) for k, v in counts.items()}
    root = ET.Element("testsuites", {"name": "meshwright check", **numbers, "time": "0"})
    suite = ET.SubElement(root, "testsuite", {"name": _clean(report.file), **numbers, "skipped": str(skipped), "time": "0"})
    properties = ET.SubElement(suite, "properties")
    for name, value in report.created_by.model_dump().items():
        ET.SubElement(properties, "property", {"name": name, "value": _clean(value)})
    for r in report.results:
        _case(suite, r)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _case(suite: ET.Element, r: CheckResult) -> None:
    case = ET.SubElement(suite, "testcase", {"name": _clean(r.name), "classname": "meshwright.check", "time": "0", "file": _clean(r.file)})
    body = "\n".join(say.render_result(r))
    if r.failed:
        kind = "error" if r.status == "error" else "failure"
        ET.SubElement(case, kind, {"type": KINDS[r.status], "message": _clean(say.headline(r))}).text = _clean(body)
        return
    if r.status != "fits":
        ET.SubElement(case, "skipped", {"message": _clean(f"informational: {say.headline(r)}")})
    ET.SubElement(case, "system-out").text = _clean(body)


def _clean(text: str) -> str:
    return _NOT_XML.sub("?", text)
