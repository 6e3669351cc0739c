"""The branch-and-bound search against brute force over every layout, every cut into stages and every recompute."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations, product
from math import gcd
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny import SEQ, TINY
from transformers import LlamaConfig, MixtralConfig

from meshwright.costmodel import schedules
from meshwright.costmodel.layouts import SCHEDULES, SPLIT, V_SHAPED, Layouts
from meshwright.costmodel.sharded import ShardedBlock
from meshwright.planner.plan import Layout, Workload
from meshwright.planner.search import Search
from meshwright.planner.shardedmodel import shard_model
from meshwright.planner.sharding import NotShardable
from meshwright.planner.space import MOST_CHUNKS, Space, to_arrays
from meshwright.planner.stages import Choice, spreads
from meshwright.profiling.cluster import Achieved, Cluster, Host, Link, Links, Node, load_device
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import Amount, Block, ModelGraph, Occurrence, Work
from meshwright.profiling.trace import trace

HEAVIER = 3.0
TIE = 1e-9  # relative: sums of the same numbers in another order
DENSE: dict[tuple[int, bool], Any] = {}  # blocks sharded once: that depends on neither the cluster nor the number of layers
EXPERTS: dict[tuple[int, bool], Any] = {}
TIED: dict[tuple[int, bool], Any] = {}
GRAPHS: dict[str, ModelGraph] = {}


def heavier(block: Block, new_id: int) -> Block:
    """A layer that works, moves and saves more than its like, so that stages are uneven."""

    def more(a: Amount) -> Amount:
        return Amount(const=a.const * HEAVIER, per_sample=a.per_sample * HEAVIER)

    def work(w: Work) -> Work:
        return w.model_copy(update={"flops": more(w.flops), "bytes": more(w.bytes), "launches": w.launches * 3})

    ops = tuple(op.model_copy(update={"forward": work(op.forward), "backward": work(op.backward), "saved": more(op.saved)}) for op in block.ops)
    storages = tuple(s.model_copy(update={"amount": more(s.amount)}) for s in block.storages)
    return block.model_copy(update={"id": new_id, "ops": ops, "storages": storages})


def two_kinds_of(graph: ModelGraph) -> ModelGraph:
    """The graph with a second, heavier kind of layer as its last block."""
    layer = next(b for b in graph.blocks if b.repeated)
    return graph.model_copy(update={"blocks": (*graph.blocks, heavier(layer, len(graph.blocks)))})


def sharded(graph: ModelGraph) -> dict[tuple[int, bool], tuple[ShardedBlock, ...] | str]:
    found: dict[tuple[int, bool], tuple[ShardedBlock, ...] | str] = {}
    for tp in (1, 2, 4, 3, 6, 8):
        for sp in (False, True) if tp > 1 else (False,):
            try:
                found[tp, sp] = shard_model(graph, tp, sp)
            except NotShardable as e:
                found[tp, sp] = str(e)
    return found


def traced(folder: Any, name: str, config: Any, architecture: str, precision: str) -> ModelGraph:
    path = folder / f"{name}.json"
    config.architectures = [architecture]
    path.write_text(json.dumps(config.to_dict(), default=str))
    return two_kinds_of(trace(str(path), seq=SEQ, precision=precision))


@pytest.fixture(scope="module")
def dense(tiny_llama: ModelGraph) -> ModelGraph:
    graph = two_kinds_of(tiny_llama)
    DENSE.update(sharded(graph))
    return graph


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> ModelGraph:
    """In bf16, with a head that is its embedding."""
    config = LlamaConfig(**TINY, tie_word_embeddings=True)
    graph = traced(tmp_path_factory.mktemp("models"), "tied", config, "LlamaForCausalLM", "bf16")
    TIED.update(sharded(graph))
    return graph


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ModelGraph:
    """A mixture of four experts, in bf16."""
    config = MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2)
    graph = traced(tmp_path_factory.mktemp("models"), "experts", config, "MixtralForCausalLM", "bf16")
    EXPERTS.update(sharded(graph))
    return graph


def with_layers(graph: ModelGraph, heavy: list[bool]) -> ModelGraph:
    """The graph with these layers, each the light or the heavy kind, between its stem and its head."""
    light = next(b.id for b in graph.blocks if b.repeated)
    first, last = graph.sequence[0], graph.sequence[-1]
    layers = [Occurrence(block=len(graph.blocks) - 1 if h else light, path=f"model.layers.{i}") for i, h in enumerate(heavy)]
    return graph.model_copy(update={"sequence": (first, *layers, last)})


@st.composite
def clusters(draw: st.DrawFn, devices: tuple[int, ...] = (1, 2, 3, 4)) -> Cluster:
    """One to two nodes of one to four devices, with random rates, links and latencies; sometimes of two speeds and memories."""

    def link() -> Link:
        return Link(bandwidth_Bps=draw(st.sampled_from([1e8, 1e9, 2e10, 4e11])), latency_s=draw(st.sampled_from([0.0, 1e-6, 1e-4])))

    made = load_device("H100-SXM").model_copy(
        update={
            "memory_bandwidth_Bps": draw(st.sampled_from([1e9, 1e11, 3e12])),
            "peak_flops": dict.fromkeys(("fp32", "bf16"), draw(st.sampled_from([1e10, 1e12, 6e13]))),
            "reserved_bytes": draw(st.sampled_from([0.0, 1e6])),
            "allocator_overhead": draw(st.sampled_from([0.0, 0.03])),
            "achieved": Achieved(launch_s=draw(st.sampled_from([0.0, 4e-6]))),
        }
    )
    nodes = [Node(device=made, devices=draw(st.sampled_from(devices)), count=draw(st.sampled_from([1, 2])))]
    if draw(st.integers(0, 4)) == 0:
        slower = {"name": "slower", "peak_flops": {k: v / 2 for k, v in made.peak_flops.items()}, "memory_bytes": made.memory_bytes * 0.6}
        nodes.append(Node(device=made.model_copy(update=slower), devices=nodes[0].devices, count=1))
    host = Host(memory_bytes=1e12, bandwidth_Bps=draw(st.sampled_from([1e8, 2e10]))) if draw(st.booleans()) else None
    return Cluster(nodes=tuple(nodes), links=Links(node=link(), network=link()), host=host)


# Parts that are held, so that what is left is small enough to try every layout
FIXES: list[dict[str, Any]] = [
    {"schedule": "1f1b"}, {"zero": 3}, {"zero": 1, "cp": 1}, {"recompute": "full"}, {"recompute": "selective"}, {"recompute": "none"},
    {"micro_batch": 1}, {"tp": 1, "cp": 1}, {"cp": 2}, {"cp_kind": "ulysses", "micro_batch": 1}, {"schedule": "gpipe"},
    {"schedule": "interleaved"}, {"schedule": "zbv"}, {"schedule": "zero-bubble"}, {"schedule": "dualpipev"}, {"replicas": 2}, {"pp": 2},
    {"loss": "chunked"}, {"offload": "optimizer"}, {"state_dtype": "bf16"}, {"ep": 2}, {"etp": 2}, {"dp": 1}, {"pp": 1, "cp": 1}, {"vpp": 2},
]  # fmt: skip


def every_layout(space: Space) -> set[Layout]:
    """The layouts of a space from its rules alone, tried one by one over all degrees up to the number of devices."""
    g, n, w, fixed = space.graph, space.cluster.size, space.workload, space.fixed
    layers, seq, found = len(g.layers), g.seq, set()
    ops = [op for b in g.blocks for op in b.ops]
    number = gcd(*(op.dims["experts"] for op in ops if op.kind == "experts")) if any(op.kind == "experts" for op in ops) else 0
    heads, kv = TINY["num_attention_heads"], TINY["num_key_value_heads"]
    for (tp, sp), blocks in space.known.items():
        if isinstance(blocks, str) or n % tp or (number and tp > 1 and not sp and "sp" not in fixed):
            continue
        vocab = any(op.kind == "cross_entropy" and op.name in b.divided for b in blocks for op in b.block.ops)
        for cp, pp, mb in product(range(1, n + 1), range(1, min(n, layers) + 1), range(1, w.global_batch + 1)):
            dp = n // (tp * cp * pp)
            if not dp or tp * cp * pp * dp != n or w.global_batch % (dp * mb):
                continue
            m = w.global_batch // (dp * mb)
            if m < pp:
                continue
            kinds = ["ring"] if cp == 1 else []
            if cp > 1 and seq % (2 * cp * (tp if sp else 1)) == 0:
                kinds.append("ring")
            if cp > 1 and seq % (cp * (tp if sp else 1)) == 0 and heads // tp % cp == 0 and kv // tp % cp == 0:
                kinds.append("ulysses")
            pairs = [(e, t) for e in range(1, number + 1) for t in range(1, 9) if number % e == 0 and TINY["intermediate_size"] % t == 0]
            pairs = [(e, t) for e, t in pairs if tp * cp * dp % (e * t) == 0] if number else [(1, 1)]
            for kind, (ep, etp) in product(kinds, pairs):
                zeros = [(z, r) for z in range(4) for r in range(1, dp + 1) if dp % r == 0]
                zeros = [(z, r) for z, r in zeros if (r == 1 if z == 0 else dp * cp > 1 and (r == 1 or r < dp * cp))]
                zeros = [(z, r) for z, r in zeros if r == 1 or tp * cp * dp // (ep * etp) % r == 0]
                losses = ["vocab_parallel"] if vocab else ["plain", "chunked"] if tp == 1 else ["plain"]
                away = ["none", "optimizer"] if space.cluster.host else ["none"]
                pipes = []
                for name in SCHEDULES if pp > 1 else ("1f1b", "gpipe"):
                    s = schedules.find(name)
                    for v in range(1, MOST_CHUNKS + 1):
                        right = v == 1 if pp == 1 else s.vpp[0] <= v <= (s.vpp[1] or v) and pp * v <= layers and m >= s.least(pp)
                        right = right and not (pp > 1 and s.shape == "loop" and s.rounds and v > 1 and m % pp)
                        if right and not (name in ("gpipe", "looped-bfs") and fixed.get("schedule") != name):
                            pipes.append((name if pp > 1 else "1f1b", v))
                for (zero, r), loss, offload, (schedule, v) in product(zeros, losses, away, dict.fromkeys(pipes)):
                    if schedule in SPLIT and (zero >= 2 or fixed.get("recompute", "none") not in ("none", "by stage")):
                        continue
                    x = Layout(
                        tp=tp, sp=sp, cp=cp, cp_kind=kind, pp=pp, vpp=v, dp=dp, zero=zero, replicas=r, ep=ep, etp=etp, micro_batch=mb,  # type: ignore[arg-type]
                        schedule=schedule, loss=loss, state_dtype=fixed.get("state_dtype", "fp32"), offload=offload,  # type: ignore[arg-type]
                    )  # fmt: skip
                    ignored = {"recompute"} | ({"schedule"} if pp == 1 and fixed.get("schedule") in ("1f1b", "gpipe") else set())
                    ignored |= {"cp_kind"} if cp == 1 else set()
                    if all(getattr(x, k) == value for k, value in fixed.items() if k not in ignored):
                        found.add(x)
    return found


def every_cut(search: Search, layout: Layout) -> list[tuple[float, float]]:
    """(step seconds, live bytes over what a rank may hold, of the worst rank) of every cut and recompute of a layout."""
    x, ends = search.row(layout), search.ends
    p, n, pp = search.bound.price(x), len(search.ends.layers), layout.pp
    m = search.space.workload.global_batch // (layout.dp * layout.micro_batch)
    (sets, which), share = search._types(pp)
    capacity = float(search.capacity(x)[0]) * share
    cuts = [(*c, n) for c in combinations(range(1, n), pp - 1)] if layout.vpp == 1 else spreads(n, pp * layout.vpp)
    v = layout.schedule in V_SHAPED
    out = []
    for cut in cuts:
        spans = list(zip((0, *cut[:-1]), cut))
        held = [[spans[r], spans[2 * pp - 1 - r]] if v else spans[r::pp] for r in range(pp)]
        sizes = [sum(b - a for a, b in chunks) for chunks in held]
        options = [
            [Choice(0, 0), Choice(1, k), *(Choice(2, i) for i in range(1, k + 1))]
            if search.modes == (0, 1, 2) and layout.schedule not in SPLIT
            else [Choice(search.modes[0], k) if search.modes[0] in (1, 2) else Choice(0, 0)]
            for k in sizes
        ]
        for choices in product(*options):
            c, e = [], []
            for r, (chunks, choice) in enumerate(zip(held, choices)):
                layers = [i for a, b in chunks for i in range(a, b)]
                time, once = [], []
                for kind in sets[which[r]]:
                    seconds = p.c[kind, 0] + p.again[kind, 0]  # [3, blocks]
                    time.append({i: seconds[choice.mode if j < choice.layers else 0, ends.layers[i]] for j, i in enumerate(layers)})
                    once.append({i: p.once[kind, 0, ends.layers[i]] for i in layers})
                    if layers[0] == 0:
                        time[-1]["stem"], once[-1]["stem"] = seconds[0, ends.before].sum(), p.once[kind, 0, ends.before].sum()
                    if layers[-1] == n - 1:
                        time[-1]["head"], once[-1]["head"] = seconds[0, ends.after].sum(), p.once[kind, 0, ends.after].sum()
                sides = 0
                for a, b in chunks:
                    k = spans.index((a, b))
                    sides += sum(1 for other in (k - 1, k + 1) if 0 <= other < len(spans) and spans[other] not in chunks)
                c.append(sum(max(t[key] for t in time) for key in time[0]) + sides * p.send[0])
                e.append(sum(max(t[key] for t in once) for key in once[0]))
            ratio = float(p.ratio[0])
            step = (m - ratio) * max(c) + ratio * sum(c) + max(e)
            cost = search.stages(x).cost(cut, choices)
            assert [k.c for k in cost] == pytest.approx(c, rel=TIE)
            out.append((step, max(k.live_bytes - cap for k, cap in zip(cost, capacity))))
    return out


INSTANCE: dict[str, Any] = {
    "heavy": st.lists(st.booleans(), min_size=1, max_size=5), "global_batch": st.sampled_from([2, 4, 6, 8]), "fix": st.sampled_from(FIXES),
    "more": st.sampled_from(FIXES), "which": st.sampled_from(["dense", "dense", "tied", "experts"]),
}  # fmt: skip


def instance(
    which: str, cluster: Cluster, heavy: list[bool], global_batch: int, fix: dict[str, Any], limit: float
) -> Search | None:
    """A search, or None where the fix leaves no layout."""
    graph = with_layers(GRAPHS[which], heavy)
    workload = Workload(global_batch=global_batch, seq=graph.seq, precision=graph.precision)  # type: ignore[arg-type]
    known = {"dense": DENSE, "tied": TIED, "experts": EXPERTS}[which]
    try:
        return Search(Space(graph, cluster, workload, fix, known=known), limit)
    except InputError:
        return None


SMALLER = {**INSTANCE, "heavy": st.lists(st.booleans(), min_size=1, max_size=4)}


@pytest.fixture(scope="module", autouse=True)
def graphs(dense: ModelGraph, tied: ModelGraph, experts: ModelGraph) -> None:
    """Not an argument of the tests below: hypothesis would print it."""
    GRAPHS.update(dense=dense, tied=tied, experts=experts)


def best_of(search: Search) -> list[tuple[float, Layout]]:
    """Every layout's best step, cheapest first; the stages of each solved without a bound (test_stages.py tries every cut)."""
    out = []
    for layout in search.space.layouts():
        cut = search.stages(search.row(layout)).best()
        if cut is not None:
            out.append((cut.step_s, layout))
    return sorted(out, key=lambda x: x[0])


@settings(max_examples=440, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cluster=clusters(), tightness=st.floats(0, 1), top=st.integers(1, 4), **INSTANCE)
def test_search_equals_brute_force(
    which: str, cluster: Cluster, heavy: list[bool], global_batch: int, fix: dict[str, Any],
    more: dict[str, Any], tightness: float, top: int,
) -> None:  # fmt: skip
    """The plan is the cheapest of all layouts that fit, and the certificate adds up."""
    check_search(which, cluster, heavy, global_batch, {**more, **fix}, tightness, top, best_of)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cluster=clusters((1, 2)), tightness=st.floats(0, 1), top=st.integers(1, 3), **SMALLER)
def test_search_equals_brute_force_over_every_cut(
    which: str, cluster: Cluster, heavy: list[bool], global_batch: int, fix: dict[str, Any],
    more: dict[str, Any], tightness: float, top: int,
) -> None:  # fmt: skip
    """The same with the layouts, cuts and recompute of the brute force enumerated here, from the rules."""

    def enumerated(search: Search) -> list[tuple[float, Layout]]:
        layouts = every_layout(search.space)
        assert layouts == set(search.space.layouts())
        assert len(layouts) == search.size
        best = [(min((step for step, over in every_cut(search, x) if over <= 0), default=np.inf), x) for x in layouts]
        return sorted([b for b in best if b[0] < np.inf], key=lambda b: b[0])

    check_search(which, cluster, heavy, global_batch, {**more, **fix}, tightness, top, enumerated)


def check_search(
    which: str, cluster: Cluster, heavy: list[bool], global_batch: int, fix: dict[str, Any], tightness: float,
    top: int, brute: Callable[[Search], list[tuple[float, Layout]]],
) -> None:  # fmt: skip
    loose = instance(which, cluster, heavy, global_batch, fix, 1e15)
    assume(loose is not None and loose.size <= 80)  # a fix may leave nothing
    assert loose is not None
    lives = sorted(
        max(c.live_bytes for c in cut.costs) for x in loose.space.layouts() if (cut := loose.stages(loose.row(x)).best()) is not None
    )  # fmt: skip
    live_limit = lives[min(int(tightness * len(lives)), len(lives) - 1)] * (1 + 1e-6) if tightness > 0.02 else lives[0] * 0.3
    device = cluster.device
    search = instance(which, cluster, heavy, global_batch, fix, live_limit * (1 + device.allocator_overhead) + device.reserved_bytes)
    assert search is not None
    expected = brute(search)
    outcome = search.run(top)
    proof = outcome.certificate
    assert [c.step_s for c in outcome.best] == pytest.approx([s for s, _ in expected[:top]], rel=TIE)
    assert proof.status == ("optimal" if expected else "infeasible")
    assert proof.space == search.size == proof.pruned_by_memory + proof.pruned_by_bound + proof.evaluated
    assert proof.gap == 0.0
    for c in outcome.best:
        assert c.live_bytes <= float(search.capacity(c.row)[0]) * search._most_memory * (1 + TIE)
        again = search.stages(c.row).cost(c.cut.ends, c.cut.choices)
        assert [k.c for k in again] == pytest.approx([k.c for k in c.cut.costs], rel=TIE)
        assert [k.live_bytes for k in again] == pytest.approx([k.live_bytes for k in c.cut.costs], rel=TIE)
        row = to_arrays([c.layout], search.space.workload)
        assert all((getattr(row, f) == getattr(c.row, f)).all() for f in Layouts.__dataclass_fields__)
    if expected:
        assert proof.bound_s <= expected[0][0] * (1 + TIE)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cluster=clusters(), tightness=st.floats(0.02, 1.2), **INSTANCE)
def test_bounds_are_never_above_what_they_bound(
    which: str, cluster: Cluster, heavy: list[bool], global_batch: int, fix: dict[str, Any],
    more: dict[str, Any], tightness: float,
) -> None:  # fmt: skip
    """Of degrees, with ZeRO stages, and of whole layouts; with and without memory; and what is said not to fit does not."""
    search = instance(which, cluster, heavy, global_batch, {**more, **fix}, 1e15)
    assume(search is not None and search.size <= 80)
    assert search is not None
    layouts = list(search.space.layouts())
    cuts = [search.stages(search.row(x)).best() for x in layouts]
    limit = tightness * max(max(k.live_bytes for k in c.costs) for c in cuts if c is not None)
    tight = instance(which, cluster, heavy, global_batch, {**more, **fix}, limit)
    assert tight is not None
    solved = {x: tight.stages(tight.row(x)).best() for x in layouts}
    exact = {x: cut.step_s if cut is not None else np.inf for x, cut in solved.items()}
    rows = np.arange(len(tight.degrees))
    ratio = tight.bound.least_ratio(tight.degrees, tight.space.schedules)
    expanded, origin, below = tight.expand(rows)
    whole = tight.finish(expanded, origin)
    assert int(below.sum()) == len(layouts) == len(whole)

    def check(x: Layouts, ratios: np.ndarray | None, name: str, least: Callable[[int], float]) -> None:
        p = tight.bound.price(x, ratios)
        step, slowest, rest = tight.bounds.step(x, p)
        capacity = tight.capacity(x) * tight._most_memory
        peaks = tight.bounds.peaks(x, p) if name == "layout" else None
        relaxed = tight.bounds.relaxed(x, p, capacity, slowest, None, peaks)
        bound = np.where(np.isfinite(relaxed), (x.microbatches - p.ratio) * np.where(np.isfinite(relaxed), relaxed, 0) + rest, np.inf)
        bound = np.where(tight.bounds.live(x, p) <= capacity, np.maximum(bound, step), np.inf)
        for i in range(len(x)):
            assert bound[i] <= least(i) * (1 + TIE), f"{name} {i}: bound {bound[i]} over {least(i)}"

    keys = [f for f in Layouts.__dataclass_fields__ if f not in ("zero", "replicas", "schedule", "vpp", "loss", "state", "offload")]

    def under(x: Layouts, i: int, names: list[str]) -> float:
        same = np.ones(len(whole), bool)
        for name in names:
            same &= getattr(whole, name) == getattr(x, name)[i]
        return min((steps[j] for j in np.flatnonzero(same)), default=np.inf)

    from meshwright.planner.space import layout_of

    steps = [exact[layout_of(whole, j)] for j in range(len(whole))]
    check(whole, None, "layout", lambda i: steps[i])
    check(expanded, ratio[origin], "with ZeRO", lambda i: under(expanded, i, [*keys, "zero", "replicas"]))
    check(tight.degrees, ratio, "degrees", lambda i: under(tight.degrees, i, keys))


def test_the_search_is_deterministic_and_says_its_gap_when_stopped() -> None:
    cluster = Cluster(nodes=(Node(device="H100-SXM", devices=4, count=2),))
    search = instance("dense", cluster, [True, False, True, False, False], 8, {"pp": 4, "schedule": "1f1b"}, 7e10)
    assert search is not None
    first, again = search.run(3), search.run(3)
    assert [c.layout for c in first.best] == [c.layout for c in again.best]
    stopped = search.run(1, max_seconds=0.0).certificate
    assert stopped.status == "time limit"
    assert stopped.gap > 0
    assert stopped.open > 0
    assert stopped.space == stopped.pruned_by_memory + stopped.pruned_by_bound + stopped.evaluated + stopped.open
    assert stopped.bound_s <= first.best[0].step_s


def test_state_is_offloaded_only_where_the_host_has_room() -> None:
    def offloaded(host: float) -> bool:
        cluster = Cluster(nodes=(Node(device="H100-SXM", devices=2),), host=Host(memory_bytes=host, bandwidth_Bps=5e10))
        search = instance("dense", cluster, [False, True], 8, {"offload": "optimizer"}, 7e10)
        assert search is not None
        return bool(search.run(1).best)

    assert offloaded(1e9)
    assert not offloaded(1e3)
