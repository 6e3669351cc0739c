"""Checks: what is evaluated, what would fit, what changed, and that one broken check does not hide the others."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from meshwright.costmodel.layouts import RECOMPUTE, SCHEDULES
from meshwright.planner import checkrun
from meshwright.planner.check import CheckReport, CheckResult, Versions, against, what_changed
from meshwright.planner.checkconfig import CheckConfig, CheckSpec
from meshwright.planner.checknearest import nearest_train, settled
from meshwright.planner.checkrun import run_checks
from meshwright.planner.explain import enough_memory
from meshwright.planner.plan import Plan, Workload
from meshwright.planner.search import Choice, Search
from meshwright.planner.solve import cost_model, parse_limit
from meshwright.planner.solve import plan as solve
from meshwright.planner.space import Space
from meshwright.profiling.cluster import parse_cluster
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import ModelGraph

GIB = 2**30
FIXED = {"tp": 1, "pp": 1, "dp": 8, "zero": 0, "micro_batch": 64, "recompute": "none", "loss": "plain"}


@pytest.fixture
def run(tiny_llama_config: Path, tiny_llama, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Evaluates one check of the tiny Llama, which is traced once for all tests."""
    monkeypatch.setattr(checkrun, "trace", lambda source, **_: tiny_llama)

    def one(base: CheckReport | None = None, **keys: Any) -> CheckResult:
        told = {"name": "a", "model": str(tiny_llama_config), "cluster": "8xH100-SXM", "seq": 32, "batch": 512, "precision": "fp32"}
        spec = CheckSpec.model_validate(told | keys)
        config = CheckConfig(path=tiny_llama_config.parent / "pyproject.toml", file="pyproject.toml", checks=(spec,))
        return run_checks(config, base, "base.json").results[0]

    return one


def just_below(result: CheckResult, bytes_: float = 2**20) -> str:
    """A limit that is a little less than what a check needs."""
    assert result.figures is not None
    return f"{int(result.figures.peak.p95 - bytes_)}B"


def test_auto_is_what_plan_answers(run, tiny_llama) -> None:  # type: ignore[no-untyped-def]
    """`plan = "auto"` has the layout, the memory and the step of `meshwright plan`."""
    found = run()
    plan = solve(tiny_llama, "8xH100-SXM", global_batch=512, seq=32, precision="fp32")

    assert isinstance(plan, Plan)
    assert found.status == "fits"
    assert found.figures.layout == plan.layout
    assert found.figures.peak == plan.prediction.memory_bytes.peak
    assert found.figures.by_kind == plan.prediction.memory_bytes.by_kind
    assert found.figures.step_s == plan.prediction.step_s.p50


def test_parts_of_a_layout_are_held(run) -> None:  # type: ignore[no-untyped-def]
    """A table holds what it names, and a whole layout is that layout."""
    assert run(plan={"zero": 3, "recompute": "full"}).figures.layout.zero == 3
    x = run(plan=FIXED).figures.layout
    assert {k: getattr(x, k) for k in FIXED} == FIXED


def test_a_failure_tells_its_peak_and_what_would_fit(run) -> None:  # type: ignore[no-untyped-def]
    """It does not fit by a known amount; each setting that is offered was solved, fits, and differs as it says."""
    fits = run(plan=FIXED)
    found = run(plan=FIXED, limit=just_below(fits))
    f = found.figures

    assert found.status == "does_not_fit"
    assert f.peak == fits.figures.peak
    assert f.over_bytes == pytest.approx(2**20, abs=1)
    assert sum(f.by_kind.values()) == pytest.approx(f.peak.p50)
    assert f.peak_event
    assert {"recompute", "micro_batch"} <= {s.change.partition("=")[0] for s in found.nearest}
    for s in found.nearest:
        assert s.peak_bytes <= f.limit_bytes
        again = run(plan={k: getattr(s.layout, k) for k in (*FIXED, "sp")}, limit=just_below(fits), cluster=f"{s.devices}xH100-SXM")
        if s.devices == 8:
            assert again.status == "fits"
            assert again.figures.peak.p95 == pytest.approx(s.peak_bytes)
            assert again.figures.step_s / f.step_s - 1 == pytest.approx(s.slower)


def test_one_thing_changed_is_one_thing(run) -> None:  # type: ignore[no-untyped-def]
    """A setting named recompute, micro_batch, zero or loss changes nothing else of the layout."""
    found = run(plan=FIXED, limit=just_below(run(plan=FIXED)))
    changed = {}
    for s in found.nearest:
        key = s.change.partition("=")[0]
        if key in ("recompute", "micro_batch", "zero", "loss"):
            changed[key] = {k for k in FIXED if getattr(s.layout, k) != getattr(found.figures.layout, k)}

    assert changed
    assert all(names == {key} for key, names in changed.items())


def test_another_degree_is_one_thing(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Degrees that are held settle the one that is not: with another of them only dp follows."""
    monkeypatch.setattr(checkrun, "nearest_train", partial(nearest_train, most=20))
    found = run(plan=FIXED, limit=just_below(run(plan=FIXED)))
    offered = {s.change.partition("=")[0]: s.layout for s in found.nearest if s.change.startswith(("tp=", "cp=", "pp="))}

    assert settled({"tp": 2, "pp": 1, "dp": 2, "zero": 3}, 8) == {"tp": 2, "pp": 1, "dp": 2, "zero": 3, "cp": 2}
    assert settled({"tp": 2, "dp": 2}, 8) == {"tp": 2, "dp": 2}
    assert "tp" in offered
    for key, x in offered.items():
        assert [k for k in ("tp", "cp", "pp") if getattr(x, k) != 1] == [key]
        assert x.dp == 8 // getattr(x, key)
        assert x.loss != "chunked"


def test_the_offer_is_the_cheapest_of_its_kind(run, tiny_llama) -> None:  # type: ignore[no-untyped-def]
    """Brute force: of every value of the changed part that fits, the one offered has the shortest step. Recompute may be of some layers."""
    limit = just_below(run(plan=FIXED))
    offered = {s.change.partition("=")[0]: s for s in run(plan=FIXED, limit=limit).nearest}
    seen = set()
    for key, values in (("recompute", RECOMPUTE), ("micro_batch", (1, 2, 4, 8, 16, 32)), ("zero", (1, 2, 3)), ("loss", ("chunked",))):
        tried = [run(plan=FIXED | {key: v}, limit=limit) for v in values]
        fitting = [t.figures.step_s for t in tried if t.status == "fits"]
        if key == "recompute":
            fitting += some_layers(tiny_llama, limit)
        if key in offered:
            assert offered[key].step_s == pytest.approx(min(fitting))
            seen.add(key)
    assert {"recompute", "micro_batch", "loss"} <= seen


def some_layers(graph: ModelGraph, limit: str) -> list[float]:
    """Steps of the fixed layout with full recompute in its first one, two or three layers, where that fits."""
    cluster = parse_cluster("8xH100-SXM")
    fixed = {k: v for k, v in FIXED.items() if k != "recompute"}
    space = Space(graph, cluster, Workload(global_batch=512, seq=32, precision="fp32"), fixed, cost_model("auto", cluster))
    search = Search(space, parse_limit(limit, cluster.device.memory_bytes))
    (layout,) = space.layouts()
    row = search.row(layout)
    stages, found = search.stages(row), []
    for layers in range(1, len(graph.layers)):
        costs = stages.cost((len(graph.layers),), (Choice(2, layers),))
        if search.reserved_bytes(row, costs[0].live_bytes)[1] <= search.limit_bytes:
            found.append(stages.step(costs))
    return found


def test_nothing_fits_on_these_devices(run) -> None:  # type: ignore[no-untyped-def]
    """With `plan = "auto"` the layout is told that takes least of its device, and no other is left to offer: more of the device's memory."""
    smallest = min(run(plan={"tp": t, "zero": 3, "recompute": r}).figures.peak.p95 for t, r in itertools.product((1, 2, 4), ("none", "full")))
    found = run(limit=f"{int(smallest / 2)}B")

    assert found.status == "does_not_fit"
    assert found.figures.peak.p95 <= smallest
    assert [s.change.partition(" of ")[0] for s in found.nearest] == ["limit"]


def test_memory_enough() -> None:
    """A limit is raised where the device has as much; else the device must be larger, with the same share of it allowed. Rounded up."""
    assert enough_memory(30.01 * GIB, 20 * GIB, 80 * GIB) == "limit of 30.1 GiB instead of 20.0 GiB"
    assert enough_memory(78 * GIB, 40 * GIB, 80 * GIB) == "devices of 156 GiB instead of 80 GiB"
    assert enough_memory(100.1 * GIB, 76 * GIB, 80 * GIB) == "devices of 106 GiB instead of 80 GiB"


def test_a_schedule_is_set_free_too(run) -> None:  # type: ignore[no-untyped-def]
    """What holds GPipe is offered the fastest schedule that fits, and other parts with GPipe kept."""
    held = {"tp": 1, "pp": 2, "dp": 4, "zero": 1, "micro_batch": 8, "recompute": "none", "schedule": "gpipe", "loss": "plain"}
    limit = just_below(run(plan=held))
    found = run(plan=held, limit=limit)
    offered = {s.change.partition("=")[0].strip(): s.layout for s in found.nearest}
    others = {name: run(plan=held | {"schedule": name}, limit=limit) for name in SCHEDULES}
    steps = {name: r.figures.step_s for name, r in others.items() if r.status == "fits"}

    assert found.status == "does_not_fit"
    assert "1f1b" in steps
    assert offered["schedule"].schedule == min(steps, key=lambda name: steps[name])
    assert all(offered[key].schedule == "gpipe" for key in {"recompute", "micro_batch", "zero", "tp"} & set(offered))
    assert len(offered) > 2


def test_a_saved_plan_is_evaluated_on_todays_model(run, tiny_llama, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Cluster, batch, sequence and layout come from the plan; a plan of another model is a warning."""
    plan = solve(tiny_llama, "4xH100-SXM", global_batch=8, seq=32, precision="fp32", fix={"recompute": "full", "tp": 2})
    assert isinstance(plan, Plan)
    plan.save(tmp_path / "plan.json")
    found = run(plan=str(tmp_path / "plan.json"), cluster=None, batch=None, seq=None, precision=None)

    assert found.status == "fits"
    assert found.figures.layout == plan.layout
    assert found.figures.inputs.batch == 8
    assert not found.warnings
    older = json.loads(plan.to_json())
    older["model"]["hash"], older["created_by"]["torch"] = "0" * 12, "1.0"
    (tmp_path / "plan.json").write_text(json.dumps(older))
    found = run(plan=str(tmp_path / "plan.json"), cluster=None, batch=None, seq=None, precision=None)

    assert [w.rule for w in found.warnings] == ["MEM004", "MEM004"]
    assert "another model" in found.warnings[0].text


def test_a_saved_plan_is_offered_another_tensor_parallelism(run, tiny_llama, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Its loss goes with its tensor parallelism, which settles how it is computed: tp = 1 has a plain one, tp > 1 shards of it."""
    fix = {"tp": 4, "pp": 1, "zero": 1, "recompute": "none", "micro_batch": 64}
    plan = solve(tiny_llama, "8xH100-SXM", global_batch=512, seq=32, precision="fp32", fix=fix)
    assert isinstance(plan, Plan)
    plan.save(tmp_path / "plan.json")
    keys = {"plan": str(tmp_path / "plan.json"), "cluster": None, "batch": None, "seq": None, "precision": None}
    found = run(**keys, limit=just_below(run(**keys)))

    assert found.status == "does_not_fit"
    assert any(s.change.startswith("tp=1") for s in found.nearest), [s.change for s in found.nearest]


def test_a_saved_plan_keeps_its_loss(run, tiny_llama, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A plan with a plain loss that does not fit any more does not fit; a loss in chunks is one of the settings that would."""
    plan = solve(tiny_llama, "8xH100-SXM", global_batch=512, seq=32, precision="fp32", fix=FIXED)
    assert isinstance(plan, Plan)
    plan.save(tmp_path / "plan.json")
    keys = {"plan": str(tmp_path / "plan.json"), "cluster": None, "batch": None, "seq": None, "precision": None}
    found = run(**keys, limit=just_below(run(**keys)))

    assert found.status == "does_not_fit"
    assert found.figures.layout == plan.layout
    assert {s.layout.loss for s in found.nearest if s.change.startswith("loss=")} == {"chunked"}
    assert all(s.layout.loss != "chunked" for s in found.nearest if s.change.startswith(("tp=", "micro_batch=", "recompute=")))


def test_an_op_without_a_model_is_named(run, tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """It is counted in the coverage, and a warning names it; the check itself stands."""
    block = tiny_llama.blocks[1]
    odd = block.ops[5].model_copy(update={"kind": "unknown", "target": "mylib::foo"})
    changed = block.model_copy(update={"ops": (*block.ops[:5], odd, *block.ops[6:])})
    graph = tiny_llama.model_copy(update={"blocks": (tiny_llama.blocks[0], changed, *tiny_llama.blocks[2:])})
    monkeypatch.setattr(checkrun, "trace", lambda source, **_: graph)
    found = run()

    assert found.status == "fits"
    assert [w.rule for w in found.warnings] == ["MEM003"]
    assert "mylib::foo x4" in found.warnings[0].text
    assert "4 not modelled: mylib::foo x4" in str(found.coverage)


def test_infer_takes_the_smallest_tp_that_fits(run) -> None:  # type: ignore[no-untyped-def]
    """auto: tp = 1 if that fits, else the next degree; the rest of the devices are replicas that share the batch."""
    roomy = run(mode="infer", cluster="8xcpu", batch=64)
    tight = run(mode="infer", cluster="8xcpu", batch=64, limit=just_below(roomy, 1000))

    assert roomy.status == tight.status == "fits"
    assert (roomy.figures.layout.tp, roomy.figures.layout.dp, roomy.figures.layout.micro_batch) == (1, 8, 8)
    assert tight.figures.layout.tp == 2
    assert roomy.figures.step_s is None


def test_infer_that_does_not_fit(run) -> None:  # type: ignore[no-untyped-def]
    """A held degree that does not fit is answered with one that does."""
    found = run(mode="infer", cluster="8xcpu", batch=64, plan={"tp": 1}, limit=just_below(run(mode="infer", cluster="8xcpu", batch=64), 1000))

    assert found.status == "does_not_fit"
    assert [s.change for s in found.nearest][0] == "tp=2"


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"cluster": "8xH900"}, "H900"),
        ({"cluster": "2x8xH100-SXM", "plan": {"tp": 16}}, "8 attention heads are not divisible by 16"),
        ({"plan": {"tp": 3}}, "tp=3"),
        ({"plan": "gone.json"}, "gone.json does not exist"),
        ({"limit": "100TiB"}, "at most the device's"),
        ({"costs": "gone.costs"}, "gone.costs"),
        ({"mode": "infer", "plan": {"tp": 3}}, "tp=3"),
        ({"mode": "infer", "cluster": "2x8xH100-SXM", "plan": {"tp": 16}}, "8 attention heads are not divisible by 16"),
        ({"mode": "infer", "plan": {"pp": 8}}, "4 layers"),
    ],
)
def test_what_cannot_be_evaluated_is_an_error(run, keys: dict[str, Any], word: str) -> None:  # type: ignore[no-untyped-def]
    """status error, with one sentence that says why."""
    found = run(**keys)

    assert found.status == "error"
    assert word in found.error
    assert "\n" not in found.error


def test_a_model_that_breaks_does_not_hide_the_others(tmp_path: Path, tiny_llama_config: Path) -> None:
    """Whatever the model's own code does (even exit) is its error; the next check is evaluated. Modules are found beside the file."""
    (tmp_path / "bad.py").write_text("import sys\n\ndef build():\n    sys.exit(3)\n\ndef raises():\n    raise OSError('a\\nb')\n")
    (tmp_path / "good_package_of_this_test.py").write_text(
        "import torch\n\ndef build():\n    return torch.nn.Linear(64, 64)\n\ndef sample(batch, seq):\n    return torch.zeros(batch, seq, 64)\n"
    )
    models = {"exits": "bad.py:build", "raises": "bad.py:raises", "gone": "gone.py:build", "good": "good_package_of_this_test:build"}
    checks = tuple(CheckSpec(name=n, model=m, cluster="1xL40S", seq=4, line=i + 1) for i, (n, m) in enumerate(models.items()))
    report = run_checks(CheckConfig(path=tmp_path / "pyproject.toml", file="pyproject.toml", checks=checks))

    assert [r.status for r in report.results] == ["error", "error", "error", "fits"]
    assert report.exit_code == 2
    assert "SystemExit" in report.results[0].error
    assert report.result("good").figures.inputs.batch == 1  # as many as there are devices


def test_growth_against_a_base(run) -> None:  # type: ignore[no-untyped-def]
    """max_increase in percent and in bytes; what changed is named; a check without it never grew too much."""
    before = run(plan=FIXED)
    base = CheckReport.of([before], "pyproject.toml")
    more = FIXED | {"micro_batch": 1, "recompute": "full"}

    assert run(base, plan=FIXED, max_increase="0%").status == "fits"
    smaller = CheckReport.of([run(plan=more)], "pyproject.toml")
    grew = run(smaller, plan=FIXED, max_increase="0.0001%")
    assert grew.status == "grew"
    assert {"micro_batch 1 -> 64", "recompute full -> none"} <= set(grew.growth.changed)
    assert any(c.startswith("activations +") for c in grew.growth.changed)
    assert run(smaller, plan=FIXED, max_increase="1GiB").status == "fits"
    assert run(smaller, plan=FIXED).status == "fits"
    assert run(base, plan=more, max_increase="0%").status == "fits"  # it shrank


def test_what_changed_names_inputs(run) -> None:  # type: ignore[no-untyped-def]
    """Inputs first: sequence, parameters, cluster."""
    was = run(plan=FIXED).figures
    inputs = was.inputs.model_copy(update={"seq": 64, "numel": 2 * was.inputs.numel, "cluster": "8xL40S"})
    told = what_changed(was, was.model_copy(update={"inputs": inputs}))

    assert told[0] == "cluster 8xH100-SXM -> 8xL40S"
    assert "seq 32 -> 64" in told
    assert any(c.startswith("parameters ") and "->" in c for c in told)
    assert what_changed(was, was) == []


def test_drift_of_versions_is_a_warning(run) -> None:  # type: ignore[no-untyped-def]
    """A base made with another torch is compared, and that is said once."""
    result = run()
    old = Versions.here().model_copy(update={"torch": "1.0"})
    report = CheckReport.of([result], "p.toml", base=CheckReport.of([result], "p.toml", versions=old), base_name="base.json")

    assert [w.rule for w in report.warnings] == ["MEM004"]
    assert "torch 1.0" in report.warnings[0].text
    assert report.exit_code == 0


def test_same_as_base(run) -> None:  # type: ignore[no-untyped-def]
    """Nothing to tell: every check fits, is in both reports and did not change."""
    result = run()
    base = CheckReport.of([result], "p.toml")
    spec = CheckSpec(name="a", model="m", cluster="c", seq=1)

    assert CheckReport.of([against(result, spec, base)], "p.toml", base=base, base_name="b").same_as_base
    assert not CheckReport.of([result], "p.toml").same_as_base
    assert not CheckReport.of([result], "p.toml", base=CheckReport.of([], "p.toml"), base_name="b").same_as_base


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not JSON"),
        ("[]", "not a report"),
        ('{"schema": "meshwright.plan/1"}', "not a report"),
        ('{"schema": "meshwright.check/1"}', "is missing"),
    ],
)
def test_a_base_that_is_no_report(tmp_path: Path, text: str, word: str) -> None:
    """One sentence with the file."""
    path = tmp_path / "base.json"
    path.write_text(text)
    with pytest.raises(InputError, match=word):
        CheckReport.load(path)
    with pytest.raises(InputError, match="does not exist"):
        CheckReport.load(tmp_path / "gone.json")
