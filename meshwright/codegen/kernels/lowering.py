"""From a Recipe to expressions: steps in primitive operations, the gradient of every input, and which values backward keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import networkx as nx

from meshwright.codegen.kernels.algebra import Algebra, Arg
from meshwright.codegen.kernels.recipe import BINARY, Recipe, Step
from meshwright.profiling.graph import DTYPE_BYTES

Value = tuple[Arg, ...]  # the parts of a row; one of them for a value a row, a number, or a half


@dataclass
class Lowered:
    """`outputs`: the nodes of each output. `gradients`: of each input that has one, by part. `saved`: nodes that backward is given:
    inputs (loads), values that leave anyway, and others, which forward stores for it."""

    recipe: Recipe
    algebra: Algebra
    outputs: dict[str, tuple[int, ...]]
    gradients: dict[str, tuple[int, ...]]
    saved: tuple[int, ...]
    _of_output: dict[int, tuple[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for o in self.recipe.outputs:
            self._of_output.update({n: (o.value, part) for part, n in enumerate(self.outputs[o.value])})

    @property
    def kept_inputs(self) -> list[str]:
        """Inputs that backward reads, in their order."""
        held = {self.algebra.nodes[n].tensor for n in self.saved if self.algebra.nodes[n].op == "load"}
        return [x.name for x in self.recipe.inputs if x.name in held]

    @property
    def kept_outputs(self) -> list[str]:
        """Outputs that backward reads."""
        held = {self._of_output[n][0] for n in self.stored_from_outputs}
        return [o.value for o in self.recipe.outputs if o.value in held]

    @property
    def stored_from_outputs(self) -> dict[int, tuple[str, int]]:
        """Saved nodes that are (a part of) an output: the output and the part."""
        return {n: self._of_output[n] for n in self.saved if n in self._of_output and self.algebra.nodes[n].op != "load"}

    @property
    def stored(self) -> list[int]:
        """Saved nodes that forward stores for backward alone."""
        return [n for n in self.saved if n not in self._of_output and self.algebra.nodes[n].op != "load"]

    @property
    def saved_bytes(self) -> int:
        """Bytes that stay for backward, of one sample; weights are there anyway."""
        r = self.recipe
        rows = sum(r.bytes_of(x) for x in r.inputs if x.name in self.kept_inputs and x.over == "rows" and x.gradient)
        rows += sum(r.rows * r.width * DTYPE_BYTES[o.dtype] for o in r.outputs if o.value in self.kept_outputs)
        return rows + sum(r.rows * _bytes_a_row(r, self.algebra, n) for n in self.stored)


def lower(recipe: Recipe) -> Lowered:
    """Expressions of a recipe's forward and backward. ValueError where a step is not supported, with its name."""
    algebra, values = Algebra(), dict[str, Value]()
    for x in recipe.inputs:
        if x.over == "rows" and x.gradient and (not x.batched or x.shape[:-1] != recipe.shape[:-1]):
            raise ValueError(f"{x.name} is broadcast over rows and has a gradient")
        one = x.over == "rows" and x.shape[-1] == 1
        kind = "column" if x.over == "columns" else "row" if one else "full"
        values[x.name] = tuple(algebra.load(x.name, part, kind) for part in range(1 if one else recipe.parts))  # type: ignore[arg-type]
    for s in recipe.steps:
        values[s.name] = _step(algebra, recipe, s, [values[a] if isinstance(a, str) else (repr(float(a)),) for a in s.args])
    outputs = {o.value: _spread(algebra, values[o.value], recipe.parts) for o in recipe.outputs}
    last = len(algebra.nodes)
    ends = dict[int, int]()
    for o in recipe.outputs:
        for part, n in enumerate(outputs[o.value]):
            grad = algebra.load(f"grad_{o.value}", part, "full")
            ends[n] = grad if n not in ends else algebra.node("add", ends[n], grad)
    wanted = {x.name: [n for n in values[x.name] if isinstance(n, int)] for x in recipe.inputs if x.gradient}
    found = algebra.gradients(ends, [n for ns in wanted.values() for n in ns])
    gradients = {name: tuple(found[n] for n in ns) for name, ns in wanted.items() if all(n in found for n in ns)}
    for x in recipe.inputs:
        if x.name in gradients and not (x.over == "rows" and x.shape[-1] == 1):
            gradients[x.name] = tuple(algebra.spread(n) for n in gradients[x.name])
    return Lowered(recipe, algebra, outputs, gradients, tuple(_saved(algebra, recipe, gradients, last, {n for ns in outputs.values() for n in ns})))


def _spread(algebra: Algebra, value: Value, parts: int) -> tuple[int, ...]:
    if len(value) != parts or not all(isinstance(n, int) and algebra.nodes[n].kind == "full" for n in value):
        raise ValueError("an output must have whole rows")
    return tuple(n for n in value if isinstance(n, int))


def _step(algebra: Algebra, recipe: Recipe, s: Step, args: list[Value]) -> Value:
    if s.op in BINARY:
        parts = max(len(a) for a in args)
        for a in args:
            if len(a) < parts and isinstance(a[0], int) and algebra.nodes[a[0]].kind != "row":
                raise ValueError(f"{s.name} mixes whole rows and halves")
        return tuple(algebra.add(s.op, *(a[i if len(a) == parts else 0] for a in args)) for i in range(parts))
    (x, *_) = args
    if s.op == "cast":
        return x
    if s.op in ("low", "high"):
        if len(x) != 2:
            raise ValueError(f"{s.name} takes a half of what is not a whole row")
        return (x[s.op == "high"],)
    if s.op == "cat":
        return (*x, *args[1])
    if s.op in ("sum", "mean"):
        total: Arg | None = None
        for n in x:
            assert isinstance(n, int)
            part = algebra.sum(n)
            total = part if total is None else algebra.add("add", total, part)
        assert total is not None
        return (total if s.op == "sum" else algebra.add("mul", total, 1 / recipe.width),)
    if s.op == "pow":
        exponent = float(args[1][0])
        return tuple(_power(algebra, n, exponent) for n in x)
    return tuple(_unary(algebra, s.op, n) for n in x)


def _power(algebra: Algebra, x: Arg, exponent: float) -> Arg:
    f = algebra.add
    if exponent in (0.5, -0.5):
        return f("sqrt" if exponent > 0 else "rsqrt", x)
    if exponent != int(exponent) or not 1 <= abs(exponent) <= 8:
        return f("exp", f("mul", f("log", x), exponent))
    out = x
    for _ in range(int(abs(exponent)) - 1):
        out = f("mul", out, x)
    return out if exponent > 0 else f("div", 1.0, out)


def _unary(algebra: Algebra, op: str, x: Arg) -> Arg:
    f = algebra.add
    if op == "silu":
        return f("mul", x, f("sigmoid", x))
    if op == "gelu":
        return f("mul", f("mul", x, 0.5), f("add", f("erf", f("mul", x, math.sqrt(0.5))), 1.0))
    if op == "gelu_tanh":
        inner = f("mul", f("add", x, f("mul", f("mul", f("mul", x, x), x), 0.044715)), math.sqrt(2 / math.pi))
        return f("mul", f("mul", x, 0.5), f("add", f("tanh", inner), 1.0))
    return f(op, x)


def _saved(algebra: Algebra, recipe: Recipe, gradients: dict[str, tuple[int, ...]], last: int, leaves: set[int]) -> list[int]:
    """Nodes that backward is given, of the forward nodes (those before `last`); `leaves` are the outputs.

    "inputs": what entered; the rest is computed again. "all": whatever a gradient reads. "statistics": the values of fewest bytes from
    which the rest follows (a minimum cut), and with them what a row was reduced to.
    """
    ends = [n for ns in gradients.values() for n in ns]
    needed = [n for n in algebra.reaches(ends, range(last)) if n < last]
    if recipe.save == "all":
        return needed
    if recipe.save == "inputs":
        return [n for n in algebra.reaches(needed) if algebra.nodes[n].op == "load"]
    cut = _least_cut(algebra, recipe, needed, leaves)
    again = algebra.reaches(needed, cut)
    reduced = {n for n in again if any(algebra.nodes[m].op == "sum" for m in algebra.reaches([n], cut))}
    rows = [n for n in again if algebra.nodes[n].kind == "row" and n not in cut and n in reduced]
    nearest = [n for n in rows if n in needed or any(n in algebra.nodes[m].args and m not in rows for m in again)]
    return [n for n in algebra.reaches(needed, [*cut, *nearest]) if n in cut or n in nearest or algebra.nodes[n].op == "load"]


def _least_cut(algebra: Algebra, recipe: Recipe, needed: list[int], leaves: set[int]) -> set[int]:
    if not needed:
        return set()
    g = nx.DiGraph()
    for n in algebra.reaches(needed):
        node = algebra.nodes[n]
        # at equal bytes, what is there anyway and need not be stored
        g.add_edge((n, 0), (n, 1), capacity=2 * _bytes_a_row(recipe, algebra, n) + (node.op != "load" and n not in leaves))
        if node.op == "load":
            g.add_edge("source", (n, 0))
        for a in node.args:
            if isinstance(a, int):
                g.add_edge((a, 1), (n, 0))
    for n in needed:
        g.add_edge((n, 1), "sink")
    _, (before, _) = nx.minimum_cut(g, "source", "sink")
    return {n for n in algebra.reaches(needed) if (n, 0) in before and (n, 1) not in before}


def _bytes_a_row(recipe: Recipe, algebra: Algebra, n: int) -> int:
    """Bytes that keeping a node costs for each row; shared rows and inputs without gradient are there anyway."""
    node = algebra.nodes[n]
    given = next((x for x in recipe.inputs if x.name == node.tensor), None)
    if node.kind == "column" or (given is not None and not given.gradient):
        return 0
    if node.kind == "row":
        return 4
    return recipe.width // recipe.parts * DTYPE_BYTES[given.dtype if given else recipe.dtype]
