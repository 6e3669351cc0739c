"""What op sharding finds for the families of models: tiny ones, traced, and their plans by name."""

from __future__ import annotations

import functools
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import transformers

from meshwright.costmodel.sharded import ShardedBlock, routed_ops
from meshwright.planner.shardedmodel import shard_model
from meshwright.planner.sharding import NotShardable, shard_block
from meshwright.planner.states import S
from meshwright.planner.tables import uses_vocab_parallel_loss
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
        image = F.adaptive_avg_pool2d(image.repeat(1, 2, 1, 1), 4).tril() + y.view(-1, 8, 4, 4)
        image = image + F.max_pool2d(self.grouped(y.view(-1, 8, 4, 4)), 2).mean()
        line = self.row(F.avg_pool1d(y, 2))
        added = self.batch.sum(2, keepdim=True).expand(8, 16, 16)[:, :1].expand(8, y.shape[0], 16)
        again = torch.baddbmm(y.transpose(0, 1), added, self.batch).transpose(0, 1)
        pairs = torch.matmul(y.unsqueeze(1), y.unsqueeze(1).transpose(-1, -2)).squeeze(1).var(2) + y.amax(2)
        pairs = pairs + y.index_select(2, torch.arange(3, device=x.device)).sum(2)
        windows = y.unfold(2, 4, 4).std(-1).sort(1)[0] + torch.topk(y, 4, dim=2)[0].mT.swapaxes(1, 2)
        parts = torch.where(y > 0, y, 0.0).masked_fill(y > 3, 1.0).softmax(1).tile(1, 1, 2).chunk(2, 2)
        sums = parts[0].sum() + image.sum() + line.pow(2).sum() + a.sum((1, 2)).sum() + windows.sum() + again.clone().sum()
        return sums + pairs.norm() + parts[1].mean()


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
        small = (EXAMPLES / "unet.py").read_text().replace("SIDE = 64", "SIDE = 8").replace("width: int = 32", "width: int = 16")
        text = ZOO if name == "zoo" else small
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


@functools.cache
def example(name: str) -> ModelGraph:
    """A model of examples/models at a short sequence."""
    return trace(str(EXAMPLES / f"{name}.json"), seq=256, precision="bf16")


def moves(sharded: ShardedBlock) -> dict[str, int]:
    """How many collectives there are, by phase and op, but for those of parameters' gradients."""
    return dict(Counter(f"{c.phase} {c.op}" for c in sharded.collectives if not c.value.startswith("param:")))


def matrices(sharded: ShardedBlock) -> dict[str, str]:
    """How each matrix is used, by the module that owns it."""
    return {n.removesuffix(".weight"): s for n, s in sharded.params.items() if len(sharded.block.param(n).shape) > 1}


def layers(graph: ModelGraph, tp: int, sp: bool = False) -> list[ShardedBlock]:
    return [b for b in shard_model(graph, tp, sp) if b.block.repeated]


REDUCED = {"forward all_reduce": 2, "backward all_reduce": 2}
SCATTERED = {"forward all_gather": 2, "forward reduce_scatter": 2, "backward all_gather": 2, "backward reduce_scatter": 2}
LLAMA = {
    "self_attn.q_proj": "S0", "self_attn.k_proj": "S0", "self_attn.v_proj": "S0", "self_attn.o_proj": "S1", "mlp.gate_proj": "S0",
    "mlp.up_proj": "S0", "mlp.down_proj": "S1",
}  # fmt: skip


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_llama_is_megatron_with_sequence_parallelism(tp: int) -> None:
    """Two all_gather and two reduce_scatter forward, their mirror backward, column and row weights, vocabulary split twice."""
    stem, layer, head = shard_model(example("llama-3.1-8b"), tp, True)
    assert matrices(layer) == LLAMA
    assert moves(layer) == SCATTERED
    assert moves(shard_model(example("llama-3.1-8b"), tp, False)[1]) == REDUCED
    assert matrices(stem) == {"model.embed_tokens": "S0"}
    assert matrices(head) == {"lm_head": "S0"}
    assert uses_vocab_parallel_loss((head,))
    assert not layer.kv_replicated


@pytest.mark.parametrize("tp", [16, 32])
@pytest.mark.parametrize("sp", [False, True])
def test_more_ranks_than_key_value_heads_gather_keys_and_values(tp: int, sp: bool) -> None:
    """Every weight is split as with fewer ranks; k and v are gathered after their projections, and each rank takes a head of them."""
    layer = shard_model(example("llama-3.1-8b"), tp, sp)[1]
    assert matrices(layer) == LLAMA
    assert layer.kv_replicated
    gathers = {(c.module, c.source, c.target) for c in layer.conversions if c.module in ("self_attn.k_proj", "self_attn.v_proj")}
    assert gathers == {("self_attn.k_proj", "S2", "R"), ("self_attn.v_proj", "S2", "R")}
    base = SCATTERED if sp else REDUCED
    assert moves(layer) == Counter(base) + Counter({"forward all_gather": 2, "backward reduce_scatter": 2})


def test_plain_loss_gathers_the_logits() -> None:
    """With loss="plain" the projection is still split, and what it makes is gathered before the loss."""
    head = shard_model(example("llama-3.1-8b"), 4, True, loss="plain")[-1]
    assert matrices(head) == {"lm_head": "S0"}
    assert not uses_vocab_parallel_loss((head,))
    assert ("lm_head", "S2", "I") in {(c.module, c.source, c.target) for c in head.conversions}


def test_gpt2_packs_query_key_and_value() -> None:
    """One weight holds q, k and v: it is split by output inside each of three pieces."""
    (layer,) = layers(family("gpt2"), 2)
    assert matrices(layer) == {"attn.c_attn": "S1x3", "attn.c_proj": "S0", "mlp.c_fc": "S1", "mlp.c_proj": "S0"}
    assert moves(layer) == REDUCED
    assert layer.sizes["attn.split_size"] == 16
    (scattered,) = layers(family("gpt2"), 2, sp=True)
    assert (matrices(scattered), moves(scattered)) == (matrices(layer), SCATTERED)


def test_vit_keeps_its_tokens_whole() -> None:
    """Seventeen tokens cannot be split, so values between layers are whole; weights are column and row."""
    (layer,) = layers(family("vit"), 2)
    columns = dict.fromkeys(("attention.q_proj", "attention.k_proj", "attention.v_proj", "mlp.fc1"), "S0")
    assert matrices(layer) == {**columns, "attention.o_proj": "S1", "mlp.fc2": "S1"}
    assert moves(layer) == REDUCED
    with pytest.raises(NotShardable, match="a sequence of 17 is not divisible by 2"):
        shard_model(family("vit"), 2, True)


def test_bert_gathers_before_its_modules() -> None:
    """A post-norm layer has two of each collective as well."""
    for sp, expected in ((False, REDUCED), (True, SCATTERED)):
        (layer,) = layers(family("bert"), 4, sp)
        assert moves(layer) == expected
        assert set(matrices(layer).values()) == {"S0", "S1"}


T5 = {"SelfAttention.q": "S0", "SelfAttention.k": "S0", "SelfAttention.v": "S0", "SelfAttention.o": "S1"}


def test_t5_shares_its_position_bias_by_heads() -> None:
    """The bias that the first layer makes is split by heads for all of them: no layer gathers it, or its heads."""
    blocks = {b.block.name: b for b in shard_model(family("t5"), 2, False)}
    first, encoder, decoder = (blocks[n] for n in ("encoder.block.0", "encoder.block.1", "decoder.block.1"))
    for block in (first, encoder, decoder):
        got = {n.split(".", 2)[2]: s for n, s in matrices(block).items()}
        assert {n: got[n] for n in T5} == {**T5}, block.block.name
        assert "forward all_gather" not in moves(block)
    assert first.states["unsqueeze_2"] == "S1"
    assert encoder.states["in:1"] == "S1"
    assert moves(encoder) == REDUCED
    assert moves(decoder) == {"forward all_reduce": 3, "backward all_reduce": 4}  # the encoder's output is an operand too
    assert {decoder.params[f"layer.1.EncDecAttention.{n}.weight"] for n in ("q", "k", "v")} == {"S0"}
    assert decoder.params["layer.1.EncDecAttention.o.weight"] == "S1"


def test_t5_scatters_its_sequence() -> None:
    """With values between layers split along the sequence: as Llama in the encoder; a decoder also gathers the encoder's output."""
    encoder, decoder = (next(b for b in family("t5").blocks if b.name == n) for n in ("encoder.block.1", "decoder.block.1"))
    assert moves(shard_block(encoder, 2, S(1), sides={"unsqueeze_2": S(1)})) == SCATTERED
    sides = {"unsqueeze_5": S(1), "zeros": S(1), "dropout_10": S(1)}
    assert moves(shard_block(decoder, 2, S(1), sides=sides)) == {
        "forward all_gather": 4, "forward reduce_scatter": 3, "backward reduce_scatter": 4, "backward all_gather": 3,
    }  # fmt: skip


def test_mamba_runs_its_scan_by_channel() -> None:
    """in_proj holds x and gate, packed; convolution and scan are per channel; x_proj sums over channels; out_proj is a row."""
    (layer,) = layers(family("mamba"), 2, sp=True)
    assert matrices(layer) == {
        "mixer.in_proj": "S0x2", "mixer.A_log": "S0", "mixer.conv1d": "S0", "mixer.x_proj": "S1", "mixer.dt_proj": "S0", "mixer.out_proj": "S1",
    }  # fmt: skip
    assert moves(layer) == {f"{phase} {op}": 1 for phase in ("forward", "backward") for op in ("all_gather", "all_reduce", "reduce_scatter")}
    assert "selective_scan" in layer.divided
    assert ("mixer.x_proj", "P", "R") in {(c.module, c.source, c.target) for c in layer.conversions}


def test_mixer_splits_both_of_its_mlps() -> None:
    """Both MLPs are column and row; with split tokens the one that mixes tokens starts by its contracted dimension."""
    (layer,) = layers(family("mixer"), 2)
    assert matrices(layer) == {"mix_tokens.up": "S0", "mix_tokens.down": "S1", "mix_channels.up": "S0", "mix_channels.down": "S1"}
    assert moves(layer) == REDUCED
    (scattered,) = layers(family("mixer"), 2, sp=True)
    assert (matrices(scattered)["mix_channels.up"], matrices(scattered)["mix_channels.down"]) == ("S0", "S1")


def test_unet_splits_channels() -> None:
    """Residual blocks are column and row over channels, with the group norm between them on each rank's groups."""
    (model,) = shard_model(family("unet"), 2, False)
    assert set(matrices(model).values()) == {"S0", "S1"}
    for block in ("down1", "down2", "middle", "up2", "up1"):
        assert (model.params[f"{block}.conv1.weight"], model.params[f"{block}.conv2.weight"]) == ("S0", "S1")
        assert model.sizes[f"{block}.norm2.num_groups"] == 4
        assert model.params[f"{block}.conv2.bias"] == "P"  # added by one rank


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek"])
def test_experts_see_the_tokens_of_their_rank(name: str) -> None:
    """With split tokens a rank routes its own, without it all of them; no collective is for experts, and none of them is split."""
    for sp in (False, True):
        block = next(b for b in layers(family(name), 2, sp) if b.routed)
        assert block.routed == routed_ops(block.block)
        assert not {c.value.partition(":")[0] for c in block.collectives} & block.routed
        assert not any(c.value.startswith("param:mlp.experts") for c in block.collectives)
        routers = [n for n in block.params if n.startswith(("mlp.experts", "mlp.gate."))]
        assert {block.params[n] for n in routers} == {"R" if sp else "I"}
        share = {block.share(op.name) for op in block.block.ops if op.kind == "experts"}
        assert share == ({0.5} if sp else {1.0})
        assert block.routed.isdisjoint(block.divided) != sp
        # around attention; DeepSeek's also gathers two latents, and its shared expert is a column and a row
        gathers, scatters = (4, 2) if name == "deepseek" else (1, 1)
        if sp:
            assert (moves(block)["forward all_gather"], moves(block)["forward reduce_scatter"]) == (gathers, scatters)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-235b-a22b", "deepseek-v3"])
@pytest.mark.parametrize("sp", [False, True])
def test_mixtures_of_experts_are_shardable(name: str, sp: bool) -> None:
    """The examples have plans at 1, 2, 4 and 8 ranks, and what is not an expert is split."""
    graph = example(name)
    for tp in (1, 2, 4, 8):
        blocks = shard_model(graph, tp, sp)
        assert any(b.routed for b in blocks)
        assert not any(b.unknown for b in blocks)
        if tp > 1:
            whole = [n for b in blocks for n, s in matrices(b).items() if not s.startswith("S") and not n.startswith(("mlp.experts.", "mlp.gate"))]
            assert not whole


def test_latent_attention_is_split_by_heads() -> None:
    """DeepSeek: what the heads share is whole on every rank; the projections to heads are columns, the one from heads is a row."""
    for sp in (False, True):
        block = next(b for b in layers(example("deepseek-v3"), 8, sp) if b.routed)
        got = matrices(block)
        assert (got["self_attn.q_b_proj"], got["self_attn.kv_b_proj"], got["self_attn.o_proj"]) == ("S0", "S0", "S1")
        for projection in ("self_attn.q_b_proj", "self_attn.kv_b_proj"):
            op = next(op for op in block.block.ops if op.module == projection)
            assert block.operands[op.name][0] == "R"
        assert (got["mlp.shared_experts.gate_proj"], got["mlp.shared_experts.up_proj"]) == ("S0", "S0")
        if sp:
            assert got["mlp.shared_experts.down_proj"] == "S1"
