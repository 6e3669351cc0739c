"""What each stage may import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import meshwright

PACKAGE = Path(meshwright.__file__).parent
ORDER = ["profiling", "costmodel", "planner", "codegen", "report"]
BARE = """
import sys
for name in ("networkx", "pulp", "highspy", "typer", "rich", "jinja2", "transformers", "ortools"):
    sys.modules[name] = None
import meshwright.profiling.trace, meshwright.profiling.cluster
"""


def test_profiling_needs_torch_numpy_yaml_and_pydantic_alone() -> None:
    """The first stage imports where the planner's libraries are missing."""
    made = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True)

    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("stage", ORDER)
def test_imports_run_one_way(stage: str) -> None:
    """No stage imports a later one; code generation reads the plan and the states, not the search."""
    later = [f"meshwright.{s}" for s in ORDER[ORDER.index(stage) + 1 :]] + ["meshwright.cli"]
    if stage == "codegen":
        later += [f"meshwright.planner.{m}" for m in ("search", "space", "sharding", "stages", "solve", "explain")]
    for path in (PACKAGE / stage).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.startswith(tuple(later)), f"{path} imports {node.module}"
