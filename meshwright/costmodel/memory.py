"""Bytes of one block on one rank: what it leaves for backward, and the most that is alive while it runs.

They come from the liveness of the traced joint program: a storage that forward makes and backward reads is kept. Rajbhandari et
al. 2020 for what data parallelism shards; Korthikanti et al. 2022 for what recompute keeps. costmodel/stagememory.py adds blocks
up to the peak of a pipeline stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from meshwright.costmodel.sharded import ShardedBlock
from meshwright.profiling.graph import DTYPE_BYTES, Block, Op, Storage

MASTER, REDUCED = 4.0, 4.0  # bytes per parameter: fp32 parameter, fp32 gradient
SAVED_KINDS = frozenset(("matmul", "attention", "experts", "conv"))  # what selective recompute keeps


@dataclass(frozen=True)
class Optimizer:
    """Bytes per parameter of an optimizer's fp32 state."""

    state_bytes: float


# Two moments (Loshchilov & Hutter 2019), one, none
OPTIMIZERS = {"adamw": Optimizer(8.0), "sgd-momentum": Optimizer(4.0), "sgd": Optimizer(0.0)}


@dataclass(frozen=True)
class BlockMemory:
    """Bytes of one block on one rank, for each microbatch of an array. All [batches] but the last ones.

    `saved`: what forward leaves for backward; `kept_selective`, `kept_full`: the same under recompute. `forward`: the most that is
    alive while the block runs forward, `backward` while it runs backward with its gradients of parameters, `backward_in_place`
    where those are added to ones that exist. All include what is saved; `backward` also the gradient that comes in. `carry`: the
    block's input. `output`: the model's output, in the block that makes it. `side`: what layers take besides the carry. `incoming`:
    the gradient that comes in. Where gradients of weights are computed
    apart: `waits` for them between the halves of backward, beside the gradient that comes in where the block `passes_on`; `halved` is
    `backward` of the first half, `late` the largest gradient of the second. `keeps_result`: what the block returns is among what is saved.
    """

    saved: np.ndarray
    kept_selective: np.ndarray
    kept_full: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    backward_in_place: np.ndarray
    carry: np.ndarray
    output: np.ndarray
    side: np.ndarray
    incoming: np.ndarray
    waits: np.ndarray
    halved: np.ndarray
    late: np.ndarray
    passes_on: bool
    keeps_result: bool
    numel: float
    buffers: float
    shapes: dict[str, tuple[float, float]]  # of the local parameters: rows, elements of a row

    def kept(self, recompute: str) -> np.ndarray:
        return {"none": self.saved, "selective": self.kept_selective, "full": self.kept_full}[recompute]

    def again(self, recompute: str) -> np.ndarray:
        """What recompute adds to the backward: the block's input, which nothing else holds. What was kept and not asked for is gone then."""
        return np.zeros_like(self.carry) if recompute == "none" else self.carry

    def padded(self, shards: int) -> float:
        """Parameters when FSDP pads the rows of each to a multiple of `shards`."""
        return sum(np.ceil(rows / shards) * shards * row for rows, row in self.shapes.values())


def block_memory(
    sharded: ShardedBlock, batches: np.ndarray, *, cp: int = 1, ep: int = 1, loss_chunks: int = 1, ulysses: bool = False
) -> BlockMemory:  # fmt: skip
    """Liveness of a block's joint program on one tensor-parallel rank.

    `cp`: context parallelism, by a ring over as many ranks: each has 1 / cp of a sample's tokens, and beside its own keys and values
    those that it receives (Liu et al. 2023, arXiv 2310.01889); backward their gradients too. `ulysses`: by all-to-all instead (Jacobs et
    al. 2023, arXiv 2309.14509), of which attention's result is kept on both sides. `ep`: expert parallelism with balanced
    routing: 1 / ep of the experts, as many tokens as before, and the buffers that tokens are sent from and received into.
    `loss_chunks`: the loss in so many parts, each computed again in backward (codegen/runtime/loss.py): no logits are kept.
    """
    block = sharded.block
    b = np.asarray(batches, float) / cp
    shares = np.array([_storage_share(s, block.by_name[s.op], sharded) for s in block.storages])
    if ep > 1:
        shares = shares / [ep if s.gradient and block.by_name[s.op].kind == "experts" else 1 for s in block.storages]
    size = np.array([[s.amount.const, s.amount.per_sample] for s in block.storages], float).reshape(-1, 2) * shares[:, None]
    nbytes = size[:, 0][None, :] + b[:, None] * size[:, 1][None, :]  # [batches, storages]
    born = np.array([s.born for s in block.storages], int)
    dies = np.array([s.dies for s in block.storages], int)
    loss = next((op for op in block.ops if op.kind == "cross_entropy"), None)
    output, kept_by_loss, sums = np.zeros(len(b)), np.zeros(len(block.storages), bool), np.zeros(len(block.storages), int)
    if loss is not None:
        output = _loss_in_place(loss, sharded, b, nbytes, born, dies)
        if loss_chunks > 1:
            parts = {loss.name, *(op.name for op in of_logits(block, loss))}
            part = np.array([s.op in parts and not s.gradient for s in block.storages], bool)
            summed = np.array([s.op in parts and s.gradient for s in block.storages], bool)
            nbytes[:, part] /= loss_chunks
            sums = np.where(summed, born, 0)
            born[summed] = min((s.born for s in block.storages if s.backward), default=0)  # the sum over the parts before
            kept_by_loss = part & np.array([s.saved for s in block.storages], bool)
            output = np.zeros(len(b))  # the stage returns what its head takes
    steps = int(dies.max(initial=0)) + 2
    turn = min((s.born for s in block.storages if s.backward), default=steps)
    gradient = np.array([s.gradient for s in block.storages], bool)
    to_the_end, at_once = np.where(gradient, steps - 2, dies), np.where(gradient, np.minimum(born + 1, dies), dies)
    copies = _copies(sharded, b, steps) + _exchanged(sharded, b, steps, cp, ep)
    for i in np.flatnonzero(sums):  # beside the sum of the parts before lies a part's own gradient, then the new sum as well
        done = max(s.born for s in block.storages if s.op == block.storages[i].op and s.backward)
        copies[:, sums[i] : done + 2] += nbytes[:, i, None]
        copies[:, done + 1] += nbytes[:, i]
    in_place, held = (_live(nbytes, born, d, steps) + copies for d in (at_once, to_the_end))
    carry = sum((_value_bytes(f"in:{i}", sharded, b) for i, x in enumerate(block.inputs) if x.role == "carry"), np.zeros(len(b)))
    side = sum((_value_bytes(f"in:{i}", sharded, b) for i, x in enumerate(block.inputs) if x.role == "side"), np.zeros(len(b)))
    saved = nbytes[:, np.array([s.saved for s in block.storages], bool) & ~kept_by_loss].sum(axis=1)
    forward = held[:, :turn].max(axis=1, initial=0.0)
    backward, again_in_place = (x[:, turn:].max(axis=1, initial=0.0) for x in (held, in_place))
    incoming = _value_bytes(block.outputs[0], sharded, b) if block.outputs and loss is None else np.zeros(len(b))
    backward, again_in_place = backward + incoming, again_in_place + incoming
    waits, halved, late, passes_on = _halved(sharded, b, nbytes, born, np.where(gradient, steps - 2, dies), copies, turn)
    kept = sum(_kept_outputs(sharded, b), np.zeros(len(b)))
    if ulysses and cp > 1:
        again, exchanged = _both_sides(sharded, b, cp)
        saved, forward, backward, again_in_place, kept = (x + again for x in (saved, forward, backward, again_in_place, kept + exchanged - again))
        halved = halved + again
    shapes = _shapes(sharded, ep)
    returned = block.outputs[0].partition(":")[0] if block.outputs else ""
    return BlockMemory(
        saved=saved, kept_selective=np.minimum(kept + carry, saved + carry), kept_full=carry, forward=forward,
        backward=np.maximum(backward, saved), backward_in_place=np.maximum(again_in_place, saved), carry=carry, output=output, side=side,
        incoming=incoming, waits=waits, halved=np.maximum(halved + incoming, saved), late=late, passes_on=passes_on,
        keeps_result=any(s.saved and s.op == returned for s in block.storages),
        numel=sum(rows * row for rows, row in shapes.values()), shapes=shapes,
        buffers=float(sum(p.numel * DTYPE_BYTES.get(p.dtype, 4) for p in block.buffers)),
    )  # fmt: skip


def _halved(
    sharded: ShardedBlock, b: np.ndarray, nbytes: np.ndarray, born: np.ndarray, dies: np.ndarray, copies: np.ndarray, turn: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """What waits for gradients of weights, the peak of the backward that leaves them out, the largest of them (codegen/runtime/split_backward.py)."""
    block, nbytes, dies, copies = sharded.block, nbytes.copy(), dies.copy(), copies.copy()
    linear = [op for op in block.ops if op.kind == "matmul" and any(v.startswith("param:") for v in op.inputs)] if block.repeated else []
    alone = {c.value for c in sharded.collectives if c.phase == "backward"}  # whose gradient a collective makes
    end, late = dies.max(initial=0), np.zeros(len(b))
    inputs, gradients = set[int](), dict[str, np.ndarray]()
    for op in linear:
        own = [i for i, s in enumerate(block.storages) if s.op == op.name and s.backward]
        for i in sorted((i for i in own if block.storages[i].gradient), key=lambda i: -nbytes[:, i].max())[:1]:
            late = np.maximum(late, nbytes[:, i])
            nbytes[:, i] = 0.0
        source = _allocated(block, next(v for v in op.inputs if not v.startswith("param:")))
        inputs |= {i for i, s in enumerate(block.storages) if s.op == source and s.saved}
        used = [block.storages[i].born for i in own if not block.storages[i].gradient][:1]
        made = [i for i, s in enumerate(block.storages) if s.backward and not s.gradient and s.dies in used]
        sizes = _value_bytes(op.name, sharded, b)
        found = [i for i in made if np.allclose(nbytes[:, i], sizes)][:1]
        dies[found] = end
        which = _gradient_of(block, op.name, alone)
        if not found and which and which not in gradients:  # traced as a sum in place, which cannot be where an addend waits
            copies[:, used[0] if used else turn :] += sizes[:, None]
        gradients[which] = sizes
    passes_on = gradients.pop("", None) is not None
    dies[list(inputs)] = end
    waits = nbytes[:, list(inputs)].sum(axis=1) + sum(gradients.values(), np.zeros(len(b)))
    live = _live(nbytes, born, dies, copies.shape[1]) + copies
    return waits, live[:, turn:].max(axis=1, initial=0.0), late, passes_on


def _allocated(block: Block, value: str) -> str:
    """The op that allocated a value's storage."""
    name, makers = value.partition(":")[0], {s.op for s in block.storages if not s.backward}
    while name not in makers and (op := block.by_name.get(name)) is not None and op.inputs:
        name = op.inputs[0].partition(":")[0]
    return name


def _gradient_of(block: Block, value: str, alone: set[str]) -> str:
    """The value whose gradient is a value's own, unchanged by views and sums; "" if that is what the block returns."""
    while value not in alone:
        if value.partition(":")[0] == block.outputs[0].partition(":")[0]:
            return ""
        users = [op for op in block.ops if any(v.partition(":")[0] == value for v in op.inputs)]
        if len(users) != 1 or not (users[0].kind == "view" or users[0].target.startswith("aten.add.")):
            break
        value = users[0].name
    return value


def last_needed(block: Block) -> int:
    """The last op whose result the block's own backward needs, where recompute stops (torch's checkpoint stops early); -1 if none."""
    returned = block.outputs[0].partition(":")[0] if block.outputs and block.repeated else ""  # another layer's backward needs that
    return max((i for i, op in enumerate(block.ops) if op.saved.at(1) > 0 and op.name != returned), default=-1)


def _live(nbytes: np.ndarray, born: np.ndarray, dies: np.ndarray, steps: int) -> np.ndarray:
    """Live bytes at each step, [batches, steps]."""
    change = np.zeros((len(nbytes), steps))
    np.add.at(change.T, born, nbytes.T)
    np.subtract.at(change.T, dies + 1, nbytes.T)
    return np.cumsum(change, axis=1)


def _copies(sharded: ShardedBlock, b: np.ndarray, steps: int) -> np.ndarray:
    """Bytes that collectives hold beside their result while they run, [batches, steps]: the whole tensor that is reduced, or gathered
    before it is put in order. A gradient that is gathered for an op's backward stays until that is done."""
    extra = np.zeros((len(b), steps))
    times: dict[tuple[str, bool], list[int]] = {}
    for s in sharded.block.storages:
        times.setdefault((s.op, s.backward), []).append(s.born)
    for c in sharded.collectives:
        made = sharded.block.by_name.get(c.value.partition(":")[0])
        made = next((op for op in _upwards(sharded.block, made, itself=True) if op.kind != "view"), None) if made is not None else None
        at = times.get((made.name if made is not None else "", c.phase == "backward"))
        if at is None:  # of what enters the block: at its beginning, or at the end of its backward
            begin = end = 0 if c.phase == "forward" else max(steps - 2, 0)
        elif c.phase == "forward":
            begin = end = max(at)
        else:
            begin, end = min(at), max(at) if c.op == "all_gather" else min(at)
        extra[:, begin : end + 1] += (c.amount.const + b * c.amount.per_sample)[:, None]
    return extra


def _exchanged(sharded: ShardedBlock, b: np.ndarray, steps: int, cp: int, ep: int) -> np.ndarray:
    """Bytes of what context and expert parallelism exchange, while the op runs that needs it, [batches, steps]."""
    extra = np.zeros((len(b), steps))
    products = [op for op in sharded.block.ops if op.kind == "experts"]
    for op in sharded.block.ops:
        width = DTYPE_BYTES.get(op.dtype, 4)
        if cp > 1 and op.kind == "attention":
            rows = op.dims["kv"] * op.dims["kv_heads"] * (op.dims["head_dim"] + op.dims["v_head_dim"])
            amount, again = rows * width * b * sharded.share(op.name if len(op.outputs) == 1 else f"{op.name}:0"), 3.0
        elif ep > 1 and op.kind == "experts" and op in (products[0], products[-1]):  # sent before the first product, back after the last
            row = op.dims["k"] if op is products[0] else op.dims["n"]
            amount, again = 2.0 * width * b * op.dims["m"] * row, 1.0
        else:
            continue
        for backward in (False, True):
            at = [s.born for s in sharded.block.storages if s.op == op.name and s.backward == backward]
            if at:
                extra[:, min(at) : max(at) + 1] += ((again if backward else 1.0) * amount)[:, None]
    return extra


def _both_sides(sharded: ShardedBlock, b: np.ndarray, cp: int) -> tuple[np.ndarray, np.ndarray]:
    """What Ulysses adds to what a block saves, and all that its all-to-alls return: attention's result before and behind the exchange, and
    keys and values as often as each rank gets a head of its own (codegen/runtime/context.py)."""
    more = returned = np.zeros(len(b))
    for op in sharded.block.ops:
        if op.kind == "attention":
            share = sharded.share(op.name if len(op.outputs) == 1 else f"{op.name}:0")
            token, d = DTYPE_BYTES.get(op.dtype, 4) * b * op.dims["batch"] * share, op.dims
            heads = max(round(d["kv_heads"] * share), 1)
            keys = token * d["kv"] * d["kv_heads"] * (d["head_dim"] + d["v_head_dim"])
            result, times = token * d["q"] * d["heads"] * d["v_head_dim"], cp // math.gcd(heads, cp)
            more = more + result + (times - 1) * keys
            returned = returned + result + token * d["q"] * d["heads"] * d["head_dim"] + times * keys
    return more, returned


def _loss_in_place(loss: Op, sharded: ShardedBlock, b: np.ndarray, nbytes: np.ndarray, born: np.ndarray, dies: np.ndarray) -> np.ndarray:
    """Bytes of the model's output; changes sizes and deaths of the loss's storages to those of what runs.

    The plain loss is as traced: at the backward of log-softmax the saved log-probabilities and two gradients, 12 bytes a logit. On
    shards of the classes (codegen/runtime/loss.py) the saved softmax becomes the gradient in place. The logits stay while the loss
    runs forward: its caller holds them.
    """
    block = sharded.block
    made = next(reversed(list(of_logits(block, loss))), None)
    own = np.array([s.op == loss.name for s in block.storages], bool)
    backward = np.array([s.backward for s in block.storages], bool)
    first = min((t for t, mine in zip(born, own & ~backward, strict=True) if mine), default=0)
    logits = np.array([made is not None and s.op == made.name and not s.backward for s in block.storages], bool)
    dies[logits] = np.maximum(dies[logits], first)
    if loss.name in sharded.divided:
        saved = own & ~backward & np.array([s.saved for s in block.storages], bool)
        dies[saved] = max((t for t, mine in zip(dies, own & backward, strict=True) if mine), default=0)
        nbytes[:, own & backward] = 0.0
    return np.asarray(nbytes[:, logits].sum(axis=1))


def of_logits(block: Block, loss: Op) -> Iterator[Op]:
    """The ops whose results are logits, from the loss up to the product that makes them."""
    for op in _upwards(block, loss):
        yield op
        if op.kind not in ("copy", "view", "pointwise"):
            return


def _upwards(block: Block, op: Op, itself: bool = False) -> Iterator[Op]:
    """The ops that made an op's first input, from the nearest on; before them the op `itself`."""
    if itself:
        yield op
    while op.inputs and (source := block.by_name.get(op.inputs[0].partition(":")[0])) is not None:
        yield source
        op = source


def _shapes(sharded: ShardedBlock, ep: int) -> dict[str, tuple[float, float]]:
    of_experts = {name for op in sharded.block.ops if op.kind == "experts" for name in _parameters(sharded.block, op)}
    found = {}
    for p in sharded.block.params:
        state, rows = sharded.params.get(p.name, "I"), float(p.shape[0] if p.shape else 1)
        local = p.numel * sharded.share(f"param:{p.name}")
        rows = rows / sharded.ranks if state.startswith("S0") else rows
        found[p.name] = (rows / ep if p.name in of_experts else rows, local / rows if rows else 0.0)
    return found


def _parameters(block: Block, op: Op) -> Iterator[str]:
    """Parameters that an op reads, itself or through views."""
    for v in op.inputs:
        source = block.by_name.get(v.partition(":")[0])
        if v.startswith("param:"):
            yield v[6:]
        elif source is not None and source.kind in ("view", "copy"):
            yield from _parameters(block, source)


def _value_bytes(v: str, sharded: ShardedBlock, b: np.ndarray) -> np.ndarray:
    a = sharded.block.spec_of(v).amount
    return (a.const + b * a.per_sample) * sharded.share(v)


def _kept_outputs(sharded: ShardedBlock, b: np.ndarray) -> Iterator[np.ndarray]:
    """What selective recompute keeps: products, attention, and what was reduced over ranks."""
    for op in sharded.block.ops:
        if op.kind in SAVED_KINDS:
            yield _output_bytes(op, sharded, b)
    for c in sharded.collectives:
        if c.phase == "forward" and c.op in ("all_reduce", "reduce_scatter"):
            yield (c.amount.const + b * c.amount.per_sample) / (sharded.ranks if c.op == "reduce_scatter" else 1)


def _output_bytes(op: Op, sharded: ShardedBlock, b: np.ndarray) -> np.ndarray:
    names = [op.name if len(op.outputs) == 1 else f"{op.name}:{i}" for i in range(len(op.outputs))]
    total = sum((_value_bytes(v, sharded, b) for v in names), np.zeros(len(b)))
    if op.kind == "attention":  # the log-sum-exp of each row, in fp32
        total = total + 4.0 * b * op.dims["batch"] * op.dims["heads"] * op.dims["q"] * sharded.share(names[0])
    return total


def _storage_share(s: Storage, op: Op, sharded: ShardedBlock) -> float:
    """The part of an allocation that one rank makes."""
    t = sharded.ranks
    if t == 1:
        return 1.0
    if op.kind == "cross_entropy":
        return 1 / t if op.name in sharded.divided else 1.0
    out = op.name if len(op.outputs) == 1 else f"{op.name}:0"
    made = sharded.block.spec_of(out).amount
    if s.backward or (made.const, made.per_sample) != (s.amount.const, s.amount.per_sample):
        # a gradient, or a copy that a product makes of an operand, has the size of the operand or parameter that it belongs to
        for v, state in zip(op.inputs, sharded.operands.get(op.name, ()), strict=False):
            a = sharded.block.spec_of(v).amount
            if (a.const, a.per_sample) == (s.amount.const, s.amount.per_sample):
                return 1 / t if state.startswith("S") else 1.0
    if not s.backward and s.saved and out in sharded.gathered:
        return 1.0  # the gathered copy is what its consumers keep
    return sharded.share(out)
