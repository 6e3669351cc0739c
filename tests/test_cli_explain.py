"""The verbs explain and plan's objectives and sweeps on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from meshwright import cli

ROOT = Path(__file__).parent.parent
MODEL = str(ROOT / "examples/models/tiny-llama.json")
SMALL = ["plan", MODEL, "--global-batch", "16", "--seq", "32", "--costs", "datasheet"]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["meshwright", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def refused(result: tuple[int, str, str], *parts: str) -> None:
    code, out, err = result
    last = err.strip().splitlines()[-1]
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert last.startswith("meshwright: ")
    for part in parts:
        assert part in last


def test_explain(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A saved plan is explained; a question has its price; JSON follows; -v has the constraints and the programmes."""
    path = str(tmp_path / "plan.json")
    assert run(*SMALL, "--cluster", "8xH100-SXM", "--fix", "tp=2", "-o", path)[0] == 0
    code, out, err = run("explain", path, "--costs", "datasheet", "-v")
    assert code == 0
    assert out.startswith("Why  tp=2")
    for part in ("Proof", "Why not", "Step", "Memory of the fullest rank", "Constraints", "Notes"):
        assert f"\n{part}" in out
    assert max(map(len, out.splitlines())) <= 100
    assert "Op sharding, an integer programme a block" in out
    assert "tensor-parallel ranks" in out
    assert "tracing" in err
    code, out, _ = run("explain", path, "--costs", "datasheet", "--why-not", "tp=1", "--why-not", "tp=3,zero=1", "--json")
    answers = json.loads(out)["answers"]
    assert code == 0
    assert [(a["fix"], a["verdict"]) for a in answers] == [("tp=1", "costs"), ("tp=3 zero=1", "impossible")]


def test_explain_prints_a_refusal(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """What plan -o writes where nothing fits is printed again; a question of it is refused."""
    path = str(tmp_path / "none.json")
    assert run(*SMALL, "--cluster", "2xH100-SXM", "--limit", "1MB", "--fix", "tp=1,pp=1", "-o", path)[0] == 1
    code, out, _ = run("explain", path)
    assert code == 0
    assert out.startswith("No plan  ")
    refused(run("explain", path, "--why-not", "tp=2"), "nothing fits")


def test_explain_refuses(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    refused(run("explain", str(tmp_path / "none.json")), "does not exist")
    refused(run("explain", "x", "--why-not", "size=3"), "--why-not 'size=3'")
    refused(run("explain", "x", "--why-not", ""), "names no choice")


def test_sweep(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A table of sizes with the smallest that is in time; saved as JSON as well; exit code 1 where none is in time."""
    path = tmp_path / "frontier.json"
    asked = [*SMALL, "--cluster", "4xH100-SXM", "--sweep", "gpus=1..4"]
    code, out, err = run(*asked, "--tokens", "1B", "--deadline", "9d", "--price", "2", "-o", str(path))
    data = json.loads(path.read_text())
    assert code == 0
    assert out.startswith(f"Sweep  {data['smallest']} devices are the fewest swept that do 1B tokens in 9 d")
    assert max(map(len, out.splitlines())) <= 100
    assert "sweeping" in err
    assert [p["devices"] for p in data["points"]] == [1, 2, 4]
    assert all(p["cost"] == pytest.approx(2 * p["device_hours"]) for p in data["points"])
    code, out, _ = run(*asked, "--tokens", "1T", "--deadline", "1s", "--json")
    assert code == 1
    assert json.loads(out)["smallest"] is None
    code, out, _ = run(*SMALL, "--cluster", "4xH100-SXM", "--sweep", "gpus=3,4")
    assert code == 0
    assert out.startswith("Sweep  ")


@pytest.mark.parametrize("objective", ["gpus", "cost", "memory"])
def test_objectives(run, objective: str) -> None:  # type: ignore[no-untyped-def]
    """Each objective gives a plan that says what it is the best of, and verifies."""
    from meshwright.planner.plan import Plan

    code, out, _ = run(*SMALL, "--cluster", "2xH100-SXM", "--objective", objective, "--json")
    plan = Plan.from_json(out)
    assert code == 0
    assert plan.objective == objective
    assert any(note.startswith(f"objective {objective}: ") for note in plan.notes)


def test_tokens_and_deadlines(run) -> None:  # type: ignore[no-untyped-def]
    """A plan with --tokens says how long they take; one that is too late for every size exits with 1 and says by how much."""
    code, out, _ = run(*SMALL, "--cluster", "2xH100-SXM", "--tokens", "1B", "--price", "3")
    assert code == 0
    assert "1B tokens take" in out
    assert "device-hours, which cost" in " ".join(out.split())
    code, out, _ = run(*SMALL, "--cluster", "2xH100-SXM", "--tokens", "15T", "--deadline", "1h", "--objective", "gpus")
    assert code == 1
    assert out.startswith("No plan  ")
    assert "1 h" in out or "60 m" in out


def test_bad_input(run) -> None:  # type: ignore[no-untyped-def]
    asked = [*SMALL, "--cluster", "2xH100-SXM"]
    refused(run(*asked, "--objective", "fame"), "'fame'", "throughput, gpus, cost, memory")
    refused(run(*asked, "--sweep", "gpus=8..4"), "--sweep")
    refused(run(*asked, "--deadline", "14d"), "--tokens")
    refused(run(*asked, "--deadline", "14", "--tokens", "1T"), "--deadline '14'")
    refused(run(*asked, "--tokens", "lots"), "--tokens 'lots'")
    refused(run(*asked, "--price", "0", "--tokens", "1T"), "--price")
    refused(run(*asked, "--max-seconds", "-1"), "--max-seconds")
