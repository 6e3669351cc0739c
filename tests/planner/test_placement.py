"""Ranks to devices: against brute force, on clusters with slow links, and on odd ones."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from meshwright.costmodel import collectives
from meshwright.costmodel.pipeline import makespan, simulate_schedule
from meshwright.planner import placement, placementsearch
from meshwright.planner.placement import GroupTraffic, Placement, Traffic, apply_order, border_seconds, group_of, place, summary
from meshwright.profiling.cluster import Cluster, Group, Link, Node, parse_cluster
from meshwright.profiling.errors import InputError

H100 = "H100-SXM"


def cluster(sizes: list[int], matrix: np.ndarray | None = None) -> Cluster:
    rows = None if matrix is None else tuple(map(tuple, matrix.tolist()))
    return Cluster(nodes=tuple(Node(device=H100, devices=n) for n in sizes), bandwidth_Bps=rows)


def tiers(sizes: list[int], inside: float = 3.6e11, between: float = 4e10) -> np.ndarray:
    """Bandwidths of all pairs where no link is slow. [size, size] bytes/s"""
    home = np.repeat(np.arange(len(sizes)), sizes)
    return np.where(home[:, None] == home, inside, between)


def slowed(matrix: np.ndarray, *pairs: tuple[int, int], by: float = 4.0) -> np.ndarray:
    matrix = matrix.copy()
    for a, b in pairs:
        matrix[a, b] /= by
        matrix[b, a] /= by
    return matrix


def instance(seed: int, least: int = 4, most: int = 7) -> tuple[Cluster, Traffic]:
    """A random cluster of 4 to 7 devices on equal or unequal nodes, with or without measured links, and random traffic."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(least, most + 1))
    sizes: list[int] = [n] if seed % 3 == 0 else []
    while sum(sizes) < n:
        sizes.append(int(rng.integers(1, n - sum(sizes) + 1)))
    sizes = [n // 2] * 2 if seed % 3 == 1 and n % 2 == 0 else sizes
    m = tiers(sizes, float(rng.choice([4e11, 1e11, 3e10])))
    style = seed % 4
    if style == 1:
        m = m * rng.lognormal(0, 0.3, m.shape)  # no two links alike, nor the directions of one
    elif style == 2:
        m = slowed(m, *(tuple(rng.choice(n, 2, replace=False)) for _ in range(3)))
    elif style == 3:
        m = m * rng.choice([1, 0.5, 0.25], size=m.shape)
    axes = ("pp", "dp", "cp", "tp") if rng.random() < 0.8 else ("pp", "dp", "ep", "cp", "tp")
    shape, rest = [1] * len(axes), n
    for p in (2, 3, 5, 7):
        while rest % p == 0:
            shape[int(rng.integers(len(axes)))] *= p
            rest //= p
    kinds = []
    for _ in range(int(rng.integers(0, 4))):
        of = [a for a in axes if rng.random() < 0.4] or ["dp"]
        op = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")[int(rng.integers(4))]
        kinds.append(GroupTraffic(tuple(of), op, float(10 ** rng.uniform(5, 9)), float(rng.integers(1, 20)), float(rng.choice([0.5, 1]))))
    traffic = Traffic(
        tuple(shape), tuple(kinds), send_bytes=float(10 ** rng.uniform(4, 9)), sends=float(rng.choice([0, 2])),
        rounds=float(rng.integers(0, 8)), loop=bool(rng.random() < 0.3), rest_s=float(rng.choice([0, 0.01])), axes=axes,
    )  # fmt: skip
    return cluster(sizes, m if style else None), traffic


def measured(link: Link, bandwidths: list[float]) -> Link:
    return Link(bandwidth_Bps=min(bandwidths), latency_s=link.latency_s, provenance="measured") if bandwidths else link


def step(c: Cluster, t: Traffic, order: tuple[int, ...]) -> float:
    """Seconds of a step under a mapping, group by group and chain by chain."""
    node, m = c.node_of, c.bandwidth_Bps
    ranks = list(np.ndindex(*t.shape))
    device = dict(zip(ranks, order))

    def lines(axes: tuple[str, ...]) -> list[list[tuple[int, ...]]]:
        found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for rank in ranks:
            found.setdefault(tuple(x for x, a in zip(rank, t.axes) if a not in axes), []).append(rank)
        return list(found.values())

    def group_s(kind: GroupTraffic, line: list[tuple[int, ...]]) -> float:
        devices = [device[r] for r in line]
        homes = list(dict.fromkeys(node[d] for d in devices))
        ring = [d for home in homes for d in devices if node[d] == home]
        pairs = list(permutations(ring, 2)) if kind.op == "all_to_all" else list(zip(ring, ring[1:] + ring[:1]))
        links = c.node_link, c.network_link
        if m is not None and len(ring) > 1:
            links = (
                measured(links[0], [m[a][b] for a, b in pairs if node[a] == node[b]]),
                measured(links[1], [m[a][b] for a, b in pairs if node[a] != node[b]]),
            )
        emptiest = min(sum(node[d] == home for d in devices) for home in homes)
        group = Group(size=len(ring), nodes=len(homes), per_node=emptiest, node_link=links[0], network_link=links[1])
        return kind.times * kind.exposed * float(collectives.seconds(kind.op, kind.nbytes, group))

    def send_s(a: int, b: int) -> float:
        links = c.node_link, c.network_link
        if m is not None:
            links = measured(links[0], [m[a][b]]), measured(links[1], [m[a][b]])
        pair = Group(size=2, nodes=1 + int(node[a] != node[b]), per_node=1, node_link=links[0], network_link=links[1])
        return float(collectives.send_seconds(t.send_bytes, pair))

    total = t.rest_s + sum(max(group_s(kind, line) for line in lines(kind.axes)) for kind in t.collectives)
    at = t.axes.index("pp")
    if t.shape[at] == 1 or not t.sends + t.rounds:
        return total
    chains = []
    for replica in lines(("pp", "cp", "tp")):
        stages = [[device[r] for r in replica if r[at] == s] for s in range(t.shape[at])]
        following = stages[1:] + stages[:1] if t.loop else stages[1:]
        hops = [max((send_s(a, b) + send_s(b, a)) / 2 for a, b in zip(x, y)) for x, y in zip(stages, following)]
        before, after = (hops[-1:] + hops, hops) if t.loop else ([0.0, *hops], [*hops, 0.0])
        at_stage = [a + b for a, b in zip(before, after)]
        chains.append(t.sends * sum(hops) + t.rounds * max(at_stage))
    return total + max(chains)


def every(c: Cluster, t: Traffic) -> tuple[np.ndarray, np.ndarray]:
    """All mappings and their seconds."""
    orders = np.array(list(permutations(range(c.size))))
    return orders, placement._Pricer.of(c, t, None).step(orders)[0]


@pytest.mark.parametrize("seed", range(50))
def test_no_mapping_is_better(seed: int) -> None:
    """On small clusters the mapping found is the best of all of them, and is said to be."""
    c, t = instance(seed)
    orders, seconds = every(c, t)
    for k in np.random.default_rng(seed).integers(len(orders), size=4):
        assert step(c, t, tuple(orders[k].tolist())) == pytest.approx(seconds[k], rel=1e-9)
    p = place(c, t)
    assert p.gap == 0
    assert p.bound == p.seconds == pytest.approx(float(seconds.min()), rel=1e-9)
    assert step(c, t, p.order) == pytest.approx(p.seconds, rel=1e-9)
    assert step(c, t, tuple(range(c.size))) == pytest.approx(p.default_seconds, rel=1e-9)


@pytest.mark.parametrize("seed", range(100, 150))
def test_a_search_cut_short_is_honest(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not all mappings are seen, the bound is below the best of them, what was found is above, and never above the default."""
    c, t = instance(seed)
    monkeypatch.setattr(placement, "FEW", 0)
    monkeypatch.setattr(placementsearch, "ROWS", seed % 40)
    monkeypatch.setattr(placementsearch, "RUNGS", ((2, seed % 5),))
    best = float(every(c, t)[1].min())
    p = place(c, t)
    assert p.bound <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= p.seconds <= p.default_seconds
    assert p.gap == pytest.approx(p.seconds / p.bound - 1 if p.bound else 0.0)
    assert sorted(p.order) == list(range(c.size))
    assert step(c, t, p.order) == pytest.approx(p.seconds, rel=1e-9)


@pytest.mark.parametrize("shape", [(2, 2, 1, 2), (2, 4, 1, 1), (1, 4, 1, 2), (4, 2, 1, 1), (1, 2, 2, 2), (1, 8, 1, 1)])
@pytest.mark.parametrize("sizes", [[4, 4], [2, 2, 2, 2], [3, 5]])
def test_the_bound_is_below_every_mapping(sizes: list[int], shape: tuple[int, ...]) -> None:
    """The bound alone, before any search, is not above the best mapping of eight devices with a slow port and a slow link."""
    m = slowed(tiers(sizes), (0, 1), *((2, j) for j in range(sizes[0], 8)))
    kinds = (
        GroupTraffic(("tp",), "all_gather", 3e7, 20), GroupTraffic(("dp", "cp"), "reduce_scatter", 4e8),
        GroupTraffic(("dp",), "all_to_all", 1e7, 9),
    )  # fmt: skip
    t = Traffic(shape, kinds, send_bytes=3e7, sends=2, rounds=7)
    orders = np.array(list(permutations(range(8))))[:: 1 if shape == (2, 2, 1, 2) else 7]
    for c in (cluster(sizes, m), cluster(sizes)):
        price = placement._Pricer.of(c, t, None)
        best = min(float(price.step(orders[i : i + 4000])[0].min()) for i in range(0, len(orders), 4000))
        bound = placement._Floor(c, price).seconds
        assert 0.5 * best < bound <= best * (1 + 1e-9)


def simulated(c: Cluster, p: tuple[int, ...], t: Traffic, compute: list[float]) -> float:
    """Seconds of a step of 1F1B by the event simulator: the slowest replica, then the slowest group of each collective."""
    microbatches = int(t.rounds) + 1
    slots = microbatches + t.shape[0] - 1
    mapped, ranks = apply_order(c, p), np.arange(t.size).reshape(t.shape)
    steps = []
    for replica, hops in enumerate(border_seconds(c, t, p)):
        groups = [mapped.group(stage[replica, 0]) for stage in ranks]
        busy = [
            x + sum(k.times / slots * float(collectives.seconds(k.op, k.nbytes, g)) for k in t.collectives if k.axes == ("tp",))
            for x, g in zip(compute, groups)
        ]
        forward, backward = [b / 3 for b in busy], [2 * b / 3 for b in busy]
        events = simulate_schedule("1F1B", forward, backward, [0.0] * len(busy), hops, microbatches, overlap_send=False)
        steps.append(makespan(events))
    rows = ranks.transpose(0, 2, 3, 1).reshape(-1, t.shape[1])
    after = [max(float(collectives.seconds(k.op, k.nbytes, mapped.group(r))) for r in rows) for k in t.collectives if k.axes == ("dp",)]
    return max(steps) + sum(after)


@pytest.mark.parametrize(
    ("sizes", "shape", "slow"),
    [
        ([8, 8], (4, 4, 1, 1), [(5, 9)]), ([8, 8], (2, 4, 1, 2), [(5, 13)]), ([8, 8], (2, 4, 1, 2), [(0, 1)]),
        ([8, 8], (4, 4, 1, 1), [(5, 9), (0, 1), (12, 13)]), ([8] * 4, (4, 4, 1, 2), [(8, 16)]),
    ],
)  # fmt: skip
def test_a_slow_link_is_avoided(sizes: list[int], shape: tuple[int, ...], slow: list[tuple[int, int]]) -> None:
    """On a cluster with slow links the mapping beats the default by what the event simulator says, and is within 5 % of the bound."""
    c = cluster(sizes, slowed(tiers(sizes), *slow))
    pp, dp, _, tp = shape
    slots, compute = 8 + pp - 1, 0.02 / (pp * tp)
    kinds = (GroupTraffic(("tp",), "all_gather", 6e7, 64 / pp * slots), GroupTraffic(("dp",), "reduce_scatter", 8e9 / (pp * tp)))
    t = Traffic(shape, kinds, send_bytes=6e7 / tp, sends=2, rounds=7, rest_s=slots * compute)
    p = place(c, t)
    assert p.seconds < p.default_seconds
    assert p.gap < 0.05
    default, found = (simulated(c, order, t, [compute] * pp) for order in (tuple(range(c.size)), p.order))
    assert found < default
    assert found < 1.05 * p.bound


def test_large_clusters_need_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal nodes without measured links one of the regular orders is proved best: the tensor-parallel axis goes into the node."""
    monkeypatch.setattr(placementsearch, "_walk", None)
    c = parse_cluster("2048x8xH100-SXM")
    kinds = (GroupTraffic(("tp",), "all_gather", 6e7, 1000), GroupTraffic(("dp",), "all_reduce", 1e9))
    p = place(c, Traffic((16, 128, 1, 8), kinds, send_bytes=1e7, sends=2, rounds=15))
    assert (p.gap, p.method, p.rank_map) == (0, "default", [])
    p = place(c, Traffic((8, 16, 128), kinds, axes=("tp", "pp", "dp")))
    assert p.gap == 0
    assert p.seconds < p.default_seconds
    assert apply_order(c, p.order).group(np.arange(16384).reshape(8, -1).T).nodes == 1
    assert p.rank_map == list(p.order)


def test_a_mapped_cluster_prices_as_the_mapping_does() -> None:
    """Under the default order the groups are the cluster's own; under another, links and nodes are those of the devices."""
    c = cluster([4, 4], slowed(tiers([4, 4]), (1, 2)))
    same = apply_order(c, range(8))
    for ranks in ([0, 1], [1, 2], [0, 2, 4, 6], [0, 4], [3], [[0, 1], [1, 2]], [[0, 1], [3, 4]]):
        assert same.group(ranks) == c.group(ranks)
    swapped = apply_order(c, [0, 1, 3, 2, 4, 5, 6, 7])
    assert swapped.group([1, 2]).node_link.bandwidth_Bps == 3.6e11
    assert swapped.group([1, 3]).node_link.bandwidth_Bps == 9e10
    mixed = apply_order(c, [0, 4, 1, 5, 2, 6, 3, 7])
    assert mixed.node_of.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert (mixed.group([0, 1]).nodes, mixed.group([0, 2]).nodes) == (2, 1)
    assert mixed.group(range(8)).network_link.bandwidth_Bps == 4e10
    assert mixed.group(range(8)).node_link.bandwidth_Bps == 9e10


def test_an_all_to_all_uses_every_pair() -> None:
    """A slow link that no ring passes slows an all-to-all all the same."""
    c = cluster([4], slowed(tiers([4]), (0, 2)))
    assert group_of(c, range(4), range(4)).node_link.bandwidth_Bps == 3.6e11
    assert group_of(c, range(4), range(4), "all_to_all").node_link.bandwidth_Bps == 9e10


def test_an_uneven_group_is_bound_by_its_emptiest_node() -> None:
    """A group of three ranks on one node and one on another sends all through the one's port: it costs more than two and two."""
    c = cluster([4, 4])
    even, uneven = (float(collectives.seconds("all_gather", 1e9, group_of(c, range(8), ranks))) for ranks in ([0, 1, 4, 5], [0, 1, 2, 4]))
    assert uneven > even


@pytest.mark.parametrize("sizes", [[5], [1, 1, 1, 1, 1]])
def test_directions_are_used_as_given(sizes: list[int]) -> None:
    """Where links are fast in one direction, the ring goes that way, within a node and over nodes."""
    m = np.full((5, 5), 1e10)
    for i in range(5):
        m[(i + 1) % 5, i] = 1e11  # backwards
    p = place(cluster(sizes, m), Traffic((1, 5, 1, 1), (GroupTraffic(("dp",), "all_gather", 1e9),)))
    assert all(m[a, b] == 1e11 for a, b in zip(p.order, p.order[1:] + p.order[:1]))
    assert p.seconds < 0.2 * p.default_seconds


def test_each_replica_has_its_own_borders() -> None:
    """A slow link between stages delays the replica that uses it, as the slowest of its tensor-parallel ranks."""
    c = cluster([8], slowed(tiers([8]), (1, 5)))
    t = Traffic((2, 2, 1, 2), send_bytes=3.6e8, sends=2)
    hops = border_seconds(c, t)
    assert hops.shape == (2, 1)
    assert hops[0, 0] == pytest.approx(4e-3 + c.node_link.latency_s)
    assert hops[1, 0] == pytest.approx(1e-3 + c.node_link.latency_s)
    assert border_seconds(c, t, [0, 5, 2, 3, 4, 1, 6, 7])[0, 0] == hops[0, 0]
    assert border_seconds(c, t, [0, 4, 2, 3, 1, 5, 6, 7]).max() == hops[1, 0]


def test_the_same_answer_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search has no luck: the same problem gives the same mapping."""
    m = tiers([8, 8]) * np.random.default_rng(0).lognormal(0, 0.05, (16, 16))
    t = Traffic((2, 4, 1, 2), (GroupTraffic(("tp",), "all_gather", 6e7, 50), GroupTraffic(("dp",), "reduce_scatter", 1e9)), 3e7, 2, 7)
    monkeypatch.setattr(placementsearch, "RUNGS", ((4, 20), (2, 100)))
    monkeypatch.setattr(placementsearch, "ROWS", 2000)
    first, again = (place(cluster([8, 8], m), t, seconds=600) for _ in range(2))
    assert first == again
    assert first.seconds < first.default_seconds


@pytest.mark.parametrize("n", [1, 7, 13])
def test_odd_counts(n: int) -> None:
    """One device and prime numbers of devices, on one node and on unequal ones."""
    t = Traffic((1, n, 1, 1), (GroupTraffic(("dp",), "all_reduce", 1e9),), rest_s=0.1)
    for c in (cluster([n]), cluster([n // 2, n - n // 2]) if n > 1 else cluster([1], np.zeros((1, 1)))):
        p = place(c, t)
        assert (sorted(p.order), p.gap) == (list(range(n)), 0)
        assert "proved best" in summary(p)


@pytest.mark.parametrize(
    ("shape", "kinds", "words"),
    [
        ((2, 2, 1, 1), (), "a layout of 4 ranks cannot be mapped to 8 devices: there must be as many"),
        ((2, 2, 2), (), "one degree of at least 1 for each of pp, dp, cp, tp"),
        ((8, 0, 1, 1), (), "one degree of at least 1 for each"),
        ((8, 1, 1, 1), (GroupTraffic(("sp",), "all_gather", 1.0),), "a group's axes must be among pp, dp, cp, tp, not sp"),
        ((8, 1, 1, 1), (GroupTraffic((), "all_gather", 1.0),), "not none"),
        ((8, 1, 1, 1), (GroupTraffic(("dp",), "all_gather", float("nan")),), "must be numbers of at least 0"),
    ],
)
def test_what_does_not_fit_together_is_said(shape: tuple[int, ...], kinds: tuple[GroupTraffic, ...], words: str) -> None:
    """Traffic that does not fit the cluster, or itself, is refused in one sentence."""
    with pytest.raises(InputError, match=words) as caught:
        place(cluster([8]), Traffic(shape, kinds))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="each of 0 to 7 once"):
        apply_order(cluster([8]), [0] * 8)


@pytest.mark.parametrize("value", ["0", "-1.5", ".nan", ".inf"])
def test_a_wrong_bandwidth_is_found(tmp_path, value: str) -> None:  # type: ignore[no-untyped-def]
    """A bandwidth that is no positive number is refused with its row and column; the diagonal is not read."""
    path = tmp_path / "lab.yaml"
    path.write_text(f"nodes: [{{device: H100-SXM, devices: 2}}]\nbandwidth_Bps: [[0, 1.0e+9], [{value}, -1]]\n")
    with pytest.raises(InputError, match=r"bandwidth_Bps: row 1, column 0 \(what device 1 sends to device 0\) must be a positive number"):
        parse_cluster(str(path))
    path.write_text("nodes: [{device: H100-SXM, devices: 2}]\nbandwidth_Bps: [[0, 1.0e+9], [2.0e+9, -1]]\n")
    assert parse_cluster(str(path)).bandwidth_Bps == ((0, 1e9), (2e9, -1))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Placement((0, 1), 2.0, 2.0, 2.0, 0.0, "default"), "rank order: the default; proved best"),
        (
            Placement((1, 0), 0.88, 1.0, 0.86871, 0.013, "axes dp, tp, pp"),
            "rank order: pp innermost, dp outermost; saves 12.0 % of the step against the default; within 1.3 % of the bound",
        ),
        (
            Placement((1, 0), 1.5, 2.0, 1.5, 0.0, "search"),
            "rank order: found by search; saves 25.0 % of the step against the default; proved best",
        ),
    ],
)
def test_one_sentence_says_what_was_found(given: Placement, words: str) -> None:
    """The summary says the order, what it saves and how far it may be from the best."""
    assert summary(given) == words
