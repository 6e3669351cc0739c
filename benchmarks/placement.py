"""What a rank order found for a cluster with slow links saves, by the closed form and by the event simulator.

    python benchmarks/placement.py [--seconds 10] [-o benchmarks/results/placement.txt]

A Llama-like model of 8 billion parameters (32 layers, hidden size 4096) trains with 8192 tokens a microbatch, 16 microbatches, 1F1B,
ZeRO 1 and sequence-parallel TP, on nodes of 8 devices whose pairwise bandwidths are given: 360 GB/s in a node, 40 GB/s between. `closed
form` is what the search minimises; the simulator runs every replica's pipeline with the transfers and tensor-parallel collectives of its
own devices, and adds the slowest data-parallel group. `bound` and `gap` are of the closed form; `sim/bound` is the found order's
simulated step over the bound.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from meshwright.costmodel import collectives
from meshwright.costmodel.pipeline import makespan, simulate_schedule
from meshwright.planner.placement import GroupTraffic, Placement, Traffic, apply_order, border_seconds, place
from meshwright.profiling.cluster import Cluster, Node

INSIDE_BPS, BETWEEN_BPS = 3.6e11, 4e10
LAYERS, HIDDEN, TOKENS, MICROBATCHES, PARAMETERS, FLOPS = 32, 4096, 8192, 16, 8e9, 4e14
ACTIVATION = 2.0 * TOKENS * HIDDEN
SLOW = 4.0  # a slow link has a quarter of the bandwidth
Edit = Callable[[np.ndarray], None]


def measured(nodes: int, noise: float = 0.0, *edits: Edit) -> Cluster:
    """Nodes of 8 with a bandwidth for every pair: noise is lognormal, equal in both directions."""
    home = np.repeat(np.arange(nodes), 8)
    m = np.where(home[:, None] == home, INSIDE_BPS, BETWEEN_BPS)
    m = m * np.exp(np.tril(np.random.default_rng(0).normal(0, noise, m.shape), -1))
    m = np.tril(m) + np.tril(m, -1).T
    for edit in edits:
        edit(m)
    return Cluster(nodes=(Node(device="H100-SXM", devices=8, count=nodes),), bandwidth_Bps=tuple(map(tuple, m.tolist())))


def slow_pairs(*pairs: tuple[int, int]) -> Edit:
    def edit(m: np.ndarray) -> None:
        for a, b in pairs:
            m[a, b] /= SLOW
            m[b, a] /= SLOW

    return edit


def slow_port(device: int) -> Edit:
    """A device whose network port is slow."""

    def edit(m: np.ndarray) -> None:
        others = np.arange(len(m)) // 8 != device // 8
        m[device, others] /= SLOW
        m[others, device] /= SLOW

    return edit


def slow_nodes(a: int, b: int) -> Edit:
    """Two nodes with a slow path between them."""

    def edit(m: np.ndarray) -> None:
        one, other = slice(8 * a, 8 * a + 8), slice(8 * b, 8 * b + 8)
        m[one, other] /= SLOW
        m[other, one] /= SLOW

    return edit


def work(pp: int, dp: int, tp: int) -> tuple[Traffic, float]:
    """Traffic of a layout, and seconds that a stage computes for one microbatch (forward and backward)."""
    slots = MICROBATCHES + pp - 1
    compute = 6 * PARAMETERS * TOKENS / FLOPS / (pp * tp)
    gathers = 4.0 * LAYERS / pp * slots  # of each op, forward and backward, in every slot of the pipeline
    held = PARAMETERS / (pp * tp)
    kinds = (
        GroupTraffic(("tp",), "all_gather", ACTIVATION, gathers), GroupTraffic(("tp",), "reduce_scatter", ACTIVATION, gathers),
        GroupTraffic(("dp", "cp"), "reduce_scatter", 4 * held), GroupTraffic(("dp", "cp"), "all_gather", 2 * held),
    )  # fmt: skip
    return Traffic((pp, dp, 1, tp), kinds, ACTIVATION / tp, 2.0, MICROBATCHES - 1.0, rest_s=slots * compute), compute


def simulated(cluster: Cluster, order: tuple[int, ...], traffic: Traffic, compute: float) -> float:
    """Seconds of a step: every replica's pipeline event by event, then the slowest data-parallel group of each kind."""
    mapped = apply_order(cluster, order)
    pp, dp, _, tp = traffic.shape
    ranks = np.arange(traffic.size).reshape(pp, dp, tp)
    slots = MICROBATCHES + pp - 1
    hops = border_seconds(cluster, traffic, order) if pp > 1 else np.zeros((dp, 0))
    slowest = 0.0
    for replica in range(dp):
        stages = []
        for stage in range(pp):
            group = mapped.group(ranks[stage, replica])
            sent = sum(k.times * float(collectives.seconds(k.op, k.nbytes, group)) for k in traffic.collectives[:2])
            stages.append(compute + sent / slots)
        forward, backward = [s / 3 for s in stages], [2 * s / 3 for s in stages]
        if pp == 1:
            slowest = max(slowest, MICROBATCHES * stages[0])
        else:
            events = simulate_schedule("1F1B", forward, backward, [0.0] * pp, hops[replica], MICROBATCHES, overlap_send=False)
            slowest = max(slowest, makespan(events))
    groups = [mapped.group(row) for row in np.moveaxis(ranks, 1, -1).reshape(-1, dp)]
    return slowest + sum(max(float(collectives.seconds(k.op, k.nbytes, g)) for g in groups) for k in traffic.collectives[2:])


CASES: list[tuple[str, Cluster, list[tuple[int, int, int]]]] = [
    ("2x8, no slow link", measured(2), [(4, 4, 1), (2, 4, 2)]),
    ("2x8, link 5-9 slow", measured(2, 0.0, slow_pairs((5, 9))), [(4, 4, 1)]),
    ("2x8, link 5-13 slow", measured(2, 0.0, slow_pairs((5, 13))), [(2, 4, 2), (2, 8, 1)]),
    ("2x8, link 7-8 slow", measured(2, 0.0, slow_pairs((7, 8))), [(1, 16, 1)]),
    ("2x8, link 0-1 slow (node)", measured(2, 0.0, slow_pairs((0, 1))), [(4, 4, 1), (2, 4, 2), (1, 8, 2)]),
    ("2x8, port of 5 slow", measured(2, 0.0, slow_port(5)), [(4, 4, 1), (2, 4, 2)]),
    ("2x8, 3 slow", measured(2, 0.0, slow_pairs((5, 9), (5, 13), (0, 1))), [(4, 4, 1), (2, 4, 2)]),
    ("2x8, 3 slow, noise 5 %", measured(2, 0.05, slow_pairs((5, 9), (5, 13), (0, 1))), [(4, 4, 1), (2, 4, 2)]),
    ("4x8, link 8-16 slow", measured(4, 0.0, slow_pairs((8, 16))), [(4, 8, 1), (4, 4, 2), (2, 4, 4)]),
    ("4x8, nodes 1-2 slow", measured(4, 0.0, slow_nodes(1, 2)), [(4, 8, 1), (4, 4, 2), (2, 4, 4)]),
    ("4x8, port of 9 slow", measured(4, 0.0, slow_port(9)), [(4, 8, 1), (4, 4, 2), (2, 4, 4)]),
    ("4x8, nodes 1-2, port, noise 5 %", measured(4, 0.05, slow_nodes(1, 2), slow_port(9)), [(4, 8, 1), (4, 4, 2), (2, 4, 4)]),
]


def row(name: str, cluster: Cluster, shape: tuple[int, int, int], seconds: float) -> tuple[str, Placement]:
    traffic, compute = work(*shape)
    began = time.perf_counter()
    p = place(cluster, traffic, seconds=seconds)
    took = time.perf_counter() - began
    default = simulated(cluster, tuple(range(cluster.size)), traffic, compute)
    found = simulated(cluster, p.order, traffic, compute)
    layout = " ".join(f"{a}={n}" for a, n in zip(("pp", "dp", "tp"), shape) if n > 1)
    moved = p.seconds - traffic.rest_s
    text = (
        f"{name:32} {layout:15} | {p.default_seconds:7.3f} {p.seconds:7.3f} {p.bound:7.3f} {100 * p.gap:5.2f} "
        f"{max(0.0, 100 * moved / max(p.bound - traffic.rest_s, 1e-12) - 100):6.1f} {saved(p.default_seconds, p.seconds):6.1f} | "
        f"{default:7.3f} {found:7.3f} {saved(default, found):6.1f} {found / p.bound:9.4f} | {took:5.2f} {p.method.split(',')[0]}"
    )
    return text, p


def saved(default: float, found: float) -> float:
    """Per cent, without a minus before zero."""
    return round(100 - 100 * found / default, 1) + 0.0


def main() -> None:
    args = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    args.add_argument("--seconds", type=float, default=10.0, help="of search for each row")
    args.add_argument("-o", type=Path, help="also write the table there")
    given = args.parse_args()
    lines = [
        f"{datetime.date.today()}, torch {torch.__version__}, python benchmarks/placement.py --seconds {given.seconds:g}",
        "8B model, 16 microbatches of 8192 tokens, 1F1B, ZeRO 1, SP; a slow link has a quarter of its bandwidth; seconds of a step;",
        "gap over the bound and saved against the default order in %; comm: the gap of what is sent alone",
        f"{'':32} {'':15} | {'closed form':^43} | {'simulator':^32} |",
        f"{'cluster':32} {'layout':15} | default   found   bound   gap   comm  saved | default   found  saved sim/bound | took method",
    ]
    print("\n".join(lines), flush=True)
    for name, cluster, shapes in CASES:
        for shape in shapes:
            lines.append(row(name, cluster, shape, given.seconds)[0])
            print(lines[-1], flush=True)
    if given.o:
        given.o.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
