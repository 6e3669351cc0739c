"""The planner's front door: a model, a cluster and a workload in, a Plan out, or why there is none and what would be."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from meshwright.costmodel import constants, schedules
from meshwright.costmodel.layouts import RECOMPUTE
from meshwright.costmodel.memory import OPTIMIZERS
from meshwright.costmodel.model import CostModel, for_device
from meshwright.costmodel.pipeline import Event, makespan, simulate_schedule
from meshwright.costmodel.sharded import ShardedBlock
from meshwright.costmodel.step import SPREAD
from meshwright.planner.expert_tables import expert_tables, without_experts
from meshwright.planner.explain import GIB, bottleneck, does_not_fit, enough_memory, memory_parts, time_parts, why_not
from meshwright.planner.mapping import map_ranks
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
    mesh_of,
)  # fmt: skip
from meshwright.planner.search import Candidate, Outcome, Search
from meshwright.planner.sharding import NotShardable
from meshwright.planner.space import Space, held_of
from meshwright.planner.tables import module_tables, stage_program
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
    max_seconds: float | None = None,
    progress: Progress | None = None,
) -> Plan | Infeasible:
    """The best layout of a model on a cluster, or why none fits.

    `model` is what trace() takes (a config.json, its folder, file.py:factory) or its ModelGraph; `cluster` what parse_cluster
    takes or a Cluster. `precision` defaults to bf16 on GPUs and fp32 on CPUs; `optimizer` is adamw, sgd-momentum or sgd. `limit`
    bounds what a rank takes of its device, with p95 of the prediction. `costs` is a compiled cost model or its file; "auto" takes the
    one shipped for the device where there is one, None the datasheet. `fix` holds parts of the layout, like {"tp": 8}. After
    `max_seconds` the best so far is returned, with its gap. Raises InputError for bad input.
    """
    say = progress or (lambda _: None)
    if not 1 <= top <= MOST:
        words = f"must be at least 1, not {top}" if top < 1 else f"is at most {MOST:,}"
        raise InputError(f"the number of layouts to show {words}")
    asked = prepare(
        model, cluster, global_batch=global_batch, seq=seq, precision=precision, optimizer=optimizer, sample=sample, limit=limit, fix=fix,
        costs=costs, progress=progress,
    )  # fmt: skip
    where, limit_bytes = asked.cluster, asked.limit_bytes()
    say(f"sharding {len(asked.graph.blocks)} unique blocks")
    space = Space(asked.graph, where, asked.workload, asked.fixed, asked.costs)
    say("searching")
    search = Search(space, limit_bytes)
    outcome = search.run(top, lambda n, left: say(f"searching: {n} layouts evaluated, {left} choices of degrees left"), max_seconds)
    if not outcome.best:
        say("nothing fits; looking for what would")
        return _infeasible(search, outcome, limit_bytes)
    mapped = map_ranks(search, outcome.best)
    if mapped is not None:
        say("laying ranks over the measured links")
        found, best, placed = mapped
        made = _assemble(found, Outcome((best,), outcome.certificate), limit_bytes)
        note = (
            f"ranks are laid over the measured links: the best step falls from {outcome.best[0].step_s:.3g} to {best.step_s:.3g} s; traffic alone is "
            f"within {placed.gap:.1%} of a bound for any order; the certificate is for layouts with ranks in the default order"
        )
        solution = made.solution.model_copy(update={"rank_map": tuple(placed.rank_map)})
        return made.model_copy(update={"cluster": where, "solution": solution, "notes": (*made.notes, note)})
    say("explaining")
    return _assemble(search, outcome, limit_bytes)


@dataclass(frozen=True)
class Inputs:
    """What a plan is asked for, checked and traced. `limit` as parse_limit takes it, of any cluster that is tried; blocks are sharded once."""

    graph: ModelGraph
    cluster: Cluster
    workload: Workload
    limit: str = "95%"
    fixed: dict[str, Any] = field(default_factory=dict)
    costs: CostModel | None = None
    known: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def limit_bytes(self, cluster: Cluster | None = None) -> float:
        """Bytes that a rank may use, of this cluster or another."""
        return parse_limit(self.limit, (cluster or self.cluster).device.memory_bytes)

    def search(self, cluster: Cluster | None = None) -> Search:
        """The search of this cluster or another for the same model. Raises InputError where there is no layout."""
        space = Space(self.graph, cluster or self.cluster, self.workload, self.fixed, self.costs, known=self.known)
        return Search(space, self.limit_bytes(cluster))


def prepare(
    model: str | ModelGraph, cluster: str | Cluster, *, global_batch: int, seq: int, precision: str | None = None, optimizer: str = "adamw",
    sample: str | None = None, limit: str = "95%", fix: dict[str, Any] | None = None, costs: str | CostModel | None = "auto",
    progress: Progress | None = None,
) -> Inputs:  # fmt: skip
    """Checks and traces what plan() is given. Raises InputError for bad input."""
    say = progress or (lambda _: None)
    for name, value in (("global batch", global_batch), ("sequence length", seq)):
        if not 1 <= value <= MOST:
            raise InputError(f"the {name} must be at least 1, not {value}" if value < 1 else f"the {name} is at most {MOST:,}")
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
    parse_limit(limit, where.device.memory_bytes)
    workload = Workload(global_batch=global_batch, seq=seq, precision=precision, optimizer=optimizer)  # type: ignore[arg-type]
    return Inputs(model, where, workload, limit, dict(fix or {}), cost_model(costs, where))


def plan_of(graph: ModelGraph, cluster: Cluster, workload: Workload, layout: Layout, costs: CostModel | None = None) -> tuple[Search, Plan]:
    """The plan of one layout, whether it is the best or not, with the search that priced it. Recompute by stage is solved; with tp > 1 a
    plain loss is whatever the sharding makes of it. InputError if the layout is not in the space or does not fit the devices."""
    limit_bytes = cluster.device.memory_bytes
    search = Search(Space(graph, cluster, workload, held_of(layout), costs), limit_bytes)
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
    experts = expert_tables(graph, x)
    if experts and layers:
        blocks = {i: sharded[o.block].block for i, o in enumerate(graph.layers)}
        layers = tuple(g.model_copy(update={"modules": tuple(without_experts(list(g.modules), blocks[g.layers[0]]))}) for g in layers)
    solution = Solution(
        layout=x, stages=_stages(search, best), mesh=mesh_of(x), layer_shardings=layers, module_shardings=modules, loss=x.loss, experts=experts,
        program=stage_program(graph, sharded, x), kv_replicated=any(b.kv_replicated for b in sharded),
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


def _stages(search: Search, best: Candidate) -> tuple[Stage, ...]:
    out = []
    for c, chunks in zip(best.cut.costs, search.chunks(best), strict=True):
        layers = sum(b - a for a, b in chunks)
        whole = c.choice.mode == 0 or c.choice.layers == layers
        out.append(
            Stage(
                layers=chunks[0], chunks=tuple(chunks) if len(chunks) > 1 else (), recompute=RECOMPUTE[c.choice.mode],  # type: ignore[arg-type]
                recompute_layers=None if whole else c.choice.layers, live_bytes=c.live_bytes,
                peak_bytes=search.reserved_bytes(best.row, c.live_bytes)[0], microbatch_s=c.c,
            )
        )  # fmt: skip
    return tuple(out)


def stage_events(plan: Plan, microbatches: int | None = None) -> list[Event]:
    """The events of the plan's schedule for a picture of it: each rank's chunks equal, forward and backward split as 1 to 2, and backward
    in halves where weights have a part of their own."""
    x, stages = plan.layout, plan.solution.stages
    v = schedules.find(x.schedule).shape == "V"
    of_rank = {k: r for r in range(x.pp) for k in ([r, 2 * x.pp - 1 - r] if v else range(r, x.pp * x.vpp, x.pp))}
    chunk = [stages[of_rank[k]].microbatch_s / x.vpp for k in range(x.pp * x.vpp)]
    third = [t / 3 for t in chunk]  # transfers are inside the stages' microbatch seconds
    return simulate_schedule(x.schedule, third, third, third, 0.0, microbatches or plan.microbatches, vpp=x.vpp)


def _prediction(search: Search, best: Candidate, limit_bytes: float) -> Prediction:
    space, fullest = search.space, best.fullest
    found = search.device_bytes(best.row, best.live_bytes)
    p50, p95 = map(float, found.device)
    step, w = best.step_s, space.workload
    name, what, _ = search.memory_of(best, fullest)
    event = f"{name} of {what}"
    return Prediction(
        step_s=Range(p05=step / SPREAD, p50=step, p95=step * SPREAD),
        simulated_step_s=simulated(search, best),
        tokens_per_s=w.global_batch * w.seq / step,
        mfu=search.bound.mfu(step, w.global_batch, space.cluster.size),
        time_s=time_parts(search, best),
        memory_bytes=Memory(
            capacity=space.cluster.device.memory_bytes, limit=limit_bytes, peak=Range(p05=p50, p50=p50, p95=p95),
            by_kind=memory_parts(search, best, fullest), peak_stage=fullest, peak_event=event,
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


def simulated(search: Search, c: Candidate) -> float:
    """The step by the event simulator, with each virtual stage's own forward, backward and weight gradient."""
    m, x, costs = int(c.row.microbatches[0]), c.layout, c.cut.costs
    if x.pp == 1:
        return m * costs[0].c + costs[0].e
    f, b, w = virtual_stage_seconds(search, c)
    schedule = schedules.find(x.schedule)
    # the schedule is periodic once it is full: a long one is its fill and drain plus so many periods
    period = x.pp if schedule.shape == "loop" and x.vpp > 1 else 1
    most = 4 * x.pp * max(1, period // x.pp)
    few = m if m <= most + period else most + (m - most) % period
    send = float(search.priced(c).send[0])

    def seconds(microbatches: int) -> float:
        return makespan(simulate_schedule(x.schedule, f, b, w, send, microbatches, vpp=x.vpp, overlap_send=False))

    events = seconds(few)
    if m > few:
        events += (m - few) // period * (events - seconds(few - period))
    return events + max(y.e for y in costs)


def virtual_stage_seconds(search: Search, c: Candidate) -> tuple[list[float], list[float], list[float]]:
    """Forward, gradient of the input and gradient of the weights of each virtual stage, in the model's order."""
    p, ends, spans = search.priced(c), search.ends, list(zip((0, *c.ends[:-1]), c.ends))
    weights = search.bound.weight_seconds(c.row)
    f, b, w = [], [], []
    seen = dict.fromkeys(range(c.layout.pp), 0)  # layers of the rank in earlier chunks
    rank_of = {span: r for r, chunks in enumerate(search.chunks(c)) for span in chunks}
    for first, last in spans:
        rank = rank_of[first, last]
        choice, kinds = c.cut.choices[rank], search.device_type(c, rank)
        layers = ends.layers[first:last]
        modes = np.where(seen[rank] + np.arange(len(layers)) < choice.layers, choice.mode, 0)
        seen[rank] += len(layers)
        outside = [*([ends.before, ends.between] if first == 0 else []), *([ends.after] if last == len(ends.layers) else [])]
        extra = np.concatenate(outside).astype(int) if outside else np.zeros(0, int)
        blocks, modes = np.concatenate([extra, layers]).astype(int), np.concatenate([np.zeros(len(extra), int), modes]).astype(int)
        backward = p.backward[:, 0, blocks] + p.again[:, 0, modes, blocks]
        rows = [(p.forward[k, 0, blocks].sum(), backward[k].sum(), weights[k, blocks].sum()) for k in kinds]
        fs, whole, ws = (float(v) for v in max(rows, key=lambda r: r[0] + r[1]))
        f.append(fs)
        b.append(whole - min(ws, whole))
        w.append(min(ws, whole))
    return f, b, w


def _alternative(search: Search, c: Candidate, best_s: float) -> Alternative:
    return Alternative(
        layout=c.layout, step_s=c.step_s, peak_bytes=search.reserved_bytes(c.row, c.live_bytes)[0], slower=c.step_s / best_s - 1,
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
    if c.pruned_by_memory:
        out.append(Rejected(constraint="memory", count=c.pruned_by_memory, example="no cut into stages and no recompute makes them fit"))
    if c.pruned_by_bound:
        out.append(Rejected(constraint="step time bound", count=c.pruned_by_bound, example="no cut into stages can beat the layouts shown"))
    if c.infeasible:
        out.append(Rejected(constraint="evaluated", count=c.infeasible, example="no cut into stages fits and beats the layouts shown"))
    for reason, count in search.space.skipped.items():
        fix, _, why = reason.partition(": ")
        out.append(Rejected(constraint=why, count=count, example=fix))
    return tuple(out)


def _notes(space: Space, x: Layout) -> tuple[str, ...]:
    out = list(space.graph.notes)
    replicated = sorted({name for b in space.shardings[x.tp, x.sp] for name in b.unknown}) if x.tp > 1 else []
    if replicated:
        out.append(f"computed on every tensor-parallel rank, for want of a sharding rule: {', '.join(replicated)}")
    whole = sorted({n for b in space.shardings[x.tp, x.sp] for n in _whole_matrices(b)}) if x.tp > 1 else []
    if whole:
        out.append(f"matrices that are whole on every tensor-parallel rank: {', '.join(whole)}")
    if space.cluster.mixed:
        out.append("the cluster mixes devices: each stage is priced as the slowest of its own, ranks numbered node by node as the cluster lists them")
    if any(op.args.get("p") for b in space.graph.blocks for op in b.ops if op.target.startswith("aten.dropout")):
        out.append("the model has dropout: its masks, and so its losses, depend on the layout")
    if any(b.kind == "experts" for block in space.graph.blocks for b in block.ops):
        out.append("experts are priced with balanced routing")
    return tuple(out)


def _whole_matrices(b: ShardedBlock) -> Iterator[str]:
    """Matrices that the block does not split, but for the experts' and their router's, which are another degree's."""
    routed = {v for op in b.block.ops if op.name in b.routed for v in op.inputs}
    for name, state in b.params.items():
        if len(b.block.param(name).shape) > 1 and not state.startswith("S") and f"param:{name}" not in routed:
            yield f"{b.block.name}.{name}" if b.block.repeated else name


def _inputs_hash(space: Space, limit_bytes: float) -> str:
    stamp = space.costs.stamp if space.costs else ""
    asked = (space.workload.model_dump_json(), sorted(space.fixed.items()), limit_bytes)
    parts = (space.graph.hash, space.cluster.model_dump_json(), stamp, *asked)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


# --- nothing fits ------------------------------------------------------------------------------------------------------


def _infeasible(search: Search, outcome: Outcome, limit_bytes: float) -> Infeasible:
    space = search.space
    _, least = search.least_memory()
    return Infeasible(
        schema="meshwright.infeasible/1", model=space.graph.name, cluster=space.cluster.name, workload=space.workload,
        needs_bytes=search.reserved_bytes(least.row, least.live_bytes)[1], limit_bytes=limit_bytes, least=does_not_fit(search, least),
        nearest=tuple(relaxations(search, least)), rejected=_rejected(search, outcome), solver=outcome.certificate,
        coverage=space.graph.coverage(),
    )  # fmt: skip


def relaxations(search: Search, least: Candidate) -> Iterator[Nearest]:
    """The smallest changes with which something fits, each solved: one held choice set free, half the batch, more nodes, more memory."""
    space = search.space
    for key in space.fixed:
        found = _solved(search, space.cluster, space.workload, {k: v for k, v in space.fixed.items() if k != key})
        if found is not None:
            tried, best = found
            yield _nearest(tried, best, f"{key}={_shown(getattr(best.layout, key))} instead of {_shown(space.fixed[key])}")
    smaller = space.workload.global_batch // 2
    while smaller >= 1 and space.workload.global_batch % smaller == 0:
        workload = space.workload.model_copy(update={"global_batch": smaller})
        found = _solved(search, space.cluster, workload, space.fixed)
        if found is not None:
            yield _nearest(*found, f"a global batch of {smaller} instead of {space.workload.global_batch}")
            break
        smaller //= 2
    more = _more_nodes(search)
    if more is not None:
        yield more
    yield _more_memory(search, least)


def _shown(value: Any) -> Any:
    return ("off", "on")[value] if isinstance(value, bool) else value


def _nearest(search: Search, best: Candidate, change: str) -> Nearest:
    p95 = search.reserved_bytes(best.row, best.live_bytes)[1]
    return Nearest(change=change, layout=best.layout, peak_bytes=p95, step_s=best.step_s)


def _solved(search: Search, cluster: Cluster, workload: Workload, fixed: dict[str, Any]) -> tuple[Search, Candidate] | None:
    """The best layout of another cluster, batch or choice for the same model; None if nothing fits or there is none."""
    try:
        tried = Search(search.space.like(cluster, workload, fixed), search.limit_bytes)
    except (InputError, NotShardable):
        return None
    found = tried.run(1).best
    return (tried, found[0]) if found else None


def _more_nodes(search: Search, most: int = 4096) -> Nearest | None:
    """The smallest number of nodes of the same kind with which something fits, by doubling and bisection."""
    space = search.space
    if space.cluster.bandwidth_Bps is not None or len(space.cluster.nodes) != 1:
        return None
    node = space.cluster.nodes[0]
    fixed = {k: v for k, v in space.fixed.items() if k != "dp"}

    def solve(count: int) -> tuple[Search, Candidate] | None:
        bigger = space.cluster.model_copy(update={"nodes": (Node(device=node.device, devices=node.devices, count=count),)})
        return _solved(search, Cluster.model_validate(bigger.model_dump()), space.workload, fixed)

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
    return _nearest(*answer, f"{high} nodes of {node.devices} {node.spec.name} ({high * node.devices} devices)")


def _more_memory(search: Search, least: Candidate) -> Nearest:
    """The same devices with enough memory, or more of it allowed, for the least hungry layout."""
    _, p95 = search.reserved_bytes(least.row, least.live_bytes)
    change = enough_memory(p95, search.limit_bytes, search.space.cluster.device.memory_bytes)
    return Nearest(change=change, layout=least.layout, peak_bytes=p95, step_s=least.step_s)
