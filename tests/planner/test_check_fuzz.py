"""Mutated configuration files: an answer that is right, or exit code 2 with one sentence. Never a traceback, never half a file.

Tracing and searching are stood in for (tests_support.stub); reading, the command line, exit codes and writers are the real ones.
"""

from __future__ import annotations

import io
import json
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests_support import GIB, stub

from meshwright import cli
from meshwright.planner import checkrun
from meshwright.planner.check import SCHEMA

TOML = """[project]
name = "x"

[[tool.meshwright.check]]
name = "pretrain-8b"
model = "train/model.py:build"
sample = "train/model.py:sample"
cluster = "8xH100-SXM"
batch = 128
seq = 70
precision = "bf16"
plan = { tp = 2, pp = 1, dp = 4, zero = 3, micro_batch = 1, sp = true, recompute = "full" }
limit = "95%"
max_increase = "2%"
informational = false
costs = "datasheet"

[[tool.meshwright.check]]
name = "serve"
model = "configs/llama.json"
mode = "infer"
cluster = { name = "two", nodes = [{ device = "L40S", devices = 2 }] }
seq = 30
limit = "40GiB"
informational = true

[[tool.meshwright.check]]
name = "saved"
model = "train.model:build"
plan = "plans/saved.json"
seq = 90
"""
DATA = tomllib.loads(TOML)["tool"]["meshwright"]
YAML = yaml.safe_dump(DATA, sort_keys=False)
TOKENS = [
    "'", '"', "[", "]", "{", "}", "[[", "]]", "=", ":", ",", "#", "-", "\n", "  ", "\t", "\r\n", "\\", "\\u0000", "\x00", "\x1b[31m", "&a ", "*a",
    "!!python/object:os.system ", "<<: ", "? ", "| ", "> ", "%", "0", "-1", "13", "1e99", "nan", "inf", "0x10", "1979-05-27", "2020-13-45", "true",
    "null", "~", '""', "[]", "{}", "9" * 30, "9" * 5000, "[" * 2000, "ü", "\U0001f600", "\u2028", "\ufeff", "\ud7ff", "name", "model", "cluster",
    "plan", "seq", "limit", "check", "tool.meshwright", "[[tool.meshwright.check]]\n", "name = 1\n", "- name: x\n", "8xH900", "c.yaml", "../..",
    "/dev/null", "auto", "infer", "train", "100TiB", "0%", "120%", "::error::x", "$(id)", "%0A",
]  # fmt: skip

edits = st.lists(
    st.tuples(
        st.sampled_from(["digit"] * 6 + ["swap"] * 2 + ["insert", "replace", "delete", "twice", "drop line"]), st.floats(0, 1), st.integers(1, 25),
        st.one_of(st.sampled_from(TOKENS), st.sampled_from(TOKENS), st.text(max_size=6)),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


def mutate(text: str, todo: list[tuple[str, float, int, str]]) -> str:
    for kind, at, length, token in todo:
        i = int(at * len(text))
        if kind == "digit":
            places = [p for p, c in enumerate(text) if c.isdigit()]
            j = places[min(int(at * len(places)), len(places) - 1)] if places else 0
            text = text[:j] + str(length % 10) + text[j + 1 :]
        elif kind == "insert":
            text = text[:i] + token + text[i:]
        elif kind == "replace":
            text = text[:i] + token + text[i + length :]
        elif kind == "delete":
            text = text[:i] + text[i + length :]
        elif kind == "twice":
            text = text[: i + length] + text[i:]
        else:
            lines = text.splitlines(keepends=True) or [""]
            j = min(int(at * len(lines)), len(lines) - 1)
            if kind == "drop line":
                del lines[j]
            else:
                k = (j + length) % len(lines)
                lines[j], lines[k] = lines[k], lines[j]
            text = "".join(lines)
    return text


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], tuple[int, str, str, Path]]:
    """`meshwright check` of a text; the command is built once, which is what takes long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkrun, "evaluate", stub)
    monkeypatch.setattr(cli, "app", typer.main.get_command(cli.app))
    outputs = ["r.json", "r.xml", "r.sarif", "r.md", "r.txt"]
    paths = [tmp_path / n for n in outputs]

    def call(name: str, text: str) -> tuple[int, str, str, Path]:
        for p in paths:
            p.unlink(missing_ok=True)
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        monkeypatch.setattr(sys, "argv", ["meshwright", "check", "--config", name, *(x for o in outputs for x in ("-o", o))])
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as e:
                code = int(e.code or 0)
        assert {p.name for p in tmp_path.iterdir()} <= {"meshwright.yaml", "pyproject.toml", *outputs}, "a temporary file is left"
        return code, out.getvalue(), err.getvalue(), tmp_path

    return call


def judge(result: tuple[int, str, str, Path], written: Callable[[], Any]) -> None:
    """The promise of this file. `written()` reads the mutated text without meshwright."""
    code, out, err, folder = result
    assert code in (0, 1, 2)
    assert "Traceback" not in err + out
    said = [line for line in err.splitlines() if line.startswith("meshwright: ")]
    files = {p.name: p for p in folder.iterdir() if p.name.startswith("r.")}
    if not out:  # refused as a whole
        assert code == 2
        assert len(said) == 1
        assert err.rstrip("\n").splitlines()[-1] == said[0]
        assert len(said[0]) < 700
        assert not files
        return
    assert len(files) == 5
    report = json.loads(files["r.json"].read_text())
    assert report["schema"] == SCHEMA
    assert files["r.txt"].read_text() == out
    assert max(map(len, out.splitlines())) <= 100
    assert files["r.md"].read_text().endswith("<!-- meshwright-check -->\n")
    ET.parse(files["r.xml"])
    json.loads(files["r.sarif"].read_text())
    # the right answer: every check that is written, with its own figures
    rows = written()
    assert [r["name"] for r in report["results"]] == [row["name"] for row in rows]
    worst = 0
    for r, row in zip(report["results"], rows, strict=True):
        counts = not row.get("informational", False)
        if r["status"] == "error":
            worst = max(worst, 2 * counts)
            continue
        figures = r["figures"]
        assert figures["inputs"]["seq"] == row.get("seq", 1)
        assert figures["peak"]["p95"] == row.get("seq", 1) * GIB
        assert r["status"] == ("fits" if figures["peak"]["p95"] <= figures["limit_bytes"] else "does_not_fit")
        limit = row.get("limit", "95%").strip()
        if limit.endswith("%"):
            assert figures["limit_bytes"] == pytest.approx(float(limit[:-1]) / 100 * figures["capacity_bytes"])
        worst = max(worst, counts * (r["status"] != "fits"))
    assert code == worst
    assert len(said) == (worst == 2)


fuzz = settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)


def test_the_texts_themselves_are_answered(run: Any) -> None:
    """Unmutated, both formats have the same answer: two fit, one does not."""
    found = []
    for name, text in (("pyproject.toml", TOML), ("meshwright.yaml", YAML)):
        found.append(run(name, text))
        judge(found[-1], lambda: DATA["check"])
    lines = [[line for line in f[1].splitlines() if "where" not in line] for f in found]

    assert found[0][0] == found[1][0] == 1
    assert lines[0] == lines[1]


@fuzz
@given(todo=edits)
def test_mutated_toml(run: Any, todo: list[tuple[str, float, int, str]]) -> None:
    """1,000 mutations of a pyproject.toml."""
    text = mutate(TOML, todo)
    judge(run("pyproject.toml", text), lambda: tomllib.loads(text.replace("\r\n", "\n"))["tool"]["meshwright"]["check"])


@fuzz
@given(todo=edits)
def test_mutated_yaml(run: Any, todo: list[tuple[str, float, int, str]]) -> None:
    """1,000 mutations of a meshwright.yaml."""
    text = mutate(YAML, todo)
    judge(run("meshwright.yaml", text), lambda: yaml.safe_load(text)["check"])
