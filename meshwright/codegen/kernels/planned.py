"""Kernels in a plan: chosen for its layout, and read back from it."""

from __future__ import annotations

from meshwright.codegen.kernels.choose import Kernel, choose
from meshwright.costmodel.model import CostModel
from meshwright.planner.plan import Plan, PlannedKernel
from meshwright.profiling.graph import ModelGraph

NOTE = "kernels are not in the predicted step and memory: they were not measured on a GPU"


def with_kernels(plan: Plan, graph: ModelGraph, costs: CostModel | None) -> Plan:
    """The plan with the kernels that the cost model prices below eager code for its layout. `graph` is the plan's model."""
    from meshwright.planner.shardedmodel import shard_model  # its solver is not there where plans only run

    x = plan.layout
    sharded = shard_model(graph, x.tp, x.sp)
    chosen = choose(graph, sharded, plan.cluster.device, costs, x.micro_batch, plan.solution.loss, x.cp)
    if plan.solution.kv_replicated:  # rotary kernels know how many heads a rank has
        chosen = tuple(k for k in chosen if k.region is None or k.region.place != "rotary")
    kernels = tuple(PlannedKernel.model_validate(k.model_dump(mode="json")) for k in chosen)
    notes = (*plan.notes, NOTE) if kernels else plan.notes
    return plan.model_copy(update={"solution": plan.solution.model_copy(update={"kernels": kernels}), "notes": notes})


def kernels_of(plan: Plan) -> tuple[Kernel, ...]:
    """The plan's kernels."""
    return tuple(Kernel.model_validate(k.model_dump()) for k in plan.solution.kernels)
