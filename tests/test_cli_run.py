"""The verbs run and compare: measured beside predicted, who died, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny import SEQ

from meshwright import cli
from meshwright.codegen.launch.local import Died, Ran, died, read_log
from meshwright.codegen.launch.torchrun import launcher
from meshwright.planner.plan import Plan
from meshwright.planner.solve import plan
from meshwright.profiling.cluster import parse_cluster
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelGraph
from meshwright.report.run import render_run, run_document

# Stands in for train.py: one line a step in log.jsonl, the peaks at the end; the rank of --dies raises before the second step
STAND_IN = """
import argparse, json, os, sys
from pathlib import Path
import torch.distributed as dist
parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=5)
steps = parser.parse_args().steps
dist.init_process_group("gloo")
rank, log = dist.get_rank(), Path(__file__).parent / "log.jsonl"
for i in range(steps):
    if (Path(__file__).parent / f"dies{rank}").exists() and i == 1:
        raise RuntimeError("no more of this")
    dist.barrier()
    if rank == 0:
        print(f"step {i}", flush=True)
        with log.open("a") as f:
            f.write(json.dumps({"step": i, "loss": 5.0 - i, "seconds": 9.0 if i == 0 else 0.25}) + "\\n")
if rank == 0:
    with log.open("a") as f:
        f.write(json.dumps({"peak_bytes": None, "predicted_step_s": 1.0, "predicted_peak_bytes": 1.0}) + "\\n")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def made(tiny_llama: ModelGraph) -> Plan:
    found = plan(tiny_llama, "2xcpu", global_batch=16, seq=SEQ, fix={"tp": 1, "pp": 1, "cp": 1, "dp": 2, "zero": 1})
    assert isinstance(found, Plan)
    return found


@pytest.fixture
def folder(made: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    made.save(path / "plan.json")
    (path / "launch.sh").write_text(launcher(made))
    (path / "train.py").write_text(STAND_IN)
    return path


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def called(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["meshwright", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return called


def test_a_folder_is_run(made: Plan, folder: Path, call) -> None:
    """torchrun starts the plan's ranks; the result is the median of the warm steps beside the prediction, as text and as JSON; progress
    goes to stderr, and lines of an earlier run are not read again."""
    code, out, err = call("run", folder, "--steps", 4)
    again = call("run", folder, "--steps", 3, "--json")
    told = json.loads(again[1])

    assert (code, again[0]) == (0, 0), err
    assert "step 3" in err
    assert out.startswith("Step  0.25 s measured, ")
    assert "median of the last 3 of 4 steps on 2 ranks" in out
    assert "Loss  5.0000 at step 0, 2.0000 at step 3" in out
    assert "not measured: the ranks ran on CPUs" in out
    assert told["steps"] == 3
    assert told["step_s"]["measured"] == 0.25
    assert told["step_s"]["error"] == pytest.approx(made.prediction.step_s.p50 / 0.25 - 1)
    assert told["losses"] == [5.0, 4.0, 3.0]
    assert told["peak_bytes"]["measured"] is None


def test_a_rank_that_dies_is_named(folder: Path, call) -> None:
    """Exit code 1 and one sentence with the rank, its exit code and its own last words, not those of the ranks that lost it."""
    (folder / "dies1").touch()
    code, out, err = call("run", folder, "--steps", 3)

    assert (code, out) == (1, "")
    assert err.strip().splitlines()[-1] == "meshwright: rank 1 ended with exit code 1: RuntimeError: no more of this"


SUMMARY = """
[rank0]: RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:1
step 4 loss 3.2
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Failures:
[1]:
  rank      : 3 (local_rank: 3)
  exitcode  : {second}
Root Cause (first observed failure):
[0]:
  rank      : 0 (local_rank: 0)
  exitcode  : {first}
"""


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (1, -9, "rank 3 was killed by SIGKILL"),
        (1, -15, "rank 0 ended with exit code 1: RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:1"),
        (1, 2, "rank 3 ended with exit code 2"),
        (-11, -15, "rank 0 was killed by SIGSEGV: RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:1"),
    ],
)
def test_who_died_first(first: int, second: int, expected: str) -> None:
    """A rank that was killed, or that failed of its own, comes before one that lost its peer, whichever torchrun saw first."""
    assert str(died(SUMMARY.format(first=first, second=second).splitlines(), 1)) == expected


def test_without_a_summary_the_run_itself_failed() -> None:
    """Like a launch.sh that finds no torchrun."""
    assert died(["launch.sh: line 9: torchrun: command not found"], 127) == Died(None, 127, "")
    assert str(Died(None, 127, "")) == "the run ended with exit code 127"


def test_peaks_are_shown_beside_the_prediction(made: Plan, tmp_path: Path) -> None:
    """On GPUs: the fullest rank, and how far off the prediction is."""
    lines = [{"step": i, "loss": 1.0, "seconds": 0.5} for i in range(10)] + [{"peak_bytes": [2**30, 3 * 2**30]}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    ran = read_log(tmp_path / "log.jsonl")
    peak = made.prediction.memory_bytes.by_metric["reserved"].p50

    assert isinstance(ran, Ran)
    assert len(ran.warm) == 8
    assert "Peak  3.0 GiB measured on rank 1" in render_run(made, ran, "run")
    assert run_document(made, ran, "run")["peak_bytes"]["error"] == pytest.approx(peak / (3 * 2**30) - 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "the run ended without a step"), ('{"step": 0, "loss"', "line 1 of the run is not a step"), ('{"step": 0}\n', "line 1 of the run is not")],
)
def test_a_broken_log_is_refused(tmp_path: Path, text: str, words: str) -> None:
    """One sentence."""
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(InputError, match=words):
        read_log(tmp_path / "log.jsonl")


def test_what_cannot_be_run_here_is_refused(made: Plan, folder: Path, tmp_path: Path, call) -> None:
    """Exit code 2 and what to do instead: plans for GPUs, for several nodes, folders of others and of other engines."""
    gpus, nodes = (made.model_copy(update={"cluster": parse_cluster(c)}) for c in ("2xH100-SXM", "2x1xcpu"))
    limit = gpus.cluster.device.memory_bytes
    memory = made.prediction.memory_bytes.model_copy(update={"capacity": limit, "limit": limit})
    gpus = gpus.model_copy(update={"prediction": gpus.prediction.model_copy(update={"memory_bytes": memory})})
    for name, p in (("gpus", gpus), ("nodes", nodes)):
        p.save(tmp_path / f"{name}.json")
    (tmp_path / "engine").mkdir()
    for name in ("plan.json", "run.sh"):
        (tmp_path / "engine" / name).write_text((folder / "plan.json").read_text())
    cases = (
        ((tmp_path / "nodes.json",), "the plan is for 2 nodes, and run starts one: emit it, then on each of them NODE_RANK=0"),
        ((tmp_path,), "was not written by emit: it has no plan.json"),
        ((tmp_path / "engine",), "is for another engine"),
        ((tmp_path / "none.json",), "does not exist"),
        ((folder, "--steps", 0), "--steps must be at least 1, not 0"),
        ((folder, "-o", tmp_path / "x"), "is a folder already, and is run where it is"),
    )
    import torch

    if not torch.cuda.is_available():
        cases = (*cases, ((tmp_path / "gpus.json",), "the plan needs 2 GPUs on this machine, which has 0: plan with --cluster 2xcpu"))
    for arguments, words in cases:
        code, out, err = call("run", *arguments)
        assert (code, out) == (2, ""), err
        assert words in err.strip().splitlines()[-1]


def test_compare_reads_a_trace(made: Plan, tmp_path: Path, call) -> None:
    """meshwright compare plan.json trace.json, as text and as JSON; a file that is no trace is one sentence and exit code 2."""
    made.save(tmp_path / "plan.json")
    rows = [("user_annotation", "ProfilerStep#3", 0, 1e6), ("cpu_op", "aten::mm", 1e5, 5e5), ("user_annotation", "gloo:all_reduce", 4e5, 4e5)]
    events = [{"ph": "X", "cat": c, "name": n, "pid": 1, "tid": 1, "ts": a, "dur": d, "args": {}} for c, n, a, d in rows]
    (tmp_path / "trace.json").write_text(json.dumps({"schemaVersion": 1, "traceEvents": events}))
    code, out, err = call("compare", tmp_path / "plan.json", tmp_path / "trace.json")
    told = json.loads(call("compare", tmp_path / "plan.json", tmp_path / "trace.json", "--json")[1])
    refused = call("compare", tmp_path / "plan.json", tmp_path / "plan.json")

    assert code == 0, err
    assert out.startswith("Step  1 s measured, ")
    assert {r["category"]: r["measured_s"] for r in told["categories"]}["data parallel"] == pytest.approx(0.2)
    assert (refused[0], refused[1]) == (2, "")
    assert "not what torch.profiler's export_chrome_trace writes" in refused[2].strip().splitlines()[-1]
