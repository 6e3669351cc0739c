"""How each op may be sharded, as data: labels for the dimensions of its operands and results.

An op computed on a shard of the dimension labelled x has every operand that carries x sharded there, every operand that does
not replicated with a partial gradient (R), and its result sharded where it carries x. A label that no result carries is
contracted: the result is a partial sum (P). A dimension without a label is never sharded. Token dimensions carry no label in
products with weights: sharding those is context parallelism, which is another degree of freedom.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from meshwright.planner.states import I, P, R, S, State
from meshwright.profiling.graph import Block, Op, TensorSpec
from meshwright.profiling.literals import UNSETTABLE

Labels = tuple[str | None, ...]

# Labels of operands by role and of the result; "*" stands for leading dimensions without labels, "~" for aligned ones that
# may be sharded together. Roles that are absent from a call are skipped.
PRODUCTS: dict[str, tuple[dict[str, str], str]] = {
    "linear": ({"input": "*k", "weight": "nk", "bias": "n"}, "*n"),
    "addmm": ({"self": "n", "mat1": "*k", "mat2": "kn"}, "*n"),
    "mm": ({"self": "*k", "mat2": "kn"}, "*n"),
    "embedding": ({"weight": "v.", "indices": "*"}, "*."),
    "scaled_dot_product_attention": (
        {"query": ".h..", "key": ".h..", "value": ".h..", "attn_mask": ".h.."}, ".h.."
    ),
    "bmm": ({"self": "b..", "mat2": "b.."}, "b.."),
    "cross_entropy_loss": ({"self": "*c", "target": "*"}, ""),
    "selective_scan": ({"x": ".d.", "dt": ".d.", "a": "d.", "b": "...", "c": "..."}, ".d."),
}  # fmt: skip

# Elementwise ops through which a partial sum passes: f(a + b) = f(a) + f(b).
LINEAR = frozenset(["to", "_to_copy", "type_as", "neg", "contiguous", "clone", "alias", "detach", "div", "mul", "add", "sub", "dropout"])
REDUCTIONS = frozenset(["mean", "sum", "amax", "amin", "softmax", "_softmax", "log_softmax", "cumsum", "norm", "linalg_vector_norm", "var", "std"])
NORMS = frozenset(("layer_norm", "rms_norm"))
RESHAPES = frozenset(["view", "reshape", "flatten", "unflatten", "_unsafe_view"])


@dataclass(frozen=True)
class Strategy:
    """One way to compute an op: the state of each operand and result, and whether its work is divided by the ranks."""

    ins: tuple[State, ...]
    outs: tuple[State, ...]
    divided: bool = False


def strategies(op: Op, block: Block, ranks: int, pieces: tuple[int, ...] = (1,)) -> tuple[list[Strategy], bool]:
    """The ways to compute `op` on `ranks` ranks, and whether a rule is known for it.

    Without a rule the only way is replicated. `pieces` are the packings that a column-parallel weight may take.
    """
    found = [_replicated(op)]
    name = op_name(op)
    specs = [block.spec_of(v) for v in op.inputs]
    params = [v.startswith("param:") for v in op.inputs]
    if not op.inputs or op.kind == "constant":
        return found, True
    known = True
    if name in PRODUCTS:
        found += _products(op, name, specs, params, ranks, pieces)
    elif name == "matmul":
        found += _matmuls(op, specs, params, ranks)
    elif name in RESHAPES:
        found += _reshapes(op, specs[0], ranks, pieces)
    elif name in ("split", "split_with_sizes", "chunk", "unbind", "tensor_split"):
        found += _splits(op, name, specs[0], ranks, pieces)
    else:
        labels = _labels(op, name, specs)
        known = labels is not None
        if labels is not None:
            found += _from_labels(op, labels[0], labels[1], specs, params, ranks, pieces)
    rows = all(len(s.shape) < 2 for s, is_param in zip(specs, params, strict=True) if is_param)
    if rows and op.kind in ("pointwise", "view", "copy", "reduction", "softmax", "norm"):
        found.append(Strategy(tuple(R for _ in op.inputs), tuple(R for _ in op.outputs)))
    if name in LINEAR and not any(params) and (len(op.inputs) > 1 or name not in ("add", "sub")) and name not in ("mul", "div", "dropout"):
        found.append(Strategy(tuple(P for _ in op.inputs), tuple(P for _ in op.outputs)))
    elif name in ("mul", "div") and len(op.inputs) == 1 or name == "dropout" and not op.args.get("p"):
        found.append(Strategy((P,), (P,)))
    elif op.kind == "view" and name not in ("split", "chunk", "unbind", "split_with_sizes", "tensor_split"):
        found.append(Strategy(tuple(P for _ in op.inputs), tuple(P for _ in op.outputs)))
    return [s for s in dict.fromkeys(found) if not _unsettable(op, name, s)], known


def _unsettable(op: Op, name: str, way: Strategy) -> bool:
    """Whether a sharded dimension's size is written in the module's code in a way that has no local value."""
    out = way.outs[0]
    if not out.sharded or not op.literals:
        return False
    if name in ("split", "split_with_sizes"):
        at = int(op.args.get("dim", 0)) % len(op.outputs[0].shape)
        keys = ["split_size", "split_sizes[0]"] if out.dim == at else []
    else:
        keys = [f"{key}[{out.dim}]" for key in ("size", "shape", "sizes")]
    return any(op.literals.get(k, "").startswith(UNSETTABLE) for k in keys)


def op_name(op: Op) -> str:
    """ "linear" for aten.linear.default, "div" for aten.div_.Tensor."""
    name = op.target.split(".")[1] if "." in op.target else op.target
    return name.rstrip("_") or name


def _replicated(op: Op) -> Strategy:
    return Strategy(tuple(I for _ in op.inputs), tuple(I for _ in op.outputs))


def _expand(pattern: str, rank: int) -> Labels:
    """A pattern like "*k" for a tensor of this rank; "." and the dimensions of "*" carry no label."""
    head, star, tail = pattern.partition("*")
    fill = "." * (rank - len(head) - len(tail)) if star else ""
    return tuple(None if c == "." else c for c in head + fill + tail)


def _products(op: Op, name: str, specs: list[TensorSpec], params: list[bool], ranks: int, pieces: tuple[int, ...]) -> list[Strategy]:
    roles, result = PRODUCTS[name]
    ins = [_expand(roles.get(role, "*"), len(s.shape)) for role, s in zip(op.roles, specs, strict=True)]
    # a mask or bias that is broadcast over a labelled dimension does not carry it
    ins = [tuple(None if size == 1 else c for c, size in zip(labels, s.shape, strict=True)) for labels, s in zip(ins, specs, strict=True)]
    outs = [_expand(result, len(op.outputs[0].shape))]
    weighted = any(params)
    packings = pieces if name in ("linear", "addmm", "mm") and weighted else (1,)
    return _from_labels(op, ins, outs, specs, params, ranks, packings)


def _matmuls(op: Op, specs: list[TensorSpec], params: list[bool], ranks: int) -> list[Strategy]:
    """a [..., m, k] @ b [..., k, n]: with a weight its own dimension or the contracted one; without, the leading dimensions."""
    a, b = (len(s.shape) for s in specs)
    lead = tuple(f"b{i}" for i in range(len(op.outputs[0].shape) - 2))
    if params[0] and a == 2:
        ins, out = [("m", "k"), (*(None,) * (b - 2), "k", None)], (*(None,) * (b - 2), "m", None)
    elif params[1] and b == 2:
        ins, out = [(*(None,) * (a - 1), "k"), ("k", "n")], (*(None,) * (a - 1), "n")
    elif a > 2 and b > 2 and not any(params):
        ins = [(*_aligned(s.shape[:-2], op.outputs[0].shape[:-2], lead), None, None) for s in specs]
        out = (*lead, None, None)
    else:
        return []
    return _from_labels(op, [tuple(x) for x in ins], [tuple(out)], specs, params, ranks, (1,))


def _from_labels(
    op: Op, ins: list[Labels], outs: list[Labels], specs: list[TensorSpec], params: list[bool], ranks: int, pieces: tuple[int, ...]
) -> list[Strategy]:
    found = []
    every = dict.fromkeys(c for labels in [*ins, *outs] for c in labels if c is not None)
    for label in every:
        contracted = not any(label in labels for labels in outs)
        for q in pieces:
            if not _divides(label, q * ranks, ins, specs) or not _divides(label, q * ranks, outs, list(op.outputs)):
                continue
            into = []
            for labels, is_param in zip(ins, params, strict=True):
                if label in labels:
                    into.append(S(labels.index(label), q))
                elif contracted:
                    into.append(P if is_param else I)  # a bias is added once; ids and targets are whole
                else:
                    into.append(R)
            if op.kind == "cross_entropy":
                result = [I for _ in outs]  # the loss itself sums over the shards of the classes
            else:
                result = [P if contracted else S(labels.index(label), q) if label in labels else R for labels in outs]
            found.append(Strategy(tuple(into), tuple(result), divided=True))
    return found


def _divides(label: str, parts: int, labelled: list[Labels], specs: list[TensorSpec]) -> bool:
    return all(
        size % parts == 0 and d != s.batch_dim
        for labels, s in zip(labelled, specs, strict=True)
        for d, (c, size) in enumerate(zip(labels, s.shape, strict=True))
        if c == label
    )


def _labels(op: Op, name: str, specs: list[TensorSpec]) -> tuple[list[Labels], list[Labels]] | None:
    """Labels of an op whose results have its operands' dimensions, moved or dropped; None if there is no rule."""
    out = op.outputs[0].shape
    if op.kind == "pointwise":
        return [_aligned(s.shape, out) for s in specs], [_all(len(o.shape)) for o in op.outputs]
    first = specs[0].shape
    rank = len(first)
    d = _all(rank)
    if name in NORMS:
        inner = len(op.args.get("normalized_shape", [0]))
        row = tuple(c if i < rank - inner else None for i, c in enumerate(d))
        return [row, *(_none(s) for s in specs[1:])], [row]
    if name in REDUCTIONS:
        dims = op.args.get("dim")
        if dims is None:
            return None
        over = {int(x) % rank for x in (dims if isinstance(dims, list) else [dims])}
        row = tuple(None if i in over else c for i, c in enumerate(d))
        keeps = len(out) == rank
        return [row], [tuple(None if i in over else c for i, c in enumerate(row)) if keeps else tuple(c for i, c in enumerate(row) if i not in over)]
    if op.kind == "copy" and name in ("contiguous", "clone", "zeros_like", "ones_like", "empty_like", "full_like"):
        return [d], [d]
    if name in ("alias", "detach", "expand_as", "lift_fresh_copy"):
        return [_aligned(first, out)], [_all(len(out))]
    if name in ("transpose", "swapaxes"):
        a, b = int(op.args["dim0"]) % rank, int(op.args["dim1"]) % rank
        moved = list(d)
        moved[a], moved[b] = moved[b], moved[a]
        return [d], [tuple(moved)]
    if name == "t":
        return [d], [d[::-1]]
    if name == "permute":
        return [d], [tuple(d[int(i) % rank] for i in op.args["dims"])]
    if name == "unsqueeze":
        at = int(op.args["dim"]) % (rank + 1)
        return [d], [(*d[:at], None, *d[at:])]
    if name == "squeeze":
        kept = [c for c, size in zip(d, first, strict=True) if size != 1]
        return ([d], [tuple(kept)]) if len(kept) == len(out) else None
    if name == "expand":
        return [_aligned(first, out)], [_all(len(out))]
    if name in ("slice", "select", "narrow"):
        at = int(op.args.get("dim", 0)) % rank
        if name == "select":
            row = tuple(None if i == at else c for i, c in enumerate(d))
            return [row], [tuple(c for i, c in enumerate(row) if i != at)]
        row = tuple(None if i == at and first[at] != out[at] else c for i, c in enumerate(d))
        return [row], [row]
    if name in ("cat", "stack"):
        at = int(op.args.get("dim", 0)) % len(out)
        if name == "stack":
            return [d for _ in specs], [(*d[:at], None, *d[at:])]
        row = tuple(None if i == at else c for i, c in enumerate(d))
        return [row for _ in specs], [row]
    return None


def _all(rank: int) -> Labels:
    return tuple(f"d{i}" for i in range(rank))


def _none(s: TensorSpec) -> Labels:
    return (None,) * len(s.shape)


def _aligned(shape: tuple[int, ...], out: tuple[int, ...], names: tuple[str, ...] = ()) -> Labels:
    """Labels of an operand that broadcasts to `out`: aligned from the right, none where it is broadcast."""
    shift = len(out) - len(shape)
    names = names or tuple(f"d{i}" for i in range(len(out)))
    return tuple(names[i + shift] if size == out[i + shift] and size > 1 else None for i, size in enumerate(shape))


def _reshapes(op: Op, spec: TensorSpec, ranks: int, pieces: tuple[int, ...]) -> list[Strategy]:
    """A shard with p blocks before it (the sizes before its dimension times its pieces) has p before it in any shape.

    The batch is the outermost factor of the outermost dimension, or the op is left alone: then p counts within a sample,
    and no shard moves into or out of the batched dimension.
    """
    out = op.outputs[0]
    if spec.batch_dim not in (None, 0) or out.batch_dim not in (None, 0):
        return []
    found = []
    for d, q in itertools.product(range(len(spec.shape)), pieces):
        if d == spec.batch_dim or spec.shape[d] % (q * ranks):
            continue
        before = q
        for size in spec.shape[:d]:
            before *= size
        target = _find(out.shape, before, ranks)
        if target is not None and target.dim != out.batch_dim:
            found.append(Strategy((S(d, q),), (target,), divided=True))
    return found


def _find(shape: tuple[int, ...], before: int, ranks: int) -> State | None:
    """The state of `shape` whose shard has `before` blocks before it."""
    passed = 1
    for d, size in enumerate(shape):
        if before % passed == 0 and before < passed * size:
            q = before // passed
            return S(d, q) if size % (q * ranks) == 0 else None
        passed *= size
    return None


def _splits(op: Op, name: str, spec: TensorSpec, ranks: int, pieces: tuple[int, ...]) -> list[Strategy]:
    """Equal pieces: a shard of a piece is a packed shard of the whole."""
    rank = len(spec.shape)
    at = int(op.args.get("dim", 0)) % rank
    found = []
    equal = len({o.shape for o in op.outputs}) == 1
    for d in range(rank):
        if d == spec.batch_dim:
            continue
        if d != at:
            if spec.shape[d] % ranks == 0 and spec.shape[d] > 1:
                shift = 1 if name == "unbind" and d > at else 0
                found.append(Strategy((S(d),), tuple(S(d - shift) for _ in op.outputs), divided=True))
        elif equal and name != "unbind" and op.outputs[0].shape[d] % ranks == 0:
            n = len(op.outputs)
            found.append(Strategy((S(d, n),), tuple(S(d) for _ in op.outputs), divided=True))
    return found


def packings(block: Block) -> tuple[int, ...]:
    """In how many pieces a weight of the block may be packed: what its splits, and views that lead with a small size, undo."""
    found = {1}
    for op in block.ops:
        name = op_name(op)
        if name in ("split", "chunk", "split_with_sizes", "tensor_split") and len({o.shape for o in op.outputs}) == 1:
            found.add(len(op.outputs))
        if name in RESHAPES and op.inputs:
            source, out = block.spec_of(op.inputs[0]).shape, op.outputs[0].shape
            if len(out) > len(source):
                found |= {s for s in out if 2 <= s <= 4 and s not in source}
    return tuple(sorted(found))
