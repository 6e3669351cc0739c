"""The planner's front door: a model, a cluster and a workload in, a Plan out, or why there is none and what would be."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from meshwright.costmodel import constants
from meshwright.costmodel.memory import OPTIMIZERS
from meshwright.costmodel.model import CostModel, for_device
from meshwright.costmodel.pipeline import Event, makespan, simulate
from meshwright.costmodel.step import SPREAD
from meshwright.planner.explain import GIB, bottleneck, does_not_fit, enough_memory, memory_parts, time_parts, why_not
from meshwright.planner.plan import (
    SCHEMA,
    Alternative,
    Certificate,
    CreatedBy,
    Layout,
    Memory,
    ModelRef,
    Plan,
    Prediction,
    Range,
    Rejected,
    Solution,
    Stage,
    Workload,
)  # fmt: skip
from meshwright.planner.search import Candidate, Outcome, Search
from meshwright.planner.sharding import NotShardable
from meshwright.planner.space import Space
from meshwright.planner.tables import module_tables, stage_program, uses_vocab_parallel_loss
from meshwright.profiling.cluster import Cluster, Node, parse_cluster
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import Coverage, ModelGraph
from meshwright.profiling.loading import read_config
from meshwright.profiling.trace import trace
from meshwright.version import __version__

MOST = 10**9  # samples, tokens or layouts that can be asked for
Progress = Callable[[str], None]


class Nearest(BaseModel):
    """A change with which the model would fit, found by solving with it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    change: str
    layout: Layout
    peak_bytes: float
    step_s: float


class Infeasible(BaseModel):
    """No layout fits: the least that one needs, and the nearest changes that would fit."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["meshwright.infeasible/1"] = Field("meshwright.infeasible/1", alias="schema")
    model: str
    cluster: str
    workload: Workload
    needs_bytes: float
    limit_bytes: float
    least: str
    nearest: tuple[Nearest, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    solver: Certificate
    coverage: Coverage


def parse_limit(text: str, capacity: float) -> float:
    """Bytes that a rank may use: "95%" of the device's memory, or "76GiB", "80GB". InputError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[KMGT]i?B|B)\s*", text)
    if not match:
        raise InputError(f"memory limit {text!r} is neither a share like 95% nor bytes like 76GiB")
    number, unit = float(match[1]), match[2]
    if unit == "%":
        limit = capacity * number / 100
    else:
        base = 1024 if "i" in unit else 1000
        limit = number * (1 if unit == "B" else base ** (1 + "KMGT".index(unit[0])))
    if not 0 < limit <= capacity:
        raise InputError(f"memory limit {text!r} is {limit / GIB:.1f} GiB: it must be above 0 and at most the device's {capacity / GIB:.1f} GiB")
    return limit


def plan(
    model: str | ModelGraph,
    cluster: str | Cluster,
    *,
    global_batch: int,
    seq: int,
    precision: str | None = None,
    optimizer: str = "adamw",
    sample: str | None = None,
    limit: str = "95%",
    fix: dict[str, Any] | None = None,
    top: int = 5,
    costs: str | CostModel | None = "auto",
    progress: Progress | None = None,
) -> Plan | Infeasible:
    """The best layout of a model on a cluster, or why none fits.

    `model` is what trace() takes (a config.json, its folder, file.py:factory) or its ModelGraph; `cluster` what parse_cluster
    takes or a Cluster. `precision` defaults to bf16 on GPUs and fp32 on CPUs; `optimizer` is adamw, sgd-momentum or sgd. `limit`
    bounds what a rank takes of its device, with p95 of the prediction. `costs` is a compiled cost model or its file; "auto" takes the
    one shipped for the device where there is one, None the datasheet. `fix` holds parts of the layout, like {"tp": 8}. Raises
    InputError for bad input.
    """
    say = progress or (lambda _: None)
    for name, value in (("global batch", global_batch), ("sequence length", seq), ("number of layouts to show", top)):
        if value < 1:
            raise InputError(f"the {name} must be at least 1, not {value}")
        if value > MOST:
            raise InputError(f"the {name} is at most {MOST:,}")
    if optimizer not in OPTIMIZERS:
        raise InputError(f"optimizer {optimizer!r} is not known: it is one of {', '.join(OPTIMIZERS)}")
    where = parse_cluster(cluster) if isinstance(cluster, str) else cluster
    precision = precision or ("fp32" if where.device.kind == "cpu" else "bf16")
    if isinstance(model, str):
        say(f"tracing {model}")
        model = trace(model, seq=seq, precision=precision, sample=sample)
    if not model.numel:
        raise InputError(f"{model.name} has no parameters: there is nothing to train")
    if (model.seq, model.precision) != (seq, precision):
        raise InputError(f"the model was traced at sequence {model.seq} in {model.precision}, not at {seq} in {precision}")
    workload = Workload(global_batch=global_batch, seq=seq, precision=precision, optimizer=optimizer)  # type: ignore[arg-type]
    limit_bytes = parse_limit(limit, where.device.memory_bytes)
    say(f"sharding {len(model.blocks)} unique blocks")
    space = Space(model, where, workload, fix or {}, cost_model(costs, where))
    say("searching")
    search = Search(space, limit_bytes)
    outcome = search.run(top, progress=lambda n, of: say(f"searching: {n} of {of} layouts evaluated"))
    if not outcome.best:
        say("nothing fits; looking for what would")
        return _infeasible(search, outcome, limit_bytes)
    say("explaining")
    return _assemble(search, outcome, limit_bytes)


def plan_of(graph: ModelGraph, cluster: Cluster, workload: Workload, layout: Layout, costs: CostModel | None = None) -> tuple[Search, Plan]:
    """The plan of one layout, whether it is the best or not, with the search that priced it. InputError if it is not in the space or
    does not fit the devices."""
    fixed = {k: getattr(layout, k) for k in ("tp", "sp", "pp", "dp", "zero", "micro_batch", "recompute", "schedule")}
    limit_bytes = cluster.device.memory_bytes
    search = Search(Space(graph, cluster, workload, fixed, costs), limit_bytes)
    outcome = search.run(1)
    if not outcome.best:
        raise InputError(f"{graph.name} with {layout} does not fit {cluster.name}")
    return search, _assemble(search, outcome, limit_bytes)


def cost_model(costs: str | CostModel | None, cluster: Cluster) -> CostModel | None:
    """The cost model of a cluster's device: the given one, or the shipped one of a built-in device."""
    if costs is None or isinstance(costs, CostModel):
        return costs
    if costs != "auto":
        return CostModel.load(costs)
    built_in = all(isinstance(n.device, str) for n in cluster.nodes)
    return for_device(cluster.device.name) if built_in else None


def _assemble(search: Search, outcome: Outcome, limit_bytes: float) -> Plan:
    space, graph, cluster, workload = search.space, search.space.graph, search.space.cluster, search.space.workload
    best = outcome.best[0]
    x = best.layout
    sharded = space.shardings[x.tp, x.sp]
    layers, modules = module_tables(graph, sharded) if x.tp > 1 else ((), ())
    costs = search.stages(best.index).costs(list(best.ends))
    starts = [0, *best.ends[:-1]]
    solution = Solution(
        layout=x,
        stages=tuple(
            Stage(layers=(a, b), live_bytes=c.live_bytes, peak_bytes=search.reserved_bytes(best.index, c.live_bytes)[0], microbatch_s=c.c)
            for a, b, c in zip(starts, best.ends, costs, strict=True)
        ),
        mesh={"pp": x.pp, "replicate": x.replicate, "shard": x.shard, "tp": x.tp},
        layer_shardings=layers, module_shardings=modules,
        loss="vocab_parallel" if x.tp > 1 and uses_vocab_parallel_loss(sharded) else "plain",
        program=stage_program(graph, sharded, x),
    )  # fmt: skip
    made = Plan(
        schema=SCHEMA, created_by=CreatedBy(version=__version__, torch=torch.__version__), inputs_hash=_inputs_hash(space, limit_bytes),
        model=_model_ref(graph), cluster=cluster, workload=workload, solution=solution, prediction=_prediction(search, best, limit_bytes),
        alternatives=tuple(_alternative(search, c, best.step_s) for c in outcome.best), why_not=tuple(why_not(search, best)),
        rejected=_rejected(search, outcome), solver=outcome.certificate, coverage=graph.coverage(), notes=_notes(space, x),
    )  # fmt: skip
    broken = made.verify()
    if broken:
        raise RuntimeError(f"the planner made an inconsistent plan: {broken[0]}")
    return made


def stage_events(plan: Plan, microbatches: int | None = None) -> list[Event]:
    """The events of the plan's schedule, forward and backward of each stage split as 1 to 2, for a picture of it."""
    send = 0.0  # transfers are inside the stages' microbatch seconds
    f = [s.microbatch_s / 3 for s in plan.solution.stages]
    b = [s.microbatch_s * 2 / 3 for s in plan.solution.stages]
    return simulate(f, b, send, microbatches or plan.microbatches)


def _prediction(search: Search, best: Candidate, limit_bytes: float) -> Prediction:
    space, i = search.space, best.index
    costs = search.stages(i).costs(list(best.ends))
    fullest = max(range(len(costs)), key=lambda s: costs[s].live_bytes)
    found = search.device_bytes(i, costs[fullest].live_bytes)
    p50, p95 = map(float, found.device)
    step, w = best.step_s, space.workload
    name, what, _ = search.memory_of(i, best.ends, fullest)
    event = f"{name} of {what}"
    return Prediction(
        step_s=Range(p05=step / SPREAD, p50=step, p95=step * SPREAD),
        simulated_step_s=_simulated(search, best),
        tokens_per_s=w.global_batch * w.seq / step,
        mfu=search.bound.mfu(step, w.global_batch, space.cluster.size),
        time_s=time_parts(search, best),
        memory_bytes=Memory(
            capacity=space.cluster.device.memory_bytes, limit=limit_bytes, peak=Range(p05=p50, p50=p50, p95=p95),
            by_kind=memory_parts(search, i, best.ends, fullest), peak_stage=fullest, peak_event=event,
            by_metric={
                name: Range(p05=float(low), p50=float(low), p95=float(high))
                for name, (low, high) in (("allocated", found.allocated), ("reserved", found.reserved), ("device", found.device))
            },
        ),
        provenance=_provenance(search),
    )  # fmt: skip


def _provenance(search: Search) -> tuple[str, ...]:
    """Where the figures come from; each kind of op that only the datasheet prices is named."""
    costs, basis = search.space.costs, search.bound.basis
    told = search.space.cluster.provenance
    if search.space.cluster.network_link.provenance != "measured":
        share = f", at the {constants.value('inter'):.0%} of it that published runs reach"
        told = tuple(t + share if t.startswith("network") else t for t in told)
    if costs is None:
        return told
    measured = ", ".join(sorted(k for k, v in basis.items() if v == "fitted"))
    missing = ", ".join(sorted(k for k, v in basis.items() if v == "datasheet"))
    lines = [f"{measured or 'no op'}: compiled cost model of {costs.device} ({costs.origin})"]
    if missing:
        lines.append(f"{missing}: no samples, priced by the datasheet and rooflines")
    if costs.links and search.space.cluster.node_link.provenance in ("datasheet", "fitted"):
        lines.append(f"collectives on one node: compiled cost model of {costs.device}")
        told = tuple(t for t in told if not t.startswith("node link"))
    return (*lines, *told)


def _simulated(search: Search, c: Candidate) -> float:
    """The step by the event simulator, with each stage's own forward and backward."""
    i, costs = c.index, search.stages(c.index).costs(list(c.ends))
    p, m = search.priced, int(search.arrays.microbatches[c.index])
    if len(costs) == 1:
        return m * costs[0].c + costs[0].e
    blocks = [search.stage_blocks(list(c.ends), s) for s in range(len(costs))]
    f = [float(p.forward[i, b].sum()) for b in blocks]
    b = [float(p.backward[i, b].sum()) for b in blocks]
    # the schedule is periodic once it is full: a long one is its fill and drain plus so many periods
    most = 4 * len(costs)
    events = makespan(simulate(f, b, float(p.send[i]), min(m, most)))
    if m > most:
        events += (m - most) * (events - makespan(simulate(f, b, float(p.send[i]), most - 1)))
    return events + max(x.e for x in costs)


def _alternative(search: Search, c: Candidate, best_s: float) -> Alternative:
    return Alternative(
        layout=c.layout, step_s=c.step_s, peak_bytes=search.reserved_bytes(c.index, c.live_bytes)[0], slower=c.step_s / best_s - 1,
        bottleneck=bottleneck(time_parts(search, c)),
    )  # fmt: skip


def _model_ref(graph: ModelGraph) -> ModelRef:
    from pathlib import Path

    return ModelRef(
        name=graph.name, source=graph.source, origin=graph.origin, sample_source=graph.sample_source, hash=graph.hash, numel=graph.numel,
        layers=len(graph.layers), layer_paths=tuple(o.path for o in graph.layers), objective=graph.objective,
        labels_from=graph.labels_from, inputs=graph.inputs, labels=graph.labels, tied=graph.tied,
        config=read_config(Path(graph.source)) if graph.origin == "hf" else None,
    )  # fmt: skip


def _rejected(search: Search, outcome: Outcome) -> tuple[Rejected, ...]:
    c = outcome.certificate
    out = []
    over = c.pruned_by_memory + c.infeasible
    if over:
        i, live, ends = search.least_memory(search.too_large())
        out.append(Rejected(constraint="memory", count=over, example=does_not_fit(search, i, live, ends)))
    if c.pruned_by_bound:
        out.append(Rejected(constraint="step time bound", count=c.pruned_by_bound, example="no cut into stages can beat the layouts shown"))
    for reason, count in search.space.skipped.items():
        fix, _, why = reason.partition(": ")
        out.append(Rejected(constraint=why, count=count, example=fix))
    return tuple(out)


def _notes(space: Space, x: Layout) -> tuple[str, ...]:
    out = list(space.graph.notes)
    replicated = sorted({name for b in space.shardings[x.tp, x.sp] for name in b.unknown}) if x.tp > 1 else []
    if replicated:
        out.append(f"computed on every tensor-parallel rank, for want of a sharding rule: {', '.join(replicated)}")
    if space.cluster.mixed:
        out.append(f"the cluster mixes devices; every one was priced as the slowest, {space.cluster.device.name}")
    if any(op.args.get("p") for b in space.graph.blocks for op in b.ops if op.target.startswith("aten.dropout")):
        out.append("the model has dropout: its masks, and so its losses, depend on the layout")
    if any(b.kind == "experts" for block in space.graph.blocks for b in block.ops):
        out.append("experts are priced with balanced routing, and are not sharded by expert parallelism")
    return tuple(out)


def _inputs_hash(space: Space, limit_bytes: float) -> str:
    stamp = space.costs.stamp if space.costs else ""
    parts = (space.graph.hash, space.cluster.model_dump_json(), stamp, space.workload.model_dump_json(), sorted(space.fixed.items()), limit_bytes)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


# --- nothing fits ------------------------------------------------------------------------------------------------------


def _infeasible(search: Search, outcome: Outcome, limit_bytes: float) -> Infeasible:
    space = search.space
    i, live, ends = search.least_memory()
    nearest = [n for n in (_more_nodes(search, limit_bytes), _more_memory(search, i, live, ends)) if n is not None]
    return Infeasible(
        schema="meshwright.infeasible/1", model=space.graph.name, cluster=space.cluster.name, workload=space.workload,
        needs_bytes=search.reserved_bytes(i, live)[1], limit_bytes=limit_bytes, least=does_not_fit(search, i, live, ends),
        nearest=tuple(nearest), rejected=_rejected(search, outcome), solver=outcome.certificate, coverage=space.graph.coverage(),
    )  # fmt: skip


def _more_nodes(search: Search, limit_bytes: float, most: int = 4096) -> Nearest | None:
    """The smallest number of nodes of the same kind with which something fits, by doubling and bisection."""
    space = search.space
    if space.cluster.bandwidth_Bps is not None or len(space.cluster.nodes) != 1:
        return None
    node = space.cluster.nodes[0]

    def solve(count: int) -> tuple[Search, Candidate] | None:
        bigger = Cluster(name=space.cluster.name, nodes=(Node(device=node.device, devices=node.devices, count=count),), links=space.cluster.links)
        try:
            tried = Search(Space(space.graph, bigger, space.workload, space.fixed, space.costs), limit_bytes)
        except (InputError, NotShardable):
            return None
        found = tried.run(1).best
        return (tried, found[0]) if found else None

    low, count, answer = node.count, node.count * 2, None
    while count <= most:
        answer = solve(count)
        if answer is not None:
            break
        low, count = count, count * 2
    if answer is None:
        return None
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        tried = solve(middle)
        if tried is None:
            low = middle
        else:
            high, answer = middle, tried
    found, best = answer
    name = node.spec.name
    return Nearest(
        change=f"{high} nodes of {node.devices} {name} ({high * node.devices} devices)", layout=best.layout,
        peak_bytes=found.reserved_bytes(best.index, best.live_bytes)[1], step_s=best.step_s,
    )  # fmt: skip


def _more_memory(search: Search, i: int, live: float, ends: list[int]) -> Nearest:
    """The same devices with enough memory, or more of it allowed, for the least hungry layout."""
    _, p95 = search.reserved_bytes(i, live)
    change = enough_memory(p95, search.limit_bytes, search.space.cluster.device.memory_bytes)
    return Nearest(change=change, layout=search.layouts[i], peak_bytes=p95, step_s=search.stages(i).step(ends))
