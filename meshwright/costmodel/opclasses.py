"""What each class of op computes and moves, and the features that its residual is learned on.

Every class is priced as

    seconds = ( t0 + ((F (1 + k0 / K) / (e1 peak))^p + (B / (e2 bandwidth))^p)^(1/p) ) exp(residual)

a roofline (Williams et al. 2009) with a launch latency t0, the share e1 of the peak and e2 of the memory bandwidth that
kernels reach, a soft maximum of exponent p where the two meet, and a loss k0 on short reductions; five constants a group of
samples. The residual is a small boosted forest over log sizes and tile counts. `Work` holds F, B and K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Columns = Mapping[str, Any]

# Bytes of one element; a packed format has half a byte and its scales.
ITEM = {
    "fp64": 8.0,
    "fp32": 4.0,
    "tf32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "int8": 1.0,
    "nvfp4": 0.5625,
    "mxfp4": 0.53,
    "int4_wo": 0.53,
    "w4a16_mxfp4": 0.53,
}


def item_bytes(dtype: str) -> float:
    """Bytes of one element of a weight; formats whose name begins with fp8 have one."""
    return ITEM.get(dtype, 1.0 if dtype.startswith(("fp8", "int8", "sq")) else 0.5625 if "fp4" in dtype else 2.0)


@dataclass(frozen=True)
class Work:
    """Arithmetic [FLOP], traffic [B] and length of the reduction of each call. All [n]."""

    flops: np.ndarray
    bytes: np.ndarray
    reduction: np.ndarray


@dataclass(frozen=True)
class OpClass:
    """One class: `groups` are the text columns with constants of their own, `unseen` the columns whose combinations are held
    out together to judge new shapes."""

    name: str
    groups: tuple[str, ...]
    unseen: tuple[str, ...]
    work: Callable[[Columns], Work]
    features: Callable[[Columns, Work, int], list[np.ndarray]]
    bound: str = "flops"  # what "the largest" is measured by

    def size(self, work: Work) -> np.ndarray:
        return work.flops if self.bound == "flops" else work.bytes


def log2(x: np.ndarray) -> np.ndarray:
    return np.log2(np.maximum(x, 1e-9))


def _fill(tiles: np.ndarray, sms: int) -> np.ndarray:
    """How much longer the last, partly filled wave of tiles makes the whole: ceil(w) / w over the multiprocessors."""
    waves = tiles / sms
    return np.ceil(waves) / waves


def _tiles(m: np.ndarray, n: np.ndarray, a: int, b: int) -> np.ndarray:
    return np.ceil(m / a) * np.ceil(n / b)


def alignment(x: np.ndarray) -> np.ndarray:
    """log2 of the largest power of two, up to 64, that divides a size."""
    whole = np.rint(x).astype(np.int64)
    return log2(np.minimum(whole & -whole, 64).astype(float))


# --- matrix products -------------------------------------------------------------------------------------------------


def _gemm_work(c: Columns) -> Work:
    m, n, k, item = c["m"], c["n"], c["k"], c["item"]
    return Work(2 * m * n * k, item * (m * k + n * k) + np.maximum(item, 2.0) * m * n, k)


def _gemm_features(c: Columns, w: Work, sms: int) -> list[np.ndarray]:
    m, n, k = c["m"], c["n"], c["k"]
    lm, ln, lk = log2(m), log2(n), log2(k)
    square = _tiles(m, n, 128, 128)
    shapes = ((128, 256), (256, 128), (64, 128), (64, 64))
    tiles = [log2(square / sms), _fill(square, sms), *(_fill(_tiles(m, n, a, b), sms) for a, b in shapes)]
    return [
        lm, ln, lk, lm + ln, lm + ln + lk, log2(w.flops / w.bytes), *tiles, m % 64 / 64, m % 128 / 64, n % 128 / 64,
        lm - ln, ln + lk, lm + lk, alignment(m), np.minimum(alignment(n), alignment(k)),
    ]  # fmt: skip


def _batched_work(c: Columns) -> Work:
    b, m, n, k, item = c["b"], c["m"], c["n"], c["k"], c["item"]
    return Work(2 * b * m * n * k, b * (item * (m * k + n * k) + np.maximum(item, 2.0) * m * n), k)


def _batched_features(c: Columns, w: Work, sms: int) -> list[np.ndarray]:
    tiles = c["b"] * _tiles(c["m"], c["n"], 128, 128)
    return [log2(c["b"]), log2(c["m"]), log2(c["n"]), log2(c["k"]), log2(w.flops), log2(w.flops / w.bytes), log2(tiles / sms), _fill(tiles, sms)]


def _grouped_work(c: Columns) -> Work:
    g, m, n, k, item = c["groups"], c["m"], c["n"], c["k"], c["item"]
    return Work(2 * m * n * k, item * (m * k + g * n * k) + np.maximum(item, 2.0) * m * n, k)


def _grouped_features(c: Columns, w: Work, sms: int) -> list[np.ndarray]:
    each = np.maximum(1, c["m"] / c["groups"])
    tiles = c["groups"] * _tiles(each, c["n"], 128, 128)
    return [log2(each), log2(c["groups"]), log2(c["n"]), log2(c["k"]), log2(w.flops), log2(w.flops / w.bytes), log2(tiles / sms), _fill(tiles, sms)]


# --- attention -------------------------------------------------------------------------------------------------------


def _seen(c: Columns) -> np.ndarray:
    """Keys that the longest query sees: the window where there is one."""
    return np.asarray(np.where(c["window"] > 0, np.minimum(c["window"], c["kv"]), c["kv"]))


def _context_work(c: Columns) -> Work:
    """Causal attention: queries sit at the end of the keys; 4 d FLOPs a visible (query, key) pair and head."""
    b, q, kv, h, g, d = (c[x] for x in ("batch", "q", "kv", "heads", "kv_heads", "head_dim"))
    seen, past = _seen(c), kv - q
    # query i of q sees min(past + i, seen) keys
    growing = np.clip(seen - past, 0, q)
    pairs = growing * past + growing * (growing + 1) / 2 + (q - growing) * seen
    moved = 2 * 2 * b * q * h * d + 2 * b * g * d * np.minimum(kv, seen + q) * (2 * (past == 0) + c["kv_item"] * (past > 0))
    return Work(4 * b * h * d * pairs, moved, q)


def _context_features(c: Columns, w: Work, sms: int) -> list[np.ndarray]:
    b, q, kv, h, g, d = (c[x] for x in ("batch", "q", "kv", "heads", "kv_heads", "head_dim"))
    seen = _seen(c)
    blocks = b * h * np.ceil(q / 128)
    return [
        log2(b * h), log2(q), log2(d), log2(seen), log2(h / g), log2(w.flops), log2(w.bytes), log2(b), log2(h), log2(g), c["kv_item"],
        log2(b * g), _fill(blocks, sms), log2(blocks / sms), h / g, log2(b * h * q), log2(kv),
    ]  # fmt: skip


def _generation_work(c: Columns) -> Work:
    """One query a sequence: the keys and values are read once; the heads that share a key-value head are padded to a tile of 16."""
    b, h, g, d, seen = c["batch"], c["heads"], c["kv_heads"], c["head_dim"], _seen(c)
    rows = np.ceil(h / g / 16) * 16
    return Work(4 * b * g * rows * d * seen, 2 * c["kv_item"] * b * g * d * seen + 2 * 2 * b * h * d, seen)


def _generation_features(c: Columns, w: Work, sms: int) -> list[np.ndarray]:
    b, h, g, d = (c[x] for x in ("batch", "heads", "kv_heads", "head_dim"))
    seen = _seen(c)
    chunks = b * g * np.ceil(seen / 128)
    return [
        log2(b * g), log2(seen), log2(d), log2(h / g), log2(w.bytes), log2(w.flops), log2(b), log2(h), log2(g), c["kv_item"], log2(c["kv"]),
        _fill(b * g, sms), log2(b * g / sms), log2(chunks / sms), h / g, log2(c["window"] + 1),
    ]  # fmt: skip


# --- what memory bounds ----------------------------------------------------------------------------------------------

# Tensors of one element each that an op reads or writes, where the name of the op tells.
PASSES = {
    "rms_norm": 2, "layer_norm": 2, "rms_norm_backward": 3, "layer_norm_backward": 3, "softmax": 2, "forward": 2, "backward": 2,
    "adamw": 7, "adamw_fused": 7, "adamw_foreach": 16, "sgd": 3,
}  # fmt: skip


def _rows_work(c: Columns) -> Work:
    size = c["rows"] * c["cols"]
    return Work(np.zeros_like(size), size * c["item"] * c["passes"], c["cols"])


def _rows_features(c: Columns, w: Work, sms: int) -> list[np.ndarray]:
    return [log2(c["rows"]), log2(c["cols"]), log2(w.bytes), log2(c["rows"] / sms), c["passes"]]


def _elements_work(c: Columns) -> Work:
    n = c["elements"]
    return Work(np.zeros_like(n), n * c["item"] * (c["inputs"] + 1 if "inputs" in c else c["passes"]), np.ones_like(n))


def _elements_features(c: Columns, w: Work, sms: int) -> list[np.ndarray]:
    return [log2(c["elements"]), log2(w.bytes), c["inputs"] if "inputs" in c else c["passes"], log2(c["elements"] / sms), c["item"]]


def _copy_work(c: Columns) -> Work:
    return Work(np.zeros_like(c["bytes"]), 2 * c["bytes"], np.ones_like(c["bytes"]))


def _copy_features(c: Columns, w: Work, sms: int) -> list[np.ndarray]:
    return [log2(w.bytes)]


def _deepep_work(c: Columns) -> Work:
    """Expert dispatch and combine: traffic of the tokens through `sms` multiprocessors (Hopper's DeepEP uses 20 when not told).
    Its rate takes the place of arithmetic, and the loss on few multiprocessors that of a short reduction."""
    copies = np.minimum(c["topk"], c["nodes"] * 8)
    moved = c["tokens"] * c["hidden"] * copies * 2.0
    return Work(moved, np.ones_like(moved), np.where(c["sms"] > 0, c["sms"], 20.0))


def _deepep_features(c: Columns, w: Work, sms: int) -> list[np.ndarray]:
    return [log2(w.flops), log2(c["tokens"]), log2(c["nodes"]), w.reduction, log2(c["experts"] / c["nodes"])]


HEADS = ("heads", "kv_heads", "head_dim")
OP_CLASSES = {
    c.name: c
    for c in (
        OpClass("gemm", ("backend", "dtype"), ("k",), _gemm_work, _gemm_features),
        OpClass("batched_gemm", ("backend", "dtype"), ("k",), _batched_work, _batched_features),
        OpClass("grouped_gemm", ("backend", "dtype"), ("k",), _grouped_work, _grouped_features),
        OpClass("attention_context", ("backend", "dtype", "kv_dtype"), HEADS, _context_work, _context_features),
        OpClass("attention_generation", ("backend", "dtype", "kv_dtype"), HEADS, _generation_work, _generation_features, bound="bytes"),
        OpClass("attention_backward", ("backend", "dtype", "kv_dtype"), HEADS, _context_work, _context_features),
        OpClass("norm", ("op", "dtype"), ("cols",), _rows_work, _rows_features, bound="bytes"),
        OpClass("pointwise", ("op", "dtype"), ("inputs",), _elements_work, _elements_features, bound="bytes"),
        OpClass("cross_entropy", ("op", "dtype"), ("cols",), _rows_work, _rows_features, bound="bytes"),
        OpClass("optimizer", ("op", "dtype"), (), _elements_work, _elements_features, bound="bytes"),
        OpClass("copy", ("op",), (), _copy_work, _copy_features, bound="bytes"),
        OpClass("deepep", ("mode", "op", "nodes"), (), _deepep_work, _deepep_features),
    )
}
