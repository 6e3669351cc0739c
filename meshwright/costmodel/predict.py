"""`predict --runs` and `calibrate --run`: step time and peak memory of a table of runs, and one measured step of a user's own."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.costmodel import constants
from meshwright.costmodel.features import features
from meshwright.costmodel.rowmodel import build
from meshwright.costmodel.runmemory import fits, peak
from meshwright.costmodel.runs import Run, parse, parse_all, read_rows
from meshwright.costmodel.training import Batch, step
from meshwright.profiling.errors import InputError
from meshwright.profiling.files import write_atomically

COLUMNS = ("id", "step_s_p05", "step_s_p50", "step_s_p95", "peak_bytes_p50", "peak_bytes_p95", "fits", "unmodelled")


@dataclass(frozen=True)
class Calibration:
    """What one measured step says of the model: measured over predicted, for runs on the same device with the same engine."""

    scale: float
    device: str
    engine: str
    measured_s: float
    predicted_s: float

    def applies(self, run: Run) -> bool:
        return run.device.name == self.device and run.engine.name == self.engine


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step as a range, bytes of the worst rank, and what the model leaves out of this run."""

    id: str
    step_s: tuple[float, float, float] | None  # p05, p50, p95
    peak_bytes: tuple[float, float] | None  # p50, p95, of the figure that the run publishes: allocated, reserved or the driver's
    fits: bool | None
    unmodelled: str

    def row(self) -> list[str]:
        if self.step_s is None or self.peak_bytes is None:
            return [self.id, "", "", "", "", "", "", self.unmodelled]
        peaks = (f"{b:.0f}" for b in self.peak_bytes)
        return [self.id, *(f"{s:.6g}" for s in self.step_s), *peaks, str(self.fits).lower(), self.unmodelled]


def predict_runs(
    path: Path, output: Path | None = None, progress: Callable[[str], None] | None = None, calibration: Calibration | None = None
) -> list[Prediction]:
    """Predicts every row of a table of runs, and writes one row each to `output`. A row that cannot be read or modelled is kept,
    with the reason. InputError if `path` is no table of runs, or `output` cannot be written."""
    say = progress or (lambda what: None)
    rows = read_rows(path)
    parsed = parse_all(rows, path)
    ready: list[tuple[int, Run, dict[str, float]]] = []
    found: dict[int, Prediction] = {}
    models = len({r.dims for _, r in parsed if isinstance(r, Run)})
    seen: set[Any] = set()
    for i, (row, run) in enumerate(parsed):
        name = (row.get("id") or "").strip() or str(i + 2)
        if isinstance(run, str):
            found[i] = Prediction(name, None, None, None, run)
            continue
        if run.dims not in seen:
            seen.add(run.dims)
            say(f"tracing: model {len(seen)} of {models}")
        try:
            ready.append((i, run, features(run)))
        except InputError as e:
            found[i] = Prediction(name, None, None, None, f"{path.name}, row {i + 2}: {e}")
    if not found.keys() - {i for i, _, _ in ready} and not ready:
        raise InputError(f"{path} has no rows")
    if ready:
        say("pricing")
        fitted = constants.load()
        batch = Batch([r for _, r, _ in ready], [f for _, _, f in ready])
        seconds = step(batch, fitted.theta)
        for (i, run, f), t in zip(ready, seconds, strict=True):
            low, high = fitted.spread["mixture" if run.dims.experts else "dense"]
            scale = calibration.scale if calibration and calibration.applies(run) else 1.0
            most = peak(run, f, parsed[i][0].get("schedule") or "")
            step_s = (low * t * scale, t * scale, high * t * scale)
            found[i] = Prediction(run.id or str(i + 2), step_s, (most.p50, most.p95), fits(run, most), left_out(run))
    predictions = [found[i] for i in range(len(parsed))]
    if output is not None:
        write_atomically(output, table(predictions))
    return predictions


def table(predictions: list[Prediction]) -> str:
    """The CSV of predictions."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(p.row() for p in predictions)
    return out.getvalue()


def left_out(run: Run) -> str:
    """What of this run the model does not price, in words; empty if nothing is known to be."""
    notes = []
    if "dimensions" in run.assumed:
        notes.append("the model's dimensions are missing: a decoder of as many parameters stands in")
    if run.offload:
        notes.append("traffic of offloading")
    return "; ".join(notes)


def calibrate(path: Path, output: Path | None = None) -> Calibration:
    """Compares one measured step with its prediction. `path` is a JSON object with the columns of a table of runs and `step_s`, the
    measured seconds. Writes the calibration as JSON to `output`. InputError says what is missing."""
    data = _object(path)
    measured = next((data[k] for k in ("step_s", "measured_step_s", "canon_step_s") if data.get(k) is not None), None)
    if isinstance(measured, bool) or not isinstance(measured, int | float) or measured <= 0:
        raise InputError(f"{path}: step_s must be the measured seconds of one step, a number above 0, not {measured!r}")
    run = parse({k: "" if v is None else str(v) for k, v in data.items()}, str(path))
    build(run.dims)
    predicted = float(step(Batch([run]), constants.load().theta)[0])
    result = Calibration(measured / predicted, run.device.name, run.engine.name, float(measured), predicted)
    if output is not None:
        write_atomically(output, json.dumps(result.__dict__, indent=2) + "\n")
    return result


def read_calibration(path: Path) -> Calibration:
    """A calibration that `calibrate` wrote. InputError if it is none."""
    data = _object(path)
    try:
        return Calibration(float(data["scale"]), str(data["device"]), str(data["engine"]), float(data["measured_s"]), float(data["predicted_s"]))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path} is not a calibration: `meshwright calibrate --run measured.json -o {path}` writes one") from None


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"{path} does not exist")
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise InputError(f"{path} is not JSON: {e}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} must be a JSON object with the columns of a run, not {type(data).__name__}")
    return data
