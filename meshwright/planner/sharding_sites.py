"""Where in a block a value may be converted: on leaving the module that returns it, on entering the module that takes it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from meshwright.profiling.graph import Block, Op

CODE_PATH = ""  # the module path of the code around the layers


@dataclass(frozen=True)
class Site:
    """A place where a conversion can be put: the input or output of a submodule, or the code around the layers."""

    module: str  # relative to the block; "" in the surrounding code
    argument: str  # the argument's or result's path in the call
    entry: bool


class Sites:
    """The sites of a block. `inlined` are modules whose forward is printed as code around the layers."""

    def __init__(self, block: Block, inlined: frozenset[str]) -> None:
        self.code = inlined
        self.module = {op.name: CODE_PATH if op.module in inlined else op.module for op in block.ops}
        self.made_by: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self.taken_by: dict[str, dict[str, str]] = defaultdict(dict)
        for call in block.calls:
            if call.module in inlined:
                continue
            for path, v in call.outputs.items():
                if path and not path.isdigit():
                    continue  # inside a structure other than a tuple, where nothing converts it
                self.made_by[_canonical(v)].append((call.module, path))
            returned = set(call.outputs.values())
            for path, v in call.inputs.items():
                if v in returned or "." in path:
                    continue  # it hands its argument on, and a conversion would leak to whoever takes it next; or it is inside a structure
                self.taken_by[_canonical(v)].setdefault(call.module, path)

    def home(self, v: str) -> str:
        return CODE_PATH if v.startswith("in:") else self.module[v.partition(":")[0]]

    def exit(self, v: str) -> Site | None:
        """The innermost submodule that returns the value, or the surrounding code that makes it."""
        calls = [(m, path) for m, path in self.made_by.get(_canonical(v), []) if _contains(m, self.home(v)) and not v.startswith("in:")]
        if calls:
            module, path = max(calls, key=lambda c: len(c[0]))
            return Site(module, path, entry=False)
        if self.code and self.home(v) == CODE_PATH and not v.startswith("in:"):
            return Site("", v, entry=False)
        return None

    def inside(self, v: str, op: Op) -> bool:
        """Whether a consumer is in the very module that the value would be converted on leaving."""
        site = self.exit(v)
        return site is not None and site.module != "" and _contains(site.module, self.module[op.name])

    def entries(self, v: str, op: Op) -> tuple[Site, ...]:
        """The submodules that take the value on its way to a consumer, outermost first, or the surrounding code."""
        home, taken = self.home(v), self.taken_by.get(_canonical(v), {})
        module = self.module[op.name]
        path = tuple(Site(m, taken[m], entry=True) for m in _ancestors(module) if m in taken and not _contains(m, home))
        if not path and self.code and module == CODE_PATH:
            return (Site("", op.name, entry=True),)
        return path


def _canonical(v: str) -> str:
    return v.removesuffix(":0") if not v.startswith("in:") else v


def _contains(module: str, path: str) -> bool:
    return path == module or path.startswith(module + ".")


def _ancestors(path: str) -> Iterator[str]:
    """ "a", "a.b", "a.b.c" for "a.b.c"."""
    parts = path.split(".") if path else []
    for i in range(1, len(parts) + 1):
        yield ".".join(parts[:i])


def outputs_of(op: Op) -> list[str]:
    """Names of the values that an op makes."""
    return [op.name if len(op.outputs) == 1 else f"{op.name}:{i}" for i in range(len(op.outputs))]
