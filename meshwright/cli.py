"""The command line: one function per verb. Results go to stdout, progress to stderr; bad input is one sentence and exit code 2."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from meshwright import cli_check, cli_dryrun, cli_explain, cli_kernels, cli_run
from meshwright.profiling.errors import InputError
from meshwright.version import __version__

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

profile_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure what the hardware does, or import what others measured.")
costs_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Compile a hardware profile into a cost model, show it, ask it.")
app.add_typer(profile_app, name="profile")
app.add_typer(costs_app, name="costs")

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
    costs: Annotated[str, typer.Option(help="a compiled cost model (.costs), auto for the shipped one, or datasheet")] = "auto",
    precision: PrecisionOpt = "",
    optimizer: Annotated[str, typer.Option(help="adamw, sgd-momentum or sgd")] = "adamw",
    sample: SampleOpt = "",
    objective: Annotated[str, typer.Option(help="throughput, gpus (the fewest devices), cost (least device-seconds) or memory")] = "throughput",
    max_seconds: Annotated[float | None, typer.Option(help="stop searching after so long, with the best so far and its gap")] = None,
    sweep: Annotated[str, typer.Option(help="the best plan of each size: gpus=8..1024 (doubling), gpus=8..64:8 or gpus=8,16,24")] = "",
    deadline: Annotated[str, typer.Option(help="how long all --tokens may take, like 14d, 36h or 90m")] = "",
    tokens: Annotated[str, typer.Option(help="tokens to train on, like 15T, 300B or 1.5e12")] = "",
    price: Annotated[float | None, typer.Option(help="of a device-hour, in any currency; without it cost is in device-hours")] = None,
    kernels: Annotated[str, typer.Option(help="auto: generated Triton kernels where they are priced below eager code; off")] = "off",
    output: Annotated[str, typer.Option("-o", "--output", help="save the plan here")] = "",
    as_json: JsonOpt = False,
) -> None:
    """Find the best layout of a model on a cluster, with the proof. Exit code 1 if nothing fits or meets the deadline."""
    from meshwright.planner import frontier
    from meshwright.planner.plan import Plan
    from meshwright.planner.solve import plan as solve
    from meshwright.planner.solve import prepare
    from meshwright.planner.space import parse_fix
    from meshwright.profiling.files import write_atomically
    from meshwright.report.frontier import render_frontier, render_too_slow
    from meshwright.report.terminal import render_infeasible, render_plan

    sizes = frontier.parse_sweep(sweep) if sweep else ()
    wanted = frontier.Target(frontier.parse_tokens(tokens) if tokens else None, frontier.parse_deadline(deadline) if deadline else None, price)
    chosen = frontier.check_asked(objective, wanted, bool(sweep), max_seconds)
    fixed = parse_fix(fix)
    if kernels not in ("auto", "off"):
        raise InputError(f"--kernels {kernels}: it is auto or off")
    _check_output(output)
    with _progress() as say:
        asked: dict[str, Any] = {
            "global_batch": global_batch, "seq": seq, "precision": _precision(precision), "optimizer": optimizer, "sample": sample or None,
            "limit": limit, "fix": fixed, "costs": None if costs == "datasheet" else costs, "progress": say,
        }  # fmt: skip
        found: Any
        if sweep:
            found = frontier.sweep(prepare(model, cluster, **asked), sizes, target=wanted, max_seconds=max_seconds, progress=say)
        elif chosen == "throughput" and wanted.tokens is None:
            found = solve(model, cluster, top=top, max_seconds=max_seconds, **asked)
        else:
            inputs = prepare(model, cluster, **asked)
            found = frontier.plan_for(chosen, inputs, target=wanted, top=top, max_seconds=max_seconds, progress=say)
        if kernels == "auto" and isinstance(found, Plan):
            from meshwright.codegen.kernels.planned import with_kernels

            say("choosing kernels")
            asked_for = prepare(model, cluster, **asked)
            found = with_kernels(found, asked_for.graph, asked_for.costs)
    text = found.to_json() if isinstance(found, Plan) else found.model_dump_json(by_alias=True, indent=2) + "\n"
    if output:
        write_atomically(Path(output), text)
    if as_json:
        print(text, end="")
    elif isinstance(found, Plan):
        _print(render_plan(found, output))
    elif isinstance(found, frontier.Frontier):
        _print(render_frontier(found))
    else:
        _print(render_too_slow(found) if isinstance(found, frontier.TooSlow) else render_infeasible(found))
    if not isinstance(found, Plan) and not (isinstance(found, frontier.Frontier) and found.answers):
        raise typer.Exit(1)


@app.command()
def emit(
    plan: Annotated[str, typer.Argument(help="a plan that `meshwright plan -o` saved")],
    output: Annotated[str, typer.Option("-o", "--output", help="the folder to write")],
    for_: Annotated[str, typer.Option("--for", help="torchtitan, megatron or deepspeed: that engine's own configuration and command instead")] = "",
    as_json: JsonOpt = False,
) -> None:
    """Write the training script of a plan: train.py, the pieces it imports, launch.sh; or what another engine needs to run it."""
    from meshwright.codegen.emit import emit as write
    from meshwright.codegen.launch import engine
    from meshwright.planner.plan import Plan
    from meshwright.report.run import render_engine

    made = Plan.load(plan)
    if for_:
        found = engine.configure(made, for_)
        files = engine.write(made, found, output)
        names = [str(f.relative_to(output)) for f in files]
        told = {"folder": output, "engine": found.release, "files": [str(f) for f in files], "command": found.command, "lost": list(found.lost)}
        _print(json.dumps(told, indent=2) if as_json else render_engine(made, found, output, names))
        return
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


@profile_app.command("measure")
def profile_measure(
    output: Annotated[str, typer.Option("-o", "--output", help="the profile; one that is there is continued")],
    budget: Annotated[str, typer.Option(help="how long to measure, like 120s or 10m")] = "120s",
    classes: Annotated[str, typer.Option(help="which classes of op, like gemm,collective; all by default")] = "",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
    flush_l2: Annotated[bool, typer.Option("--flush-l2", help="empty a GPU's L2 before each call")] = False,
) -> None:
    """Measure the ops that models use on this device and, under torchrun, every collective by group and by pair."""
    from meshwright.profiling.measure import measure, parse_budget
    from meshwright.profiling.measure_progress import progress_bar

    seconds = parse_budget(budget)
    wanted = [c.strip() for c in classes.split(",") if c.strip()] or None
    leads = int(os.environ.get("RANK", "0")) == 0
    with progress_bar() as say:
        made = measure(Path(output), seconds, wanted, device, say if leads else None, flush=flush_l2)
    if leads:
        print(f"Wrote {output}: {made.rows()} samples of {len(made.tables)} classes on {made.device}")
        print(f"Next: meshwright costs compile {output} -o {Path(output).with_suffix('.costs')}")


@profile_app.command("import")
def profile_import(
    source: Annotated[str, typer.Argument(help="aiconfigurator, nccl-tests or galvatron")],
    paths: Annotated[list[str], typer.Argument(help="the tree of tables, the texts that nccl-tests printed, or the folders of Galvatron's JSON")],
    output: Annotated[str, typer.Option("-o", "--output", help="the profile to write; galvatron's is layers.yaml by default")] = "",
    gpu: Annotated[str, typer.Option(help="which GPU of the tree, like h100_sxm")] = "",
) -> None:
    """Import what others measured: operator tables of aiconfigurator, logs of nccl-tests, or layer profiles of Galvatron."""
    from meshwright.profiling.hardware import write_profile
    from meshwright.profiling.importers.aiconfigurator import import_tree
    from meshwright.profiling.importers.nccl_tests import read_nccl_tests

    _check_output(output)
    if source == "galvatron":
        return _import_layers(paths, output or "layers.yaml")
    if not output:
        raise InputError("profile import needs -o, the profile to write")
    with _progress() as say:
        if source == "aiconfigurator":
            if not gpu or len(paths) != 1:
                raise InputError("profile import aiconfigurator takes one folder and --gpu, like: aiconfigurator DIR --gpu h100_sxm -o h100.yaml")
            made = import_tree(Path(paths[0]), gpu, say)
        elif source == "nccl-tests":
            made = read_nccl_tests([Path(p) for p in paths])
        else:
            raise InputError(f"{source!r} is not known: profile import takes aiconfigurator or nccl-tests, and galvatron for layer profiles")
        say(f"writing {output}")
        write_profile(made, Path(output))
    print(f"Wrote {output}: {made.rows()} samples of {made.device} in {len(made.tables)} classes")
    for name in made.provenance.get("not_used", []):
        print(f"  not used: {name} (no class of op here)")
    print(f"Next: meshwright costs compile {output} -o {Path(output).with_suffix('.costs')}")


def _import_layers(paths: list[str], output: str) -> None:
    """Galvatron's profiles are of whole layers: they become a layer profile, which no cost model of ops is compiled from."""
    from meshwright.profiling.importers.galvatron import read_galvatron
    from meshwright.profiling.layerprofile import write_layer_profile

    made = read_galvatron([Path(p) for p in paths])
    write_layer_profile(made, Path(output))
    clusters = ", ".join(f"{c.nodes}x{c.devices_per_node}" for c in made.clusters)
    print(f"Wrote {output}: a layer profile of {made.model or 'no model'}{f', clusters {clusters}' if clusters else ''}")
    for name in made.provenance["not_used"]:
        print(f"  not used: {name} (runs of whole models; no row of a layer)")
    if missing := made.missing():
        print(f"  not there: {', '.join(missing)}; give the folder that holds them too, to price a plan")


@costs_app.command("compile")
def costs_compile(
    profile: Annotated[list[str], typer.Argument(help="what 'profile measure' or 'profile import' wrote; several of one device are put together")],
    output: Annotated[str, typer.Option("-o", "--output", help="the cost model to write, like h100.costs")],
    max_kb: Annotated[int, typer.Option(help="size of the file at most, in kB; residuals are cut where it costs the least accuracy")] = 950,
    as_json: JsonOpt = False,
) -> None:
    """Fit every class of op and collective, and judge each fit on samples that it did not see."""
    from meshwright.costmodel.compile import compile_profile
    from meshwright.profiling.hardware import merge, read_profile
    from meshwright.report.costs import render_costs

    _check_output(output)
    if max_kb < 1:
        raise InputError(f"--max-kb must be at least 1, not {max_kb}")
    with _progress() as say:
        say(f"reading {', '.join(profile)}")
        model = compile_profile(merge([read_profile(Path(p)) for p in profile]), say, most_bytes=max_kb * 1000.0)
        model.save(Path(output))
    if as_json:
        print(json.dumps({"file": output, "device": model.device, "provenance": model.provenance, "report": model.report}, indent=2))
        return
    _print(render_costs(model))
    print(f"Wrote {output} ({Path(output).stat().st_size / 1000:.0f} kB)")


@costs_app.command("show")
def costs_show(
    model: Annotated[str, typer.Argument(help="a .costs file or a device with a shipped one, like H100-SXM")],
    as_json: JsonOpt = False,
) -> None:
    """Show what a cost model knows: provenance, and its errors on samples that it did not see."""
    from meshwright.costmodel.model import CostModel
    from meshwright.report.costs import render_costs

    found = CostModel.load(model)
    if as_json:
        print(json.dumps({"device": found.device, "facts": found.facts, "provenance": found.provenance, "report": found.report}, indent=2))
    else:
        _print(render_costs(found))


@costs_app.command("predict")
def costs_predict(
    model: Annotated[str, typer.Argument(help="a .costs file or a built-in device")],
    ops: Annotated[str, typer.Option(help="a CSV of ops in aiconfigurator's columns: op_name, gemm_dtype, m, n, k, ...")],
    output: Annotated[str, typer.Option("-o", "--output", help="the CSV to write")],
) -> None:
    """Answer a table of ops: latency_p05, latency_p50 and latency_p95 beside each row, in the table's own unit."""
    from meshwright.costmodel.model import CostModel
    from meshwright.costmodel.predict_ops import predict_table

    _check_output(output)
    answered = predict_table(CostModel.find(model), Path(ops), Path(output))
    print(f"Wrote {output}: {answered.rows} rows" + (f", {answered.datasheet} of them by the datasheet alone" if answered.datasheet else ""))


@app.command("predict")
def predict_published(
    runs: Annotated[str, typer.Option(help="a CSV of training runs: model dimensions, layout, GPU, software")],
    output: Annotated[str, typer.Option("-o", "--output", help="the CSV to write: step seconds, peak bytes, what is not modelled")],
    calibration: Annotated[str, typer.Option(help="a calibration that 'meshwright calibrate' wrote")] = "",
) -> None:
    """Predict the step time and peak memory of training runs, one row each."""
    from meshwright.costmodel.predict import predict_runs, read_calibration

    _check_output(output)
    with _progress() as say:
        found = predict_runs(Path(runs), Path(output), say, read_calibration(Path(calibration)) if calibration else None)
    answered = sum(p.step_s is not None for p in found)
    print(f"Wrote {output}: {len(found)} rows, {answered} answered" + ("" if answered == len(found) else "; the rest say why in the last column"))


@app.command()
def calibrate(
    run: Annotated[str, typer.Option(help="a JSON object: the columns of a run, and step_s, its measured seconds")],
    output: Annotated[str, typer.Option("-o", "--output", help="the calibration to write")] = "calibration.json",
    as_json: JsonOpt = False,
) -> None:
    """Scale step predictions by one measured step of your own: for the same device and engine, with 'predict --calibration'."""
    from dataclasses import asdict

    from meshwright.costmodel.predict import calibrate as compare

    _check_output(output)
    made = compare(Path(run), Path(output))
    if as_json:
        print(json.dumps(asdict(made), indent=2))
        return
    print(f"Measured {made.measured_s:.4g} s, predicted {made.predicted_s:.4g} s: {made.engine} on {made.device} is scaled by {made.scale:.3f}")
    print(f"Wrote {output}. Next: meshwright predict --runs runs.csv --calibration {output} -o predictions.csv")


cli_check.register(app)
cli_dryrun.register(app)
cli_explain.register(app)
cli_run.register(app)
cli_kernels.register(app)


def _check_output(output: str) -> None:
    """Refuses an output before the work, not after it."""
    if output and not Path(output).absolute().parent.is_dir():
        raise InputError(f"-o {output}: the folder {Path(output).parent} does not exist")
    if output and Path(output).is_dir():
        raise InputError(f"-o {output}: it is a folder, not a file")


def _precision(text: str) -> str | None:
    if text not in ("", "bf16", "fp32"):
        raise InputError(f"precision {text!r} is not known: it is bf16 or fp32")
    return text or None


def _print(text: str) -> None:
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


class _progress:
    """A line on stderr that says what is going on; on a terminal, a spinner. What a model prints goes there too: stdout is for results."""

    def __enter__(self) -> Any:
        self.aside = contextlib.redirect_stdout(sys.stderr)
        self.aside.__enter__()
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
        self.aside.__exit__(None, None, None)


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
    except OSError as e:  # a name that is too long, a full disk
        sys.exit(_refuse(f"{str(e.filename)[:200] + ': ' if e.filename else ''}{e.strerror or e}"))
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(message: str, code: int = 2) -> int:
    print(f"meshwright: {message}", file=sys.stderr)
    return code
