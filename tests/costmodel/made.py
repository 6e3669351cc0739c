"""A device that exists on paper: its ops follow a known law with noise, so that a fit can be judged."""

from __future__ import annotations

import numpy as np

from meshwright.profiling.hardware import HardwareProfile, table_of

PEAK, BANDWIDTH, LAUNCH, REACHED = 1e14, 1e12, 4e-6, (0.7, 0.8)
FACTS = {"peak_flops": {"bf16": PEAK, "fp8": 2 * PEAK}, "memory_bandwidth_Bps": BANDWIDTH, "sms": 60, "node_link_Bps": 1e11}


def gemm_seconds(m: np.ndarray, n: np.ndarray, k: np.ndarray) -> np.ndarray:
    """A roofline that loses the last wave of 128 x 128 tiles, and a third on rows that are no multiple of 8."""
    tiles = np.ceil(m / 128) * np.ceil(n / 128) / FACTS["sms"]
    wave = np.where(tiles > 1, np.ceil(tiles) / tiles, 1.0)
    arithmetic = 2 * m * n * k / (REACHED[0] * PEAK) * wave
    traffic = 2 * (m * k + n * k + m * n) / (REACHED[1] * BANDWIDTH)
    return np.asarray(LAUNCH + np.maximum(arithmetic, traffic) * np.where(m % 8 > 0, 1.3, 1.0))


def gemms(n: int, rng: np.random.Generator, noise: float = 0.02, top: int = 8192) -> dict[str, np.ndarray]:
    m, cols, k = (np.rint(2 ** rng.uniform(4, np.log2(top), n)) for _ in range(3))
    cols, k = 64 * np.ceil(cols / 64), 64 * np.ceil(k / 64)
    seconds = gemm_seconds(m, cols, k) * np.exp(rng.normal(0, noise, n))
    text = {"backend": np.full(n, "torch", object), "kernel": np.full(n, "", object), "dtype": np.full(n, "bf16", object)}
    return {**text, "m": m, "n": cols, "k": k, "seconds": seconds}


def collective_seconds(nbytes: np.ndarray, ranks: int) -> np.ndarray:
    """Latency, then a slower protocol, then bandwidth."""
    moved = nbytes * (ranks - 1) / ranks
    return np.asarray(np.where(nbytes < 65536, 8e-6 + moved / 2e10, 15e-6 + moved / 8e10))


def profile(samples: int = 4000, seed: int = 0) -> HardwareProfile:
    rng = np.random.default_rng(seed)
    p = HardwareProfile("Made-1", dict(FACTS), {"kind": "measured", "source": "a law with noise"})
    p.tables["gemm"] = gemms(samples, rng)
    rows = []
    for ranks in (2, 4, 8):
        for size in 2.0 ** np.arange(9, 30):
            seconds = float(collective_seconds(np.array(size), ranks) * np.exp(rng.normal(0, 0.02)))
            for op in ("all_gather", "all_reduce"):
                rows.append({"backend": "nccl", "op": op, "dtype": "bf16", "ranks": ranks, "nodes": 1, "bytes": size, "seconds": seconds})
    p.tables["collective"] = table_of("collective", rows)
    return p
