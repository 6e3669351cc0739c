"""meshwright: finds the parallel layout of a PyTorch model that is provably best under its cost model, and the code that runs it."""

from __future__ import annotations

import importlib
from typing import Any

from meshwright.version import __version__

# loaded on first use: `import meshwright` stays quick, and profiling works where the planner's libraries are missing
_HOMES = {
    "plan": "meshwright.planner.solve",
    "check": "meshwright.planner.checkrun:run_checks",
    "Infeasible": "meshwright.planner.solve",
    "Plan": "meshwright.planner.plan",
    "Workload": "meshwright.planner.plan",
    "Cluster": "meshwright.profiling.cluster",
    "InputError": "meshwright.profiling.errors",
    "trace": "meshwright.profiling.trace",
    "apply": "meshwright.codegen.apply",
    "emit": "meshwright.codegen.emit",
    "parallelize": "meshwright.decorator",
    "DoesNotFit": "meshwright.decorator",
}

__all__ = [
    "Cluster", "DoesNotFit", "Infeasible", "InputError", "Plan", "Workload", "__version__", "apply", "check", "emit", "parallelize", "plan",
    "trace",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'meshwright' has no attribute {name!r}")
    home, _, other = _HOMES[name].partition(":")
    return getattr(importlib.import_module(home), other or name)
