"""The plan document: round trip, verification, and what a broken file is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY
from transformers import LlamaConfig

from meshwright.planner.plan import Layout, Plan, Workload
from meshwright.planner.solve import plan as make_plan
from meshwright.planner.solve import plan_of
from meshwright.profiling.cluster import Cluster, parse_cluster
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelGraph
from meshwright.profiling.trace import trace


@pytest.fixture(scope="module")
def plan(tiny_llama: ModelGraph) -> Plan:
    """The tiny Llama on tp=2, pp=2 of eight GPUs: every part of a plan is in use."""
    fix = {"tp": 2, "pp": 2, "zero": 3, "vpp": 1, "schedule": "1f1b"}
    made = make_plan(tiny_llama, "8xH100-SXM", global_batch=8, seq=32, precision="fp32", fix=fix)
    assert isinstance(made, Plan)
    return made


@pytest.fixture(scope="module")
def free_plan(tiny_llama: ModelGraph) -> Plan:
    """With two chunks a rank, context parallelism, ZeRO in groups of replicas."""
    fix = {"tp": 1, "pp": 2, "vpp": 2, "schedule": "interleaved", "cp": 2, "cp_kind": "ring", "zero": 3, "replicas": 2, "offload": "none"}
    made = make_plan(tiny_llama, "8xH100-SXM", global_batch=8, seq=32, precision="fp32", fix=fix)
    assert isinstance(made, Plan), made
    return made


def test_round_trip(plan: Plan, tmp_path: Path) -> None:
    """A saved plan loads as the same plan, and writes the same text again."""
    path = tmp_path / "plan.json"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded.to_json() == plan.to_json() == path.read_text()
    assert loaded.layout == plan.layout
    assert plan.verify() == []


def test_round_trip_of_a_free_plan(free_plan: Plan, tmp_path: Path) -> None:
    """So does one with chunks, parts of the sequence and replicas."""
    free_plan.save(tmp_path / "plan.json")

    assert Plan.load(tmp_path / "plan.json") == free_plan
    assert [len(s.chunks) for s in free_plan.solution.stages] == [2, 2]


def test_recompute_of_layers(plan: Plan) -> None:
    """A plan that says no recompute of its stages has the layout's; a stage's own may be of its first layers only."""
    data = json.loads(plan.to_json())
    data["solution"]["layout"]["recompute"] = "full"
    for s in data["solution"]["stages"]:
        del s["recompute"]
    data["alternatives"] = []
    old = Plan.from_json(json.dumps(data))
    assert [s.recompute for s in old.solution.stages] == ["full", "full"]
    stage = old.solution.stages[0]
    assert [stage.recompute_of(i) for i in range(2)] == ["full", "full"]
    assert [stage.model_copy(update={"recompute_layers": 1}).recompute_of(i) for i in range(2)] == ["full", "none"]
    data["solution"]["layout"]["recompute"] = "by stage"
    data["solution"]["stages"][0] |= {"recompute": "full", "recompute_layers": 1}
    data["solution"]["stages"][1] |= {"recompute": "selective"}
    assert Plan.from_json(json.dumps(data)).verify() == []


def test_the_plan_of_a_layout_keeps_its_loss(tmp_path: Path) -> None:
    """On a device that holds the loss in chunks only, a plain one does not fit; it is not planned in chunks."""
    config = LlamaConfig(**TINY | {"vocab_size": 65536})
    config.architectures = ["LlamaForCausalLM"]
    path = tmp_path / "llama.json"
    path.write_text(json.dumps(config.to_dict(), default=str))
    graph, workload = trace(str(path), seq=128, precision="bf16"), Workload(global_batch=16, seq=128, precision="bf16")
    roomy = parse_cluster("1xH100-SXM")
    x = Layout(micro_batch=16)
    made = [plan_of(graph, roomy, workload, x.model_copy(update={"loss": loss}))[1] for loss in ("plain", "chunked")]
    plain, chunked = (p.prediction.memory_bytes.peak.p95 for p in made)
    assert [p.layout.loss for p in made] == ["plain", "chunked"]
    assert chunked < plain
    (node,) = roomy.nodes
    device = node.spec.model_copy(update={"memory_bytes": (plain + chunked) / 2})
    tight = Cluster(name="tight", nodes=(node.model_copy(update={"device": device}),))
    assert plan_of(graph, tight, workload, x.model_copy(update={"loss": "chunked"}))[1].layout.loss == "chunked"
    with pytest.raises(InputError, match="does not fit"):
        plan_of(graph, tight, workload, x)


Edit = Callable[[dict[str, Any]], None]


def put(value: Any, *where: str | int) -> Edit:
    def edit(data: dict[str, Any]) -> None:
        at: Any = data
        for key in where[:-1]:
            at = at[key]
        assert at[where[-1]] != value
        at[where[-1]] = value

    return edit


EDITS: dict[str, tuple[Edit, str]] = {
    "degree": (put(4, "solution", "layout", "tp"), "solution.layout"),
    "batch": (put(7, "workload", "global_batch"), "solution.layout"),
    "sp without tp": (lambda d: d["solution"]["layout"].update(tp=1, sp=True, dp=4), "solution.layout.sp"),
    "mesh": (put(99, "solution", "mesh", "shard"), "solution.mesh"),
    "stage gap": (put([3, 4], "solution", "stages", 1, "layers"), "solution.stages[1].layers"),
    "stage missing": (lambda d: d["solution"]["stages"].pop(), "solution.stages"),
    "layers lost": (put([2, 3], "solution", "stages", 1, "layers"), "solution.stages"),
    "layer paths": (lambda d: d["model"]["layer_paths"].pop(), "model.layer_paths"),
    "no program": (put(None, "solution", "program"), "solution.program"),
    "output never made": (put("nowhere", "solution", "program", "output"), "solution.program.output"),
    "program target": (put("eval:1", "solution", "program", "stem", 0, "target"), "solution.program.stem[0].target"),
    "layer twice": (lambda d: d["solution"]["layer_shardings"].append(d["solution"]["layer_shardings"][0]), "solution.layer_shardings"),
    "memory parts": (lambda d: d["prediction"]["memory_bytes"]["by_kind"].update(extra=1e9), "prediction.memory_bytes.by_kind"),
    "time parts": (lambda d: d["prediction"]["time_s"].update(extra=1.0), "prediction.time_s"),
    "quantiles": (put(1e9, "prediction", "step_s", "p05"), "prediction.step_s"),
    "limit": (put(1.0, "prediction", "memory_bytes", "limit"), "prediction.memory_bytes"),
    "no stage": (put(7, "prediction", "memory_bytes", "peak_stage"), "prediction.memory_bytes.peak_stage"),
    "no number": (put(float("nan"), "prediction", "memory_bytes", "by_kind", "optimizer"), "prediction.memory_bytes.by_kind"),
    "proof": (put(10**6, "solver", "space"), "solver"),
    "recompute of a stage": (put("full", "solution", "stages", 1, "recompute"), "solution.stages[1].recompute"),
    "layers of a stage": (lambda d: d["solution"]["stages"][0].update(recompute_layers=1), "solution.stages[0].recompute"),
    "more layers than the stage": (lambda d: d["solution"]["stages"][0].update(recompute_layers=99), "solution.stages[0].recompute_layers"),
    "chunks without vpp": (lambda d: d["solution"]["stages"][0].update(chunks=[[0, 1], [1, 2]]), "solution.stages[0].chunks"),
    "experts that do not divide": (put(3, "solution", "layout", "ep"), "solution.layout.ep"),
    "copies of no shards": (put(3, "solution", "layout", "replicas"), "solution.layout.replicas"),
    "context ranks": (put(2, "solution", "layout", "cp"), "solution.layout"),
    "first alternative": (put(9, "alternatives", 0, "layout", "micro_batch"), "alternatives[0].layout"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_caught(plan: Plan, name: str) -> None:
    """A plan that was edited into a contradiction is refused, in one line that says where."""
    edit, where = EDITS[name]
    data = json.loads(plan.to_json())
    edit(data)
    broken = Plan.model_validate(data).verify()
    assert any(b.startswith(f"{where}: ") for b in broken), broken
    with pytest.raises(InputError, match="inconsistent") as caught:
        Plan.from_json(json.dumps(data))
    assert "\n" not in str(caught.value)


FREE_EDITS: dict[str, tuple[Edit, str]] = {
    "chunk missing": (lambda d: d["solution"]["stages"][0]["chunks"].pop(), "solution.stages[0].chunks"),
    "first chunk": (put([0, 2], "solution", "stages", 0, "layers"), "solution.stages[0].chunks"),
    "chunk twice": (lambda d: d["solution"]["stages"][1]["chunks"].__setitem__(1, d["solution"]["stages"][0]["chunks"][1]), "solution.stages["),
    "no ZeRO": (put(0, "solution", "layout", "zero"), "solution.layout.replicas"),
    "mesh": (lambda d: d["solution"]["mesh"].pop("cp"), "solution.mesh"),
}


@pytest.mark.parametrize("name", FREE_EDITS)
def test_edits_of_a_free_plan_are_caught(free_plan: Plan, name: str) -> None:
    """The same of a plan with several chunks a rank, context parallelism and replicas."""
    edit, where = FREE_EDITS[name]
    data = json.loads(free_plan.to_json())
    edit(data)
    broken = Plan.model_validate(data).verify()
    assert any(b.startswith(where) for b in broken), broken


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON that can be read: RecursionError"),
        ('{"schema": ' + "9" * 5000 + "}", "is not JSON that can be read: ValueError"),
        ("[]", "is not a plan of schema 'meshwright.plan/1' (found 'list')"),
        ('{"schema": "meshwright.plan/0"}', "(found 'meshwright.plan/0')"),
        ('{"schema": "meshwright.plan/1"}', "created_by is missing"),
    ],
)
def test_broken_files_are_told_why(tmp_path: Path, text: str, words: str) -> None:
    """A file that is no plan is refused in one sentence with its path and the reason."""
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        Plan.load(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_and_wrong_keys_are_named(plan: Plan) -> None:
    """A key that plans do not have, or a value out of range, is named by its path."""
    data = json.loads(plan.to_json())
    data["solution"]["layout"]["zero"] = 7
    with pytest.raises(InputError, match=r"solution\.layout\.zero"):
        Plan.from_json(json.dumps(data))
    data["solution"]["layout"]["zero"] = 3
    data["solution"]["sauce"] = 1
    with pytest.raises(InputError, match=r"solution\.sauce is not a known key"):
        Plan.from_json(json.dumps(data))


def test_missing_files_are_named(plan: Plan, tmp_path: Path) -> None:
    """A plan that does not exist, or a folder that does not, is named."""
    with pytest.raises(InputError, match="does not exist"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="does not exist"):
        plan.save(tmp_path / "none" / "plan.json")
    with pytest.raises(InputError, match="is a folder"):
        plan.save(tmp_path)


def test_folders_are_refused(tmp_path: Path) -> None:
    """A folder is no plan."""
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        Plan.load(tmp_path)


def test_binary_files_are_refused(tmp_path: Path) -> None:
    """A file that is not text is refused as such."""
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(InputError, match="is not text"):
        Plan.load(path)


def test_a_failed_save_leaves_the_old_plan(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If saving fails midway, the plan that was there is intact and nothing else is left behind."""
    path = tmp_path / "plan.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            plan.save(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    plan.save(path)
    assert Plan.load(path).to_json() == plan.to_json()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_figures_of_memory_are_ordered(plan: Plan) -> None:
    """What torch calls allocated is within what it calls reserved, and that within what the driver sees, which is the peak."""
    data = json.loads(plan.to_json())["prediction"]["memory_bytes"]
    allocated, reserved, device = (data["by_metric"][name] for name in ("allocated", "reserved", "device"))
    for quantile in ("p50", "p95"):
        assert 0 < allocated[quantile] <= reserved[quantile] <= device[quantile]
        assert device[quantile] == data["peak"][quantile]
    assert all(metric["p50"] <= metric["p95"] for metric in data["by_metric"].values())
    live = sum(v for k, v in data["by_kind"].items() if k != "reserved")
    assert live <= allocated["p50"]
    assert device["p50"] == pytest.approx(live + data["by_kind"]["reserved"])
