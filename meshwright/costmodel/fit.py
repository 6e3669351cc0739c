"""Fits one class of ops: constants of the roofline a group, a boosted residual, and the spread of what it did not see."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from meshwright.costmodel import residual
from meshwright.costmodel.opclasses import OpClass, Work

# constants of the roofline: launch [us], shares of peak and bandwidth, exponent - 1, loss on short reductions
START = (4.0, 0.7, 0.75, 1.0, 30.0)
LOW = (0.05, 0.003, 0.01, 0.05, 0.01)
HIGH = (500.0, 1.2, 1.5, 6.0, 3000.0)
SAMPLED = 4000  # samples that constants are fitted on
FEW = 60  # with fewer samples than this a class has no residual
STOPS = (25, 50, 100, 150, 200, 300, 400)  # sizes of the forest that are tried
QUANTILES = (0.05, 0.95)
PACKED = 5.0  # bytes of a leaf in the file, compressed


def roofline(theta: np.ndarray, work: Work, peak: float, bandwidth: float) -> np.ndarray:
    """Seconds of the roofline. `theta` as START; `peak` in FLOP/s, `bandwidth` in B/s."""
    t0, e1, e2, soft, short = theta
    arithmetic = work.flops * (1 + short / work.reduction) / (e1 * peak)
    traffic = work.bytes / (e2 * bandwidth)
    larger, smaller = np.maximum(arithmetic, traffic), np.minimum(arithmetic, traffic)
    p = 1 + soft
    return np.asarray(t0 * 1e-6 + larger * (1 + (smaller / np.maximum(larger, 1e-30)) ** p) ** (1 / p))


def fit_roofline(work: Work, seconds: np.ndarray, peak: float, bandwidth: float, seed: int = 0) -> np.ndarray:
    """Constants by least squares on the logarithm, with a loss that outliers do not pull (soft L1 at 10 %)."""
    n = len(seconds)
    pick = np.random.default_rng(seed).choice(n, min(SAMPLED, n), replace=False)
    some = Work(work.flops[pick], work.bytes[pick], work.reduction[pick])
    target = np.log(seconds[pick])
    x0 = np.log(np.clip(START, np.array(LOW) * 1.01, np.array(HIGH) * 0.99))
    x0[0] = np.log(np.clip(seconds.min() * 0.7e6, LOW[0] * 1.01, HIGH[0] * 0.99))
    pull = 0.02 * np.sqrt(len(pick)) / 5  # a weak prior decides what the samples do not
    wide = np.array([2.0, 0.7, 0.7, 1.0, 2.0])
    start = np.log(START)
    start[0] = x0[0]

    def errors(x: np.ndarray) -> np.ndarray:
        fitted = np.log(roofline(np.exp(x), some, peak, bandwidth)) - target
        return np.concatenate([fitted, (x - start) / wide * pull])

    found = least_squares(errors, x0, loss="soft_l1", f_scale=0.1, bounds=(np.log(LOW), np.log(HIGH)))
    return np.asarray(np.exp(found.x))


@dataclass
class Spread:
    """Quantiles of log(measured / predicted) on samples that the fit did not see, by size of the work. `edges` are log2 of the
    predicted seconds between the bins; `beyond` holds for work larger than any sample's."""

    edges: list[float]
    low: list[float]
    high: list[float]
    beyond: tuple[float, float]

    def at(self, predicted: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Low and high log factors of predictions [s]; `outside` marks work larger than any sample's."""
        i = np.searchsorted(np.array(self.edges), np.log2(predicted), side="right")
        low, high = np.array(self.low)[i], np.array(self.high)[i]
        low = np.where(outside, np.minimum(low, self.beyond[0]), low)
        return low, np.where(outside, np.maximum(high, self.beyond[1]), high)


def spread_of(log_error: np.ndarray, predicted: np.ndarray, beyond: np.ndarray, bins: int = 8, least: int = 60) -> Spread:
    """Quantiles of held-out errors in bins of equal count; `beyond` are the errors of the largest tenth, held out whole."""
    bins = max(1, min(bins, len(predicted) // least))
    edges = np.quantile(np.log2(predicted), np.arange(1, bins) / bins) if bins > 1 else np.array([])
    where = np.searchsorted(edges, np.log2(predicted), side="right")
    low, high = [], []
    for i in range(bins):
        e = log_error[where == i] if (where == i).any() else log_error
        # of n errors the k-th of n + 1 leaves the stated share outside (split conformal prediction, Vovk et al. 2005)
        n = len(e)
        q = np.clip(np.array(QUANTILES) + np.array([-1, 1]) * 0.5 / (n + 1), 0, 1)
        a, b = np.quantile(e, q)
        low.append(float(min(a, 0.0)))
        high.append(float(max(b, 0.0)))
    far = np.quantile(beyond, QUANTILES) if len(beyond) else np.array([min(low), max(high)])
    return Spread([float(x) for x in edges], low, high, (float(min(far[0], 0)), float(max(far[1], 0))))


@dataclass
class Group:
    """One group's constants, the peak that they are shares of, its spread, and the largest work of its samples."""

    theta: np.ndarray
    peak: float
    bandwidth: float
    index: int
    largest: float
    samples: int
    spread: Spread | None = None
    trust: float = 1.0  # share of the residual that holds for work larger than any sample's


@dataclass
class Fitted:
    """A fitted class: groups by their key, the residual forest and its fast first part."""

    kind: str
    groups: dict[str, Group] = field(default_factory=dict)
    forests: dict[str, Any] = field(default_factory=dict)
    coarse: dict[str, Any] = field(default_factory=dict)
    report: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Samples:
    """The samples of a class, made ready: work, features, group of each, measured seconds."""

    spec: OpClass
    columns: dict[str, np.ndarray]
    work: Work
    features: np.ndarray
    keys: np.ndarray  # group key of each sample
    seconds: np.ndarray
    peaks: dict[str, float]
    bandwidth: float

    def take(self, mask: np.ndarray) -> Samples:
        w = Work(self.work.flops[mask], self.work.bytes[mask], self.work.reduction[mask])
        columns = {k: v[mask] for k, v in self.columns.items()}
        return Samples(self.spec, columns, w, self.features[mask], self.keys[mask], self.seconds[mask], self.peaks, self.bandwidth)


def forest_key(spec: OpClass, group: str) -> str:
    """Which groups share a forest: products in 16 bits over all backends; 8-bit ones, whose kernels differ, do not."""
    parts = dict(zip(spec.groups, group.split("|")))
    if spec.name == "gemm" and parts["dtype"] not in ("bf16", "fp16"):
        return group
    if spec.name in ("gemm", "batched_gemm", "grouped_gemm"):
        return parts["dtype"]
    return "all"


def fit_groups(s: Samples) -> dict[str, Group]:
    groups = {}
    for i, key in enumerate(sorted(set(s.keys))):
        mask = s.keys == key
        part = s.take(mask)
        theta = fit_roofline(part.work, part.seconds, s.peaks[key], s.bandwidth)
        groups[key] = Group(theta, s.peaks[key], s.bandwidth, i, float(s.spec.size(part.work).max()), int(mask.sum()))
    return groups


def base_seconds(s: Samples, groups: dict[str, Group]) -> np.ndarray:
    out = np.full(len(s.seconds), np.nan)
    for key, g in groups.items():
        mask = s.keys == key
        if mask.any():
            out[mask] = roofline(g.theta, s.take(mask).work, g.peak, g.bandwidth)
    return out


def with_group(features: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.column_stack([features, index * residual.RESOLUTION])


def train_forests(s: Samples, groups: dict[str, Group], trees: dict[str, int] | None, coarse: bool = False) -> dict[str, Any]:
    """A forest of log(measured / roofline) for every set of groups that share one; none where samples are few."""
    base = base_seconds(s, groups)
    shared = np.array([forest_key(s.spec, k) for k in s.keys], object)
    index = np.array([groups[k].index for k in s.keys], float)
    out = {}
    for key in sorted(set(shared)):
        mask = shared == key
        n = int(mask.sum())
        wanted = max(STOPS) if trees is None else trees.get(key, 0)
        if n < FEW or not wanted:
            continue
        y = np.log(s.seconds[mask] / base[mask])
        x = with_group(s.features[mask], index[mask])
        if coarse:
            out[key] = residual.train(x, y, trees=28, leaves=int(np.clip(n // 20, 7, 31)), rate=0.3)
        else:
            out[key] = residual.train(x, y, trees=wanted, leaves=int(np.clip(n // 40, 7, 127)), rate=0.1, share=0.7)
    return out


def predict(s: Samples, groups: dict[str, Group], forests: dict[str, Any], trees: dict[str, int] | None = None) -> np.ndarray:
    """Seconds of samples by groups and freshly trained forests (not the shortened ones), the first `trees` of each."""
    out = base_seconds(s, groups)
    shared = np.array([forest_key(s.spec, k) for k in s.keys], object)
    for key, forest in forests.items():
        mask = shared == key
        if mask.any():
            index = np.array([groups[k].index for k in s.keys[mask]], float)
            first = trees[key] if trees else None
            out[mask] *= np.exp(forest.predict(with_group(s.features[mask], index), num_iteration=first, num_threads=1))
    return out


def error_row(name: str, split: str, predicted: np.ndarray, measured: np.ndarray, **more: Any) -> dict[str, Any]:
    """Errors of one split: |predicted - measured| / measured."""
    e = np.abs(predicted / measured - 1)
    row = {"group": name, "split": split, "n": len(e), "median": float(np.median(e)), "mean": float(e.mean()), "p90": float(np.quantile(e, 0.9))}
    return {**row, **more}


@dataclass
class Explored:
    """A class before its forests' sizes are chosen: samples, what is held out, and the errors of the random fifth by size."""

    samples: Samples
    splits: dict[str, np.ndarray]
    groups: dict[str, Group] = field(default_factory=dict)
    forests: dict[str, Any] = field(default_factory=dict)
    tried: dict[str, dict[int, float]] = field(default_factory=dict)  # forest -> trees -> median error; 0 trees is the roofline


def explore(s: Samples, seed: int = 1) -> Explored:
    """Holds out, and fits what is left of the random fifth with forests of every size."""
    rng = np.random.default_rng(seed)
    splits = {"random fifth": rng.random(len(s.seconds)) < 0.2, "largest tenth": _largest(s), "unseen shapes": _unseen(s, rng)}
    splits = {k: v & np.isin(s.keys, sorted(set(s.keys[~v]))) for k, v in splits.items()}
    splits = {k: v for k, v in splits.items() if v.sum() >= 3 and (~v).sum() >= 12}
    found = Explored(s, splits)
    if "random fifth" in splits:
        test = splits["random fifth"]
        found.groups = fit_groups(s.take(~test))
        found.forests = train_forests(s.take(~test), found.groups, None)
        found.tried = _tried(s.take(test), found.groups, found.forests)
    return found


def choose_trees(explored: list[Explored], most_bytes: float | None) -> list[dict[str, int]]:
    """Trees of every forest: the smallest within 1.5 % of its best error, none where the roofline is as good; then, while they
    would not fit into `most_bytes`, the one that loses least accuracy for the bytes is made smaller."""
    chosen = []
    for e in explored:
        best = {k: min(t.values()) for k, t in e.tried.items()}
        chosen.append({k: next(n for n, error in sorted(t.items()) if error <= best[k] * 1.015) for k, t in e.tried.items()})
    if most_bytes is None:
        return chosen

    def size(e: Explored, key: str, trees: int) -> float:
        leaves = np.mean([t["num_leaves"] for t in e.forests[key].dump_model(num_iteration=1)["tree_info"]])
        return float(PACKED * leaves * trees)

    while sum(size(e, k, n) for e, c in zip(explored, chosen) for k, n in c.items()) > most_bytes:
        options = []
        for i, (e, c) in enumerate(zip(explored, chosen)):
            for k, n in c.items():
                smaller = [t for t in e.tried[k] if t < n]
                if smaller and n:
                    t = max(smaller)
                    saved = size(e, k, n) - size(e, k, t)
                    options.append(((e.tried[k][t] - e.tried[k][n]) / saved, i, k, t))
        if not options:
            break
        _, i, k, t = min(options)
        chosen[i][k] = t
    return chosen


def finish(e: Explored, trees: dict[str, int]) -> Fitted:
    """The class with forests of the chosen sizes: constants and forests on all samples, errors and spread on held-out ones."""
    s = e.samples
    out = Fitted(s.spec.name)
    held: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    trust: dict[str, float] = {}
    for split, test in e.splits.items():
        train, judge = s.take(~test), s.take(test)
        first = split == "random fifth"
        groups = e.groups if first else fit_groups(train)
        forests = e.forests if first else train_forests(train, groups, trees)
        p = predict(judge, groups, {k: f for k, f in forests.items() if trees.get(k)}, trees)
        if split == "largest tenth":
            trust, p = _trusted(judge, groups, p)
        held[split] = (judge.keys, np.log(judge.seconds / p), p)
        rough = predict(judge, groups, train_forests(train, groups, None, coarse=True)) if first else p
        for key in sorted(set(judge.keys)):
            mask = judge.keys == key
            more = {"roofline_median": error_row("", "", base_seconds(judge.take(mask), groups), judge.seconds[mask])["median"]}
            if first:
                more["fast_median"] = error_row("", "", rough[mask], judge.seconds[mask])["median"]
            out.report.append(error_row(key, split, p[mask], judge.seconds[mask], **more))
    out.groups = fit_groups(s)
    for key, share in trust.items():
        out.groups[key].trust = share
    _spreads(out, held)
    out.forests = {k: residual.to_text(f) for k, f in train_forests(s, out.groups, trees).items()}
    out.coarse = {k: residual.to_text(f) for k, f in train_forests(s, out.groups, None, coarse=True).items()}
    return out


def _trusted(s: Samples, groups: dict[str, Group], p: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """How much of the residual to keep beyond the samples: all, half or none, whichever predicts the held-out largest tenth best."""
    base = base_seconds(s, groups)
    trust, best = {}, p.copy()
    for key in sorted(set(s.keys)):
        mask = s.keys == key
        tried = {share: base[mask] * (p[mask] / base[mask]) ** share for share in (1.0, 0.5, 0.0)}
        trust[key] = min(tried, key=lambda share: float(np.median(np.abs(tried[share] / s.seconds[mask] - 1))))
        best[mask] = tried[trust[key]]
    return trust, best


def _spreads(out: Fitted, held: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """Spread of every group, and how much of the held-out fifth its interval covers when half of it judges the other half."""
    keys, errors, predicted = held.get("random fifth", (np.array([], object), np.array([]), np.array([])))
    far_keys, far_errors, _ = held.get("largest tenth", (np.array([], object), np.array([]), np.array([])))
    for key, g in out.groups.items():
        mask, far = keys == key, far_keys == key
        if mask.sum() < 20:  # too few of its own: all groups of the class together
            mask = np.ones(len(keys), bool)
        if mask.sum() < 5:
            g.spread = Spread([], [np.log(1 / 1.5)], [np.log(1.5)], (np.log(0.5), np.log(2.0)))
            continue
        g.spread = spread_of(errors[mask], predicted[mask], far_errors[far])
        half = np.arange(mask.sum()) % 2 == 0
        e, p = errors[mask], predicted[mask]
        low, high = spread_of(e[half], p[half], np.array([])).at(p[~half], np.zeros((~half).sum(), bool))
        inside = (e[~half] >= low) & (e[~half] <= high)
        for row in out.report:
            if row["group"] == key and row["split"] == "random fifth":
                row["covered"] = float(inside.mean())


def _tried(s: Samples, groups: dict[str, Group], forests: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Median held-out error of every forest by its number of trees."""
    shared = np.array([forest_key(s.spec, k) for k in s.keys], object)
    out = {}
    for key, forest in forests.items():
        part = s.take(shared == key)
        if not len(part.seconds):
            out[key] = {STOPS[0]: 0.0}
            continue
        plain = error_row("", "", base_seconds(part, groups), part.seconds)["median"]
        out[key] = {0: plain} | {t: error_row("", "", predict(part, groups, {key: forest}, {key: t}), part.seconds)["median"] for t in STOPS}
    return out


def _largest(s: Samples) -> np.ndarray:
    """The largest tenth by work, of each group."""
    size = s.spec.size(s.work)
    out = np.zeros(len(size), bool)
    for key in set(s.keys):
        mask = s.keys == key
        out |= mask & (size >= np.quantile(size[mask], 0.9))
    return out


def _unseen(s: Samples, rng: np.random.Generator) -> np.ndarray:
    """About a sixth of the distinct values (or combinations) of the class's `unseen` columns, held out together."""
    if not s.spec.unseen:
        return np.zeros(len(s.seconds), bool)
    _, which = np.unique(np.stack([s.columns[c] for c in s.spec.unseen]), axis=1, return_inverse=True)
    which = which.ravel()
    kinds = which.max() + 1
    return np.isin(which, rng.choice(kinds, max(1, kinds // 6), replace=False))
