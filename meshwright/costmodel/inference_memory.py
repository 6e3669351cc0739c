"""Bytes of one rank that only runs forward: weights, the key-value cache at full length, and the largest work in between.

    weights    c P / tp of the blocks that the rank's pipeline stage holds (what tensor parallelism does not divide is whole)
    cache      b s h (d + d_v) c for each causal attention op: b sequences of s positions, h key-value heads of d and d_v
               (Pope et al. 2022, section 3.3; Kwon et al. 2023, section 2: two vectors a head and position)
    working    the most that is alive at once while one block runs forward, loss left out: over one whole prompt at a time where
               there is a cache (Yu et al. 2022, section 4: requests join the batch as they come), over the batch where not

with c the bytes of the compute dtype. The cache is that of the traced program: a model whose engine caches something smaller
(a latent, a window) needs less. A prompt is processed in one piece, with logits at each position; engines that cut it need less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.costmodel.sharded import ShardedBlock
from meshwright.profiling.graph import DTYPE_BYTES, ModelGraph, Op


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes of one stage on one rank."""

    weights: float
    kv_cache: float
    working: float

    @property
    def live_bytes(self) -> float:
        return self.weights + self.kv_cache + self.working

    def by_kind(self) -> dict[str, float]:
        return {k: v for k, v in (("weights", self.weights), ("kv_cache", self.kv_cache), ("working", self.working)) if v > 0}


def inference_memory(graph: ModelGraph, sharded: Sequence[ShardedBlock], batch: int, pp: int = 1) -> list[InferenceMemory]:
    """Memory of each pipeline stage for `batch` sequences of the graph's length on one replica.

    `sharded` are the graph's blocks on the tensor-parallel ranks, in block order. Layers are dealt out as evenly as they go.
    """
    compute_bytes = 2.0 if graph.precision == "bf16" else 4.0
    cache = [_cache_bytes(s, batch, compute_bytes) for s in sharded]
    # then one token of each sequence at a time, which is as many tokens as batch / seq prompts have
    at_once = max(1, -(-batch // graph.seq)) if any(cache) else batch
    working = [forward_peak(s, at_once) for s in sharded]
    stages = []
    for blocks in _stages(graph, pp):
        held: dict[str, float] = {}
        tied = {name: group[0] for group in graph.tied for name in group}
        for block, path in blocks:
            for p in sharded[block].block.params:
                name = f"{path}.{p.name}" if path else p.name
                held[tied.get(name, name)] = p.numel * sharded[block].share(f"param:{p.name}")
        stages.append(
            InferenceMemory(
                weights=compute_bytes * sum(held.values()),
                kv_cache=sum(cache[b] for b, _ in blocks),
                working=max((working[b] for b, _ in blocks), default=0.0),
            )
        )
    return stages


def _stages(graph: ModelGraph, pp: int) -> list[list[tuple[int, str]]]:
    """(block, path) of everything that each stage holds: what comes before the layers on the first, after them on the last."""
    sequence = [(o.block, o.path) for o in graph.sequence]
    layers = [i for i, o in enumerate(graph.sequence) if graph.blocks[o.block].repeated]
    if pp == 1 or not layers:
        return [sequence]
    ends = [layers[round(len(layers) * (s + 1) / pp) - 1] + 1 for s in range(pp)]
    ends[-1] = len(sequence)
    return [sequence[first:last] for first, last in zip([0, *ends[:-1]], ends, strict=True)]


def _cache_bytes(sharded: ShardedBlock, batch: int, compute_bytes: float) -> float:
    total = 0.0
    for op in sharded.block.ops:
        if op.kind == "attention" and op.dims.get("causal"):
            d = op.dims
            share = max(sharded.share(op.name), 1 / d["kv_heads"])  # heads are divided as its output is, and a rank has one at least
            total += batch * d["batch"] * d["kv"] * d["kv_heads"] * (d["head_dim"] + d["v_head_dim"]) * compute_bytes * share
    return total


def forward_peak(sharded: ShardedBlock, batch: int) -> float:
    """The most bytes alive while a block runs forward: each value from its op to its last reader; views share their source's."""
    block = sharded.block
    ops = [op for op in block.ops if op.module != "@loss"]
    source: dict[str, str] = {}

    def root(value: str) -> str:
        return source.get(value.partition(":")[0], value.partition(":")[0]) if not value.startswith(("in:", "param:", "buffer:")) else value

    last: dict[str, int] = {}
    for i, op in enumerate(ops):
        if op.kind == "view" and op.inputs:
            source[op.name] = root(op.inputs[0])
        for v in op.inputs:
            last[root(v)] = i
    for v in block.outputs:
        last[root(v)] = len(ops)
    carries = [f"in:{i}" for i, x in enumerate(block.inputs) if x.role != "batch"]
    size = {v: _bytes(v, sharded, batch) for v in carries}
    alive = sum(size.values())
    most = alive
    for i, op in enumerate(ops):
        if op.kind != "view":
            size[op.name] = sum(_output_bytes(op, sharded, batch))
            alive += size[op.name]
            most = max(most, alive)
            last.setdefault(op.name, i)
        for v in [v for v in size if last.get(v, -1) == i]:
            alive -= size.pop(v)
    return most


def _bytes(value: str, sharded: ShardedBlock, batch: int) -> float:
    spec = sharded.block.spec_of(value)
    many = batch if spec.batch_dim is not None else 1
    return spec.numel * DTYPE_BYTES.get(spec.dtype, 4) * many * sharded.share(value)


def _output_bytes(op: Op, sharded: ShardedBlock, batch: int) -> list[float]:
    names = [op.name] if len(op.outputs) == 1 else [f"{op.name}:{i}" for i in range(len(op.outputs))]
    return [_bytes(v, sharded, batch) for v in names]
