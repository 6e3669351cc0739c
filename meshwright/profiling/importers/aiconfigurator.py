"""HardwareProfile from the operator tables that NVIDIA's aiconfigurator publishes (Apache-2.0).

A tree holds `systems/<gpu>.yaml` (datasheet figures) and `systems/data/<gpu>/<family>/<framework>/<version>/<op>_perf.parquet`
(or .txt and .csv, in older trees). Tables of ops that no class of ours prices are passed over, and listed in the provenance.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from meshwright.profiling.cluster import load_device
from meshwright.profiling.errors import InputError
from meshwright.profiling.hardware import CLASSES, HardwareProfile, Table, concat, numbers
from meshwright.profiling.importers.columns import FAMILIES, convert, times

# Streaming multiprocessors, by the vendors' datasheets; what a table does not say.
MULTIPROCESSORS = {
    "a100": 108, "a30": 56, "a10": 72, "h100_pcie": 114, "h100": 132, "h200": 132, "h20": 78, "h800": 132, "gh200": 132, "l4": 58, "l40s": 142,
    "b200": 148, "b300": 148, "gb200": 148, "gb300": 148, "b100": 148, "rtx_pro_6000": 188, "v100": 80,
}  # fmt: skip
Rows = dict[str, list[str]]


def import_tree(root: Path, gpu: str, progress: Callable[[str], None] | None = None) -> HardwareProfile:
    """The profile of one GPU of a tree. `root` is the tree, its `systems` folder, or the GPU's own folder. InputError says what
    is missing, or the file, row and column that is broken."""
    say = progress or (lambda _: None)
    folder, datasheet = _locate(root, gpu)
    files = sorted(p for p in folder.rglob("*_perf.*") if p.suffix in (".parquet", ".txt", ".csv"))
    if not files:
        raise InputError(f"{folder} holds no *_perf.parquet table")
    profile = HardwareProfile(_device(gpu), _facts(datasheet, gpu) if datasheet else {})
    parts: dict[str, list[Table]] = {}
    skipped: list[str] = []
    sources: list[str] = []
    for path in files:
        say(f"reading {path.relative_to(folder)}")
        rows = read_rows(path)
        kinds = _take(rows, path, parts)
        (sources if kinds else skipped).append(str(path.relative_to(folder)))
    for kind, tables in parts.items():
        profile.tables[kind] = concat(kind, tables)
    if not profile.tables:
        raise InputError(f"{folder} holds no table of an op that is priced here: those are {', '.join(FAMILIES)}")
    profile.provenance = {
        "kind": "imported", "source": "operator tables of NVIDIA's aiconfigurator (Apache-2.0)", "gpu": gpu, "tables": sources, "not_used": skipped,
    }  # fmt: skip
    return profile


def _take(rows: Rows, path: Path, parts: dict[str, list[Table]]) -> set[str]:
    """Appends the rows of a file to the tables of their classes; which classes those were."""
    if "op_name" not in rows:
        raise InputError(f"{path} has no column 'op_name'")
    ops = np.array(rows["op_name"], object)
    found = set()
    for op in sorted(set(ops)):
        if op not in FAMILIES:
            continue
        index = np.flatnonzero(ops == op)
        some = {k: [v[i] for i in index] for k, v in rows.items()} if len(index) < len(ops) else rows
        kind = FAMILIES[op].kind
        keys = convert(op, some, len(index), str(path), list(index + 1))
        for half, seconds in times(op, some, str(path)).items():
            table = {**keys, "seconds": seconds}
            if kind == "deepep":
                name = f"{half}_sms"
                table["op"] = np.full(len(index), half, object)
                table["sms"] = np.nan_to_num(numbers(some[name], str(path), name)) if name in some else np.zeros(len(index))
            parts.setdefault(kind, []).append({c: table[c] for c in (*CLASSES[kind], "seconds")})
            found.add(kind)
    return found


def _locate(root: Path, gpu: str) -> tuple[Path, dict[str, Any] | None]:
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: give the tree that holds systems/{gpu}.yaml and systems/data/{gpu}")
    for systems in (root / "systems", root, *(p.parent for p in sorted(root.glob("**/systems/*.yaml"))[:1])):
        folder = systems / "data" / gpu
        if folder.is_dir():
            sheet = systems / f"{gpu}.yaml"
            return folder, _yaml(sheet) if sheet.exists() else None
    if root.name == gpu:
        sheet = root.parent.parent / f"{gpu}.yaml"
        return root, _yaml(sheet) if sheet.exists() else None
    known = sorted(p.name for p in (root / "systems" / "data").glob("*") if p.is_dir()) or sorted(p.name for p in (root / "data").glob("*"))
    raise InputError(f"{root} has no tables of {gpu!r}" + (f": it has {', '.join(known)}" if known else ": systems/data is not there"))


def _yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        raise InputError(f"{path} is not YAML{f' (line {mark.line + 1})' if mark else ''}") from None
    if not isinstance(data, dict) or not isinstance(data.get("gpu"), dict):
        raise InputError(f"{path} has no 'gpu' mapping")
    return data


def _device(gpu: str) -> str:
    """Our name of the GPU where it is a built-in device, else theirs."""
    for spelling in (gpu.replace("_", "-"), gpu.partition("_")[0]):
        try:
            return load_device(spelling).name
        except InputError:
            continue
    return gpu


def _facts(sheet: dict[str, Any], gpu: str) -> dict[str, Any]:
    g, node = sheet["gpu"], sheet.get("node")
    node = node if isinstance(node, dict) else {}
    peaks = {ours: _figure(g[theirs], gpu, theirs) for ours, theirs in _PEAKS.items() if g.get(theirs)}
    facts: dict[str, Any] = {"peak_flops": peaks, "sms": next((n for k, n in MULTIPROCESSORS.items() if gpu.startswith(k)), 100)}
    for ours, (where, theirs) in {
        "memory_bandwidth_Bps": (g, "mem_bw"), "memory_bytes": (g, "mem_capacity"), "power_W": (g, "power"),
        "node_link_Bps": (node, "intra_node_bw"), "network_Bps": (node, "inter_node_bw"), "devices_per_node": (node, "num_gpus_per_node"),
    }.items():  # fmt: skip
        if where.get(theirs):
            facts[ours] = _figure(where[theirs], gpu, theirs)
    return facts


def _figure(value: Any, gpu: str, key: str) -> float:
    """A datasheet figure above 0. InputError names its key."""
    try:
        x = float(value)
    except (TypeError, ValueError):
        x = math.nan
    if not 0 < x < math.inf:
        raise InputError(f"{gpu}.yaml: {key} must be a number above 0, not {value!r}")
    return x


_PEAKS = {"bf16": "bfloat16_tc_flops", "fp8": "fp8_tc_flops", "int8": "int8_tc_flops", "fp4": "fp4_tc_flops"}


def read_rows(path: Path) -> Rows:
    """A table as columns of text. InputError for a file that is broken or cut short."""
    return _parquet(path) if path.suffix == ".parquet" else _csv(path)


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"reading {path.name} needs pyarrow: pip install 'meshwright[import]'") from None
    try:
        table = pq.read_table(path)
    except Exception as e:
        raise InputError(f"{path} is not a whole parquet file ({str(e).splitlines()[0].rstrip('.')})") from None
    out: Rows = {}
    for name in table.column_names:
        out[name] = ["" if v is None else str(v) for v in table[name].to_pylist()]
    return out


def _csv(path: Path) -> Rows:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8") from None
    with io.StringIO(text, newline="") as f:
        reader = csv.reader(f)
        header = next(reader, None)
        if not header:
            raise InputError(f"{path} is empty")
        rows = []
        for i, row in enumerate(reader):
            if not row:
                continue
            if len(row) != len(header):
                column = header[min(len(row), len(header) - 1)]
                raise InputError(
                    f"{path}, row {i + 1}, column {column}: the row has {len(row)} cells, the header {len(header)}: the file may be cut short"
                )
            rows.append(row)
    columns = list(zip(*rows)) if rows else [()] * len(header)
    return {name: list(column) for name, column in zip(header, columns)}
