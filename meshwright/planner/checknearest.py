"""What would make a check fit: each answer is the planner's, with one part of the layout, or the number of devices, set free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

from meshwright.costmodel.layouts import LOSSES
from meshwright.planner.check import Figures, Setting
from meshwright.planner.explain import enough_memory
from meshwright.planner.plan import Workload
from meshwright.planner.search import Candidate, Search
from meshwright.planner.sharding import NotShardable
from meshwright.planner.solve import _prediction
from meshwright.planner.space import Space, divisors
from meshwright.profiling.cluster import Cluster, Node
from meshwright.profiling.errors import InputError

# What each part of a layout takes along: devices are tp x pp x dp, sequence parallelism needs tp, ZeRO needs dp, and whether the loss is on
# shards of the classes is settled by tp.
FREES = {
    "recompute": ("recompute",), "micro_batch": ("micro_batch",), "zero": ("zero",), "sp": ("sp",),
    "tp": ("tp", "dp", "sp", "loss"), "pp": ("pp", "dp"), "schedule": ("schedule", "vpp"), "cp": ("cp", "dp"), "ep": ("ep", "etp"),
    "loss": ("loss",), "offload": ("offload",),
}  # fmt: skip
MOST, FACTOR = 4096, 64  # devices that are tried, and how many times those of the check


def search_of(asked: Any, cluster: Cluster, workload: Workload, fixed: dict[str, Any]) -> Search:
    """The layouts of a check's model on a cluster, priced, with what is held. Raises InputError where there are none."""
    return Search(Space(asked.graph, cluster, workload, fixed, asked.costs, known=asked.shardings), asked.limit_bytes)


def nearest_train(asked: Any, figures: Figures, held: Search, most: int = 6) -> tuple[Setting, ...]:
    """Settings that fit, cheapest step first. The price is against the step that the checked layout would take."""
    found: list[Setting] = []
    workload = held.space.workload
    if asked.fixed:
        asked = replace(asked, fixed=settled(asked.fixed, asked.cluster.size))
        for key, free in FREES.items():
            if key in asked.fixed:
                found += _one_free(asked, workload, key, free, figures)
        search = search_of(asked, asked.cluster, workload, {})
        best = search.run(1).best
        if best and best[0].layout not in [s.layout for s in found]:
            found.append(_setting("plan = auto", search, best[0], figures))
    found.sort(key=lambda s: s.step_s or 0.0)
    found = found[: most - 1]
    more = _more_devices(asked, figures)
    if more is not None:
        found.append(more)
    if not asked.fixed:
        found.append(_more_memory(held, figures))
    return tuple(found)


def settled(fixed: dict[str, Any], devices: int) -> dict[str, Any]:
    """What is held, with the degree that the other three settle: to set another one free is not to set that one free."""
    degrees = ("tp", "cp", "pp", "dp")
    left = [key for key in degrees if key not in fixed]
    if len(left) != 1:
        return fixed
    return {**fixed, left[0]: devices // prod(fixed[key] for key in degrees if key in fixed)}


def _one_free(asked: Any, workload: Workload, key: str, free: tuple[str, ...], figures: Figures) -> list[Setting]:
    """The cheapest layout that fits and differs from what is held in one part alone."""
    fixed = {k: v for k, v in asked.fixed.items() if k not in free}
    alone = "dp" in free and fixed.get("zero")  # on one replica there is nothing to shard over
    options = [fixed, {**fixed, "zero": 0}] if alone else [fixed]
    if key == "tp" and "loss" in asked.fixed:  # in chunks only where that is held
        losses = [name for name in LOSSES if name != "chunked" or name == asked.fixed["loss"]]
        options = [{**option, "loss": name} for option in options for name in losses]
    best: tuple[Search, Candidate] | None = None
    for option in options:
        try:
            search = search_of(asked, asked.cluster, workload, option)
        except (InputError, NotShardable):
            continue
        for c in search.run(1).best:
            sharded = c.layout.dp > 1 and option.get("zero") == 0 and fixed.get("zero")
            if not sharded and (best is None or c.step_s < best[1].step_s):
                best = search, c
    if best is None or getattr(best[1].layout, key) == asked.fixed[key]:
        return []
    search, c = best
    x = c.layout
    change = f"{key}={_value(getattr(x, key))}"
    if key == "tp" and x.sp != figures.layout.sp:
        change += f" sp={_value(x.sp)}"
    return [_setting(change, search, c, figures)]


def _setting(change: str, search: Search, c: Candidate, figures: Figures) -> Setting:
    slower = c.step_s / figures.step_s - 1 if figures.step_s else None
    p95 = _prediction(search, c, search.limit_bytes).memory_bytes.peak.p95
    return Setting(change=change, layout=c.layout, devices=search.space.cluster.size, peak_bytes=p95, step_s=c.step_s, slower=slower)


def larger(cluster: Cluster) -> Iterator[Cluster]:
    """Two, four, ... times as many nodes of the same kind; none where links were measured, nodes are mixed, or it is this machine."""
    if cluster.bandwidth_Bps is not None or len(cluster.nodes) != 1 or cluster.device.kind == "cpu":
        return
    node, factor = cluster.nodes[0], 2
    while cluster.size * factor <= MOST and factor <= FACTOR:
        nodes = (Node(device=node.device, devices=node.devices, count=node.count * factor),)
        yield Cluster(name=cluster.name, nodes=nodes, links=cluster.links)
        factor *= 2


def _more_devices(asked: Any, figures: Figures) -> Setting | None:
    """The fewest nodes of the same kind, by doubling, on which what is held fits. A batch that was not given grows along."""
    fixed = {k: v for k, v in asked.fixed.items() if k != "dp"}
    for cluster in larger(asked.cluster):
        batch = asked.batch if asked.spec.batch or asked.saved else cluster.size
        workload = Workload(global_batch=batch, seq=asked.graph.seq, precision=asked.graph.precision)
        try:
            search = search_of(asked, cluster, workload, fixed)
        except (InputError, NotShardable):
            continue
        best = search.run(1).best
        if best:
            return _setting(_devices(cluster), search, best[0], figures)
    return None


def _more_memory(held: Search, figures: Figures) -> Setting:
    """The same devices with memory enough, and the same share of it allowed, or more of what they have."""
    return Setting(
        change=enough_memory(figures.peak.p95, figures.limit_bytes, figures.capacity_bytes), layout=figures.layout,
        devices=held.space.cluster.size, peak_bytes=figures.peak.p95, step_s=figures.step_s, slower=0.0,
    )  # fmt: skip


def nearest_infer(asked: Any, figures: Figures, solve: Callable[..., Figures], most: int = 5) -> tuple[Setting, ...]:
    """Degrees, then numbers of nodes, with which serving fits: the fewest devices a replica first. There is no step to price."""
    found: list[Setting] = []
    size = asked.cluster.size
    for key in ("tp", "pp"):
        for degree in divisors(size):
            degrees = {"tp": figures.layout.tp, "pp": figures.layout.pp} | {key: degree}
            if degree <= getattr(figures.layout, key):
                continue
            tried = _infer(asked, solve, degrees, asked.cluster)
            if tried is not None:
                found.append(Setting(change=f"{key}={degree}", layout=tried.layout, devices=size, peak_bytes=tried.peak.p95))
                break
    for cluster in larger(asked.cluster):
        tried = _infer(asked, solve, {"tp": figures.layout.tp, "pp": figures.layout.pp}, cluster)
        if tried is not None:
            found.append(Setting(change=_devices(cluster), layout=tried.layout, devices=cluster.size, peak_bytes=tried.peak.p95))
            break
    return tuple(found[:most])


def _infer(asked: Any, solve: Callable[..., Figures], degrees: dict[str, int], cluster: Cluster) -> Figures | None:
    try:
        tried = solve(asked, degrees["tp"], degrees["pp"], cluster)
    except (InputError, NotShardable):
        return None
    return tried if tried.over_bytes <= 0 else None


def _devices(cluster: Cluster) -> str:
    nodes = sum(n.count for n in cluster.nodes)
    return f"{cluster.size} devices ({nodes} nodes)"


def _value(choice: Any) -> Any:
    return ("off", "on")[choice] if isinstance(choice, bool) else choice
