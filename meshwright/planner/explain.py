"""Why this plan and not another: where its time goes, what each other choice would cost, what would make a model fit."""

from __future__ import annotations

from typing import Any

import numpy as np

from meshwright.costmodel.layouts import RECOMPUTE
from meshwright.planner.leastmemory import Need, least_memory
from meshwright.planner.plan import Layout, WhyNot
from meshwright.planner.search import Candidate, Search
from meshwright.profiling.errors import InputError

GIB = 2**30
LARGE = 150_000  # layouts that a question in the plan may search; `explain --why-not` searches all

WORDS = {
    "forward": "forward", "backward": "backward", "recompute": "recompute", "tensor_parallel": "TP collectives",
    "data_parallel": "DP traffic", "accumulation": "gradient accumulation",
    "context_parallel": "CP exchange", "expert_parallel": "expert all-to-all", "mixed_devices": "unlike devices in a stage",
    "pipeline_transfers": "pipeline transfers", "pipeline_bubble": "pipeline bubble",
    "reduce_and_gather": "gradient reduction", "optimizer": "optimizer",
}  # fmt: skip


def time_parts(search: Search, c: Candidate) -> dict[str, float]:
    """Seconds of a step by cause: the slowest rank's own work, the bubble around it, and what happens once.

    The parts add up to the candidate's step.
    """
    p, costs, m = search.priced(c), c.cut.costs, int(c.row.microbatches[0])
    slowest = max(range(len(costs)), key=lambda s: costs[s].c)
    blocks, modes = search.rank_blocks(c, slowest)

    def on(rank: int, values: np.ndarray, of: np.ndarray) -> float:
        """Seconds of these blocks on the slowest device of a rank."""
        return float(values[search.device_type(c, rank)][:, of].sum(axis=1).max())

    # the kind of device that decides: its parts, so that they add up
    kinds = search.device_type(c, slowest)
    total = [(p.c[k, 0, blocks] + p.again[k, 0, modes, blocks]).sum() for k in kinds]
    kind = kinds[int(np.argmax(total))]
    parts = {name: m * float(values[kind, 0, blocks].sum()) for name, values in p.parts.items()}
    parts["recompute"] = m * float(p.again[kind, 0, modes, blocks].sum())
    parts["pipeline_transfers"] = m * search.sides(c, slowest) * float(p.send[0])
    parts["pipeline_bubble"] = float(p.ratio[0]) * (sum(x.c for x in costs) - costs[slowest].c)
    last = max(range(len(costs)), key=lambda s: costs[s].e)
    optimizer = min(on(last, p.optimizer[:, 0], search.rank_blocks(c, last)[0]), costs[last].e)
    parts["reduce_and_gather"] = costs[last].e - optimizer
    parts["optimizer"] = optimizer
    # a stage of unlike devices takes the slowest of each block
    parts["mixed_devices"] = c.step_s - sum(parts.values())
    return {k: v for k, v in parts.items() if v > 1e-9 * c.step_s}


def memory_parts(search: Search, c: Candidate, rank: int) -> dict[str, float]:
    """Bytes of a rank at its peak by category, with what the device reserves before the first tensor."""
    parts = search.memory_of(c, rank)[2]
    live = sum(parts.values())
    parts = {**parts, "reserved": search.reserved_bytes(c.row, live)[0] - live}
    return {k: v for k, v in parts.items() if v > 0}


def bottleneck(parts: dict[str, float]) -> str:
    """What a step loses most to besides forward and backward, if it loses a tenth."""
    total = sum(parts.values())
    name, seconds = max(((k, v) for k, v in parts.items() if k not in ("forward", "backward")), key=lambda x: x[1], default=("", 0.0))
    return f"{WORDS[name]} {seconds / total:.0%}" if total and seconds >= 0.1 * total else "compute"


def why_not(search: Search, best: Candidate, most: int = 6) -> list[WhyNot]:
    """For choices of the best layout, the best layout that chooses otherwise."""
    answers = []
    for fix in _questions(search, best.layout):
        found = answer(search, best, fix)
        if found is not None:
            answers.append(found)
    skipped = [
        WhyNot(fix=reason.partition(": ")[0], fits=False, reason=reason.partition(": ")[2])
        for reason in search.space.skipped
        if not reason.partition(": ")[0].endswith("with sp") and reason.startswith("tp=")
    ]
    # the dearest refusals first, then what was never possible
    answers.sort(key=lambda a: (a.fits, -(a.slower or 0.0)))
    return [*answers[:most], *skipped[:2]]


def _questions(search: Search, chosen: Layout) -> list[dict[str, Any]]:
    """Choices to hold instead: the neighbours of a degree and its least, the other ZeRO stages and recomputes, half and twice the microbatch."""
    out: list[dict[str, Any]] = []
    for key in ("tp", "pp", "cp", "ep"):
        values = sorted({int(v) for v in getattr(search.degrees, key)})
        at = values.index(getattr(chosen, key))
        near = {values[max(at - 1, 0)], values[min(at + 1, len(values) - 1)], *([values[0]] if key in ("tp", "pp") else [])}
        out += [{key: value} for value in sorted(near - {values[at]})]
    if chosen.dp * chosen.cp > 1:
        out += [{"zero": zero, "tp": chosen.tp, "pp": chosen.pp} for zero in range(4) if zero != chosen.zero]
    out += [{"recompute": r} for r in RECOMPUTE if r != chosen.recompute and search.space.graph.layers]
    out += [{"micro_batch": int(chosen.micro_batch * f), "tp": chosen.tp, "pp": chosen.pp} for f in (2, 0.5) if chosen.micro_batch * f >= 1]
    if chosen.tp > 1:
        out.append({"sp": not chosen.sp, "tp": chosen.tp})
    if chosen.pp > 1 and chosen.schedule != "1f1b":
        out.append({"schedule": "1f1b", "pp": chosen.pp})
    asked = [q for q in out if all(search.space.fixed.get(k, v) == v for k, v in q.items())]
    return asked if search.size <= 10 * LARGE else asked[:8]


def answer(search: Search, best: Candidate, fix: dict[str, Any]) -> WhyNot | None:
    """The price of the best layout with `fix` held against `best`, or why none of them fits; None if the space has none."""
    name, among = _words(fix, best.layout), ""
    try:
        held = search.holding(fix)
        more: dict[str, Any] = {}
        for key in (*(("ep", "etp") if search.space.moe else ()), "cp", "micro_batch"):  # of a large space a part, which the answer says
            if held.size <= LARGE:
                break
            if key not in fix:
                more[key] = getattr(best.layout, key)
                held = search.holding({**fix, **more})
        held_too = {**dict(list(fix.items())[1:]), **more}
        among = f", among layouts with {' '.join(f'{k}={v}' for k, v in held_too.items())}" if held_too else ""
    except InputError:
        return None
    found = held.run(1).best
    if not found:
        return WhyNot(fix=name, fits=False, reason=does_not_fit(held, held.least_memory()[1]) + among)
    other = found[0]
    return WhyNot(fix=name, fits=True, step_s=other.step_s, slower=other.step_s / best.step_s - 1, reason=difference(search, best, other) + among)


def why_not_memory(search: Search, best: Need, most: int = 6) -> list[WhyNot]:
    """For choices of the layout that needs least memory, what the others need at least, dearest first."""
    found = []
    for fix in _questions(search, best.candidate.layout):
        try:
            other = least_memory(search.holding(fix)).best[0]
        except InputError:
            continue
        fits = other.bytes <= search.limit_bytes
        more = f"{(other.bytes - best.bytes) / GIB:.2f} GiB more" if other.bytes > best.bytes * (1 + 1e-6) else "no more bytes"
        told = f"{more}: {other.bytes / GIB:.2f} GiB at best (p95) and {other.candidate.step_s:.3g} s a step, with {other.candidate.layout}"
        told = told if fits else f"does not fit: {told}"
        answered = WhyNot(fix=_words(fix, best.candidate.layout), fits=fits, step_s=other.candidate.step_s if fits else None, reason=told)
        found.append((other.bytes, answered))
    return [w for _, w in sorted(found, key=lambda x: -x[0])][:most]


def _words(fix: dict[str, Any], chosen: Layout) -> str:
    """The first choice is the question; what is held beside it is as chosen."""
    key, value = next(iter(fix.items()))
    return f"{key}={_value(value)}"


def enough_memory(needed: float, limit: float, capacity: float) -> str:
    """What to change for `needed` bytes (p95): the limit, where the devices have so much, or else the devices, with the same share allowed."""
    if needed <= 0.95 * capacity:
        return f"limit of {np.ceil(10 * needed / GIB) / 10:.1f} GiB instead of {limit / GIB:.1f} GiB"
    return f"devices of {np.ceil(needed * capacity / limit / GIB):.0f} GiB instead of {capacity / GIB:.0f} GiB"


def does_not_fit(search: Search, least: Candidate) -> str:
    """ "needs 91.2 GiB at best (activations 38.0, optimizer 12.1), with tp=8 ..." for the least hungry of some layouts."""
    parts = sorted(memory_parts(search, least, least.fullest).items(), key=lambda x: -x[1])[:2]
    largest = ", ".join(f"{k} {v / GIB:.1f}" for k, v in parts)
    _, p95 = search.reserved_bytes(least.row, least.live_bytes)
    return f"needs {p95 / GIB:.1f} GiB at best ({largest}), with {least.layout}"


def _value(choice: Any) -> Any:
    return ("off", "on")[choice] if isinstance(choice, bool) else choice


def difference(search: Search, best: Candidate, other: Candidate) -> str:
    """What another layout spends more on than the best one."""
    ours, theirs = time_parts(search, best), time_parts(search, other)
    more = {k: theirs.get(k, 0.0) - ours.get(k, 0.0) for k in {*ours, *theirs}}
    name, seconds = max(more.items(), key=lambda x: (x[1], x[0]))
    changed = [
        f"{k}={_value(getattr(other.layout, k))}"
        for k in Layout.model_fields
        if getattr(other.layout, k) != getattr(best.layout, k)
    ]
    spent = f"+{seconds:.3g} s of {WORDS[name]}" if seconds > 0 else "the same within rounding"
    return f"{spent}, with {' '.join(changed)}" if changed else spent
