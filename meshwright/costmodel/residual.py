"""Boosted forests over rounded features, stored as lightgbm's text with only what a prediction needs.

Features are rounded to 1/RESOLUTION, so that thresholds are short and equal in the file and in training; leaves are whole
multiples of UNIT, of a logarithm. lightgbm reads the shortened text as its own.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

RESOLUTION = 64.0
UNIT = 3e-4
_KEPT = ("num_leaves", "num_cat", "split_feature", "threshold", "decision_type", "left_child", "right_child", "leaf_value", "shrinkage")


def encode(columns: list[np.ndarray]) -> np.ndarray:
    """Feature columns as the matrix that forests are trained on and asked with. [n, features]"""
    rounded = np.empty((len(columns[0]), len(columns)))
    for j, c in enumerate(columns):
        np.multiply(c, RESOLUTION, out=rounded[:, j])
    return np.rint(rounded, out=rounded)


def train(x: np.ndarray, y: np.ndarray, *, trees: int, leaves: int, rate: float, smallest: int = 5, share: float = 1.0) -> Any:
    """A lightgbm Booster of y on x, with Huber's loss at 5 % (y is a logarithm of a ratio)."""
    import lightgbm

    params = {
        "objective": "huber", "alpha": 0.05, "num_leaves": leaves, "learning_rate": rate, "min_data_in_leaf": smallest,
        "feature_fraction": share, "max_bin": 1023,
        "seed": 0, "deterministic": True, "force_row_wise": True, "num_threads": 1, "verbose": -1,
    }  # fmt: skip
    return lightgbm.train(params, lightgbm.Dataset(x, y, free_raw_data=False), trees)


def to_text(booster: Any, trees: int | None = None) -> str:
    """The booster's text without statistics of its training, leaves and thresholds in few digits."""
    head, *parts = booster.model_to_string(num_iteration=trees or -1).split("\nTree=")
    last = parts[-1].partition("\nend of trees")[0]
    blocks = []
    for i, part in enumerate([*parts[:-1], last]):
        fields = dict(line.split("=", 1) for line in part.splitlines()[1:] if "=" in line)
        blocks.append(f"Tree={i}\n" + "".join(f"{k}={v}\n" for k, v in _shortened(fields).items()) + "\n\n")
    # sizes let lightgbm find the trees; without them it reads them one after another
    head = re.sub(r"feature_infos=.*", "feature_infos=" + " ".join(["none"] * booster.num_feature()), head)
    head = re.sub(r"tree_sizes=.*", "tree_sizes=" + " ".join(str(len(b)) for b in blocks), head)
    return head.rstrip("\n") + "\n\n" + "".join(blocks) + "end of trees\n"


def _shortened(fields: dict[str, str]) -> dict[str, str]:
    """One tree's fields with few digits, its nodes and leaves renumbered in the order of a walk, which compresses best."""
    values = [str(round(float(v) / UNIT)) for v in fields["leaf_value"].split()]
    out = {k: fields[k] for k in _KEPT if k in fields}
    if "left_child" not in fields:
        return {**out, "leaf_value": " ".join(values)}
    left, right = ([int(c) for c in fields[k].split()] for k in ("left_child", "right_child"))
    nodes: list[int] = []
    leaves: list[int] = []
    stack = [0]
    while stack:
        node = stack.pop()
        if node < 0:
            leaves.append(~node)
            continue
        nodes.append(node)
        stack += [right[node], left[node]]
    place = {old: new for new, old in enumerate(nodes)} | {~old: ~new for new, old in enumerate(leaves)}
    split, cuts, kinds = (fields[k].split() for k in ("split_feature", "threshold", "decision_type"))
    out["split_feature"] = " ".join(split[i] for i in nodes)
    out["threshold"] = " ".join(f"{float(cuts[i]):.1f}" for i in nodes)
    out["decision_type"] = " ".join(kinds[i] for i in nodes)
    out["left_child"] = " ".join(str(place[left[i]]) for i in nodes)
    out["right_child"] = " ".join(str(place[right[i]]) for i in nodes)
    out["leaf_value"] = " ".join(values[i] for i in leaves)
    return out


def from_text(text: str) -> Any:
    """The booster of a text that `to_text` wrote."""
    import lightgbm

    return lightgbm.Booster(model_str=text)


def predict(booster: Any, x: np.ndarray) -> np.ndarray:
    """Residuals of a booster that `from_text` made. [n]"""
    return np.asarray(booster.predict(x, num_threads=1)) * UNIT
