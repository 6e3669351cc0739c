"""Dry run against truth: small programs on 1 to 4 gloo ranks, each run for real with every allocation recorded.

Three peaks of a training step must be the same number of bytes, on every rank:

(a) the dry run's, on fake tensors in one process;
(b) the tracker's, on real CPU tensors and gloo;
(c) the allocator's: the running sum of what torch's CPU allocator handed out and took back, as torch's profiler recorded it,
    over the bytes that were alive when the record began. At the step's begin it must agree with the tracker to the byte.

(c) leaves out, and no tolerance makes up for it:

- what an operator allocates and frees inside itself, which nobody sees who looks between operators. Products in bf16 (mm packs its
  operands), attention (its accumulators, forward and backward), chunk_cat, layer norm's backward and in-place additions that
  convert do this; in fp32 at most attention's few kB. The test says which, and fails where another operator does;
- gloo's own copies: it reduces and scatters by an all-reduce of a copy, and gathers into copies, where NCCL works in place;
- what Python and checkpoint keep on the host, on a GPU too: 8 bytes for a number that meets a tensor, 5,056 for a generator's state.

gloo lets go of a tensor in its own thread a little after the work is done. The real runs wait for that, or the moment is chance.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers
from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler
from torch._C._profiler import ProfilerActivity, ProfilerConfig, ProfilerState, _EventType, _ExperimentalConfig, _RecordFunctionFast
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from harness import run
from models import SEQ, build, write_models

from meshwright.codegen import measured as measuring
from meshwright.codegen.apply import apply
from meshwright.codegen.dryrun import dry_run
from meshwright.codegen.measured import program_of, track
from meshwright.codegen.tracker import Tracker, storages_of
from meshwright.planner.plan import Plan
from meshwright.planner.solve import plan
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.trace import trace

BATCH = 16
MARK, GLOO, BEGIN = "operator:", "gloo:", "begin of the second step"
NUMBER, STATE = 8, torch.get_rng_state().nbytes  # what Python and checkpoint keep on the host
for _name in ("torch.distributed.tensor._redistribute", "transformers"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore")


@dataclass(frozen=True)
class Case:
    """A model and the layout that its plan must have."""

    model: str
    fix: tuple[tuple[str, Any], ...]
    precision: str = "fp32"

    @property
    def layout(self) -> dict[str, Any]:
        plain = {"tp": 1, "sp": False, "cp": 1, "pp": 1, "vpp": 1, "dp": 1, "zero": 0, "recompute": "none", "schedule": "1f1b"}
        loss = {} if "tp" in dict(self.fix) else {"loss": "plain"}  # sharded classes have a loss of their own
        return {**plain, **loss, "replicas": 1, **dict(self.fix)}

    @property
    def world(self) -> int:
        x = self.layout
        return int(x["tp"] * x["cp"] * x["pp"] * x["dp"])

    def __str__(self) -> str:
        return "-".join([self.model, self.precision, *(f"{k}{v}" for k, v in self.fix)])


def case(model: str, precision: str = "fp32", **fix: Any) -> Case:
    return Case(model, tuple(fix.items()), precision)


CASES = [
    case("llama"), case("gpt2", recompute="full"), case("mixer", recompute="selective"), case("llama", "bf16", recompute="selective"),
    case("llama", dp=2, zero=0), case("qwen3", dp=2, zero=1), case("gpt2", dp=2, zero=2, recompute="full"), case("mixer", dp=2, zero=3),
    case("llama", tp=2), case("qwen3", tp=2, sp=True, recompute="selective"), case("gpt2", tp=2, recompute="full"),
    case("llama", pp=2), case("mixer", pp=2, recompute="full"), case("llama", "bf16", dp=2, zero=3),
    case("llama", tp=2, sp=True, dp=2, zero=1), case("gpt2", pp=2, dp=2, zero=2), case("qwen3", pp=2, tp=2, sp=True, recompute="full"),
    case("llama", pp=4), case("mixer", tp=2, dp=2, zero=3, recompute="selective"), case("llama", "bf16", pp=2, dp=2, zero=1),
    case("llama", pp=2, vpp=2, schedule="interleaved"), case("llama", pp=2, vpp=2, schedule="zbv"), case("llama", pp=2, schedule="zero-bubble"),
    case("llama", pp=2, vpp=2, schedule="dualpipev"), case("llama", dp=4, zero=2, replicas=2), case("llama", loss="chunked"),
    case("mixtral", dp=2, zero=1, ep=2), case("llama", cp=2, cp_kind="ring"), case("llama", cp=2, cp_kind="ulysses", recompute="selective"),
]  # fmt: skip
# What the first rank of a stage holds more than another. The mixer's head has 10 rows of 32 and a bias: 5 on a tensor-parallel rank, 3 and 2
# on its two data-parallel ones, of which the second has both moments of a row less; the parameter itself is padded. And a bias that one
# tensor-parallel rank adds is zeros, 32 of them, on the other.
ROW, ZEROS = 2 * 4 * (32 + 1), 4 * 32
MORE = {case("mixer", tp=2, dp=2, zero=3, recompute="selective"): {0, -ZEROS, ROW, ROW - ZEROS}}


@dataclass
class Truth:
    """One rank's figures in bytes: (b) and (c); what (c) would be with the insides of operators; which of those hold how much."""

    tracked: int
    allocated: int
    inside: int
    hidden: dict[str, int] = field(default_factory=dict)
    disagreed: int = 0  # the allocator's live bytes less the tracker's when the second step began


class Recorded(Tracker):
    """The tracker, with the profiler on, and every operator and the second step's begin marked in its record."""

    made: list[Recorded] = []

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.recording = False
        self.known = self.begun = 0  # bytes alive when the record and when the step began
        self.outputs: dict[str, set[int]] = {}  # by call of a collective: where its outputs lie
        self.sending: list[Any] = []
        Recorded.made.append(self)

    def restart(self) -> None:
        super().restart()
        if self.recording:
            self.begun = self.live_bytes
            with _RecordFunctionFast(BEGIN):
                return
        self.known = self.live_bytes
        self.recording = True
        activities = {ProfilerActivity.CPU}
        config = ProfilerConfig(ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig())  # True: memory
        _prepare_profiler(config, activities)
        _enable_profiler(config, activities)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional":
            self.sending.append(args)
        out = super().__torch_dispatch__(Marked(func, self.outputs), types, args, kwargs)
        if func._schema.name == "_c10d_functional::wait_tensor":
            settle()
            self.sending.clear()
        elif func.namespace == "c10d" and func._schema.name not in ("c10d::send", "c10d::recv_"):
            for x in tree_leaves(out):
                if isinstance(x, torch.ScriptObject) and "Work" in str(x._type()):
                    dist.Work.unbox(x).wait()
                    settle()
        return out


class Marked:
    """An operator that marks its calls in the record; a collective notes in `outputs`, by the mark, where its outputs lie."""

    def __init__(self, func: Any, outputs: dict[str, set[int]]) -> None:
        self.func, self.namespace, self._schema, self.outputs = func, func.namespace, func._schema, outputs

    def __str__(self) -> str:
        return str(self.func)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.namespace not in ("c10d", "_c10d_functional"):
            with _RecordFunctionFast(MARK + str(self.func)):
                return self.func(*args, **kwargs)
        mark = f"{self.func}#{len(self.outputs)}"
        with _RecordFunctionFast(MARK + mark):
            out = self.func(*args, **kwargs)
        self.outputs[mark] = {s.data_ptr() for s in storages_of(out)}
        return out


def settle() -> None:
    """Waits until no other thread of this process runs: gloo lets go of tensors, in its own thread, a little after it is done."""
    me, quiet = str(threading.get_native_id()), 0
    while quiet < 2:
        time.sleep(0.0002)
        states = [Path(f"/proc/self/task/{t}/stat").read_text().rpartition(")")[2].split()[0] for t in os.listdir("/proc/self/task") if t != me]
        quiet = quiet + 1 if all(s == "S" for s in states) else 0


def _on_rank(work: list[tuple[Plan, str]]) -> list[Truth]:
    """On every rank: a step of each plan for real."""
    return [_truth(*w) for w in work]


def _truth(made: Plan, source: str) -> Truth:
    Recorded.made.clear()
    parallel = apply(made, build(source), device="cpu")
    with mock.patch.object(measuring, "Tracker", Recorded):
        measured = track(program_of(parallel))
    [tracker] = Recorded.made
    return _replay(tracker, _disable_profiler().experimental_event_tree(), int(sum(measured.peak[1].values())))


def _replay(tracker: Recorded, record: list[Any], tracked: int) -> Truth:
    """The allocator's peak in the second step, from the record's memory events."""
    events: list[tuple[int, int, int, str, int]] = []  # time, pointer, bytes, the marked operator around it and which call

    def walk(event: Any, name: str, call: int) -> None:
        kind, x = event.typed
        if kind == _EventType.Allocation:
            events.append((event.start_time_ns, x.ptr, x.alloc_size, name, call))
        elif event.name == BEGIN:
            events.append((event.start_time_ns, 0, 0, BEGIN, 0))
        elif event.name.startswith(MARK) and not call:
            name, call = event.name.removeprefix(MARK), event.id
        elif event.name.startswith(GLOO):
            name, call = GLOO, event.id
        for child in event.children:
            walk(child, name, call)

    for event in record:
        walk(event, "", 0)
    events.sort(key=lambda e: e[0])
    held: dict[int, int] = {}  # by pointer: the event that allocated
    inside: set[int] = set()  # events of what an operator allocates and frees inside
    hosts: set[int] = set()  # events of what no operator made: Python's numbers, and the generator's state
    for i, (_, pointer, nbytes, name, call) in enumerate(events):
        if nbytes > 0:
            held[pointer] = i
            if not name and nbytes in (NUMBER, STATE):
                hosts.add(i)
            elif name == GLOO or pointer not in tracker.outputs.get(name, {pointer}):
                inside.add(i)
        elif pointer in held:
            born = held.pop(pointer)
            if born in hosts:
                hosts.add(i)
            elif born in inside or (call and call == events[born][4]):
                inside |= {born, i}
    live = whole = tracker.known
    found = Truth(tracked, 0, 0)
    for i, (_, _, nbytes, name, _) in enumerate(events):
        if name == BEGIN:
            found = Truth(tracked, live, live, disagreed=live - tracker.begun)
        if i in hosts:
            continue
        whole += nbytes
        if i not in inside:
            live += nbytes
        elif nbytes > 0:
            name = name.partition("#")[0]
            found.hidden[name] = max(found.hidden.get(name, 0), nbytes)
        found.allocated, found.inside = max(found.allocated, live), max(found.inside, whole)
    return found


# operators that may hold memory inside, beyond the 8 bytes of a number that meets a tensor
INSIDE = {
    "aten.mm.default", "aten.addmm.default", "aten.bmm.default", "fsdp.chunk_cat.default", "aten.native_layer_norm_backward.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default", "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
    "aten.mul.Tensor", "aten.add_.Tensor",  # of different dtypes
    "aten.sort.default", "aten.histc.default",  # of the router's choice
}  # fmt: skip


class Bench:
    """Plans of all cases, and the real runs, several in one fork."""

    def __init__(self, folder: Path) -> None:
        self.sources = write_models(folder)
        self.graphs: dict[tuple[str, str], ModelGraph] = {}
        self.plans = {c: self._plan(c) for c in CASES}
        self._found: dict[Case, list[Truth]] = {}
        self._dry: dict[Case, list[float]] = {}

    def _plan(self, case: Case) -> Plan:
        key = case.model, case.precision
        if key not in self.graphs:
            self.graphs[key] = trace(self.sources[case.model], seq=SEQ, precision=case.precision)
        fix = case.layout
        if fix["pp"] > 1 or fix["dp"] > 1:
            fix["micro_batch"] = BATCH // fix["dp"] // (2 * fix["pp"])
        made = plan(self.graphs[key], f"{case.world}xcpu", global_batch=BATCH, seq=SEQ, fix=fix, precision=case.precision)
        assert isinstance(made, Plan), made
        return made

    def truth(self, case: Case) -> list[Truth]:
        """By rank."""
        if case not in self._found:
            alike = [c for c in CASES if c.world == case.world]
            ranks = run(case.world, _on_rank, [(self.plans[c], self.sources[c.model]) for c in alike])
            self._found.update({c: [r[i] for r in ranks] for i, c in enumerate(alike)})
        return self._found[case]

    def dry(self, case: Case) -> list[float]:
        """The dry run's peak, by rank; forked, so that two cores share the work."""
        if case not in self._dry:
            ranks = [(c, r) for c in CASES for r in range(c.world)]
            with multiprocessing.get_context("fork").Pool(2) as pool:
                found = pool.starmap(_dry, [(self.plans[c], r) for c, r in ranks], chunksize=1)
            for (c, _), peak in zip(ranks, found, strict=True):
                self._dry.setdefault(c, []).append(peak)
        return self._dry[case]


def _dry(made: Plan, rank: int) -> float:
    return dry_run(made, rank, whole=True).peak_bytes


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("truth"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_peaks_are_the_allocators(bench: Bench, case: Case) -> None:
    """On every rank the tracker's peak is the allocator's, to the byte, and the dry run of that rank finds the same."""
    for truth, dry in zip(bench.truth(case), bench.dry(case), strict=True):
        assert truth.disagreed == 0
        assert truth.tracked == truth.allocated
        assert dry == truth.allocated


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_known_operators_hold_memory_inside(bench: Bench, case: Case) -> None:
    """Nothing but the operators that are named above, and gloo, takes memory that the tracker cannot see."""
    for truth in bench.truth(case):
        unseen = {n for n, most in truth.hidden.items() if most > NUMBER and not n.startswith((GLOO, "c10d.", "_c10d_functional."))}
        assert unseen <= INSIDE


def test_ranks_of_a_stage_are_alike(bench: Bench) -> None:
    """Ranks of one pipeline stage hold the same, but for what they cannot share evenly: the first one's dry run speaks for its stage."""
    for case in CASES:
        found = [t.allocated for t in bench.truth(case)]
        per_stage = case.world // case.layout["pp"]
        for i in range(0, case.world, per_stage):
            assert {found[i] - x for x in found[i : i + per_stage]} == MORE.get(case, {0}), case


def test_experts(tmp_path: Path) -> None:
    """The same holds for a model of experts, whose grouped products run in fp32 though their fake kernel refuses it."""
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, vocab_size=64,
        max_position_embeddings=32, num_local_experts=4, num_experts_per_tok=2, architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    path = tmp_path / "mixtral.json"
    path.write_text(json.dumps(config.to_dict(), default=str))
    made = plan(str(path), "2xcpu", global_batch=8, seq=SEQ, fix={"dp": 2, "zero": 3, "micro_batch": 2}, precision="fp32")
    assert isinstance(made, Plan)
    for rank, [truth] in enumerate(run(2, _on_rank, [(made, str(path))])):
        assert (truth.disagreed, truth.tracked) == (0, truth.allocated)
        assert dry_run(made, rank, whole=True).peak_bytes == truth.allocated
