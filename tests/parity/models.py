"""Tiny models of every family, written where a test wants them: configs of transformers and plain factory files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from meshwright.profiling import loading
from meshwright.profiling.graph import ModelGraph

SEQ = 16
EXAMPLES = Path(__file__).parents[2] / "examples" / "models"
_WIDTHS: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "vocab_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
_GPT2 = {
    "n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 64, "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_ROUTED: dict[str, Any] = {**_WIDTHS, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT: dict[str, Any] = {
    **_ROUTED, "num_key_value_heads": 8, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
_ENCODER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_T5 = {
    "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 64, "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
_MAMBA = {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 4, "vocab_size": 64, "time_step_rank": 4}
# Llama has layers enough for eight stages or four of two chunks; Qwen3 a number of layers that no stages share equally
_CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", {**_WIDTHS, "num_hidden_layers": 8}, "LlamaForCausalLM"),
    "qwen3": ("Qwen3Config", {**_WIDTHS, "num_hidden_layers": 5, "head_dim": 8}, "Qwen3ForCausalLM"),
    "mixtral": ("MixtralConfig", {**_WIDTHS, "num_local_experts": 4, "num_experts_per_tok": 2}, "MixtralForCausalLM"),
    "qwen3-moe": ("Qwen3MoeConfig", {**_ROUTED, "num_experts": 8, "head_dim": 8}, "Qwen3MoeForCausalLM"),
    "deepseek": ("DeepseekV3Config", _LATENT, "DeepseekV3ForCausalLM"),
    "gpt2": ("GPT2Config", _GPT2, "GPT2LMHeadModel"),
    "vit": ("ViTConfig", {**_ENCODER, "image_size": 16, "patch_size": 4, "num_labels": 10}, "ViTForImageClassification"),
    "bert": ("BertConfig", {**_ENCODER, "vocab_size": 64, "max_position_embeddings": 32}, "BertForMaskedLM"),
    "t5": ("T5Config", _T5, "T5ForConditionalGeneration"),
    "mamba": ("MambaConfig", _MAMBA, "MambaForCausalLM"),
}  # fmt: skip
MODELS = (*_CONFIGS, "mixer", "unet")
_MIXER = '''"""A tiny MLP-Mixer that sees 16 patches."""

import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self, width, hidden, bias=True):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    def __init__(self, tokens, width):
        super().__init__()
        self.norm_tokens, self.mix_tokens = nn.LayerNorm(width), Mlp(tokens, tokens // 2, bias=False)
        self.norm_channels, self.mix_channels = nn.LayerNorm(width), Mlp(width, 2 * width)

    def forward(self, x):
        x = x + self.mix_tokens(self.norm_tokens(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mix_channels(self.norm_channels(x))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(48, 32)
        self.blocks = nn.ModuleList(Block(16, 32) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, images):
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4)
        x = self.embed(patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def build():
    return Mixer()


def sample(batch, seq):
    return {"images": torch.randn(batch, 3, 16, 16), "labels": torch.randint(0, 10, (batch,))}
'''


def write_models(folder: Path) -> dict[str, str]:
    """Writes every tiny model into `folder`; returns what names each of them to the planner."""
    sources = {}
    for name, (kind, sizes, architecture) in _CONFIGS.items():
        config = getattr(transformers, kind)(**sizes)
        config.architectures = [architecture]
        path = folder / f"{name}.json"
        path.write_text(json.dumps(config.to_dict(), default=str))
        sources[name] = str(path)
    unet = (EXAMPLES / "unet.py").read_text().replace("SIDE = 64", "SIDE = 8").replace("width: int = 32", "width: int = 16")
    for name, text in (("mixer", _MIXER), ("unet", unet)):
        path = folder / f"tiny_{name}.py"
        path.write_text(text)
        sources[name] = f"{path}:build"
    return sources


def build(source: str) -> nn.Module:
    """The model in fp32 for training, with the same weights at every call."""
    torch.manual_seed(0)
    if source.endswith(".json"):
        config = loading.hf_config(loading.read_config(Path(source)), source)
        return loading.hf_class(config, source)(config).float().train()
    made = loading.import_target(source)[1]()
    assert isinstance(made, nn.Module)
    return made.train()


def make_batch(graph: ModelGraph, samples: int) -> tuple[dict[str, Tensor], Tensor]:
    """Random inputs by name and labels for `samples` samples, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    assert graph.labels is not None
    made = {}
    for i in (*graph.inputs, graph.labels):
        shape = list(i.spec.shape)
        shape[0] *= samples
        integer = i.spec.dtype == "int64"
        made[i.name] = torch.randint(0, i.high or 10, shape, generator=generator) if integer else torch.randn(shape, generator=generator)
    labels = made.pop(graph.labels.name)
    return made, labels
