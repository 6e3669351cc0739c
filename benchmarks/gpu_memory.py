"""Predicted peak memory of plans for one GPU, and what a GPU says of them.

    python benchmarks/gpu_memory.py predict -o benchmarks/results/gpu-memory-predictions.json
    PYTHONPATH=. python benchmarks/gpu_memory.py measure benchmarks/results/gpu-memory-predictions.json -o results.json
    PYTHONPATH=. python benchmarks/gpu_memory.py measure benchmarks/results/gpu-memory-predictions.json --device cpu

`predict` needs no GPU. It plans 20 training configurations for 1xH200-SXM (Llama, GPT-2 and Mixtral of 0.1 to 3.2 B parameters; recompute
none, selective and full; bf16 and fp32; 512 to 32k tokens; one and several microbatches) and writes their plans, predictions in them.

`measure` needs one CUDA GPU, torch >= 2.11, transformers, numpy, pydantic and PyYAML, and nothing of the planner. Every configuration
trains three steps in a process of its own, so that the allocator starts empty, with segments that grow as launch.sh sets them. Peaks
are of the steps; what setup peaked at, and what the GPU held before the process, is beside them. The results are rewritten after every
configuration. --device cpu runs one tiny configuration end to end and measures no memory.

Nothing of it was measured yet: only --device cpu was run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from meshwright.planner.plan import Plan, Workload
from meshwright.profiling.errors import InputError
from meshwright.profiling.files import write_atomically
from meshwright.profiling.loading import hf_class, hf_config
from meshwright.profiling.measure_host import device_name, host, invocation

PREDICTIONS, RESULTS = "meshwright.gpu-memory-predictions/1", "meshwright.gpu-memory/1"
CLUSTER = "1xH200-SXM"
ALLOCATOR = "expandable_segments:True"  # as launch.sh.jinja
METRICS = ("allocated", "reserved", "device")  # torch.cuda.max_memory_allocated, max_memory_reserved, and what the driver calls used
GIB = 2.0**30
NAMED = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "mixtral": "MixtralForCausalLM"}


# --- predict -----------------------------------------------------------------------------------------------------------


def llama(hidden: int, inter: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool, kind: str = "llama") -> dict[str, Any]:
    return {
        "model_type": kind, "architectures": [NAMED[kind]], "hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": 32768,
        "tie_word_embeddings": tied,
    }  # fmt: skip


def gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "architectures": [NAMED["gpt2"]], "n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": 50257,
        "n_positions": 1024, "bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip


def mixtral(hidden: int, inter: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    extra = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None, "attention_dropout": 0.0}
    return {**llama(hidden, inter, layers, heads, kv_heads, 32000, False, "mixtral"), **extra}


MODELS = {
    "llama-0.1b": llama(768, 2048, 12, 12, 4, 32000, True),
    "llama-0.4b": llama(1024, 4096, 20, 16, 16, 32000, False),  # every head has keys and values of its own
    "llama-1.2b": llama(2048, 8192, 16, 32, 8, 128256, True),
    "llama-3.2b": llama(3072, 8192, 28, 24, 8, 128256, True),
    "gpt2-0.1b": gpt2(768, 12, 12),
    "gpt2-1.6b": gpt2(1600, 48, 25),
    "mixtral-0.4b": mixtral(768, 2048, 8, 12, 4),
    "mixtral-2b": mixtral(1536, 4096, 12, 12, 4),
}
TINY = llama(64, 128, 2, 4, 2, 256, False)
# model, precision, tokens a sample, samples a microbatch, microbatches, recompute, optimizer; no two neighbours alike, for a short budget
CASES = [
    ("llama-1.2b", "bf16", 2048, 4, 1, "none", "adamw"),
    ("gpt2-0.1b", "fp32", 1024, 16, 1, "none", "adamw"),
    ("mixtral-0.4b", "bf16", 2048, 4, 2, "none", "adamw"),
    ("llama-3.2b", "bf16", 4096, 2, 4, "full", "adamw"),
    ("llama-0.4b", "fp32", 1024, 4, 4, "none", "adamw"),
    ("llama-1.2b", "bf16", 2048, 4, 4, "none", "adamw"),
    ("gpt2-1.6b", "bf16", 1024, 8, 2, "none", "adamw"),
    ("mixtral-2b", "bf16", 4096, 2, 1, "selective", "adamw"),
    ("llama-0.1b", "fp32", 2048, 4, 1, "none", "adamw"),
    ("llama-1.2b", "bf16", 32768, 1, 1, "full", "adamw"),
    ("llama-0.4b", "bf16", 8192, 1, 4, "selective", "adamw"),
    ("llama-3.2b", "bf16", 2048, 1, 1, "none", "adamw"),
    ("gpt2-0.1b", "bf16", 1024, 16, 4, "full", "adamw"),
    ("llama-0.1b", "bf16", 512, 8, 1, "none", "adamw"),
    ("mixtral-2b", "fp32", 1024, 2, 2, "full", "adamw"),
    ("llama-1.2b", "bf16", 1024, 8, 2, "none", "sgd-momentum"),
    ("llama-0.1b", "bf16", 16384, 1, 1, "none", "adamw"),
    ("llama-1.2b", "bf16", 4096, 4, 2, "selective", "adamw"),
    ("llama-3.2b", "fp32", 512, 2, 2, "selective", "adamw"),
    ("llama-3.2b", "bf16", 4096, 3, 1, "none", "adamw"),
]


def planned(
    config: dict[str, Any], name: str, precision: str, seq: int, micro_batch: int, microbatches: int, recompute: str, optimizer: str, folder: Path
) -> dict[str, Any]:
    """The plan of one configuration as plain data, without the planner's arguments for it."""
    from meshwright.planner.plan import Layout
    from meshwright.planner.solve import plan_of
    from meshwright.profiling.cluster import parse_cluster
    from meshwright.profiling.trace import trace

    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    graph = trace(str(path), seq=seq, precision=precision)
    workload = Workload(global_batch=micro_batch * microbatches, seq=seq, precision=precision, optimizer=optimizer)  # type: ignore[arg-type]
    _, found = plan_of(graph, parse_cluster(CLUSTER), workload, Layout(micro_batch=micro_batch, recompute=recompute))  # type: ignore[arg-type]
    here = found.model.model_copy(update={"source": path.name})
    bare = found.model_copy(update={"model": here, "alternatives": (), "why_not": (), "rejected": ()})
    return bare.model_dump(by_alias=True, mode="json", exclude_defaults=True) | {"schema": bare.schema_}


def predict(out: Path) -> None:
    """Plans the configurations and writes them."""
    import transformers

    entries = []
    print(f"{f'predicted for {CLUSTER}, GiB':63} {'parameters':>10}" + "".join(f" {f'{m} p50, p95':>19}" for m in METRICS))
    with tempfile.TemporaryDirectory() as folder:
        for model, *how in CASES:
            data = planned(MODELS[model], model, *how, folder=Path(folder))  # type: ignore[arg-type]
            plan = read_plan(data)
            entries.append({"name": name_of(plan), "plan": data})
            told = "".join(f" {low / GIB:11.2f} {high / GIB:7.2f}" for low, high in predicted(plan).values())
            print(f"{name_of(plan):63} {plan.model.numel / 1e9:8.2f} B{told}", flush=True)
        tiny = planned(TINY, "llama-tiny", "bf16", 32, 2, 2, "full", "adamw", Path(folder))
    head = {
        "format": PREDICTIONS, "note": "predictions only: nothing of this was measured yet", **invocation(),
        "torch": str(torch.__version__), "transformers": transformers.__version__, "cluster": CLUSTER,
    }  # fmt: skip
    lines = ",\n".join(f"  {json.dumps(e)}" for e in entries)
    start = json.dumps({**head, "smoke": {"name": name_of(read_plan(tiny)), "plan": tiny}}, indent=1).removesuffix("\n}")
    write_atomically(out, f'{start},\n "entries": [\n{lines}\n ]\n}}\n')


# --- both --------------------------------------------------------------------------------------------------------------


def read_plan(data: Any) -> Plan:
    return Plan.from_json(json.dumps(data), "a plan of the predictions")


def read(path: Path) -> dict[str, Any]:
    """A file that predict wrote, or InputError."""
    try:
        data = json.loads(path.read_text())
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise InputError(f"{path} is not JSON: {e}") from None
    if not isinstance(data, dict) or data.get("format") != PREDICTIONS:
        raise InputError(f"{path} is not a file of predictions: write one with gpu_memory.py predict -o {path.name}")
    return data


def predicted(plan: Plan) -> dict[str, tuple[float, float]]:
    """(p50, p95) bytes by metric."""
    return {m: (r.p50, r.p95) for m in METRICS if (r := plan.prediction.memory_bytes.by_metric[m])}


def name_of(plan: Plan) -> str:
    w, x = plan.workload, plan.layout
    model = plan.model.source.removesuffix(".json")
    return f"{model} {w.precision} {w.seq} tokens, {plan.microbatches} x {x.micro_batch}, recompute {x.recompute}, {w.optimizer}"


# --- measure -----------------------------------------------------------------------------------------------------------


def train(plan: Plan, kind: str, steps: int) -> dict[str, Any]:
    """Trains some steps as planned; on a GPU, its peaks in bytes, or that they ran out of memory."""
    import torch.distributed as dist

    from meshwright.codegen.apply import apply, make_optimizer

    cuda = kind == "cuda"
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    row: dict[str, Any] = {"host": host(device), "device": device_name(device)}
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)

    def peaks() -> dict[str, int]:
        if not cuda:
            return {}
        torch.cuda.synchronize()
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}

    try:
        assert plan.model.config is not None
        config = hf_config(plan.model.config, plan.model.source)
        with device:
            model = hf_class(config, plan.model.source)(config).float().train()
        parallel = apply(plan, model, device=device)
        del model
        optimizer = make_optimizer(plan, parallel.stage)
        gc.collect()
        row["setup"] = peaks()
        if cuda:
            torch.cuda.empty_cache()  # an emitted script fills the shards in place, and never holds the whole model beside them
            torch.cuda.reset_peak_memory_stats()
        tokens = torch.randint(0, plan.model.inputs[0].high, (plan.workload.global_batch, plan.workload.seq + 1))
        inputs = {plan.model.inputs[0].name: tokens[:, :-1].contiguous().to(device)}
        labels = tokens[:, 1:].contiguous().to(device)
        losses = []
        for _ in range(steps):
            losses.append(parallel.train_step(inputs, labels))
            optimizer.step()
            optimizer.zero_grad()
        row["measured"] = peaks()
        row["losses"] = [round(float(x), 4) for x in losses]
    except torch.OutOfMemoryError as e:
        row |= {"out_of_memory": True, "measured": {}, "at": peaks(), "error": str(e).partition("\n")[0]}
    if cuda:
        free, total = torch.cuda.mem_get_info(device)
        row["total_bytes"] = total
        row["alloc_retries"] = torch.cuda.memory_stats().get("num_alloc_retries", 0)
        if row["measured"]:
            row["measured"]["device"] = total - free
    dist.destroy_process_group()
    return row


def apart(path: Path, entry: str, kind: str, steps: int, limit_s: float) -> dict[str, Any]:
    """`train` of one entry in a process of its own; what it said last where it failed."""
    env = {"OMP_NUM_THREADS": "1", "PYTORCH_ALLOC_CONF": ALLOCATOR, **os.environ}
    command = [sys.executable, __file__, "one", str(path), entry, "--device", kind, "--steps", str(steps)]
    before = used_bytes() if kind == "cuda" else None
    started = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=limit_s)
        lines = done.stdout.splitlines()
        row: dict[str, Any] = json.loads(lines[-1]) if done.returncode == 0 and lines else {}
        if not row:
            row = {"measured": {}, "failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    except subprocess.TimeoutExpired:
        row = {"measured": {}, "failed": f"it took more than {limit_s:g} s"}
    return {**row, "used_before_bytes": before, "seconds": round(time.monotonic() - started, 1), "allocator": env["PYTORCH_ALLOC_CONF"]}


def used_bytes() -> float | None:
    """What the driver says is in use, without a context of this process: other programs' memory."""
    with contextlib.suppress(OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return float(subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()[0]) * 2**20
    return None


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of |predicted p50 / measured - 1|, and how many rows were above p95, by metric."""
    out: dict[str, Any] = {
        "configurations": len(rows), "out_of_memory": sum("out_of_memory" in r for r in rows), "failed": sum("failed" in r for r in rows),
    }  # fmt: skip
    for m in METRICS:
        pairs = [(r["predicted"][m], r["measured"][m]) for r in rows if r["measured"].get(m)]
        if pairs:
            errors = [p50 / x - 1 for (p50, _), x in pairs]
            out[m] = {
                "measured": len(pairs), "median_error": statistics.median(map(abs, errors)), "worst_error": max(errors, key=abs),
                "median_bias": statistics.median(errors), "above_p95": sum(x > p95 for (_, p95), x in pairs),
            }  # fmt: skip
    return out


def line(row: dict[str, Any]) -> str:
    """A row of the table: GiB predicted p50, p95 and measured, of each metric."""
    if "failed" in row:
        return f"{row['name']:63} failed: {row['failed']}"
    if "out_of_memory" in row:
        told = ", ".join(f"{m} p50 {row['predicted'][m][0] / GIB:.2f} p95 {row['predicted'][m][1] / GIB:.2f}" for m in METRICS)
        return f"{row['name']:63} out of memory at {row['at'].get('allocated', 0) / GIB:.2f} GiB allocated; predicted {told}"
    cells = ""
    for m in METRICS:
        (low, high), x = row["predicted"][m], row["measured"][m]
        cells += f" {low / GIB:8.2f} {high / GIB:6.2f} {x / GIB:7.2f} {100 * (low / x - 1):+6.1f}%{'!' if x > high else ' '}"
    return f"{row['name']:63}{cells}"


def measure(path: Path, out: Path | None, kind: str, steps: int, budget_s: float, limit_s: float, only: str) -> int:
    """Measures the entries, prints the table and the summary; the exit code."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("torch finds no GPU here, and measure needs one; --device cpu runs a smoke test without memory figures")
    if kind == "cuda" and out is None:
        raise InputError("measure needs -o FILE for its results")
    data = read(path)
    if kind == "cpu":
        row = {"name": data["smoke"]["name"], **apart(path, "smoke", kind, steps, limit_s)}
        if out is not None:
            head = {"format": RESULTS, **invocation(), "torch": str(torch.__version__), "note": "a smoke test on a CPU: memory is not measured"}
            write_atomically(out, json.dumps({**head, "rows": [row]}, indent=1) + "\n")
        said = f"failed: {row['failed']}" if "failed" in row else f"losses {row['losses']}; memory is not measured on a CPU"
        print(f"{row['name']}: {said}")
        return int("failed" in row)
    assert out is not None
    head = {
        "format": RESULTS, **invocation(), "torch": str(torch.__version__), "predictions": {k: data[k] for k in ("date", "torch", "cluster")},
        "steps": steps,
    }  # fmt: skip
    wanted = [(i, e) for i, e in enumerate(data["entries"]) if only in e["name"]]
    if not wanted:
        raise InputError(f"no configuration's name contains {only!r}")
    rows: list[dict[str, Any]] = []
    print(f"{'GiB: predicted p50, p95, measured, off (! above p95)':63}" + "".join(f" {m:>31} " for m in METRICS))
    started = time.monotonic()
    for i, entry in wanted:
        if budget_s and time.monotonic() - started > budget_s:
            break
        plan = read_plan(entry["plan"])
        row = {"name": entry["name"], "predicted": predicted(plan), **apart(path, str(i), kind, steps, limit_s)}
        head["host"] = row.pop("host", head.get("host"))
        planned_for = plan.cluster.device.name
        if not rows and row.get("device", planned_for) != planned_for:
            print(f"this is a {row['device']}; the predictions are for {planned_for}", file=sys.stderr)
        rows.append(row)
        print(line(row), flush=True)
        found = {**head, "summary": summary(rows), "left_out": len(wanted) - len(rows), "rows": rows}
        write_atomically(out, json.dumps(found, indent=1) + "\n")
    told = summary(rows)
    counts = f"{told['configurations']} configurations, {told['out_of_memory']} out of memory, {told['failed']} failed"
    print(f"{counts}, {len(wanted) - len(rows)} left out")
    for m in METRICS:
        if m in told:
            t = told[m]
            print(
                f"{m:10} median error {100 * t['median_error']:.1f} %, bias {100 * t['median_bias']:+.1f} %, worst {100 * t['worst_error']:+.1f} %;"
                f" above p95 in {t['above_p95']} of {t['measured']}"
            )
    return int(bool(told["failed"]))


def one(path: Path, entry: str, kind: str, steps: int) -> None:
    """What a process of `measure` runs: one entry, its row as the last line of output."""
    data = read(path)
    plan = read_plan((data["smoke"] if entry == "smoke" else data["entries"][int(entry)])["plan"])
    print(json.dumps(train(plan, kind, steps)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="predict | measure")
    asked = verbs.add_parser("predict", help="plan the configurations")
    asked.add_argument("-o", "--output", type=Path, required=True)
    asked = verbs.add_parser("measure", help="train them on a GPU and compare")
    asked.add_argument("predictions", type=Path)
    asked.add_argument("-o", "--output", type=Path)
    asked.add_argument("--budget", type=float, default=0.0, help="seconds after which no further configuration starts")
    asked.add_argument("--limit", type=float, default=300.0, help="seconds that one configuration may take")
    asked.add_argument("--only", default="", help="configurations whose name contains this")
    inner = verbs.add_parser("one")
    inner.add_argument("predictions", type=Path)
    inner.add_argument("entry")
    for p in (asked, inner):
        p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        p.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    try:
        if args.verb == "predict":
            predict(args.output)
        elif args.verb == "measure":
            return measure(args.predictions, args.output, args.device, args.steps, args.budget, args.limit, args.only)
        else:
            one(args.predictions, args.entry, args.device, args.steps)
    except InputError as e:
        print(f"gpu_memory: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
