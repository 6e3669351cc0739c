"""The verb explain: why this plan, what another choice would cost, and what would make it fit."""

from __future__ import annotations

from typing import Annotated

import typer


def explain(
    plan: Annotated[str, typer.Argument(help="what `meshwright plan -o` saved")],
    why_not: Annotated[list[str], typer.Option(help="solve with this held instead, like tp=1 or tp=8,zero=3; may be repeated")] = [],  # noqa: B006
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="every constraint by name, and the integer programmes in words")] = False,
    costs: Annotated[str, typer.Option(help="the cost model that the plan was made with: a .costs file, auto, or datasheet")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Say why a plan is as it is; with --why-not, the price of another choice, or the constraint that forbids it and what would do."""
    from meshwright.cli import _print, _progress
    from meshwright.planner.explainrun import explain as run
    from meshwright.planner.explainrun import load_document
    from meshwright.planner.plan import Plan
    from meshwright.planner.space import parse_fix
    from meshwright.profiling.errors import InputError
    from meshwright.report.explain import render_explanation
    from meshwright.report.terminal import render_infeasible

    questions = []
    for text in why_not:
        try:
            fix = parse_fix(text)
        except InputError as e:
            raise InputError(str(e).replace("--fix", "--why-not")) from None
        if not fix:
            raise InputError("--why-not names no choice: write one like tp=1")
        questions.append(fix)
    made = load_document(plan)
    if not isinstance(made, Plan):
        if questions:
            raise InputError(f"{plan} says that nothing fits: there is no plan to hold a choice against")
        _print(made.model_dump_json(by_alias=True, indent=2) if as_json else render_infeasible(made))
        return
    with _progress() as say:
        found = run(made, questions, costs=None if costs == "datasheet" else costs, blocks=verbose, progress=say)
    _print(found.model_dump_json(by_alias=True, indent=2) if as_json else render_explanation(found))


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("explain")(explain)
