"""Configuration files of `meshwright check`: what is read, and how each mistake is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshwright.planner.checkconfig import find_config, parse_amount, read_config, shown_path
from meshwright.profiling.errors import InputError

TOML = """[project]
name = "x"

[[tool.meshwright.check]]
name = "a"
model = "model.py:build"
cluster = "8xH100-SXM"
seq = 128
plan = { tp = 2, recompute = "full", sp = true }
max_increase = "1GiB"

[[ tool.meshwright."check" ]]
name = "b"
model = "model.py:build"
mode = "infer"
cluster = { nodes = [{ device = "L40S", devices = 2 }] }
seq = 128
limit = "40GiB"
informational = true
"""
YAML = """check:
  - name: a
    model: model.py:build
    cluster: 8xH100-SXM
    seq: 128
    plan: {tp: 2, recompute: full, sp: true}
    max_increase: 1GiB

  - name: b
    model: model.py:build
    mode: infer
    cluster:
      nodes: [{device: L40S, devices: 2}]
    seq: 128
    limit: 40GiB
    informational: true
"""
ONE = 'name = "a"\nmodel = "m.py:build"\n'


def written(tmp_path: Path, text: str, name: str = "pyproject.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_toml_and_yaml_are_the_same(tmp_path: Path) -> None:
    """The same keys in both formats make the same checks, each with the line of its own table."""
    toml = read_config(written(tmp_path, TOML))
    yaml = read_config(written(tmp_path, YAML, "meshwright.yaml"))

    assert [c.line for c in toml.checks] == [4, 12]
    assert [c.line for c in yaml.checks] == [2, 9]
    assert [c.model_copy(update={"line": 1}) for c in toml.checks] == [c.model_copy(update={"line": 1}) for c in yaml.checks]
    assert toml.checks[0].fixed == {"tp": 2, "recompute": "full", "sp": True}
    assert toml.checks[1].informational


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (ONE + 'cluster = "c"', ["seq is missing"]),
        (ONE + "seq = 1", ["cluster is missing"]),
        ('name = "a"\ncluster = "c"\nseq = 1', ["model is missing"]),
        (ONE + 'cluster = "c"\nseq = 1\nspeed = 3', ["speed", "not a known key"]),
        (ONE + 'cluster = "c"\nseq = 1\nline = 3', ["line", "not a known key"]),
        (ONE + 'cluster = "c"\nseq = "1"', ["seq", "integer"]),
        (ONE + 'cluster = "c"\nseq = true', ["seq", "integer"]),
        (ONE + 'cluster = "c"\nseq = 0', ["seq", "greater than or equal to 1"]),
        (ONE + 'cluster = "c"\nseq = 99999999999', ["seq", "1,000,000,000"]),
        (ONE + 'cluster = "c"\nseq = 1\nlimit = "lots"', ["limit", "'lots'", "76GiB"]),
        (ONE + 'cluster = "c"\nseq = 1\nlimit = "120%"', ["limit", "120%"]),
        (ONE + 'cluster = "c"\nseq = 1\nlimit = 0.95', ["limit", "string"]),
        (ONE + 'cluster = "c"\nseq = 1\nmax_increase = "+2%"', ["max_increase", "+2%"]),
        (ONE + 'cluster = "c"\nseq = 1\nmode = "eval"', ["mode", "'train' or 'infer'"]),
        (ONE + 'cluster = "c"\nseq = 1\nprecision = "fp8"', ["precision", "bf16"]),
        (ONE + 'cluster = "c"\nseq = 1\nplan = 3', ["plan", "must be text or a table"]),
        (ONE + 'cluster = "c"\nseq = 1\nplan = { fsdp = 8 }', ["plan", "'fsdp'", "zero"]),
        (ONE + 'cluster = "c"\nseq = 1\nplan = { tp = "8" }', ["plan", "tp must be a whole number"]),
        (ONE + 'cluster = "c"\nseq = 1\nplan = { zero = 4 }', ["plan", "zero", "3"]),
        (ONE + 'cluster = "c"\nseq = 1\nmode = "infer"\nplan = { zero = 1 }', ["plan.zero", "infer"]),
        (ONE + 'cluster = "c"\nseq = 1\nmode = "infer"\nplan = "p.json"', ["plan", "infer"]),
        (ONE + 'cluster = { nodes = [{ device = "L40S", devices = 2, gpus = 1 }] }\nseq = 1', ["cluster", "gpus", "not a known key"]),
        ('name = "a b\\nc"\nmodel = "m"\ncluster = "c"\nseq = 1', ["name", "one line"]),
        ('name = ""\nmodel = "m"\ncluster = "c"\nseq = 1', ["name"]),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named(tmp_path: Path, table: str, words: list[str]) -> None:
    """One sentence with the file, the line of the table, the check and the key."""
    path = written(tmp_path, f"[[tool.meshwright.check]]\n{table}\n")
    with pytest.raises(InputError) as refused:
        read_config(path)
    told = str(refused.value)

    assert f"{path}:1: check " in told
    assert "\n" not in told
    for word in words:
        assert word in told


@pytest.mark.parametrize(
    ("text", "name", "word"),
    [
        ("[tool.meshwright", "pyproject.toml", "not TOML"),
        ("[project]\nname = 'x'\n", "pyproject.toml", "no [[tool.meshwright.check]]"),
        ("[tool.meshwright]\ncheck = 3\n", "pyproject.toml", "no checks"),
        ("[tool.meshwright]\ncheck = [3]\n", "pyproject.toml", "must be a table"),
        ("[tool.meshwright]\nchecks = []\n", "pyproject.toml", "'checks' is not a known key"),
        ("tool = 3\n", "pyproject.toml", "no [[tool.meshwright.check]]"),
        ("check: [", "meshwright.yaml", "not YAML"),
        ("- 3\n", "meshwright.yaml", "must be a mapping"),
        ("check: []\n", "meshwright.yaml", "no checks"),
        ("check:\n- name: a\n  name: b\n", "meshwright.yaml", "'name' appears twice"),
        ("check:\n- name: a\n  batch:\n", "meshwright.yaml", "batch: it has no value"),
        ("check: &a [*a]\n", "meshwright.yaml", "must be a table"),
        ("a: &a {b: *a}\n", "meshwright.yaml", "'a' is not a known key"),
        ("check: 2020-13-45\n", "meshwright.yaml", ""),
        ("? [a]\n: b\n", "meshwright.yaml", "YAML"),
        ("a: !!python/object:os.system {}\n", "meshwright.yaml", "not YAML"),
        ("x", "meshwright.json", ".toml or a .yaml"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, name: str, word: str) -> None:
    """Not TOML, not YAML, no checks, other keys: one sentence with the file's name."""
    with pytest.raises(InputError, match=name) as refused:
        read_config(written(tmp_path, text, name))
    assert word in str(refused.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Not text, and not there."""
    path = tmp_path / "pyproject.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_config(path)
    with pytest.raises(InputError, match="no such file"):
        find_config(str(tmp_path / "gone.toml"))


def test_two_checks_of_one_name(tmp_path: Path) -> None:
    """The second is refused, at its own line."""
    table = '[[tool.meshwright.check]]\nname = "a"\nmodel = "m"\ncluster = "c"\nseq = 1\n'
    with pytest.raises(InputError, match=":6: check 'a': name: another check has it"):
        read_config(written(tmp_path, table * 2))


def test_only_picks_by_name(tmp_path: Path) -> None:
    """Names pick checks; one that is not there is refused with those that are."""
    config = read_config(written(tmp_path, TOML))

    assert [c.name for c in config.only(["b"]).checks] == ["b"]
    with pytest.raises(InputError, match="no check 'c': it has 'a', 'b'"):
        config.only(["c"])


def test_find_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one configuration of the folder; a pyproject.toml without checks is none; two are refused."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, '[project]\nname = "meshwright-user"\n')
    with pytest.raises(InputError, match="no checks here"):
        find_config()
    written(tmp_path, YAML, "meshwright.yaml")
    assert find_config() == Path("meshwright.yaml")
    written(tmp_path, TOML)
    with pytest.raises(InputError, match="could both hold"):
        find_config()


def test_shown_path_is_that_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Annotations need paths from the top of the repository, wherever the checks run."""
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert shown_path(Path("pyproject.toml")) == "pyproject.toml"
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    assert shown_path(Path("pyproject.toml")) == "sub/pyproject.toml"


def test_amounts() -> None:
    """Shares and bytes, decimal and binary."""
    assert parse_amount("95%") == (95.0, "%")
    assert parse_amount("2 GiB") == (2 * 2**30, "B")
    assert parse_amount("1.5GB") == (1.5e9, "B")
    for wrong in ("", "5", "GiB", "-1GiB", "1e9B", "nan%", "5 %%"):
        with pytest.raises(ValueError, match="neither a share"):
            parse_amount(wrong)
