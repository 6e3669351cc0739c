"""Op sharding finds Megatron's plan for a Llama, and says why where there is none."""

from __future__ import annotations

from collections import Counter

import pytest

from meshwright.costmodel.sharded import ShardedBlock
from meshwright.planner.sharding import NotShardable
from meshwright.planner.shardedmodel import shard_model
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


@pytest.mark.parametrize(("tp", "words"), [(8, "4 key-value heads are not divisible by 8"), (3, "8 attention heads are not divisible by 3")])
def test_indivisible_heads_are_named(tiny_llama: ModelGraph, tp: int, words: str) -> None:
    """A degree that does not divide the heads is refused with both numbers."""
    with pytest.raises(NotShardable, match=words):
        shard_model(tiny_llama, tp, False)
