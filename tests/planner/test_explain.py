"""Explanations of saved plans: each price and each refusal against solving it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshwright.planner import explainrun
from meshwright.planner.explainrun import Answer, answer, constraints_of, explain, found_in, load_document, reopen, words
from meshwright.planner.leastmemory import least_memory
from meshwright.planner.plan import Plan
from meshwright.planner.search import Candidate, Search
from meshwright.planner.solve import Infeasible, prepare
from meshwright.planner.solve import plan as make_plan
from meshwright.planner.space import FIXABLE
from meshwright.profiling.cluster import Cluster, Node, load_device
from meshwright.profiling.errors import InputError
from meshwright.report.explain import proof, render_explanation

SEQ = 32
ASKED = {"global_batch": 8, "seq": SEQ, "precision": "fp32"}


def cluster_of(devices: int, memory_bytes: float = 80e9) -> Cluster:
    device = load_device("H100-SXM").model_copy(update={"reserved_bytes": 0.0, "allocator_overhead": 0.0, "memory_bytes": memory_bytes})
    return Cluster(name="made", nodes=(Node(device=device, devices=devices),))


@pytest.fixture(scope="module")
def plan(tiny_llama_config: Path) -> Plan:
    made = make_plan(str(tiny_llama_config), cluster_of(8), **ASKED)  # type: ignore[arg-type]
    assert isinstance(made, Plan)
    return made


@pytest.fixture(scope="module")
def opened(plan: Plan) -> tuple[Search, Candidate]:
    search = reopen(plan)
    return search, found_in(search, plan)


@pytest.fixture(scope="module")
def tight(tiny_llama_config: Path) -> tuple[Plan, Search, Candidate]:
    """A plan on devices with little more than the least memory that anything needs."""
    inputs = prepare(str(tiny_llama_config), cluster_of(4), limit="100%", **ASKED)  # type: ignore[arg-type]
    need = least_memory(inputs.search()).best[0].bytes
    made = make_plan(inputs.graph, cluster_of(4, need * 1.1), limit="100%", **ASKED)  # type: ignore[arg-type]
    assert isinstance(made, Plan)
    search = reopen(made)
    return made, search, found_in(search, made)


def test_a_plan_is_found_again(plan: Plan, opened: tuple[Search, Candidate]) -> None:
    """Traced and solved again, the plan's layout is the best and costs what the plan says; nothing is to be noted."""
    search, best = opened
    assert best.layout == plan.layout
    assert best.step_s == pytest.approx(plan.prediction.step_s.p50, rel=1e-9)
    assert search.run(1).best[0].step_s == pytest.approx(best.step_s, rel=1e-9)
    assert list(explainrun.notes(search, plan, best)) == []


def test_a_plan_with_held_parts_says_so(tiny_llama_config: Path) -> None:
    """Where --fix made the plan, a question may have a price below zero, and the note says why."""
    made = make_plan(str(tiny_llama_config), cluster_of(8), fix={"tp": 8, "recompute": "full"}, **ASKED)  # type: ignore[arg-type]
    assert isinstance(made, Plan)
    found = explain(made, [{"recompute": "none"}])
    assert any("--fix" in note for note in found.notes)
    assert found.answers[0].slower is not None
    assert found.answers[0].slower < 0


@pytest.mark.parametrize("fix", [{"tp": 2}, {"pp": 2, "recompute": "full"}, {"zero": 3}])
def test_the_price_is_that_of_the_solved_plan(plan: Plan, opened: tuple[Search, Candidate], tiny_llama_config: Path, fix: dict[str, object]) -> None:
    """What is held is held, the step is that of planning with --fix, and both sides' parts add up."""
    search, best = opened
    found = answer(search, best, fix)
    solved = make_plan(search.space.graph, cluster_of(8), fix=fix, **ASKED)  # type: ignore[arg-type]
    assert isinstance(solved, Plan)
    assert found.verdict == "costs"
    assert found.other is not None
    assert found.other.step_s == pytest.approx(solved.prediction.step_s.p50)
    assert found.slower == pytest.approx(solved.prediction.step_s.p50 / plan.prediction.step_s.p50 - 1)
    assert all(getattr(found.other.layout, k) == v for k, v in fix.items())
    assert sum(found.other.time_s.values()) == pytest.approx(found.other.step_s)
    assert sum(found.other.memory_bytes.values()) <= found.other.peak_bytes * (1 + 1e-9)
    for key in FIXABLE:
        told = [c for c in found.changed if c.startswith(f"{key}=")]
        assert bool(told) == (getattr(found.other.layout, key) != getattr(best.layout, key))


def test_the_plan_has_it_already(opened: tuple[Search, Candidate]) -> None:
    search, best = opened
    assert answer(search, best, {"tp": best.layout.tp, "zero": best.layout.zero}).verdict == "has it"


@pytest.mark.parametrize(
    ("fix", "why"),
    [({"tp": 3}, "no degrees divide 8 devices"), ({"pp": 8}, "pp=8: the model has 4 layers"), ({"ep": 2}, "ep=2: the model has no experts")],
)
def test_what_no_layout_has_is_told_with_its_reason(opened: tuple[Search, Candidate], fix: dict[str, int], why: str) -> None:
    """The structural reason, and the values that the choice may have."""
    search, best = opened
    found = answer(search, best, fix)
    assert found.verdict == "impossible"
    assert why in found.reason
    key = next(iter(fix))
    values = [int(v) for v in found.possible[0].removeprefix(f"{key} may be ").split(", ")]
    assert fix[key] not in values
    for value in values:
        assert len(search.holding({key: value}).degrees)


def test_heads_that_do_not_divide_are_named(tiny_llama_config: Path) -> None:
    made = make_plan(str(tiny_llama_config), cluster_of(16), **{**ASKED, "global_batch": 16})  # type: ignore[arg-type]
    assert isinstance(made, Plan)
    search = reopen(made)
    found = answer(search, found_in(search, made), {"tp": 16})
    assert found.verdict == "impossible"
    assert "8 attention heads are not divisible by 16" in found.reason


def test_what_does_not_fit_names_the_number_and_what_would(tight: tuple[Plan, Search, Candidate]) -> None:
    """The least that is needed with the choice held, its parts, and changes that fit when they are solved again."""
    made, search, best = tight
    fix = {"zero": 0, "tp": 1, "pp": 1, "cp": 1}
    found = answer(search, best, fix)
    held = search.holding(fix)
    assert found.verdict == "does not fit"
    assert not held.run(1).best
    assert found.needs_bytes == pytest.approx(least_memory(held).best[0].bytes)
    assert found.limit_bytes == pytest.approx(made.prediction.memory_bytes.limit)
    assert found.needs_bytes > found.limit_bytes
    assert found.other is not None
    assert found.other.peak_bytes == pytest.approx(found.needs_bytes)
    assert found.nearest
    for n in found.nearest[:-1]:
        assert n.layout != best.layout
        assert n.peak_bytes <= found.limit_bytes * (1 + 1e-9)
        changed = [k for k in fix if getattr(n.layout, k) != fix[k]]
        assert len(changed) == 1
        assert n.change.startswith(f"{changed[0]}=")
        assert n.step_s == pytest.approx(search.holding({k: v for k, v in fix.items() if k not in changed}).run(1).best[0].step_s)
    assert "devices of" in found.nearest[-1].change


def test_constraints_have_the_plan_s_figures(opened: tuple[Search, Candidate], tight: tuple[Plan, Search, Candidate]) -> None:
    """Memory does not bind where there is plenty; where it does, the step without it is solved. Each stage's figure is its own."""
    plenty = {c.name: c for c in constraints_of(*opened)}
    made, search, best = tight
    scarce = {c.name: c for c in constraints_of(search, best)}
    assert not plenty["memory limit"].binds
    assert scarce["memory limit"].binds
    free = make_plan(search.space.graph, cluster_of(4), limit="100%", **ASKED)  # type: ignore[arg-type]
    assert isinstance(free, Plan)
    assert f"{free.prediction.step_s.p50:.4g} s" in scarce["memory limit"].says
    for i, stage in enumerate(made.solution.stages):
        held = search.reserved_bytes(best.row, stage.live_bytes)[1]
        assert f"{held / 2**30:.1f} of" in scarce[f"stage {i}"].says
    x = best.layout
    assert scarce["global batch"].says.endswith("= 8")
    assert f"dp {x.dp} " in scarce["global batch"].says
    assert scarce["devices"].says.endswith("= 4")


def test_another_model_is_refused(plan: Plan, tmp_path: Path) -> None:
    """A model that is gone, and one that is another now, are each one sentence."""
    gone = plan.model_copy(update={"model": plan.model.model_copy(update={"source": str(tmp_path / "none.json")})})
    with pytest.raises(InputError, match="none.json is not here: explain traces it again"):
        reopen(gone)
    config = json.loads(Path(plan.model.source).read_text())
    (tmp_path / "other.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    other = plan.model_copy(update={"model": plan.model.model_copy(update={"source": str(tmp_path / "other.json")})})
    with pytest.raises(InputError, match="is not the model that was planned .* parameters then"):
        reopen(other)


def test_documents(plan: Plan, tiny_llama_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan and a refusal are each read as what they are; a broken refusal says where."""
    path = tmp_path / "plan.json"
    plan.save(path)
    assert load_document(path) == plan
    monkeypatch.setattr("meshwright.planner.solve.relaxations", lambda *_: iter(()))
    refusal = make_plan(str(tiny_llama_config), cluster_of(2, 1e5), **ASKED)  # type: ignore[arg-type]
    assert isinstance(refusal, Infeasible)
    path.write_text(refusal.model_dump_json(by_alias=True))
    assert load_document(path) == refusal
    path.write_text(json.dumps(json.loads(path.read_text()) | {"needs_bytes": "much"}))
    with pytest.raises(InputError, match="needs_bytes"):
        load_document(path)
    path.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        load_document(path)
    with pytest.raises(InputError, match="does not exist"):
        load_document(tmp_path / "none.json")


def test_rendered_at_a_hundred_columns(plan: Plan, tight: tuple[Plan, Search, Candidate]) -> None:
    """Every kind of answer: nothing is wider than 100 columns, and the figures are the explanation's."""
    made, search, best = tight
    found = explain(plan, [{"tp": 2}, {"pp": 8}, {"tp": plan.layout.tp}], blocks=True)
    refused = answer(search, best, {"zero": 0, "tp": 1, "pp": 1, "cp": 1})
    for text in (
        render_explanation(found),
        render_explanation(explain(made, [])),
        render_explanation(found.model_copy(update={"answers": (refused,)})),
    ):
        assert max(map(len, text.splitlines())) <= 100
    text = render_explanation(found)
    assert isinstance(found.answers[0], Answer)
    assert f"{found.answers[0].slower:+.1%}" in text
    assert "Why not pp=8  impossible: pp=8: the model has 4 layers" in text
    assert "the plan has that already" in text
    assert words({"tp": 2, "sp": True}) == "tp=2 sp=on"


def test_the_certificate_in_words(plan: Plan) -> None:
    """Every count is told, and they add up to the space."""
    c = plan.solver
    text = proof(c)
    for n in (c.space, c.pruned_by_bound, c.evaluated):
        assert f"{n:,}" in text
    assert "none is left open" in text
    assert "the optimum of the cost model" in text
    late = proof(c.model_copy(update={"open": 7, "gap": 0.25}))
    assert "7 are left open" in late
    assert "gap 25.0%" in late
    assert "optimum" not in late
