"""What the integer programme of a block minimizes and bounds: bytes moved, work repeated, weights kept whole, memory of one rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from meshwright.planner.rules import Strategy
from meshwright.planner.sharding_result import has_gradient
from meshwright.planner.sharding_sites import Site
from meshwright.planner.states import CONVERSIONS, State, moved
from meshwright.profiling.graph import Block, Op

REPEATED_WORK = 0.01  # bytes of collective that one repeated byte of local traffic is worth
LATENCY = 0.05  # of the carry's bytes, for each collective: of plans that move the same, the one with fewer
ENTRY = 0.0002  # of the carry's bytes: of two equal places for a conversion, the module's exit; code around the layers last
CODE = 0.0008
PARTS = ("collectives", "starts", "places", "repeated", "packing")  # of the second objective
PARAMETER_BYTES = 16.0  # parameter, gradient and two moments, in fp32


class Prices:
    """Coefficients of a block's integer programme, for `batch` samples in memory and one sample elsewhere."""

    def __init__(self, block: Block, ranks: int, ways: Mapping[str, Sequence[Strategy]], batch: int) -> None:
        self.block, self.ranks, self.ways, self.batch = block, ranks, ways, batch
        carries = [f"in:{i}" for i, x in enumerate(block.inputs) if x.role == "carry"]
        self.unit = float(max(block.spec_of(v).nbytes for v in (*block.outputs, *carries)))  # what a block passes on

    def conversion(self, v: str, s: State, t: State, site: Site | None) -> Iterator[tuple[str, float]]:
        """Prices by part, in bytes, of a conversion on leaving a module, or at the `site` where a value enters one."""
        starts = CONVERSIONS[s.kind, t.kind][: 2 if has_gradient(self.block, v) else 1]
        yield "collectives", self.moved(v, s, t)
        yield "starts", LATENCY * self.unit * sum(op is not None for op in starts)
        if site is not None:
            yield "places", self.unit * (ENTRY * (1 + 0.05 * site.module.count(".")) if site.module else CODE)

    def moved(self, v: str, s: State, t: State) -> float:
        """Bytes that a conversion moves, forward and backward."""
        return self.block.spec_of(v).nbytes * moved(s, t, self.ranks, has_gradient(self.block, v))

    def work(self, name: str, k: int) -> tuple[str, float]:
        """The price of computing an op in a way, and of which part it is."""
        op, way = self.block.by_name[name], self.ways[name][k]
        if way.divided or op.kind in ("view", "constant"):
            return "packing", 0.1 * LATENCY * self.unit * sum(s.pieces - 1 for s in (*way.ins, *way.outs))
        return "repeated", REPEATED_WORK * (op.forward.bytes.at(1) + op.backward.bytes.at(1)) * (1 - 1 / self.ranks)

    def replicated(self, name: str, k: int) -> float:
        """Bytes of matrices that this way of an op leaves replicated."""
        op = self.block.by_name[name]
        return float(sum(
            self.block.spec_of(v).nbytes
            for v, s in zip(op.inputs, self.ways[name][k].ins, strict=True)
            if v.startswith("param:") and not s.sharded and len(self.block.spec_of(v).shape) > 1
        ))  # fmt: skip

    @property
    def scale(self) -> float:
        """Bytes of the block's parameters, to divide objectives by."""
        return sum(self.block.spec_of(f"param:{p.name}").nbytes for p in self.block.params) + self.unit

    # -- memory

    def held(self, name: str, k: int) -> float:
        """Bytes of one rank that this way of an op needs: the parameters that it is the first to read, and what it saves."""
        op, way = self.block.by_name[name], self.ways[name][k]
        total = 0.0
        for i, (v, s) in enumerate(zip(op.inputs, way.ins, strict=True)):
            if v.startswith("param:") and self.uses[v][0] == (op, i):
                total += PARAMETER_BYTES * self.block.param(v[6:]).numel / (self.ranks if s.sharded else 1)
        local = way.outs[0].sharded or (op.kind == "cross_entropy" and way.divided)
        return total + op.saved.at(self.batch) / (self.ranks if local else 1)

    def copied(self, v: str, s: State, t: State) -> float:
        """What a gather of a value that is saved adds: its consumers keep all of it."""
        op = self.block.by_name.get(v.partition(":")[0])
        return op.saved.at(self.batch) * (1 - 1 / self.ranks) if op is not None and s.sharded and not t.sharded else 0.0

    @property
    def unread(self) -> float:
        return PARAMETER_BYTES * sum(p.numel for p in self.block.params if f"param:{p.name}" not in self.uses)

    @cached_property
    def uses(self) -> dict[str, list[tuple[Op, int]]]:
        """Every parameter's readers: op and position among its operands."""
        uses: dict[str, list[tuple[Op, int]]] = defaultdict(list)
        for op in self.block.ops:
            for i, v in enumerate(op.inputs):
                if v.startswith("param:"):
                    uses[v].append((op, i))
        return dict(uses)
