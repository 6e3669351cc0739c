"""Traces of torch.profiler: what one rank computed and sent, and when its steps began.

On a GPU the events are kernels, which belong to forward, backward or the optimizer by where they were launched. On a CPU they are the
outermost aten operators, and what gloo did on its threads.
"""

from __future__ import annotations

import gzip
import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from meshwright.profiling.errors import InputError
from meshwright.profiling.intervals import subtract

Phase = Literal["forward", "backward", "optimizer", "communication"]
Raw = dict[str, Any]

# Kinds of compute by the name of a kernel or operator; the first that matches.
KINDS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("attention", r"flash|fmha|attention|sdpa|cudnn_generated_fort_native_sdpa"),
        ("matmul", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|splitk|aten::(linear|mm|bmm|addmm|matmul|baddbmm|_grouped_mm)|grouped_mm"),
        ("loss", r"softmax|nll|cross_entropy"),
        ("norm", r"norm"),
        ("optimizer", r"multi_tensor_apply|fused_adam|adam"),
        ("copy", r"memcpy|memset|copy|::cat|catarray|chunk_cat|split_with_sizes|::to$|_to_copy|::clone|::zero_|::fill_"),
    )
)
COLLECTIVES = re.compile(
    r"(all_?gather|all_?reduce|reduce_?scatter|all_?to_?all|alltoall|send_?recv|send|recv|broadcast|barrier|reduce|gather|scatter)", re.IGNORECASE
)
OP = {"sendrecv": "send_recv", "send": "send_recv", "recv": "send_recv", "alltoall": "all_to_all"}
WAITS = re.compile(r"^(_c10d_functional(_autograd)?::wait_tensor|c10d::)")
LAUNCHES = re.compile(r"^c10d::(.+?)_*$")


@dataclass(frozen=True)
class Event:
    """Something that ran, in seconds on the trace's clock. Communication has its operation and, where the trace says them, the ranks
    of its group and the dimension of the device mesh; `within` is the annotation or operator that asked for it."""

    start: float
    end: float
    phase: Phase
    kind: str
    dimension: str = ""
    ranks: tuple[int, ...] = ()
    within: str = ""


@dataclass(frozen=True)
class Trace:
    """One rank's trace. `steps` are the times at which its steps began, and the end of the last; empty where it is not annotated."""

    path: str
    rank: int | None
    world: int | None
    device: Literal["cuda", "cpu"]
    events: tuple[Event, ...]
    steps: tuple[float, ...]


def read_trace(path: str | Path) -> Trace:
    """Reads trace.json or trace.json.gz. InputError where it is no Chrome trace of torch.profiler, or has nothing that ran."""
    data = _load(Path(path))
    rows = data.get("traceEvents") if isinstance(data, dict) else None
    if not isinstance(rows, list) or "schemaVersion" not in data:
        what = "an execution trace" if isinstance(data, dict) and "nodes" in data else "another file"
        raise InputError(f"{path} is {what}, not what torch.profiler's export_chrome_trace writes")
    try:
        spans = [e for e in rows if isinstance(e, dict) and e.get("ph") == "X" and float(e.get("dur", 0)) >= 0 and "ts" in e]
        kernels = [e for e in spans if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        events = list(_gpu(spans, kernels) if kernels else _cpu(spans))
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise InputError(f"{path} has an event that torch.profiler would not write: {type(e).__name__}: {e}") from None
    if not any(e.phase != "communication" for e in events):
        raise InputError(f"{path} has no kernels and no operators: profile with activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]")
    told = data.get("distributedInfo") or {}
    rank, world = (told.get(k) if isinstance(told, dict) else None for k in ("rank", "world_size"))
    return Trace(str(path), rank, world, "cuda" if kernels else "cpu", tuple(events), _steps(spans, bool(kernels)))


def _load(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"trace {path} does not exist")
    try:
        raw = path.read_bytes()
        return json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (OSError, EOFError) as e:
        raise InputError(f"trace {path} cannot be read: {e}") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"trace {path} is not whole JSON: {e}") from None


def _seconds(e: Raw) -> tuple[float, float]:
    return e["ts"] * 1e-6, (e["ts"] + e["dur"]) * 1e-6


def _steps(spans: list[Raw], gpu: bool) -> tuple[float, ...]:
    """Where each ProfilerStep# begins, and where the last ends; on a GPU as its own annotations say, which follow the kernels."""
    named = [e for e in spans if str(e.get("name", "")).startswith("ProfilerStep#")]
    for kind in ("gpu_user_annotation", "user_annotation"):
        found = sorted({_seconds(e) for e in named if e.get("cat") == kind})
        if found and (gpu or kind == "user_annotation"):
            return (*(a for a, _ in found), max(b for _, b in found))
    return ()


class _Inside:
    """Which annotation a moment of a thread lies in. `spans` must not overlap on one thread, but for those that begin another."""

    def __init__(self, spans: Iterable[Raw]) -> None:
        self.rows: dict[Any, list[tuple[float, float, str]]] = defaultdict(list)
        for e in spans:
            self.rows[e["pid"], e["tid"]].append((*_seconds(e), str(e["name"])))
        for key, rows in self.rows.items():
            outer: list[tuple[float, float, str]] = []
            for row in sorted(rows, key=lambda r: (r[0], -r[1])):
                if not outer or row[0] >= outer[-1][1]:
                    outer.append(row)
            self.rows[key] = outer
        self.starts = {key: [r[0] for r in rows] for key, rows in self.rows.items()}

    def name(self, thread: Any, moment: float) -> str:
        """The outermost one, empty if there is none."""
        i = bisect_right(self.starts.get(thread, []), moment) - 1
        return self.rows[thread][i][2] if i >= 0 and moment < self.rows[thread][i][1] else ""


def _phases(spans: list[Raw]) -> tuple[_Inside, _Inside]:
    """The optimizer's annotations, and autograd's nodes."""
    optimizer = _Inside(e for e in spans if str(e.get("name", "")).startswith("Optimizer.step#"))
    return optimizer, _Inside(e for e in spans if str(e.get("name", "")).startswith("autograd::engine::evaluate_function"))


def _phase(thread: Any, moment: float, optimizer: _Inside, backward: _Inside) -> Phase:
    return "optimizer" if optimizer.name(thread, moment) else "backward" if backward.name(thread, moment) else "forward"


def kind_of(name: str) -> str:
    """What a kernel or operator computes, by its name."""
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "pointwise and reductions")


def operation(name: str) -> str:
    """The collective in a name, as all_gather, all_reduce, reduce_scatter, all_to_all, send_recv or another; empty if there is none."""
    match = COLLECTIVES.search(name)
    if not match:
        return ""
    plain = match[1].lower().replace("_", "")
    known = {"allgather": "all_gather", "allreduce": "all_reduce", "reducescatter": "reduce_scatter", **OP}
    return known.get(plain, plain)


# --- GPUs --------------------------------------------------------------------------------------------------------------


def _gpu(spans: list[Raw], kernels: list[Raw]) -> Iterator[Event]:
    optimizer, backward = _phases(spans)
    launches = {e["args"]["correlation"]: e for e in spans if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})}
    for e in kernels:
        args, name = e.get("args", {}), str(e["name"])
        if re.match(r"nccl", name, re.IGNORECASE):
            described = str(args.get("Process Group Description", ""))
            dimension = described.removeprefix("mesh_") if described.startswith("mesh_") else ""
            op = operation(str(args.get("Collective name", ""))) or operation(name)
            yield Event(*_seconds(e), "communication", op, dimension, _ranks(args.get("Process Group Ranks")), described)
            continue
        launch = launches.get(args.get("correlation"))
        phase: Phase = "forward"
        if launch is not None:
            phase = _phase((launch["pid"], launch["tid"]), launch["ts"] * 1e-6, optimizer, backward)
        yield Event(*_seconds(e), phase, kind_of(name))


def _ranks(text: Any) -> tuple[int, ...]:
    """ "[0, 2, 4]" as numbers; torch shortens long lists with dots, of which nothing is taken."""
    if isinstance(text, list):
        return tuple(int(r) for r in text)
    return tuple(int(r) for r in re.findall(r"\d+", str(text or ""))) if "..." not in str(text or "") else ()


# --- CPUs --------------------------------------------------------------------------------------------------------------


def _cpu(spans: list[Raw]) -> Iterator[Event]:
    optimizer, backward = _phases(spans)
    operators = [e for e in spans if e.get("cat") == "cpu_op" and re.match(r"(aten|fsdp)::", str(e.get("name", "")))]
    outermost = _Inside(operators)
    # an operator on a tensor that is still on its way waits for it
    waiting = _Inside(e for e in spans if WAITS.match(str(e.get("name", ""))))
    for thread, rows in outermost.rows.items():
        waits = [(a, b) for a, b, _ in waiting.rows.get(thread, [])]
        for a, b, name in rows:
            near = waits[max(bisect_right(waits, (a, a)) - 1, 0) : bisect_right(waits, (b, b))]
            for start, end in subtract([(a, b)], near):
                yield Event(start, end, _phase(thread, a, optimizer, backward), kind_of(name))
    yield from _gloo(spans)


def _gloo(spans: list[Raw]) -> Iterator[Event]:
    """What gloo ran. Its events name no group: the operator or annotation that asked for each, the next of its kind, stands for it."""
    asked_in = _Inside(e for e in spans if str(e.get("name", "")).startswith(("FSDP::", "_c10d_functional::", "_c10d_functional_autograd::")))
    asked: dict[str, list[str]] = defaultdict(list)
    for e in sorted(spans, key=lambda e: e["ts"]):
        match = LAUNCHES.match(str(e.get("name", "")))
        if match:
            asked[_as_gloo(operation(match[1]))].append(asked_in.name((e["pid"], e["tid"]), e["ts"] * 1e-6))
    ran = sorted((e for e in spans if str(e.get("name", "")).startswith("gloo:")), key=lambda e: e["ts"])
    for e in ran:
        op = operation(str(e["name"]).removeprefix("gloo:"))
        waiting = asked[_as_gloo(op)]
        yield Event(*_seconds(e), "communication", op, within=waiting.pop(0) if waiting else "")


def _as_gloo(op: str) -> str:
    """gloo reduces and scatters by an all_reduce."""
    return "all_reduce" if op == "reduce_scatter" else op
