"""A whole model on a tensor-parallel group: every block sharded, with what stands between blocks and tied parameters agreed."""

from __future__ import annotations

import contextlib

from meshwright.costmodel.sharded import ShardedBlock
from meshwright.planner.sharding import NotShardable, shard_block
from meshwright.planner.states import I, S, State, parse
from meshwright.profiling.graph import Block, ModelGraph


def inlined_modules(graph: ModelGraph) -> frozenset[str]:
    """The modules that contain the layers: their forward is printed as the code around the layers."""
    if graph.program is None:
        return frozenset()
    parts = graph.program.layers[0].split(".")
    return frozenset(".".join(parts[:i]) for i in range(len(parts)))


def shard_model(graph: ModelGraph, tp: int, sp: bool) -> tuple[ShardedBlock, ...]:
    """Every block of the graph on `tp` ranks; with `sp` the values between blocks are sharded along the sequence.

    Raises NotShardable where heads or the sequence are not divisible, or a tied parameter would have two placements.
    """
    if tp == 1:
        return tuple(ShardedBlock.whole(b) for b in graph.blocks)
    for block in graph.blocks:
        _check_heads(block, tp)
    if sp and graph.program is None:
        raise NotShardable(f"sequence parallelism needs a plain sequence of layers; {graph.no_program}")
    carry = S(1) if sp else I
    inlined = inlined_modules(graph)
    sharded_loss = graph.objective == "cross_entropy" and graph.program is not None

    def solve(stored: dict[str, State]) -> list[ShardedBlock]:
        return [
            shard_block(
                block, tp, carry, I if block.id == graph.sequence[-1].block else carry, inlined=inlined, sharded_loss=sharded_loss,
                stored=stored,
            )
            for block in graph.blocks
        ]  # fmt: skip

    blocks = solve({})
    for group in graph.tied:
        places = _places(blocks, group)
        if len(places) < 2:
            continue
        # one tensor, one placement: the first that every block can take
        for place in (*places, I):
            with contextlib.suppress(NotShardable):
                blocks = solve(dict.fromkeys(group, place))
                break
        else:
            raise NotShardable(f"{group[0]} is tied to {group[1]} and no placement suits both")
    return tuple(blocks)


def _places(blocks: list[ShardedBlock], names: tuple[str, ...]) -> list[State]:
    """The distinct ways in which blocks outside the layers store these parameters."""
    states = [parse(b.params[n]) for b in blocks if not b.block.repeated for n in names if n in b.params]
    return list(dict.fromkeys(s if s.sharded else I for s in states))


def _check_heads(block: Block, tp: int) -> None:
    for op in block.ops:
        if op.kind != "attention" or not op.requires_grad:
            continue
        for name, heads in (("attention heads", op.dims["heads"]), ("key-value heads", op.dims["kv_heads"])):
            if heads % tp:
                raise NotShardable(f"{heads} {name} are not divisible by {tp}")
