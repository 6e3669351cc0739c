"""Answers a table of ops, in the source's own columns and unit, with what a CostModel says of each row."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meshwright.costmodel.fit import Spread
from meshwright.costmodel.model import WIDE, CostModel
from meshwright.profiling.errors import InputError
from meshwright.profiling.files import write_atomically
from meshwright.profiling.hardware import numbers
from meshwright.profiling.importers.columns import DEEPEP_TIMES, FAMILIES, convert, known_ops

ADDED = ("latency_p05", "latency_p50", "latency_p95", "latency_basis")


@dataclass(frozen=True)
class Answered:
    """How many rows were answered, how many of them from the datasheet."""

    rows: int
    datasheet: int


def predict_table(model: CostModel, source: Path, output: Path) -> Answered:
    """Writes `source` with the columns of ADDED beside its own, row for row. Times are in the unit of the source's tables:
    milliseconds, and microseconds for DeepEP, where a row's time is dispatch and combine together. InputError names the file,
    row and column that is wrong."""
    if not source.is_file():
        raise InputError(f"{source} {'is a folder' if source.is_dir() else 'does not exist'}")
    try:
        with source.open(newline="", encoding="utf-8-sig") as f:
            rows = list(csv.reader(f))
    except (UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{source} is not a CSV file in UTF-8 ({e})") from None
    if not rows or "op_name" not in rows[0]:
        raise InputError(f"{source} has no header with a column 'op_name'")
    header, body = rows[0], [r for r in rows[1:] if r]
    for i, row in enumerate(body):
        if len(row) != len(header):
            raise InputError(f"{source}, row {i + 1}: {len(row)} cells, the header has {len(header)}")
    answers = answer(model, {name: [r[j] for r in body] for j, name in enumerate(header)}, str(source))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*header, *ADDED])
    for row, low, middle, high, basis in zip(body, *answers):
        writer.writerow([*row, f"{low:.6g}", f"{middle:.6g}", f"{high:.6g}", basis])
    write_atomically(output, buffer.getvalue())
    return Answered(len(body), int((answers[3] == "datasheet").sum()))


def answer(model: CostModel, rows: dict[str, list[str]], where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """p05, p50, p95 in the source's unit and the basis of every row; `rows` maps column names to text. [n] each"""
    ops = np.array(rows["op_name"], object)
    out = np.empty((3, len(ops)))
    basis = np.empty(len(ops), object)
    for op in sorted(set(ops)):
        if op not in FAMILIES:
            at = int(np.flatnonzero(ops == op)[0]) + 1
            raise InputError(f"{where}, row {at}, column op_name: {op!r} is not priced here: the ops are {', '.join(known_ops())}")
        index = np.flatnonzero(ops == op)
        some = {k: [v[i] for i in index] for k, v in rows.items()}
        family = FAMILIES[op]
        keys = convert(op, some, len(index), where, list(index + 1))
        if family.kind == "collective":
            low, middle, high, what = _collective(model, keys)
        elif family.kind == "deepep":
            low, middle, high, what = _deepep(model, op, keys, some)
        else:
            e = model.estimate(family.kind, **{k: v for k, v in keys.items() if family.kind == "moe" or k != "kernel"})
            low, middle, high, what = e.p05, e.p50, e.p95, e.basis
        out[:, index] = np.stack([low, middle, high]) / family.unit_s
        basis[index] = what
    return out[0], out[1], out[2], basis


def _collective(model: CostModel, c: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    n = len(c["bytes"])
    middle, low, high, basis = np.empty(n), np.empty(n), np.empty(n), np.full(n, "fitted", object)
    parts = zip(c["op"], c["ranks"], c["nodes"], c["kernel"], c["dtype"])
    text = np.array([f"{op}|{int(r)}|{int(d)}|{k}|{dtype}" for op, r, d, k, dtype in parts], object)
    for key in set(text):
        mask = text == key
        op, ranks, nodes, kernel, dtype = key.split("|")
        size = c["bytes"][mask]
        seconds = model.collective_seconds(op, size, int(ranks), int(nodes), kernel, dtype)
        if seconds is None and kernel:  # a kernel that was not measured: NCCL's time
            seconds = model.collective_seconds(op, size, int(ranks), int(nodes), dtype=dtype)
        spread: Spread = model.link_spread.get(f"{op}|{kernel}" if kernel else op, WIDE)
        if seconds is None:
            seconds, spread = datasheet_collective(model, op, size, int(ranks)), WIDE
            basis[mask] = "datasheet"
        a, b = spread.at(seconds, np.zeros(len(size), bool))
        middle[mask], low[mask], high[mask] = seconds, seconds * np.exp(a), seconds * np.exp(b)
    return low, middle, high, basis


def datasheet_collective(model: CostModel, op: str, nbytes: np.ndarray, ranks: int) -> np.ndarray:
    """A ring at 80 % of the link's datasheet bandwidth, with 10 us to start and 2 us a hop."""
    link = 0.8 * float(model.facts.get("node_link_Bps", 1e11))
    passes = 2 if op == "all_reduce" else 1
    return np.asarray(10e-6 + passes * (2e-6 * (ranks - 1) + nbytes * (ranks - 1) / ranks / link))


def _deepep(model: CostModel, op: str, c: dict[str, np.ndarray], rows: dict[str, list[str]]) -> tuple[np.ndarray, ...]:
    total = [np.zeros(len(c["tokens"])) for _ in range(3)]
    basis = np.full(len(c["tokens"]), "fitted", object)
    for half in DEEPEP_TIMES[op]:
        name = f"{half}_sms"
        sms = np.nan_to_num(numbers(rows[name], op, name)) if name in rows else 0.0
        keys = {k: v for k, v in c.items() if k not in ("backend", "kernel")}
        e = model.estimate("deepep", **{**keys, "op": half, "sms": sms})
        for t, part in zip(total, e[:3]):
            t += part
        basis = np.where(e.basis == "datasheet", "datasheet", basis)
    return total[0], total[1], total[2], basis
