"""The command line: one function per verb. Results go to stdout, progress to stderr; bad input is one sentence and exit code 2."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from meshwright.profiling.errors import InputError
from meshwright.version import __version__

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

# click's UsageError, wherever this typer keeps its click
_UsageError: Any = typer.BadParameter.__mro__[1]

ModelArg = Annotated[str, typer.Argument(help="a Hugging Face config.json or its folder, file.py:factory, or package.module:factory")]
SampleOpt = Annotated[str, typer.Option(help="file.py:name of sample(batch, seq), for a model whose file has none")]
PrecisionOpt = Annotated[str, typer.Option(help="bf16 or fp32; the default is bf16 on GPUs and fp32 on CPUs")]
JsonOpt = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"meshwright {__version__}")
        raise typer.Exit


@app.callback()
def _main(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False) -> None:
    """Finds the parallel layout of a PyTorch model that is provably best under its cost model, and writes the code that runs it."""


@app.command()
def plan(
    model: ModelArg,
    cluster: Annotated[str, typer.Option(help="8xH100-SXM, 16x8xH100-SXM (nodes x devices), 4xcpu, or a YAML file")],
    global_batch: Annotated[int, typer.Option(help="samples of one optimizer step over all devices")],
    seq: Annotated[int, typer.Option(help="tokens of a sample")],
    limit: Annotated[str, typer.Option(help="memory that a rank may use: a share of the device (95%) or bytes (76GiB)")] = "95%",
    fix: Annotated[str, typer.Option(help="hold parts of the layout, like tp=8,pp=2,zero=3,recompute=full")] = "",
    top: Annotated[int, typer.Option(help="how many layouts to show")] = 5,
    precision: PrecisionOpt = "",
    sample: SampleOpt = "",
    output: Annotated[str, typer.Option("-o", "--output", help="save the plan here")] = "",
    as_json: JsonOpt = False,
) -> None:
    """Find the best layout of a model on a cluster, with the proof. Exit code 1 if nothing fits."""
    from meshwright.planner.plan import Plan, write_atomically
    from meshwright.planner.solve import plan as solve
    from meshwright.planner.space import parse_fix
    from meshwright.report.terminal import render_infeasible, render_plan

    fixed = parse_fix(fix)
    if output and not Path(output).absolute().parent.is_dir():
        raise InputError(f"-o {output}: the folder {Path(output).parent} does not exist")
    with _progress() as say:
        found = solve(
            model,
            cluster,
            global_batch=global_batch,
            seq=seq,
            precision=_precision(precision),
            sample=sample or None,
            limit=limit,
            fix=fixed,
            top=top,
            progress=say,
        )
    text = found.to_json() if isinstance(found, Plan) else found.model_dump_json(by_alias=True, indent=2) + "\n"
    if output:
        write_atomically(Path(output), text)
    if as_json:
        print(text, end="")
    elif isinstance(found, Plan):
        _print(render_plan(found, output))
    else:
        _print(render_infeasible(found))
    if not isinstance(found, Plan):
        raise typer.Exit(1)


@app.command()
def emit(
    plan: Annotated[str, typer.Argument(help="a plan that `meshwright plan -o` saved")],
    output: Annotated[str, typer.Option("-o", "--output", help="the folder to write")],
    as_json: JsonOpt = False,
) -> None:
    """Write the training script of a plan: train.py, the pieces it imports, and launch.sh."""
    from meshwright.codegen.emit import emit as write
    from meshwright.planner.plan import Plan

    made = Plan.load(plan)
    files = write(made, output)
    if as_json:
        print(json.dumps({"folder": output, "files": [str(f) for f in files]}, indent=2))
        return
    lines = len((Path(output) / "train.py").read_text().splitlines())
    print(f"Wrote {output}: train.py ({lines} lines), launch.sh and {len(files) - 2} more files for {made.layout.devices} devices")
    print(f"Next: bash {output}/launch.sh --steps 20")


@app.command()
def trace(
    model: ModelArg,
    seq: Annotated[int, typer.Option(help="tokens of a sample")] = 2048,
    precision: PrecisionOpt = "bf16",
    sample: SampleOpt = "",
    as_json: JsonOpt = False,
) -> None:
    """Show what a model does: its blocks, parameters, FLOPs, saved bytes, and the ops that are not modelled."""
    from meshwright.profiling.trace import trace as run
    from meshwright.report.terminal import render_trace

    if seq < 1:
        raise InputError(f"the sequence length must be at least 1, not {seq}")
    with _progress() as say:
        say(f"tracing {model}")
        graph = run(model, seq=seq, precision=_precision(precision) or "bf16", sample=sample or None)
    if as_json:
        print(graph.model_dump_json(indent=2))
    else:
        _print(render_trace(graph))


@app.command()
def devices(as_json: JsonOpt = False) -> None:
    """List the built-in devices, with their figures and where those come from."""
    from meshwright.profiling.cluster import devices as known
    from meshwright.report.terminal import render_devices

    found = list(known().values())
    if as_json:
        print(json.dumps([d.model_dump(mode="json") for d in found], indent=2))
    else:
        _print(render_devices(found))


def _precision(text: str) -> str | None:
    if text not in ("", "bf16", "fp32"):
        raise InputError(f"precision {text!r} is not known: it is bf16 or fp32")
    return text or None


def _print(text: str) -> None:
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


class _progress:
    """A line on stderr that says what is going on; on a terminal, a spinner."""

    def __enter__(self) -> Any:
        console = Console(stderr=True)
        self.status = console.status("", spinner="dots") if console.is_terminal else None
        if self.status:
            self.status.start()
        self.last = ""
        return self.say

    def say(self, what: str) -> None:
        if self.status:
            self.status.update(what)
        elif what.partition(":")[0] != self.last.partition(":")[0]:
            print(f"{what} ...", file=sys.stderr, flush=True)
        self.last = what

    def __exit__(self, *_: object) -> None:
        if self.status:
            self.status.stop()


def main() -> None:
    """Runs the command line. Bad input becomes one sentence on stderr and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        code = app(prog_name="meshwright", standalone_mode=False)
    except InputError as e:
        sys.exit(_refuse(str(e)))
    except _UsageError as e:
        if type(e).__name__ == "NoArgsIsHelpError":
            print(e.format_message(), file=sys.stderr)
            sys.exit(2)
        command = e.ctx.command_path if e.ctx else "meshwright"
        sys.exit(_refuse(f"{e.format_message().rstrip('.')} (see {command} --help)"))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(_refuse("interrupted", 130))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(message: str, code: int = 2) -> int:
    print(f"meshwright: {message}", file=sys.stderr)
    return code
