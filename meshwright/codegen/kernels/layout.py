"""Where the rows of each tensor of a recipe lie: offsets as text, with every size and stride a literal."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.codegen.kernels.recipe import Recipe

TILE = 4096  # elements that a program works on, where rows are short
LONGEST = 65536  # of a row that one program holds whole
PROGRAMS = 256  # that share the rows where gradients are summed over all of them: a fixed number, so that results are


@dataclass(frozen=True)
class Rows:
    """The rows of a recipe, walked in the order in which they lie in memory.

    `groups`: dimensions of the outputs that count as one, outermost first; `sizes`: rows of each group but the first, whose size
    the batch decides.
    """

    recipe: Recipe
    groups: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]

    @property
    def single(self) -> bool:
        """Whether all rows lie one after another in every tensor."""
        return len(self.groups) == 1

    def strides(self, tensor: str) -> tuple[int, ...]:
        """Elements between neighbours in each group; 0 where the tensor is broadcast."""
        return tuple(_strides(self.recipe, tensor)[g[-1]] for g in self.groups)

    def index(self) -> list[str]:
        """Lines that split a row's number into those of the groups, and find where a row begins in each kind of tensor."""
        if self.single:
            return []
        lines, below = [], 1
        for i in range(len(self.groups) - 1, -1, -1):
            text = "row" if below == 1 else f"row // {below}"
            lines.append(f"i{i} = {text}" + (f" % {self.sizes[i - 1]}" if i else ""))
            below *= self.sizes[i - 1] if i else 1
        return lines[::-1] + [f"{name} = {said}" for said, name in self._named().items()]

    def offset(self, tensor: str) -> str:
        """The offset of a row's first element."""
        said = self._said(tensor)
        return said if self.single else self._named()[said]

    def _said(self, tensor: str) -> str:
        names = ["row"] if self.single else [f"i{i}" for i in range(len(self.groups))]
        return " + ".join(n if s == 1 else f"{n} * {s}" for n, s in zip(names, self.strides(tensor)) if s) or "0"

    def _named(self) -> dict[str, str]:
        tensors = [self.recipe.outputs[0].value, *(x.name for x in self.recipe.inputs if x.over == "rows"), *(o.value for o in self.recipe.outputs)]
        found: dict[str, str] = {}
        for t in tensors:
            found.setdefault(self._said(t), f"at_{t}" if found else "at")
        return found


def rows_of(recipe: Recipe) -> Rows:
    """Merges the dimensions of the rows that lie alike in every tensor."""
    outer = recipe.shape[:-1]
    main = recipe.outputs[0].strides
    order = [0, *sorted((d for d in range(1, len(outer)) if outer[d] > 1), key=lambda d: (-main[d], d))]
    tensors = [_strides(recipe, x.name) for x in recipe.inputs if x.over == "rows"] + [_strides(recipe, o.value) for o in recipe.outputs]
    groups = [[order[0]]]
    for d in order[1:]:
        last = groups[-1][-1]
        if all(t[last] == t[d] * outer[d] for t in tensors):
            groups[-1].append(d)
        else:
            groups.append([d])
    sizes = []
    for g in groups[1:]:
        n = 1
        for d in g:
            n *= outer[d]
        sizes.append(n)
    return Rows(recipe, tuple(tuple(g) for g in groups), tuple(sizes))


def _strides(recipe: Recipe, tensor: str) -> tuple[int, ...]:
    """Row strides of a tensor by dimension of the outputs."""
    name = tensor.removeprefix("grad_")
    for o in recipe.outputs:
        if o.value == name:
            return o.strides[:-1]
    x = next(x for x in recipe.inputs if x.name == name)
    missing = len(recipe.shape) - len(x.shape)
    own = [0 if size == 1 and whole > 1 else s for size, s, whole in zip(x.shape, x.strides, recipe.shape[missing:])][:-1]
    if not x.batched and missing == 0:
        own[0] = 0
    return (*(0,) * missing, *own)


@dataclass(frozen=True)
class Tile:
    """What one program works on: `rows` x `columns` (a power of two) of a part of `width` columns. `whole`: a row is not tiled."""

    rows: int
    columns: int
    width: int
    whole: bool

    @property
    def ragged(self) -> bool:
        """Whether columns must be masked."""
        return self.columns != self.width and (self.whole or self.width % self.columns != 0)

    @property
    def warps(self) -> int:
        size = self.rows * self.columns
        return 4 if size <= 2048 else 8 if size <= 8192 else 16


def tile(recipe: Recipe, whole: bool) -> Tile:
    """The tile of a kernel that needs whole rows, or not. ValueError for rows that are too long for one program."""
    width = recipe.width // recipe.parts
    power = 1 << (width - 1).bit_length()
    if whole and power > LONGEST:
        raise ValueError(f"rows of {width} elements are longer than the {LONGEST} that one program holds")
    columns = power if whole else min(power, 1024)
    return Tile(max(1, min(64, TILE // columns)), columns, width, whole or power == columns)
