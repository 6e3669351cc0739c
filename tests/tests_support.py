"""Stands in for tracing and searching, so that what reads, writes and exits can be tested by the thousand."""

from __future__ import annotations

from typing import Any

from meshwright.planner.check import CheckResult, Figures, Inputs, Setting
from meshwright.planner.checkconfig import CheckSpec
from meshwright.planner.checkrun import Graphs
from meshwright.planner.plan import Layout, Range
from meshwright.planner.solve import parse_limit
from meshwright.profiling.cluster import Cluster, parse_cluster
from meshwright.profiling.errors import InputError
from meshwright.profiling.graph import Coverage

GIB = 2**30


def stub(spec: CheckSpec, place: dict[str, Any], graphs: Graphs) -> CheckResult:
    """As checkrun.evaluate, of a model that needs as many GiB (p95) as its sequence has tokens. 13 cannot be evaluated."""
    cluster = spec.cluster if isinstance(spec.cluster, Cluster) else parse_cluster(spec.cluster or "1xH100-SXM")
    limit_bytes = parse_limit(spec.limit, cluster.device.memory_bytes)
    if spec.seq == 13:
        raise InputError("13 is unlucky")
    needed = float(spec.seq or 1) * GIB
    layout = Layout(dp=cluster.size)
    figures = Figures(
        inputs=Inputs(
            model=spec.model, cluster=cluster.name, devices=cluster.size, batch=spec.batch or cluster.size, seq=spec.seq or 1,
            precision=spec.precision or "bf16", numel=10**9, layers=4,
        ),
        layout=layout, peak=Range(p05=needed / 1.2, p50=needed / 1.2, p95=needed), capacity_bytes=cluster.device.memory_bytes,
        limit_bytes=limit_bytes, by_kind={"activations": needed / 1.2}, peak_event="backward of the loss",
        step_s=None if spec.mode == "infer" else 1.0,
    )  # fmt: skip
    fits = needed <= limit_bytes
    nearest = () if fits else (Setting(change="recompute=full", layout=layout, devices=cluster.size, peak_bytes=limit_bytes / 2, slower=0.2),)
    status = "fits" if fits else "does_not_fit"
    return CheckResult(**place, status=status, figures=figures, nearest=nearest, coverage=Coverage(ops=3, modelled=3, free=0))  # type: ignore[arg-type]
