"""Which shapes are sampled: per class of op a coarse grid first, then finer ones, then what published models have.

Every axis has levels. The points of level i are the product of all axes' values up to level i that are not in level i - 1,
in a fixed random order, so that the samples of an interrupted or short run are spread over the whole grid.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Key = dict[str, Any]
Axes = dict[str, tuple[tuple[Any, ...], ...]]
OP_CLASSES = (
    "gemm", "batched_gemm", "grouped_gemm", "attention_context", "attention_generation", "attention_backward", "norm", "pointwise",
    "cross_entropy", "optimizer", "copy",
)  # fmt: skip
LINK_CLASSES = ("collective", "pair")
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
MOST_PER_CLASS = 20_000
LAUNCH_S = 1e-5
LONGEST_CALL_S = 0.1  # no op of a step takes longer
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def _powers(*exponents: int) -> tuple[int, ...]:
    return tuple(1 << i for i in exponents)


def _thirds(*exponents: int) -> tuple[int, ...]:
    """3 x 2^i, between the powers of two."""
    return tuple(3 << i for i in range(*exponents))


@dataclass(frozen=True)
class Scale:
    """What one device does, roughly, and what a sample may take. `flops` and `bandwidth_Bps` are calibrated here and now."""

    kind: str  # cuda or cpu
    dtypes: tuple[tuple[str, ...], ...]  # by level
    flops: dict[str, float]
    bandwidth_Bps: float
    memory_bytes: float  # that a sample may hold
    sample_s: float  # that a sample may take, warm-up and repeats together


MODELS_K = (896, 1536, 2560, 3072, 3584, 5120, 6144, 7168, 11008, 13824, 14336, 18944, 28672)
GPU: dict[str, Axes] = {
    "gemm": {
        "m": ((128, 1024, 8192), (1, 8, 32, 64, 256, 512, 2048, 4096, 16384, 32768), (16, 96, 768, 1536, 3072, 6144, 12288)),
        "n": ((1024, 4096, 16384), (256, 512, 2048, 8192, 32768), (128, *MODELS_K, 32000, 50257, 128256, 151936)),
        "k": ((1024, 4096, 16384), (256, 512, 2048, 8192), (64, 128, *MODELS_K)),
    },
    "batched_gemm": {
        "b": ((8, 64), (2, 16, 32, 128, 256), ()), "m": ((128, 1024), (16, 512, 2048, 4096), (1, 64, 256)),
        "n": ((64, 1024), (128, 512, 2048, 4096), (256, 768)), "k": ((64, 1024), (128, 512, 2048), (96, 256, 1536)),
    },
    "grouped_gemm": {
        "groups": ((8, 64), (4, 16, 32, 128), (2, 256)), "m": ((1024, 16384), (256, 4096, 8192, 65536), (512, 2048, 32768)),
        "n": ((1024, 4096), (512, 2048, 14336), (768, 1536, 7168)), "k": ((1024, 4096), (512, 2048, 14336), (768, 1536, 7168)),
    },
    "attention": {
        "batch": ((1, 8), (2, 4, 16, 32), ()), "q": ((512, 4096), (1024, 2048, 8192, 16384, 32768), (256, 3072, 65536)),
        "heads": ((8, 32), (4, 16, 64), (1, 2, 12, 28, 40)), "share": ((1, 4), (2, 8), (16,)), "head_dim": ((128, 64), (96, 256), ()),
    },
    "attention_generation": {
        "batch": ((1, 32), (4, 8, 16, 64, 128), (2, 256)), "kv": ((512, 4096), (128, 1024, 2048, 8192, 16384), (32768, 65536)),
        "heads": ((8, 32), (4, 16, 64), (1, 2, 28, 40)), "share": ((1, 4), (2, 8), (16,)), "head_dim": ((128, 64), (), (256,)),
    },
    "norm": {"rows": ((256, 4096, 65536), (1, 64, 1024, 16384), (512, 2048, 8192, 32768)),
             "cols": ((1024, 4096, 16384), (128, 512, 2048, 8192), MODELS_K)},
    "pointwise": {"elements": (_powers(14, 20, 26), _powers(10, 17, 18, 22, 24, 28, 30),
                               _thirds(12, 28, 2))},
    "cross_entropy": {"rows": ((512, 8192), (128, 2048, 32768), (1024, 4096, 16384)),
                      "cols": ((32000, 128256), (8000, 16032, 50257, 151936), (4000, 64128, 202048, 256000))},
    "optimizer": {"elements": (_powers(16, 23, 28), _powers(18, 20, 25, 30), _thirds(15, 28, 2))},
    "copy": {"bytes": (_powers(12, 20, 28), _powers(16, 18, 22, 24, 26, 30), _thirds(13, 29, 2))},
    "collective": {"bytes": (_powers(12, 20, 27), _powers(8, 15, 17, 18, 22, 24, 25, 29, 30),
                             _thirds(12, 29))},
    "pair": {"bytes": ((1 << 12, 1 << 26), (1 << 16, 1 << 20, 1 << 23), (1 << 18, 1 << 28))},
}  # fmt: skip
CPU: dict[str, Axes] = {
    "gemm": {
        "m": ((64, 512, 2048), (8, 32, 128, 256, 1024, 4096), (1, 96, 384, 768, 1536)),
        "n": ((64, 256, 1024), (32, 128, 512, 2048), (96, 192, 384, 768, 1536, 4096, 8192, 32000)),
        "k": ((64, 256, 1024), (32, 128, 512, 2048), (96, 192, 384, 768, 1536, 4096)),
    },
    "batched_gemm": {
        "b": ((4, 32), (1, 8, 16, 64), (128,)), "m": ((32, 256), (16, 64, 128, 512), ()), "n": ((32, 256), (8, 16, 64, 128, 512), ()),
        "k": ((32, 256), (8, 16, 64, 128), ()),
    },
    "grouped_gemm": {
        "groups": ((4, 8), (2, 16), (32,)), "m": ((128, 1024), (64, 256, 512, 2048), ()), "n": ((64, 256), (128, 512), (768, 1024)),
        "k": ((64, 256), (128, 512), (768, 1024)),
    },
    "attention": {
        "batch": ((1, 8), (2, 4, 16), ()), "q": ((32, 256), (64, 128, 512), (1024, 2048)), "heads": ((4, 8), (2, 16), (1, 12, 32)),
        "share": ((1, 2), (4,), ()), "head_dim": ((16, 64), (8, 32, 128), ()),
    },
    "attention_generation": {
        "batch": ((1, 8), (2, 4, 16), ()), "kv": ((64, 1024), (128, 256, 512, 4096), ()), "heads": ((4, 8), (2, 16), (32,)),
        "share": ((1, 2), (4,), ()), "head_dim": ((16, 64), (32, 128), ()),
    },
    "norm": {"rows": ((32, 256, 2048), (8, 64, 128, 512, 1024, 4096), ()), "cols": ((64, 256, 1024), (32, 128, 512, 2048), (768, 1536, 4096))},
    "pointwise": {"elements": (_powers(12, 16, 20), _powers(10, 14, 18, 22, 24), _thirds(10, 22, 2))},
    "cross_entropy": {"rows": ((64, 512), (32, 128, 256, 1024, 2048), ()), "cols": ((256, 4096), (128, 512, 1024, 2048, 8192), (32000, 50257))},
    "optimizer": {"elements": (_powers(14, 18, 22), _powers(12, 16, 20, 24), _thirds(12, 22, 2))},
    "copy": {"bytes": (_powers(12, 18, 24), _powers(10, 14, 16, 20, 22, 26), _thirds(11, 23, 2))},
    "collective": {"bytes": (_powers(12, 18, 22), _powers(10, 14, 16, 20, 24, 26), _thirds(10, 24))},
    "pair": {"bytes": ((1 << 12, 1 << 20), (1 << 16, 1 << 18, 1 << 22), (1 << 14, 1 << 24))},
}  # fmt: skip
POINTWISE = {"add": 2, "mul": 2, "silu": 1, "gelu": 1, "copy_cast": 1, "silu_backward": 2, "gelu_backward": 2}
OPS: dict[str, tuple[str, ...]] = {
    "norm": ("rms_norm", "rms_norm_backward", "layer_norm", "layer_norm_backward"), "pointwise": tuple(POINTWISE),
    "cross_entropy": ("forward", "backward"), "optimizer": ("adamw_fused", "adamw_foreach"),
}  # fmt: skip
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
KERNELS = {"gemm": "linear", "batched_gemm": "bmm", "grouped_gemm": "grouped_mm"}


def levels(axes: Axes, seed: str) -> Iterator[Key]:
    """The points of the axes' product, level by level, each level in a random order that `seed` fixes."""
    seen: set[tuple[Any, ...]] = set()
    for level in range(max(len(v) for v in axes.values())):
        values = [tuple(itertools.chain(*v[: level + 1])) for v in axes.values()]
        fresh = [p for p in itertools.product(*values) if p not in seen]
        seen.update(fresh)
        random.Random(f"{seed}{level}").shuffle(fresh)
        yield from (dict(zip(axes, p, strict=True)) for p in fresh)


def samples(kind: str, scale: Scale) -> list[Key]:
    """The keys of a class of ops in the order in which they are measured: those that the device can hold and do in time."""
    grids = GPU if scale.kind == "cuda" else CPU
    axes = dict(grids["attention" if kind in ("attention_context", "attention_backward") else kind])
    axes["dtype"] = scale.dtypes
    if kind in OPS:
        axes["op"] = (OPS[kind],)
    if kind == "copy":
        axes["op"] = (("device", "to_host", "to_device") if scale.kind == "cuda" else ("device",),)
        axes["dtype"] = (scale.dtypes[0][:1],)
    found: list[Key] = []
    for point in levels(axes, kind):
        key = _key(kind, point)
        if point["dtype"] == "fp8" and (kind != "gemm" or key["n"] % 16 or key["k"] % 16 or key["m"] % 16):
            continue
        if key.get("heads", 1) % point.get("share", 1):
            continue
        flops, read = work(kind, key)
        seconds = flops / scale.flops[point["dtype"]] + read / scale.bandwidth_Bps + LAUNCH_S
        if seconds <= min(scale.sample_s / 5, LONGEST_CALL_S) and 3 * read <= scale.memory_bytes:
            found.append(key)
            if len(found) == MOST_PER_CLASS:
                break
    return found


def _key(kind: str, point: Key) -> Key:
    if kind.startswith("attention"):
        kv = point.get("kv", point.get("q"))
        return {
            "backend": "torch", "kernel": "sdpa", "dtype": point["dtype"], "kv_dtype": point["dtype"], "batch": point["batch"],
            "q": point.get("q", 1), "kv": kv, "heads": point["heads"], "kv_heads": max(1, point["heads"] // point["share"]),
            "head_dim": point["head_dim"], "window": 0,
        }  # fmt: skip
    if kind in KERNELS:
        return {"backend": "torch", "kernel": "scaled_mm" if point["dtype"] == "fp8" else KERNELS[kind], **point}
    return {**point, "inputs": POINTWISE[point["op"]]} if kind == "pointwise" else point


def work(kind: str, key: Key) -> tuple[float, float]:
    """FLOPs and bytes of one call, roughly: what bounds its time, and the bytes of its tensors."""
    size = ITEM_BYTES[key["dtype"]]
    if kind in KERNELS:
        m, n, k, b = key["m"], key["n"], key["k"], key.get("b", 1)
        weights = n * k * key.get("groups", 1)
        return 2.0 * b * m * n * k, float(b * (m * k + weights + m * n) * max(size, 2))
    if kind.startswith("attention"):
        tokens = key["batch"] * key["head_dim"]
        flops = 4.0 * tokens * key["heads"] * key["q"] * key["kv"] * (0.5 if key["q"] == key["kv"] else 1)
        read = float(tokens * (2 * key["q"] * key["heads"] + 2 * key["kv"] * key["kv_heads"]) * size)
        # a GPU reaches about half of a product's rate here, a CPU a fifth
        return (12 * flops, 3 * read) if kind == "attention_backward" else (5 * flops, read)
    if kind in ("norm", "cross_entropy"):
        return 0.0, float(key["rows"] * key["cols"] * (4 * size if kind == "norm" else 16))
    if kind == "copy":
        return 0.0, 2.0 * key["bytes"]
    if kind == "optimizer":
        return 0.0, 10.0 * key["elements"] * size
    return 10.0 * key["elements"], float(key["elements"] * (key["inputs"] + 1) * max(size, 4))


def link_samples(kind: str, scale: Scale, backend: str, places: list[tuple[int, int]], world: int) -> list[Key]:
    """The keys of collectives for groups of (ranks, nodes), or of every ordered pair of `world` ranks, coarse sizes first.
    `scale.bandwidth_Bps` is that of a link here."""
    grid = dict((GPU if scale.kind == "cuda" else CPU)[kind])
    found: list[Key] = []
    if kind == "pair":
        grid["source"] = grid["target"] = (tuple(range(world)),)
    else:
        grid |= {"op": (COLLECTIVES,), "place": (tuple(places),), "dtype": scale.dtypes}
    for p in levels(grid, kind):
        if p["bytes"] * 3 > scale.memory_bytes or 10 * p["bytes"] / scale.bandwidth_Bps > scale.sample_s:
            continue
        if kind == "pair":
            if p["source"] != p["target"]:
                found.append({"backend": backend, "source": p["source"], "target": p["target"], "bytes": p["bytes"]})
        elif p["dtype"] in ITEM_BYTES and p["dtype"] != "fp8":
            ranks, nodes = p["place"]
            whole = ranks * ITEM_BYTES[p["dtype"]]
            size = math.ceil(p["bytes"] / whole) * whole
            found.append({"backend": backend, "kernel": "", "op": p["op"], "dtype": p["dtype"], "ranks": ranks, "nodes": nodes, "bytes": size})
    return found
