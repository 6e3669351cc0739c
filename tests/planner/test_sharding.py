"""Op sharding finds Megatron's plan for a Llama, and says why where there is none."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from test_sharding_families import family

from meshwright.costmodel.sharded import ShardedBlock
from meshwright.planner.shardedmodel import shard_model
from meshwright.planner.sharding import NotShardable, Setting, _Problem, solve_block
from meshwright.planner.sharding_words import ROWS, describe, describe_model
from meshwright.planner.states import I, S
from meshwright.profiling.graph import ModelGraph

OUTPUT_DIM = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
INPUT_DIM = ("self_attn.o_proj", "mlp.down_proj")


def layer_of(graph: ModelGraph, tp: int, sp: bool) -> ShardedBlock:
    return next(s for s in shard_model(graph, tp, sp) if s.block.repeated)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("sp", [False, True])
def test_a_llama_layer_is_sharded_as_megatron_does(tiny_llama: ModelGraph, tp: int, sp: bool) -> None:
    """Query, key, value, gate and up are split by output, o and down by input, and a rank holds 1/tp of every matrix."""
    layer = layer_of(tiny_llama, tp, sp)
    assert {n: layer.params[f"{n}.weight"] for n in OUTPUT_DIM} == dict.fromkeys(OUTPUT_DIM, "S0")
    assert {n: layer.params[f"{n}.weight"] for n in INPUT_DIM} == dict.fromkeys(INPUT_DIM, "S1")
    matrices = sum(p.numel for p in layer.block.params if len(p.shape) == 2)
    norms = sum(p.numel for p in layer.block.params if len(p.shape) == 1)
    assert layer.numel == matrices / tp + norms
    assert layer.unknown == ()


def test_a_layer_reduces_twice_forward_and_twice_backward(tiny_llama: ModelGraph) -> None:
    """Without sequence parallelism a layer communicates two all_reduce forward and two backward, of the carry's bytes each."""
    layer = layer_of(tiny_llama, 2, False)
    assert Counter((c.phase, c.op) for c in layer.collectives) == {("forward", "all_reduce"): 2, ("backward", "all_reduce"): 2}
    assert {c.amount.per_sample for c in layer.collectives} == {4.0 * 32 * 64}


def test_sequence_parallelism_gathers_and_scatters(tiny_llama: ModelGraph) -> None:
    """With sequence parallelism a layer gathers twice and reduce-scatters twice in each phase, and reduces the gradients of its norms."""
    layer = layer_of(tiny_llama, 2, True)
    moved = Counter((c.phase, c.op) for c in layer.collectives if not c.value.startswith("param:"))
    assert moved == {(phase, op): 2 for phase in ("forward", "backward") for op in ("all_gather", "reduce_scatter")}
    norms = sorted(c.value for c in layer.collectives if c.value.startswith("param:"))
    assert norms == ["param:input_layernorm.weight", "param:post_attention_layernorm.weight"]
    assert (layer.carry, layer.carry_out) == ("S1", "S1")


def test_one_rank_communicates_nothing(tiny_llama: ModelGraph) -> None:
    """With tp=1 every block is whole: nothing is converted and a rank holds every parameter."""
    blocks = shard_model(tiny_llama, 1, False)
    assert [b.numel for b in blocks] == [b.block.numel for b in blocks]
    assert not any(b.collectives or b.conversions for b in blocks)


@pytest.mark.parametrize(("tp", "words"), [(3, "8 attention heads are not divisible by 3"), (16, "8 attention heads are not divisible by 16")])
def test_indivisible_heads_are_named(tiny_llama: ModelGraph, tp: int, words: str) -> None:
    """A degree that does not divide the heads is refused with both numbers."""
    with pytest.raises(NotShardable, match=words):
        shard_model(tiny_llama, tp, False)


def test_key_value_heads_that_do_not_line_up_are_named(tiny_llama: ModelGraph) -> None:
    """Six ranks cannot share four key-value heads evenly, nor take one each."""
    attention = [op.name for op in tiny_llama.blocks[1].ops if op.kind == "attention"]
    graph = with_op(tiny_llama, attention[0], dims={**tiny_llama.blocks[1].by_name[attention[0]].dims, "heads": 12})
    with pytest.raises(NotShardable, match="4 key-value heads are not divisible by 6, nor 6 by them"):
        shard_model(graph, 6, False)


def with_op(graph: ModelGraph, name: str, **changes: Any) -> ModelGraph:
    """The graph with one op of its layer changed."""
    blocks = [
        b.model_copy(update={"ops": tuple(op.model_copy(update=changes) if op.name == name else op for op in b.ops)}) if b.repeated else b
        for b in graph.blocks
    ]
    return graph.model_copy(update={"blocks": tuple(blocks)})


@pytest.mark.parametrize("sp", [False, True])
def test_an_op_without_a_rule_is_computed_whole_and_named(tiny_llama: ModelGraph, sp: bool) -> None:
    """An unknown op on a path with gradients takes and makes whole values on every rank; what is around it is still split."""
    silu = next(op.name for op in tiny_llama.blocks[1].ops if op.target == "aten.silu.default")
    graph = with_op(tiny_llama, silu, target="aten.foo.default", kind="unknown")
    layer = layer_of(graph, 2, sp)
    assert layer.unknown == ("aten.foo in model.layers.0.mlp.act_fn",)
    assert (layer.operands[silu], layer.states[silu]) == (("I",), "I")
    assert silu not in layer.divided
    assert layer.params["self_attn.q_proj.weight"] == "S0"
    assert not any(b.unknown for b in shard_model(graph, 1, False))


def test_an_op_without_a_rule_or_gradient_is_computed_whole(tiny_llama: ModelGraph) -> None:
    """Positions and masks need no rule: every rank computes them."""
    silu = next(op.name for op in tiny_llama.blocks[1].ops if op.target == "aten.silu.default")
    graph = with_op(tiny_llama, silu, target="aten.foo.default", kind="unknown", requires_grad=False)
    assert silu not in layer_of(graph, 2, False).divided


def test_memory_is_a_row_of_the_programme(tiny_llama: ModelGraph) -> None:
    """A bound that holds changes nothing; one that cannot hold is named with the least that the block needs, which then suffices."""
    block = tiny_llama.blocks[1]
    free = solve_block(block, Setting(2, S(1), S(1)))
    bound = solve_block(block, Setting(2, S(1), S(1), memory=free.memory))
    assert (bound.sharded, bound.price) == (free.sharded, free.price)
    with pytest.raises(NotShardable, match=r"^memory: model\.layers\.0 needs at least [\d,]+ bytes of one rank, more than 1,000$") as error:
        solve_block(block, Setting(2, S(1), S(1), memory=1000.0))
    least = float(str(error.value).split("least ")[1].split(" bytes")[0].replace(",", ""))
    assert solve_block(block, Setting(2, S(1), S(1), memory=least + 1)).memory == pytest.approx(least, abs=1)
    with pytest.raises(NotShardable):
        solve_block(block, Setting(2, S(1), S(1), memory=least - 10))


def test_less_memory_costs_communication() -> None:
    """A BERT layer that has to save less moves more: it splits tokens where whole ones would be saved."""
    block = next(b for b in family("bert").blocks if b.repeated)
    free = solve_block(block, Setting(2, I, I))
    tight = solve_block(block, Setting(2, I, I, memory=0.97 * free.memory))
    assert tight.memory <= 0.97 * free.memory
    assert tight.price > free.price


def test_memory_counts_parameters_and_saved_activations(tiny_llama: ModelGraph) -> None:
    """16 bytes for each parameter of a rank, what ops save (whole or split), and gathered copies of what is saved."""
    block = tiny_llama.blocks[1]
    for ranks, carry in ((2, I), (2, S(1)), (4, S(1))):
        solution = solve_block(block, Setting(ranks, carry, carry, batch=3))
        s = solution.sharded
        saved = sum(op.saved.at(3) * (1.0 if op.name in s.gathered else s.share(op.name)) for op in block.ops)
        assert solution.memory == pytest.approx(16 * s.numel + saved)


def test_rows_have_names(tiny_llama: ModelGraph) -> None:
    """Every constraint says what it is about: its family, the op or value, the state."""
    problem = _Problem(tiny_llama.blocks[1], Setting(2, S(1), S(1), memory=1e12))
    problem.solve()
    names = list(problem.model.constraints)
    assert len(names) == sum(problem.families.values()) == len(set(names))
    assert {n for n in names if n in ("memory", "weights_sharded", "one_way_linear_3", "leaves_linear_3_P", "final_add_6_S1")} == {
        "memory", "weights_sharded", "one_way_linear_3", "leaves_linear_3_P", "final_add_6_S1",
    }  # fmt: skip
    assert set(problem.families) == set(ROWS) - {"tied"}


def test_the_programme_in_words(tiny_llama: ModelGraph) -> None:
    """The words name the choice of each op, what is moved where, and the size of the programme."""
    text = describe(tiny_llama.blocks[1], 2, S(1), memory=2.0**30)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "model.layers.0 on 2 tensor-parallel ranks: the carry enters as S1 and leaves as S1"
    assert "self_attn.o_proj linear_3 reshape S2, self_attn.o_proj.weight S1 -> P divided" in lines
    assert "linear_3 P to S1, leaving self_attn.o_proj: forward reduce_scatter, backward all_gather, 8.0 KiB" in lines
    assert "32.0 KiB moved by collectives, forward and backward" in lines
    assert "backward all_reduce of the gradients of input_layernorm.weight, post_attention_layernorm.weight" in lines
    assert any(line.endswith("one_way: an op is computed in one way") for line in lines)
    assert any(line.startswith("memory of one rank:") and line.split(" of at most ")[1].startswith("1.0 GiB") for line in lines)
    counted = [int(line.split()[0]) for line in lines if ": " in line and line.split()[0].isdigit()]
    total = next(line for line in lines if line.endswith(" constraints"))
    assert sum(counted) == sum(int(n) for n in total.replace(",", "").split() if n.isdigit())


def test_a_model_in_words(tiny_llama: ModelGraph) -> None:
    """Every block has its paragraph, in the order of the model."""
    text = describe_model(tiny_llama, 2, False)
    titles = [line for line in text.splitlines() if " tensor-parallel ranks: " in line]
    assert [t.split(" on 2 ")[0] for t in titles] == ["stem", "model.layers.0", "head"]
