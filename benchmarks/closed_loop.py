"""Measure a machine, predict the steps of a dozen layouts on it, run them, and say how far the predictions were off.

    python benchmarks/closed_loop.py                                   # 4 gloo ranks on this CPU, one thread each
    torchrun --nproc-per-node 8 benchmarks/closed_loop.py --device cuda   # a GPU node, NCCL
    ... [--budget 120s] [--profile FILE] [--costs FILE | --datasheet] [--config config.json] [--json] [-o results.json]

A run measures a profile (or takes --profile), compiles it (or takes --costs; --datasheet predicts without any), plans every layout with
all degrees fixed, runs the plans through apply with AdamW, and prints Spearman's rank correlation, the median error, the median error
after one common factor for the machine, and regret: the measured time of the layout predicted fastest over the fastest, minus 1.
Ranks that share a CPU share its cores, which datasheet predictions do not know: there only the ranks and the scaled error mean something.
Where ranks outnumber cores, a rank that waits in a pipeline's bubble leaves its core to another, so that pipelines are faster than any
model of one device a rank says; the correlation is also given without them. Everything else that runs on the machine is in the measured seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import socket
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.codegen.apply import apply
from meshwright.planner.plan import Plan
from meshwright.planner.solve import plan
from meshwright.profiling import loading
from meshwright.profiling.errors import InputError
from meshwright.profiling.files import write_atomically
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.hardware import read_profile, write_profile
from meshwright.profiling.measure import measure, parse_budget
from meshwright.profiling.measure_host import device_name
from meshwright.profiling.measure_progress import progress_bar
from meshwright.profiling.trace import trace

CPU_MODEL = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "vocab_size": 2048, "max_position_embeddings": 512,
}  # fmt: skip
GPU_MODEL = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
torch.set_num_threads(1)  # before any op: a rank has one thread, and a fork cannot use its parent's pool
WARM_UP = 2
LEAST_MEASURED = 5  # classes without as many samples are priced by the datasheet
TIMEOUT_S = 1800


@dataclass
class Outcome:
    """One layout: seconds of a step as predicted and as measured (median), and half of the quartiles' distance over the median."""

    layout: str
    predicted_s: float
    measured_s: float
    spread: float


def layouts(n: int, batch: int) -> dict[str, dict[str, Any]]:
    """A dozen layouts of n ranks (a multiple of 4), every degree fixed. `batch` samples a step; a multiple of 4 n is best."""
    half = n // 2

    def fix(tp: int = 1, sp: bool = False, pp: int = 1, dp: int = 1, zero: int = 0, recompute: str = "none", parts: int = 1) -> dict[str, Any]:
        return {"tp": tp, "sp": sp, "pp": pp, "dp": dp, "zero": zero, "recompute": recompute, "micro_batch": max(1, batch // dp // parts)}

    return {
        **{f"dp{n} zero{z}": fix(dp=n, zero=z) for z in range(4)},
        f"dp{n} zero0 recompute": fix(dp=n, recompute="full"),
        f"dp{n} zero2, 4 microbatches": fix(dp=n, zero=2, parts=4),
        f"tp{n}": fix(tp=n),
        f"tp{n} sp recompute": fix(tp=n, sp=True, recompute="full"),
        f"pp{min(n, 4)} dp{n // min(n, 4)}, 2 pp microbatches": fix(pp=min(n, 4), dp=n // min(n, 4), parts=2 * min(n, 4)),
        f"tp2 sp dp{half} zero1": fix(tp=2, sp=True, dp=half, zero=1),
        f"pp2 dp{half} zero0, 4 microbatches": fix(pp=2, dp=half, parts=4),
        f"tp2 pp{half} sp, {2 * half} microbatches": fix(tp=2, sp=True, pp=half, parts=2 * half),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; ties share their mean rank."""

    def ranks(x: np.ndarray) -> np.ndarray:
        _, which, count = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[which]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def score(outcomes: list[Outcome]) -> dict[str, float]:
    predicted, measured = np.array([o.predicted_s for o in outcomes]), np.array([o.measured_s for o in outcomes])
    log = np.log(predicted / measured)
    plain = np.array(["pp" not in o.layout for o in outcomes])
    return {
        "spearman": spearman(predicted, measured),
        "spearman_without_pp": spearman(predicted[plain], measured[plain]) if plain.sum() > 2 else float("nan"),
        "median_error": float(np.median(np.abs(predicted / measured - 1))),
        "median_error_scaled": float(np.median(np.abs(np.exp(log - np.median(log)) - 1))),
        "factor": float(np.exp(np.median(log))),
        "regret": float(measured[predicted.argmin()] / measured.min() - 1),
        "median_spread": float(np.median([o.spread for o in outcomes])),
    }


def make_batch(graph: ModelGraph, samples: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Random inputs by name and labels."""
    assert graph.labels is not None
    made = {}
    for i in (*graph.inputs, graph.labels):
        shape = [i.spec.shape[0] * samples, *i.spec.shape[1:]]
        made[i.name] = torch.randint(0, i.high or 10, shape, device=device) if i.spec.dtype == "int64" else torch.randn(shape, device=device)
    labels = made.pop(graph.labels.name)
    return made, labels


def build(source: str, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    config = loading.hf_config(loading.read_config(Path(source)), source)
    with device:
        return loading.hf_class(config, source)(config).float().train()


def run(made: Plan, source: str, graph: ModelGraph, steps: int, device: torch.device) -> list[float]:
    """Seconds of every timed step on the slowest rank. Collective over all ranks."""
    parallel = apply(made, build(source, device), device=device)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-4, foreach=False)
    inputs, labels = make_batch(graph, made.workload.global_batch // made.layout.dp, device)
    seconds = []
    for _ in range(WARM_UP + steps):
        dist.barrier()
        start = time.perf_counter()
        parallel.train_step(inputs, labels)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(seconds[WARM_UP:], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    del parallel, optimizer
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return [float(x) for x in slowest]


def cost_model(args: argparse.Namespace, folder: Path) -> Any:
    """The cost model to predict with, on rank 0; None for the datasheet. Measures on all ranks unless a file is given."""
    from meshwright.costmodel.compile import compile_profile

    if args.datasheet:
        return None
    if args.costs:
        return args.costs
    leads = dist.get_rank() == 0
    path = Path(args.profile) if args.profile else folder / "profile.yaml"
    if not args.profile or not path.exists():
        with progress_bar() as say:
            measure(path, parse_budget(args.budget), device=args.device, progress=say if leads else None)
    if not leads:
        return None
    profile = read_profile(path)
    if args.output and not args.profile:
        write_profile(profile, Path(args.output).with_suffix(".profile.yaml"))
    few = [k for k, t in profile.tables.items() if len(t["seconds"]) < LEAST_MEASURED]
    say_error(f"compiling {profile.rows()} samples" + (f"; too few of {', '.join(few)}" if few else ""))
    return compile_profile(profile)


def plans(args: argparse.Namespace, graph: ModelGraph, costs: Any, device: torch.device) -> list[tuple[str, Plan | str]]:
    """The plan of every layout, or why it has none."""
    world = dist.get_world_size()
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    kind = device_name(device)
    cluster = args.cluster or (f"{world}x{kind}" if per_node == world else f"{world // per_node}x{per_node}x{kind}")
    found: list[tuple[str, Plan | str]] = []
    for name, fix in layouts(world, args.batch).items():
        try:
            made = plan(graph, cluster, global_batch=args.batch, seq=args.seq, precision=graph.precision, fix=fix, top=1, costs=costs)
        except InputError as e:
            found.append((name, str(e)))
            continue
        found.append((name, made if isinstance(made, Plan) else "does not fit"))
    return found


def on_ranks(args: argparse.Namespace) -> None:
    """What every rank does, inside a process group of all ranks."""
    leads = dist.get_rank() == 0
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        box: list[Any] = [str(folder)]
        dist.broadcast_object_list(box, src=0)
        costs = cost_model(args, Path(box[0]))
        source = args.config or write_model(folder, args.device)
        graph = trace(source, seq=args.seq, precision="bf16" if args.device == "cuda" else "fp32")
        planned: list[Any] = [plans(args, graph, costs, device) if leads else None]
        dist.broadcast_object_list(planned, src=0)
        refused = {title: made for title, made in planned[0] if isinstance(made, str)}
        runs = {title: made for title, made in planned[0] if isinstance(made, Plan)}
        seconds: dict[str, list[float]] = {title: [] for title in runs}
        for i in range(args.passes):
            for title, made in runs.items():
                if leads:
                    say_error(f"running {title} ({i + 1} of {args.passes})")
                seconds[title] += run(made, source, graph, args.steps, device)
        outcomes = []
        for title, made in runs.items():
            low, middle, high = (float(x) for x in np.percentile(seconds[title], [25, 50, 75]))
            outcomes.append(Outcome(title, made.prediction.step_s.p50, middle, (high - low) / 2 / middle))
        dist.barrier()
    if leads:
        report(args, outcomes, refused, costs is not None)


def write_model(folder: Path, device: str) -> str:
    from transformers import LlamaConfig

    sizes: dict[str, Any] = GPU_MODEL if device == "cuda" else CPU_MODEL
    config = LlamaConfig(**sizes)
    config.architectures = ["LlamaForCausalLM"]
    path = folder / "config.json"
    path.write_text(json.dumps(config.to_dict(), default=str))
    return str(path)


def report(args: argparse.Namespace, outcomes: list[Outcome], refused: dict[str, str], measured: bool) -> None:
    if len(outcomes) < 3:
        raise InputError(f"only {len(outcomes)} layouts ran: {'; '.join(f'{k}: {v}' for k, v in refused.items())}")
    result = {
        "costs": "measured" if measured else "datasheet", "ranks": dist.get_world_size(), "device": args.device, "batch": args.batch, "seq": args.seq,
        "cores": os.cpu_count(), "load_average": os.getloadavg()[1],
        **score(outcomes), "layouts": [asdict(o) for o in outcomes], "refused": refused,
    }  # fmt: skip
    text = json.dumps(result, indent=2) + "\n"
    if args.output:
        write_atomically(Path(args.output), text)
    if args.json:
        print(text, end="", flush=True)
        return
    width = max(len(o.layout) for o in outcomes)
    lines = [f"{'layout':{width}}  predicted ms  measured ms  spread  ratio"]
    for o in sorted(outcomes, key=lambda x: x.measured_s):
        ratio = o.predicted_s / o.measured_s
        lines.append(f"{o.layout:{width}}  {o.predicted_s * 1e3:12.1f}  {o.measured_s * 1e3:11.1f}  {o.spread:6.1%}  {ratio:5.2f}")
    lines += [f"{name}: not run ({why})" for name, why in refused.items()]
    s = score(outcomes)
    ranks = f"Spearman {s['spearman']:.2f} ({s['spearman_without_pp']:.2f} without pipelines), regret {s['regret']:.1%}"
    errors = f"median error {s['median_error']:.1%}, {s['median_error_scaled']:.1%} after one factor of {s['factor']:.2f}"
    lines.append(f"{result['costs']} costs, {len(outcomes)} layouts: {ranks}, {errors}")
    if args.device == "cpu":
        lines.append(f"{result['ranks']} ranks on {result['cores']} cores, load average {result['load_average']:.1f} (these ranks included)")
    print("\n".join(lines), flush=True)


def say_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def enter(args: argparse.Namespace) -> None:
    """Joins the process group, works, leaves."""
    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=timedelta(seconds=TIMEOUT_S))
    try:
        on_ranks(args)
    finally:
        dist.destroy_process_group()


def fork(args: argparse.Namespace) -> int:
    """Ranks as forks of this process, which has run no op. Ends the others when one fails; returns the worst exit code."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(args.ranks):
        child = os.fork()
        if not child:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(args.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os._exit(guarded(enter, args))
        children.append(child)
    worst = 0
    while children:
        done, status = os.wait()
        children.remove(done)
        code = os.waitstatus_to_exitcode(status)
        worst = worst or code
        if code:
            for other in children:
                os.kill(other, 15)
    return abs(worst)


def guarded(fn: Any, args: argparse.Namespace) -> int:
    """Runs fn(args); bad input is one sentence on stderr and 2."""
    try:
        fn(args)
    except InputError as e:
        if os.environ.get("RANK", "0") == "0":
            say_error(f"closed_loop: {e}")
        return 2
    except Exception:
        import traceback

        traceback.print_exc()
        return 1
    sys.stdout.flush()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=4, help="CPU ranks to fork where torchrun did not start any")
    parser.add_argument("--budget", default="60s", help="for measuring the profile")
    parser.add_argument("--profile", default="", help="a profile measured here; measured into this file if it does not exist")
    parser.add_argument("--costs", default="", help="a compiled cost model; nothing is measured then")
    parser.add_argument("--datasheet", action="store_true", help="predict from the datasheet; nothing is measured then")
    parser.add_argument("--cluster", default="", help="what to plan for; the default is what runs here")
    parser.add_argument("--config", default="", help="a Hugging Face config.json; the default is a small Llama")
    parser.add_argument("--batch", type=int, default=16, help="samples a step")
    parser.add_argument("--seq", type=int, default=0, help="tokens a sample; 128 on a CPU, 4096 on GPUs")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each layout in each pass")
    parser.add_argument("--passes", type=int, default=2, help="how often all layouts are run, one after the other; steps are pooled")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-o", "--output", default="", help="save the JSON here")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.seq = args.seq or (4096 if args.device == "cuda" else 128)
    if "RANK" in os.environ:
        return guarded(enter, args)
    if args.device == "cuda":
        return guarded(_refuse, args)
    return fork(args)


def _refuse(args: argparse.Namespace) -> None:
    raise InputError("--device cuda needs ranks: start with torchrun --nproc-per-node N benchmarks/closed_loop.py --device cuda")


if __name__ == "__main__":
    sys.exit(main())
