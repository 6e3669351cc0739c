"""One rank of N in one process: a process group whose collectives return at once, a model of fake tensors, and what pipeline stages hand on."""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import schedules
from torch.distributed.tensor import debug

from meshwright.codegen.apply import LossFn, shard_modules, virtual_stage
from meshwright.codegen.runtime.context import slice_tokens
from meshwright.codegen.runtime.mesh import Mesh
from meshwright.codegen.runtime.pipeline import leave_out
from meshwright.codegen.stage import ProgramStage
from meshwright.planner.plan import Plan
from meshwright.planner.token_dims import token_dim
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelInput
from meshwright.profiling.loading import build_factory, build_hf, import_target

Example = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # what a chunk takes, what it returns


def build(plan: Plan) -> nn.Module:
    """The plan's model on meta, in fp32, ready for training. InputError if its source is not what it was."""
    ref = plan.model
    model = build_hf(Path(ref.source), "fp32")[0] if ref.origin == "hf" else build_factory(ref.source)[0].float().train()
    numel = sum(p.numel() for p in model.parameters())
    if numel != ref.numel:
        raise InputError(f"the plan is for {ref.name} with {ref.numel:,} parameters; {ref.source} now has {numel:,}: plan again")
    return model


def own_loss(plan: Plan) -> LossFn | None:
    """The loss of the model's own file, where the plan was made with it."""
    return getattr(import_target(plan.model.source)[0], "loss", None) if plan.model.objective == "custom" else None


def with_layers(model: nn.Module, plan: Plan, paths: Sequence[str]) -> nn.Module:
    """A copy of a model on meta that holds, of its layers, those at `paths`."""
    absent = [p for p in plan.model.layer_paths if p not in set(paths)]
    held = {p: model.get_submodule(p) for p in absent}
    leave_out(model, absent)
    made = copy.deepcopy(model)
    for path, layer in held.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return made


def materialise(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives every tensor on meta a storage of the mode that is on; parameters that are one stay one."""
    made: dict[int, nn.Parameter] = {}
    for m in model.modules():
        for name, p in m._parameters.items():
            if p is not None:
                if id(p) not in made:
                    kind = dtype if p.is_floating_point() else p.dtype
                    made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=kind, device="cpu"), p.requires_grad)
                m._parameters[name] = made[id(p)]
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cpu")


def make_inputs(plan: Plan, samples: int) -> tuple[dict[str, Tensor], Tensor | None]:
    """Inputs by name and labels of whole samples."""

    def make(i: ModelInput) -> Tensor:
        shape = list(i.spec.shape)
        shape[i.spec.batch_dim or 0] *= samples
        return torch.zeros(shape, dtype=getattr(torch, i.spec.dtype))

    return {i.name: make(i) for i in plan.model.inputs}, None if plan.model.labels is None else make(plan.model.labels)


def make_examples(plan: Plan, template: nn.Module, mesh: Mesh) -> list[Example]:
    """What each chunk of this rank takes and returns for a microbatch: the code around the layers, run without them.

    `template`, on meta, is consumed.
    """
    x, program = plan.layout, plan.solution.program
    assert program is not None
    materialise(template, torch.bfloat16 if plan.workload.precision == "bf16" else torch.float32)
    leave_out(template, program.layers)
    bare = program.model_copy(update={"layers": ()})
    around = ProgramStage(template, bare, 0, 0, mesh, cp_kind=x.cp_kind, chunked=x.loss == "chunked")
    if x.tp > 1:
        shard_modules(plan, template, 0, 0, mesh)
    inputs = tuple(_own_tokens(plan, t, i, mesh) for t, i in zip(make_inputs(plan, x.micro_batch)[0].values(), plan.model.inputs, strict=True))
    handed: list[Tensor] = []
    output = around(*inputs, seen=handed.append)
    carry, last = handed[0].detach().requires_grad_(), output.detach().requires_grad_()
    rank = mesh["pp"].get_local_rank()
    places = [virtual_stage(x, rank, chunk) for chunk in range(x.vpp)]
    return [(inputs if p == 0 else (carry,), (last if p == x.pp * x.vpp - 1 else carry,)) for p in places]


def _own_tokens(plan: Plan, x: Tensor, what: ModelInput, mesh: Mesh) -> Tensor:
    dim = token_dim(what.spec, plan.workload.seq) if plan.layout.cp > 1 else None
    return x if dim is None else slice_tokens(x, dim, mesh["cp"], plan.layout.cp_kind)


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Attention whose values are of another width than its keys is a GPU's fused kernel: a CPU has none, and keeps the scores."""
    plain = torch.ops.aten.scaled_dot_product_attention.default

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, *,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        if value.shape[-1] == key.shape[-1] or enable_gqa or query.ndim != 4:
            return plain.decompose(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        kept = torch.is_grad_enabled() and query.requires_grad
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, kept, dropout_p, is_causal, scale=scale)[0]

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", attention, "AutogradCPU")
        yield


# --- the process group -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def world(rank: int, ranks: int, *, on_cpu: bool = False) -> Iterator[None]:
    """A process group whose collectives return at once.

    `on_cpu`: it stands for gloo, whose sends keep what they sent until the schedule forgets them; NCCL's let go when they are done.
    Raises InputError where there is a process group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise InputError("a dry run makes a process group of its own: run it where torch.distributed is not initialised")

    def settled(self: Any, stages: Any, *args: Any, **kwargs: Any) -> None:
        for s in stages:  # examples were given; the real vote on it reads a number off the wire
            s._inference_mode = schedules.InferenceMode.STATIC

    send: Any = getattr(schedules, "_batch_p2p", None)

    def keeping(ops: Any, *args: Any, **kwargs: Any) -> Any:
        works = _Works(send(ops, *args, **kwargs))
        works.sent = [op.tensor for op in ops]
        return works

    owner = next((c for c in vars(schedules).values() if isinstance(c, type) and "_warmup_p2p" in vars(c)), None)
    patch: Any = mock.patch.object(owner, "_warmup_p2p", settled) if owner else contextlib.nullcontext()
    keep: Any = mock.patch.object(schedules, "_batch_p2p", keeping) if on_cpu and send else contextlib.nullcontext()
    level, hook = logging.root.manager.disable, sys.excepthook
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        logging.disable(logging.ERROR)  # torch logs what an operator's fake kernel raises
        with warnings.catch_warnings(), patch, keep:
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        sys.excepthook = hook  # which init_process_group replaced
        dist.destroy_process_group()
        forget: Any = getattr(debug, "_clear_sharding_prop_cache", None)  # it holds meshes of this world, which equal later ones
        if forget is not None:
            forget()


class _Works(list[Any]):
    """Pending sends, with what they hold."""

    sent: list[Tensor]


def group_of(name: str) -> tuple[str, int]:
    """What a process group is called, and its size."""
    try:
        found = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except (ValueError, RuntimeError, LookupError):
        return name, 0
    return str(getattr(found, "group_desc", "") or name).removeprefix("mesh_"), found.size()
