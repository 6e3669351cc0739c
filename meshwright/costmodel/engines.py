"""What each training engine does: one table of facts, each with its source, and the rules that find the engine of a run.

A fact is something that documentation, code or a paper says about the software. No fact is a fitted number. Where a source says
"deduced", the fact is not documented and was read off published figures (memory per token, time per release) of that software.
A run names its engine by `software` and `release`; the year stands in where it does not, and words in them or in its notes
(compile, eager, async TP, flash, unfused) override the facts that they name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Engine:
    """Facts about one engine at one release, which the step model reads; from `masks` on, the memory model alone."""

    name: str
    attention: Literal["unfused", "fa1", "fa2", "native"]  # scores in memory; FlashAttention 1, 2; the device's own best kernel
    fusion: Literal["eager", "modules", "compiled"]  # every op a kernel; one kernel a module; one kernel a pointwise region
    overlap_dp: bool  # gradients reduced and parameters gathered beside compute
    overlap_tp: bool  # tensor-parallel collectives beside their GEMMs
    overlap_p2p: bool  # pipeline sends beside compute
    overlap_ep: bool  # expert all-to-all beside another chunk's compute (needs interleaving or a second microbatch)
    optimizer_B: float  # bytes that the optimiser reads and writes per parameter
    gradient_B: float  # bytes of a gradient element on the wire
    loss_passes: float  # fp32 passes over the logits, forward and backward
    cast_B: float  # bytes moved per activation element that is cast to 8 or 4 bits
    recompute: Literal["none", "selective", "full"]  # where a run does not say
    selective: Literal["attention", "every second"]  # what "selective" recompute means
    stops_early: bool  # a checkpoint's recompute ends at the last saved tensor (non-reentrant torch.utils.checkpoint)
    zero: Literal["none", "zero1", "zero2", "zero3"]  # where a run does not say
    sequence_parallel: bool  # beside tensor parallelism, where a run does not say
    broadcast_parameters: bool  # ZeRO-1 shards whole tensors and broadcasts them rank by rank
    grouped_experts: Literal["no", "blackwell", "yes"]  # one grouped kernel for all local experts, or a GEMM per expert
    sends_once: bool  # a token goes once to each rank that holds one of its experts, or once per expert
    interleaves: bool  # a pipeline is interleaved where the layers divide and the run does not say
    weight_B: float  # bytes per parameter of the weights that compute reads
    gradient_store_B: float  # bytes per parameter that gradients are kept in
    state_B: float  # bytes per parameter of master weights and moments
    dropout: bool  # trained with dropout masks
    masks: bool  # dropout masks of the two branches of a layer are kept for backward, a byte per element
    repeats_kv: bool  # keys and values are copied once per query head before attention
    light: bool  # can recompute norms and activation functions alone
    loss_B: float  # bytes per logit at the peak of the loss, forward or backward
    loss_split_B: float  # the same where the vocabulary is split over tensor-parallel ranks
    frees_gradients: bool  # gradients are released after the optimiser and made anew in backward
    bf16_gradient_B: float  # bytes per parameter that gradients take on top when training in bfloat16
    step_B: float  # bytes per local parameter that the optimiser's step makes on top and frees
    bucket_B: float  # bytes of communication buckets whose size is fixed, where data-parallel ranks share states
    expandable: bool  # launched with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
    prints: Literal["allocated", "reserved"]  # which of torch's figures the engine's own log shows


Facts = dict[str, tuple[Any, str]]

KORTHIKANTI = "Korthikanti et al. 2022 (arXiv:2205.05198)"
MLM = "Megatron-LM, megatron/training and megatron/core at that release"
TORCH_FSDP = "torch.distributed.fsdp documentation"

# Each entry: (parent, facts that differ from it). Sources follow the value.
ENGINES: dict[str, tuple[str | None, Facts]] = {
    "megatron-2020": (None, {
        "attention": ("unfused", "Shoeybi et al. 2019 (arXiv:1909.08053): softmax(QK/sqrt d)V as three steps"),
        "fusion": ("eager", "Megatron-LM v1: only layer norm (apex) was fused"),
        "overlap_dp": (False, "Megatron-LM v1: one all-reduce after the backward pass"),
        "overlap_tp": (False, "Shoeybi et al. 2019: all-reduces f and g are synchronous"),
        "overlap_p2p": (False, "Narayanan et al. 2021 (arXiv:2104.04473): synchronous send and receive"),
        "overlap_ep": (False, "no experts"),
        "optimizer_B": (44.0, "apex FusedAdam with fp16 parameters: reads and writes of master, moments, gradient, and unscaling"),
        "gradient_B": (2.0, "Megatron-LM v1: gradients are all-reduced in fp16"),
        "loss_passes": (10.0, "vocab_parallel_cross_entropy: max, subtract, exp, sum, divide, and their backward, in fp32"),
        "cast_B": (4.0, "no 8-bit path; TransformerEngine's fused cast if a run has one"),
        "recompute": ("full", "Narayanan et al. 2021, section 3.5: activation recomputation is the default of their runs"),
        "selective": ("attention", KORTHIKANTI),
        "stops_early": (False, "Megatron-LM's own CheckpointFunction is reentrant: it recomputes the whole layer"),
        "zero": ("none", "Megatron-LM v1 has no distributed optimizer"),
        "sequence_parallel": (False, "introduced by " + KORTHIKANTI),
        "broadcast_parameters": (False, "no sharding"),
        "grouped_experts": ("no", "no experts; later TransformerEngine's GroupedLinear, which launches a GEMM per expert on four streams"),
        "sends_once": (False, "Megatron Core: moe_token_dispatcher_type alltoall is the default"),
        "interleaves": (False, "--num-layers-per-virtual-pipeline-stage is off unless given"),
        "weight_B": (2.0, "fp16 parameters"),
        "gradient_store_B": (2.0, "fp16 gradients"),
        "state_B": (12.0, "Rajbhandari et al. 2020 (arXiv:1910.02054): fp32 master and two moments"),
        "dropout": (True, "Shoeybi et al. 2019: dropout 0.1"),
        "masks": (True, KORTHIKANTI + ", section 4.1; Megatron-LM arguments: --hidden-dropout 0.1 unless given"),
        "repeats_kv": (False, "keys and values stay as they are until the attention kernel"),
        "light": (False, "--recompute-granularity knows full and selective"),
        "loss_B": (10.0, "vocab_parallel_cross_entropy: 16-bit logits 2, their fp32 copy 4, its exponentials 4; backward works in place"),
        "loss_split_B": (10.0, "the same on each rank's part of the vocabulary"),
        "frees_gradients": (False, "gradients live in one contiguous buffer"),
        "bf16_gradient_B": (0.0, "the same buffer in both precisions"),
        "step_B": (0.0, "fused Adam (apex, TransformerEngine) works in place"),
        "bucket_B": (0.0, "collectives work on slices of the gradient buffer"),
        "expandable": (False, "off unless PYTORCH_CUDA_ALLOC_CONF says so"),
        "prints": ("allocated", "Megatron-LM report_memory, and papers built on it: max_memory_allocated"),
    }),
    "megatron-2021": ("megatron-2020", {
        "fusion": ("modules", "Narayanan et al. 2021, section 4.2: fused bias+GeLU, bias+dropout+add, scale+mask+softmax"),
    }),
    "megatron-deepspeed": ("megatron-2021", {
        "gradient_B": (4.0, "BigScience Megatron-DeepSpeed: all-reduce of 16-bit gradients, then all-gather under ZeRO-1; bf16 optimizer keeps fp32"),
        "zero": ("zero1", "BigScience Megatron-DeepSpeed train scripts: ZERO_STAGE=1 or 0"),
        "masks": (False, "BLOOM and GPT-NeoX train without dropout"),
        "bucket_B": (2e9, "DeepSpeed configuration: reduce_bucket_size and allgather_bucket_size, 5e8 elements each, 16 bits"),
        "bf16_gradient_B": (4.0, "DeepSpeed BF16_Optimizer: gradients accumulate in fp32, whole on every rank, beside the 16-bit ones"),
        "step_B": (4.0, "DeepSpeed stage_1_and_2: averaged 16-bit gradients become one flat fp32 partition in step(); divided as states are"),
        "dropout": (False, "BLOOM and GPT-NeoX train without dropout"),
    }),
    "megatron-2022": ("megatron-2021", {
        "recompute": ("selective", KORTHIKANTI + ": selective recompute is the recommended default"),
        "sequence_parallel": (True, KORTHIKANTI),
        "dropout": (False, "flag default in released large-model scripts"),
    }),
    "megatron-2023": ("megatron-2022", {
        "attention": ("fa2", "Megatron-LM v23.04: --use-flash-attn"),
        "optimizer_B": (40.0, MLM + ": fp32 main gradients, no unscaling pass in bf16"),
        "gradient_B": (4.0, MLM + ": --accumulate-allreduce-grads-in-fp32 is implied by bf16"),
        "loss_passes": (8.0, MLM + ": exp in place"),
        "recompute": ("none", "deduced: published memory per token is 34 bytes x hidden, nothing recomputed"),
        "gradient_store_B": (2.0, "deduced: 16 bytes per parameter in all"),
    }),
    "megatron-core": ("megatron-2023", {
        "attention": ("native", "TransformerEngine's attention picks cuDNN fused attention on Hopper and Blackwell"),
        "fusion": ("compiled", "TransformerEngine fuses norm+cast; Megatron Core jits bias+SwiGLU, RoPE, bias+dropout+add"),
        "overlap_dp": (True, "Megatron Core: overlap_grad_reduce, overlap_param_gather (performance guide)"),
        "overlap_tp": (True, "Megatron Core: tp_comm_overlap through TransformerEngine user buffers"),
        "overlap_p2p": (True, "Megatron Core: overlap_p2p_comm with interleaving"),
        "overlap_ep": (True, "Megatron Core: overlap_moe_expert_parallel_comm"),
        "optimizer_B": (34.0, "precision-aware fused Adam: bf16 gradient, fp32 master and moments"),
        "loss_passes": (5.0, "Megatron Core: cross_entropy_loss_fusion"),
        "zero": ("zero1", "Megatron Core performance recipes: use_distributed_optimizer"),
        "interleaves": (True, "Megatron Core performance guide: set virtual_pipeline_model_parallel_size to hide the bubble"),
        "masks": (False, "Megatron Core recipes: hidden_dropout 0"),
        "light": (True, "Megatron Core: recompute_modules layernorm, moe_act, mla_up_proj, mlp, moe, core_attn"),
        "gradient_store_B": (4.0, "Megatron Core: gradients accumulate in fp32"),
    }),
    "megatron-core-grouped": ("megatron-core", {
        "sends_once": (True, "Megatron Core: flex dispatcher (DeepEP, HybridEP) deduplicates copies of a token per rank"),
        "grouped_experts": (
            "blackwell",
            "Megatron Core 2026: grouped MXFP8 GEMM with fused SwiGLU and quantisation (cuDNN, CuTe DSL), Blackwell only; deduced: the "
            "container that carries it, from its published figures",
        ),
    }),
    "fsdp1": ("megatron-2021", {
        "attention": ("fa1", "LLM Foundry 2023: attn_impl triton or flash-attn 1"),
        "fusion": ("eager", "FSDP1 runs plain modules eagerly"),
        "overlap_dp": (True, TORCH_FSDP + ": forward and backward prefetch"),
        "optimizer_B": (40.0, "fused AdamW on fp32 shards, with a cast to 16 bits"),
        "gradient_B": (4.0, TORCH_FSDP + ": reduce_dtype fp32 in MixedPrecision of its large-model users"),
        "loss_passes": (10.0, "cross_entropy on logits.float(): cast 1.5, log_softmax 3, backward of loss and log_softmax 4, cast 1.5"),
        "cast_B": (6.0, "TransformerEngine modules without fused norms"),
        "recompute": ("none", "off unless configured"),
        "stops_early": (True, "torch.utils.checkpoint, use_reentrant=False: early stop"),
        "zero": ("zero3", TORCH_FSDP + ": FULL_SHARD is the default"),
        "masks": (False, "0 in the configurations of large models"),
        "repeats_kv": (True, "torchtitan, torchtune, llama and Hugging Face: repeat_kv before scaled_dot_product_attention"),
        "loss_B": (14.0, "F.cross_entropy on logits.float(): log-probabilities 4, gradients of nll_loss and log_softmax 4 each; 16-bit logits 2"),
        "loss_split_B": (16.0, "torch.distributed.tensor.parallel.loss: log-probabilities, one-hot gradient, exponentials and their sum, fp32"),
        "frees_gradients": (True, "torch.optim.Optimizer.zero_grad: set_to_none is the default"),
        "step_B": (4.0, "torch.optim.AdamW foreach: one list of fp32 temporaries as large as the local parameters"),
        "dropout": (False, "0 in the configurations of large models"),
    }),
    "composer": ("fsdp1", {
        "loss_B": (4.0, "LLM Foundry: loss_fn fused_crossentropy (flash-attn) works on 16-bit logits and writes their gradient in their place"),
        "step_B": (0.0, "LLM Foundry: decoupled_adamw and decoupled_lionw work parameter by parameter"),
    }),
    "composer-fa2": ("composer", {"attention": ("fa2", "flash-attn 2 and torch SDPA, released July and October 2023")}),
    "fsdp1-2022": ("fsdp1", {"attention": ("unfused", "before FlashAttention (2022; in PyTorch since March 2023) reached these trainers")}),
    "fsdp1-fa2": ("fsdp1", {"attention": ("fa2", "flash-attn 2 and torch SDPA, released July and October 2023")}),
    "fsdp2": ("fsdp1-fa2", {
        "overlap_p2p": (True, "torch.distributed.pipelining: batched sends on their own stream"),
        "optimizer_B": (30.0, "fused AdamW: fp32 parameter, gradient and moments, one pass"),
        "cast_B": (6.0, "torchao float8: dynamic scaling reads each tensor for its maximum, then reads and casts it in two layouts"),
        "recompute": ("selective", "torchtitan train configs: activation_checkpoint.mode = selective"),
        "selective": ("every second", "torchtitan: the op policy saves every second matmul"),
        "loss_B": (12.0, "as fsdp1, but torchtitan's train loop deletes the prediction before backward"),
        "expandable": (True, "torchtitan run_train.sh sets expandable_segments:True"),
        "prints": ("reserved", "torchtitan components/metrics.py: the log's memory is max_reserved_gib"),
        "sequence_parallel": (True, "torchtitan: SequenceParallel plan for norms and residual"),
    }),
    "fsdp2-te": ("fsdp2", {
        "attention": ("native", "TransformerEngine attention"),
        "fusion": ("modules", "TransformerEngine modules fuse norms and casts"),
        "recompute": ("none", "NeMo AutoModel benchmark configs: activation_checkpointing false"),
        "grouped_experts": ("yes", "NeMo AutoModel: grouped GEMM experts and DeepEP"),
        "expandable": (False, "its launcher leaves PYTORCH_CUDA_ALLOC_CONF alone"),
        "prints": ("allocated", "NeMo AutoModel: max_memory_allocated in its training log"),
        "sends_once": (True, "DeepEP (DeepSeek 2025)"),
    }),
    "torchtune": ("fsdp2", {
        "optimizer_B": (14.0, "torchtune recipes: parameters and AdamW states in bf16"),
        "gradient_B": (2.0, "torchtune recipes: bf16 throughout"),
        "recompute": ("none", "single-device recipes: enable_activation_checkpointing false unless set"),
        "zero": ("zero3", "torchtune distributed recipes: FSDP2"),
        "loss_B": (4.0, "torchtune recipes since 2024: CEWithChunkedOutputLoss, 16-bit logits and their gradient; fp32 in chunks only"),
        "expandable": (False, "its recipes leave PYTORCH_CUDA_ALLOC_CONF alone"),
        "prints": ("allocated", "torchtune.training.get_memory_stats: peak_memory_active and peak_memory_alloc"),
        "step_B": (2.0, "torch.optim.AdamW foreach on bf16 parameters; 0 with fused=True, its recipes' setting since 2025"),
        "state_B": (4.0, "two bf16 moments"),
        "sequence_parallel": (False, "no tensor parallelism by default"),
    }),
    "deepspeed": ("fsdp1-fa2", {
        "gradient_B": (2.0, "DeepSpeed ZeRO: gradients reduced in the training dtype"),
        "optimizer_B": (44.0, "DeepSpeed FusedAdam on fp32 partitions, with a cast"),
        "stops_early": (False, "Hugging Face gradient checkpointing was reentrant by default"),
        "loss_B": (16.0, "Hugging Face: the fp32 logits stay in the model's output 4, log-probabilities 4, two gradients 8"),
        "frees_gradients": (False, "DeepSpeed ZeRO: partitioned gradients stay until the step"),
        "bucket_B": (2e9, "DeepSpeed configuration: reduce_bucket_size and allgather_bucket_size, 5e8 elements each, 16 bits"),
        "step_B": (4.0, "DeepSpeed ZeRO: the fp32 copy of a rank's gradients in step()"),
        "fusion": ("eager", "Hugging Face modules, eager"),
    }),
    "deepspeed-2022": ("deepspeed", {
        "attention": ("unfused", "Hugging Face attention of that time; DeepSpeed's own kernels are not flash either"),
        "fusion": ("modules", "DeepSpeed's fused transformer kernels, or Megatron's"),
    }),
    "gemini": ("deepspeed", {
        "recompute": ("full", "ColossalAI's Llama benchmark turns gradient checkpointing on"),
    }),
    "internevo": ("megatron-2023", {
        "overlap_dp": (True, "InternEvo: overlap_sync_grad, overlap_sync_param"),
        "optimizer_B": (44.0, "hybrid ZeRO optimizer with unscaling and norm passes"),
        "gradient_B": (2.0, "InternEvo: 16-bit gradient buckets"),
        "zero": ("zero1", "InternEvo configs: zero1"),
        "sequence_parallel": (False, "off in the published configs"),
        "broadcast_parameters": (True, "InternEvo HybridZeroOptimizer: each rank broadcasts its partition of whole tensors"),
        "masks": (False, "its Llama-like models have no dropout"),
        "bucket_B": (1.07e9, "InternEvo configs: reduce_bucket_size 512 MiB, two buckets"),
        "step_B": (8.0, "InternEvo HybridZeroOptimizer.step: flat 16-bit gradients to fp32 (4 more), and flattened copies of the partition (4)"),
    }),
    "nanotron": ("megatron-2023", {
        "fusion": ("eager", "nanotron: plain modules, flash-attn and fused norm"),
        "overlap_dp": (True, "nanotron: gradient buckets reduced by hooks"),
        "zero": ("zero1", "nanotron: ZeRO-1 in its configurations"),
        "gradient_store_B": (4.0, "nanotron: accumulate_grad_in_fp32"),
        "loss_passes": (10.0, "sharded cross-entropy, unfused"),
        "masks": (False, "its Llama models have no dropout"),
    }),
    "xla": ("megatron-core", {
        "attention": ("fa2", "XLA calls cuDNN flash attention, or Pallas kernels"),
        "overlap_tp": (False, "latency-hiding scheduler without collective matmul by default"),
        "loss_passes": (6.0, "XLA fuses the softmax"),
        "loss_B": (8.0, "XLA fuses the softmax: logits in fp32 and their gradient"),
        "loss_split_B": (8.0, "the same"),
        "recompute": ("full", "remat of whole layers is the default policy of MaxText and its kin"),
        "zero": ("zero3", "GSPMD: parameters sharded over the fsdp axis"),
        "grouped_experts": ("yes", "MaxText: megablox grouped matmul"),
        "gradient_B": (2.0, "gradients in the compute dtype"),
    }),
}  # fmt: skip

# (pattern in software, [(first year of release, engine), ...] in ascending order). The first pattern that matches holds.
FAMILIES: tuple[tuple[str, tuple[tuple[float, str], ...]], ...] = (
    (r"automodel", ((0, "fsdp2-te"),)),
    (r"megatron.?core|mcore|megatron.?bridge|nemo|transformer.?engine", ((0, "megatron-core"), (2026.4, "megatron-core-grouped"))),
    (r"megatron.?deepspeed|neox", ((0, "megatron-deepspeed"), (2023.5, "megatron-2023"))),
    (r"megatron.?llama", ((0, "internevo"),)),
    (
        r"megatron|megascale|zero.?bubble|fairscale.*tp",
        ((0, "megatron-2020"), (2021, "megatron-2021"), (2022, "megatron-2022"), (2023, "megatron-2023"), (2024.3, "megatron-core"),
         (2026.4, "megatron-core-grouped")),
    ),
    (r"torchtitan|titan", ((0, "fsdp2"),)),
    (r"torchtune", ((0, "torchtune"),)),
    (r"gemini|colossal", ((0, "gemini"),)),
    (r"intern.?(?:evo|lm|train)|xtuner", ((0, "internevo"),)),
    (r"nanotron|picotron|ultrascale", ((0, "nanotron"),)),
    (r"jax|xla|maxtext|alpa|levanter|paxml|praxis|easylm|t5x", ((0, "xla"),)),
    (r"fsdp.?2|fully_shard", ((0, "fsdp2"),)),
    (r"composer|foundry|mosaic", ((0, "composer"), (2024, "composer-fa2"))),
    (
        r"fsdp|metaseq|olmo|litgpt|lightning|fairscale|accelerate|fms|axolotl|unsloth|trl|llama.?recipes|llama.?cookbook",
        ((0, "fsdp1-2022"), (2022.9, "fsdp1"), (2023.6, "fsdp1-fa2"), (2025, "fsdp2")),
    ),
    (r"deepspeed|zero|ulysses|hugging|transformers|\bhf\b|peft", ((0, "deepspeed-2022"), (2023.2, "deepspeed"))),
)  # fmt: skip
# An engine that no pattern finds: like the common one of its year, by whether the run splits models or only data.
UNKNOWN_MODEL_PARALLEL = ((0, "megatron-2020"), (2021, "megatron-2021"), (2022, "megatron-2022"), (2023, "megatron-2023"), (2024.5, "megatron-core"))
UNKNOWN_DATA_PARALLEL = ((0, "deepspeed-2022"), (2022, "fsdp1-2022"), (2022.9, "fsdp1"), (2023.6, "fsdp1-fa2"), (2024.5, "fsdp2"))

# (pattern in software and notes, facts that it states).
OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"unfused.?attention|no.?flash|without flash|eager attention|math attention", {"attention": "unfused"}),
    (r"flash.?attention.?3|\bfa-?3\b|cudnn.?attention", {"attention": "native"}),
    (r"flash.?attention.?2|\bfa-?2\b|sdpa", {"attention": "fa2"}),
    (r"\beager\b", {"fusion": "eager"}),
    (r"(?<!no )(?<!without )\bcompiled?\b", {"fusion": "compiled"}),
    (r"async.?tp|asynctp|collective matmul|tp.?comm.?overlap|userbuffer", {"overlap_tp": True}),
    (r"chunked.?(ce|cross)|fused.?(linear.?)?cross|liger|cut.?cross", {"loss_passes": 4.0}),
    (r"chunked.?(ce|cross)|fused.?(linear.?)?cross|liger|cut.?cross", {"loss_passes": 4.0, "loss_B": 4.0, "loss_split_B": 4.0}),
    # the logits are never whole: only a chunk of them and the gradient of the hidden states
    (r"fused.?linear.?cross|liger|cut.?cross", {"loss_B": 0.5, "loss_split_B": 0.5}),
    # litgpt: the head runs in chunks (lm_head_chunk_size) and chunked_cross_entropy keeps 16-bit log-probabilities beside the logits
    (r"lit-?gpt", {"loss_B": 6.0}),
    (r"optimi[sz]er.?in.?(bwd|backward)", {"gradient_store_B": 0.0, "step_B": 0.0}),
    # torchao float8, rowwise: an absolute maximum and a cast along rows, and again along columns, each its own strided pass
    (r"(?:float|fp)8[ -]row.?wise", {"cast_B": 24.0}),
    (r"deep.?ep|hybrid.?ep|hai.?llm", {"sends_once": True}),
    (r"grouped.?gemm|megablocks", {"grouped_experts": "yes"}),
)  # fmt: skip


def build(name: str) -> Engine:
    """The engine of one entry of the table, with what it inherits."""
    facts: dict[str, Any] = {}
    chain = [name]
    while (parent := ENGINES[chain[-1]][0]) is not None:
        chain.append(parent)
    for entry in reversed(chain):
        facts |= {key: value for key, (value, _) in ENGINES[entry][1].items()}
    return Engine(name=name, **facts)


def sources(name: str) -> dict[str, str]:
    """Where each fact of an engine comes from."""
    found: dict[str, str] = {}
    entry: str | None = name
    while entry is not None:
        parent, facts = ENGINES[entry]
        found = {key: source for key, (_, source) in facts.items()} | found
        entry = parent
    return {f.name: found[f.name] for f in fields(Engine) if f.name in found}


def release_year(release: str, software: str = "", year: float | None = None) -> float | None:
    """A release as a decimal year: "25.11" (a monthly container) is 2025.83, "2023" is its middle,
    2023.5. The software's name comes first, then the release, then `year`."""
    for text in (software, release):
        for match in re.finditer(r"(?<![\d.])(?:(20[12]\d)(?:[.\-/](\d{1,2}))?|(\d\d)\.(\d\d))(?!\d)", text):
            whole, month = (match[1], match[2]) if match[1] else ("20" + match[3], match[4])
            if 2018 <= int(whole) <= 2035 and (month is None or 1 <= int(month) <= 12):
                return int(whole) + ((int(month) - 1) / 12 if month else 0.5)
    return None if year is None else year + 0.5


def _since(table: Sequence[tuple[float, str]], when: float | None) -> str:
    date = 2023.5 if when is None else when
    return [name for first, name in table if first <= date][-1] if date >= table[0][0] else table[0][1]


def resolve(software: str = "", release: str = "", year: float | None = None, notes: str = "", model_parallel: bool = True) -> tuple[Engine, bool]:
    """The engine of a run, and whether the software was recognised. `model_parallel`: the run splits tensors or layers."""
    name, when = software.lower().replace("_", "-"), release_year(release, software, year)
    for pattern, table in FAMILIES:
        if re.search(pattern, name):
            entry, known = _since(table, when), True
            break
    else:
        entry, known = _since(UNKNOWN_MODEL_PARALLEL if model_parallel else UNKNOWN_DATA_PARALLEL, when), False
    engine = build(entry)
    stated = f"{name} ; {notes.lower()}"
    for pattern, facts in OPTIONS:
        if facts and re.search(pattern, stated):
            engine = replace(engine, **facts)
    return engine, known
