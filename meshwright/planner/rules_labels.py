"""The table of sharding rules: labels for the dimensions of each op's operands and results.

An op computed on a shard of the dimension labelled x has every operand that carries x sharded there, every operand that does
not replicated with a partial gradient (R), and its result sharded where it carries x. A label that no result carries is
contracted: the result is a partial sum (P). A dimension without a label is never sharded. Token dimensions carry no label in
products with weights: sharding those is context parallelism, which is another degree of freedom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from meshwright.profiling.graph import Op, TensorSpec

Labels = tuple[str | None, ...]

# Labels of operands by role and of the result; "*" stands for dimensions without labels.
PRODUCTS: dict[str, tuple[dict[str, str], str]] = {
    "linear": ({"input": "*k", "weight": "nk", "bias": "n"}, "*n"),
    "addmm": ({"self": "n", "mat1": "*k", "mat2": "kn"}, "*n"),
    "mm": ({"self": "*k", "mat2": "kn"}, "*n"),
    "embedding": ({"weight": "v.", "indices": "*"}, "*."),
    "scaled_dot_product_attention": (
        {"query": "*h..", "key": "*h..", "value": "*h..", "attn_mask": "*h.."}, "*h.."
    ),
    "bmm": ({"self": "b..", "mat2": "b.."}, "b.."),
    "baddbmm": ({"self": "b..", "batch1": "b..", "batch2": "b.."}, "b.."),
    "cross_entropy_loss": ({"self": "*c", "target": "*"}, ""),
    "selective_scan": ({"x": ".d.", "dt": ".d.", "a": "d.", "b": "...", "c": "..."}, ".d."),
    "group_norm": ({"input": ".c*", "weight": "c", "bias": "c"}, ".c*"),
}  # fmt: skip
CONVOLUTIONS = {
    "conv": ({"input": ".i*", "weight": "oi*", "bias": "o"}, ".o*"),
    "conv_transpose": ({"input": ".i*", "weight": "io*", "bias": "o"}, ".o*"),
    "grouped": ({"input": ".c*", "weight": "c*", "bias": "c"}, ".c*"),
}
NORMS = frozenset(["layer_norm", "rms_norm"])
REDUCTIONS = frozenset(["mean", "sum", "amax", "amin", "any", "all", "logsumexp", "norm", "linalg_vector_norm", "var", "std", "argmax", "argmin"])
# Dimensions that an op mixes, keeping their number: named by its argument `dim`, or the last ones of every image or matrix.
ALONG = frozenset(["softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "topk", "sort", "glu", "index_select", "flip", "roll", "gather"])
LAST_TWO = frozenset([
    "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "tril", "triu", "pixel_shuffle",
])  # fmt: skip
LAST = frozenset(["avg_pool1d", "max_pool1d", "adaptive_avg_pool1d"])
SAME_SHAPE = frozenset(["contiguous", "clone", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"])
BROADCAST = frozenset(["alias", "detach", "expand_as", "expand", "broadcast_to", "lift_fresh_copy", "broadcast_tensors"])
ADDED = frozenset([("linear", "bias"), ("conv", "bias"), ("addmm", "self"), ("baddbmm", "self")])  # operands that are added to a product
STATISTICS = frozenset(["batch_norm", "instance_norm"])  # their running statistics are buffers, which are not sharded


@dataclass(frozen=True)
class Labelled:
    """Labels of an op's operands and results, and what else must divide into as many parts as a label does."""

    ins: list[Labels]
    outs: list[Labels]
    whole: dict[str, int] = field(default_factory=dict)


def labels_of(op: Op, name: str, specs: list[TensorSpec], weights: list[bool]) -> Labelled | None:
    """The rule for an op, or None. `weights`: which operands are made of parameters alone."""
    ranks = [len(s.shape) for s in specs]
    if name == "group_norm":
        own = f"param:{op.module}.weight" in op.inputs  # a module that owns its weight reads its number of groups from itself
        return _products(op, *PRODUCTS[name], specs, {"c": int(op.args["num_groups"])}) if own else _unlabelled(op, specs)
    if name in PRODUCTS:
        return _products(op, *PRODUCTS[name], specs)
    if op.kind == "conv":
        groups = int(op.args.get("groups", 1))
        if ranks[0] != ranks[1]:
            return None
        if groups > 1:
            return _products(op, *CONVOLUTIONS["grouped"], specs, {"c": groups}) if "transpose" not in name else None
        return _products(op, *CONVOLUTIONS["conv_transpose" if "transpose" in name else "conv"], specs)
    if name == "matmul":
        return _matmul(op, specs, weights)
    if name == "einsum":
        return _einsum(op, specs, weights)
    if name in STATISTICS:
        return _unlabelled(op, specs)
    return _moved(op, name, specs)


def _products(op: Op, roles: dict[str, str], result: str, specs: list[TensorSpec], whole: dict[str, int] | None = None) -> Labelled | None:
    ins = []
    for role, s in zip(op.roles, specs, strict=True):
        labels = _expand(roles.get(role, "*"), len(s.shape))
        if labels is None:
            return None
        # a mask or bias that is broadcast over a labelled dimension does not carry it
        ins.append(tuple(None if size == 1 else c for c, size in zip(labels, s.shape, strict=True)))
    outs = [_expand(result, len(o.shape)) for o in op.outputs]
    return Labelled(ins, [o for o in outs if o is not None], whole or {}) if None not in outs else None


def _expand(pattern: str, rank: int) -> Labels | None:
    """A pattern like "*k" for a tensor of this rank; "." and the dimensions of "*" carry no label."""
    head, star, tail = pattern.partition("*")
    missing = rank - len(head) - len(tail)
    if missing < 0 and star and not head:
        tail, missing = tail[-rank:] if rank else "", 0  # a mask of fewer dimensions
    if missing < 0 or (missing and not star):
        return None
    return tuple(None if c == "." else c for c in head + "." * missing + tail)


def _matmul(op: Op, specs: list[TensorSpec], weights: list[bool]) -> Labelled | None:
    """a [..., m, k] @ b [..., k, n]: with a weight its own dimension or the contracted one; without, the leading dimensions."""
    a, b = (len(s.shape) for s in specs)
    rank = len(op.outputs[0].shape)
    if weights[0] and a == 2 and b >= 2:
        return Labelled([("m", "k"), (*(None,) * (b - 2), "k", None)], [(*(None,) * (b - 2), "m", None)])
    if weights[1] and b == 2:
        return Labelled([(*(None,) * (a - 1), "k"), ("k", "n")], [(*(None,) * (a - 1), "n")])
    if a < 2 or b < 2:
        return None
    lead = tuple(f"b{i}" for i in range(rank - 2))
    ins = [(*aligned(s.shape[:-2], op.outputs[0].shape[:-2], lead), None, None) for s in specs]
    return Labelled(ins, [(*lead, None, None)])


def _einsum(op: Op, specs: list[TensorSpec], weights: list[bool]) -> Labelled | None:
    """The equation's own letters; with a weight those that it carries, without one those that are not contracted."""
    operands, arrow, result = str(op.args.get("equation", "")).replace(" ", "").partition("->")
    letters = operands.split(",")
    if not arrow or "." in operands or [len(x) for x in letters] != [len(s.shape) for s in specs]:
        return None
    kept = set("".join(x for x, w in zip(letters, weights, strict=True) if w)) if any(weights) else set(result)

    def labels(x: str) -> Labels:
        return tuple(c if c in kept else None for c in x)

    return Labelled([labels(x) for x in letters], [labels(result)])


def _moved(op: Op, name: str, specs: list[TensorSpec]) -> Labelled | None:
    """Ops whose results have their operands' dimensions, moved or dropped."""
    outs = [o.shape for o in op.outputs]
    out, first = outs[0], specs[0].shape
    rank = len(first)
    d = _all(rank)
    if name == "prelu":
        row = tuple(c if i != 1 else None for i, c in enumerate(d))
        return Labelled([row, *(_none(s.shape) for s in specs[1:])], [row])
    if name in ALONG or name in LAST_TWO or name in LAST or name in ("constant_pad_nd", "pad"):
        mixed = _mixed(op, name, rank)
        if mixed is None or any(len(o) != rank for o in outs):
            return None
        row = tuple(c if i not in mixed and all(o[i] == first[i] for o in outs) else None for i, c in enumerate(d))
        rest = [row if len(s.shape) == rank and name == "gather" else _none(s.shape) for s in specs[1:]]
        kept = all(a == b for s in specs[1:] if name == "gather" for a, b, c in zip(s.shape, first, row, strict=True) if c)
        return Labelled([row, *rest], [row for _ in outs]) if kept else None
    if op.kind == "pointwise":
        return Labelled([aligned(s.shape, out) for s in specs], [_all(len(o)) for o in outs])
    if name in NORMS:
        inner = len(op.args.get("normalized_shape", [0]))
        row = tuple(c if i < rank - inner else None for i, c in enumerate(d))
        return Labelled([row, *(_none(s.shape) for s in specs[1:])], [row for _ in outs])
    if name in REDUCTIONS:
        return _reduction(op, name, d)
    if name in SAME_SHAPE:
        return Labelled([d], [d])
    if name in BROADCAST:
        ins = [aligned(s.shape, out) if i < len(outs) else _none(s.shape) for i, s in enumerate(specs)]
        return Labelled(ins, [_all(len(o)) for o in outs])
    if name in ("transpose", "swapaxes", "t", "permute", "mT", "numpy_T"):
        order = _order(op, name, rank)
        return Labelled([d], [tuple(d[i] for i in order)])
    if name == "unsqueeze":
        at = int(op.args["dim"]) % (rank + 1)
        return Labelled([d], [(*d[:at], None, *d[at:])])
    if name == "squeeze":
        given = op.args.get("dim", list(range(rank)))
        dims = {int(x) % rank for x in (given if isinstance(given, list) else [given])}
        gone = tuple(c for i, c in enumerate(d) if not (i in dims and first[i] == 1))
        return Labelled([d], [gone]) if len(gone) == len(out) else None
    if name == "unfold":
        at = int(op.args["dimension"]) % rank
        row = tuple(None if i == at else c for i, c in enumerate(d))
        return Labelled([row], [(*row, None)])
    if name in ("repeat", "tile"):
        if len(out) != rank:
            return None
        row = tuple(c if a == b else None for c, a, b in zip(d, first, out, strict=True))
        return Labelled([row], [row])
    if name in ("slice", "select", "narrow"):
        at = int(op.args.get("dim", 0)) % rank
        if name == "select":
            row = tuple(None if i == at else c for i, c in enumerate(d))
            return Labelled([row], [tuple(c for i, c in enumerate(row) if i != at)])
        # a slice of everything stays one on a shard; a narrow says its length
        row = tuple(None if i == at and (first[at] != out[at] or name == "narrow") else c for i, c in enumerate(d))
        return Labelled([row], [row])
    if name in ("cat", "stack"):
        at = int(op.args.get("dim", 0)) % len(out)
        if name == "stack":
            return Labelled([d for _ in specs], [(*d[:at], None, *d[at:])])
        row = tuple(None if i == at else c for i, c in enumerate(d))
        return Labelled([row for _ in specs], [row])
    return None


def _mixed(op: Op, name: str, rank: int) -> set[int] | None:
    if name in LAST_TWO or name in LAST:
        wide = min(2 if name in LAST_TWO else 1, rank)
        return set(range(rank - (3 if name == "pixel_shuffle" else wide), rank))
    if name in ("constant_pad_nd", "pad"):
        return set(range(rank - len(op.args.get("pad", [])) // 2, rank))
    given: Any = op.args.get("dims", op.args.get("dim", -1))
    if name == "roll" and not given:
        return None
    return {int(x) % rank for x in (given if isinstance(given, list) else [given])}


def _order(op: Op, name: str, rank: int) -> list[int]:
    order = list(range(rank))
    if name == "permute":
        return [int(i) % rank for i in op.args["dims"]]
    if name in ("t", "numpy_T"):
        return order[::-1]
    given = (-2, -1) if name == "mT" else (op.args.get("dim0", op.args.get("axis0", 0)), op.args.get("dim1", op.args.get("axis1", 0)))
    a, b = (int(x) % rank for x in given)
    order[a], order[b] = order[b], order[a]
    return order


def _reduction(op: Op, name: str, d: Labels) -> Labelled | None:
    """Over dims that stay whole; a sum may also be over shards, which makes it partial."""
    given = op.args.get("dim")
    rank, out = len(d), op.outputs[0].shape
    over = set(range(rank)) if given in (None, []) else {int(x) % rank for x in (given if isinstance(given, list) else [given])}
    keeps = len(out) == rank
    row = tuple(None if i in over and name != "sum" else c for i, c in enumerate(d))
    result = tuple(None if i in over else c for i, c in enumerate(d) if keeps or i not in over)
    return Labelled([row], [result for _ in op.outputs]) if len(result) == len(out) else None


def _unlabelled(op: Op, specs: list[TensorSpec]) -> Labelled:
    return Labelled([_none(s.shape) for s in specs], [_none(o.shape) for o in op.outputs])


def _all(rank: int) -> Labels:
    return tuple(f"d{i}" for i in range(rank))


def _none(shape: Sequence[int]) -> Labels:
    return (None,) * len(shape)


def aligned(shape: tuple[int, ...], out: tuple[int, ...], names: tuple[str, ...] = ()) -> Labels:
    """Labels of an operand that broadcasts to `out`: aligned from the right, none where it is broadcast."""
    shift = len(out) - len(shape)
    names = names or tuple(f"d{i}" for i in range(len(out)))
    return tuple(names[i + shift] if size == out[i + shift] and size > 1 else None for i, size in enumerate(shape))
