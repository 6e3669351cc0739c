"""HardwareProfile -> CostModel: fits every class of op and collective, and judges each fit on samples that it did not see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from meshwright.costmodel import residual
from meshwright.costmodel.fit import Samples, choose_trees, error_row, explore, finish, spread_of
from meshwright.costmodel.model import CostModel, group_keys, peak_of, ready
from meshwright.costmodel.moefit import fit_moe
from meshwright.costmodel.opclasses import OP_CLASSES
from meshwright.costmodel.segments import fit_segments
from meshwright.profiling.errors import InputError
from meshwright.profiling.hardware import CLASSES, TEXT, HardwareProfile, Table

BANDS = ((0.0, 65536.0, "< 64 KiB"), (65536.0, 2.0**20, "64 KiB - 1 MiB"), (2.0**20, 2.0**24, "1 - 16 MiB"), (2.0**24, np.inf, "> 16 MiB"))
PACKED_TEXT = 0.26  # compressed bytes of a byte of a forest's text
LEAST = 5  # samples that a class needs to be fitted at all


def compile_profile(profile: HardwareProfile, progress: Callable[[str], None] | None = None, most_bytes: float | None = None) -> CostModel:
    """Compiles a profile. Classes with fewer than LEAST samples fall back to the datasheet. `most_bytes` bounds the size of the
    file; forests are then cut where it costs the least accuracy. InputError if nothing can be fitted."""
    say = progress or (lambda _: None)
    model = CostModel(
        profile.device, dict(profile.facts), {**profile.provenance, "samples": {k: len(t["seconds"]) for k, t in profile.tables.items()}}
    )
    explored = {}
    for kind in OP_CLASSES:
        if kind in profile.tables:
            table = deduplicate(kind, profile.tables[kind])
            if len(table["seconds"]) >= LEAST:
                say(f"fitting {kind}: {len(table['seconds'])} samples")
                explored[kind] = explore(samples(kind, table, model.facts))
    if "moe" in profile.tables:
        table = deduplicate("moe", profile.tables["moe"], drop=("backend",))
        if len(table["seconds"]) >= 20:
            say(f"fitting moe: {len(table['seconds'])} samples")
            model.moe = fit_moe(table, model.facts)
            model.report += [{"class": "moe", **row} for row in model.moe.report]
    taken = len(model.moe.forest) * PACKED_TEXT if model.moe and model.moe.forest else 0.0
    trees = choose_trees(list(explored.values()), most_bytes - taken if most_bytes else None)
    for (kind, e), chosen in zip(explored.items(), trees):
        say(f"judging {kind} on samples held out")
        model.classes[kind] = finish(e, chosen)
        model.report += [{"class": kind, **row} for row in model.classes[kind].report]
    if "collective" in profile.tables:
        say("fitting collectives")
        _collectives(model, deduplicate("collective", profile.tables["collective"], drop=("backend",)))
    if not model.classes and not model.links and not model.moe:
        raise InputError(f"the profile of {profile.device} has no class with {LEAST} samples or more: there is nothing to fit")
    return model


def deduplicate(kind: str, table: Table, drop: tuple[str, ...] = ("kernel",)) -> Table:
    """One row a key, with the median of its seconds. `drop` are key columns that do not tell rows apart."""
    keys = [c for c in CLASSES[kind] if c in table and c not in drop]
    codes = np.stack([np.unique(table[c].astype(str) if c in TEXT else table[c], return_inverse=True)[1].ravel() for c in keys])
    _, first, which = np.unique(codes, axis=1, return_index=True, return_inverse=True)
    which = which.ravel()
    order = np.argsort(which, kind="stable")
    groups = np.split(table["seconds"][order], np.cumsum(np.bincount(which))[:-1])
    return {**{c: table[c][first] for c in CLASSES[kind]}, "seconds": np.array([np.median(g) for g in groups])}


def samples(kind: str, table: Table, facts: dict[str, Any]) -> Samples:
    """A table made ready to fit."""
    spec = OP_CLASSES[kind]
    columns, n = ready(spec, {c: table[c] for c in CLASSES[kind]})
    keys = group_keys(spec, columns, n)
    keys = np.full(n, keys, object) if isinstance(keys, str) else keys
    work = spec.work(columns)
    bandwidth = float(facts.get("memory_bandwidth_Bps") or (work.bytes / table["seconds"]).max())
    peaks = {}
    for key in sorted(set(keys)):
        mask = keys == key
        dtype = dict(zip(spec.groups, key.split("|"))).get("dtype", "bf16")
        peaks[key] = (
            peak_of(facts, dtype)
            if facts.get("peak_flops") and "dtype" in spec.groups
            else float((work.flops / table["seconds"])[mask].max() or 1e12)
        )
    encoded = residual.encode(spec.features(columns, work, int(facts.get("sms", 100))))
    arrays = {c: np.asarray(v) for c, v in columns.items() if not isinstance(v, str)}
    return Samples(spec, arrays, work, encoded, keys, table["seconds"], peaks, bandwidth)


def _collectives(model: CostModel, table: Table) -> None:
    """Segments of every measured (op, ranks, nodes, kernel), and their errors by size on a held-out fifth."""
    text = [f"{op}|{int(r)}|{int(n)}|{k}" for op, r, n, k in zip(table["op"], table["ranks"], table["nodes"], table["kernel"])]
    keys = np.array(text, object)
    rng = np.random.default_rng(1)
    errors: dict[str, list[tuple[float, float, float]]] = {}
    for key in sorted(set(keys)):
        mask = keys == key
        size, seconds = table["bytes"][mask], table["seconds"][mask]
        model.links[key] = fit_segments(size, seconds)
        for _ in range(3):  # three draws: a group has few samples
            test = rng.random(len(size)) < 0.2
            if not test.any() or (~test).sum() < LEAST:
                continue
            p = fit_segments(size[~test], seconds[~test]).seconds(size[test])
            op, _, _, kernel = key.split("|")
            errors.setdefault(f"{op}|{kernel}" if kernel else op, []).extend(zip(size[test], p, seconds[test]))
    for name, rows in errors.items():
        size, p, y = np.array(rows).T
        for low, high, band in BANDS:
            mask = (size >= low) & (size < high)
            if mask.any():
                model.report.append({"class": "collective", **error_row(f"{name} {band}", "random fifth", p[mask], y[mask])})
        model.link_spread[name] = spread_of(np.log(y / p), p, np.array([]), bins=4, least=25)
