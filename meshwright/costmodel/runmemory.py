"""Peak memory of a published run, closed form: what every rank holds at the moments where it may hold most, and the worst of them.

    states        weights, gradients and optimiser states of the rank's layers (Rajbhandari et al. 2020, section 5)
    activations   microbatches in flight (schedules.py) x layers x what a layer keeps (runmemory_layers.py)
    moments       the loss on the last stage; backward of a layer; the gradient of a table, on the first; the optimiser's step

What the run's own figure shows is then the allocator's business (allocator.py): allocated, reserved, or the driver's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from meshwright.costmodel.allocator import DeviceBytes, constants, device_bytes, needed
from meshwright.costmodel.features import features
from meshwright.costmodel.rowmodel import RowModel, build
from meshwright.costmodel.runmemory_layers import Kept, kept
from meshwright.costmodel.runs import Run
from meshwright.costmodel.schedules import Schedule, find

GIB = 2.0**30
Metric = Literal["allocated", "reserved", "device"]
NF4_B = 0.516  # bytes per parameter in 4 bits with doubly quantised scales (Dettmers et al. 2023, arXiv:2305.14314, section 3)
# in-flight microbatches of a pipeline that interleaves the loss of a stage over all (Lin et al. 2024, nnScaler), over those of 1F1B
# (Yeung et al. 2024, arXiv:2411.05288, section 6.2)
INTERLACED = 1.5


@dataclass(frozen=True)
class Peak:
    """The worst moment of the worst rank. `live` are bytes of tensors; `parts` are where they go; `reported` is what torch and the
    driver say of them; `metric` is the one of these that the run publishes."""

    live: float
    moment: str
    rank: int
    parts: dict[str, float]
    reported: DeviceBytes
    metric: Metric

    @property
    def p50(self) -> float:
        return float(getattr(self.reported, self.metric)[0])

    @property
    def p95(self) -> float:
        return float(getattr(self.reported, self.metric)[1])


@dataclass(frozen=True)
class _Stage:
    """What one rank holds: parameters of layers and tables, microbatches in flight, and whether it computes the loss."""

    rank: int
    layers: float
    tables: float  # embedding and head, in tables
    flight: float
    loss: bool
    embeds: bool


def metric_of(run: Run) -> Metric:
    """Which figure a run publishes: what its metric says, else what its engine prints."""
    low = run.memory_metric.lower()
    if "smi" in low or "not stated" in low or "driver" in low:
        return "device"
    if "reserved" in low or "allocated" in low or "active" in low:
        return "reserved" if "reserved" in low else "allocated"
    return run.engine.prints


def peak_bytes(run: Run, f: dict[str, float] | None = None) -> float:
    """Bytes (p50) that the run's own metric would show."""
    return peak(run, f).p50


def peak(run: Run, f: dict[str, float] | None = None, schedule: str = "") -> Peak:
    """The peak of a run. `f`: its features, if at hand. `schedule`: the run's own words for its schedule, which may say that it holds
    more than the schedule that prices it."""
    f = features(run) if f is None else f
    model = build(run.dims)
    interlaced = INTERLACED if "interlac" in schedule.lower() else 1.0
    found = _peak(run, model, f, interlaced)
    if "recompute" in run.assumed and run.recompute == "none" and run.engine.light:
        for more, light in ((run, True), (replace(run, recompute="full"), False)):
            if fits(run, found):
                break
            found = _peak(more, model, f, interlaced, light)
    return found


def fits(run: Run, found: Peak) -> bool:
    """Whether the run fits its device. Cached segments are given back when memory is short, so that most of the gap between allocated
    and reserved does not count."""
    return needed(found.reported, expandable=run.engine.expandable) < run.device.memory_GiB * GIB * constants().usable


def _peak(run: Run, model: RowModel, f: dict[str, float], interlaced: float, light: bool = False) -> Peak:
    e, d = run.engine, run.dims
    layer = _mean(run, model, light)
    table = d.vocab * d.hidden / run.tp
    layer_params = max(0.0, (f["params"] * run.pp - model.embedding_params / run.tp) / d.layers + f["expert_params"] * run.pp / d.layers)
    whole_params = layer_params * (2 if run.schedule == "dualpipe" else 1)
    shards = f["group"] if run.shard else 1.0
    states = _states(run, shards)
    logits = run.tokens * d.vocab / run.tp * (e.loss_split_B if run.tp > 1 else e.loss_B)
    late_gradients = e.frees_gradients and run.microbatches == 1 and not run.frozen
    split = 1 / (run.tp if run.sp else 1)
    carry = run.tokens * d.hidden * (8 * split + (2 if run.sp else 0))  # last norm and hidden states around the loss, gathered for the head
    worst: Peak | None = None
    for s in _stages(run, f):
        params = s.layers * whole_params + s.tables * table
        fixed = params * (states.base + (0 if late_gradients else states.gradients))
        if run.frozen:
            fixed = s.layers * whole_params * states.base + s.tables * table * e.weight_B / (shards if run.shard == 3 else 1)
        held = s.flight * interlaced * s.layers * layer.stays * run.tokens
        one = s.layers * layer.stays * run.tokens
        gathered, reducing, pools = _gathered(run, whole_params, s.tables * table, params, shards)
        bucket = e.bucket_B if run.dp > 1 and not run.frozen else 0.0
        work = layer.backward + (layer.whole if run.recompute == "full" or layer.whole > layer.stays else 0.0)
        moments = {
            "backward": {"activations": held, "one layer's backward": work * run.tokens, "gathered": gathered + reducing},
            "step": {"gradients": params * states.gradients if late_gradients else 0.0, "step": params * states.step},
        }
        if s.loss:
            moments["loss"] = {"activations": held, "logits": logits + carry, "gathered": gathered}
        if s.embeds and not run.frozen:
            rest = max(0.0, held - one)
            moments["table"] = {"activations": rest, "gradient of the table": 2 * table, "gathered": gathered}
        for moment, parts in moments.items():
            parts = {"states": fixed, "buckets": bucket} | parts
            live = sum(parts.values())
            if worst is None or live > worst.live:
                worst = Peak(live, moment, s.rank, parts, _reported(run, live, pools), metric_of(run))
    assert worst is not None
    return worst


def _reported(run: Run, live: float, pools: tuple[float, float]) -> DeviceBytes:
    groups = sum(n > 1 for n in (run.tp, run.pp, run.dp, run.cp, run.ep)) + (run.n_gpus > 1)
    low, high = (
        device_bytes(
            live * error, gathered_bytes=pools[0], reduced_bytes=pools[1], communicators=float(groups), hopper=run.device.table != "A100",
            year=run.year, expandable=run.engine.expandable,
        )
        for error in constants().closed_form
    )  # fmt: skip
    return DeviceBytes(*((getattr(low, m)[0], getattr(high, m)[1]) for m in ("allocated", "reserved", "device")))


def _mean(run: Run, model: RowModel, light: bool) -> Kept:
    """A layer, averaged over the model's: what stays; the largest of what one needs."""
    stays, whole, backward = 0.0, 0.0, 0.0
    for layer, count in ((model.dense, model.dense_layers), (model.sparse, model.sparse_layers)):
        if layer is not None and count:
            k = kept(run, layer, light)
            stays += k.stays * count / run.dims.layers
            whole, backward = max(whole, k.whole), max(backward, k.backward)
    return Kept(stays, whole, backward)


@dataclass(frozen=True)
class _States:
    """Bytes per local parameter: kept all the time, gradients, and what the optimiser's step adds."""

    base: float
    gradients: float
    step: float


def _states(run: Run, shards: float) -> _States:
    """Weights, gradients and optimiser states (Rajbhandari et al. 2020, section 5)."""
    e = run.engine
    if run.frozen:
        return _States((NF4_B if run.quantised else e.weight_B) / (shards if run.shard == 3 else 1.0), 0.0, 0.0)
    state = 0.0 if run.offload else e.state_B
    if run.shard == 3:
        fp32 = e.weight_B if e.state_B < 12 else 0.0  # the fp32 master among the states is the parameter itself
        gradient = (4.0 if e.state_B >= 12 else e.gradient_store_B) if e.gradient_store_B else 0.0
        return _States((fp32 + state) / shards, gradient / shards, e.step_B / shards)
    gradient = e.gradient_store_B + (e.bf16_gradient_B if run.precision == "bf16" else 0.0)
    return _States(e.weight_B + state / shards, gradient / (shards if run.shard == 2 else 1.0), e.step_B / shards)


def _gathered(run: Run, layer: float, tables: float, params: float, shards: float) -> tuple[float, float, tuple[float, float]]:
    """Bytes that full sharding gathers: live at any time (the tables, which stay gathered, and a layer in 16 bits), live while a layer's
    gradients are reduced, and what the pools of the gathering and reducing streams keep beyond that (FSDP2: all-gather and
    reduce-scatter run on their own streams, whose blocks no other stream reuses)."""
    if run.shard != 3 or shards <= 1:
        return 0.0, 0.0, (0.0, 0.0)
    reduce_B = 0.0 if run.frozen else 4.0 if run.engine.gradient_B >= 4 else 2.0
    gathered = 2 * (tables + layer)
    return gathered, 2 * layer + (2 + reduce_B) * layer, (2 * (tables + 2 * layer), params * reduce_B / shards)


def _stages(run: Run, f: dict[str, float]) -> list[_Stage]:
    """Every rank of the pipeline."""
    if run.pp == 1:
        return [_Stage(0, run.dims.layers, 1.0 if run.dims.tied else 2.0, 1.0, True, True)]
    pp, s = run.pp, find(run.schedule)
    v_shape = s.shape == "V"
    out = []
    for r in range(pp // 2 if s.mirrored and pp > 1 else pp):
        layers = f["first"] if r == 0 else f["last"] if r == pp - 1 and not v_shape else f["middle"]
        tables = (2.0 if v_shape else 1.0) if r == 0 else 1.0 if r == pp - 1 and not v_shape else 0.0
        loss = r == 0 if v_shape else r == pp - 1
        out.append(_Stage(r, layers, tables, in_flight(run, s, r), loss, r == 0))
    return out


def in_flight(run: Run, s: Schedule, rank: int) -> float:
    """Microbatches whose activations a rank holds at once, in whole stages (schedules.py)."""
    pp, m = run.pp, max(1, int(run.microbatches))
    if s.mirrored:  # a rank's two stages of the model, half of the microbatches each
        return s.in_flight(max(1, pp // 2), rank, max(1, m // 2), 2) * 2
    v = 2 if s.shape == "V" else run.vpp
    if s.name == "interleaved" and v == 1:
        s = find("1F1B")
    return min(float(m), s.in_flight(pp, rank, m, v))
