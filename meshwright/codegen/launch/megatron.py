"""Megatron-LM: the arguments of pretrain_gpt.py.

Options are those of Megatron-LM core_r0.15, megatron/training/arguments.py, where their checks are too.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from meshwright.codegen.launch.decoder import Decoder, decoder
from meshwright.codegen.launch.engine import Engine, chunks, covered, lost_everywhere
from meshwright.codegen.launch.torchrun import ALLOCATOR, start_script
from meshwright.planner.plan import Plan
from meshwright.profiling.errors import InputError

RELEASE = "Megatron-LM core_r0.15"
FAMILIES = ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe", "deepseek_v3", "gpt2")
SHARDED = {2: "optim_grads", 3: "optim_grads_params"}  # Megatron FSDP
LOOPS = {"interleaved": "interleaved 1F1B", "zbv": "interleaved 1F1B", "dualpipev": "interleaved 1F1B"}

Arguments = list[tuple[str, ...]]  # an option and its values


def configure(plan: Plan) -> Engine:
    """arguments.sh and run.sh. InputError where pretrain_gpt.py builds no such model or cannot run the layout."""
    model = decoder(plan, RELEASE, FAMILIES)
    _check(plan, model)
    program = '"$MEGATRON_LM/pretrain_gpt.py" "${MODEL[@]}" "${LAYOUT[@]}" "${TRAINING[@]}" "${DATA[@]}" "$@"'
    x = plan.layout
    lines = [
        *ALLOCATOR, ': "${MEGATRON_LM:?set it to the folder of Megatron-LM}"', 'export PYTHONPATH="$MEGATRON_LM${PYTHONPATH:+:$PYTHONPATH}"',
        'source "$here/arguments.sh"',
    ]  # fmt: skip
    if x.tp * x.cp > 1 and x.zero < 2:
        lines.append("export CUDA_DEVICE_MAX_CONNECTIONS=1  # Megatron-LM orders communication and compute by it")
    run = start_script(plan, "run.sh", "pretrain_gpt.py", program, "MEGATRON_LM=~/Megatron-LM bash run.sh --train-iters 20", tuple(lines))
    parts = {"MODEL": _model(plan, model), "LAYOUT": _layout(plan, model), "TRAINING": _training(plan), "DATA": _data(model)}
    files = {"arguments.sh": _bash(parts), "run.sh": run}
    return Engine("megatron", RELEASE, files, "MEGATRON_LM=~/Megatron-LM bash run.sh", tuple(_lost(plan, model)))


def _model(plan: Plan, m: Decoder) -> Arguments:
    out: Arguments = [
        ("--num-layers", str(m.layers)), ("--hidden-size", str(m.hidden)), ("--ffn-hidden-size", str(m.inner)),
        ("--num-attention-heads", str(m.heads)), ("--seq-length", str(plan.workload.seq)),
        ("--max-position-embeddings", str(max(m.positions, plan.workload.seq))), ("--norm-epsilon", f"{m.norm_eps:g}"),
        ("--attention-dropout", f"{m.dropout[0]:g}"), ("--hidden-dropout", f"{m.dropout[1]:g}"), ("--make-vocab-size-divisible-by", "1"),
    ]  # fmt: skip
    if m.family == "gpt2":
        out += [("--position-embedding-type", "learned_absolute"), ("--normalization", "LayerNorm")]
    else:
        out += [("--position-embedding-type", "rope"), ("--rotary-base", str(int(m.rope.get("rope_theta", 10000))))]
        out += [("--normalization", "RMSNorm"), ("--swiglu",), ("--disable-bias-linear",)]
        out += [("--use-rope-scaling",), ("--rope-scaling-factor", f"{m.rope['factor']:g}")] if m.rope.get("rope_type") == "llama3" else []
    out += [] if m.tied else [("--untie-embeddings-and-output-weights",)]
    out += [("--add-qkv-bias",)] if m.qkv_bias and m.family != "gpt2" else []
    out += [("--qk-layernorm",)] if m.family.startswith("qwen3") else []
    return [*out, *(_latent(m) if m.latent else _heads(m)), *_experts(plan, m)]


def _heads(m: Decoder) -> Arguments:
    grouped: Arguments = [("--group-query-attention",), ("--num-query-groups", str(m.kv_heads))] if m.kv_heads != m.heads else []
    return [("--kv-channels", str(m.head_dim)), *grouped]


def _latent(m: Decoder) -> Arguments:
    assert m.latent is not None
    a, r = m.latent, m.rope
    out: Arguments = [("--multi-latent-attention",), ("--qk-layernorm",), ("--kv-lora-rank", str(a.kv_rank))]
    out += [("--q-lora-rank", str(a.q_rank))] if a.q_rank else []
    out += [("--qk-head-dim", str(a.nope_dim)), ("--qk-pos-emb-head-dim", str(a.rope_dim)), ("--v-head-dim", str(a.v_dim))]
    if r.get("rope_type") == "yarn":
        return [
            *out, ("--rope-type", "yarn"), ("--rotary-scaling-factor", f"{r['factor']:g}"), ("--mscale", f"{r['mscale']:g}"),
            ("--mscale-all-dim", f"{r['mscale_all_dim']:g}"),
        ]  # fmt: skip
    return [*out, ("--rope-type", "rope")]


def _experts(plan: Plan, m: Decoder) -> Arguments:
    e = m.experts
    if e is None:
        return []
    pattern = "+".join(f"[{int(has)}]*{len(list(run))}" for has, run in groupby(e.layers))
    out: Arguments = [
        ("--num-experts", str(e.count)), ("--moe-router-topk", str(e.top_k)), ("--moe-ffn-hidden-size", str(e.inner)),
        ("--moe-layer-freq", f"({pattern})"), ("--moe-router-load-balancing-type", "none"), ("--moe-token-dispatcher-type", "alltoall"),
        ("--moe-permute-fusion",), ("--moe-router-dtype", "fp32"),
    ]  # fmt: skip
    out += [("--moe-grouped-gemm",)] if plan.workload.precision == "bf16" else []
    out += [("--moe-shared-expert-intermediate-size", str(e.shared))] if e.shared else []
    out += [] if e.normalised else [("--moe-router-pre-softmax",)]  # weights as the softmax over all experts has them
    if e.sigmoid:
        out += [("--moe-router-score-function", "sigmoid"), ("--moe-router-enable-expert-bias",)]
        out += [("--moe-router-pre-softmax",), ("--moe-router-topk-scaling-factor", f"{e.scale:g}")]
    if e.groups:
        out += [("--moe-router-num-groups", str(e.groups)), ("--moe-router-group-topk", str(e.top_groups))]
    return out


def _layout(plan: Plan, m: Decoder) -> Arguments:
    x = plan.layout
    out: Arguments = [("--tensor-model-parallel-size", str(x.tp))]
    out += [("--sequence-parallel",)] if x.sp else []
    out += [("--pipeline-model-parallel-size", str(x.pp))]
    out += _stages(plan) if x.pp > 1 else []
    out += [("--context-parallel-size", str(x.cp))]
    out += [("--cp-comm-type", "a2a" if x.cp_kind == "ulysses" else "p2p")] if x.cp > 1 else []
    if m.experts:
        out += [("--expert-model-parallel-size", str(x.ep)), ("--expert-tensor-parallel-size", str(x.etp))]
    return [*out, *_data_parallel(plan), *_recompute(plan, m)]


def _stages(plan: Plan) -> Arguments:
    """Equal stages by their number, others as a layout of their own: E the embedding, t a layer, L the loss, | between stages."""
    x, spans = plan.layout, chunks(plan)
    sizes = [b - a for a, b in spans]
    if len(set(sizes)) == 1:
        return [("--num-layers-per-virtual-pipeline-stage", str(sizes[0]))] if x.vpp > 1 else []
    parts = [f"t*{n}" if n > 1 else "t" for n in sizes]
    return [("--pipeline-model-parallel-layout", "E" + "|".join(parts) + "L")]


def _distributed_optimizer(plan: Plan) -> bool:
    """Moments in bf16 and on the host are parts of the distributed optimizer."""
    x = plan.layout
    return x.zero > 0 or x.state_dtype != "fp32" or x.offload != "none"


def _data_parallel(plan: Plan) -> Arguments:
    x = plan.layout
    out: Arguments = [("--overlap-grad-reduce",)] if x.dp * x.cp > 1 else []
    if _distributed_optimizer(plan):
        out += [("--use-distributed-optimizer",)] + ([("--overlap-param-gather",)] if x.dp * x.cp > 1 else [])
    if x.zero in SHARDED:
        out += [("--use-megatron-fsdp",), ("--data-parallel-sharding-strategy", SHARDED[x.zero]), ("--no-gradient-accumulation-fusion",)]
        out += [("--ckpt-format", "fsdp_dtensor"), ("--init-model-with-meta-device",)]
    out += [("--num-distributed-optimizer-instances", str(x.replicas))] if x.replicas > 1 else []
    out += [("--use-precision-aware-optimizer",)] if x.state_dtype != "fp32" or x.offload != "none" else []
    out += [("--exp-avg-dtype", "bf16"), ("--exp-avg-sq-dtype", "bf16")] if x.state_dtype == "bf16" else []
    return out + ([("--optimizer-cpu-offload",), ("--optimizer-offload-fraction", "1.0")] if x.offload == "optimizer" else [])


def _recompute(plan: Plan, m: Decoder) -> Arguments:
    stages = covered(plan)
    modes = {mode for mode, n in stages if n}
    if "full" in modes:
        most = max(n for mode, n in stages if mode == "full")
        if plan.layout.recompute == "full":
            return [("--recompute-granularity", "full"), ("--recompute-method", "uniform"), ("--recompute-num-layers", "1")]
        return [("--recompute-granularity", "full"), ("--recompute-method", "block"), ("--recompute-num-layers", str(most))]
    if "selective" in modes:
        kept = ["layernorm", *(["moe_act"] if m.experts else []), *(["mla_up_proj"] if m.latent else [])]
        return [("--recompute-granularity", "selective"), ("--recompute-modules", *kept)]
    return []


def _training(plan: Plan) -> Arguments:
    w = plan.workload
    out: Arguments = [
        ("--micro-batch-size", str(plan.layout.micro_batch)), ("--global-batch-size", str(w.global_batch)), ("--train-iters", "20"),
        ("--lr", "1e-3"), ("--lr-decay-style", "constant"), ("--log-interval", "1"), ("--eval-iters", "0"),
    ]  # fmt: skip
    out += [("--bf16",)] if w.precision == "bf16" else []
    if w.optimizer == "adamw":
        return [*out, ("--optimizer", "adam"), ("--weight-decay", "0.01")]
    return [*out, ("--optimizer", "sgd"), ("--sgd-momentum", "0.9" if w.optimizer == "sgd-momentum" else "0.0"), ("--weight-decay", "0.0")]


def _data(m: Decoder) -> Arguments:
    """Made-up tokens; this tokenizer adds one of its own to the vocabulary."""
    return [("--mock-data",), ("--tokenizer-type", "NullTokenizer"), ("--vocab-size", str(m.vocab - 1))]


def _bash(parts: dict[str, Arguments]) -> str:
    lines = [f"# {RELEASE}: arguments of pretrain_gpt.py. DATA is made up: put your own --data-path and tokenizer there."]
    for name, arguments in parts.items():
        lines += ["", f"{name}=(", *("  " + " ".join(_quoted(word) for word in words) for words in arguments), ")"]
    return "\n".join(lines) + "\n"


def _quoted(word: str) -> str:
    return f"'{word}'" if set(word) & set("()*|[]") else word


def _check(plan: Plan, m: Decoder) -> None:
    x = plan.layout
    sizes = {b - a for a, b in chunks(plan)}
    refusals = (
        (x.vpp > 1 and plan.microbatches % x.pp != 0,
         f"interleaves stages where pp divides the microbatches, and {plan.microbatches} are not divisible by {x.pp}"),
        (m.experts is not None and x.tp > 1 and not x.sp, "needs sequence parallelism where experts run beside tp: plan with --fix sp=on"),
        (m.kv_heads % x.tp != 0 and x.tp % m.kv_heads != 0, f"cannot lay {m.kv_heads} key-value heads over tp={x.tp}"),
        (x.cp > 1 and plan.workload.seq % (2 * x.cp) != 0, f"needs a sequence that 2 cp divides, and {plan.workload.seq} is not divisible"),
        (m.rope.get("rope_type", "default") not in ({"default", "yarn"} if m.latent else {"default", "llama3"}),
         f"has no {m.rope.get('rope_type')} rotary embedding in pretrain_gpt.py for this model"),
        (0 in sizes and x.pp > 1, "needs a layer in every stage"),
    )  # fmt: skip
    for wrong, why in refusals:
        if wrong:
            raise InputError(f"{RELEASE} {why}")


def _lost(plan: Plan, m: Decoder) -> Iterator[str]:
    x = plan.layout
    yield "kernels: Megatron-LM runs the fused kernels of Transformer Engine, so its step and memory are not those that were predicted"
    yield from lost_everywhere(plan, "Megatron-LM")
    if x.schedule not in ("1f1b", "interleaved"):
        yield f"schedule={x.schedule}: Megatron-LM has 1F1B and interleaved 1F1B, here {LOOPS.get(x.schedule, '1F1B')}"
    if x.tp > 1 and plan.solution.loss != "vocab_parallel":
        yield f"loss={x.loss}: Megatron-LM's loss is vocabulary-parallel beside tp, and holds less than predicted"
    elif x.loss == "chunked":
        yield "loss=chunked: Megatron-LM computes the loss of all logits at once, which needs more memory than predicted"
    if m.vocab % x.tp:
        yield f"vocabulary: Megatron-LM pads {m.vocab:,} tokens to a multiple of tp={x.tp}"
    if x.zero == 0 and x.dp * x.cp > 1 and _distributed_optimizer(plan):
        yield "zero=0: moments on the host or in bf16 are parts of Megatron-LM's distributed optimizer, which shards them (ZeRO 1)"
    if x.zero == 1 and x.replicas == 1 and x.pp == 1 and plan.microbatches > 1:
        yield "gradients: Megatron-LM keeps one fp32 buffer of them all, where the plan counts what autograd holds"
    if x.zero >= 2 and x.pp > 1:
        yield f"zero={x.zero}: Megatron FSDP's documentation names tp, ep and cp beside it, and not pipelines: try it before you count on it"
    yield from _lost_recompute(plan)
    if plan.workload.optimizer == "sgd":
        yield "optimizer: Megatron-LM keeps a momentum buffer for SGD even where momentum is 0"


def _lost_recompute(plan: Plan) -> Iterator[str]:
    x, stages = plan.layout, covered(plan)
    modes = {mode for mode, n in stages if n}
    if "selective" in modes and "full" not in modes:
        yield f"recompute={x.recompute}: Megatron-LM recomputes norms and experts' activations; the plan all but products and attention"
    if x.recompute == "by stage" and (len(set(stages)) > 1 or x.vpp > 1):
        yield "recompute=by stage: Megatron-LM recomputes alike in every stage, here as the one that recomputes most"
