"""What the planner's choice would have cost: published jobs that were measured in several layouts, and jobs that were tuned by hand.

    python benchmarks/regret.py --runs runs.csv [--where split=calib] [--json PATH]
    python benchmarks/regret.py --runs runs.csv --tuned megatron-sc21,megatron-bridge,torchtitan

A group is the runs that share source, software and release, model and its dimensions, GPU and its links, number of GPUs, sequence,
precision and global batch, and were timed in two layouts or more; a layout that was timed several times counts with its median. Each group
is planned from nothing (the traced model, the cluster, the batch), the plan is mapped to the nearest timed layout, and regret is that
layout's published time over the group's best, minus 1.

Nearest, by the sum of: |log2| of the ratios of tp, cp, pp, ep, dp, vpp, microbatch and copies of the state (HSDP); the difference of the
ZeRO stages; of the recompute (none 0, selective 1, full 2, mean of the layers); 1 where the schedules differ (1F1B and interleaved
differ by vpp alone; the space has ZB-1p, but no ZB-2p); 1 for stages that were not balanced, since a plan's are. Of layouts equally
near the slowest counts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from meshwright.costmodel import constants
from meshwright.costmodel.features import features
from meshwright.costmodel.layouts import RECOMPUTE
from meshwright.costmodel.rowmodel import Dims, config_of
from meshwright.costmodel.runs import Run, parse_all, read_rows
from meshwright.costmodel.sharded import ShardedBlock
from meshwright.costmodel.training import Batch, step
from meshwright.planner.explain import WORDS, time_parts
from meshwright.planner.plan import Layout, Workload
from meshwright.planner.search import Candidate, Search
from meshwright.planner.solve import cost_model
from meshwright.planner.space import Space
from meshwright.planner.stages import Choice, Cut
from meshwright.profiling.cluster import Cluster, Device, Link, Links, Node, devices, load_device
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.trace import trace

console = Console(width=170)
# Built-in devices of the names of rundevices.yaml, and those whose achieved rates stand for the other devices of its tables.
BUILT_IN = {"A100-SXM": "A100-SXM-80GB", "A100-40GB-SXM": "A100-SXM-40GB", "H100-SXM": "H100-SXM", "H100-PCIe": "H100-PCIe",
            "H200-SXM": "H200-SXM", "B200-SXM": "B200", "L40S": "L40S", "RTX4090": "RTX-4090"}  # fmt: skip
TABLES = {"A100": "A100-SXM-80GB", "H100": "H100-SXM", "B200": "B200"}
SCHEDULE = {"zb-1p": "zero-bubble", "zb-v": "zbv", "dualpipe-v": "dualpipev", "1f1b": "1f1b", "interleaved": "1f1b", "gpipe": "gpipe"}
LOGS = ("tp", "cp", "pp", "ep", "dp", "vpp", "micro_batch", "replicas")
# Parts of a layout that an engine has or has not; and those that a group may have in common.
ENGINE = ("cp", "sp", "zero", "schedule")
COMMON = ("tp", "sp", "cp", "pp", "vpp", "dp", "zero", "replicas", "ep", "etp", "micro_batch", "schedule", "recompute")
WAYS = {
    "own": "the planner's own choice, mapped to the nearest timed layout (the acceptance line)",
    "engine": "the same, with cp, sp, ZeRO stage and schedule held where all runs of the group agree: what its engine was used with",
    "asked": "the same, with every part of the layout held that all runs of the group have in common",
    "timed": "the planner's cost model choosing among the timed layouts only",
    "runs": "the step model of runs (predict --runs, fitted to these among others) choosing among the timed layouts only",
}


def short(layout: Layout) -> str:
    """ "tp8+sp pp2 dp4 z1 mb2 full" for a layout."""
    return re.sub(r"(?<=\S)=|\b[tp]p=1 |recompute=|schedule=|loss=", "", str(layout).replace("micro_batch", "mb").replace("zero=", "z"))


@dataclass(frozen=True)
class Point:
    """A layout as distances see it."""

    layout: Layout
    recompute: float  # mean of the layers' modes
    balanced: bool = True  # stages were cut to take equally long
    schedule: str = ""  # where the planner has no such schedule

    def distance(self, other: Point) -> float:
        a, b = self.layout, other.layout
        logs = sum(abs(np.log2(getattr(a, k) / getattr(b, k))) for k in LOGS)
        unlike = (self.family != other.family) + (self.balanced != other.balanced)
        return float(logs + abs(a.zero - b.zero) + abs(self.recompute - other.recompute) + unlike)

    @property
    def family(self) -> str:
        return self.schedule or ("1f1b" if self.layout.schedule == "interleaved" else self.layout.schedule)

    def __str__(self) -> str:
        return f"{short(self.layout)}{f' {self.schedule}' if self.schedule else ''}{'' if self.balanced else ' even'}"


@dataclass(frozen=True)
class Timed:
    """A layout of a group with its published seconds."""

    point: Point
    runs: tuple[Run, ...]

    @property
    def seconds(self) -> float:
        return float(np.median([r.measured_s or np.nan for r in self.runs]))


@dataclass
class Group:
    """One job in several layouts; `failed` are those that ran out of memory."""

    key: tuple[Any, ...]
    timed: list[Timed]
    failed: list[Point]

    @property
    def run(self) -> Run:
        return self.timed[0].runs[0]

    @property
    def best(self) -> float:
        return min(t.seconds for t in self.timed)

    def nearest(self, choice: Point) -> tuple[Timed, float]:
        """The nearest timed layout, of equally near ones the slowest, and how far it is."""
        distances = [choice.distance(t.point) for t in self.timed]
        near = min(distances)
        return max((t for t, d in zip(self.timed, distances) if d < near + 1e-9), key=lambda t: t.seconds), near

    def regret(self, t: Timed) -> float:
        return t.seconds / self.best - 1


@dataclass
class Answer:
    """What the ways chose in one group: regret by way, and how they got there."""

    group: Group
    regret: dict[str, float] = field(default_factory=dict)
    choice: dict[str, str] = field(default_factory=dict)
    mapped: dict[str, str] = field(default_factory=dict)
    distance: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, list[float]] = field(default_factory=dict)  # of each timed layout
    known: set[str] = field(default_factory=set)  # ways whose choice has tp, cp, pp and dp of a timed layout
    unproved: int = 0  # searches that ran out of time
    refused: list[str] = field(default_factory=list)  # timed layouts that do not fit in our model of memory
    near_failed: bool = False  # a layout that ran out of memory is nearer to the choice than any timed one
    why: dict[str, str] = field(default_factory=dict)


# -- from a run to what the planner takes


def layout_of(run: Run) -> Layout:
    """The layout of a run as the planner writes it. InputError for one that it has no words for."""
    dp = round(run.dp)
    if run.tp * run.cp * run.pp * dp != run.n_gpus:
        raise InputError("its degrees do not multiply to its GPUs")
    if run.tp * run.cp * dp % (run.ep * run.etp):
        raise InputError("its expert degrees do not divide a stage")
    schedule = SCHEDULE.get(run.schedule, "1f1b")  # Point.schedule says where the planner has none
    vpp = 2 if schedule in ("zbv", "dualpipev") else run.vpp
    return Layout(
        tp=run.tp, sp=run.sp, cp=run.cp, pp=run.pp, vpp=vpp, dp=dp, zero=run.shard, ep=run.ep, etp=run.etp,  # type: ignore[arg-type]
        replicas=max(1, round(dp * run.cp / run.shard_group)) if run.shard else 1, micro_batch=round(run.micro_batch),
        recompute=run.recompute, schedule="interleaved" if schedule == "1f1b" and vpp > 1 else schedule,  # type: ignore[arg-type]
        loss="vocab_parallel" if run.tp > 1 else "plain",
    )  # fmt: skip


def point_of(run: Run) -> Point:
    unknown = "" if run.schedule in SCHEDULE else run.schedule
    return Point(layout_of(run), float(RECOMPUTE.index(run.recompute)), run.balanced or run.pp == 1, unknown)


def cluster_of(run: Run) -> Cluster:
    """The cluster of a run: the built-in device where there is one, else the datasheet's with the achieved rates of the device whose ops
    stand for it; the run's own links where it names them. A node is as many GPUs as divide the run's, at most what it says."""
    d = run.device
    per_node = next(k for k in range(min(run.per_node, run.n_gpus), 0, -1) if run.n_gpus % k == 0)
    name = BUILT_IN.get(d.name)
    if name and abs(load_device(name).memory_bytes / 2**30 / d.memory_GiB - 1) < 0.1:
        device: str | Device = name
        spec = load_device(name)
    else:
        base = devices()[TABLES[d.table]]
        spec = device = base.model_copy(
            update={
                "name": d.name, "aliases": (), "memory_bytes": d.memory_GiB * 2**30, "memory_bandwidth_Bps": d.memory_Bps,
                "peak_flops": {"bf16": d.peak_flops, "fp32": d.peak_flops * d.rates.get("fp32", 0.5)},
                "devices_per_node": d.per_node, "source": d.source,
                "node_link": base.node_link.model_copy(update={"bandwidth_Bps": d.node_link_Bps, "source": d.source}),
                "network_link": base.network_link.model_copy(update={"bandwidth_Bps": d.network_Bps, "source": d.source}),
            }
        )  # fmt: skip

    def link(own: Link, bandwidth_Bps: float) -> Link | None:
        known = abs(bandwidth_Bps / own.bandwidth_Bps - 1) < 0.01
        return None if known else own.model_copy(update={"bandwidth_Bps": bandwidth_Bps, "source": "the run"})

    links = Links(node=link(spec.node_link, run.node_link_Bps), network=link(spec.network_link, run.network_Bps))
    return Cluster(name=f"{run.n_gpus}x{d.name}", nodes=(Node(device=device, devices=per_node, count=run.n_gpus // per_node),), links=links)


@lru_cache(maxsize=4)
def traced(dims: Dims, seq: int) -> ModelGraph:
    """The model of these dimensions in all its layers. InputError if they make none."""
    config = config_of(dims)
    if config["model_type"] == "gpt2":
        config |= {"n_layer": dims.layers, "n_positions": seq}
    else:
        config |= {"num_hidden_layers": dims.layers, "max_position_embeddings": max(seq, 2048)}
    if config["model_type"] == "deepseek_v3":
        config["first_k_dense_replace"] = dims.dense_first
    if "mlp_only_layers" in config:
        config["mlp_only_layers"] = list(range(dims.dense_first))
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        return trace(str(path), seq=seq, precision="bf16")


class Job:
    """The planner on the job of a run; searches with more held share what was priced."""

    def __init__(self, run: Run, known: dict[tuple[int, bool], tuple[ShardedBlock, ...] | str]) -> None:
        self.graph, self.cluster = traced(run.dims, run.seq), cluster_of(run)
        work = Workload(global_batch=round(run.global_batch), seq=run.seq, precision="bf16")
        costs = cost_model("auto", self.cluster)
        self.search = Search(Space(self.graph, self.cluster, work, {}, costs, known=known), self.cluster.device.memory_bytes)

    def plan(self, fix: dict[str, Any], max_seconds: float) -> tuple[Candidate | None, bool]:
        """The best layout with `fix` held, if any fits, and whether that is proved."""
        search = self.search.holding(fix) if fix else self.search
        outcome = search.run(1, max_seconds=max_seconds)
        return next(iter(outcome.best), None), outcome.certificate.status != "time limit"

    def point(self, c: Candidate) -> Point:
        """The layout of a plan, its stages balanced."""
        layers = [sum(b - a for a, b in chunks) for chunks in self.search.chunks(c)]
        again = sum(x.mode * min(x.layers, n) for x, n in zip(c.cut.choices, layers))
        return Point(c.layout, again / max(1, sum(layers)))

    def price(self, t: Timed | Point, free: bool = False) -> tuple[Candidate, bool]:
        """A timed layout with its own recompute (`free`: with the one that is best) and, unless it was balanced, the cut of its engine; and
        whether that fits. InputError where the space has nothing of the kind."""
        p = t.point if isinstance(t, Timed) else t
        x, s = p.layout, self.search
        if p.schedule:
            raise InputError(f"the planner has no schedule {p.schedule}")
        if (x.tp, x.sp) not in s.space.shardings:
            raise InputError(f"tp={x.tp} is not in the space")
        if x.micro_batch / x.cp not in s.bound.batches:
            raise InputError(f"microbatches of {x.micro_batch} do not divide the batch")
        if x.pp * x.vpp > len(self.graph.layers):
            raise InputError(f"{x.pp * x.vpp} stages are more than {len(self.graph.layers)} layers")
        row, mode = s.row(x), RECOMPUTE.index(x.recompute) if x.recompute in RECOMPUTE else 0
        modes = None if free else (mode,)
        if x.pp > 1 and x.vpp == 1 and not p.balanced and not free:
            ends = engine_ends(len(self.graph.layers), x.pp)
            stages = s.stages(row, modes, unlimited=True)
            chosen = tuple(Choice(mode, b - a if mode else 0) for a, b in zip((0, *ends), ends))
            costs = stages.cost(ends, chosen)
            cut = Cut(stages.step(costs), ends, chosen, costs)
            return s.candidate(row, cut), max(c.live_bytes for c in costs) <= float(s.capacity(row)[0])
        cut = s.stages(row, modes).best()
        fits = cut is not None
        cut = cut or s.stages(row, modes, unlimited=True).best()
        if cut is None:
            raise InputError(f"{x} cannot be cut into stages")
        return s.candidate(row, cut), fits


def engine_ends(layers: int, pp: int) -> tuple[int, ...]:
    """Where stages end that an engine cuts by number of layers: evenly; else with both ends of the model, or the head, as a layer; else
    stages are filled from the front and the last takes what is left, as features._stages has it, or, where that is nothing, evenly."""
    full = -(-layers // pp)
    if layers % pp == 0:
        sizes = [full] * pp
    elif (layers + 2) % pp == 0 and full > 1:
        sizes = [full - 1, *[full] * (pp - 2), full - 1]
    elif (layers - (pp - 1) * full) > 0:
        sizes = [*[full] * (pp - 1), layers - (pp - 1) * full]
    else:
        sizes = [layers // pp + (i < layers % pp) for i in range(pp)]
    return tuple(int(n) for n in np.cumsum(sizes))


# -- groups


def groups_of(runs: Iterable[Run], say: Callable[[str], None], failed: Container[str] = ()) -> list[Group]:
    """Groups with two timed layouts or more; says how many rows are in none, and why. `failed`: runs that ran out of memory."""
    left: Counter[str] = Counter()
    found: dict[tuple[Any, ...], dict[Point, list[Run]]] = defaultdict(lambda: defaultdict(list))
    points: dict[tuple[Any, ...], list[Point]] = defaultdict(list)
    total = 0
    for run in runs:
        total += 1
        if run.frozen:
            left["adapters only"] += 1
            continue
        if {"dimensions", "seq_len", "global_batch"} & set(run.assumed):
            left["dimensions, sequence or batch not published"] += 1
            continue
        try:
            p = point_of(run)
        except InputError as e:
            left[str(e)] += 1
            continue
        key = (run.source, run.model, run.device.name, run.n_gpus, run.seq, run.precision, run.global_batch, run.engine.name, run.year,
               run.dims, run.node_link_Bps, run.network_Bps)  # fmt: skip
        if run.measured_s:
            found[key][p].append(run)
        elif run.id in failed:
            points[key].append(p)
            left["out of memory"] += 1
        else:
            left["no time printed"] += 1
    groups = []
    for key, layouts in found.items():
        if len(layouts) < 2:
            left["one layout of its job timed"] += sum(map(len, layouts.values()))
            continue
        groups.append(Group(key, [Timed(p, tuple(rs)) for p, rs in layouts.items()], points.get(key, [])))
    kept = sum(len(t.runs) for g in groups for t in g.timed)
    distinct = sum(len(g.timed) for g in groups)
    out = ", ".join(f"{n} {why}" for why, n in left.most_common() if n)
    say(f"{total} runs; {len(groups)} groups of {kept} runs in {distinct} layouts; left out: {out}")
    return groups


def held(group: Group, keys: Sequence[str]) -> dict[str, Any]:
    """Parts of the layout that all timed runs of a group have in common."""
    out: dict[str, Any] = {}
    for key in keys:
        values = {getattr(t.point.layout, key) for t in group.timed}
        if len(values) == 1 and not (key == "sp" and all(t.point.layout.tp == 1 for t in group.timed)):
            out[key] = values.pop()
    if "schedule" in out and out["schedule"] in ("1f1b", "interleaved") and "vpp" not in out and keys is COMMON:
        out.pop("schedule")
    return out


def answer(group: Group, known: dict[Any, Any], max_seconds: float) -> Answer:
    """Every way but "runs" on one group."""
    out = Answer(group)
    job = Job(group.run, known)
    for way, fix in (("own", {}), ("engine", held(group, ENGINE)), ("asked", held(group, COMMON))):
        try:
            found, proved = job.plan(fix, max_seconds)
            out.unproved += not proved
        except InputError as e:
            out.why[way] = str(e)
            continue
        if found is None:
            out.why[way] = "nothing fits"
            continue
        point = job.point(found)
        t, d = group.nearest(point)
        out.regret[way], out.choice[way], out.mapped[way], out.distance[way] = group.regret(t), str(point), str(t.point), d
        out.predicted[way] = [found.step_s]
        if any(all(getattr(point.layout, k) == getattr(y.point.layout, k) for k in ("tp", "cp", "pp", "dp")) for y in group.timed):
            out.known.add(way)
        if way == "own":
            out.near_failed = any(point.distance(f) < d - 1e-9 for f in group.failed)
    seconds: list[float] = []
    for t in group.timed:
        try:
            c, fits = job.price(t)
            seconds.append(c.step_s)
            out.refused += [] if fits else [t.runs[0].id]
        except InputError as e:
            seconds.append(np.nan)
            out.why["timed"] = str(e)
    chosen(out, "timed", seconds)
    return out


def chosen(out: Answer, way: str, seconds: Sequence[float]) -> None:
    """Regret of the timed layout that `seconds` say is fastest, of equal ones the slowest."""
    values = np.array(seconds, float)
    out.predicted[way] = list(values)
    if np.isfinite(values).sum() < 2:
        out.why.setdefault(way, "fewer than two layouts can be priced")
        return
    least = np.nanmin(values)
    t = max((t for t, s in zip(out.group.timed, values) if s <= least * (1 + 1e-9)), key=lambda t: t.seconds)
    out.regret[way], out.mapped[way] = out.group.regret(t), str(t.point)


def by_runs(answers: list[Answer]) -> None:
    """The step model of runs on every timed layout, by its shipped constants, which were fitted to these runs among others."""
    rows = [t.runs[0] for a in answers for t in a.group.timed]
    seconds = step(Batch(rows, [features(r) for r in rows]), constants.load().theta)
    at = 0
    for a in answers:
        n = len(a.group.timed)
        chosen(a, "runs", [float(s) for s in seconds[at : at + n]])
        at += n


# -- reports


def summary(answers: list[Answer], way: str) -> Table:
    table = Table("source", "groups", "median %", "mean %", "worst %", "no regret %", "median distance")
    by_source: dict[str, list[Answer]] = {}
    for a in answers:
        if way in a.regret:
            by_source.setdefault(a.group.run.source, []).append(a)

    def cells(mine: list[Answer]) -> list[str]:
        r = 100 * np.array([a.regret[way] for a in mine])
        d = [a.distance[way] for a in mine if way in a.distance]
        percents = [f"{x:.1f}" for x in (np.median(r), r.mean(), r.max())]
        return [str(len(mine)), *percents, f"{100 * (r < 1e-9).mean():.0f}", f"{np.median(d):.1f}" if d else ""]

    for s, mine in by_source.items():
        table.add_row(s, *cells(mine))
    answered = [a for a in answers if way in a.regret]
    if answered:
        table.add_row("all groups", *cells(answered), style="bold")
        medians, means = ([100 * f([a.regret[way] for a in mine]) for mine in by_source.values()] for f in (np.median, np.mean))
        none = np.mean([np.mean([a.regret[way] < 1e-9 for a in mine]) for mine in by_source.values()])
        figures = f"{np.mean(medians):.1f}", f"{np.mean(means):.1f}"
        table.add_row("mean of sources", str(len(by_source)), *figures, "", f"{100 * none:.0f}", "")
        known = [a for a in answered if way in a.known]
        if known:
            table.add_row("degrees were timed", *cells(known))
    return table


def detail(answers: list[Answer]) -> Table:
    table = Table("job", "timed", "own choice", "nearest timed layout", "far", *(f"{w} %" for w in WAYS), title="each group")
    for a in answers:
        r = a.group.run
        job = f"{r.source} {r.model} {r.n_gpus}x{r.device.name} s{r.seq} b{r.global_batch:g} {r.precision}"
        shown = [f"{100 * a.regret[w]:.1f}" if w in a.regret else "-" for w in WAYS]
        far = f"{a.distance['own']:.1f}{'!' if a.near_failed else ''}" if "own" in a.distance else ""
        table.add_row(job, str(len(a.group.timed)), a.choice.get("own", a.why.get("own", "")), a.mapped.get("own", ""), far, *shown)
    return table


def regrets(runs: list[Run], failed: set[str], args: argparse.Namespace) -> None:
    groups = sorted(groups_of(runs, console.print, failed), key=lambda g: (g.run.source, str(g.run.dims), g.run.seq, g.run.n_gpus))
    answers, known, last, started = [], dict[Any, Any](), None, time.perf_counter()
    for i, g in enumerate(groups):
        print(f"\rgroup {i + 1} of {len(groups)}, {time.perf_counter() - started:.0f} s", end="", file=sys.stderr, flush=True)
        if (g.run.dims, g.run.seq) != last:
            known, last = {}, (g.run.dims, g.run.seq)
        answers.append(answer(g, known, args.max_seconds))
    print(file=sys.stderr)
    by_runs(answers)
    console.print(detail(answers))
    for way in WAYS:
        console.print(f"\n{way}: {WAYS[way]}")
        console.print(summary(answers, way))
        for why, n in Counter(a.why[way] for a in answers if way in a.why and way not in a.regret).items():
            console.print(f"  without an answer: {n}: {why}")
    layouts = Counter(a.group.run.source for a in answers for _ in a.group.timed)
    refused = Counter(a.group.run.source for a in answers for _ in a.refused)
    shares = ", ".join(f"{s} {refused[s]} of {n}" for s, n in layouts.items())
    console.print(
        f"of {layouts.total()} timed layouts {refused.total()} do not fit in our model of memory ({shares}); "
        f"{sum(a.near_failed for a in answers)} choices are nearer to a layout that ran out of memory than to a timed one; "
        f"{sum(a.unproved for a in answers)} searches ran out of time"
    )
    if args.json:
        args.json.write_text(json.dumps([
            {"id": [t.runs[0].id for t in a.group.timed], "seconds": [t.seconds for t in a.group.timed], "regret": a.regret,
             "choice": a.choice, "mapped": a.mapped, "distance": a.distance, "predicted": a.predicted, "why": a.why, "refused": a.refused}
            for a in answers
        ], indent=1))  # fmt: skip


def reasons(search: Search, ours: Candidate, theirs: Candidate, most: int = 3) -> str:
    """What our layout saves and pays against theirs, in shares of their predicted step."""
    a, b = time_parts(search, ours), time_parts(search, theirs)
    change = {k: (a.get(k, 0.0) - b.get(k, 0.0)) / theirs.step_s for k in {*a, *b}}
    largest = sorted(change.items(), key=lambda kv: -abs(kv[1]))[:most]
    return ", ".join(f"{WORDS[k]} {100 * v:+.0f} %" for k, v in largest if abs(v) >= 0.005)


def tuned(runs: list[Run], sources: Sequence[str], max_seconds: float) -> None:
    """Jobs that were tuned by hand, the fastest published run of each: their layout and ours, both as we price them."""
    jobs: dict[tuple[Any, ...], Run] = {}
    for r in runs:
        if r.source in sources and r.measured_s and not {"dimensions", "seq_len", "global_batch"} & set(r.assumed):
            key = (sources.index(r.source), r.model, r.device.name, r.n_gpus, r.seq, r.precision, r.global_batch)
            if key not in jobs or r.measured_s < (jobs[key].measured_s or np.inf):
                jobs[key] = r
    rows: dict[str, list[list[str]]] = defaultdict(list)
    known, last, count = dict[Any, Any](), None, Counter[str]()
    ordered = sorted(jobs.values(), key=lambda r: (sources.index(r.source), r.dims.layers * r.dims.hidden**2, str(r.dims), r.seq, r.n_gpus))
    for i, r in enumerate(ordered):
        print(f"\rjob {i + 1} of {len(jobs)}", end="", file=sys.stderr, flush=True)
        name = f"{r.model}, {r.n_gpus} {r.device.name}, seq {r.seq}, batch {r.global_batch:g}, {r.precision}"
        row = [name, "", f"{r.measured_s:.3g}", "", "", "", "", ""]
        rows[r.source].append(row)
        if (r.dims, r.seq) != last:
            known, last = {}, (r.dims, r.seq)
        try:
            job = Job(r, known)
            found, proved = job.plan({}, max_seconds)
            row[4:6] = [short(found.layout), f"{found.step_s:.3g}{'' if proved else ' ?'}"] if found else ["nothing fits", ""]
            row[1] = short(layout_of(r))
            theirs, fits = job.price(point_of(r), free="recompute" in r.assumed)
        except InputError as e:
            row[7] = str(e)
            count[f"{r.source}: cannot be priced"] += 1
            continue
        row[1] = short(theirs.layout)
        row[3] = f"{theirs.step_s:.3g}{'' if fits else ' !'}"
        if found is not None:
            row[6], row[7] = f"{100 * (found.step_s / theirs.step_s - 1):+.0f}", reasons(job.search, found, theirs)
            alike = [k for k in ("tp", "cp", "pp", "ep") if getattr(found.layout, k) == getattr(theirs.layout, k)]
            count[f"{r.source}: {'same tp, cp, pp and ep' if len(alike) == 4 else 'other degrees'}"] += 1
    print(file=sys.stderr)
    for source, lines in rows.items():
        print(f"\n### {source}\n\n| job | their layout | published s | priced s | our layout | priced s | ours % | what changes |")
        print("|---" * 8 + "|")
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    counted = ", ".join(f"{what}: {n}" for what, n in sorted(count.items()))
    print(f"\n{counted}; !: does not fit in our model of memory; ?: not proved in time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="a table of published runs (CSV)")
    parser.add_argument("--where", default="", help="keep the rows where a column has a value, like split=calib")
    parser.add_argument("--source", default="", help="keep the rows of these sources, by source_key, separated by commas")
    parser.add_argument("--tuned", default="", help="show jobs of these sources beside our plans instead, separated by commas")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="of one search; the best so far then counts")
    parser.add_argument("--json", type=Path, help="also write every group as JSON")
    args = parser.parse_args()
    column, _, value = args.where.partition("=")
    sources = [s for s in (args.source or args.tuned).split(",") if s]
    try:
        rows = read_rows(args.runs)
        parsed = parse_all(rows, args.runs, keep=lambda row: (not column or (row.get(column) or "") == value))
    except InputError as e:
        sys.exit(f"regret: {e}")
    runs = [r for _, r in parsed if isinstance(r, Run)]
    if sources:
        runs = [r for r in runs if r.source in sources]
    console.print(f"{len(parsed)} rows, {len(parsed) - len(runs)} not read or of other sources")
    if args.tuned:
        tuned(runs, sources, args.max_seconds)
    else:
        regrets(runs, {r.id for row, r in parsed if isinstance(r, Run) and (row.get("oom") or "").lower() in ("true", "1")}, args)


if __name__ == "__main__":
    main()
