"""Seconds of isolated ops, priced for arrays of shapes: fitted rooflines per device kind.

The rooflines were fitted to the operator tables that NVIDIA's aiconfigurator publishes (Apache-2.0): torch.nn.functional.linear
in bf16, FlashAttention-family context attention, and NCCL. Median error 4.6-4.9 % for products of M >= 1024 and N, K >= 256, and
6.5-11 % for attention forward. A device without a table uses the table of its kind, scaled by the datasheets.

`OpPrices` is the whole interface that the step model uses, so that another source of op seconds can take its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.costmodel.rundevices import RunDevice, known

Array = np.ndarray
TILES = ((128, 256, 0.0), (256, 128, 0.0), (128, 128, 1.0), (64, 128, 2.0), (128, 64, 2.0), (64, 64, 3.5))


@dataclass(frozen=True)
class Rooflines:
    """Constants of one device kind. GEMM: t0 + ((F (1 + k0/K) wave^w / (e peak))^p + (bytes / (b bw))^p)^(1/p).
    Attention: t0 + F/(u peak) (1 + s0/s) x narrow where head_dim <= 64. Collectives: op -> {ranks: (latency_s, bus_Bps)}."""

    e: float
    b: float
    t0: float
    p: float
    k0: float
    w: float
    tile_penalty: float
    u: float
    s0: float
    attention_t0: float
    narrow: float
    collectives: dict[str, dict[int, tuple[float, float]]]


def _bus(gather: str, reduce: str, alltoall: str) -> dict[str, dict[int, tuple[float, float]]]:
    def parse(text: str) -> dict[int, tuple[float, float]]:
        pairs = [tuple(map(float, part.split("/"))) for part in text.split()]
        return {n: (us * 1e-6, gb * 1e9) for n, (us, gb) in zip((2, 4, 8), pairs, strict=True)}

    return {"all_gather": parse(gather), "all_reduce": parse(reduce), "all_to_all": parse(alltoall)}


# latency_us/bus_GBps at 2, 4 and 8 ranks; fitted on NCCL messages of 1 MiB and more
TABLES = {
    "A100": Rooflines(0.9134, 1.081, 4.365e-6, 4.758, 180.3, 0.5309, 0.25, 0.5615, 458.1, 4.09e-5, 1.0,
        _bus("23.8/139.1 32.1/175.0 24.7/176.0", "35.6/188.9 56.1/213.5 34.5/200.2", "21.3/150.3 24.3/180.2 27.8/184.7")),
    "H100": Rooflines(0.84, 0.8282, 2.779e-6, 3.541, 141.0, 0.4022, 0.0093, 0.6756, 1158.0, 2.01e-5, 1.312,
        _bus("12.2/230.4 15.1/280.4 16.8/304.5", "15.5/284.6 26.7/344.4 26.7/396.8", "12.8/261.5 13.0/273.0 13.0/285.6")),
    "B200": Rooflines(0.733, 0.6352, 2.325e-6, 3.155, 37.9, 0.6641, 0.0078, 0.5367, 992.0, 2.29e-5, 1.602,
        _bus("14.5/423.6 18.6/518.0 23.7/516.8", "16.1/500.1 60.8/710.3 31.5/579.2", "15.6/319.9 16.9/470.4 18.9/536.3")),
}  # fmt: skip


def granularity(x: Array) -> Array:
    """The largest power of two up to 64 that divides x; 1 for odd x."""
    whole = np.maximum(1, np.round(x)).astype(np.int64)
    return np.minimum(64, whole & -whole)


def misaligned(n: Array, k: Array) -> Array:
    """How far a product of widths n and k is off the 64-element granularity of tensor-core tiles: 0 at 64, 1 at 8 and below.
    (NVIDIA, Matrix Multiplication Background User's Guide: dimensions of 64 elements and more on A100.)"""
    g = np.minimum(granularity(n), granularity(k))
    return np.asarray(np.log2(64 / np.maximum(g, 8)) / 3)


class OpPrices:
    """Prices isolated ops of one device. Sizes are numbers or arrays of one shape; results are seconds of that shape."""

    def __init__(self, device: RunDevice) -> None:
        self.device = device
        self.r = TABLES[device.table]
        facts = known()[2][device.table]
        self.link_scale = device.node_link_Bps / facts["node_link_Bps"]

    def gemm(self, m: Array, n: Array, k: Array, rate: float = 1.0, launch: bool = True) -> Array:
        """Seconds of [m, k] x [k, n] at 16 bits, or at a precision of `rate` times the 16-bit peak (with 1-byte operands)."""
        r, d = self.r, self.device
        width = 2.0 if rate == 1.0 else 1.0
        waves = [np.ceil(np.ceil(m / a) * np.ceil(n / b) / d.sm) * d.sm * a * b * (1 + r.tile_penalty * c) for a, b, c in TILES]
        waste = np.minimum.reduce(waves) / (m * n)
        compute = 2 * m * n * k / (r.e * d.peak_flops * rate) * (1 + r.k0 / k) * waste**r.w
        memory = (width * (m * k + n * k) + 2 * m * n) / (r.b * d.memory_Bps)
        return np.asarray((r.t0 if launch else 0.0) + (compute**r.p + memory**r.p) ** (1 / r.p))

    def attention(self, flops: float, seq: float, head_dim: float) -> float:
        """Seconds of causal flash attention forward of `flops` (the causal half) at sequence length `seq`."""
        r = self.r
        shape = (1 + r.s0 / seq) * (r.narrow if head_dim <= 64 else 1.0)
        return r.attention_t0 + flops / (self.device.peak_flops * r.u) * shape

    def bus(self, op: str, ranks: float) -> tuple[float, float]:
        """(latency_s, bus bandwidth) of a collective among `ranks` devices of one node."""
        n = 2 if ranks <= 2 else 4 if ranks <= 4 else 8
        latency, bandwidth = self.r.collectives[op][n]
        return latency, bandwidth * self.link_scale
