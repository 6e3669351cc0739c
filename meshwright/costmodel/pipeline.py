"""Pipeline schedules: the closed forms that the search uses, and an event-by-event simulation of the same schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from meshwright.costmodel.schedules import Kind, find, looped, orders, shape_of

Times = Sequence[float] | np.ndarray


@dataclass(frozen=True, slots=True)
class Event:
    """One action of one microbatch on one stage (a rank of the pipeline): F forward, B gradient of the input, W gradient of
    the weights, BW both; the B of `simulate` is both."""

    stage: int
    microbatch: int
    kind: Kind
    start_s: float
    end_s: float
    chunk: int = 0


def order_1f1b(stages: int, stage: int, microbatches: int) -> list[tuple[Literal["F", "B"], int]]:
    """What one stage does, in order (Narayanan et al. 2019): warm up, one forward one backward, drain."""
    return [("F" if x.kind == "F" else "B", x.microbatch) for x in looped(stages, microbatches, 1, 1, None)[stage]]


def simulate(forward_s: Sequence[float], backward_s: Sequence[float], send_s: float, microbatches: int) -> list[Event]:
    """The events of one step of 1F1B, in order of their start.

    `forward_s` and `backward_s` are seconds per stage and microbatch, `send_s` of one transfer to a neighbour. Transfers
    are not overlapped: torch's schedule waits for them between computations.
    """
    events = simulate_schedule("1F1B", forward_s, backward_s, [0.0] * len(forward_s), send_s, microbatches, overlap_send=False)
    return [replace(e, kind="B") if e.kind == "BW" else e for e in events]


def simulate_schedule(
    schedule: str,
    F: Times,
    B: Times,
    W: Times,
    send: float | Times,
    microbatches: int,
    vpp: int | None = None,
    overlap_send: bool = True,
) -> list[Event]:
    """The events of one step of a schedule, in order of their start.

    `F`, `B`, `W`: seconds of one microbatch in each virtual stage, in the model's order: stages * vpp of them (see
    schedules.py for which rank runs which). `send`: seconds of a transfer between virtual stages k and k + 1, either way, one
    number or one for each k; none within a rank. Overlapped, a transfer delays only who waits for it; else the sender too,
    as part of its event. `vpp` may be left out where the schedule has only one. ValueError: what the schedule cannot run.
    """
    s, n = find(schedule), len(F)
    if not n == len(B) == len(W):
        raise ValueError(f"F, B and W need one time per virtual stage each, not {n}, {len(B)} and {len(W)}")
    p, m, v = shape_of(schedule, n, microbatches, vpp)
    todo = orders(s.name, n if s.mirrored else p, microbatches, None if s.mirrored else v)
    stage = [[s.virtual_stage(p, r, c) for c in range(v)] for r in range(p)]
    rank = {k: r for r in range(p) for k in stage[r]}
    hop = _hops(send, [rank[k] for k in range(n)]).tolist()
    took = {"F": list(map(float, F)), "B": list(map(float, B)), "W": list(map(float, W))}
    took["BW"] = [b + w for b, w in zip(took["B"], took["W"])]

    # When an input is there: forwards of virtual stage k under k, backwards under n + k. None: not yet.
    there: list[list[float | None]] = [[None] * m for _ in range(2 * n + 1)]
    there[0] = [0.0] * m
    waits: list[tuple[int, int] | None] = [None] * p
    position, free, runnable = [0] * p, [0.0] * p, list(range(p - 1, -1, -1))
    events: list[Event] = []
    while runnable:
        r = runnable.pop()
        mine, at, now = todo[r], position[r], free[r]
        while at < len(mine):
            kind, i, chunk = mine[at]
            k = stage[r][chunk]
            start = now
            if kind != "W":
                ready = there[k if kind == "F" else n + k][i]
                if ready is None:
                    waits[r] = (k if kind == "F" else n + k, i)
                    break
                start = max(now, ready)
            now = start + took[kind][k]
            if kind != "W":
                # whom it feeds; the last forward feeds its own backward, the first backward nobody
                goal, edge = (k + 1 if k < n - 1 else n + k, k) if kind == "F" else (n + k - 1 if k else 2 * n, k - 1)
                there_at = now
                if 0 <= edge < n - 1:
                    there_at += hop[edge]
                    now = now if overlap_send else there_at
                there[goal][i] = there_at
                other = rank[goal % n] if goal < 2 * n else r
                if waits[other] == (goal, i) and other != r:
                    waits[other] = None
                    runnable.append(other)
            events.append(Event(r, i, kind, start, now, chunk))
            at += 1
        position[r], free[r] = at, now
    if len(events) < sum(map(len, todo)):
        raise RuntimeError(f"the order of {s.name} waits for itself: {p} stages, {m} microbatches, vpp {v}")
    return sorted(events, key=lambda e: (e.start_s, e.stage))


def _hops(send: float | Times, rank: list[int]) -> np.ndarray:
    """Seconds of the transfer behind each virtual stage but the last, [..., virtual stages - 1]; none within a rank."""
    given = np.asarray(send, float)
    apart = np.array([a != b for a, b in zip(rank, rank[1:])], float)
    if given.ndim and given.shape[-1] not in (1, len(apart)):
        raise ValueError(f"send needs one time, or one for each of the {len(apart)} borders, not {given.shape[-1]}")
    return np.where(apart > 0, given, 0.0)


def makespan(events: Sequence[Event]) -> float:
    """Seconds until all stages are done."""
    return max(e.end_s for e in events)


def longest_stage(events: Sequence[Event]) -> float:
    """Seconds from the first start to the last end of the stage where this is longest: the step where no stage waits for the
    others between steps, as under the post-validated optimizer of the zero-bubble papers (arXiv 2401.10241, section 4)."""
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for e in events:
        first[e.stage] = min(first.get(e.stage, e.start_s), e.start_s)
        last[e.stage] = max(last.get(e.stage, e.end_s), e.end_s)
    return max(last[r] - first[r] for r in last)


def peak_in_flight(events: Sequence[Event], held_until_w: float = 1.0) -> list[float]:
    """Microbatches whose activations each stage holds at its peak, a chunk counting 1 / vpp.

    Allocated as F starts. B frees all but the share `held_until_w`, which W frees; B frees all where the events have no W. The
    default is a whole: 16-bit transformers keep 32 of 34 bytes per token and channel until W (arXiv 2401.10241, section 2).
    """
    chunks = max(e.chunk for e in events) + 1
    kept = held_until_w if any(e.kind == "W" for e in events) else 0.0
    change = {"F": 1.0, "B": kept - 1.0, "W": -kept, "BW": -1.0}
    held, peak = [0.0] * (max(e.stage for e in events) + 1), [0.0] * (max(e.stage for e in events) + 1)
    for e in sorted(events, key=lambda e: e.start_s):
        held[e.stage] += change[e.kind]
        peak[e.stage] = max(peak[e.stage], held[e.stage])
    return [round(x / chunks, 9) for x in peak]


def step_1f1b(stage_s: np.ndarray, microbatches: np.ndarray | int) -> np.ndarray:
    """Seconds of 1F1B from each stage's forward plus backward (transfers included): the slowest stage runs `microbatches`
    times, the others fill and drain once. Exact for equal stages: (m + p - 1)(F + B). stage_s [..., stages] -> [...]"""
    return np.asarray((np.asarray(microbatches) - 1) * stage_s.max(-1) + stage_s.sum(-1))


def in_flight(stages: int, stage: int, microbatches: int) -> int:
    """Microbatches whose activations a stage holds at its peak under 1F1B."""
    return min(microbatches, stages - stage)


@dataclass(frozen=True)
class Ramp:
    """What a rank's idle time depends on: `p` ranks, `v` chunks, `m` microbatches, and the mean chunk of the *other* ranks: seconds `f`, `b`,
    `w`, and `d` of an overlapped transfer. Arrays broadcast to [..., ranks]."""

    p: int
    v: int
    m: np.ndarray
    f: np.ndarray
    b: np.ndarray
    w: np.ndarray
    d: np.ndarray


Forms = tuple[np.ndarray | float, ...]


# Idle seconds of a rank that is busy for m (F + B + W): the largest of these. Each form is one path through the schedule's graph. Those
# of the papers are named; the rest were read off the critical paths of the simulation, whose lengths are linear in F, B, W and d.
def _ramp_interleaved(x: Ramp) -> Forms:
    """Narayanan et al. 2021, section 2.2: (p - 1)(F + B) / v. Warm-up's two forwards per hop hide transfers that are shorter than
    half a chunk's F + B; longer ones show."""
    n, whole = x.p - 1, x.f + x.b + x.w
    fill = n * whole + 2 * (n + x.p * (x.v - 1)) * x.d
    return (fill + np.maximum(0, x.m * x.v - x.p) * np.maximum(0, n * (2 * x.d - whole) / (2 * x.p - 1)),)


def _ramp_looped_bfs(x: Ramp) -> Forms:
    """Lamy-Poirier 2022, section 4: (p - 1)(F + B) / v, where a rank has enough microbatches to be busy until the first is back."""
    there, back = x.f + x.d, x.b + x.w + x.d
    late = sum(np.maximum(0, x.p * (t + x.d) - x.m * t) for t in (x.f, x.b + x.w))
    return ((x.p - 1) * (there + back + 2 * x.d) + (x.v - 1) * late,)


def _ramp_zb1(x: Ramp) -> Forms:
    """Qi et al. 2023, table 1: (p - 1)(F + B - W), where that is more than F and than B alone. Transfers hide behind W."""
    n, late = x.p - 1, 2 * x.p * (x.v - 1) * x.d
    over = np.maximum(0, x.m * x.v - x.p) * np.maximum(0, 2 * x.d * n / x.p - x.w)
    return n * (x.f + x.b - x.w + 4 * x.d) + late + over, n * (x.b + 2 * x.d) + late + over, n * (x.f + 3 * x.d) + late + over


def _longest_zb1(x: Ramp) -> Forms:
    """Qi et al. 2023, table 1: (p - 1)(F + B - W), where that is more than B alone."""
    return _ramp_zb1(x)[:2]


def _ramp_zb2(x: Ramp) -> Forms:
    """Qi et al. 2023, table 1: (p - 1)(F + B - 2W), and the skew (p - 1)F of the stages where they wait for each other. For 2 p - 1
    microbatches or more; every two that are missing leave a gap of about one B."""
    n, short = x.p - 1, np.maximum(0, 2 * x.p - 1 - x.m)
    return n * (x.f + x.d) + short // 2 * x.b, n * (x.f + x.b - 2 * x.w + 2 * x.d), (n - short % 2) * x.f + (short + 1) // 2 * x.b


def _longest_zb2(x: Ramp) -> Forms:
    """Qi et al. 2023, table 1: (p - 1)(F + B - 2W), none where W is long enough."""
    n, short = x.p - 1, np.maximum(0, 2 * x.p - 1 - x.m)
    return n * (x.f + x.b - 2 * x.w + 2 * x.d), n * (x.b - x.f + x.d), short // 2 * x.b, 0 * x.f


def _ramp_zbv(x: Ramp) -> Forms:
    """Qi et al. 2023, section 6: the skew of p - 1 chunks alone, where F = B = W."""
    n, s = x.p - 1, np.maximum(0, 2 * x.p - 1 - x.m)  # short of 2p - 1 microbatches
    return (
        (n + s) * x.b - s * x.w + (5 * n - 2) * x.d, (1 + s) * x.b + (n - 1 - s) * x.w + 3 * n * x.d,
        (1 + s) * x.f + (n - 1 - s) * x.w + (3 * n - 2) * x.d, (2 * n - 1) * x.f - (n - 1) * x.b + (3 * n - 2) * x.d,
        2 * n * x.b - 2 * (n - s) * x.w + (6 * n - 2) * x.d, 2 * s * x.b + 4 * s * x.d, s * (x.f + x.b) + 4 * s * x.d,
        (n - 1) * x.f + x.b + (5 * n - 2) * x.d,
    )  # fmt: skip


def _longest_zbv(x: Ramp) -> Forms:
    """Qi et al. 2023, section 6: no bubble where F = B = W."""
    n, s = x.p - 1, np.maximum(0, 2 * x.p - 1 - x.m)
    return (
        2 * n * x.b - 2 * (n - s) * x.w + (6 * n - 2) * x.d, x.b - n * x.f + (n - 1) * x.w + 2 * n * x.d,
        n * (x.b - x.f) + 4 * n * x.d, (n - 1) * (x.w - x.f) + 2 * n * x.d, (n - 1) * (x.f - x.b) + 2 * n * x.d,
        (2 * n - 1) * x.f + x.b - 2 * n * x.w + 2 * n * x.d, 2 * s * x.b + 4 * s * x.d, s * (x.f + x.b) + 4 * s * x.d, 0 * x.f,
    )  # fmt: skip


def _ramp_dual(x: Ramp) -> Forms:
    """A forward beside a backward runs before it here, as torch runs them. Where the two run as one and hand over together, the
    bubble is DeepSeek's (p - 1)(F&B + B - 3W), B with its W (github.com/deepseek-ai/DualPipe): for F = B = W twice this."""
    n = x.p - 1
    return (
        n * (2 * x.b - x.w + 6 * x.d) - x.f, n * (x.f + 3 * x.d), n * (x.b + 5 * x.d) - x.f, n * (x.f + x.b - x.w + 4 * x.d),
    )  # fmt: skip


def _ramp_vhalf(x: Ramp) -> Forms:
    """Qi et al. 2024, section 3.3: half of 1F1B's bubble where F = B = W, and no bubble in between where W + 2F >= 2B; W
    fills gaps first, so that here B >= F is needed too."""
    p, m, even = x.p, x.m, 1 - x.p % 2
    d, more = 8 * (p - 1) * x.d, m * (2 * x.f - 2 * x.b + x.d)
    return (
        (p - 1 + 2 * even) * x.f + 3 * (p - 1) * x.b - (p + even) * x.w + d, (p + 2 * even) * x.f + (2 * p - 4 - even) * x.b + d,
        (p - 1 + 2 * even) * x.f + (2 * p - 2 - even) * x.b - x.w + d, more + (p - 2) * x.f + (2 * p - 2 + even) * x.b + d,
        more + (2 * p - 4) * x.f + (2 * p + even) * x.b - p * x.w + d,
        m * (2 * x.b - 2 * x.f - x.w) + (2 * p + 1 + even) * x.f + (2 * p - 6) * x.b - (p // 2 - 1) * x.w + d,
    )  # fmt: skip


def _ramp_vmin(x: Ramp) -> Forms:
    """Qi et al. 2024, section 3.3: two thirds of 1F1B's bubble where F = B = W, and in between six times the larger of F and B for
    every microbatch."""
    p, three, whole = x.p, x.p % 3 == 0, x.f + x.b + x.w
    d, last = 14 * (p - 1) * x.d, 2 * x.f if three else 0.0
    return (
        (1.5 * p - 1) * x.f + (3 * p - 4) * x.b - 0.5 * p * x.w + d + last,
        (3 * p - 4) * x.f + (1.5 * p - 1) * x.b - 0.5 * p * x.w + d + last,
        x.m * (6 * x.b - 2 * whole) + (2 * p + 4 * three) * x.f + (2 * p - 6 - 2 * three) * x.b + x.w + d,
        x.m * (6 * x.f - 2 * whole) + (2 * p - 6 - three) * x.f + (2 * p + 2 * three) * x.b + (1 + three) * x.w + d,
    )


RAMPS: dict[str, Callable[[Ramp], Forms]] = {
    "interleaved": _ramp_interleaved, "LoopedBFS": _ramp_looped_bfs, "ZB-1p": _ramp_zb1, "ZB-2p": _ramp_zb2, "ZB-V": _ramp_zbv,
    "V-Half": _ramp_vhalf, "V-Min": _ramp_vmin, "DualPipe-V": _ramp_dual, "DualPipe": _ramp_dual,
}  # fmt: skip
LONGEST: dict[str, Callable[[Ramp], Forms]] = {"ZB-1p": _longest_zb1, "ZB-2p": _longest_zb2, "ZB-V": _longest_zbv}


def _gpipe(f: np.ndarray, b: np.ndarray, hop: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Two flow shops in turn, transfers as lags: sum + (m - 1) max each (Huang et al. 2019, section 2.3)."""
    return np.asarray(sum(t.sum(-1) + (m - 1) * t.max(-1) for t in (f, b)) + 2 * hop.sum(-1))


def _1f1b(f: np.ndarray, b: np.ndarray, hop: np.ndarray, m: np.ndarray) -> np.ndarray:
    """The longest of the paths that turn at one stage s: m c_s, what lies before s once, and what lies behind it for the first microbatch, for
    the last, or for both, instead of what s runs meanwhile; and the path to and fro, since 1F1B leaves a transfer no slack: it
    crosses borders twice for every microbatch but one in p. On equal stages (m + p - 1)(F + B), Narayanan et al. 2019.
    """
    p, m = f.shape[-1], m[..., None]
    c = f + b
    through = c + 2 * np.concatenate([hop, np.zeros((*hop.shape[:-1], 1))], -1)
    before = np.cumsum(through, -1) - through
    behind = through.sum(-1, keepdims=True) - before - c
    warm = np.minimum(p - 1 - np.arange(p), m - 1)
    turns = [0 * c, behind - warm * f, behind - warm * b, np.where(m > warm + 1, 2 * behind - warm * c, 0)]
    shapes = np.broadcast_shapes(*(t.shape for t in turns))
    one = (m * c + before + np.max([np.broadcast_to(t, shapes) for t in turns], 0)).max(-1)
    whole, rest = np.divmod(m + p - 1, p)  # all the way there and back as often as the microbatches allow, then a shorter turn
    all_but = np.concatenate([through.sum(-1, keepdims=True) - before, 0 * before[..., :1]], -1)
    shapes = np.broadcast_shapes(all_but.shape[:-1], rest.shape[:-1])
    turn = np.take_along_axis(np.broadcast_to(all_but, (*shapes, p + 1)), np.broadcast_to(p - rest, (*shapes, 1)), -1)
    return np.asarray(np.maximum(one, (whole * all_but[..., :1] + turn)[..., 0]))


def step_seconds(
    schedule: str,
    F: npt.ArrayLike,
    B: npt.ArrayLike,
    W: npt.ArrayLike,
    microbatches: npt.ArrayLike,
    vpp: int | None = None,
    send: npt.ArrayLike = 0.0,
    overlap_send: bool = True,
    barrier: bool = True,
) -> np.ndarray:
    """Seconds of one step in closed form: makespan(simulate_schedule(...)) for whole arrays. [..., virtual stages] -> [...]

    `F`, `B`, `W`, `send`, `vpp` and `overlap_send` as there, with any leading dimensions; `microbatches` [...]. Without `barrier`, the
    longest stage alone (see longest_stage), which differs for ZB-1p, ZB-2p and ZB-V only.

    A rank is busy for m c_r and idle while the others fill and drain; a step is the longest of these. On equal stages without
    transfers this is the simulation, exactly and whatever F, B and W for GPipe, 1F1B, interleaved and ZB-1p; within 2 % for the others
    (V-Half and V-Min: of three stages or more) from 2 p microbatches on, where B and W are within a quarter of F; further
    off the regime ZB-2p has been seen 6 % and V-Half 8 % away. On other stages GPipe is exact, 1F1B the longest of its own
    paths and never above the simulation, and elsewhere a rank's idle time is that of equal stages with the means of the other
    ranks. tests/costmodel/test_schedules.py holds the distances.
    """
    f, b, w = np.broadcast_arrays(*(np.asarray(t, float) for t in (F, B, W)))
    s, n, m = find(schedule), f.shape[-1], np.asarray(microbatches)
    shapes = {shape_of(schedule, n, int(i), vpp)[::2] for i in np.unique(m)}
    (p, v), m = shapes.pop(), m // 2 if s.mirrored else m
    of_rank = np.array([[s.virtual_stage(p, r, c) for c in range(v)] for r in range(p)])
    hop = _hops(np.asarray(send), [int(np.argwhere(of_rank == k)[0, 0]) for k in range(n)])
    hop = np.broadcast_to(hop, (*hop.shape[:-1], n - 1))
    if not overlap_send:
        none = np.zeros((*hop.shape[:-1], 1))
        f, b, hop = f + np.concatenate([hop, none], -1), b + np.concatenate([none, hop], -1), 0 * hop
    if s.name in ("GPipe", "1F1B"):
        return (_gpipe if s.name == "GPipe" else _1f1b)(f, b + w, hop, m)
    own = [t[..., of_rank].sum(-1) for t in (f, b, w)]
    busy = m[..., None] * sum(own)
    if p == 1:
        return np.asarray(busy[..., 0])
    fo, bo, wo = ((t.sum(-1, keepdims=True) - t) / (v * (p - 1)) for t in own)
    d = hop.sum(-1)[..., None] / (v * p - 1 - (s.shape == "V"))
    forms = (RAMPS if barrier else RAMPS | LONGEST)[s.name](Ramp(p, v, m[..., None], fo, bo, wo, d))
    return np.asarray(np.max([np.broadcast_to(busy + x, np.broadcast_shapes(busy.shape, np.shape(x))) for x in forms], (0, -1)))
