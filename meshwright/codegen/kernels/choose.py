"""Which kernels a plan uses: those whose traffic and launches the cost model prices below eager's, at the shard's shapes.

Eager is priced op by op, as everywhere in the planner; a kernel by the bytes that it moves, as one pointwise op each way. What backward
keeps is the choice of fewest bytes that stay (ties: of least time), and a kernel that would keep more than eager does is not chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np

from meshwright.codegen.kernels.building import Use
from meshwright.codegen.kernels.generate import generate, traffic
from meshwright.codegen.kernels.layout import PROGRAMS
from meshwright.codegen.kernels.lowering import Lowered, lower
from meshwright.codegen.kernels.recipe import SAVES, Save
from meshwright.codegen.kernels.regions import Region, find
from meshwright.costmodel.model import CostModel
from meshwright.costmodel.pricing import Priced, price_ops
from meshwright.costmodel.sharded import ShardedBlock
from meshwright.profiling.cluster import Device
from meshwright.profiling.graph import DTYPE_BYTES, Block, Frozen, ModelGraph, Op

VOCAB_PARALLEL: Final = "vocab_parallel_cross_entropy"
WORTH = 0.98  # of eager's seconds: a kernel that gains less is not worth a file


class Kernel(Frozen):
    """One choice. `modules`: full paths of the modules that run it ("" for the loss); seconds and bytes are of one microbatch in one of
    them, forward and backward, on one rank. `saved_bytes`: what stays for backward by choice of it, `save` the one taken, and
    `saved_change_bytes` what it adds to eager's (negative: frees). `region` says what is computed and where it goes in."""

    name: str
    kind: Literal["generated", "vocab_parallel_cross_entropy"] = "generated"
    modules: tuple[str, ...]
    formula: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    dtype: str
    save: Save = "inputs"
    saved_bytes: dict[str, int] = {}
    saved_change_bytes: int = 0
    eager_s: float
    fused_s: float
    eager_bytes: int
    fused_bytes: int
    region: Region | None = None

    @property
    def gain_s(self) -> float:
        """Seconds of one microbatch over all modules."""
        return (self.eager_s - self.fused_s) * len(self.modules)


def choose(
    graph: ModelGraph, sharded: Sequence[ShardedBlock], device: Device, costs: CostModel | None, micro_batch: float, loss: str = "plain",
    cp: int = 1,
) -> tuple[Kernel, ...]:  # fmt: skip
    """The kernels of a layout, those that gain most first. `sharded` are the graph's blocks on one rank (shard_model, or whole); `loss`
    is the plan's: "vocab_parallel" takes the vocab-parallel cross-entropy. With `cp` a rank has that part of each sample's rows, and
    rotary embeddings, whose kernels know their positions, stay eager."""
    found: list[Kernel] = []
    batch = micro_batch / cp
    for s in sharded:
        paths = [o.path for o in graph.sequence if o.block == s.block.id]
        priced = price_ops(s, device, np.array([batch]), costs)
        for region in find(s):
            if cp > 1 and region.place == "rotary":
                continue
            made = _priced(s, region, priced, device, costs, batch, paths)
            if made.fused_s < WORTH * made.eager_s and made.saved_change_bytes <= 0:
                found.append(made)
        if loss == "vocab_parallel":
            found += _loss(s, priced, device, costs, batch)
    return tuple(sorted(found, key=lambda k: (-k.gain_s, k.modules, k.name)))


def traffic_seconds(nbytes: float, launches: int, device: Device, costs: CostModel | None) -> float:
    """Seconds of kernels that only move bytes, priced as measured pointwise ops of the same traffic (12 bytes an element, as fp32 add)."""
    each = max(nbytes / launches / 12.0, 1.0)
    if costs is not None and costs.basis("pointwise", op="add", dtype="fp32") == "fitted":
        return launches * float(costs.seconds("pointwise", op="add", dtype="fp32", inputs=2.0, elements=np.array([each]))[0])
    return nbytes / (device.memory_bandwidth_Bps * device.achieved.memory) + launches * device.achieved.launch_s


def _priced(
    s: ShardedBlock, region: Region, priced: Priced, device: Device, costs: CostModel | None, batch: float, paths: Sequence[str]
) -> Kernel:  # fmt: skip
    index = {op.name: i for i, op in enumerate(s.block.ops)}
    mine = [index[n] for u in region.uses for n in u.ops]
    options = {save: [_saving(u, save) for u in region.uses] for save in SAVES}
    kept = {save: sum(lower(u.recipe).saved_bytes for u in uses) * batch for save, uses in options.items()}
    change = {save: sum(_change(s.block, u) for u in uses) * batch for save, uses in options.items()}
    seconds = {save: sum(_seconds(u, device, costs, batch) for u in uses) for save, uses in options.items()}
    save = min(SAVES, key=lambda x: (change[x], seconds[x], SAVES.index(x)))
    uses = tuple(options[save])
    for u in uses:
        generate(u.recipe)  # what cannot be printed is not offered
    shares = {op.name: 1 / s.ranks if op.name in s.divided else 1.0 for op in s.block.ops}
    moved = sum((op.forward.bytes.at(batch) + op.backward.bytes.at(batch)) * shares[op.name] for op in (s.block.ops[i] for i in mine))
    return Kernel(
        name="+".join(dict.fromkeys(u.recipe.name for u in uses)), modules=tuple(".".join(x for x in (p, region.module) if x) for p in paths),
        formula=tuple(dict.fromkeys(line for u in uses for line in u.recipe.formula())),
        shapes={f"{u.recipe.name}.{x.name}": x.shape for u in uses for x in u.recipe.inputs}, dtype=uses[0].recipe.dtype, save=save,
        saved_bytes={k: int(v) for k, v in kept.items()}, saved_change_bytes=int(change[save]),
        eager_s=float(priced.forward[0, mine].sum() + priced.backward[0, mine].sum()), fused_s=seconds[save],
        eager_bytes=int(moved), fused_bytes=int(sum(sum(traffic(u.recipe)) for u in uses) * batch), region=region.model_copy(update={"uses": uses}),
    )  # fmt: skip


def _saving(use: Use, save: Save) -> Use:
    return use.model_copy(update={"recipe": use.recipe.model_copy(update={"save": save})})


def _seconds(use: Use, device: Device, costs: CostModel | None, batch: float) -> float:
    """Forward and backward of a kernel, with the second sum of the gradients of shared rows."""
    forward, backward = traffic(use.recipe)
    low = lower(use.recipe)
    total = traffic_seconds(forward * batch, 1, device, costs)
    total += traffic_seconds(backward * batch, 1, device, costs) if low.gradients else 0.0
    columns = [x for x in use.recipe.inputs if x.over == "columns" and x.name in low.gradients]
    return total + sum(traffic_seconds(8.0 * PROGRAMS * use.recipe.width, 1, device, costs) for _ in columns)


def _change(block: Block, use: Use) -> int:
    """Bytes of one sample that stay for backward with the kernel, less those that stay in eager.

    What eager keeps of inputs and outputs is taken to stay: others may read it.
    """
    low, r = lower(use.recipe), use.recipe
    eager = sum(int(block.by_name[n].saved.at(1)) for n in use.ops)
    stays = sum(min(int(block.by_name[n].saved.at(1)), block.by_name[n].outputs[0].nbytes) for n in use.gives)
    share = _local_share(block, use)
    new = sum(r.bytes_of(x) for x, v in zip(r.inputs, use.arguments) if x.name in low.kept_inputs and x.gradient and not _kept(block, v))
    new += sum(
        r.rows * r.width * DTYPE_BYTES[o.dtype] for o, v in zip(r.outputs, use.gives) if o.value in low.kept_outputs and not _kept(block, v)
    )  # fmt: skip
    stored = low.saved_bytes - _tensors(low)
    return int(new + stored - (eager - stays) * share)


def _tensors(low: Lowered) -> int:
    """Of the bytes kept, those of inputs and outputs."""
    r = low.recipe
    inputs = sum(r.bytes_of(x) for x in r.inputs if x.name in low.kept_inputs and x.over == "rows" and x.gradient)
    return inputs + sum(r.rows * r.width * DTYPE_BYTES[o.dtype] for o in r.outputs if o.value in low.kept_outputs)


def _local_share(block: Block, use: Use) -> float:
    """The part of the ops' bytes that one rank has."""
    n = 1
    for size in block.spec_of(use.gives[-1]).shape:
        n *= size
    return use.recipe.rows * use.recipe.width / n


def _kept(block: Block, value: str) -> bool:
    """Whether eager keeps a value for backward; weights are there anyway. What enters a block left one of its kind."""
    if value.startswith("param:"):
        return True
    if value.startswith("in:"):
        left = block.by_name.get(block.outputs[0])
        return block.inputs[int(value[3:])].role == "carry" and left is not None and left.saved.at(1) > 0
    op: Op | None = block.by_name.get(value.partition(":")[0])
    while op is not None and op.kind == "view":  # what a view shows is what is kept
        op = block.by_name.get(op.inputs[0].partition(":")[0])
    return op is not None and op.saved.at(1) > 0


def _loss(s: ShardedBlock, priced: Priced, device: Device, costs: CostModel | None, batch: float) -> list[Kernel]:
    """The vocab-parallel cross-entropy of a block that ends in one, against the loss and the cast and reshapes before it."""
    block = s.block
    loss = next((op for op in block.ops if op.kind == "cross_entropy"), None)
    if loss is None:
        return []
    logits = block.by_name.get(loss.inputs[0].partition(":")[0])
    ops = [loss.name]
    while logits is not None and logits.module == loss.module:
        ops.append(logits.name)
        logits = block.by_name.get(logits.inputs[0].partition(":")[0])
    if logits is None:
        return []
    spec = logits.outputs[0]
    index = {op.name: i for i, op in enumerate(block.ops)}
    mine = [index[n] for n in ops]
    local = int(spec.nbytes * batch / s.ranks)
    fused = traffic_seconds(local, 1, device, costs) + traffic_seconds(2 * local, 1, device, costs)
    found = [block.ops[i] for i in mine]
    moved = sum(op.forward.bytes.at(batch) + op.backward.bytes.at(batch) for op in found) / s.ranks
    kept = sum(op.saved.at(batch) for op in found) / s.ranks
    return [
        Kernel(
            name=VOCAB_PARALLEL, kind=VOCAB_PARALLEL, modules=("",), formula=("loss = mean(log(sum(exp(logits))) - logits[label])",),
            shapes={"logits": (*spec.shape[:-1], spec.shape[-1] // s.ranks)}, dtype=spec.dtype, saved_bytes={"inputs": local},
            saved_change_bytes=int(local - kept), eager_s=float(priced.forward[0, mine].sum() + priced.backward[0, mine].sum()), fused_s=fused,
            eager_bytes=int(moved), fused_bytes=3 * local,
        )
    ]  # fmt: skip
