"""Memory of inference: the closed form against the formulas it cites and against a run."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.costmodel.inference_memory import forward_peak, inference_memory
from meshwright.planner.shardedmodel import shard_model
from meshwright.profiling.graph import ModelGraph

WIDTH, LAYERS, HEADS, KV_HEADS, SEQ = 64, 4, 8, 4, 32


def test_weights_and_cache_are_those_of_the_formula(tiny_llama: ModelGraph) -> None:
    """c P for the weights; 2 b s h d c a layer for the cache."""
    (held,) = inference_memory(tiny_llama, shard_model(tiny_llama, 1, False), batch=6)

    assert held.weights == 4 * tiny_llama.numel
    assert held.kv_cache == 6 * SEQ * LAYERS * KV_HEADS * 2 * (WIDTH // HEADS) * 4
    assert held.live_bytes == sum(held.by_kind().values())


def test_tensor_parallelism_divides(tiny_llama: ModelGraph) -> None:
    """tp = 4 leaves a quarter of the cache, and of the weights all but the norms."""
    (one,) = inference_memory(tiny_llama, shard_model(tiny_llama, 1, False), batch=8)
    (four,) = inference_memory(tiny_llama, shard_model(tiny_llama, 4, False), batch=8)
    norms = 4 * WIDTH * (2 * LAYERS + 1)

    assert four.kv_cache == one.kv_cache / 4
    assert four.weights == pytest.approx((one.weights - norms) / 4 + norms)
    assert four.working < one.working


def test_a_rank_has_one_key_value_head_at_least(tiny_llama: ModelGraph) -> None:
    """tp = 8 with 4 key-value heads: a rank's cache is that of one head, as with tp = 4."""
    (four,) = inference_memory(tiny_llama, shard_model(tiny_llama, 4, False), batch=8)
    (eight,) = inference_memory(tiny_llama, shard_model(tiny_llama, 8, False), batch=8)

    assert eight.kv_cache == four.kv_cache == 4 * 8 * SEQ * LAYERS * 2 * (WIDTH // HEADS)


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_stages_share_the_model(tiny_llama: ModelGraph, pp: int) -> None:
    """Weights and cache of the stages add up to the model's."""
    sharded = shard_model(tiny_llama, 1, False)
    (whole,) = inference_memory(tiny_llama, sharded, batch=2)
    stages = inference_memory(tiny_llama, sharded, batch=2, pp=pp)

    assert len(stages) == pp
    assert sum(s.weights for s in stages) == whole.weights
    assert sum(s.kv_cache for s in stages) == whole.kv_cache
    assert all(s.kv_cache > 0 for s in stages)


def test_prompts_come_one_at_a_time(tiny_llama: ModelGraph) -> None:
    """With a cache the work is that of one prompt until the batch has more tokens than that."""
    sharded = shard_model(tiny_llama, 1, False)
    one, many, more = (inference_memory(tiny_llama, sharded, batch=b)[0].working for b in (1, SEQ, 2 * SEQ))

    assert one == many
    assert more > many


class _Live(TorchDispatchMode):
    """The most bytes of storages that are alive at once, those of a module's parameters left out."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.held = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                s = t.untyped_storage()
                key = s._cdata
                if key not in self.alive and key not in self.held:
                    self.alive[key] = s.nbytes()
                    weakref.finalize(s, self.alive.pop, key, None)
                    self.peak = max(self.peak, sum(self.alive.values()))
        return out


def test_work_of_a_layer_is_near_what_a_run_holds(tiny_llama: ModelGraph, tiny_llama_config) -> None:  # type: ignore[no-untyped-def]
    """The most alive in the layers of a real forward is within a third of the closed form: Python's own temporaries live longer."""
    from meshwright.profiling.loading import build_hf

    module, _ = build_hf(tiny_llama_config, "fp32")
    module = module.to_empty(device="cpu").eval()
    ids = torch.zeros(3, SEQ, dtype=torch.long)
    with torch.no_grad(), _Live(module) as live:
        module.model(ids, use_cache=False)
    layer = next(b for b in shard_model(tiny_llama, 1, False) if b.block.repeated)
    told = forward_peak(layer, 3)

    assert told * 0.67 <= live.peak <= told * 1.5
