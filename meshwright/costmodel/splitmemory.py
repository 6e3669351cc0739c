"""Peak live bytes of a rank whose schedule splits backward: microbatches in flight and microbatches that wait for W, chunk by chunk.

The first half of a microbatch's backward (B) frees what it has used; until the second (W) the layers' linear modules hold what goes into
them and the gradient of what comes out (codegen/runtime/split_backward.py). How many of a rank's chunks hold which, at each of its actions,
is costmodel/schedules.held; which one runs decides what stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from meshwright.costmodel import schedules
from meshwright.costmodel.memory import REDUCED
from meshwright.costmodel.moments import Moment, Parts

if TYPE_CHECKING:
    from meshwright.costmodel.stagememory import Place, StageMemory

_RUN = {"F": "F", "B": "B", "W": "W", "R": "RL"}  # moments of an action


@dataclass(frozen=True)
class _Chunk:
    """Bytes of a chunk: of a microbatch in flight and of one that waits, of the sums of gradients outside its layers and in them, of what is
    gathered, of the reduced gradients that replace the sums and that; what runs."""

    kept: Any
    waits: Any
    root_sums: Any
    layer_sums: Any
    gathered: Any
    reduced: Any
    running: dict[str, Moment]


class SplitRank:
    """Blocks [begin, end) at a place as ranks of a schedule that splits backward; numbers, or arrays with one entry for each."""

    def __init__(self, memory: StageMemory, begin: Any, end: Any, place: Place) -> None:
        self.m, self.b, self.x, self.place = memory, memory.b, memory.x, place
        self.vpp = max(self.x.vpp, schedules.find(self.x.schedule).vpp[0])
        borders = (begin, end) if place.borders is None else place.borders
        self.spans = [(borders[c], borders[c + 1]) for c in range(self.vpp)]
        self.constant, _, _ = memory._base(begin, end, place)
        self.constant = {**self.constant, "gradients": 0.0, "gathered": 0.0}
        joins = np.asarray(place.chunks) < self.vpp  # the chunks follow on each other
        self.chunks = [self._chunk(c, joins) for c in range(self.vpp)]

    def _chunk(self, c: int, joins: Any) -> _Chunk:
        m, b, x, s = self.m, self.b, self.x, self.m._sums
        low, high = self.spans[c]
        stem, head = np.logical_and(self.place.stem, c == 0), np.logical_and(self.place.head, c == self.vpp - 1)
        handed = np.logical_not(head | joins * (c < self.vpp - 1))  # another rank takes what it returns
        own = b.side * np.logical_not(stem) + m.returned(low, high, stem, head)
        output = b.output * head
        kept = s["kept"][high] - s["kept"][low] + own + output
        at = m.at
        last = np.searchsorted(at, high) - 1
        top = at[np.clip(last, 0, len(at) - 1)]
        arrived = b.incoming[top] * handed * (last >= np.searchsorted(at, low))  # in a receive buffer, which is always there
        assert b.waits is not None
        assert b.halved is not None
        assert b.late is not None
        waiting = np.concatenate([[0.0], np.cumsum(b.waits)])
        waits = waiting[high] - waiting[low] - arrived
        roots = (x.compute_bytes if x.fsdp else REDUCED) * (not (x.sums_whole and not x.mixed))
        fresh = roots * s["root"] + x.compute_bytes * s["tied"]  # gradients that lie beside their sums until the backward ends
        before, saved = s["kept"][:-1], np.minimum(b.saved, b.halved)
        inside = np.minimum(b.kept, b.forward)
        forward = {"activations": before + inside, "temporaries": b.forward - inside}
        halved = {"activations": before + saved - waiting[1:], "temporaries": b.halved - saved - fresh[1:]}
        late = {"activations": waiting[1:], "temporaries": b.late}
        resting = own + output - s["kept"][low] + waiting[high] - arrived
        running = {
            "F": Moment("forward", {"activations": own - s["kept"][low]}, forward, low, high),
            "B": Moment("backward", {"activations": resting, "temporaries": fresh[high]}, halved, low, high),
            "W": Moment("weight gradients", {"activations": -waiting[low] - arrived}, late, low, high),
        }
        root, root_padded = s["root"][high] - s["root"][low], s["root_padded"][high] - s["root_padded"][low]
        gathered = x.compute_bytes * x.fsdp * (s["padded"][high] - s["padded"][low])
        if x.fsdp:  # the root first, then the layers, each of which is freed when its gradients are reduced
            late_root = m._late(root, root_padded / x.shards, m._last_root(low, high))
            running["R"] = Moment(
                "reduction", {"gathered": -x.compute_bytes * root_padded, "communication": REDUCED * root_padded, "temporaries": late_root}
            )
            each = {
                "gathered": -x.compute_bytes * b.padded, "communication": REDUCED * b.padded,
                "temporaries": m._late(b.numel, m._local, b.last_numel),
            }  # fmt: skip
            behind = {"gathered": -x.compute_bytes * root_padded, "gradients": -REDUCED * (root - root_padded / x.shards)}
            lowest = at[np.clip(np.searchsorted(at, low), 0, len(at) - 1)]
            running["L"] = Moment("reduction", behind, each, lowest, top + 1)
        layers = REDUCED * (s["layers"][high] - s["layers"][low])
        return _Chunk(kept, waits, REDUCED * root, layers, gathered, REDUCED * (s["local"][high] - s["local"][low]), running)

    def _held(self, rank: int) -> tuple[schedules.Held, ...]:
        return schedules.held(self.x.schedule, self.x.pp, self.x.microbatches, self.vpp)[rank]

    @property
    def _amounts(self) -> list[tuple[str, Any]]:
        """Bytes that chunks hold, with their category."""
        kinds = ("activations", "activations", "gradients", "gradients", "gathered", "gradients")
        return [x for c in self.chunks for x in zip(kinds, (c.kept, c.waits, c.root_sums, c.layer_sums, c.gathered, c.reduced), strict=True)]

    def peaks(self, ranks: Any) -> Any:
        """Peak live bytes as each rank of `ranks`, broadcast with the places."""
        amounts = np.stack(np.broadcast_arrays(*(a for _, a in self._amounts)))
        constant, places = sum(self.constant.values()), amounts.shape[1:]
        flat = amounts.reshape(len(amounts), -1)
        most = np.full((self.x.pp, flat.shape[1]), -np.inf)  # of every rank
        for (kind, c), (times, starts) in schedules.counts(self.x.schedule, self.x.pp, self.x.microbatches, self.vpp).items():
            running = [self.chunks[c].running[k].height for k in _RUN[kind] if k in self.chunks[c].running]
            if running:
                height = np.broadcast_to(np.max(np.broadcast_arrays(*running), axis=0), places).ravel()
                most = np.maximum(most, np.maximum.reduceat(times @ flat, starts, axis=0) + height)
        most = (most + np.broadcast_to(constant, places).ravel()).reshape(self.x.pp, *places)
        of = np.broadcast_to(ranks, np.broadcast_shapes(np.shape(ranks), places))
        out = np.take_along_axis(np.broadcast_to(most, (self.x.pp, *of.shape[of.ndim - len(places) :])), of.reshape(-1, *places), axis=0)
        return out.reshape(of.shape) if of.shape else float(out.reshape(()))

    def peak(self, rank: int) -> tuple[str, int, Parts]:
        """Moment, block and bytes by category of the fullest moment as one rank, of a place that is one."""
        found = []
        for held in self._held(rank):
            running = self.chunks[held.chunk].running
            for moment in (running[kind] for kind in _RUN[held.kind] if kind in running):
                if float(moment.height) == -np.inf:
                    continue
                at, parts = moment.fullest()
                for n, (kind, amount) in zip(held.counts(), self._amounts, strict=True):
                    parts[kind] = parts.get(kind, 0.0) + n * amount
                found.append((moment.name, at if moment.scores else int(self.spans[held.chunk][1]) - 1, parts))
        name, at, parts = max(found, key=lambda x: float(sum(x[2].values())))
        return name, at, {k: self.constant.get(k, 0.0) + parts.get(k, 0.0) for k in {*self.constant, *parts}}

    def least(self, ranks: Any) -> Any:
        """A lower bound that grows with all that blocks hold: what every chunk holds at one moment."""
        counts = np.array(schedules.fewest(self.x.schedule, self.x.pp, self.x.microbatches, self.vpp))[np.asarray(ranks)]
        if schedules.one_round(self.x.pp, self.x.microbatches, self.vpp):
            return sum(self.constant.values()) + sum(np.maximum(counts, 0) * c.kept for c in self.chunks)
        all_gathered = self.vpp <= schedules.GATHERED
        there = sum(np.maximum(counts, 0) * c.kept + c.layer_sums + c.root_sums + c.gathered * all_gathered for c in self.chunks)
        return sum(self.constant.values()) + np.where(counts >= 0, there, 0.0)
