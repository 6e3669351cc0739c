"""The model of a published run: built from its dimensions, traced, and read as what one layer multiplies, moves and keeps.

A transformers config of the same dimensions is traced at a short sequence (`trace`, two layers on meta). Everything but attention
is linear in tokens and attention is known by its heads, so one trace serves every sequence length and batch.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from meshwright.costmodel.layers import SEQ, Layer, read_layer
from meshwright.profiling.errors import InputError


@dataclass(frozen=True)
class Dims:
    """Dimensions of a decoder-only model. `moe_ffn` is the width of one expert; `dense_first` layers of a mixture are dense."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool
    tied: bool
    experts: int = 0
    top_k: int = 0
    moe_ffn: int = 0
    shared: int = 0
    latent: bool = False  # multi-head latent attention, DeepSeek-V3's ranks
    dense_first: int = 0


@dataclass(frozen=True)
class RowModel:
    """Layers of a model: `dense` of the one kind, then `layers - dense` of the other."""

    dims: Dims
    dense: Layer | None
    sparse: Layer | None
    dense_layers: int
    sparse_layers: int
    embedding_params: float
    params: float
    active_params: float


def config_of(d: Dims) -> dict[str, Any]:
    """A transformers config with these dimensions, two layers of each kind deep."""
    common = {"hidden_size": d.hidden, "num_attention_heads": d.heads, "num_key_value_heads": d.kv_heads, "vocab_size": d.vocab,
              "tie_word_embeddings": d.tied, "max_position_embeddings": 2048, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    if d.experts and d.latent:
        return common | {"model_type": "deepseek_v3", "intermediate_size": d.ffn, "moe_intermediate_size": d.moe_ffn, "n_routed_experts": d.experts,
                         "num_experts_per_tok": d.top_k, "n_shared_experts": max(1, d.shared), "first_k_dense_replace": 2 if d.dense_first else 0,
                         "num_hidden_layers": 4 if d.dense_first else 2, "n_group": 8 if d.experts % 8 == 0 else 1,
                         "topk_group": 4 if d.experts % 8 == 0 else 1}  # fmt: skip
    if d.experts and d.shared and not d.dense_first:
        return common | {"model_type": "qwen2_moe", "intermediate_size": d.ffn, "moe_intermediate_size": d.moe_ffn, "num_experts": d.experts,
                         "num_experts_per_tok": d.top_k, "shared_expert_intermediate_size": d.shared * d.moe_ffn, "num_hidden_layers": 2,
                         "decoder_sparse_step": 1}  # fmt: skip
    if d.experts:
        return common | {"model_type": "qwen3_moe", "intermediate_size": d.ffn, "moe_intermediate_size": d.moe_ffn, "num_experts": d.experts,
                         "num_experts_per_tok": d.top_k, "head_dim": d.head_dim + d.head_dim % 2, "num_hidden_layers": 4 if d.dense_first else 2,
                         "mlp_only_layers": [0, 1] if d.dense_first else [], "decoder_sparse_step": 1}  # fmt: skip
    plain = d.head_dim * d.heads == d.hidden
    even = d.head_dim + d.head_dim % 2  # rotary embeddings turn pairs
    if d.gated:
        kind = "qwen3" if d.hidden % d.heads else "llama"  # Llama's heads divide its width
        return common | {"model_type": kind, "intermediate_size": d.ffn, "num_hidden_layers": 2, "head_dim": even}
    if d.kv_heads == d.heads and plain:
        return {"model_type": "gpt2", "n_embd": d.hidden, "n_inner": d.ffn, "n_layer": 2, "n_head": d.heads, "vocab_size": d.vocab,
                "n_positions": 2048, "activation_function": "gelu", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
                "tie_word_embeddings": d.tied, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    return common | {"model_type": "nemotron", "intermediate_size": d.ffn, "num_hidden_layers": 2, "head_dim": even}


@lru_cache(maxsize=4096)
def build(d: Dims) -> RowModel:
    """Traces a model of these dimensions. InputError if they make no model, or transformers is not installed."""
    from meshwright.profiling.trace import trace  # torch is slow to import

    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config_of(d)))
        try:
            graph = trace(str(path), seq=SEQ)
        except InputError as e:
            raise InputError(str(e).replace(str(path), "a model of these dimensions")) from None
        except Exception as e:  # whatever transformers makes of odd dimensions
            raise InputError(f"these dimensions make no model ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})") from None
    kinds = {o.block: graph.blocks[o.block] for o in graph.sequence if graph.blocks[o.block].repeated}
    layers = [read_layer(b) for b in kinds.values()]
    sparse = next((x for x in layers if x.expert_products), None)
    dense = next((x for x in layers if not x.expert_products), None)
    dense_layers = d.layers if sparse is None else min(d.dense_first, d.layers)
    sparse_layers = d.layers - dense_layers
    embedding = float(d.vocab * d.hidden * (1 if d.tied else 2))
    total, active = embedding, embedding
    for layer, count in ((dense, dense_layers), (sparse, sparse_layers)):
        if layer is not None:
            rest = layer.split_params + layer.whole_params
            total += count * (rest + layer.expert_params)
            active += count * (rest + layer.expert_params * d.top_k / max(1, d.experts))
    return RowModel(d, dense if dense_layers else None, sparse, dense_layers, sparse_layers, embedding, total, active)
