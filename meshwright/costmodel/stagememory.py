"""Peak live bytes of a pipeline stage, closed form: the largest of the few moments at which a training step can peak.

FSDP2 as the runtime applies it (torch 2.13): a parameter is stored in fp32, sharded; used in the compute dtype, gathered; its
gradient is reduced in fp32. With c the bytes of the compute dtype and P parameters,

    parameters   4 P / shard
    gathered     c P for ZeRO 0 to 2; for ZeRO 3 what is outside the layers, the layer that runs and the buffer of the next
    gradients    4 P summed whole over microbatches (ZeRO 0 and 1), or 4 P / shard
    optimizer    8 P / shard, AdamW's two moments; 4 P / shard, one of momentum; none
    communication  what a reduce-scatter reads, in fp32, until the next one begins; a pipeline's receive buffers, one a microbatch

Around these stand the activations of the microbatches in flight. The moments: a block runs forward; a block runs backward (the loss
is one); a layer's gradients are reduced; those outside the layers are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from meshwright.costmodel import schedules
from meshwright.costmodel.memory import MASTER, REDUCED

CATEGORIES = ("parameters", "gathered", "gradients", "optimizer", "activations", "communication", "inputs", "temporaries")
Parts = dict[str, Any]  # bytes by category, numbers or arrays


@dataclass(frozen=True)
class Shape:
    """What of a layout decides where bytes lie."""

    pp: int
    microbatches: int
    zero: int
    dp: int
    compute_bytes: float
    mixed: bool  # computes in fewer bits than fp32
    schedule: str = "1f1b"
    state_bytes: float = 8.0  # of the optimizer, per parameter
    first: bool = False  # the first backward of a step rather than a later one: nothing is summed yet

    @property
    def fsdp(self) -> bool:
        return self.dp > 1 or self.mixed

    @property
    def shards(self) -> int:
        return self.dp if self.zero else 1

    @property
    def sums_whole(self) -> bool:
        """Gradients are summed unsharded over microbatches and reduced once."""
        return self.zero < 2 and self.microbatches > 1


@dataclass(frozen=True)
class Blocks:
    """The model's blocks in order, on one rank, for one layout. All [blocks], bytes of one microbatch or counts."""

    layer: np.ndarray  # bool: an element of the layer list
    kept: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    saved: np.ndarray
    carry: np.ndarray
    numel: np.ndarray
    padded: np.ndarray
    buffers: np.ndarray
    incoming: np.ndarray  # of `backward`: the gradient of what the block returns
    keeps_result: np.ndarray  # bool: what the block returns is among what it keeps
    last_numel: np.ndarray  # of the block's last parameter, whose gradient a reduction holds longest
    tied: np.ndarray  # of the block's parameters, those that an earlier block holds: in `numel` of that one only, with gradients of their own
    recomputes: bool = False  # layers keep what goes into them
    backward_first: np.ndarray | None = None  # `backward` where no sum exists yet, if that differs
    side: float = 0.0  # what layers take besides the carry
    output: float = 0.0  # what the model returns
    inputs: float = 0.0  # of all microbatches
    handed: float = 0.0  # from stage to stage


@dataclass(frozen=True)
class Moment:
    """A candidate for the peak: constant parts for the stage, and parts of each block over a range of blocks."""

    name: str
    parts: Parts
    scores: Parts = field(default_factory=dict)  # [blocks]
    begin: Any = 0
    end: Any = 0  # no block if end <= begin
    needs: Any = True  # where the moment exists
    idle: bool = False  # no microbatch is in flight


class RangeMax:
    """Maximum of a fixed array over ranges [a, b), for arrays of ranges; minus infinity where a range is empty."""

    def __init__(self, values: np.ndarray) -> None:
        self.rows = [np.append(values, -np.inf)]
        while (1 << len(self.rows)) <= len(values):
            last, half = self.rows[-1], 1 << (len(self.rows) - 1)
            self.rows.append(np.maximum(last, np.append(last[half:], np.full(half, -np.inf))))

    def __call__(self, a: Any, b: Any) -> Any:
        a, b = np.broadcast_arrays(a, b)
        length = np.maximum(b - a, 1)
        k = np.frexp(length)[1] - 1
        table = np.stack(self.rows)
        most = table.shape[1] - 1
        first = table[k, np.clip(a, 0, most)]
        second = table[k, np.clip(b - (1 << k), 0, most)]
        return np.where(b > a, np.maximum(first, second), -np.inf)


class StageMemory:
    """Live bytes of any interval of layers as any stage of a layout."""

    def __init__(self, blocks: Blocks, shape: Shape) -> None:
        self.b, self.x = blocks, shape
        n = len(blocks.layer)
        self.at = np.flatnonzero(blocks.layer)  # positions of the layers
        position = np.arange(n)
        order = np.searchsorted(self.at, position)
        self._below = np.where(order > 0, self.at[np.maximum(order - 1, 0)] if len(self.at) else 0, -1)
        after = np.searchsorted(self.at, position, side="right")
        self._above = np.where(after < len(self.at), self.at[np.minimum(after, max(len(self.at) - 1, 0))] if len(self.at) else 0, -1)

    @cached_property
    def _sums(self) -> dict[str, np.ndarray]:
        b, root = self.b, ~self.b.layer
        terms = {
            "kept": b.kept, "numel": b.numel, "padded": b.padded, "buffers": b.buffers, "tied": b.tied, "root": b.numel * root,
            "root_padded": b.padded * root, "layers": b.numel * b.layer, "layers_padded": b.padded * b.layer,
        }  # fmt: skip
        return {name: np.concatenate([[0.0], np.cumsum(x)]) for name, x in terms.items()}

    def span(self, first: Any, last: Any, stage: int) -> tuple[Any, Any]:
        """Blocks [begin, end) of layers [first, last) as `stage`."""
        n, at = len(self.b.layer), self.at
        begin = np.where(stage == 0, 0, at[np.minimum(first, len(at) - 1)] if len(at) else 0)
        end = np.where(stage == self.x.pp - 1, n, at[np.maximum(last, 1) - 1] + 1 if len(at) else n)
        return begin, end

    def flying(self, stage: int) -> float:
        """Microbatches whose activations the stage holds, the one that runs included."""
        x = self.x
        microbatches = x.microbatches if x.first or x.microbatches == 1 else x.microbatches - 1
        schedule = schedules.find(x.schedule)
        return schedule.in_flight(x.pp, stage, microbatches, schedule.vpp[0])

    def returned(self, end: Any, stage: int) -> Any:
        """What a stage that is not the last returned, where the pipeline alone holds it; less what a receive buffer holds already."""
        received = self.b.handed * (stage > 0 and self.b.recomputes)
        return self.b.handed * ~self.b.keeps_result[np.minimum(end, len(self.b.layer)) - 1] * (stage < self.x.pp - 1) - received

    def base(self, begin: Any, end: Any, stage: int) -> Parts:
        """What is there at every moment."""
        x, s = self.x, self._sums

        def between(key: str) -> Any:
            return s[key][end] - s[key][begin]

        c = x.compute_bytes * x.fsdp
        flying = self.flying(stage)
        kept = between("kept") + (self.b.side if stage else 0.0) + self.returned(end, stage)
        kept = kept + (self.b.output if x.pp > 1 and stage == x.pp - 1 else 0.0)
        gradients: Any = 0.0
        if x.microbatches > 1 and not x.first:
            gradients = REDUCED * (between("numel") if x.sums_whole else between("padded") / x.shards)
        received = (stage > 0) + (stage < x.pp - 1) if x.pp > 1 else 0
        return {
            "parameters": MASTER * between("padded") / x.shards + between("buffers"),
            "gathered": c * (between("root_padded") if x.zero == 3 else between("padded")),
            "gradients": gradients,
            "optimizer": x.state_bytes * between("padded") / x.shards,
            "activations": (flying - 1) * kept + (self.b.side if stage else 0.0) + self.returned(end, stage),
            "communication": (received * x.microbatches + (stage > 0 and x.microbatches > 1)) * self.b.handed,
            "inputs": self.b.inputs,
        }

    def moments(self, begin: Any, end: Any, stage: int) -> list[Moment]:
        """The candidates for the peak, beside the base, of blocks [begin, end)."""
        x, b, s = self.x, self.b, self._sums
        at = self.at
        c = x.compute_bytes
        shards, zero3 = x.shards, x.zero == 3
        n = len(b.layer)
        # the first and the last layer of the stage
        lows, highs = np.searchsorted(at, begin), np.searchsorted(at, end) - 1
        some = highs >= lows
        low = at[np.clip(lows, 0, max(len(at) - 1, 0))] if len(at) else np.zeros_like(begin)
        high = at[np.clip(highs, 0, max(len(at) - 1, 0))] if len(at) else np.zeros_like(begin)
        low, high = np.where(some, low, begin), np.where(some, high, begin)
        last_stage = stage == x.pp - 1
        output = b.output if last_stage and x.pp > 1 else 0.0

        one = x.microbatches == 1 or x.first
        sums_tied = c * float(b.tied.sum()) * (stage == 0) * (x.pp == 1)  # two gradients of one tensor, and their sum
        before = s["kept"][:-1]  # kept by the blocks before each, from the model's start
        own_grads = x.fsdp and not (x.sums_whole and not x.mixed)  # new gradients lie beside the sums until they are reduced or added
        root_grads = (c if x.fsdp else REDUCED) * (own_grads or one)
        reduces = x.fsdp and not x.sums_whole  # inside the backward of every microbatch
        leftover = REDUCED * (s["root_padded"][end] - s["root_padded"][begin]) if reduces and not one and x.pp == 1 else 0.0
        grown = 0.0 * s["layers"] if not one else s["layers_padded"] / shards if reduces else s["layers"]

        def between(prefix: np.ndarray) -> Any:
            return prefix[end] - prefix[begin]

        def const(extra: Parts) -> Parts:
            """Parts of a moment in the backward of block j: the sums run to the stage's end, the scores take away up to j."""
            return {
                "activations": -s["kept"][begin] + output,
                "temporaries": root_grads * s["root"][end] + c * s["tied"][end],
                "gradients": REDUCED * grown[end],
                "gathered": -freed[end],
                **extra,
            }

        # the last backward of a step frees what was gathered, layer by layer
        frees = x.fsdp and x.pp == 1 and x.zero < 3 and x.microbatches <= 2 and not x.first
        freed = c * s["layers_padded"] if frees else 0.0 * s["layers"]
        after = {"temporaries": -root_grads * s["root"][1:] - c * s["tied"][1:], "gradients": -REDUCED * grown[1:], "gathered": freed[1:]}
        running = np.where(b.layer, b.padded, 0.0) * c * zero3
        flat = np.where(self._below >= 0, b.padded[self._below], 0.0) * c * zero3 * (shards > 1) * b.layer
        reading = np.where(self._above >= 0, b.padded[self._above], 0.0) * REDUCED * reduces
        arrived = b.incoming[high] * (not last_stage)  # in a receive buffer, which the base counts
        saved = np.minimum(b.saved, b.backward)

        def score(extra_communication: Any) -> Parts:
            return {
                "activations": before + saved,
                "temporaries": b.backward - saved + after["temporaries"],
                "gradients": after["gradients"],
                "gathered": running + after["gathered"],
                "communication": extra_communication,
            }

        zeros = np.zeros(n)
        forward = {
            "activations": before + np.minimum(b.kept, b.forward), "gathered": running,
            "temporaries": np.maximum(b.forward, flat) - np.minimum(b.kept, b.forward),  # or the flat buffer of the layer before
            "communication": running * (shards > 1),
        }  # fmt: skip
        root_flat = c * between(s["root_padded"]) * zero3 * (shards > 1)
        sums = const({})
        sums["temporaries"] = sums["temporaries"] + sums_tied
        # whether there is a backward that is neither the first nor the last
        between_steps = not (x.fsdp and x.sums_whole and x.pp == 1 and x.microbatches == 2 and not x.first)
        found = [
            Moment("forward", {"activations": -s["kept"][begin], "communication": leftover}, forward, begin, end),
            Moment("forward", {"activations": -s["kept"][begin], "communication": leftover + root_flat}, forward, begin, low),
            Moment(  # the first layer is gathered while the root's buffer is there
                "forward",
                {
                    "activations": s["kept"][low] - s["kept"][begin], "gathered": c * b.padded[low] * zero3,
                    "communication": leftover + root_flat + c * b.padded[low] * zero3 * (shards > 1),
                },
                needs=some,
            ),
            Moment("backward", const({"communication": leftover}), score(zeros), high + 1, end),  # after the layers: the loss
            Moment("backward", const({"communication": leftover - arrived}), score(zeros), high, high + 1, some),
            Moment("backward", const({"communication": leftover - arrived}), score(flat), high, high + 1, some & (high > low) & between_steps),
            Moment("backward", const({}), score(flat + reading), low + 1, high, between_steps),
            Moment("backward", const({}), score(reading), low, low + 1, some & (high > low) & between_steps),
            Moment("backward", sums, score(reading), begin, low, between_steps),  # before the layers
        ]
        if x.fsdp and x.sums_whole and x.pp == 1 and not x.first:  # the last backward of a step, which reduces and frees layer by layer
            above = REDUCED * np.where(self._above >= 0, b.padded[self._above], 0.0)
            kept_whole = REDUCED * (s["layers"] - s["layers_padded"] / shards)
            freed_last = c * s["layers_padded"]
            last = score(above)
            last["gradients"] = last["gradients"] + kept_whole[1:]
            last["gathered"] = running + freed_last[1:]
            sums_last = {**sums, "gathered": -freed_last[end], "gradients": sums["gradients"] - kept_whole[end]}
            found.append(Moment("backward", sums_last, last, begin, low))
            without = {**sums_last, "temporaries": sums["temporaries"] - sums_tied}
            found.append(Moment("backward", without, last, low, high))
        if x.fsdp and (reduces or x.pp == 1 and not x.first):
            # the buffer is filled from the gradients, which go before the reduced ones come
            held = c * b.last_numel * (shards > 1)
            new = np.maximum(c * b.numel, held + REDUCED * b.padded / shards) if reduces else self._late(b.numel, b.padded, b.last_numel)
            gone = 0.0 * s["layers"] if reduces else REDUCED * (s["layers"] - s["layers_padded"] / shards)
            ends = frees or (x.sums_whole and x.pp == 1)  # gathered parameters go before their gradients are reduced
            freed = c * s["layers_padded"] if ends else 0.0 * s["layers"]
            parts = {
                "activations": before, "temporaries": new + b.carry + after["temporaries"], "gradients": after["gradients"] + gone[1:],
                "communication": REDUCED * b.padded, "gathered": freed[:-1],  # its own too
            }  # fmt: skip
            reduce = const({"gathered": -freed[end]})
            reduce["gradients"] = reduce["gradients"] - gone[end]
            found.append(Moment("reduction", reduce, parts, low, np.where(some, high + 1, low)))
            if zero3:
                found.append(Moment("reduction", reduce, {**parts, "communication": parts["communication"] + flat}, low + 1, high + 1))
            root = s["root"][end] - s["root"][begin]
            padded = s["root_padded"][end] - s["root_padded"][begin]
            done = REDUCED * (grown[end] - grown[begin]) - (gone[end] - gone[begin])
            found.append(
                Moment(
                    "reduction",
                    {
                        "temporaries": np.maximum(c * root, self._last_root(begin, end) * c * (shards > 1) + REDUCED * padded / shards)
                        if reduces
                        else self._late(root, padded, self._last_root(begin, end)),
                        "communication": REDUCED * padded, "gradients": done, "activations": 0.0 * root + output,
                        "gathered": -c * padded if zero3 else -freed[end] + freed[begin] - c * padded * ends,
                    },
                )
            )  # fmt: skip
        if x.fsdp and not reduces and x.pp > 1:  # a pipeline reduces when all its microbatches are done, the root first
            padded = between(s["root_padded"])
            late = self._late(between(s["root"]), padded, self._last_root(begin, end))
            parts = {"gathered": -c * padded, "communication": REDUCED * padded, "temporaries": late}
            found.append(Moment("reduction", parts, idle=True))
        if x.first and x.fsdp and not reduces:  # the first backward leaves fp32 sums where there were none
            last_root = c * self._last_root(begin, end) * x.mixed
            found.append(Moment("accumulation", {"gradients": REDUCED * between(s["numel"]), "activations": output, "temporaries": last_root}))
        return found

    def _late(self, numel: Any, padded: Any, last: Any) -> Any:
        """What a reduced result takes beyond the sums that it replaces, of which a reduction over ranks holds the last until it is done."""
        return np.maximum(REDUCED * padded / self.x.shards - REDUCED * (numel - last), 0.0) * (self.x.shards > 1)

    def _last_root(self, begin: Any, end: Any) -> Any:
        """The last parameter outside the layers, of blocks [begin, end)."""
        holds = np.flatnonzero(~self.b.layer & (self.b.numel > 0))
        if not len(holds):
            return 0.0 * begin
        at = np.searchsorted(holds, end) - 1
        block = holds[np.maximum(at, 0)]
        return np.where((at >= 0) & (block >= begin), self.b.last_numel[block], 0.0)

    def live(self, first: Any, last: Any, stage: int) -> Any:
        """Peak live bytes of layers [first, last) as `stage`; numbers or arrays."""
        return self._live_of(first, last, [stage])[0]

    def live_of_stages(self, first: Any, last: Any) -> list[Any]:
        """The same as each stage in turn."""
        return self._live_of(first, last, range(self.x.pp))

    def _live_of(self, first: Any, last: Any, stages: Iterable[int]) -> list[Any]:
        heights: dict[tuple[bool, bool, bool], tuple[Any, Any]] = {}  # above what is always there: the stages between the ends are alike

        def live(memory: StageMemory, stage: int, begin: Any, end: Any) -> Any:
            kind = (memory.x.first, stage == 0, stage == self.x.pp - 1)
            if kind not in heights:
                busy, idle = np.full(np.shape(begin), -np.inf), np.full(np.shape(begin), -np.inf)
                for m in memory.moments(begin, end, stage):
                    if m.idle:
                        idle = np.maximum(idle, memory._height(m))
                    else:
                        busy = np.maximum(busy, memory._height(m))
                heights[kind] = busy, idle
            base = memory.base(begin, end, stage)
            total = sum(base.values())
            return np.maximum(total + heights[kind][0], total - base["activations"] + heights[kind][1])

        found = []
        for stage in stages:
            begin, end = self.span(first, last, stage)
            peak = live(self, stage, begin, end)
            two = self.x.pp == 1 and self.x.microbatches == 2 and self.x.fsdp  # no backward of two is like a later one
            if self._first is not None and (two or self._first.flying(stage) > self.flying(stage)):
                peak = np.maximum(peak, live(self._first, stage, begin, end))
            found.append(peak)
        return found

    @cached_property
    def _first(self) -> StageMemory | None:
        """The first backward of a pipeline, when every microbatch may be in flight; None if there is but one backward."""
        if self.x.microbatches == 1 or self.x.first:
            return None
        backward = self.b.backward if self.b.backward_first is None else self.b.backward_first
        return StageMemory(replace(self.b, backward=backward), replace(self.x, first=True))

    def _height(self, m: Moment) -> Any:
        total = sum(m.parts.values())
        if m.scores:
            total = total + RangeMax(np.asarray(sum(m.scores.values()), float))(m.begin, m.end)
        return np.where(m.needs, total, -np.inf)

    def peak(self, first: int, last: int, stage: int) -> tuple[str, int, dict[str, float]]:
        """The moment of the peak, its block, and its bytes by category."""
        begin, end = self.span(first, last, stage)
        base = self.base(begin, end, stage)
        heights = [(float(self._height(m) - base["activations"] * m.idle), m) for m in self.moments(begin, end, stage)]
        height, best = max(heights, key=lambda x: x[0])
        if self._first is not None and float(self.live(first, last, stage)) > sum(base.values()) + height:
            return self._first.peak(first, last, stage)
        if best.idle:
            base = {**base, "activations": 0.0}
        at, parts = int(end) - 1, dict(best.parts)
        if best.scores:
            total = np.asarray(sum(best.scores.values()), float)
            at = int(best.begin) + int(np.argmax(total[int(best.begin) : int(best.end)]))
            parts = {k: parts.get(k, 0.0) + (best.scores[k][at] if k in best.scores else 0.0) for k in {*parts, *best.scores}}
        return best.name, at, {k: float(base.get(k, 0.0) + parts.get(k, 0.0)) for k in CATEGORIES}
