"""Compiling a profile: what is fitted, how wrong it says it is, and what the file holds."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path

import numpy as np
import pytest

from meshwright.costmodel.compile import compile_profile, deduplicate
from meshwright.costmodel.model import CostModel, from_datasheet, shipped, shipped_names
from meshwright.costmodel.segments import fit_segments
from meshwright.profiling.cluster import load_device
from meshwright.profiling.errors import InputError
from meshwright.profiling.hardware import HardwareProfile
from tests.costmodel import made


@pytest.fixture(scope="module")
def model() -> CostModel:
    return compile_profile(made.profile())


def error(model: CostModel, c: dict[str, np.ndarray]) -> np.ndarray:
    p = model.seconds("gemm", dtype="bf16", m=c["m"], n=c["n"], k=c["k"])
    return np.asarray(np.abs(p / c["seconds"] - 1))


def test_unseen_shapes_are_predicted_to_within_the_noise(model: CostModel) -> None:
    fresh = made.gemms(2000, np.random.default_rng(7), noise=0.0)

    assert np.median(error(model, fresh)) < 0.025
    row = next(r for r in model.report if r["class"] == "gemm" and r["split"] == "random fifth")
    assert row["median"] < 0.035
    assert row["median"] < row["roofline_median"]


def test_shapes_larger_than_any_sample_are_extrapolated(model: CostModel) -> None:
    """Sixty-four times the work of the largest sample: a learned curve alone would stand still there."""
    size = np.full(3, 32768.0)
    c = {"m": size, "n": size, "k": size, "seconds": made.gemm_seconds(size, size, size)}

    assert error(model, c).max() < 0.12


def test_the_interval_covers_nine_of_ten_unseen_samples(model: CostModel) -> None:
    fresh = made.gemms(4000, np.random.default_rng(11))

    e = model.estimate("gemm", dtype="bf16", m=fresh["m"], n=fresh["n"], k=fresh["k"])

    inside = ((fresh["seconds"] >= e.p05) & (fresh["seconds"] <= e.p95)).mean()
    assert 0.85 <= inside <= 0.95
    assert set(e.basis) == {"fitted"}


def test_the_fast_estimate_is_near_the_full_one(model: CostModel) -> None:
    c = made.gemms(1000, np.random.default_rng(3), noise=0.0)
    shape = {"m": c["m"], "n": c["n"], "k": c["k"]}

    full, fast = (model.seconds("gemm", dtype="bf16", fast=f, **shape) for f in (False, True))

    assert np.median(np.abs(fast / full - 1)) < 0.06


def test_a_class_without_samples_is_priced_by_the_datasheet_and_says_so(model: CostModel) -> None:
    e = model.estimate("attention_context", dtype="bf16", batch=1, q=4096, heads=32, kv_heads=8, head_dim=128)
    fp8 = model.estimate("gemm", dtype="fp8", m=4096, n=4096, k=4096)

    assert e.basis[0] == fp8.basis[0] == "datasheet"
    flops = 4 * 32 * 128 * 4096 * 4097 / 2
    assert e.p50[0] > flops / made.PEAK
    assert e.p95[0] / e.p05[0] == pytest.approx(4.0)
    assert fp8.p50[0] == pytest.approx(2 * 4096**3 / (0.7 * 2 * made.PEAK), rel=0.1)


def test_a_saved_model_answers_the_same_and_holds_no_pickle(model: CostModel, tmp_path: Path) -> None:
    path = tmp_path / "made.costs"
    c = made.gemms(300, np.random.default_rng(5))
    shape = {"m": c["m"], "n": c["n"], "k": c["k"]}

    model.save(path)
    back = CostModel.load(path)

    np.testing.assert_allclose(back.seconds("gemm", dtype="bf16", **shape), model.seconds("gemm", dtype="bf16", **shape), rtol=1e-4)
    one = np.array([1e6])
    np.testing.assert_allclose(back.collective_seconds("all_gather", one, 8), model.collective_seconds("all_gather", one, 8), rtol=1e-4)
    assert back.report[0]["class"] == "gemm"
    with zipfile.ZipFile(path) as z:
        for name in z.namelist():
            with pytest.raises((ValueError, IndexError, UnicodeDecodeError, EOFError)):
                list(pickletools.genops(z.read(name)))


def test_a_size_limit_is_kept(tmp_path: Path) -> None:
    whole = compile_profile(made.profile())
    small = compile_profile(made.profile(), most_bytes=3_000)

    assert len(small.to_bytes()) < 0.75 * len(whole.to_bytes())


def test_equal_profiles_compile_to_equal_files() -> None:
    assert compile_profile(made.profile(600)).to_bytes() == compile_profile(made.profile(600)).to_bytes()


def test_duplicates_count_once_with_their_median() -> None:
    t = made.gemms(3, np.random.default_rng(0))
    doubled = {k: np.concatenate([v, v, v]) for k, v in t.items()}
    doubled["seconds"] = np.concatenate([t["seconds"], t["seconds"] * 3, t["seconds"] * 1.1])

    assert sorted(deduplicate("gemm", doubled)["seconds"]) == pytest.approx(sorted(t["seconds"] * 1.1))


def test_segments_find_where_the_protocol_changes() -> None:
    sizes = 2.0 ** np.arange(9, 30)

    fitted = fit_segments(sizes, made.collective_seconds(sizes, 8))

    between = 2.0 ** np.arange(9.5, 29, 1)
    clear = (between < 40000) | (between > 140000)
    np.testing.assert_allclose(fitted.seconds(between)[clear], made.collective_seconds(between, 8)[clear], rtol=0.03)
    assert fitted.bandwidth_Bps == pytest.approx(8e10 * 8 / 7, rel=0.02)


def test_collectives_between_and_beyond_the_measured_ranks(model: CostModel) -> None:
    size = np.array([1e8])
    at = {n: float(model.collective_seconds("all_reduce", size, n)[0]) for n in (2, 3, 4, 8, 16)}  # type: ignore[index]

    assert at[2] < at[3] < at[4] < at[8] < at[16]
    assert at[16] == pytest.approx(float(made.collective_seconds(size, 16)[0]), rel=0.1)
    assert model.collective_seconds("all_to_all", size, 4) is None


def test_nothing_to_fit_is_an_error() -> None:
    with pytest.raises(InputError, match="has no class with 5 samples or more"):
        compile_profile(HardwareProfile("Empty"))


def test_a_file_that_is_no_cost_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.costs"
    path.write_text("no")

    with pytest.raises(InputError, match="is not a compiled cost model"):
        CostModel.load(path)
    with pytest.raises(InputError, match="nor a device with a shipped cost model: A100"):
        CostModel.load("Z9000")


def test_a_device_without_samples_is_its_datasheet() -> None:
    device = load_device("L40S")

    e = from_datasheet(device).estimate("gemm", dtype="bf16", m=8192, n=8192, k=8192)

    assert e.basis[0] == "datasheet"
    assert e.p50[0] > 2 * 8192**3 / device.peak_flops["bf16"]


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_models_are_small_and_sane(name: str) -> None:
    """Larger products take longer, and none is faster than the datasheet's peak."""
    model = CostModel.load(name)
    size = 2.0 ** np.arange(8, 15)

    seconds = model.seconds("gemm", dtype="bf16", m=size, n=size, k=size)

    path = shipped(name)
    assert path is not None
    assert path.stat().st_size < 1_000_000
    assert (np.diff(seconds) > 0).all()
    assert (2 * size**3 / seconds < load_device(name).peak_flops["bf16"]).all()
    assert model.provenance["source"]


def test_four_devices_are_shipped() -> None:
    assert {"H100-SXM", "H200-SXM", "A100-SXM-80GB", "B200"} <= set(shipped_names())
