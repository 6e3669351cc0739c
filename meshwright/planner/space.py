"""Which layouts exist: every divisor degree that the model, the batch and the cluster allow, and why the others do not.

A layout is chosen in two steps, so that the search can bound what it has not built: its degrees (tensor, context, pipeline, data and
expert parallelism, microbatch), then its details (ZeRO stage and replicas, schedule and chunks, loss, optimizer state). How layers are cut
into stages and what each stage recomputes is solved for each layout (stages.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import gcd
from typing import Any

import numpy as np

from meshwright.costmodel import schedules
from meshwright.costmodel.layouts import ASKED, BY_ROW, FREE, LOSSES, OFFLOADS, RECOMPUTE, SCHEDULES, SPLIT, STATE_DTYPES, Layouts
from meshwright.costmodel.model import CostModel
from meshwright.costmodel.sharded import ShardedBlock
from meshwright.planner.expert_tables import why_not
from meshwright.planner.plan import Layout, Workload
from meshwright.planner.shardedmodel import shard_model
from meshwright.planner.sharding import NotShardable
from meshwright.planner.tables import uses_vocab_parallel_loss
from meshwright.planner.token_dims import no_token_dims
from meshwright.profiling.cluster import Cluster
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelGraph

CHOICES: dict[str, tuple[str, ...]] = {
    "cp_kind": ("ring", "ulysses"), "recompute": RECOMPUTE, "schedule": SCHEDULES, "loss": LOSSES, "state_dtype": STATE_DTYPES,
    "offload": OFFLOADS,
}  # fmt: skip
FIXABLE: dict[str, type] = {
    "tp": int, "sp": bool, "cp": int, "cp_kind": str, "pp": int, "vpp": int, "dp": int, "zero": int, "replicas": int, "ep": int, "etp": int,
    "micro_batch": int, "recompute": str, "schedule": str, "loss": str, "state_dtype": str, "offload": str,
}  # fmt: skip
_ALIASES = {"mb": "micro_batch", "microbatch": "micro_batch", "remat": "recompute", "hsdp": "replicas", "chunks": "vpp"}
MOST_CHUNKS = 8  # of a rank
MOST_ETP = 8
NO_RECOMPUTE = "recompute beside weights' gradients that wait is not in the memory model"
NO_SHARDED_GRADIENTS = "it runs the weights' gradients apart, where ZeRO 2 and 3 do not see them to reduce them after each microbatch"


def parse_fix(text: str) -> dict[str, Any]:
    """ "tp=8,pp=2,recompute=full" -> {"tp": 8, ...}; InputError names what can be fixed."""
    fixed: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = part.partition("=")
        key = _ALIASES.get(key.strip(), key.strip())
        if not equals or key not in FIXABLE:
            raise InputError(f"--fix {part!r}: write one of {', '.join(FIXABLE)} with a value, like tp=8")
        if key in fixed:
            raise InputError(f"--fix {text!r}: {key} is there twice")
        fixed[key] = _fixed_value(key, value.strip())
    return fixed


def _fixed_value(key: str, value: str) -> Any:
    if key in CHOICES:
        if value not in CHOICES[key]:
            raise InputError(f"--fix {key}={value}: it is one of {', '.join(CHOICES[key])}")
        return value
    if key == "sp":
        if value.lower() not in ("true", "false", "1", "0", "on", "off"):
            raise InputError(f"--fix sp={value}: it is on or off")
        return value.lower() in ("true", "1", "on")
    try:
        number = int(value)
    except ValueError:
        raise InputError(f"--fix {key}={value}: {value!r} is not a whole number") from None
    if key == "zero" and not 0 <= number <= 3:
        raise InputError(f"--fix zero={value}: ZeRO stages are 0, 1, 2 and 3")
    if key != "zero" and number < 1:
        raise InputError(f"--fix {key}={value}: a degree is at least 1")
    return number


def held_of(layout: Layout) -> dict[str, Any]:
    """A layout as what a search holds; recompute that differs by stage is left to it, and with tp > 1 a plain loss is whatever the sharding
    makes of it."""
    free = {("recompute", "by stage"), *([("loss", "plain")] if layout.tp > 1 else [])}
    return {k: getattr(layout, k) for k in FIXABLE if (k, getattr(layout, k)) not in free}


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


@dataclass(frozen=True)
class Details:
    """What a layout chooses after its degrees. Rows as the cost model's columns: zero, replicas; schedule, vpp; loss; state; offload."""

    sharding: np.ndarray  # [a, 2] zero, replicas
    schedule: np.ndarray  # [b, 2] schedule, vpp
    rest: np.ndarray  # [c, 3] loss, state, offload

    @property
    def below(self) -> np.ndarray:
        """Layouts with each row of `sharding`."""
        together = runs_together(self.sharding[:, :1], self.schedule[None, :, 0]) if len(self.schedule) else np.zeros((len(self.sharding), 0))
        return np.asarray(together.sum(axis=1, dtype=np.int64) * len(self.rest))

    @property
    def count(self) -> int:
        return int(self.below.sum())


def runs_together(zero: np.ndarray, schedule: np.ndarray) -> np.ndarray:
    """Whether a ZeRO stage and a schedule do: where the weights' gradients run apart, nothing would reduce those of each microbatch."""
    return np.asarray((zero < 2) | ~np.isin(schedule, [SCHEDULES.index(name) for name in SPLIT]))


@dataclass
class Space:
    """Every layout of a model on a cluster, and what was left out, counted by reason."""

    graph: ModelGraph
    cluster: Cluster
    workload: Workload
    fixed: dict[str, Any] = field(default_factory=dict)
    costs: CostModel | None = None
    skipped: Counter[str] = field(default_factory=Counter)
    shardings: dict[tuple[int, bool], tuple[ShardedBlock, ...]] = field(default_factory=dict)
    known: dict[tuple[int, bool], tuple[ShardedBlock, ...] | str] = field(default_factory=dict)  # made for any cluster, or why not

    def __post_init__(self) -> None:
        self._caches()
        for tp in self._degrees("tp", self.cluster.size):
            for sp in (False, True) if tp > 1 else (False,):
                if self.fixed.get("sp", sp) == sp:
                    self._shard(tp, sp)

    def _caches(self) -> None:
        for name in ("_zero", "_pipelines", "_rest", "_no_experts"):  # asked for many times with few answers
            setattr(self, name, lru_cache(maxsize=None)(getattr(self, name)))

    def _degrees(self, key: str, of: int) -> list[int]:
        return [d for d in divisors(of) if self.fixed.get(key, d) == d]

    def _names(self, key: str, names: tuple[str, ...]) -> list[str]:
        return [n for n in names if self.fixed.get(key, n) == n]

    def _shard(self, tp: int, sp: bool) -> None:
        name = f"tp={tp}{' with sp' if sp else ''}"
        if tp > 1 and self.moe and (why := self._no_experts(True, 1, 1)):
            self.skipped[f"{name}: {why}"] += 1
            return
        if tp > 1 and self.moe and not sp and self.fixed.get("sp") is None:
            self.skipped[f"{name}: experts take each token once, which needs sequence parallelism"] += 1
            return
        if (tp, sp) not in self.known:
            try:
                self.known[tp, sp] = shard_model(self.graph, tp, sp)
            except NotShardable as e:
                self.known[tp, sp] = str(e)
        made = self.known[tp, sp]
        if isinstance(made, str):
            self.skipped[f"{name}: {made}"] += 1
            return
        self.shardings[tp, sp] = made

    def holding(self, fix: dict[str, Any]) -> Space:
        """This space with more of the layout held; it shares the sharded blocks. Raises InputError where both hold a part differently."""
        clash = [k for k, v in fix.items() if self.fixed.get(k, v) != v]
        if clash:
            raise InputError(f"{clash[0]} is held at {self.fixed[clash[0]]} already")
        held = {**self.fixed, **fix}
        shardings = {(tp, sp): s for (tp, sp), s in self.shardings.items() if held.get("tp", tp) == tp and held.get("sp", sp) == sp}
        made = Space.__new__(Space)
        made.__dict__.update({k: getattr(self, k) for k in ("graph", "cluster", "workload", "costs", "known")})
        made.fixed, made.shardings, made.skipped = held, shardings, Counter(self.skipped)
        made._caches()
        return made

    def like(self, cluster: Cluster, workload: Workload, fixed: dict[str, Any]) -> Space:
        """The space of the same model on another cluster or for another batch; blocks that are sharded already are not sharded again."""
        return Space(self.graph, cluster, workload, fixed, self.costs, known=self.known)

    # -- what the model allows

    @cached_property
    def moe(self) -> tuple[int, int] | None:
        """Experts of every expert block and their inner size (common divisors); None without experts."""
        products = [[op for op in b.ops if op.kind == "experts"] for b in self.graph.blocks]
        products = [ops for ops in products if ops]
        if not products:
            return None
        return gcd(*(op.dims["experts"] for ops in products for op in ops)), gcd(*(ops[-1].dims["k"] for ops in products))

    @cached_property
    def no_chunked_loss(self) -> str:
        """Why the loss cannot be computed on some rows at a time; empty if it can: the model ends in one projection of rows."""
        program = self.graph.program
        if self.graph.objective != "cross_entropy" or program is None:
            return "the loss is no cross-entropy behind a plain sequence of layers"
        last = self.graph.blocks[self.graph.sequence[-1].block]
        called = [s.target.removeprefix("module:") for s in program.head if s.target.startswith("module:")]
        inside = [op for op in last.ops if called and (op.module == called[-1] or op.module.startswith(called[-1] + "."))]
        if [op.kind for op in inside if op.kind != "view"] != ["matmul"]:
            return f"{called[-1] if called else 'the end of the model'} is not one projection"
        after = program.head[max(i for i, s in enumerate(program.head) if s.target.startswith("module:")) + 1 :]
        other = next((s.target for s in after if not s.target.startswith(BY_ROW)), "")
        return f"{other} comes after the projection to logits" if other else ""

    @cached_property
    def no_context(self) -> str:
        """Why samples cannot be split along the sequence; empty if they can: every other op must act token by token."""
        layers = [b for b in self.graph.blocks if b.repeated]
        if not layers or self.graph.program is None:
            return "the model is no plain sequence of layers"
        for b in layers:
            attention = [op for op in b.ops if op.kind == "attention"]
            if not attention:
                return f"{b.name} has no attention that would join the parts"
            for op in attention:
                if not op.dims["q"] == op.dims["kv"] == self.graph.seq:
                    return f"attention of {b.name} is not over the {self.graph.seq} tokens of a sample"
                if len(op.inputs) > 3:
                    return f"attention of {b.name} takes a mask or bias"
            other = next((op for op in b.ops if op.kind in ("conv", "scan", "unknown")), None)
            if other is not None:
                return f"{other.target} of {b.name} joins tokens"
        return no_token_dims(self.graph)

    @cached_property
    def heads(self) -> tuple[int, int]:
        """Query and key-value heads that every attention has (common divisors)."""
        found = [op.dims for b in self.graph.blocks for op in b.ops if op.kind == "attention"]
        return (gcd(*(d["heads"] for d in found)), gcd(*(d["kv_heads"] for d in found))) if found else (0, 0)

    def _no_experts(self, tp: bool, ep: int, etp: int) -> str:
        """Why experts cannot be spread that way; empty if they can."""
        return why_not(self.graph, tp=2 if tp else 1, ep=ep, etp=etp)

    # -- degrees

    @cached_property
    def degrees(self) -> Layouts:
        """Every choice of degrees; `zero` and `schedule` are FREE. Raises InputError, with the reason that excluded most, if none is."""
        rows = list(self._degree_rows())
        if not rows:
            raise InputError(self.nothing())
        c = np.array(rows, np.int64).T
        batch = self.workload.global_batch
        # a plain loss is the cheapest, and stands for those that are not chosen
        return Layouts.of(
            tp=c[0], sp=c[1], cp=c[2], ulysses=c[3], pp=c[4], dp=c[5], ep=c[6], etp=c[7], micro_batch=c[8], microbatches=batch // (c[5] * c[8]),
            zero=np.full(len(rows), FREE), schedule=np.where(c[4] > 1, FREE, 0), state=STATE_DTYPES.index(self.fixed.get("state_dtype", "fp32")),
            offload=FREE,
        )  # fmt: skip

    def _degree_rows(self) -> Iterator[tuple[int, ...]]:
        layers, n = len(self.graph.layers), self.cluster.size
        for tp, sp in self.shardings:
            for cp, ulysses in self._contexts(tp, sp, n // tp):
                rest = n // (tp * cp)
                for pp in self._degrees("pp", rest):
                    if pp > 1 and self.graph.program is None:
                        self.skipped[f"pp={pp}: {self.graph.no_program}"] += 1
                        continue
                    if pp > max(layers, 1):
                        self.skipped[f"pp={pp}: the model has {layers} layers"] += 1
                        continue
                    dp = rest // pp
                    if self.fixed.get("dp", dp) != dp:
                        continue
                    if self.workload.global_batch % dp:
                        self.skipped[f"dp={dp}: it does not divide the global batch {self.workload.global_batch}"] += 1
                        continue
                    for ep, etp in self._expert_degrees(tp, tp * cp * dp):
                        for mb in self._degrees("micro_batch", self.workload.global_batch // dp):
                            if self.workload.global_batch // (dp * mb) < pp:
                                self.skipped["microbatches < pp: a schedule needs at least as many microbatches as stages"] += 1
                                continue
                            yield tp, int(sp), cp, ulysses, pp, dp, ep, etp, mb

    def _contexts(self, tp: int, sp: bool, rest: int) -> Iterator[tuple[int, int]]:
        seq, tokens = self.graph.seq, tp if sp else 1
        heads, kv_heads = (h // tp for h in self.heads)
        for cp in self._degrees("cp", rest):
            if cp == 1:
                yield 1, 0
                continue
            if self.no_context:
                self.skipped[f"cp={cp}: {self.no_context}"] += 1
                continue
            for kind in self._names("cp_kind", ("ring", "ulysses")):
                parts = cp * tokens * (2 if kind == "ring" else 1)
                if seq % parts:
                    self.skipped[f"cp={cp} ({kind}): a sequence of {seq} is not divisible by {parts}"] += 1
                elif seq == cp:
                    self.skipped[f"cp={cp} ({kind}): attention of one token on each rank is not told apart from decoding"] += 1
                elif kind == "ulysses" and (heads % cp or kv_heads % cp):
                    self.skipped[f"cp={cp} (ulysses): {heads} heads and {max(kv_heads, 1)} key-value heads of a rank are not divisible by {cp}"] += 1
                else:
                    yield cp, int(kind == "ulysses")

    def _expert_degrees(self, tp: int, stage: int) -> Iterator[tuple[int, int]]:
        if not self.moe:
            if self.fixed.get("ep", 1) == 1 and self.fixed.get("etp", 1) == 1:
                yield 1, 1
            else:
                self.skipped[f"ep={self.fixed.get('ep', 1)}: the model has no experts that can be told apart"] += 1
            return
        experts, inner = self.moe
        for ep in self._degrees("ep", experts):
            for etp in self._degrees("etp", inner):
                why = self._no_experts(tp > 1, ep, etp)
                if why:
                    self.skipped[f"ep={ep} etp={etp}: {why}"] += 1
                    continue
                if stage % (ep * etp) == 0 and etp <= max(MOST_ETP, self.fixed.get("etp", 1)):
                    yield ep, etp

    # -- details

    def details(self, *, pp: int, dp: int, cp: int, tp: int, sp: bool, edp: int, microbatches: int) -> Details:
        """Every choice of details for some degrees."""
        return Details(self._zero(dp, cp, edp), self._pipelines(pp, microbatches), self._rest(tp, bool(sp)))

    def _zero(self, dp: int, cp: int, edp: int) -> np.ndarray:
        found = []
        for zero in range(4):
            if self.fixed.get("zero", zero) != zero or (zero and dp * cp == 1):
                continue
            for r in self._degrees("replicas", dp) if zero else [1] if self.fixed.get("replicas", 1) == 1 else []:
                if r == 1 or (r < dp * cp and edp % r == 0):
                    found.append((zero, r))
        return np.array(found, np.int64).reshape(-1, 2)

    def _pipelines(self, pp: int, microbatches: int) -> np.ndarray:
        return np.array(self.schedules(pp, microbatches), np.int64).reshape(-1, 2)

    def _rest(self, tp: int, sp: bool) -> np.ndarray:
        state = [STATE_DTYPES.index(self.fixed.get("state_dtype", "fp32"))]  # half the state changes what is computed: only where asked
        offload = [OFFLOADS.index(o) for o in self._names("offload", OFFLOADS) if o == "none" or self.cluster.host is not None]
        return np.array([(a, b, c) for a in self._losses(tp, sp) for b in state for c in offload], np.int64).reshape(-1, 3)

    def _losses(self, tp: int, sp: bool) -> list[int]:
        """The loss is on shards of the classes where the sharding has it so; else whole, at once or in chunks."""
        divided = uses_vocab_parallel_loss(self.shardings[tp, sp])
        if self.fixed.get("loss") == "chunked" and self.no_chunked_loss:
            self.skipped[f"loss=chunked: {self.no_chunked_loss}"] += 1
        plain = ("plain", "chunked") if tp == 1 and not self.no_chunked_loss else ("plain",)
        return [LOSSES.index(n) for n in self._names("loss", ("vocab_parallel",) if divided else plain)]

    def schedules(self, pp: int, microbatches: int) -> list[tuple[int, int]]:
        """(schedule, chunks of a rank) that so many stages and microbatches may have. GPipe takes as long as 1F1B and holds more: only where
        it is asked for."""
        vpp, out = self.fixed.get("vpp"), []
        if pp == 1:
            return [(0, 1)] if vpp in (None, 1) and self.fixed.get("schedule", "1f1b") in ("1f1b", "gpipe") else []
        layers = len(self.graph.layers)
        for name in self._names("schedule", SCHEDULES):
            if name in ASKED and self.fixed.get("schedule") != name:
                continue
            if name in SPLIT and self.fixed.get("recompute", "none") not in ("none", "by stage"):
                self.skipped[f"schedule={name}: {NO_RECOMPUTE}"] += 1
                continue
            if name in SPLIT and (self.fixed.get("zero") or 0) >= 2:
                self.skipped[f"schedule={name}: {NO_SHARDED_GRADIENTS}"] += 1
                continue
            s = schedules.find(name)
            for v in range(s.vpp[0], min(s.vpp[1] or MOST_CHUNKS, MOST_CHUNKS) + 1):
                if vpp not in (None, v) or pp * v > layers:
                    continue
                if microbatches < s.least(pp) or (s.shape == "loop" and s.rounds and v > 1 and microbatches % pp):
                    continue
                out.append((SCHEDULES.index(name), v))
        return out

    def details_of(self, x: Layouts) -> tuple[list[Details], np.ndarray]:
        """The details of each row of degrees: distinct ones, and which a row has."""
        key = np.stack([x.pp, x.dp, x.cp, x.tp, x.sp, x.edp, x.microbatches], axis=1)
        unique, which = np.unique(key, axis=0, return_inverse=True)
        names = ("pp", "dp", "cp", "tp", "sp", "edp", "microbatches")
        return [self.details(**{k: int(v) for k, v in zip(names, row)}) for row in unique], which.ravel()  # type: ignore[arg-type]

    # -- one by one

    def layouts(self) -> Iterator[Layout]:
        """Every layout, one by one, for spaces that are small enough; `recompute` is left as "none"."""
        details, which = self.details_of(self.degrees)
        for i in range(len(self.degrees)):
            row = self.degrees.take(slice(i, i + 1))
            d = details[which[i]]
            for zero, replicas in d.sharding:
                for schedule, vpp in d.schedule:
                    for loss, state, offload in d.rest if runs_together(zero, schedule) else ():
                        full = row.with_columns(**{k: np.array([v]) for k, v in zip(
                            ("zero", "replicas", "schedule", "vpp", "loss", "state", "offload"), (zero, replicas, schedule, vpp, loss, state, offload)
                        )})  # fmt: skip
                        yield layout_of(full, 0)

    def nothing(self) -> str:
        """Why the space is empty."""
        w, n = self.workload, self.cluster.size
        reasons = [r for r, _ in self.skipped.most_common()]
        wanted = ", ".join(f"{k}={v}" for k, v in self.fixed.items())
        if wanted:
            heads = tuple(f"{k}={v}" for k, v in self.fixed.items())
            named = [r for r in reasons if r.startswith(heads)] or [r for r in reasons if r.startswith("microbatches") and "pp" in self.fixed]
            why = named[0].removeprefix(f"{wanted}: ") if named else f"no degrees divide {n} devices and a global batch of {w.global_batch} that way"
            return f"no layout of {n} devices has {wanted}: {why}"
        return f"no layout of {n} devices is possible: {reasons[0] if reasons else 'nothing divides'}"


def layout_of(x: Layouts, i: int, recompute: str = "none") -> Layout:
    """Row i as a Layout."""
    v = {name: int(getattr(x, name)[i]) for name in Layouts.__dataclass_fields__}
    return Layout(
        tp=v["tp"], sp=bool(v["sp"]), cp=v["cp"], cp_kind=CHOICES["cp_kind"][v["ulysses"]], pp=v["pp"], vpp=v["vpp"], dp=v["dp"],  # type: ignore[arg-type]
        zero=v["zero"], replicas=v["replicas"], ep=v["ep"], etp=v["etp"], micro_batch=v["micro_batch"], recompute=recompute,  # type: ignore[arg-type]
        schedule=SCHEDULES[v["schedule"]], loss=LOSSES[v["loss"]], state_dtype=STATE_DTYPES[v["state"]], offload=OFFLOADS[v["offload"]],  # type: ignore[arg-type]
    )  # fmt: skip


def to_arrays(layouts: list[Layout], workload: Workload) -> Layouts:
    """Layouts as the cost model's arrays."""

    def column(f: Any) -> np.ndarray:
        return np.array([f(x) for x in layouts], np.int64)

    same = ("tp", "sp", "cp", "pp", "dp", "ep", "etp", "micro_batch", "zero", "replicas", "vpp")
    return Layouts.of(
        **{k: column(lambda x, k=k: int(getattr(x, k))) for k in same},
        ulysses=column(lambda x: int(x.cp_kind == "ulysses")), schedule=column(lambda x: SCHEDULES.index(x.schedule)),
        microbatches=column(lambda x: workload.global_batch // (x.dp * x.micro_batch)), loss=column(lambda x: LOSSES.index(x.loss)),
        state=column(lambda x: STATE_DTYPES.index(x.state_dtype)), offload=column(lambda x: OFFLOADS.index(x.offload)),
    )  # fmt: skip


__all__ = ["CHOICES", "FIXABLE", "Details", "Space", "divisors", "held_of", "layout_of", "parse_fix", "to_arrays"]
