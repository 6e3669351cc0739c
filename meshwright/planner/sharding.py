"""Op sharding of one block over a tensor-parallel group, as an integer programme (PuLP, HiGHS).

Over the forward graph, with states that carry their gradient's (states.py) and rules as data (rules.py):

    x[n,k]          op n is computed in strategy k                       sum_k x[n,k] = 1
    u[v,s,s']       value v, made in s, leaves its module as s'          sum_s' u[v,s,s'] = made(v, s)
    w[v,E,s,s']     and enters each module E that takes it as s'         sum_s' w[v,E,s,s'] = what E's surroundings see
    x of a consumer in k needs its operands' states: sum_{k: in=s'} x[m,k] = entered(v, E, s')

A conversion happens only where a module's forward begins or ends (a hook can put it there), or in the code around the layers,
which is ours to print. The objective is lexicographic: first the bytes of weights that stay replicated, because that is what a
tensor-parallel degree is for; then the bytes that the collectives move, forward and backward, and a small price for work that
every rank repeats. Neither depends on the cluster.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from meshwright.costmodel.sharded import Collective, Conversion, ShardedBlock
from meshwright.planner.rules import Strategy, op_name, packings, strategies
from meshwright.planner.states import CONVERSIONS, I, R, S, State, convertible, moved
from meshwright.profiling.blocks import LOSS
from meshwright.profiling.graph import Amount, Block, Op
from meshwright.profiling.literals import UNSETTABLE

REPEATED_WORK = 0.01  # bytes of collective that one repeated byte of local traffic is worth
ENTRY = 2.0  # bytes: of two equal places for a conversion, the module's exit; code around the layers last
CODE = 8.0
CODE_PATH = ""  # the module path of the code around the layers
LATENCY = 0.05  # of the carry's bytes, for each collective: of plans that move the same, the one with fewer


class NotShardable(Exception):
    """Why a block cannot be computed with this tensor-parallel degree: a phrase for the user."""


@dataclass(frozen=True)
class Site:
    """A place where a conversion can be put: the input or output of a submodule, or the code around the layers."""

    module: str  # relative to the block; "" in the surrounding code
    argument: str  # the argument's or result's path in the call
    entry: bool


def shard_block(
    block: Block, ranks: int, carry: State, carry_out: State | None = None, *, inlined: frozenset[str] = frozenset(),
    sharded_loss: bool = True, stored: dict[str, State] | None = None,
) -> ShardedBlock:  # fmt: skip
    """The cheapest sharding of `block` on `ranks` ranks whose carry enters as `carry` and leaves as `carry_out` (default: the same).

    `inlined` are the modules whose forward is printed as code around the layers (they contain the layers): conversions can be
    put between their statements. `sharded_loss`: the loss may be computed on shards of the classes. `stored` fixes how
    parameters are stored (I for replicated). Raises NotShardable, with the reason, where the rules have no such way.
    """
    carry_out = carry_out or carry
    enters = [f"in:{i}" for i, b in enumerate(block.inputs) if b.role == "carry"]
    for state, value in [*((carry, v) for v in enters), (carry_out, block.outputs[0])]:
        spec = block.spec_of(value)
        if state.sharded and (state.dim >= len(spec.shape) or state.dim == spec.batch_dim):
            raise NotShardable(f"values between layers have no sequence dimension {state.dim}")
        if state.sharded and spec.shape[state.dim] % ranks:
            raise NotShardable(f"a sequence of {spec.shape[state.dim]} is not divisible by {ranks}")
    return _Problem(block, ranks, carry, carry_out, inlined if not block.repeated else frozenset(), sharded_loss, stored or {}).solve()


class _Problem:
    def __init__(
        self, block: Block, ranks: int, carry: State, carry_out: State, inlined: frozenset[str], sharded_loss: bool, stored: dict[str, State]
    ) -> None:
        self.block, self.ranks, self.carry, self.carry_out = block, ranks, carry, carry_out
        self.unknown: list[str] = []
        q = packings(block)
        self.ways: dict[str, list[Strategy]] = {}
        for op in block.ops:
            # sizes in the code around the layers are ours to print
            ways, known = strategies(op.model_copy(update={"literals": {}}) if op.module in inlined else op, block, ranks, q)
            if not known and op.module != LOSS and (op.requires_grad or any(v.startswith("param:") for v in op.inputs)):
                self.unknown.append(op.target)
            if op.module == LOSS and not sharded_loss:
                ways = ways[:1]
            ways = [
                w
                for w in ways
                if all(stored.get(v[6:], _stored(s)) == _stored(s) for v, s in zip(op.inputs, w.ins, strict=True) if v.startswith("param:"))
            ]
            self.ways[op.name] = [_without_gradient_states(op, block, s) for s in ways]
        self.consumers: dict[str, list[tuple[Op, int]]] = defaultdict(list)
        for op in block.ops:
            for i, v in enumerate(op.inputs):
                if not v.startswith(("param:", "buffer:")):
                    self.consumers[v].append((op, i))
        self.latency = LATENCY * max(block.spec_of(v).nbytes for v in block.outputs)
        self.sites = _Sites(block, inlined)

    def solve(self) -> ShardedBlock:
        import pulp

        model = pulp.LpProblem("sharding", pulp.LpMinimize)
        x = {(op.name, k): pulp.LpVariable(f"x_{op.name}_{k}", cat="Binary") for op in self.block.ops for k in range(len(self.ways[op.name]))}
        for op in self.block.ops:
            model += pulp.lpSum(x[op.name, k] for k in range(len(self.ways[op.name]))) == 1, f"one_way_{op.name}"
        leave: dict[tuple[str, State, State], Any] = {}
        enter: dict[tuple[str, Site, State, State], Any] = {}
        for v in self._values():
            made = self._made(v, x)
            wanted = {self._wants(op, i, k) for op, i in self.consumers[v] for k in range(len(self.ways[op.name]))}
            exit_site = self.sites.exit(v)
            left: dict[State, Any] = dict(made)
            if exit_site is not None:
                left = defaultdict(list)
                for s, amount in made.items():
                    targets = [t for t in {*wanted, s, *self._final(v)} if self._convertible(v, s, t)]
                    for t in targets:
                        leave[v, s, t] = pulp.LpVariable(f"u_{len(leave)}", 0, 1)
                        left[t].append(leave[v, s, t])
                    model += pulp.lpSum(leave[v, s, t] for t in targets) == amount
                left = {t: pulp.lpSum(terms) for t, terms in left.items()}
            self._consume(model, x, v, made, left, exit_site, enter)
            for s in self._final(v):
                if s not in left:  # no module whose result could be converted
                    raise NotShardable(f"{v} cannot leave its block as {s}")
                model += left[s] == 1
        for group in self._shared_params():
            self._tie(model, x, group)
        first = pulp.lpSum(self._replicated_bytes(n, k) * var for (n, k), var in x.items())
        then = pulp.lpSum(
            [self._moved(v, s, t) * var for (v, s, t), var in leave.items() if s != t]
            + [(self._moved(v, s, t) + self._place(site)) * var for (v, site, s, t), var in enter.items() if s != t]
            + [self._repeated(n, k) * var for (n, k), var in x.items()]
        )
        solver = pulp.HiGHS(msg=False)
        scale = max(self._scale(), 1.0)
        model.setObjective(first / scale)
        _run(model, solver)
        best = pulp.value(first) or 0.0
        model += first <= best + 1e-6 * max(best, 1.0), "weights_sharded"
        model.setObjective(then / scale)
        _run(model, solver)
        choice = {op.name: self.ways[op.name][self._chosen(x, op)] for op in self.block.ops}
        exits = {v: (s, t) for (v, s, t), var in leave.items() if s != t and (var.value() or 0) > 0.5}
        entries = {(v, site): (s, t) for (v, site, s, t), var in enter.items() if s != t and (var.value() or 0) > 0.5}
        return self._result(choice, exits, entries)

    # -- pieces of the model

    def _consume(
        self, model: Any, x: Any, v: str, made: dict[State, Any], left: dict[State, Any], exit_site: Site | None, enter: dict[Any, Any]
    ) -> None:
        """Leads a value into the modules that take it, outermost first, each of which may convert it, and to their ops."""
        import pulp

        below: dict[tuple[Site, ...], set[State]] = defaultdict(set)  # path of sites -> states wanted by ops under it
        users: dict[tuple[Site, ...], list[tuple[Op, int]]] = defaultdict(list)
        for op, i in self.consumers[v]:
            path = self.sites.entries(v, op)
            users[path].append((op, i))
            for n in range(len(path) + 1):
                below[path[:n]] |= {self._wants(op, i, k) for k in range(len(self.ways[op.name]))}
        entered: dict[tuple[Site, ...], dict[State, Any]] = {(): left}
        for path in sorted(below, key=len):
            if not path:
                continue
            site, terms = path[-1], defaultdict(list)
            for s, amount in entered[path[:-1]].items():
                targets = [t for t in {*below[path], s} if self._convertible(v, s, t)]
                for t in targets:
                    enter[v, site, s, t] = pulp.LpVariable(f"w_{len(enter)}", 0, 1)
                    terms[t].append(enter[v, site, s, t])
                model += pulp.lpSum(enter[v, site, s, t] for t in targets) == amount
            entered[path] = {t: pulp.lpSum(parts) for t, parts in terms.items()}
        for path, ops in users.items():
            for op, i in ops:
                # a consumer inside the module that makes the value sees it before it leaves
                seen = made if exit_site is not None and self.sites.inside(v, op) else entered[path]
                ways = range(len(self.ways[op.name]))
                for s in {*seen, *(self._wants(op, i, k) for k in ways)}:
                    model += pulp.lpSum(x[op.name, k] for k in ways if self._wants(op, i, k) == s) == seen.get(s, 0)

    def _values(self) -> Iterator[str]:
        yield from (f"in:{i}" for i in range(len(self.block.inputs)))
        for op in self.block.ops:
            yield from _outputs(op)

    def _made(self, v: str, x: Any) -> dict[State, Any]:
        """State -> amount in which a value is made: by its op's strategy, or as it enters the block."""
        import pulp

        if v.startswith("in:"):
            role = self.block.inputs[int(v[3:])].role
            return {self.carry if role == "carry" else I: 1}
        name, _, index = v.partition(":")
        made: dict[State, list[Any]] = defaultdict(list)
        for k, way in enumerate(self.ways[name]):
            made[way.outs[int(index or 0)]].append(x[name, k])
        return {s: pulp.lpSum(terms) for s, terms in made.items()}

    def _wants(self, op: Op, i: int, k: int) -> State:
        return self.ways[op.name][k].ins[i]

    def _final(self, v: str) -> list[State]:
        """States that a value must leave the block in: the carry as `carry_out`, anything else replicated."""
        if v not in self.block.outputs:
            return []
        return [self.carry_out if v == self.block.outputs[0] else I]

    def _convertible(self, v: str, s: State, t: State) -> bool:
        return convertible(s, t) and (not t.sharded or self._splits(v, t))

    def _splits(self, v: str, t: State) -> bool:
        spec = self.block.spec_of(v)
        return t.dim < len(spec.shape) and t.dim != spec.batch_dim and spec.shape[t.dim] % self.ranks == 0

    def _chosen(self, x: Any, op: Op) -> int:
        return max(range(len(self.ways[op.name])), key=lambda k: x[op.name, k].value() or 0.0)

    def _shared_params(self) -> list[list[tuple[Op, int]]]:
        uses: dict[str, list[tuple[Op, int]]] = defaultdict(list)
        for op in self.block.ops:
            for i, v in enumerate(op.inputs):
                if v.startswith("param:"):
                    uses[v].append((op, i))
        return [u for u in uses.values() if len(u) > 1]

    def _tie(self, model: Any, x: Any, uses: list[tuple[Op, int]]) -> None:
        """One parameter, one stored state: every op that uses it stores it the same way, and in one module uses it the same way."""
        import pulp

        def states(op: Op, i: int, exact: bool) -> dict[State, list[Any]]:
            out: dict[State, list[Any]] = defaultdict(list)
            for k, way in enumerate(self.ways[op.name]):
                out[way.ins[i] if exact else _stored(way.ins[i])].append(x[op.name, k])
            return out

        for other in uses[1:]:
            exact = other[0].module == uses[0][0].module
            first, theirs = states(*uses[0], exact), states(*other, exact)
            for s in {*first, *theirs}:
                model += pulp.lpSum(first.get(s, [])) == pulp.lpSum(theirs.get(s, []))

    # -- prices

    def _replicated_bytes(self, name: str, k: int) -> float:
        """Bytes of matrices that this way leaves replicated."""
        op = self.block.by_name[name]
        return float(sum(
            self.block.spec_of(v).nbytes
            for v, s in zip(op.inputs, self.ways[name][k].ins, strict=True)
            if v.startswith("param:") and not s.sharded and len(self.block.spec_of(v).shape) > 1
        ))  # fmt: skip

    def _moved(self, v: str, s: State, t: State) -> float:
        spec = self.block.spec_of(v)
        forward, backward = CONVERSIONS[s.kind, t.kind]
        if not _has_gradient(self.block, v):
            return spec.nbytes * (self.ranks - 1) / self.ranks + self.latency if forward else 0.0
        return spec.nbytes * moved(s, t, self.ranks) + self.latency * ((forward is not None) + (backward is not None))

    def _place(self, site: Site) -> float:
        return (ENTRY + 0.1 * site.module.count(".")) if site.module else CODE

    def _repeated(self, name: str, k: int) -> float:
        op, way = self.block.by_name[name], self.ways[name][k]
        if way.divided or op.kind in ("view", "constant"):
            packed = sum(s.pieces - 1 for s in (*way.ins, *way.outs))
            return 0.1 * self.latency * packed  # of equal plans the one with plain shards
        return REPEATED_WORK * (op.forward.bytes.at(1) + op.backward.bytes.at(1)) * (1 - 1 / self.ranks)

    def _scale(self) -> float:
        return sum(self.block.spec_of(f"param:{p.name}").nbytes for p in self.block.params) + self.block.spec_of(self.block.outputs[0]).nbytes

    # -- the answer

    def _result(
        self, choice: dict[str, Strategy], exits: dict[str, tuple[State, State]], entries: dict[tuple[str, Site], tuple[State, State]]
    ) -> ShardedBlock:
        block, t = self.block, self.ranks
        params: dict[str, str] = {}
        for op in block.ops:
            for v, s in zip(op.inputs, choice[op.name].ins, strict=True):
                if v.startswith("param:"):
                    params[v[6:]] = str(s)
        states = {f"in:{i}": self.carry if b.role == "carry" else I for i, b in enumerate(block.inputs)}
        for op in block.ops:
            for v, s in zip(_outputs(op), choice[op.name].outs, strict=True):
                states[v] = s
        conversions, collectives, gathered = [], [], set()
        for v, (s, to), site in [
            *((v, pair, self.sites.exit(v)) for v, pair in exits.items()),
            *((v, pair, site) for (v, site), pair in entries.items()),
        ]:
            assert site is not None
            conversions.append(Conversion(value=v, source=str(s), target=str(to), module=site.module, argument=site.argument, entry=site.entry))
            size = block.spec_of(v).amount
            for collective, phase in zip(CONVERSIONS[s.kind, to.kind], ("forward", "backward"), strict=True):
                if collective and (phase == "forward" or _has_gradient(block, v)):
                    collectives.append(Collective(op=collective, amount=size, phase=phase, value=v))  # type: ignore[arg-type]
            if s.sharded and not to.sharded:
                gathered.add(v)
        for op in block.ops:
            if op.kind == "cross_entropy" and choice[op.name].divided:  # maximum, sum and target of each row
                rows = Amount(per_sample=4.0 * op.dims.get("rows", 0))
                collectives += [Collective(op="all_reduce", amount=rows, phase="forward", value=op.name)] * 3
            for v, s in zip(op.inputs, choice[op.name].ins, strict=True):  # gradients of replicated weights used on shards
                if v.startswith("param:") and s == R:
                    collectives.append(Collective(op="all_reduce", amount=block.spec_of(v).amount, phase="backward", value=v))
        return ShardedBlock(
            block=block, ranks=t, carry=str(self.carry), carry_out=str(self.carry_out), params=params,
            states={v: str(s) for v, s in states.items()}, divided=frozenset(n for n, way in choice.items() if way.divided),
            operands={n: tuple(str(s) for s in way.ins) for n, way in choice.items()},
            conversions=tuple(conversions), collectives=tuple(collectives), gathered=frozenset(gathered),
            sizes=_local_sizes(block, choice, t), unknown=tuple(sorted(set(self.unknown))),
        )  # fmt: skip


class _Sites:
    """Where a value may be converted: on leaving the module that returns it, on entering the module that takes it."""

    def __init__(self, block: Block, inlined: frozenset[str]) -> None:
        self.code = inlined
        self.module = {op.name: CODE_PATH if op.module in inlined else op.module for op in block.ops}
        self.made_by: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self.taken_by: dict[str, dict[str, str]] = defaultdict(dict)
        for call in block.calls:
            if call.module in inlined:
                continue
            for path, v in call.outputs.items():
                self.made_by[_canonical(v)].append((call.module, path))
            returned = set(call.outputs.values())
            for path, v in call.inputs.items():
                if v in returned:
                    continue  # it hands its argument on: a conversion would leak to whoever takes it next
                self.taken_by[_canonical(v)].setdefault(call.module, path)

    def home(self, v: str) -> str:
        return CODE_PATH if v.startswith("in:") else self.module[v.partition(":")[0]]

    def exit(self, v: str) -> Site | None:
        """The innermost submodule that returns the value, or the surrounding code that makes it."""
        calls = [(m, path) for m, path in self.made_by.get(_canonical(v), []) if _contains(m, self.home(v)) and not v.startswith("in:")]
        if calls:
            module, path = max(calls, key=lambda c: len(c[0]))
            return Site(module, path, entry=False)
        if self.code and self.home(v) == CODE_PATH and not v.startswith("in:"):
            return Site("", v, entry=False)
        return None

    def inside(self, v: str, op: Op) -> bool:
        """Whether a consumer is in the very module that the value would be converted on leaving."""
        site = self.exit(v)
        return site is not None and site.module != "" and _contains(site.module, self.module[op.name])

    def entries(self, v: str, op: Op) -> tuple[Site, ...]:
        """The submodules that take the value on its way to a consumer, outermost first, or the surrounding code."""
        home, taken = self.home(v), self.taken_by.get(_canonical(v), {})
        module = self.module[op.name]
        path = tuple(Site(m, taken[m], entry=True) for m in _ancestors(module) if m in taken and not _contains(m, home))
        if not path and self.code and module == CODE_PATH:
            return (Site("", op.name, entry=True),)
        return path


def _stored(s: State) -> State:
    """How a parameter that is used as `s` is stored: sharded, or replicated."""
    return s if s.sharded else I


def _canonical(v: str) -> str:
    return v.removesuffix(":0") if not v.startswith("in:") else v


def _contains(module: str, path: str) -> bool:
    return path == module or path.startswith(module + ".")


def _ancestors(path: str) -> Iterator[str]:
    """ "a", "a.b", "a.b.c" for "a.b.c"."""
    parts = path.split(".") if path else []
    for i in range(1, len(parts) + 1):
        yield ".".join(parts[:i])


def _outputs(op: Op) -> list[str]:
    return [op.name if len(op.outputs) == 1 else f"{op.name}:{i}" for i in range(len(op.outputs))]


def _has_gradient(block: Block, v: str) -> bool:
    if v.startswith("in:"):
        return block.inputs[int(v[3:])].requires_grad
    if v.startswith("param:"):
        return block.param(v[6:]).trainable
    if v.startswith("buffer:"):
        return False
    return block.by_name[v.partition(":")[0]].requires_grad


def _without_gradient_states(op: Op, block: Block, way: Strategy) -> Strategy:
    """For a value without gradient, R is I."""
    ins = tuple(I if s == R and not _has_gradient(block, v) else s for v, s in zip(op.inputs, way.ins, strict=True))
    outs = tuple(I if s == R and not op.requires_grad else s for s in way.outs)
    return Strategy(ins, outs, way.divided)


def _local_sizes(block: Block, choice: dict[str, Strategy], ranks: int) -> dict[str, int]:
    """Attributes that hold a size of a dimension that is now sharded, with their local value."""
    local: dict[str, int] = {}
    whole: dict[str, int] = {}
    for op in block.ops:
        for where, attribute in op.literals.items():
            if attribute.startswith(UNSETTABLE):
                continue
            key, _, index = where.partition("[")
            position = int(index.rstrip("]")) if index else None
            size = op.args[key][position] if position is not None else op.args[key]
            out = choice[op.name].outs[0]
            name = op_name(op)
            if position is not None and name in ("view", "reshape", "expand", "unflatten", "_unsafe_view"):
                sharded = out.sharded and out.dim == position
            else:
                at = int(op.args.get("dim", 0)) % len(op.outputs[0].shape)
                sharded = name in ("split", "split_with_sizes") and out.sharded and out.dim == at
            (local if sharded else whole)[attribute] = size // ranks if sharded else size
    clash = sorted(set(local) & set(whole))
    if clash:
        raise NotShardable(f"{block.name}.{clash[0]} is written in the code as a size that is sharded in one place and whole in another")
    return local


def _run(model: Any, solver: Any) -> None:
    import pulp

    status = model.solve(solver)
    if pulp.LpStatus[status] != "Optimal":
        raise NotShardable("no combination of its ops' sharding rules fits together")


__all__ = ["NotShardable", "S", "shard_block"]
