"""What op sharding finds for the families of models: tiny ones, traced, and their plans by name."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import transformers

from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.trace import trace

EXAMPLES = Path(__file__).parents[2] / "examples" / "models"
SEQ = 16
WIDTHS: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 32,
}  # fmt: skip
ROUTED: dict[str, Any] = {**WIDTHS, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT: dict[str, Any] = {
    **ROUTED, "num_key_value_heads": 8, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
PLAIN: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", WIDTHS, "LlamaForCausalLM"),
    "llama_one_kv": ("LlamaConfig", {**WIDTHS, "num_key_value_heads": 1}, "LlamaForCausalLM"),
    "qwen3": ("Qwen3Config", {**WIDTHS, "head_dim": 8}, "Qwen3ForCausalLM"),
    "gpt2": ("GPT2Config", GPT2, "GPT2LMHeadModel"),
    "bert": ("BertConfig", {**PLAIN, "vocab_size": 64, "max_position_embeddings": 32}, "BertForMaskedLM"),
    "vit": ("ViTConfig", {**PLAIN, "image_size": 16, "patch_size": 4, "num_labels": 10}, "ViTForImageClassification"),
    "t5": ("T5Config", {"d_model": 32, "d_ff": 64, "num_layers": 3, "num_heads": 4, "d_kv": 8, "vocab_size": 64, "decoder_start_token_id": 0},
           "T5ForConditionalGeneration"),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4, "vocab_size": 64, "time_step_rank": 4}, "MambaForCausalLM"),
    "mixtral": ("MixtralConfig", {**WIDTHS, "num_local_experts": 4, "num_experts_per_tok": 2}, "MixtralForCausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", {**ROUTED, "num_experts": 4, "head_dim": 8}, "Qwen3MoeForCausalLM"),
    "deepseek": ("DeepseekV3Config", LATENT, "DeepseekV3ForCausalLM"),
}  # fmt: skip
FAMILIES = (*CONFIGS, "mixer", "unet", "zoo")
# Ops that the rules know and none of the other models has.
ZOO = '''"""One of each."""

import torch
from torch import nn
from torch.nn import functional as F


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.prelu, self.norm = nn.Linear(16, 32), nn.PReLU(8), nn.BatchNorm1d(8)
        self.transposed, self.grouped, self.row = nn.ConvTranspose2d(8, 4, 2), nn.Conv2d(8, 16, 3, groups=4), nn.Conv1d(8, 6, 3)
        self.weight = nn.Parameter(torch.randn(16, 12))
        self.batch = nn.Parameter(torch.randn(8, 16, 16))

    def forward(self, x):  # [b, 8, 16]
        y = F.glu(self.up(x), -1) + self.prelu(x) + self.norm(x)
        y = torch.roll(y, 1, 1).flip(2) + y.cumsum(1) + torch.stack([y, x], 1).sum(1) + y.narrow(2, 0, 16)
        a = torch.einsum("bsh,hk->bsk", y, self.weight) + F.pad(y, (0, 4))[..., :12].logsumexp(1, keepdim=True)
        image = self.transposed(y.unsqueeze(2).unflatten(3, (4, 4)).squeeze(2))
        image = F.adaptive_avg_pool2d(image.repeat(1, 2, 1, 1), 4).tril() + y.view(-1, 8, 4, 4) + F.max_pool2d(self.grouped(y.view(-1, 8, 4, 4)), 2).mean()
        line = self.row(F.avg_pool1d(y, 2))
        again = torch.baddbmm(y.transpose(0, 1), self.batch.sum(2, keepdim=True).expand(8, 16, 16)[:, :1].expand(8, y.shape[0], 16), self.batch).transpose(0, 1)
        pairs = torch.matmul(y.unsqueeze(1), y.unsqueeze(1).transpose(-1, -2)).squeeze(1).var(2) + y.amax(2) + y.index_select(2, torch.arange(3, device=x.device)).sum(2)
        windows = y.unfold(2, 4, 4).std(-1).sort(1)[0] + torch.topk(y, 4, dim=2)[0].mT.swapaxes(1, 2)
        parts = torch.where(y > 0, y, 0.0).masked_fill(y > 3, 1.0).softmax(1).tile(1, 1, 2).chunk(2, 2)
        return parts[0].sum() + image.sum() + line.pow(2).sum() + a.sum((1, 2)).sum() + pairs.norm() + windows.sum() + again.clone().sum() + parts[1].mean()


def build():
    return Zoo()


def sample(batch, seq):
    return {"x": torch.randn(batch, 8, 16)}
'''


@functools.cache
def family(name: str) -> ModelGraph:
    """The tiny model of a family, traced in fp32."""
    if name == "mixer":
        return trace(f"{EXAMPLES / name}.py:build", seq=64, precision="fp32")
    if name in ("unet", "zoo"):
        text = ZOO if name == "zoo" else (EXAMPLES / "unet.py").read_text().replace("SIDE = 64", "SIDE = 8").replace("width: int = 32", "width: int = 16")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"tiny_{name}.py"
            path.write_text(text)
            return trace(f"{path}:build", seq=64, precision="fp32")
    config, sizes, architecture = CONFIGS[name]
    made = getattr(transformers, config)(**sizes)
    made.architectures = [architecture]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.json"
        path.write_text(json.dumps(made.to_dict(), default=str))
        return trace(str(path), seq=SEQ, precision="fp32")
