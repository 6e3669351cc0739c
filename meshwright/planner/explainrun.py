"""A saved plan, asked why: its model is traced again, its search rebuilt, and each question is solved, not guessed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meshwright.costmodel.layouts import RECOMPUTE
from meshwright.costmodel.model import CostModel
from meshwright.planner.explain import memory_parts, time_parts
from meshwright.planner.leastmemory import least_memory
from meshwright.planner.plan import Certificate, Layout, Plan, WhyNot
from meshwright.planner.search import Candidate, Search
from meshwright.planner.solve import Infeasible, Nearest, _inputs_hash, cost_model, relaxations
from meshwright.planner.space import Space, held_of
from meshwright.profiling.cluster import first_error
from meshwright.profiling.errors import InputError
from meshwright.profiling.trace import trace

Progress = Callable[[str], None]
SAME = 1e-6  # relative: steps that differ by less are one
UNLIMITED = 1e18  # bytes


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Side(_Model):
    """A layout as it is compared: seconds of its step and bytes of its fullest rank, by part."""

    layout: Layout
    step_s: float
    time_s: dict[str, float]
    peak_bytes: float  # p95
    memory_bytes: dict[str, float]  # p50, adds up to the peak's median


class Answer(_Model):
    """One question: what the plan would be with some choices held.

    "costs": solved, at a price; "has it": the plan is so already; "does not fit": proven, with the least that is needed; "impossible":
    no layout has it, for the reason given."""

    fix: str
    verdict: Literal["costs", "has it", "does not fit", "impossible"]
    reason: str = ""
    other: Side | None = None
    slower: float | None = None  # step over the plan's, minus one
    changed: tuple[str, ...] = ()
    needs_bytes: float | None = None  # p95
    limit_bytes: float | None = None
    nearest: tuple[Nearest, ...] = ()
    possible: tuple[str, ...] = ()  # values that the choice may have
    solver: Certificate | None = None


class Constraint(_Model):
    """One constraint of the plan, its figure, and whether it binds: whether the plan would be another without it."""

    name: str
    says: str
    binds: bool = False


class Explanation(_Model):
    """Why a plan is as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["meshwright.explanation/1"] = Field("meshwright.explanation/1", alias="schema")
    model: str
    cluster: str
    objective: str
    plan: Side
    answers: tuple[Answer, ...] = ()
    why_not: tuple[WhyNot, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    solver: Certificate
    notes: tuple[str, ...] = ()
    blocks: str = ""  # the integer programmes of op sharding, in words


def load_document(path: str | Path) -> Plan | Infeasible:
    """A plan, or the refusal that `plan -o` writes where nothing fits. InputError for anything else."""
    path = Path(path)
    try:
        data = json.loads(path.read_text()) if path.is_file() else None
    except (ValueError, OSError, RecursionError):
        data = None  # Plan.load says what is wrong
    if isinstance(data, dict) and data.get("schema") == "meshwright.infeasible/1":
        try:
            return Infeasible.model_validate(data)
        except ValidationError as e:
            raise InputError(f"{path}: {first_error(e)}") from None
    return Plan.load(path)


def reopen(plan: Plan, *, costs: str | CostModel | None = "auto", progress: Progress | None = None) -> Search:
    """The search that a plan came from: its model traced again, its cluster, workload and memory limit. InputError where the model is
    gone or is another now."""
    say, m = progress or (lambda _: None), plan.model
    path = Path(m.source if m.origin == "hf" else m.source.rpartition(":")[0])
    if (m.origin == "hf" or path.suffix == ".py") and not path.exists():
        raise InputError(f"the plan's model {m.source} is not here: explain traces it again, so run it where the plan was made")
    say(f"tracing {m.source}")
    sample = (m.sample_source or None) if m.origin == "module" else None
    graph = trace(m.source, seq=plan.workload.seq, precision=plan.workload.precision, sample=sample)
    if graph.hash != m.hash:
        what = f"{m.numel:,} parameters then, {graph.numel:,} now" if graph.numel != m.numel else "the same number of parameters, another graph"
        raise InputError(f"{m.source} is not the model that was planned ({what}): plan it again")
    say(f"sharding {len(graph.blocks)} unique blocks")
    space = Space(graph, plan.cluster, plan.workload, {}, cost_model(costs, plan.cluster))
    return Search(space, plan.prediction.memory_bytes.limit)


def found_in(search: Search, plan: Plan) -> Candidate:
    """The plan's layout as this search prices it. InputError where it is not in the space or no longer fits."""
    best = search.holding(held_of(plan.layout)).run(1).best
    if not best:
        raise InputError(f"the plan's layout does not fit any more as this version prices it ({plan.layout}): plan again")
    return best[0]


def explain(
    plan: Plan, questions: list[dict[str, Any]], *, costs: str | CostModel | None = "auto", blocks: bool = False,
    progress: Progress | None = None,
) -> Explanation:  # fmt: skip
    """Answers `questions` (what parse_fix gives) about a plan; without any, says what the plan rests on. `blocks`: with the integer
    programmes of op sharding in words."""
    say = progress or (lambda _: None)
    search = reopen(plan, costs=costs, progress=say)
    best = found_in(search, plan)
    answers = []
    for fix in questions:
        say(f"solving {words(fix)}")
        answers.append(answer(search, best, fix))
    constraints: tuple[Constraint, ...] = ()
    if not questions or blocks:
        say("solving without the memory limit")
        constraints = tuple(constraints_of(search, best, every=blocks))
    return Explanation(
        schema="meshwright.explanation/1", model=plan.model.name, cluster=plan.cluster.name, objective=plan.objective,
        plan=side(search, best), answers=tuple(answers), why_not=() if questions else plan.why_not, constraints=constraints,
        solver=plan.solver, notes=tuple(notes(search, plan, best)), blocks=in_words(search, best.layout) if blocks else "",
    )  # fmt: skip


def words(fix: dict[str, Any]) -> str:
    """ "tp=8 sp=on" for what is held."""
    return " ".join(f"{k}={_shown(v)}" for k, v in fix.items())


def side(search: Search, c: Candidate) -> Side:
    """A candidate by its parts."""
    return Side(
        layout=c.layout, step_s=c.step_s, time_s=time_parts(search, c), peak_bytes=search.reserved_bytes(c.row, c.live_bytes)[1],
        memory_bytes=memory_parts(search, c, c.fullest),
    )  # fmt: skip


def answer(search: Search, best: Candidate, fix: dict[str, Any]) -> Answer:
    """The best layout with `fix` held: its price against `best`, or the constraint that forbids it and the smallest changes that would do."""
    name = words(fix)
    if all(getattr(best.layout, k) == v for k, v in fix.items()):
        return Answer(fix=name, verdict="has it", reason="the plan has that already")
    try:
        held = search.holding(fix)
    except InputError as e:
        return Answer(fix=name, verdict="impossible", reason=_why(search, fix, str(e)), possible=tuple(_possible(search, fix)))
    outcome = held.run(1)
    if outcome.best:
        other = outcome.best[0]
        return Answer(
            fix=name, verdict="costs", other=side(held, other), slower=other.step_s / best.step_s - 1, solver=outcome.certificate,
            changed=tuple(
                f"{k}={_shown(getattr(other.layout, k))} instead of {_shown(getattr(best.layout, k))}"
                for k in Layout.model_fields if getattr(other.layout, k) != getattr(best.layout, k)
            ),
        )  # fmt: skip
    need = least_memory(held).best[0]
    least = need.candidate
    nearest = [n for n in relaxations(held, least) if n.layout != best.layout]
    return Answer(
        fix=name, verdict="does not fit", other=side(held, least), needs_bytes=need.bytes, limit_bytes=search.limit_bytes,
        nearest=tuple(nearest), solver=outcome.certificate,
    )  # fmt: skip


def _why(search: Search, fix: dict[str, Any], told: str) -> str:
    """The reason why no layout has what is held: the space's own for one of its parts, where there is one."""
    own = [r for k, v in fix.items() for r in search.space.skipped if r.startswith((f"{k}={v}:", f"{k}={v} "))]
    return own[0] if own and len(fix) == 1 else told


def _possible(search: Search, fix: dict[str, Any]) -> Iterator[str]:
    """The values that choices may have in this space, each by itself."""
    for key in fix:
        values = getattr(search.degrees, key, None)
        if key in ("tp", "cp", "pp", "dp", "ep", "etp", "micro_batch") and values is not None:
            yield f"{key} may be {_listed(sorted({int(v) for v in values}))}"


def _listed(values: list[int], most: int = 12) -> str:
    shown = [str(v) for v in values[:most]]
    return f"{', '.join(shown)}, ... {values[-1]}" if len(values) > most else ", ".join(shown)


def constraints_of(search: Search, best: Candidate, every: bool = False) -> Iterator[Constraint]:
    """The constraints of a plan with their figures, and whether each binds; `every`: with all that the space leaves out."""
    x, w, space = best.layout, search.space.workload, search.space
    free = Search(space, UNLIMITED, search.bound).run(1).best[0]
    binds = free.step_s < best.step_s * (1 - SAME)
    limit = search.limit_bytes
    told = "no layout is faster with more memory"
    if binds:
        told = f"without the limit a step would take {free.step_s:.4g} s ({free.step_s / best.step_s - 1:+.1%}), with {free.layout}"
    yield Constraint(name="memory limit", says=f"at most {limit / 2**30:.1f} GiB (p95) of a rank's device; {told}", binds=binds)
    stages = best.cut.costs
    for rank, s in enumerate(stages):
        p95 = search.reserved_bytes(best.row, s.live_bytes)[1]
        share = float(search._types(x.pp)[1][rank])
        left = limit * share - p95
        layers = ", ".join(f"{a} to {b - 1}" for a, b in search.chunks(best)[rank])
        recompute = "" if s.choice.mode == 0 else f", {RECOMPUTE[s.choice.mode]} recompute of {s.choice.layers} layers"
        memory = f"{p95 / 2**30:.1f} of {limit * share / 2**30:.1f} GiB (p95), {left / 2**30:.1f} free"
        says = f"layers {layers}{recompute}: {memory}; {s.c:.4g} s a microbatch"
        slowest = x.pp > 1 and rank == max(range(len(stages)), key=lambda i: stages[i].c)
        yield Constraint(name=f"stage {rank}", says=says + (", the slowest" if slowest else ""))
    m = int(best.row.microbatches[0])
    cp = f" x cp {x.cp}" if x.cp > 1 else ""
    yield Constraint(name="devices", says=f"tp {x.tp}{cp} x pp {x.pp} x dp {x.dp} = {space.cluster.size}")
    yield Constraint(name="global batch", says=f"dp {x.dp} x micro_batch {x.micro_batch} x {m} microbatches = {w.global_batch}")
    if x.pp > 1:
        ratio = float(search.priced(best).ratio[0])
        bubble = ratio * (sum(s.c for s in stages) - max(s.c for s in stages)) / best.step_s
        yield Constraint(
            name="pipeline", says=f"{m} microbatches are at least {x.pp} stages; the bubble is {bubble:.1%} of the step ({ratio:.2f} of 1F1B's)"
        )
    heads, kv_heads = space.heads
    if x.tp > 1 and heads:
        kv = f"{kv_heads} key-value heads" if kv_heads % x.tp == 0 else f"{kv_heads} key-value heads, which ranks share"
        yield Constraint(name="heads", says=f"{heads} attention heads and {kv} over tp {x.tp}")
    tokens = x.cp * (x.tp if x.sp else 1) * (2 if x.cp > 1 and x.cp_kind == "ring" else 1)
    if tokens > 1:
        yield Constraint(name="sequence", says=f"{space.graph.seq} tokens in {tokens} parts of {space.graph.seq // tokens}")
    for reason in space.skipped if every else [r for r in space.skipped if r.startswith(("tp=", "pp=", "dp="))][:4]:
        yield Constraint(name="left out", says=reason)


def notes(search: Search, plan: Plan, best: Candidate) -> Iterator[str]:
    """What is not as it was when the plan was made."""
    then = plan.prediction.step_s.p50
    if abs(best.step_s - then) > SAME * then:
        yield f"this version prices the plan's layout at {best.step_s:.4g} s a step, the plan says {then:.4g} s: prices here are against the former"
    if _inputs_hash(search.space, search.limit_bytes) != plan.inputs_hash:
        yield "the plan was made with parts of the layout held (--fix) or with other costs; questions here are asked of the whole space"


def in_words(search: Search, x: Layout) -> str:
    """The integer programmes that shard the blocks of a layout."""
    if x.tp == 1:
        return "tp=1: every op runs whole on one rank, so that there is nothing to shard"
    from meshwright.planner.sharding_words import describe_model

    return describe_model(search.space.graph, x.tp, x.sp)


def _shown(value: Any) -> Any:
    return ("off", "on")[value] if isinstance(value, bool) else value
