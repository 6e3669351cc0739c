"""The verb dryrun: a rank of a plan without its devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from meshwright.profiling.errors import InputError


def dryrun(
    plan: Annotated[str, typer.Argument(help="a plan that `meshwright plan -o` saved, or a folder that `meshwright emit` wrote")],
    rank: Annotated[int, typer.Option(help="which rank to be; the first of the plan's fullest stage by default", show_default=False)] = -1,
    whole: Annotated[bool, typer.Option("--whole", help="run every layer and microbatch instead of extrapolating")] = False,
    output: Annotated[str, typer.Option("-o", "--output", help="save the result here, as JSON")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Run a plan's own program, or an emitted script, as one of its ranks on this CPU, without its memory: peak bytes, where, what is sent."""
    from meshwright.cli import _check_output, _print, _progress
    from meshwright.codegen.dryrun import dry_run
    from meshwright.codegen.dryrun_script import dry_run_script
    from meshwright.planner.plan import Plan
    from meshwright.profiling.files import write_atomically
    from meshwright.report.dryrun import dry_run_document, render_dry_run

    _check_output(output)
    folder = Path(plan) if Path(plan).is_dir() else None
    made = Plan.load(folder / "plan.json" if folder else plan)
    if rank < -1:
        raise InputError(f"the plan has no rank {rank}: its {made.layout.devices} ranks are 0 to {made.layout.devices - 1}")
    with _progress() as say:
        own = None if rank == -1 else rank
        found = dry_run_script(folder, own, whole=whole, progress=say) if folder else dry_run(made, own, whole=whole, progress=say)
    text = json.dumps(dry_run_document(made, found), indent=2) + "\n"
    if output:
        write_atomically(Path(output), text)
    _print(text if as_json else render_dry_run(made, found, output))


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("dryrun")(dryrun)
