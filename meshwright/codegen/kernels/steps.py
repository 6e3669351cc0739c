"""aten ops as steps of a recipe: the table of what can be generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from meshwright.profiling.graph import Op

Arg = str | float
Said = list[tuple[str, str, tuple[Arg, ...]]]  # (name within the op, step, arguments): the last is the op's result
FLOATS = ("float32", "bfloat16", "float16")
_UNARY = ("neg", "rsqrt", "sqrt", "exp", "log", "sigmoid", "tanh", "erf", "relu", "silu")
_BINARY = ("add", "sub", "mul", "div")


def steps_of(op: Op) -> Said | None:
    """The steps of an op, whose tensor arguments are written "$0", "$1" in the order of its inputs; None where there is no rule.

    Elementwise ops on floats, reductions of the last dimension that keep it, norms, and halves of a row with their `cat`.
    """
    name = op.target.removeprefix("aten.").partition(".")[0]
    if len(op.outputs) != 1 or op.dtype not in FLOATS or not op.inputs:
        return None
    if name in _UNARY:
        return [("", name, ("$0",))]
    rule = _RULES.get(name)
    return rule(op) if rule else None


def _binary(op: Op) -> Said | None:
    name = op.target.removeprefix("aten.").partition(".")[0]
    if op.args.get("alpha", 1) != 1 or "rounding_mode" in op.args:
        return None
    other = "$1" if len(op.inputs) == 2 else op.args.get("other")
    if not isinstance(other, str | int | float):
        return None
    return [("", name, ("$0", other if isinstance(other, str) else float(other)))]


def _rsub(op: Op) -> Said | None:
    other = op.args.get("other")
    return [("", "sub", (float(other), "$0"))] if isinstance(other, int | float) and op.args.get("alpha", 1) == 1 else None


def _power(op: Op) -> Said | None:
    exponent = op.args.get("exponent")
    return [("", "pow", ("$0", float(exponent)))] if isinstance(exponent, int | float) and len(op.inputs) == 1 else None


def _reduction(op: Op) -> Said | None:
    dims, rank = op.args.get("dim"), len(op.outputs[0].shape)
    if not op.args.get("keepdim") or not isinstance(dims, list) or [d % rank for d in dims] != [rank - 1]:
        return None
    return [("", op.target.removeprefix("aten.").partition(".")[0], ("$0",))]


def _gelu(op: Op) -> Said | None:
    return [("", "gelu_tanh" if op.args.get("approximate", "none") == "tanh" else "gelu", ("$0",))]


def _cast(op: Op) -> Said | None:
    return [("", "cast", ("$0",))]


def _dropout(op: Op) -> Said | None:
    return [("", "cast", ("$0",))] if not op.args.get("p", 0) or not op.args.get("train", True) else None


def _layer_norm(op: Op) -> Said | None:
    eps = float(op.args.get("eps", 1e-5))
    if len(op.args.get("normalized_shape", ())) != 1:
        return None
    said: Said = [
        ("m", "mean", ("$0",)), ("c", "sub", ("$0", "m")), ("q", "mul", ("c", "c")), ("v", "mean", ("q",)), ("e", "add", ("v", eps)),
        ("s", "rsqrt", ("e",)), ("n", "mul", ("c", "s")),
    ]  # fmt: skip
    return _scaled(op, said)


def _rms_norm(op: Op) -> Said | None:
    eps = op.args.get("eps")
    if len(op.args.get("normalized_shape", ())) != 1 or not isinstance(eps, float):
        return None
    said: Said = [("p", "mul", ("$0", "$0")), ("m", "mean", ("p",)), ("e", "add", ("m", eps)), ("s", "rsqrt", ("e",)), ("n", "mul", ("$0", "s"))]
    return _scaled(op, said)


def _scaled(op: Op, said: Said) -> Said:
    """With the norm's weight and bias, where it has them."""
    last = said[-1][0]
    for i, role in enumerate(op.roles):
        if role in ("weight", "bias"):
            said.append((role, "mul" if role == "weight" else "add", (last, f"${i}")))
            last = role
    return said


def _slice(op: Op) -> Said | None:
    rank, start, end = len(op.outputs[0].shape), op.args.get("start", 0), op.args.get("end")
    if op.args.get("dim", 0) % rank != rank - 1 or op.args.get("step", 1) != 1:
        return None
    half = op.outputs[0].shape[-1]
    if start == 0 and end == half:
        return [("", "low", ("$0",))]
    if start == half and (end is None or end >= 2 * half):
        return [("", "high", ("$0",))]
    return None


def _cat(op: Op) -> Said | None:
    rank = len(op.outputs[0].shape)
    return [("", "cat", ("$0", "$1"))] if len(op.inputs) == 2 and op.args.get("dim", 0) % rank == rank - 1 else None


_RULES: dict[str, Callable[[Op], Said | None]] = {
    **dict.fromkeys(_BINARY, _binary), "rsub": _rsub, "pow": _power, "mean": _reduction, "sum": _reduction, "gelu": _gelu, "to": _cast,
    "_to_copy": _cast, "dropout": _dropout, "layer_norm": _layer_norm, "rms_norm": _rms_norm, "slice": _slice, "cat": _cat,
}  # fmt: skip


def moves_rows(op: Op) -> bool:
    """Whether a view leaves rows whole and the batch first: a transpose of two dimensions between, or a new one there."""
    rank = len(op.outputs[0].shape)
    args: dict[str, Any] = op.args
    if op.target == "aten.transpose.int":
        return all(0 < args[d] % rank < rank - 1 for d in ("dim0", "dim1"))
    return op.target == "aten.unsqueeze.default" and args["dim"] % rank < rank - 1
