"""HardwareProfile -> CostModel: fits every class of op and collective, and judges each fit on samples that it did not see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from meshwright.costmodel import residual
from meshwright.costmodel.calls import group_keys, peak_of, ready
from meshwright.costmodel.fit import Samples, choose_trees, error_row, explore, finish, spread_of
from meshwright.costmodel.model import CostModel
from meshwright.costmodel.moefit import fit_moe
from meshwright.costmodel.opclasses import OP_CLASSES, item_bytes
from meshwright.costmodel.segments import Segments, byte_shift, fit_segments, shifted
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
    """Segments of every measured (op, ranks, nodes, kernel), and their errors by size on a held-out fifth, drawn three times."""
    text = [f"{op}|{int(r)}|{int(n)}|{k}" for op, r, n, k in zip(table["op"], table["ranks"], table["nodes"], table["kernel"])]
    keys = np.array(text, object)
    single = np.array([item_bytes(d) == 1 for d in table["dtype"]])
    everything = np.ones(len(keys), bool)
    model.links, model.link_shift = _fit_links(keys, single, table, everything)
    rng = np.random.default_rng(1)
    errors: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(3):
        test = rng.random(len(keys)) < 0.2
        links, shifts = _fit_links(keys, single, table, ~test)
        for key in sorted(set(keys[test])):
            mask = test & (keys == key)
            if key not in links:
                continue
            name, size = link_name(key), table["bytes"][mask]
            p = links[key].seconds(size) * np.where(single[mask], shifted(size, shifts[name]), 1.0)
            errors.setdefault(name, []).extend(zip(size, p, table["seconds"][mask]))
    for name, rows in sorted(errors.items()):
        size, p, y = np.array(rows).T
        for low, high, band in BANDS:
            mask = (size >= low) & (size < high)
            if mask.any():
                model.report.append({"class": "collective", **error_row(f"{name} {band}", "random fifth", p[mask], y[mask])})
        model.link_spread[name] = spread_of(np.log(y / p), p, np.array([]), bins=4, least=25)


def _fit_links(keys: np.ndarray, single: np.ndarray, table: Table, use: np.ndarray) -> tuple[dict[str, Segments], dict[str, list[float]]]:
    """Segments by key, of elements of two bytes and more, and the shift of one-byte ones by op and kernel."""
    groups: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    for key in sorted(set(keys[use])):
        mask = use & (keys == key)
        groups.setdefault(link_name(key), []).append((table["bytes"][mask], table["seconds"][mask], single[mask]))
    shifts = {name: byte_shift(parts) for name, parts in groups.items()}
    links = {}
    for key in sorted(set(keys[use])):
        mask = use & (keys == key)
        if mask.sum() >= LEAST:
            size = table["bytes"][mask]
            seconds = table["seconds"][mask] / np.where(single[mask], shifted(size, shifts[link_name(key)]), 1.0)
            links[key] = fit_segments(size, seconds)
    return links, shifts


def link_name(key: str) -> str:
    """Op and kernel of a key "op|ranks|nodes|kernel"."""
    op, _, _, kernel = key.split("|")
    return f"{op}|{kernel}" if kernel else op
