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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from meshwright.costmodel import schedules
from meshwright.costmodel.chunkmemory import ChunkMemory
from meshwright.costmodel.layouts import SPLIT
from meshwright.costmodel.memory import MASTER, REDUCED
from meshwright.costmodel.moments import Moment, Parts
from meshwright.costmodel.splitmemory import SplitRank

CATEGORIES = ("parameters", "gathered", "gradients", "optimizer", "activations", "communication", "inputs", "temporaries")

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
    vpp: int = 1  # chunks of a rank
    state_bytes: float = 8.0  # of the optimizer, per parameter
    copies: int = 1  # of the shards: ranks that hold equal ones, over which a gradient is summed after it was reduced
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

    @property
    def holds_reduced(self) -> bool:
        """What was reduced over copies is held beside the sum that it was added to: till the block's next reduction, in a pipeline till the
        end of the backward."""
        return self.copies > 1 and self.zero >= 2 and self.microbatches > 1 and not self.first

    @property
    def holds_all_reduced(self) -> bool:
        return self.holds_reduced and self.pp == 1 and self.microbatches > 2


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
    local: np.ndarray | None = None  # of `padded`, what one rank stores; padded / shards if not given, but experts shard over ranks of their own
    recomputes: Any = False  # layers keep what goes into them; bool, or bool of each block
    backward_first: np.ndarray | None = None  # `backward` where no sum exists yet, if that differs
    # of schedules that split backward: what waits for W, the first half of a backward, the largest gradient of the second
    waits: np.ndarray | None = None
    halved: np.ndarray | None = None
    late: np.ndarray | None = None
    side: float = 0.0  # what layers take besides the carry
    output: float = 0.0  # what the model returns
    inputs: float = 0.0  # of all microbatches
    handed: float = 0.0  # from stage to stage


_ARRAYS = (
    "layer", "kept", "forward", "backward", "saved", "carry", "numel", "padded", "buffers", "incoming", "keeps_result", "last_numel", "tied",
    "recomputes", "backward_first", "local", "waits", "halved", "late",
)  # fmt: skip
_BOOLS = ("layer", "keeps_result", "recomputes")
_SCALARS = ("side", "output", "inputs", "handed")


@dataclass(frozen=True)
class Place:
    """How a rank stands in the pipeline. Numbers, or one for each range of blocks that is asked for.

    Chunks that follow on each other (where a V turns) are one. Assumed of several: each has receive buffers of its own, takes `side` and
    holds what it returns as a stage of its own would; between two of them a microbatch runs on as inside a stage.
    """

    stem: Any  # holds the model's first block
    head: Any  # holds its last
    chunks: Any  # parts of the model that do not follow on each other
    returned: Any  # bytes of a microbatch that chunks returned, where the pipeline alone holds them; less what receive buffers hold already
    borders: Any = None  # [chunks + 1] the blocks at which chunks begin and end, also of those that follow on each other


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

    @property
    def _splits(self) -> bool:
        return self.x.schedule in SPLIT and self.x.pp > 1

    @cached_property
    def _local(self) -> np.ndarray:
        return np.asarray(self.b.padded / self.x.shards if self.b.local is None else self.b.local)

    @cached_property
    def _sums(self) -> dict[str, np.ndarray]:
        b, root = self.b, ~self.b.layer
        terms = {
            "kept": b.kept, "numel": b.numel, "padded": b.padded, "buffers": b.buffers, "tied": b.tied, "root": b.numel * root,
            "root_padded": b.padded * root, "layers": b.numel * b.layer, "layers_padded": b.padded * b.layer, "local": self._local,
            "layers_local": self._local * b.layer,
        }  # fmt: skip
        return {name: np.concatenate([[0.0], np.cumsum(x)]) for name, x in terms.items()}

    def span(self, first: Any, last: Any, stage: int) -> tuple[Any, Any]:
        """Blocks [begin, end) of layers [first, last) as `stage`."""
        return self.blocks(first, last, stage == 0, stage == self.x.pp - 1)

    def blocks(self, first: Any, last: Any, stem: Any, head: Any) -> tuple[Any, Any]:
        """Blocks [begin, end) of layers [first, last), with all that stands before the layers or behind them or without."""
        n, at = len(self.b.layer), self.at
        begin = np.where(stem, 0, at[np.minimum(first, len(at) - 1)] if len(at) else 0)
        end = np.where(head, n, at[np.maximum(last, 1) - 1] + 1 if len(at) else n)
        return begin, end

    def flying(self, rank: Any) -> Any:
        """Microbatches whose activations the rank holds, the one that runs included; a chunk counts 1 / vpp."""
        x = self.x
        microbatches = x.microbatches if x.first or x.microbatches == 1 else x.microbatches - 1
        schedule = schedules.find(x.schedule)
        vpp = max(x.vpp, schedule.vpp[0])
        held = [schedule.in_flight(x.pp, int(r), microbatches, vpp) for r in np.ravel(rank)]
        return np.reshape(held, np.shape(rank)) if np.ndim(rank) else held[0]

    @property
    def by_chunk(self) -> bool:
        """Whether a rank has several chunks that do not follow on each other, and runs a microbatch's backward at once."""
        return self.x.vpp > 1 and self.x.schedule not in SPLIT

    def returned(self, begin: Any, end: Any, stem: Any, head: Any) -> Any:
        """What one chunk returned, where the pipeline alone holds it; less what a receive buffer holds already."""
        returns = ~self.b.keeps_result[np.minimum(end, len(self.b.layer)) - 1] * np.logical_not(head)
        received = np.asarray(self.b.recomputes)[begin if np.ndim(self.b.recomputes) else ...] * np.logical_not(stem)
        return self.b.handed * returns - self.b.handed * received

    def place(self, begin: Any, end: Any, stage: int) -> Place:
        """Of blocks [begin, end) as `stage` of a pipeline with one chunk a rank."""
        stem, head = stage == 0, stage == self.x.pp - 1
        return Place(stem, head, 1, self.returned(begin, end, stem, head))

    def base(self, begin: Any, end: Any, stage: int) -> Parts:
        """What is there at every moment in blocks [begin, end) as `stage`."""
        return self.base_at(begin, end, self.place(begin, end, stage), self.flying(stage))

    def base_at(self, begin: Any, end: Any, place: Place, flying: Any) -> Parts:
        """The same with so many microbatches in flight at `place`."""
        constant, kept, own = self._base(begin, end, place)
        return {**constant, "activations": (flying - 1) * kept + own}

    def _base(self, begin: Any, end: Any, place: Place) -> tuple[Parts, Any, Any]:
        """Parts whatever is in flight, activations of a microbatch in flight, and what the running one has before its first block."""
        x, s = self.x, self._sums

        def between(key: str) -> Any:
            return s[key][end] - s[key][begin]

        c = x.compute_bytes * x.fsdp
        received = place.chunks - place.stem * 1  # chunks that another rank hands to
        own = self.b.side * received + place.returned
        kept = between("kept") + own + self.b.output * place.head * (x.pp > 1)
        gradients: Any = 0.0
        if x.microbatches > 1 and not x.first:
            gradients = REDUCED * (between("numel") if x.sums_whole else between("local"))
        links = received + place.chunks - place.head * 1
        constant = {
            "parameters": MASTER * between("local") + between("buffers"),
            "gathered": c * (between("root_padded") if x.zero == 3 else between("padded")),
            "gradients": gradients,
            "optimizer": x.state_bytes * between("local"),
            "communication": (links * x.microbatches + (received > 0) * (x.microbatches > 1)) * self.b.handed
            + REDUCED * x.holds_all_reduced * between("local"),
            "inputs": self.b.inputs,
        }
        return constant, kept, own

    def moments(self, begin: Any, end: Any, place: Place) -> list[Moment]:
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
        output = b.output * place.head * (x.pp > 1)

        one = x.microbatches == 1 or x.first
        sums_tied = c * (s["tied"][end] - s["tied"][begin]) * (x.pp == 1)  # two gradients of one tensor, and their sum
        before = s["kept"][:-1]  # kept by the blocks before each, from the model's start
        own_grads = x.fsdp and not (x.sums_whole and not x.mixed)  # new gradients lie beside the sums until they are reduced or added
        root_grads = (c if x.fsdp else REDUCED) * (own_grads or one)
        reduces = x.fsdp and not x.sums_whole  # inside the backward of every microbatch
        leftover = REDUCED * (s["root_padded"][end] - s["root_padded"][begin]) if reduces and not one and x.pp == 1 else 0.0
        grows = one or x.holds_reduced and not x.holds_all_reduced
        grown = 0.0 * s["layers"] if not grows else s["layers_local"] if reduces else s["layers"]

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
        arrived = b.incoming[high] * np.logical_not(place.head)  # in a receive buffer, which the base counts
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
            "temporaries": b.forward - np.minimum(b.kept, b.forward), "communication": running * (shards > 1),
        }  # fmt: skip
        later = {**forward, "temporaries": np.maximum(b.forward, flat) - np.minimum(b.kept, b.forward)}  # or the flat buffer of the layer before
        root_flat = c * between(s["root_padded"]) * zero3 * (shards > 1)
        sums = const({})
        sums["temporaries"] = sums["temporaries"] + sums_tied
        # whether there is a backward that is neither the first nor the last
        between_steps = not (x.fsdp and x.sums_whole and x.pp == 1 and x.microbatches == 2 and not x.first)
        found = [
            Moment("forward", {"activations": -s["kept"][begin], "communication": leftover}, forward, begin, low + 1),
            Moment("forward", {"activations": -s["kept"][begin], "communication": leftover}, later, low + 1, end),
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
            kept_whole = REDUCED * (s["layers"] - s["layers_local"])
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
            held, replaced = c * b.last_numel * (shards > 1), REDUCED * x.holds_all_reduced
            new = np.maximum(c * b.numel, held + REDUCED * self._local) if reduces else self._late(b.numel, self._local, b.last_numel)
            new = new - replaced * self._local
            gone = 0.0 * s["layers"] if reduces else REDUCED * (s["layers"] - s["layers_local"])
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
                        else self._late(root, padded / shards, self._last_root(begin, end)),
                        "communication": REDUCED * padded - replaced * padded / shards, "gradients": done, "activations": 0.0 * root + output,
                        "gathered": -c * padded if zero3 else -freed[end] + freed[begin] - c * padded * ends,
                    },
                )
            )  # fmt: skip
        if x.fsdp and not reduces and x.pp > 1:  # a pipeline reduces when all its microbatches are done, the root first
            padded = between(s["root_padded"])
            late = self._late(between(s["root"]), padded / shards, self._last_root(begin, end))
            parts = {"gathered": -c * padded, "communication": REDUCED * padded, "temporaries": late}
            found.append(Moment("reduction", parts, idle=True))
        if x.first and x.fsdp and not reduces:  # the first backward leaves fp32 sums where there were none
            last_root = c * self._last_root(begin, end) * x.mixed
            found.append(Moment("accumulation", {"gradients": REDUCED * between(s["numel"]), "activations": output, "temporaries": last_root}))
        return found

    def _late(self, numel: Any, local: Any, last: Any) -> Any:
        """What a reduced result takes beyond the sums that it replaces, of which a reduction over ranks holds the last until it is done."""
        return np.maximum(REDUCED * local - REDUCED * (numel - last), 0.0) * (self.x.shards > 1)

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
        begin, end = self.span(first, last, stage)
        return self.live_at(begin, end, self.place(begin, end, stage), stage)

    def live_of_stages(self, first: Any, last: Any) -> list[Any]:
        """The same as each stage in turn."""
        found: list[Any] = []
        for ranks in ([0], range(1, self.x.pp - 1), [self.x.pp - 1][: self.x.pp - 1]):  # the stages between the ends are alike
            if len(ranks):
                begin, end = self.span(first, last, ranks[0])
                of_rank = np.reshape(ranks, (-1, *[1] * np.ndim(begin)))
                found += list(self.live_at(begin, end, self.place(begin, end, ranks[0]), of_rank))
        return found

    def live_at(self, begin: Any, end: Any, place: Place, rank: Any) -> Any:
        """Peak live bytes of blocks [begin, end) at `place`, as `rank` in the order of the pipeline; numbers or arrays, broadcast."""
        if self._splits:
            return SplitRank(self, begin, end, place).peaks(rank)
        if self.by_chunk and place.borders is not None:
            return ChunkMemory(self, begin, end, place).live(rank)
        flying = self.flying(rank)
        peak = self._peaks(begin, end, place, flying)
        if self._first is not None:
            early = self._first.flying(rank)
            two = self.x.pp == 1 and self.x.microbatches == 2 and self.x.fsdp  # no backward of two is like a later one
            more = (early > flying) | two
            if np.any(more):
                peak = np.where(more, np.maximum(peak, self._first._peaks(begin, end, place, early)), peak)
        return peak

    def least_at(self, begin: Any, end: Any, place: Place, rank: Any) -> Any:
        """A lower bound on `live_at` that grows with all that blocks hold: the last block's forward alone."""
        if self._splits:
            return SplitRank(self, begin, end, place).least(rank)
        if self.by_chunk and place.borders is not None:
            return ChunkMemory(self, begin, end, place).least(rank)
        constant, kept, own = self._base(begin, end, place)
        before = self._sums["kept"][end - 1] - self._sums["kept"][begin]
        return sum(constant.values()) + (self.flying(rank) - 1) * kept + own + before + self.b.forward[end - 1]

    def _peaks(self, begin: Any, end: Any, place: Place, flying: Any) -> Any:
        busy, idle = np.full(np.shape(begin), -np.inf), np.full(np.shape(begin), -np.inf)
        for m in self.moments(begin, end, place):
            if m.idle:
                idle = np.maximum(idle, m.height)
            else:
                busy = np.maximum(busy, m.height)
        constant, kept, own = self._base(begin, end, place)
        total = sum(constant.values())
        return np.maximum(total + ((flying - 1) * kept + own) + busy, total + idle)

    @cached_property
    def _first(self) -> StageMemory | None:
        """The first backward of a pipeline, when every microbatch may be in flight; None if there is but one backward."""
        if self.x.microbatches == 1 or self.x.first:
            return None
        backward = self.b.backward if self.b.backward_first is None else self.b.backward_first
        return StageMemory(replace(self.b, backward=backward), replace(self.x, first=True))

    def peak(self, first: int, last: int, stage: int) -> tuple[str, int, dict[str, float]]:
        """The moment of the peak of layers [first, last) as `stage`, its block, and its bytes by category."""
        begin, end = self.span(first, last, stage)
        return self.peak_at(begin, end, self.place(begin, end, stage), stage)

    def peak_at(self, begin: Any, end: Any, place: Place, rank: int) -> tuple[str, int, dict[str, float]]:
        """The same of blocks [begin, end) at `place`."""
        if self._splits or (self.by_chunk and place.borders is not None):
            name, at, parts = (SplitRank if self._splits else ChunkMemory)(self, begin, end, place).peak(rank)
            return name, at, {k: float(parts.get(k, 0.0)) for k in CATEGORIES}
        base = self.base_at(begin, end, place, self.flying(rank))
        heights = [(float(m.height - base["activations"] * m.idle), m) for m in self.moments(begin, end, place)]
        height, best = max(heights, key=lambda x: x[0])
        if self._first is not None and float(self.live_at(begin, end, place, rank)) > sum(base.values()) + height:
            return self._first.peak_at(begin, end, place, rank)
        if best.idle:
            base = {**base, "activations": 0.0}
        at, parts = best.fullest()
        return best.name, at if best.scores else int(end) - 1, {k: float(base.get(k, 0.0) + parts.get(k, 0.0)) for k in CATEGORIES}

    @cached_property
    def _table(self) -> np.ndarray:
        """What blocks hold, [_ARRAYS, blocks]."""
        own = {name: getattr(self.b, name) for name in _ARRAYS}
        own["local"] = self._local
        own["backward_first"] = self.b.backward if self.b.backward_first is None else self.b.backward_first
        own["recomputes"] = np.broadcast_to(self.b.recomputes, len(self.b.layer))
        own |= {name: np.zeros(len(self.b.layer)) for name in ("waits", "halved", "late") if own[name] is None}
        return np.array([own[name] for name in _ARRAYS], float)


def joined(memories: Sequence[StageMemory], index: np.ndarray) -> StageMemory:
    """Blocks of several memories of one layout, one behind another: `index` counts through those of each in turn."""
    one = memories[0]
    for m in memories[1:]:
        differ = [name for name in _SCALARS if getattr(m.b, name) != getattr(one.b, name)]
        if differ or m.x != one.x:
            raise ValueError(f"stage memories of one layout differ in {', '.join(differ) or 'their shape'}")
    table = np.concatenate([m._table for m in memories], axis=1)[:, index]
    arrays: dict[str, Any] = {name: row > 0 if name in _BOOLS else row for name, row in zip(_ARRAYS, table, strict=True)}
    return StageMemory(Blocks(**arrays, **{name: getattr(one.b, name) for name in _SCALARS}), one.x)
