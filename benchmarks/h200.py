"""One GPU: a measured profile, then real training steps. Needs torch, numpy, PyYAML and pydantic alone.

    python benchmarks/h200.py [--out DIR] [--budget 300s] [--step-budget 300s]     # DIR defaults to $OUT, or .
    python benchmarks/h200.py --tiny                                               # a smoke test on a CPU

Writes DIR/profile.yaml (see `meshwright profile measure`) and DIR/steps.yaml: Llama-like and GPT-like models of plain modules, several
widths, microbatches and sequence lengths, with and without recompute, parameters in bf16 or bf16 autocast over fp32, fused AdamW:
median seconds of a step and of its forward, backward and optimizer, spread, and peak memory as allocated and as reserved. Depth is
cut to what fits; `layers` is in the row. Rows that do not fit say so. steps.yaml is rewritten after every row.

Not run yet on a GPU: only --tiny, on a CPU, where memory is not measured.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from meshwright.profiling.errors import InputError
from meshwright.profiling.files import write_atomically
from meshwright.profiling.measure import measure, parse_budget, summary
from meshwright.profiling.measure_host import host, invocation
from meshwright.profiling.measure_progress import progress_bar


@dataclass(frozen=True)
class Size:
    """The widths of a decoder."""

    family: str  # llama or gpt
    hidden: int
    inter: int
    heads: int
    kv_heads: int
    vocab: int
    layers: int

    @property
    def parameters(self) -> int:
        kv = self.hidden // self.heads * self.kv_heads
        matrices = 3 if self.family == "llama" else 2
        return self.layers * (self.hidden * (2 * self.hidden + 2 * kv) + matrices * self.hidden * self.inter) + 2 * self.vocab * self.hidden


@dataclass(frozen=True)
class Case:
    """One measurement: a size, and how it is trained."""

    name: str
    size: Size
    micro_batch: int
    seq: int
    recompute: bool
    precision: str  # bf16: everything; autocast: fp32 parameters, bf16 products

    @property
    def title(self) -> str:
        return f"{self.name} b{self.micro_batch} s{self.seq} {self.precision}{' recompute' if self.recompute else ''}"


SIZES = {
    "llama-1b": Size("llama", 2048, 8192, 32, 8, 128256, 16),
    "llama-8b, 8 of 32 layers": Size("llama", 4096, 14336, 32, 8, 128256, 8),
    "llama-70b, 2 of 80 layers": Size("llama", 8192, 28672, 64, 8, 32000, 2),
    "gpt-1.3b": Size("gpt", 2048, 8192, 16, 16, 50304, 24),
    "gpt-13b, 8 of 40 layers": Size("gpt", 5120, 20480, 40, 40, 50304, 8),
}
TINY = {"llama-tiny": Size("llama", 64, 128, 4, 2, 256, 2), "gpt-tiny": Size("gpt", 64, 256, 4, 4, 256, 2)}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves against each other. x [B, H, S, D], cos and sin [S, D]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Layer(nn.Module):
    """A pre-norm decoder layer: RMSNorm, rotary positions, grouped attention and SwiGLU; or LayerNorm, biases and GELU."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.llama, self.heads, self.kv_heads = size.family == "llama", size.heads, size.kv_heads
        h, kv = size.hidden, size.hidden // size.heads * size.kv_heads
        norm: Callable[[int], nn.Module] = nn.RMSNorm if self.llama else nn.LayerNorm
        self.norm1, self.norm2 = norm(h), norm(h)
        bias = not self.llama
        self.q, self.k, self.v, self.o = (nn.Linear(h, n, bias=bias) for n in (h, kv, kv, h))
        self.up, self.down = nn.Linear(h, size.inter, bias=bias), nn.Linear(size.inter, h, bias=bias)
        self.gate = nn.Linear(h, size.inter, bias=False) if self.llama else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (m(y).unflatten(-1, (n, -1)).transpose(1, 2) for m, n in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads)))
        if self.llama:
            q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y) if self.gate is not None else F.gelu(self.up(y)))


class Decoder(nn.Module):
    """Token (and for GPT position) embedding, layers, norm, head."""

    def __init__(self, size: Size, seq: int, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.embed = nn.Embedding(size.vocab, size.hidden)
        self.positions = nn.Embedding(seq, size.hidden) if size.family == "gpt" else None
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden) if size.family == "llama" else nn.LayerNorm(size.hidden)
        self.head = nn.Linear(size.hidden, size.vocab, bias=False)
        width = size.hidden // size.heads
        angles = torch.outer(torch.arange(seq).float(), 10000.0 ** -(torch.arange(0, width, 2).float() / width)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions.weight
        for layer in self.layers:
            x = checkpoint(layer, x, self.cos, self.sin, use_reentrant=False) if self.recompute else layer(x, self.cos, self.sin)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def cases(tiny: bool) -> Iterator[Case]:
    """Every size once, then its microbatches, sequences, recompute and precisions, so that a short budget has every size."""
    sizes = TINY if tiny else SIZES
    shapes = ((1, 32), (2, 32)) if tiny else ((1, 4096), (2, 4096), (4, 4096), (8, 2048), (1, 16384), (8, 4096), (2, 1024))
    ways = ((False, "bf16"), (True, "bf16"), (False, "autocast"), (True, "autocast"))
    for i, (micro_batch, seq) in enumerate(shapes):
        for recompute, precision in ways if i < 2 or not tiny else ways[:1]:
            for name, size in sizes.items():
                yield Case(name, size, micro_batch, seq, recompute, precision)


def run(case: Case, device: torch.device, steps: int, limit_s: float) -> dict[str, Any]:
    """A row of results: medians over `steps` steps, fewer where they take more than `limit_s` seconds. OutOfMemoryError if it does not fit."""
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    autocast = case.precision == "autocast"
    with device:
        model = Decoder(case.size, case.seq, case.recompute)
        tokens = torch.randint(0, case.size.vocab, (case.micro_batch, case.seq + 1))
    if not autocast:
        model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)

    def step(parts: bool = False) -> list[float]:
        """Seconds of a step; with `parts` of forward with the loss, backward, and optimizer with zeroing, each waited for."""
        times = [_now(device)]
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        del logits
        if parts:
            times.append(_now(device))
        loss.backward()
        if parts:
            times.append(_now(device))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(_now(device))
        return [float(x) for x in np.diff(times)]

    warm = [step() for _ in range(3)]
    steps = int(np.clip(limit_s / max(sum(warm[-1]), 1e-6), 3, steps))
    low, middle, high = np.percentile([step()[0] for _ in range(steps)], [25, 50, 75])
    forward, backward, update = np.median([step(parts=True) for _ in range(3)], axis=0)
    row = {
        "step_s": float(middle), "spread": float((high - low) / 2 / middle), "forward_s": float(forward), "backward_s": float(backward),
        "optimizer_s": float(update), "steps": steps, "tokens_per_s": case.micro_batch * case.seq / float(middle),
    }  # fmt: skip
    if cuda:
        row |= {"peak_allocated_bytes": torch.cuda.max_memory_allocated(device), "peak_reserved_bytes": torch.cuda.max_memory_reserved(device)}
        free, total = torch.cuda.mem_get_info(device)
        row["used_bytes"] = total - free
    return row


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def steps(out: Path, device: torch.device, budget_s: float, count: int, tiny: bool) -> list[dict[str, Any]]:
    """Runs the cases within the budget; writes out/steps.yaml after each."""
    head = {"format": "meshwright.steps/1", "host": host(device), **invocation(), "software": "eager, SDPA, fused AdamW, one device"}
    rows: list[dict[str, Any]] = []
    planned = list(cases(tiny))
    started = time.monotonic()
    for i, case in enumerate(planned):
        if time.monotonic() - started > budget_s:
            print(f"the budget is used up after {i} of {len(planned)} cases", file=sys.stderr)
            break
        row = {"name": case.name, **asdict(replace(case, name="").size), "parameters": case.size.parameters}
        row |= {"micro_batch": case.micro_batch, "seq": case.seq, "recompute": case.recompute, "precision": case.precision}
        try:
            row |= run(case, device, count, budget_s / 20)
        except torch.OutOfMemoryError:
            row["does_not_fit"] = True
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        rows.append(row)
        said = "does not fit" if "does_not_fit" in row else f"{row['step_s'] * 1e3:.1f} ms, {row.get('peak_allocated_bytes', 0) / 2**30:.2f} GiB"
        print(f"{case.title}: {said}", flush=True)
        write_atomically(out / "steps.yaml", yaml.safe_dump({**head, "rows": rows}, sort_keys=False, width=150))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="the folder to write into")
    parser.add_argument("--budget", default="", help="for the profile; 300s, or 5s with --tiny; 0 to leave it out")
    parser.add_argument("--step-budget", default="", help="for the training steps; 300s, or 20s with --tiny")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of a case, at most")
    parser.add_argument("--tiny", action="store_true", help="tiny models on whatever device is here: a smoke test")
    args = parser.parse_args()
    try:
        if not (args.tiny or torch.cuda.is_available()):
            raise InputError("torch finds no GPU here; --tiny runs a smoke test on a CPU")
        if not args.out.is_dir():
            raise InputError(f"--out {args.out} is not a folder")
        step_budget = parse_budget(args.step_budget or ("20s" if args.tiny else "300s"))
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        if args.budget != "0":
            with progress_bar() as say:
                found = measure(args.out / "profile.yaml", parse_budget(args.budget or ("5s" if args.tiny else "300s")), None, "auto", say)
            print("\n".join(summary(found)), flush=True)
            if device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
        steps(args.out, device, step_budget, args.steps, args.tiny)
    except InputError as e:
        sys.exit(f"h200: {e}")


if __name__ == "__main__":
    main()
