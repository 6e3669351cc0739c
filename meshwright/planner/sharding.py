"""Op sharding of one block over a tensor-parallel group, as an integer programme (PuLP, HiGHS).

Over the forward graph, with states that carry their gradient's (states.py) and rules as data (rules.py):

    x[n,k]          op n is computed in strategy k                       sum_k x[n,k] = 1
    u[v,s,s']       value v, made in s, leaves its module as s'          sum_s' u[v,s,s'] = made(v, s)
    w[v,E,s,s']     and enters each module E that takes it as s'         sum_s' w[v,E,s,s'] = what E's surroundings see
    x of a consumer in k needs its operands' states: sum_{k: in=s'} x[m,k] = entered(v, E, s')

A conversion happens only where a module's forward begins or ends (a hook can put it there), or in the code around the layers,
which is ours to print. The objective is lexicographic: first the bytes of weights that stay replicated, because that is what a
tensor-parallel degree is for; then the bytes that the collectives move, forward and backward, and a small price for work that
every rank repeats. Neither depends on the cluster. A row "memory" bounds the bytes of one rank where that is asked for.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from meshwright.costmodel.sharded import ShardedBlock
from meshwright.planner.rules import Strategy, packings, strategies
from meshwright.planner.rules_routed import Region
from meshwright.planner.sharding_prices import PARTS, Prices
from meshwright.planner.sharding_result import NotShardable, has_gradient, sharded_block
from meshwright.planner.sharding_sites import Site, Sites, outputs_of
from meshwright.planner.states import I, R, S, State, convertible
from meshwright.profiling.blocks import LOSS
from meshwright.profiling.graph import Block, Op


@dataclass(frozen=True)
class Setting:
    """What shard_block is asked for. `stored`: how parameters are stored (I for replicated); `sides`: in which state values besides
    the carry pass between blocks, by the name of their source (`free`: these in whichever suits); `memory`: bytes of one rank for
    `batch` samples."""

    ranks: int
    carry: State
    carry_out: State
    inlined: frozenset[str] = frozenset()
    sharded_loss: bool = True
    stored: Mapping[str, State] | None = None
    sides: Mapping[str, State] | None = None
    memory: float | None = None
    batch: int = 1
    free: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Solution:
    """A sharded block and what it was chosen for. `parts` adds up to the second objective, in bytes; `rows` counts constraints by
    family; `memory` are the bytes of one rank; `sides` the states of the values that were free."""

    sharded: ShardedBlock
    choice: dict[str, Strategy]
    placed: list[tuple[str, State, State, Site, float]]
    replicated: float
    parts: dict[str, float]
    memory: float
    variables: Counter[str]
    rows: Counter[str]
    sides: dict[str, State]

    @property
    def price(self) -> tuple[float, float]:
        """The two objectives, in order."""
        return self.replicated, sum(self.parts.values())


def shard_block(
    block: Block, ranks: int, carry: State, carry_out: State | None = None, *, inlined: frozenset[str] = frozenset(),
    sharded_loss: bool = True, stored: Mapping[str, State] | None = None, sides: Mapping[str, State] | None = None,
    memory: float | None = None, batch: int = 1,
) -> ShardedBlock:  # fmt: skip
    """The cheapest sharding of `block` on `ranks` ranks whose carry enters as `carry` and leaves as `carry_out` (default: the same).

    `inlined` are the modules whose forward is printed as code around the layers (they contain the layers): conversions can be
    put between their statements. `sharded_loss`: the loss may be computed on shards of the classes. `stored` fixes how
    parameters are stored (I for replicated), `sides` in which states other values come from and go to other blocks (by their
    source; replicated if absent). `memory` bounds the bytes of one rank: parameters at 16 bytes each, and what is saved for the
    backward of `batch` samples. Raises NotShardable, with the reason, where the rules have no such way.
    """
    setting = Setting(ranks, carry, carry_out or carry, inlined, sharded_loss, stored, sides, memory, batch)
    return solve_block(block, setting).sharded


def solve_block(block: Block, setting: Setting) -> Solution:
    """As shard_block, with the figures of the integer programme."""
    ranks = setting.ranks
    enters = [f"in:{i}" for i, b in enumerate(block.inputs) if b.role == "carry"]
    for state, value in [*((setting.carry, v) for v in enters), (setting.carry_out, block.outputs[0])]:
        spec = block.spec_of(value)
        if state.sharded and (state.dim >= len(spec.shape) or state.dim == spec.batch_dim):
            raise NotShardable(f"values between layers have no sequence dimension {state.dim}")
        if state.sharded and spec.shape[state.dim] % ranks:
            raise NotShardable(f"a sequence of {spec.shape[state.dim]} is not divisible by {ranks}")
    return _Problem(block, setting).solve()


class _Problem:
    def __init__(self, block: Block, setting: Setting) -> None:
        import pulp

        self.block, self.setting, self.ranks = block, setting, setting.ranks
        self.inlined = setting.inlined if not block.repeated else frozenset()
        self.unknown: dict[str, None] = {}  # ops that are computed whole for want of a rule, in order
        self.ways = self._ways()
        self.consumers: dict[str, list[tuple[Op, int]]] = defaultdict(list)
        for op in block.ops:
            for i, v in enumerate(op.inputs):
                if not v.startswith(("param:", "buffer:")):
                    self.consumers[v].append((op, i))
        self.prices = Prices(block, self.ranks, self.ways, setting.batch)
        self.sites = Sites(block, self.inlined)
        self.sum = pulp.lpSum
        self.model = pulp.LpProblem("sharding", pulp.LpMinimize)
        self.families: Counter[str] = Counter()
        self.x = {(op.name, k): self._variable(f"x {op.name} {k}", binary=True) for op in block.ops for k in range(len(self.ways[op.name]))}
        self.freely: dict[tuple[str, State], Any] = {}  # of free values: how much is in which state
        self.leave: dict[tuple[str, State, State], Any] = {}
        self.enter: dict[tuple[str, Site, State, State], Any] = {}

    def _ways(self) -> dict[str, list[Strategy]]:
        block, setting, q = self.block, self.setting, packings(self.block)
        region = Region(block, self.ranks)
        by_token = region.by_token() if setting.carry.sharded else {}
        if by_token is None:
            raise NotShardable(f"the tokens of {block.name} that are routed to experts are not divisible by {self.ranks}")
        stored = setting.stored or {}
        found: dict[str, list[Strategy]] = {}
        for op in block.ops:
            whole = Strategy(tuple(I for _ in op.inputs), tuple(I for _ in op.outputs))
            routed = Strategy(*by_token[op.name], divided=True) if op.name in by_token else None
            if op.name in region.core:
                ways = [routed or whole]
            else:
                # sizes in the code around the layers are ours to print
                ways, known = strategies(op.model_copy(update={"literals": {}}) if op.module in self.inlined else op, block, self.ranks, q)
                if not known and op.module != LOSS and (op.requires_grad or any(v.startswith("param:") for v in op.inputs)):
                    self.unknown[f"{op.target.removesuffix('.default')} in {_place_of(block, op)}"] = None
                if op.module == LOSS and not setting.sharded_loss:
                    ways = ways[:1]
                ways = [*ways, routed] if routed else ways
            allowed = [
                w
                for w in ways
                if all(stored.get(v[6:], _stored(s)) == _stored(s) for v, s in zip(op.inputs, w.ins, strict=True) if v.startswith("param:"))
            ]
            if not allowed:
                raise NotShardable(f"no way to compute {op.name} in {_place_of(block, op)} with its parameters stored so")
            found[op.name] = list(dict.fromkeys(_without_gradient_states(op, block, s) for s in allowed))
        return found

    # -- the model

    def _variable(self, name: str, binary: bool = False) -> Any:
        import pulp

        return pulp.LpVariable(name.replace(":", ".").replace(" ", "_"), 0, 1, cat="Binary" if binary else "Continuous")

    def _row(self, row: Any, family: str, *names: object) -> None:
        """Adds a named constraint."""
        self.families[family] += 1
        name = "_".join([family, *(str(n).replace(":", ".").replace(" ", "_") for n in names)])
        self.model += row, name if name not in self.model.constraints else f"{name}_{self.families[family]}"

    def solve(self) -> Solution:
        import pulp

        for op in self.block.ops:
            self._row(self.sum(self.x[op.name, k] for k in range(len(self.ways[op.name]))) == 1, "one_way", op.name)
        for v in self._values():
            self._flow(v)
        for uses in self.prices.uses.values():
            self._tie(uses)
        converted: list[tuple[str, State, State, Site | None, Any]] = [(v, s, t, None, var) for (v, s, t), var in self.leave.items() if s != t]
        converted += [(v, s, t, site, var) for (v, site, s, t), var in self.enter.items() if s != t]
        priced = [(part, price, var) for v, s, t, site, var in converted for part, price in self.prices.conversion(v, s, t, site)]
        priced += [(*self.prices.work(n, k), var) for (n, k), var in self.x.items()]
        first = self.sum(self.prices.replicated(n, k) * var for (n, k), var in self.x.items())
        then = self.sum(price * var for _, price, var in priced)
        held = [self.prices.held(n, k) * var for (n, k), var in self.x.items()]
        memory = self.sum(held + [self.prices.copied(v, s, t) * var for v, s, t, _, var in converted]) + self.prices.unread
        solver, scale = pulp.HiGHS(msg=False, gapRel=0.0), max(self.prices.scale, 1.0)
        if self.setting.memory is not None:
            self._row(memory * (1 / scale) <= self.setting.memory / scale, "memory")
        if not self._run(first / scale, solver):
            raise NotShardable(self._infeasible(memory, scale, solver))
        best = pulp.value(first) or 0.0
        self._row(first * (1 / scale) <= best / scale + 1e-7, "weights_sharded")
        if not self._run(then / self.prices.unit, solver):
            raise NotShardable("no combination of its ops' sharding rules fits together")
        choice = {op.name: self.ways[op.name][self._chosen(op)] for op in self.block.ops}
        placed = []
        for v, s, t, at, var in converted:
            site = at or self.sites.exit(v)
            if _on(var) and site is not None:
                placed.append((v, s, t, site, self.prices.moved(v, s, t)))
        parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for part, price, var in priced:
            parts[part] += price * (var.value() or 0.0)
        carries = (self.setting.carry, self.setting.carry_out)
        return Solution(
            sharded_block(self.block, self.ranks, carries, self._entering(), choice, [x[:4] for x in placed], tuple(self.unknown)), choice, placed,
            best, parts, float(pulp.value(memory) or 0.0),
            Counter({"x": len(self.x), "u": len(self.leave), "w": len(self.enter)}), self.families,
            {source: state for (source, state), amount in self.freely.items() if (pulp.value(amount) or 0.0) > 0.5},
        )  # fmt: skip

    def _run(self, objective: Any, solver: Any) -> bool:
        import pulp

        self.model.setObjective(objective)
        return pulp.LpStatus[self.model.solve(solver)] == "Optimal"

    def _infeasible(self, memory: Any, scale: float, solver: Any) -> str:
        """Why the rows have no solution: the memory row and its least value, or the rules."""
        import pulp

        row = self.model.constraints.pop("memory", None)
        if row is None or not self._run(memory * (1 / scale), solver):
            return "no combination of its ops' sharding rules fits together"
        least, bound = float(pulp.value(memory) or 0.0), self.setting.memory or 0.0
        return f"memory: {self.block.name} needs at least {least:,.0f} bytes of one rank, more than {bound:,.0f}"

    def _flow(self, v: str) -> None:
        """A value from where it is made, through its module's exit, into the modules that take it, to its consumers."""
        made, final = self._made(v), self._final(v)
        wanted = {self._wants(op, i, k) for op, i in self.consumers[v] for k in range(len(self.ways[op.name]))}
        exit_site = self.sites.exit(v)
        left: dict[State, Any] = dict(made)
        if exit_site is not None:
            leaving = defaultdict(list)
            for s, amount in made.items():
                targets = [t for t in sorted({*wanted, s, *final}) if self._convertible(v, s, t)]
                for t in targets:
                    self.leave[v, s, t] = self._variable(f"u {v} {s} {t}")
                    leaving[t].append(self.leave[v, s, t])
                self._row(self.sum(self.leave[v, s, t] for t in targets) == amount, "leaves", v, s)
            left = {t: self.sum(terms) for t, terms in leaving.items()}
        self._consume(v, made, left, exit_site)
        if final and v in self.setting.free:
            self._row(self.sum(left[s] for s in left if s in final) == 1, "final", v, "free")
            self.freely |= {(v, s): left[s] for s in left if s in final}
            return
        for s in final:
            if s not in left:  # no module whose result could be converted
                raise NotShardable(f"{v} cannot leave its block as {s}")
            self._row(left[s] == 1, "final", v, s)

    def _consume(self, v: str, made: dict[State, Any], left: dict[State, Any], exit_site: Site | None) -> None:
        """Leads a value into the modules that take it, outermost first, each of which may convert it, and to their ops."""
        # a consumer inside the module that the value is returned from sees it as it was made
        roots: dict[bool, dict[State, Any]] = {True: made, False: left}
        below: dict[tuple[bool, tuple[Site, ...]], set[State]] = defaultdict(set)  # path of sites -> states wanted by ops under it
        users: dict[tuple[bool, tuple[Site, ...]], list[tuple[Op, int]]] = defaultdict(list)
        for op, i in self.consumers[v]:
            inside, path = exit_site is not None and self.sites.inside(v, op), self.sites.entries(v, op)
            users[inside, path].append((op, i))
            for n in range(len(path) + 1):
                below[inside, path[:n]] |= {self._wants(op, i, k) for k in range(len(self.ways[op.name]))}
        entered: dict[tuple[bool, tuple[Site, ...]], dict[State, Any]] = {(inside, ()): root for inside, root in roots.items()}
        for inside, path in sorted(below, key=lambda key: len(key[1])):
            if not path:
                continue
            site, terms = path[-1], defaultdict(list)
            for s, amount in entered[inside, path[:-1]].items():
                targets = [t for t in sorted({*below[inside, path], s}) if self._convertible(v, s, t)]
                for t in targets:
                    self.enter[v, site, s, t] = self._variable(f"w {v} {site.module} {site.argument} {s} {t}")
                    terms[t].append(self.enter[v, site, s, t])
                self._row(self.sum(self.enter[v, site, s, t] for t in targets) == amount, "enters", v, site.module, site.argument, s)
            entered[inside, path] = {t: self.sum(parts) for t, parts in terms.items()}
        for (inside, path), ops in users.items():
            for op, i in ops:
                seen, ways = entered[inside, path], range(len(self.ways[op.name]))
                for s in sorted({*seen, *(self._wants(op, i, k) for k in ways)}):
                    wants = self.sum(self.x[op.name, k] for k in ways if self._wants(op, i, k) == s)
                    self._row(wants == seen.get(s, 0), "takes", op.name, i, s)

    def _values(self) -> Iterator[str]:
        yield from (f"in:{i}" for i in range(len(self.block.inputs)))
        for op in self.block.ops:
            yield from outputs_of(op)

    def _entering(self) -> dict[str, State]:
        sides = self.setting.sides or {}
        return {f"in:{i}": self.setting.carry if b.role == "carry" else sides.get(b.source, I) for i, b in enumerate(self.block.inputs)}

    def _made(self, v: str) -> dict[State, Any]:
        """State -> amount in which a value is made: by its op's strategy, or as it enters the block."""
        if v.startswith("in:"):
            x = self.block.inputs[int(v[3:])]
            if x.role == "carry" or x.source not in self.setting.free:
                return {self._entering()[v]: 1}
            enters = {s: self._variable(f"y {v} {s}") for s in self._whole_or_split(v)}
            self._row(self.sum(enters.values()) == 1, "enters", v)
            self.freely |= {(x.source, s): amount for s, amount in enters.items()}
            return enters
        name, _, index = v.partition(":")
        made: dict[State, list[Any]] = defaultdict(list)
        for k, way in enumerate(self.ways[name]):
            made[way.outs[int(index or 0)]].append(self.x[name, k])
        return {s: self.sum(terms) for s, terms in made.items()}

    def _wants(self, op: Op, i: int, k: int) -> State:
        return self.ways[op.name][k].ins[i]

    def _final(self, v: str) -> list[State]:
        """States that a value must leave the block in: the carry as `carry_out`, anything else as `sides` says."""
        if v not in self.block.outputs:
            return []
        if v != self.block.outputs[0] and v in self.setting.free:
            return self._whole_or_split(v)
        return [self.setting.carry_out if v == self.block.outputs[0] else (self.setting.sides or {}).get(v, I)]

    def _whole_or_split(self, v: str) -> list[State]:
        return [I, *(s for s in map(S, range(len(self.block.spec_of(v).shape))) if self._splits(v, s))]

    def _convertible(self, v: str, s: State, t: State) -> bool:
        return s == t or (convertible(s, t) and all(not state.sharded or self._splits(v, state) for state in (s, t)))

    def _splits(self, v: str, t: State) -> bool:
        spec = self.block.spec_of(v)
        return t.dim < len(spec.shape) and t.dim != spec.batch_dim and spec.shape[t.dim] % self.ranks == 0

    def _chosen(self, op: Op) -> int:
        return max(range(len(self.ways[op.name])), key=lambda k: self.x[op.name, k].value() or 0.0)

    def _tie(self, uses: list[tuple[Op, int]]) -> None:
        """One parameter, one stored state: every op that uses it stores it the same way, and in one module uses it the same way."""

        def states(op: Op, i: int, exact: bool) -> dict[State, list[Any]]:
            out: dict[State, list[Any]] = defaultdict(list)
            for k, way in enumerate(self.ways[op.name]):
                out[way.ins[i] if exact else _stored(way.ins[i])].append(self.x[op.name, k])
            return out

        for a, b in ((a, b) for n, b in enumerate(uses) for a in uses[:n]):
            exact = a[0].module == b[0].module
            if a is not uses[0] and not exact:
                continue  # stored alike already, by the first use
            mine, theirs = states(*a, exact), states(*b, exact)
            for s in sorted({*mine, *theirs}):
                name = a[0].inputs[a[1]].removeprefix("param:")
                self._row(self.sum(mine.get(s, [])) == self.sum(theirs.get(s, [])), "tied", name, a[0].name, a[1], b[0].name, b[1], s)


def _on(var: Any) -> bool:
    return (var.value() or 0.0) > 0.5


def _place_of(block: Block, op: Op) -> str:
    return ".".join(p for p in (block.name if block.repeated else "", op.module) if p) or block.name


def _stored(s: State) -> State:
    """How a parameter that is used as `s` is stored: sharded, or replicated."""
    return s if s.sharded else I


def _without_gradient_states(op: Op, block: Block, way: Strategy) -> Strategy:
    """For a value without gradient, R is I."""
    ins = tuple(I if s == R and not has_gradient(block, v) else s for v, s in zip(op.inputs, way.ins, strict=True))
    outs = tuple(I if s == R and not op.requires_grad else s for s in way.outs)
    return Strategy(ins, outs, way.divided)


__all__ = ["NotShardable", "S", "Setting", "Solution", "shard_block", "solve_block"]
