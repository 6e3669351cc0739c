"""Which layouts exist: every divisor degree that the model, the batch and the cluster allow, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from meshwright.costmodel.model import CostModel
from meshwright.costmodel.sharded import ShardedBlock
from meshwright.costmodel.step import RECOMPUTE, SCHEDULES, Layouts
from meshwright.planner.plan import Layout, Workload
from meshwright.planner.shardedmodel import shard_model
from meshwright.planner.sharding import NotShardable
from meshwright.profiling.cluster import Cluster
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelGraph

FIXABLE = {"tp": int, "sp": bool, "pp": int, "dp": int, "zero": int, "micro_batch": int, "recompute": str, "schedule": str}
_ALIASES = {"mb": "micro_batch", "microbatch": "micro_batch", "remat": "recompute"}


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
    if key == "recompute":
        if value not in RECOMPUTE:
            raise InputError(f"--fix recompute={value}: it is one of {', '.join(RECOMPUTE)}")
        return value
    if key == "schedule":
        if value not in SCHEDULES:
            raise InputError(f"--fix schedule={value}: it is one of {', '.join(SCHEDULES)}")
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


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


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

    def __post_init__(self) -> None:
        for tp in self._degrees("tp", self.cluster.size):
            for sp in (False, True) if tp > 1 else (False,):
                if self.fixed.get("sp", sp) == sp:
                    self._shard(tp, sp)

    def _degrees(self, key: str, of: int) -> list[int]:
        return [d for d in divisors(of) if self.fixed.get(key, d) == d]

    def _shard(self, tp: int, sp: bool) -> None:
        try:
            self.shardings[tp, sp] = shard_model(self.graph, tp, sp)
        except NotShardable as e:
            self.skipped[f"tp={tp}{' with sp' if sp else ''}: {e}"] += 1

    def enumerate(self) -> Iterator[Layout]:
        """Every layout, in a fixed order."""
        layers = len(self.graph.layers)
        for tp, sp in self.shardings:
            rest = self.cluster.size // tp
            for pp in self._degrees("pp", rest):
                dp = rest // pp
                if self.fixed.get("dp", dp) != dp:
                    continue
                if pp > 1 and self.graph.program is None:
                    self.skipped[f"pp={pp}: {self.graph.no_program}"] += 1
                    continue
                if pp > max(layers, 1):
                    self.skipped[f"pp={pp}: the model has {layers} layers"] += 1
                    continue
                if self.workload.global_batch % dp:
                    self.skipped[f"dp={dp}: it does not divide the global batch {self.workload.global_batch}"] += 1
                    continue
                yield from self._inner(tp, sp, pp, dp, layers)

    def _inner(self, tp: int, sp: bool, pp: int, dp: int, layers: int) -> Iterator[Layout]:
        zeros = [z for z in (range(4) if dp > 1 else (0,)) if self.fixed.get("zero", z) == z]
        recomputes = [r for r in (RECOMPUTE if layers else ("none",)) if self.fixed.get("recompute", r) == r]
        for micro_batch in self._degrees("micro_batch", self.workload.global_batch // dp):
            if self.workload.global_batch // (dp * micro_batch) < pp:
                self.skipped["microbatches < pp: a schedule needs at least as many microbatches as stages"] += 1
                continue
            for zero in zeros:
                for recompute in recomputes:
                    yield Layout(
                        tp=tp, sp=sp, pp=pp, dp=dp, zero=zero, micro_batch=micro_batch, recompute=recompute,  # type: ignore[arg-type]
                        schedule=self.fixed.get("schedule", "1f1b"),
                    )  # fmt: skip

    def layouts(self) -> list[Layout]:
        """All layouts; InputError, with the reason that excluded most, if there is none."""
        found = list(self.enumerate())
        if found:
            return found
        w, n = self.workload, self.cluster.size
        reasons = [r for r, _ in self.skipped.most_common()]
        wanted = ", ".join(f"{k}={v}" for k, v in self.fixed.items())
        if wanted:
            heads = tuple(f"{k}={v}" for k, v in self.fixed.items())
            named = [r for r in reasons if r.startswith(heads)] or [r for r in reasons if r.startswith("microbatches") and "pp" in self.fixed]
            why = named[0].removeprefix(f"{wanted}: ") if named else f"no degrees divide {n} devices and a global batch of {w.global_batch} that way"
            raise InputError(f"no layout of {n} devices has {wanted}: {why}")
        raise InputError(f"no layout of {n} devices is possible: {reasons[0] if reasons else 'nothing divides'}")


def to_arrays(layouts: list[Layout], workload: Workload) -> Layouts:
    """Layouts as the cost model's arrays."""

    def column(f: Any) -> np.ndarray:
        return np.array([f(x) for x in layouts])

    return Layouts(
        tp=column(lambda x: x.tp), sp=column(lambda x: int(x.sp)), pp=column(lambda x: x.pp), dp=column(lambda x: x.dp),
        zero=column(lambda x: x.zero), micro_batch=column(lambda x: x.micro_batch),
        microbatches=column(lambda x: workload.global_batch // (x.dp * x.micro_batch)),
        recompute=column(lambda x: RECOMPUTE.index(x.recompute)), schedule=column(lambda x: SCHEDULES.index(x.schedule)),
    )  # fmt: skip
