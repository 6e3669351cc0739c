"""A table of ops is answered row for row, in its own unit."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from meshwright.costmodel.compile import compile_profile
from meshwright.costmodel.model import CostModel
from meshwright.costmodel.predict_ops import predict_table
from meshwright.profiling.errors import InputError
from tests.costmodel import made

HEADER = "op_name,kernel_source,gemm_dtype,m,n,k,nccl_dtype,num_gpus,message_size,note"


@pytest.fixture(scope="module")
def model() -> CostModel:
    return compile_profile(made.profile())


def ask(model: CostModel, folder: Path, *rows: str, header: str = HEADER) -> list[dict[str, str]]:
    source, output = folder / "ops.csv", folder / "out.csv"
    source.write_text("\n".join([header, *rows]) + "\n")
    predict_table(model, source, output)
    with output.open() as f:
        return list(csv.DictReader(f))


def test_rows_keep_their_order_columns_and_unit(model: CostModel, tmp_path: Path) -> None:
    got = ask(model, tmp_path, "all_reduce,NCCL,,,,,half,8,524288,a", "gemm,,bfloat16,1024,4096,4096,,,,b", "all_gather,,,,,,int8,2,1048576,c")

    assert [r["note"] for r in got] == ["a", "b", "c"]
    assert float(got[1]["latency_p50"]) == pytest.approx(1e3 * float(made.gemm_seconds(*map(made.np.array, (1024.0, 4096.0, 4096.0)))), rel=0.05)
    assert float(got[0]["latency_p50"]) == pytest.approx(1e3 * float(made.collective_seconds(made.np.array(2.0**20), 8)), rel=0.1)
    for row in got:
        assert float(row["latency_p05"]) <= float(row["latency_p50"]) <= float(row["latency_p95"])
        assert row["latency_basis"] == "fitted"


def test_rows_of_one_op_may_name_their_dtype_in_different_columns(model: CostModel, tmp_path: Path) -> None:
    header = "op_name,kernel_source,nccl_dtype,allreduce_dtype,num_gpus,message_size"
    got = ask(model, tmp_path, "all_reduce,NCCL,half,,8,33554432", "all_reduce,NCCL,,bfloat16,8,33554432", header=header)

    assert got[0]["latency_p50"] == got[1]["latency_p50"]


def test_what_was_not_measured_is_answered_from_the_datasheet(model: CostModel, tmp_path: Path) -> None:
    rows = ask(model, tmp_path, "gemm,,fp8,1024,4096,4096,,,,", "alltoall,NCCL,,,,,half,8,524288,")

    assert {r["latency_basis"] for r in rows} == {"datasheet"}


def test_attention_and_experts_are_answered_without_samples(model: CostModel, tmp_path: Path) -> None:
    header = "op_name,attn_dtype,kv_cache_dtype,batch_size,isl,num_heads,num_key_value_heads,head_dim,step"
    assert float(ask(model, tmp_path, "context_attention,bfloat16,bfloat16,4,2048,32,8,128,0", header=header)[0]["latency_p50"]) > 0
    header = "op_name,moe_dtype,num_tokens,hidden_size,inter_size,topk,num_experts,moe_tp_size,moe_ep_size,distribution"
    assert float(ask(model, tmp_path, "moe,bfloat16,4096,4096,1024,2,8,1,1,balanced", header=header)[0]["latency_p50"]) > 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["gemn,,bfloat16,1,1,1,,,,"], "row 1, column op_name: 'gemn' is not priced here"),
        (["gemm,,bfloat16,64,64,64,,,,", "gemm,,bfloat16,-4,64,64,,,,"], "row 2, column m: '-4' is not a size"),
        (["gemm,,bfloat16,1,1"], "row 1: 5 cells, the header has 10"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(model: CostModel, tmp_path: Path, rows: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ask(model, tmp_path, *rows)
    assert not (tmp_path / "out.csv").exists()


def test_blank_cells_of_optional_columns_take_their_default(model: CostModel, tmp_path: Path) -> None:
    header = "op_name,attn_dtype,batch_size,isl,num_heads,num_key_value_heads,head_dim,window_size"
    got = ask(model, tmp_path, "context_attention,bfloat16,4,2048,32,8,128,", "context_attention,bfloat16,4,2048,32,8,128,0", header=header)

    assert got[0]["latency_p50"] == got[1]["latency_p50"]


def test_odd_kernel_names_and_sizes_do_not_break_a_table(model: CostModel, tmp_path: Path) -> None:
    assert float(ask(model, tmp_path, "all_reduce,a|b,,,,,half,8,1024,")[0]["latency_p50"]) > 0
    with pytest.raises(InputError, match="row 2, column m: 'inf' is not a size"):
        ask(model, tmp_path, "all_reduce,NCCL,,,,,half,8,1024,", "gemm,,bfloat16,inf,64,64,,,,")
