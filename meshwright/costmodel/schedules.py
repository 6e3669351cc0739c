"""Pipeline schedules as data: which rank runs what in which order, whatever the times are, and what it holds meanwhile.

A schedule cuts the model into `stages * vpp` virtual stages in the model's order and gives each rank `vpp` of them, its chunks:

    loop   chunk c of rank r is virtual stage c * stages + r         (1F1B, interleaved 1F1B, looped BFS, ZB-H1, ZB-H2)
    V      chunk 0 of rank r is virtual stage r, chunk 1 is 2 * stages - 1 - r: the last rank turns around, and the
           first rank holds both ends of the model                    (ZB-V, V-Half, V-Min, DualPipe-V)

A rank runs its actions strictly in order: F forward, B gradient of the input, W gradient of the weights, BW both at once.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np

Kind = Literal["F", "B", "W", "BW"]


class Action(NamedTuple):
    """One entry of a rank's order; `chunk` counts the virtual stages of its rank, in the model's order."""

    kind: Kind
    microbatch: int
    chunk: int = 0



@dataclass(frozen=True)
class Schedule:
    """One pipeline schedule. Callables take stages (ranks), [rank,] microbatches and vpp.

    `order` is the list of each rank. `in_flight` is the microbatches whose activations a rank holds at its peak, one chunk
    counting 1 / vpp and held until W ends; exact where the microbatches fill the pipeline twice, else an upper bound.
    """

    name: str
    aliases: tuple[str, ...]
    order: Callable[[int, int, int], list[list[Action]]]
    in_flight: Callable[[int, int, int, int], float]
    vpp: tuple[int, int | None] = (1, 1)  # the fewest and the most chunks of a rank
    shape: Literal["loop", "V"] = "loop"
    least: Callable[[int], int] = lambda stages: stages  # microbatches that it needs
    rounds: bool = True  # with several chunks, microbatches go in rounds of as many as there are ranks
    mirrored: bool = False  # ranks r and stages - 1 - r hold the same two stages and run half of the microbatches each

    def virtual_stage(self, stages: int, rank: int, chunk: int) -> int:
        """Place of a rank's chunk in the model's order."""
        return 2 * stages - 1 - rank if self.shape == "V" and chunk else chunk * stages + rank


def looped(p: int, m: int, v: int, slope: int, delay: int | None) -> list[list[Action]]:
    """Depth-first loops: rank r warms up with `slope * (p - 1 - r)` forwards beyond the `(v - 1) * p` of the last rank, then
    runs one forward and one backward, and puts off each W by `delay * r` backwards (None: B and W at once).

    Narayanan et al. 2021 (arXiv 2104.04473), section 2.2, slope 1 for one chunk and 2 for several, as Megatron-LM and
    torch count their warm-up; Qi et al. 2023 (arXiv 2401.10241), section 2: ZB-H1 is slope 1 and delay 1, ZB-H2 is 2 and 2.
    """

    def at(k: int, kind: Kind) -> Action:  # p microbatches go through one chunk, then through the next
        round_, rest = divmod(k, p * v)
        chunk, i = divmod(rest, p)
        return Action(kind, round_ * p + i, chunk if kind == "F" else v - 1 - chunk)

    out: list[list[Action]] = []
    for r in range(p):
        warm = min(slope * (p - 1 - r) + (v - 1) * p, m * v)
        todo = [at(k, "F") for k in range(warm)]
        for k in range(m * v):
            if warm + k < m * v:
                todo.append(at(warm + k, "F"))
            todo.append(at(k, "BW" if delay is None else "B"))
            if delay is not None and k >= delay * r:
                todo.append(at(k - delay * r, "W"))
        if delay is not None:
            todo += [at(k, "W") for k in range(max(0, m * v - delay * r), m * v)]
        out.append(todo)
    return out


def gpipe(p: int, m: int, v: int) -> list[list[Action]]:
    """All forwards, then all backwards (Huang et al. 2019, arXiv 1811.06965, section 2.3)."""
    one = [Action(kind, i) for kind in ("F", "BW") for i in range(m)]  # type: ignore[arg-type]
    return [list(one) for _ in range(p)]


def looped_bfs(p: int, m: int, v: int) -> list[list[Action]]:
    """Breadth-first loops: all microbatches through each chunk in turn, and back (Lamy-Poirier 2022, arXiv 2211.05953, section 4)."""
    there = [Action("F", i, c) for c in range(v) for i in range(m)]
    back = [Action("BW", i, c) for c in reversed(range(v)) for i in reversed(range(m))]
    return [[*there, *back] for _ in range(p)]


class _Rank:
    """Appends actions of one rank, counting the microbatches of each chunk and the W that are owed."""

    def __init__(self) -> None:
        self.todo: list[Action] = []
        self.count = {(kind, c): 0 for kind in "FB" for c in (0, 1)}
        self.owed: deque[Action] = deque()

    def f(self, chunk: int) -> None:
        self.todo.append(Action("F", self._next("F", chunk), chunk))

    def bw(self, chunk: int) -> None:
        self.todo.append(Action("BW", self._next("B", chunk), chunk))

    def b(self, chunk: int) -> None:
        i = self._next("B", chunk)
        self.todo.append(Action("B", i, chunk))
        self.owed.append(Action("W", i, chunk))

    def w(self, chunk: int | None = None) -> None:
        """The W that has been owed longest, of one chunk or of any."""
        found = next((x for x in self.owed if chunk is None or x.chunk == chunk), None)
        if found:
            self.owed.remove(found)
            self.todo.append(found)

    def _next(self, kind: str, chunk: int) -> int:
        self.count[kind, chunk] += 1
        return self.count[kind, chunk] - 1


def zbv(p: int, m: int, v: int) -> list[list[Action]]:
    """ZB-V (Qi et al. 2023, arXiv 2401.10241, section 6): no bubble where F = B = W, in the memory of 1F1B.

    Written for 2 p - 1 microbatches or more; fewer are the same order with the others left out.
    """
    n = max(2 * p - 1, m)
    out: list[list[Action]] = []
    for r in range(p):
        q = _Rank()
        for _ in range(2 * (p - r) - 1):
            q.f(0)
        for _ in range(r):
            q.f(1)
            q.f(0)
        for _ in range(p - r):
            q.f(1)
            q.b(1)
            q.w()
        while q.count["F", 1] < n:
            if q.count["F", 0] < n:
                q.f(0)
            q.b(0)
            q.w()
            q.f(1)
            q.b(1)
            q.w()
        for _ in range(r):
            q.b(0)
            q.b(1)
        for _ in range(p - r):
            q.b(0)
            q.w(0)
        for chunk in (1, 0):
            while any(x.chunk == chunk for x in q.owed):
                q.w(chunk)
        out.append([x for x in q.todo if x.microbatch < m])
    return out


def dualpipe_v(p: int, m: int, v: int) -> list[list[Action]]:
    """DualPipe-V, the eight steps of github.com/deepseek-ai/DualPipe (DualPipe: DeepSeek-V3, arXiv 2412.19437, section 3.2;
    cut in half: Qi et al. 2025). A forward that runs together with a backward stands before it: whether the two hide each
    other's communication is in the times, not in the order."""
    out: list[list[Action]] = []
    for r in range(p):
        q = _Rank()
        for _ in range(2 * (p - r - 1)):  # 1: F0
            q.f(0)
        for _ in range(r + 1):  # 2: F0 F1
            q.f(0)
            q.f(1)
        for _ in range(p - r - 1):  # 3: B1 W1 F1
            q.b(1)
            q.w()
            q.f(1)
        for _ in range(m - 2 * p + r + 1):  # 4: F0 with B1, F1 with B0
            q.f(0)
            q.bw(1)
            q.f(1)
            q.bw(0)
        for _ in range(p - r - 1):  # 5: B1, F1 with B0
            q.bw(1)
            q.f(1)
            q.bw(0)
        half = (r + 1) // 2
        for i in range(r + 1):  # 6: B1 B0, W apart in the second half
            for chunk, apart in ((1, i > half or (i == half and r % 2 == 1)), (0, i >= half)):
                (q.b if apart else q.bw)(chunk)
        for _ in range(p - r - 1):  # 7: W B0
            q.w()
            q.b(0)
        for _ in range(r + 1):  # 8: W
            q.w()
        out.append(q.todo)
    return out


def v_block(p: int, m: int, v: int, half: bool) -> list[list[Action]]:
    """V-Half and V-Min (Qi et al. 2024, arXiv 2405.15362, section 3.3 and appendix): every microbatch repeats one building
    block six slots after the one before, F = B = W = one slot. That orders F and B; W go into the gaps, and no rank ever holds
    more chunks than in the steady state.
    """
    turn = (3 if p % 2 == 0 else 0) if half else (2 if p % 3 == 0 else 0)
    ranks: list[deque[Action]] = []
    for r in range(p):
        if half:  # F0, F1, B1, B0
            block = (2 * r, 3 * p - r - 2, 3 * p + turn + 2 * r - 1, 6 * p + turn - r - 2)
        else:
            block = (r, 2 * p - r - 1, 2 * p + turn + r, 4 * p + turn - r - 1)
        kinds: tuple[tuple[Kind, int], ...] = (("F", 0), ("F", 1), ("B", 1), ("B", 0))
        slots = {at + 6 * i: Action(k, i, c) for at, (k, c) in zip(block, kinds) for i in range(m)}
        ranks.append(deque(slots[t] for t in sorted(slots)))
    return _fill(ranks, 2 * ((p + 2) // 2 if half else (p + 4) // 3))


def _fill(ranks: list[deque[Action]], most: int) -> list[list[Action]]:
    """Runs F and B of V-shaped ranks in their order, one slot each, and W whenever the next waits or `most` chunks are held."""
    p = len(ranks)
    out: list[list[Action]] = [[] for _ in range(p)]
    owed: list[deque[Action]] = [deque() for _ in range(p)]
    held, done = [0] * p, set[tuple[str, int, int]]()
    while any(ranks) or any(owed):
        now = []
        for r in range(p):
            x = ranks[r][0] if ranks[r] else None
            k = 2 * p - 1 - r if x and x.chunk else r
            if x and x.kind == "F":
                ready = held[r] < most and (k == 0 or ("F", k - 1, x.microbatch) in done)
            else:
                ready = x is not None and (("B", k + 1, x.microbatch) if k < 2 * p - 1 else ("F", k, x.microbatch)) in done
            if x and ready:
                out[r].append(ranks[r].popleft())
                now.append((x.kind, k, x.microbatch))
                held[r] += x.kind == "F"
                if x.kind == "B":
                    owed[r].append(x._replace(kind="W"))
            elif owed[r]:
                out[r].append(owed[r].popleft())
                held[r] -= 1
        done.update(now)
    return out


# Names as published runs and torch spell them; `find` ignores case, punctuation, a leading "Schedule" and a bracket behind.
# In flight: 1F1B and GPipe, Narayanan et al. 2019; interleaved, its warm-up (arXiv 2104.04473); ZB-1p, ZB-2p and ZB-V, arXiv 2401.10241,
# table 2 and section 6; V-Half and V-Min, arXiv 2405.15362, table 1; DualPipe, the table of github.com/deepseek-ai/DualPipe.
SCHEDULES: dict[str, Schedule] = {
    s.name: s
    for s in (
        Schedule("GPipe", (), gpipe, lambda p, r, m, v: m, least=lambda p: 1),
        Schedule(
            "1F1B", ("1F1B-flush", "PipeDream-flush", "non-interleaved"), partial(looped, slope=1, delay=None),
            lambda p, r, m, v: min(m, p - r), least=lambda p: 1,
        ),
        Schedule(
            "interleaved", ("1F1B-I", "interleaved-1F1B", "1F1B-interleaved", "VPP"), partial(looped, slope=2, delay=None),
            lambda p, r, m, v: min(m * v, 2 * (p - r - 1) + (v - 1) * p + 1) / v, vpp=(2, None),
        ),
        Schedule(
            "ZB-1p", ("ZB-H1", "ZB1", "InterleavedZeroBubble", "zero-bubble"), partial(looped, slope=1, delay=1),
            lambda p, r, m, v: min(m, p), vpp=(1, None),
        ),
        Schedule("LoopedBFS", ("breadth-first",), looped_bfs, lambda p, r, m, v: m, vpp=(2, None), rounds=False),
        Schedule("ZB-2p", ("ZB-H2", "ZB2"), partial(looped, slope=2, delay=2), lambda p, r, m, v: min(m, 2 * p - 1)),
        Schedule("ZB-V", ("ZBV", "V-ZB", "ZBVZeroBubble"), zbv, lambda p, r, m, v: min(m, p), vpp=(2, 2), shape="V"),
        Schedule("V-Half", (), partial(v_block, half=True), lambda p, r, m, v: min(m, (p + 2) // 2), vpp=(2, 2), shape="V"),
        Schedule("V-Min", (), partial(v_block, half=False), lambda p, r, m, v: min(m, (p + 4) // 3), vpp=(2, 2), shape="V"),
        Schedule(
            "DualPipe-V", ("cut-in-half",), dualpipe_v, lambda p, r, m, v: min(m, p + 0.5), vpp=(2, 2), shape="V",
            least=lambda p: 2 * p,
        ),
        Schedule(
            "DualPipe", (), dualpipe_v, lambda p, r, m, v: min(m, p + 0.5), vpp=(2, 2), shape="V", least=lambda p: 2 * p,
            mirrored=True,
        ),
    )
}  # fmt: skip


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", re.sub(r"\(.*?\)", "", name.lower())).removeprefix("schedule")


_BY_NAME = {_plain(n): s for s in SCHEDULES.values() for n in (s.name, *s.aliases)}


def find(name: str) -> Schedule:
    """The schedule of that name, as "ZB-1p", "1F1B (DeepSpeed)" or torch's "ScheduleInterleaved1F1B"."""
    if _plain(name) not in _BY_NAME:
        raise ValueError(f"no pipeline schedule is called {name!r}: one of {', '.join(SCHEDULES)}")
    return _BY_NAME[_plain(name)]


def shape_of(schedule: str, virtual: int, microbatches: int, vpp: int | None = None) -> tuple[int, int, int]:
    """Ranks, microbatches of a rank and chunks of a rank, for so many virtual stages; ValueError if the schedule has no such.

    DualPipe has one virtual stage for each rank, and its ranks come in pairs that do the same from both ends: what is returned is
    one of each pair, with half of the microbatches.
    """
    s = find(schedule)
    if s.mirrored:
        if vpp not in (None, 1) or virtual % 2 or microbatches % 2:
            raise ValueError(f"{s.name} needs even stages and microbatches and vpp 1: not {virtual}, {microbatches} and {vpp or 1}")
        p, m, v = virtual // 2, microbatches // 2, 2
    else:
        v = s.vpp[0] if vpp is None else vpp
        if v < s.vpp[0] or (s.vpp[1] and v > s.vpp[1]):
            needs = f"{s.vpp[0]}" if s.vpp[1] else f"{s.vpp[0]} or more"
            raise ValueError(f"{s.name} needs vpp {needs}, not {v}" + ("; one chunk is 1F1B" if s.name == "interleaved" else ""))
        if virtual < v or virtual % v:
            raise ValueError(f"{virtual} virtual stages are not divided by vpp {v}: give one time per chunk of every rank")
        p, m = virtual // v, microbatches
    if m < max(1, s.least(p)):
        raise ValueError(f"{s.name} of {virtual} stages needs {max(1, s.least(p)) * (2 if s.mirrored else 1)} microbatches, not {microbatches}")
    if s.shape == "loop" and s.rounds and v > 1 and m % p:
        raise ValueError(f"{s.name} with vpp {v} needs microbatches in multiples of its {p} ranks, as Megatron-LM: not {m}")
    return p, m, v


@lru_cache(maxsize=256)
def orders(schedule: str, stages: int, microbatches: int, vpp: int | None = None) -> tuple[tuple[Action, ...], ...]:
    """What each of `stages` ranks runs, in order. Of DualPipe, the ranks of the first half: the others mirror them."""
    s = find(schedule)
    p, m, v = shape_of(schedule, stages * (1 if s.mirrored else s.vpp[0] if vpp is None else vpp), microbatches, vpp)
    return tuple(tuple(todo) for todo in s.order(p, m, v))


GATHERED = 3  # chunks that torch (2.13) keeps gathered at once, of those that FSDP shards below ZeRO 2


class Held(NamedTuple):
    """What a rank holds while an action of one of its chunks runs (R: its gradients are reduced), without the microbatch that runs: of
    each chunk the microbatches in flight (forward, and no B yet) and those that wait for W; whether it has had a B and a W before, whether
    its last is still to come, and whether it is among the GATHERED that run next."""

    kind: Literal["F", "B", "W", "R"]
    chunk: int
    flying: tuple[int, ...]
    waiting: tuple[int, ...]
    begun: tuple[bool, ...]
    summed: tuple[bool, ...]
    open: tuple[bool, ...]
    gathered: tuple[bool, ...]

    def counts(self) -> list[int]:
        """Of each chunk in turn: microbatches in flight and waiting; whether sums of gradients are there, outside the layers and in them,
        whether it is gathered, whether its reduced gradients are there instead."""
        found = []
        for c in range(len(self.flying)):
            there = self.open[c] or (self.kind == "R" and self.chunk == c)
            found += [self.flying[c], self.waiting[c], int(self.begun[c] and there), int(self.summed[c] and there)]
            found += [int(self.gathered[c]), int(not there)]
        return found


def held(schedule: str, stages: int, microbatches: int, vpp: int) -> tuple[tuple[Held, ...], ...]:
    """Of each rank, what it holds at the moments that may be the fullest: those that no other of their kind and chunk exceeds.

    B and W at once count as B, then W. More microbatches than fill the pipeline three times repeat what it holds.
    """
    return _held(schedule, stages, _enough(schedule, stages, microbatches), vpp)


def _enough(schedule: str, stages: int, microbatches: int) -> int:
    return min(microbatches, max(3 * stages, find(schedule).least(stages)))


@lru_cache(maxsize=512)
def _held(schedule: str, stages: int, m: int, vpp: int) -> tuple[tuple[Held, ...], ...]:
    return tuple(tuple(_fullest(*moments, vpp)) for moments in _moments(schedule, stages, m, vpp))


@lru_cache(maxsize=512)
def _moments(schedule: str, stages: int, m: int, vpp: int) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]:
    """Of each rank, kind and chunk of every action, and a row of what it then holds, in the order of Held. [actions], [actions, 6 vpp]"""
    found = []
    for todo in orders(schedule, stages, m, vpp):
        kinds = np.array([k for a in todo for k in a.kind])
        chunks = np.array([a.chunk for a in todo for _ in a.kind])
        runs = chunks[:, None] == np.arange(vpp)
        f, b, w = (runs & (kinds == k)[:, None] for k in "FBW")
        before = [np.cumsum(x, axis=0) - x for x in (f, b, w)]
        # where each chunk runs next: the first few of them are gathered
        after = np.where(runs, np.arange(len(runs))[:, None], len(runs))
        upcoming = np.minimum.accumulate(after[::-1], axis=0)[::-1]
        gathered = upcoming <= np.sort(upcoming, axis=1)[:, [min(GATHERED, vpp) - 1]]
        forwards, backwards, weights = before
        rows = np.concatenate([forwards - backwards - b, backwards - weights - w, backwards > 0, weights > 0, weights < m, gathered], axis=1)
        last = np.flatnonzero((w & (weights == m - 1)).any(axis=1))  # behind it gradients are reduced
        done = weights + w
        reduced = [forwards - backwards, backwards - done, backwards > 0, done > 0, done < m, gathered]
        rows = np.concatenate([rows, np.concatenate(reduced, axis=1)[last]]).astype(np.int32)
        found.append((np.append(kinds, ["R"] * len(last)), np.append(chunks, chunks[last]), rows))
    return tuple(found)


def _fullest(kinds: np.ndarray, chunks: np.ndarray, rows: np.ndarray, vpp: int) -> Iterator[Held]:
    """Those that no other holds more than in every place, while the same runs."""
    for kind in sorted(set(kinds.tolist())):
        for chunk in range(vpp):
            same = np.unique(rows[(kinds == kind) & (chunks == chunk)], axis=0)
            for row in same[(same[:, None] <= same).all(axis=2).sum(axis=1) == 1]:
                flying, waiting, *flags = row.reshape(6, vpp).tolist()
                yield Held(kind, chunk, tuple(flying), tuple(waiting), *(tuple(map(bool, x)) for x in flags))


@lru_cache(maxsize=512)
def _counts(schedule: str, stages: int, m: int, vpp: int) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    found: dict[tuple[str, int], list[list[list[int]]]] = {}
    for rank, moments in enumerate(_held(schedule, stages, m, vpp)):
        for x in moments:
            of = found.setdefault((x.kind, x.chunk), [[] for _ in range(stages)])
            of[rank].append(x.counts())
    return {
        key: (np.array([row for rows in of for row in rows], float), np.cumsum([0, *map(len, of[:-1])])) for key, of in found.items()
    }


def counts(schedule: str, stages: int, microbatches: int, vpp: int) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """`held` as arrays, by kind and chunk: rows of Held.counts, rank behind rank, and where each rank's begin."""
    return _counts(schedule, stages, _enough(schedule, stages, microbatches), vpp)


def fewest(schedule: str, stages: int, microbatches: int, vpp: int) -> tuple[int, ...]:
    """Of each rank, how many microbatches every chunk of it holds at least at one moment between its first W and its last, or at any where
    `one_round`; -1 if it has none."""
    return _fewest(schedule, stages, _enough(schedule, stages, microbatches), vpp)


@lru_cache(maxsize=4096)
def _fewest(schedule: str, stages: int, m: int, vpp: int) -> tuple[int, ...]:
    found = []
    for _, _, rows in _moments(schedule, stages, m, vpp):
        found.append(int(_between(rows, stages, m, vpp).min(axis=1).max(initial=-1)))
    return tuple(found)


def one_round(stages: Any, microbatches: Any, vpp: Any) -> Any:
    """Whether a rank's last chunk may be done before its first has any gradient."""
    return (vpp > 1) & (microbatches <= stages)


def _between(rows: np.ndarray, stages: int, m: int, vpp: int) -> np.ndarray:
    """Of a rank's moments those between its first W and its last, or all where `one_round`: microbatches in flight. [moments, chunks]"""
    return rows[(rows[:, 3 * vpp : 5 * vpp] > 0).all(axis=1) | one_round(stages, m, vpp), :vpp]


def mean_held(schedule: str, stages: int, microbatches: int, vpp: int, sizes: tuple[tuple[int, ...], ...]) -> tuple[float, ...]:
    """Of each rank, how many microbatches its layers hold at least at one of the moments of `fewest`, on average over them and in every one
    of some cuts; `sizes`: layers that each virtual stage of a cut has. 0 if it has no such moment, infinite without layers."""
    return _mean_held(schedule, stages, _enough(schedule, stages, microbatches), vpp, sizes)


@lru_cache(maxsize=4096)
def _mean_held(schedule: str, stages: int, m: int, vpp: int, sizes: tuple[tuple[int, ...], ...]) -> tuple[float, ...]:
    found, s = [], find(schedule)
    for rank, (_, _, rows) in enumerate(_moments(schedule, stages, m, vpp)):
        flying = _between(rows, stages, m, vpp)
        own = np.array(sizes, float)[:, [s.virtual_stage(stages, rank, c) for c in range(vpp)]]
        own = own[own.sum(axis=1) > 0]
        means = flying @ own.T / own.sum(axis=1)  # [moments, cuts]
        found.append(float(means.min(axis=1).max(initial=0.0)) if len(own) else np.inf)
    return tuple(found)
