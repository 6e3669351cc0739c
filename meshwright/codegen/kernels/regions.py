"""Regions of a sharded block that become one kernel each, at the shard's shapes, and the module whose forward takes the kernel in.

A region lies between matrix products, attention, collectives and indexing. What is looked for is what can be put into a live model:
- "module": all of a module's own arithmetic (a norm; the gate of an MLP), around the submodules that it calls;
- "add_norm": a residual addition with the norm that reads it, in the module that holds the norm;
- "rotary": rotary embedding of queries and keys, with the norms of both where nothing stands between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from meshwright.codegen.kernels.building import NotFusable, Use, make_use
from meshwright.codegen.kernels.steps import moves_rows, steps_of
from meshwright.costmodel.sharded import ShardedBlock
from meshwright.profiling.graph import Block, Frozen, ModuleCall, Op

Place = Literal["module", "add_norm", "rotary"]


class Region(Frozen):
    """Where kernels go in: `module` is relative to the block. `takes` and `returns` are values of the block, `argument` the name that the
    module's argument is given by. `calls`: submodules that the new forward calls (path relative to the module, value in, value out)."""

    place: Place
    module: str
    uses: tuple[Use, ...]
    takes: tuple[str, ...] = ()
    returns: str = ""
    argument: str = "x"
    calls: tuple[tuple[str, str, str], ...] = ()


def find(sharded: ShardedBlock) -> list[Region]:
    """The regions of a block, in the order of its ops; an op is in one of them at most."""
    block = sharded.block
    found = _rotary(sharded) + _add_norm(sharded)
    taken = {n for r in found for u in r.uses for n in u.ops}
    for module in sorted(dict.fromkeys(op.module for op in block.ops), key=lambda m: m.count(".")):
        mine = [op for op in block.ops if op.module == module]
        if module and not module.startswith("@") and not any(op.name in taken for op in mine):
            made = _module(sharded, module)
            if made is not None and not any(n in taken for u in made.uses for n in u.ops):
                found.append(made)
                taken |= {n for u in made.uses for n in u.ops}
    order = {op.name: i for i, op in enumerate(block.ops)}
    return sorted(found, key=lambda r: order[r.uses[0].ops[0]])


# --- modules ---------------------------------------------------------------------------------------------------------


def _inside(module: str, op: Op) -> bool:
    return op.module == module or op.module.startswith(module + ".")


def _call(block: Block, module: str) -> ModuleCall | None:
    calls = [c for c in block.calls if c.module == module]
    return calls[0] if len(calls) == 1 else None


def _simple(call: ModuleCall | None) -> bool:
    """One tensor in, one out."""
    return call is not None and len(call.inputs) == 1 and list(call.outputs) == [""]


def _module(sharded: ShardedBlock, module: str) -> Region | None:
    """A module all of whose own ops can be generated, with the submodules that it calls."""
    block = sharded.block
    call = _call(block, module)
    if call is None or not _simple(call):
        return None
    ops = [op for op in block.ops if _inside(module, op)]
    children = list(dict.fromkeys(op.module.removeprefix(module + ".").partition(".")[0] for op in ops if op.module != module))
    absorbed, called = set[str](), list[tuple[str, str, str]]()
    own = {op.name for op in ops if op.module == module}
    for child in children:
        path = f"{module}.{child}"
        parts = [op for op in ops if _inside(path, op)]
        its = _call(block, path)
        if all(steps_of(op) for op in parts) and not any(p.name.startswith(path + ".") for p in block.params) and not _converted(sharded, path):
            own |= {op.name for op in parts}
            absorbed.add(child)
        elif _simple(its):
            assert its is not None
            called.append((child, next(iter(its.inputs.values())), its.outputs[""]))
        else:
            return None
    if any(steps_of(block.by_name[n]) is None for n in own):
        return None
    try:
        uses = [make_use(sharded, group) for group in _connected(block, [op for op in ops if op.name in own])]
    except NotFusable:
        return None
    (takes,), returns = call.inputs.values(), call.outputs[""]
    if not uses or not _runs_in_order(called, uses, takes) or any(_foreign(module, u) for u in uses):
        return None
    (argument,) = call.inputs
    named = {} if argument.isdigit() else {"argument": argument}
    return Region(place="module", module=module, uses=tuple(uses), takes=(takes,), returns=returns, calls=tuple(called), **named)


def _converted(sharded: ShardedBlock, module: str) -> bool:
    return any(c.module == module for c in sharded.conversions)


def _foreign(module: str, use: Use) -> bool:
    """Whether a kernel reads a parameter that is not the module's own: its holder could not see to it (hooks, sharding)."""
    return any(a.startswith("param:") and a[6:].rpartition(".")[0] != module for a in use.arguments)


def _runs_in_order(calls: Sequence[tuple[str, str, str]], uses: Sequence[Use], takes: str) -> bool:
    """Whether calls and kernels can follow one another, each with what it needs at hand."""
    have = {takes}
    left: list[tuple[set[str], set[str]]] = [({value}, {out}) for _, value, out in calls]
    left += [({a for a in u.arguments if not a.startswith("param:")}, set(u.gives)) for u in uses]
    while left:
        ready = [x for x in left if x[0] <= have]
        if not ready:
            return False
        for x in ready:
            have |= x[1]
            left.remove(x)
    return True


def _connected(block: Block, ops: Sequence[Op]) -> list[list[Op]]:
    """Ops in groups that values connect, each in order."""
    group = {op.name: {op.name} for op in ops}
    for op in ops:
        for v in op.inputs:
            if v in group and group[v] is not group[op.name]:
                joined = group[v] | group[op.name]
                for n in joined:
                    group[n] = joined
    seen, out = set[str](), list[list[Op]]()
    for op in ops:
        if op.name not in seen:
            out.append([o for o in ops if o.name in group[op.name]])
            seen |= group[op.name]
    return out


# --- across modules --------------------------------------------------------------------------------------------------


def _add_norm(sharded: ShardedBlock) -> list[Region]:
    """Residual additions whose sum a norm reads, both in one module and no conversion between."""
    block, found = sharded.block, list[Region]()
    for call in block.calls:
        parent = call.module.rpartition(".")[0]
        source = next(iter(call.inputs.values())) if _simple(call) else ""
        add = block.by_name.get(source)
        ops = [op for op in block.ops if _inside(call.module, op)]
        if add is None or add.target != "aten.add.Tensor" or add.module != parent or len(add.inputs) != 2:
            continue
        if not all(steps_of(op) for op in ops) or not any(op.kind in ("reduction", "norm") for op in ops):
            continue
        if any(c.module == call.module and c.entry for c in sharded.conversions) or _changes(sharded, add):
            continue
        if {block.spec_of(v).shape for v in add.inputs} != {add.outputs[0].shape}:
            continue
        try:
            use = make_use(sharded, [add, *ops], also=(add.name,))
        except NotFusable:
            continue
        if not _foreign(call.module, use):
            found.append(Region(place="add_norm", module=call.module, uses=(use,), takes=add.inputs, returns=call.outputs[""]))
    return found


def _changes(sharded: ShardedBlock, add: Op) -> bool:
    """Whether what the addition reads is converted on its way there, in the module's own code."""
    return any(c.value in (*add.inputs, add.name) and c.module == add.module for c in sharded.conversions)


def _rotary(sharded: ShardedBlock) -> list[Region]:
    """Rotary embeddings of the queries and keys of one attention, and the norms before them."""
    block, found = sharded.block, list[Region]()
    for attention in (op for op in block.ops if op.kind == "attention"):
        ends = [block.by_name.get(v) for v in attention.inputs[:2]]
        whole = [_behind(block, op, attention.module) for op in ends if op is not None]
        if len(whole) != 2 or not all(any(op.target == "aten.cat.default" for op in ops) for ops in whole):
            continue
        for norms in (True, False):
            parts = [ops if norms else _trimmed([op for op in ops if op.module == attention.module]) for ops in whole]
            try:
                uses = tuple(make_use(sharded, ops) for ops in parts)
            except NotFusable:
                continue
            if all(_rotates(block, attention.module, u) for u in uses) and not any(_converted(sharded, m) for m in _modules(block, uses, attention)):
                found.append(Region(place="rotary", module=attention.module, uses=uses))
                break
    return found


def _rotates(block: Block, module: str, use: Use) -> bool:
    """Whether a kernel has one tensor of rows, and beside parameters the two tables that the module is given, in their order."""
    call = _call(block, module)
    given = {k.rpartition(".")[2]: v for k, v in call.inputs.items() if "." in k} if call is not None else {}
    tables = [a for a, x in zip(use.arguments, use.recipe.inputs) if x.over == "rows" and not x.batched]
    rows = [x for x in use.recipe.inputs if x.over == "rows" and x.batched]
    return len(use.gives) == 1 and len(rows) == 1 and tables == [given.get("0"), given.get("1")]


def _modules(block: Block, uses: Sequence[Use], attention: Op) -> set[str]:
    """Modules, other than the attention's own, whose ops are in the kernels."""
    return {block.by_name[n].module for u in uses for n in u.ops} - {attention.module}


def _behind(block: Block, end: Op, module: str) -> list[Op]:
    """Ops of the module, or of norms that it calls, that lead to `end` and can be generated; views between them too."""
    seen, stack = set[str](), [end.name]
    while stack:
        n = stack.pop()
        made = block.by_name.get(n)
        if made is None or n in seen or not _inside(module, made) or not (steps_of(made) or (made.kind == "view" and moves_rows(made))):
            continue
        seen.add(n)
        stack += made.inputs
    return _trimmed([op for op in block.ops if op.name in seen])


def _trimmed(ops: list[Op]) -> list[Op]:
    """Without the views at the start: the region takes what they give."""
    while True:
        names = {op.name for op in ops}
        first = [op for op in ops if op.kind == "view" and not steps_of(op) and not any(v in names for v in op.inputs)]
        if not first:
            return ops
        ops = [op for op in ops if op not in first]
