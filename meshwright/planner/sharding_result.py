"""From the choices of the integer programme to a ShardedBlock: states, conversions, collectives, local sizes."""

from __future__ import annotations

from collections.abc import Mapping

from meshwright.costmodel.sharded import Collective, Conversion, ShardedBlock, routed_ops
from meshwright.planner.rules import FILLS, Strategy, op_name
from meshwright.planner.rules_labels import CONVOLUTIONS
from meshwright.planner.sharding_sites import Site, outputs_of
from meshwright.planner.states import CONVERSIONS, R, State
from meshwright.profiling.graph import Amount, Block
from meshwright.profiling.literals import UNSETTABLE

Placed = tuple[str, State, State, Site]  # a value, converted from one state to another, at a site


class NotShardable(Exception):
    """Why a block cannot be computed with this tensor-parallel degree: a phrase for the user."""


def has_gradient(block: Block, v: str) -> bool:
    if v.startswith("in:"):
        return block.inputs[int(v[3:])].requires_grad
    if v.startswith("param:"):
        return block.param(v[6:]).trainable
    if v.startswith("buffer:"):
        return False
    return block.by_name[v.partition(":")[0]].requires_grad


def sharded_block(
    block: Block, ranks: int, carries: tuple[State, State], enters: Mapping[str, State], choice: Mapping[str, Strategy], placed: list[Placed],
    unknown: tuple[str, ...] = (),
) -> ShardedBlock:  # fmt: skip
    """The block as one rank runs it. `carries`: in which state the carry comes and leaves; `enters`: the state of every input; `unknown`: ops
    without a rule."""
    routed = routed_ops(block)
    params: dict[str, str] = {}
    states = dict(enters)
    for op in block.ops:
        for v, s in zip(op.inputs, choice[op.name].ins, strict=True):
            if v.startswith("param:"):
                params[v[6:]] = str(s)
        for v, s in zip(outputs_of(op), choice[op.name].outs, strict=True):
            states[v] = s
    conversions, collectives, gathered = [], [], set()
    for v, s, to, site in placed:
        conversions.append(Conversion(value=v, source=str(s), target=str(to), module=site.module, argument=site.argument, entry=site.entry))
        size = block.spec_of(v).amount
        for collective, phase in zip(CONVERSIONS[s.kind, to.kind], ("forward", "backward"), strict=True):
            if collective and (phase == "forward" or has_gradient(block, v)):
                collectives.append(Collective(op=collective, amount=size, phase=phase, value=v))  # type: ignore[arg-type]
        if s.sharded and not to.sharded:
            gathered.add(v)
    reduced: set[str] = set()
    for op in block.ops:
        if op.kind == "cross_entropy" and choice[op.name].divided:  # maximum, sum and target of each row
            rows = Amount(per_sample=4.0 * op.dims.get("rows", 0))
            collectives += [Collective(op="all_reduce", amount=rows, phase="forward", value=op.name)] * 3
        for v, s in zip(op.inputs, choice[op.name].ins, strict=True):  # gradients of replicated weights used on shards
            if v.startswith("param:") and s == R and op.name not in routed and v not in reduced:
                reduced.add(v)
                collectives.append(Collective(op="all_reduce", amount=block.spec_of(v).amount, phase="backward", value=v))
    return ShardedBlock(
        block=block, ranks=ranks, carry=str(carries[0]), carry_out=str(carries[1]), params=params,
        states={v: str(s) for v, s in states.items()}, divided=frozenset(n for n, way in choice.items() if way.divided),
        operands={n: tuple(str(s) for s in way.ins) for n, way in choice.items()},
        conversions=tuple(conversions), collectives=tuple(collectives), gathered=frozenset(gathered),
        sizes=_local_sizes(block, choice, ranks), routed=routed, kv_replicated=_takes_all_keys(block, choice),
        unknown=unknown,
    )  # fmt: skip


def _takes_all_keys(block: Block, choice: Mapping[str, Strategy]) -> bool:
    """Whether an attention has its queries sharded by heads and its keys whole."""
    for op in block.ops:
        if op.kind == "attention":
            states = dict(zip(op.roles, choice[op.name].ins, strict=True))
            if states["query"].sharded and not states["key"].sharded:
                return True
    return False


def _local_sizes(block: Block, choice: Mapping[str, Strategy], ranks: int) -> dict[str, int]:
    """Attributes that hold a size of a dimension that is now sharded, with their local value."""
    local: dict[str, int] = {}
    whole: dict[str, int] = {}
    for op in block.ops:
        out, name = choice[op.name].outs[0], op_name(op)
        for key, attribute in (("num_groups", "num_groups"), ("groups", "groups")):
            # nn.GroupNorm and grouped convolutions read how many groups there are from themselves
            if key in op.args and f"param:{op.module}.weight" in op.inputs and (name == "group_norm" or op.kind == "conv"):
                sharded = out.sharded and out.dim == CONVOLUTIONS["grouped"][1].index("c") and op.args[key] > 1
                (local if sharded else whole)[f"{op.module}.{attribute}"] = op.args[key] // ranks if sharded else op.args[key]
        for where, attribute in op.literals.items():
            if attribute.startswith(UNSETTABLE):
                continue
            key, _, index = where.partition("[")
            position = int(index.rstrip("]")) if index else None
            size = op.args[key][position] if position is not None else op.args[key]
            if position is not None and name in ("view", "reshape", "expand", "unflatten", "_unsafe_view", *FILLS):
                sharded = out.sharded and out.dim == position
            else:
                at = int(op.args.get("dim", 0)) % len(op.outputs[0].shape)
                sharded = name in ("split", "split_with_sizes") and out.sharded and out.dim == at
            if not isinstance(size, int):
                continue  # of the batch: the run's own
            (local if sharded else whole)[attribute] = size // ranks if sharded else size
    clash = sorted(set(local) & set(whole))
    if clash:
        raise NotShardable(f"{block.name}.{clash[0]} is written in the code as a size that is sharded in one place and whole in another")
    return local
