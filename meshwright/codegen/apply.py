"""apply: a live model and a Plan to a model that trains as planned, on the ranks of this process group.

The order is tensor parallelism, recompute, FSDP. What runs are the pieces of runtime/, as in an emitted script; the code around
the layers is the plan's program, interpreted.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from meshwright.codegen.runtime import loss as losses
from meshwright.codegen.runtime.context import attend, slice_tokens
from meshwright.codegen.runtime.experts import fully_shard_layer, place_experts
from meshwright.codegen.runtime.mesh import Mesh
from meshwright.codegen.runtime.optimizer import Streamed, by_mesh, clip_gradients
from meshwright.codegen.runtime.pipeline import add_tied_gradients, first_last_pair, held_twice, mean_over_ranks
from meshwright.codegen.runtime.recompute import recompute
from meshwright.codegen.runtime.split_backward import split_backward
from meshwright.codegen.runtime.steps import accumulate, pipeline, run_schedule
from meshwright.codegen.runtime.tensor_parallel import Local
from meshwright.codegen.runtime.weights import gather_full
from meshwright.codegen.stage import Chunks, ProgramStage, WholeModel, split, split_ties
from meshwright.costmodel import schedules
from meshwright.costmodel.layouts import LOSS_CHUNKS, SPLIT
from meshwright.planner.plan import Layout, ModuleSharding, Plan
from meshwright.planner.states import parse
from meshwright.planner.token_dims import token_dim
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelInput

LOG = logging.getLogger("meshwright")
PipelineSchedule = PipelineScheduleSingle | PipelineScheduleMulti
LossFn = Callable[[Tensor, Any], Tensor]
# by the plan's names: the class in torch.optim and what it takes on a GPU; none makes temporaries (DTensor has no fused SGD)
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {"fused": True}), "sgd-momentum": ("SGD", {"momentum": 0.9, "foreach": False}), "sgd": ("SGD", {"foreach": False}),
}  # fmt: skip
SCHEDULES: dict[str, type[PipelineSchedule]] = {
    "1f1b": Schedule1F1B, "gpipe": ScheduleGPipe, "interleaved": ScheduleInterleaved1F1B, "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble, "dualpipev": ScheduleDualPipeV, "looped-bfs": ScheduleLoopedBFS,
}  # fmt: skip


class PlanMismatch(InputError):
    """The plan is for another number of ranks, or for another model."""


def packed_parameters(plan: Plan) -> dict[str, tuple[int, int]]:
    """Full names of parameters that are sharded inside pieces: their dimension and number of pieces."""
    found = {}
    for prefix, modules in _sharded_modules(plan):
        for m in modules:
            for name, text in m.params.items():
                state = parse(text)
                if state.pieces > 1:
                    found[".".join(x for x in (prefix, m.module, name) if x)] = (state.dim, state.pieces)
    for e in plan.solution.experts:
        owners = [f"{e.module}.{e.listed}.{i}" for i in range(e.experts)] if e.listed else [e.module]
        states = {f"{owner}.{name}": parse(text) for owner in owners for name, text in e.params.items()}
        for path in (plan.model.layer_paths[i] for i in e.layers):
            found |= {f"{path}.{name}": (state.dim, state.pieces) for name, state in states.items() if state.pieces > 1}
    return found


def _sharded_modules(plan: Plan) -> Iterator[tuple[str, tuple[ModuleSharding, ...]]]:
    for group in plan.solution.layer_shardings:
        for i in group.layers:
            yield plan.model.layer_paths[i], group.modules
    yield "", plan.solution.module_shardings


class Parallel:
    """A model that trains as a Plan says. `stage` is this rank's part, `parts` its chunks; parameters keep the model's own names."""

    def __init__(self, plan: Plan, parts: Sequence[nn.Module], mesh: Mesh, loss: LossFn) -> None:
        self.plan, self.parts, self.mesh, self.loss = plan, tuple(parts), mesh, loss
        self.stage: nn.Module = parts[0] if len(parts) == 1 else Chunks(parts)
        self.is_first, self.is_last = any(p.is_first for p in parts), any(p.is_last for p in parts)
        self.last_rank = last_rank(plan.layout)
        self.schedule: PipelineSchedule | None = None
        self.tied = split_ties(plan) if plan.layout.pp > 1 else []
        self._pair = first_last_pair(mesh, self.last_rank) if self.tied else None
        if plan.layout.pp > 1:
            self.schedule = self.make_schedule()

    def make_schedule(self, examples: Sequence[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = ()) -> PipelineSchedule:
        """The schedule of the rank's chunks; with examples of what each takes and returns, ranks need not tell each other."""
        x, rank = self.plan.layout, self.mesh["pp"].get_local_rank()
        places = [virtual_stage(x, rank, chunk) for chunk in range(len(self.parts))]
        return pipeline(SCHEDULES[x.schedule], self.parts, places, self.mesh, self.plan.microbatches, self._scaled_loss, x.zero, examples)  # type: ignore[no-any-return]

    @property
    def data_parallel_rank(self) -> int:
        """Which part of the global batch this rank reads: samples [r B / dp, (r + 1) B / dp)."""
        return int(self.mesh["replicate"].get_local_rank() * self.plan.layout.shard + self.mesh["shard"].get_local_rank())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under the model's own names; a tied one that two chunks hold comes twice."""
        for part in self.parts:
            for name, p in part.named_parameters():
                yield name.removeprefix("model."), p

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.named_parameters()]

    def train_step(self, inputs: Mapping[str, Tensor], labels: Tensor | None = None) -> Tensor:
        """Forward and backward of one step over all microbatches; gradients are left in the parameters.

        `inputs` by name and `labels` are this data-parallel rank's whole samples. Returns the mean loss of the global batch.
        """
        m = self.plan.model
        batch = [self._own_tokens(inputs[i.name], i) for i in m.inputs]
        own = self._own_tokens(labels, m.labels) if labels is not None else torch.zeros(len(batch[0]), device=batch[0].device)
        if self.schedule is not None:
            total = run_schedule(self.schedule, self.parts, batch, own, self.plan.layout.zero)
        else:
            total = accumulate(self.stage, batch, own, self._scaled_loss, self.plan.microbatches, self.plan.layout.zero)
        if self.tied:
            add_tied_gradients(self.parts, self.tied, self._pair)
        return mean_over_ranks(total, self.mesh, self.last_rank)

    def clip_gradients(self, most: float) -> Tensor:
        """Scales the gradients to a norm of at most `most` over the whole model; returns the norm that they had."""
        x = self.plan.layout
        lists = tuple(f".{e.module}.{e.listed}." for e in self.plan.solution.experts if e.listed)
        apart = [p for n, p in self.named_parameters() if any(path in f".{n}" for path in lists)]
        return clip_gradients(self.parameters(), most, x.devices // x.pp, shared=held_twice(self.parts, self.tied), apart=apart, ep=x.ep)

    def _own_tokens(self, x: Tensor, what: ModelInput | None) -> Tensor:
        """Of whole samples, the tokens that a context-parallel rank holds."""
        dim = token_dim(what.spec, self.plan.workload.seq) if what is not None and self.plan.layout.cp > 1 else None
        return x if dim is None else slice_tokens(x, dim, self.mesh["cp"], self.plan.layout.cp_kind)

    def _scaled_loss(self, output: Tensor, labels: Tensor) -> Tensor:
        if self.plan.layout.loss == "chunked":
            return losses.chunked_cross_entropy(output, self.parts[-1].project, labels, LOSS_CHUNKS) / self.plan.microbatches  # type: ignore[arg-type]
        return self.loss(output, labels) / self.plan.microbatches

    def full_gradients(self) -> dict[str, Tensor]:
        """This stage's gradients, gathered whole and in the model's own order. Collective over the stage's ranks."""
        packed = packed_parameters(self.plan)
        return {n: gather_full(p.grad, packed.get(n)) for n, p in self.named_parameters() if p.grad is not None}

    def full_parameters(self) -> dict[str, Tensor]:
        """This stage's parameters, gathered whole and in the model's own order. Collective over the stage's ranks."""
        packed = packed_parameters(self.plan)
        return {n: gather_full(p, packed.get(n)) for n, p in self.named_parameters()}


def apply(plan: Plan, model: nn.Module, *, loss: LossFn | None = None, device: torch.device | str | None = None) -> Parallel:
    """Shards `model`, which every rank holds with equal weights or on meta, as `plan` says; the model itself is consumed.

    Needs an initialised process group of the plan's size. `loss(output, labels)` is the model file's own where it has one. What is on
    meta stays there, sharded, for the caller to fill. Raises PlanMismatch where ranks or model differ from the plan's.
    """
    x = plan.layout
    if not dist.is_initialized():
        raise PlanMismatch(f"apply needs a process group of {x.devices} ranks: call torch.distributed.init_process_group first")
    if dist.get_world_size() != x.devices:
        raise PlanMismatch(f"the plan needs {x.devices} ranks, found {dist.get_world_size()}: plan again with --cluster of that size")
    _check_model(plan, model)
    kind = torch.device(device).type if device else "cuda" if torch.cuda.is_available() else "cpu"
    mesh = make_mesh(x, kind)
    own = plan.solution.stages[mesh["pp"].get_local_rank()]
    spans = own.chunks or (own.layers,)
    parts, before = [], 0
    for part, span in zip(split(plan, model, spans), spans, strict=True):
        parts.append(_part(plan, part, span, [own.recompute_of(before + i) for i in range(span[1] - span[0])], mesh))
        before += span[1] - span[0]
    return Parallel(plan, parts, mesh, _loss(plan, loss, mesh))


def make_mesh(x: Layout, device_type: str) -> Mesh:
    """The device mesh of a layout."""
    return Mesh(device_type, pp=x.pp, replicate=x.replicate, shard=x.shard, cp=x.cp, tp=x.tp, ep=x.ep, etp=x.etp, zero=x.zero)


def uses_fsdp(plan: Plan) -> bool:
    """Whether parameters are shared, averaged over or cast by FSDP."""
    x = plan.layout
    copies = x.devices // (x.pp * x.ep * x.etp) if plan.solution.experts else 1
    return x.dp * x.cp > 1 or copies > 1 or plan.workload.precision == "bf16"


def virtual_stage(x: Layout, rank: int, chunk: int) -> int:
    """Place in the model's order of a pipeline rank's chunk."""
    return schedules.find(x.schedule).virtual_stage(x.pp, rank, chunk)


def last_rank(x: Layout) -> int:
    """The pipeline rank that holds the end of the model."""
    return 0 if x.vpp > 1 and schedules.find(x.schedule).shape == "V" else x.pp - 1


def _part(plan: Plan, model: nn.Module, span: tuple[int, int], recomputes: Sequence[str], mesh: Mesh) -> nn.Module:
    """The layers of a span with the code around them, sharded: tensor parallelism, experts, attention, recompute, FSDP."""
    x, program = plan.layout, plan.solution.program
    keys = [i.name for i in plan.model.inputs]
    stage: nn.Module = WholeModel(model, keys)
    if program is not None:
        stage = ProgramStage(model, program, *span, mesh, cp_kind=x.cp_kind, chunked=x.loss == "chunked")
    paths = plan.model.layer_paths[slice(*span)]
    if plan.solution.kernels:
        from meshwright.codegen.kernels.install import install  # what generates kernels needs more than torch
        from meshwright.codegen.kernels.planned import kernels_of

        left = install(model, kernels_of(plan)).left
        for path, why in left.items():
            LOG.info("%s stays eager: %s", path, why)
    if x.schedule in SPLIT and x.pp > 1:
        split_backward(stage, [model.get_submodule(p) for p in paths])
    if x.tp > 1:
        shard_modules(plan, model, *span, mesh)
    _tie(plan, model)
    experts = _place_experts(plan, model, span, mesh)
    for path, mode in zip(paths, recomputes, strict=True):
        layer = model.get_submodule(path)
        if x.cp > 1 or plan.solution.kv_replicated:
            attend(layer, cp=mesh["cp"] if x.cp > 1 else None, kind=x.cp_kind, tp=mesh["tp"] if plan.solution.kv_replicated else None)
        recompute(layer, mode)
    held = [*stage.parameters(), *stage.buffers()]
    if any(t.device.type != mesh.device_type for t in held) and not any(t.is_meta for t in held):
        stage.to(_device(mesh))
    if uses_fsdp(plan):
        _data_parallel(plan, stage, [(model.get_submodule(p), e) for p, e in zip(paths, experts, strict=True)], mesh)
    return stage


def _place_experts(plan: Plan, model: nn.Module, span: tuple[int, int], mesh: Mesh) -> list[list[nn.Module]]:
    """Spreads the experts of the layers of a span; the modules that hold them, of each layer."""
    found: list[list[nn.Module]] = []
    for i in range(*span):
        tables = [e for e in plan.solution.experts if i in e.layers]
        found.append([model.get_submodule(f"{plan.model.layer_paths[i]}.{e.module}") for e in tables])
        for e, module in zip(tables, found[-1], strict=True):
            place_experts(module, mesh, experts=e.experts, params=e.params, sizes=e.sizes, listed=e.listed)
    return found


def make_optimizer(plan: Plan, stage: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer | Streamed:
    """The plan's optimizer over a stage's parameters, as an emitted script makes it for a GPU."""
    name, options = OPTIMIZERS[plan.workload.optimizer]
    x = plan.layout
    if x.offload == "none" and x.state_dtype == "fp32":
        made: torch.optim.Optimizer = getattr(torch.optim, name)(by_mesh(stage.parameters()), lr=lr, **options)
        return made
    make = functools.partial(getattr(torch.optim, name), lr=lr, **options)
    dtype, device = torch.bfloat16 if x.state_dtype == "bf16" else None, "cpu" if x.offload == "optimizer" else None
    return Streamed(make, stage.parameters(), dtype=dtype, device=device)


def _check_model(plan: Plan, model: nn.Module) -> None:
    numel = sum(p.numel() for p in model.parameters())
    if numel != plan.model.numel:
        raise PlanMismatch(f"the plan is for {plan.model.name} with {plan.model.numel:,} parameters; this model has {numel:,}")


def _device(mesh: Mesh) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device(mesh.device_type)


def shard_modules(plan: Plan, model: nn.Module, first: int, last: int, mesh: Mesh) -> None:
    """Tensor parallelism of the layers [first, last) and of the modules around them, as far as this stage holds them."""
    owned = set(plan.model.layer_paths[first:last])
    held = dict(model.named_modules())
    for prefix, modules in _sharded_modules(plan):
        if prefix and prefix not in owned:
            continue
        for m in modules:
            module = held.get(".".join(p for p in (prefix, m.module) if p))
            if module is not None and not isinstance(module, nn.Identity):  # else it belongs to another stage
                parallelize_module(module, mesh["tp"], Local(m.params, m.inputs, m.outputs, m.sizes))


def _tie(plan: Plan, model: nn.Module) -> None:
    """Sharding made two parameters of a tied one: make them one again, where this stage still has both."""
    modules = dict(model.named_modules())
    for group in plan.model.tied:
        held = [(owner, name.rpartition(".")[2]) for name in group if (owner := modules.get(name.rpartition(".")[0])) is not None]
        held = [(owner, leaf) for owner, leaf in held if owner._parameters.get(leaf) is not None]
        kept = next((o._parameters[n] for o, n in held if isinstance(o._parameters[n], DTensor)), None)
        for owner, leaf in held:
            owner._parameters[leaf] = kept if kept is not None else held[0][0]._parameters[held[0][1]]


def _data_parallel(plan: Plan, stage: nn.Module, layers: Sequence[tuple[nn.Module, Sequence[nn.Module]]], mesh: Mesh) -> None:
    x = plan.layout
    options: dict[str, Any] = {}
    if plan.workload.precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer, experts in layers:
        fully_shard_layer(layer, experts, mesh, reshard_after_forward=x.zero == 3, **options)
    fully_shard(stage, mesh=mesh.state(), reshard_after_forward=False, **options)


def _loss(plan: Plan, own: LossFn | None, mesh: Mesh) -> LossFn:
    if plan.solution.loss == "vocab_parallel":
        loss = losses.vocab_parallel_cross_entropy
        if any(k.kind == "vocab_parallel_cross_entropy" for k in plan.solution.kernels):
            from meshwright.codegen.kernels.vocab_parallel import vocab_parallel_cross_entropy as loss
        return functools.partial(loss, mesh=mesh["tp"])
    if own is not None:
        return own
    table: dict[str, Any] = {"cross_entropy": losses.cross_entropy, "mse": losses.mse, "square": losses.square}
    if plan.model.objective not in table:
        raise InputError(f"{plan.model.source} has its own loss: pass it as apply(..., loss=loss)")
    return table[plan.model.objective]  # type: ignore[no-any-return]
