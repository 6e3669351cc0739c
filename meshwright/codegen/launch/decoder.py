"""What another engine must be told of a Hugging Face decoder to build the same one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meshwright.planner.plan import Plan
from meshwright.profiling.errors import InputError
from meshwright.profiling.loading import hf_config

FAMILIES = {
    "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe", "DeepseekV3ForCausalLM": "deepseek_v3", "GPT2LMHeadModel": "gpt2",
}  # fmt: skip


@dataclass(frozen=True)
class Experts:
    """Routed experts. `layers` says of each layer of the model whether it has them; `shared` is the inner size of the shared ones."""

    count: int
    top_k: int
    inner: int
    shared: int
    layers: tuple[bool, ...]
    normalised: bool  # the weights of a token's experts add up to one
    sigmoid: bool
    scale: float
    groups: int
    top_groups: int


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: ranks of the compressed queries (0: not compressed), keys and values, and the parts of a head."""

    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder in the words of its config. `rope` is its dictionary of rotary parameters, empty without any."""

    family: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    dropout: tuple[float, float]  # of attention, of the residual
    rope: dict[str, Any]
    experts: Experts | None
    latent: Latent | None


def decoder(plan: Plan, engine: str, families: tuple[str, ...]) -> Decoder:
    """The plan's model for an engine that has these families. InputError where it is another, or is built in a way of its own."""
    names = (plan.model.config or {}).get("architectures") or []
    family = FAMILIES.get(names[0] if names else "")
    if plan.model.origin != "hf" or not names:
        raise InputError(f"{engine} builds its own models, of a Hugging Face config with 'architectures': {plan.model.source} is none")
    if family not in families:
        known = ", ".join(n for n, f in FAMILIES.items() if f in families)
        raise InputError(f"{engine} has no {names[0]}: of the models that a plan may have, it builds {known}")
    c = hf_config(dict(plan.model.config or {}), plan.model.source)
    layers, hidden, heads = int(c.num_hidden_layers), int(c.hidden_size), int(c.num_attention_heads)
    gpt2 = family == "gpt2"
    windowed = getattr(c, "sliding_window", None) and (family == "mixtral" or getattr(c, "use_sliding_window", False))
    for odd, what in ((getattr(c, "mlp_bias", False), "bias in its MLP"), (windowed, "attention over a sliding window")):
        if odd:
            raise InputError(f"{plan.model.source} has {what}, which is not written for {engine}")
    if not gpt2 and c.hidden_act != "silu":
        raise InputError(f"{plan.model.source} has {c.hidden_act} in its MLP, and {engine} is told of silu alone")
    inner = (c.n_inner or 4 * hidden) if gpt2 else c.intermediate_size
    return Decoder(
        family=str(family), layers=layers, hidden=hidden, inner=int(inner), heads=heads,
        kv_heads=int(getattr(c, "num_key_value_heads", None) or heads), head_dim=int(_head_dim(c, family, hidden // heads)),
        vocab=int(c.vocab_size), positions=int(c.max_position_embeddings), norm_eps=float(c.layer_norm_epsilon if gpt2 else c.rms_norm_eps),
        tied=bool(c.tie_word_embeddings), qkv_bias=gpt2 or family == "qwen2" or bool(getattr(c, "attention_bias", False)),
        dropout=(float(c.attn_pdrop), float(c.resid_pdrop)) if gpt2 else (float(getattr(c, "attention_dropout", 0.0)), 0.0),
        rope={} if gpt2 else dict(c.rope_parameters or {}), experts=_experts(c, family, layers), latent=_latent(c, family),
    )  # fmt: skip


def _head_dim(c: Any, family: str | None, default: int) -> int:
    if family == "deepseek_v3":
        return int(c.qk_nope_head_dim + c.qk_rope_head_dim)
    return int(getattr(c, "head_dim", None) or default)


def _experts(c: Any, family: str | None, layers: int) -> Experts | None:
    if family == "mixtral":
        every = (True,) * layers
        return Experts(c.num_local_experts, c.num_experts_per_tok, c.intermediate_size, 0, every, True, False, 1.0, 0, 0)
    if family == "qwen3_moe":
        has = tuple(i not in c.mlp_only_layers and (i + 1) % c.decoder_sparse_step == 0 for i in range(layers))
        return Experts(c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size, 0, has, bool(c.norm_topk_prob), False, 1.0, 0, 0)
    if family == "deepseek_v3":
        has = tuple(i >= c.first_k_dense_replace for i in range(layers))
        shared = c.n_shared_experts * c.moe_intermediate_size
        groups = (c.n_group, c.topk_group) if c.n_group > 1 else (0, 0)
        return Experts(
            c.n_routed_experts, c.num_experts_per_tok, c.moe_intermediate_size, shared, has, bool(c.norm_topk_prob), True,
            float(c.routed_scaling_factor), *groups,
        )  # fmt: skip
    return None


def _latent(c: Any, family: str | None) -> Latent | None:
    if family != "deepseek_v3":
        return None
    return Latent(int(c.q_lora_rank or 0), int(c.kv_lora_rank), int(c.qk_nope_head_dim), int(c.qk_rope_head_dim), int(c.v_head_dim))
