"""From the sharded blocks of a layout to what runs it: module tables by layer, and the code around the layers made local."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from meshwright.costmodel.sharded import ShardedBlock
from meshwright.planner.plan import LayerSharding, Layout, ModuleSharding, StageProgram
from meshwright.planner.rules_views import RESHAPES
from meshwright.planner.shardedmodel import inlined_modules
from meshwright.planner.sharding import NotShardable
from meshwright.planner.states import parse
from meshwright.planner.token_dims import TokenDims, token_dims
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
    if layout.cp > 1:
        local = _with_context(local, token_dims(graph), layout)
    return _renamed(_with_batch(local, layout.micro_batch), p)


def _with_context(program: StageProgram, tokens: TokenDims, layout: Layout) -> StageProgram:
    """The program of a rank that has some of the tokens: what is made for all of them is cut ("context:<dim>"), sizes are of its own."""
    stem, side, head = (_cut_statements(part, tokens, layout) for part in (program.stem, program.side, program.head))
    args, kwargs = _map_refs((program.layer_args, program.layer_kwargs), _cut_names(tokens.made))
    for (reader, value), dim in tokens.read.items():
        if not reader:
            path = value.partition(":")[2]
            cut_path = Statement(target=f"context:{dim}", args=({"attr": path},), outputs=(f"{path.rpartition('.')[2]}_tokens",))
            side.append(cut_path)
            args, kwargs = _with_cut_attribute((args, kwargs), path, cut_path.outputs[0])
    return program.model_copy(
        update={"stem": tuple(stem), "side": tuple(side), "head": tuple(head), "layer_args": tuple(args), "layer_kwargs": kwargs}
    )


def _cut_names(made: Mapping[str, int]) -> Callable[[str], str]:
    return lambda name: f"{name}_tokens" if name in made else name


def _with_cut_attribute(x: Any, path: str, name: str) -> Any:
    if isinstance(x, dict):
        return {"ref": name} if x == {"attr": path} else {k: _with_cut_attribute(v, path, name) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(_with_cut_attribute(v, path, name) for v in x)
    return x


def _cut_statements(statements: Iterable[Statement], tokens: TokenDims, layout: Layout) -> list[Statement]:
    """Statements of one part of the program, on this rank's tokens."""
    rename, out = _cut_names(tokens.made), []
    for s in statements:
        args, kwargs = _map_refs((s.args, s.kwargs), rename)
        for (reader, value), dim in tokens.read.items():
            if reader not in s.outputs:
                continue
            path = value.partition(":")[2] if value.startswith(("param:", "buffer:")) else ""
            read, name = ({"attr": path}, f"{path.rpartition('.')[2]}_tokens") if path else ({"ref": value}, f"{value}_tokens")
            of_own = _with_cut_attribute((args, kwargs), path, name) if path else _map_refs((args, kwargs), _renamer(value, name))
            if of_own != (args, kwargs):
                out.append(Statement(target=f"context:{dim}", args=(read,), outputs=(name,)))
                args, kwargs = of_own
        made = s.model_copy(update={"args": tuple(args), "kwargs": kwargs})
        output = s.outputs[0]
        if output in tokens.made:
            cut = Statement(target=f"context:{tokens.made[output]}", args=({"ref": output},), outputs=(rename(output),))
            out += [made, cut]
        else:
            out.append(_with_local_size(made, tokens.values.get(output), layout.cp))
    return out


def _with_local_size(s: Statement, dim: int | None, cp: int) -> Statement:
    """A reshape whose result has tokens in dimension `dim`, to the sizes that one of `cp` ranks has."""
    name = s.target.partition(":")[2].partition(".")[0]
    if dim is None or not s.target.startswith("aten:") or name not in (*RESHAPES, "expand"):
        return s
    args = [list(a) if isinstance(a, list | tuple) else a for a in s.args]
    for a in args:
        if isinstance(a, list) and dim < len(a):
            if isinstance(a[dim], int) and a[dim] > 0:
                a[dim] //= cp
            elif isinstance(a[dim], str) and a[dim].startswith("B*") and int(a[dim][2:]) % cp == 0:
                a[dim] = f"B*{int(a[dim][2:]) // cp}"
    return s.model_copy(update={"args": tuple(args)})


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
        if s.target.startswith("context:") and "ref" in s.args[0]:
            wish = f"{names.get(s.args[0]['ref'], s.args[0]['ref'])}_tokens"
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
