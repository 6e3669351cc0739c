"""apply: a live model and a Plan to a model that trains as planned, on the ranks of this process group.

The order is tensor parallelism, recompute, FSDP. What runs are the pieces of runtime/, as in an emitted script; the code around
the layers is the plan's program, interpreted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from meshwright.codegen.runtime import loss as losses
from meshwright.codegen.runtime.pipeline import PerMicrobatch, add_tied_gradients, first_last_pair, leave_out, mean_over_ranks, reshard
from meshwright.codegen.runtime.recompute import recompute
from meshwright.codegen.runtime.tensor_parallel import Local, convert
from meshwright.codegen.runtime.weights import gather_full
from meshwright.planner.plan import ModuleSharding, Plan, StageProgram
from meshwright.planner.states import parse
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import Statement
from meshwright.profiling.loading import main_output

LossFn = Callable[[Tensor, Any], Tensor]
MESH = ("pp", "replicate", "shard", "tp")
# by the plan's names: the class in torch.optim and what it takes on a GPU; none makes temporaries (DTensor has no fused SGD)
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {"fused": True}), "sgd-momentum": ("SGD", {"momentum": 0.9, "foreach": False}), "sgd": ("SGD", {"foreach": False}),
}  # fmt: skip
SCHEDULES: dict[str, type[Schedule1F1B] | type[ScheduleGPipe]] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


class PlanMismatch(InputError):
    """The plan is for another number of ranks, or for another model."""


class ProgramStage(nn.Module):
    """Layers [first, last) of a model, with the code before and after them on the first and last stage."""

    def __init__(self, model: nn.Module, program: StageProgram, first: int, last: int, mesh: DeviceMesh) -> None:
        super().__init__()
        self.model, self.program, self.span, self.mesh = model, program, (first, last), mesh
        self.is_first, self.is_last = first == 0, last == len(program.layers)
        drop = [p for i, p in enumerate(program.layers) if not first <= i < last]
        kept = modules_of(program.side)
        drop += [m for m in modules_of(program.stem) if not self.is_first and m not in kept]
        drop += [m for m in modules_of(program.head) if not self.is_last and m not in kept]
        leave_out(model, drop)

    def forward(self, *inputs: Tensor, seen: Callable[[Tensor], None] | None = None) -> Tensor:
        """The stage's output. `seen` is shown what enters the first layer."""
        names = self.program.inputs if self.is_first else ("h",)
        env: dict[str, Any] = dict(zip(names, inputs, strict=True))
        if self.is_first:
            self._run(self.program.stem, env)
        if seen is not None:
            seen(env["h"])
        self._run(self.program.side, env)
        for path in self.program.layers[slice(*self.span)]:
            args, kwargs = self._call(self.program.layer_args, self.program.layer_kwargs, env)
            env["h"] = self.model.get_submodule(path)(*args, **kwargs)
        if not self.is_last:
            return env["h"]  # type: ignore[no-any-return]
        self._run(self.program.head, env)
        return env[self.program.output]  # type: ignore[no-any-return]

    def _run(self, statements: Sequence[Statement], env: dict[str, Any]) -> None:
        for s in statements:
            kind, _, what = s.target.partition(":")
            args, kwargs = self._call(s.args, s.kwargs, env)
            if kind == "module":
                made = self.model.get_submodule(what)(*args, **kwargs)
            elif kind == "convert":
                made = convert(args[0], what, self.mesh["tp"])
            elif kind == "get":
                made = args[0][int(what)]
            else:
                name, _, overload = what.partition(".")
                made = getattr(getattr(torch.ops.aten, name), overload)(*args, **kwargs)
            env.update(zip(s.outputs, made if len(s.outputs) > 1 else (made,), strict=True))

    def _call(self, args: Sequence[Any], kwargs: Mapping[str, Any], env: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        return [self._value(a, env) for a in args], {k: self._value(v, env) for k, v in kwargs.items()}

    def _value(self, x: Any, env: dict[str, Any]) -> Any:
        if isinstance(x, dict):
            if set(x) == {"ref"}:
                return env[x["ref"]]
            if set(x) == {"attr"}:
                return functools.reduce(getattr, x["attr"].split("."), self.model)
            if set(x) == {"device"}:
                return next(v for v in env.values() if isinstance(v, Tensor)).device
            if set(x) == {"dtype"}:
                return getattr(torch, x["dtype"])
            if set(x) == {"tuple"}:
                return tuple(self._value(v, env) for v in x["tuple"])
            if set(x) == {"dict"}:
                return {k: self._value(v, env) for k, v in x["dict"].items()}
        if isinstance(x, list | tuple):
            return type(x)(self._value(v, env) for v in x)
        return x


class WholeModel(nn.Module):
    """A model that runs as it is, returning the tensor that the loss reads."""

    def __init__(self, model: nn.Module, keys: Sequence[str]) -> None:
        super().__init__()
        self.model, self.keys = model, tuple(keys)

    def forward(self, *inputs: Tensor) -> Tensor:
        named = dict(zip(self.keys, inputs, strict=True))
        positional = [named.pop(k) for k in self.keys if k.startswith("input_") and k[6:].isdigit()]
        out = main_output(self.model(*positional, **named))
        assert out is not None
        return out


def modules_of(statements: Sequence[Statement]) -> list[str]:
    """Paths of the modules that statements call."""
    return [s.target.removeprefix("module:") for s in statements if s.target.startswith("module:")]


def packed_parameters(plan: Plan) -> dict[str, tuple[int, int]]:
    """Full names of parameters that are sharded inside pieces: their dimension and number of pieces."""
    found = {}
    for prefix, modules in _sharded_modules(plan):
        for m in modules:
            for name, text in m.params.items():
                state = parse(text)
                if state.pieces > 1:
                    found[".".join(x for x in (prefix, m.module, name) if x)] = (state.dim, state.pieces)
    return found


def _sharded_modules(plan: Plan) -> Iterator[tuple[str, tuple[ModuleSharding, ...]]]:
    for group in plan.solution.layer_shardings:
        for i in group.layers:
            yield plan.model.layer_paths[i], group.modules
    yield "", plan.solution.module_shardings


class Parallel:
    """A model that trains as a Plan says. `stage` is this rank's part; parameters keep the model's own names."""

    def __init__(self, plan: Plan, stage: nn.Module, mesh: DeviceMesh, loss: LossFn) -> None:
        self.plan, self.stage, self.mesh, self.loss = plan, stage, mesh, loss
        x = plan.layout
        self.is_first = mesh["pp"].get_local_rank() == 0
        self.is_last = mesh["pp"].get_local_rank() == x.pp - 1
        self.schedule: Schedule1F1B | ScheduleGPipe | None = None
        self._tied = split_ties(plan) if x.pp > 1 else []
        self._pair = first_last_pair(mesh) if self._tied else None
        if x.pp > 1:
            self.schedule = self.make_schedule()

    def make_schedule(
        self, inputs: tuple[Tensor, ...] | None = None, outputs: tuple[Tensor, ...] | None = None
    ) -> Schedule1F1B | ScheduleGPipe:  # fmt: skip
        """The stage's schedule; with examples of what it takes and returns, ranks need not tell each other."""
        x, at = self.plan.layout, self.mesh["pp"]
        module = PerMicrobatch(self.stage) if isinstance(self.stage, FSDPModule) and x.zero >= 2 else self.stage
        held = PipelineStage(module, at.get_local_rank(), x.pp, _device(self.mesh), inputs, outputs, group=at.get_group())
        return SCHEDULES[x.schedule](held, self.plan.microbatches, loss_fn=self._scaled_loss, scale_grads=False)

    @property
    def data_parallel_rank(self) -> int:
        """Which part of the global batch this rank reads: samples [r B / dp, (r + 1) B / dp)."""
        return int(self.mesh["replicate"].get_local_rank() * self.plan.layout.shard + self.mesh["shard"].get_local_rank())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters under the model's own names."""
        for name, p in self.stage.named_parameters():
            yield name.removeprefix("model."), p

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.named_parameters()]

    def train_step(self, inputs: Mapping[str, Tensor], labels: Tensor | None = None) -> Tensor:
        """Forward and backward of one step over all microbatches; gradients are left in the parameters.

        `inputs` by name and `labels` are this data-parallel rank's samples. Returns the mean loss of the global batch.
        """
        batch = [inputs[i.name] for i in self.plan.model.inputs]
        labels = labels if labels is not None else torch.zeros(len(batch[0]), device=batch[0].device)
        total = self._pipeline(batch, labels) if self.schedule else self._accumulate(batch, labels)
        if self._tied:
            add_tied_gradients(self.stage.get_submodule("model"), self._tied, self._pair)
        return mean_over_ranks(total, self.mesh)

    def _scaled_loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return self.loss(output, labels) / self.plan.microbatches

    def _accumulate(self, batch: list[Tensor], labels: Tensor) -> Tensor:
        n, zero, total = self.plan.microbatches, self.plan.layout.zero, torch.zeros((), device=labels.device)
        parts = zip(*(x.chunk(n) for x in batch), labels.chunk(n), strict=True)
        for i, (*inputs, wanted) in enumerate(parts):
            if isinstance(self.stage, FSDPModule):
                last = i == n - 1
                self.stage.set_requires_gradient_sync(last or zero >= 2)
                self.stage.set_reshard_after_backward(last or zero == 3)
                self.stage.set_is_last_backward(last)
            loss = self._scaled_loss(self.stage(*inputs), wanted)
            loss.backward()
            total += loss.detach()
        return total

    def _pipeline(self, batch: list[Tensor], labels: Tensor) -> Tensor:
        assert self.schedule is not None
        zero = self.plan.layout.zero
        found: list[Tensor] = []
        managed = isinstance(self.stage, FSDPModule) and zero >= 2
        if managed:
            self.stage.set_reshard_after_backward(zero == 3)  # type: ignore[operator]
        inputs = tuple(batch) if self.is_first else ()
        keywords: dict[str, Any] = {"target": labels, "losses": found} if self.is_last else {}
        self.schedule.step(*inputs, return_outputs=False, **keywords)  # or it keeps every microbatch's logits
        if managed:
            reshard(self.stage)
        return torch.stack(found).sum().detach() if found else torch.zeros((), device=labels.device)

    def full_gradients(self) -> dict[str, Tensor]:
        """This stage's gradients, gathered whole and in the model's own order. Collective over the stage's ranks."""
        packed = packed_parameters(self.plan)
        return {n: gather_full(p.grad, packed.get(n)) for n, p in self.named_parameters() if p.grad is not None}

    def full_parameters(self) -> dict[str, Tensor]:
        """This stage's parameters, gathered whole and in the model's own order. Collective over the stage's ranks."""
        packed = packed_parameters(self.plan)
        return {n: gather_full(p, packed.get(n)) for n, p in self.named_parameters()}


def apply(plan: Plan, model: nn.Module, *, loss: LossFn | None = None, device: torch.device | str | None = None) -> Parallel:
    """Shards `model`, which every rank holds with equal weights, as `plan` says; the model itself is consumed.

    Needs an initialised process group of the plan's size. `loss(output, labels)` is the model file's own where it has one.
    Raises PlanMismatch where ranks or model differ from the plan's.
    """
    plan.check_runs()
    x = plan.layout
    if not dist.is_initialized():
        raise PlanMismatch(f"apply needs a process group of {x.devices} ranks: call torch.distributed.init_process_group first")
    if dist.get_world_size() != x.devices:
        raise PlanMismatch(f"the plan needs {x.devices} ranks, found {dist.get_world_size()}: plan again with --cluster of that size")
    _check_model(plan, model)
    kind = torch.device(device).type if device else "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(kind, (x.pp, x.replicate, x.shard, x.tp), mesh_dim_names=MESH)
    own = plan.solution.stages[mesh["pp"].get_local_rank()]
    first, last = own.layers
    program = plan.solution.program
    keys = [i.name for i in plan.model.inputs]
    stage: nn.Module = ProgramStage(model, program, first, last, mesh) if program else WholeModel(model, keys)
    paths = plan.model.layer_paths[first:last]
    if x.tp > 1:
        shard_modules(plan, model, first, last, mesh)
    _tie(plan, model)
    for i, path in enumerate(paths):
        recompute(model.get_submodule(path), own.recompute_of(i))
    if any(t.device.type != mesh.device_type for t in (*stage.parameters(), *stage.buffers())):
        stage.to(_device(mesh))
    if x.dp > 1 or plan.workload.precision == "bf16":
        _data_parallel(plan, stage, [model.get_submodule(p) for p in paths], mesh)
    return Parallel(plan, stage, mesh, _loss(plan, loss, mesh))


def make_optimizer(plan: Plan, stage: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    """The plan's optimizer over a stage's parameters, as an emitted script makes it for a GPU."""
    name, options = OPTIMIZERS[plan.workload.optimizer]
    made: torch.optim.Optimizer = getattr(torch.optim, name)(stage.parameters(), lr=lr, **options)
    return made


def _check_model(plan: Plan, model: nn.Module) -> None:
    numel = sum(p.numel() for p in model.parameters())
    if numel != plan.model.numel:
        raise PlanMismatch(f"the plan is for {plan.model.name} with {plan.model.numel:,} parameters; this model has {numel:,}")


def _device(mesh: DeviceMesh) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device(mesh.device_type)


def shard_modules(plan: Plan, model: nn.Module, first: int, last: int, mesh: DeviceMesh) -> None:
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


def split_ties(plan: Plan) -> list[tuple[str, ...]]:
    """Tied parameters of which the first stage and the last stage each hold one."""
    program = plan.solution.program
    if program is None:
        return []

    def held(group: tuple[str, ...], part: Sequence[Statement]) -> bool:
        return any(name.startswith(m + ".") for name in group for m in modules_of(part))

    return [g for g in plan.model.tied if held(g, program.stem) and held(g, program.head)]


def _data_parallel(plan: Plan, stage: nn.Module, layers: list[nn.Module], mesh: DeviceMesh) -> None:
    x = plan.layout
    options: dict[str, Any] = {"mesh": mesh["replicate", "shard"] if x.zero == 0 else mesh["shard"]}
    if plan.workload.precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, reshard_after_forward=x.zero == 3, **options)
    fully_shard(stage, reshard_after_forward=False, **options)


def _loss(plan: Plan, own: LossFn | None, mesh: DeviceMesh) -> LossFn:
    if plan.solution.loss == "vocab_parallel":
        return functools.partial(losses.vocab_parallel_cross_entropy, mesh=mesh["tp"])
    if own is not None:
        return own
    table: dict[str, Any] = {"cross_entropy": losses.cross_entropy, "mse": losses.mse, "square": losses.square}
    if plan.model.objective not in table:
        raise InputError(f"{plan.model.source} has its own loss: pass it as apply(..., loss=loss)")
    return table[plan.model.objective]  # type: ignore[no-any-return]
