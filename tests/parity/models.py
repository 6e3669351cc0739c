"""Tiny models of four kinds, written where a test wants them: three configs of transformers and one plain factory file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from meshwright.profiling import loading
from meshwright.profiling.graph import ModelGraph

SEQ = 16
_WIDTHS = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "vocab_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
_GPT2 = {
    "n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 64, "n_positions": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
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
    configs = {
        "llama": (transformers.LlamaConfig(**_WIDTHS), "LlamaForCausalLM"),
        "qwen3": (transformers.Qwen3Config(**_WIDTHS, head_dim=8), "Qwen3ForCausalLM"),
        "gpt2": (transformers.GPT2Config(**_GPT2), "GPT2LMHeadModel"),
    }
    sources = {}
    for name, (config, architecture) in configs.items():
        config.architectures = [architecture]
        path = folder / f"{name}.json"
        path.write_text(json.dumps(config.to_dict(), default=str))
        sources[name] = str(path)
    (folder / "tiny_mixer.py").write_text(_MIXER)
    return {**sources, "mixer": f"{folder / 'tiny_mixer.py'}:build"}


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
