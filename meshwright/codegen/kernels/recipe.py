"""Recipe: what one generated kernel computes, as data: inputs with their layout, steps by name, outputs, and what backward keeps.

A kernel works on rows of `width` elements. All dimensions before the last are its rows; the first of them is the batch, whose size is
free. Steps are elementwise or reduce a row; `low` and `high` are the halves of a row and `cat` joins two.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Literal

from meshwright.profiling.graph import DTYPE_BYTES, Frozen

Save = Literal["inputs", "statistics", "all"]
SAVES: tuple[Save, ...] = ("inputs", "statistics", "all")
BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
UNARY = ("neg", "rsqrt", "sqrt", "exp", "log", "sigmoid", "silu", "gelu", "gelu_tanh", "tanh", "erf", "relu")
REDUCTIONS = ("sum", "mean")
HALVES = ("low", "high", "cat")


class Input(Frozen):
    """A tensor that enters. `over`: "rows" has rows of the kernel's width (or 1: a value a row), "columns" is one row for all (a weight).

    `shape` and `strides` are those of one sample on one rank, last dimension included; dimensions of size 1 are broadcast. What is not
    `batched` is the same for every sample (rotary tables).
    """

    name: str
    over: Literal["rows", "columns"]
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    gradient: bool = True
    batched: bool = True


class Step(Frozen):
    """name = op(args): an argument is the name of an input or an earlier step, or a number."""

    name: str
    op: str
    args: tuple[str | float, ...]


class Output(Frozen):
    """A value that leaves, in the dtype and with the strides that eager code gives it (of one sample)."""

    value: str
    dtype: str
    strides: tuple[int, ...]


class Recipe(Frozen):
    """See the module. `save`: what backward keeps (generate.py); `shape` is that of the outputs, one sample, batch first."""

    label: str
    shape: tuple[int, ...]
    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]
    save: Save = "inputs"

    @property
    def width(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows of one sample."""
        n = 1
        for size in self.shape[:-1]:
            n *= size
        return n

    @cached_property
    def name(self) -> str:
        """The label, the width, and eight digits that change with anything in the recipe."""
        digest = hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.label}_{self.width}_{digest}"

    @property
    def parts(self) -> int:
        """Tiles that a row is worked on in: two halves where steps take halves."""
        return 2 if any(s.op in HALVES for s in self.steps) else 1

    @property
    def dtype(self) -> str:
        """Of the first output; values kept for backward are stored in it."""
        return self.outputs[0].dtype

    def bytes_of(self, x: Input) -> int:
        """Bytes of an input of one sample."""
        n = DTYPE_BYTES[x.dtype]
        for size in x.shape:
            n *= size
        return n

    def formula(self) -> list[str]:
        """One line for each output, "y = w * (x * rsqrt(mean(x^2) + 1e-05))"; values used twice have a line of their own."""
        uses: dict[str, int] = {}
        for s in self.steps:
            for a in s.args:
                if isinstance(a, str):
                    uses[a] = uses.get(a, 0) + 1
        named = {o.value for o in self.outputs}
        text: dict[str, str] = {x.name: x.name for x in self.inputs}
        lines = []
        for s in self.steps:
            said = _said(s, [text[a] if isinstance(a, str) else f"{a:.12g}" for a in s.args])
            if s.name in named or (uses.get(s.name, 0) > 1 and said != text.get(str(s.args[0]))):
                lines.append(f"{s.name} = {said[1:-1] if said.startswith('(') and _closes(said) else said}")
                said = s.name
            text[s.name] = said
        return lines


def _said(s: Step, args: list[str]) -> str:
    if s.op in BINARY:
        return f"({args[0]} {BINARY[s.op]} {args[1]})"
    if s.op == "cast":
        return args[0]
    if s.op == "pow":
        return f"{args[0]}^{args[1]}"
    return f"{s.op}({', '.join(a[1:-1] if a.startswith('(') and _closes(a) else a for a in args)})"


def _closes(text: str) -> bool:
    """Whether the first parenthesis closes with the last."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return i == len(text) - 1
    return False
