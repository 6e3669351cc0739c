"""A whole model on a tensor-parallel group: every block sharded, with what stands between blocks and tied parameters agreed."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from meshwright.costmodel.sharded import ShardedBlock
from meshwright.planner.sharding import NotShardable, Setting, Solution, solve_block
from meshwright.planner.states import I, S, State, parse
from meshwright.profiling.graph import Block, ModelGraph

Loss = Literal["vocab_parallel", "plain"]
Key = tuple[int, tuple[tuple[str, State], ...], tuple[tuple[str, State], ...], frozenset[str]]
COMBINATIONS = 256  # of the states of values that layers take besides the carry


def inlined_modules(graph: ModelGraph) -> frozenset[str]:
    """The modules that contain the layers: their forward is printed as the code around the layers."""
    if graph.program is None:
        return frozenset()
    parts = graph.program.layers[0].split(".")
    return frozenset(".".join(parts[:i]) for i in range(len(parts)))


def shard_model(graph: ModelGraph, tp: int, sp: bool, loss: Loss = "vocab_parallel") -> tuple[ShardedBlock, ...]:
    """Every block of the graph on `tp` ranks; with `sp` the values between blocks are sharded along the sequence.

    `loss`: on shards of the logits where the model's own code allows it, or "plain", on gathered logits. An op without a
    sharding rule is computed whole. Raises NotShardable where heads or the sequence are not divisible, or a tied parameter would have two
    placements.
    """
    if tp == 1:
        return tuple(ShardedBlock.whole(b) for b in graph.blocks)
    return tuple(s.sharded for s in solve_model(graph, tp, sp, loss))


def solve_model(graph: ModelGraph, tp: int, sp: bool, loss: Loss = "vocab_parallel") -> tuple[Solution, ...]:
    """As shard_model, for tp > 1, with the figures of each block's integer programme."""
    for block in graph.blocks:
        _check_heads(block, tp)
    if sp and graph.program is None:
        raise NotShardable(f"sequence parallelism needs a plain sequence of layers; {graph.no_program}")
    sharded_loss = loss == "vocab_parallel" and graph.objective == "cross_entropy" and graph.program is not None
    made = _Solved(graph, tp, S(1) if sp else I, inlined_modules(graph), sharded_loss)
    solved = made.best({})
    for group in graph.tied:
        places = _places([s.sharded for s in solved], group)
        if len(places) < 2:
            continue
        # one tensor, one placement: the first that every block can take
        for place in (*places, I):
            with contextlib.suppress(NotShardable):
                solved = made.best(dict.fromkeys(group, place))
                break
        else:
            raise NotShardable(f"{group[0]} is tied to {group[1]} and no placement suits both")
    return solved


@dataclass
class _Solved:
    """The blocks of a model, each solved once for every way in which what it shares with others may be placed."""

    graph: ModelGraph
    tp: int
    carry: State
    inlined: frozenset[str]
    sharded_loss: bool
    known: dict[Key, Solution | str] = field(default_factory=dict)

    def best(self, stored: Mapping[str, State]) -> tuple[Solution, ...]:
        """The cheapest states of the values that blocks share besides the carry, and every block solved for them."""
        graph = self.graph
        fixed = {b.outputs[0]: self._carry_out(b) for b in graph.blocks}
        choices = self._sides(stored, fixed)
        times = Counter(o.block for o in graph.sequence)
        found: tuple[Solution, ...] | None = None
        least, why = (float("inf"), float("inf")), ""
        for states in itertools.product(*choices.values()):
            sides = fixed | dict(zip(choices, states, strict=True))
            try:
                solved = tuple(self._block(b, stored, sides) for b in graph.blocks)
            except NotShardable as e:
                why = why or str(e)
                continue
            each = [(s.price, times[b.id]) for b, s in zip(graph.blocks, solved, strict=True)]
            price = (sum(p[0] * n for p, n in each), sum(p[1] * n for p, n in each))
            if price < least:
                found, least = solved, price
        if found is None:
            raise NotShardable(why)
        return found

    def _sides(self, stored: Mapping[str, State], fixed: Mapping[str, State]) -> dict[str, list[State]]:
        """Values besides the carry that one block makes and another takes: the states to try for each.

        They are those that a block would choose if the others did not matter. What is made outside the layers and has no gradient
        (rotary tables) costs nothing whole.
        """
        makers = {v: b for b in self.graph.blocks for v in b.outputs}
        found: dict[str, list[State]] = {}
        for block in self.graph.blocks:
            for x in block.inputs:
                if x.role != "carry" and x.source not in fixed and x.source in makers and (x.requires_grad or makers[x.source].repeated):
                    found[x.source] = [I]
        for block in self.graph.blocks if found else ():
            free = frozenset(v for v in found if v in block.outputs or any(x.source == v for x in block.inputs))
            with contextlib.suppress(NotShardable):
                for v, s in (self._block(block, stored, fixed, free).sides if free else {}).items():
                    found[v] += [s] if s not in found[v] else []
        total = 1
        for source, states in found.items():
            total *= len(states)
            if total > COMBINATIONS:
                found[source] = [I]
        return found

    def _carry_out(self, block: Block) -> State:
        return I if block.id == self.graph.sequence[-1].block else self.carry

    def _block(self, block: Block, stored: Mapping[str, State], sides: Mapping[str, State], free: frozenset[str] = frozenset()) -> Solution:
        own = {v: s for v, s in sides.items() if v in block.outputs[1:] or any(x.source == v and x.role != "carry" for x in block.inputs)}
        held = {n: s for n, s in stored.items() if any(p.name == n for p in block.params)}
        key = (block.id, tuple(sorted(own.items())), tuple(sorted(held.items())), free)
        if key not in self.known:
            setting = Setting(self.tp, self.carry, self._carry_out(block), self.inlined, self.sharded_loss, held, own, free=free)
            try:
                self.known[key] = solve_block(block, setting)
            except NotShardable as e:
                self.known[key] = str(e)
        known = self.known[key]
        if isinstance(known, str):
            raise NotShardable(known)
        return known


def _places(blocks: list[ShardedBlock], names: tuple[str, ...]) -> list[State]:
    """The distinct ways in which blocks outside the layers store these parameters."""
    states = [parse(b.params[n]) for b in blocks if not b.block.repeated for n in names if n in b.params]
    return list(dict.fromkeys(s if s.sharded else I for s in states))


def _check_heads(block: Block, tp: int) -> None:
    for op in block.ops:
        if op.kind != "attention" or not op.requires_grad:
            continue
        heads, kv = op.dims["heads"], op.dims["kv_heads"]
        if heads % tp:
            raise NotShardable(f"{heads} attention heads are not divisible by {tp}")
        if kv % tp and tp % kv:
            raise NotShardable(f"{kv} key-value heads are not divisible by {tp}, nor {tp} by them")
