"""torchtitan: train.toml, and the planned model as a flavor of one of torchtitan's own.

Options are those of torchtitan 0.2.2, torchtitan/config/job_config.py: the last release that reads TOML (0.3 has configurations in Python).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from meshwright.codegen.launch.decoder import Decoder, decoder
from meshwright.codegen.launch.engine import Engine, chunks, lost_everywhere
from meshwright.codegen.launch.torchrun import ALLOCATOR, start_script
from meshwright.planner.plan import Plan
from meshwright.profiling.errors import InputError

RELEASE = "torchtitan 0.2.2"
MODELS = {"llama": "llama3", "qwen3": "qwen3", "qwen3_moe": "qwen3", "deepseek_v3": "deepseek_v3"}
PIPED = ("llama", "deepseek_v3")  # the others' TrainSpec has no pipelining_fn
SCHEDULES = {
    "1f1b": "1F1B", "gpipe": "GPipe", "interleaved": "Interleaved1F1B", "zero-bubble": "InterleavedZeroBubble", "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}  # fmt: skip
RESHARD = {1: "never", 2: "never", 3: "always"}

Section = dict[str, Any]


def configure(plan: Plan) -> Engine:
    """train.toml, planned.py and run.sh. InputError where torchtitan has no such model or cannot run the layout."""
    model = decoder(plan, RELEASE, tuple(MODELS))
    _check(plan, model)
    program = '-m torchtitan.train --job.config_file "$here/train.toml" "$@"'
    lines = (*ALLOCATOR, 'export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"  # planned.py is imported')
    run = start_script(plan, "run.sh", "torchtitan", program, "bash run.sh --model.hf_assets_path TOKENIZER_FOLDER --training.steps 20", lines)
    files = {"train.toml": toml(sections(plan, model)), "planned.py": flavor(model), "run.sh": run}
    return Engine("torchtitan", RELEASE, files, "bash run.sh --model.hf_assets_path TOKENIZER_FOLDER", tuple(_lost(plan, model)))


def sections(plan: Plan, model: Decoder) -> dict[str, Section]:
    """The sections of train.toml."""
    x, w = plan.layout, plan.workload
    bf16 = w.precision == "bf16"
    recompute = _recompute(plan)
    return {
        "job": {"description": f"{plan.model.name}: {x}", "dump_folder": "./outputs"},
        "experimental": {"custom_import": "planned"},
        "model": {"name": MODELS[model.family], "flavor": "planned"},
        "optimizer": {"name": "AdamW", "lr": 1e-3},
        "training": {
            "local_batch_size": w.global_batch // x.dp if x.pp > 1 else x.micro_batch, "global_batch_size": w.global_batch, "seq_len": w.seq,
            "steps": 20, "dataset": "c4", "mixed_precision_param": "bfloat16" if bf16 else "float32", "mixed_precision_reduce": "float32",
            "enable_cpu_offload": x.offload == "optimizer",
        },
        "parallelism": {
            "data_parallel_replicate_degree": x.replicate, "data_parallel_shard_degree": x.shard,
            "fsdp_reshard_after_forward": RESHARD.get(x.zero, "never"), "tensor_parallel_degree": x.tp,
            "disable_loss_parallel": plan.solution.loss != "vocab_parallel", "context_parallel_degree": x.cp,
            "context_parallel_rotate_method": "alltoall", "expert_parallel_degree": x.ep, "expert_tensor_parallel_degree": x.etp,
            **(_pipeline(plan) if x.pp > 1 else {"pipeline_parallel_degree": 1}),
        },
        "activation_checkpoint": {"mode": recompute, **({"selective_ac_option": "op"} if recompute == "selective" else {})},
        "compile": {"enable": False},
        "checkpoint": {"enable": False},
        "metrics": {"log_freq": 1},
    }  # fmt: skip


def _pipeline(plan: Plan) -> Section:
    x, parts = plan.layout, [[f"layers.{i}" for i in range(a, b)] for a, b in chunks(plan)]
    parts[0].insert(0, "tok_embeddings")
    parts[-1] += ["norm", "output"]
    return {
        "pipeline_parallel_degree": x.pp, "pipeline_parallel_schedule": SCHEDULES[x.schedule],
        "pipeline_parallel_microbatch_size": x.micro_batch, "module_fqns_per_model_part": parts,
    }  # fmt: skip


def _recompute(plan: Plan) -> str:
    """One mode for every layer: of several, the one that holds least."""
    modes = {s.recompute for s in plan.solution.stages}
    return next(m for m in ("full", "selective", "none") if m in modes)


def _check(plan: Plan, m: Decoder) -> None:
    x = plan.layout
    refusals = (
        (plan.workload.optimizer != "adamw", f"has Adam and AdamW alone, and the plan trains with {plan.workload.optimizer}"),
        (x.pp > 1 and m.family not in PIPED, f"does not pipeline {MODELS[m.family]}: plan with --fix pp=1"),
        (x.zero == 0 and x.dp > 1 and x.cp == 1 and x.tp * x.pp > 1,
         f"replicates data-parallel ranks only where nothing else is parallel, and the plan has zero=0 with dp={x.dp}: plan with --fix zero=1"),
        (x.ep > 1 and x.etp not in (1, x.tp), f"runs experts with etp 1 or tp, not etp={x.etp} beside tp={x.tp}"),
        (x.ep == 1 and x.etp not in (1, x.tp), f"splits experts over tp={x.tp} ranks where ep is 1, not over etp={x.etp}"),
        ((x.shard * x.cp * x.tp) % (x.ep * x.etp) != 0,
         f"lays experts over the ranks that shard one copy, shard {x.shard} x cp {x.cp} x tp {x.tp}: ep={x.ep} does not divide them"),
        (m.kv_heads % x.tp != 0, f"does not replicate {m.kv_heads} key-value heads over tp={x.tp}"),
        (plan.workload.seq % (x.tp * (2 * x.cp if x.cp > 1 else 1)) != 0,
         f"needs a sequence that tp x 2 cp divides, and {plan.workload.seq} is not divisible"),
        (m.qkv_bias, "has no bias in its attention"),
        (m.family in ("llama", "deepseek_v3") and m.tied, f"does not tie embeddings in {MODELS[m.family]}"),
        (m.family == "llama" and m.head_dim * m.heads != m.hidden, f"has heads of hidden / heads in llama3, not of {m.head_dim}"),
        (m.family == "qwen3_moe" and m.experts is not None and not all(m.experts.layers), "has experts in every layer of qwen3"),
        (m.rope.get("rope_type", "default") not in {"llama": ("default", "llama3"), "deepseek_v3": ("default", "yarn")}.get(m.family, ("default",)),
         f"has no {m.rope.get('rope_type')} rotary embedding in {MODELS[m.family]}"),
        (x.offload != "none" and x.shard * x.cp == 1, "moves state to the host through FSDP alone: plan with zero 1 to 3"),
    )  # fmt: skip
    for wrong, why in refusals:
        if wrong:
            raise InputError(f"{RELEASE} {why}")


def _lost(plan: Plan, m: Decoder) -> Iterator[str]:
    x, many = plan.layout, plan.microbatches > 1
    yield from lost_everywhere(plan, "torchtitan")
    fsdp = x.shard * x.cp > 1
    if plan.workload.precision == "bf16" and not fsdp and x.tp * x.pp > 1:
        yield "precision: torchtitan computes in bf16 through FSDP; without it, beside tp or pp, in fp32, slower and larger than predicted"
    if x.tp > 1 and not x.sp:
        yield "sp=False: torchtitan's tensor parallelism is always with sequence parallelism, so it holds less than predicted"
    if x.cp > 1 and x.cp_kind == "ulysses":
        yield "cp_kind=ulysses: torchtitan has ring attention alone, and keys and values go round instead of heads changing places"
    if x.zero == 0 and x.cp > 1:
        yield f"zero=0: torchtitan shards parameters and state over cp={x.cp}"
    if x.zero == 1 and many and x.pp == 1:
        yield "zero=1: torchtitan reduces gradients after every microbatch, as ZeRO 2 does"
    if x.zero == 1 and x.pp > 1:
        yield "zero=1: torchtitan shards parameters too, and gathers them at the start of a step"
    if x.zero == 2 and many and x.pp == 1:
        yield "zero=2: torchtitan gathers parameters again for every microbatch"
    if x.zero >= 2 and x.pp > 1:
        yield f"zero={x.zero}: in a pipeline torchtitan keeps whole gradients until the last microbatch, which needs more memory than predicted"
    if x.ep == 1 and x.etp == 1 and x.tp > 1 and m.experts:
        yield f"etp=1: without expert parallelism torchtitan splits experts over tp={x.tp}"
    if x.loss == "chunked":
        yield "loss=chunked: torchtitan computes the loss of all logits at once, which needs more memory than predicted"
    if x.recompute == "by stage":
        yield f"recompute=by stage: torchtitan has one mode for every layer, here {_recompute(plan)}"
    if _recompute(plan) == "selective":
        note = "selective recompute of torchtitan keeps every second product, the plan keeps all: it holds less and computes more"
        yield f"recompute={x.recompute}: {note}"
    if x.state_dtype != "fp32":
        yield f"state_dtype={x.state_dtype}: torchtitan keeps the moments in the dtype of the parameters, fp32"
    if x.offload != "none":
        yield "offload=optimizer: torchtitan moves parameters and gradients to the host too, which is slower than predicted"
    yield "gradients: torchtitan clips them to a norm of 1.0 (training.max_norm)"


def flavor(m: Decoder) -> str:
    """planned.py: adds the model to torchtitan's flavors."""
    args: dict[str, Any] = {
        "dim": m.hidden, "n_layers": m.layers, "n_heads": m.heads, "vocab_size": m.vocab, "norm_eps": m.norm_eps,
        "rope_theta": float(m.rope.get("rope_theta", 10000.0)), "max_seq_len": m.positions,
    }  # fmt: skip
    e = m.experts
    if e is not None:
        routing = {
            "num_experts": e.count, "num_shared_experts": e.shared // e.inner, "top_k": e.top_k, "score_func": "sigmoid" if e.sigmoid else "softmax",
            "route_norm": e.normalised, "route_scale": e.scale, "score_before_experts": False,
            **({"num_expert_groups": e.groups, "num_limited_groups": e.top_groups} if e.groups else {}),
        }  # fmt: skip
        args |= {"moe_inter_dim": e.inner, "moe_args": _Call("MoEArgs", routing)}
    if m.family == "llama":
        # torchtitan rounds its own inner size up to a multiple: of the right one, from just below it
        scale: dict[str, Any] = {"scaling_factor": float(m.rope.get("factor", 1.0))}
        scale |= {k: float(m.rope[k]) for k in ("low_freq_factor", "high_freq_factor") if k in m.rope}
        scale |= {"original_max_position_embeddings": m.rope["original_max_position_embeddings"]} if "factor" in m.rope else {}
        args |= {"n_kv_heads": m.kv_heads, "multiple_of": m.inner, "ffn_dim_multiplier": m.inner / int(8 * m.hidden / 3) * 0.99}
        args |= {"rope_scaling_args": _Call("RoPEScalingArgs", scale)}
    elif m.latent is not None and e is not None:
        l, r = m.latent, m.rope  # noqa: E741
        args |= {"inter_dim": m.inner, "n_dense_layers": e.layers.index(True), "q_lora_rank": l.q_rank, "kv_lora_rank": l.kv_rank}
        args |= {"qk_nope_head_dim": l.nope_dim, "qk_rope_head_dim": l.rope_dim, "v_head_dim": l.v_dim}
        args |= {"original_seq_len": r.get("original_max_position_embeddings", m.positions)}
        if "factor" in r:
            args |= {"rope_factor": r["factor"], "beta_fast": r["beta_fast"], "beta_slow": r["beta_slow"], "mscale": r["mscale"]}
    else:
        args |= {"n_kv_heads": m.kv_heads, "head_dim": m.head_dim, "hidden_dim": m.inner, "qk_norm": True, "enable_weight_tying": m.tied}
        args |= {"moe_enabled": True} if e else {}
    package = MODELS[m.family]
    table, cls, extra = {
        "llama3": ("llama3_args", "TransformerModelArgs", "RoPEScalingArgs"), "qwen3": ("qwen3_args", "Qwen3ModelArgs", ""),
        "deepseek_v3": ("deepseekv3_args", "DeepSeekV3ModelArgs", ""),
    }[package]  # fmt: skip
    names = ", ".join(filter(None, (extra, cls)))
    imports = [f"from torchtitan.models.{package} import {table}", f"from torchtitan.models.{package}.model.args import {names}"]
    imports += ["from torchtitan.models.moe import MoEArgs"] if e else []
    head = '"""The planned model among torchtitan\'s flavors; train.toml imports this."""'
    body = [f"    {k}={v!r}," for k, v in args.items()]
    return "\n".join([head, "", *imports, "", f'{table}["planned"] = {cls}(', *body, ")", ""])


class _Call:
    """A call as a literal of Python."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self.name, self.arguments = name, arguments

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.arguments.items())})"


def toml(parts: dict[str, Section]) -> str:
    """Sections as TOML. Values are strings, numbers, truth values and lists of those."""
    lines = [f"# {RELEASE}. The tokenizer is not in the plan: give its folder with --model.hf_assets_path."]
    for name, section in parts.items():
        lines += ["", f"[{name}]", *(f"{k} = {_value(v)}" for k, v in section.items())]
    return "\n".join(lines) + "\n"


def _value(v: Any) -> str:
    if isinstance(v, bool):
        return str(v).lower()
    if isinstance(v, list):
        inner = [_value(x) for x in v]
        return "[\n" + "".join(f"  {x},\n" for x in inner) + "]" if v and isinstance(v[0], list) else f"[{', '.join(inner)}]"
    if isinstance(v, str):
        return '"' + v.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(v)
