"""The same question asked of the joint forward and backward graph: one integer programme over it, with plain states and no duals.

A value is split (S), the same on every rank (R) or a sum over ranks (P), and backward ops are ops like any other. What the planner
finds on the forward graph alone must be what this finds for a Llama layer: the same weights and the same collectives.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import pulp
import torch
from test_sharding_families import LLAMA, SCATTERED
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch.fx import Node
from transformers import AttentionInterface, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from meshwright.profiling.joint import _as_opaque_ops, export
from meshwright.profiling.ops import HF_ATTENTION, hf_attention

TOKENS, RANKS = 20, 2  # no other dimension has this size
State = tuple[str, int]
R, P = ("R", 0), ("P", 0)
ELEMENTWISE = frozenset(["pow", "rsqrt", "detach", "mul", "add", "silu", "neg", "div", "clone", "silu_backward", "expand"])
# What a change of state sends of a tensor, in units of (t - 1) / t.
MOVES = {("S", "R"): ("all_gather", 1.0), ("P", "R"): ("all_reduce", 2.0), ("P", "S"): ("reduce_scatter", 1.0), ("R", "S"): ("", 0.0)}


def S(d: int) -> State:
    return ("S", d)


@dataclass(frozen=True)
class Way:
    ins: tuple[State, ...]
    outs: tuple[State, ...]


class Layer(nn.Module):
    """A tiny Llama layer whose rotary tables are inputs. h [1, tokens, 32] -> the same"""

    def __init__(self) -> None:
        super().__init__()
        AttentionInterface.register(HF_ATTENTION, hf_attention)
        config = LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=1, vocab_size=64)
        config._attn_implementation = HF_ATTENTION
        self.layer = LlamaDecoderLayer(config, 0)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.layer(h, position_embeddings=(cos, sin))


def joint_graph() -> torch.fx.Graph:
    with torch.device("meta"):
        module = Layer()
        inputs = {"h": torch.randn(1, TOKENS, 32, requires_grad=True), "cos": torch.randn(1, TOKENS, 4), "sin": torch.randn(1, TOKENS, 4)}
    exported = export(module, inputs).module()
    _as_opaque_ops(exported)
    with contextlib.ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, exported, (), inputs)
        return joint._aot_graph_capture.graph_module.graph


# ------------------------------------------------------------------------------------------------------------------ rules


def value(n: Node) -> tuple[Node, int]:
    """The op behind an element of a tuple, and which of its results it is."""
    return (n.args[0], n.args[1]) if n.target is operator.getitem else (n, 0)  # type: ignore[return-value]


def shape(n: Node) -> tuple[int, ...]:
    return tuple(n.meta["val"].shape)


def shapes(n: Node) -> list[tuple[int, ...]]:
    made = n.meta["val"]
    return [tuple(x.shape) for x in (made if isinstance(made, list | tuple) else [made])]


def operands(n: Node) -> list[Node]:
    flat = itertools.chain.from_iterable(a if isinstance(a, list | tuple) else [a] for a in n.args)
    return [a for a in flat if isinstance(a, Node)]


def labelled(n: Node, name: str) -> tuple[list[list[Any]], list[list[Any]]]:
    """Labels of the dimensions of operands and results; a label that no result has is contracted, None is never split."""
    ins, out = [shape(a) for a in operands(n)], shapes(n)[0]
    d: list[Any] = list(range(len(ins[0])))
    if name in ELEMENTWISE:
        every = list(range(len(out)))
        return [[every[i + len(out) - len(s)] if s[i] == out[i + len(out) - len(s)] else None for i in range(len(s))] for s in ins], [every]
    if name == "mm":  # a token dimension of a product with (or for) a weight stays whole: splitting it is context parallelism
        m, k, o = (c if size != TOKENS else None for c, size in zip("mko", (*ins[0], ins[1][1]), strict=True))
        return [[m, k], [k, o]], [[m, o]]
    if name in ("view", "_unsafe_view"):
        prefix = {math.prod(ins[0][:i]): i for i in range(len(ins[0])) if ins[0][i] > 1}
        return [d], [[prefix.get(math.prod(out[:i])) if out[i] > 1 else None for i in range(len(out))]]
    if name in ("t", "transpose"):
        a, b = (0, 1) if name == "t" else (n.args[1], n.args[2])
        moved = list(d)
        moved[a], moved[b] = moved[b], moved[a]  # type: ignore[index]
        return [d], [moved]
    if name == "unsqueeze":
        return [d], [[*d[: n.args[1]], None, *d[n.args[1] :]]]  # type: ignore[misc]
    if name in ("slice", "slice_backward", "cat"):
        at = {"slice": n.args[1], "slice_backward": n.args[2] if len(n.args) > 2 else 0, "cat": n.args[-1]}[name]
        kept = [None if i == at % len(out) else i for i in d]  # type: ignore[operator]
        return [kept for _ in ins], [kept]
    if name in ("sum", "mean"):
        over = {i % len(d) for i in n.args[1]}  # type: ignore[union-attr,operator,misc]
        return [[None if i in over and name == "mean" else i for i in d]], [[None if i in over else i for i in d]]
    if name in ("attention", "attention_backward"):
        heads = [[None, "h", None, None][: len(s)] for s in ins]
        return heads, [[None, "h", None, None][: len(s)] if len(s) > 1 else [None] for s in shapes(n)]
    raise AssertionError(f"no rule for {name}")


SHAPES = frozenset(["expand", "view", "_unsafe_view", "t", "transpose", "unsqueeze", "slice", "slice_backward", "cat"])
LINEAR = SHAPES | {"add", "neg", "clone", "detach", "div"}


def ways(n: Node) -> list[Way]:
    name = n.target.__name__.split(".")[0]  # type: ignore[union-attr]
    ins, outs = labelled(n, name)
    sizes = [shape(a) for a in operands(n)]
    found = [Way((R,) * len(ins), (R,) * len(outs))]
    for label in dict.fromkeys(c for labels in (*ins, *outs) for c in labels if c is not None):
        carried = [(labels.index(label), s) for labels, s in zip((*ins, *outs), (*sizes, *shapes(n)), strict=True) if label in labels]
        if all(s[d] % RANKS == 0 for d, s in carried):
            contracted = not any(label in labels for labels in outs)
            states = [S(labels.index(label)) if label in labels else R for labels in ins]
            found.append(Way(tuple(states), tuple(P if contracted else S(o.index(label)) if label in o else R for o in outs)))
    if name in LINEAR and (name != "add" or len(ins) > 1):
        found.append(Way((P,) * len(ins), (P,)))
    if name == "mul":
        found += [Way(tuple(P if i == k else R for i in range(len(ins))), (P,)) for k in range(len(ins))]
    return list(dict.fromkeys(found))


# -------------------------------------------------------------------------------------------------------------- programme


@dataclass
class Found:
    weights: dict[str, State]
    collectives: Counter[str]
    replicated: float


def solve(graph: torch.fx.Graph) -> Found:
    """Least bytes of whole matrices, then least bytes moved, then least work repeated."""
    model = pulp.LpProblem("joint", pulp.LpMinimize)
    nodes = [n for n in graph.nodes if n.op in ("placeholder", "call_function") and n.target is not operator.getitem and "_assert" not in n.name]
    backward: set[Node] = set()
    choices: dict[Node, list[Way]] = {}
    for n in nodes:
        if n.op == "placeholder":
            kind = type(n.meta["desc"]).__name__
            if kind == "ParamAOTInput":
                states = [R, *(S(d) for d, size in enumerate(shape(n)) if size % RANKS == 0)]
            else:
                states = [S(1)] if shape(n)[-1] == 32 else [R]  # h and the gradient of the result; the rotary tables
            choices[n] = [Way((), (s,)) for s in states]
        else:
            choices[n] = ways(n)
        if "tangents" in n.name or any(value(a)[0] in backward for a in operands(n)):
            backward.add(n)
    x = {(n, k): pulp.LpVariable(f"x_{n.name}_{k}", cat="Binary") for n in nodes for k in range(len(choices[n]))}
    for n in nodes:
        model += pulp.lpSum(x[n, k] for k in range(len(choices[n]))) == 1
    wants: dict[tuple[Node, int], list[tuple[Node | None, dict[State, Any]]]] = defaultdict(list)
    for n in nodes:
        for i, a in enumerate(operands(n)):
            asked: dict[State, Any] = defaultdict(list)
            for k, way in enumerate(choices[n]):
                asked[way.ins[i]].append(x[n, k])
            wants[value(a)].append((n, {s: pulp.lpSum(v) for s, v in asked.items()}))
    output = graph.output_node()
    params = {n.meta["desc"].target: n for n in nodes if n.op == "placeholder" and hasattr(n.meta["desc"], "target")}
    for made, desc in zip(output.args[0], output.meta["desc"], strict=True):  # type: ignore[arg-type]
        if not isinstance(made, Node):
            continue
        of = getattr(getattr(desc, "grad_of", None), "target", None)
        if of is None:
            wants[value(made)].append((None, {S(1): 1}))  # what the next layer takes, and the one before it
            continue
        # a gradient lies as its parameter does; one of a whole parameter may be a sum over ranks until the step
        stored = {way.outs[0]: x[params[of], k] for k, way in enumerate(choices[params[of]])}
        whole = pulp.LpVariable(f"summed_{of}", 0, 1)
        model += whole <= stored[R]
        wants[value(made)].append((None, {**stored, R: stored[R] - whole, P: whole}))
    moved, work, conversions = [], [], {}
    for n in nodes:
        for index, size in enumerate(shapes(n)):
            made_in: dict[State, Any] = defaultdict(list)
            for k, way in enumerate(choices[n]):
                made_in[way.outs[index]].append(x[n, k])
            states = {s for _, asked in wants[n, index] for s in asked}
            movable = TOKENS in size
            for t in states:
                sources = []
                for s, amount in made_in.items():
                    if s != t and (not movable or (s[0], t[0]) not in MOVES or (t[0] == "S" and size[t[1]] % RANKS)):
                        continue
                    w = pulp.LpVariable(f"w_{n.name}_{index}_{s}_{t}", 0, 1)
                    model += w <= pulp.lpSum(amount)
                    sources.append(w)
                    if s != t:
                        conversions[n, index, s, t] = w
                        moved.append(MOVES[s[0], t[0]][1] * math.prod(size) * w)
                for _, asked in wants[n, index]:
                    if t in asked:
                        model += asked[t] <= pulp.lpSum(sources)
        work += [1e-3 * math.prod(shapes(n)[0]) * x[n, k] for k, way in enumerate(choices[n]) if not any(s[0] == "S" for s in (*way.ins, *way.outs))]
    first = pulp.lpSum(math.prod(shape(n)) * x[n, 0] for n in params.values() if len(shape(n)) > 1)
    solver = pulp.HiGHS(msg=False, gapRel=0.0)
    model.setObjective(first)
    assert pulp.LpStatus[model.solve(solver)] == "Optimal"
    least = pulp.value(first) or 0.0
    model += first <= least + 0.5
    model.setObjective(pulp.lpSum([*moved, *work]) / (TOKENS * 32))
    assert pulp.LpStatus[model.solve(solver)] == "Optimal"
    collectives: Counter[str] = Counter()
    for (n, index, s, t), w in conversions.items():
        if w.value() > 0.5 and MOVES[s[0], t[0]][0]:
            users = [user for user, asked in wants[n, index] if t in asked and (pulp.value(asked[t]) or 0) > 0.5]
            forward = n not in backward and any(user is None or user not in backward for user in users)
            collectives[f"{'forward' if forward else 'backward'} {MOVES[s[0], t[0]][0]}"] += 1
    weights = {name: next(way.outs[0] for k, way in enumerate(choices[n]) if x[n, k].value() > 0.5) for name, n in params.items()}
    return Found(weights, collectives, least)


def test_the_joint_graph_gives_the_same_plan() -> None:
    """Column and row weights, and eight collectives: two all_gather and two reduce_scatter forward, and their mirror backward."""
    found = solve(joint_graph())
    weights = {name.removeprefix("layer.").removesuffix(".weight"): s for name, s in found.weights.items()}
    assert {n: f"{kind}{d}" for n, (kind, d) in weights.items() if "norm" not in n} == LLAMA
    assert {weights["input_layernorm"], weights["post_attention_layernorm"]} == {R}
    assert found.collectives == SCATTERED
    assert found.replicated == 0.0
