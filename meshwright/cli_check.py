"""The verbs of CI: check, diff and comment."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshwright.profiling.errors import InputError

if TYPE_CHECKING:
    from meshwright.planner.check import CheckReport

SUFFIXES = {".json": "json", ".xml": "junit", ".sarif": "sarif", ".md": "markdown", ".txt": "text"}
FORMATS = ("text", "json", "github", "junit", "sarif", "markdown")

ConfigOpt = Annotated[str, typer.Option(help="pyproject.toml or meshwright.yaml; the one of this folder by default")]
NameOpt = Annotated[list[str], typer.Option("--name", help="only the check of this name; may be repeated")]


def check(
    config: ConfigOpt = "",
    name: NameOpt = [],  # noqa: B006
    format_: Annotated[str, typer.Option("--format", help=f"what stdout gets: {', '.join(FORMATS)}")] = "text",
    output: Annotated[
        list[str],
        typer.Option("-o", "--output", help="a file as well, its format by its suffix (.json .xml .sarif .md .txt) or before it, like junit:out; "
                     "may be repeated"),
    ] = [],  # noqa: B006
    save: Annotated[str, typer.Option(help="save the report here, as the base of a later --compare-to")] = "",
    compare_to: Annotated[str, typer.Option(help="a saved report: what changed against it, and whether it grew by more than max_increase")] = "",
    exit_zero: Annotated[bool, typer.Option("--exit-zero", help="exit with 0 even if a check does not fit; errors still exit with 2")] = False,
) -> None:  # fmt: skip
    """Check that every configured model still fits, and say by how much not, where, and what would fit.

    Exit code 0: all fit. 1: one does not fit, or grew by more than its max_increase. 2: wrong use, or a model that could not be evaluated.
    Informational checks never fail.
    """
    from meshwright.planner.check import CheckReport
    from meshwright.planner.checkconfig import find_config, read_config
    from meshwright.report.check_github import append_summary

    targets = _targets([*output, *([f"json:{save}"] if save else [])])
    if format_ not in FORMATS:
        raise InputError(f"--format {format_!r} is not known: it is {', '.join(FORMATS)}")
    base = CheckReport.load(compare_to) if compare_to else None
    read = read_config(find_config(config)).only(name)
    report = _run(read, base, Path(compare_to).name, partial=bool(name))
    for path, kind in targets:
        _write(path, render(report, kind))
    sys.stdout.write(render(report, format_))
    if format_ == "github":
        append_summary(report)
    broken = [r for r in report.results if r.status == "error" and r.failed]
    if broken:
        more = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
        print(f"meshwright: check {broken[0].name!r} could not be evaluated: {broken[0].error[:500]}{more}", file=sys.stderr)
    code = report.exit_code
    if code and not (exit_zero and code == 1):
        raise typer.Exit(code)


def diff(
    compare_to: Annotated[str, typer.Option(help="a report that 'meshwright check --save' wrote")],
    path: Annotated[str, typer.Option(help="another such report; by default the checks are run now")] = "",
    config: ConfigOpt = "",
    name: NameOpt = [],  # noqa: B006
    format_: Annotated[str, typer.Option("--format", help="text, json or markdown")] = "text",
    output: Annotated[str, typer.Option("-o", "--output", help="write it here instead of to stdout")] = "",
) -> None:
    """Show what each check needs against a base. Exit code 0 whatever the difference is; 2 if a check could not be evaluated."""
    from meshwright.planner.check import CheckReport
    from meshwright.planner.checkconfig import find_config, read_config
    from meshwright.report import check_diff

    if format_ not in check_diff.FORMATS:
        raise InputError(f"--format {format_!r} is not known: it is {', '.join(check_diff.FORMATS)}")
    targets = _targets([f"text:{output}"] if output else [])
    base = CheckReport.load(compare_to)
    now = CheckReport.load(path) if path else _run(read_config(find_config(config)).only(name), None, "", partial=bool(name))
    known = [r.name for r in (*now.results, *base.results)]
    unknown = next((n for n in name if n not in known), None)
    if unknown is not None:
        raise InputError(f"neither report has a check {unknown!r}: they have {', '.join(map(repr, dict.fromkeys(known)))}")
    if name:
        base, now = _only(base, name), _only(now, name)
    text = check_diff.render_diff(base, now, format_)
    if targets:
        _write(targets[0][0], text)
    else:
        sys.stdout.write(text)
    broken = [r for r in now.results if r.status == "error" and r.failed]
    if broken:
        print(f"meshwright: check {broken[0].name!r} could not be evaluated: {broken[0].error[:500]}", file=sys.stderr)
        raise typer.Exit(2)


def comment(
    path: Annotated[str, typer.Option(help="the report to tell: what 'meshwright check --save' or '-o report.json' wrote")],
    repo: Annotated[str, typer.Option(help="owner/name; GITHUB_REPOSITORY by default")] = "",
    pull_request: Annotated[int, typer.Option(help="its number")] = 0,
    behavior: Annotated[str, typer.Option(help="update: change the earlier comment, if there is one; new: add another")] = "update",
    tag: Annotated[str, typer.Option(help="tells the comments of several configurations apart")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the comment and post nothing")] = False,
) -> None:
    """Post a report under a pull request, or update the comment that is there. Needs GITHUB_TOKEN and, from Actions, GITHUB_API_URL.

    Where nothing changed against the base and there is no earlier comment, nothing is posted.
    """
    from meshwright.planner.check import CheckReport
    from meshwright.report.check_comment import BEHAVIORS, over_https, post
    from meshwright.report.check_markdown import render_markdown

    if behavior not in BEHAVIORS:
        raise InputError(f"--behavior {behavior!r} is not known: it is {' or '.join(BEHAVIORS)}")
    report = CheckReport.load(path)
    if dry_run:
        sys.stdout.write(render_markdown(report, tag))
        return
    repo = repo or os.environ.get("GITHUB_REPOSITORY", "")
    told = post(
        report, repo=repo, number=pull_request, api=os.environ.get("GITHUB_API_URL", ""), token=os.environ.get("GITHUB_TOKEN", "").strip(),
        http=over_https, behavior=behavior, tag=tag,
    )  # fmt: skip
    print(told)


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command()(check)
    app.command()(diff)
    app.command()(comment)


def render(report: CheckReport, kind: str) -> str:
    """A report in one of FORMATS."""
    from meshwright.report.check_github import render_github
    from meshwright.report.check_junit import render_junit
    from meshwright.report.check_markdown import render_markdown
    from meshwright.report.check_sarif import render_sarif
    from meshwright.report.check_text import render_text

    if kind == "json":
        return report.to_json()
    return {"text": render_text, "github": render_github, "junit": render_junit, "sarif": render_sarif, "markdown": render_markdown}[kind](report)


def _run(config, base: CheckReport | None, base_name: str, partial: bool) -> CheckReport:  # type: ignore[no-untyped-def]
    from meshwright.cli import _progress
    from meshwright.planner.checkrun import run_checks

    with _progress() as say:
        return run_checks(config, base, base_name, partial=partial, say=say)


def _only(report: CheckReport, names: list[str]) -> CheckReport:
    return report.model_copy(update={"results": tuple(r for r in report.results if r.name in names)})


def _targets(outputs: list[str]) -> list[tuple[Path, str]]:
    """(path, format) of each --output; refused before the work if it could not be written."""
    out: list[tuple[Path, str]] = []
    for text in outputs:
        head, colon, rest = text.partition(":")
        path, kind = (rest, head) if colon and head in FORMATS else (text, SUFFIXES.get(Path(text).suffix, ""))
        if not path:
            raise InputError(f"--output {text!r} names no file")
        if not kind:
            raise InputError(f"--output {text}: no format goes with this suffix; put it before, like junit:{text}")
        target = Path(path)
        if not target.absolute().parent.is_dir():
            raise InputError(f"--output {path}: the folder {target.parent} does not exist")
        if target.is_dir():
            raise InputError(f"--output {path}: it is a folder, not a file")
        if target.resolve() in [t.resolve() for t, _ in out]:
            raise InputError(f"--output {path}: named twice")
        out.append((target, kind))
    return out


def _write(path: Path, text: str) -> None:
    from meshwright.profiling.files import write_atomically

    write_atomically(path, text)
