"""The integer programme of a block in words: what it chose, what its constraints say, what it pays for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from meshwright.planner.rules import Strategy
from meshwright.planner.shardedmodel import Loss, solve_model
from meshwright.planner.sharding import Setting, Solution, solve_block
from meshwright.planner.states import CONVERSIONS, I, State
from meshwright.profiling.graph import Block, ModelGraph

VARIABLES = {
    "x": "an op is computed in this way",
    "u": "a value leaves the module that returns it in this state",
    "w": "a value enters a module that takes it in this state",
}
ROWS = {
    "one_way": "an op is computed in one way",
    "leaves": "what a module returns leaves it in one state",
    "enters": "what a module takes enters it in one state",
    "takes": "an op's operand is in the state in which it arrives",
    "final": "what a block returns is in the state that the next one takes",
    "tied": "a parameter that is read twice is stored, and in one module used, one way",
    "memory": "parameters at 16 bytes each and saved activations fit in the bytes of one rank",
    "weights_sharded": "the bytes of whole matrices stay at their least while communication is minimized",
}
PARTS = {
    "collectives": "moved by collectives, forward and backward",
    "starts": "for starting them: 5 % of what the block passes on, each",
    "places": "for conversions that are not at a module's exit",
    "repeated": "for work that every rank does: 1 % of its memory traffic",
    "packing": "for weights that are split in several pieces",
}
STATES = {"S": "split", "I": "whole", "R": "whole, its gradient a sum over ranks", "P": "a sum over ranks"}


def describe(
    block: Block, ranks: int, carry: State = I, carry_out: State | None = None, *, inlined: frozenset[str] = frozenset(),
    sharded_loss: bool = True, stored: Mapping[str, State] | None = None, sides: Mapping[str, State] | None = None,
    memory: float | None = None, batch: int = 1,
) -> str:  # fmt: skip
    """What the integer programme of a block says and chose (arguments: sharding.shard_block); raises NotShardable as that does."""
    setting = Setting(ranks, carry, carry_out or carry, inlined, sharded_loss, stored, sides, memory, batch)
    return words(solve_block(block, setting), memory)


def describe_model(graph: ModelGraph, tp: int, sp: bool, loss: Loss = "vocab_parallel") -> str:
    """The integer programmes of every block of a model, in words, on tp > 1 ranks."""
    return "\n\n".join(words(solution) for solution in solve_model(graph, tp, sp, loss))


def words(solution: Solution, memory: float | None = None) -> str:
    """A solution in words, one fact a line. `memory`: the bound that it was solved under."""
    s, block = solution.sharded, solution.sharded.block
    lines = [f"{block.name} on {s.ranks} tensor-parallel ranks: the carry enters as {s.carry} and leaves as {s.carry_out}"]
    used = {x.partition("x")[0][:1] for x in (*s.states.values(), *s.params.values())}
    lines += ["states: " + "; ".join(f"{k}{'<dim>' if k == 'S' else ''} {text}" for k, text in STATES.items() if k in used)]
    lines += ["", f"{sum(solution.variables.values())} variables, {sum(solution.rows.values())} constraints"]
    lines += _table((f"  {count}", f"{name}: {VARIABLES[name]}") for name, count in solution.variables.items() if count)
    lines += _table((f"  {count}", f"{name}: {ROWS[name]}") for name, count in solution.rows.items())
    lines += ["", "minimized, in this order, for one sample"]
    lines += _table([
        (f"  {_bytes(solution.replicated)}", "of matrices that every rank holds whole"),
        *((f"  {_bytes(b)}", PARTS[part]) for part, b in solution.parts.items()),
    ])  # fmt: skip
    bound = f" of at most {_bytes(memory)}" if memory is not None else ""
    lines += ["", f"memory of one rank: {_bytes(solution.memory)}{bound}, parameters at 16 bytes each and what backward needs"]
    lines += ["", "chosen"]
    for_each = [(op, solution.choice[op.name]) for op in block.ops]
    lines += _table(
        (f"  {op.module or '(its own code)'}", op.name, _way(op.inputs, way), "divided" if way.divided else "by every rank") for op, way in for_each
    )
    lines += ["", "conversions" if solution.placed else "no conversions"]
    for v, source, target, site, moved in solution.placed:
        where = f"{'entering' if site.entry else 'leaving'} {site.module}" if site.module else "in the code around the layers"
        lines.append(f"  {v} {source} to {target}, {where}: {_collectives(source, target)}, {_bytes(moved)}")
    reduced = [c for c in s.collectives if c.value.startswith("param:")]
    if reduced:
        names = ", ".join(c.value.removeprefix("param:") for c in reduced)
        lines.append(f"  backward all_reduce of the gradients of {names}")
    return "\n".join(lines)


def _way(inputs: tuple[str, ...], way: Strategy) -> str:
    ins = ", ".join(f"{v.removeprefix('param:')} {s}" for v, s in zip(inputs, way.ins, strict=True))
    outs = dict.fromkeys(map(str, way.outs))
    return f"{ins} -> {', '.join(outs)}"


def _collectives(source: State, target: State) -> str:
    forward, backward = CONVERSIONS[source.kind, target.kind]
    return f"forward {forward or 'nothing'}, backward {backward or 'nothing'}"


def _bytes(n: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f} B"


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths: Counter[int] = Counter()
    for row in rows:
        for i, cell in enumerate(row[:-1]):
            widths[i] = max(widths[i], len(cell))
    return ["  ".join([*(cell.ljust(widths[i]) for i, cell in enumerate(row[:-1])), row[-1]]).rstrip() for row in rows]
