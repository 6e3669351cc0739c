"""The command line: answers, refusals and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from meshwright import cli
from meshwright.planner.plan import json_schema

ROOT = Path(__file__).parent.parent
MODEL = str(ROOT / "examples/models/tiny-llama.json")
SMALL = ["plan", MODEL, "--global-batch", "16", "--seq", "32"]


def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["meshwright", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capfd.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    return lambda *arguments: call(capfd, monkeypatch, *arguments)


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, nothing on stdout, and the refusal is one sentence with these words."""
    code, out, err = result
    last = err.strip().splitlines()[-1]

    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert last.startswith("meshwright: ")
    for word in words:
        assert word in last


def test_plan_answers_in_its_first_line(run) -> None:  # type: ignore[no-untyped-def]
    """The first line is the layout; no line is wider than 100 columns; results and progress are on their own streams."""
    code, out, err = run(*SMALL, "--cluster", "8xH100-SXM")

    assert code == 0
    assert out.startswith("Plan  tp=")
    assert max(map(len, out.splitlines())) <= 100
    for part in ("Why not", "Memory", "Next: "):
        assert f"\n{part}" in out
    assert "searching" in err


def test_plan_json_follows_the_schema(run) -> None:  # type: ignore[no-untyped-def]
    """--json prints the plan with the published keys, and the committed schema is the code's."""
    code, out, _ = run(*SMALL, "--cluster", "8xH100-SXM", "--json")
    data = json.loads(out)
    schema = json.loads((ROOT / "docs/plan.schema.json").read_text())
    jsonschema.validate(data, schema)

    assert code == 0
    assert json_schema() == schema
    assert data["prediction"]["step_s"]["p50"] > 0
    assert data["solver"]["status"] == "optimal"
    assert {"solution", "prediction", "alternatives", "rejected", "solver", "coverage"} <= set(data)


def test_top_limits_the_alternatives(run) -> None:  # type: ignore[no-untyped-def]
    """--top 2 shows two layouts."""
    _, out, _ = run(*SMALL, "--cluster", "8xH100-SXM", "--top", "2", "--json")

    assert len(json.loads(out)["alternatives"]) == 2


def test_nothing_fits(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Where nothing fits: by how much, what would, and exit code 1."""
    code, out, _ = run(*SMALL, "--cluster", "2xL40S", "--limit", "1.5GB")

    assert code == 1
    assert out.startswith("No plan  tiny-llama does not fit on 2xL40S")
    assert "too much" in out.splitlines()[0]
    assert "Nearest that would fit" in out
    assert max(map(len, out.splitlines())) <= 100


def test_plan_emit_and_run(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A saved plan is emitted, and its launch.sh prints a loss a step under torchrun."""
    saved, folder = tmp_path / "plan.json", tmp_path / "run"
    code, out, _ = run(*SMALL, "--cluster", "2xcpu", "--fix", "tp=2", "-o", str(saved))
    assert code == 0
    assert f"Saved {saved}" in out
    code, out, _ = run("emit", str(saved), "-o", str(folder))
    assert code == 0
    assert "train.py" in out
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    made = subprocess.run(["bash", str(folder / "launch.sh"), "--steps", "2"], capture_output=True, text=True, env={"PATH": path}, timeout=120)

    assert made.returncode == 0, made.stderr
    assert [line.split()[:3:2] for line in made.stdout.splitlines()] == [["step", "loss"], ["step", "loss"]]


def test_trace_and_devices(run) -> None:  # type: ignore[no-untyped-def]
    """trace shows parameters and coverage; devices shows every device with its source; both speak JSON."""
    code, out, _ = run("trace", MODEL, "--seq", "32")
    assert code == 0
    assert "parameters" in out.splitlines()[0]
    assert "0 not modelled" in out
    code, out, _ = run("trace", MODEL, "--seq", "32", "--json")
    assert json.loads(out)["seq"] == 32
    code, out, _ = run("devices")
    assert max(map(len, out.splitlines())) <= 100
    code, out, _ = run("devices", "--json")
    names = [d["name"] for d in json.loads(out)]

    assert code == 0
    assert {"A100-SXM-40GB", "A100-SXM-80GB", "H100-SXM", "H100-PCIe", "H200-SXM", "B200", "L40S", "RTX-4090", "cpu"} == set(names)


def test_missing_file(run) -> None:  # type: ignore[no-untyped-def]
    """A model file that is not there."""
    refused(run("plan", "nowhere/config.json", "--cluster", "8xH100", "--global-batch", "8", "--seq", "32"), "nowhere/config.json")


def test_yaml_with_a_wrong_key(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A cluster file with a key that does not exist names the key."""
    path = tmp_path / "c.yaml"
    path.write_text("nodes:\n  - device: H100-SXM\n    devices: 8\n    gpus: 3\n")
    refused(run(*SMALL, "--cluster", str(path)), "gpus", "not a known key")


def test_unknown_device(run) -> None:  # type: ignore[no-untyped-def]
    """An unknown device is refused with the list of known ones."""
    refused(run(*SMALL, "--cluster", "8xH900"), "H900", "H100-SXM")


def test_batch_that_no_microbatch_divides(run) -> None:  # type: ignore[no-untyped-def]
    """A microbatch that does not divide the batch of a rank."""
    refused(run(*SMALL, "--cluster", "8xH100", "--fix", "micro_batch=3"), "micro_batch=3", "16")
    refused(run("plan", MODEL, "--global-batch", "7", "--seq", "32", "--cluster", "8xH100", "--fix", "dp=8"), "dp=8", "7")


def test_factory_that_raises(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A factory that raises is named with its error."""
    path = tmp_path / "broken.py"
    path.write_text("def build():\n    raise RuntimeError('no such thing')\n")
    refused(run("plan", f"{path}:build", "--cluster", "8xH100", "--global-batch", "8", "--seq", "32"), "build", "no such thing")


@pytest.mark.parametrize(("text", "words"), [("import sys\nsys.exit(3)\n", "SystemExit: 3"), ("def build():\n    raise SystemExit\n", "SystemExit")])
def test_a_model_that_exits(run, tmp_path: Path, text: str, words: str) -> None:  # type: ignore[no-untyped-def]
    """A model's exit code is not ours."""
    path = tmp_path / "broken.py"
    path.write_text(text)
    refused(run("plan", f"{path}:build", "--cluster", "8xH100", "--global-batch", "8", "--seq", "32"), "broken.py", words)


@pytest.mark.parametrize("flag", ["--global-batch", "--seq"])
def test_absurd_numbers(run, flag: str) -> None:  # type: ignore[no-untyped-def]
    """Refused before anything is enumerated or traced."""
    refused(run("plan", MODEL, "--cluster", "8xH100", "--global-batch", "16", "--seq", "32", flag, "9" * 20), "at most 1,000,000,000")


def test_names_that_are_too_long(run) -> None:  # type: ignore[no-untyped-def]
    """What the system refuses is one sentence."""
    refused(run("plan", "a" * 5000, "--cluster", "8xH100", "--global-batch", "8", "--seq", "32"), "File name too long")


def test_a_part_that_is_fixed_twice(run) -> None:  # type: ignore[no-untyped-def]
    """--fix tp=1,tp=2 is a contradiction."""
    refused(run(*SMALL, "--cluster", "8xH100", "--fix", "tp=1,tp=2"), "tp is there twice")


def test_config_that_is_not_a_model(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A config.json without a model type, and one that is not JSON."""
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    refused(run("plan", str(path), "--cluster", "8xH100", "--global-batch", "8", "--seq", "32"), "config.json", "model_type")
    path.write_text("{")
    refused(run("plan", str(path), "--cluster", "8xH100", "--global-batch", "8", "--seq", "32"), "JSON")


def test_heads_that_tp_does_not_divide(run) -> None:  # type: ignore[no-untyped-def]
    """Such a layout is skipped, which is said; asked for alone it is refused."""
    code, out, _ = run(*SMALL, "--cluster", "2x8xH100", "--json")
    assert any("8 attention heads are not divisible by 16" in r["constraint"] for r in json.loads(out)["rejected"])
    refused(run(*SMALL, "--cluster", "2x8xH100", "--fix", "tp=16"), "8 attention heads are not divisible by 16")
    code, out, _ = run(*SMALL, "--cluster", "8xH100", "--fix", "tp=8", "--json")
    assert code == 0
    assert json.loads(out)["solution"]["kv_replicated"]  # 4 key-value heads, which ranks share


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--global-batch", "-4", "global batch"),
        ("--seq", "0", "sequence"),
        ("--top", "-1", "number of layouts"),
        ("--limit", "-5%", "limit"),
        ("--limit", "120%", "limit"),
        ("--limit", "lots", "limit"),
        ("--cluster", "-8xH100", "-8xH100"),
        ("--fix", "tp=-2", "tp=-2"),
        ("--fix", "speed=9", "speed=9"),
        ("--precision", "int3", "int3"),
        ("--global-batch", "many", "--global-batch"),
    ],
)
def test_values_that_make_no_sense(run, option: str, value: str, word: str) -> None:  # type: ignore[no-untyped-def]
    """Negative sizes and words that are not numbers are refused, with the value."""
    refused(run(*SMALL, "--cluster", "8xH100", option, value), word)


def test_inconsistent_plan(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """An edited plan is refused with the place where it contradicts itself, and nothing is written."""
    saved = tmp_path / "plan.json"
    run(*SMALL, "--cluster", "8xH100", "-o", str(saved))
    data = json.loads(saved.read_text())
    data["solution"]["layout"]["dp"] *= 2
    saved.write_text(json.dumps(data))
    refused(run("emit", str(saved), "-o", str(tmp_path / "run")), "inconsistent", "solution.layout")
    saved.write_text("[]")
    refused(run("emit", str(saved), "-o", str(tmp_path / "run")), "not a plan")

    assert not (tmp_path / "run").exists()


def test_output_folder_that_does_not_exist(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """-o into a folder that is not there is refused before the search."""
    refused(run(*SMALL, "--cluster", "8xH100", "-o", str(tmp_path / "no" / "plan.json")), "does not exist")
