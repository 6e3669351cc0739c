"""How long a dry run takes, what it needs, and what extrapolation costs: Llama 3.1 70B on 512 ranks, layout by layout.

    python benchmarks/dryrun.py [--no-whole]
    python benchmarks/dryrun.py --scripts      the scripts that emit writes for Llama 3.1 405B on 16,384 and DeepSeek-V3 on 2,048 ranks

Every run is a process of its own, so that its memory is its own; s is its processor seconds, imports included. `whole` runs every
layer and microbatch of the stage.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from meshwright.codegen.dryrun import dry_run
from meshwright.codegen.dryrun_script import dry_run_script
from meshwright.codegen.emit import emit
from meshwright.planner.plan import Plan
from meshwright.planner.solve import plan
from meshwright.planner.space import parse_fix
from meshwright.profiling.trace import trace

MODELS = Path(__file__).parent.parent / "examples/models"
MODEL = str(MODELS / "llama-3.1-70b.json")
CLUSTER, BATCH, SEQ = "64x8xH100-SXM", 512, 8192
GIB = 2**30
# what is fixed, and the stages whose first rank is run, of how many; -1 is the last rank
ROWS = [
    ("tp=8,sp=on,pp=4,zero=1,micro_batch=1", (0, 256, -1)),
    ("tp=8,sp=on,pp=1,zero=3,micro_batch=1,recompute=full", (0,)),
    ("tp=1,pp=1,zero=3,micro_batch=1,recompute=full", (0, -1)),
    ("tp=8,sp=on,pp=8,zero=2,micro_batch=1,recompute=selective", (0, 256, -1)),
    ("tp=4,sp=on,pp=16,zero=1,micro_batch=1,recompute=selective", (0, -1)),
]
SCRIPTS = [("llama-3.1-405b", "2048x8xH100-SXM", 2048), ("deepseek-v3", "256x8xH100-SXM", 4096)]  # model, cluster, global batch
SCRIPTS_SEQ = 4096


def one(path: str, rank: int, whole: bool) -> None:
    folder = Path(path).is_dir()
    found = dry_run_script(path, rank, whole=whole) if folder else dry_run(Plan.load(path), rank, whole=whole)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sent = sum(c.nbytes * c.count for c in found.collectives)
    calls = sum(c.count for c in found.collectives)
    size = {"calls": calls, "layers": found.layers_held}
    result = {**size, "peak": found.peak_bytes, "seconds": time.process_time(), "rss": rss, "sent": sent, "stage": found.stage}
    print(json.dumps({**result, "run": f"{found.layers_run}x{found.microbatches_run}"}))


def apart(path: str, rank: int, whole: bool) -> dict[str, float]:
    arguments = [sys.executable, __file__, "--one", path, "--rank", str(rank), *(["--whole"] if whole else [])]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def scripts(folder: Path) -> None:
    """The first, a middle and the last rank of the emitted scripts, each in a process of its own."""
    print(f"{datetime.date.today()}, torch {torch.__version__}, python benchmarks/dryrun.py --scripts")
    print("Emitted scripts, one rank each; run: layers x microbatches; GiB; live: the plan's, off: peak over it; sent: a step; s: processor")
    for model, cluster, batch in SCRIPTS:
        made = plan(trace(str(MODELS / f"{model}.json"), seq=SCRIPTS_SEQ, precision="bf16"), cluster, global_batch=batch, seq=SCRIPTS_SEQ)
        if not isinstance(made, Plan):
            raise SystemExit(f"{model} on {cluster} does not fit")
        emit(made, folder / model)
        n = made.layout.devices
        print(f"\n{model} on {cluster} ({n:,} ranks), batch {batch}, sequence {SCRIPTS_SEQ}: {made.layout}, {made.microbatches} microbatches")
        print(f"{'rank':>6}{'stage':>6}{'layers':>7} | {'run':>6}{'peak':>8}{'live':>8}{'off':>8} | {'calls':>9}{'sent':>9} | {'s':>6}{'RSS':>6}")
        for rank in (0, n // 2, n - 1):
            a = apart(str(folder / model), rank, False)
            live = made.solution.stages[int(a["stage"])].live_bytes
            row = f"{rank:>6}{a['stage']:>6}{a['layers']:>7} | {a['run']:>6}{a['peak'] / GIB:8.2f}{live / GIB:8.2f}{a['peak'] / live - 1:+8.1%} |"
            print(f"{row}{a['calls']:10,.0f}{a['sent'] / GIB:9.1f} | {a['seconds']:6.1f}{a['rss']:6.2f}", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--no-whole", action="store_true", help="leave out the runs of every layer and microbatch")
    arguments.add_argument("--scripts", action="store_true", help="run the emitted scripts of two large models instead")
    arguments.add_argument("--one", help=argparse.SUPPRESS)
    arguments.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.one:
        one(given.one, given.rank, given.whole)
        return
    if given.scripts:
        with tempfile.TemporaryDirectory() as folder:
            scripts(Path(folder))
        return
    print(f"{datetime.date.today()}, torch {torch.__version__}, python benchmarks/dryrun.py")
    print(f"Llama 3.1 70B on {CLUSTER}, batch {BATCH}, sequence {SEQ}, bf16; layers x microbatches; GiB; s: processor seconds")
    second = f"{'whole':>6}{'peak':>8}{'s':>6}{'RSS':>6} | {'peak':>7}{'sent':>7}"
    print(f"{'layout':<61}{'rank':>5}{'stage':>6} | {'run':>5}{'peak':>8}{'s':>6}{'RSS':>6} | {second}")
    graph = trace(MODEL, seq=SEQ, precision="bf16")
    with tempfile.TemporaryDirectory() as folder:
        for fix, ranks in ROWS:
            made = plan(graph, CLUSTER, global_batch=BATCH, seq=SEQ, fix=parse_fix(fix))
            if not isinstance(made, Plan):
                print(f"{fix:<61} does not fit")
                continue
            path = str(Path(folder) / "plan.json")
            Path(path).write_text(made.to_json())
            for rank in ranks:
                rank = rank % made.layout.devices
                a = apart(path, rank, False)
                row = f"{fix:<61}{rank:>5}{a['stage']:>6} | {a['run']:>5}{a['peak'] / GIB:8.3f}{a['seconds']:6.1f}{a['rss']:6.2f} |"
                if not given.no_whole:
                    b = apart(path, rank, True)
                    row += f" {b['run']:>6}{b['peak'] / GIB:8.3f}{b['seconds']:6.1f}{b['rss']:6.2f} |"
                    row += f"{a['peak'] / b['peak'] - 1:+8.3%}{a['sent'] / b['sent'] - 1:+7.1%}"
                print(row, flush=True)


if __name__ == "__main__":
    main()
