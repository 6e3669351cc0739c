"""parallelize: shards a module, or the class of one, where it stands in a training script."""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.codegen.apply import apply
from meshwright.codegen.kernels.planned import with_kernels
from meshwright.construction import Construction, construct, kept_rng, materialise
from meshwright.decorated import LOSSES, InDryRun, InProcess, OnRanks, Parallelized
from meshwright.planner import frontier
from meshwright.planner.plan import Plan, Workload
from meshwright.planner.solve import Infeasible, cost_model, parse_limit, prepare
from meshwright.planner.solve import plan as solve
from meshwright.profiling.cluster import Cluster, parse_cluster
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.live import Sample, is_hf, on_meta, own_loss, size_of
from meshwright.profiling.trace import trace
from meshwright.ranks import agreed, discover, from_first, join, refuse
from meshwright.report.terminal import render_infeasible

log = logging.getLogger("meshwright")
ON_INFEASIBLE = ("raise", "warn")
SAMPLES_A_RANK, TOKENS = 8, 2048  # of a model of transformers that comes without a sample


class DoesNotFit(InputError):
    """No layout fits the memory limit. The text says by how much, where the bytes are and what would fit."""

    def __init__(self, refusal: Infeasible) -> None:
        super().__init__(render_infeasible(refusal))
        self.refusal = refusal


@dataclass(frozen=True)
class Options:
    """What parallelize was given, checked."""

    plan: str | Plan
    sample: Sample | Workload | None
    cluster: Cluster | None
    objective: str
    limit: str
    kernels: str | tuple[str, ...]
    on_infeasible: str


@dataclass(frozen=True)
class Subject:
    """What is parallelised: a model on meta, and how to have it for real. `made`: the construction, where it is a class."""

    template: nn.Module
    build: Callable[[], nn.Module]
    made: Construction | None = None

    @property
    def name(self) -> str:
        return type(self.template).__name__


def parallelize(
    module: Any = None, /, *, plan: str | Path | Plan = "auto", sample: Sample | Workload | None = None, cluster: str | Path | Cluster | None = None,
    objective: str = "throughput", memory_limit: float | str = 0.95, kernels: str | tuple[str, ...] = "auto", on_infeasible: str = "raise",
) -> Any:  # fmt: skip
    """Shards a module according to a plan. Usable bare, with arguments, on an nn.Module class or as a function of an instance.

    A class is returned as one that constructs parallel models, and no rank ever holds a whole one; of an instance, a new module is returned.
    `plan` is "auto", which solves now, a saved plan's path, or a Plan. `sample` shows what the model takes: example tensors of a whole
    optimizer step (the batch first, "labels" among them), a function sample(batch=..., seq=...) that makes them, or, for a model of
    transformers, a Workload or nothing. `cluster` is like "8xH100-SXM", a YAML file or a Cluster; by default the ranks of this job.
    `memory_limit` is a share of the device, or bytes as text. Without ranks, a `cluster` of several devices makes a dry run.

    Raises DoesNotFit where nothing fits (with on_infeasible="warn" one process goes on with the plain module), PlanMismatch where plan and
    ranks differ, InputError for bad input. MESHWRIGHT_DISABLE=1 makes it return what it was given.
    """
    if os.environ.get("MESHWRIGHT_DISABLE", "0") not in ("", "0"):
        return module if module is not None else lambda given: given
    options = _options(plan, sample, cluster, objective, memory_limit, kernels, on_infeasible)
    if module is None:
        return functools.partial(_parallelize, options)
    return _parallelize(options, module)


def _parallelize(options: Options, module: Any) -> Any:
    if isinstance(module, type) and issubclass(module, nn.Module):
        return _constructing(options, module)
    if isinstance(module, nn.Module) and not isinstance(module, Parallelized):
        return _make(options, Subject(on_meta(module), functools.partial(copy.deepcopy, module)))
    what = "a module that is parallel already" if isinstance(module, Parallelized) else getattr(module, "__name__", type(module).__name__)
    raise InputError(f"parallelize takes an nn.Module or a class of them, not {what}")


def _constructing(options: Options, cls: type[nn.Module]) -> type[nn.Module]:
    """A class whose construction makes a parallel model of the given one."""

    def refuse_subclass(sub: type, **_: Any) -> None:
        raise InputError(f"{sub.__name__} derives from {cls.__name__}, which is decorated: decorate {sub.__name__} and leave {cls.__name__} plain")

    def construct_parallel(_: type, *args: Any, **kwargs: Any) -> nn.Module:
        make = functools.partial(cls, *args, **kwargs)
        made = construct(make, cls.__name__)
        return _make(options, Subject(made.template, make, made))

    kept = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "__wrapped__": cls}
    metaclass: Any = type(cls)
    return metaclass(cls.__name__, (cls,), {**kept, "__new__": construct_parallel, "__init_subclass__": classmethod(refuse_subclass)})


# --- from options to a model -------------------------------------------------------------------------------------------


def _make(options: Options, subject: Subject) -> nn.Module:
    ranks = join()
    graph = functools.lru_cache(None)(functools.partial(_traced, options, subject.template))
    cluster = options.cluster or discover(ranks)
    plan = functools.partial(_plan, options, subject.template, cluster, graph)
    given = options.plan if isinstance(options.plan, Plan) else None
    found = agreed(subject.template, given, plan) if ranks > 1 else plan()
    if not isinstance(found, Plan):
        refusal = DoesNotFit(found)
        if options.on_infeasible == "raise" or ranks > 1 or cluster.size > 1:
            raise refusal
        log.warning("%s", refusal)
        return InProcess(None, subject.build(), lambda: graph(found.workload), own_loss(subject.template), str(refusal))
    found = _with_kernels(options, found, graph)
    _matches(found, subject, ranks if ranks > 1 or options.cluster is None else options.cluster.size)
    if ranks == 1 or dist.get_rank() == 0:
        step, peak = found.prediction.step_s.p50, found.prediction.memory_bytes.peak
        dry = ranks == 1 and found.layout.devices > 1
        where = f"in a dry run of {found.layout.devices} ranks" if dry else f"on {ranks} ranks" if ranks > 1 else "in one process"
        log.info("%s %s: %s, step %.3g s, peak %.2f GiB predicted", subject.name, where, found.layout, step, peak.p50 / 2**30)
    loss = own_loss(subject.template)
    if loss is None and found.model.objective not in LOSSES:
        raise InputError(f"the plan is for a loss of the model's own: give {subject.name} a method loss(output, labels)")
    again = functools.partial(graph, found.workload)
    if ranks == 1 and found.layout.devices > 1:
        return InDryRun(found, subject.template, again, loss)
    model = subject.build() if ranks == 1 or subject.made is None else on_meta(subject.template)
    loss = own_loss(model)
    if ranks == 1:
        return InProcess(found, model, again, loss)
    model.float()  # the plan's fp32 copy, which optimizers update
    parallel = apply(found, model, loss=loss)
    if subject.made is not None:
        materialise(parallel, subject.made, from_first(torch.initial_seed()))
    return OnRanks(parallel, subject.template, again)


def _plan(options: Options, template: nn.Module, cluster: Cluster, graph: Callable[[Workload], ModelGraph]) -> Plan | Infeasible:
    if isinstance(options.plan, Plan):
        return options.plan
    if options.plan != "auto":
        return Plan.load(options.plan)
    w = _workload(options, template, cluster)
    asked: dict[str, Any] = {
        "global_batch": w.global_batch, "seq": w.seq, "precision": w.precision, "optimizer": w.optimizer, "limit": options.limit,
    }  # fmt: skip
    if options.objective == "throughput":
        return solve(graph(w), cluster, **asked)
    found = frontier.plan_for(options.objective, prepare(graph(w), cluster, **asked))  # type: ignore[arg-type]
    assert not isinstance(found, frontier.TooSlow)  # there is no deadline
    return found


def _with_kernels(options: Options, plan: Plan, graph: Callable[[Workload], ModelGraph]) -> Plan:
    """The plan with the kernels that were asked for: its own, none, those that the cost model chooses, or some of these by name."""
    if options.kernels == "auto":
        return plan
    chosen = with_kernels(plan, graph(plan.workload), cost_model("auto", plan.cluster)) if options.kernels != "off" else plan
    known = {k.name: k for k in chosen.solution.kernels}
    names = () if options.kernels == "off" else tuple(known) if options.kernels == "on" else options.kernels
    unknown = next((n for n in names if n not in known), None)
    if unknown is not None:
        raise InputError(f"the plan has no kernel {unknown!r}: it has {', '.join(known) or 'none'}")
    kept = tuple(k for k in chosen.solution.kernels if k.name in names)
    return chosen.model_copy(update={"solution": chosen.solution.model_copy(update={"kernels": kept})})


def _traced(options: Options, template: nn.Module, workload: Workload) -> ModelGraph:
    sample = None if isinstance(options.sample, Workload) else options.sample
    with kept_rng():
        return trace(template, seq=workload.seq, precision=workload.precision, sample=sample)


def _workload(options: Options, template: nn.Module, cluster: Cluster) -> Workload:
    """What one optimizer step is: the sample's batch and length. Several GPUs compute in bf16, one process as the model is."""
    if isinstance(options.sample, Workload):
        return options.sample
    plain = all(p.dtype == torch.bfloat16 for p in template.parameters() if p.is_floating_point())
    precision = "bf16" if plain or (cluster.device.kind == "cuda" and cluster.size > 1) else "fp32"
    if options.sample is not None:
        batch, seq = size_of(options.sample)
    elif is_hf(template):
        config: Any = template.config
        most = getattr(config.get_text_config(), "max_position_embeddings", None) or TOKENS
        batch, seq = SAMPLES_A_RANK * cluster.size, min(most, TOKENS)
    else:
        name = type(template).__name__
        raise InputError(f"{name} needs a sample of its inputs: sample=example tensors, batch first, or a function sample(batch=.., seq=..)")
    return Workload(global_batch=batch, seq=seq, precision=precision)  # type: ignore[arg-type]


def _matches(plan: Plan, subject: Subject, devices: int) -> None:
    """Raises PlanMismatch, told on rank 0, where the plan is for another number of ranks or another model."""
    if plan.layout.devices != devices:
        try:
            where = frontier.of_size(plan.cluster, devices).name
        except InputError:
            where = f"{devices}x{plan.cluster.device.name}"
        w, m = plan.workload, plan.model
        command = f"meshwright plan {m.source} --cluster {where} --global-batch {w.global_batch} --seq {w.seq} -o plan.json"
        from_file = m.origin == "hf" or m.source.rpartition(":")[0].endswith(".py")
        again = command if from_file else f'parallelize(..., plan="auto"), or solve for --cluster {where}'
        refuse(f"the plan needs {plan.layout.devices} ranks, found {devices}. Re-plan: {again}")
    numel = sum(p.numel() for p in subject.template.parameters())
    paths = {name for name, _ in subject.template.named_modules()}
    if numel != plan.model.numel:
        refuse(f"the plan is for {plan.model.name} with {plan.model.numel:,} parameters; {subject.name} has {numel:,}")
    missing = next((p for p in plan.model.layer_paths if p not in paths), None)
    if missing is not None:
        refuse(f"the plan is for {plan.model.name}, whose layers include {missing}; {subject.name} has no such module")


# --- what was given ----------------------------------------------------------------------------------------------------


def _options(
    plan: Any, sample: Any, cluster: Any, objective: Any, memory_limit: Any, kernels: Any, on_infeasible: Any
) -> Options:  # fmt: skip
    if not isinstance(plan, str | Path | Plan):
        raise InputError(f'plan is "auto", the path of a saved plan, or a Plan, not {type(plan).__name__}')
    if sample is not None and not (callable(sample) or isinstance(sample, Mapping | tuple | list | Tensor | Workload)):
        raise InputError(f"sample is example tensors, a function sample(batch, seq) or a Workload, not {type(sample).__name__}")
    if cluster is not None and not isinstance(cluster, str | Path | Cluster):
        raise InputError(f"cluster is like '8xH100-SXM', a YAML file or a Cluster, not {type(cluster).__name__}")
    where = parse_cluster(str(cluster)) if isinstance(cluster, str | Path) else cluster
    if objective not in frontier.OBJECTIVES:
        raise InputError(f"objective {objective!r} is not known: it is one of {', '.join(frontier.OBJECTIVES)}")
    share = isinstance(memory_limit, int | float) and not isinstance(memory_limit, bool)
    if share and not 0 < memory_limit <= 1:
        raise InputError(f"memory_limit {memory_limit} is not a share of the device: it is above 0 and at most 1, or bytes as text like '76GiB'")
    if not share and not isinstance(memory_limit, str):
        raise InputError(f"memory_limit is a share like 0.95 or bytes like '76GiB', not {type(memory_limit).__name__}")
    limit = f"{memory_limit * 100:.6f}%" if share else str(memory_limit)
    parse_limit(limit, float("inf"))
    if kernels not in ("auto", "on", "off") and not (isinstance(kernels, tuple | list) and all(isinstance(k, str) for k in kernels)):
        raise InputError(f"kernels is 'auto', 'on', 'off' or a tuple of names, not {kernels!r}")
    if on_infeasible not in ON_INFEASIBLE:
        raise InputError(f"on_infeasible {on_infeasible!r} is not known: it is one of {', '.join(ON_INFEASIBLE)}")
    return Options(
        plan=str(plan) if isinstance(plan, Path) else plan, sample=sample, cluster=where, objective=objective, limit=limit,
        kernels=kernels if isinstance(kernels, str) else tuple(kernels), on_infeasible=on_infeasible,
    )  # fmt: skip
