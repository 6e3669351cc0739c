"""Schemas of the formats that CI systems read, for what this package writes of them.

SARIF: written from the OASIS standard "Static Analysis Results Interchange Format 2.1.0" (sections 3.13 to 3.58): the objects that
we emit with their required properties, types and enumerations, closed against unknown properties as the standard's schema is.
JUnit: the elements and attributes on which the schemas of Ant, Jenkins and Surefire agree, with `file` as GitLab reads it.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any


def _closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


TEXT = {"type": "string", "minLength": 1}
MESSAGE = _closed(["text"], text=TEXT)  # 3.11
LEVEL = {"enum": ["none", "note", "warning", "error"]}  # 3.27.10
REGION = _closed(["startLine"], startLine={"type": "integer", "minimum": 1})  # 3.30
URI = {"type": "string", "pattern": r"^[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+$", "not": {"pattern": "%(?![0-9A-Fa-f]{2})"}}  # RFC 3986
LOCATION = _closed(  # 3.28, 3.29, 3.4
    ["physicalLocation"],
    physicalLocation=_closed(["artifactLocation", "region"], artifactLocation=_closed(["uri"], uri=URI), region=REGION),
)
LOCATIONS = {"type": "array", "minItems": 1, "maxItems": 1, "items": LOCATION}
RULE = _closed(  # 3.49
    ["id", "shortDescription"], id={"type": "string", "pattern": r"^MEM\d{3}$"}, name={"type": "string", "pattern": "^[A-Z][A-Za-z]+$"},
    shortDescription=MESSAGE, help=MESSAGE, defaultConfiguration=_closed(["level"], level=LEVEL),
)  # fmt: skip
DRIVER = _closed(  # 3.19
    ["name", "version", "rules"], name=TEXT, version=TEXT, rules={"type": "array", "uniqueItems": True, "minItems": 1, "items": RULE}
)
RESULT = _closed(  # 3.27
    ["ruleId", "ruleIndex", "level", "message", "locations", "partialFingerprints"],
    ruleId={"enum": ["MEM001", "MEM002", "MEM003", "MEM004"]}, ruleIndex={"type": "integer", "minimum": 0}, level=LEVEL, message=MESSAGE,
    locations=LOCATIONS, properties={"type": "object"},
    partialFingerprints={"type": "object", "minProperties": 1, "additionalProperties": TEXT, "propertyNames": {"pattern": r"/v\d+$"}},
)  # fmt: skip
INVOCATION = _closed(  # 3.20, 3.58
    ["executionSuccessful"], executionSuccessful={"type": "boolean"}, exitCode={"type": "integer"},
    toolExecutionNotifications={"type": "array", "items": _closed(["message"], level=LEVEL, message=MESSAGE, locations=LOCATIONS)},
)  # fmt: skip
RUN = _closed(  # 3.14
    ["tool", "results"], tool=_closed(["driver"], driver=DRIVER), invocations={"type": "array", "items": INVOCATION},
    columnKind={"enum": ["utf16CodeUnits", "unicodeCodePoints"]}, results={"type": "array", "maxItems": 5000, "items": RESULT},
)  # fmt: skip
SARIF = _closed(  # 3.13; GitHub asks for $schema
    ["$schema", "version", "runs"], version={"const": "2.1.0"}, runs={"type": "array", "minItems": 1, "maxItems": 1, "items": RUN},
    **{"$schema": {"type": "string", "pattern": r"sarif-2\.1\.0\.json$"}},
)  # fmt: skip

# element -> (attributes: pattern, and whether required; children: how many at most)
_ANY, _COUNT, _TIME = ".*", r"\d+", r"\d+(\.\d+)?"
JUNIT: dict[str, tuple[dict[str, tuple[str, bool]], dict[str, float]]] = {
    "testsuites": (
        {"name": (_ANY, False), "tests": (_COUNT, True), "failures": (_COUNT, True), "errors": (_COUNT, True), "time": (_TIME, True)},
        {"testsuite": float("inf")},
    ),
    "testsuite": (
        {"name": (".+", True), "tests": (_COUNT, True), "failures": (_COUNT, True), "errors": (_COUNT, True), "skipped": (_COUNT, True),
         "time": (_TIME, True)},
        {"properties": 1, "testcase": float("inf")},
    ),
    "properties": ({}, {"property": float("inf")}),
    "property": ({"name": (".+", True), "value": (_ANY, True)}, {}),
    "testcase": (
        {"name": (".+", True), "classname": (".+", True), "time": (_TIME, True), "file": (".+", False)},
        {"skipped": 1, "error": 1, "failure": 1, "system-out": 1},
    ),
    "skipped": ({"message": (_ANY, False)}, {}),
    "failure": ({"type": (".+", True), "message": (_ANY, False)}, {}),
    "error": ({"type": (".+", True), "message": (_ANY, False)}, {}),
    "system-out": ({}, {}),
}  # fmt: skip


def junit_mistakes(root: ET.Element) -> list[str]:
    """What contradicts the schema, each in words."""
    out = [] if root.tag == "testsuites" else [f"the root is {root.tag}"]
    for element in root.iter():
        if element.tag not in JUNIT:
            out.append(f"{element.tag} is not an element")
            continue
        attributes, children = JUNIT[element.tag]
        out += [f"{element.tag}.{key} is not an attribute" for key in element.attrib if key not in attributes]
        for key, (pattern, required) in attributes.items():
            value = element.attrib.get(key)
            if value is None and required:
                out.append(f"{element.tag}.{key} is missing")
            elif value is not None and not re.fullmatch(pattern, value, re.DOTALL):
                out.append(f"{element.tag}.{key} is {value!r}")
        tags = [child.tag for child in element]
        out += [f"{element.tag} holds {tag} {tags.count(tag)} times" for tag in set(tags) if tags.count(tag) > children.get(tag, 0)]
        if element.tag in ("testsuites", "testsuite"):
            counts = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}
            for key, tag in counts.items():
                found = sum(1 for _ in element.iter(tag))
                if key in element.attrib and element.attrib[key] != str(found):
                    out.append(f"{element.tag}.{key} is {element.attrib[key]}, and there are {found}")
    return out
