"""A rank's part of a model: layers with the code around them, interpreted from the plan's program."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from meshwright.codegen.runtime.context import slice_tokens
from meshwright.codegen.runtime.mesh import Mesh
from meshwright.codegen.runtime.pipeline import leave_out
from meshwright.codegen.runtime.tensor_parallel import convert
from meshwright.costmodel.layouts import BY_ROW
from meshwright.planner.plan import Plan, StageProgram
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import Statement
from meshwright.profiling.loading import main_output


class ProgramStage(nn.Module):
    """Layers [first, last) of a model, with the code before and after them on the first and last stage.

    Where the loss is computed in chunks, the last stage returns what the `tail` of the program takes: it ends in the projection to logits.
    """

    def __init__(
        self, model: nn.Module, program: StageProgram, first: int, last: int, mesh: Mesh, *, cp_kind: str = "ring", chunked: bool = False
    ) -> None:
        super().__init__()
        self.model, self.program, self.span, self.mesh, self.cp_kind = model, program, (first, last), mesh, cp_kind
        self.is_first, self.is_last = first == 0, last == len(program.layers)
        self.tail = tail_of(program, model) if chunked and self.is_last else ()
        leave_out(model, left_out(program, first, last))

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
        self._run(self.program.head[: len(self.program.head) - len(self.tail)], env)
        return env[self.tail[0].args[0]["ref"] if self.tail else self.program.output]  # type: ignore[no-any-return]

    def project(self, rows: Tensor) -> Tensor:
        """The tail of the program on some rows of what forward returned. [rows, width] -> [rows, classes]"""
        if isinstance(self, FSDPModule):
            self.unshard()  # backward may come when the step has sharded it again
        env: dict[str, Any] = {self.tail[0].args[0]["ref"]: rows}
        self._run(self.tail, env)
        return env[self.program.output]  # type: ignore[no-any-return]

    def _run(self, statements: Sequence[Statement], env: dict[str, Any]) -> None:
        for s in statements:
            kind, _, what = s.target.partition(":")
            args, kwargs = self._call(s.args, s.kwargs, env)
            if kind == "module":
                made = self.model.get_submodule(what)(*args, **kwargs)
            elif kind == "convert":
                made = convert(args[0], what, self.mesh["tp"])
            elif kind == "context":
                made = slice_tokens(args[0], int(what), self.mesh["cp"], self.cp_kind)
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
        self.is_first = self.is_last = True

    def forward(self, *inputs: Tensor) -> Tensor:
        named = dict(zip(self.keys, inputs, strict=True))
        positional = [named.pop(k) for k in self.keys if k.startswith("input_") and k[6:].isdigit()]
        out = main_output(self.model(*positional, **named))
        assert out is not None
        return out


class Chunks(nn.Module):
    """The chunks of a rank that has several virtual stages, in the model's order."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)


def modules_of(statements: Sequence[Statement]) -> list[str]:
    """Paths of the modules that statements call."""
    return [s.target.removeprefix("module:") for s in statements if s.target.startswith("module:")]


def left_out(program: StageProgram, first: int, last: int) -> list[str]:
    """Paths of the modules that a stage with the layers [first, last) does not have."""
    drop = [p for i, p in enumerate(program.layers) if not first <= i < last]
    kept = modules_of(program.side)
    drop += [m for m in modules_of(program.stem) if first > 0 and m not in kept]
    return drop + [m for m in modules_of(program.head) if last < len(program.layers) and m not in kept]


def tail_of(program: StageProgram, model: nn.Module | None = None) -> tuple[Statement, ...]:
    """The end of the program from the projection to logits on. InputError where it is not one of rows; `model` tells whether it is linear."""
    at = next((i for i, s in reversed(list(enumerate(program.head))) if s.target.startswith("module:")), None)
    tail = program.head[at:] if at is not None else ()
    made: set[str] = set()
    for i, s in enumerate(tail):
        alone = len(s.args) >= 1 and isinstance(s.args[0], dict) and set(s.args[0]) == {"ref"}
        known = alone and (i == 0 or s.args[0]["ref"] in made)
        by_row = s.target.startswith(BY_ROW) if i else model is None or isinstance(model.get_submodule(s.target[7:]), nn.Linear)
        if not known or not by_row:
            raise InputError(f"the loss cannot be computed in chunks: {s.target} is no projection of rows; plan with --fix loss=plain")
        made |= set(s.outputs)
    if not tail:
        raise InputError("the loss cannot be computed in chunks: no module makes the logits; plan with --fix loss=plain")
    return tail


def split(plan: Plan, model: nn.Module, spans: Sequence[tuple[int, int]]) -> list[nn.Module]:
    """The model once for each span of layers, sharing its tensors, without what the span does not have.

    Where two spans have a tied parameter, the later gets its own.
    """
    program = plan.solution.program
    if len(spans) == 1 or program is None:
        return [model]
    made: list[nn.Module] = []
    for span in spans:
        drop = left_out(program, *span)
        held = {p: model.get_submodule(p) for p in drop}
        leave_out(model, drop)
        shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        own = dict(model.named_parameters(remove_duplicate=False))
        for names in plan.model.tied:
            p = next((own[n] for n in names if n in own), None)
            if p is not None and any(q is p for m in made for q in m.parameters()):
                shared[id(p)] = nn.Parameter(p.detach().clone(), p.requires_grad)
        made.append(copy.deepcopy(model, shared))
        for path, module in held.items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module)
    return made


def split_ties(plan: Plan) -> list[tuple[str, ...]]:
    """Tied parameters of which the first stage and the last stage each hold one."""
    program = plan.solution.program
    if program is None:
        return []

    def held(group: tuple[str, ...], part: Sequence[Statement]) -> bool:
        return any(name.startswith(m + ".") for name in group for m in modules_of(part))

    return [g for g in plan.model.tied if held(g, program.stem) and held(g, program.head)]


def parts_of(stage: nn.Module) -> Iterator[nn.Module]:
    """The chunks of a rank."""
    yield from stage.parts if isinstance(stage, Chunks) else (stage,)
