"""Pipeline schedules: the closed form that the search uses, and an event-by-event simulation of the same schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Event:
    """One forward or backward of one microbatch on one stage."""

    stage: int
    microbatch: int
    kind: Literal["F", "B"]
    start_s: float
    end_s: float


def order_1f1b(stages: int, stage: int, microbatches: int) -> list[tuple[Literal["F", "B"], int]]:
    """What one stage does, in order (Narayanan et al. 2019): warm up, one forward one backward, drain."""
    warm = min(microbatches, stages - stage - 1)
    todo: list[tuple[Literal["F", "B"], int]] = [("F", i) for i in range(warm)]
    for i in range(microbatches - warm):
        todo += [("F", warm + i), ("B", i)]
    return todo + [("B", i) for i in range(microbatches - warm, microbatches)]


def simulate(forward_s: Sequence[float], backward_s: Sequence[float], send_s: float, microbatches: int) -> list[Event]:
    """The events of one step of 1F1B, in order of their start.

    `forward_s` and `backward_s` are seconds per stage and microbatch, `send_s` of one transfer to a neighbour. Transfers
    are not overlapped: torch's schedule waits for them between computations.
    """
    p = len(forward_s)
    queues = [order_1f1b(p, s, microbatches) for s in range(p)]
    position = [0] * p
    free = [0.0] * p
    done: dict[tuple[str, int, int], float] = {}
    events: list[Event] = []
    remaining = sum(len(q) for q in queues)
    while remaining:
        advanced = False
        for s in range(p):
            while position[s] < len(queues[s]):
                kind, i = queues[s][position[s]]
                if kind == "F":
                    ready = 0.0 if s == 0 else done.get(("F", s - 1, i))
                    took = forward_s[s] + (send_s if s < p - 1 else 0.0)
                else:
                    ready = done.get(("F", s, i)) if s == p - 1 else done.get(("B", s + 1, i))
                    took = backward_s[s] + (send_s if s > 0 else 0.0)
                if ready is None:
                    break
                start = max(free[s], ready)
                free[s] = done[kind, s, i] = start + took
                events.append(Event(s, i, kind, start, start + took))
                position[s] += 1
                remaining -= 1
                advanced = True
        if not advanced:
            raise RuntimeError("the schedule waits for itself")
    return sorted(events, key=lambda e: (e.start_s, e.stage))


def makespan(events: Sequence[Event]) -> float:
    return max(e.end_s for e in events)


def step_1f1b(stage_s: np.ndarray, microbatches: np.ndarray | int) -> np.ndarray:
    """Seconds of 1F1B from each stage's forward plus backward (transfers included): the slowest stage runs `microbatches`
    times, the others fill and drain once. Exact for equal stages: (m + p - 1)(F + B). stage_s [..., stages] -> [...]"""
    return np.asarray((np.asarray(microbatches) - 1) * stage_s.max(-1) + stage_s.sum(-1))


def in_flight(stages: int, stage: int, microbatches: int) -> int:
    """Microbatches whose activations a stage holds at its peak under 1F1B."""
    return min(microbatches, stages - stage)
