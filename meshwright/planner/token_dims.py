"""Which dimension of each value holds the tokens of a sample: what context parallelism cuts, and why a model cannot be cut.

Every op but attention must act token by token. What does not come from the batch and has a row for each token (positions, rotary tables)
is made whole and then cut, which the code around the layers can do, but no module's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshwright.planner.rules import FILLS, op_name
from meshwright.planner.rules_labels import Labels, aligned, labels_of
from meshwright.planner.rules_routed import Region
from meshwright.planner.rules_views import RESHAPES, SPLITS
from meshwright.planner.shardedmodel import inlined_modules
from meshwright.planner.sharding import NotShardable
from meshwright.profiling.blocks import ROOT
from meshwright.profiling.graph import Block, ModelGraph, Op, TensorSpec

Dims = tuple[int | None, ...]
_POSITIONS = frozenset(["arange", *FILLS, "slice", "narrow"])  # what makes a value with a row for each token
_NO_GRAD = "wrap_with_set_grad_enabled"
_MEANS = {"cross_entropy_loss": 1, "mse_loss": 1, "l1_loss": 1, "mean": None}  # what a loss ends with, and torch's number of "mean"


@dataclass(frozen=True)
class TokenDims:
    """`carry`: of what enters and leaves the layers; `values`: of every value of the code around them. `made`: of those that it makes for
    all tokens and has to cut; `read`: of what it has to cut where it reads it, by (value that the statement makes, value read), the
    buffers that layers take by ("", buffer)."""

    carry: int
    values: dict[str, int]
    made: dict[str, int]
    read: dict[tuple[str, str], int]


def token_dim(spec: TensorSpec, seq: int) -> int | None:
    """The dimension of a model's input that has `seq` tokens; None without one. NotShardable if more than one has."""
    found = [d for d, size in enumerate(spec.shape) if size == seq and d != spec.batch_dim]
    if len(found) > 1:
        raise NotShardable(f"an input of shape {spec.shape} has more than one dimension of {seq}, and either could be the tokens")
    return found[0] if found else None


def token_dims(graph: ModelGraph) -> TokenDims:
    """Follows the tokens through the whole model. Raises NotShardable with why they cannot be cut, a phrase for the user."""
    if graph.program is None:
        raise NotShardable("the model is no plain sequence of layers")
    return _Walk(graph).dims()


def no_token_dims(graph: ModelGraph) -> str:
    """Why tokens cannot be cut; empty if they can."""
    try:
        token_dims(graph)
    except NotShardable as e:
        return str(e)
    return ""


class _Walk:
    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.around = inlined_modules(graph)
        p = graph.program
        assert p is not None
        # buffers that layers take are read in them under the whole model's name
        self.shared = {f"{kind}:{ROOT}.{path}" for path in attributes((p.layer_args, p.layer_kwargs)) for kind in ("param", "buffer")}
        self.made: dict[str, int] = {}
        self.read: dict[tuple[str, str], int] = {}
        self.values: dict[str, int] = {}

    def dims(self) -> TokenDims:
        graph = self.graph
        stem, *layers, head = [graph.blocks[o.block] for o in graph.sequence]
        found = self._block(stem, self._entering(stem, None))
        carry = found.get(stem.outputs[0])
        if carry is None:
            raise NotShardable("what enters the layers has no dimension of tokens")
        self.values |= {v: d for v, d in found.items() if d is not None} | {"h": carry}
        for block in {b.id: b for b in layers}.values():
            if self._block(block, self._entering(block, carry))[block.outputs[0]] != carry:
                raise NotShardable(f"{block.name} moves the tokens of what it takes")
        found = self._block(head, self._entering(head, carry))
        self.values |= {v: d for v, d in found.items() if d is not None and not v.startswith("in:")}
        return TokenDims(carry, self.values, self.made, self.read)

    def _entering(self, block: Block, carry: int | None) -> dict[str, int | None]:
        """The dimensions of what enters a block, by name."""
        seq = self.graph.seq
        found: dict[str, int | None] = {}
        for i, x in enumerate(block.inputs):
            given = token_dim(x.spec, seq) if x.source.startswith("input:") else self.values.get(x.source)
            found[f"in:{i}"] = carry if x.role == "carry" else given
        if block.repeated:
            for v in {v for op in block.ops for v in op.inputs} & self.shared:
                found[v] = d = token_dim(block.spec_of(v), seq)
                if d is not None:
                    self.read["", v.replace(f":{ROOT}.", ":", 1)] = d
        return found

    def _block(self, block: Block, entering: Mapping[str, int | None]) -> dict[str, int | None]:
        """The dimension of every value of a block."""
        found: dict[str, int | None] = dict(entering)
        region = Region(block, 1).by_token() or {}
        for op in block.ops:
            dims = tuple(found.get(v) for v in op.inputs)
            around = not block.repeated and op.module in self.around
            if op.name in region:
                outs: Dims = tuple(s.dim if s.sharded else None for s in region[op.name][1])
            elif any(d is not None for d in dims):
                outs = _through(op, dims, block, self.graph.seq, self._reader(op, block) if around else None)
            else:
                outs = self._constant(op) if around else (None,) * len(op.outputs)
            if block.repeated and any(d is not None and _literal(op, d) for d in outs):
                raise NotShardable(f"{op.module or block.name} has the length of the sequence in an attribute")
            for i, d in enumerate(outs):
                found[op.name if len(op.outputs) == 1 else f"{op.name}:{i}"] = d
        return found

    def _constant(self, op: Op) -> Dims:
        """A value of the code around the layers with a row for each token is cut as soon as it is made."""
        if op_name(op) not in _POSITIONS or len(op.outputs) != 1 or op.outputs[0].batch_dim is not None:
            return (None,) * len(op.outputs)
        d = token_dim(op.outputs[0], self.graph.seq)
        if d is not None:
            self.made[op.name] = d
        return (d,)

    def _reader(self, op: Op, block: Block) -> Callable[[str, int], None]:
        result = "h" if op.name == block.outputs[0] else op.name

        def read(value: str, dim: int) -> None:
            self.read[result, value] = dim

        return read


def attributes(x: Any) -> set[str]:
    """Paths of the parameters and buffers in a statement's arguments."""
    if isinstance(x, dict):
        return {x["attr"]} if set(x) == {"attr"} else {a for v in x.values() for a in attributes(v)}
    return {a for v in x for a in attributes(v)} if isinstance(x, list | tuple) else set()


def _literal(op: Op, dim: int) -> bool:
    return any(f"{key}[{dim}]" in op.literals for key in ("size", "shape", "sizes"))


def _through(op: Op, dims: Dims, block: Block, seq: int, read: Callable[[str, int], None] | None) -> Dims:
    """The dimensions of an op's results, from those of its operands. `read` is told of operands that have to be cut."""
    name, specs = op_name(op), [block.spec_of(v) for v in op.inputs]
    joins = NotShardable(f"{op.target} of {op.module or block.name} joins tokens")
    if name in _MEANS and op.kind != "norm" and len(op.outputs[0].shape) == 0:
        if _MEANS[name] is not None and op.args.get("reduction", 1) != _MEANS[name]:
            raise NotShardable(f"the loss ends with {op.target}, which is no mean")
        return (None,)
    if name == _NO_GRAD:
        return _beside(op, dims, seq, joins)
    if name in RESHAPES:
        return (_reshaped(specs[0].shape, dims[0], op.outputs[0].shape, joins),)
    if name in SPLITS:
        at, d = int(op.args.get("dim", 0)) % len(specs[0].shape), dims[0]
        if d is None or d == at:
            raise joins
        return (d - 1 if name == "unbind" and at < d else d,) * len(op.outputs)
    if op.kind == "attention":
        if any(d != len(s.shape) - 2 for d, s in zip(dims, specs, strict=True)):
            raise NotShardable(f"{op.target} of {op.module or block.name} takes a mask, or keys of other tokens")
        return (len(op.outputs[0].shape) - 2,) + (None,) * (len(op.outputs) - 1)
    ins, outs = _labels(op, name, specs, joins)
    carried = {labels[d] for labels, d in zip(ins, dims, strict=True) if d is not None}
    if len(carried) != 1 or None in carried:
        raise joins
    label = carried.pop()
    for v, labels, d in zip(op.inputs, ins, dims, strict=True):
        if label in labels and d is None:
            if read is None:
                raise NotShardable(f"{op.module or block.name} makes its own positions, which are those of all tokens")
            read(v, labels.index(label))
    if not all(label in labels for labels in outs):
        raise joins
    return tuple(labels.index(label) for labels in outs)


def _beside(op: Op, dims: Dims, seq: int, joins: NotShardable) -> Dims:
    """Of code under no_grad, which makes tables from positions: the dimension that the positions have there."""
    d = next(d for d in dims if d is not None)
    found = []
    for o in op.outputs:
        rows = [i for i, size in enumerate(o.shape) if size == seq]
        if not rows or (d not in rows and len(rows) > 1):
            raise joins
        found.append(d if d in rows else rows[0])
    return tuple(found)


def _reshaped(shape: Sequence[int], dim: int | None, out: Sequence[int], joins: NotShardable) -> int:
    """Where a dimension begins in another shape, whole or with what stands behind it."""
    assert dim is not None
    before = after = 1
    for size in shape[:dim]:
        before *= size
    for d, size in enumerate(out):
        if after == before and size > 1:
            if size % shape[dim]:
                break
            return d
        after *= size
    raise joins


def _labels(op: Op, name: str, specs: list[TensorSpec], joins: NotShardable) -> tuple[list[Labels], list[Labels]]:
    """Labels of operands and results, products included: theirs are the rows of each operand and what is contracted ("k")."""
    ranks = [len(s.shape) for s in specs]
    rows = [tuple(f"d{i}" for i in range(r)) for r in ranks]
    out = tuple(f"d{i}" for i in range(len(op.outputs[0].shape)))
    if name == "embedding":
        at = op.roles.index("indices") if "indices" in op.roles else 1
        return [rows[i] if i == at else (None,) * r for i, r in enumerate(ranks)], [(*rows[at], None)]
    if name in ("linear", "mm", "addmm"):
        at = {"addmm": 1}.get(name, 0)
        return [(*rows[i][:-1], None) if i == at else (None,) * r for i, r in enumerate(ranks)], [(*out[:-1], None)]
    if name in ("matmul", "bmm") and min(ranks) >= 2:
        left, right = (aligned(s.shape[:-2], op.outputs[0].shape[:-2], out[:-2]) for s in specs)
        return [(*left, "m", None), (*right, None, "n")], [(*out[:-2], "m", "n")]
    if name == "outer":
        return [("d0",), ("d1",)], [("d0", "d1")]
    if name == "einsum":
        operands, arrow, result = str(op.args.get("equation", "")).replace(" ", "").partition("->")
        if not arrow or "." in operands:
            raise joins
        return [tuple(x) for x in operands.split(",")], [tuple(result)]
    rule = labels_of(op, name, specs, [False] * len(specs))
    if rule is None:
        raise NotShardable(f"no rule says whether {op.target} of {op.module} joins tokens")
    return rule.ins, rule.outs
