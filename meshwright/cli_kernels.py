"""meshwright kernels: which generated kernels a plan uses, and their source."""

from __future__ import annotations

import json
from typing import Annotated

import typer

PlanArg = Annotated[str, typer.Argument(help="a plan that `meshwright plan --kernels auto -o` saved")]
kernels_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The Triton kernels of a plan.")


@kernels_app.callback()
def _kernels() -> None:
    """The Triton kernels of a plan."""


@kernels_app.command()
def show(
    plan: PlanArg,
    source: Annotated[str, typer.Option(help="print the file of this kernel, by its name or the beginning of it")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Show each kernel: what it computes, where it runs, what it keeps for backward, and what it is predicted to save."""
    from meshwright.codegen.kernels.planned import kernels_of
    from meshwright.planner.plan import Plan
    from meshwright.report.kernels import render_kernels, render_source

    made = Plan.load(plan)
    if source:
        print(render_source(kernels_of(made), source), end="")
    elif as_json:
        print(json.dumps([k.model_dump(mode="json") for k in made.solution.kernels], indent=2))
    elif not made.solution.kernels:
        print("No kernels: the plan was made without --kernels auto, or none is priced below eager code for its layout")
    else:
        print(render_kernels(kernels_of(made)))


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.add_typer(kernels_app, name="kernels")
