"""A traced layer, read as what one token costs in it, and how it splits over tensor-parallel ranks.

The split follows the dataflow (Shoeybi et al. 2019): a product that reads a whole tensor splits its weight by columns when another
product or attention follows without a norm over its width; the product that reads a split tensor splits by rows, and its output is
all-reduced.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import Block, Op

SEQ = 256  # of the trace
POINTWISE = frozenset(("pointwise", "norm", "reduction", "softmax", "copy"))


def _free(op: Op) -> bool:
    """Launches nothing: a view, a copy of what is contiguous, a dropout with probability 0."""
    return op.kind in ("view", "constant") or op.forward.launches == 0 or ("dropout" in op.target and op.args.get("p") == 0)


@dataclass(frozen=True)
class Product:
    """One matrix product per token: [tokens, k] x [k, n]. `split` is what tensor parallelism divides: columns n, rows k, or
    nothing."""

    n: int
    k: int
    split: Literal["columns", "rows", "none"]


@dataclass(frozen=True)
class Traffic:
    """Bytes of pointwise work per token and its kernels, forward. `split` bytes divide by tensor-parallel ranks, `whole` bytes
    only under sequence parallelism, `routed` bytes grow with the experts per token."""

    whole: float = 0.0
    split: float = 0.0
    routed: float = 0.0
    kernels: int = 0
    routed_kernels: int = 0  # of `kernels`, those of routed work


@dataclass(frozen=True)
class Layer:
    """What one layer does with one token. `kept_*` are bytes that backward needs from forward, as engines with fused kernels keep
    them: inputs of products, of attention and of nonlinear regions. Parameters are counts."""

    products: tuple[Product, ...]
    expert_products: tuple[Product, ...]  # of one expert
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    traffic: dict[str, Traffic] = field(hash=False)  # by fusion: eager, modules, compiled
    backward_over_forward: float = 2.0  # eager bytes
    kept_whole: float = 0.0
    kept_split: float = 0.0
    kept_routed: float = 0.0
    split_params: float = 0.0
    whole_params: float = 0.0
    expert_params: float = 0.0

    @property
    def row_products(self) -> int:
        """Each ends in one all-reduce forward, and the columns before it in one backward."""
        return sum(p.split == "rows" for p in self.products)


def read_layer(block: Block) -> Layer:
    """What a traced layer does with one token, and how it splits."""
    split = split_values(block)
    routed = routed_values(block)
    products, experts, attention = [], [], None
    for op in block.ops:
        if op.kind == "matmul" and _weight(op):
            products.append(Product(op.dims["n"], op.dims["k"], split.product[op.name]))
        elif op.kind == "experts":
            experts.append(Product(op.dims["n"], op.dims["k"], "none"))
        elif op.kind == "attention":
            attention = op
    if attention is None:
        raise InputError(f"a layer of {block.name} has no attention")
    a = attention.dims
    levels = {"eager": _eager(block, split, routed)}
    levels["modules"] = _regions(block, split, routed, by_module=True)
    levels["compiled"] = _regions(block, split, routed, by_module=False)
    eager = [op for op in block.ops if op.kind in POINTWISE and not _free(op)]
    forward = sum(op.forward.bytes.per_sample for op in eager)
    backward = sum(op.backward.bytes.per_sample for op in eager)
    kept = _kept(block, split, routed)
    params: dict[str, float] = defaultdict(float)
    for p in block.params:
        users = [op for op in block.ops if f"param:{p.name}" in _sources(block, op)]
        if any(op.kind == "experts" for op in users):
            params["experts"] += p.numel
        elif any(op.kind == "matmul" and split.product.get(op.name, "none") != "none" for op in users):
            params["split"] += p.numel
        else:
            params["whole"] += p.numel
    return Layer(
        tuple(products), tuple(experts), a["heads"], a["kv_heads"], a["head_dim"], a["v_head_dim"], levels, backward / max(forward, 1.0),
        kept["whole"], kept["split"], kept["routed"], params["split"], params["whole"], params["experts"],
    )  # fmt: skip


@dataclass(frozen=True)
class Splits:
    """Which values are split over tensor-parallel ranks, and how each weighted product is."""

    values: frozenset[str]
    product: dict[str, Literal["columns", "rows", "none"]]


def _weight(op: Op) -> bool:
    return any(v.startswith("param:") for v in op.inputs)


def _sources(block: Block, op: Op) -> set[str]:
    """Inputs of an op, through views."""
    found: set[str] = set()
    stack = list(op.inputs)
    while stack:
        value = stack.pop()
        name = value.partition(":")[0]
        if name in block.by_name and _free(block.by_name[name]):
            stack += block.by_name[name].inputs
        else:
            found.add(value if value.startswith(("param:", "in:", "buffer:")) else name)
    return found


def split_values(block: Block) -> Splits:
    """Column or row split of each weighted product, in dataflow order (the module's docstring)."""
    users: dict[str, list[Op]] = defaultdict(list)
    for op in block.ops:
        for value in op.inputs:
            users[value.partition(":")[0]].append(op)
    values: set[str] = set()
    product: dict[str, Literal["columns", "rows", "none"]] = {}
    for op in block.ops:
        inputs = {v.partition(":")[0] for v in op.inputs if not v.startswith("param:")}
        if op.kind == "matmul" and _weight(op):
            if inputs & values:
                product[op.name] = "rows"
            elif _feeds_product(op, users):
                product[op.name] = "columns"
                values.add(op.name)
            else:
                product[op.name] = "none"
        elif op.kind == "experts":
            continue  # experts are split by expert parallelism
        elif inputs & values:
            values.add(op.name)
    return Splits(frozenset(values), product)


def _feeds_product(op: Op, users: dict[str, list[Op]]) -> bool:
    """Whether an op's output reaches a product or attention with no norm over its whole width in between."""
    width = op.dims["n"]
    stack, seen, reached = list(users[op.name]), set(), False
    while stack:
        user = stack.pop()
        if user.name in seen:
            continue
        seen.add(user.name)
        out = user.outputs[0].shape if user.outputs else ()
        if user.kind == "experts" or (user.kind == "reduction" and user.target.startswith(("topk", "aten.topk", "aten::topk"))):
            return False
        if user.kind == "matmul" or user.kind == "attention":
            reached = True
            continue
        if user.kind == "norm" and out and out[-1] == width:
            return False
        if user.kind == "reduction" and out and out[-1] == 1 and math.prod(out) * width == math.prod(op.outputs[0].shape):
            return False
        stack += users[user.name]
    return reached


def routed_values(block: Block) -> frozenset[str]:
    """Values with a row per routed copy of a token: what flows into and out of experts until it is summed per token."""
    rows = next((op.dims["m"] for op in block.ops if op.kind == "experts"), 0)
    if not rows:
        return frozenset()
    first = (
        next(i for i, op in enumerate(block.ops) if op.kind == "reduction" and "sort" in op.target)
        if any("sort" in o.target for o in block.ops)
        else 0
    )
    found = set()
    for op in block.ops[first:]:
        shape = op.outputs[0].shape if op.outputs else ()
        if shape and (shape[0] == rows or (len(shape) > 2 and shape[0] * shape[1] == rows and op.kind in ("reduction", "copy", "view"))):
            found.add(op.name)
    return frozenset(found)


def _class(op: Op, split: Splits, routed: frozenset[str]) -> str:
    return "routed" if op.name in routed else "split" if op.name in split.values else "whole"


def _eager(block: Block, split: Splits, routed: frozenset[str]) -> Traffic:
    moved: dict[str, float] = defaultdict(float)
    kernels = {True: 0, False: 0}
    for op in block.ops:
        if op.kind in POINTWISE and not _free(op):
            moved[_class(op, split, routed)] += op.forward.bytes.per_sample / SEQ
        if not _free(op):
            kernels[op.name in routed] += op.forward.launches
    return Traffic(moved["whole"], moved["split"], moved["routed"], sum(kernels.values()), kernels[True])


def _regions(block: Block, split: Splits, routed: frozenset[str], by_module: bool) -> Traffic:
    """Traffic when each region of pointwise work is one kernel that reads its inputs and writes its outputs once. A region is
    connected, has one class, and with `by_module` stays inside one submodule of the layer (a fused kernel of that engine)."""
    parent: dict[str, str] = {}

    def root(x: str) -> str:
        while parent[x] != x:
            x = parent[x]
        return x

    members = [op for op in block.ops if op.kind in POINTWISE and not _free(op)]
    home = {op.name: (_class(op, split, routed), op.module.split(".")[0] if by_module else "", _breaks(op)) for op in members}
    through = {op.name: _sources(block, op) for op in block.ops}
    for op in members:
        parent[op.name] = op.name
        for source in through[op.name]:
            if source in parent and home[source][:2] == home[op.name][:2] and not home[source][2] and not home[op.name][2]:
                parent[root(source)] = root(op.name)
    reads: dict[str, set[str]] = defaultdict(set)
    writes: dict[str, set[str]] = defaultdict(set)
    for op in block.ops:
        if _free(op):
            continue
        here = root(op.name) if op.name in parent else op.name
        for source in through[op.name]:
            there = root(source) if source in parent else source
            if here != there:
                if op.name in parent:
                    reads[here].add(source)
                if source in parent:
                    writes[there].add(source)
    outs = {v.partition(":")[0] for v in block.outputs}
    for name in parent:
        if name in outs:
            writes[root(name)].add(name)
    moved: dict[str, float] = defaultdict(float)
    for region in {root(n) for n in parent}:
        for value in reads[region] | writes[region]:
            if value.startswith(("param:", "buffer:")):
                continue
            moved[home[region][0]] += block.spec_of(value).nbytes / SEQ
    heavy = [op for op in block.ops if op.kind not in POINTWISE and not _free(op)]
    kernels = len({root(n) for n in parent}) + sum(op.forward.launches for op in heavy)
    of_routed = len({root(n) for n in parent if n in routed}) + sum(op.forward.launches for op in heavy if op.kind == "experts")
    return Traffic(moved["whole"], moved["split"], moved["routed"], kernels, of_routed)


def _breaks(op: Op) -> bool:
    """Gathers and sorts are kernels of their own."""
    return op.kind == "copy" and "index" in op.target or "sort" in op.target or "topk" in op.target


def _kept(block: Block, split: Splits, routed: frozenset[str]) -> dict[str, float]:
    """Bytes per token of the distinct 16-bit values that backward needs: inputs of products and attention, and what the pointwise
    regions between them read from elsewhere."""
    kept: set[str] = set()
    heavy = {op.name for op in block.ops if op.kind in ("matmul", "attention", "experts")}
    for op in block.ops:
        sources = _sources(block, op)
        if op.name in heavy:
            kept |= sources
        elif op.kind in POINTWISE and not _free(op):
            nonlinear = op.kind in ("norm", "softmax") or not any(w in op.target for w in ("add", "to", "cat", "neg", "contiguous"))
            kept |= {s for s in sources if nonlinear and (s in heavy or s.startswith("in:"))}
    for op in block.ops:
        if op.kind == "attention":
            kept.add(op.name)
    total: dict[str, float] = defaultdict(float)
    for value in kept:
        if value.startswith(("param:", "buffer:")):
            continue
        if value.startswith("in:"):
            spec = block.inputs[int(value[3:])]
            if spec.role == "carry":
                total["whole"] += 2.0 * spec.spec.numel / SEQ
            continue
        op = block.by_name[value]
        if op.outputs and op.outputs[0].batch_dim is not None:
            total[_class(op, split, routed)] += 2.0 * op.outputs[0].numel / SEQ
    return total
