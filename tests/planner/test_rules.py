"""Every sharding rule, run: each strategy of each op of small traced models on two virtual ranks, in fp64, with gradients.

A strategy says in which states operands come and the result leaves, and a state says where a value and its gradient are. Operands are
cut as their states say, the op runs on each rank with its local sizes, and what comes out is put together as the states say.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from test_sharding_families import FAMILIES, family
from torch import Tensor
from torch.nn import functional as F

from meshwright.costmodel.sharded import routed_ops
from meshwright.planner.rules import Strategy, op_name, packings, strategies
from meshwright.planner.rules_routed import Region
from meshwright.planner.states import S, State
from meshwright.profiling.graph import Block, Op, TensorSpec

RANKS, BATCH = 2, 2
POSITIVE = frozenset(["rsqrt", "sqrt", "log", "pow"])
DROPPED = frozenset(["device", "layout", "pin_memory", "memory_format", "non_blocking", "copy"])


# ------------------------------------------------------------------------------------------------------ states of tensors


def shard(x: Tensor, s: State, rank: int) -> Tensor:
    return torch.cat([piece.chunk(RANKS, s.dim)[rank] for piece in x.chunk(s.pieces, s.dim)], s.dim)


def assemble(parts: list[Tensor], s: State) -> Tensor:
    return torch.cat([part.chunk(s.pieces, s.dim)[q] for q in range(s.pieces) for part in parts], s.dim)


def summands(x: Tensor) -> list[Tensor]:
    first = torch.randn_like(x)
    return [first, x - first]


def cut(x: Tensor, s: State) -> list[Tensor]:
    """A value as its state places it on the ranks."""
    if s.sharded:
        return [shard(x, s, r) for r in range(RANKS)]
    return summands(x) if s.kind == "P" and x.is_floating_point() else [x, x]


def cut_gradient(g: Tensor, s: State) -> list[Tensor]:
    if s.sharded:
        return [shard(g, s, r) for r in range(RANKS)]
    return summands(g) if s.kind == "R" else [g, g]


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.to(b.dtype), b, rtol=1e-9, atol=1e-9)


def placed(parts: list[Tensor], s: State, whole: Tensor, gradient: bool) -> bool:
    """Whether the ranks' values (or gradients) are `whole` in this state."""
    if s.sharded:
        return same(assemble(parts, s), whole)
    if s.kind == ("R" if gradient else "P"):
        return same(parts[0] + parts[1], whole)
    return all(same(p, whole) for p in parts)


# ------------------------------------------------------------------------------------------------------------ running ops


def sample(spec: TensorSpec, op: Op, role: str, shapes: dict[str, tuple[int, ...]]) -> Tensor:
    """A random operand for two samples."""
    shape = [n * BATCH if d == spec.batch_dim else n for d, n in enumerate(spec.shape)]
    if spec.dtype == "bool":
        return torch.rand(shape) < 0.5
    if spec.dtype.startswith("int"):
        return torch.randint(0, _high(op, role, shapes), shape)
    x = torch.rand(shape, dtype=torch.float64) + 0.1 if op_name(op) in POSITIVE else torch.randn(shape, dtype=torch.float64)
    return x.requires_grad_()


def _high(op: Op, role: str, shapes: dict[str, tuple[int, ...]]) -> int:
    if op.kind == "embedding":
        return shapes["weight"][0]
    if op.kind == "cross_entropy":
        return shapes["self"][1]
    if op_name(op) == "gather":
        return shapes["self"][int(op.args["dim"])]
    return 4


def arguments(op: Op, outs: tuple[State, ...]) -> dict[str, Any]:
    """An op's other arguments for two samples, with the local sizes of a rank whose results are in these states."""
    args = {k: _filled(v) for k, v in op.args.items() if k not in DROPPED}
    name, out = op_name(op), outs[0]
    if not out.sharded:
        return args
    if name in ("view", "reshape", "expand", "_unsafe_view", "unflatten"):
        key = next(k for k in ("size", "shape", "sizes") if k in args)
        at = out.dim - (int(args["dim"]) if name == "unflatten" else 0)
        if 0 <= at < len(args[key]) and args[key][at] > 0:
            args[key] = [n // RANKS if i == at else n for i, n in enumerate(args[key])]
    elif name in ("split", "split_with_sizes") and out.dim == int(args.get("dim", 0)) % len(op.outputs[0].shape):
        key = "split_size" if "split_size" in args else "split_sizes"
        args[key] = [n // RANKS for n in args[key]] if isinstance(args[key], list) else args[key] // RANKS
    elif name == "group_norm" and out.dim == 1:
        args["num_groups"] //= RANKS
    elif op.kind == "conv" and out.dim == 1 and args.get("groups", 1) > 1:
        args["groups"] //= RANKS
    elif name == "arange":
        args["end"] //= RANKS
    return args


def _filled(x: Any) -> Any:
    if isinstance(x, str) and x.startswith("B*"):
        return int(x[2:]) * BATCH
    if isinstance(x, str) and x.startswith("torch."):
        dtype = getattr(torch, x[6:])
        return torch.float64 if dtype.is_floating_point else dtype
    return [_filled(v) for v in x] if isinstance(x, list) else x


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Mamba's recurrence, step by step."""
    state, out = torch.zeros(*x.shape[:2], a.shape[1], dtype=x.dtype), []
    for i in range(x.shape[2]):
        state = torch.exp(dt[:, :, i, None] * a) * state + (dt[:, :, i] * x[:, :, i])[..., None] * b[:, None, :, i]
        out.append((state * c[:, None, :, i]).sum(-1))
    return torch.stack(out, 2)


def run(op: Op, operands: list[Tensor], args: dict[str, Any]) -> list[Tensor]:
    """One call of an aten op by its schema's names."""
    if op.kind == "scan":
        return [scan(*operands)]
    namespace, name, overload = op.target.split(".")
    call: dict[str, Any] = {}
    for role, x in zip(op.roles, operands, strict=True):
        head, dot, index = role.partition(".")
        x = x.clone() if name.endswith("_") else x
        if dot:
            call.setdefault(head, []).extend([None] * (int(index) - len(call.get(head, []))))
            call[head].append(x)
        else:
            call[head] = x
    args = {k: 0.0 if k in ("p", "dropout_p") else v for k, v in args.items()}
    if name == "histc":
        return [torch.histc(call["self"].double(), **args).to(torch.int32)]
    target = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    call |= {a.name: None for a in target._schema.arguments if a.name not in {**call, **args} and not a.has_default_value()}
    result = target(**call, **args)
    return list(result) if isinstance(result, list | tuple) else [result]


def run_local(op: Op, way: Strategy, operands: list[list[Tensor]]) -> list[list[Tensor]]:
    """The op on every rank: [rank][result]. Ops whose local program differs from the module's own are written out."""
    by_role = {role: [operands[r][i] for r in range(RANKS)] for i, role in enumerate(op.roles)}
    states = dict(zip(op.roles, way.ins, strict=True))
    name = op_name(op)
    if name == "embedding" and states["weight"] == S(0):
        return [[_rows(by_role["weight"][r], by_role["indices"][r], r, op.args.get("padding_idx"))] for r in range(RANKS)]
    if name == "cross_entropy_loss" and way.divided:
        return _vocab_parallel_loss(by_role["self"], by_role["target"][0])
    args = arguments(op, way.outs)
    if name == "scaled_dot_product_attention" and states["query"].sharded and not states["key"].sharded:
        group = operands[0][0].shape[1] * RANKS // by_role["key"][0].shape[1]
        for r in range(RANKS):
            heads = operands[r][0].shape[1]
            mine = sorted({h // group for h in range(r * heads, (r + 1) * heads)})
            operands[r] = [x[:, mine] if role in ("key", "value") else x for role, x in zip(op.roles, operands[r], strict=True)]
    return [run(op, operands[r], dict(args)) for r in range(RANKS)]


def _rows(weight: Tensor, ids: Tensor, rank: int, padding: int | None) -> Tensor:
    """Rows of the local part of the vocabulary, zero for the rest."""
    first = rank * weight.shape[0]
    mine = (ids >= first) & (ids < first + weight.shape[0])
    here = padding - first if padding is not None and 0 <= padding - first < weight.shape[0] else None
    return F.embedding((ids - first).masked_fill(~mine, 0), weight, here) * mine.unsqueeze(-1)


def _vocab_parallel_loss(logits: list[Tensor], target: Tensor) -> list[list[Tensor]]:
    """Maximum, sum of exponentials and target's logit, each summed (or compared) over the ranks' classes."""
    highest = torch.stack([x.max(1).values for x in logits]).max(0).values.detach()
    total = sum((x - highest[:, None]).exp().sum(1) for x in logits)
    size = logits[0].shape[1]
    picked = sum(
        x.gather(1, (target - r * size).clamp(0, size - 1)[:, None])[:, 0] * ((target >= r * size) & (target < (r + 1) * size))
        for r, x in enumerate(logits)
    )
    assert isinstance(total, Tensor)
    assert isinstance(picked, Tensor)
    loss = (highest + total.log() - picked).mean()
    return [[loss], [loss]]


def wrong(op: Op, block: Block, way: Strategy) -> str:
    """What a strategy gets wrong, if anything."""
    torch.manual_seed(len(op.name))
    shapes = {role: block.spec_of(v).shape for role, v in zip(op.roles, op.inputs, strict=True)}
    whole = [sample(block.spec_of(v), op, role, shapes) for v, role in zip(op.inputs, op.roles, strict=True)]
    whole = [x.detach() if v.startswith("buffer:") else x for v, x in zip(op.inputs, whole, strict=True)]
    expected = run(op, whole, arguments(op, (State("I"),)))
    parts = [[p.detach().clone().requires_grad_(x.requires_grad) for p in cut(x.detach(), s)] for x, s in zip(whole, way.ins, strict=True)]
    operands = [[parts[i][r] for i in range(len(whole))] for r in range(RANKS)]
    got = run_local(op, way, [list(o) for o in operands])
    for i, (out, s) in enumerate(zip(expected, way.outs, strict=True)):
        if not placed([got[r][i] for r in range(RANKS)], s, out, gradient=False):
            return f"result {i}"
    smooth = [i for i, out in enumerate(expected) if out.is_floating_point() and out.requires_grad]
    if not smooth:
        return ""
    gradients = {i: torch.randn_like(expected[i]) for i in smooth}
    torch.autograd.backward([expected[i] for i in smooth], [gradients[i] for i in smooth])
    if op.kind == "cross_entropy" and way.divided:
        torch.autograd.backward(got[0][0], gradients[0])  # one loss, on both ranks
    else:
        for i in smooth:
            local = cut_gradient(gradients[i], way.outs[i])
            for r in range(RANKS):
                if got[r][i].requires_grad:
                    got[r][i].backward(local[r], retain_graph=True)
    for i, (x, s) in enumerate(zip(whole, way.ins, strict=True)):
        if x.requires_grad and x.grad is not None:
            grads = [operands[r][i].grad for r in range(RANKS)]
            zero = [torch.zeros_like(operands[r][i]) if g is None else g for r, g in enumerate(grads)]
            if not placed(zero, s, x.grad, gradient=True):
                return f"gradient of {op.roles[i]}"
    return ""


def ways_of(name: str) -> list[tuple[Op, Block, Strategy]]:
    """Every op and strategy of a family's blocks that can run by itself, each distinct one once."""
    found = {}
    for block in family(name).blocks:
        region, q = Region(block, RANKS), packings(block)
        for op in block.ops:
            if op.kind == "constant" or not op.inputs or op.name in region.core:
                continue
            for way in strategies(op, block, RANKS, q)[0]:
                found[str((op.target, op.args, op.roles, [block.spec_of(v) for v in op.inputs], way))] = (op, block, way)
    return list(found.values())


# How many strategies each family has at least: fewer means that rules were lost, or that the test passes them over.
LEAST = {
    "llama": 200, "llama_one_kv": 200, "qwen3": 200, "gpt2": 150, "bert": 100, "vit": 80, "t5": 200, "mamba": 150, "mixtral": 150, "qwen3_moe": 150,
    "deepseek": 200, "mixer": 80, "unet": 150, "zoo": 300,
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_strategy_computes_what_the_op_does(name: str) -> None:
    """Values and gradients of each strategy of each op recombine to those of the op on one rank."""
    kinds: Counter[str] = Counter()
    failures = []
    for op, block, way in ways_of(name):
        try:
            problem = wrong(op, block, way)
        except RuntimeError as e:  # local sizes that the op refuses
            problem = str(e).partition("\n")[0]
        kinds[op.kind] += 1
        if problem:
            failures.append(f"{op.target} {op.name} {[str(s) for s in way.ins]} -> {[str(s) for s in way.outs]}: {problem}")
    assert not failures, "\n".join(failures)
    assert kinds.total() >= LEAST[name], kinds


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek"])
def test_each_rank_can_route_its_own_tokens(name: str) -> None:
    """Experts and router on each rank's tokens give the rows, and the gradients, that they give on all tokens."""
    block = next(b for b in family(name).blocks if routed_ops(b))
    region = Region(block, RANKS)
    assert routed_ops(block) < region.core
    assert not region.beside
    states = region.by_token()
    assert states is not None
    torch.manual_seed(0)
    entering: dict[str, Tensor] = {}
    placed_as: dict[str, State] = {}
    for op in block.ops:
        for v, s in zip(op.inputs, states[op.name][0] if op.name in states else (), strict=False):
            if v.partition(":")[0] not in region.core:
                entering.setdefault(v, sample(block.spec_of(v), op, "", {}))
                placed_as[v] = s
    assert {str(s) for v, s in placed_as.items() if not v.startswith(("param:", "buffer:"))} == {"S1"}
    outside = {v for op in block.ops if op.name not in region.core for v in op.inputs} | set(block.outputs)
    left = [n for n in region.core if n in outside]
    assert [str(states[n][1][0]) for n in left] == ["S1"]
    whole = _region(block, region.core, entering, None)[left[0]]
    weight = torch.randn_like(whole)
    whole.backward(weight)
    parts = {v: [p.detach().clone().requires_grad_(p.is_floating_point()) for p in cut(x.detach(), placed_as[v])] for v, x in entering.items()}
    got = []
    for r in range(RANKS):
        got.append(_region(block, region.core, {v: p[r] for v, p in parts.items()}, states)[left[0]])
        got[r].backward(shard(weight, S(1), r))
    assert placed(got, S(1), whole, gradient=False)
    checked = 0
    for v, x in entering.items():
        if x.grad is not None:
            grads = [p.grad for p in parts[v]]
            assert all(g is not None for g in grads), v
            assert placed([g for g in grads if g is not None], placed_as[v], x.grad, gradient=True), v
            checked += 1
    assert checked == 4  # tokens, router, and two matrices of the experts


def _region(block: Block, core: frozenset[str], values: dict[str, Tensor], states: Any) -> dict[str, Tensor]:
    """Runs the ops of a region in order, on the values that enter it; with `states` as one rank does."""
    values = dict(values)
    for op in block.ops:
        if op.name not in core:
            continue
        outs = states[op.name][1] if states is not None else (State("I"),)
        args = arguments(op, outs)
        made = run(op, [values[v] for v in op.inputs], args)
        for i, x in enumerate(made):
            values[op.name if len(op.outputs) == 1 else f"{op.name}:{i}"] = x
    return values
