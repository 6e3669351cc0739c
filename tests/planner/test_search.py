"""The branch-and-bound search against brute force over every layout and every cut into stages."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from conftest import SEQ, TINY
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from meshwright.costmodel.sharded import ShardedBlock
from meshwright.planner import space as space_module
from meshwright.planner.plan import Workload
from meshwright.planner.search import Search
from meshwright.planner.sharding import NotShardable
from meshwright.planner.shardedmodel import shard_model
from meshwright.planner.space import Space
from meshwright.profiling.cluster import Achieved, Cluster, Link, Links, Node, load_device
from meshwright.profiling.graph import Amount, Block, ModelGraph, Occurrence, Work
from meshwright.profiling.trace import trace

HEAVIER = 3.0
TIE = 1e-9  # relative: sums of the same numbers in another order


def heavier(block: Block, new_id: int) -> Block:
    """A layer that works, moves and saves more than its like, so that stages are uneven."""

    def more(a: Amount) -> Amount:
        return Amount(const=a.const * HEAVIER, per_sample=a.per_sample * HEAVIER)

    def work(w: Work) -> Work:
        return w.model_copy(update={"flops": more(w.flops), "bytes": more(w.bytes), "launches": w.launches * 3})

    ops = tuple(op.model_copy(update={"forward": work(op.forward), "backward": work(op.backward), "saved": more(op.saved)}) for op in block.ops)
    storages = tuple(s.model_copy(update={"amount": more(s.amount)}) for s in block.storages)
    return block.model_copy(update={"id": new_id, "ops": ops, "storages": storages})


@pytest.fixture(scope="module")
def two_kinds(tiny_llama: ModelGraph) -> ModelGraph:
    """The tiny Llama with a second, heavier kind of layer as its last block."""
    layer = next(b for b in tiny_llama.blocks if b.repeated)
    return tiny_llama.model_copy(update={"blocks": (*tiny_llama.blocks, heavier(layer, len(tiny_llama.blocks)))})


@pytest.fixture(scope="module")
def shardings(two_kinds: ModelGraph) -> dict[tuple[int, bool], tuple[ShardedBlock, ...]]:
    """The blocks sharded once: how layers are sharded depends on neither the cluster nor their number."""
    return {(tp, sp): shard_model(two_kinds, tp, sp) for tp in (1, 2, 4) for sp in (False, True) if tp > 1 or not sp}


@pytest.fixture(scope="module")
def two_kinds_tied(tmp_path_factory: pytest.TempPathFactory) -> ModelGraph:
    """The like in bf16, whose head is its embedding."""
    path = tmp_path_factory.mktemp("models") / "tied.json"
    config = LlamaConfig(**TINY, tie_word_embeddings=True)
    config.architectures = ["LlamaForCausalLM"]
    path.write_text(json.dumps(config.to_dict(), default=str))
    graph = trace(str(path), seq=SEQ, precision="bf16")
    layer = next(b for b in graph.blocks if b.repeated)
    return graph.model_copy(update={"blocks": (*graph.blocks, heavier(layer, len(graph.blocks)))})


@pytest.fixture(scope="module")
def shardings_tied(two_kinds_tied: ModelGraph) -> dict[tuple[int, bool], tuple[ShardedBlock, ...]]:
    return {(tp, sp): shard_model(two_kinds_tied, tp, sp) for tp in (1, 2, 4) for sp in (False, True) if tp > 1 or not sp}


def with_layers(graph: ModelGraph, heavy: list[bool]) -> ModelGraph:
    """The graph with these layers, each the light or the heavy kind, between its stem and its head."""
    light = next(b.id for b in graph.blocks if b.repeated)
    first, last = graph.sequence[0], graph.sequence[-1]
    layers = [Occurrence(block=len(graph.blocks) - 1 if h else light, path=f"model.layers.{i}") for i, h in enumerate(heavy)]
    return graph.model_copy(update={"sequence": (first, *layers, last)})


def space_of(
    graph: ModelGraph, cluster: Cluster, workload: Workload, fix: dict[str, Any], shardings: dict[tuple[int, bool], tuple[ShardedBlock, ...]]
) -> Space:
    """The space with shardings that are already made."""

    def shard(_: ModelGraph, tp: int, sp: bool) -> tuple[ShardedBlock, ...]:
        if (tp, sp) not in shardings:
            raise NotShardable(f"4 key-value heads are not divisible by {tp}")
        return shardings[tp, sp]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(space_module, "shard_model", shard)
        return Space(graph, cluster, workload, fix)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """One to two nodes of one to four devices, with random rates, links and latencies."""

    def link() -> Link:
        return Link(bandwidth_Bps=draw(st.sampled_from([1e8, 1e9, 2e10, 4e11])), latency_s=draw(st.sampled_from([0.0, 1e-6, 1e-4])))

    device = load_device("H100-SXM").model_copy(
        update={
            "memory_bandwidth_Bps": draw(st.sampled_from([1e9, 1e11, 3e12])),
            "peak_flops": dict.fromkeys(("fp32", "bf16"), draw(st.sampled_from([1e10, 1e12, 6e13]))),
            "reserved_bytes": draw(st.sampled_from([0.0, 1e6])),
            "allocator_overhead": draw(st.sampled_from([0.0, 0.03])),
            "achieved": Achieved(launch_s=draw(st.sampled_from([0.0, 4e-6]))),
        }
    )
    node = Node(device=device, devices=draw(st.sampled_from([1, 2, 4])), count=draw(st.sampled_from([1, 2])))
    return Cluster(nodes=(node,), links=Links(node=link(), network=link()))


FIXES: list[dict[str, Any]] = [{}, {}, {}, {"zero": 3}, {"recompute": "full"}, {"micro_batch": 1}, {"tp": 1}, {"zero": 0, "recompute": "none"}]


def every_cut(search: Search, i: int) -> list[tuple[float, float]]:
    """(step seconds, live bytes of the fullest stage) of every cut of layout i into contiguous stages of at least one layer."""
    stages, layout = search.stages(i), search.layouts[i]
    layers = len(search.space.graph.layers)
    microbatches = search.space.workload.global_batch // (layout.dp * layout.micro_batch)
    cost = {
        (a, b, s): stages.cost(a, b, s)
        for s in range(layout.pp)
        for a in ([0] if s == 0 else range(s, layers))
        for b in ([layers] if s == layout.pp - 1 else range(a + 1, layers))
    }
    out = []
    for cuts in combinations(range(1, layers), layout.pp - 1):
        edges = [0, *cuts, layers]
        costs = [cost[edges[s], edges[s + 1], s] for s in range(layout.pp)]
        step = (microbatches - 1) * max(x.c for x in costs) + sum(x.c for x in costs) + max(x.e for x in costs)
        out.append((step, max(x.live_bytes for x in costs)))
    return out


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    cluster=clusters(), heavy=st.lists(st.booleans(), min_size=1, max_size=6), global_batch=st.sampled_from([4, 6, 8, 16]),
    fix=st.sampled_from(FIXES), tightness=st.floats(0, 1), top=st.integers(1, 4),
)  # fmt: skip
def test_search_equals_brute_force(
    two_kinds: ModelGraph, shardings: dict[tuple[int, bool], tuple[ShardedBlock, ...]], cluster: Cluster, heavy: list[bool],
    global_batch: int, fix: dict[str, Any], tightness: float, top: int,
) -> None:  # fmt: skip
    """The plan is the cheapest of all layouts and cuts that fit, and nothing that the search left out is better."""
    graph = with_layers(two_kinds, heavy)
    workload = Workload(global_batch=global_batch, seq=graph.seq, precision="fp32")
    space = space_of(graph, cluster, workload, fix, shardings)
    assume(next(space.enumerate(), None) is not None)  # a fix may leave nothing, like ZeRO on one device
    loose = Search(space, 1e15)
    table = [every_cut(loose, i) for i in range(len(loose.layouts))]
    lives = sorted(live for cuts in table for _, live in cuts)
    # from nothing fits (just below the least) to everything does
    live_limit = lives[min(int(tightness * len(lives)), len(lives) - 1)] * (1 + 1e-6) if tightness > 0.02 else lives[0] * 0.99
    device = cluster.device
    limit = live_limit * (1 + device.allocator_overhead) + device.reserved_bytes
    search = Search(space, limit)
    assert search.capacity == pytest.approx(np.full(len(table), live_limit), rel=TIE)

    best = [min((step for step, live in cuts if live <= room), default=None) for cuts, room in zip(table, search.capacity)]
    fits = sorted(b for b in best if b is not None)
    outcome = search.run(top)
    proof = outcome.certificate
    found = [c.step_s for c in outcome.best]
    assert found == pytest.approx(fits[:top], rel=TIE)
    assert proof.status == ("optimal" if fits else "infeasible")
    assert proof.space == len(table) == proof.pruned_by_memory + proof.pruned_by_bound + proof.evaluated
    for c in outcome.best:
        assert c.step_s == pytest.approx(best[c.index], rel=TIE)
        assert c.live_bytes <= search.capacity[c.index]
        assert search.reserved_bytes(c.index, c.live_bytes)[1] <= limit * (1 + TIE)
        assert (c.step_s, c.live_bytes) in [(pytest.approx(s, rel=TIE), pytest.approx(m, rel=TIE)) for s, m in table[c.index]]
    worst = found[-1] if found else float("inf")
    returned = {c.index for c in outcome.best}
    for i, b in enumerate(best):
        if search.memory_bounds[i] > search.capacity[i]:
            assert b is None, f"{search.layouts[i]} was pruned by memory and fits"
        if b is not None and i not in returned:
            assert b >= worst * (1 - TIE), f"{search.layouts[i]} was left out and is better"
    if fits:
        assert proof.bound_s <= fits[0] * (1 + TIE)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cluster=clusters(), heavy=st.lists(st.booleans(), min_size=1, max_size=6), global_batch=st.sampled_from([4, 8]), tied=st.booleans())
def test_bounds_hold_for_every_cut(
    two_kinds: ModelGraph, shardings: dict[tuple[int, bool], tuple[ShardedBlock, ...]], two_kinds_tied: ModelGraph,
    shardings_tied: dict[tuple[int, bool], tuple[ShardedBlock, ...]], cluster: Cluster, heavy: list[bool], global_batch: int, tied: bool,
) -> None:  # fmt: skip
    """No cut of any layout is faster than its step bound or smaller than its memory bound, and the least memory is found."""
    graph, shardings = (two_kinds_tied, shardings_tied) if tied else (two_kinds, shardings)
    graph = with_layers(graph, heavy)
    workload = Workload(global_batch=global_batch, seq=graph.seq, precision=graph.precision)
    search = Search(space_of(graph, cluster, workload, {}, shardings), 1e15)
    table = [every_cut(search, i) for i in range(len(search.layouts))]
    fastest = np.array([min(s for s, _ in cuts) for cuts in table])
    smallest = np.array([min(m for _, m in cuts) for cuts in table])
    assert (search.step_bounds <= fastest * (1 + TIE)).all()
    for i, (bound, least) in enumerate(zip(search.memory_bounds, smallest)):
        assert bound <= least * (1 + TIE), f"{search.layouts[i]}: bound {bound:.6g}, smallest cut {least:.6g}"
    _, live, _ = search.least_memory()
    assert live == pytest.approx(smallest.min(), rel=TIE)
