"""The columns of aiconfigurator's operator tables, as ours and back.

One row is one kernel call: `op_name` says which, and latencies are in milliseconds (DeepEP in microseconds). Collective sizes are
in elements of the dtype. The tables are published under Apache-2.0 by NVIDIA's aiconfigurator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.profiling.errors import InputError
from meshwright.profiling.hardware import TEXT, numbers

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
ELEMENT = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}
COLLECTIVES = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
}
MS, US = 1e-3, 1e-6
Text = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Family:
    """How the rows of one op map: our class, our column from theirs (the first that is there), their unit of time."""

    kind: str
    columns: Mapping[str, tuple[str, ...]]
    unit_s: float = MS


_ATTENTION = {
    "dtype": ("attn_dtype",), "kv_dtype": ("kv_cache_dtype",), "batch": ("batch_size",), "q": ("isl",), "heads": ("num_heads",),
    "kv_heads": ("num_key_value_heads",), "head_dim": ("head_dim",), "window": ("window_size",), "step": ("step",),
}  # fmt: skip
_DEEPEP = {"nodes": ("node_num",), "hidden": ("hidden_size",), "tokens": ("num_token",), "topk": ("num_topk",), "experts": ("num_experts",)}
_COLLECTIVE = {"dtype": ("nccl_dtype", "allreduce_dtype"), "ranks": ("num_gpus",), "elements": ("message_size",)}
FAMILIES = {
    "gemm": Family("gemm", {"dtype": ("gemm_dtype",), "m": ("m",), "n": ("n",), "k": ("k",)}),
    "context_attention": Family("attention_context", _ATTENTION),
    "generation_attention": Family("attention_generation", _ATTENTION),
    "moe": Family("moe", {
        "dtype": ("moe_dtype",), "tokens": ("num_tokens",), "hidden": ("hidden_size",), "inter": ("inter_size",), "topk": ("topk",),
        "experts": ("num_experts",), "tp": ("moe_tp_size",), "ep": ("moe_ep_size",), "distribution": ("distribution",),
    }),
    **dict.fromkeys(COLLECTIVES, Family("collective", _COLLECTIVE)),
    "ll": Family("deepep", _DEEPEP, US),
    "normal": Family("deepep", _DEEPEP, US),
}  # fmt: skip
# Columns with the time of each half of a DeepEP row.
DEEPEP_TIMES: dict[str, dict[str, tuple[str, ...]]] = {
    "ll": {"dispatch": ("dispatch_avg_t_us",), "combine": ("combine_avg_t_us",)},
    "normal": {"dispatch": ("dispatch_transmit_us", "dispatch_notify_us"), "combine": ("combine_transmit_us", "combine_notify_us")},
}
LARGEST = 1e15
OPTIONAL = {"window", "step", "kv_dtype", "distribution", "tp", "ep"}


def convert(op: str, rows: Text, count: int, where: str, places: Sequence[int] | None = None) -> dict[str, np.ndarray]:
    """Key columns of one op's rows as ours, without the time. InputError names the file, row and column that is wrong.

    `rows` maps their column names to text; `where` is the file and `places` the number of each row in it, for messages.
    """
    family = FAMILIES[op]
    out: dict[str, np.ndarray] = {}
    for ours, theirs in family.columns.items():
        given = [t for t in theirs if t in rows and any(rows[t])]
        if not given:
            if ours in OPTIONAL:
                continue
            raise InputError(f"{where}: rows of {op} have no column {' or '.join(theirs)}")
        name = given[0]
        if ours in TEXT:  # of two columns that mean the same, each row may fill another
            cells = [next((x for x in row if x), "") for row in zip(*(rows[t] for t in given))]
            out[ours] = np.array([DTYPES.get(x, x) for x in cells], object)
        else:
            value = numbers(rows[name], where, name, places)
            if ours in OPTIONAL:
                value = np.where([x == "" for x in rows[name]], 1.0 if ours in ("tp", "ep") else 0.0, value)
            out[ours] = value
            bad = np.flatnonzero(~((value >= (0 if ours in ("step", "window", "kv_heads") else 1)) & (value <= LARGEST)))
            if bad.size:
                row = places[bad[0]] if places is not None else bad[0] + 1
                raise InputError(f"{where}, row {row}, column {name}: {rows[name][bad[0]]!r} is not a size")
    blank = [""] * count
    out["backend"] = np.array([x.lower() for x in rows.get("framework", blank)], object)
    out["kernel"] = np.array([x.replace("|", "/") for x in rows.get("kernel_source", blank)], object)  # | joins names
    _DERIVE.get(family.kind, lambda o, op, n: None)(out, op, count)
    return out


def _attention(out: dict[str, np.ndarray], op: str, count: int) -> None:
    step = out.pop("step", np.zeros(count))
    out["kv"] = out["q"] + step
    out["kv_heads"] = np.where(out["kv_heads"] > 0, out["kv_heads"], out["heads"])  # 0 stands for one per head
    out.setdefault("window", np.zeros(count))
    out.setdefault("kv_dtype", out["dtype"])


def _collective(out: dict[str, np.ndarray], op: str, count: int) -> None:
    item = np.array([ELEMENT.get(d, 1.0) for d in out["dtype"]])
    out["bytes"] = out.pop("elements") * item
    out["op"] = np.full(count, COLLECTIVES[op], object)
    out["nodes"] = np.ones(count)
    # NCCL is what every collective of a training step runs on: it goes without a name, other kernels keep theirs
    out["kernel"] = np.array(["" if k in ("", "NCCL") else k for k in out["kernel"]], object)


def _moe(out: dict[str, np.ndarray], op: str, count: int) -> None:
    out.setdefault("distribution", np.full(count, "balanced", object))
    for name in ("tp", "ep"):
        out.setdefault(name, np.ones(count))


def _deepep(out: dict[str, np.ndarray], op: str, count: int) -> None:
    out["mode"] = np.full(count, op, object)


_DERIVE: dict[str, Callable[[dict[str, np.ndarray], str, int], None]] = {
    "attention_context": _attention, "attention_generation": _attention, "collective": _collective, "moe": _moe, "deepep": _deepep,
}  # fmt: skip


def times(op: str, rows: Text, where: str) -> dict[str, np.ndarray]:
    """Seconds of each row: {"": latency}, or one entry for each half of a DeepEP row."""
    family = FAMILIES[op]
    if family.kind != "deepep":
        return {"": _positive(rows, "latency", where) * family.unit_s}
    out = {}
    for half, names in DEEPEP_TIMES[op].items():
        out[half] = sum((_positive(rows, n, where, zero=i > 0) for i, n in enumerate(names)), np.zeros(1)) * family.unit_s
    return out


def _positive(rows: Text, name: str, where: str, zero: bool = False) -> np.ndarray:
    if name not in rows:
        raise InputError(f"{where} has no column {name!r}")
    x = numbers(rows[name], where, name)
    bad = np.flatnonzero(~((x >= 0 if zero else x > 0) & np.isfinite(x)))
    if bad.size:
        raise InputError(f"{where}, row {bad[0] + 1}, column {name}: {rows[name][bad[0]]!r} is not a time above 0")
    return x


def known_ops() -> list[str]:
    return list(FAMILIES)
