"""The text that nccl-tests prints (all_reduce_perf and its siblings), as the collective table of a HardwareProfile.

The out-of-place time is read. The collective is what the program says it is, in versions that say so; else what the columns allow:
the ratio of bus to algorithm bandwidth, the reduction, the root, elements against bytes; and the file's name as the last resort.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshwright.profiling.errors import InputError
from meshwright.profiling.hardware import HardwareProfile
from meshwright.profiling.measure_host import builtin_name

DTYPES = {
    "float": "fp32", "half": "fp16", "bfloat16": "bf16", "double": "fp64", "f8e4m3": "fp8", "f8e5m2": "fp8", "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8", **{f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 32, 64)},
}  # fmt: skip
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp64": 8, "fp8": 1, "int8": 1, "uint8": 1, "int32": 4, "uint32": 4, "int64": 8, "uint64": 8}
# program -> op; those mapped to "" measure what no plan uses
PROGRAMS = {
    "all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter", "alltoall": "all_to_all",
    "sendrecv": "send_recv", "broadcast": "", "reduce": "", "gather": "", "scatter": "", "hypercube": "",
}  # fmt: skip
PREFIX = re.compile(r"^(?:\[[\d,]+\]<std(?:out|err)>:|\d+:)\s?")  # mpirun --tag-output, srun --label
RANK = re.compile(r"^#\s*Rank\s+(\d+)\s+(?:Group\s+(\d+)\s+)?Pid\s+\d+\s+on\s+(\S+)\s+device\s+\d+\s+\[[^\]]*\]\s*(.*)$")
PROGRAM = re.compile(r"^#\s*Collective test (starting|concluded):\s*(\w+?)(?:_perf)?\b", re.IGNORECASE)
RANK_EXAMPLE = "'#  Rank  0 Group  0 Pid  1 on host device  0 [0x07] NVIDIA H200'"


@dataclass
class _Row:
    line: int
    size: int
    count: int
    dtype: str
    redop: str
    root: int
    time_us: float
    algbw: float
    busbw: float
    wrong: str
    wrong_in_place: str


@dataclass
class _Section:
    """What one run of one program printed."""

    line: int
    program: str = ""
    ranks: dict[int, tuple[str, str, str]] = field(default_factory=dict)  # rank -> group, host, device
    rows: list[_Row] = field(default_factory=list)

    def groups(self) -> list[list[str]]:
        """The hosts of each communicator."""
        found: dict[str, list[str]] = {}
        for group, host, _ in self.ranks.values():
            found.setdefault(group, []).append(host)
        return list(found.values())


def read_nccl_tests(paths: Sequence[Path]) -> HardwareProfile:
    """The collectives of one or more outputs, all from one kind of device. InputError names the file, the line and the column that
    is wrong, or what the file lacks."""
    if not paths:
        raise InputError("no file of nccl-tests output is given")
    profile: HardwareProfile | None = None
    first: tuple[Path, str] | None = None
    for path in paths:
        sections = [s for s in _sections(path) if s.rows]
        if not sections:
            raise InputError(f"{path} has no row of nccl-tests output, like '1048576 262144 float sum -1 42.1 ...'")
        for section in sections:
            device = _device(path, section)
            if first is None or profile is None:
                first = (path, device)
                source = {"imported_from": "nccl-tests", "device_name": device, "files": []}
                profile = HardwareProfile(builtin_name(device), {}, source)
            elif device != first[1]:
                raise InputError(f"{path} was measured on {device}, {first[0]} on {first[1]}: import them into profiles of their own")
            rows = _samples(path, section)
            profile.add("collective", rows)
            used = {"file": path.name, "op": rows[0]["op"], "ranks": rows[0]["ranks"], "nodes": rows[0]["nodes"], "rows": len(rows)}
            profile.provenance["files"].append(used)
    assert profile is not None
    return profile


def _sections(path: Path) -> Iterator[_Section]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path} cannot be read as text: {getattr(e, 'strerror', None) or 'not UTF-8'}") from None
    section, columns = _Section(1), list[str]()
    program = ""
    for number, raw in enumerate(lines, 1):
        line = PREFIX.sub("", raw).strip()
        cells = line.split()
        if found := PROGRAM.match(line):
            if found[1].lower() == "starting":
                program = found[2]
            else:
                section.program = found[2]
        if re.match(r"^#\s*nThread\b", line):
            yield section
            section, columns = _Section(number, program), []
            program = ""
        if line.startswith("#"):
            rank = RANK.match(line)
            if rank is None and re.match(r"^#\s*Rank\s+\d", line):
                raise InputError(f"{path}, line {number}: {line[:60]!r} is not a line like {RANK_EXAMPLE}")
            if rank:
                section.ranks[int(rank[1])] = (rank[2] or "0", rank[3], rank[4].strip())
            names = line[1:].split()
            if names[:3] == ["size", "count", "type"]:
                columns = names
        elif cells and cells[0].isdigit() and (columns or len(cells) > 2) and _is_row(cells):
            section.rows.append(_row(path, number, cells, columns))
    yield section


def _is_row(cells: list[str]) -> bool:
    """Whether cells that start with a number are a row of the table, whole or not, and not a message of something else."""
    return len(cells) == 1 or cells[1].isdigit() or any(c in DTYPES for c in cells[2:3])


def _row(path: Path, line: int, cells: list[str], columns: list[str]) -> _Row:
    where = f"{path}, line {line}"
    if not columns:
        raise InputError(f"{where}: a row stands before the header line '#  size  count  type ...'")
    names = list(columns)
    blank: list[str] = [n for n in ("redop", "root") if n in names]  # programs without a reduction used to leave its column empty
    if len(cells) > 3 and blank and cells[3].lstrip("-").replace(".", "", 1).isdigit() and len(cells) >= len(names) - len(blank):
        for name in blank[: len(names) - len(cells)]:
            names.remove(name)
    if len(cells) < len(names):
        raise InputError(f"{where}, column {names[len(cells)]}: the row ends before it, after {len(cells)} of {len(names)}; the file may be cut off")
    if len(cells) > len(names):
        raise InputError(f"{where}: {len(cells)} columns, the header has {len(names)}")
    at = {name: i for i, name in reversed(list(enumerate(names)))}  # the first of each name is out of place
    wrong = next((n for n in ("#wrong", "error") if n in at), "")
    for name in ("time", "algbw", "busbw"):
        if name not in at:
            raise InputError(f"{where}: the header has no column {name}")

    def number(name: str) -> float:
        try:
            return float(cells[at[name]])
        except ValueError:
            raise InputError(f"{where}, column {name}: {cells[at[name]]!r} is not a number") from None

    if cells[at["type"]] not in DTYPES:
        raise InputError(f"{where}, column type: {cells[at['type']]!r} is not one of {', '.join(DTYPES)}")
    time_us = number("time")
    if not (time_us > 0 or number("size") == 0):
        raise InputError(f"{where}, column time: {cells[at['time']]!r} is not above 0")
    return _Row(
        line, int(number("size")), int(number("count")), DTYPES[cells[at["type"]]], cells[at["redop"]] if "redop" in at else "none",
        int(number("root")) if "root" in at else -1, time_us, number("algbw"), number("busbw"), cells[at[wrong]] if wrong else "",
        cells[len(names) - 1 - names[::-1].index(wrong)] if wrong else "",
    )  # fmt: skip


def _device(path: Path, section: _Section) -> str:
    if not section.ranks:
        raise InputError(f"{path} has no line like {RANK_EXAMPLE} before line {section.rows[0].line}")
    missing = sorted(set(range(max(section.ranks) + 1)) - set(section.ranks))
    if missing:
        raise InputError(f"{path} names rank {max(section.ranks)} but has no line for rank {missing[0]}")
    devices = sorted({device for _, _, device in section.ranks.values()})
    if len(devices) > 1:
        raise InputError(f"{path} mixes devices, {devices[0]} and {devices[1]}: a profile is of one device")
    return devices[0]


def _samples(path: Path, section: _Section) -> list[dict[str, Any]]:
    groups = section.groups()
    sizes = sorted({len(g) for g in groups})
    if len(sizes) > 1:
        raise InputError(f"{path} has groups of {sizes[0]} and of {sizes[-1]} ranks: all groups of a run must be equal")
    if sizes[0] < 2:
        raise InputError(f"{path} has groups of one rank: a collective needs at least 2")
    ranks, nodes = sizes[0], max(len(set(g)) for g in groups)
    rows = [r for r in section.rows if r.redop == section.rows[0].redop and r.size > 0]
    if not rows:
        raise InputError(f"{path}: every message has 0 bytes")
    op = _op(path, section, rows, ranks)
    return [
        {"backend": "nccl", "kernel": "", "op": op, "dtype": r.dtype, "ranks": ranks, "nodes": nodes, "bytes": r.size, "seconds": r.time_us * 1e-6}
        for r in rows
    ]


def _op(path: Path, section: _Section, rows: list[_Row], ranks: int) -> str:
    """What was run. InputError if it cannot be told, or if it is no collective that a plan uses."""
    program = section.program.lower()
    if program in PROGRAMS:
        return _used(path, program)
    able = [p for p in PROGRAMS if p not in ("gather", "scatter", "hypercube") and all(_fits(p, r, ranks) for r in rows)]
    if len(able) == 1:
        return _used(path, able[0])
    name = path.name.lower().replace("-", "_")
    named = [p for p in sorted(PROGRAMS, key=len, reverse=True) if p in name or p.replace("_", "") in name]
    if named and (not able or named[0] in able):
        return _used(path, named[0])
    if not able:
        raise InputError(f"{path}, line {rows[0].line}: its rows fit no collective of {ranks} ranks; name the file like all_gather_perf.txt")
    raise InputError(f"{path}: its rows fit {' and '.join(able)}; name the file after its program, like {able[0]}_perf.txt")


def _used(path: Path, program: str) -> str:
    if not PROGRAMS[program]:
        used = ", ".join(f"{p}_perf" for p, op in PROGRAMS.items() if op)
        raise InputError(f"{path} is the output of {program}_perf, which no plan uses; import {used}")
    return PROGRAMS[program]


def _fits(program: str, row: _Row, ranks: int) -> bool:
    """Whether a program could have printed a row. Bus over algorithm bandwidth: nccl-tests, doc/PERFORMANCE.md."""
    factor = {"all_reduce": 2 * (ranks - 1) / ranks, "sendrecv": 1.0, "broadcast": 1.0, "reduce": 1.0}.get(program, (ranks - 1) / ranks)
    if abs(row.busbw - factor * row.algbw) > 0.006 * (1 + factor):  # both are printed with two decimals
        return False
    if (program in ("broadcast", "reduce")) != (row.root >= 0):
        return False
    if program != "sendrecv" and (row.redop != "none") != (program in ("all_reduce", "reduce_scatter", "reduce")):
        return False
    if row.wrong.isdigit() and program != "sendrecv" and (program == "alltoall") != (row.wrong_in_place == "N/A"):
        return False  # all-to-all in place is timed but not checked
    whole = ranks if program in ("all_gather", "reduce_scatter", "alltoall") else 1
    return row.count * ITEM_BYTES[row.dtype] * whole == row.size
