"""Which modules of a model are experts, and how a rank holds its part of them.

Experts are found by their products (ops of kind "experts"), not by names: the module that holds them takes tokens, the experts that each
token goes to and their weights, and every parameter in it has one row per expert, or belongs to one expert of a list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from meshwright.planner.plan import ExpertSharding, Layout, ModuleSharding
from meshwright.planner.rules import op_name
from meshwright.planner.rules_views import RESHAPES
from meshwright.planner.sharding_sites import outputs_of
from meshwright.planner.states import I, P, S, State
from meshwright.profiling.graph import DTYPE_BYTES, Block, ModelGraph, ModuleCall, Op
from meshwright.profiling.literals import UNSETTABLE

GROUPED_ALIGNMENT = 16  # bytes that rows of an operand of torch's grouped product must be a multiple of
SPLITS = frozenset(("chunk", "split", "split_with_sizes", "tensor_split"))


class NotExperts(Exception):
    """Why experts cannot be spread over ranks: a phrase for the user."""


@dataclass(frozen=True)
class Experts:
    """A module of experts in a block.

    `inner`: the width between its products. `states`: of its parameters over etp, by name in it; `no_etp`: why an expert cannot be
    split. `listed`: the path in the module of a list of experts; `states` are then by name in one of them.
    """

    module: str
    count: int
    inner: int
    states: dict[str, State]
    sizes: tuple[str, ...] = ()
    no_etp: str = ""
    listed: str | None = None


def places_experts(layout: Layout) -> bool:
    """Whether experts have a mesh of their own: where they are spread over ranks, or shard their state over more ranks than the rest does."""
    return layout.tp * layout.ep * layout.etp > 1


def expert_tables(graph: ModelGraph, layout: Layout) -> tuple[ExpertSharding, ...]:
    """Tables of equal layers, and of experts outside layers (no layers, a full path). Raises NotExperts where they cannot be placed."""
    if not places_experts(layout):
        return ()
    tables = []
    for block in graph.blocks:
        layers = tuple(i for i, o in enumerate(graph.layers) if o.block == block.id)
        for found in experts_of(block):
            if layout.etp > 1 and found.no_etp:
                raise NotExperts(found.no_etp)
            rows = GROUPED_ALIGNMENT // DTYPE_BYTES[{"bf16": "bfloat16", "fp32": "float32"}[graph.precision]]
            if layout.etp > 1 and not found.listed and found.inner % (layout.etp * rows):
                raise NotExperts(
                    f"an expert's {found.inner} inner features in {layout.etp} parts are no multiple of {rows}, as grouped products need"
                )
            if found.count % layout.ep:
                raise NotExperts(f"{found.count} experts of {found.module} are not divisible by {layout.ep}")
            sizes = dict.fromkeys(found.sizes, found.count // layout.ep) if layout.ep > 1 else {}
            states = {name: str(state) if layout.etp > 1 else "I" for name, state in found.states.items()}
            tables.append(
                ExpertSharding(
                    layers=layers, module=found.module, experts=found.count, params=states, sizes=sizes, listed=found.listed,
                )
            )  # fmt: skip
    return tuple(tables)


def why_not(graph: ModelGraph, *, tp: int, ep: int, etp: int) -> str:
    """Why experts cannot be placed with these degrees, in words; empty if they can."""
    try:
        expert_tables(graph, Layout(tp=tp, ep=ep, etp=etp))
    except NotExperts as e:
        return str(e)
    return ""


def without_experts(modules: list[ModuleSharding], block: Block) -> list[ModuleSharding]:
    """A layer's tensor-parallel table without the modules of experts, which are placed on a mesh of their own."""
    own = tuple(e.module for e in experts_of(block))
    return [m for m in modules if not any(m.module == path or m.module.startswith(path + ".") for path in own)]


def experts_of(block: Block) -> tuple[Experts, ...]:
    """The modules of experts in a block. Raises NotExperts where there are products of experts that cannot be told apart."""
    modules = list(dict.fromkeys(op.module for op in block.ops if op.kind == "experts"))
    return tuple(_experts(block, module) for module in modules)


def _experts(block: Block, module: str) -> Experts:
    call = next((c for c in block.calls if c.module == module), None)
    if not module or call is None or not _is_boundary(block, call):
        raise NotExperts(f"{module or block.name} has experts but does not take tokens, their experts and their weights")
    ops = [op for op in block.ops if op.module == module or op.module.startswith(module + ".")]
    products = [op for op in ops if op.kind == "experts"]
    count = products[0].dims["experts"]
    if any(p.dims["experts"] != count for p in products):
        raise NotExperts(f"{module} has products of unlike numbers of experts")
    inner = _inner(block, ops, products)
    own = [p for p in block.params if p.name.startswith(module + ".")]
    found, listed = _listed(module, products, inner)
    if not listed:
        found = {f"{p.name.removeprefix(module + '.')}": _state(block, f"param:{p.name}", products, inner) for p in own}
    alone = [p.name for p in own if (len(found) * count != len(own) if listed else not p.shape or p.shape[0] != count)]
    if alone:
        raise NotExperts(f"{alone[0]} belongs to no single expert of {module}")
    whole = [name for name, state in found.items() if state is None]
    no_etp = f"{whole[0]} of {module} has no dimension along which an expert can be split" if whole else _joins(ops, products, inner)
    counted = {a.removeprefix(module + ".") for op in ops for key, a in op.literals.items() if op.args.get(key) == count and UNSETTABLE not in a}
    sizes = tuple(sorted(a for a in counted if "." not in a))
    return Experts(module, count, products[-1].dims["k"], {name: state or I for name, state in found.items()}, sizes, no_etp, listed or None)


def _listed(module: str, products: list[Op], inner: dict[str, int]) -> tuple[dict[str, State | None], str]:
    """States of one expert's parameters where products take those of a list of experts, and the path of the list in the module."""
    found: dict[str, State | None] = {}
    path = ""
    for op in products:
        pieces = inner.get(op.name)
        weight = S(0, pieces) if pieces else S(1) if op.inputs[0] in inner else None
        for role, state in (("weights", weight), ("biases", S(0, pieces) if pieces else P)):
            first, second = (next((v for v, r in zip(op.inputs, op.roles, strict=True) if r == f"{role}.{i}"), "") for i in (0, 1))
            parts, others = first.removeprefix(f"param:{module}.").split("."), second.removeprefix(f"param:{module}.").split(".")
            at = [i for i, (a, b) in enumerate(zip(parts, others)) if (a, b) == ("0", "1")]
            if first and len(at) == 1:
                path = ".".join(parts[: at[0]])
                found[".".join(parts[at[0] + 1 :])] = state
    return found, path


def _is_boundary(block: Block, call: ModuleCall) -> bool:
    """Whether a call takes [T, H], [T, k] of integers and [T, k], and returns [T, H]."""
    if len(call.inputs) != 3 or list(call.outputs) != [""]:
        return False
    hidden, index, weights = (block.spec_of(v) for v in call.inputs.values())
    out = block.spec_of(call.outputs[""])
    return (
        len(hidden.shape) == len(index.shape) == 2 and index.shape == weights.shape and index.dtype.startswith("int")
        and not weights.dtype.startswith("int") and out.shape == hidden.shape and hidden.shape[0] == index.shape[0]
    )  # fmt: skip


def _inner(block: Block, ops: list[Op], products: list[Op]) -> dict[str, int]:
    """Values along whose last dimension an expert can be split, with the number of pieces packed in it: what products make that another
    product takes, itself or after pointwise ops."""
    needed: set[str] = set()
    for op in reversed(ops):
        if op.kind == "experts" or any(v in needed for v in outputs_of(op)):
            needed |= set(op.inputs[:1] if op.kind == "experts" else op.inputs)
    pieces: dict[str, int] = {}
    for op in ops:
        if op.kind == "experts" and op.name in needed:
            pieces[op.name] = max((len(o.outputs) for o in _users(ops, op.name) if op_name(o) in SPLITS), default=1)
        elif op.kind != "experts" and any(v in pieces for v in op.inputs):
            for v in outputs_of(op):
                pieces[v] = 1 if op_name(op) in SPLITS else max(pieces.get(x, 1) for x in op.inputs)
    return pieces


def _state(block: Block, param: str, products: list[Op], inner: dict[str, int]) -> State | None:
    """How a parameter is sharded over etp: along what an expert's first products make and its last one contracts."""
    shape = block.spec_of(param).shape
    for value, order in _views(block, param, tuple(range(len(shape)))):
        for op in _users(list(block.ops), value):
            role = next((r for v, r in zip(op.inputs, op.roles, strict=True) if v == value), "")
            if op in products and role in ("weight", "mat2"):
                if op.name in inner:
                    return S(order[-1], inner[op.name])
                return S(order[-2]) if op.inputs[0] in inner else None
            if op_name(op) == "index" and len(shape) == 2:  # a bias: one row for each row of tokens
                added = next((o for o in _users(list(block.ops), op.name) if op_name(o) == "add"), None)
                if added is None:
                    return None
                made = next(v for v in added.inputs if v != op.name)
                return S(1, inner[made]) if made in inner else P if made in [p.name for p in products] else None
    return None


def _views(block: Block, value: str, order: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A value and its transposes, each with the dimensions of the first in the order that it has them."""
    yield value, order
    for op in block.ops:
        if op.inputs[:1] == (value,) and op_name(op) in ("transpose", "permute", "t", "mT"):
            n, name = len(order), op_name(op)
            if name == "permute":
                turned = [int(d) % n for d in op.args["dims"]]
            else:
                a, b = (int(op.args.get(k, d)) % n for k, d in (("dim0", -2), ("dim1", -1)))
                turned = [b if i == a else a if i == b else i for i in range(n)]
            yield from _views(block, op.name, tuple(order[i] for i in turned))


def _joins(ops: list[Op], products: list[Op], inner: dict[str, int]) -> str:
    """Why an expert cannot be split between its products: an op there that is not element by element. Empty if none."""
    for op in ops:
        if not any(v in inner for v in op.inputs) or op in products:
            continue
        name = op_name(op)
        apart = op.kind == "pointwise" or name in SPLITS or (name == "slice" and op.args.get("step", 1) > 1)
        if not apart or name in RESHAPES:
            return f"{op.target.removesuffix('.default')} in {op.module} needs the whole of an expert's inner dimension"
    last = [p for p in products if p.name not in inner]
    if len(last) != 1:
        return f"{products[0].module} has no single last product"
    after = {last[0].name}
    for op in ops[ops.index(last[0]) + 1 :]:  # what follows must be linear, as the parts of an expert are added after it
        if any(v in after for v in op.inputs):
            if op.kind not in ("view", "copy") and op_name(op) not in ("mul", "sum", "to", "index_add", "add"):
                return f"{op.target.removesuffix('.default')} in {op.module} follows the last product of experts and is not linear"
            after.update(outputs_of(op))
    return ""


def _users(ops: list[Op], value: str) -> list[Op]:
    return [op for op in ops if value in op.inputs]
