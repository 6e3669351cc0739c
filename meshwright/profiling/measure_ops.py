"""The ops that are measured: from the key of a sample to a call that torch runs.

Forward calls run without autograd; backward calls differentiate a kept graph, so that only the backward is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from meshwright.profiling.measure_shapes import Key
from meshwright.profiling.measure_timing import Call, Clock

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
PARAMETERS = 16  # tensors of an optimizer's step
BACKWARD = "_backward"


class Pool:
    """Random numbers on the device, made once; each sample takes its inputs from it, one after the other."""

    def __init__(self, device: torch.device, bytes_: float) -> None:
        self.device = device
        self._numbers = torch.empty(int(bytes_) // 4, device=device).uniform_(-1, 1)
        self._used = 0

    def restart(self) -> None:
        self._used = 0

    def take(self, *shape: int, dtype: str) -> Tensor:
        """A tensor of small random numbers [*shape]: a part of the pool, or a fresh tensor where the pool is used up."""
        kind, count = DTYPES[dtype], math.prod(shape)
        if dtype != "fp32":  # as fp32 bits, 16-bit halves would hold infinities
            return self.take(*shape, dtype="fp32").to(kind)
        start, self._used = self._used, self._used + -(-count // 16) * 16
        if self._used > len(self._numbers):
            return torch.empty(shape, device=self.device).uniform_(-1, 1)
        return self._numbers[start : start + count].view(shape)

    def leaf(self, *shape: int, dtype: str) -> Tensor:
        return self.take(*shape, dtype=dtype).detach().requires_grad_()


def build(kind: str, key: Key, pool: Pool) -> Call:
    """A call of the op that `key` names. Raises what torch raises for an op that this device or build lacks."""
    pool.restart()
    return BUILDERS[kind](key, pool)


def import_lazily() -> None:
    """Runs an optimizer step and a differentiated op once: torch imports seconds' worth of modules at the first."""
    p = torch.zeros(1, requires_grad=True)
    p.square().sum().backward()
    torch.optim.AdamW([p], foreach=True).step()


def _gemm(key: Key, pool: Pool) -> Call:
    m, n, k, dtype = key["m"], key["n"], key["k"], key["dtype"]
    a, w = pool.take(m, k, dtype=dtype), pool.take(n, k, dtype=dtype)
    if dtype == "fp8":
        one = torch.ones((), device=a.device)
        return lambda: torch._scaled_mm(a, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return lambda: F.linear(a, w)


def _batched_gemm(key: Key, pool: Pool) -> Call:
    a = pool.take(key["b"], key["m"], key["k"], dtype=key["dtype"])
    b = pool.take(key["b"], key["k"], key["n"], dtype=key["dtype"])
    return lambda: torch.bmm(a, b)


def _grouped_gemm(key: Key, pool: Pool) -> Call:
    groups, m = key["groups"], key["m"]
    a = pool.take(m, key["k"], dtype=key["dtype"])
    w = pool.take(groups, key["n"], key["k"], dtype=key["dtype"]).transpose(1, 2)
    ends = torch.tensor([m * (i + 1) // groups for i in range(groups)], dtype=torch.int32, device=a.device)
    return lambda: torch._grouped_mm(a, w, offs=ends)


def _attention(key: Key, pool: Pool, leaf: bool = False) -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
    make = pool.leaf if leaf else pool.take
    wide, narrow = (key["batch"], key["heads"]), (key["batch"], key["kv_heads"])
    q = make(*wide, key["q"], key["head_dim"], dtype=key["dtype"])
    k, v = (make(*narrow, key["kv"], key["head_dim"], dtype=key["dtype"]) for _ in range(2))
    causal, grouped = key["q"] > 1, key["heads"] != key["kv_heads"]
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped), (q, k, v)


def _attention_forward(key: Key, pool: Pool) -> Call:
    return _attention(key, pool)[0]


def _attention_backward(key: Key, pool: Pool) -> Call:
    forward, leaves = _attention(key, pool, leaf=True)
    return _backward(forward(), leaves)


def _backward(out: Tensor, inputs: tuple[Tensor, ...]) -> Call:
    gradient = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)


def _norm(key: Key, pool: Pool) -> Call:
    op, cols, dtype = key["op"].removesuffix(BACKWARD), key["cols"], key["dtype"]
    backward = key["op"].endswith(BACKWARD)
    make = pool.leaf if backward else pool.take
    x, w = make(key["rows"], cols, dtype=dtype), make(cols, dtype=dtype)
    if op == "layer_norm":
        b = make(cols, dtype=dtype)
        return _backward(F.layer_norm(x, (cols,), w, b), (x, w, b)) if backward else lambda: F.layer_norm(x, (cols,), w, b)
    return _backward(F.rms_norm(x, (cols,), w, 1e-6), (x, w)) if backward else lambda: F.rms_norm(x, (cols,), w, 1e-6)


def _pointwise(key: Key, pool: Pool) -> Call:
    op, dtype = key["op"], key["dtype"]
    x, *others = (pool.take(key["elements"], dtype=dtype) for _ in range(key["inputs"]))
    wide = torch.float32 if dtype != "fp32" else torch.bfloat16
    calls: dict[str, Call] = {
        "add": lambda: torch.add(x, others[0]),
        "mul": lambda: torch.mul(x, others[0]),
        "silu": lambda: F.silu(x),
        "gelu": lambda: F.gelu(x),
        "copy_cast": lambda: x.to(wide),
        "silu_backward": lambda: torch.ops.aten.silu_backward(others[0], x),
        "gelu_backward": lambda: torch.ops.aten.gelu_backward(others[0], x),
    }
    return calls[op]


def _cross_entropy(key: Key, pool: Pool) -> Call:
    backward = key["op"] == "backward"
    x = (pool.leaf if backward else pool.take)(key["rows"], key["cols"], dtype=key["dtype"])
    labels = torch.arange(key["rows"], device=x.device) % key["cols"]
    return _backward(F.cross_entropy(x.float(), labels), (x,)) if backward else lambda: F.cross_entropy(x.float(), labels)


def _optimizer(key: Key, pool: Pool) -> Call:
    parts = min(PARAMETERS, key["elements"])
    parameters = [pool.leaf(key["elements"] // parts, dtype=key["dtype"]) for _ in range(parts)]
    for p in parameters:
        p.grad = pool.take(len(p), dtype=key["dtype"])
    fused = key["op"] == "adamw_fused"
    return torch.optim.AdamW(parameters, lr=1e-4, fused=fused or None, foreach=None if fused else True).step


def _copy(key: Key, pool: Pool) -> Call:
    here = pool.take(key["bytes"] // 4, dtype="fp32")
    if key["op"] == "to_host":
        there = torch.empty(here.shape, pin_memory=True)
        return lambda: there.copy_(here, non_blocking=True)
    # never into the pool: zeros in it would make later products draw less power and run faster
    target = torch.empty_like(here)
    source = here if key["op"] == "device" else here.cpu().pin_memory()
    return lambda: target.copy_(source, non_blocking=True)


BUILDERS: dict[str, Callable[[Key, Pool], Call]] = {
    "gemm": _gemm, "batched_gemm": _batched_gemm, "grouped_gemm": _grouped_gemm,
    "attention_context": _attention_forward, "attention_generation": _attention_forward, "attention_backward": _attention_backward,
    "norm": _norm, "pointwise": _pointwise, "cross_entropy": _cross_entropy, "optimizer": _optimizer, "copy": _copy,
}  # fmt: skip


def calibrate(device: torch.device, dtypes: tuple[str, ...]) -> tuple[dict[str, float], float]:
    """FLOP/s of a square product by dtype and bytes/s of a copy: what sizes the samples. A dtype without a product gets 1 % of the best."""
    clock, flops = Clock(device), {}
    side = 4096 if device.type == "cuda" else 256
    pool = Pool(device, 4 * (2 * side * side + 32))
    for dtype in dtypes:
        key = {"m": side, "n": side, "k": side, "dtype": dtype}
        try:
            flops[dtype] = 2.0 * side**3 / clock.estimate(build("gemm", key, pool), 0.5, 12)
        except (RuntimeError, NotImplementedError):
            flops[dtype] = 0.0
    best = max(flops.values())
    size = (256 if device.type == "cuda" else 16) << 20
    source, target = torch.zeros(size, dtype=torch.int8, device=device), torch.zeros(size, dtype=torch.int8, device=device)
    bandwidth = 2.0 * size / clock.estimate(lambda: target.copy_(source), 0.5, 12)
    return {d: f or 0.01 * best for d, f in flops.items()}, bandwidth
