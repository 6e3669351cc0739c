"""DeepSpeed: ds_config.json, and the script that DeepSpeed leaves to its user.

Options are those of DeepSpeed 0.19.8: docs/_pages/config-json.md, deepspeed/runtime/zero/config.py, deepspeed/runtime/tensor_parallel/config.py
and deepspeed/module_inject/auto_ep_config.py, where their checks are too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from meshwright.codegen.launch.engine import Engine, covered, lost_everywhere
from meshwright.codegen.launch.torchrun import ALLOCATOR, start_script, template
from meshwright.planner.plan import Plan
from meshwright.profiling.errors import InputError

RELEASE = "DeepSpeed 0.19.8"
ROUTED = {"mixtral": "mixtral", "qwen3_moe": "qwen3_moe", "deepseek_v3": "deepseek_v3"}  # model_type -> preset of AutoEP
HEADS = ("ForCausalLM", "LMHeadModel")


def configure(plan: Plan) -> Engine:
    """ds_config.json, config.json, train.py and run.sh. InputError where DeepSpeed cannot run the layout, or the model is no causal LM."""
    config = plan.model.config or {}
    names = config.get("architectures") or []
    if plan.model.origin != "hf" or not names or not names[0].endswith(HEADS):
        raise InputError(f"the script for {RELEASE} is of Hugging Face causal language models, with 'architectures': {plan.model.source} is none")
    _check(plan)
    program = '"$here/train.py" --deepspeed_config "$here/ds_config.json" "$@"'
    x = plan.layout
    script = template("deepspeed.py.jinja").render(
        name=plan.model.name, layout=str(x), release=RELEASE, cls=names[0], tp=x.tp, seq=plan.workload.seq, zero3=x.zero == 3,
        recompute=_recomputes(plan), vocab=plan.model.inputs[0].high,
    )  # fmt: skip
    files = {
        "ds_config.json": json.dumps(config_of(plan), indent=2) + "\n", "config.json": json.dumps(config, indent=2) + "\n", "train.py": script,
        "run.sh": start_script(plan, "run.sh", "train.py", program, "bash run.sh --steps 20", ALLOCATOR),
    }  # fmt: skip
    return Engine("deepspeed", RELEASE, files, "bash run.sh --steps 20", tuple(_lost(plan)))


def config_of(plan: Plan) -> dict[str, Any]:
    """ds_config.json."""
    x, w = plan.layout, plan.workload
    zero: dict[str, Any] = {"stage": x.zero, "overlap_comm": x.zero > 0, "contiguous_gradients": True, "reduce_scatter": True}
    if x.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if x.zero == 3 and x.replicas > 1:
        zero["zero_hpz_partition_size"] = x.shard
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "adamw": ("AdamW", {}), "sgd-momentum": ("SGD", {"momentum": 0.9}), "sgd": ("SGD", {}),
    }  # fmt: skip
    kind, options = kinds[w.optimizer]
    return {
        "train_batch_size": w.global_batch, "train_micro_batch_size_per_gpu": x.micro_batch, "gradient_accumulation_steps": plan.microbatches,
        "optimizer": {"type": kind, "params": {"lr": 1e-3, **options}},
        **({} if kind == "AdamW" else {"zero_allow_untested_optimizer": True}),
        "bf16": {"enabled": w.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        **({"tensor_parallel": {"autotp_size": x.tp}} if x.tp > 1 else {}),
        **({"expert_parallel": {"enabled": True, "autoep_size": x.ep, "preset_model": _preset(plan)}} if x.ep > 1 else {}),
        "steps_per_print": 1,
    }  # fmt: skip


def _preset(plan: Plan) -> str | None:
    return ROUTED.get(str((plan.model.config or {}).get("model_type")))


def _experts(plan: Plan) -> bool:
    c = plan.model.config or {}
    return any(c.get(k) for k in ("num_local_experts", "num_experts", "n_routed_experts"))


def _recomputes(plan: Plan) -> bool:
    return any(mode != "none" and n for mode, n in covered(plan))


def _check(plan: Plan) -> None:
    x, w = plan.layout, plan.workload
    refusals = (
        (x.pp > 1, "pipelines a model only where it is written as a list of layers (PipelineModule): plan with --fix pp=1"),
        (x.cp > 1, "splits sequences only in attention of its own (Ulysses), which the script does not set up: plan with --fix cp=1"),
        (x.etp > 1, "does not split an expert over ranks: plan with --fix etp=1"),
        (x.ep > 1 and _preset(plan) is None, f"lays experts over ranks for {', '.join(ROUTED)}, not for this model: plan with --fix ep=1"),
        (x.tp > 1 and x.ep == 1 and _experts(plan), "splits a model with experts over tensor-parallel ranks only where ep > 1"),
        (x.tp > 1 and x.ep > 1 and x.offload != "none", "does not move state to the host where tp and ep are both above 1"),
        (x.tp > 1 and plan.solution.kv_replicated, f"does not replicate key-value heads over tp={x.tp}"),
        (x.offload != "none" and x.zero == 0, "moves the optimizer's state to the host with ZeRO 1 to 3 alone"),
        (x.offload != "none" and w.optimizer != "adamw", f"has Adam on the host, and not {w.optimizer}"),
    )  # fmt: skip
    for wrong, why in refusals:
        if wrong:
            raise InputError(f"{RELEASE} {why}")


def _lost(plan: Plan) -> Iterator[str]:
    x = plan.layout
    yield from lost_everywhere(plan, "DeepSpeed")
    if x.sp:
        yield "sp=True: DeepSpeed's AutoTP keeps norms and residuals whole on every rank, which needs more memory than predicted"
    if plan.solution.loss == "vocab_parallel":
        yield "loss=vocab_parallel: AutoTP gathers the logits, and every rank computes the whole loss"
    if x.loss == "chunked":
        yield "loss=chunked: Hugging Face models compute the loss of all logits at once, which needs more memory than predicted"
    if x.replicas > 1:
        how = "gathers parameters inside a group from a second copy, and shards the rest over all" if x.zero == 3 else "shards over all of them"
        yield f"replicas={x.replicas}: DeepSpeed has no groups of data-parallel ranks with copies of their own; it {how}"
    if x.recompute == "selective":
        yield "recompute=selective: Hugging Face models recompute whole layers, which holds less and takes longer"
    if x.recompute == "by stage" and (len(set(covered(plan))) > 1 or covered(plan)[0] != ("full", plan.model.layers)):
        yield "recompute=by stage: Hugging Face models recompute every layer, and whole, which holds less and takes longer"
    if x.state_dtype != "fp32":
        yield f"state_dtype={x.state_dtype}: DeepSpeed keeps moments in bf16 only together with master weights in bf16, so they stay fp32"
    if plan.workload.precision == "bf16":
        yield "memory: DeepSpeed keeps bf16 weights beside fp32 masters, and buckets of 5e8 elements, which the plan does not count"
