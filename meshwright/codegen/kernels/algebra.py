"""Expressions on tiles and their derivatives: equal expressions are one node, and the gradient is an expression of the same kind.

A node is a tile of whole rows ("full", [rows, columns]), one value a row ("row", [rows, 1]), or one row that all share ("column",
[1, columns]). Arguments are numbers of nodes (int) or constants (the text of a float, so that 1 the node is not 1 the number).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

Kind = Literal["full", "row", "column"]
Arg = int | str


class Node(NamedTuple):
    """One operation; a "load" has the tensor's name and the part of the row."""

    op: str
    args: tuple[Arg, ...]
    kind: Kind
    tensor: str = ""
    part: int = 0


_FOLD: dict[str, Callable[..., float]] = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg}


class Algebra:
    """Nodes in topological order, each expression once."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._known: dict[Node, int] = {}

    def load(self, tensor: str, part: int, kind: Kind) -> int:
        return self._node(Node("load", (), kind, tensor, part))

    def add(self, op: str, *args: Arg | float) -> Arg:
        """A node of an elementwise operation, simplified where an argument is 0 or 1; a constant where all arguments are."""
        given = tuple(repr(x) if isinstance(x, float) else x for x in args)
        a, b = (*given, "")[:2]
        if op == "mul" and "1.0" in given:
            return b if a == "1.0" else a
        if op in ("add", "sub") and b == "0.0":
            return a
        if all(isinstance(x, str) for x in given):
            return repr(_FOLD[op](*(float(x) for x in given)))
        kinds = {self.nodes[x].kind for x in given if isinstance(x, int)}
        return self._node(Node(op, given, "full" if "full" in kinds or len(kinds) == 2 else kinds.pop()))

    def node(self, op: str, *args: Arg | float) -> int:
        """As add, where the result is no constant."""
        made = self.add(op, *args)
        assert isinstance(made, int)
        return made

    def sum(self, x: int) -> int:
        """Over the columns of each row."""
        if self.nodes[x].kind == "column":
            raise ValueError("a row that all rows share is not reduced")
        return x if self.nodes[x].kind == "row" else self._node(Node("sum", (x,), "row"))

    def spread(self, x: int) -> int:
        """x as a tile of whole rows."""
        return x if self.nodes[x].kind == "full" else self._node(Node("spread", (x,), "full"))

    def _node(self, node: Node) -> int:
        if node not in self._known:
            self._known[node] = len(self.nodes)
            self.nodes.append(node)
        return self._known[node]

    def reaches(self, ends: Iterable[int], stops: Iterable[int] = ()) -> list[int]:
        """Nodes that must be computed for `ends`, in order; those in `stops` are given and not looked behind."""
        given, seen, stack = set(stops), set(), list(ends)
        while stack:
            n = stack.pop()
            if n not in seen:
                seen.add(n)
                if n not in given:
                    stack += [a for a in self.nodes[n].args if isinstance(a, int)]
        return sorted(seen)

    def gradients(self, ends: Mapping[int, int], wanted: Iterable[int]) -> dict[int, int]:
        """Reverse mode: `ends` are outputs and the nodes of their gradients; found are the gradients of `wanted`, where there are any.

        The gradient of a "column" node is a tile that is still to be summed over all rows.
        """
        found: dict[int, int] = dict(ends)

        def give(to: Arg, grad: Arg, of: int) -> None:
            if isinstance(to, str):
                return
            assert isinstance(grad, int)
            kind = self.nodes[to].kind
            if kind == "column" or (kind == "row" and self.nodes[of].kind == "full"):
                grad = self.spread(grad)
            if kind == "row":
                grad = self.sum(grad)
            known = found.get(to)
            found[to] = grad if known is None else self.node("add", known, grad)

        for n in range(max(ends, default=-1), -1, -1):
            if n in found and self.nodes[n].op != "load":
                for to, grad in self._derivative(n, found[n]):
                    give(to, grad, n)
        return {n: found[n] for n in wanted if n in found}

    def _derivative(self, n: int, g: int) -> list[tuple[Arg, Arg]]:
        """Gradients of the arguments of node n, whose own gradient is g."""
        op, args = self.nodes[n].op, self.nodes[n].args
        f = self.add
        a, b = (*args, "")[:2]
        if op == "add":
            return [(a, g), (b, g)]
        if op == "sub":
            return [(a, g), (b, f("neg", g))]
        if op == "mul":
            return [(a, f("mul", f("mul", g, 2.0), a))] if a == b else [(a, f("mul", g, b)), (b, f("mul", g, a))]
        if op == "div":
            return [(a, f("div", g, b)), (b, f("neg", f("div", f("mul", g, n), b)))]
        if op == "neg":
            return [(a, f("neg", g))]
        if op == "rsqrt":
            return [(a, f("mul", f("mul", g, -0.5), f("mul", f("mul", n, n), n)))]
        if op == "sqrt":
            return [(a, f("div", f("mul", g, 0.5), n))]
        if op == "exp":
            return [(a, f("mul", g, n))]
        if op == "log":
            return [(a, f("div", g, a))]
        if op == "sigmoid":
            return [(a, f("mul", g, f("mul", n, f("sub", 1.0, n))))]
        if op == "tanh":
            return [(a, f("mul", g, f("sub", 1.0, f("mul", n, n))))]
        if op == "erf":
            return [(a, f("mul", g, f("mul", 2 / math.sqrt(math.pi), f("exp", f("neg", f("mul", a, a))))))]
        if op == "relu":
            return [(a, f("mul", g, f("step", a)))]
        if op in ("sum", "spread"):
            return [(a, g)]
        if op == "step":
            return []
        raise AssertionError(op)
