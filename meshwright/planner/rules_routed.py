"""Experts and their router: a region of a block in which every rank computes its own tokens, or every rank computes all.

Sorting and grouping tokens by expert has no placement of one tensor at a time: an order of all tokens is not made of orders of
some. But the region as a whole acts token by token, so each rank can send its own tokens through all of it. Inside, what has a row
per token is sharded by rows (in an order of the rank's own), counts of tokens are partial sums, and parameters are used R. Experts
on different ranks are another degree of freedom, priced where expert parallelism is.
"""

from __future__ import annotations

from meshwright.costmodel.sharded import routed_ops
from meshwright.planner.states import I, P, R, S, State
from meshwright.profiling.graph import Block, Op, TensorSpec


class Region:
    """`core`: the experts, what decides which tokens they get, and what brings results into the tokens' order. `beside`: ops on the
    same flattened tokens that are not dispatched (an expert for every token)."""

    def __init__(self, block: Block, ranks: int) -> None:
        self.block, self.ranks = block, ranks
        routed = routed_ops(block)
        modules = {block.by_name[n].module for n in routed}
        top = min(modules, key=len, default="")
        parent = top.rpartition(".")[0]
        core = set(routed)
        for op in reversed(block.ops):
            if op.name in core:
                core |= {n for n in _producers(op, block) if self._decides(block.by_name[n], parent)}
        for op in block.ops:
            if op.module == parent and any(n in core for n in _producers(op, block)) and any(self._flat(v) for v in op.inputs):
                core.add(op.name)
        self.core = frozenset(core)
        beside: set[str] = set()
        for op in block.ops:
            if op.name not in core and core and any(n in core | beside and self._flat(v) for v, n in _made_by(op, block)):
                beside.add(op.name)
        self.beside = frozenset(beside)

    def _decides(self, op: Op, parent: str) -> bool:
        """Whether an op that the region reads belongs to it: it is in the module around the experts, or makes flattened tokens."""
        inside = bool(parent) and (op.module == parent or op.module.startswith(parent + "."))
        return inside or any(_rows(o) == 0 for o in op.outputs)

    def _flat(self, v: str) -> bool:
        return not v.startswith(("param:", "buffer:")) and _rows(self.block.spec_of(v)) == 0

    def by_token(self) -> dict[str, tuple[tuple[State, ...], tuple[State, ...]]] | None:
        """States of operands and results of each op where every rank computes its own tokens; None where tokens are not divisible."""
        states: dict[str, State] = {}
        found = {}
        for op in self.block.ops:
            if op.name not in self.core and op.name not in self.beside:
                continue
            ins = []
            for v in op.inputs:
                state = states.get(v) or self._entering(v)
                if state is None:
                    return None
                ins.append(state)
            outs = []
            for i, spec in enumerate(op.outputs):
                rows = _rows(spec)
                if rows is not None:
                    if spec.shape[rows] % self.ranks:
                        return None
                    state = S(rows)
                elif any(s.sharded or s == P for s in ins):
                    state = P  # a count of tokens
                else:
                    state = R if R in ins else I
                states[op.name if len(op.outputs) == 1 else f"{op.name}:{i}"] = state
                outs.append(state)
            found[op.name] = (tuple(ins), tuple(outs))
        return found

    def _entering(self, v: str) -> State | None:
        if v.startswith(("param:", "buffer:")):
            return R
        spec = self.block.spec_of(v)
        rows = _rows(spec)
        if rows is None:
            return R
        return S(rows) if spec.shape[rows] % self.ranks == 0 else None


def _rows(spec: TensorSpec) -> int | None:
    """The dimension of the tokens: the batched one where it holds the tokens of every sample, else the one after it."""
    if spec.batch_dim != 0:
        return None
    if spec.shape[0] > 1:
        return 0
    return 1 if len(spec.shape) > 1 else None


def _made_by(op: Op, block: Block) -> list[tuple[str, str]]:
    return [(v, v.partition(":")[0]) for v in op.inputs if v.partition(":")[0] in block.by_name]


def _producers(op: Op, block: Block) -> list[str]:
    return [n for _, n in _made_by(op, block)]
