"""The verbs run and compare: what a plan takes where it runs, beside what it was predicted to take."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from meshwright.profiling.errors import InputError

JsonOpt = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def run(
    plan: Annotated[str, typer.Argument(help="a plan that `meshwright plan -o` saved, or a folder that `meshwright emit` wrote")],
    steps: Annotated[int | None, typer.Option(help="how many steps; as many as the script has by default")] = None,
    output: Annotated[str, typer.Option("-o", "--output", help="the folder to emit a plan to; by default it is gone after the run")] = "",
    as_json: JsonOpt = False,
) -> None:
    """Run a plan on this machine and show its step time, memory and loss beside the prediction. Exit code 1 if a rank dies."""
    from meshwright.codegen.launch import local
    from meshwright.planner.plan import Plan

    if steps is not None and steps < 1:
        raise InputError(f"--steps must be at least 1, not {steps}")
    source = Path(plan)
    if source.is_dir():
        if output:
            raise InputError(f"-o {output}: {plan} is a folder already, and is run where it is")
        made = local.check_folder(source)
        local.check_here(made, source)
        return _run(made, source, steps, as_json, str(source))
    made = Plan.load(source)
    local.check_here(made, Path(output or "run"))
    if output:
        return _emit_and_run(made, Path(output), steps, as_json, output)
    with tempfile.TemporaryDirectory(prefix="meshwright-") as scratch:
        _emit_and_run(made, Path(scratch) / "run", steps, as_json, "")


def _emit_and_run(plan, folder: Path, steps: int | None, as_json: bool, told: str) -> None:  # type: ignore[no-untyped-def]
    from meshwright.codegen.emit import emit

    emit(plan, folder)
    _run(plan, folder, steps, as_json, told)


def _run(plan, folder: Path, steps: int | None, as_json: bool, told: str) -> None:  # type: ignore[no-untyped-def]
    from meshwright.cli import _print
    from meshwright.codegen.launch import local
    from meshwright.report.run import render_run, run_document

    found = local.run(plan, folder, steps, lambda line: print(line, file=sys.stderr, flush=True))
    if isinstance(found, local.Died):
        print(f"meshwright: {found}", file=sys.stderr)
        raise typer.Exit(1)
    _print(json.dumps(run_document(plan, found, told), indent=2) if as_json else render_run(plan, found, told))


def compare(
    plan: Annotated[str, typer.Argument(help="the plan that was run")],
    traces: Annotated[list[str], typer.Argument(help="what torch.profiler's export_chrome_trace wrote, .json or .json.gz; one of each rank")],
    steps: Annotated[int | None, typer.Option(help="how many steps a trace without ProfilerStep# annotations covers")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Show where a measured step differs from the prediction, by category: compute, exposed communication, idle."""
    from meshwright.cli import _print, _progress
    from meshwright.planner.plan import Plan
    from meshwright.profiling.torchtrace import read_trace
    from meshwright.report import compare as report

    if steps is not None and steps < 1:
        raise InputError(f"--steps must be at least 1, not {steps}")
    made = Plan.load(plan)
    read = []
    with _progress() as say:
        for path in traces:
            say(f"reading {path}")
            read.append(read_trace(path))
    found = report.compare(made, read, steps)
    _print(json.dumps(report.compare_document(found), indent=2) if as_json else report.render_comparison(found))


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.command()(run)
    app.command()(compare)
