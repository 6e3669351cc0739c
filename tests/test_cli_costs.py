"""The commands around costs, as a user types them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.profiling.test_hardware import ROW, tree

TINY = "examples/models/tiny-llama.json"


def run(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "meshwright", *args], capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """import -> compile, from a small tree of tables."""
    folder = tmp_path_factory.mktemp("costs")
    rows = [[*ROW[:6], m, n, k, 0.004 + 2e3 * m * n * k / 5e13] for m in (64, 256, 1024) for n in (128, 512, 2048) for k in (128, 512, 2048)]
    tree(folder, rows)
    imported = run("profile", "import", "aiconfigurator", str(folder), "--gpu", "z9_sxm", "-o", str(folder / "z9.yaml"))
    assert imported.returncode == 0, imported.stderr
    assert "27 samples" in imported.stdout
    made = run("costs", "compile", str(folder / "z9.yaml"), "-o", str(folder / "z9.costs"))
    assert made.returncode == 0, made.stderr
    assert all(len(line) <= 100 for line in made.stdout.splitlines())
    return folder / "z9.costs"


def test_a_table_of_ops_is_answered(compiled: Path) -> None:
    ops, out = compiled.parent / "ops.csv", compiled.parent / "out.csv"
    ops.write_text("op_name,gemm_dtype,m,n,k\ngemm,bfloat16,512,512,512\n")

    made = run("costs", "predict", str(compiled), "--ops", str(ops), "-o", str(out))

    assert made.returncode == 0, made.stderr
    row = next(csv.DictReader(out.open()))
    assert float(row["latency_p50"]) == pytest.approx(0.004 + 2e3 * 512**3 / 5e13, rel=0.15)


def test_show_prints_the_errors_and_the_provenance(compiled: Path) -> None:
    shown = run("costs", "show", str(compiled))
    data = json.loads(run("costs", "show", str(compiled), "--json").stdout)

    assert "aiconfigurator" in shown.stdout
    assert "random fifth" in shown.stdout
    assert data["report"][0]["class"] == "gemm"


def test_a_shipped_device_is_shown_and_plans_stand_on_it() -> None:
    shown = run("costs", "show", "h100")
    planned = run("plan", TINY, "--cluster", "2xH100", "--global-batch", "8", "--seq", "64")

    assert shown.stdout.startswith("Cost model of H100-SXM")
    assert "compiled cost model of H100-SXM" in planned.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("costs", "show", "nothing"), "nothing is neither a .costs file nor a device with a shipped cost model"),
        (("costs", "compile", "none.yaml", "-o", "x.costs"), "profile none.yaml does not exist"),
        (("costs", "predict", "H100", "--ops", "none.csv", "-o", "x.csv"), "none.csv does not exist"),
        (("profile", "import", "other", "x", "-o", "y.yaml"), "'other' is not known: profile import takes aiconfigurator or nccl-tests"),
        (("profile", "import", "aiconfigurator", "x", "-o", "y.yaml"), "takes one folder and --gpu"),
        (("profile", "measure", "-o", "x.yaml", "--budget", "soon"), "soon"),
        (("predict", "--runs", "none.csv", "-o", "x.csv"), "none.csv does not exist"),
        (("calibrate", "--run", "none.json"), "none.json does not exist"),
        (("plan", TINY, "--cluster", "2xH100", "--global-batch", "8", "--seq", "64", "--costs", "no.costs"), "no.costs does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(args: tuple[str, ...], message: str) -> None:
    got = run(*args)

    assert got.returncode == 2
    assert message in got.stderr
    assert len(got.stderr.strip().splitlines()) == 1 or "..." in got.stderr
