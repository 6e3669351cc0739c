"""From connected ops of a sharded block to a Recipe at the shard's shapes: names, layouts, and views of rows taken to the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from meshwright.codegen.kernels.lowering import lower
from meshwright.codegen.kernels.recipe import Input, Output, Recipe, Step
from meshwright.codegen.kernels.steps import FLOATS, moves_rows, steps_of
from meshwright.costmodel.sharded import ShardedBlock
from meshwright.profiling.graph import Frozen, Op


class Use(Frozen):
    """One call of a kernel: `arguments` of the recipe's inputs, in order: a value of the block, or "param:<name>"; `gives` its outputs."""

    recipe: Recipe
    arguments: tuple[str, ...]
    gives: tuple[str, ...]
    ops: tuple[str, ...]


class NotFusable(Exception):
    """Why ops do not make a kernel."""


def make_use(sharded: ShardedBlock, ops: Sequence[Op], also: Sequence[str] = ()) -> Use:
    """The kernel of connected ops. Its outputs are what others read; `also` what leaves in any case."""
    block = sharded.block
    names = {op.name for op in ops}
    used = {v for op in block.ops if op.name not in names for v in op.inputs} | set(block.outputs)
    gives = [op.name for op in ops if op.name in used or op.name in also]
    if not gives:
        raise NotFusable("nothing leaves")
    return _Builder(sharded, names, gives).use([op.name for op in ops])


class _Builder:
    """Steps of a region in the order of its ops; views of rows are taken to the region's inputs."""

    def __init__(self, sharded: ShardedBlock, names: set[str], gives: Sequence[str]) -> None:
        self.sharded, self.block, self.names, self.gives = sharded, sharded.block, names, gives
        self.inputs: list[tuple[str, dict[str, Any]]] = []
        self.steps: list[Step] = []
        self.values: dict[tuple[str, tuple[str, ...]], str] = {}
        self.meta: dict[str, torch.Tensor] = {}

    def use(self, ops: Sequence[str]) -> Use:
        said = [self._value(v, ()) for v in self.gives]
        shape = tuple(self._meta(self.gives[-1]).shape)
        if any(tuple(self._meta(v).shape) != shape for v in self.gives) or self.block.spec_of(self.gives[-1]).batch_dim != 0:
            raise NotFusable("outputs of different rows")
        self.inputs.sort(key=lambda x: (x[1]["over"] == "columns", not x[1].get("batched", True)))
        renamed = self._names(shape)
        inputs = tuple(Input(name=renamed[name], **fields) for name, fields in self.inputs)
        finals = dict(zip(said, ("h", "y") if len(said) == 2 else ("y",) if len(said) == 1 else tuple(f"y{i}" for i in range(len(said)))))
        if len(finals) != len(said):
            raise NotFusable("one value leaves twice")
        renamed |= finals
        steps = tuple(Step(name=renamed.get(s.name, s.name), op=s.op, args=tuple(renamed.get(a, a) if isinstance(a, str) else a for a in s.args))
                      for s in self.steps)  # fmt: skip
        outputs = tuple(
            Output(value=finals[s], dtype=self.block.spec_of(v).dtype, strides=tuple(self._meta(v).stride())) for s, v in zip(said, self.gives)
        )  # fmt: skip
        recipe = Recipe(label=_label(steps, inputs), shape=shape, inputs=inputs, steps=steps, outputs=outputs)
        try:
            lower(recipe)
        except ValueError as e:
            raise NotFusable(str(e)) from None
        return Use(recipe=recipe, arguments=tuple(name.partition("|")[0] for name, _ in self.inputs), gives=tuple(self.gives), ops=tuple(ops))

    def _names(self, shape: tuple[int, ...]) -> dict[str, str]:
        """Names of inputs: a, b for rows (x alone), cos and sin for what all samples share, parameters by their own last name."""
        rows = [n for n, f in self.inputs if f["over"] == "rows" and f["batched"]]
        fixed = [n for n, f in self.inputs if f["over"] == "rows" and not f["batched"]]
        names = {n: "x" if len(rows) == 1 else "abcdefg"[i] for i, n in enumerate(rows[:7])}
        names |= {n: ("cos", "sin")[i] if len(fixed) == 2 else f"shared{i}" for i, n in enumerate(fixed)}
        for n, _ in self.inputs:
            if n not in names:
                last = n.partition("|")[0].rpartition(".")[2].removeprefix("param:")
                names[n] = last if last not in names.values() else f"{last}{len(names)}"
        return names

    def _value(self, v: str, views: tuple[str, ...], state: str = "") -> str:
        """The step's name of a value after some views, as an op reads it (in a placement)."""
        key = (v, views)
        if key not in self.values:
            self.values[key] = self._made(v, views) if v in self.names else self._leaf(v, views, state)
        return self.values[key]

    def _reads(self, op: Op, i: int) -> str:
        """The placement in which an op reads its i-th input."""
        states = self.sharded.operands.get(op.name, ())
        return states[i] if i < len(states) else ""

    def _made(self, v: str, views: tuple[str, ...]) -> str:
        op = self.block.by_name[v]
        if op.kind == "view" and moves_rows(op):
            return self._value(op.inputs[0], (v, *views), self._reads(op, 0))
        said = steps_of(op)
        if said is None:
            raise NotFusable(op.target)
        rank = len(op.outputs[0].shape)
        same = [views if len(self.block.spec_of(x).shape) == rank else () for x in op.inputs]
        args = [self._value(x, there, self._reads(op, i)) for i, (x, there) in enumerate(zip(op.inputs, same))]
        local: dict[str, str] = {}
        for name, step, given in said:
            out = f"{step}_{len(self.steps)}"
            said_args = tuple(args[int(a[1:])] if isinstance(a, str) and a[0] == "$" else local[a] if isinstance(a, str) else a for a in given)
            self.steps.append(Step(name=out, op=step, args=said_args))
            local[name] = out
        return out

    def _leaf(self, v: str, views: tuple[str, ...], state: str) -> str:
        spec = self.block.spec_of(v)
        if spec.dtype not in FLOATS:
            raise NotFusable(f"{v} is {spec.dtype}")
        if v.startswith(("param:", "buffer:")):
            if len(spec.shape) != 1 or v.startswith("buffer:"):
                raise NotFusable(f"{v} is not a row that all rows share")
            shape = self._local(v, spec.shape)
            trainable = self.block.param(v[6:]).trainable
            self.inputs.append((v, {"over": "columns", "dtype": spec.dtype, "shape": shape, "strides": (1,), "gradient": trainable}))
            return v
        batched = spec.batch_dim is not None
        base = v
        while not batched and not views and (shown := self.block.by_name.get(base)) is not None and shown.target == "aten.unsqueeze.default":
            base = shown.inputs[0]  # what aligns on the right needs no dimensions of size one on the left
        t = self._meta(base)
        if base == v and state and state != self.sharded.states.get(v, state):  # converted on the way: what a collective gives is contiguous
            t = torch.empty(self._local(v, spec.shape, state), device="meta")
        for name in views:
            t = _apply(self.block.by_name[name], [t])
        if (batched and spec.batch_dim != 0) or t.stride(-1) != 1:
            raise NotFusable(f"{v} has no rows of its own")
        own = self.block.by_name.get(v.partition(":")[0])
        gradient = self.block.inputs[int(v[3:])].requires_grad if v.startswith("in:") else own is not None and own.requires_grad
        name = f"{base}|{'.'.join(views)}"
        fields = {"over": "rows", "dtype": spec.dtype, "shape": tuple(t.shape), "strides": tuple(t.stride()), "gradient": gradient and batched}
        self.inputs.append((name, {**fields, "batched": batched}))
        return name

    def _local(self, v: str, shape: tuple[int, ...], state: str = "") -> tuple[int, ...]:
        """The shape on one rank, in the value's own placement or another."""
        state = state or (self.sharded.params.get(v[6:], "I") if v.startswith("param:") else self.sharded.states.get(v, "I"))
        if state[0] != "S":
            return shape
        dim = int(state[1:].partition("x")[0])
        return tuple(n // self.sharded.ranks if i == dim else n for i, n in enumerate(shape))

    def _meta(self, v: str) -> torch.Tensor:
        """A value as a tensor without data, with the shape and strides that it has on one rank."""
        if v not in self.meta:
            shape = self._local(v, self.block.spec_of(v).shape)
            self.meta[v] = torch.empty(shape, device="meta")
            op = self.block.by_name.get(v.partition(":")[0])
            if op is not None and (op.kind == "view" or steps_of(op)):
                made = _apply(op, [self._meta(x) for x in op.inputs], int(v.partition(":")[2] or 0))
                if made is not None and tuple(made.shape) == shape:
                    self.meta[v] = made
        return self.meta[v]


def _apply(op: Op, inputs: list[torch.Tensor], output: int = 0) -> Any:
    """An op on tensors without data; None where its arguments do not suit a shard (the value is then taken as contiguous)."""
    if op.kind != "view":
        full = [x for x in inputs if x.dim() == len(op.outputs[0].shape)]
        if len(full) < 1:
            return None
        try:
            return torch.empty_like(max(full, key=lambda x: x.numel())) if len(full) == 1 else torch.add(*full[:2])
        except RuntimeError:
            return None
    namespace, name, overload = op.target.split(".")
    args = {k: _batch_of_one(v) for k, v in op.args.items()}
    try:
        made = getattr(getattr(getattr(torch.ops, namespace), name), overload)(**dict(zip(op.roles, inputs)), **args)
    except (RuntimeError, TypeError, AttributeError):
        return None
    return made[output] if isinstance(made, list | tuple) else made


def _batch_of_one(x: Any) -> Any:
    if isinstance(x, list):
        return [_batch_of_one(v) for v in x]
    return int(x[2:]) if isinstance(x, str) and x.startswith("B*") else x


def _label(steps: Sequence[Step], inputs: Sequence[Input]) -> str:
    """A name for people."""
    ops = [s.op for s in steps]
    rows = {x.name for x in inputs if x.over == "rows" and x.batched}
    said = ["add"] if steps[0].op == "add" and set(steps[0].args) <= rows else []
    if "rsqrt" in ops:
        said.append("layer_norm" if ops.count("mean") == 2 else "rms_norm")
    if "cat" in ops:
        said.append("rope")
    gates = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu"}
    for op in dict.fromkeys(ops):
        if op in gates:
            said.append(gates[op] if len(rows) == 2 else op)
    if "tanh" in ops and "pow" in ops:
        said.append("geglu" if len(rows) == 2 else "gelu_tanh")
    return "_".join(said) or "_".join(dict.fromkeys(op for op in ops if op != "cast")) or "copy"
