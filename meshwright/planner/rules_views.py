"""Where a shard goes when a tensor is reshaped, split or chunked."""

from __future__ import annotations

import itertools

from meshwright.planner.states import S, State
from meshwright.profiling.graph import Op, TensorSpec

RESHAPES = frozenset(["view", "reshape", "flatten", "unflatten", "_unsafe_view"])
SPLITS = frozenset(["split", "split_with_sizes", "chunk", "unbind", "tensor_split", "unsafe_split"])


def reshapes(op: Op, spec: TensorSpec, ranks: int, pieces: tuple[int, ...]) -> list[tuple[State, State]]:
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
            found.append((S(d, q), target))
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


def splits(op: Op, name: str, spec: TensorSpec, ranks: int) -> list[tuple[State, tuple[State, ...]]]:
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
                found.append((S(d), tuple(S(d - shift) for _ in op.outputs)))
        elif equal and name != "unbind" and op.outputs[0].shape[d] % ranks == 0:
            found.append((S(d, len(op.outputs)), tuple(S(d) for _ in op.outputs)))
    return found
