"""Calls of an op class as a table of columns: defaults, what follows from names, the datasheet's peak, the group of each call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from meshwright.costmodel.opclasses import PASSES, OpClass, item_bytes
from meshwright.profiling.errors import InputError
from meshwright.profiling.hardware import CLASSES, TEXT

DEFAULTS: dict[str, Any] = {"window": 0.0, "sms": 0.0, "nodes": 1.0, "distribution": "balanced", "tp": 1.0, "ep": 1.0}
ASSUMED = {"fp32": "fp32", "tf32": "bf16", "fp16": "bf16", "int4_wo": "bf16", "int8_wo": "bf16", "w4a16_mxfp4": "bf16"}


def peak_of(facts: Mapping[str, Any], dtype: str) -> float:
    """FLOP/s of a dtype by the datasheet: of the format's own units, or of the ones that it is computed with."""
    peaks = facts.get("peak_flops", {})
    known = ASSUMED.get(dtype, dtype)
    for name in (
        dtype,
        known,
        *(("fp4",) if "fp4" in dtype else ()),
        *(("fp8",) if dtype.startswith("fp8") or "fp4" in dtype else ()),
        "bf16",
        "fp32",
    ):
        if peaks.get(name):
            return float(peaks[name])
    return 1e12


def ready(spec: OpClass, columns: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Columns as arrays of one length, with defaults and what the class derives from names (item bytes, passes)."""
    given = {k: v for k, v in columns.items() if v is not None}
    sizes = [len(np.atleast_1d(v)) for v in given.values() if not isinstance(v, str)]
    n = max(sizes, default=1)
    out: dict[str, Any] = {}
    for name in CLASSES[spec.name]:
        value = given.get(name)
        if value is None:
            if name == "kv":
                value = given["q"]
            elif name == "kv_dtype":
                value = given.get("dtype", "bf16")
            elif name in TEXT:
                value = ""
            elif name in DEFAULTS:
                value = DEFAULTS[name]
            else:
                raise InputError(f"{spec.name} needs {name!r}: it is priced by {', '.join(CLASSES[spec.name])}")
        out[name] = value if isinstance(value, str) else np.asarray(value) if name in TEXT else _floats(value, n)
    if "dtype" in out:
        out["item"] = _by_name(out["dtype"], item_bytes, n)
    if "kv_dtype" in out:
        out["kv_item"] = _by_name(out["kv_dtype"], item_bytes, n)
        out["kv_heads"] = np.where(out["kv_heads"] > 0, out["kv_heads"], out["heads"])
        out["window"] = np.nan_to_num(out["window"])
    if "op" in out and "nodes" not in out:
        out["passes"] = _by_name(out["op"], lambda name: float(PASSES.get(name, 2)), n)
    return out, n


def _floats(value: Any, n: int) -> np.ndarray:
    x = np.asarray(value, float)
    return np.broadcast_to(x, (n,)) if x.ndim == 0 or len(x) != n else x


def _by_name(names: Any, of: Any, n: int) -> np.ndarray:
    if isinstance(names, str):
        return np.full(n, of(names))
    unique, where = np.unique(names.astype(str), return_inverse=True)
    return np.array([of(str(u)) for u in unique])[where]


def group_keys(spec: OpClass, columns: Mapping[str, Any], n: int) -> np.ndarray | str:
    """The group of each call: one text where all are of one group."""
    parts = [columns[c] for c in spec.groups]
    if all(isinstance(p, str) or (c not in TEXT and (p == p[0]).all()) for c, p in zip(spec.groups, parts)):
        return "|".join(p if isinstance(p, str) else f"{p[0]:g}" for p in parts)
    text = [
        np.full(n, p, object) if isinstance(p, str) else np.array([f"{v:g}" if isinstance(v, float) else str(v) for v in p], object) for p in parts
    ]
    return np.array(["|".join(row) for row in zip(*text)], object)
