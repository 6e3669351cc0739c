"""Layouts as arrays: what the cost model prices, any number at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RECOMPUTE = ("none", "selective", "full")
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zero-bubble", "zbv", "dualpipev", "looped-bfs")
ASKED = ("gpipe", "looped-bfs")  # they take as long as others that hold less: only where asked for
LOSSES = ("plain", "chunked", "vocab_parallel")
STATE_DTYPES = ("fp32", "bf16")
OFFLOADS = ("none", "optimizer")
FREE = -1  # not chosen yet: the cost model then takes whatever is cheapest, so that its price is a lower bound
LOSS_CHUNKS = 8  # of a chunked loss
BY_ROW = ("aten:_to_copy", "aten:to", "aten:mul", "aten:div")  # what may stand between logits and a loss in chunks
V_SHAPED = ("zbv", "dualpipev")
SPLIT = ("zero-bubble", "zbv", "dualpipev")  # the gradient of the weights runs apart from that of the input

Array = np.ndarray


@dataclass(frozen=True)
class Layouts:
    """Arrays of one length. `ulysses`, `loss`, `state` and `offload` index the choices above; `zero`, `schedule` and `offload` may be FREE.

    Devices are tp x cp x pp x dp, ranks ordered pp, dp, cp, tp with tp innermost; expert ranks are edp x ep x etp on the same
    devices of a stage, etp innermost. `replicas` are groups of data-parallel ranks that hold equal copies under ZeRO 1 to 3.
    """

    tp: Array
    sp: Array
    cp: Array
    ulysses: Array
    pp: Array
    dp: Array
    ep: Array
    etp: Array
    micro_batch: Array
    microbatches: Array
    zero: Array
    replicas: Array
    schedule: Array
    vpp: Array
    loss: Array
    state: Array
    offload: Array

    def __len__(self) -> int:
        return len(self.tp)

    @classmethod
    def of(cls, **columns: Array | int) -> Layouts:
        """Layouts with defaults for the columns that are not given: one device wide, ZeRO 0, 1F1B."""
        n = max((np.size(v) for v in columns.values()), default=1)
        ones = ("tp", "cp", "pp", "dp", "ep", "etp", "micro_batch", "microbatches", "replicas", "vpp")
        return cls(*(np.broadcast_to(columns.get(f, int(f in ones)), n).astype(np.int64) for f in cls.__dataclass_fields__))

    def take(self, index: Array | slice) -> Layouts:
        return Layouts(*(getattr(self, f)[index] for f in self.__dataclass_fields__))

    def with_columns(self, **columns: Array) -> Layouts:
        return Layouts(*(np.asarray(columns.get(f, getattr(self, f))) for f in self.__dataclass_fields__))

    @classmethod
    def join(cls, parts: list[Layouts]) -> Layouts:
        return cls(*(np.concatenate([getattr(p, f) for p in parts]) for f in cls.__dataclass_fields__))

    @property
    def stage(self) -> Array:
        """Devices of one pipeline stage."""
        return self.tp * self.cp * self.dp

    @property
    def shards(self) -> Array:
        """Ranks that share one copy of what is not an expert's, under ZeRO 1 to 3."""
        return self.dp // self.replicas * self.cp

    @property
    def edp(self) -> Array:
        """Ranks that hold the same experts."""
        return self.stage // (self.ep * self.etp)

    @property
    def expert_shards(self) -> Array:
        """Of those, the ones that share a copy under ZeRO 1 to 3."""
        return self.edp // self.replicas
