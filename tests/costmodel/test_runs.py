"""Tables of runs: what a cell may look like, what an empty one means, and laws that every predicted step obeys."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from meshwright.costmodel import constants
from meshwright.costmodel.features import features
from meshwright.costmodel.predict import calibrate, predict_runs, read_calibration
from meshwright.costmodel.rowmodel import Dims, build
from meshwright.costmodel.runmemory import peak_bytes
from meshwright.costmodel.runs import Run, parse, read_rows
from meshwright.costmodel.spellings import recompute_of, schedule_of, sharding_of
from meshwright.costmodel.training import Batch, step
from meshwright.profiling.errors import InputError

pytest.importorskip("transformers")

SMALL = {"layers": 8, "hidden": 1024, "ffn_hidden": 4096, "heads": 16, "vocab": 32768, "gated_mlp": False, "seq_len": 2048}
WIDE = {"layers": 32, "hidden": 4096, "ffn_hidden": 16384, "heads": 32, "vocab": 51200, "gated_mlp": False, "seq_len": 2048}
BASE = {"id": "a", "gpu": "A100-80GB-SXM", "n_gpus": 32, "software": "megatron-lm", "release": "2023", "micro_batch": 1, "global_batch": 256}


def run(**cells: object) -> Run:
    return parse({k: str(v) for k, v in (BASE | WIDE | cells).items()}, "runs.csv, row 2")


def seconds(*runs: Run) -> list[float]:
    return [float(x) for x in step(Batch(runs), constants.load().theta)]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    names = sorted({k for r in rows for k in r})
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


# --- laws -------------------------------------------------------------------------------------------------------------------


def test_zero_bubble_schedules_are_close_with_many_microbatches() -> None:
    """With 32 microbatches a stage the bubble is all that a schedule changes: within 4 % of each other, 1F1B the slowest."""
    times = seconds(*(run(pp=8, schedule=s, global_batch=1024) for s in ("1F1B", "ZB-1p", "ZB-2p", "ZB-V")))
    assert max(times) == times[0]
    assert max(times) / min(times) < 1.04


def test_misaligned_width_costs_more_than_its_products() -> None:
    """Width 14400 (divisible by 64, but not when split by 8) is slower than 13824 by far more than its 8.5 % of extra products."""
    wide = {"layers": 8, "heads": 64, "tp": 8, "n_gpus": 8, "global_batch": 16, "vocab": 51200}
    slow, fast = seconds(run(hidden=14400, ffn_hidden=57600, **wide), run(hidden=13824, ffn_hidden=55296, **wide))
    assert slow / fast > 1.15


def test_full_recompute_costs_one_forward() -> None:
    """A third of forward plus backward, less what is not recomputed: head, optimiser."""
    none, full = seconds(run(recompute="none"), run(recompute="full"))
    assert 1.2 < full / none < 1.36


def test_tensor_parallelism_divides_compute_and_adds_traffic() -> None:
    """Products per device fall with every doubling, but not by as much as the ranks."""
    whole, half, quarter = (features(run(tp=t, n_gpus=t, global_batch=8)) for t in (1, 2, 4))
    assert whole["gemm_f"] > 1.8 * half["gemm_f"] > 3.2 * quarter["gemm_f"]
    assert whole.get("tp", 0) == 0 < half["tp"] < quarter["tp"]


def test_more_bandwidth_is_never_slower() -> None:
    """Network bandwidth, per device, from Ethernet to NDR."""
    times = seconds(*(run(n_gpus=64, inter_bw_GBps_per_gpu=b) for b in (3, 12.5, 25, 50)))
    assert times == sorted(times, reverse=True)


def test_parameters_of_the_traced_model_are_those_of_the_architecture() -> None:
    """Dense, gated with grouped heads, mixture of experts, and latent attention, from dimensions alone."""
    llama = build(Dims(32, 4096, 14336, 32, 8, 128, 128256, True, False))
    assert llama.params == pytest.approx(8.03e9, rel=0.01)
    mixture = build(Dims(48, 2048, 768, 32, 4, 128, 151936, True, False, experts=128, top_k=8, moe_ffn=768))
    assert mixture.params == pytest.approx(30.5e9, rel=0.01)
    assert mixture.active_params == pytest.approx(3.35e9, rel=0.02)


def test_column_and_row_products_alternate() -> None:
    """Megatron's split, found from the dataflow: queries, keys, values by columns, the output by rows, and so the MLP."""
    layer = build(Dims(32, 4096, 14336, 32, 8, 128, 128256, True, False)).dense
    assert layer is not None
    assert [p.split for p in layer.products] == ["columns"] * 3 + ["rows"] + ["columns"] * 2 + ["rows"]


def test_experts_cost_less_than_a_dense_model_of_their_size() -> None:
    """A mixture computes with its active parameters."""
    cells = {"ffn_hidden": 4096, "n_experts": 8, "top_k": 2, "moe_ffn_hidden": 4096, "gated_mlp": True, "ep": 8, "layers": 8}
    dense = {"ffn_hidden": 8 * 4096, "gated_mlp": True, "layers": 8}
    times = seconds(run(software="megatron-core", release="25.11", **cells), run(software="megatron-core", release="25.11", **dense))
    assert times[0] < 0.7 * times[1]


def test_recompute_and_sharding_save_memory() -> None:
    """Where activations are most of it, peak bytes fall with full recompute, with ZeRO-1 and again with ZeRO-3."""
    none, full, sharded, fully = (
        peak_bytes(run(software="", release="2023", zero_stage_or_fsdp=z, recompute=r, micro_batch=8))
        for z, r in (("none", "none"), ("none", "full"), ("zero1", "full"), ("zero3", "full"))
    )
    assert none > full > sharded > fully


# --- cells ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "1f1b"), ("1F1B (DeepSpeed)", "1f1b"), ("1F1B-I", "interleaved"), ("Interleaved 1F1B", "interleaved"), ("ZBH1", "zb-1p"),
     ("ZB-H2", "zb-2p"), ("ZB-V", "zb-v"), ("V-Half", "v-half"), ("DualPipeV", "dualpipe-v"), ("DualPipe", "dualpipe"), ("GPipe", "gpipe")],
)  # fmt: skip
def test_schedules_by_any_spelling(text: str, expected: str) -> None:
    """Published tables do not agree on names."""
    assert schedule_of(text)[0] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("none", (0, 1)), ("zero1(group 8)", (1, 8)), ("ZeRO-3", (3, 64)), ("fsdp16", (3, 16)), ("fsdp2(8)", (3, 8)), ("fsdp2(zero3)", (3, 64)),
     ("shard_grad_op", (2, 64)), ("2", (2, 64)), ("distributed optimizer", (1, 64)), ("HSDP", (3, 64))],
)  # fmt: skip
def test_shardings_by_any_spelling(text: str, expected: tuple[int, float]) -> None:
    """A stage and the ranks that share a copy, out of 64."""
    assert sharding_of(text, 64) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("", ""), ("False", "none"), ("True", "full"), ("selective", "selective"), ("block", "full"), ("core_attn", "selective")]
)
def test_recompute_by_any_spelling(text: str, expected: str) -> None:
    """Empty stays empty: the engine decides."""
    assert recompute_of(text) == expected


def test_a_row_with_only_a_size_a_gpu_and_a_count_is_predicted() -> None:
    """Everything else is what the software of that year did by default, and is named as assumed."""
    sparse = parse({"id": "x", "gpu": "H100", "n_gpus": "8", "model": "Some-7B"}, "runs.csv, row 2")
    assert {"software", "dimensions", "micro_batch", "global_batch", "seq_len", "recompute"} <= set(sparse.assumed)
    assert build(sparse.dims).params == pytest.approx(7e9, rel=0.1)
    assert seconds(sparse)[0] > 0


def test_an_unknown_gpu_is_priced_by_its_peak() -> None:
    """The row's own peak rate finds the nearest known device; with neither, the sentence names the column."""
    twice, once = seconds(run(gpu="Accelerator X", peak_tflops_bf16=624), run(gpu="Accelerator X", peak_tflops_bf16=312))
    assert twice < once
    with pytest.raises(InputError, match=r"runs.csv, row 2, column gpu: unknown GPU 'Accelerator X'"):
        run(gpu="Accelerator X")


def test_a_layout_that_cannot_hold_whole_copies_is_sharded() -> None:
    """Where weights and gradients alone exceed the device, an empty sharding cell cannot mean none."""
    large = {"layers": 80, "hidden": 8192, "ffn_hidden": 32768, "heads": 64}
    assert run(**large).shard == 3
    assert run(**large, tp=8).shard == 0


def test_bad_cells_name_file_row_and_column() -> None:
    """One sentence, no traceback."""
    with pytest.raises(InputError, match=r"^runs.csv, row 2, column tp: 'eight' is not a number$"):
        run(tp="eight")
    with pytest.raises(InputError, match="column n_gpus: the number of GPUs is missing"):
        run(n_gpus="")


# --- files ------------------------------------------------------------------------------------------------------------------


def test_predictions_keep_every_row(tmp_path: Path) -> None:
    """One row each, in order; a row that cannot be modelled says why, and ranges are ordered."""
    rows = [BASE | SMALL, BASE | SMALL | {"id": "b", "gpu": "unheard of"}, BASE | SMALL | {"id": "c", "software": "", "n_gpus": 8, "tp": 2}]
    out = tmp_path / "predictions.csv"
    predict_runs(write(tmp_path / "runs.csv", rows), out)
    with out.open() as f:
        written = list(csv.DictReader(f))
    assert list(written[0]) == ["id", "step_s_p05", "step_s_p50", "step_s_p95", "peak_bytes_p50", "peak_bytes_p95", "fits", "unmodelled"]
    assert [r["id"] for r in written] == ["a", "b", "c"]
    assert float(written[0]["step_s_p05"]) < float(written[0]["step_s_p50"]) < float(written[0]["step_s_p95"])
    assert float(written[0]["peak_bytes_p50"]) < float(written[0]["peak_bytes_p95"])
    assert written[1]["step_s_p50"] == ""
    assert "unheard of" in written[1]["unmodelled"]
    assert written[2]["fits"] == "true"
    assert written[2]["unmodelled"] == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("id,gpu\na,H100\n", "has no column 'n_gpus'"),
        ("id,gpu,n_gpus\n", "has a header and no rows"),
        (b"\xff\xfe\x00", "not a CSV"),
    ],
)
def test_a_broken_table_is_refused_in_one_sentence(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    """The file and what is wrong with it."""
    path = tmp_path / "runs.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        read_rows(path)


def test_one_measured_step_scales_runs_on_that_device_and_engine(tmp_path: Path) -> None:
    """calibrate stores measured over predicted; predictions of the same device and engine move by it, others do not."""
    cells = BASE | SMALL
    (tmp_path / "measured.json").write_text(json.dumps(cells | {"step_s": 3.0}))
    calibrate(tmp_path / "measured.json", tmp_path / "scale.json")
    scale = read_calibration(tmp_path / "scale.json")
    table = write(tmp_path / "runs.csv", [cells, cells | {"id": "b", "gpu": "H100"}])
    with_scale, without = predict_runs(table, calibration=scale), predict_runs(table)
    assert with_scale[0].step_s is not None
    assert without[0].step_s is not None
    assert with_scale[0].step_s[1] == pytest.approx(3.0, rel=1e-6)
    assert without[0].step_s[1] == pytest.approx(3.0 / scale.scale, rel=1e-6)
    assert with_scale[1] == without[1]


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("[1]", "must be a JSON object"), ('{"gpu": "H100"}', "step_s must be the measured seconds")]
)
def test_a_broken_measurement_is_refused(tmp_path: Path, content: str, message: str) -> None:
    """One sentence that names the file."""
    path = tmp_path / "measured.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        calibrate(path)


@pytest.mark.parametrize(
    ("precision", "low"), [("fp8-cs", True), ("mxfp8", True), ("nvfp4", True), ("w4a8", True), ("fp64", False), ("bf16 with 8-bit adam", False)]
)
def test_eight_bits_are_those_of_the_products(precision: str, low: bool) -> None:
    assert (run(gpu="H100-80GB-SXM", precision=precision).rate > 1) == low


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"tp": 8, "pp": 8}, "tp 8 x pp 8 x cp 1 is more than the 32 GPUs"),
        ({"pp": 32, "layers": 2, "hidden": 1024, "heads": 16}, "32 stages are more than the 2 layers"),
        ({"tp": 1.5}, "column tp: 1.5 must be a whole number"),
        ({"seq_len": "inf"}, "column seq_len: inf must be a number of at most 1e"),
    ],
)
def test_impossible_rows_are_refused(cells: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(**cells)


def test_no_offload_is_no_offload() -> None:
    assert not any(run(offload=x).offload for x in ("no", "false", "0", "none", ""))
    assert run(offload="optimizer").offload


def test_stated_interleaving_has_two_chunks_at_least() -> None:
    assert run(pp=8, layers=32, hidden=4096, heads=32, schedule="interleaved").vpp >= 2


def test_the_memory_of_a_gpu_is_not_read_from_other_numbers_of_its_name() -> None:
    assert run(gpu="NVL72 GB200", n_gpus=72).device.memory_GiB > 150
    assert run(gpu="DGX A100 (640GB)").device.name == "A100-SXM"
