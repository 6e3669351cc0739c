"""The fitted constants as a small file with their ranges: what was fitted, on how many runs, and how far it was off elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from meshwright.profiling.errors import InputError

FILE = Path(__file__).with_name("constants.yaml")


@dataclass(frozen=True)
class Fitted:
    """`theta` in the order of training.NAMES. `spread` by kind of model: published over predicted step time, at 5 % and 95 %."""

    theta: np.ndarray
    spread: Mapping[str, tuple[float, float]]


@lru_cache
def value(name: str) -> float:
    """One shipped constant by name, for parts of the cost model that are not fitted themselves."""
    return float(yaml.safe_load(FILE.read_text())["constants"][name]["value"])


@lru_cache
def load(path: Path = FILE) -> Fitted:
    """The shipped constants, or those of another file. InputError names what is missing."""
    from meshwright.costmodel.training import NAMES

    try:
        data: Any = yaml.safe_load(path.read_text())
        theta = np.array([float(data["constants"][name]["value"]) for name in NAMES])
        spread = {kind: (float(low), float(high)) for kind, (low, high) in data["spread"].items()}
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path} does not hold the step model's constants: {e}") from None
    return Fitted(theta, spread)


def text(theta: np.ndarray, folds: Mapping[str, np.ndarray], spread: Mapping[str, tuple[float, float]], provenance: Mapping[str, Any]) -> str:
    """The file's content. `folds` are the constants fitted without each source; only their range is kept."""
    from meshwright.costmodel.training import CONSTANTS, NAMES

    ranges = np.array(list(folds.values()))
    lines = ["# Constants of the step model (costmodel/training.py), fitted to published training runs. No constant names a source or a model.",
             "# `folds` is the range when one source after another is left out. `spread` is published over predicted step time of the sources",
             "# left out, at 5 % and 95 %."]  # fmt: skip
    lines += [f"{key}: {value}" for key, value in provenance.items()]
    lines.append("constants:")
    for i, name in enumerate(NAMES):
        low, high = ranges[:, i].min(), ranges[:, i].max()
        lines.append(
            f"  {name}: {{value: {theta[i]:.4g}, folds: [{low:.3g}, {high:.3g}], prior: {CONSTANTS[name].start:g}}}  # {CONSTANTS[name].meaning}"
        )
    lines.append("spread:")
    lines += [f"  {kind}: [{low:.3f}, {high:.3f}]" for kind, (low, high) in spread.items()]
    return "\n".join(lines) + "\n"
