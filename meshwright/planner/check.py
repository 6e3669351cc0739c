"""CheckReport: whether each configured model fits, where its peak is, what changed against a base, and what would fit.

One JSON document (schema "meshwright.check/1"), written by `meshwright check` and read back by `check --compare-to`, `diff` and
`comment`. How checks are evaluated is in checkrun.py.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meshwright.planner.checkconfig import CheckSpec, parse_amount
from meshwright.planner.plan import Bytes, Count, Layout, Range, Seconds
from meshwright.profiling.cluster import first_error
from meshwright.profiling.errors import InputError
from meshwright.profiling.files import write_atomically
from meshwright.profiling.graph import Coverage
from meshwright.version import __version__

SCHEMA: Final = "meshwright.check/1"
GIB = 2**30
Status = Literal["fits", "does_not_fit", "grew", "error"]
Rule = Literal["MEM001", "MEM002", "MEM003", "MEM004"]
RULES: Final[dict[str, tuple[str, str]]] = {
    "MEM001": ("does-not-fit", "A rank needs more memory (p95 of the prediction) than the check's limit."),
    "MEM002": ("regression", "The memory of a rank grew by more than the check's max_increase against the base."),
    "MEM003": ("unmodelled-op", "The model has ops without a cost model; their memory is that of their outputs."),
    "MEM004": ("plan-drift", "The plan or the base was made with another model or with other versions of the software."),
}


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Versions(_Model):
    """The software that predicted. `transformers` is empty where it is not installed."""

    meshwright: str
    torch: str
    transformers: str = ""

    @classmethod
    def here(cls) -> Versions:
        try:
            hf = importlib.metadata.version("transformers")
        except importlib.metadata.PackageNotFoundError:
            hf = ""
        return cls(meshwright=__version__, torch=torch.__version__, transformers=hf)


class Inputs(_Model):
    """What was asked. `batch` is the global batch in samples, `numel` the model's parameters, `hash` that of its graph."""

    model: str
    cluster: str
    devices: Count
    batch: Count
    seq: Count
    precision: str
    numel: Annotated[int, Field(ge=0)]
    layers: Annotated[int, Field(ge=0)]
    hash: str = ""


class Figures(_Model):
    """Memory of the fullest rank of one layout. `by_kind` adds up to `peak.p50`; `by_metric` is the p95 by how it is measured
    (allocated, reserved, device), where the cost model tells. `step_s` is None for inference."""

    inputs: Inputs
    layout: Layout
    peak: Range
    capacity_bytes: Bytes
    limit_bytes: Bytes
    by_kind: dict[str, float]
    by_metric: dict[str, float] = {}
    peak_stage: int = 0
    peak_event: str = ""
    step_s: Seconds | None = None

    @property
    def over_bytes(self) -> float:
        """How much too much (above 0) or free (below 0)."""
        return self.peak.p95 - self.limit_bytes


class Setting(_Model):
    """One thing changed, with which the model fits: solved by the planner. `slower`: its step over the checked layout's, minus one."""

    change: str
    layout: Layout
    devices: Count
    peak_bytes: Bytes
    step_s: Seconds | None = None
    slower: float | None = None


class Finding(_Model):
    """A warning: the rule that it belongs to, in one sentence."""

    rule: Rule
    text: str


class Growth(_Model):
    """Against the base: bytes of p95, their share of the base's, and what the check allows (None: anything)."""

    base: Figures
    base_status: Status
    bytes: float
    share: float
    allowed_bytes: Bytes | None = None
    changed: tuple[str, ...] = ()


class CheckResult(_Model):
    """One check. `file` and `line` are where it is configured. `figures` is None if it could not be evaluated; `error` says why."""

    name: str
    status: Status
    informational: bool = False
    mode: Literal["train", "infer"] = "train"
    plan: str = "auto"
    file: str
    line: Annotated[int, Field(ge=1)] = 1
    figures: Figures | None = None
    growth: Growth | None = None
    nearest: tuple[Setting, ...] = ()
    coverage: Coverage | None = None
    warnings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    error: str = ""

    @property
    def failed(self) -> bool:
        """Whether it turns the exit code: an informational check never does."""
        return self.status != "fits" and not self.informational


class Summary(_Model):
    """How many checks there are of each kind, informational ones included."""

    checks: int
    fits: int
    does_not_fit: int
    grew: int
    error: int
    warnings: int
    informational: int


class CheckReport(_Model):
    """Every check of a configuration, in its order. `missing` names what only the base has; `warnings` are of no one check."""

    schema_: Literal["meshwright.check/1"] = Field(SCHEMA, alias="schema")
    created_by: Versions
    file: str
    base: str = ""
    base_versions: Versions | None = None
    results: tuple[CheckResult, ...]
    missing: tuple[str, ...] = ()
    warnings: tuple[Finding, ...] = ()
    summary: Summary

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @classmethod
    def of(
        cls, results: list[CheckResult], file: str, *, versions: Versions | None = None, base: CheckReport | None = None,
        base_name: str = "", partial: bool = False,
    ) -> CheckReport:  # fmt: skip
        """Sums results up. `partial`: checks were picked by name, so what the base has besides is not missing."""
        count = {s: sum(r.status == s for r in results) for s in ("fits", "does_not_fit", "grew", "error")}
        names = {r.name for r in results}
        versions = versions or Versions.here()
        warnings = tuple(_drift(base.created_by, versions)) if base else ()
        return cls(
            schema=SCHEMA, created_by=versions, file=file, base=base_name,
            base_versions=base.created_by if base else None, warnings=warnings, results=tuple(results),
            missing=() if partial or base is None else tuple(r.name for r in base.results if r.name not in names),
            summary=Summary(
                checks=len(results), warnings=len(warnings) + sum(len(r.warnings) for r in results),
                informational=sum(r.informational for r in results), **count,
            ),
        )  # fmt: skip

    @property
    def exit_code(self) -> int:
        """0: every check fits. 1: one does not, or grew too much. 2: one could not be evaluated. Informational ones do not count."""
        failed = {r.status for r in self.results if r.failed}
        return 2 if "error" in failed else 1 if failed else 0

    @property
    def same_as_base(self) -> bool:
        """Whether there is a base and nothing to tell against it: every check fits, is in both and needs what it needed."""
        quiet = all(r.status == "fits" and r.growth is not None and not r.growth.changed for r in self.results)
        return bool(self.base) and quiet and not self.missing

    def result(self, name: str) -> CheckResult | None:
        return next((r for r in self.results if r.name == name), None)

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        write_atomically(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> CheckReport:
        """A saved report. InputError, one sentence, if it is not one."""
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        except FileNotFoundError:
            raise InputError(f"the report {path} does not exist") from None
        except OSError as e:
            raise InputError(f"the report {path} cannot be read: {e.strerror}") from None
        except (ValueError, RecursionError):
            raise InputError(f"the report {path} is not JSON") from None
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise InputError(f"{path} is not a report of schema {SCHEMA!r}: write one with 'meshwright check --save {path.name}'")
        try:
            return cls.model_validate(data)
        except ValidationError as e:
            raise InputError(f"the report {path}: {first_error(e)}") from None


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


# --- against a base ----------------------------------------------------------------------------------------------------


def against(result: CheckResult, spec: CheckSpec, base: CheckReport) -> CheckResult:
    """A result beside the same check of the base: growth, what changed, and whether that is more than the check allows."""
    before = base.result(spec.name)
    if result.figures is None or before is None or before.figures is None:
        return result
    was, now = before.figures, result.figures
    grown = now.peak.p95 - was.peak.p95
    allowed = None
    if spec.max_increase is not None:
        number, unit = parse_amount(spec.max_increase)
        allowed = was.peak.p95 * number / 100 if unit == "%" else number
    status: Status = result.status
    if status == "fits" and allowed is not None and grown > allowed + 1:  # a byte is for rounding
        status = "grew"
    growth = Growth(
        base=was, base_status=before.status, bytes=grown, share=grown / was.peak.p95 if was.peak.p95 else 0.0, allowed_bytes=allowed,
        changed=tuple(what_changed(was, now)),
    )  # fmt: skip
    return result.model_copy(update={"status": status, "growth": growth})


def _drift(base: Versions, here: Versions) -> Iterator[Finding]:
    for name in Versions.model_fields:
        then, now = getattr(base, name), getattr(here, name)
        if then != now:
            yield Finding(rule="MEM004", text=f"the base was made with {name} {then or 'not installed'}, this with {now or 'not installed'}")


def what_changed(was: Figures, now: Figures) -> list[str]:
    """What differs, causes before effects: "seq 8192 -> 10240", "parameters 8.03 B -> 8.5 B", "activations +2.1 GiB"."""
    a, b = was.inputs, now.inputs
    out = [f"{key} {getattr(a, key)} -> {getattr(b, key)}" for key in ("model", "cluster", "batch", "seq", "precision", "layers")
           if getattr(a, key) != getattr(b, key)]  # fmt: skip
    if a.numel != b.numel:
        out.append(f"parameters {_count(a.numel)} -> {_count(b.numel)}")
    elif a.hash != b.hash and not out:
        out.append("the model computes something else with as many parameters")
    if was.limit_bytes != now.limit_bytes:
        out.append(f"limit {_gib(was.limit_bytes)} -> {_gib(now.limit_bytes)}")
    for key in Layout.model_fields:
        x, y = getattr(was.layout, key), getattr(now.layout, key)
        if x != y:
            out.append(f"{key} {_choice(x)} -> {_choice(y)}")
    kinds = {k: now.by_kind.get(k, 0.0) - was.by_kind.get(k, 0.0) for k in {**was.by_kind, **now.by_kind}}
    least = max(0.005 * was.peak.p50, 1.0)
    largest = sorted(kinds.items(), key=lambda x: (-abs(x[1]), x[0]))
    out += [f"{k.replace('_', ' ')} {'+' if d > 0 else '-'}{_gib(abs(d))}" for k, d in largest if abs(d) >= least]
    if was.step_s and now.step_s and abs(now.step_s / was.step_s - 1) >= 0.005:
        out.append(f"step {was.step_s:.3g} s -> {now.step_s:.3g} s ({now.step_s / was.step_s - 1:+.1%})")
    return out


def _choice(value: object) -> object:
    return ("off", "on")[value] if isinstance(value, bool) else value


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


def _count(n: int) -> str:
    return f"{n / 1e9:.3g} B" if n >= 1e9 else f"{n / 1e6:.3g} M" if n >= 1e6 else str(n)
