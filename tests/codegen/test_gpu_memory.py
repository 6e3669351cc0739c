"""benchmarks/gpu_memory.py as far as no GPU is needed: the shipped predictions, and the path that measures them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from meshwright.planner.plan import Plan

ROOT = Path(__file__).parents[2]
SCRIPT, PREDICTIONS = ROOT / "benchmarks/gpu_memory.py", ROOT / "benchmarks/results/gpu-memory-predictions.json"
ABSENT = ("pulp", "networkx", "ortools", "highspy", "scipy", "lightgbm", "typer", "rich", "jinja2")


def measure(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`measure` of the shipped predictions where the planner's and the command line's packages are not installed."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({ABSENT}))\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, str(SCRIPT), "measure", str(PREDICTIONS), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_predictions() -> None:
    """Each entry is a sound plan for one GPU with all three figures in order, of its own name, and the file says that it is unmeasured."""
    data = json.loads(PREDICTIONS.read_text())
    assert "nothing of this was measured" in data["note"]
    assert len({e["name"] for e in data["entries"]}) == len(data["entries"]) == 20
    for entry in data["entries"]:
        plan = Plan.from_json(json.dumps(entry["plan"]))
        ranges = plan.prediction.memory_bytes.by_metric
        assert plan.layout.devices == 1
        assert ranges["allocated"].p50 < ranges["reserved"].p50 < ranges["device"].p50
        assert all(r.p50 < r.p95 for r in ranges.values())


def test_smoke(tmp_path: Path) -> None:
    """`measure --device cpu` trains a tiny model in a process of its own, with no package of the planner, and measures no memory."""
    done = measure(tmp_path, "--device", "cpu", "-o", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(row["losses"]) == 3
    assert row["losses"][2] < row["losses"][0]
    assert row["measured"] == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_gpu(tmp_path: Path) -> None:
    """Without a GPU it says so in one sentence and exits with 2."""
    done = measure(tmp_path, "-o", str(tmp_path / "out.json"))
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out.json").exists()
