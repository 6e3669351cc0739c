"""A table of training runs, one row a run, read into typed `Run`s whose empty cells are filled by what their engine does.

Only `model` dimensions (or a parameter count), `gpu` and `n_gpus` are needed. Every filled cell is named in `Run.assumed`.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from meshwright.costmodel import rundevices
from meshwright.costmodel.engines import Engine, release_year, resolve
from meshwright.costmodel.rowdims import dense_parameters, dimensions
from meshwright.costmodel.rowmodel import Dims
from meshwright.costmodel.rundevices import RunDevice
from meshwright.costmodel.spellings import Cells, recompute_of, schedule_of, sharding_of
from meshwright.profiling.errors import InputError


@dataclass(frozen=True)
class Run:
    """One training run. `shard` is the ZeRO stage and `shard_group` how many data-parallel ranks share one copy; `rate` is the
    peak of the precision over the 16-bit peak; `year` is the release's date; `measured_s` the published step, if any."""

    id: str
    model: str
    engine: Engine
    device: RunDevice
    dims: Dims
    year: float
    n_gpus: int
    per_node: int
    node_link_Bps: float
    network_Bps: float
    precision: str
    rate: float
    tp: int
    sp: bool
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int
    dp: float
    shard: int
    shard_group: float
    micro_batch: float
    microbatches: float
    global_batch: float
    seq: int
    recompute: str
    offload: bool
    schedule: str
    balanced: bool  # layers were moved between stages until they balance
    frozen: bool  # adapters only: no weight gradients of the base model
    quantised: bool  # frozen weights in 4 bits
    source: str = ""
    job: tuple[str, ...] = ()
    measured_s: float | None = None
    measured_GiB: float | None = None
    memory_metric: str = ""
    assumed: tuple[str, ...] = ()

    @property
    def low(self) -> bool:
        return self.rate > 1.0

    @property
    def tokens(self) -> float:
        """Tokens of one microbatch on one rank of its tensor-parallel group."""
        return self.micro_batch * self.seq / self.cp


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file. InputError if there is no such file, it is no table, or a needed column is missing."""
    if not path.exists():
        raise InputError(f"{path} does not exist")
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f)
            rows = list(reader)
            names = reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error, IsADirectoryError) as e:
        raise InputError(f"{path} is not a CSV table: {e}") from None
    missing = [c for c in ("id", "gpu", "n_gpus") if c not in names]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}: a table of runs needs id, gpu, n_gpus and the model's dimensions")
    if not rows:
        raise InputError(f"{path} has a header and no rows")
    return rows


# formats of eight and four bits: fp8, mxfp8, nvfp4, float8, e4m3, w4a8; not fp64, nor the 8 bits of an optimizer's states
NOTHING = ("", "none", "no", "false", "off", "0", "0.0")
LOW_PRECISION = re.compile(r"(?<![a-z])(?:(?:mx|nv)?fp|float|mx|nv|w)_?[48](?![0-9])|e[2-5]m[1-3]|^8$|^4$")


def parse(row: Mapping[str, str | None], where: str) -> Run:
    """A Run from the cells of one row. `where` is "file, row 7". InputError, one sentence, for what cannot be read."""
    c = Cells(row, where)
    assumed: list[str] = []

    def default(name: str, value, fill):  # type: ignore[no-untyped-def]
        if value is not None and value != "":
            return value
        assumed.append(name)
        return fill() if callable(fill) else fill

    notes = c.text("notes")
    n_gpus = c.count("n_gpus")
    if n_gpus is None:
        raise InputError(f"{where}, column n_gpus: the number of GPUs is missing")
    peak_cell = c.number("peak_tflops_bf16") or c.number("peak_tflops_prec")
    try:
        device = rundevices.find(c.text("gpu"), peak_cell)
    except InputError as e:
        raise InputError(f"{where}, column gpu: {e}") from None
    tp, pp, cp = (c.count(x) or 1 for x in ("tp", "pp", "cp"))
    year_cell = c.number("year")
    engine, known = resolve(c.text("software"), c.text("release"), year_cell, notes, model_parallel=tp * pp > 1)
    if not known:
        assumed.append("software")
    if device.year < 2020 and engine.attention != "unfused":
        engine = replace(engine, attention="unfused")  # flash attention needs Turing or later
    year = release_year(c.text("release"), c.text("software"), year_cell) or 2023.5
    dims = dimensions(c, where, assumed)
    precision = c.text("precision").lower() or ("fp16" if device.year < 2020 else "bf16")
    peak, base = c.number("peak_tflops_prec"), c.number("peak_tflops_bf16")
    low = bool(LOW_PRECISION.search(precision))
    rate = (peak / base if peak and base and peak > base else device.rate(precision)) if low else 1.0
    if precision in ("fp32", "tf32"):
        device = replace(device, peak_flops=device.peak_flops * device.rates.get(precision, 0.5))
    per_node = c.count("gpus_per_node") or min(device.per_node, n_gpus)
    ep = c.count("ep") or (_default_ep(dims, n_gpus, tp, pp, per_node) if dims.experts else 1)
    if tp * pp * cp > n_gpus:
        raise InputError(f"{where}: tp {tp} x pp {pp} x cp {cp} is more than the {n_gpus} GPUs")
    if pp > dims.layers + 2:  # embedding and head may be stages of their own
        raise InputError(f"{where}, column pp: {pp} stages are more than the {dims.layers} layers")
    seq = default("seq_len", c.count("seq_len"), lambda: 2048 if year < 2024 else 4096)
    micro = c.number("micro_batch") or None
    batch = c.number("global_batch") or None
    dp_cell = c.number("dp") or None
    cp, dp, micro, batch = _batches(n_gpus, tp, pp, cp, dp_cell, micro, batch, engine, assumed)
    sharding = c.text("zero_stage_or_fsdp")
    if not sharding and engine.zero != "zero3" and not _fits_replicated(dims, tp, pp, ep, engine, device):
        sharding = "zero3"  # weights and gradients alone exceed the device: the run cannot have kept whole copies
        assumed.append("zero_stage_or_fsdp")
    shard, group = sharding_of(sharding or engine.zero, dp * cp)
    if not sharding:
        assumed.append("zero_stage_or_fsdp")
    if shard == 3:
        engine = replace(engine, overlap_dp=True)  # FSDP and ZeRO-3 prefetch the next layer's parameters
    schedule, balanced = schedule_of(c.text("schedule"))
    if schedule.startswith("dualpipe"):
        engine = replace(engine, overlap_ep=True)  # what the schedule is for (DeepSeek-V3, section 3.2.1)
    vpp = c.count("vpp") or _default_vpp(dims.layers, pp, schedule, bool(c.text("schedule")), engine)
    task = c.text("task").lower()
    recompute = recompute_of(c.text("recompute"))
    if not recompute:
        assumed.append("recompute")
        recompute = engine.recompute
        if recompute == "none" and engine.zero == "zero3" and not _activations_fit(dims, micro * seq / cp, tp, pp, dp * cp, device, task):
            recompute = "full"  # engines of this kind have no other way to fit
    sp = c.flag("sp")
    link, network = c.number("intra_bw_GBps"), c.number("inter_bw_GBps_per_gpu")
    measured = c.number("canon_step_s") or None
    rate_cell = c.number("canon_tokens_per_s_per_gpu")
    if measured is None and rate_cell and c.number("global_batch"):
        measured = batch * seq / (rate_cell * n_gpus)
    job = tuple(c.text(k) for k in ("source_key", "model", "gpu", "n_gpus", "seq_len", "precision", "global_batch"))
    return Run(
        id=c.text("id"), model=c.text("model"), engine=engine, device=device, dims=dims, year=year, n_gpus=n_gpus, per_node=per_node,
        node_link_Bps=link * 1e9 if link else device.node_link_Bps, network_Bps=network * 1e9 if network else device.network_Bps,
        precision=precision, rate=rate, tp=tp, sp=(engine.sequence_parallel if sp is None else sp) and tp > 1, pp=pp,
        vpp=1 if schedule.startswith(("zb", "v-", "dualpipe")) else vpp, cp=cp, ep=ep, etp=c.count("etp") or 1, dp=dp, shard=shard,
        shard_group=group, micro_batch=micro, microbatches=max(1.0, batch / (dp * micro)), global_batch=batch, seq=seq,
        recompute=recompute, offload=c.text("offload").lower() not in NOTHING, schedule=schedule, balanced=balanced,
        frozen="lora" in task, quantised="qlora" in task, source=c.text("source_key") or c.text("source"), job=job, measured_s=measured,
        measured_GiB=c.number("measured_peak_mem_GiB"), memory_metric=c.text("mem_metric"), assumed=tuple(assumed),
    )  # fmt: skip


def _batches(
    n: int, tp: int, pp: int, cp: int, dp_cell: float | None, micro: float | None, batch: float | None, engine: Engine, assumed: list[str]
) -> tuple[int, float, float, float]:  # fmt: skip
    """Context- and data-parallel degree, microbatch and global batch. Ranks that the batch cannot feed split the sequence."""
    dp = n / (tp * pp * cp)
    if dp < 1 and dp_cell:
        dp = dp_cell
    dp = max(dp, 1.0)
    if micro is None:
        assumed.append("micro_batch")
        share = batch / dp if batch else 1.0
        # engines without gradient accumulation by default take their share of the batch at once
        micro = max(1.0, min(share, 8.0)) if engine.zero == "zero3" and pp == 1 else 1.0
    if batch is None:
        assumed.append("global_batch")
        batch = dp * micro * (1 if pp == 1 else 4 * pp)
    spread = dp * micro / batch
    if spread > 1:
        if dp_cell and dp_cell * micro <= batch and abs(dp_cell - dp) < 0.5:
            spread = 1.0
        elif batch >= dp:
            micro = batch / dp  # the microbatch cannot be larger than a rank's share
            spread = 1.0
        else:
            micro = 1.0 if micro > batch else micro
            spread = max(1.0, dp * micro / batch)
            cp, dp = max(1, round(cp * spread)), dp / spread
            assumed.append("cp")
    return cp, dp, micro, batch


def _default_ep(d: Dims, n: int, tp: int, pp: int, per_node: int) -> int:
    """Experts spread over the data-parallel ranks of a node, where a run does not say."""
    return max(1, math.gcd(d.experts, max(1, min(per_node, n // (tp * pp)))))


def _default_vpp(layers: int, pp: int, schedule: str, stated: bool, engine: Engine) -> int:
    """Chunks of about four layers where the engine interleaves and the layers (with embedding and head as one each) divide."""
    if pp == 1 or (schedule != "interleaved" and (stated or not engine.interleaves)):
        return 1
    least = 2 if schedule == "interleaved" and stated else 1
    for count in (layers, layers + 1, layers + 2):
        if count % pp == 0:
            each = count // pp
            return next((each // chunk for chunk in (4, 5, 3, 2, 1) if each % chunk == 0 and each // chunk >= least), 1)
    return 1


def _fits_replicated(d: Dims, tp: int, pp: int, ep: int, engine: Engine, device: RunDevice) -> bool:
    """Whether a rank's weights and gradients fit its memory when they are not sharded over data-parallel ranks."""
    rest = dense_parameters(replace(d, ffn=0) if d.experts else d)
    experts = 3.0 * d.hidden * d.moe_ffn * d.experts * (d.layers - d.dense_first)
    local = rest / (tp * pp) + experts / (ep * pp)
    return local * (engine.weight_B + engine.gradient_store_B) < 0.95 * device.memory_GiB * 2**30


def _activations_fit(d: Dims, tokens: float, tp: int, pp: int, ranks: float, device: RunDevice, task: str) -> bool:
    """Whether all activations of a microbatch and the sharded states fit (Korthikanti et al. 2022, without scores)."""
    wide = d.moe_ffn * d.top_k if d.experts else d.ffn
    per_layer = 2 * (4 * d.hidden + (2 * d.heads + 2 * d.kv_heads) * d.head_dim / tp + (4 if d.gated else 2) * wide / tp)
    states = (0.6 if "qlora" in task else 2 if "lora" in task else 16) * dense_parameters(d) / (tp * pp * max(1.0, ranks))
    return tokens * d.layers * per_layer + states < 0.9 * device.memory_GiB * 2**30


def parse_all(
    rows: list[dict[str, str]], path: Path, keep: Callable[[dict[str, str]], bool] = lambda row: True
) -> list[tuple[dict[str, str], Run | str]]:
    """Every kept row with its Run, or with the sentence that says why it has none."""
    found: list[tuple[dict[str, str], Run | str]] = []
    for i, row in enumerate(rows, start=2):
        if not keep(row):
            continue
        try:
            found.append((row, parse(row, f"{path.name}, row {i}")))
        except InputError as e:
            found.append((row, str(e)))
    return found
