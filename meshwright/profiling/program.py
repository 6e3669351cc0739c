"""From an exported graph to a Program: the few lines of a model's own code around its layers, so that a pipeline stage can
run a part of the model under its own names.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_unflatten

from meshwright.profiling.blocks import Naming, call_entries, depends_on_data, depends_on_parameters, leaf_paths
from meshwright.profiling.graph import Program, Statement
from meshwright.profiling.joint import Batch, is_identity, skipped
from meshwright.profiling.kinds import op_name

CARRY = "h"


class NotSequential(Exception):
    """Why a model is not stem, layers, head: a phrase for the user."""


@dataclass(frozen=True)
class _Leaf:
    """An encoded argument, kept apart from the containers around it."""

    value: Any


@dataclass
class _Call:
    """A call in the code around the layers: a submodule (`path`) with its signature, or an op (`node`)."""

    path: str = ""
    signature: Any = None
    node: Node | None = None
    ins: list[tuple[Any, Node | None]] = field(default_factory=list)  # (constant, node) per leaf argument
    outs: dict[str, Node] = field(default_factory=dict)  # output path -> node

    def values(self) -> list[Node]:
        return [n for _, n in self.ins if n is not None]


def make_program(exported: Any, module: nn.Module, root: str, layers: Sequence[str], all_layers: Sequence[str], nm: Naming, batch: Batch) -> Program:
    """The Program of the submodule `root` of the traced `module`, whose traced layers are `layers` and whose full list is `all_layers`.

    Raises NotSequential where the code between the layers does something, a layer takes what cannot be recomputed on
    another stage, or the model returns more than one tensor.
    """
    w = _Walker(exported, root, layers, nm, batch)
    calls = w.calls()
    where = [i for i, c in enumerate(calls) if c.path in layers]
    if where != list(range(where[0], where[0] + len(where))):
        raise NotSequential("the model computes something between its layers")
    stem, middle, head = calls[: where[0]], calls[where[0] : where[-1] + 1], calls[where[-1] + 1 :]
    carries = w.carries(middle)
    templates = [w.arguments(c, {carry: CARRY}) for c, carry in zip(middle, carries, strict=False)]
    if any(t != templates[0] for t in templates):
        raise NotSequential("its layers take different arguments")
    first, last = carries[0], carries[-1]
    shared = [v for v in middle[0].values() if w.base(v) is not w.base(first)]
    for v in shared:
        if depends_on_data(v):
            raise NotSequential("its layers take an input that depends on the batch besides the carry")
        if depends_on_parameters(v, nm):
            raise NotSequential("its layers share an input that is computed from parameters")
    stem_calls = w.slice(stem, [first], stop=None)
    side_calls = w.slice(stem, shared, stop=first)
    late = w.slice(head, [w.output_value()], stop=last)
    if any(w.base(n) not in w.made_by(late) | {w.base(last)} and w.reads_model(n) for c in late for n in c.values()):
        raise NotSequential("the code after its layers uses values from before them")
    args, kwargs = _without_defaults(*templates[0], module.get_submodule(layers[0]))
    return Program(
        # without a stem the layers take an input itself
        inputs=tuple(CARRY if n is w.base(first) else nm.names[n].removeprefix("input:") for n in w.model_inputs()),
        stem=tuple(w.statement(c, {first: CARRY}) for c in stem_calls),
        side=tuple(w.statement(c, {first: CARRY}) for c in side_calls),
        layers=tuple(all_layers),
        layer_args=args,
        layer_kwargs=kwargs,
        head=tuple(w.statement(c, {last: CARRY}) for c in late),
        output=CARRY if w.output_value() is w.base(last) else w.name(w.output_value()),
    )


def _without_defaults(args: tuple[Any, ...], kwargs: dict[str, Any], layer: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call without the arguments that the layer's forward has by default."""
    parameters = inspect.signature(layer.forward).parameters
    kwargs = {k: v for k, v in kwargs.items() if k not in parameters or v is not parameters[k].default}
    names = list(parameters)
    while args and len(args) <= len(names) and args[-1] is parameters[names[len(args) - 1]].default:
        args = args[:-1]
    return args, kwargs


class _Walker:
    def __init__(self, exported: Any, root: str, layers: Sequence[str], nm: Naming, batch: Batch) -> None:
        self.exported, self.root, self.layers, self.nm, self.batch = exported, root, layers, nm, batch
        self.nodes: dict[str, Node] = {n.name: n for n in exported.graph.nodes}
        self.signatures = call_entries(exported)
        self.local: dict[Node, str] = {}

    # -- finding the calls

    def calls(self) -> list[_Call]:
        """The calls of the code around the layers, in order; layers and other submodules are one call each."""
        found: list[_Call] = []
        for node in self.exported.graph.nodes:
            element = node.target is operator.getitem and any(c.node is node.args[0] for c in found)
            if skipped(node) and not element:
                continue
            stack = [p for p, _ in (node.meta.get("nn_module_stack") or {}).values()]
            if self.root not in stack:
                continue  # the loss
            path = self._opaque(stack)
            if path and found and found[-1].path == path:
                continue
            if any(path and c.path == path for c in found):
                raise NotSequential(f"it calls {self._short(path)} more than once")
            found.append(self._module_call(path) if path else self._op_call(node))
        return found

    def _opaque(self, stack: list[str]) -> str:
        """The outermost module that does not contain the layers; "" for the surrounding code itself."""
        for path in stack:
            if path and (path in self.layers or not any(layer.startswith(path + ".") for layer in self.layers)):
                return path
        return ""

    def _module_call(self, path: str) -> _Call:
        s = self.signatures.get(path)
        if s is None:
            raise NotSequential(f"the call of {self._short(path)} cannot be written down")
        call = _Call(path, s)
        call.ins = [(getattr(a, "value", None), self.nodes.get(getattr(a, "name", ""))) for a in s.inputs]
        for key, a in zip(leaf_paths(s.out_spec, "out"), s.outputs, strict=True):
            node = self.nodes.get(getattr(a, "name", ""))
            if node is not None:
                call.outs[key] = node
        return call

    def _op_call(self, node: Node) -> _Call:
        if op_name(node.target) == "wrap_with_set_grad_enabled":
            raise NotSequential("it runs code under no_grad around its layers")
        return _Call(node=node, ins=[(None, n) for n in node.all_input_nodes], outs={"": node})

    def carries(self, layer_calls: list[_Call]) -> list[Node]:
        """The value that enters the first layer, then the one that leaves each."""
        made = []
        for c in layer_calls:
            if list(c.outs) != [""]:
                raise NotSequential("its layers return more than one tensor")
            made.append(c.outs[""])
        position = 0
        for value, call in zip(made, layer_calls[1:], strict=False):
            if value not in call.values():
                raise NotSequential("a layer does not take what the layer before it returned")
            position = call.values().index(value)
        return [layer_calls[0].values()[position], *made]

    # -- data flow

    def slice(self, calls: list[_Call], wanted: Sequence[Node], stop: Node | None) -> list[_Call]:
        """The calls that make `wanted`, in order, not looking behind `stop`."""
        known = {self.base(stop)} if stop is not None else set()
        needed = {self.base(n) for n in wanted} - known
        picked = []
        for c in reversed(calls):
            if needed & {n for n in c.outs.values() if self.base(n) is n}:
                picked.append(c)
                needed |= {self.base(n) for n in c.values()} - known
        return picked[::-1]

    def base(self, node: Node) -> Node:
        """The value behind what changes nothing: aliases, additions of zero, conversions to the dtype it has."""
        while node.op == "call_function" and _changes_nothing(node):
            node = node.args[0]  # type: ignore[assignment]
        return node

    def made_by(self, calls: list[_Call]) -> set[Node]:
        return {self.base(n) for c in calls for n in c.outs.values()}

    def reads_model(self, node: Node) -> bool:
        """True for a value that is neither a parameter, a buffer nor an element of a tuple."""
        name = self.nm.names.get(self.base(node), "")
        return not name.startswith(("param:", "buffer:")) and node.target is not operator.getitem

    def model_inputs(self) -> list[Node]:
        entering = {getattr(a, "name", "") for a in self.signatures[self.root].inputs}
        return [n for n in self.exported.graph.nodes if n.name in entering and self.nm.names.get(n, "").startswith("input:")]

    def output_value(self) -> Node:
        outs = [self.nodes[a.name] for a in self.signatures[self.root].outputs if getattr(a, "name", "") in self.nodes]
        if not outs:
            raise NotSequential("it returns no tensor")
        return self.base(outs[0])

    # -- writing

    def _short(self, path: str) -> str:
        return path.removeprefix(self.root + ".")

    def name(self, node: Node) -> str:
        node = self.base(node)
        source = self.nm.names.get(node, node.name)
        return source[6:] if source.startswith("input:") else self.local.get(node, node.name)

    def _value(self, node: Node, rename: dict[Node, str]) -> Any:
        node = self.base(node)
        for key, name in rename.items():
            if node is self.base(key):
                return {"ref": name}
        source = self.nm.names.get(node, "")
        if source.startswith(("param:", "buffer:")):
            return {"attr": self._short(source.partition(":")[2])}
        return {"ref": self.name(node)}

    def arguments(self, call: _Call, rename: dict[Node, str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a module call, as JSON."""
        leaves = [_Leaf(self._value(n, rename) if n is not None else self.batch.arg(c)) for c, n in call.ins]
        args, kwargs = tree_unflatten(leaves, call.signature.in_spec)
        return tuple(_plain(a) for a in args), {k: _plain(v) for k, v in kwargs.items()}

    def statement(self, call: _Call, rename: dict[Node, str]) -> Statement:
        for node in call.outs.values():
            for key, ref in rename.items():
                if self.base(node) is self.base(key):
                    self.local[self.base(node)] = ref
        if call.path:
            args, kwargs = self.arguments(call, rename)
            keys = leaf_paths(call.signature.out_spec, "out")
            if keys != [""] and keys != [str(i) for i in range(len(keys))]:
                raise NotSequential(f"{self._short(call.path)} returns a structure")
            outputs = tuple(self.name(call.outs[k]) if k in call.outs else "_" for k in keys)
            return Statement(target="module:" + self._short(call.path), args=args, kwargs=kwargs, outputs=outputs)
        assert call.node is not None
        node = call.node
        args = tuple(self._argument(a, rename) for a in node.args)
        kwargs = {k: self._argument(a, rename) for k, a in node.kwargs.items() if k not in ("layout", "pin_memory") and a is not None}
        if node.target is operator.getitem:
            return Statement(target=f"get:{node.args[1]}", args=args[:1], outputs=(self.name(node),))
        overload = getattr(node.target, "_overloadname", "default")
        return Statement(target=f"aten:{op_name(node.target)}.{overload}", args=args, kwargs=kwargs, outputs=(self.name(node),))

    def _argument(self, a: Any, rename: dict[Node, str]) -> Any:
        if isinstance(a, Node):
            return self._value(a, rename)
        if isinstance(a, list | tuple):
            return [self._argument(x, rename) for x in a]
        if isinstance(a, torch.device):
            return {"device": True}
        if isinstance(a, torch.dtype):
            return {"dtype": str(a).removeprefix("torch.")}
        return self.batch.arg(a)


def _changes_nothing(node: Node) -> bool:
    adds_zero = op_name(node.target) == "add" and len(node.args) == 2 and isinstance(node.args[1], int | float) and node.args[1] == 0
    return adds_zero or is_identity(node)


def _plain(x: Any) -> Any:
    """Containers of encoded leaves as JSON."""
    if isinstance(x, _Leaf):
        return x.value
    if isinstance(x, tuple):
        return {"tuple": [_plain(v) for v in x]}
    if isinstance(x, list):
        return [_plain(v) for v in x]
    if isinstance(x, dict):
        return {"dict": {k: _plain(v) for k, v in x.items()}}
    raise NotSequential(f"a layer takes a {type(x).__name__}")
