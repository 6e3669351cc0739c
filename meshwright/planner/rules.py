"""The ways in which each op may be computed on the ranks of a tensor-parallel group (the table: rules_labels.py).

Besides what the table says, every op can be computed whole (I); ops without matrices on values whose gradients are partial sums (R),
because backward is linear in the gradient; linear ones on partial sums (P).
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.planner.rules_labels import ADDED, Labelled, Labels, labels_of
from meshwright.planner.rules_views import RESHAPES, SPLITS, reshapes, splits
from meshwright.planner.states import I, P, R, S, State
from meshwright.profiling.graph import Block, Op, TensorSpec
from meshwright.profiling.literals import UNSETTABLE

# Elementwise ops through which a partial sum passes: f(a + b) = f(a) + f(b).
LINEAR = frozenset(["to", "_to_copy", "type_as", "neg", "contiguous", "clone", "alias", "detach", "add", "sub"])
SCALED = frozenset(["mul", "div"])  # linear in one operand where the other is a number
FILLS = frozenset(["zeros", "ones", "full", "empty"])
ROWS = frozenset(["pointwise", "view", "copy", "reduction", "softmax", "norm"])
INEXACT = ("float", "bfloat")


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
    found = [Strategy(tuple(I for _ in op.inputs), tuple(I for _ in op.outputs))]
    name = op_name(op)
    if not op.inputs or op.kind == "constant":
        return found + _filled(op, name, ranks), True
    specs = [block.spec_of(v) for v in op.inputs]
    params = [v.startswith("param:") for v in op.inputs]
    known = True
    if name in RESHAPES:
        found += [Strategy((s,), (t,), divided=True) for s, t in reshapes(op, specs[0], ranks, pieces)]
    elif name in SPLITS:
        found += [Strategy((s,), t, divided=True) for s, t in splits(op, name, specs[0], ranks)]
    else:
        weights = [_of_parameters(v, block) for v in op.inputs]
        rule = labels_of(op, name, specs, weights)
        known = rule is not None
        if rule is not None:
            packings = pieces if op.kind not in ("attention", "embedding", "cross_entropy") and name not in ("bmm", "baddbmm") else (1,)
            found += _from_labels(op, name, rule, specs, params, ranks, packings)
        if name == "scaled_dot_product_attention":
            found += _with_all_keys(op, specs, ranks)
    if op.kind in ROWS and all(len(s.shape) < 2 for s, is_param in zip(specs, params, strict=True) if is_param):
        found.append(Strategy(tuple(R for _ in op.inputs), tuple(R for _ in op.outputs)))
    if _linear(op, name, params, specs):
        found.append(Strategy(tuple(P for _ in op.inputs), tuple(P for _ in op.outputs)))
    return [s for s in dict.fromkeys(found) if not _unsettable(op, name, s)], known


def _filled(op: Op, name: str, ranks: int) -> list[Strategy]:
    """A tensor of one value whose size follows an attribute is local where the attribute is."""
    if name not in FILLS:
        return []
    sizes = {d: n for d, n in enumerate(op.args.get("size", [])) if op.literals.get(f"size[{d}]", UNSETTABLE)[:1] != UNSETTABLE}
    return [Strategy((), (S(d),), divided=True) for d, n in sizes.items() if isinstance(n, int) and n % ranks == 0]


def op_name(op: Op) -> str:
    """ "linear" for aten.linear.default, "div" for aten.div_.Tensor."""
    name = op.target.split(".")[1] if "." in op.target else op.target
    return name.rstrip("_") or name


def _linear(op: Op, name: str, params: list[bool], specs: list[TensorSpec]) -> bool:
    """Whether partial sums in give a partial sum out."""
    if any(params) or not all(x.dtype.startswith(INEXACT) for x in (*specs, *op.outputs)):
        return False
    if name in SCALED:
        return len(op.inputs) == 1 and not op.args.get("rounding_mode")
    if name == "dropout":
        return not op.args.get("p")
    if name in ("add", "sub"):
        return len(op.inputs) > 1
    return name in LINEAR or (op.kind == "view" and name not in SPLITS)


def _of_parameters(v: str, block: Block) -> bool:
    """Whether a value is made of parameters alone."""
    if v.startswith(("param:", "buffer:")):
        return True
    op = block.by_name.get(v.partition(":")[0])
    if op is None or block.spec_of(v).batch_dim is not None:
        return False
    return bool(op.inputs) and all(_of_parameters(x, block) for x in op.inputs)


def _from_labels(
    op: Op, name: str, rule: Labelled, specs: list[TensorSpec], params: list[bool], ranks: int, pieces: tuple[int, ...]
) -> list[Strategy]:
    found = []
    for label in dict.fromkeys(c for labels in [*rule.ins, *rule.outs] for c in labels if c is not None):
        contracted = not any(label in labels for labels in rule.outs)
        for q in pieces:
            parts = q * ranks
            if rule.whole.get(label, parts) % parts:
                continue
            if not _divides(label, parts, rule.ins, specs) or not _divides(label, parts, rule.outs, list(op.outputs)):
                continue
            into = []
            for labels, is_param, role in zip(rule.ins, params, op.roles or [""] * len(op.inputs), strict=True):
                if label in labels:
                    into.append(S(labels.index(label), q))
                elif contracted and ("conv" if op.kind == "conv" else name, role) in ADDED:
                    if not is_param:
                        break  # a bias is added once; only a stored one can be left out on the other ranks
                    into.append(P)
                else:
                    into.append(R)
            else:
                result = [P if contracted else S(labels.index(label), q) if label in labels else R for labels in rule.outs]
                if op.kind == "cross_entropy":
                    into = [s if s.sharded else I for s in into]
                    result = [I for _ in result]  # the loss itself sums over the shards of the classes
                found.append(Strategy(tuple(into), tuple(result), divided=True))
    return found


def _divides(label: str, parts: int, labelled: list[Labels], specs: list[TensorSpec]) -> bool:
    return all(
        size % parts == 0 and d != s.batch_dim
        for labels, s in zip(labelled, specs, strict=True)
        for d, (c, size) in enumerate(zip(labels, s.shape, strict=True))
        if c == label
    )


def _with_all_keys(op: Op, specs: list[TensorSpec], ranks: int) -> list[Strategy]:
    """More ranks than key-value heads: each has all of them and takes the one of its own query heads."""
    sizes = dict(zip(op.roles, (s.shape for s in specs), strict=True))
    if len(sizes["query"]) != 4:
        return []
    heads, kv = sizes["query"][1], sizes["key"][1]
    if not (kv < ranks and ranks % kv == 0 and heads % ranks == 0):
        return []
    mask = S(1) if len(sizes.get("attn_mask", ())) == 4 and sizes["attn_mask"][1] > 1 else R
    state = {"query": S(1), "key": R, "value": R, "attn_mask": mask}
    return [Strategy(tuple(state.get(role, R) for role in op.roles), (S(1),), divided=True)]


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


def packings(block: Block) -> tuple[int, ...]:
    """In how many pieces a weight of the block may be packed: what its splits, and views that lead with a small size, undo."""
    found = {1}
    for op in block.ops:
        name = op_name(op)
        if name in SPLITS and name != "unbind" and len({o.shape for o in op.outputs}) == 1:
            found.add(len(op.outputs))
        if name in RESHAPES and op.inputs:
            source, out = block.spec_of(op.inputs[0]).shape, op.outputs[0].shape
            if len(out) > len(source):
                found |= {s for s in out if 2 <= s <= 4 and s not in source}
    return tuple(sorted(found))
