"""From the sharded blocks of a layout to what runs it: module tables by layer, and the code around the layers made local."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from meshwright.costmodel.sharded import ShardedBlock
from meshwright.planner.plan import LayerSharding, Layout, ModuleSharding, StageProgram
from meshwright.planner.rules_views import RESHAPES
from meshwright.planner.shardedmodel import inlined_modules
from meshwright.planner.sharding import NotShardable
from meshwright.planner.states import parse
from meshwright.profiling.graph import ModelGraph, Program, Statement


def module_tables(graph: ModelGraph, sharded: tuple[ShardedBlock, ...]) -> tuple[tuple[LayerSharding, ...], tuple[ModuleSharding, ...]]:
    """Tables of equal layers, and of the modules outside layers by full path."""
    inlined = inlined_modules(graph)
    layers: dict[int, list[int]] = {}
    for i, o in enumerate(graph.layers):
        layers.setdefault(o.block, []).append(i)
    inside = tuple(LayerSharding(layers=tuple(at), modules=tuple(_modules(sharded[b], frozenset()))) for b, at in layers.items())
    outside: list[ModuleSharding] = []
    for block in sharded:
        if not block.block.repeated:
            outside += _modules(block, inlined)
    return inside, tuple(outside)


def _modules(block: ShardedBlock, inlined: frozenset[str]) -> list[ModuleSharding]:
    """One entry for each module that reads parameters or converts, in order of execution."""
    found: dict[str, dict[str, dict[str, Any]]] = {}

    def entry(module: str) -> dict[str, dict[str, Any]]:
        return found.setdefault(module, {"params": {}, "inputs": {}, "outputs": {}, "sizes": {}})

    for op in block.block.ops:
        for v, state in zip(op.inputs, block.operands[op.name], strict=True):
            if not v.startswith("param:"):
                continue
            name = v.removeprefix("param:")
            prefix = op.module + "." if op.module else ""
            if (inlined and op.module in inlined) or not name.startswith(prefix):
                raise NotShardable(f"{name} is read outside the module that owns it")
            entry(op.module)["params"][name.removeprefix(prefix)] = state
    for c in block.conversions:
        if c.module == "" and inlined:
            continue  # a statement of the program
        if "." in c.argument:
            raise NotShardable(f"{c.module} takes or returns {c.argument} inside a structure, where it cannot be converted")
        entry(c.module)["inputs" if c.entry else "outputs"][c.argument] = f"{c.source}>{c.target}"
    for attribute, size in block.sizes.items():
        module, _, name = attribute.rpartition(".")
        entry(module)["sizes"][name] = size
    return [ModuleSharding(module=m, **parts) for m, parts in found.items()]


def uses_vocab_parallel_loss(sharded: tuple[ShardedBlock, ...]) -> bool:
    """Whether the loss is computed on shards of the classes."""
    return any(op.kind == "cross_entropy" and op.name in b.divided for b in sharded for op in b.block.ops)


def stage_program(graph: ModelGraph, sharded: tuple[ShardedBlock, ...], layout: Layout) -> StageProgram | None:
    """The graph's Program with the layout's microbatch, local sizes and conversions, and readable names."""
    if graph.program is None:
        return None
    p = graph.program
    first = sharded[graph.sequence[0].block]
    last = sharded[graph.sequence[-1].block]
    stem = _with_conversions(_localised(p.stem, first), first, {first.block.outputs[0]: "h"})
    side = _localised(p.side, first)
    carry = next((f"in:{i}" for i, x in enumerate(last.block.inputs) if x.role == "carry"), "")
    head = _with_conversions(_localised(p.head, last), last, {carry: "h"})
    local = StageProgram(
        inputs=p.inputs, stem=tuple(stem), side=tuple(side), layers=p.layers, layer_args=p.layer_args, layer_kwargs=p.layer_kwargs,
        head=tuple(head), output=p.output,
    )  # fmt: skip
    return _renamed(_with_batch(local, layout.micro_batch), p)


def _localised(statements: Iterable[Statement], block: ShardedBlock) -> list[Statement]:
    """Sizes of reshapes divided where the result is sharded."""
    out = []
    for s in statements:
        name = s.target.partition(":")[2].partition(".")[0]
        state = parse(block.states.get(s.outputs[0], "I")) if s.target.startswith("aten:") else None
        if state is not None and state.sharded and name in (*RESHAPES, "expand"):
            args = [list(a) if isinstance(a, list | tuple) else a for a in s.args]
            for a in args:
                if isinstance(a, list) and state.dim < len(a) and isinstance(a[state.dim], int) and a[state.dim] > 0:
                    a[state.dim] //= block.ranks
            s = s.model_copy(update={"args": tuple(args)})
        out.append(s)
    return out


def _with_conversions(statements: list[Statement], block: ShardedBlock, names: dict[str, str]) -> list[Statement]:
    """Conversions in the code around the layers, as statements after the value is made or before it is used."""
    for c in block.conversions:
        if c.module:
            continue
        name = names.get(c.value, c.value)
        made = [i for i, s in enumerate(statements) if name in s.outputs or c.value in s.outputs]
        target = f"convert:{c.source}>{c.target}"
        if not c.entry:
            if not made:
                raise NotShardable(f"{c.value} is not a value of the code around the layers")
            output = statements[made[-1]].outputs[0]
            statements.insert(made[-1] + 1, Statement(target=target, args=({"ref": output},), outputs=(output,)))
            continue
        at = next((i for i, s in enumerate(statements) if c.argument in s.outputs or (names.get(c.argument) in s.outputs)), None)
        if at is None:
            raise NotShardable(f"{c.argument} is not a value of the code around the layers")
        converted = f"{name}_{c.target.lower()}"
        user = statements[at]
        args, kwargs = _map_refs((user.args, user.kwargs), _renamer(name, converted))
        statements[at] = user.model_copy(update={"args": tuple(args), "kwargs": kwargs})
        statements.insert(at, Statement(target=target, args=({"ref": name},), outputs=(converted,)))
    return statements


def _renamer(old: str, new: str) -> Callable[[str], str]:
    return lambda name: new if name == old else name


def _map_refs(x: Any, f: Callable[[str], str]) -> Any:
    if isinstance(x, dict):
        return {"ref": f(x["ref"])} if set(x) == {"ref"} else {k: _map_refs(v, f) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(_map_refs(v, f) for v in x)
    return x


def _with_batch(program: StageProgram, micro_batch: int) -> StageProgram:
    """ "B*<n>" becomes n times the microbatch."""

    def fill(x: Any) -> Any:
        if isinstance(x, str) and x.startswith("B*"):
            return int(x[2:]) * micro_batch
        if isinstance(x, dict):
            return {k: fill(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return type(x)(fill(v) for v in x)
        return x

    def each(statements: tuple[Statement, ...]) -> tuple[Statement, ...]:
        return tuple(s.model_copy(update={"args": fill(s.args), "kwargs": fill(s.kwargs)}) for s in statements)

    return program.model_copy(
        update={
            "stem": each(program.stem), "side": each(program.side), "head": each(program.head),
            "layer_args": fill(program.layer_args), "layer_kwargs": fill(program.layer_kwargs),
        }
    )  # fmt: skip


def _renamed(program: StageProgram, original: Program) -> StageProgram:
    """Values named after the module or function that makes them."""
    names: dict[str, str] = {"h": "h"} | {i: i for i in program.inputs}
    taken = {"h", *program.inputs}

    def fresh(wish: str) -> str:
        name, n = wish, 2
        while name in taken:
            name, n = f"{wish}_{n}", n + 1
        taken.add(name)
        return name

    parts = (*program.stem, *program.side, *program.head)
    for s in parts:
        wish = s.target.partition(":")[2].partition(".")[0] if s.target.startswith("aten") else s.target.rpartition(".")[2].rpartition(":")[2]
        for i, output in enumerate(s.outputs):
            if output != "_" and output not in names:
                names[output] = fresh(f"{wish}_{i}" if len(s.outputs) > 1 else wish if wish.isidentifier() else output)

    def rename(r: str) -> str:
        return names.get(r, r)

    def each(statements: tuple[Statement, ...]) -> tuple[Statement, ...]:
        return tuple(
            s.model_copy(
                update={
                    "args": _map_refs(s.args, rename), "kwargs": _map_refs(s.kwargs, rename),
                    "outputs": tuple(rename(o) for o in s.outputs),
                }
            )
            for s in statements
        )  # fmt: skip

    return program.model_copy(
        update={
            "stem": each(program.stem), "side": each(program.side), "head": each(program.head),
            "layer_args": _map_refs(program.layer_args, rename), "layer_kwargs": _map_refs(program.layer_kwargs, rename),
            "output": rename(program.output),
        }
    )  # fmt: skip
