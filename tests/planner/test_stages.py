"""Exact stage cuts with recompute against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from made_memory import Pick, made_blocks, made_shape

from meshwright.costmodel import schedules
from meshwright.costmodel.layouts import SPLIT
from meshwright.costmodel.stagememory import Blocks, Place, Shape, StageMemory
from meshwright.planner import stagecuts
from meshwright.planner.stages import Choice, Cut, StageProblem, Stages, spreads

FULL = 2


def picker(seed: int) -> Pick:
    rng = np.random.default_rng(seed)
    return lambda low, high: int(rng.integers(low, high + 1))


def made_memory(pick: Pick, x: Shape, kinds: np.ndarray) -> Callable[[np.ndarray], StageMemory]:
    """Layers of equal kind and mode hold alike, but that a recomputed layer shares what the block before it keeps, and that a layer (or the
    head) behind a recomputed one keeps what goes into it, as real blocks do."""
    b = made_blocks(pick, x, len(kinds))
    if x.schedule in SPLIT:
        waits, halved, late = (np.array([pick(0, 30) for _ in b.layer], float) for _ in range(3))
        b = replace(b, waits=waits * b.layer, halved=b.saved + halved, late=late * b.layer)
    at = np.flatnonzero(b.layer)
    like = np.arange(len(b.layer))
    like[at] = at[[int(np.argmax(kinds == k)) for k in kinds]]
    less = np.array([[0, 0, 0], [pick(0, 20), pick(0, 20), pick(0, 20)], [pick(20, 50), pick(0, 50), pick(0, 50)]], float)
    again = [0.0, float(pick(0, 20)), float(pick(0, 30))]
    keeps = bool(pick(0, 1))
    shared, passed = float(pick(0, 3)), float(pick(0, 8))

    def memory(modes: np.ndarray) -> StageMemory:
        mode = np.zeros(len(b.layer), int)
        mode[at] = modes
        names = ("kept", "forward", "backward", "saved", "numel", "padded", "buffers", "last_numel")
        known = {name: getattr(b, name)[like].copy() for name in (*names, *(("waits", "halved", "late") if b.waits is not None else ()))}
        for i, name in enumerate(("kept", "forward", "saved")):
            known[name] = np.maximum(known[name] - less[mode, i], 0.0)
        known["saved"] += np.array(again)[mode]
        known["backward"] += np.array(again)[mode]
        for j in range(1, len(mode)):
            if mode[j] and not mode[j - 1]:
                known["kept"][j] = max(known["kept"][j] - shared, 0.0)
            if mode[j - 1] and not mode[j]:
                for name in ("kept", "forward", "backward", "saved"):
                    known[name][j] += passed
        return StageMemory(replace(b, **known, keeps_result=(mode == 0) & keeps, recomputes=mode > 0), x)

    return memory


def splitting(x: Shape) -> Shape:
    """The shape with what a schedule needs that splits backward."""
    return replace(x, zero=min(x.zero, 1), microbatches=max(x.microbatches, schedules.find(x.schedule).least(x.pp)))


def made_problem(seed: int, vpp: int = 1, v_shape: bool = False, split: bool = False) -> StageProblem:
    """A few layers of mixed kinds on a few ranks of one or two device types."""
    pick = picker(seed)
    layers = pick(3, 7) if vpp == 1 else pick(2 * vpp, 4 * vpp + 1)
    most = min(4, layers // vpp)
    x = made_shape(pick, most)
    while vpp > 1 and x.pp < 2:
        x = made_shape(pick, most)
    schedule = "1f1b" if vpp == 1 else ("zbv", "dualpipev")[pick(0, 1)] if v_shape else "interleaved"
    microbatches = x.microbatches * (2 if vpp > 1 else 1)
    x = replace(x, vpp=vpp, schedule=schedule, microbatches=microbatches + (-microbatches % x.pp if schedule == "interleaved" else 0))
    x = replace(x, schedule="zero-bubble", microbatches=-(-x.microbatches // x.pp) * x.pp) if split else x
    x = splitting(x) if v_shape or split else x
    kinds = np.sort([pick(0, 1) for _ in range(layers)]) if pick(0, 1) else np.array([pick(0, 2) for _ in range(layers)])
    slow = np.array([1.0, 1.0 + pick(0, 8) / 4])
    of_kind = np.array([[[pick(2, 9)] * 3 for _ in range(3)]], float).transpose(0, 2, 1) + np.array([[0], [pick(0, 2)], [pick(0, 3)]])
    if pick(0, 4) == 0:
        of_kind[0, 1:] += np.array([[pick(-3, 3) for _ in range(3)] for _ in range(2)])  # recompute may even be cheaper
    c = slow[:, None, None] * of_kind[0][None][:, :, kinds] / 7
    e = slow[:, None] * np.array([pick(0, 30) for _ in range(3)], float)[None][:, kinds] / 7
    types = np.array([pick(0, 1) for _ in range(x.pp)]) if pick(0, 1) else np.zeros(x.pp, int)
    modes = ((0, 1, 2), (0, 1, 2), (0, 2), (0, 2), (0, 2), (2,), (0,), (0, 1), (1, 2))[pick(0, 8)]

    def ends() -> np.ndarray:
        return slow[:, None] * np.array([pick(0, 9), pick(0, 9)], float)

    p = StageProblem(
        c=c, e=e, before=ends(), after=ends(), pp=x.pp, microbatches=x.microbatches, ratio=(0.0, 1 / 3, 0.5, 1.0)[pick(0, 3)],
        send_s=float(pick(0, 3)), capacity=np.full(x.pp, np.inf), types=types, memory=made_memory(pick, x, kinds), kinds=kinds, modes=modes,
        partial=pick(0, 3) > 0, vpp=vpp, v_shape=v_shape,
    )  # fmt: skip
    p = replace(p, modes=(0,)) if v_shape or split else p
    found = np.sort([max(one[2] for one in ranks) for _, ranks in every_cut(p, most=40)])
    one = found[min(len(found) - 1, int(len(found) * pick(0, 60) / 100))]
    capacity = one * pick(99, 101) / 100 + np.array([pick(0, 20) for _ in range(x.pp)])
    return replace(p, capacity=capacity if pick(0, 9) else found[0] * np.full(x.pp, 0.99) - 1)


# --- every cut, one by one --------------------------------------------------------------------------------------------------

One = tuple[float, float, float, Choice]  # C, E, live bytes


def choices(p: StageProblem, n: int) -> list[Choice]:
    found = [Choice(m, n if m else 0) for m in p.modes]
    if p.partial and {0, 2} <= set(p.modes):
        found += [Choice(FULL, k) for k in range(1, n)]
    return found


def modes_of(p: StageProblem, first: int, last: int, choice: Choice) -> np.ndarray:
    """Mode of each of the model's layers from which a stage of [first, last) is taken."""
    k = min(choice.layers, last - first)
    if choice.mode == FULL and 0 < k < last - first:
        return np.where(np.arange(p.layers) < first + k, FULL, 0)
    return np.full(p.layers, choice.mode if k else 0)


class Brute:
    """Costs of what ranks may hold, straight from the problem's layers and from its memory."""

    def __init__(self, p: StageProblem) -> None:
        self.p = p
        self.memories: dict[bytes, StageMemory] = {}
        self.known: dict[object, list[One]] = {}

    def memory(self, modes: np.ndarray) -> StageMemory:
        if modes.tobytes() not in self.memories:
            self.memories[modes.tobytes()] = self.p.memory(modes)
        return self.memories[modes.tobytes()]

    def rank(self, rank: int, chunks: list[tuple[int, int]]) -> list[One]:
        """What each choice costs."""
        key = rank, *chunks
        if key not in self.known:
            self.known[key] = [self.one(rank, chunks, choice) for choice in choices(self.p, sum(b - a for a, b in chunks))]
        return self.known[key]

    def one(self, rank: int, chunks: list[tuple[int, int]], choice: Choice) -> One:
        p, t = self.p, self.p.types[rank]
        c, e = np.zeros(2), np.zeros(2)
        c[0], e[0] = p.before[t] if chunks[0][0] == 0 else (0, 0)
        c[1], e[1] = p.after[t] if chunks[-1][1] == p.layers else (0, 0)
        count, seconds, once = 0, 0.0, 0.0
        for first, last in chunks:
            for layer in range(first, last):
                mode = choice.mode if count < choice.layers else 0
                seconds += p.c[t, mode, layer]
                once += p.e[t, layer]
                count += 1
            seconds += p.send_s * ((first > 0 and first not in [b for _, b in chunks]) + (last < p.layers and last not in [a for a, _ in chunks]))
        return float(seconds + c.sum()), float(once + e.sum()), self.live(rank, chunks, choice), choice

    def live(self, rank: int, chunks: list[tuple[int, int]], choice: Choice) -> float:
        if self.p.vpp == 1:
            (first, last), *_ = chunks
            return float(self.memory(modes_of(self.p, first, last, choice)).live(first, last, rank))
        left, blocks, returned, x = choice.layers, [], 0.0, self.memory(np.zeros(self.p.layers, int)).x
        for first, last in chunks:
            own = Choice(choice.mode, min(left, last - first))
            left -= own.layers
            m = self.memory(modes_of(self.p, first, last, own))
            n = len(m.b.layer)
            begin, end = m.at[first] if first else 0, m.at[last - 1] + 1 if last < self.p.layers else n
            blocks.append({k: v[begin:end] for k, v in vars(m.b).items() if isinstance(v, np.ndarray)})
            alone = last < self.p.layers and not m.b.keeps_result[end - 1]
            returned += m.b.handed * (alone - (first > 0 and bool(m.b.recomputes[begin])))
        b = replace(m.b, **{k: np.concatenate([x[k] for x in blocks]) for k in blocks[0]})
        borders = np.cumsum([0, *(len(held["layer"]) for held in blocks)])
        apart = 1 + sum(a[1] != b[0] for a, b in itertools.pairwise(chunks))
        place = Place(chunks[0][0] == 0, chunks[-1][1] == self.p.layers, apart, returned, borders)
        return float(StageMemory(b, x).live_at(np.array(0), np.array(len(b.layer)), place, rank))


def held(p: StageProblem, ends: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    """Layers of each rank."""
    starts = [0, *ends[:-1]]
    schedule = schedules.find("zbv" if p.v_shape else "interleaved")
    found = []
    for r in range(p.pp):
        found.append([(starts[k], ends[k]) for k in (schedule.virtual_stage(p.pp, r, c) for c in range(p.vpp))])
    return found


def cuts_of(p: StageProblem) -> list[tuple[int, ...]]:
    if p.vpp > 1:
        return spreads(p.layers, p.pp * p.vpp)
    return [(*cut, p.layers) for cut in combinations(range(1, p.layers), p.pp - 1)]


def every_cut(p: StageProblem, most: int | None = None, brute: Brute | None = None):  # type: ignore[no-untyped-def]
    """Ends and what its ranks cost, of every cut and every choice; or of so many cuts, with few choices."""
    brute = brute or Brute(p)
    for ends in cuts_of(p)[:most]:
        options = [brute.rank(r, chunks) for r, chunks in enumerate(held(p, ends))]
        for ranks in zip(*(np.random.default_rng(0).permutation(np.array(x, object)) for x in options)) if most else product(*options):
            yield ends, ranks


def step(p: StageProblem, ranks) -> float:  # type: ignore[no-untyped-def]
    c = [one[0] for one in ranks]
    return (p.microbatches - p.ratio) * max(c) + p.ratio * sum(c) + max(one[1] for one in ranks)


def check_best(p: StageProblem) -> Cut | None:
    """The answer is that of enumeration, ties included, and costs what it says."""
    brute = Brute(p)
    fit = [
        (step(p, ranks), ends)
        for ends in cuts_of(p)
        for ranks in product(
            *([one for one in brute.rank(r, chunks) if one[2] <= p.capacity[r]] for r, chunks in enumerate(held(p, ends)))
        )
    ]  # fmt: skip
    stages = Stages(p)
    found = stages.best()
    if not fit:
        assert found is None
        return None
    least = min(x[0] for x in fit)
    assert found is not None
    assert found.step_s == pytest.approx(least, rel=1e-12)
    assert found.ends == min(ends for s, ends in fit if s <= least * (1 + 1e-12))
    for r, (chunks, cost, choice) in enumerate(zip(held(p, found.ends), found.costs, found.choices, strict=True)):
        options = [one for one in brute.rank(r, chunks) if one[2] <= p.capacity[r]]
        assert cost.choice == choice
        assert choice == min(one[3] for one in options if one[0] <= min(x[0] for x in options) * (1 + 1e-12))
        mine = next(one for one in options if one[3] == choice)
        assert (cost.c, cost.e) == pytest.approx(mine[:2], rel=1e-12)
        assert cost.live_bytes == mine[2]
    assert stages.cost(found.ends, found.choices) == found.costs
    assert stages.step(found.costs) == found.step_s
    assert stages.best(found.step_s) is None
    assert stages.best(found.step_s * (1 + 1e-9)) == found
    return found


def check_least(p: StageProblem) -> None:
    over, cut = Stages(p).least_memory()
    assert over == min(max(one[2] - cap for one, cap in zip(ranks, p.capacity)) for _, ranks in every_cut(p))
    assert over == max(x.live_bytes - cap for x, cap in zip(Stages(p).cost(cut.ends, cut.choices), p.capacity))
    assert Stages(p).cost(cut.ends, cut.choices) == cut.costs


# --- one chunk a rank -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(240))
def test_the_best_cut_is_the_best_of_all_that_fit(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen cut and recompute are as fast as the fastest of all that fit in memory, and are found whenever one fits."""
    if seed % 2:
        monkeypatch.setattr(stagecuts, "MANY", 0)
    check_best(made_problem(seed))


def test_some_of_these_fit_and_some_do_not() -> None:
    """The random problems are neither all loose nor all hopeless, and some answers recompute part of a stage."""
    answers = [Stages(made_problem(seed)).best() for seed in range(240)]
    found = [x for x in answers if x is not None]
    parts = [c for x in found for c, n in zip(x.choices, np.diff([0, *x.ends])) if c.mode == FULL and c.layers < n]
    assert 20 <= len(answers) - len(found) <= 120
    assert len(parts) >= 20
    assert {c.mode for x in found for c in x.choices} == {0, 1, 2}


@pytest.mark.parametrize("seed", range(70))
def test_least_memory_is_the_least_of_all_cuts(seed: int) -> None:
    """What an infeasible plan is said to need at least is what the smallest of all cuts and choices needs."""
    check_least(made_problem(seed))


# --- several chunks a rank --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vpp", "v_shape"), [(2, False), (3, False), (2, True)])
@pytest.mark.parametrize("seed", range(30))
def test_the_best_of_several_chunks_is_the_best_of_all_spreads(seed: int, vpp: int, v_shape: bool) -> None:
    """The same over the cuts that several chunks a rank are chosen from, in loops and in a V."""
    check_best(made_problem(1000 * vpp + seed, vpp, v_shape))


@pytest.mark.parametrize(("vpp", "v_shape"), [(2, False), (3, False), (2, True)])
@pytest.mark.parametrize("seed", range(10))
def test_least_memory_of_several_chunks(seed: int, vpp: int, v_shape: bool) -> None:
    """The same of the least memory."""
    check_least(made_problem(7000 + 1000 * vpp + seed, vpp, v_shape))


@pytest.mark.parametrize("vpp", [1, 2])
@pytest.mark.parametrize("seed", range(10))
def test_the_best_cut_where_backward_is_split(seed: int, vpp: int) -> None:
    """The same where what waits for gradients of weights is held beside what is in flight."""
    p = made_problem(20000 + 1000 * vpp + seed, vpp, split=True)
    check_best(p)
    check_least(p)


def test_spreads_are_even_but_for_the_ends() -> None:
    """Remainders go to the last stages, the first gives up at most two layers and the last at most three; none is empty."""
    assert spreads(3, 2) == [(1, 3), (2, 3)]
    assert spreads(2, 4) == []
    for layers, virtual in ((8, 4), (13, 5), (61, 32), (126, 16)):
        cuts = spreads(layers, virtual)
        assert tuple(np.cumsum([len(part) for part in np.array_split(np.arange(layers), virtual)][::-1])) in cuts
        for cut in cuts:
            held = np.diff([0, *cut])
            x, y = (int(max(held[1:-1]) - held[i]) for i in (0, -1))
            assert cut[-1] == layers
            assert min(held) > 0
            assert max(held[1:-1]) - min(held[1:-1]) <= 1
            assert x <= 3
            assert y <= 3


# --- larger models ----------------------------------------------------------------------------------------------------------


def large(seed: int, layers: int, pp: int, dense: int = 0, tight: float = 0.8, vpp: int = 1) -> StageProblem:
    """Equal layers behind `dense` others, in memory that does not hold them all without recompute."""
    pick = picker(seed)
    x = Shape(pp=pp, microbatches=pick(pp, 4 * pp), zero=pick(0, 3), dp=4, compute_bytes=2.0, mixed=True)
    schedule = "1f1b" if vpp == 1 else "interleaved"
    x = replace(x, vpp=vpp, schedule=schedule, microbatches=x.microbatches + (-x.microbatches % pp if schedule == "interleaved" else 0))
    kinds = np.array([0] * dense + [1] * (layers - dense))
    c = np.array([[[4.0 if k else 3.0 for k in kinds]]]) * np.array([1.0, 1.05, 1.33])[:, None] * 1e-3
    p = StageProblem(
        c=c, e=np.where(kinds, 2e-3, 1e-3)[None], before=np.array([[2e-3, 1e-3]]), after=np.array([[3e-3, 2e-3]]), pp=pp,
        microbatches=x.microbatches, ratio=1.0, send_s=1e-4, capacity=np.zeros(pp), types=np.zeros(pp, int),
        memory=made_memory(pick, x, kinds), kinds=kinds, vpp=vpp,
    )  # fmt: skip
    least, none = (Stages(replace(p, modes=modes)).least_memory()[0] for modes in ((0, 1, 2), (0,)))
    return replace(p, capacity=np.full(pp, least + tight * (none - least)))


@pytest.mark.parametrize(("layers", "pp", "dense"), [(24, 2, 0), (30, 4, 0), (33, 5, 3), (40, 16, 0), (18, 1, 2)])
@pytest.mark.parametrize("tight", [0.0, 0.3, 0.7, 1.0])
def test_alike_layers_are_as_good_as_told_apart(layers: int, pp: int, dense: int, tight: float) -> None:
    """To know which layers are equal changes nothing but the time it takes."""
    for seed in range(3):
        p = large(seed, layers, pp, dense, tight)
        apart = replace(p, kinds=np.arange(layers))
        assert Stages(p).best() == Stages(apart).best()
        assert Stages(p).least_memory() == Stages(apart).least_memory()


@pytest.mark.parametrize(("layers", "pp", "dense"), [(30, 1, 0), (40, 1, 4), (18, 2, 0), (15, 2, 3), (12, 3, 2)])
@pytest.mark.parametrize("tight", [0.5, 0.7, 0.9])
def test_the_best_of_many_choices(layers: int, pp: int, dense: int, tight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enumeration agrees where a stage has many layers to choose from, most of them equal."""
    monkeypatch.setattr(stagecuts, "MANY", 0)
    for seed in range(3):
        p = large(seed, layers, pp, dense, tight)
        check_best(p)
        if pp < 3:
            check_least(p)


@pytest.mark.parametrize("vpp", [2, 3])
@pytest.mark.parametrize("tight", [0.5, 0.7, 0.9])
def test_the_best_of_many_choices_of_several_chunks(vpp: int, tight: float) -> None:
    """The same of several chunks a rank."""
    for seed in range(2):
        p = large(seed, 25, 2, 3, tight, vpp)
        check_best(p)
        check_least(p)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_ruled_out_by_a_bound_does_not_fit(seed: int) -> None:
    """The bound on a block range's peak lies below the peak, whatever is recomputed."""
    p = large(seed, 14, 3, 2)
    stages = Stages(p)
    least, _ = stages._bank.least
    for border in range(p.layers + 1):
        memory = p.memory(np.where(np.arange(p.layers) < border, FULL, 0))
        for stage in range(p.pp):
            first, last = np.nonzero(np.triu(np.ones((p.layers + 1, p.layers + 1)), 1))
            begin, end = memory.span(first, last, stage)
            assert (least.least_at(begin, end, least.place(begin, end, stage), stage) <= memory.live(first, last, stage)).all()


# --- by hand ----------------------------------------------------------------------------------------------------------------


def weightless(pp: int, layers: int) -> Callable[[np.ndarray], StageMemory]:
    none = np.zeros(layers)
    nothing = Blocks(
        layer=none == 0, kept=none, forward=none, backward=none, saved=none, carry=none, numel=none, padded=none, buffers=none,
        incoming=none, keeps_result=none > 0, last_numel=none, tied=none,
    )  # fmt: skip
    return lambda modes: StageMemory(nothing, Shape(pp=pp, microbatches=3, zero=0, dp=1, compute_bytes=4.0, mixed=False))


def test_a_middle_stage_that_pays_two_transfers_is_not_left_the_heavy_layer() -> None:
    """The best cut is found where the first stage must take fewer layers than fit it."""
    c = np.tile([1.0, 1.0, 4.0, 1.0], (1, 3, 1))
    problem = StageProblem(
        c=c, e=np.zeros((1, 4)), before=np.zeros((1, 2)), after=np.zeros((1, 2)), pp=3, microbatches=3, ratio=1.0, send_s=3.0,
        capacity=np.ones(3), types=np.zeros(3, int), memory=weightless(3, 4), kinds=np.arange(4),
    )  # fmt: skip
    found = Stages(problem).best()
    assert found is not None
    assert (found.step_s, found.ends, found.choices) == (2 * 8.0 + 19.0, (1, 2, 4), (Choice(0, 0),) * 3)


@pytest.mark.parametrize(("c", "e"), [([1, 1, 3], [3, 2, 0]), ([3, 1, 1], [0, 2, 3])])
def test_of_cuts_that_take_equally_long_the_one_with_smaller_ends(c: list[int], e: list[int]) -> None:
    """One layer to the first stage and two to it take 11 s alike, one more in max E where the other has more in max C."""
    problem = StageProblem(
        c=np.tile(np.array(c, float), (1, 3, 1)), e=np.array([e], float), before=np.zeros((1, 2)), after=np.zeros((1, 2)), pp=2,
        microbatches=2, ratio=0.0, send_s=0.0, capacity=np.ones(2), types=np.zeros(2, int), memory=weightless(2, 3), kinds=np.arange(3),
    )  # fmt: skip
    found = Stages(problem).best()
    assert found is not None
    assert (found.step_s, found.ends) == (11.0, (1, 3))


def test_slower_devices_get_fewer_layers() -> None:
    """Two stages of fast devices and two of devices 2.5 times slower: five layers each there, two each here."""
    c = np.array([1.0, 2.5])[:, None, None] * np.ones((2, 3, 14))
    problem = StageProblem(
        c=c, e=np.zeros((2, 14)), before=np.zeros((2, 2)), after=np.zeros((2, 2)), pp=4, microbatches=16, ratio=1.0, send_s=0.0,
        capacity=np.ones(4), types=np.array([0, 0, 1, 1]), memory=weightless(4, 14), kinds=np.zeros(14, int),
    )  # fmt: skip
    found = Stages(problem).best()
    assert found is not None
    assert found.ends == (5, 10, 12, 14)
    assert found.step_s == 15 * 5 + 20.0
    c[:, :, 0] *= 8  # a layer that a slow device could not run in time
    problem = replace(problem, c=c, kinds=np.array([1] + [0] * 13))
    found = Stages(problem).best()
    assert found is not None
    assert found.ends[0] == 1
    assert Stages(problem).best(found.step_s * (1 + 1e-9)) == found


def test_only_the_stages_that_must_recompute_do() -> None:
    """The first of four stages holds four microbatches and recomputes as few of its layers as make it fit; the last needs none."""
    p = large(0, 32, 4, tight=0.6)
    found = Stages(p).best()
    assert found is not None
    again = [x.layers for x in found.choices if x.mode != 1]
    assert found.choices[0].mode
    assert found.choices[-1] == Choice(0, 0)
    assert again
    none = Stages(replace(p, modes=(0,))).best()
    full = Stages(replace(p, modes=(2,))).best()
    assert full is not None
    assert found.step_s < full.step_s
    assert none is None or found.step_s <= none.step_s


def test_the_peak_of_a_rank_adds_up_to_its_live_bytes() -> None:
    """The moment of the peak is named with its block, and its categories add up, for one chunk a rank and for several."""
    for vpp, v_shape in ((1, False), (2, False), (2, True)):
        for seed in range(12):
            p = made_problem(5000 + seed, vpp, v_shape)
            stages = Stages(p)
            _, cut = stages.least_memory()
            for r, cost in enumerate(cut.costs):
                name, at, parts = stages.peak(cut.ends, cut.choices, r)
                assert sum(parts.values()) == cost.live_bytes
                assert name in ("forward", "backward", "weight gradients", "reduction", "accumulation")
                assert 0 <= at < stages._bank.n


def test_what_is_no_stage_problem_is_refused() -> None:
    """More stages than layers have no cut; a bubble of more microbatches than there are, and unknown modes, are errors."""
    p = large(0, 8, 4)
    assert Stages(replace(p, pp=16, capacity=np.ones(16), types=np.zeros(16, int))).best() is None
    with pytest.raises(ValueError, match="cannot be cut"):
        Stages(replace(p, pp=16, capacity=np.ones(16), types=np.zeros(16, int))).least_memory()
    with pytest.raises(ValueError, match="bubble ratio"):
        Stages(replace(p, microbatches=1, ratio=2.0))
    with pytest.raises(ValueError, match="modes"):
        Stages(replace(p, modes=(3,)))
