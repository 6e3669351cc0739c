"""How many devices: the fewest that do, those on which a step costs least, and the frontier of a sweep over sizes.

Sizes are those of the given cluster's own kind: any count inside one node, then whole nodes. Nothing is assumed to grow or fall with the
size: each one is solved, or shown to hold nothing, or bounded away by the best so far, which the search takes as its cutoff.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from meshwright.costmodel.memory import MASTER, OPTIMIZERS
from meshwright.planner.explain import why_not_memory
from meshwright.planner.leastmemory import least_memory
from meshwright.planner.plan import Certificate, Layout, Plan, Workload
from meshwright.planner.search import Candidate, Outcome, Search
from meshwright.planner.solve import Infeasible, Inputs, _assemble, _infeasible, _inputs_hash
from meshwright.planner.space import held_of
from meshwright.profiling.cluster import Cluster, Node
from meshwright.profiling.errors import InputError

Objective = Literal["throughput", "gpus", "cost", "memory"]
OBJECTIVES = ("throughput", "gpus", "cost", "memory")
Progress = Callable[[str], None]
HOUR, DAY = 3600.0, 86400.0
TRILLION = 1e12
MOST_SIZES = 512  # of a sweep
_TIMES = {"s": 1.0, "m": 60.0, "h": HOUR, "d": DAY, "w": 7 * DAY}
_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_NUMBER = r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)"


# --- what is asked -------------------------------------------------------------------------------------------------------


def parse_deadline(text: str) -> float:
    """Seconds of "14d", "36h", "90m", "2w" or "600s". InputError for anything else."""
    match = re.fullmatch(rf"\s*{_NUMBER}\s*([smhdw])\s*", text)
    if not match or not 0 < float(match[1]) * _TIMES[match[2]] < float("inf"):
        raise InputError(f"--deadline {text!r} is not a time above zero, like 14d, 36h or 90m")
    return float(match[1]) * _TIMES[match[2]]


def parse_tokens(text: str) -> float:
    """Tokens of "15T", "300B", "1.5e12". InputError for anything else."""
    match = re.fullmatch(rf"\s*{_NUMBER}\s*([KMBTkmbt]?)\s*", text)
    if not match or not 0 < float(match[1]) * _COUNTS[match[2].upper()] < float("inf"):
        raise InputError(f"--tokens {text!r} is not a number of tokens above zero, like 15T, 300B or 1.5e12")
    return float(match[1]) * _COUNTS[match[2].upper()]


def parse_sweep(text: str) -> tuple[int, ...]:
    """Numbers of devices, ascending, of "gpus=8..1024" (doubling), "gpus=8..64:8" (steps) or "gpus=8,16,24". InputError for anything else."""
    match = re.fullmatch(r"\s*(?:gpus|devices)\s*=\s*(\d{1,9})\.\.(\d{1,9})(?::(\d{1,9}))?\s*", text)
    listed = re.fullmatch(r"\s*(?:gpus|devices)\s*=\s*(\d{1,9}(?:\s*,\s*\d{1,9})*)\s*", text)
    if match:
        low, high, step = int(match[1]), int(match[2]), int(match[3]) if match[3] else None
        if not 1 <= low <= high or step == 0:
            raise InputError(f"--sweep {text!r}: sizes go from one device or more up to no fewer, in steps of one or more")
        if step is None:
            sizes = [low * 2**i for i in range(32) if low * 2**i <= high]
        else:
            sizes = list(range(low, min(high, low + step * MOST_SIZES) + 1, step))
    elif listed:
        sizes = sorted({int(n) for n in listed[1].split(",")})
        if sizes[0] < 1:
            raise InputError(f"--sweep {text!r}: a cluster has one device or more")
    else:
        raise InputError(f"--sweep {text!r} is not like gpus=8..1024 (doubling), gpus=8..64:8 (steps of 8) or gpus=8,16,24")
    if len(sizes) > MOST_SIZES:
        raise InputError(f"--sweep {text!r} names more than {MOST_SIZES} sizes")
    return tuple(sizes)


@dataclass(frozen=True)
class Target:
    """So many tokens, in so many seconds of training, at so much a device-hour; each may be left open."""

    tokens: float | None = None
    deadline_s: float | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        if self.price is not None and not 0 < self.price < float("inf"):
            raise InputError(f"--price must be above zero, not {self.price:g}")
        if self.deadline_s is not None and self.tokens is None:
            raise InputError("--deadline says nothing without --tokens, how many there are to train on")

    def seconds(self, step_s: float, w: Workload) -> float | None:
        """What all tokens take with such a step."""
        return None if self.tokens is None else self.tokens / (w.global_batch * w.seq) * step_s

    def most_step_s(self, w: Workload) -> float:
        """The longest step that meets the deadline; infinite without one."""
        if self.deadline_s is None or self.tokens is None:
            return float("inf")
        return self.deadline_s * (w.global_batch * w.seq) / self.tokens


def check_asked(objective: str, target: Target, sweep: bool, max_seconds: float | None) -> Objective:
    """The objective, if what is asked goes together; else InputError."""
    if objective not in OBJECTIVES:
        raise InputError(f"--objective {objective!r} is not known: it is one of {', '.join(OBJECTIVES)}")
    if sweep and objective != "throughput":
        raise InputError(f"--sweep solves every size for throughput: leave --objective {objective} away")
    if target.deadline_s is not None and not sweep and objective not in ("gpus", "cost"):
        raise InputError(f"--deadline goes with --sweep, --objective gpus or --objective cost, not with --objective {objective}")
    if target.price is not None and not sweep and target.tokens is None:
        raise InputError("--price says nothing without --tokens or --sweep")
    if max_seconds is not None and not 0 <= max_seconds < float("inf"):
        raise InputError(f"--max-seconds must be zero or more, not {max_seconds:g}")
    return objective  # type: ignore[return-value]


# --- clusters of the same kind -------------------------------------------------------------------------------------------


def node_of(cluster: Cluster) -> Node:
    """The one kind of node that a cluster is of. InputError where there are several, of which no size is a smaller such cluster."""
    first = cluster.nodes[0]
    if any((n.spec, n.devices) != (first.spec, first.devices) for n in cluster.nodes):
        raise InputError(f"{cluster.name} has unlike nodes: other sizes of it are solved only where all nodes are alike")
    return first


def sizes_of(cluster: Cluster) -> list[int]:
    """Every size up to the cluster's own: any count inside a node, then whole nodes."""
    per = node_of(cluster).devices
    return [*range(1, min(per, cluster.size) + 1), *range(2 * per, cluster.size + 1, per)]


def of_size(cluster: Cluster, devices: int) -> Cluster:
    """A cluster of so many devices with the nodes and links of another. InputError where that is neither whole nodes nor part of one.

    Of measured bandwidths the first devices' are taken. Ranks of a CPU share its memory: fewer of them have more each."""
    node = node_of(cluster)
    if devices < 1 or (devices > node.devices and devices % node.devices):
        raise InputError(f"{devices} devices are neither whole nodes of {node.devices} nor part of one")
    if devices == cluster.size:
        return cluster
    count, per = max(devices // node.devices, 1), min(devices, node.devices)
    device = node.device
    if node.spec.kind == "cpu":
        device = node.spec.model_copy(update={"memory_bytes": node.spec.memory_bytes * cluster.size / devices})
    measured = cluster.bandwidth_Bps
    if measured is not None and devices > cluster.size:
        raise InputError(f"{cluster.name} has measured bandwidths of {cluster.size} devices: there are none of {devices}")
    name = f"{count}x{per}x{node.spec.name}" if count > 1 else f"{per}x{node.spec.name}"
    return Cluster(
        name=name, nodes=(Node(device=device, devices=per, count=count),), links=cluster.links, host=cluster.host,
        bandwidth_Bps=None if measured is None else tuple(row[:devices] for row in measured[:devices]),
    )  # fmt: skip


def too_small(inputs: Inputs, cluster: Cluster) -> str:
    """Why no layout can fit by a count alone: every parameter's fp32 copy and optimizer state stand somewhere; empty if that fits."""
    held = MASTER + (0.0 if cluster.host is not None else 0.5 * OPTIMIZERS[inputs.workload.optimizer].state_bytes)
    needed, room = held * inputs.graph.numel, cluster.size * inputs.limit_bytes(cluster)
    return f"parameters and optimizer state alone are {needed / 2**30:.0f} of {room / 2**30:.0f} GiB" if needed > room else ""


# --- objectives ----------------------------------------------------------------------------------------------------------


class TooSlow(BaseModel):
    """No size of the cluster meets the deadline: what all of its devices take at best."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["meshwright.too-slow/1"] = Field("meshwright.too-slow/1", alias="schema")
    model: str
    cluster: str
    devices: int
    workload: Workload
    tokens: float
    deadline_s: float
    takes_s: float
    step_s: float
    layout: Layout


@dataclass
class _Tried:
    """Sizes that were gone through: how many were solved, and how many held nothing, by why."""

    solved: int = 0
    bounded: int = 0
    empty: int = 0
    certificate: Certificate | None = None

    def add(self, c: Certificate) -> None:
        if c.evaluated:
            self.solved += 1
        else:
            self.bounded += 1
        self.certificate = c if self.certificate is None else _sum(self.certificate, c)

    def __str__(self) -> str:
        parts = [f"{self.solved} solved", f"{self.bounded} excluded by bounds alone", f"{self.empty} with no layout at all"]
        return f"{self.solved + self.bounded + self.empty} sizes: {', '.join(p for p in parts if not p.startswith('0 '))}"


def _sum(a: Certificate, b: Certificate) -> Certificate:
    """The counts of both, with what else `b` says."""
    names = ("seconds", "space", "pruned_by_memory", "pruned_by_bound", "evaluated", "infeasible", "priced", "open")
    return b.model_copy(update={n: getattr(a, n) + getattr(b, n) for n in names})


def plan_for(
    objective: Objective, inputs: Inputs, *, target: Target | None = None, top: int = 5, max_seconds: float | None = None,
    progress: Progress | None = None,
) -> Plan | Infeasible | TooSlow:  # fmt: skip
    """The best plan by another measure than the step of the whole cluster, or why there is none.

    "gpus": the fewest devices that meet the target (if there is one), and the fastest layout of so many. "cost": the size with the least
    device-seconds a step that meets it. "memory": the layout whose fullest rank takes least of its device (p95), of equal ones the
    faster. InputError for an unknown objective and for a deadline that the objective does not look at.
    """
    say, target = progress or (lambda _: None), target or Target()
    check_asked(objective, target, False, max_seconds)
    if objective == "memory":
        return _least(inputs, top, max_seconds, say)
    if objective == "throughput":
        search = inputs.search()
        outcome = search.run(top, lambda n, left: say(f"searching: {n} layouts evaluated, {left} choices of degrees left"), max_seconds)
        if not outcome.best:
            return _infeasible(search, outcome, search.limit_bytes)
        made = _told(search, outcome)
        return made.model_copy(update={"notes": (*made.notes, *_days(target, made))})
    return (_fewest if objective == "gpus" else _cheapest)(inputs, target, top, max_seconds, say)


def _told(search: Search, outcome: Outcome) -> Plan:
    return _assemble(search, outcome, search.limit_bytes)


def _left(started: float, max_seconds: float | None) -> float | None:
    return None if max_seconds is None else max(max_seconds - (time.perf_counter() - started), 0.0)


def _searches(inputs: Inputs, tried: _Tried, size: int) -> Search | None:
    """The search of one size; None where there is no layout, which is counted."""
    cluster = of_size(inputs.cluster, size)
    if too_small(inputs, cluster):
        tried.bounded += 1
        return None
    try:
        return inputs.search(cluster)
    except InputError:
        tried.empty += 1
        return None


def _fewest(inputs: Inputs, target: Target, top: int, max_seconds: float | None, say: Progress) -> Plan | Infeasible | TooSlow:
    started, tried = time.perf_counter(), _Tried()
    for size in sizes_of(inputs.cluster):
        say(f"solving sizes: {size} devices")
        search = _searches(inputs, tried, size)
        if search is None:
            continue
        outcome = search.run(top, None, _left(started, max_seconds), _cutoff(target, inputs))
        tried.add(outcome.certificate)
        if outcome.best:
            say(f"explaining {size} devices")
            assert tried.certificate is not None
            what = "fits and meets the deadline" if target.deadline_s is not None else "fits"
            note = f"objective gpus: {size} devices are the fewest on which it {what}; {tried}"
            made = _told(search, outcome)
            return made.model_copy(update={"objective": "gpus", "solver": tried.certificate, "notes": (*made.notes, *_days(target, made), note)})
    return _none(inputs, target, say)


def _cheapest(inputs: Inputs, target: Target, top: int, max_seconds: float | None, say: Progress) -> Plan | Infeasible | TooSlow:
    started, tried = time.perf_counter(), _Tried()
    best: tuple[Search, Candidate] | None = None
    least, open_bound, skipped = float("inf"), float("inf"), 0
    for size in sizes_of(inputs.cluster):
        say(f"solving sizes: {size} devices")
        search = _searches(inputs, tried, size)
        if search is None:
            continue
        left = _left(started, max_seconds)
        if best is not None and left == 0.0:
            x = search.degrees
            open_bound = min(open_bound, size * float(search.bounds.step(x, search.bound.price(x))[0].min()))
            skipped += 1
            continue
        outcome = search.run(1, None, left, min(_cutoff(target, inputs), least / size))
        tried.add(outcome.certificate)
        if outcome.best and size * outcome.best[0].step_s < least:
            best, least = (search, outcome.best[0]), size * outcome.best[0].step_s
        if outcome.certificate.open:
            open_bound = min(open_bound, size * outcome.certificate.bound_s)
    if best is None:
        return _none(inputs, target, say)
    search, candidate = best
    n = search.space.cluster.size
    say(f"explaining {n} devices")
    final = search.run(top, None, _left(started, max_seconds))
    if final.best[0].step_s > candidate.step_s:  # the time is over
        final = Outcome((candidate, *final.best)[:top], final.certificate)
    bound = min(least, open_bound)
    assert tried.certificate is not None
    proof = tried.certificate.model_copy(
        update={
            "status": "time limit" if bound < least or tried.certificate.open else "optimal",
            "gap": max(least / bound - 1, 0.0),
            "bound_s": bound,
        }
    )
    made = _told(search, final)
    late = f", and {skipped} left open when the time was over" if skipped else ""
    note = f"objective cost: {least:.4g} device-seconds a step are the least, on {n} devices; {tried}{late}"
    return made.model_copy(update={"objective": "cost", "solver": proof, "notes": (*made.notes, *_days(target, made), note)})


def _cutoff(target: Target, inputs: Inputs) -> float:
    """Steps at or above it are too slow."""
    return float(np.nextafter(target.most_step_s(inputs.workload), np.inf))


def _days(target: Target, made: Plan) -> tuple[str, ...]:
    takes = target.seconds(made.prediction.step_s.p50, made.workload)
    if takes is None or target.tokens is None:
        return ()
    of = f" of {duration(target.deadline_s)}" if target.deadline_s is not None else ""
    hours = takes / HOUR * made.cluster.size
    cost = f", which cost {target.price * hours:,.0f}" if target.price is not None else ""
    return (f"{tokens_text(target.tokens)} tokens take {duration(takes)}{of} and {hours:,.0f} device-hours{cost}",)


def _none(inputs: Inputs, target: Target, say: Progress) -> Infeasible | TooSlow:
    """Why no size does: the whole cluster is too small, or too slow."""
    say("nothing does; looking for what would")
    search = inputs.search()
    outcome = search.run(1)
    if not outcome.best:
        return _infeasible(search, outcome, search.limit_bytes)
    w, best = inputs.workload, outcome.best[0]
    takes = target.seconds(best.step_s, w)
    assert takes is not None
    assert target.tokens is not None
    assert target.deadline_s is not None
    return TooSlow(
        schema="meshwright.too-slow/1", model=inputs.graph.name, cluster=inputs.cluster.name, devices=inputs.cluster.size, workload=w,
        tokens=target.tokens, deadline_s=target.deadline_s, takes_s=takes, step_s=best.step_s, layout=best.layout,
    )  # fmt: skip


def _least(inputs: Inputs, top: int, max_seconds: float | None, say: Progress) -> Plan | Infeasible:
    search = inputs.search()
    say("searching")
    found = least_memory(search, top, lambda n, left: say(f"searching: {n} layouts evaluated, {left} choices of degrees left"), max_seconds)
    fits = [n for n in found.best if n.bytes <= search.limit_bytes]
    outcome = Outcome(tuple(n.candidate for n in fits), found.certificate)
    if not fits:
        return _infeasible(search, outcome, search.limit_bytes)
    say("explaining")
    layout = fits[0].candidate.layout
    made = _told(search.holding(held_of(layout)), outcome)  # which asks no questions of its own: those are about seconds
    note = f"objective memory: no layout's fullest rank takes less of its device than {fits[0].bytes / 2**30:.2f} GiB (p95); the gap is in bytes"
    return made.model_copy(
        update={
            "objective": "memory", "why_not": tuple(why_not_memory(search, fits[0])), "notes": (*made.notes, note),
            "inputs_hash": _inputs_hash(search.space, search.limit_bytes),
        }
    )  # fmt: skip


# --- sweep ---------------------------------------------------------------------------------------------------------------


class Point(BaseModel):
    """One size of a sweep: its fastest plan, or why there is none. `device_hours` and `cost` are those of the frontier's tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    devices: int
    cluster: str = ""
    layout: Layout | None = None
    step_s: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    peak_bytes: float | None = None  # p95
    device_hours: float | None = None
    cost: float | None = None
    takes_s: float | None = None
    meets: bool | None = None
    frontier_step: bool = False  # no size with as few devices is faster
    frontier_cost: bool = False  # none that costs as little is faster
    why: str = ""
    solver: Certificate | None = None


class Frontier(BaseModel):
    """A sweep over sizes of one cluster. Hours and cost are for `tokens`, which are a trillion if none were asked for (`asked`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["meshwright.frontier/1"] = Field("meshwright.frontier/1", alias="schema")
    model: str
    device: str
    workload: Workload
    tokens: float
    asked: bool
    deadline_s: float | None = None
    price: float | None = None
    points: tuple[Point, ...]
    smallest: int | None = None

    @property
    def answers(self) -> bool:
        """Whether there is a plan, and one that meets the deadline if there is a deadline."""
        return any(p.step_s is not None and p.meets is not False for p in self.points)


def sweep(
    inputs: Inputs, sizes: tuple[int, ...], *, target: Target | None = None, max_seconds: float | None = None,
    progress: Progress | None = None,
) -> Frontier:  # fmt: skip
    """The fastest plan of each size of the inputs' cluster; `max_seconds` for each size."""
    say, target = progress or (lambda _: None), target or Target()
    node_of(inputs.cluster)
    points = []
    for size in sizes:
        say(f"sweeping: {size} devices")
        points.append(_point(inputs, size, target, max_seconds))
    marked = mark(points)
    meets = [p.devices for p in marked if p.meets]
    return Frontier(
        schema="meshwright.frontier/1", model=inputs.graph.name, device=node_of(inputs.cluster).spec.name, workload=inputs.workload,
        tokens=target.tokens or TRILLION, asked=target.tokens is not None, deadline_s=target.deadline_s, price=target.price, points=marked,
        smallest=min(meets) if meets else None,
    )  # fmt: skip


def _point(inputs: Inputs, size: int, target: Target, max_seconds: float | None) -> Point:
    try:
        cluster = of_size(inputs.cluster, size)
    except InputError as e:
        return Point(devices=size, why=str(e))
    small = too_small(inputs, cluster)
    if small:
        return Point(devices=size, cluster=cluster.name, why=f"does not fit: {small}")
    try:
        search = inputs.search(cluster)
    except InputError as e:
        return Point(devices=size, cluster=cluster.name, why=str(e))
    outcome = search.run(1, None, max_seconds)
    if not outcome.best:
        need = least_memory(search).best[0].bytes
        why = f"does not fit: {need / 2**30:.1f} GiB needed at best of {search.limit_bytes / 2**30:.1f} GiB allowed"
        return Point(devices=size, cluster=cluster.name, why=why, solver=outcome.certificate)
    best, w = outcome.best[0], inputs.workload
    takes = target.seconds(best.step_s, w)
    hours = size * best.step_s / HOUR * (target.tokens or TRILLION) / (w.global_batch * w.seq)
    return Point(
        devices=size, cluster=cluster.name, layout=best.layout, step_s=best.step_s, tokens_per_s=w.global_batch * w.seq / best.step_s,
        mfu=search.bound.mfu(best.step_s, w.global_batch, size), peak_bytes=search.reserved_bytes(best.row, best.live_bytes)[1],
        device_hours=hours, cost=None if target.price is None else target.price * hours, takes_s=takes,
        meets=None if target.deadline_s is None or takes is None else takes <= target.deadline_s, solver=outcome.certificate,
    )  # fmt: skip


def mark(points: list[Point]) -> tuple[Point, ...]:
    """The points with those told that no other beats: in devices and step, and in device-hours and step."""

    def best(p: Point, of: Callable[[Point], float]) -> bool:
        if p.step_s is None:
            return False
        mine = of(p), p.step_s
        others = [(of(q), q.step_s) for q in points if q.step_s is not None]
        return not any(a <= mine[0] and b <= mine[1] and (a, b) != mine for a, b in others)

    return tuple(
        p.model_copy(update={"frontier_step": best(p, lambda q: q.devices), "frontier_cost": best(p, lambda q: q.device_hours or 0.0)})
        for p in points
    )


# --- words ---------------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds for a reader: days from two of them on, else hours, minutes or seconds."""
    for unit, size in (("d", DAY), ("h", HOUR), ("m", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.{1 if seconds < 100 * size else 0}f}".removesuffix(".0") + f" {unit}"
    return f"{seconds:.3g} s"


def tokens_text(tokens: float) -> str:
    """A number of tokens for a reader, like 15T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if tokens >= size:
            return f"{tokens / size:.6g}{unit}"
    return f"{tokens:.6g}"
