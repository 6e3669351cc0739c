"""Peak live bytes of a rank with several chunks, each a stage of its own: what the others hold while one of them runs.

A schedule's order decides how many microbatches each chunk has in flight at each action (costmodel/schedules.py). Below ZeRO 2 torch
(2.13) gathers, of chunks that FSDP shards, the three that run next, and reduces the gradients of one when its last backward is over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from meshwright.costmodel import schedules
from meshwright.costmodel.memory import REDUCED

if TYPE_CHECKING:
    from meshwright.costmodel.moments import Moment, Parts
    from meshwright.costmodel.stagememory import Place, Shape, StageMemory

NONE, SHARED, WHOLE = 0, 1, 2  # gradients of a chunk
Kind = Literal["gather", "forward", "first backward", "backward", "reduction"]


class Moments(NamedTuple):
    """Moments of a rank's order, one a row. What runs, in which chunk; of each chunk the microbatches in flight, the one that runs
    included, the state of its gradients, and whether it is gathered."""

    kind: tuple[Kind, ...]
    chunk: np.ndarray
    flying: np.ndarray  # [rows, chunks]
    gradients: np.ndarray
    gathered: np.ndarray


def _moments(order: Sequence[schedules.Action], vpp: int, microbatches: int, *, ahead: bool) -> Iterator[tuple[Kind, int, tuple[int, ...]]]:
    """What runs, in which chunk, and a row of all three counts. `ahead`: what is gathered takes bytes before it is used."""
    flying, gradients, backwards = [0] * vpp, [NONE] * vpp, [0] * vpp
    active, used = set[int](), set[int]()
    following: list[list[int]] = []  # of each action, the chunks that run next
    for action in reversed(order):
        last = following[-1] if following else []
        following.append([action.chunk, *(c for c in last if c != action.chunk)])

    def row() -> tuple[int, ...]:
        return (*flying, *gradients, *(int(c in (active if ahead else used)) for c in range(vpp)))

    for action, chunks in zip(order, reversed(following), strict=True):
        c = action.chunk
        active = set(chunks[: schedules.GATHERED])
        used &= active
        if c not in used:
            yield "gather", c, row()
        used.add(c)
        if action.kind == "F":
            flying[c] += 1
            yield "forward", c, row()
            continue
        yield "backward" if gradients[c] else "first backward", c, row()
        flying[c] -= 1
        backwards[c] += 1
        gradients[c] = WHOLE
        if backwards[c] == microbatches:
            yield "reduction", c, row()
            gradients[c] = SHARED


def fullest(schedule: str, stages: int, microbatches: int, vpp: int, rank: int, ahead: bool) -> Moments:
    """The moments at which a rank may be fullest. More microbatches than four rounds repeat what it holds."""
    return _fullest(schedule, stages, min(microbatches, 4 * stages + microbatches % stages), vpp, rank, ahead)


@lru_cache(maxsize=4096)
def _fullest(schedule: str, stages: int, m: int, vpp: int, rank: int, ahead: bool) -> Moments:
    groups: dict[tuple[Kind, int], list[tuple[int, ...]]] = {}
    for kind, c, row in _moments(schedules.orders(schedule, stages, m, vpp)[rank], vpp, m, ahead=ahead):
        groups.setdefault((kind, c), []).append(row)
    kinds, chunks, rows = list[Kind](), list[int](), list[np.ndarray]()
    for (kind, c), found in groups.items():
        many = np.array(list(dict.fromkeys(found)))
        many = many[[i for i, x in enumerate(many) if (many >= x).all(axis=1).sum() == 1]]
        between = [0 < i < len(many) - 1 and (many[i - 1] + many[i + 1] == 2 * x).all() for i, x in enumerate(many)]
        many = many[np.logical_not(between)]
        kinds += [kind] * len(many)
        chunks += [c] * len(many)
        rows.append(many)
    flying, gradients, gathered = np.split(np.concatenate(rows), 3, axis=1)
    return Moments(tuple(kinds), np.array(chunks), flying, gradients, gathered)


def held(x: Shape, vpp: int, rank: int) -> Moments:
    """A rank's moments; from ZeRO 2 on the schedule knows nothing of FSDP, and all chunks are gathered."""
    found = fullest(x.schedule, x.pp, x.microbatches, vpp, rank, x.shards > 1)
    return found if x.zero < 2 else found._replace(gathered=np.ones_like(found.gathered))


def last_forward(x: Shape, vpp: int, rank: int) -> Moments:
    """Of a rank's moments, one at which its last chunk runs forward."""
    of = held(x, vpp, rank)
    at = max((i for i, k in enumerate(of.kind) if k == "forward" and of.chunk[i] == vpp - 1), key=lambda i: of.flying[i].sum())
    return Moments(of.kind[at : at + 1], of.chunk[at : at + 1], of.flying[at : at + 1], of.gradients[at : at + 1], of.gathered[at : at + 1])


def least_times(x: Shape, vpp: int, ranks: np.ndarray) -> np.ndarray:
    """[ranks, chunks] how often `ChunkMemory.least` counts what a chunk keeps."""
    return np.stack([last_forward(x, vpp, int(rank)).flying[0] for rank in ranks])


def one_round(breadth_first: Any, stages: Any, microbatches: Any) -> Any:
    """Whether a rank's last chunk is done before its first has any gradient."""
    return breadth_first | (microbatches <= stages)


@lru_cache(maxsize=65536)
def fewest(schedule: str, stages: int, microbatches: int, vpp: int) -> tuple[int, ...]:
    """Of each rank, how many microbatches every chunk holds at one backward of the last chunk, where all have gradients unless one_round."""
    found, some = list[int](), bool(one_round(schedule == "looped-bfs", stages, microbatches))
    for rank in range(stages):
        of = fullest(schedule, stages, microbatches, vpp, rank, True)
        last = np.array(["backward" in k for k in of.kind]) & (of.chunk == vpp - 1) & (some | (of.gradients == WHOLE).all(axis=1))
        found.append(int(of.flying[last].min(axis=1).max(initial=0)))
    return tuple(found)


class ChunkMemory:
    """Live bytes of blocks [begin, end) at a place with several chunks; numbers, or arrays with one entry for each."""

    def __init__(self, memory: StageMemory, begin: Any, end: Any, place: Place) -> None:
        from meshwright.costmodel.stagememory import Place

        assert place.borders is not None
        self.m, self.x, self.end = memory, memory.x, end
        s, x = memory._sums, memory.x
        self.constant, _, _ = memory._base(begin, end, place)
        self.constant = {**self.constant, "gradients": 0.0, "gathered": 0.0}
        low, high = np.stack(place.borders[:-1]), np.stack(place.borders[1:])  # [chunks, places]
        self.low, self.high, self.vpp = low, high, len(low)
        stem, head = np.zeros(low.shape, bool), np.zeros(low.shape, bool)
        stem[0], head[-1] = place.stem, place.head
        self.place = Place(stem, head, 1, memory.returned(low, high, stem, head))
        _, self.kept, self.own = memory._base(low, high, self.place)
        self.kept, self.own = np.broadcast_to(self.kept, low.shape), np.broadcast_to(self.own, low.shape)

        def between(key: str) -> np.ndarray:
            return np.asarray(s[key][high] - s[key][low], float)

        c = x.compute_bytes * x.fsdp
        numel, self.local = between("numel"), REDUCED * between("local")
        self.whole = REDUCED * numel if x.zero < 2 else self.local
        self.shared = self.local if x.fsdp else self.whole
        self.padded = c * between("root_padded" if x.zero == 3 else "padded")
        self.copied = c * between("root_padded") * (x.shards > 1) * (x.zero < 2)

    @cached_property
    def running(self) -> dict[Kind, list[Moment]]:
        """What runs in a chunk as in a stage of its own, each with one entry for each chunk and place."""
        later = self.m.moments(self.low, self.high, self.place)
        first = (self.m._first or self.m).moments(self.low, self.high, self.place)
        return {
            "forward": [m for m in later if m.name == "forward"],
            "backward": [m for m in later if m.name != "forward" and not m.idle],
            "first backward": [m for m in first if m.name != "forward" and not m.idle],
            "reduction": [m for m in later if m.idle],
        }

    @cached_property
    def heights(self) -> dict[Kind, np.ndarray]:
        """What the chunk that runs takes beside the counts, by kind: [chunks, places]."""
        found: dict[Kind, np.ndarray] = {"gather": self.copied}
        for kind, moments in self.running.items():
            most = np.full(self.low.shape, -np.inf)
            for m in moments:
                most = np.maximum(most, m.height)
            found[kind] = most + (self.own - self.kept if kind != "reduction" else 0.0)
        return found

    def counted(self, of: Moments) -> np.ndarray:
        """[moments, places] what the chunks hold by count."""
        counts = np.concatenate([of.flying, of.gradients == WHOLE, of.gradients == SHARED, of.gathered], axis=1).astype(float)
        amounts = np.concatenate([self.kept, self.whole, self.shared, self.padded])
        return np.asarray(np.tensordot(counts, amounts, axes=1))

    def _by_rank(self, ranks: Any, of_rank: Any) -> Any:
        """`of_rank` of each rank, [places], where ranks are broadcast with the places."""
        shape = np.broadcast_shapes(np.shape(ranks), self.low.shape[1:])
        of, out = np.broadcast_to(ranks, shape), np.empty(shape)
        for rank in np.unique(ranks):
            out = np.where(of == rank, of_rank(int(rank)), out)
        return out

    def live(self, ranks: Any) -> Any:
        """Peak live bytes as each of `ranks`, broadcast with the places."""

        def most(rank: int) -> Any:
            of = held(self.x, self.vpp, rank)
            return (self.counted(of) + np.stack([self.heights[k][c] for k, c in zip(of.kind, of.chunk, strict=True)])).max(axis=0)

        return sum(self.constant.values()) + self._by_rank(ranks, most)

    def least(self, ranks: Any) -> Any:
        """A lower bound on `live` that grows with all that blocks hold: the last block's forward alone."""
        before = self.m._sums["kept"][self.end - 1] - self.m._sums["kept"][self.low[-1]]
        runs = before + self.m.b.forward[self.end - 1] + self.own[-1] - self.kept[-1]
        return sum(self.constant.values()) + runs + self._by_rank(ranks, lambda rank: self.counted(last_forward(self.x, self.vpp, rank))[0])

    def peak(self, rank: int) -> tuple[str, int, Parts]:
        """Moment, block and bytes by category of the fullest moment as one rank, of a place that is one."""
        of = held(self.x, self.vpp, rank)
        total = self.counted(of) + np.array([self.heights[k][c] for k, c in zip(of.kind, of.chunk, strict=True)])
        best = int(np.argmax(total))
        kind, c, flying = of.kind[best], int(of.chunk[best]), of.flying[best]
        parts = dict(self.constant)
        state, idle = of.gradients[best], kind in ("gather", "reduction")
        own = 0.0 if idle else self.own[c] - self.kept[c]
        added: Parts = {
            "activations": flying @ self.kept + own, "gathered": of.gathered[best] @ self.padded,
            "gradients": (state == WHOLE) @ self.whole + (state == SHARED) @ self.shared,
        }  # fmt: skip
        name, at, more = ("gather", int(self.high[c]) - 1, {"communication": self.copied[c]}) if kind == "gather" else self._fullest(kind, c)
        for some in (added, more):
            for k, v in some.items():
                parts[k] = parts.get(k, 0.0) + v
        return name, at, parts

    def _fullest(self, kind: Kind, c: int) -> tuple[str, int, Parts]:
        """Of what runs in a chunk, the fullest moment, its block and its bytes."""
        m = max(self.running[kind], key=lambda m: float(np.broadcast_to(m.height, self.low.shape)[c]))
        at, parts = int(self.high[c]) - 1, {k: np.broadcast_to(v, self.low.shape)[c] for k, v in m.parts.items()}
        if m.scores:
            begin, end = (int(np.broadcast_to(v, self.low.shape)[c]) for v in (m.begin, m.end))
            scores = {k: np.broadcast_to(v, len(self.m.b.layer)) for k, v in m.scores.items()}
            at = begin + int(np.argmax(sum(v[begin:end] for v in scores.values())))
            for k, v in scores.items():
                parts[k] = parts.get(k, 0.0) + v[at]
        return m.name, at, parts
