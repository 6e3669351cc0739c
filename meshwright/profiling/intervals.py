"""Sets of times as sorted lists of intervals that do not touch, in seconds."""

from __future__ import annotations

from collections.abc import Iterable

Intervals = list[tuple[float, float]]


def union(spans: Iterable[tuple[float, float]]) -> Intervals:
    """All times in any of the spans, in whatever order they come."""
    out: Intervals = []
    for a, b in sorted(spans):
        if b <= a:
            continue
        if out and a <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], b))
        else:
            out.append((a, b))
    return out


def subtract(these: Intervals, those: Intervals) -> Intervals:
    """Times in `these` and not in `those`."""
    out: Intervals = []
    at = 0
    for a, b in these:
        while at < len(those) and those[at][1] <= a:
            at += 1
        i = at
        while a < b:
            if i == len(those) or those[i][0] >= b:
                out.append((a, b))
                break
            if those[i][0] > a:
                out.append((a, those[i][0]))
            a = those[i][1]
            i += 1
    return out


def clip(these: Intervals, start: float, end: float) -> Intervals:
    """The part between two times."""
    return [(max(a, start), min(b, end)) for a, b in these if b > start and a < end]


def length(these: Intervals) -> float:
    """Seconds in all."""
    return sum(b - a for a, b in these)
