"""Traces of torch.profiler beside a plan: every moment counts once, and what cannot be read is said in a sentence."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import SEQ
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from meshwright.planner.plan import Plan, mesh_of
from meshwright.planner.solve import plan
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.intervals import clip, length, subtract, union
from meshwright.profiling.torchtrace import kind_of, operation, read_trace
from meshwright.report.compare import compare, compare_document, render_comparison

NCCL = "ncclDevKernel_{}_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


@pytest.fixture(scope="module")
def made(tiny_llama: ModelGraph) -> Plan:
    """tp=2 and dp=2 on CPUs, with the step of two seconds that the traces below are compared with."""
    found = plan(tiny_llama, "4xcpu", global_batch=16, seq=SEQ, fix={"tp": 2, "pp": 1, "cp": 1, "zero": 3, "recompute": "none"})
    assert isinstance(found, Plan)
    times = {"forward": 0.5, "backward": 1.0, "tensor_parallel": 0.2, "data_parallel": 0.2, "optimizer": 0.1}
    step = found.prediction.step_s.model_copy(update={"p05": 1.5, "p50": 2.0, "p95": 2.5})
    return found.model_copy(update={"prediction": found.prediction.model_copy(update={"step_s": step, "time_s": times})})


def on(made: Plan, **degrees: Any) -> Plan:
    """The plan with another layout, of which nothing but the degrees is read."""
    layout = made.layout.model_copy(update=degrees)
    return made.model_copy(update={"solution": made.solution.model_copy(update={"layout": layout, "mesh": mesh_of(layout)})})


class Rows:
    """A trace of a GPU rank, built event by event; times in microseconds."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def add(self, cat: str, name: str, start: float, end: float, tid: int = 1, **args: Any) -> Rows:
        self.events.append({"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": tid, "ts": start, "dur": end - start, "args": args})
        return self

    def kernel(self, name: str, start: float, end: float, launched: float | None = None, **args: Any) -> Rows:
        number = len(self.events)
        if launched is not None:
            self.add("cuda_runtime", "cudaLaunchKernel", launched, launched + 1, correlation=number)
        return self.add("kernel", name, start, end, tid=7, correlation=number, **args)

    def write(self, path: Path, **told: Any) -> Path:
        text = json.dumps({"schemaVersion": 1, "traceEvents": self.events, **told})
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
        return path


def gpu_step() -> Rows:
    """Two steps of 1000 us. In each: forward 100-300, backward 300-600, a tensor-parallel all_reduce 250-400 of which 250-400 is behind
    compute, a data-parallel reduce_scatter 550-750 of which 600-750 is not, the optimizer 800-900, the rest idle."""
    rows = Rows()
    for i in range(2):
        t = 1000.0 * i
        rows.add("user_annotation", f"ProfilerStep#{i}", t, t + 1000)
        rows.add("cpu_op", "autograd::engine::evaluate_function: MmBackward0", t + 200, t + 290, tid=2)
        rows.add("user_annotation", "Optimizer.step#AdamW.step", t + 700, t + 790)
        rows.kernel("sm90_xmma_gemm_bf16", t + 100, t + 300, launched=t + 50)
        number = len(rows.events) + 1
        rows.add("cuda_runtime", "cudaLaunchKernel", t + 210, t + 211, tid=2, correlation=number)
        rows.add("kernel", "flash_bwd_kernel", t + 300, t + 600, tid=7, correlation=number)
        rows.kernel(NCCL.format("AllReduce_Sum_bf16"), t + 250, t + 400, **{"Collective name": "allreduce", "Process Group Description": "mesh_tp"})
        rows.kernel(NCCL.format("ReduceScatter_Sum_f32"), t + 550, t + 750, **{"Process Group Description": "x", "Process Group Ranks": "[0, 2]"})
        rows.kernel("multi_tensor_apply_kernel", t + 800, t + 900, launched=t + 750)
    return rows


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_each_moment_counts_once(made: Plan, tmp_path: Path, name: str) -> None:
    """Kernels fall to forward, backward and the optimizer by their launch; of communication only what no kernel covers is exposed, by its
    group, which the mesh's name or the ranks tell; the rows add up to the step."""
    path = gpu_step().write(tmp_path / name, distributedInfo={"rank": 0, "world_size": 4})
    found = compare(made, [read_trace(path)]).slowest
    us = {k: round(v * 1e6) for k, v in found.rows.items() if v > 1e-9}

    assert us == {"forward": 200, "backward": 300, "optimizer": 100, "data parallel": 150, "pipeline and idle": 250}
    assert {k: round(v * 1e6) for k, v in found.hidden.items()} == {"tensor parallel": 150, "data parallel": 50}
    assert round(found.step_s * 1e6) == 1000
    assert {k: round(v * 1e6) for k, v in found.kinds.items()} == {"matmul": 200, "attention": 300, "optimizer": 100}


def test_several_ranks(made: Plan, tmp_path: Path) -> None:
    """The slowest rank is shown, with the spread of each row over the ranks; predicted categories are those of the plan."""
    slow = gpu_step()
    for e in slow.events:
        e["ts"], e["dur"] = 2 * e["ts"], 2 * e["dur"]
    paths = [r.write(tmp_path / f"{i}.json", distributedInfo={"rank": i, "world_size": 4}) for i, r in enumerate((gpu_step(), slow))]
    found = compare(made, [read_trace(p) for p in paths])
    told = compare_document(found)
    rows = {r["category"]: r for r in told["categories"]}
    text = render_comparison(found)

    assert told["slowest"]["rank"] == 1
    assert [round(r["step_s"] * 1e6) for r in told["ranks"]] == [1000, 2000]
    assert [round(rows["forward"][k] * 1e6) for k in ("least_s", "measured_s", "most_s")] == [200, 400, 400]
    assert rows["backward"]["predicted_s"] == 1.0
    assert rows["backward"]["error"] == pytest.approx(1.0 / 600e-6 - 1)
    assert sum(r["measured_s"] for r in told["categories"]) == pytest.approx(told["step_s"]["measured"])
    assert text.startswith("Step  2 ms measured, 2 s predicted")
    assert "the slowest of 2: rank 1, median of 2 steps" in text


def test_without_annotations_the_steps_are_asked_for(made: Plan, tmp_path: Path) -> None:
    """A trace without ProfilerStep# is refused with what to say; with --steps it is the mean of so many."""
    rows = gpu_step()
    rows.events = [e for e in rows.events if not e["name"].startswith("ProfilerStep")]
    trace = read_trace(rows.write(tmp_path / "trace.json"))
    with pytest.raises(InputError, match="has no ProfilerStep# annotations .* say how many steps it covers with --steps"):
        compare(made, [trace])
    found = compare(made, [trace], steps=2).slowest

    assert round(found.step_s * 1e6) == 900  # from the first kernel to the last, halved
    assert round(found.rows["forward"] * 1e6) == 200


@pytest.mark.parametrize(
    ("degrees", "args", "op", "row"),
    [
        ({"tp": 2, "dp": 2}, {"Process Group Ranks": "[2, 3]"}, "AllGather", "tensor parallel"),
        ({"tp": 2, "dp": 2}, {"Process Group Ranks": "[1, 3]"}, "AllGather", "data parallel"),
        ({"tp": 1, "dp": 4}, {}, "AllReduce_Sum_f32", "data parallel"),
        ({"tp": 1, "dp": 2, "pp": 2}, {}, "SendRecv", "pipeline and idle"),
        ({"tp": 1, "dp": 2, "cp": 2}, {}, "SendRecv", "context parallel"),
        ({"tp": 1, "dp": 4, "ep": 2}, {"Collective name": "all_to_all"}, "SendRecv", "expert parallel"),
        ({"tp": 2, "dp": 2}, {"Process Group Ranks": "[0, 1, 2, 3]"}, "AllReduce_Sum_f32", "other communication"),
    ],
)
def test_groups_are_told_apart(made: Plan, tmp_path: Path, degrees: dict[str, int], args: dict[str, str], op: str, row: str) -> None:
    """By the ranks of the group, by the operation, or because there is only one group."""
    rows = Rows().add("user_annotation", "ProfilerStep#0", 0, 100).kernel("gemm", 0, 10, launched=0).kernel(NCCL.format(op), 20, 50, **args)
    defaults = {"tp": 1, "sp": False, "dp": 1, "pp": 1, "cp": 1, "ep": 1}
    found = compare(on(made, **{**defaults, **degrees}), [read_trace(rows.write(tmp_path / "trace.json"))]).slowest
    expected = 30 + (60 if row == "pipeline and idle" else 0)

    assert round(found.rows[row] * 1e6) == expected


def test_a_real_trace_of_a_cpu(made: Plan, tmp_path: Path) -> None:
    """A step of a small model, recorded by torch.profiler: compute in all three phases, rows that add up, no communication."""
    model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128))
    optimizer = torch.optim.AdamW(model.parameters())
    path = tmp_path / "trace.json"
    with profile(
        activities=[ProfilerActivity.CPU], schedule=schedule(wait=0, warmup=1, active=3), on_trace_ready=lambda p: p.export_chrome_trace(str(path))
    ) as p:
        for _ in range(4):
            with record_function("work"):
                model(torch.randn(64, 128)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            p.step()
    found = compare(made, [read_trace(path)]).slowest

    assert found.device == "cpu"
    assert found.steps == 3
    assert all(found.rows[row] > 0 for row in ("forward", "backward", "optimizer"))
    assert sum(found.rows.values()) == pytest.approx(found.step_s)
    assert found.kinds["matmul"] > 0
    assert found.rows["tensor parallel"] == found.rows["data parallel"] == 0


def test_waiting_in_an_operator_is_no_compute(made: Plan, tmp_path: Path) -> None:
    """On a CPU an aten operator that waits for a collective counts as communication, of what asked for it."""
    rows = Rows().add("user_annotation", "ProfilerStep#0", 0, 100)
    rows.add("cpu_op", "aten::linear", 0, 20).add("cpu_op", "aten::addmm", 2, 18)
    rows.add("cpu_op", "_c10d_functional::all_reduce", 20, 24).add("cpu_op", "c10d::allreduce_", 21, 23)
    rows.add("cpu_op", "aten::square", 24, 60).add("cpu_op", "_c10d_functional::wait_tensor", 26, 50)
    rows.add("user_annotation", "FSDP::all_gather", 60, 64).add("cpu_op", "c10d::_allgather_base_", 61, 63)
    rows.add("user_annotation", "gloo:all_reduce", 22, 50, tid=9).add("user_annotation", "gloo:all_gather", 62, 90, tid=8)
    found = compare(made, [read_trace(rows.write(tmp_path / "trace.json"))]).slowest
    us = {k: round(v * 1e6) for k, v in found.rows.items() if v > 1e-9}

    assert us == {"forward": 32, "tensor parallel": 26, "data parallel": 28, "pipeline and idle": 14}


BROKEN = {
    "truncated": ('{"schemaVersion": 1, "traceEvents": [{"ph": "X"', "is not whole JSON"),
    "a list": ("[1, 2]", "is another file, not what torch.profiler's export_chrome_trace writes"),
    "an execution trace": ('{"schema": "1.1.1-chakra.0.0.4", "nodes": []}', "is an execution trace, not what"),
    "of another tool": ('{"traceEvents": []}', "is another file"),
    "empty": ('{"schemaVersion": 1, "traceEvents": []}', "has no kernels and no operators"),
    "odd": ('{"schemaVersion": 1, "traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "ts": "x", "dur": 1}]}', "has an event that torch"),
    "binary": ("\x1f\x8bnope", "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_trace_is_refused(tmp_path: Path, what: str) -> None:
    """One sentence that names the file."""
    text, words = BROKEN[what]
    path = tmp_path / "trace.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=f"{path} {words}") as refused:
        read_trace(path)
    assert "\n" not in str(refused.value)


def test_traces_of_another_run_are_refused(made: Plan, tmp_path: Path) -> None:
    """Of another number of ranks, or two of one rank."""
    paths = [gpu_step().write(tmp_path / f"{i}.json", distributedInfo={"rank": 0, "world_size": n}) for i, n in enumerate((4, 4, 8))]
    with pytest.raises(InputError, match="is of a run on 8 ranks, the plan is for 4"):
        compare(made, [read_trace(paths[2])])
    with pytest.raises(InputError, match="are both of rank 0"):
        compare(made, [read_trace(p) for p in paths[:2]])


def test_names_of_kernels_and_collectives() -> None:
    """As they are called on GPUs and CPUs."""
    assert [kind_of(n) for n in ("nvjet_tst_128x256", "flash_fwd_splitkv_kernel", "aten::mm", "vectorized_layer_norm_kernel", "Memcpy DtoD")] == [
        "matmul", "attention", "matmul", "norm", "copy"
    ]  # fmt: skip
    names = ("_allgather_base", "_reduce_scatter_base_", "allreduce", "ncclDevKernel_SendRecv", "alltoall_base_", "send")
    assert [operation(n) for n in names] == ["all_gather", "reduce_scatter", "all_reduce", "send_recv", "all_to_all", "send_recv"]


spans = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8)


@given(spans, spans, st.integers(0, 30), st.integers(0, 30))
def test_intervals_are_sets(a: list[tuple[int, int]], b: list[tuple[int, int]], start: int, end: int) -> None:
    """union, subtract and clip agree with sets of whole seconds."""

    def moments(these: list[tuple[float, float]]) -> set[int]:
        return {t for x, y in these for t in range(int(x), int(y))}

    these, those = union(a), union(b)
    assert moments(these) == moments(a)
    assert moments(subtract(these, those)) == moments(a) - moments(b)
    assert moments(clip(these, start, end)) == moments(a) & set(range(start, end))
    assert length(these) == len(moments(a))
    assert all(x[1] < y[0] for x, y in zip(these, these[1:], strict=False))
