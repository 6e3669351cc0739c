"""What `meshwright check` reads: `[[tool.meshwright.check]]` tables of a pyproject.toml, or the same keys in a meshwright.yaml."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from meshwright.planner.plan import Count, Layout
from meshwright.planner.space import FIXABLE
from meshwright.profiling.cluster import Cluster, first_error
from meshwright.profiling.errors import InputError

NAMES = ("meshwright.yaml", "meshwright.yml", "pyproject.toml")  # looked for in this order
INFERENCE_PARTS = ("tp", "pp", "dp")
_OURS = re.compile(r"""^\s*\[+\s*["']?tool["']?\s*\.\s*["']?meshwright\b""", re.MULTILINE)
_LIMIT = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*(%|[KMGT]i?B|B)\s*", re.ASCII)


class CheckSpec(BaseModel):
    """One check as it was written. `batch` is the global batch in samples, `seq` the tokens of a sample; `line` is where the
    table starts in the file (from 1). A `plan` is "auto", the path of a plan, or parts of a layout that are held."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1, max_length=100)]
    model: Annotated[str, Field(min_length=1)]
    cluster: str | Cluster | None = None
    sample: str = ""
    batch: Count | None = None
    seq: Count | None = None
    precision: Literal["bf16", "fp32"] | None = None
    mode: Literal["train", "infer"] = "train"
    plan: str | dict[str, Any] = "auto"
    limit: str = "95%"
    max_increase: str | None = None
    informational: bool = False
    costs: str = "auto"
    line: Annotated[int, Field(ge=1)] = 1

    @property
    def plan_file(self) -> str:
        """The path of the plan that is held, or ""."""
        return self.plan if isinstance(self.plan, str) and self.plan != "auto" else ""

    @property
    def fixed(self) -> dict[str, Any]:
        """The parts of the layout that the table itself holds."""
        return dict(self.plan) if isinstance(self.plan, dict) else {}

    @field_validator("name", "model", "sample", "plan", "costs", "cluster")
    @classmethod
    def _one_line(cls, value: Any) -> Any:
        if isinstance(value, str) and (not value.isprintable() or value != value.strip()):
            raise ValueError("it must be one line of printable text, without blanks around it")
        return value

    @field_validator("plan", "costs", "cluster")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("it is empty; leave the key out for its default")
        return value

    @field_validator("batch", "seq")
    @classmethod
    def _not_absurd(cls, value: int | None) -> int | None:
        if value is not None and value > 10**9:
            raise ValueError("it is at most 1,000,000,000")
        return value

    @field_validator("plan")
    @classmethod
    def _parts_of_a_layout(cls, value: Any) -> Any:
        return check_parts(value) if isinstance(value, dict) else value

    @field_validator("limit", "max_increase")
    @classmethod
    def _amount(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            number, unit = parse_amount(value)
            if info.field_name == "limit" and (not number or (unit == "%" and number > 100)):
                raise ValueError(f"{value!r} must be above 0 and at most the device's memory")
        return value

    @model_validator(mode="after")
    def _complete(self) -> CheckSpec:
        if not self.plan_file:
            for key in ("cluster", "seq"):
                if getattr(self, key) is None:
                    raise ValueError(f"{key} is missing")
        if self.mode == "infer":
            if self.plan_file:
                raise ValueError("plan: a saved plan is of training; with mode = infer it is auto or a table of tp, pp and dp")
            wrong = [k for k in self.fixed if k not in INFERENCE_PARTS]
            if wrong:
                raise ValueError(f"plan.{wrong[0]} has no meaning with mode = infer, which takes tp, pp and dp")
        return self


class CheckConfig(BaseModel):
    """The checks of a file. `file` is how annotations name it: relative to the repository where there is one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    file: str
    checks: tuple[CheckSpec, ...]

    @property
    def folder(self) -> Path:
        return self.path.parent

    def only(self, names: list[str]) -> CheckConfig:
        """The checks of these names (all, if there are none), in the file's order. InputError for a name that is not there."""
        known = [c.name for c in self.checks]
        for name in names:
            if name not in known:
                raise InputError(f"{self.file} has no check {name!r}: it has {', '.join(map(repr, known))}")
        return self.model_copy(update={"checks": tuple(c for c in self.checks if not names or c.name in names)})


def check_parts(parts: dict[str, Any]) -> dict[str, Any]:
    """Parts of a layout from a table, with types as in Layout. ValueError says which is wrong."""
    for key, value in parts.items():
        if key not in FIXABLE:
            raise ValueError(f"{str(key)[:40]!r} is not a part of a layout: those are {', '.join(FIXABLE)}")
        if type(value) is not FIXABLE[key]:
            wanted = {int: "a whole number", bool: "true or false", str: "text"}[FIXABLE[key]]
            raise ValueError(f"{key} must be {wanted}")
    try:
        Layout.model_validate(parts)
    except ValidationError as e:
        raise ValueError(first_error(e)) from None
    return parts


def parse_amount(text: str) -> tuple[float, str]:
    """ "95%" -> (95, "%"); "76GiB" -> (bytes, "B"). ValueError for anything else."""
    match = _LIMIT.fullmatch(text)
    if not match:
        raise ValueError(f"{text[:40]!r} is neither a share like 95% nor bytes like 76GiB")
    number, unit = float(match[1]), match[2]
    if unit == "%":
        return number, "%"
    return number * (1 if unit == "B" else (1024 if "i" in unit else 1000) ** (1 + "KMGT".index(unit[0]))), "B"


def find_config(given: str = "") -> Path:
    """The configuration that was named, or the one of this folder. InputError if there is none, or two."""
    if given:
        if not Path(given).is_file():
            raise InputError(f"--config {given}: there is no such file")
        return Path(given)
    found = [Path(n) for n in NAMES if Path(n).is_file() and (n != "pyproject.toml" or _OURS.search(_read(Path(n))))]
    if not found:
        raise InputError("no checks here: write [[tool.meshwright.check]] in pyproject.toml, or meshwright.yaml, or name a file with --config")
    if len(found) > 1:
        raise InputError(f"{found[0]} and {found[1]} could both hold the checks: name one with --config")
    return found[0]


def read_config(path: Path) -> CheckConfig:
    """The checks of a file. InputError, one sentence, names the file, its line, the check and the key that is wrong."""
    file, text = shown_path(path), _read(path)
    if path.suffix in (".yaml", ".yml"):
        table, lines = _yaml(text, file)
    elif path.suffix == ".toml":
        table, lines = _toml(text, file)
    else:
        raise InputError(f"{file} must be a .toml or a .yaml file")
    for key in table:
        if key != "check":
            raise InputError(f"{file}: {str(key)[:40]!r} is not a known key beside 'check'")
    rows = table.get("check")
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{file} has no checks: each is a [[tool.meshwright.check]] table, or an item of 'check' in YAML")
    checks: list[CheckSpec] = []
    for i, row in enumerate(rows):
        line = lines[i] if i < len(lines) else 1
        checks.append(_check(row, i, f"{file}:{line}", line))
        if checks[-1].name in [c.name for c in checks[:-1]]:
            raise InputError(f"{file}:{line}: check {checks[-1].name!r}: name: another check has it")
    return CheckConfig(path=path, file=file, checks=tuple(checks))


def shown_path(path: Path) -> str:
    """A path for a reader: from the top of the repository that CI runs in, or from here, where it lies under one of them."""
    for top in (os.environ.get("GITHUB_WORKSPACE"), os.curdir):
        if top and path.resolve().is_relative_to(Path(top).resolve()):
            return path.resolve().relative_to(Path(top).resolve()).as_posix()
    return path.as_posix()


def _check(row: Any, i: int, where: str, line: int) -> CheckSpec:
    if not isinstance(row, dict):
        raise InputError(f"{where}: check {i + 1} must be a table of keys, not {type(row).__name__}")
    name = row.get("name")
    named = repr(name) if isinstance(name, str) and 0 < len(name) <= 100 and name.isprintable() else str(i + 1)
    if "line" in row or any(not isinstance(k, str) for k in row):
        odd = next(k for k in row if k == "line" or not isinstance(k, str))
        raise InputError(f"{where}: check {named}: {str(odd)[:40]!r} is not a known key")
    empty = next((k for k, v in row.items() if v is None), None)
    if empty is not None:
        raise InputError(f"{where}: check {named}: {empty[:40]}: it has no value; leave the key out for its default")
    try:
        return CheckSpec(**row, line=line)
    except ValidationError as e:
        raise InputError(f"{where}: check {named}: {_mistake(e)}") from None


def _mistake(e: ValidationError) -> str:
    """The first mistake in one sentence. Where a key takes several kinds of value, the deepest mistake is the one that was made."""
    errors = e.errors()
    key = str(errors[0]["loc"][0])[:40] if errors[0]["loc"] else ""
    kinds = [x for x in errors if x["loc"][:1] == errors[0]["loc"][:1]]
    if len(kinds) > 1 and all(x["type"] in ("string_type", "dict_type", "model_type", "model_attributes_type") for x in kinds):
        return f"{key}: must be text{' or a table' if key in ('plan', 'cluster') else ''}"
    words = first_error(e)
    if key == "cluster":
        words = re.sub(r"^cluster\.[^:]*?\bCluster\]?", "cluster", words)
    return " ".join(words.split())[:300]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from None


# --- TOML --------------------------------------------------------------------------------------------------------------

_HEADER = re.compile(r"""^\s*\[\[\s*["']?tool["']?\s*\.\s*["']?meshwright["']?\s*\.\s*["']?check["']?\s*\]\]""")


def _toml(text: str, file: str) -> tuple[dict[str, Any], list[int]]:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise InputError(f"{file} is not TOML: {e}") from None
    except (RecursionError, ValueError) as e:  # values nested too deep, a number of thousands of digits
        raise InputError(f"{file} is not TOML that can be read: {type(e).__name__}") from None
    tool = data.get("tool")
    table = tool.get("meshwright") if isinstance(tool, dict) else None
    if not isinstance(table, dict):
        raise InputError(f"{file} has no [[tool.meshwright.check]] table")
    headers = [n for n, row in enumerate(text.splitlines(), 1) if _HEADER.match(row)]
    rows = table.get("check")
    if isinstance(rows, list) and len(headers) != len(rows):  # written in line, or such a row inside of a text: the first is near enough
        near = [n for n, row in enumerate(text.splitlines(), 1) if "meshwright" in row]
        headers = [near[0] if near else 1] * len(rows)
    return table, headers


# --- YAML --------------------------------------------------------------------------------------------------------------


def _yaml(text: str, file: str) -> tuple[dict[str, Any], list[int]]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        raise InputError(f"{file} is not YAML{f' (line {mark.line + 1})' if mark else ''}") from None
    except (RecursionError, ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as e:
        # what PyYAML lets through: a value that contains itself, a date that is none, a mapping as a key
        raise InputError(f"{file} is not YAML that can be read: {type(e).__name__}") from None
    _no_repeated_keys(root, file)
    if not isinstance(data, dict):
        raise InputError(f"{file} must be a mapping with 'check', not {type(data).__name__}")
    return data, _yaml_lines(root)


def _no_repeated_keys(root: Any, file: str) -> None:
    """YAML takes the last of two equal keys in silence; here it is a mistake."""
    todo, seen = [root], set()
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = [k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode)]
            twice = next((k for k in keys if keys.count(k) > 1), None)
            if twice is not None:
                raise InputError(f"{file}:{node.start_mark.line + 1}: {str(twice)[:40]!r} appears twice")
            todo += [v for _, v in node.value]
        elif isinstance(node, yaml.SequenceNode):
            todo += node.value


def _yaml_lines(root: Any) -> list[int]:
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if getattr(key, "value", None) == "check" and isinstance(value, yaml.SequenceNode):
            return [item.start_mark.line + 1 for item in value.value]
    return []
