"""HardwareProfile: measured samples of one device's ops and links, as tables of columns, in one YAML file.

Every class of op has one table with the columns of `CLASSES`, a `seconds` column, and optionally `spread` (half of the distance
between the quartiles over the median) and `runs`. In the file each table is a block of comma-separated lines, so that half
a million rows load in seconds and a person can still read and compare them.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from meshwright.profiling.errors import InputError
from meshwright.profiling.files import write_atomically

FORMAT = "meshwright.profile/1"
TEXT = frozenset(("dtype", "kv_dtype", "backend", "kernel", "op", "mode", "distribution"))
EXTRA = ("seconds", "spread", "runs")

# The key columns of each class of op. Sizes are those of one call on one rank.
CLASSES: dict[str, tuple[str, ...]] = {
    "gemm": ("backend", "kernel", "dtype", "m", "n", "k"),  # [m, k] x [k, n]
    "batched_gemm": ("backend", "kernel", "dtype", "b", "m", "n", "k"),
    "grouped_gemm": ("backend", "kernel", "dtype", "groups", "m", "n", "k"),  # m rows over all groups
    "attention_context": ("backend", "kernel", "dtype", "kv_dtype", "batch", "q", "kv", "heads", "kv_heads", "head_dim", "window"),
    "attention_generation": ("backend", "kernel", "dtype", "kv_dtype", "batch", "q", "kv", "heads", "kv_heads", "head_dim", "window"),
    "attention_backward": ("backend", "kernel", "dtype", "kv_dtype", "batch", "q", "kv", "heads", "kv_heads", "head_dim", "window"),
    "moe": ("backend", "kernel", "dtype", "tokens", "hidden", "inter", "topk", "experts", "tp", "ep", "distribution"),
    "norm": ("op", "dtype", "rows", "cols"),
    "pointwise": ("op", "dtype", "elements", "inputs"),
    "cross_entropy": ("op", "dtype", "rows", "cols"),
    "optimizer": ("op", "dtype", "elements"),
    "copy": ("op", "dtype", "bytes"),  # op: device, to_host, to_device
    "collective": ("backend", "kernel", "op", "dtype", "ranks", "nodes", "bytes"),  # bytes of the full tensor
    "pair": ("backend", "source", "target", "bytes"),
    "deepep": ("mode", "op", "nodes", "hidden", "tokens", "topk", "experts", "sms"),  # op: dispatch, combine
}

Table = dict[str, np.ndarray]


@dataclass
class HardwareProfile:
    """Samples of one device. `facts` are its datasheet figures (peak_flops by dtype, memory_bandwidth_Bps, sms, ...);
    `provenance` says what was measured, by what, where and when; `tables` hold the samples by class."""

    device: str
    facts: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)

    def rows(self) -> int:
        return sum(len(t["seconds"]) for t in self.tables.values())

    def add(self, kind: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends samples of a class, as mappings with its key columns and `seconds`."""
        made = table_of(kind, list(rows))
        if not len(made["seconds"]):
            return
        old = self.tables.get(kind)
        self.tables[kind] = made if old is None else concat(kind, [old, made])


def table_of(kind: str, rows: list[Mapping[str, Any]]) -> Table:
    """Rows as columns: text columns as objects, the rest as float64; `spread` and `runs` only where some row has them."""
    columns = [*CLASSES[kind], "seconds", *(c for c in EXTRA[1:] if any(c in r for r in rows))]
    out: Table = {}
    for c in columns:
        if c in TEXT:
            out[c] = np.array([str(r.get(c, "")) for r in rows], object)
        else:
            out[c] = np.array([float(r.get(c, math.nan)) for r in rows], float)
    return out


def concat(kind: str, tables: list[Table]) -> Table:
    """Tables of one class below one another; a column that one of them lacks is nan there."""
    columns = [*CLASSES[kind], "seconds", *(c for c in EXTRA[1:] if any(c in t for t in tables))]
    return {c: np.concatenate([t.get(c, np.full(len(t["seconds"]), np.nan)) for t in tables]) for c in columns}


def merge(profiles: list[HardwareProfile]) -> HardwareProfile:
    """Several profiles of one device as one: facts and provenance of the first that has them, all samples. InputError for two devices."""
    first = profiles[0]
    for p in profiles[1:]:
        if p.device != first.device:
            raise InputError(f"the profiles are of two devices, {first.device} and {p.device}: compile each on its own")
    out = HardwareProfile(first.device)
    for p in profiles:
        out.facts = {**p.facts, **out.facts}
        out.provenance = {**p.provenance, **out.provenance}
    for kind in CLASSES:
        tables = [p.tables[kind] for p in profiles if kind in p.tables]
        if tables:
            out.tables[kind] = concat(kind, tables)
    return out


def write_profile(profile: HardwareProfile, path: Path) -> None:
    """Writes the profile beside its place, then renames it."""
    head = {"format": FORMAT, "device": profile.device, "facts": profile.facts, "provenance": profile.provenance}
    text = [yaml.safe_dump(head, sort_keys=False, width=120), "tables:\n"]
    for kind, table in profile.tables.items():
        text.append(f"  {kind}: |\n    {','.join(table)}\n")
        columns = [[_cell(v) for v in table[c]] for c in table]
        text += [f"    {','.join(row)}\n" for row in zip(*columns)]
    write_atomically(path, "".join(text))


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value.replace(",", ";").replace("\n", " ")
    if math.isnan(value):
        return ""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.6g}"


def read_profile(path: Path) -> HardwareProfile:
    """Reads a profile. InputError names the file and what is wrong: the table, row and column for a bad sample."""
    if not path.is_file():
        raise InputError(f"profile {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        data = yaml.load(path.read_text(), Loader=loader)
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        mark = getattr(e, "problem_mark", None)
        raise InputError(f"{path} is not YAML{f' (line {mark.line + 1})' if mark else ''}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(f"{path} is not a hardware profile: its first key must be 'format: {FORMAT}'")
    if not isinstance(data.get("device"), str):
        raise InputError(f"{path}: 'device' must be the name of the device")
    for key in ("facts", "provenance", "tables"):
        if not isinstance(data.get(key) or {}, dict):
            raise InputError(f"{path}: '{key}' must be a mapping")
    profile = HardwareProfile(data["device"], data.get("facts") or {}, data.get("provenance") or {})
    for kind, text in (data.get("tables") or {}).items():
        if kind not in CLASSES:
            raise InputError(f"{path}: {kind!r} is not a class of op; the classes are {', '.join(CLASSES)}")
        profile.tables[kind] = _read_table(path, kind, str(text))
    return profile


def _read_table(path: Path, kind: str, text: str) -> Table:
    lines = list(csv.reader(io.StringIO(text)))
    header = lines[0] if lines else []
    missing = [c for c in (*CLASSES[kind], "seconds") if c not in header]
    if missing:
        raise InputError(f"{path}: table {kind} has no column {missing[0]!r}")
    for c in header:
        if c not in CLASSES[kind] and c not in EXTRA:
            raise InputError(f"{path}: table {kind}: {c!r} is not one of its columns, {', '.join((*CLASSES[kind], *EXTRA))}")
    body = [row for row in lines[1:] if row]
    for i, row in enumerate(body):
        if len(row) != len(header):
            raise InputError(f"{path}: table {kind}, row {i + 1}: {len(row)} cells, the header has {len(header)}")
    out: Table = {}
    for c, column in zip(header, zip(*body) if body else [()] * len(header)):
        out[c] = np.array(column, object) if c in TEXT else numbers(column, f"{path}: table {kind}", c)
    bad = np.flatnonzero(~((out["seconds"] > 0) & np.isfinite(out["seconds"])))
    if bad.size:
        raise InputError(f"{path}: table {kind}, row {bad[0] + 1}, column seconds: {body[bad[0]][header.index('seconds')]!r} is not above 0")
    return out


def numbers(column: Iterable[str], where: str, name: str, places: Sequence[int] | None = None) -> np.ndarray:
    """A column of text as float64, empty cells as nan. InputError names the row (its number in `places`, if they are given) and
    column of the first that is no number."""
    cells = list(column)
    try:
        return np.array([float(x) if x != "" else math.nan for x in cells], float)
    except ValueError:
        for i, x in enumerate(cells):
            try:
                float(x or "nan")
            except ValueError:
                row = places[i] if places is not None else i + 1
                raise InputError(f"{where}, row {row}, column {name}: {x!r} is not a number") from None
        raise
