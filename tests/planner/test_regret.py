"""benchmarks/regret.py as far as no table of runs is needed: distances, the nearest timed layout, and what a run becomes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from meshwright.costmodel.runs import Run, parse
from meshwright.planner.plan import Layout

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    """benchmarks/regret.py, which is no package."""
    spec = importlib.util.spec_from_file_location("benchmarks_regret", ROOT / "benchmarks" / "regret.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def run_of(**cells: Any) -> Run:
    row = {
        "id": "1", "model": "made", "layers": "32", "hidden": "4096", "heads": "32", "ffn_hidden": "16384", "vocab": "50304",
        "gpu": "A100-80GB-SXM", "n_gpus": "64", "gpus_per_node": "8", "seq_len": "2048", "precision": "bf16", "tp": "4", "pp": "4", "dp": "4",
        "micro_batch": "2", "global_batch": "256", "recompute": "full", "software": "megatron-lm-2023", "zero_stage_or_fsdp": "zero1",
        "source_key": "made", "canon_step_s": "10",
    }  # fmt: skip
    return parse(row | {k: str(v) for k, v in cells.items()}, "made, row 2")


def test_a_run_becomes_the_layout_that_it_names(benchmark: ModuleType) -> None:
    x = benchmark.layout_of(run_of())
    assert (x.tp, x.pp, x.dp, x.zero, x.replicas, x.micro_batch, x.recompute, x.schedule) == (4, 4, 4, 1, 1, 2, "full", "1f1b")
    x = benchmark.layout_of(run_of(tp=1, pp=1, dp=64, zero_stage_or_fsdp="zero1(group 8)"))
    assert (x.replicas, x.shard) == (8, 8)
    assert benchmark.layout_of(run_of(vpp=2, schedule="interleaved")).schedule == "interleaved"
    assert benchmark.layout_of(run_of(schedule="ZB-V")).vpp == 2


def test_a_schedule_that_the_space_lacks_is_no_neighbour_of_another(benchmark: ModuleType) -> None:
    zb1, zb2, plain = (benchmark.point_of(run_of(schedule=s)) for s in ("ZB-1p", "ZB-2p", "1F1B"))
    assert zb2.schedule == "zb-2p"
    assert zb1.distance(zb2) == zb2.distance(plain) == plain.distance(zb1) == 1.0
    assert plain.distance(benchmark.point_of(run_of(vpp=2, schedule="interleaved"))) == 1.0  # of vpp alone


def test_distance_is_a_sum_of_logs_and_steps(benchmark: ModuleType) -> None:
    a = benchmark.Point(Layout(tp=8, pp=2, dp=4, zero=1, micro_batch=2, recompute="full"), 2.0, False)
    b = benchmark.Point(Layout(tp=2, pp=4, dp=8, zero=3, micro_batch=1, recompute="by stage"), 0.5)
    assert a.distance(a) == 0.0
    assert a.distance(b) == b.distance(a) == 2 + 1 + 1 + 1 + 2 + 1.5 + 1


def test_of_layouts_equally_near_the_slowest_counts(benchmark: ModuleType) -> None:
    points = [benchmark.point_of(run_of(micro_batch=m)) for m in (1, 4, 8)]
    timed = [benchmark.Timed(p, (run_of(canon_step_s=s),)) for p, s in zip(points, (11, 10, 12), strict=True)]
    group = benchmark.Group((), timed, [])
    found, distance = group.nearest(benchmark.point_of(run_of(micro_batch=2)))
    assert (found.seconds, distance) == (11.0, 1.0)
    assert group.regret(found) == pytest.approx(0.1)


def test_a_layout_timed_twice_counts_with_its_median(benchmark: ModuleType) -> None:
    runs = [run_of(canon_step_s=s) for s in (10, 14, 11)] + [run_of(micro_batch=4), run_of(micro_batch=4, canon_step_s="", oom=True)]
    said: list[str] = []
    (group,) = benchmark.groups_of(runs, said.append, {"1"})
    assert sorted(t.seconds for t in group.timed) == [10.0, 11.0]
    assert len(group.failed) == 1
    assert "4 runs in 2 layouts" in said[0]


def test_what_a_group_has_in_common_is_held(benchmark: ModuleType) -> None:
    (group,) = benchmark.groups_of([run_of(), run_of(micro_batch=4), run_of(tp=8, dp=2)], lambda _: None)
    held = benchmark.held(group, benchmark.COMMON)
    assert held["pp"] == 4
    assert held["recompute"] == "full"
    assert not {"tp", "dp", "micro_batch"} & held.keys()


@pytest.mark.parametrize(
    ("layers", "pp", "sizes"),
    [(80, 8, [10] * 8), (70, 12, [5, *[6] * 10, 5]), (78, 12, [*[7] * 11, 1]), (7, 5, [2, 2, 1, 1, 1]), (30, 16, [1, *[2] * 14, 1])],
)
def test_stages_of_an_engine(benchmark: ModuleType, layers: int, pp: int, sizes: list[int]) -> None:
    assert np.diff((0, *benchmark.engine_ends(layers, pp))).tolist() == sizes


def test_the_cluster_has_the_links_of_the_run(benchmark: ModuleType) -> None:
    c = benchmark.cluster_of(run_of(inter_bw_GBps_per_gpu=6.25))
    assert (c.size, c.devices_per_node, c.device.name) == (64, 8, "A100-SXM-80GB")
    assert c.network_link.bandwidth_Bps == 6.25e9
    assert c.node_link == c.device.node_link
    odd = benchmark.cluster_of(run_of(gpu="V100-32GB-SXM", precision="fp16"))
    assert odd.device.peak_flops["bf16"] == 125e12
    assert benchmark.cluster_of(run_of(gpu="GB200-NVL72", n_gpus=256, gpus_per_node=72, tp=1, pp=1, dp=256)).devices_per_node == 64
