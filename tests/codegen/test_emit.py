"""The emitted folder: short, independent of meshwright, lint-clean, whole or absent."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from meshwright.codegen.emit import emit
from meshwright.planner.plan import Plan
from meshwright.planner.solve import plan
from meshwright.planner.space import parse_fix
from meshwright.profiling.errors import InputError
from meshwright.profiling.trace import trace
from tests.made_plans import recomputing

ROOT = Path(__file__).parent.parent.parent
LLAMA = str(ROOT / "examples/models/tiny-llama.json")
FIXES = [
    "tp=1,dp=8,zero=3,recompute=full",
    "tp=2,pp=2,dp=2,zero=2,micro_batch=2",
    "tp=4,sp=on,pp=1,dp=2,zero=1",
    "pp=4,tp=1,dp=2,zero=0,micro_batch=2",
]


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    graph = trace(LLAMA, seq=32, precision="bf16")
    made = {fix: plan(graph, "8xH100-SXM", global_batch=16, seq=32, fix=parse_fix(fix)) for fix in FIXES}
    assert all(isinstance(p, Plan) for p in made.values())
    return made  # type: ignore[return-value]


@pytest.mark.parametrize("fix", FIXES)
def test_script_is_short_and_stands_alone(plans: dict[str, Plan], fix: str, tmp_path: Path) -> None:
    """train.py has fewer than 200 lines, nothing in the folder imports meshwright, and ruff finds no error in it."""
    files = emit(plans[fix], tmp_path / "run")
    text = (tmp_path / "run/train.py").read_text()
    sources = [f.read_text() for f in files if f.suffix == ".py"]
    lint = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E9,F", tmp_path], capture_output=True, text=True)

    assert len(text.splitlines()) < 200
    assert not any(re.search(r"^\s*(from|import) meshwright", s, re.M) for s in sources)
    assert lint.returncode == 0, lint.stdout


@pytest.mark.parametrize("fix", [f.replace(",recompute=full", "") for f in FIXES])
def test_recompute_by_stage_is_a_table(fix: str, tmp_path: Path) -> None:
    """RECOMPUTE has each stage's mode and how many of its first layers have it; without it there is one mode, and no table."""
    made = plan(LLAMA, "8xH100-SXM", global_batch=16, seq=32, fix=parse_fix(fix) | {"recompute": "none"})
    assert isinstance(made, Plan)
    layers = [sum(b - a for a, b in s.chunks or (s.layers,)) for s in made.solution.stages]
    stages = [{"recompute": ("full", "none", "selective")[i % 3]} | ({"recompute_layers": 1} if i == 0 else {}) for i in range(len(layers))]
    emit(made, tmp_path / "plain")
    emit(recomputing(made, stages), tmp_path / "run")
    text, plain = ((tmp_path / name / "train.py").read_text() for name in ("run", "plain"))
    (line,) = [line for line in text.splitlines() if line.startswith("RECOMPUTE = ")]
    lint = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E9,F", tmp_path], capture_output=True, text=True)

    assert ast.literal_eval(line.partition(" = ")[2].partition("  #")[0]) == [
        (s["recompute"], s.get("recompute_layers", n)) for s, n in zip(stages, layers, strict=True)
    ]
    assert "recompute(layer, mode if i < covered" in text
    assert "recompute(" not in plain
    assert len(text.splitlines()) < 200
    assert lint.returncode == 0, lint.stdout


LAYERS = """
import functools, sys, torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
folder, rank = sys.argv[1:]
sys.path.insert(0, folder)
dist.init_process_group("fake", rank=int(rank), world_size=2, store=FakeStore())
import train
stages = train.Trainer(torch.device("cpu"), 0).parts
calls = {n: m.forward for stage in stages for n, m in stage.named_modules() if n.rpartition(".")[0].endswith("layers") and list(m.parameters())}
kind = {n: "none" if not isinstance(f, functools.partial) else "selective" if "context_fn" in f.keywords else "full" for n, f in calls.items()}
print(*kind.values())
"""


@pytest.mark.parametrize("chunks", [{"schedule": "1f1b", "vpp": 1}, {"schedule": "interleaved", "vpp": 2}])
def test_scripts_recompute_the_layers_that_the_plan_says(chunks: dict[str, Any], tmp_path: Path) -> None:
    """On each rank of a pipeline the emitted script wraps the first layers of its stage, with that stage's mode, and no others."""
    fix = {"pp": 2, "tp": 1, "dp": 1, "recompute": "none"} | chunks
    made = plan(LLAMA, "2xcpu", global_batch=8, seq=32, fix=fix)
    assert isinstance(made, Plan)
    stages = [{"recompute": "full", "recompute_layers": 1}, {"recompute": "selective"}]
    emit(recomputing(made, stages), tmp_path / "run")
    found = [
        subprocess.run([sys.executable, "-c", LAYERS, str(tmp_path / "run"), str(rank)], capture_output=True, text=True, timeout=120)
        for rank in range(2)
    ]
    lengths = [sum(b - a for a, b in s.chunks or (s.layers,)) for s in made.solution.stages]

    assert [x.returncode for x in found] == [0, 0], found[0].stderr + found[1].stderr
    assert found[0].stdout.split() == ["full"] + ["none"] * (lengths[0] - 1)
    assert found[1].stdout.split() == ["selective"] * lengths[1]


def test_plan_is_in_the_folder(plans: dict[str, Plan], tmp_path: Path) -> None:
    """The folder holds the plan itself and the model's configuration."""
    emit(plans[FIXES[0]], tmp_path / "run")

    assert Plan.load(tmp_path / "run/plan.json") == plans[FIXES[0]]
    assert json.loads((tmp_path / "run/config.json").read_text())["model_type"] == "llama"


def test_other_folders_are_left_alone(plans: dict[str, Plan], tmp_path: Path) -> None:
    """A folder that emit did not write is refused and kept; one that it wrote is replaced."""
    kept = tmp_path / "mine"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not written by emit"):
        emit(plans[FIXES[0]], kept)
    emit(plans[FIXES[0]], tmp_path / "run")
    (tmp_path / "run/old.txt").write_text("old")
    emit(plans[FIXES[1]], tmp_path / "run")

    assert [p.name for p in kept.iterdir()] == ["notes.txt"]
    assert not (tmp_path / "run/old.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "run"]


def test_several_nodes_have_their_launcher(tmp_path: Path) -> None:
    """On two nodes, launch.sh asks for NODE_RANK and MASTER_ADDR and starts each node's ranks."""
    made = plan(LLAMA, "2x4xH100-SXM", global_batch=16, seq=32)
    assert isinstance(made, Plan)
    emit(made, tmp_path / "run")
    text = (tmp_path / "run/launch.sh").read_text()
    asked = subprocess.run(["bash", str(tmp_path / "run/launch.sh")], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})

    assert "--nnodes 2 --nproc-per-node 4" in text
    assert asked.returncode != 0
    assert "NODE_RANK" in asked.stderr


TIED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from runtime.weights import allocate
from torch import nn
with torch.device("meta"):
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
allocate(model, torch.device("cpu"))
assert model["a"].weight is model["b"].weight and model["a"].weight.device.type == "cpu"
"""


def test_tied_parameters_stay_one(plans: dict[str, Plan], tmp_path: Path) -> None:
    """Giving a model on meta its memory keeps tied parameters one tensor."""
    emit(plans[FIXES[0]], tmp_path / "run")
    made = subprocess.run([sys.executable, "-c", TIED, str(tmp_path / "run")], capture_output=True, text=True)

    assert made.returncode == 0, made.stderr
