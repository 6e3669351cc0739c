"""The GitHub Action's own script on a repository with a pull request that breaks, and the files that GitHub and pre-commit read."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples/ci-check"
SCRIPT = ROOT / "scripts/ci-check.sh"


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.com", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A clone as Actions makes it: main is the base, the checked-out branch has no commit of its own yet."""
    origin = tmp_path / "origin"
    (origin / "train").mkdir(parents=True)
    for name in ("model.py", "pyproject.toml"):
        shutil.copy(EXAMPLE / name, origin / "train")
    git(origin, "init", "--quiet", "--initial-branch", "main")
    git(origin, "add", ".")
    git(origin, "commit", "--quiet", "-m", "base")
    git(tmp_path, "clone", "--quiet", "--branch", "main", f"file://{origin}", "clone")
    git(tmp_path / "clone", "switch", "--quiet", "-c", "change")
    return tmp_path / "clone"


def run(repository: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script in the folder of the checks, with the environment of a job and no token."""
    keep = {k: v for k, v in os.environ.items() if k in ("HOME", "PATH", "TMPDIR", "PYTHONPATH")}
    told = {
        "PATH": f"{Path(sys.executable).parent}:{keep.pop('PATH')}", "GITHUB_WORKSPACE": str(repository),
        "MESHWRIGHT_OUT": str(repository.parent / "out"), "GITHUB_OUTPUT": str(repository.parent / "outputs"),
        "GITHUB_STEP_SUMMARY": str(repository.parent / "summary"),
    }  # fmt: skip
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], cwd=repository / "train", env=keep | told | variables, capture_output=True, text=True, timeout=300
    )


def test_a_pull_request_that_breaks(repository: Path) -> None:
    """The base is fetched and checked, the change against it: exit 1, an annotation at the check's line, the comment, every file."""
    git(repository, "apply", "--directory", "train", str(EXAMPLE / "longer-context.patch"))
    git(repository, "commit", "--quiet", "-am", "change")
    made = run(repository, GITHUB_BASE_REF="main")
    out = repository.parent / "out"
    comment = (out / "comment.md").read_text()
    report = json.loads((out / "report.json").read_text())

    assert made.returncode == 1, made.stderr
    assert made.stdout.startswith("::error file=train/pyproject.toml,line=5,title=MEM001 pretrain does not fit::")
    assert comment.startswith("#### GPU memory: 1 of 2 checks no longer fits\npretrain: ")
    assert "Why: seq 2048 -> 4096; parameters 372 M -> 559 M; activations +" in comment
    assert "micro_batch=" in comment
    assert [r["status"] for r in report["results"]] == ["does_not_fit", "fits"]
    assert report["base"] == "base.json"
    assert ET.parse(out / "junit.xml").getroot().attrib["failures"] == "1"
    assert json.loads((out / "report.sarif").read_text())["runs"][0]["results"][0]["ruleId"] == "MEM001"
    assert (repository.parent / "summary").read_text().startswith("#### GPU memory")
    assert (repository.parent / "outputs").read_text() == f"folder={out}\nexit-code=1\n"
    clean = subprocess.run(["git", "status", "--short"], cwd=repository, capture_output=True, text=True, check=True).stdout
    trees = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True).stdout
    assert [line for line in clean.splitlines() if "__pycache__" not in line] == []
    assert len(trees.splitlines()) == 1


def test_a_pull_request_that_breaks_the_model(repository: Path) -> None:
    """A model that cannot be built is exit code 2 and an annotation; what the base said is still compared with the rest."""
    (repository / "train/model.py").write_text("def build():\n    raise RuntimeError('no layers')\n")
    git(repository, "commit", "--quiet", "-am", "change")
    made = run(repository, MESHWRIGHT_BASE="main")

    assert made.returncode == 2
    assert made.stdout.count("::error file=train/pyproject.toml") == 2
    assert "no layers" in made.stdout
    assert "exit-code=2" in (repository.parent / "outputs").read_text()
    assert (repository.parent / "out/comment.md").exists()


@pytest.mark.parametrize("base", ["", "--upload-pack=x", "gone"])
def test_without_a_base(repository: Path, base: str) -> None:
    """No base, or one that is no commit: the checks run, and nothing is compared."""
    made = run(repository, MESHWRIGHT_BASE=base)

    assert made.returncode == 0, made.stderr
    assert ("::notice" in made.stdout) == bool(base)
    assert json.loads((repository.parent / "out/report.json").read_text())["base"] == ""


def test_a_base_without_checks(repository: Path) -> None:
    """The pull request that adds the checks has nothing to be compared with."""
    text = (repository / "train/pyproject.toml").read_text()
    git(repository, "switch", "--quiet", "--orphan", "empty")
    git(repository, "commit", "--quiet", "--allow-empty", "-m", "nothing")
    git(repository, "switch", "--quiet", "change")
    (repository / "train/pyproject.toml").write_text(text)
    made = run(repository, MESHWRIGHT_BASE="empty")

    assert made.returncode == 0, made.stderr
    assert "the base has no checks" in made.stdout


def test_the_comment_that_cannot_be_posted_does_not_fail(repository: Path) -> None:
    """A job without a token gets a notice."""
    run(repository)
    made = run(repository, "comment", PULL_REQUEST="7")

    assert made.returncode == 0
    assert "::notice title=meshwright check::the comment could not be posted" in made.stdout
    assert "meshwright: --repo '' must be owner/name" in made.stderr


def test_action_and_script_agree() -> None:
    """Every input is described and used; what the script reads is given; foreign text reaches the shell through variables only."""
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    text, script = (ROOT / "action.yml").read_text(), SCRIPT.read_text()
    steps = {s["name"]: s for s in action["runs"]["steps"]}

    assert action["runs"]["using"] == "composite"
    assert all(i.get("description") and "default" in i for i in action["inputs"].values())
    for name in action["inputs"]:
        assert f"inputs.{name}" in text
    for step in steps.values():
        assert "${{" not in step["run"]
        assert step["shell"] == "bash"
    read = set(re.findall(r"\b(MESHWRIGHT_\w+|PULL_REQUEST)\b", script))
    given = {k for s in steps.values() for k in s["env"]}
    assert read <= given
    assert "GITHUB_TOKEN" not in steps["check"]["env"]  # it runs the code of the pull request
    for output in action["outputs"].values():
        name = re.search(r"steps\.check\.outputs\.([\w-]+)", output["value"])
        assert name
        assert f"{name[1]}=" in script


def test_pre_commit_hook() -> None:
    """The hook runs a command that exists, before a push, whatever files changed that may hold a model or the checks."""
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())

    assert hook["id"] == "meshwright-check"
    assert hook["entry"] == "meshwright check"
    assert hook["pass_filenames"] is False
    assert hook["stages"] == ["pre-push"]
    for name in ("pyproject.toml", "a/pyproject.toml", "meshwright.yaml", "train/model.py", "my_models.py", "configs/config.json"):
        assert re.search(hook["files"], name), name
    assert not re.search(hook["files"], "README.md")
