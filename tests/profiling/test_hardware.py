"""Profiles as files, and what others measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshwright.profiling.errors import InputError
from meshwright.profiling.hardware import HardwareProfile, merge, read_profile, write_profile
from meshwright.profiling.importers.aiconfigurator import import_tree

GEMM = {"backend": "torch", "kernel": "linear", "dtype": "bf16", "m": 128, "n": 256, "k": 64, "seconds": 2.5e-6}
COLUMNS = ["framework", "version", "device", "op_name", "kernel_source", "gemm_dtype", "m", "n", "k", "latency"]


def profile() -> HardwareProfile:
    p = HardwareProfile("Made-1", {"sms": 10, "peak_flops": {"bf16": 1e14}}, {"date": "2026-01-01"})
    p.add("gemm", [GEMM, {**GEMM, "m": 1, "spread": 0.02, "runs": 7}])
    call = {"backend": "gloo", "kernel": "", "op": "all_reduce", "dtype": "fp32", "ranks": 4, "nodes": 1, "bytes": 4096}
    p.add("collective", [{**call, "seconds": 1e-4}])
    return p


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"

    write_profile(profile(), path)
    back = read_profile(path)

    assert (back.device, back.facts, back.provenance) == (profile().device, profile().facts, profile().provenance)
    for kind, table in profile().tables.items():
        for name, column in table.items():
            np.testing.assert_array_equal(back.tables[kind][name], column)


def test_profiles_of_one_device_are_put_together() -> None:
    links = HardwareProfile("Made-1", {}, {"driver": "1"}, {"collective": profile().tables["collective"]})

    both = merge([profile(), links])

    assert both.rows() == profile().rows() + 1
    assert both.facts == profile().facts
    assert both.provenance == {"date": "2026-01-01", "driver": "1"}
    with pytest.raises(InputError, match="two devices, Made-1 and Other"):
        merge([profile(), HardwareProfile("Other")])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format: meshwright.profile/1", "format: other", "is not a hardware profile"),
        ("gemm: |", "gemn: |", "'gemn' is not a class of op"),
        ("torch,linear,bf16,128,256,64", "torch,linear,bf16,128,abc,64", "table gemm, row 1, column n: 'abc' is not a number"),
        ("torch,linear,bf16,128,256,64", "torch,linear,128,256,64", "table gemm, row 1: 8 cells, the header has 9"),
        ("2.5e-06", "-1", "table gemm, row 1, column seconds: '-1' is not above 0"),
        ("dtype,m,n,k", "dtype,m,n,kk", "table gemm has no column 'k'"),
    ],
)
def test_a_broken_profile_is_refused_in_a_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "p.yaml"
    write_profile(profile(), path)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))

    with pytest.raises(InputError, match=message):
        read_profile(path)


def tree(root: Path, rows: list[list[Any]], columns: list[str] = COLUMNS, suffix: str = ".csv", name: str = "gemm_perf") -> Path:
    folder = root / "systems" / "data" / "z9_sxm" / "gemm" / "vllm" / "1.0"
    folder.mkdir(parents=True, exist_ok=True)
    sheet = "gpu: {mem_bw: 1.0e12, bfloat16_tc_flops: 1.0e14, power: 300}\nnode: {num_gpus_per_node: 8, intra_node_bw: 1.0e11}\n"
    (root / "systems" / "z9_sxm.yaml").write_text(sheet)
    path = folder / f"{name}{suffix}"
    if suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.table({c: [r[i] for r in rows] for i, c in enumerate(columns)}), path)
    else:
        path.write_text("\n".join(",".join(str(x) for x in row) for row in [columns, *rows]) + "\n")
    return path


ROW = ["VLLM", "1.0", "Z9", "gemm", "linear", "bfloat16", 64, 128, 256, 0.004]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_operator_tables_are_imported_in_our_units(tmp_path: Path, suffix: str) -> None:
    tree(tmp_path, [ROW, [*ROW[:5], "fp8", 1, 2, 3, 0.5]], suffix=suffix)

    p = import_tree(tmp_path, "z9_sxm")

    t = p.tables["gemm"]
    assert p.device == "z9_sxm"
    assert p.facts["peak_flops"] == {"bf16": 1e14}
    assert list(t["dtype"]) == ["bf16", "fp8"]
    assert t["m"].tolist() == [64, 1]
    np.testing.assert_allclose(t["seconds"], [4e-6, 5e-4])


def test_collective_sizes_are_elements_of_their_dtype(tmp_path: Path) -> None:
    columns = ["framework", "op_name", "kernel_source", "nccl_dtype", "num_gpus", "message_size", "latency"]
    tree(tmp_path, [["X", "alltoall", "NCCL", "half", 8, 1024, 0.01], ["X", "alltoall", "NCCL", "int8", 8, 1024, 0.01]], columns, name="nccl_perf")

    t = import_tree(tmp_path, "z9_sxm").tables["collective"]

    assert t["bytes"].tolist() == [2048, 1024]
    assert set(t["op"]) == {"all_to_all"}


def test_tables_of_other_ops_are_passed_over_and_named(tmp_path: Path) -> None:
    tree(tmp_path, [ROW])
    tree(tmp_path, [["x", "mamba2", 1.0]], ["framework", "op_name", "latency"], name="mamba2_perf")

    p = import_tree(tmp_path, "z9_sxm")

    assert p.provenance["not_used"] == ["gemm/vllm/1.0/mamba2_perf.csv"]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([[*ROW[:6], "x", *ROW[7:]]], COLUMNS, "gemm_perf.csv, row 1, column m: 'x' is not a number"),
        ([ROW, [*ROW[:9], 0]], COLUMNS, "row 2, column latency: '0' is not a time above 0"),
        ([ROW, ROW[:4]], COLUMNS, "row 2, column kernel_source: the row has 4 cells, the header 10"),
        ([ROW[:6] + ROW[7:]], COLUMNS[:6] + COLUMNS[7:], "rows of gemm have no column m"),
    ],
)
def test_a_broken_table_names_file_row_and_column(tmp_path: Path, rows: list[list[Any]], columns: list[str], message: str) -> None:
    tree(tmp_path, rows, columns)

    with pytest.raises(InputError, match=message):
        import_tree(tmp_path, "z9_sxm")


def test_a_parquet_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    path = tree(tmp_path, [ROW] * 50, suffix=".parquet")
    path.write_bytes(path.read_bytes()[:200])

    with pytest.raises(InputError, match="gemm_perf.parquet is not a whole parquet file"):
        import_tree(tmp_path, "z9_sxm")


def test_an_unknown_gpu_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    tree(tmp_path, [ROW])

    with pytest.raises(InputError, match="has no tables of 'y1': it has z9_sxm"):
        import_tree(tmp_path, "y1")


@pytest.mark.parametrize("sheet", ["gpu: {mem_bw: 0}", "gpu: {mem_bw: [1]}", "gpu: {bfloat16_tc_flops: abc}"])
def test_a_datasheet_figure_that_is_no_number_is_named(tmp_path: Path, sheet: str) -> None:
    tree(tmp_path, [ROW])
    (tmp_path / "systems" / "z9_sxm.yaml").write_text(sheet)

    if sheet == "gpu: {mem_bw: 0}":  # as if it were not there
        assert "memory_bandwidth_Bps" not in import_tree(tmp_path, "z9_sxm").facts
        return
    with pytest.raises(InputError, match="z9_sxm.yaml: (mem_bw|bfloat16_tc_flops) must be a number above 0"):
        import_tree(tmp_path, "z9_sxm")


def test_a_link_is_followed_and_a_device_is_not_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    target.write_text("old")
    link.symlink_to(target)

    write_profile(profile(), link)

    assert link.is_symlink()
    assert read_profile(target).device == "Made-1"
    with pytest.raises(InputError, match="is a device or a pipe"):
        write_profile(profile(), Path("/dev/null"))
