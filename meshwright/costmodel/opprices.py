"""Seconds of isolated ops inside a training step: the shipped compiled cost models, carried over to devices of the same kind.

Products, flash attention and collectives come from the compiled model of the device's kind (A100, H100, B200). Another device of that
kind keeps the learned residual and takes the roofline at its own datasheet's rates; its links are scaled by their datasheet bandwidth.

`OpPrices` is the whole interface that the step model uses, so that another source of op seconds can take its place.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from meshwright.costmodel.fit import Group, roofline
from meshwright.costmodel.model import CostModel, for_device
from meshwright.costmodel.opclasses import Work, alignment
from meshwright.costmodel.rundevices import RunDevice, known

Array = np.ndarray
SHIPPED = {"A100": "A100-SXM-80GB", "H100": "H100-SXM", "B200": "B200"}
MEASURED_RANKS = (2, 4, 8)
SMALL_B, LARGE_B = 4e6, 2.56e8  # messages between which a collective's bandwidth is read, bytes
LEAST_LATENCY_S = 3e-6


def granularity(x: Array) -> Array:
    """The largest power of two up to 64 that divides x; 1 for odd x."""
    return np.exp2(alignment(np.maximum(1, x)))


def misaligned(n: Array, k: Array) -> Array:
    """How far a product of widths n and k is off the 64-element granularity of tensor-core tiles: 0 at 64, 1 at 8 and below.
    (NVIDIA, Matrix Multiplication Background User's Guide: dimensions of 64 elements and more on A100.)"""
    g = np.minimum(granularity(n), granularity(k))
    return np.asarray(np.log2(64 / np.maximum(g, 8)) / 3)


class OpPrices:
    """Prices isolated ops of one device. Sizes are numbers or arrays of one shape; results are seconds of that shape."""

    def __init__(self, device: RunDevice) -> None:
        self.device = device
        found = for_device(SHIPPED[device.table])
        assert found is not None, f"the package ships a cost model of {SHIPPED[device.table]}"
        self.model: CostModel = found
        self.link_scale = device.node_link_Bps / known()[2][device.table]["node_link_Bps"]
        self._bus: dict[tuple[str, int], tuple[float, float]] = {}

    @cached_property
    def _products(self) -> Group:
        """Constants of 16-bit products."""
        return self.model.group("gemm", dtype="bf16")

    @property
    def launch_s(self) -> float:
        """What the smallest kernel takes."""
        return float(self._products.theta[0]) * 1e-6

    def gemm(self, m: Array, n: Array, k: Array, rate: float = 1.0, launch: bool = True) -> Array:
        """Seconds of [m, k] x [k, n] at 16 bits, or at a precision of `rate` times the 16-bit peak (with 1-byte operands). Widths are
        priced as multiples of 64; what others lose is `misaligned`."""
        g = self._products
        shape = np.broadcast_shapes(np.shape(m), np.shape(n), np.shape(k))
        m, n, k = (np.atleast_1d(np.broadcast_to(np.asarray(x, float), shape)).astype(float) for x in (m, n, k))
        wide, deep = (64 * np.maximum(1, np.round(x / 64)) for x in (n, k))
        isolated = self.model.seconds("gemm", dtype="bf16", m=m, n=wide, k=deep)
        left = isolated / roofline(g.theta, _product(m, wide, deep, 2.0), g.peak, g.bandwidth)
        here = _product(m, n, k, 2.0 if rate == 1.0 else 1.0)
        seconds = roofline(g.theta, here, self.device.peak_flops * rate, self.device.memory_Bps) * left
        if not launch:
            seconds = np.maximum(seconds - g.theta[0] * 1e-6, 1e-9)
        return np.asarray(seconds.reshape(shape))

    def attention(self, flops: float, seq: float, head_dim: float) -> float:
        """Seconds of causal flash attention forward of `flops` (the causal half) at sequence length `seq`. Heads that no common kernel
        is made for are priced by their FLOPs at the nearest smaller one's rate (64 or 128)."""
        d = 64.0 if head_dim <= 64 else 128.0
        each = 4 * d * seq * (seq + 1) / 2
        heads = min(32.0, max(1.0, flops / each))
        batch = max(1.0, flops / each / heads)
        seconds = float(self.model.seconds("attention_context", dtype="bf16", batch=batch, q=float(seq), heads=heads, kv_heads=heads, head_dim=d)[0])
        return seconds * flops / (each * batch * heads) * float(self.model.facts["peak_flops"]["bf16"]) / self.device.peak_flops

    def bus(self, op: str, ranks: float) -> tuple[float, float]:
        """(latency_s, bus bandwidth) of a collective among `ranks` devices of one node (bus bandwidth as nccl-tests defines it)."""
        n = next((r for r in MEASURED_RANKS if ranks <= r), MEASURED_RANKS[-1])
        if (op, n) not in self._bus:
            seconds = self.model.collective_seconds(op, np.array([SMALL_B, LARGE_B]), n)
            assert seconds is not None, f"{self.model.device} has no samples of {op} over {n} ranks"
            moved = (2 if op == "all_reduce" else 1) * (n - 1) / n
            bandwidth = moved * (LARGE_B - SMALL_B) / (seconds[1] - seconds[0])
            self._bus[op, n] = max(seconds[0] - moved * SMALL_B / bandwidth, LEAST_LATENCY_S), bandwidth
        latency, bandwidth = self._bus[op, n]
        return latency, bandwidth * self.link_scale


def _product(m: Array, n: Array, k: Array, item: float) -> Work:
    return Work(2 * m * n * k, item * (m * k + n * k) + 2 * m * n, k)
