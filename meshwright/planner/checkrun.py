"""Evaluates checks: each model is traced once, the checked layout is priced, and where it does not fit the planner is asked what would."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from meshwright.costmodel.allocator import surroundings
from meshwright.costmodel.inference_memory import InferenceMemory, inference_memory
from meshwright.planner.check import CheckReport, CheckResult, Figures, Finding, Inputs, Setting, Versions, against
from meshwright.planner.checkconfig import CheckConfig, CheckSpec
from meshwright.planner.checknearest import nearest_infer, nearest_train, search_of
from meshwright.planner.plan import Layout, Plan, Range, Workload
from meshwright.planner.search import Search
from meshwright.planner.shardedmodel import shard_model
from meshwright.planner.sharding import NotShardable
from meshwright.planner.solve import _prediction, cost_model, parse_limit
from meshwright.planner.space import divisors, held_of
from meshwright.profiling.cluster import Cluster, parse_cluster
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.loading import one_line
from meshwright.profiling.trace import trace

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """A check with its defaults filled in. `fixed` are the parts of the layout that are held."""

    spec: CheckSpec
    cluster: Cluster
    graph: ModelGraph
    batch: int
    limit_bytes: float
    fixed: dict[str, Any]
    costs: Any
    saved: Plan | None = None
    shardings: dict[Any, Any] = field(default_factory=dict)  # filled as degrees are tried


@dataclass
class Graphs:
    """Traced models, each once."""

    folder: Path
    say: Progress
    _known: dict[tuple[str, int, str, str], ModelGraph] = field(default_factory=dict)

    def get(self, model: str, seq: int, precision: str, sample: str) -> ModelGraph:
        key = (model, seq, precision, sample)
        if key not in self._known:
            self.say(f"tracing {model}")
            self._known[key] = trace(in_folder(self.folder, model), seq=seq, precision=precision, sample=in_folder(self.folder, sample) or None)
        return self._known[key]


def run_checks(
    config: CheckConfig, base: CheckReport | None = None, base_name: str = "", *, partial: bool = False, say: Progress | None = None
) -> CheckReport:
    """Every check of a configuration. One that cannot be evaluated has status "error" and does not hide the others."""
    tell = say or (lambda _: None)
    graphs = Graphs(config.folder, tell)
    versions = Versions.here()
    results = []
    with _importable(config.folder):
        for spec in config.checks:
            tell(f"checking {spec.name}")
            result = run_check(spec, config.file, graphs)
            results.append(against(result, spec, base) if base is not None else result)
    return CheckReport.of(results, config.file, versions=versions, base=base, base_name=base_name, partial=partial)


def run_check(spec: CheckSpec, file: str, graphs: Graphs) -> CheckResult:
    """One check; whatever goes wrong with its model is its `error`."""
    place: dict[str, Any] = {
        "name": spec.name, "informational": spec.informational, "mode": spec.mode, "file": file, "line": spec.line,
        "plan": spec.plan if isinstance(spec.plan, str) else ",".join(f"{k}={v}" for k, v in spec.plan.items()),
    }  # fmt: skip
    try:
        return evaluate(spec, place, graphs)
    except InputError as e:
        why = str(e)
    except (Exception, SystemExit) as e:  # the model's own code runs here, and may raise anything
        why = f"{spec.model} could not be evaluated: {one_line(e)}"
    return CheckResult(**place, status="error", error=" ".join(why.split()))


def evaluate(spec: CheckSpec, place: dict[str, Any], graphs: Graphs) -> CheckResult:
    """Traces and solves one check. Raises InputError."""
    asked = ask(spec, graphs)
    figures, search = evaluate_train(asked) if spec.mode == "train" else (evaluate_infer(asked), None)
    fits = figures.over_bytes <= 0
    nearest: tuple[Setting, ...] = ()
    if not fits:
        graphs.say(f"{spec.name} does not fit; looking for what would")
        nearest = nearest_train(asked, figures, search) if search is not None else nearest_infer(asked, figures, infer_figures)
    coverage = asked.graph.coverage()
    return CheckResult(
        **place, status="fits" if fits else "does_not_fit", figures=figures, nearest=nearest, coverage=coverage,
        warnings=tuple(_warnings(asked)), notes=tuple(asked.graph.notes),
    )  # fmt: skip


def ask(spec: CheckSpec, graphs: Graphs) -> Asked:
    """Fills in what a check leaves open: from its plan, from the cluster, from the device."""
    saved = Plan.load(in_folder(graphs.folder, spec.plan_file)) if spec.plan_file else None
    cluster = spec.cluster if isinstance(spec.cluster, Cluster) else None
    if cluster is None and isinstance(spec.cluster, str):
        cluster = parse_cluster(in_folder(graphs.folder, spec.cluster) if spec.cluster.endswith((".yaml", ".yml")) else spec.cluster)
    if cluster is None:
        assert saved is not None
        cluster = saved.cluster
    limit_bytes = parse_limit(spec.limit, cluster.device.memory_bytes)
    precision = spec.precision or (saved.workload.precision if saved else "fp32" if cluster.device.kind == "cpu" else "bf16")
    seq = spec.seq or (saved.workload.seq if saved else 0)
    fixed = held_of(saved.layout) if saved else spec.fixed
    costs = None if spec.costs == "datasheet" else in_folder(graphs.folder, spec.costs) if spec.costs.endswith(".costs") else spec.costs
    graph = graphs.get(spec.model, seq, precision, spec.sample)
    return Asked(
        spec=spec, cluster=cluster, graph=graph, batch=spec.batch or (saved.workload.global_batch if saved else cluster.size),
        limit_bytes=limit_bytes, fixed=fixed, costs=cost_model(costs, cluster), saved=saved,
    )  # fmt: skip


def evaluate_train(asked: Asked) -> tuple[Figures, Search]:
    """The best layout that fits under what is held, or else the one that needs least."""
    workload = Workload(global_batch=asked.batch, seq=asked.graph.seq, precision=asked.graph.precision)  # type: ignore[arg-type]
    search = search_of(asked, asked.cluster, workload, asked.fixed)
    found = search.run(1).best
    if found:
        best = found[0]
    else:
        best = search.least_memory()[1]
        free = search.stages(best.row, unlimited=True).best()  # the step that it would take if memory were no matter
        best = replace(best, step_s=free.step_s) if free is not None else best
    told = _prediction(search, best, asked.limit_bytes)
    memory = told.memory_bytes
    return Figures(
        inputs=_inputs(asked), layout=best.layout, peak=memory.peak, capacity_bytes=memory.capacity, limit_bytes=asked.limit_bytes,
        by_kind=memory.by_kind, by_metric=_by_metric(memory), peak_stage=memory.peak_stage, peak_event=memory.peak_event,
        step_s=best.step_s,
    ), search  # fmt: skip


def evaluate_infer(asked: Asked) -> Figures:
    """The layout that is held, or the smallest tensor-parallel degree that fits; else the layout that needs least."""
    least: Figures | None = None
    refused = ""
    for tp in [d for d in divisors(asked.cluster.size) if asked.fixed.get("tp", d) == d]:
        for pp in [asked.fixed.get("pp", 1)]:
            try:
                figures = infer_figures(asked, tp, pp)
            except (NotShardable, InputError) as e:
                refused = refused or f"tp={tp} pp={pp}: {e}"
                continue
            if figures.over_bytes <= 0:
                return figures
            if least is None or figures.peak.p95 < least.peak.p95:
                least = figures
    if least is None:
        why = refused or f"tp={asked.fixed.get('tp')} does not divide them"
        raise InputError(f"no layout of {asked.cluster.size} devices is possible: {why}")
    return least


def infer_figures(asked: Asked, tp: int, pp: int, cluster: Cluster | None = None) -> Figures:
    """Memory of serving the check's batch with these degrees; what is left of the devices are replicas that share the batch."""
    where = cluster or asked.cluster
    dp, rest = divmod(where.size, tp * pp)
    if rest or not dp:
        raise InputError(f"tp={tp} x pp={pp} does not divide {where.size} devices")
    if asked.fixed.get("dp", dp) != dp and cluster is None:
        raise InputError(f"tp={tp} x pp={pp} x dp={asked.fixed['dp']} is not the {where.size} devices of the cluster")
    if pp > max(len(asked.graph.layers), 1):
        raise InputError(f"the model has {len(asked.graph.layers)} layers")
    each = -(-asked.batch // dp)
    stages = inference_memory(asked.graph, shard_model(asked.graph, tp, False), each, pp)
    fullest = max(range(len(stages)), key=lambda i: stages[i].live_bytes)
    held: InferenceMemory = stages[fullest]
    device = where.device
    low, high = surroundings(device, communicators=(tp > 1) + (pp > 1)).device
    p50, p95 = float(low.at(held.live_bytes)), float(high.at(held.live_bytes))
    by_kind = held.by_kind() | ({"reserved": p50 - held.live_bytes} if p50 > held.live_bytes else {})
    return Figures(
        inputs=_inputs(asked), layout=Layout(tp=tp, pp=pp, dp=dp, micro_batch=each), peak=Range(p05=p50, p50=p50, p95=p95),
        capacity_bytes=device.memory_bytes, limit_bytes=asked.limit_bytes, by_kind=by_kind, peak_stage=fullest,
        peak_event="forward of the prompt",
    )  # fmt: skip


def in_folder(folder: Path, source: str) -> str:
    """A path of the configuration as seen from here. `file.py:name` keeps its name; `package.module:name` is no path."""
    head, colon, name = source.rpartition(":")
    if colon and not head.endswith(".py"):
        return source
    path, tail = (head, f":{name}") if colon else (source, "")
    return f"{folder / path}{tail}" if path else source


def _inputs(asked: Asked) -> Inputs:
    g = asked.graph
    return Inputs(
        model=asked.spec.model, cluster=asked.cluster.name, devices=asked.cluster.size, batch=asked.batch, seq=g.seq,
        precision=g.precision, numel=g.numel, layers=len(g.layers), hash=g.hash,
    )  # fmt: skip


def _by_metric(memory: Any) -> dict[str, float]:
    """p95 by how it is measured, where the prediction tells."""
    told = getattr(memory, "by_metric", None) or {}
    items = told.items() if isinstance(told, dict) else told.model_dump().items()
    values = {k: v.get("p95") if isinstance(v, dict) else getattr(v, "p95", v) for k, v in items}
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float)}


def _warnings(asked: Asked) -> Iterator[Finding]:
    unknown = asked.graph.coverage().unknown
    if unknown:
        names = ", ".join(f"{name} x{n}" for name, n in sorted(unknown.items()))
        yield Finding(rule="MEM003", text=f"not modelled, counted by the bytes of their outputs: {names}")
    plan = asked.saved
    if plan is None:
        return
    if plan.model.hash != asked.graph.hash:
        why = f"{plan.model.numel:,} parameters then, {asked.graph.numel:,} now" if plan.model.numel != asked.graph.numel else "its graph differs"
        yield Finding(rule="MEM004", text=f"{asked.spec.plan_file} was made for another model: {why}")
    here = Versions.here()
    for name, then in (("meshwright", plan.created_by.version), ("torch", plan.created_by.torch)):
        if then != getattr(here, name):
            yield Finding(rule="MEM004", text=f"{asked.spec.plan_file} was made with {name} {then}, this is {getattr(here, name)}")


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """`package.module:name` is looked for beside the configuration first."""
    path = str(folder.resolve())
    sys.path.insert(0, path)
    try:
        yield
    finally:
        if path in sys.path:
            sys.path.remove(path)
