"""Least memory, fewest devices, least cost and sweeps, each against solving everything there is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshwright.planner.frontier import (
    DAY,
    Frontier,
    Point,
    Target,
    TooSlow,
    check_asked,
    mark,
    of_size,
    parse_deadline,
    parse_sweep,
    parse_tokens,
    plan_for,
    sizes_of,
    sweep,
    too_small,
)
from meshwright.planner.leastmemory import TIE, LeastMemorySearch, least_memory
from meshwright.planner.plan import Plan, Workload
from meshwright.planner.search import Search
from meshwright.planner.solve import Infeasible, Inputs, prepare
from meshwright.planner.space import Space, to_arrays
from meshwright.profiling.cluster import Cluster, Node, load_device, parse_cluster
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.trace import trace

BARE: dict[str, Any] = {"reserved_bytes": 0.0, "allocator_overhead": 0.0}  # what a device takes is what is live


def cluster_of(devices: int, count: int = 1, memory_bytes: float = 80e9, **more: Any) -> Cluster:
    device = load_device("H100-SXM").model_copy(update={**BARE, "memory_bytes": memory_bytes, **more})
    return Cluster(name="made", nodes=(Node(device=device, devices=devices, count=count),))


@pytest.fixture(scope="module")
def inputs(tiny_llama: ModelGraph) -> Inputs:
    """The tiny Llama on up to two nodes of four."""
    return prepare(tiny_llama, cluster_of(4, 2), global_batch=8, seq=32, precision="fp32", costs=None, limit="100%")


@pytest.fixture(scope="module")
def bf16(tiny_llama_config: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelGraph:
    """The tiny Llama in bf16 with many words: most of its bytes are outside the layers."""
    path = tmp_path_factory.mktemp("models") / "words.json"
    path.write_text(json.dumps(json.loads(tiny_llama_config.read_text()) | {"vocab_size": 4096}))
    return trace(str(path), seq=32, precision="bf16")


def with_memory(inputs: Inputs, memory_bytes: float) -> Inputs:
    """The same on devices with so much memory; blocks stay sharded."""
    node = inputs.cluster.nodes[0]
    smaller = cluster_of(node.devices, node.count, memory_bytes)
    return dataclasses.replace(inputs, cluster=smaller)


def searches(inputs: Inputs) -> dict[int, Search]:
    """The search of every size that has a layout."""
    found = {}
    for size in sizes_of(inputs.cluster):
        try:
            found[size] = inputs.search(of_size(inputs.cluster, size))
        except InputError:
            continue
    return found


# --- least memory --------------------------------------------------------------------------------------------------------


def exact_needs(search: Search) -> tuple[list[Any], np.ndarray]:
    """Every layout of a space, and the bytes (p95) that its fullest rank takes under its best cut, one by one."""
    layouts = list(search.space.layouts())
    rows = to_arrays(layouts, search.space.workload)
    needs = []
    for i in range(len(layouts)):
        row = rows.take(slice(i, i + 1))
        _, cut = search.stages(row).least_memory()
        needs.append(search.reserved_bytes(row, max(c.live_bytes for c in cut.costs))[1])
    return layouts, np.array(needs)


@pytest.mark.parametrize(
    ("precision", "spec", "batch", "fix"), [("fp32", (4, 1), 8, {}), ("bf16", (2, 2), 4, {}), ("bf16", (4, 1), 8, {"schedule": "gpipe", "pp": 2})]
)
def test_least_memory_equals_brute_force(
    tiny_llama: ModelGraph, bf16: ModelGraph, precision: str, spec: tuple[int, int], batch: int, fix: dict[str, Any]
) -> None:
    """The layouts that need least are those of solving every layout by itself; no bound is above what it bounds; the counts add up."""
    graph = tiny_llama if precision == "fp32" else bf16
    workload = Workload(global_batch=batch, seq=32, precision=precision)  # type: ignore[arg-type]
    search = Search(Space(graph, cluster_of(*spec), workload, fix), 80e9)
    layouts, needs = exact_needs(search)
    rows = to_arrays(layouts, workload)
    made = LeastMemorySearch(search)
    for any_loss in (False, True):
        bounds = made.close(rows, any_loss)
        worst = int(np.argmax(bounds / needs))
        assert bounds[worst] <= needs[worst] * (1 + TIE), f"{layouts[worst]}: bound {bounds[worst]:.6g}, needs {needs[worst]:.6g}"
    assert float(np.median(made.close(rows, any_loss=False) / needs)) > 0.5  # and they bound something
    degrees = search.degrees
    names = ("tp", "sp", "cp", "ulysses", "pp", "dp", "micro_batch")
    for row, bound in zip(np.stack([getattr(degrees, n) for n in names], axis=1), made.cheap(degrees), strict=True):
        below = np.all([getattr(rows, n) == v for n, v in zip(names, row, strict=True)], axis=0)
        assert bound <= needs[below].min() * (1 + TIE)
    found = least_memory(search, top=3)
    assert [n.bytes for n in found.best] == pytest.approx(sorted(needs)[:3], rel=TIE)
    c = found.certificate
    assert c.status == "optimal"
    assert c.space == len(layouts) == c.pruned_by_memory + c.pruned_by_bound + c.evaluated
    assert c.evaluated < len(layouts) / (4 if not fix else 1)


def test_degrees_take_no_more_than_their_details(bf16: ModelGraph) -> None:
    """What a device takes beside live bytes (streams, communicators) is for degrees at most that of each ZeRO stage below them."""
    search = Search(Space(bf16, parse_cluster("8xH100-SXM"), Workload(global_batch=8, seq=32)), 80e9)
    made = LeastMemorySearch(search)
    _, least = made.fixed_bytes(search.degrees)
    below, origin, _ = search.expand(np.arange(len(search.degrees)))
    _, fixed = made.fixed_bytes(below)
    assert (least[origin] <= fixed).all()
    assert len({round(v) for v in fixed}) > 5


def test_least_memory_is_the_least_limit_with_a_cut(inputs: Inputs) -> None:
    """Of devices with unlike memory too: with that limit some layout has a cut that fits, and with a little less none has."""
    large, small = (load_device("H100-SXM").model_copy(update={**BARE, "name": n, "memory_bytes": b}) for n, b in (("large", 3e6), ("small", 1e6)))
    cluster = Cluster(nodes=(Node(device=large, devices=1), Node(device=small, devices=1)))
    space = Space(inputs.graph, cluster, inputs.workload.model_copy(update={"global_batch": 4}), {}, None)
    search = Search(space, 1e6)
    found = least_memory(search).best[0]

    def fits(limit: float) -> bool:
        rows = to_arrays(list(space.layouts()), space.workload)
        held = Search(space, limit)
        return any(held.stages(rows.take(slice(i, i + 1))).best() is not None for i in range(len(rows)))

    assert fits(found.bytes * (1 + 1e-6))
    assert not fits(found.bytes * (1 - 1e-6))
    assert found.candidate.layout.pp == 2  # a stage on each, so that the larger may hold more
    over, candidate = search.least_memory()
    assert over > 0
    assert candidate == found.candidate


def test_of_equal_needs_the_faster_layout_is_taken(inputs: Inputs) -> None:
    """What needs no more than the least and is faster comes first, cut included."""
    search = inputs.search(of_size(inputs.cluster, 2))
    best = least_memory(search).best[0]
    assert best.candidate.step_s == pytest.approx(Search(search.space, best.bytes * (1 + TIE)).run(1).best[0].step_s)


def test_memory_objective(inputs: Inputs) -> None:
    """The plan is the layout that needs least, twice the same; its reasons are in bytes."""
    made = [plan_for("memory", inputs) for _ in range(2)]
    plan = made[0]
    assert isinstance(plan, Plan)
    assert plan.verify() == []
    best = least_memory(inputs.search()).best[0]
    assert plan.objective == "memory"
    assert plan.prediction.memory_bytes.peak.p95 == pytest.approx(best.bytes)
    assert plan.why_not
    assert all("more" in w.reason for w in plan.why_not)
    assert plan.inputs_hash == plan_for("throughput", inputs).inputs_hash  # type: ignore[union-attr]
    texts = [p.model_copy(update={"solver": p.solver.model_copy(update={"seconds": 0.0})}).to_json() for p in made]  # type: ignore[union-attr]
    assert texts[0] == texts[1]


# --- sizes ---------------------------------------------------------------------------------------------------------------


def test_sizes_are_parts_of_a_node_then_whole_nodes() -> None:
    """Any count inside one node; a cluster of a size has the nodes and links of the larger."""
    cluster = parse_cluster("3x4xH100-SXM")
    assert sizes_of(cluster) == [1, 2, 3, 4, 8, 12]
    assert of_size(cluster, 3).nodes == (Node(device="H100-SXM", devices=3, count=1),)
    assert of_size(cluster, 20).nodes == (Node(device="H100-SXM", devices=4, count=5),)
    assert of_size(cluster, 12) is cluster
    with pytest.raises(InputError, match="6 devices are neither whole nodes of 4 nor part of one"):
        of_size(cluster, 6)
    mixed = Cluster(nodes=(Node(device="H100-SXM", devices=2), Node(device="A100-80GB", devices=2)))
    with pytest.raises(InputError, match="unlike nodes"):
        sizes_of(mixed)


def test_smaller_clusters_keep_what_was_measured() -> None:
    """Of bandwidths between pairs the first devices'; fewer ranks of a CPU share the same memory."""
    measured = Cluster(nodes=(Node(device="H100-SXM", devices=4),), bandwidth_Bps=tuple(tuple(10.0 * i + j + 1 for j in range(4)) for i in range(4)))
    assert of_size(measured, 2).bandwidth_Bps == ((1.0, 2.0), (11.0, 12.0))
    with pytest.raises(InputError, match="measured bandwidths of 4 devices: there are none of 8"):
        of_size(measured, 8)
    cpu = parse_cluster("4xcpu")
    assert of_size(cpu, 2).device.memory_bytes == pytest.approx(parse_cluster("2xcpu").device.memory_bytes)


def least_by_size(inputs: Inputs) -> dict[int, float]:
    return {size: least_memory(search).best[0].bytes for size, search in searches(inputs).items()}


def test_fewest_devices_equal_solving_every_size(inputs: Inputs) -> None:
    """The smallest size on which something fits, and its fastest layout; below it nothing fits."""
    needs = least_by_size(inputs)
    memory = (needs[1] + needs[2]) / 2 if needs[2] < needs[1] else needs[1]
    asked = with_memory(inputs, memory)
    fits = {size: found.run(1).best for size, found in searches(asked).items()}
    fewest = min(size for size, best in fits.items() if best)
    plan = plan_for("gpus", asked, top=1)
    assert isinstance(plan, Plan)
    assert fewest == 2
    assert plan.cluster.size == plan.layout.devices == fewest
    assert plan.prediction.step_s.p50 == pytest.approx(fits[fewest][0].step_s)
    assert plan.objective == "gpus"
    assert f"{fewest} devices are the fewest" in plan.notes[-1]
    assert plan.verify() == []


def test_fewest_devices_that_meet_a_deadline(inputs: Inputs) -> None:
    """A deadline between the steps of two sizes asks for the faster one, exactly at it too; one that no size meets is told."""
    steps = {size: found.run(1).best[0].step_s for size, found in searches(inputs).items()}
    size = sizes_of(inputs.cluster)[-1]
    tokens = 1e9
    per_step = 8 * 32
    for aim in sorted(set(steps.values())):
        target = Target(tokens, tokens / per_step * aim)
        plan = plan_for("gpus", inputs, target=target, top=1)
        assert isinstance(plan, Plan)
        expected = min(n for n, s in steps.items() if s <= aim * (1 + 1e-9))
        assert plan.cluster.size == expected
    late = plan_for("gpus", inputs, target=Target(tokens, tokens / per_step * min(steps.values()) * 0.5))
    assert isinstance(late, TooSlow)
    assert late.devices == size
    assert late.takes_s == pytest.approx(tokens / per_step * steps[size])


def test_least_cost_equals_solving_every_size(inputs: Inputs) -> None:
    """The size with the least device-seconds a step, with a deadline among those that meet it."""
    steps = {size: found.run(1).best[0].step_s for size, found in searches(inputs).items()}
    cheapest = min(steps, key=lambda n: (n * steps[n], n))
    plan = plan_for("cost", inputs, top=2)
    assert isinstance(plan, Plan)
    assert plan.cluster.size * plan.prediction.step_s.p50 == pytest.approx(cheapest * steps[cheapest])
    assert plan.solver.gap == 0.0
    assert plan.solver.bound_s == pytest.approx(cheapest * steps[cheapest])
    assert plan.verify() == []
    others = {n: s for n, s in steps.items() if s < steps[cheapest] * (1 - 1e-6)}
    if others:
        aim = max(others.values())
        wanted = min((n for n in steps if steps[n] <= aim * (1 + 1e-9)), key=lambda n: n * steps[n])
        plan = plan_for("cost", inputs, target=Target(8 * 32.0, aim), top=1)
        assert isinstance(plan, Plan)
        assert plan.cluster.size * plan.prediction.step_s.p50 == pytest.approx(wanted * steps[wanted])


def test_no_size_is_large_enough(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where even all devices hold too little, the refusal is that of the whole cluster; a count alone excludes it."""
    monkeypatch.setattr("meshwright.planner.solve.relaxations", lambda *_: iter(()))
    small = with_memory(inputs, 1e5)
    assert "parameters and optimizer state alone" in too_small(small, small.cluster)
    for objective in ("gpus", "cost", "memory"):
        refusal = plan_for(objective, small)  # type: ignore[arg-type]
        assert isinstance(refusal, Infeasible)
        assert refusal.needs_bytes > refusal.limit_bytes


def test_a_count_excludes_only_what_does_not_fit(inputs: Inputs) -> None:
    """Parameters and state by themselves are a lower bound: with what some size needs, that size is not excluded."""
    for size, need in least_by_size(inputs).items():
        asked = with_memory(inputs, need)
        assert not too_small(asked, of_size(asked.cluster, size))


# --- deadlines and tokens ------------------------------------------------------------------------------------------------


def test_deadline_by_hand() -> None:
    """15T tokens in 14 days at 1,024 x 4,096 tokens a step: 3,576,278.7 steps, so that none may take more than 0.33823 s."""
    target = Target(parse_tokens("15T"), parse_deadline("14d"))
    w = Workload(global_batch=1024, seq=4096)
    assert target.most_step_s(w) == pytest.approx(14 * 86400 / (15e12 / (1024 * 4096)))
    assert target.most_step_s(w) == pytest.approx(0.338230, rel=1e-5)
    assert target.seconds(0.25, w) == pytest.approx(894069.67, rel=1e-6)  # 10.35 days
    assert Target(1e12).most_step_s(w) == float("inf")
    with pytest.raises(InputError, match="--tokens"):
        Target(None, DAY)


@pytest.mark.parametrize(
    ("text", "seconds"), [("14d", 1209600.0), ("36h", 129600.0), ("90m", 5400.0), (" 600 s", 600.0), ("2w", 1209600.0), ("1.5h", 5400.0)]
)
def test_deadlines_are_read(text: str, seconds: float) -> None:
    assert parse_deadline(text) == seconds


@pytest.mark.parametrize(("text", "tokens"), [("15T", 15e12), ("300B", 3e11), ("1.5e12", 1.5e12), ("2m", 2e6), ("1024", 1024.0)])
def test_tokens_are_read(text: str, tokens: float) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("gpus=8..64", (8, 16, 32, 64)), ("gpus=8..100", (8, 16, 32, 64)), ("gpus=8..32:8", (8, 16, 24, 32)), ("devices=24,8,16,8", (8, 16, 24)),
        ("gpus=5", (5,)), ("gpus = 3..3", (3,)),
    ],
)  # fmt: skip
def test_sweeps_are_read(text: str, sizes: tuple[int, ...]) -> None:
    assert parse_sweep(text) == sizes


@pytest.mark.parametrize("text", ["14", "d", "-1d", "0h", "1y", "1e999d", "nan d", ""])
def test_other_deadlines_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="^--deadline .*like 14d, 36h or 90m$"):
        parse_deadline(text)


@pytest.mark.parametrize("text", ["many", "-3T", "0", "1e999", "15TB", ""])
def test_other_tokens_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="^--tokens .*like 15T, 300B or 1.5e12$"):
        parse_tokens(text)


@pytest.mark.parametrize(
    "text", ["8..64", "gpus=", "gpus=64..8", "gpus=0..8", "gpus=8..64:0", "gpus=0,8", "gpus=1..100000:1", "gpus=a,b", "gpus=9999999999"]
)
def test_other_sweeps_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="^--sweep "):
        parse_sweep(text)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("speed", Target(), False, None), "'speed' is not known"), (("gpus", Target(), True, None), "leave --objective gpus away"),
        (("throughput", Target(1.0, 1.0), False, None), "--deadline goes with"), (("memory", Target(1.0, 1.0), False, None), "--deadline goes with"),
        (("cost", Target(price=2.0), False, None), "--price says nothing"), (("throughput", Target(), False, -1.0), "--max-seconds"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(asked: tuple[Any, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_asked(*asked)


# --- sweep ---------------------------------------------------------------------------------------------------------------


def test_sweep(inputs: Inputs) -> None:
    """Each size's own best plan; what holds nothing says why; the smallest that meets the deadline; hours and cost by hand."""
    sizes = (1, 2, 4, 6, 7, 8, 16)
    steps = {n: inputs.search(of_size(inputs.cluster, n)).run(1).best[0].step_s for n in (1, 2, 4, 8, 16)}
    tokens = 1e9
    aim = steps[4]
    made = sweep(inputs, sizes, target=Target(tokens, tokens / 256 * aim, 3.0))
    assert isinstance(made, Frontier)
    points = {p.devices: p for p in made.points}
    for n, step in steps.items():
        p = points[n]
        assert p.step_s == pytest.approx(step)
        assert p.device_hours == pytest.approx(n * step / 3600 * tokens / 256)
        assert p.cost == pytest.approx(3 * n * step / 3600 * tokens / 256)
        assert p.takes_s == pytest.approx(tokens / 256 * step)
        assert p.meets is (step <= aim)
        assert p.tokens_per_s == pytest.approx(256 / step)
    assert made.smallest == min(n for n, step in steps.items() if step <= aim)
    assert "neither whole nodes of 4" in points[6].why
    assert points[6].step_s is None
    tight = sweep(with_memory(inputs, least_by_size(inputs)[2] * (1 + 1e-6)), (1, 2, 32))
    assert tight.points[0].why.startswith("does not fit: ")
    assert tight.points[1].step_s is not None
    assert tight.points[2].step_s is None or tight.points[2].devices == 32
    assert Frontier.model_validate_json(made.model_dump_json(by_alias=True)) == made


def test_points_that_another_beats_are_off_the_frontier() -> None:
    """By hand: 4 devices at 10 s (40 device-seconds), 8 at 4 (32), 16 at 5 (80), 32 at 2 (64), and one size that holds nothing."""
    steps = {4: 10.0, 8: 4.0, 16: 5.0, 32: 2.0}
    points = [Point(devices=n, step_s=s, device_hours=n * s) for n, s in steps.items()] + [Point(devices=64, why="nothing")]
    marked = {p.devices: (p.frontier_step, p.frontier_cost) for p in mark(points)}
    assert marked == {4: (True, False), 8: (True, True), 16: (False, False), 32: (True, True), 64: (False, False)}


def test_max_seconds_leaves_a_gap(inputs: Inputs) -> None:
    """With no time the first layout found is given; what is left open and the gap are told, and the bound is no lie."""
    search = inputs.search()
    needs = exact_needs(inputs.search(of_size(inputs.cluster, 4)))[1]
    cut_short = least_memory(inputs.search(of_size(inputs.cluster, 4)), max_seconds=0.0)
    c = cut_short.certificate
    assert c.space == c.pruned_by_memory + c.pruned_by_bound + c.evaluated + c.open
    assert c.bound_s <= needs.min() * (1 + TIE)
    assert c.gap == pytest.approx(cut_short.best[0].bytes / c.bound_s - 1)
    plan = plan_for("cost", inputs, max_seconds=0.0, top=1)
    assert isinstance(plan, Plan)
    best = search.run(1).best[0]
    assert plan.solver.bound_s <= 8 * best.step_s * (1 + TIE)
    assert plan.verify() == []
