"""A run beside its prediction, and what was written for another engine, as text of at most 100 columns and as JSON."""

from __future__ import annotations

from typing import Any

from meshwright.codegen.launch.engine import Engine
from meshwright.codegen.launch.local import Ran
from meshwright.planner.plan import Plan, Range
from meshwright.report.terminal import _hanging, _paragraph, gib, seconds, span


def run_document(plan: Plan, ran: Ran, folder: str) -> dict[str, Any]:
    """The run as JSON: measured, predicted, and the error of the prediction as a share of what was measured. Seconds and bytes."""
    step, peak = plan.prediction.step_s, predicted_peak(plan)
    most = max(ran.peak_bytes) if ran.peak_bytes else None
    return {
        "folder": folder, "ranks": plan.layout.devices, "steps": len(ran.steps),
        "step_s": {"measured": ran.step_s, "predicted": step.p50, "p05": step.p05, "p95": step.p95, "error": step.p50 / ran.step_s - 1},
        "peak_bytes": {
            "measured": list(ran.peak_bytes) if ran.peak_bytes else None, "predicted": peak.p50, "p95": peak.p95,
            "error": peak.p50 / most - 1 if most else None,
        },
        "losses": [s.loss for s in ran.steps],
    }  # fmt: skip


def predicted_peak(plan: Plan) -> Range:
    """What the plan expects of torch.cuda.max_memory_reserved, which train.py measures."""
    m = plan.prediction.memory_bytes
    return m.by_metric.get("reserved", m.peak)


def render_run(plan: Plan, ran: Ran, folder: str) -> str:
    """A run for a reader: step, memory and loss, measured beside predicted."""
    step, peak = plan.prediction.step_s, predicted_peak(plan)
    inside = "inside" if step.p05 <= ran.step_s <= step.p95 else "outside"
    wide = f"{inside} the predicted {span(step.p05, step.p95)}"
    lines = [f"Step  {seconds(ran.step_s)} measured, {seconds(step.p50)} predicted ({_error(step.p50, ran.step_s)}), {wide}"]
    lines += _paragraph(f"median of the last {len(ran.warm)} of {len(ran.steps)} steps on {plan.layout.devices} ranks; {plan.layout}", "      ")
    if ran.peak_bytes:
        most = max(ran.peak_bytes)
        where = f"rank {ran.peak_bytes.index(most)}"
        lines.append(f"Peak  {gib(most)} measured on {where}, {gib(peak.p50)} predicted ({_error(peak.p50, most)}); least {gib(min(ran.peak_bytes))}")
    else:
        lines.append(f"Peak  not measured: the ranks ran on CPUs; {gib(peak.p50)} predicted")
    lines.append(f"Loss  {ran.steps[0].loss:.4f} at step {ran.steps[0].index}, {ran.steps[-1].loss:.4f} at step {ran.steps[-1].index}")
    return "\n".join([*lines, f"Ran   {folder}"] if folder else lines)


def render_engine(plan: Plan, engine: Engine, folder: str, files: list[str]) -> str:
    """What was written for another engine, its command, and what of the plan is lost."""
    lines = [f"Wrote {folder}: {', '.join(files)}", f"      for {engine.release} on {plan.layout.devices} devices; {plan.layout}"]
    lines.append("Lost or otherwise" if engine.lost else "Nothing of the plan is lost")
    for sentence in engine.lost:
        head, _, rest = sentence.partition(": ")
        lines += _hanging(head, rest, 26)
    return "\n".join([*lines, f"Next: cd {folder} && {engine.command}"])


def _error(predicted: float, measured: float) -> str:
    return f"{predicted / measured - 1:+.1%}"
