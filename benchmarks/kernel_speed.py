"""Kernels against the memory's own bandwidth, torch.compile and eager, on one GPU.

    python benchmarks/kernel_speed.py [--model examples/models/llama-3.1-8b.json] [-o benchmarks/results/kernels.json]

`vocab-parallel cross-entropy` at 8192 rows x 131072 classes in bf16 makes three passes over the logits (read; read and write): its bound is
three times their bytes at the bandwidth that a copy of as many bytes reaches here, and the bar is 85 % of that. The generated kernels of
the model's layers run forward and backward beside torch.compile(mode="max-autotune") and eager code on the same inputs; the bar is 5 %
of the compiled time. Times are medians of repeated runs between CUDA events, with the cache flushed before each. Without a GPU it prints
what the bytes allow at the datasheet's bandwidth, and measures nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshwright.codegen.kernels.generate import traffic
from meshwright.codegen.kernels.load import load
from meshwright.codegen.kernels.recipe import SAVES, Recipe
from meshwright.codegen.kernels.regions import find
from meshwright.codegen.kernels.vocab_parallel import cross_entropy
from meshwright.codegen.runtime.loss import cross_entropy as eager_cross_entropy
from meshwright.costmodel.sharded import ShardedBlock
from meshwright.profiling.cluster import load_device
from meshwright.profiling.files import write_atomically
from meshwright.profiling.trace import trace

ROWS, CLASSES = 8192, 131072
LOSS_BAR, COMPILED_BAR = 0.85, 1.05
REPEATS, FLUSHED_BYTES = 20, 256 * 2**20  # more than any cache
Run = Callable[[], object]


def median_s(run: Run, prepare: Run = lambda: None) -> float:
    """Median seconds of a run on the GPU; `prepare` is not timed."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    found = []
    for i in range(REPEATS + 3):
        prepare()
        flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()  # type: ignore[no-untyped-call]
        run()
        end.record()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        if i >= 3:
            found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found)


def copy_Bps() -> float:
    """Bytes read and written a second by a copy as large as the logits."""
    x = torch.empty(ROWS * CLASSES, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / median_s(lambda: y.copy_(x))


def loss_rows(bandwidth: float) -> list[dict[str, Any]]:
    """The loss, fused and eager: forward and backward together."""
    base = torch.randn(ROWS, CLASSES, dtype=torch.bfloat16, device="cuda")
    labels = torch.randint(0, CLASSES, (ROWS,), device="cuda")
    bound = 3 * base.nbytes / bandwidth
    rows = []
    for name, function in (("kernel", cross_entropy), ("eager", eager_cross_entropy)):
        held: list[Tensor] = []

        def prepare(held: list[Tensor] = held) -> None:
            held[:] = [base.clone().requires_grad_()]

        def run(held: list[Tensor] = held, function: Any = function) -> None:
            function(held[0], labels).backward()

        torch.cuda.reset_peak_memory_stats()
        seconds = median_s(run, prepare)
        peak = torch.cuda.max_memory_allocated()
        rows.append({"case": f"cross-entropy {ROWS} x {CLASSES}", "how": name, "seconds": seconds, "of_bound": bound / seconds, "peak_bytes": peak})
    return rows


def recipes(model: str, seq: int) -> list[Recipe]:
    """Every distinct recipe of the model's layers, with each choice of what to keep."""
    graph = trace(model, seq=seq, precision="bf16")
    layers = [b for b in graph.blocks if b.repeated]
    found = [u.recipe for b in layers for r in find(ShardedBlock.whole(b)) for u in r.uses]
    return list(dict.fromkeys(r.model_copy(update={"save": save}) for r in found for save in SAVES[:2]))


def inputs_of(recipe: Recipe, batch: int) -> list[Tensor]:
    made = []
    for x in recipe.inputs:
        shape = (batch * x.shape[0], *x.shape[1:]) if x.over == "rows" and x.batched else x.shape
        t = torch.empty_strided(shape, x.strides, dtype=getattr(torch, x.dtype), device="cuda").normal_()
        made.append(t.requires_grad_(x.gradient))
    return made


def recipe_rows(recipe: Recipe, bandwidth: float, batch: int) -> list[dict[str, Any]]:
    """One recipe, fused, compiled and eager: forward and backward together."""
    module = load(recipe)
    tensors = inputs_of(recipe, batch)
    wanted = [t for t in tensors if t.requires_grad]
    bound = sum(traffic(recipe)) * batch / bandwidth
    compiled = torch.compile(module.formula, mode="max-autotune")
    rows = []
    for name, function in (("kernel", getattr(module, recipe.label)), ("compiled", compiled), ("eager", module.formula)):

        def run(function: Any = function) -> None:
            out = function(*tensors)
            out = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(out, wanted, [torch.ones_like(o) for o in out])

        seconds = median_s(run)
        rows.append({"case": f"{recipe.name} ({recipe.save})", "how": name, "seconds": seconds, "of_bound": bound / seconds})
    return rows


def bounds(device: str, model: str, seq: int) -> list[str]:
    """What the bytes allow at a datasheet's bandwidth."""
    bandwidth = load_device(device).memory_bandwidth_Bps
    lines = [f"bytes over the bandwidth of {device} ({bandwidth / 1e12:.2f} TB/s), nothing measured:"]
    three = 3 * ROWS * CLASSES * 2
    lines.append(f"  {f'cross-entropy {ROWS} x {CLASSES} bf16':44} {three / 1e9:8.2f} GB  {three / bandwidth * 1e3:7.3f} ms")
    for r in recipes(model, seq):
        moved = sum(traffic(r))
        lines.append(f"  {f'{r.name} ({r.save})':44} {moved / 1e9:8.2f} GB  {moved / bandwidth * 1e3:7.3f} ms")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/models/llama-3.1-8b.json")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="H100-SXM", help="whose bandwidth bounds are printed for, where there is no GPU")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no GPU here: kernels are not measured.")
        print("\n".join(bounds(args.device, args.model, args.seq)))
        return
    bandwidth = copy_Bps()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: a copy moves {bandwidth / 1e12:.2f} TB/s")
    rows = loss_rows(bandwidth)
    for recipe in recipes(args.model, args.seq):
        rows += recipe_rows(recipe, bandwidth, args.batch)
    for r in rows:
        print(f"  {r['case']:52} {r['how']:9} {r['seconds'] * 1e3:8.3f} ms  {r['of_bound']:6.1%} of the bound")
    times = {(r["case"], r["how"]): r["seconds"] for r in rows}
    slow = [c for c, how in times if how == "kernel" and (c, "compiled") in times and times[c, "kernel"] > COMPILED_BAR * times[c, "compiled"]]
    print(f"cross-entropy {'reaches' if rows[0]['of_bound'] >= LOSS_BAR else 'misses'} {LOSS_BAR:.0%} of the copy's bandwidth")
    print(f"slower than {COMPILED_BAR - 1:.0%} over torch.compile: {', '.join(slow) or 'none'}")
    if args.out is not None:
        head = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "copy_Bps": bandwidth}
        write_atomically(args.out, json.dumps({**head, "model": args.model, "seq": args.seq, "batch": args.batch, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
