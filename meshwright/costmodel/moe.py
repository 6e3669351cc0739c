"""Seconds of a fused mixture-of-experts layer on one rank (no communication): two grouped GEMMs with a small-batch and a large-batch regime.

A layer is gate/up (hidden -> 2 * inter / tp) and down (inter / tp -> hidden) over experts / ep local experts. Time has a launch floor, the
traffic of the activations around the products and, for each of the two products, a smooth maximum of

- reading the weights of every expert that some token picked (few tokens), and
- multiplying tiles: the tokens of an expert are padded to a tile, tiles fill waves of SMs (many tokens).

How many experts are touched, how many tokens the busiest rank gets and how many tiles they need follow from the routing: the model takes the
busiest rank of an expert-parallel group, because that is the rank the others wait for. A handful of constants per (dtype, kernel) is fitted.

Columns of a table of layers, arrays of length n: `tokens` (of the whole expert-parallel group), `hidden`, `inter`, `topk`, `experts`, `tp`,
`ep`, `skew` (0 balanced, otherwise the exponent of a power law over experts), `dtype`, `kernel`; optional: `gated` (1, or 0 where there is no
gate matrix).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

Columns = Mapping[str, np.ndarray]
Theta = dict[str, list[float]]

# Rows of a tile, the block sizes of Triton, CUTLASS and Marlin grouped GEMMs.
TILES = (8, 16, 32, 64, 128, 256)
TILE_COLUMNS = 128
DRAWS = 24

# dtype -> (bytes of a weight with its scales, precision of the products).
# Scales: one bf16 per 128 (int4), one byte per 32 (mxfp4) or 16 (nvfp4) weights.
DTYPES: dict[str, tuple[float, str]] = {
    "bf16": (2.0, "bf16"),
    "fp16": (2.0, "bf16"),
    "fp8": (1.0, "fp8"),
    "fp8_block": (1.0, "fp8"),
    "int4_wo": (0.516, "bf16"),
    "w4a16_mxfp4": (0.531, "bf16"),
    "w4a8_mxfp4_mxfp8": (0.531, "fp8"),
    "nvfp4": (0.5625, "fp4"),
}


class MoeDevice(Protocol):
    """What the model needs of a device: dense FLOP/s by precision (bf16, fp8, fp4), bytes/s of memory and the number of SMs."""

    @property
    def peak_flops(self) -> Mapping[str, float]: ...
    @property
    def memory_bandwidth_Bps(self) -> float: ...
    @property
    def sm_count(self) -> int: ...


@dataclass(frozen=True)
class Terms:
    """Arrays of length n from which `base_seconds` computes times. Seconds are at the datasheet's rates.

    `tiles` has a column per entry of TILES: the sum of ceil(tokens of an expert / tile) over the rank's experts.
    """

    group: np.ndarray  # "dtype|kernel"
    mean: np.ndarray  # tokens per expert that a kernel assumes when it picks a tile: tokens * topk / experts
    pairs: np.ndarray  # (token, expert) pairs on the rank
    touched: np.ndarray  # experts of the rank with at least one token
    hottest: np.ndarray  # tokens of the rank's busiest expert
    tiles: np.ndarray  # [n, len(TILES)]
    flops_row: np.ndarray  # [n, 2] seconds of one token-expert pair at peak, gate/up and down
    weights: np.ndarray  # [n, 2] seconds to read the weights of one expert
    columns: np.ndarray  # [n] tiles across the output of gate/up
    hidden: np.ndarray
    traffic: np.ndarray  # [n, 4] seconds for activations: every pair's inter, every pair's hidden, the rank's inter, the rank's hidden
    sms: int


# ---------------------------------------------------------------------------------------------------------------- routing


def balanced_load(tokens: np.ndarray, experts: np.ndarray, topk: np.ndarray, ep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(pairs, touched experts) of rank 0 when token i picks experts (i + j * ceil(experts / topk)) mod experts for j < topk.

    With fewer tokens than that stride, the tokens spread their first choice evenly over it.
    """
    local = np.maximum(experts // ep, 1)
    stride = -(-experts // topk)
    pairs = np.zeros(len(tokens))
    full, rest = np.divmod(tokens, experts)
    for j in range(int(topk.max(initial=1))):
        start = (j * stride) % experts
        end = start + rest
        overlap = np.clip(np.minimum(end, local) - start, 0, None) + np.clip(np.minimum(end, experts + local) - experts, 0, None)
        # few tokens: token i has its j-th expert at floor(i * stride / tokens) + start
        few = np.clip(np.ceil((local - start) * tokens / stride), 0, tokens)
        wrapped = np.clip(np.ceil((experts + local - start) * tokens / stride), 0, tokens)
        few += wrapped - np.clip(np.ceil((experts - start) * tokens / stride), 0, tokens)
        pairs += np.where(j < topk, np.where(tokens >= stride, full * local + overlap, few), 0)
    return pairs, np.minimum(pairs, local)


@lru_cache(maxsize=64)
def _uniforms(experts: int) -> np.ndarray:
    """[DRAWS, experts] numbers in (0, 1), the same ones for every question about this number of experts."""
    return np.random.default_rng(experts).random((DRAWS, experts))


@lru_cache(maxsize=65536)
def skewed_load(tokens: int, experts: int, topk: int, ep: int, skew: float) -> tuple[float, ...]:
    """Expected (pairs, touched experts, tokens of the busiest expert, tiles for each of TILES) on the busiest of `ep` ranks.

    Popularities are independent draws from a power law with density x ** -skew between 1 and 0.8 * tokens (0.01 and 2 with fewer pairs than
    experts), scaled to tokens * topk pairs, rounded, at most `tokens` each; what is missing goes to the least popular experts of each rank.
    The mean is over fixed draws.
    """
    low, high = (1.0, max(0.8 * tokens, 1.0 + 1e-9)) if tokens * topk > experts else (0.01, 2.0)
    uniforms = _uniforms(experts)
    if abs(skew - 1) < 1e-6:
        popularity = low * (high / low) ** uniforms
    else:
        power = 1 - skew
        popularity = ((high**power - low**power) * uniforms + low**power) ** (1 / power)
    wanted = tokens * topk
    counts = np.minimum(np.rint(popularity / popularity.sum(1, keepdims=True) * wanted), tokens)
    ep = max(1, min(ep, experts))
    local = experts // ep
    ranks = np.sort(counts[:, : local * ep].reshape(DRAWS, ep, local), axis=2)
    missing = wanted - ranks.sum((1, 2))
    quota = np.floor(missing / ep)[:, None] + (np.arange(ep)[None, :] < (missing % ep)[:, None])
    # raise the least popular experts of a rank to a common level that uses up its quota
    total = np.cumsum(ranks, axis=2)
    order = np.arange(1, local + 1)
    need = ranks * order - total  # to raise all smaller ones to this one
    filled = np.maximum((need <= quota[:, :, None]).sum(2), 1)
    level = (np.maximum(quota, 0) + np.take_along_axis(total, filled[:, :, None] - 1, 2)[:, :, 0]) / filled
    floor = np.floor(level)
    extra = np.rint((level - floor) * filled)
    raised = floor[:, :, None] + (order <= extra[:, :, None])
    ranks = np.where((order <= filled[:, :, None]) & (quota[:, :, None] > 0), raised, ranks)
    ranks[:, :, -1] += np.minimum(quota, 0)  # too many: the busiest gives them back
    ranks = np.clip(ranks, 0, tokens)
    sums = ranks.sum(2)
    busiest = np.take_along_axis(ranks, sums.argmax(1)[:, None, None], 1)[:, 0, :]  # [DRAWS, local]
    padded = [float(np.ceil(busiest / tile).sum(1).mean()) for tile in TILES]
    return (float(busiest.sum(1).mean()), float((busiest > 0).sum(1).mean()), float(busiest.max(1).mean()), *padded)


def rank_load(columns: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(pairs [n], touched experts [n], tokens of the busiest expert [n], tiles [n, len(TILES)]) of the busiest rank."""
    tokens, experts, topk, ep = (np.asarray(columns[name]).astype(np.int64) for name in ("tokens", "experts", "topk", "ep"))
    skew = np.asarray(columns["skew"], float)
    pairs, touched = balanced_load(tokens, experts, topk, ep)
    each, more = np.divmod(pairs, np.maximum(experts // ep, 1))
    local = np.maximum(experts // ep, 1)
    size = np.array(TILES)
    tiles = (local - more)[:, None] * np.ceil(each[:, None] / size) + more[:, None] * np.ceil((each[:, None] + 1) / size)
    hottest = each + (more > 0)
    skewed = np.flatnonzero(skew > 0)
    if len(skewed):
        keys = np.stack([tokens[skewed], experts[skewed], topk[skewed], ep[skewed], skew[skewed]], 1)
        unique, inverse = np.unique(keys, axis=0, return_inverse=True)
        loads = np.array([skewed_load(int(t), int(e), int(k), int(p), float(s)) for t, e, k, p, s in unique])[inverse.ravel()]
        pairs[skewed], touched[skewed], hottest[skewed], tiles[skewed] = loads[:, 0], loads[:, 1], loads[:, 2], loads[:, 3:]
    return pairs, touched, hottest, tiles


# ------------------------------------------------------------------------------------------------------------------- base


def base_terms(columns: Columns, device: MoeDevice) -> Terms:
    """What the layers of a table compute and move on the busiest rank, in seconds at the datasheet's rates.

    A product of m rows with a k x n matrix has 2 * m * k * n FLOPs and reads k * n weights. Around the products, activations of 16 bits
    pass memory per (token, expert) pair: wide + inter for the output of gate/up and its gated form, hidden for the permuted input and the
    output before the sum over topk. Kernels that keep a slot for every pair of the group move those of other ranks as well.
    """
    dtype = np.asarray(columns["dtype"]).astype(str)
    group = np.char.add(np.char.add(dtype, "|"), np.asarray(columns["kernel"]).astype(str))
    names, which = np.unique(dtype, return_inverse=True)
    spec = [DTYPES[str(name)] for name in names]
    weight_bytes = np.array([entry[0] for entry in spec])[which]
    # without units for a precision, weights are unpacked to bf16 in the kernel
    peak = np.array([device.peak_flops.get(entry[1], device.peak_flops["bf16"]) for entry in spec])[which]
    tokens, hidden, topk, experts = (np.asarray(columns[name], float) for name in ("tokens", "hidden", "topk", "experts"))
    inter = np.asarray(columns["inter"], float) / np.asarray(columns["tp"], float)
    wide = inter * (1 + np.asarray(columns.get("gated", np.ones(len(tokens))), float))
    pairs, touched, hottest, tiles = rank_load(columns)
    every = tokens * topk
    bandwidth = device.memory_bandwidth_Bps
    return Terms(
        group=group,
        mean=every / experts,
        pairs=pairs,
        touched=touched,
        hottest=hottest,
        tiles=tiles,
        flops_row=np.stack([2 * hidden * wide, 2 * hidden * inter], 1) / peak[:, None],
        weights=np.stack([hidden * wide, hidden * inter], 1) * (weight_bytes / bandwidth)[:, None],
        columns=np.ceil(wide / TILE_COLUMNS),
        hidden=hidden,
        traffic=np.stack([every * (wide + inter), every * hidden, pairs * (wide + inter), pairs * hidden], 1) * (2.0 / bandwidth),
        sms=device.sm_count,
    )


# The constants of a group: name -> (start, lower, upper); all positive and fitted as logarithms, except the tile rule which is searched.
# A tile rule is (fewest rows, most rows, factor on the mean tokens of an expert).
CONSTANTS: dict[str, tuple[float, float, float]] = {
    "launch": (2e-5, 2e-6, 3e-4),  # s
    "compute": (0.7, 0.1, 1.5),  # part of peak at large tiles
    "half": (16.0, 0.3, 500.0),  # rows of a tile at which half of `compute` is reached
    "memory": (0.8, 0.1, 1.5),  # part of the bandwidth when weights are read
    "every_inter": (0.1, 1e-4, 10.0),  # passes over the activations of all pairs of the group, and of the rank's
    "every_hidden": (0.1, 1e-4, 10.0),
    "rank_inter": (1.0, 1e-4, 10.0),
    "rank_hidden": (2.0, 1e-4, 10.0),
    "expert": (1e-8, 1e-10, 1e-5),  # s per touched expert
    "sharp": (3.0, 1.0, 12.0),  # exponent of the smooth maximum
    "spill": (0.1, 1e-3, 3.0),  # part by which products slow down when the rank's activations are far larger than a cache
    "cache": (1e8, 1e7, 3e9),  # bytes of activations at which half of that shows
}
NAMES = tuple(CONSTANTS)
RULES = ((16, 64, 1.0), (16, 128, 1.0), (16, 128, 2.0), (8, 64, 1.0), (8, 128, 1.0), (64, 64, 1.0), (128, 128, 1.0), (64, 128, 1.0))
FIT_ROWS = 6000


def _tile(mean: np.ndarray, rule: tuple[float, float, float]) -> np.ndarray:
    """log2 of the rows of the tile that a kernel picks: the mean tokens of an expert, rounded to a power of two, between two bounds."""
    low, high, scale = rule
    return np.clip(np.round(np.log2(np.maximum(mean * scale, 1e-9))), np.log2(low), np.log2(high))


def _parts(theta: np.ndarray, rule: tuple[float, float, float], terms: Terms) -> dict[str, np.ndarray]:
    """Seconds of the parts of a time for one group's constants."""
    value = dict(zip(NAMES, theta))
    exponent = _tile(terms.mean, rule)
    rows = 2.0**exponent
    first = np.log2(TILES[0])
    tiles = terms.tiles[np.arange(len(rows)), (exponent - first).astype(int)]
    held = 2.0 * terms.pairs * terms.hidden
    rate = value["compute"] * rows / (rows + value["half"]) / (1 + value["spill"] * held / (held + value["cache"]))
    compute = terms.flops_row * (tiles * rows / rate)[:, None]
    read = terms.weights * (terms.touched / value["memory"])[:, None]
    sharp = value["sharp"]
    product = ((compute**sharp + read**sharp) ** (1 / sharp)).sum(1)
    passes = terms.traffic @ np.array([value[name] for name in ("every_inter", "every_hidden", "rank_inter", "rank_hidden")])
    return {
        "compute": compute.sum(1),
        "read": read.sum(1),
        "product": product,
        "traffic": passes,
        "fixed": value["launch"] + value["expert"] * terms.touched,
        "tiles": tiles,
        "rows": rows,
    }


def _seconds(theta: np.ndarray, rule: tuple[float, float, float], terms: Terms) -> np.ndarray:
    parts = _parts(theta, rule, terms)
    return parts["product"] + parts["traffic"] + parts["fixed"]


def _take(terms: Terms, rows: np.ndarray) -> Terms:
    fields = {name: value if name == "sms" else value[rows] for name, value in vars(terms).items()}
    return Terms(**fields)


def group_of(theta: Theta, group: str) -> str:
    """The fitted group for a "dtype|kernel": itself, else one of the same dtype, else of weights as small and products as precise."""
    if group in theta:
        return group
    dtype = group.split("|")[0]
    if dtype not in DTYPES:
        raise KeyError(f"no MoE dtype {dtype}; known are {', '.join(DTYPES)}")
    size, precision = DTYPES[dtype]

    def distance(name: str) -> tuple[bool, float, bool, str]:
        other = name.split("|")[0]
        return other != dtype, round(abs(np.log2(DTYPES[other][0] / size)), 1), DTYPES[other][1] != precision, name

    return min(theta, key=distance)


def base_seconds(theta: Theta, terms: Terms) -> np.ndarray:
    """Seconds [n] of the layers."""
    return base_parts(theta, terms)["total"]


def base_parts(theta: Theta, terms: Terms) -> dict[str, np.ndarray]:
    """`total` and its parts, seconds [n]: `product` (and its bounds `compute` and `read`), `traffic`, `fixed`; the `tiles` of `rows` rows."""
    out = {name: np.zeros(len(terms.group)) for name in ("total", "product", "compute", "read", "traffic", "fixed", "tiles", "rows")}
    for group in np.unique(terms.group):
        rows = np.flatnonzero(terms.group == group)
        constants = theta[group_of(theta, str(group))]
        low, high, scale = constants[:3]
        parts = _parts(np.array(constants[3:]), (low, high, scale), _take(terms, rows))
        parts["total"] = parts["product"] + parts["traffic"] + parts["fixed"]
        for name, value in parts.items():
            out[name][rows] = value
    return out


def fit_base(columns: Columns, seconds: np.ndarray, device: MoeDevice) -> Theta:
    """Constants of every (dtype, kernel) in a table of measured `seconds` [n]: the tile rule (low, high, scale) and then NAMES.

    Robust least squares on logarithms of ratios; the two tile rules that do best on a quarter of the rows are fitted on all. Leave out rows
    whose routing is not what `skew` says, such as group-limited routing (DeepSeek-V3) measured with made-up logits: their ties send
    every token to the first experts of rank 0, so under expert parallelism that rank has up to 30 times the pairs of a balanced one.
    """
    terms = base_terms(columns, device)
    theta: Theta = {}
    generator = np.random.default_rng(0)
    for group in np.unique(terms.group):
        rows = np.flatnonzero(terms.group == group)
        if len(rows) > FIT_ROWS:
            rows = np.sort(generator.choice(rows, FIT_ROWS, replace=False))
        part, wanted = _take(terms, rows), np.log(seconds[rows])
        few = np.sort(generator.choice(len(rows), min(len(rows), FIT_ROWS // 4), replace=False))
        trials = [(*_fit(_take(part, few), wanted[few], rule, 25), rule) for rule in RULES]
        trials.sort(key=lambda trial: trial[1])
        finals = [(*_fit(part, wanted, rule, 40, start), rule) for start, _, rule in trials[:2]]
        best = min(finals, key=lambda trial: trial[1])
        theta[str(group)] = [float(f"{value:.6g}") for value in (*best[2], *best[0])]
    return theta


def _fit(terms: Terms, wanted: np.ndarray, rule: tuple[float, float, float], steps: int, start: np.ndarray | None = None) -> tuple[np.ndarray, float]:
    """Levenberg-Marquardt on logarithms of the constants, weights of a Huber loss with a knee at 0.15."""
    bounds = np.log(np.array([CONSTANTS[name][1:] for name in NAMES]))
    point = np.log(np.array([CONSTANTS[name][0] for name in NAMES]) if start is None else start)
    prior = np.log(np.array([CONSTANTS[name][0] for name in NAMES]))
    strength = 0.003 * np.sqrt(len(wanted))  # a weak pull keeps constants that nothing shows where they started

    def residual(at: np.ndarray) -> np.ndarray:
        return np.log(_seconds(np.exp(at), rule, terms)) - wanted

    def loss(error: np.ndarray, at: np.ndarray) -> float:
        size = np.abs(error)
        return float(np.where(size < 0.15, size**2, 0.3 * size - 0.0225).sum() + ((strength * (at - prior)) ** 2).sum())

    error = residual(point)
    current, damping = loss(error, point), 1e-2
    for _ in range(steps):
        slope = np.empty((len(wanted), len(point)))
        for k in range(len(point)):
            step = np.zeros(len(point))
            step[k] = 1e-4
            slope[:, k] = (residual(point + step) - error) / 1e-4
        weight = np.minimum(1.0, 0.15 / np.maximum(np.abs(error), 1e-9))
        normal = slope.T @ (slope * weight[:, None]) + strength**2 * np.eye(len(point))
        gradient = slope.T @ (error * weight) + strength**2 * (point - prior)
        better = False
        for _ in range(8):
            move = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -gradient)
            trial = np.clip(point + np.clip(move, -1.0, 1.0), bounds[:, 0], bounds[:, 1])
            error_trial = residual(trial)
            value = loss(error_trial, trial)
            if value < current:
                better = current - value > 1e-5 * current
                point, error, current, damping = trial, error_trial, value, max(damping / 3, 1e-6)
                break
            damping *= 4
        if not better:
            break
    return np.exp(point), current / len(wanted)


# --------------------------------------------------------------------------------------------------------------- residual

FEATURES = (
    "group",
    "log2_mean",
    "log2_local_mean",
    "touched_share",
    "log2_hottest",
    "tile_fill",
    "log2_blocks",
    "log2_hidden",
    "log2_inter",
    "log2_experts",
    "log2_local",
    "topk",
    "skew",
    "compute_to_read",
    "wave",
    "log2_tokens",
)


def features(columns: Columns, theta: Theta, terms: Terms) -> np.ndarray:
    """[n, len(FEATURES)] inputs of a residual on log(seconds / base)."""
    parts = base_parts(theta, terms)
    names = sorted(theta)
    order = {name: names.index(group_of(theta, str(name))) for name in np.unique(terms.group)}
    experts, ep = np.asarray(columns["experts"], float), np.asarray(columns["ep"], float)
    tp = np.asarray(columns["tp"], float)
    local = experts / ep
    waves = parts["tiles"] * terms.columns / terms.sms

    def log2(value: np.ndarray, low: float, high: float) -> np.ndarray:
        return np.log2(np.clip(value, low, high))

    out = np.stack(
        [
            np.array([order[str(name)] for name in terms.group], float),
            log2(terms.mean, 2**-8, 2**10),
            log2(terms.pairs / np.maximum(terms.touched, 1), 1, 2**11),
            terms.touched / local,
            log2(terms.hottest, 1, 2**11),
            terms.pairs / np.maximum(parts["tiles"] * parts["rows"], 1),
            log2(waves, 2**-7, 2**4),
            np.log2(np.asarray(columns["hidden"], float)),
            np.log2(np.asarray(columns["inter"], float) / tp),
            np.log2(experts),
            np.log2(local),
            np.asarray(columns["topk"], float),
            np.asarray(columns["skew"], float),
            log2(parts["compute"] / np.maximum(parts["read"], 1e-12), 2**-6, 2**4),
            np.minimum(np.ceil(waves) / np.maximum(waves, 1e-9), 4.0),
            log2(np.asarray(columns["tokens"], float), 1, 4096),
        ],
        1,
    )
    return np.round(out, 4)
