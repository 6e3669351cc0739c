"""Placement states of a value on a tensor-parallel group, and the collectives between them.

A state says where a value is and, with it, where its gradient is, so that no backward graph is needed:

    S<d>, S<d>x<q>  sharded on dimension d (inside each of q pieces)   gradient sharded the same way
    I               replicated                                         gradient replicated
    R               replicated                                         gradient a partial sum on every rank
    P               a partial sum on every rank                        gradient replicated

These are the states, and the notation, of codegen/runtime/tensor_parallel.py.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

CollectiveOp = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]


class State(NamedTuple):
    kind: Literal["S", "I", "R", "P"]
    dim: int = 0
    pieces: int = 1

    def __str__(self) -> str:
        if self.kind != "S":
            return self.kind
        return f"S{self.dim}" + (f"x{self.pieces}" if self.pieces > 1 else "")

    @property
    def sharded(self) -> bool:
        return self.kind == "S"


I = State("I")  # noqa: E741
R = State("R")
P = State("P")


def S(dim: int, pieces: int = 1) -> State:
    return State("S", dim, pieces)


def parse(text: str) -> State:
    """The state that str() wrote."""
    if text[:1] != "S":
        return {"I": I, "R": R, "P": P}[text]
    dim, _, pieces = text[1:].partition("x")
    return S(int(dim), int(pieces or 1))


# (from, to) -> (collective forward, collective backward); None moves nothing.
CONVERSIONS: dict[tuple[str, str], tuple[CollectiveOp | None, CollectiveOp | None]] = {
    ("S", "R"): ("all_gather", "reduce_scatter"),
    ("S", "I"): ("all_gather", None),
    ("P", "S"): ("reduce_scatter", "all_gather"),
    ("I", "S"): (None, "all_gather"),
    ("I", "R"): (None, "all_reduce"),
    ("P", "I"): ("all_reduce", None),
    ("P", "R"): ("all_reduce", "all_reduce"),
}


def convertible(source: State, target: State) -> bool:
    """Whether one conversion leads from one state to the other. Packed shards are not converted."""
    if source == target:
        return True
    return source.pieces == target.pieces == 1 and (source.kind, target.kind) in CONVERSIONS


def moved(source: State, target: State, ranks: int, backward: bool = True) -> float:
    """Bytes that a conversion moves per byte of the full tensor, forward and (unless it has no gradient) backward, in ring terms.

    all_gather and reduce_scatter send (t - 1) / t of the tensor, all_reduce twice that.
    """
    if source == target:
        return 0.0
    share = (ranks - 1) / ranks
    ops = CONVERSIONS[source.kind, target.kind][: 2 if backward else 1]
    return sum({"all_reduce": 2 * share, None: 0.0}.get(op, share) for op in ops)
