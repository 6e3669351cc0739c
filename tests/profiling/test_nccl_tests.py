"""Reading what nccl-tests prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshwright.profiling.errors import InputError
from meshwright.profiling.hardware import read_profile, write_profile
from meshwright.profiling.importers.nccl_tests import read_nccl_tests

HEADER = """\
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
"""
FACTORS = {"all_reduce": 2.0, "reduce_scatter": 1.0, "all_gather": 1.0, "alltoall": 1.0}


def rank_lines(ranks: int, hosts: int = 1, device: str = "NVIDIA H200") -> str:
    per = ranks // hosts
    lines = [f"#  Rank {r:2d} Group  0 Pid  {4000 + r} on   host{r // per} device {r % per:2d} [0x{r:02x}] {device}" for r in range(ranks)]
    return "\n".join(lines) + "\n"


def printed(
    program: str, ranks: int = 8, hosts: int = 1, *, dtype: str = "float", start: bool = False, checked: bool = True,
    sizes: tuple[int, ...] = (4096, 1 << 20, 1 << 28), device: str = "NVIDIA H200",
) -> str:  # fmt: skip
    """What a program of nccl-tests would print for a machine that takes 20 us plus 100 GB/s."""
    item = {"float": 4, "half": 2, "bfloat16": 2}[dtype]
    rows = []
    for size in sizes:
        us = 20 + size / 1e5
        algbw = size / us / 1e3
        busbw = algbw * (1.0 if program in ("sendrecv", "broadcast") else FACTORS.get(program, ranks / (ranks - 1)) * (ranks - 1) / ranks)
        redop = "sum" if program in ("all_reduce", "reduce_scatter", "sendrecv") else "none"
        count = size // item // (1 if program in ("all_reduce", "sendrecv", "broadcast") else ranks)
        root = 0 if program == "broadcast" else -1
        wrong = "0" if checked else "N/A"
        figures = f"{us:8.2f} {algbw:7.2f} {busbw:7.2f}"
        in_place = "N/A" if program == "alltoall" else wrong
        rows.append(f"{size:12d} {count:12d} {dtype:>9s} {redop:>7s} {root:7d} {figures} {wrong:>6s} {figures} {in_place:>6s}")
    begin = f"# Collective test starting: {program}_perf\n" if start else ""
    first = "# nThread 1 nGpus 1 minBytes 8 maxBytes 268435456 step: 2(factor) warmup iters: 5 iters: 20 agg iters: 1 validation: 1 graph: 0\n"
    head = begin + first + "#\n# Using devices\n" + rank_lines(ranks, hosts, device) + HEADER
    return head + "\n".join(rows) + "\n# Out of bounds values : 0 OK\n# Avg bus bandwidth    : 41.2\n#\n"


def save(folder: Path, text: str, name: str = "slurm-17.out") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(("program", "op"), [("all_reduce", "all_reduce"), ("all_gather", "all_gather"), ("reduce_scatter", "reduce_scatter"),
                                             ("alltoall", "all_to_all"), ("sendrecv", "send_recv")])  # fmt: skip
def test_the_columns_tell_the_collective(tmp_path: Path, program: str, op: str) -> None:
    """An output that does not name its program, in a file that does not either, is told by its bandwidths, redop and counts."""
    found = read_nccl_tests([save(tmp_path, printed(program))])
    table = found.tables["collective"]

    assert set(table["op"]) == {op}
    assert table["bytes"].tolist() == [4096, 1 << 20, 1 << 28]
    assert table["seconds"][1] == pytest.approx((20 + (1 << 20) / 1e5) * 1e-6, rel=1e-3)
    assert set(table["ranks"]) == {8}
    assert set(table["nodes"]) == {1}
    assert found.device == "H200-SXM"


def test_ranks_over_hosts_are_nodes(tmp_path: Path) -> None:
    """Nodes are the distinct hosts of the rank lines; the dtype is the profile's word for it."""
    found = read_nccl_tests([save(tmp_path, printed("all_reduce", 16, 2, dtype="bfloat16"))])

    assert set(found.tables["collective"]["nodes"]) == {2}
    assert set(found.tables["collective"]["ranks"]) == {16}
    assert set(found.tables["collective"]["dtype"]) == {"bf16"}


def test_several_runs_and_files_make_one_profile(tmp_path: Path) -> None:
    """Runs one after the other in a file, and several files, end up in one table, which round-trips through a profile's file."""
    both = save(tmp_path, printed("all_reduce", start=True) + printed("all_gather", start=True), "log.txt")
    other = save(tmp_path, printed("alltoall", 4, dtype="half"), "more.txt")
    found = read_nccl_tests([both, other])
    write_profile(found, tmp_path / "profile.yaml")
    again = read_profile(tmp_path / "profile.yaml")

    assert again.rows() == 9
    assert again.tables["collective"]["op"].tolist() == ["all_reduce"] * 3 + ["all_gather"] * 3 + ["all_to_all"] * 3


def test_noise_between_rows_is_passed_over(tmp_path: Path) -> None:
    """Messages of NCCL and mpirun among the rows, and their prefixes, do not matter."""
    text = printed("all_reduce")
    noisy = "".join(
        f"[1,0]<stdout>:{line}\nhost0:1:2 [0] NCCL INFO Channel 00\n15 more processes have sent a message\n" for line in text.splitlines()
    )

    assert read_nccl_tests([save(tmp_path, noisy)]).rows() == 3


def test_older_versions_leave_redop_blank(tmp_path: Path) -> None:
    """A row with an empty redop column, and 'error' instead of '#wrong', is read by the header; the file's name tells the program."""
    text = printed("all_gather").replace("#wrong", " error").replace("   none", "")

    assert set(read_nccl_tests([save(tmp_path, text, "all_gather_perf.txt")]).tables["collective"]["op"]) == {"all_gather"}


def test_an_ambiguous_output_says_what_would_tell(tmp_path: Path) -> None:
    """Unchecked all_gather and alltoall print the same columns: the file's name decides, and without it the error says so."""
    text = printed("all_gather", checked=False)

    with pytest.raises(InputError, match="name the file after its program, like all_gather_perf.txt"):
        read_nccl_tests([save(tmp_path, text)])
    assert set(read_nccl_tests([save(tmp_path, text, "alltoall-h200.log")]).tables["collective"]["op"]) == {"all_to_all"}


BROKEN = [
    (lambda t: t.replace("#  Rank", "#  Notes"), "has no line like '#  Rank"),
    (lambda t: t[: t.index("1048576") + 45], r"line 17, column (root|time): the row ends before it"),
    (lambda t: t.replace("30.49", "3o.49", 1), r"line 17, column time: '3o.49' is not a number"),
    (lambda t: t.replace("float", "complex", 1), r"line 16, column type: 'complex' is not one of float"),
    (lambda t: t.replace("#       size", "#       sice"), r"line 16: a row stands before the header"),
    (lambda t: t.replace("#  Rank  3", "#  Rank 30"), r"names rank 30 but has no line for rank 3"),
    (lambda t: t.replace("Pid  4003 on", "Pid  4003 at"), r"line 7: '#  Rank"),
    (lambda t: t.replace("0x03] NVIDIA H200", "0x03] NVIDIA H100 80GB HBM3"), "mixes devices"),
    (lambda t: "", "has no row of nccl-tests output"),
    (lambda t: t.replace("   30.49", "    0.00", 1), r"line 17, column time: '0.00' is not above 0"),
]


@pytest.mark.parametrize(("breaks", "says"), BROKEN)
def test_a_broken_file_names_line_and_column(tmp_path: Path, breaks, says: str) -> None:  # type: ignore[no-untyped-def]
    """Every way in which a file can be broken is one sentence that names the file and what is wrong in it."""
    with pytest.raises(InputError, match=says) as e:
        read_nccl_tests([save(tmp_path, breaks(printed("all_reduce")))])
    assert "slurm-17.out" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_broadcast_is_refused_by_name(tmp_path: Path) -> None:
    """Programs that measure what no plan uses are told by their root, and refused."""
    with pytest.raises(InputError, match="is the output of broadcast_perf, which no plan uses"):
        read_nccl_tests([save(tmp_path, printed("broadcast"))])


def test_devices_are_not_mixed(tmp_path: Path) -> None:
    """Files of two kinds of device belong into two profiles."""
    one, two = save(tmp_path, printed("all_reduce"), "a"), save(tmp_path, printed("all_reduce", device="NVIDIA A100-SXM4-80GB"), "b")
    with pytest.raises(InputError, match="import them into profiles of their own"):
        read_nccl_tests([one, two])
    assert read_nccl_tests([two]).device == "A100-SXM-80GB"


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    """No file, a file that does not exist, and one that is no text."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for paths in ([], [tmp_path / "none"], [tmp_path / "binary"]):
        with pytest.raises(InputError):
            read_nccl_tests(paths)
