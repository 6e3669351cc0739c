"""Measuring this machine: coverage under a short budget, resuming, refusals, and ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meshwright.profiling.errors import InputError
from meshwright.profiling.hardware import CLASSES, read_profile
from meshwright.profiling.measure import measure, parse_budget
from meshwright.profiling.measure_host import builtin_name
from meshwright.profiling.measure_links import placements
from meshwright.profiling.measure_ops import Pool, build
from meshwright.profiling.measure_shapes import COLLECTIVES, GPU, LINK_CLASSES, OP_CLASSES, Scale, levels, link_samples, samples
from meshwright.profiling.measure_timing import repeats_for, summarise

CPU_SCALE = Scale("cpu", (("fp32",), ("bf16",)), {"fp32": 5e10, "bf16": 1e11}, 1e10, 1e9, 0.4)
GPU_SCALE = Scale("cuda", (("bf16",), ("fp32", "fp16", "fp8")), dict.fromkeys(("bf16", "fp32", "fp16", "fp8"), 5e14), 4e12, 6e10, 2.4)
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_short_budget_covers_every_class(tmp_path: Path) -> None:
    """Classes take turns: a budget of five seconds has samples of each, with medians, spreads and where they come from."""
    seen: list[float] = []
    started = time.monotonic()
    found = measure(tmp_path / "p.yaml", 5.0, device="cpu", progress=lambda share, what: seen.append(share))
    took = time.monotonic() - started

    assert took < 30  # a machine that others use as well
    assert set(found.tables) == set(OP_CLASSES)
    for kind, table in found.tables.items():
        assert np.isfinite(np.stack([table[c] for c in CLASSES[kind] if table[c].dtype != object])).all()
        assert (table["runs"] >= 1).all()
        assert (table["spread"] >= 0).all()
    assert found.provenance["torch"] == str(torch.__version__)
    assert found.provenance["threads"] == 1
    assert found.provenance["runs"][0]["samples"] == found.rows()
    assert found.facts["cores"] == os.cpu_count()
    assert all(a <= b for a, b in pairwise(seen))
    again = read_profile(tmp_path / "p.yaml")
    assert (again.rows(), again.provenance) == (found.rows(), found.provenance)


def test_a_second_run_continues_the_file(tmp_path: Path) -> None:
    """Samples that the file has are not measured again: no key is there twice, and the runs are listed."""
    first = measure(tmp_path / "p.yaml", 0.5, ["norm", "copy"], "cpu")
    second = measure(tmp_path / "p.yaml", 0.5, ["norm", "copy"], "cpu")

    assert second.rows() > first.rows()
    assert len(second.provenance["runs"]) == 2
    for kind, table in second.tables.items():
        keys = list(zip(*(table[c].tolist() for c in CLASSES[kind])))
        assert len(set(keys)) == len(keys)
        assert table["seconds"][: len(first.tables[kind]["seconds"])] == pytest.approx(first.tables[kind]["seconds"], rel=1e-5)


def test_an_interrupted_run_leaves_a_file_to_continue(tmp_path: Path) -> None:
    """Ctrl-C during a run: the file holds every sample so far, and the next run goes on from there."""
    seen: list[str] = []

    def interrupt(share: float, what: str) -> None:
        seen.append(what)
        if what.startswith("7 samples"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "p.yaml", 60.0, ["pointwise", "copy"], "cpu", interrupt)
    assert read_profile(tmp_path / "p.yaml").rows() == 7
    assert measure(tmp_path / "p.yaml", 0.3, ["copy"], "cpu").rows() > 7


def test_samples_of_another_machine_are_not_mixed(tmp_path: Path) -> None:
    """A file measured on another device, or with other threads, is refused with both values."""
    path = tmp_path / "p.yaml"
    measure(path, 0.2, ["copy"], "cpu")
    path.write_text(path.read_text().replace("threads: 1", "threads: 64"))
    with pytest.raises(InputError, match="its samples have threads 64, this run has 1; choose another file with -o"):
        measure(path, 0.2, ["copy"], "cpu")
    path.write_text("notes: mine\n")
    with pytest.raises(InputError, match="is not a hardware profile"):
        measure(path, 0.2, ["copy"], "cpu")
    assert path.read_text() == "notes: mine\n"


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    """Unknown classes, devices and folders, and classes that need ranks, are refused before anything is measured."""
    path = tmp_path / "p.yaml"
    cases: list[tuple[str, dict[str, Any]]] = [
        ("'gemms' is not a class of op; the classes are gemm", {"classes": ["gemms"]}),
        ("'moe' is only imported, not measured", {"classes": ["moe"]}),
        ("collective and pair need more than one rank: start with torchrun", {"classes": ["collective"]}),
        ("device 'tpu' is not known", {"device": "tpu"}),
        ("budget must be above 0", {"budget_s": 0.0}),
        ("the folder .* does not exist", {"output": tmp_path / "none" / "p.yaml"}),
    ]
    for says, options in cases:
        with pytest.raises(InputError, match=says):
            measure(**{"output": path, "budget_s": 1.0, "device": "cpu", **options})
    assert not path.exists()


def test_budgets_are_times() -> None:
    """Seconds, minutes and hours; anything else is refused."""
    assert [parse_budget(t) for t in ("120s", "5m", "1h", "90", "1.5 h")] == [120, 300, 3600, 90, 5400]
    for text in ("", "soon", "-3s", "0s", "5d"):
        with pytest.raises(InputError, match="is not a time like 120s"):
            parse_budget(text)


def test_an_op_that_is_missing_is_noted_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch lacks an op for a dtype, the rest is measured and the provenance says what is missing."""

    def broken(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no such kernel on this device")

    monkeypatch.setattr(torch, "_grouped_mm", broken)
    found = measure(tmp_path / "p.yaml", 0.5, ["grouped_gemm", "copy"], "cpu")

    assert set(found.tables) == {"copy"}
    assert found.provenance["skipped"][-1] == "grouped_gemm grouped_mm fp32: no such kernel on this device"


@pytest.mark.parametrize("kind", OP_CLASSES)
def test_every_op_runs(kind: str) -> None:
    """The smallest keys of every op of every class are calls that run, twice, in every dtype of a CPU."""
    pool = Pool(torch.device("cpu"), 1e6)
    seen = set()
    for key in sorted(samples(kind, CPU_SCALE), key=lambda k: sum(v for v in k.values() if isinstance(v, int))):
        if (key.get("op"), key["dtype"]) not in seen:
            seen.add((key.get("op"), key["dtype"]))
            call = build(kind, key, pool)
            call()
            call()
    assert {d for _, d in seen} == ({"fp32"} if kind == "copy" else {"fp32", "bf16"})


@pytest.mark.parametrize("kind", OP_CLASSES)
def test_grids_are_coarse_first_and_without_repeats(kind: str) -> None:
    """A GPU's keys have the class's columns, none twice; the first few already span the sizes."""
    keys = samples(kind, GPU_SCALE)
    flat = [tuple(k[c] for c in CLASSES[kind]) for k in keys]

    assert len(set(flat)) == len(flat)
    assert 10 < len(flat) <= 20_000
    if kind == "gemm":
        assert {k["dtype"] for k in keys[:27]} == {"bf16"}
        assert {k["m"] for k in keys[:27]} == {128, 1024, 8192}
        assert {k["dtype"] for k in keys} == {"bf16", "fp32", "fp16", "fp8"}
        assert all(k["n"] % 16 == 0 for k in keys if k["dtype"] == "fp8")


def test_a_smaller_budget_has_smaller_samples() -> None:
    """No sample is expected to take more than its share of the budget."""
    assert len(samples("gemm", CPU_SCALE)) > len(samples("gemm", Scale(**{**CPU_SCALE.__dict__, "sample_s": 0.01}))) > 30


def test_levels_are_nested() -> None:
    """Every point comes once, and those of a level come before finer ones."""
    points = [tuple(p.values()) for p in levels({"a": ((1, 2), (3,)), "b": ((1,), (), (9,))}, "x")]

    assert sorted(points[:2]) == [(1, 1), (2, 1)]
    assert points[2] == (3, 1)
    assert sorted(points[3:]) == [(1, 9), (2, 9), (3, 9)]
    assert len(set(GPU["pair"]["bytes"][0])) == 2


def test_groups_span_nodes_in_every_way() -> None:
    """Four ranks on two nodes: pairs inside a node and across, and all four."""
    found = placements(("a", "a", "b", "b"))

    assert found == {(2, 1): [[0, 1], [2, 3]], (2, 2): [[0, 2], [1, 3]], (4, 2): [[0, 1, 2, 3]]}
    assert set(placements(("a",) * 8)) == {(2, 1), (4, 1), (8, 1)}
    for groups in placements(tuple("aabbccdd")).values():
        assert sorted(r for g in groups for r in g) == list(range(8))


def test_messages_divide_among_ranks() -> None:
    """Bytes are whole elements of every rank, also for three and six ranks."""
    keys = link_samples("collective", CPU_SCALE, "gloo", [(3, 1), (6, 1)], 6)

    assert {k["op"] for k in keys} == set(COLLECTIVES)
    assert all(k["bytes"] % (k["ranks"] * (4 if k["dtype"] == "fp32" else 2)) == 0 for k in keys)
    assert len(link_samples("pair", CPU_SCALE, "gloo", [], 4)) % 12 == 0


def test_timing_is_bounded_and_robust() -> None:
    """Repeats fit into the limit; a stray window moves the spread, not the median."""
    repeats = repeats_for(1e-3, 0.05, 2e-3, 15)
    assert repeats.inner * repeats.runs * 1e-3 <= 0.05
    assert repeats_for(10.0, 0.05, 2e-3, 15).runs == 1
    timing = summarise([1.0, 1.0, 1.0, 50.0, 1.0])
    assert (timing.seconds, timing.spread, timing.runs) == (1.0, 0.0, 5)


def test_drivers_names_are_built_in_devices() -> None:
    """What drivers call a GPU, as the name of the built-in device."""
    names = {"NVIDIA H200": "H200-SXM", "NVIDIA H100 80GB HBM3": "H100-SXM", "NVIDIA A100-SXM4-40GB": "A100-SXM-40GB",
             "NVIDIA GeForce RTX 4090": "RTX-4090", "NVIDIA GH200 480GB": "NVIDIA GH200 480GB"}  # fmt: skip
    assert {n: builtin_name(n) for n in names} == names


RANKS = """
import os, sys
for name in ("networkx", "pulp", "highspy", "typer", "rich", "jinja2", "transformers", "ortools"):
    sys.modules[name] = None
import torch
torch.set_num_threads(1)
from meshwright.profiling.measure import main
children = []
for rank in range(4):
    child = os.fork()
    if not child:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
        main(["-o", sys.argv[2], "--budget", "4s", "--classes", "gemm,collective,pair", "--device", "cpu"])
        sys.stdout.flush()
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children))
"""


def test_ranks_measure_collectives_and_pairs(tmp_path: Path) -> None:
    """Four gloo ranks: collectives at groups of 2 and 4, pairs, and ops with all ranks at once; one file, one summary. And all that
    where only torch, numpy, PyYAML and pydantic are installed."""
    path = tmp_path / "p.yaml"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    done = subprocess.run([sys.executable, "-c", RANKS, port, str(path)], env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = read_profile(path)

    assert set(found.tables) == {"gemm", *LINK_CLASSES}
    assert set(found.tables["collective"]["ranks"]) == {2.0, 4.0}
    assert len(set(found.tables["collective"]["op"])) >= 3
    assert (found.tables["pair"]["source"] != found.tables["pair"]["target"]).all()
    assert found.provenance["ops"] == "all 4 ranks at once"
    assert found.provenance["ranks"] == 4
    assert done.stdout.count("samples") == 1
    assert "0% calibrating" in done.stderr
