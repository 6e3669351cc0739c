"""How fast a cost model answers: op evaluations a second on one core, and milliseconds to open.

    python benchmarks/op_rate.py [H100-SXM | file.costs] [--calls 1000000] [--json]

Prints, for each class, calls a second of the fast estimate (the one for an inner loop) and of the full one, over random shapes that do
not repeat, and the time to open the file and to read a class's residual on first use.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from meshwright.costmodel.model import CostModel


def shapes(kind: str, n: int, rng: np.random.Generator) -> dict[str, np.ndarray | str | float]:
    """Random calls of a class."""

    def sizes(low: float, high: float) -> np.ndarray:
        return np.rint(2 ** rng.uniform(np.log2(low), np.log2(high), n))

    if kind == "gemm":
        return {"dtype": "bf16", "m": sizes(1, 32768), "n": sizes(64, 65536), "k": sizes(64, 65536)}
    heads = sizes(4, 64)
    common = {"dtype": "bf16", "batch": sizes(1, 64), "heads": heads, "kv_heads": np.maximum(1, np.rint(heads / 4)), "head_dim": 128.0}
    if kind == "attention_context":
        return {**common, "q": sizes(128, 16384)}
    return {**common, "q": 1.0, "kv": sizes(128, 65536)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", nargs="?", default="H100-SXM")
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    import lightgbm  # noqa: F401 - its own import is not the model's

    opened = []
    for _ in range(5):
        start = time.perf_counter()
        model = CostModel.load(args.model)
        opened.append(time.perf_counter() - start)
    rng = np.random.default_rng(0)
    rows = []
    for kind in ("gemm", "attention_context", "attention_generation"):
        if kind not in model.classes:
            continue
        calls = shapes(kind, args.calls, rng)
        few = {k: v[:1] if isinstance(v, np.ndarray) else v for k, v in calls.items()}
        start = time.perf_counter()
        model.seconds(kind, **few)
        first = time.perf_counter() - start
        model.seconds(kind, fast=True, **few)
        rate = {}
        for fast, n in ((True, args.calls), (False, args.calls // 10)):
            part = {k: v[:n] if isinstance(v, np.ndarray) else v for k, v in calls.items()}
            best = min(_timed(model, kind, fast, part) for _ in range(3))
            rate[fast] = n / best
        rows.append({"class": kind, "fast_per_s": rate[True], "full_per_s": rate[False], "first_call_ms": 1e3 * first})
    result = {"model": model.device, "open_ms": 1e3 * min(opened), "classes": rows}
    if args.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    print(f"{model.device}: opens in {result['open_ms']:.1f} ms")
    print(f"{'class':24} {'fast calls/s':>14} {'full calls/s':>14} {'first call, ms':>15}")
    for r in rows:
        print(f"{r['class']:24} {r['fast_per_s']:14,.0f} {r['full_per_s']:14,.0f} {r['first_call_ms']:15.1f}")


def _timed(model: CostModel, kind: str, fast: bool, calls: dict[str, np.ndarray | str | float]) -> float:
    start = time.perf_counter()
    model.seconds(kind, fast=fast, **calls)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
