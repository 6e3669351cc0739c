"""A check report that no cost model made, with every status, so that the goldens of its formats stay as they are."""

from __future__ import annotations

from meshwright.planner.check import CheckReport, CheckResult, Figures, Finding, Inputs, Setting, Versions, against
from meshwright.planner.checkconfig import CheckSpec
from meshwright.planner.plan import Layout, Range
from meshwright.profiling.graph import Coverage

GIB = 2**30
VERSIONS = Versions(meshwright="1.2.3", torch="2.13.0", transformers="5.23.0")
OLDER = VERSIONS.model_copy(update={"torch": "2.12.1"})
COVERAGE = Coverage(ops=412, modelled=405, free=6, unknown={"mylib::foo": 1})


def figures(p95_gib: float, *, seq: int = 8192, numel: int = 8_030_261_248, limit_gib: float = 76.0, infer: bool = False, **kinds: float) -> Figures:
    """A layout whose memory is exactly this."""
    by_kind = {k: v * GIB for k, v in kinds.items()}
    p50 = sum(by_kind.values())
    return Figures(
        inputs=Inputs(
            model="train/model.py:build", cluster="8xH100-SXM", devices=8, batch=128, seq=seq, precision="bf16", numel=numel, layers=32,
            hash="0123456789ab",
        ),
        layout=Layout(tp=1, dp=8, zero=0 if infer else 3, micro_batch=2), peak=Range(p05=p50, p50=p50, p95=p95_gib * GIB),
        capacity_bytes=80 * GIB, limit_bytes=limit_gib * GIB, by_kind=by_kind,
        peak_event="forward of the prompt" if infer else "backward of the loss", step_s=None if infer else 15.4 * seq / 8192,
    )  # fmt: skip


def setting(change: str, gib: float, slower: float | None, **layout: object) -> Setting:
    x = Layout.model_validate({"dp": 8, "zero": 3, "micro_batch": 2} | layout)
    return Setting(
        change=change, layout=x, devices=x.devices, peak_bytes=gib * GIB, step_s=None if slower is None else 15.4 * (1 + slower), slower=slower
    )


def result(name: str, status: str, line: int, **rest: object) -> CheckResult:
    return CheckResult.model_validate({"name": name, "status": status, "file": "pyproject.toml", "line": line} | rest)


def base_report() -> CheckReport:
    """What the base branch needed."""
    return CheckReport.of(
        [
            result("pretrain-8b", "fits", 14, figures=figures(74.9, parameters=6.5, optimizer=7.5, activations=38.0, temporaries=10.4)),
            result("sft-8b", "fits", 24, figures=figures(41.0, parameters=6.5, optimizer=7.5, activations=20.1)),
            result("serve-8b", "fits", 34, mode="infer", figures=figures(41.0, infer=True, weights=15.0, kv_cache=20.0)),
            result("retired", "fits", 44, figures=figures(10.0, parameters=8.0)),
        ],
        "pyproject.toml", versions=OLDER,
    )  # fmt: skip


def report() -> CheckReport:
    """One check of each kind, compared with base_report()."""
    nearest = (
        setting("micro_batch=1", 66.9, 0.004, micro_batch=1),
        setting("tp=2 sp=on", 55.0, 0.061, tp=2, sp=True, dp=4),
        setting("recompute=full", 57.0, 0.18, recompute="full"),
        setting("plan = auto", 69.5, 0.0, micro_batch=1, recompute="selective"),
        setting("16 devices (2 nodes)", 71.2, -0.48, dp=16),
    )
    made = [
        result(
            "pretrain-8b", "does_not_fit", 14, plan="tp=1,zero=3,micro_batch=2",
            figures=figures(84.1, seq=10240, parameters=6.5, optimizer=7.5, activations=45.9, temporaries=10.4), nearest=nearest, coverage=COVERAGE,
            warnings=(Finding(rule="MEM003", text="not modelled, counted by the bytes of their outputs: mylib::foo x1"),),
        ),
        result(
            "sft-8b", "fits", 24, plan="plans/sft.json",
            figures=figures(43.0, numel=8_500_000_000, parameters=6.9, optimizer=8.0, activations=20.9), coverage=COVERAGE,
        ),
        result("serve-8b", "fits", 34, mode="infer", figures=figures(41.0, infer=True, weights=15.0, kv_cache=20.0)),
        result("nightly, 50%: a|b", "does_not_fit", 54, informational=True, figures=figures(90.0, activations=80.0), coverage=COVERAGE),
        result("broken", "error", 64, error="train/old.py:build raised RuntimeError: 50% of @everyone's <b>layers</b>, gone"),
    ]  # fmt: skip
    base = base_report()
    specs = {name: CheckSpec(name=name, model="m", cluster="8xH100-SXM", seq=1, max_increase="2%" if name == "sft-8b" else None)
             for name in (r.name for r in made)}  # fmt: skip
    compared = [against(r, specs[r.name], base) for r in made]
    return CheckReport.of(compared, "pyproject.toml", versions=VERSIONS, base=base, base_name="base.json")
