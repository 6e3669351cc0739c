"""Python text for parts of a plan: the program's statements, module tables, names and numbers."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from meshwright.planner.plan import ModuleSharding, StageProgram
from meshwright.profiling.graph import Statement

LINE = 118
_PLACEMENT = {"convert": "convert", "context": "slice_tokens"}
_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


def literal(x: Any) -> str:
    """A value as Python text, with double quotes."""
    if isinstance(x, str):
        return json.dumps(x)
    if isinstance(x, dict):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in x.items()) + "}"
    if isinstance(x, list):
        return "[" + ", ".join(literal(v) for v in x) + "]"
    if isinstance(x, tuple):
        return "(" + ", ".join(literal(v) for v in x) + ("," if len(x) == 1 else "") + ")"
    return repr(x)


def call(prefix: str, args: Sequence[str], at: int) -> list[str]:
    """`prefix(args)` in as many lines as it needs, the first starting at column `at`."""
    one = f"{prefix}({', '.join(args)})"
    if at + len(one) <= LINE:
        return [one]
    inner = textwrap.wrap(", ".join(a.replace(" ", "\0") for a in args) + ",", LINE - at - 4)
    return [f"{prefix}(", *(f"    {line}".replace("\0", " ") for line in inner), ")"]


def wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, LINE))


def identifier(name: str) -> str:
    return name if name.isidentifier() else f"v_{name}"


def attribute(path: str) -> str:
    """ "model.layers.3.mlp" -> "model.layers[3].mlp" """
    out = ""
    for part in path.split("."):
        out += f"[{part}]" if part.isdigit() else ("." if out else "") + part
    return out


def layer_list(paths: Sequence[str]) -> str:
    """Text of the list of layer paths: [f"model.layers.{i}" for i in range(80)], one such list for each list of layers."""
    groups: list[tuple[str, list[int]]] = []
    for path in paths:
        prefix, _, number = path.rpartition(".")
        if not number.isdigit():
            return literal(list(paths))
        if not groups or groups[-1][0] != prefix:
            groups.append((prefix, []))
        groups[-1][1].append(int(number))
    return " + ".join(f'[f"{prefix + "." if prefix else ""}{{i}}" for i in {as_range(numbers)}]' for prefix, numbers in groups)


def as_range(numbers: Sequence[int]) -> str:
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"range({numbers[0]}, {numbers[-1] + 1})"
    return repr(list(numbers))


def spans(numbers: Sequence[int]) -> str:
    """ "0-2, 5" """
    out: list[list[int]] = []
    for n in numbers:
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def table(name: str, modules: Iterable[ModuleSharding], base: str = "") -> list[str]:
    """A dictionary of Local styles by module path, on top of the one named `base`."""
    rows = [f"    **{base},"] if base else []
    for m in modules:
        parts = [literal(dict(m.params))] if m.params else []
        parts += [f"{key}={literal(dict(getattr(m, key)))}" for key in ("inputs", "outputs", "sizes") if getattr(m, key)]
        lines = call(f"{literal(m.module)}: Local", parts, 5)
        rows += [f"    {line}" for line in [*lines[:-1], lines[-1] + ","]]
    return [f"{name} = {{", *rows, "}"]


class ProgramText:
    """A stage's forward as lines of Python."""

    def __init__(self, program: StageProgram, piped: bool, cp_kind: str = "ring", tail: Sequence[Statement] = ()) -> None:
        self.program, self.piped, self.cp_kind, self.tail = program, piped, cp_kind, tail
        self.hidden = identifier(tail[0].args[0]["ref"]) if tail else ""
        self.inlined: dict[str, str] = {}
        names = program.inputs
        self.first = "inputs[0]" if piped or len(names) != 1 else identifier(names[0])

    @property
    def signature(self) -> str:
        return "*inputs: Tensor" if self.first == "inputs[0]" else f"{self.first}: Tensor"

    def lines(self) -> list[str]:
        p = self.program
        names = ", ".join(identifier(n) for n in p.inputs) + ("," if len(p.inputs) == 1 else "")
        unpack = [f"{names} = inputs" if len(p.inputs) > 1 else f"({names}) = inputs"] if self.first == "inputs[0]" else []
        # alone, a stage need not make again for its layers what the code before them made
        made = set() if self.piped else {s.outputs for s in p.stem}
        side = [s for s in p.side if s.outputs not in made]
        layer = call("h = self.model.get_submodule(path)", self._arguments(p.layer_args, p.layer_kwargs), 12)
        needed = references((p.layer_args, p.layer_kwargs))
        # what the layers and the side code read is kept under its name
        stem_lines = self._part(p.stem, {"h"} | (set() if self.piped else needed | references([(s.args, s.kwargs) for s in side])))
        loop = [f"for path in {'self.layers' if self.piped else 'LAYERS'}:", *(f"    {line}" for line in layer)]
        result = self.hidden or identifier(p.output)
        head = _returned([*self._part(p.head[: len(p.head) - len(self.tail)], {result}), f"return {result}"])
        side_lines = self._part(side, needed)
        if not self.piped:
            return [*unpack, *stem_lines, *side_lines, *loop, *head]
        before = ["if self.is_first:", *(f"    {x}" for x in [*unpack, *stem_lines]), "else:", "    (h,) = inputs"]
        return [*before, *side_lines, *loop, "if not self.is_last:", "    return h", *head]

    def project_lines(self) -> list[str]:
        """The code behind what forward returns, where the loss calls it on some rows at a time."""
        output = self.program.output
        return _returned([*self._part(self.tail, {output}), f"return {identifier(output)}"])

    def _part(self, statements: Sequence[Statement], kept: set[str]) -> list[str]:
        """Statements as lines; the result of a function that is read once, and is not in `kept`, is written where it is read."""
        uses = Counter(r for s in statements for r in _all_references((s.args, s.kwargs)))
        self.inlined = {}
        lines: list[str] = []
        for s in statements:
            name = s.outputs[0]
            is_function = s.target.partition(":")[0] in ("aten", "get")
            if is_function and len(s.outputs) == 1 and uses[name] == 1 and name not in kept:
                self.inlined[name] = self._expression(s)
                continue
            target = ", ".join(identifier(o) for o in s.outputs)
            text = self._expression(s)
            lines += [f"{target} = {text}"] if len(text) + len(target) < LINE - 20 else call(f"{target} = {self._callee(s)}", self._all_args(s), 12)
        return lines

    def _arguments(self, args: Iterable[Any], kwargs: dict[str, Any]) -> list[str]:
        return [self._value(a) for a in args] + [f"{k}={self._value(v)}" for k, v in kwargs.items()]

    def _all_args(self, s: Statement) -> list[str]:
        args = self._arguments(s.args, s.kwargs)
        kind, _, what = s.target.partition(":")
        if kind == "convert":
            return [args[0], literal(what), 'self.mesh["tp"]']
        if kind == "context":
            return [args[0], what, 'self.mesh["cp"]', literal(self.cp_kind)]
        return args[1:] if self._is_method(s) else args

    def _is_method(self, s: Statement) -> bool:
        kind, _, what = s.target.partition(":")
        on_tensor = bool(s.args) and isinstance(s.args[0], dict) and "ref" in s.args[0]
        return kind == "aten" and on_tensor and hasattr(torch.Tensor, what.partition(".")[0])

    def _callee(self, s: Statement) -> str:
        """What a statement calls, as a person writes it where torch has a method or function of that name."""
        kind, _, what = s.target.partition(":")
        if kind == "module":
            return f"self.model.{attribute(what)}"
        if kind in _PLACEMENT:
            return _PLACEMENT[kind]
        name = what.partition(".")[0]
        if self._is_method(s):
            x = self._value(s.args[0])
            return f"({x}).{name}" if " " in x and not x.endswith((")", "]")) else f"{x}.{name}"
        return f"torch.{name}" if hasattr(torch, name) and not _reads_tensor(s) else f"torch.ops.aten.{what}"

    def _expression(self, s: Statement) -> str:
        kind, _, what = s.target.partition(":")
        args = self._arguments(s.args, s.kwargs)
        if kind == "get":
            return f"{args[0]}[{what}]"
        operator = _OPERATORS.get(what.partition(".")[0]) if kind == "aten" else None
        if operator and len(args) == 2 and not s.kwargs:
            return f"{args[0]} {operator} {args[1]}"
        return f"{self._callee(s)}({', '.join(self._all_args(s))})"

    def _value(self, x: Any) -> str:
        if isinstance(x, dict):
            key, value = next(iter(x.items()))
            if key == "ref":
                return self.inlined.get(value, identifier(value))
            if key == "attr":
                return f"self.model.{attribute(value)}"
            if key == "device":
                return f"{self.first}.device"
            if key == "dtype":
                return f"torch.{value}"
            if key == "tuple":
                inner = ", ".join(self._value(v) for v in value)
                return f"({inner},)" if len(value) == 1 else f"({inner})"
            return "{" + ", ".join(f"{literal(k)}: {self._value(v)}" for k, v in value.items()) + "}"
        if isinstance(x, list | tuple):
            return "[" + ", ".join(self._value(v) for v in x) + "]"
        return literal(x)


def references(x: Any) -> set[str]:
    """Names of the program's values in arguments."""
    return set(_all_references(x))


def _all_references(x: Any) -> list[str]:
    if isinstance(x, dict):
        return [x["ref"]] if set(x) == {"ref"} else [r for v in x.values() for r in _all_references(v)]
    if isinstance(x, list | tuple):
        return [r for v in x for r in _all_references(v)]
    return []


def _reads_tensor(s: Statement) -> bool:
    return bool(references((s.args, s.kwargs)))


def _returned(lines: list[str]) -> list[str]:
    """ "x = f(y)", "return x" as "return f(y)"."""
    name = lines[-1].removeprefix("return ")
    if len(lines) > 1 and lines[-2].startswith(f"{name} = "):
        return [*lines[:-2], "return " + lines[-2].removeprefix(f"{name} = ")]
    return lines
