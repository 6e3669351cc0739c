"""The text of Triton kernels: loads and expressions in order, then stores; what is used once and is short stands inside the next."""

from __future__ import annotations

from meshwright.codegen.kernels.layout import PROGRAMS, Rows, Tile, tile
from meshwright.codegen.kernels.lowering import Lowered
from meshwright.codegen.kernels.recipe import BINARY

INLINE = 48  # an expression that is used once and is no longer than this stays inside the next one
_CALLS = {"rsqrt": "tl.rsqrt", "sqrt": "tl.sqrt", "exp": "tl.exp", "log": "tl.log", "sigmoid": "tl.sigmoid", "erf": "tl.erf", "tanh": "_tanh"}


class Names:
    """Names of the tensors that the ops take and return."""

    def __init__(self, low: Lowered) -> None:
        r = low.recipe
        self.inputs = [x.name for x in r.inputs]
        self.outputs = [o.value for o in r.outputs]
        self.stored = [f"kept_{i}" for i in range(len(low.stored))]
        self.grads = [f"grad_{o}" for o in self.outputs]
        self.kept = [*low.kept_inputs, *low.kept_outputs, *self.stored]
        self.wanted = list(low.gradients)
        self.columns = [x.name for x in r.inputs if x.over == "columns" and x.name in low.gradients]
        self.shared = [x.name for x in r.inputs if x.over == "columns" or not x.batched]
        self.name = r.name


def kernel(low: Lowered, rows: Rows, backward: bool) -> str:
    """Forward or backward of a recipe."""
    return "\n".join(_Kernel(low, rows, backward).lines())


def tiles(low: Lowered, backward: bool) -> tuple[Tile, bool]:
    """The tile of a kernel, and whether its programs walk over many tiles of rows (to sum over them)."""
    ends = [n for ns in (low.gradients if backward else low.outputs).values() for n in ns]
    computed = low.algebra.reaches(ends, low.saved if backward else ())
    summed = backward and any(x.over == "columns" and x.name in low.gradients for x in low.recipe.inputs)
    return tile(low.recipe, summed or any(low.algebra.nodes[n].op == "sum" for n in computed)), summed


class _Kernel:
    """The text of one kernel: loads and expressions in order, then stores."""

    def __init__(self, low: Lowered, rows: Rows, backward: bool) -> None:
        self.low, self.rows, self.backward = low, rows, backward
        self.tile, self.looped = tiles(low, backward)
        self.recipe, self.nodes = low.recipe, low.algebra.nodes
        self.names: dict[int, str] = {}
        self.body: list[str] = []
        self.counts: dict[str, int] = {}
        self.given = set(low.saved) if backward else set[int]()
        ends = [n for ns in (low.gradients if backward else low.outputs).values() for n in ns]
        ends += [] if backward else low.stored
        self.order = low.algebra.reaches(ends, self.given)
        self.uses = dict.fromkeys(self.order, 0)
        for n in self.order:
            for a in () if n in self.given else self.nodes[n].args:
                if isinstance(a, int):
                    self.uses[a] += 1
        for n in ends:
            self.uses[n] += 1
        self.mask = "inside"

    def lines(self) -> list[str]:
        t, names = self.tile, Names(self.low)
        backward = [*names.grads, *names.kept, *(f"{n}_grad" for n in names.wanted)]
        takes = backward if self.backward else [*names.inputs, *names.outputs, *names.stored]
        for n in self.order:
            self._define(n)
        stores = self._stores()
        within = f" * {t.rows} + tl.arange(0, {t.rows})[:, None]"
        column = f"tl.arange(0, {t.columns})[None, :]"
        head = [f"column = {column}" if t.whole else f"column = tl.program_id(1) * {t.columns} + {column}"]
        each = [f"inside = (row < rows) & (column < {t.width})" if t.ragged else "inside = row < rows", *self.rows.index(), *self.body]
        if not self.looped:
            head = [f"row = (tl.program_id(0){within}).to(tl.int64)", *head, *each, *stores]
        else:
            fixed = [line for line in self.body if line.endswith("# of all rows")]
            each = [line for line in each if line not in fixed]
            sums = [f"{n}_sum{p} = tl.zeros(({t.columns},), tl.float32)" for n in names.columns for p in self._parts()]
            head += [*(line.removesuffix("  # of all rows") for line in fixed), *sums]
            head += [f"for tile in range(tl.program_id(0), tl.cdiv(rows, {t.rows}), {PROGRAMS}):"]
            head += [f"    {line}" for line in [f"row = (tile{within}).to(tl.int64)", *each, *stores]]
            for name in names.columns:
                for p in self._parts():
                    at = f"{name}_grad_ptr + tl.program_id(0) * {self.recipe.width} + {self._plus(p)}tl.arange(0, {t.columns})"
                    mask = f", mask=tl.arange(0, {t.columns}) < {t.width}" if t.ragged else ""
                    head.append(f"tl.store({at}, {name}_sum{p}{mask})")
        kind = "backward" if self.backward else "forward"
        body = [f"    {line}".removesuffix("  # of all rows") for line in head]
        return ["@triton.jit", f"def _{kind}_kernel({', '.join(f'{n}_ptr' for n in takes)}, rows):", *body]

    def _parts(self) -> list[str]:
        return [""] if self.recipe.parts == 1 else ["_low", "_high"]

    def _plus(self, part: str) -> str:
        return f"{self.tile.width} + " if part == "_high" else ""

    def _define(self, n: int) -> None:
        node = self.nodes[n]
        if n in self.given or node.op == "load":
            text, hint = self._load(n)
        else:
            text, hint = self._expression(n), node.op
        inline = node.op != "load" and n not in self.given and self.uses[n] == 1 and len(text) <= INLINE
        if inline:
            self.names[n] = text
            return
        self.counts[hint] = self.counts.get(hint, 0) + 1
        name = hint if node.op == "load" or n in self.given else f"{hint}_{self.counts[hint]}"
        self.names[n] = name
        fixed = "  # of all rows" if node.kind == "column" else ""
        self.body.append(f"{name} = {_bare(text)}{fixed}")

    def _load(self, n: int) -> tuple[str, str]:
        """Text of a load, and the name of what it gives."""
        node = self.nodes[n]
        if n in self.low.stored_from_outputs:
            tensor, part = self.low.stored_from_outputs[n]
            return self._read(tensor, part, "full"), f"{tensor}{self._parts()[part]}"
        if node.op != "load":
            i = self.low.stored.index(n)
            column = f" * {self.tile.width} + column" if node.kind == "full" else ""
            mask = "row < rows" if node.kind == "row" else self.mask
            return f"tl.load(kept_{i}_ptr + row{column}, mask={mask}, other=0.0).to(tl.float32)", f"kept_{i}"
        name = node.tensor + ("" if node.kind == "row" else self._parts()[node.part])
        return self._read(node.tensor, node.part, node.kind), name

    def _read(self, tensor: str, part: int, kind: str) -> str:
        if kind == "column":
            mask = f", mask=column < {self.tile.width}, other=0.0" if self.tile.ragged else ""
            return f"tl.load({tensor}_ptr + {self._plus(self._parts()[part])}column{mask}).to(tl.float32)"
        at, mask = self._at(tensor, part, kind)
        return f"tl.load({at}, mask={mask}, other=0.0).to(tl.float32)"

    def _at(self, tensor: str, part: int, kind: str, pointer: str = "") -> tuple[str, str]:
        """Address and mask of a tile of a tensor's rows."""
        base = f"{pointer or tensor}_ptr + {self.rows.offset(tensor)}"
        if kind == "row":
            return base, "row < rows"
        return f"{base} + {self._plus(self._parts()[part])}column", self.mask

    def _expression(self, n: int) -> str:
        op, args = self.nodes[n].op, [self.names[a] if isinstance(a, int) else a for a in self.nodes[n].args]
        if op in BINARY:
            return f"({args[0]} {BINARY[op]} {args[1]})"
        a = _bare(args[0])
        if op == "neg":
            return f"-{args[0]}"
        if op == "sum":
            inner = f"tl.where(inside, {a}, 0.0)" if self.tile.ragged else a
            return f"tl.sum({inner}, 1, keep_dims=True)"
        if op == "spread":
            return f"tl.broadcast_to({a}, ({self.tile.rows}, {self.tile.columns}))"
        if op == "relu":
            return f"tl.maximum({a}, 0.0)"
        if op == "step":
            return f"tl.where({a} > 0.0, 1.0, 0.0)"
        return f"{_CALLS[op]}({a})"

    def _stores(self) -> list[str]:
        lines = []
        if not self.backward:
            for o in self.recipe.outputs:
                for part, n in enumerate(self.low.outputs[o.value]):
                    at, mask = self._at(o.value, part, "full")
                    lines.append(f"tl.store({at}, {_bare(self.names[n])}, mask={mask})")
            for i, n in enumerate(self.low.stored):
                row = self.nodes[n].kind == "row"
                at = f"kept_{i}_ptr + row" if row else f"kept_{i}_ptr + row * {self.tile.width} + column"
                lines.append(f"tl.store({at}, {_bare(self.names[n])}, mask={'row < rows' if row else self.mask})")
            return lines
        for x in self.recipe.inputs:
            for part, n in enumerate(self.low.gradients.get(x.name, ())):
                if x.over == "columns":
                    name = f"{x.name}_sum{self._parts()[part]}"
                    lines.append(f"{name} += tl.sum(tl.where({self.mask}, {_bare(self.names[n])}, 0.0), 0)")
                else:
                    at, mask = self._at(x.name, part, "row" if x.shape[-1] == 1 else "full", f"{x.name}_grad")
                    lines.append(f"tl.store({at}, {_bare(self.names[n])}, mask={mask})")
        return lines


def _bare(text: str) -> str:
    """Without the parentheses around the whole."""
    if not text.startswith("("):
        return text
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[1:-1] if i == len(text) - 1 else text
    return text
