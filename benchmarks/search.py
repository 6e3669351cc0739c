"""How fast the planner proves its answers: seconds to gap 0, layouts priced a second, growth with devices and layers.

    python benchmarks/search.py [--only 8b,405b,deepseek,rate,growth,bubbles]

Tracing is told apart. Everything runs in this one process; ratios in one run are what to compare.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from meshwright.costmodel.pipeline import longest_stage, peak_in_flight, simulate_schedule
from meshwright.planner.plan import Workload
from meshwright.planner.search import Search
from meshwright.planner.solve import cost_model, parse_limit
from meshwright.planner.space import Space
from meshwright.profiling.cluster import parse_cluster
from meshwright.profiling.graph import ModelGraph, Occurrence
from meshwright.profiling.trace import trace

MODELS = Path(__file__).parent.parent / "examples" / "models"
CASES = {  # model, cluster, global batch, seconds asked for
    "8b": ("llama-3.1-8b", "8xH100-SXM", 64, 2.0),
    "70b": ("llama-3.1-70b", "8x8xH100-SXM", 512, 10.0),
    "405b": ("llama-3.1-405b", "2048x8xH100-SXM", 2048, 10.0),
    "deepseek": ("deepseek-v3", "256x8xH100-SXM", 4096, 10.0),
}
SEQ = 4096


def search_of(graph: ModelGraph, cluster: str, batch: int) -> tuple[Search, float]:
    """A search, and the seconds that sharding and pricing took."""
    started = time.perf_counter()
    where = parse_cluster(cluster)
    space = Space(graph, where, Workload(global_batch=batch, seq=SEQ), {}, cost_model("auto", where))
    return Search(space, parse_limit("95%", where.device.memory_bytes)), time.perf_counter() - started


def with_layers(graph: ModelGraph, times: int) -> ModelGraph:
    """The model with each of its layers so many times."""
    out: list[Occurrence] = []
    for o in graph.sequence:
        out += [o] * (times if graph.blocks[o.block].repeated else 1)
    return graph.model_copy(update={"sequence": tuple(out)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="8b,70b,405b,deepseek,rate,growth,bubbles")
    only = parser.parse_args().only.split(",")
    graphs: dict[str, ModelGraph] = {}
    head = f"{'model':<16}{'devices':>8}{'trace s':>9}{'shard s':>9}{'search s':>10}{'total s':>9}{'asked':>7}{'gap':>7}"
    head += f"{'space':>13}{'priced':>10}{'evaluated':>11}  best"
    if set(CASES) & set(only):
        print(head)
    for name, (model, cluster, batch, asked) in CASES.items():
        if not {name, *(("rate", "growth") if name in ("8b", "405b") else ())} & set(only):
            continue
        started = time.perf_counter()
        graphs[name] = trace(str(MODELS / f"{model}.json"), seq=SEQ, precision="bf16")
        traced = time.perf_counter() - started
        if name not in only:
            continue
        search, setup = search_of(graphs[name], cluster, batch)
        started = time.perf_counter()
        outcome = search.run(1)
        took, c = time.perf_counter() - started, outcome.certificate
        print(
            f"{model:<16}{search.space.cluster.size:>8,}{traced:>9.1f}{setup:>9.2f}{took:>10.2f}{setup + took:>9.2f}{asked:>7.0f}{c.gap:>7.1%}"
            f"{c.space:>13,}{c.priced:>10,}{c.evaluated:>11,}  {outcome.best[0].layout}"
        )
    if "rate" in only:
        rate(graphs["405b"])
    if "growth" in only:
        growth(graphs["8b"], graphs["405b"])
    if "bubbles" in only:
        bubbles()


def rate(graph: ModelGraph) -> None:
    """Layouts a second: step bound, memory bound and the bound under memory of every layout of part of a space."""
    search, _ = search_of(graph, "2048x8xH100-SXM", 2048)
    rows = np.arange(0, len(search.degrees), 4)
    print("\nLayouts a second (a quarter of the 405B space, each with a bound on its step and whether it may fit)")
    for name, refine in (("priced: seconds and bytes of every block", False), ("and bounded under memory over all cuts and recompute", True)):
        started, n = time.perf_counter(), 0
        for part in np.array_split(rows, 16):
            x, origin, _ = search.expand(part)
            full = search.finish(x, origin)
            p = search.bound.price(full)
            _, slowest, _ = search.bounds.step(full, p)
            capacity = search.capacity(full)
            fits = search.bounds.live(full, p) <= capacity
            if refine:
                keep = np.flatnonzero(fits)
                search.bounds.relaxed(full.take(keep), p.take(keep), capacity[keep], slowest[keep])
            n += len(full)
        took = time.perf_counter() - started
        print(f"  {name:<56}{n:>9,} layouts in {took:5.2f} s: {n / took:>10,.0f} a second")
    started, n = time.perf_counter(), 0
    x, origin, _ = search.expand(rows[len(rows) // 2 : len(rows) // 2 + 1])
    full = search.finish(x, origin)
    for i in range(0, len(full), max(1, len(full) // 40)):
        search.evaluate(full.take(slice(i, i + 1)))
        n += 1
    took = time.perf_counter() - started
    print(f"  {'solved exactly: best cut and recompute of one layout':<56}{n:>9,} layouts in {took:5.2f} s: {n / took:>10,.0f} a second")


def growth(small: ModelGraph, large: ModelGraph, repeats: int = 3) -> None:
    """Seconds of the search as devices or layers double, the least of a few runs."""

    def least(graph: ModelGraph, cluster: str, batch: int) -> tuple[float, int]:
        times, size = [], 0
        for _ in range(repeats):
            search, setup = search_of(graph, cluster, batch)
            started = time.perf_counter()
            search.run(1)
            times.append(setup + time.perf_counter() - started)
            size = search.size
        return min(times), size

    print("\nGrowth of the whole search (sharding, pricing, proof) when devices double")
    before = None
    for nodes in (256, 512, 1024, 2048, 4096):
        took, size = least(large, f"{nodes}x8xH100-SXM", 2048)
        print(f"  405B on {nodes * 8:>6,} devices: {took:6.2f} s, {size:>10,} layouts{'' if before is None else f'   x{took / before:.2f}'}")
        before = took
    print("Growth when layers double")
    before = None
    for times in (1, 2, 4, 8):
        took, size = least(with_layers(small, times), "16x8xH100-SXM", 512)
        ratio = "" if before is None else f"   x{took / before:.2f}"
        print(f"  8B with {32 * times:>4} layers on 128 devices: {took:6.2f} s, {size:>10,} layouts{ratio}")
        before = took


def bubbles() -> None:
    """Idle time of the longest stage with F = B = W = 1 and no transfers, and the microbatches that a rank holds."""
    print("\nBubble of schedules with F = B = W = 1, m = 4 p microbatches (Qi et al. 2023: 1F1B 3(p - 1), p - 1 at memory p, none at 2p)")
    for p in (4, 8, 16):
        m, one = 4 * p, [1.0] * p
        row = []
        for schedule in ("1F1B", "ZB-1p", "ZB-2p"):
            events = simulate_schedule(schedule, one, one, one, 0.0, m)
            row.append(f"{schedule} {longest_stage(events) - 3 * m:g} (memory {max(peak_in_flight(events)):g})")
        print(f"  p = {p:<3} {', '.join(row)}")


if __name__ == "__main__":
    main()
