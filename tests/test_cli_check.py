"""`meshwright check`, `diff` and `comment`: outputs, refusals, exit codes, and that no file is ever half-written."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from tests_support import GIB, stub

from meshwright import cli
from meshwright.planner import checkrun
from meshwright.planner.check import CheckReport
from meshwright.report.check_comment import PAGE, over_https, post
from meshwright.report.check_markdown import hidden_tag

TABLE = '[[tool.meshwright.check]]\nname = "{name}"\nmodel = "m.py:build"\ncluster = "8xH100-SXM"\nseq = {seq}\n{more}\n'


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """The command line in a folder of its own; a check needs as many GiB (p95) as its seq says, and seq 13 breaks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_WORKSPACE", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.setattr(checkrun, "evaluate", stub)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["meshwright", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def config(tmp_path: Path, *checks: tuple[str, int, str]) -> None:
    text = "\n".join(TABLE.format(name=n, seq=s, more=m) for n, s, m in checks)
    (tmp_path / "pyproject.toml").write_text(text)


def refused(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result

    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("meshwright: ")
    for word in words:
        assert word in err.strip().splitlines()[-1]


def test_exit_codes(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """0 fits, 1 does not, 2 could not be evaluated; informational checks do not count; --exit-zero leaves errors."""
    config(tmp_path, ("a", 40, ""), ("b", 90, ""), ("c", 13, ""), ("d", 90, "informational = true"), ("e", 13, "informational = true"))

    assert run("check", "--name", "a")[0] == 0
    assert run("check", "--name", "a", "--name", "b")[0] == 1
    code, out, err = run("check")
    assert code == 2
    assert out.startswith("Check  1 of 5 checks does not fit, 1 could not be evaluated, 2 informational fail\n")
    assert err.strip().splitlines()[-1] == "meshwright: check 'c' could not be evaluated: 13 is unlucky"
    assert run("check", "--name", "d", "--name", "e")[0] == 0
    assert run("check", "--name", "b", "--exit-zero")[0] == 0
    assert run("check", "--name", "c", "--exit-zero")[0] == 2


def test_outputs_by_suffix_and_by_name(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Every --output is written in its format, beside what stdout gets."""
    config(tmp_path, ("a", 40, ""), ("b", 90, ""))
    names = ["r.json", "r.xml", "r.sarif", "r.md", "r.txt", "github:r.log", "junit:odd"]
    code, out, _ = run("check", "--format", "json", *(x for n in names for x in ("-o", n)))

    assert code == 1
    assert json.loads(out)["schema"] == "meshwright.check/1"
    assert (tmp_path / "r.json").read_text() == out
    assert json.loads((tmp_path / "r.sarif").read_text())["version"] == "2.1.0"
    assert ET.parse(tmp_path / "r.xml").getroot().tag == ET.parse(tmp_path / "odd").getroot().tag == "testsuites"
    assert (tmp_path / "r.md").read_text().startswith("#### GPU memory: 1 of 2 checks does not fit")
    assert (tmp_path / "r.txt").read_text().startswith("Check  1 of 2")
    assert (tmp_path / "r.log").read_text().startswith("::error file=pyproject.toml,line=8,")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["pyproject.toml", "r.log", "odd", *names[:5]])


def test_github_format_fills_the_step_summary(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """With --format github, the markdown is added to the page of the run."""
    config(tmp_path, ("b", 90, ""))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    code, out, _ = run("check", "--format", "github")

    assert code == 1
    assert out.splitlines()[-1] == "meshwright check: 1 check: 0 fit, 1 does not fit, 0 errors, 0 warnings"
    assert (tmp_path / "summary").read_text().startswith("#### GPU memory: ")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--format", "yaml"], "--format 'yaml'"),
        (["-o", "no/such/r.json"], "does not exist"),
        (["-o", "r.csv"], "no format goes with this suffix"),
        (["-o", "."], "no format"),
        (["-o", "text:."], "a folder"),
        (["-o", "r.json", "--save", "r.json"], "named twice"),
        (["--name", "zzz"], "no check 'zzz'"),
        (["--config", "gone.toml"], "no such file"),
        (["--compare-to", "gone.json"], "gone.json does not exist"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_use_is_one_sentence(run, tmp_path: Path, arguments: list[str], word: str) -> None:  # type: ignore[no-untyped-def]
    """Exit code 2, nothing on stdout, nothing written."""
    config(tmp_path, ("a", 40, ""))
    refused(run("check", *arguments), word)
    assert [p.name for p in tmp_path.iterdir()] == ["pyproject.toml"]


def test_a_broken_configuration_writes_nothing(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """No output exists after a refusal, and one that was there is as it was."""
    config(tmp_path, ("a", 40, "speed = 3"))
    (tmp_path / "old.json").write_text("old")
    refused(run("check", "-o", "old.json", "-o", "new.md", "--save", "base.json"), "pyproject.toml:1", "'a'", "speed")

    assert (tmp_path / "old.json").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old.json", "pyproject.toml"]


def test_save_compare_and_diff(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """check --save on the base, then check --compare-to and diff --compare-to: growth, what changed, the amount."""
    config(tmp_path, ("a", 40, 'max_increase = "2%"'), ("b", 50, ""), ("old", 20, ""))
    assert run("check", "--save", "base.json")[0] == 0
    config(tmp_path, ("a", 42, 'max_increase = "2%"'), ("b", 50, ""), ("new", 30, ""))
    code, out, _ = run("check", "--compare-to", "base.json", "--save", "head.json")
    assert code == 1
    assert "x  a  42.0 GiB (p95) fits, but it may grow by 0.8 GiB at most (+2.0 GiB, +5.0% against the base)" in " ".join(out.split("\n     "))
    assert "seq 40 -> 42" in out
    assert "-  old  in the base, but no longer configured" in out
    code, out, _ = run("diff", "--compare-to", "base.json")
    again = run("diff", "--compare-to", "base.json", "--path", "head.json")

    assert code == 0
    assert out.splitlines()[-1] == "Amount: +12.0 GiB (110.0 GiB -> 122.0 GiB)"
    assert again[:2] == (code, out)
    for line in ("~ a", "+ new", "- old", "1 check did not change"):
        assert line in out.splitlines()
    data = json.loads(run("diff", "--compare-to", "base.json", "--format", "json")[1])
    assert data["diff_total_bytes"] == pytest.approx(12 * GIB)
    assert run("diff", "--compare-to", "base.json", "--format", "markdown", "-o", "d.md")[1] == ""
    assert (tmp_path / "d.md").read_text().startswith("#### GPU memory: +12.0 GiB")


def test_diff_of_a_name_that_is_not_there(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A mistyped --name is refused, not an empty difference."""
    config(tmp_path, ("a", 40, ""))
    run("check", "--save", "base.json")
    refused(run("diff", "--compare-to", "base.json", "--path", "base.json", "--name", "zzz"), "'zzz'", "'a'")


def test_a_base_with_no_number_in_it(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """NaN compares with nothing, so it would let any growth pass."""
    config(tmp_path, ("a", 40, 'max_increase = "2%"'))
    run("check", "--save", "base.json")
    data = json.loads((tmp_path / "base.json").read_text())
    data["results"][0]["figures"]["peak"]["p95"] = float("nan")
    (tmp_path / "base.json").write_text(json.dumps(data))
    refused(run("check", "--compare-to", "base.json"), "base.json is not JSON")


def test_what_a_model_prints_is_not_in_the_report(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """It goes to stderr; stdout is one JSON document."""

    def talks(*arguments: Any) -> Any:
        print("loading weights")
        return stub(*arguments)

    monkeypatch.setattr(checkrun, "evaluate", talks)
    config(tmp_path, ("a", 40, ""))
    code, out, err = run("check", "--format", "json")

    assert code == 0
    assert json.loads(out)["summary"]["checks"] == 1
    assert "loading weights" in err


@pytest.mark.parametrize("api", ["http://[::1", "http://127.0.0.1:port", "http://a b"])
def test_an_address_that_is_none(api: str) -> None:
    """One sentence, and the token is not in it."""
    with pytest.raises(ValueError, match="cannot be asked at that address") as refusal:
        over_https("GET", f"{api}/repos", {"Authorization": "Bearer secret"}, None)
    assert "secret" not in str(refusal.value)


def test_diff_of_a_broken_check(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """It is told, is in no sum, and the exit code is 2."""
    config(tmp_path, ("a", 40, ""))
    run("check", "--save", "base.json")
    config(tmp_path, ("a", 13, ""))
    code, out, err = run("diff", "--compare-to", "base.json")

    assert code == 2
    assert "! a" in out.splitlines()
    assert out.splitlines()[-1] == "Amount: +0.0 MiB (0.0 MiB -> 0.0 MiB)"
    assert "unlucky" in err


def test_help_documents_the_exit_codes(run) -> None:  # type: ignore[no-untyped-def]
    """--help says what 0, 1 and 2 mean."""
    code, out, _ = run("check", "--help")
    text = " ".join(out.split())

    assert code == 0
    for part in ("Exit code 0: all fit", "1: one does not fit", "2: wrong use", "Informational checks never fail"):
        assert part in text


# --- comment -----------------------------------------------------------------------------------------------------------


class GitHub:
    """The comments of a pull request, as GitHub's REST interface serves them."""

    def __init__(self, *bodies: str) -> None:
        self.comments: list[dict[str, Any]] = [{"id": i + 1, "body": b} for i, b in enumerate(bodies)]
        self.calls: list[str] = []
        self.refuse = 0

    def __call__(self, method: str, url: str, headers: dict[str, str], body: bytes | None) -> tuple[int, str]:
        assert headers["Authorization"] == "Bearer secret"
        path = url.removeprefix("https://api.example/repos/o/r/")
        self.calls.append(f"{method} {path}")
        if self.refuse:
            return self.refuse, "{}"
        if method == "GET":
            page = int(path.partition("&page=")[2])
            return 200, json.dumps(self.comments[(page - 1) * PAGE : page * PAGE])
        text = json.loads(body or b"")["body"]
        if method == "PATCH":
            comment = next(c for c in self.comments if c["id"] == int(path.rpartition("/")[2]))
            comment["body"] = text
            return 200, json.dumps(comment)
        self.comments.append({"id": len(self.comments) + 1, "body": text})
        return 201, json.dumps(self.comments[-1])


def posted(github: GitHub, report: CheckReport, **keys: Any) -> str:
    return post(report, **({"repo": "o/r", "number": 7, "api": "https://api.example", "token": "secret", "http": github} | keys))


@pytest.fixture
def report(run, tmp_path: Path) -> CheckReport:  # type: ignore[no-untyped-def]
    config(tmp_path, ("a", 90, ""))
    run("check", "--save", "r.json")
    return CheckReport.load(tmp_path / "r.json")


def test_comment_is_posted_then_updated(report: CheckReport) -> None:
    """The first time it is posted; after that the same comment changes, found on whichever page it is."""
    github = GitHub(*["hello"] * 150)
    assert posted(github, report) == "Posted comment 151 under pull request 7"
    github.comments += [{"id": 999, "body": f"> {hidden_tag()} quoted"}]
    assert posted(github, report) == "Updated comment 151 of pull request 7"

    assert len(github.comments) == 152
    assert github.calls[-1] == "PATCH issues/comments/151"
    assert github.comments[150]["body"].rstrip().endswith(hidden_tag())


def test_comment_new_and_tags(report: CheckReport) -> None:
    """new adds another; comments of another tag are left alone."""
    github = GitHub()
    posted(github, report)
    posted(github, report, behavior="new")
    posted(github, report, tag="other")

    assert len(github.comments) == 3
    posted(github, report, tag="other")
    assert github.calls[-1] == "PATCH issues/comments/3"


def test_comment_is_skipped_where_there_is_nothing_to_tell(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Nothing changed and no earlier comment: nothing is posted. With an earlier one, it is updated."""
    config(tmp_path, ("a", 40, ""))
    run("check", "--save", "base.json")
    run("check", "--compare-to", "base.json", "--save", "head.json")
    quiet = CheckReport.load(tmp_path / "head.json")
    github = GitHub("hello")
    assert "nothing was posted" in posted(github, quiet)
    assert github.calls == ["GET issues/7/comments?per_page=100&page=1"]
    github.comments.append({"id": 5, "body": f"x\n{hidden_tag()}\n"})

    assert posted(github, quiet) == "Updated comment 5 of pull request 7"


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"repo": "o"}, "owner/name"), ({"number": 0}, "pull request"), ({"api": ""}, "GITHUB_API_URL"), ({"token": ""}, "GITHUB_TOKEN"),
        ({"token": "a\nb"}, "GITHUB_TOKEN"),
    ],
)
def test_comment_needs_to_know_where(report: CheckReport, keys: dict[str, Any], word: str) -> None:
    """What is missing is named, and no request is made."""
    github = GitHub()
    with pytest.raises(ValueError, match=word):
        posted(github, report, **keys)
    assert github.calls == []


def test_comment_that_github_refuses(report: CheckReport) -> None:
    """A refusal is one sentence with the status; of a permission, which."""
    github = GitHub()
    github.refuse = 403
    with pytest.raises(ValueError, match=r"GitHub answered 403 to GET .*: the token needs the permission pull-requests: write"):
        posted(github, report)


def test_comment_dry_run(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """--dry-run prints what would be posted, and needs no token."""
    config(tmp_path, ("a", 90, ""))
    run("check", "--save", "r.json")
    code, out, _ = run("comment", "--path", "r.json", "--dry-run", "--tag", "t")

    assert code == 0
    assert out.startswith("#### GPU memory: 1 of 1 check does not fit\na: 90.0 GiB (p95)")
    assert out.endswith("<!-- meshwright-check:t -->\n")
    refused(run("comment", "--path", "gone.json"), "does not exist")
    refused(run("comment", "--path", "r.json", "--behavior", "delete"), "--behavior")
