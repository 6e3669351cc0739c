"""The class of fused mixture-of-experts layers: fitting and pricing on top of the two-regime model of moe.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from meshwright.costmodel import moe, residual
from meshwright.costmodel.fit import Spread, error_row, spread_of
from meshwright.profiling.errors import InputError

TREES, LEAVES, RATE = 100, 63, 0.2
FEW = 200  # with fewer samples there is no residual
COLUMNS = ("dtype", "kernel", "tokens", "hidden", "inter", "topk", "experts", "tp", "ep", "distribution")
SHAPE = ("hidden", "inter", "experts")


@dataclass(frozen=True)
class Facts:
    """What moe.py needs of a device."""

    peak_flops: Mapping[str, float]
    memory_bandwidth_Bps: float
    sm_count: int

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Facts:
        peaks = dict(facts.get("peak_flops") or {})
        peaks.setdefault("bf16", peaks.get("fp32", 1e14))
        return cls(peaks, float(facts.get("memory_bandwidth_Bps", 1e12)), int(facts.get("sms", 100)))


@dataclass
class MoeFitted:
    """Constants a (dtype, kernel), the residual forest, its clip, the spread a dtype, and the kernel that each dtype runs."""

    theta: moe.Theta = field(default_factory=dict)
    clip: float = 1.0
    forest: str | None = None
    spread: dict[str, Spread] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    report: list[dict[str, Any]] = field(default_factory=list)


def skew_of(name: str) -> float:
    """0 for "balanced" or "uniform", the exponent for "power_law_1.2". InputError for anything else."""
    if name in ("balanced", "uniform", ""):
        return 0.0
    try:
        return float(name.rpartition("_")[2])
    except ValueError:
        raise InputError(f"distribution {name!r} is not known: it is balanced or like power_law_1.2") from None


def prepared(columns: Mapping[str, Any], kernels: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Columns as moe.py takes them: routing skew as a number, a kernel where none is named."""
    n = max(len(np.atleast_1d(columns[c])) for c in COLUMNS if c in columns and not isinstance(columns[c], str))
    out: dict[str, np.ndarray] = {}
    for c in COLUMNS:
        value = columns.get(c, {"tp": 1.0, "ep": 1.0}.get(c, ""))
        out[c] = (
            np.full(n, value, object)
            if isinstance(value, str)
            else np.broadcast_to(np.asarray(value), (n,))
            if np.ndim(value) == 0
            else np.asarray(value)
        )
    skew = {name: skew_of(str(name)) for name in set(out.pop("distribution"))}
    names = columns.get("distribution", "")
    out["skew"] = np.full(n, skew[names]) if isinstance(names, str) else np.array([skew[x] for x in names])
    if "" in set(out["kernel"]):
        out["kernel"] = np.array([k or kernels.get(str(d), "") for d, k in zip(out["dtype"], out["kernel"])], object)
    return out


def flops(c: Mapping[str, np.ndarray]) -> np.ndarray:
    """FLOPs of the rank's share under balanced routing: three products of hidden x inter a (token, expert) pair."""
    return np.asarray(6.0 * c["tokens"] * c["topk"] / c["ep"] * c["hidden"] * c["inter"] / c["tp"], float)


def _take(c: Mapping[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
    return {k: v[mask] for k, v in c.items()}


def _train(x: np.ndarray, y: np.ndarray) -> Any:
    return residual.train(x, y, trees=TREES, leaves=LEAVES, rate=RATE, smallest=8)


def _matrix(c: Mapping[str, np.ndarray], theta: moe.Theta, terms: moe.Terms) -> np.ndarray:
    return residual.encode(list(moe.features(c, theta, terms).T))


def fit_moe(table: Mapping[str, np.ndarray], facts: Mapping[str, Any], seed: int = 1) -> MoeFitted:
    """Fits the class and judges it on a random fifth, the largest tenth by FLOPs and unseen (hidden, inter, experts)."""
    device, y = Facts.of(facts), np.asarray(table["seconds"], float)
    commonest = {d: Counter(table["kernel"][table["dtype"] == d]).most_common(1)[0][0] for d in sorted(set(table["dtype"]))}
    keep = np.array([str(d) in moe.DTYPES for d in table["dtype"]])
    c = prepared({k: v[keep] for k, v in table.items() if k in COLUMNS}, commonest)
    y = y[keep]
    out = MoeFitted(kernels={k: str(v) for k, v in commonest.items() if k in moe.DTYPES})
    rng = np.random.default_rng(seed)
    work, n = flops(c), len(y)
    shapes = np.unique(np.stack([c[s].astype(float) for s in SHAPE]), axis=1, return_inverse=True)[1].ravel()
    unseen = rng.choice(shapes.max() + 1, max(1, (shapes.max() + 1) // 6), replace=False)
    splits = {"random fifth": rng.random(n) < 0.2, "largest tenth": work >= np.quantile(work, 0.9), "unseen shapes": np.isin(shapes, unseen)}
    held: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for split, test in splits.items():
        if test.sum() < 5 or (~test).sum() < 20:
            continue
        theta, clip, forest = _fit(_take(c, ~test), y[~test], device)
        judge, measured = _take(c, test), y[test]
        terms = moe.base_terms(judge, device)
        base = moe.base_seconds(theta, terms)
        p = base * np.exp(np.clip(forest.predict(_matrix(judge, theta, terms), num_threads=1), -clip, clip)) if forest else base
        held[split] = (judge["dtype"], np.log(measured / p), p)
        for dtype in ("all", *sorted(set(judge["dtype"]))):
            mask = np.ones(len(p), bool) if dtype == "all" else judge["dtype"] == dtype
            plain = error_row("", "", base[mask], measured[mask])["median"]
            out.report.append(error_row(dtype, split, p[mask], measured[mask], roofline_median=plain))
    _spreads(out, held, set(c["dtype"]))
    out.theta, out.clip, forest = _fit(c, y, device)
    out.forest = residual.to_text(forest) if forest else None
    out.largest = {d: float(work[c["dtype"] == d].max()) for d in sorted(set(c["dtype"]))}
    return out


def _fit(c: Mapping[str, np.ndarray], y: np.ndarray, device: Facts) -> tuple[moe.Theta, float, Any]:
    theta = moe.fit_base(c, y, device)
    terms = moe.base_terms(c, device)
    left = np.log(y / moe.base_seconds(theta, terms))
    clip = float(np.quantile(np.abs(left), 0.995))
    return theta, clip, _train(_matrix(c, theta, terms), left) if len(y) >= FEW else None


def _spreads(out: MoeFitted, held: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], dtypes: set[str]) -> None:
    nothing = (np.array([], object), np.array([]), np.array([]))
    names, errors, predicted = held.get("random fifth", nothing)
    far_names, far, _ = held.get("largest tenth", nothing)
    for dtype in sorted(dtypes):
        mask = names == dtype
        if mask.sum() < 20:
            mask = np.ones(len(names), bool)
        if not mask.any():
            out.spread[dtype] = Spread([], [float(np.log(0.6))], [float(np.log(1.6))], (float(np.log(0.5)), float(np.log(2))))
            continue
        out.spread[dtype] = spread_of(errors[mask], predicted[mask], far[far_names == dtype])
        half = np.arange(mask.sum()) % 2 == 0
        e, p = errors[mask], predicted[mask]
        low, high = spread_of(e[half], p[half], np.array([])).at(p[~half], np.zeros((~half).sum(), bool))
        for row in out.report:
            if row["group"] == dtype and row["split"] == "random fifth":
                row["covered"] = float(((e[~half] >= low) & (e[~half] <= high)).mean())


def price(fitted: MoeFitted, forest: Any | None, columns: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Median seconds and the low and high log factors of calls. InputError for a dtype that is not known."""
    c = prepared(columns, fitted.kernels)
    unknown = sorted({str(d) for d in c["dtype"]} - set(moe.DTYPES))
    if unknown:
        raise InputError(f"moe has no dtype {unknown[0]!r}: the dtypes are {', '.join(moe.DTYPES)}")
    device = Facts.of(facts)
    terms = moe.base_terms(c, device)
    seconds = moe.base_seconds(fitted.theta, terms)
    if forest is not None:
        seconds = seconds * np.exp(np.clip(residual.predict(forest, _matrix(c, fitted.theta, terms)), -fitted.clip, fitted.clip))
    low, high, work = np.empty(len(seconds)), np.empty(len(seconds)), flops(c)
    for dtype in set(c["dtype"]):
        mask = c["dtype"] == dtype
        spread = fitted.spread.get(dtype) or Spread([], [float(np.log(0.5))], [float(np.log(2))], (float(np.log(0.4)), float(np.log(2.5))))
        low[mask], high[mask] = spread.at(seconds[mask], work[mask] > fitted.largest.get(dtype, 0.0))
    return seconds, low, high
