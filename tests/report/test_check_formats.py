"""How a check report is shown: goldens of every format, schemas, escaping. MESHWRIGHT_GOLDENS=write writes the goldens again."""

from __future__ import annotations

import json
import os
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import jsonschema
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made_report import VERSIONS, base_report, figures, report, result
from schemas import SARIF, junit_mistakes

from meshwright.cli_check import FORMATS, render
from meshwright.planner.check import CheckReport, Finding
from meshwright.report import check_markdown
from meshwright.report.check_diff import render_diff
from meshwright.report.check_github import append_summary, command, render_github
from meshwright.report.check_text import render_text

GOLDENS = Path(__file__).parent / "goldens"
NAMES = {"text": "check.txt", "json": "check.json", "github": "check.github", "junit": "check.xml", "sarif": "check.sarif", "markdown": "check.md"}
DIFFS = {"text": "diff.txt", "json": "diff.json", "markdown": "diff.md"}


def golden(name: str, text: str) -> None:
    path = GOLDENS / name
    if os.environ.get("MESHWRIGHT_GOLDENS") == "write":
        path.write_text(text)
    assert text == path.read_text(), f"{name} differs; MESHWRIGHT_GOLDENS=write writes it again"


def strange(text: str) -> CheckReport:
    """A report whose every text is `text`."""
    made = [
        result(text, "does_not_fit", 1, figures=figures(90.0, activations=80.0), warnings=(Finding(rule="MEM003", text=text),), notes=(text,)),
        result(f"{text}2", "error", 2, error=text),
        result(f"{text}3", "error", 3, error=text, informational=True),
    ]
    return CheckReport.of(made, "a folder,b:c/100%.toml", versions=VERSIONS)


ODD = ["a\nb", "a\r\n::error::x", "100%, a:b", "]]></failure><x>", "\x00\x1b[31m", "| a | `b` <!-- c --> @team", "ü \U0001f600 \u2028", "a" * 5000]


@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_has_a_golden(format_: str) -> None:
    """The output of a report with every status, byte for byte."""
    golden(NAMES[format_], render(report(), format_))


@pytest.mark.parametrize("format_", DIFFS)
def test_every_diff_format_has_a_golden(format_: str) -> None:
    """The difference of two reports, byte for byte."""
    golden(DIFFS[format_], render_diff(base_report(), report(), format_))


def test_text_is_narrow_and_its_first_line_is_the_answer() -> None:
    """No line is wider than 100 columns, whatever the names; the first says how many do not fit, the last counts."""
    for made in (report(), *(strange(t) for t in ODD)):
        lines = render_text(made).splitlines()
        assert max(map(len, lines)) <= 100
        assert re.match(r"Check  \d of \d checks (no longer fits|does not fit), ", lines[0])
        assert re.match(r"\d+ checks?: ", lines[-1])


def test_a_failure_says_all_that_helps() -> None:
    """By how much, where the peak is, what changed, the nearest settings with their price, and where it is configured."""
    text = " ".join(render_text(report()).split())
    for part in (
        "84.1 GiB (p95) > 76.0 GiB limit on 8xH100-SXM: 8.1 GiB too much", "+9.2 GiB, +12.3% against the base", "backward of the loss",
        "activations 45.9", "seq 8192 -> 10240", "activations +7.9 GiB", "micro_batch=1 66.9 GiB (p95), +0.4% step", "recompute=full",
        "pyproject.toml:14",
        "Coverage: 1236 ops: 1215 modelled, 18 free, 3 not modelled: mylib::foo x3", "grew too much", "it may grow by 0.8 GiB at most",
    ):  # fmt: skip
        assert part in text


def test_diff_ends_with_the_amount() -> None:
    """The key is explained, and the last line is the sum."""
    lines = render_diff(base_report(), report()).splitlines()

    assert lines[1] == "Key: ~ changed, + added, - removed"
    assert re.fullmatch(r"Amount: [+-][\d.]+ GiB \([\d.]+ GiB -> [\d.]+ GiB\)", lines[-1])
    assert max(map(len, lines)) <= 100


def test_github_escapes_data_and_properties() -> None:
    """%, line ends in the message; also : and , in properties. One command is one line, whatever is in it."""
    assert command("error", "50%\r\na:b,c", title="50%, a:b") == "::error title=50%25%2C a%3Ab::50%25%0D%0Aa:b,c"
    for made in (report(), *(strange(t) for t in ODD)):
        for line in render_github(made).split("\n"):
            if line.startswith("::"):
                found = re.fullmatch(r"::(error|warning|notice) file=([^,:]*)(?:,line=(\d+))?,title=([^,:]*)::(.*)", line, re.DOTALL)
                assert found, line
                for part in (found[2], found[4], found[5]):
                    assert "\r" not in part
                    assert re.fullmatch(r"(?:[^%]|%25|%0D|%0A|%3A|%2C)*", part, re.DOTALL)
            else:
                assert re.match(r"$|meshwright check: |and \d+ ", line), line


def test_github_keeps_to_the_annotations_that_are_shown() -> None:
    """Of more than ten errors, ten are commands and the rest are counted."""
    many = CheckReport.of([result(f"c{i}", "error", 1, error="x") for i in range(25)], "p.toml", versions=VERSIONS)
    lines = render_github(many).splitlines()

    assert sum(line.startswith("::error") for line in lines) == 10
    assert "and 15 errors more" in lines[10]


def test_github_step_summary(tmp_path: Path) -> None:
    """The markdown is added to what is there; near GitHub's limit it is left out."""
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    append_summary(report(), str(path))
    assert path.read_text().startswith("before\n#### GPU memory")
    path.write_text("x" * 999_990)
    append_summary(report(), str(path))

    assert path.stat().st_size == 999_990


def test_sarif_follows_its_schema() -> None:
    """Strictly: only what SARIF 2.1.0 knows, rule indexes that point at their rule, results of known rules, stable fingerprints."""
    for made in (report(), base_report(), *(strange(t) for t in ODD)):
        log = json.loads(render(made, "sarif"))
        jsonschema.validate(log, SARIF, format_checker=jsonschema.FormatChecker())
        run = log["runs"][0]
        rules = [r["id"] for r in run["tool"]["driver"]["rules"]]
        for r in run["results"]:
            assert rules[r["ruleIndex"]] == r["ruleId"]
        prints = [(r["ruleId"], r["partialFingerprints"]["meshwrightCheck/v1"]) for r in run["results"]]
        assert len(set(prints)) == len(prints)


def test_sarif_fingerprint_stays_when_the_check_moves() -> None:
    """An alert is the same alert when its line or its figures change."""
    made = [
        json.loads(render(CheckReport.of([result("a", "does_not_fit", line, figures=figures(p95, activations=70.0))], "p.toml"), "sarif"))
        for line, p95 in ((3, 80.0), (30, 99.0))
    ]
    first, second = (m["runs"][0]["results"][0]["partialFingerprints"] for m in made)

    assert first == second


def test_junit_follows_its_schema() -> None:
    """Elements, attributes and counts as the common JUnit schema has them; informational failures are skipped, not failed."""
    for made in (report(), base_report(), *(strange(t) for t in ODD)):
        root = ET.fromstring(render(made, "junit").encode())
        assert junit_mistakes(root) == []
    root = ET.fromstring(render(report(), "junit").encode())
    kinds = {c.attrib["name"]: [x.tag for x in c] for c in root.iter("testcase")}

    assert kinds == {
        "pretrain-8b": ["failure"], "sft-8b": ["failure"], "serve-8b": ["system-out"], "nightly, 50%: a|b": ["skipped", "system-out"],
        "broken": ["error"],
    }  # fmt: skip


def test_junit_schema_finds_mistakes() -> None:
    """The schema of this test is not empty: wrong counts, unknown attributes and children are found."""
    wrong = '<testsuites tests="2" failures="0" errors="0" time="0"><testsuite name="a" tests="1" failures="0" errors="0" skipped="0" time="0">' \
        '<testcase name="b" classname="c" time="x" color="red"><oops/></testcase></testsuite></testsuites>'  # fmt: skip
    found = " ".join(junit_mistakes(ET.fromstring(wrong)))
    for word in ("color", "oops", "time", "tests"):
        assert word in found


def test_markdown_stands_alone_in_two_lines() -> None:
    """The first two lines are the answer and the worst check; the last is the hidden tag."""
    lines = check_markdown.render_markdown(report(), "a b").splitlines()

    assert lines[0].startswith("#### GPU memory: ")
    assert lines[1].startswith("pretrain-8b: 84.1 GiB (p95) > 76.0 GiB limit")
    assert lines[-1] == "<!-- meshwright-check:a-b -->"


def test_markdown_lets_no_foreign_markup_through() -> None:
    """No mention, no HTML, no extra cell from a name or an error."""
    text = check_markdown.render_markdown(report())
    rows = [line for line in text.splitlines() if line.startswith("| nightly")]
    columns = re.sub(r"\\\|", "", rows[0]).count("|")

    assert columns == 7
    assert "@everyone" not in text
    assert "<b>" not in text
    for odd in ODD:
        shown = check_markdown.render_markdown(strange(odd))
        assert shown.count("<!--") == 1
        assert shown.count("<details>") == shown.count("</details>")


@pytest.mark.parametrize("count", [1, 40, 400, 3000])
def test_markdown_keeps_to_the_length_of_a_comment(count: int) -> None:
    """Too long a comment loses its middle, and keeps its answer, its footer, its tag, and whole sections."""
    made = [result(f"{'n' * 90} {i}", "error", 1, error="e" * 3000) for i in range(count)]
    text = check_markdown.render_markdown(CheckReport.of(made, "p.toml", versions=VERSIONS))

    assert len(text) <= 65_536
    assert text.startswith(f"#### GPU memory: {count} of {count} check")
    assert text.endswith("<!-- meshwright-check -->\n")
    if count > 1:
        assert f" {count - 1}** (pyproject.toml" in text
    if count >= 40:
        assert "left out here" in text


def test_json_round_trips(tmp_path: Path) -> None:
    """What is saved is read back as it was."""
    path = tmp_path / "base.json"
    report().save(path)

    assert CheckReport.load(path) == report()


def test_summary_and_exit_code() -> None:
    """An error is 2, a failure 1, and informational checks turn neither."""
    made: dict[str, Any] = {r.name: r for r in report().results}

    def code(*names: str) -> int:
        return CheckReport.of([made[n] for n in names], "p.toml").exit_code

    assert report().exit_code == 2
    assert code("serve-8b") == 0
    assert code("nightly, 50%: a|b") == 0
    assert code("sft-8b") == 1
    assert code("pretrain-8b", "serve-8b") == 1
    assert code("pretrain-8b", "broken") == 2
