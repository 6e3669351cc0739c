"""Seconds and MB of a plan of layers (LayerPlan) under a layer profile.

The accounts are those of Hetu-Galvatron's cost model (github.com/PKU-DAIR/Hetu-Galvatron, core/cost_model; arXiv 2211.13878 and
2307.02031), restated. Of one microbatch on a stage of `ranks` ranks, with `samples` = batch / microbatches / data of it on a rank:

    forward       a line fitted to the measured forwards, at samples / degree, of a layer; half of the ends' line for each of the two
    backward      2 x forward; a checkpointed layer runs its forward again
    tensor        `Account.tensor` half all-reduces (an all-gather or reduce-scatter of Megatron's sequence parallelism) of samples x
                  sequence x hidden; Ulysses `Account.ulysses` all-to-alls of as much; a checkpointed layer's forward repeats its own.
                  From the table by size, and between its sizes from the line fitted to it
    ZeRO-3        `Account.gathers` all-gathers of the parameters, not overlapped
    gradients     one all-reduce of bf16 gradients a step: 2 (n - 1) / n of the bytes over the bus bandwidth of the n ranks. It
                  overlaps with the backward of the layer (with half of it, where the degree is half of the stage or more), and both
                  then take `overlap` times as long. What that adds to a layer is its `sync_s`
    hops          the activation goes to the next stage and its gradient comes back: charged to layers alike, 2 x stages in total
    ends          the embedding's and head's all-gather, where ZeRO-3, overlaps with their forward, and the gradient reduction of
                  the last microbatch with their backward
    resharding    where the degree changes inside a stage, (k - 1) / k of the larger degree k's activation there, and back. Its search
                  charges that to the choice, and leaves it out of the step that it reports; here it is in the step

Memory of a rank, each layer rounded up to a MB: fp32 parameters, gradient and two moments (4 x parameters) by `zero_share`;
activations of the microbatches in flight, stages - stage of them under 1F1B; the ends with those of their stage; 1024 MB of
context; one all-gather buffer where Megatron's sequence parallelism is used; and 20 % of the limit kept back for the allocator's cache.
What a checkpointed layer recomputes is not in it.

The reduction of gradients is counted once a step, while the shares of ZeRO are those of a runtime that reduces after each microbatch
(async_grad_reduce off): both as Galvatron does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from meshwright.profiling.errors import InputError
from meshwright.profiling.layerprofile import EndSamples, LayerPlan, LayerProfile, Links, Strategy

CONTEXT_MB = 1024.0  # Galvatron, TrainArgs.pytorch_context_mem
CACHE_SHARE, CACHE_FROM_GB = 0.2, 20  # Galvatron, DpOnModel: kept back where the limit is of more than 20 GB


@dataclass(frozen=True)
class Account:
    """What is counted. `tensor` and `ulysses`: collectives in a layer's forward and backward. `pipeline`: how stages make a step."""

    name: str
    gathers: tuple[int, int]  # all-gathers of ZeRO-3 in forward and backward
    tensor: tuple[int, int]
    ulysses: tuple[int, int]
    pipeline: Literal["closed", "exact"]
    ulysses_reduces: bool  # gradients of Ulysses ranks are reduced, where there are no other replicas too


# The run that chose the plan: one gather reproduces the step that it reported. Its form for the pipeline counts the first and
# the last stage only, so that it may be asked about even cuts alone.
GALVATRON = Account("Galvatron's account", (1, 0), (4, 2), (2, 2), "closed", False)
# ZeRO-3 gathers for the forward and again for the backward (Rajbhandari et al. 2020, section 7.2.2); a layer of Megatron's sequence
# parallelism has four half all-reduces each way (Korthikanti et al. 2022, section 4.2.2), one of Ulysses exchanges q, k, v and the output
# (Jacobs et al. 2023, section 3.2); 1F1B is followed event by event.
EXACT = Account("exact account", (1, 1), (4, 4), (4, 4), "exact", True)


@dataclass(frozen=True)
class Cost:
    """Of one layer, or of the ends on a stage: seconds of a microbatch, what the gradient reduction adds, MB held and MB in flight."""

    forward_s: float
    backward_s: float
    sync_s: float
    states_MB: float
    activation_MB: float  # of one microbatch

    @property
    def seconds(self) -> float:
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class StagePrice:
    forward_s: float
    backward_s: float
    sync_s: float
    memory_MB: float


@dataclass(frozen=True)
class Price:
    """`fits` compares each stage's `memory_MB` with `budget_MB`, the limit less `reserve_MB`."""

    step_s: float
    samples_per_s: float
    stages: tuple[StagePrice, ...]
    budget_MB: float
    reserve_MB: float

    @property
    def fits(self) -> bool:
        return all(s.memory_MB <= self.budget_MB for s in self.stages)


def zero_share(zero: int, ranks: int, microbatches: int) -> float:
    """Share of 4 x parameters that a rank holds: ZeRO-2 keeps the bf16 parameters whole (1/8), ZeRO-3 nothing; 0.003 for what is not
    evenly cut, and 5/4 for fp32 gradients that are summed over microbatches. Galvatron, MemoryCostModel, mixed precision."""
    if zero == 0 or ranks == 1:
        return 1.0
    share = 1 / ranks + 0.003
    return (share if zero == 3 else 7 / 8 * share + 1 / 8) * (5 / 4 if microbatches > 1 else 1.0)


def makespan(forward_s: Sequence[float], backward_s: Sequence[float], sync_s: Sequence[float], microbatches: int) -> float:
    """Seconds of a 1F1B step: stage i runs stages - 1 - i forwards, then one forward and one backward in turn; at its end it
    reduces its gradients for `sync_s` more. Narayanan et al. 2019 (arXiv 1806.03377)."""
    stages, m = len(forward_s), microbatches
    if stages == 1:
        return m * (forward_s[0] + backward_s[0]) + sync_s[0]
    free = [0.0] * stages
    ran_f, ran_b = [0] * stages, [0] * stages
    end_f = [[0.0] * m for _ in range(stages)]
    end_b = [[0.0] * m for _ in range(stages)]
    left = 2 * m * stages
    while left:
        for i in range(stages):
            while True:
                j = ran_f[i]
                if j < m and j - ran_b[i] < stages - i:  # its turn is a forward
                    if i and ran_f[i - 1] <= j:
                        break
                    at = max(free[i], end_f[i - 1][j]) if i else free[i]
                    free[i] = end_f[i][j] = at + forward_s[i]
                    ran_f[i] += 1
                else:
                    j = ran_b[i]
                    if j == m or (ran_b[i + 1] if i + 1 < stages else ran_f[i]) <= j:
                        break
                    at = max(free[i], end_b[i + 1][j]) if i + 1 < stages else max(free[i], end_f[i][j])
                    free[i] = end_b[i][j] = at + backward_s[i]
                    ran_b[i] += 1
                left -= 1
    return max(e + s for e, s in zip(free, sync_s))


def closed_form(stage_s: Sequence[float], microbatches: int) -> float:
    """Galvatron's pipeline_costmodel without the reduction: the last stage busy throughout, or the first."""
    first, rest, m, p = stage_s[0], sum(stage_s[1:]), microbatches, len(stage_s)
    ramp = min(p - 1, m - 1) * first
    return max(first + rest + stage_s[-1] * (m - 1), max(ramp / 3, rest / 3) + max(ramp * 2 / 3, rest * 2 / 3) + first * max(0, m + 1 - p))


class Pricer:
    """Prices plans of one profile on `devices` devices for a step of `batch` samples. InputError where the profile lacks a figure."""

    def __init__(self, profile: LayerProfile, devices: int, batch: int, limit_MB: float, account: Account = EXACT) -> None:
        if missing := profile.missing():
            raise InputError(f"the layer profile lacks {', '.join(missing)}: import the folder that holds them too")
        assert profile.layer is not None and profile.vocab is not None  # noqa: PT018
        assert profile.layers is not None and profile.hidden is not None and profile.overlap is not None  # noqa: PT018
        if devices < 1 or batch < 1 or limit_MB <= 0:
            raise InputError(f"{devices} devices, a batch of {batch} and {limit_MB} MB: each must be at least 1")
        self.layer_samples, self.vocab_samples = profile.layer, profile.vocab
        self.layers, self.hidden, self.sequence, self.overlap = profile.layers, profile.hidden, profile.sequence, profile.overlap
        self.devices, self.batch, self.account = devices, batch, account
        self.links: Links | None = profile.links(devices) if devices > 1 else None
        self.reserve_MB = float(int(limit_MB * CACHE_SHARE)) if limit_MB // 1024 > CACHE_FROM_GB else 0.0
        self.budget_MB = limit_MB - self.reserve_MB
        self._forward, self._ends_forward = _line(profile.layer.forward_s), _line(profile.vocab.forward_s)
        self._lines = {(k, n): _line(t) for k in ("allreduce", "all2all") for n, t in self._tables(k).items()}
        self._layer: dict[tuple[Strategy, int, int], Cost] = {}
        self._vocab: dict[tuple[Strategy, int, int], tuple[Cost, Cost]] = {}

    def samples(self, strategy: Strategy, stages: int, microbatches: int) -> int | None:
        """Samples of a microbatch on a rank, or None if the strategy does not divide the ranks and the batch."""
        if self.devices % stages or self.batch % microbatches or strategy.degree * strategy.data * stages != self.devices:
            return None
        each = self.batch // microbatches
        return each // strategy.data if each % strategy.data == 0 else None

    def layer(self, strategy: Strategy, stages: int, microbatches: int) -> Cost:
        """One layer. InputError if the strategy does not divide what it splits, or was not measured."""
        key = strategy, stages, microbatches
        if key in self._layer:
            return self._layer[key]
        samples = self.samples(*key)
        if samples is None:
            raise InputError(f"{strategy} does not divide {self.devices} devices in {stages} stages and {self.batch} samples in {microbatches}")
        own, account, k = self.layer_samples, self.account, strategy.degree
        forward = self._forward[0] * samples / k + self._forward[1]
        backward = 2 * forward + (forward if strategy.checkpoint else 0.0)
        parameters, n = own.parameters_MB / strategy.tensor, strategy.shards
        reduced = 0.0
        if n > 1 and (strategy.data > 1 or account.ulysses_reduces):
            reduced = 2 * (n - 1) / n * parameters / 2 / self._bandwidth(strategy)
        ranks = self.devices // stages
        overlapped = backward if k == 1 or k < ranks // 2 else backward / 2
        sync = self._overlapped(reduced, overlapped) - overlapped
        gather = (n - 1) / n * parameters / 2 / self._bandwidth(strategy) if strategy.zero == 3 and n > 1 else 0.0
        each = self._exchange(strategy, samples) if k > 1 else 0.0
        ahead, back = account.ulysses if strategy.ulysses else account.tensor
        again = ahead if strategy.checkpoint else 0
        hop = self._hop(samples, stages)
        activation = (own.checkpoint_MB / k if strategy.checkpoint else _at(own.activation_MB, k, "activation of a layer")) * samples
        made = Cost(
            forward + ahead * each + account.gathers[0] * gather + hop,
            backward + (back + again) * each + account.gathers[1] * gather + hop,
            sync,
            4 * parameters * zero_share(strategy.zero, n, microbatches),
            activation,
        )
        self._layer[key] = made
        return made

    def vocab(self, strategy: Strategy, stages: int, microbatches: int) -> tuple[Cost, Cost]:
        """What the first and the last stage have besides their layers; of one stage, the first is all of it."""
        key = strategy, stages, microbatches
        if key in self._vocab:
            return self._vocab[key]
        samples = self.samples(*key)
        if samples is None:
            raise InputError(f"the ends' {strategy} does not divide {self.devices} devices in {stages} stages and {self.batch} samples")
        forward = self._ends_forward[0] * samples / strategy.degree + self._ends_forward[1]
        own = self.vocab_samples
        if stages == 1:
            made = self._end(own.both, strategy, forward, 2, samples, microbatches), Cost(0.0, 0.0, 0.0, 0.0, 0.0)
        else:
            first, last = (self._end(e, strategy, forward / 2, 1, samples, microbatches) for e in (own.first, own.last))
            made = first, last
        self._vocab[key] = made
        return made

    def _end(self, own: EndSamples, strategy: Strategy, forward: float, reduces: int, samples: int, microbatches: int) -> Cost:
        states, n = _at(own.states_MB, strategy.tensor, "states of the ends"), strategy.shards
        gather = (n - 1) / n * states / 4 / 2 / self._bandwidth(strategy) if n > 1 else 0.0  # of bf16: a quarter of the states, halved
        gathers = self.account.gathers if strategy.zero == 3 else (0, 0)
        exchange = reduces * self._exchange(strategy, samples) if strategy.tensor > 1 else 0.0
        ahead, back = self._hidden(gathers[0] * gather, forward), self._hidden(gathers[1] * gather, 2 * forward)
        last = self._hidden((gathers[1] + 1) * gather, 2 * forward)
        return Cost(
            ahead + exchange / 2,
            back + exchange / 2,
            last - back if self.account.pipeline == "exact" else 0.0,
            states * zero_share(strategy.zero, n, microbatches),
            _at(own.activation_MB, strategy.degree, "activation of the ends") * samples,
        )

    def memory_MB(self, costs: Sequence[Cost], ends: Sequence[Cost], in_flight: int, buffer_MB: float) -> float:
        """MB of a stage from its layers and the ends on it, with so many microbatches in flight."""
        held = sum(math.ceil(c.states_MB + c.activation_MB * in_flight) for c in costs)
        return held + math.ceil(sum(e.states_MB + e.activation_MB * in_flight for e in ends) + CONTEXT_MB) + buffer_MB

    def buffer_MB(self, strategies: Sequence[Strategy], stages: int, microbatches: int) -> float:
        """The all-gather buffer of Megatron's sequence parallelism, of the largest degree on a stage."""
        widest = max((s for s in strategies if s.tensor > 1), key=lambda s: s.tensor, default=None)
        return 0.0 if widest is None else float(int(self._activation_MB(self.samples(widest, stages, microbatches) or 0)))

    def reshard_s(self, one: Strategy, other: Strategy, stages: int, microbatches: int) -> float:
        """Seconds, there and back, to give activations of one degree to a layer of another."""
        if one.degree == other.degree:
            return 0.0
        wide = max(one, other, key=lambda s: s.degree)
        moved = (wide.degree - 1) / wide.degree * self._activation_MB(self.samples(wide, stages, microbatches) or 0)
        assert self.links
        return 2 * moved / (1e3 * _at(self.links.consecutive_GBps, wide.degree, "all-reduce bandwidth"))

    def price(self, plan: LayerPlan) -> Price:
        """The step and the memory of every stage. InputError if the plan does not divide what it splits."""
        p, m = plan.stages, plan.microbatches
        if len(plan.layers) != sum(plan.cut) or len(plan.layers) != self.layers or min(plan.cut) < 1 or plan.batch != self.batch:
            raise InputError(f"a plan of {len(plan.layers)} layers and {plan.batch} samples does not fit the {self.layers} and {self.batch} here")
        if m < p:
            raise InputError(f"{m} microbatches do not fill {p} stages: 1F1B needs one for each at least")
        first, last = self.vocab(plan.vocab, p, m)
        stages = []
        for i in range(p):
            own = plan.of_stage(i)
            costs = [self.layer(s, p, m) for s in own]
            ends = [c for c, there in ((first, i == 0), (last, i == p - 1 and p > 1)) if there]
            moves = sum(self.reshard_s(a, b, p, m) for a, b in zip(own, own[1:]))
            parts = [*costs, *ends]
            stages.append(
                StagePrice(
                    sum(c.forward_s for c in parts) + moves / 2,
                    sum(c.backward_s for c in parts) + moves / 2,
                    sum(c.sync_s for c in parts),
                    self.memory_MB(costs, ends, p - i, self.buffer_MB([*own, *([plan.vocab] if ends else [])], p, m)),
                )
            )
        ends_s = [first.seconds if i == 0 else last.seconds if i == p - 1 else 0.0 for i in range(p)]
        step = self.step_s([s.forward_s for s in stages], [s.backward_s for s in stages], [s.sync_s for s in stages], ends_s, m)
        return Price(step, self.batch / step, tuple(stages), self.budget_MB, self.reserve_MB)

    def step_s(
        self, forward_s: Sequence[float], backward_s: Sequence[float], sync_s: Sequence[float], ends_s: Sequence[float], microbatches: int
    ) -> float:
        """A step from its stages. The closed account takes the reduction of a stage as over when stages before it ran one microbatch,
        and leaves `ends_s` out of what a reduction has to wait for (Galvatron, pipeline_costmodel)."""
        if self.account.pipeline == "exact":
            return makespan(forward_s, backward_s, sync_s, microbatches)
        stage_s = [f + b for f, b in zip(forward_s, backward_s)]
        waits, before = 0.0, 0.0
        for seconds, sync, end in zip(stage_s, sync_s, ends_s):
            waits = max(waits, sync - end - before)
            before += seconds
        return closed_form(stage_s, microbatches) + waits

    def _tables(self, kind: str) -> dict[int, dict[int, float]]:
        return {} if self.links is None else self.links.allreduce_s if kind == "allreduce" else self.links.all_to_all_s

    def _bandwidth(self, strategy: Strategy) -> float:
        """MB a second of the bus between ranks that hold the same parameters: strided where tensor ranks lie between them."""
        assert self.links
        n = strategy.shards
        strided = strategy.tensor > 1 and n < self.devices
        return 1e3 * _at(self.links.strided_GBps if strided else self.links.consecutive_GBps, n, "all-reduce bandwidth")

    def _activation_MB(self, samples: int) -> float:
        return samples * self.sequence * self.hidden * 2 / 2**20

    def _exchange(self, strategy: Strategy, samples: int) -> float:
        """Seconds of one half all-reduce, or one all-to-all, of a microbatch's activation."""
        kind = "all2all" if strategy.ulysses else "allreduce"
        table = self._tables(kind)
        if strategy.degree not in table:
            raise InputError(f"the layer profile has no {kind} times of {strategy.degree} ranks: it has {sorted(table)}")
        size = self._activation_MB(samples)
        slope, intercept = self._lines[kind, strategy.degree]
        measured = table[strategy.degree].get(int(size)) if size == int(size) else None
        seconds = slope * size + intercept if measured is None else measured
        return seconds if strategy.ulysses else seconds / 2

    def _hop(self, samples: int, stages: int) -> float:
        if stages == 1:
            return 0.0
        assert self.links
        return stages * self._activation_MB(samples) / (1e3 * _at(self.links.p2p_GBps, stages, "bandwidth between stages")) / self.layers

    def _overlapped(self, comm_s: float, compute_s: float) -> float:
        """Seconds of both at once: each takes `overlap` times as long while they overlap."""
        return max(comm_s, compute_s) + (self.overlap - 1) * min(comm_s, compute_s)

    def _hidden(self, comm_s: float, compute_s: float) -> float:
        """The same for the ends, whose communication is not slowed (Galvatron, EmbeddingLMHeadTimeCostModel)."""
        slowed = compute_s * self.overlap
        return comm_s if slowed <= comm_s else comm_s + (slowed - comm_s) / self.overlap


def _line(points: dict[int, float]) -> tuple[float, float]:
    """Slope and intercept by least squares; of one point, the line through the origin."""
    if len(points) == 1:
        ((x, y),) = points.items()
        return y / x, 0.0
    slope, intercept = np.polyfit(list(points), list(points.values()), 1)
    return float(slope), float(intercept)


def _at(table: dict[int, float], key: int, what: str) -> float:
    if key not in table:
        raise InputError(f"the layer profile has no {what} at {key}: it has {sorted(table)}")
    return table[key]
