"""Why this plan and not another: where its time goes, what each other choice would cost, what would make a model fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.planner.plan import Layout, WhyNot
from meshwright.planner.search import Candidate, Search

GIB = 2**30

WORDS = {
    "forward": "forward", "backward": "backward", "recompute": "recompute", "tensor_parallel": "TP collectives",
    "data_parallel": "DP traffic", "accumulation": "gradient accumulation",
    "pipeline_transfers": "pipeline transfers", "pipeline_bubble": "pipeline bubble",
    "reduce_and_gather": "gradient reduction", "optimizer": "optimizer",
}  # fmt: skip


def time_parts(search: Search, candidate: Candidate) -> dict[str, float]:
    """Seconds of a step by cause: the slowest stage's own work, the bubble around it, and what happens once.

    The parts add up to the candidate's step.
    """
    i, ends = candidate.index, list(candidate.ends)
    costs = search.stages(i).costs(ends)
    m = int(search.arrays.microbatches[i])
    slowest = max(range(len(costs)), key=lambda s: costs[s].c)
    blocks = search.stage_blocks(ends, slowest)
    parts = {name: m * float(values[i, blocks].sum()) for name, values in search.priced.parts.items()}
    sends = (slowest > 0) + (slowest < len(costs) - 1)
    parts["pipeline_transfers"] = m * sends * float(search.priced.send[i])
    parts["pipeline_bubble"] = sum(x.c for s, x in enumerate(costs) if s != slowest)
    last = max(range(len(costs)), key=lambda s: costs[s].e)
    optimizer = float(search.priced.optimizer[i, search.stage_blocks(ends, last)].sum())
    parts["reduce_and_gather"] = costs[last].e - optimizer
    parts["optimizer"] = optimizer
    total = sum(parts.values())
    return {k: v for k, v in parts.items() if v > 1e-9 * total}


def memory_parts(search: Search, i: int, ends: Sequence[int], stage: int) -> dict[str, float]:
    """Bytes of a stage at its peak by category, with what the device reserves before the first tensor."""
    parts = search.memory_of(i, ends, stage)[2]
    live = sum(parts.values())
    parts = {**parts, "reserved": search.reserved_bytes(i, live)[0] - live}
    return {k: v for k, v in parts.items() if v > 0}


def bottleneck(parts: dict[str, float]) -> str:
    """What a step loses most to besides forward and backward, if it loses a tenth."""
    total = sum(parts.values())
    name, seconds = max(((k, v) for k, v in parts.items() if k not in ("forward", "backward")), key=lambda x: x[1], default=("", 0.0))
    return f"{WORDS[name]} {seconds / total:.0%}" if total and seconds >= 0.1 * total else "compute"


@dataclass(frozen=True)
class _Question:
    text: str
    rows: np.ndarray


def why_not(search: Search, best: Candidate, most: int = 6) -> list[WhyNot]:
    """For each choice of the best layout, the best layout that chooses otherwise."""
    answers = []
    for q in _questions(search, best.layout):
        if len(q.rows):
            answers.append(answer(search, best, q.text, q.rows))
    skipped = [
        WhyNot(fix=reason.partition(": ")[0], fits=False, reason=reason.partition(": ")[2])
        for reason in search.space.skipped
        if not reason.partition(": ")[0].endswith("with sp")
    ]
    # the dearest refusals first, then what was never possible
    answers.sort(key=lambda a: (a.fits, -(a.slower or 0.0)))
    return [*answers[:most], *skipped[:2]]


def _questions(search: Search, chosen: Layout) -> list[_Question]:
    a = search.arrays

    def rows(**want: Any) -> np.ndarray:
        keep = np.ones(len(a), bool)
        for key, value in want.items():
            keep &= np.array([getattr(x, key) == value for x in search.layouts])
        return np.flatnonzero(keep)

    out = []
    for key in ("tp", "pp"):
        values = sorted({getattr(x, key) for x in search.layouts})
        at = values.index(getattr(chosen, key))
        for value in {values[0], values[max(at - 1, 0)], values[min(at + 1, len(values) - 1)]} - {values[at]}:
            out.append(_Question(f"{key}={value}", rows(**{key: value})))
    for zero in range(4):
        if zero != chosen.zero and chosen.dp > 1:
            out.append(_Question(f"zero={zero}", rows(zero=zero, tp=chosen.tp, pp=chosen.pp)))
    for recompute in ("none", "selective", "full"):
        if recompute != chosen.recompute:
            out.append(_Question(f"recompute={recompute}", rows(recompute=recompute)))
    for factor in (2, 0.5):
        wanted = int(chosen.micro_batch * factor)
        if wanted >= 1 and wanted != chosen.micro_batch:
            out.append(_Question(f"micro_batch={wanted}", rows(micro_batch=wanted, tp=chosen.tp, pp=chosen.pp)))
    if chosen.tp > 1:
        out.append(_Question(f"sp={'off' if chosen.sp else 'on'}", rows(sp=not chosen.sp, tp=chosen.tp)))
    return out


def answer(search: Search, best: Candidate, fix: str, rows: np.ndarray) -> WhyNot:
    """The price of the best layout among `rows` against `best`, or why none of them fits."""
    found = search.run(1, among=rows).best
    if not found:
        i, live, ends = search.least_memory(rows)
        return WhyNot(fix=fix, fits=False, reason=does_not_fit(search, i, live, ends))
    other = found[0]
    slower = other.step_s / best.step_s - 1
    return WhyNot(fix=fix, fits=True, step_s=other.step_s, slower=slower, reason=difference(search, best, other))


def enough_memory(needed: float, limit: float, capacity: float) -> str:
    """What to change for `needed` bytes (p95): the limit, where the devices have so much, or else the devices, with the same share allowed."""
    if needed <= 0.95 * capacity:
        return f"limit of {np.ceil(10 * needed / GIB) / 10:.1f} GiB instead of {limit / GIB:.1f} GiB"
    return f"devices of {np.ceil(needed * capacity / limit / GIB):.0f} GiB instead of {capacity / GIB:.0f} GiB"


def does_not_fit(search: Search, i: int, live: float, ends: list[int]) -> str:
    """ "91.2 GiB at best (activations 38.0, optimizer 12.1), with tp=8 ..." for the least hungry of some layouts."""
    costs = search.stages(i).costs(ends)
    fullest = max(range(len(costs)), key=lambda s: costs[s].live_bytes)
    parts = sorted(memory_parts(search, i, ends, fullest).items(), key=lambda x: -x[1])[:2]
    largest = ", ".join(f"{k} {v / GIB:.1f}" for k, v in parts)
    _, p95 = search.reserved_bytes(i, live)
    return f"needs {p95 / GIB:.1f} GiB at best ({largest}), with {search.layouts[i]}"


def _value(choice: Any) -> Any:
    return ("off", "on")[choice] if isinstance(choice, bool) else choice


def difference(search: Search, best: Candidate, other: Candidate) -> str:
    """What another layout spends more on than the best one."""
    ours, theirs = time_parts(search, best), time_parts(search, other)
    more = {k: theirs.get(k, 0.0) - ours.get(k, 0.0) for k in {*ours, *theirs}}
    name, seconds = max(more.items(), key=lambda x: (x[1], x[0]))
    changed = [
        f"{k}={_value(getattr(other.layout, k))}"
        for k in ("tp", "sp", "pp", "dp", "zero", "micro_batch", "recompute")
        if getattr(other.layout, k) != getattr(best.layout, k)
    ]
    spent = f"+{seconds:.3g} s of {WORDS[name]}" if seconds > 0 else "the same within rounding"
    return f"{spent}, with {' '.join(changed)}" if changed else spent
