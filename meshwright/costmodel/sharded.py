"""A block as one rank of a tensor-parallel group computes it: which work is divided, what is communicated."""

from __future__ import annotations

from typing import Literal

from meshwright.profiling.graph import Amount, Block, Frozen


class Collective(Frozen):
    """One collective over the tensor-parallel group. `amount` is the full tensor, before sharding or after gathering."""

    op: Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
    amount: Amount
    phase: Literal["forward", "backward"]
    value: str


class Conversion(Frozen):
    """Where a value changes its placement: on entering or leaving a submodule (relative to the block, "" in the code around
    the layers), at this argument or result. States as in planner/states.py."""

    value: str
    source: str
    target: str
    module: str
    argument: str
    entry: bool


class ShardedBlock(Frozen):
    """A block on `ranks` tensor-parallel ranks.

    `params` and `states` give the placement of parameters and values ("S0", "I", "R", "P"), `divided` the ops whose work the
    ranks share, `gathered` the values that exist whole beside their shard, `sizes` the attributes of submodules to set to
    their local value, `unknown` the ops computed replicated for want of a rule. `routed` are the ops that see each token at its
    experts (`routed_ops`). `kv_replicated`: every rank has all key-value heads and uses those of its own query heads.
    """

    block: Block
    ranks: int
    carry: str = "I"
    carry_out: str = "I"
    params: dict[str, str] = {}
    states: dict[str, str] = {}
    divided: frozenset[str] = frozenset()
    operands: dict[str, tuple[str, ...]] = {}
    conversions: tuple[Conversion, ...] = ()
    collectives: tuple[Collective, ...] = ()
    gathered: frozenset[str] = frozenset()
    sizes: dict[str, int] = {}
    unknown: tuple[str, ...] = ()
    routed: frozenset[str] = frozenset()
    kv_replicated: bool = False

    @classmethod
    def whole(cls, block: Block) -> ShardedBlock:
        """The block on one rank."""
        return cls(block=block, ranks=1, routed=routed_ops(block))

    def share(self, value: str) -> float:
        """The part of a value (or "param:<name>") that one rank holds."""
        state = self.params.get(value[6:], "I") if value.startswith("param:") else self.states.get(value, "I")
        return 1 / self.ranks if state.startswith("S") else 1.0

    @property
    def numel(self) -> float:
        """Parameters that one rank holds."""
        return sum(p.numel * self.share(f"param:{p.name}") for p in self.block.params)


def routed_ops(block: Block) -> frozenset[str]:
    """Names of the ops that are dispatched to experts: those of the modules that hold grouped products, not of the router."""
    modules = {op.module for op in block.ops if op.kind == "experts"}
    return frozenset(op.name for op in block.ops if any(op.module == m or op.module.startswith(m + ".") for m in modules))
