"""What a mapping of ranks to devices costs: the traffic of a layout, and the seconds of a step under many mappings at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from meshwright.costmodel import collectives
from meshwright.costmodel.collectives import Op
from meshwright.costmodel.model import CostModel
from meshwright.profiling.cluster import Cluster, Group, Link

AXES = ("pp", "dp", "cp", "tp")
JOINED = ("cp", "tp")  # ranks that compute one microbatch together: a stage starts when the last of them has its input


@dataclass(frozen=True)
class GroupTraffic:
    """One kind of collective: ranks that differ only in `axes` form a group and move `nbytes` (the full tensor), `times` a step; the
    step pays the share `exposed` of its seconds."""

    axes: tuple[str, ...]
    op: Op
    nbytes: float
    times: float = 1.0
    exposed: float = 1.0


@dataclass(frozen=True)
class Traffic:
    """What one layout sends in a step. `shape` are the degrees of `axes`, outermost first.

    Pipeline: a transfer of `send_bytes` between ranks next to each other in pp takes h seconds. A step pays `sends` h for each border and
    `rounds` times the h of the stage whose borders take longest: 2 and microbatches - 1 for 1F1B without overlap (step_1f1b). `loop`:
    the last stage sends to the first (vpp > 1). `rest_s`: seconds of the step that no mapping changes.
    """

    shape: tuple[int, ...]
    collectives: tuple[GroupTraffic, ...] = ()
    send_bytes: float = 0.0
    sends: float = 0.0
    rounds: float = 0.0
    loop: bool = False
    rest_s: float = 0.0
    axes: tuple[str, ...] = AXES

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def borders(self) -> int:
        """Stage borders of a chain that the step pays for."""
        stages = dict(zip(self.axes, self.shape)).get("pp", 1)
        return 0 if stages == 1 or self.sends + self.rounds == 0 else stages - (not self.loop)


@dataclass(frozen=True)
class _Kind:
    """Collectives of the same groups. `rows` are the ranks of each group [groups, n]; `parts` are (seconds' weight, op, bytes)."""

    axes: tuple[int, ...]
    rows: np.ndarray
    every_pair: bool
    parts: tuple[tuple[float, Op, float], ...]

    @property
    def n(self) -> int:
        return int(self.rows.shape[1])


@dataclass(frozen=True)
class _Pricer:
    """Prices mappings, many at once. `home` [places] is the node of each place, `matrix` [places, places] what was measured. A place is a
    device, or a class of devices that are alike."""

    home: np.ndarray
    matrix: np.ndarray | None
    node_link: Link
    network_link: Link
    traffic: Traffic
    kinds: tuple[_Kind, ...]
    costs: CostModel | None

    @staticmethod
    def of(cluster: Cluster, traffic: Traffic, costs: CostModel | None) -> _Pricer:
        ranks = np.arange(traffic.size).reshape(traffic.shape)
        found: dict[tuple[tuple[int, ...], bool], list[tuple[float, Op, float]]] = {}
        for c in traffic.collectives:
            axes = tuple(i for i, a in enumerate(traffic.axes) if a in c.axes and traffic.shape[i] > 1)
            if axes and c.times * c.exposed > 0:
                found.setdefault((axes, c.op == "all_to_all"), []).append((c.times * c.exposed, c.op, c.nbytes))
        kinds = []
        for (axes, every_pair), parts in found.items():
            rows = np.moveaxis(ranks, axes, range(-len(axes), 0)).reshape(-1, prod(traffic.shape[a] for a in axes))
            kinds.append(_Kind(axes, rows, every_pair, tuple(parts)))
        matrix = None
        if cluster.bandwidth_Bps is not None:
            matrix = np.array(cluster.bandwidth_Bps)
            np.fill_diagonal(matrix, np.inf)
        return _Pricer(cluster.node_of, matrix, cluster.node_link, cluster.network_link, traffic, tuple(kinds), costs)

    def step(self, orders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of a step under each mapping [k, size] -> [k], and a guide for a search: the same, and a little of the mean over the
        groups, which tells apart mappings with as slow a slowest group."""
        total = np.full(len(orders), self.traffic.rest_s)
        mean = np.zeros(len(orders))
        for kind in self.kinds:
            of_group = self.groups(kind, orders[:, kind.rows])
            total += of_group.max(axis=1).sum(axis=-1)
            mean += of_group.mean(axis=1).sum(axis=-1)
        if self.traffic.borders:
            chains = self.chains(self.hops(orders))
            total += chains.max(axis=1)
            mean += chains.mean(axis=1)
        return total, total + 0.1 * mean

    def groups(self, kind: _Kind, rows: np.ndarray) -> np.ndarray:
        """Weighted seconds of groups of places, for each part of a kind. [..., n] -> [..., parts]"""
        homes = self.home[rows]
        spans, emptiest = _spread(homes)
        inside = outside = np.full(spans.shape, np.inf)
        if self.matrix is not None:
            inside, outside = _slowest(rows, homes, self.matrix, kind.every_pair)
        return self.collective(kind, spans, emptiest, inside, outside)

    def collective(self, kind: _Kind, spans: np.ndarray, emptiest: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
        """Weighted seconds of groups that span so many nodes, with so many ranks on the emptiest, over links so fast within and between
        nodes (used where links were measured). Arrays of one shape -> [..., parts]"""
        out = np.empty((*spans.shape, len(kind.parts)))
        code = spans * (kind.n + 1) + emptiest
        same = code.size > 0 and bool((code == code.flat[0]).all())
        for value in [code.flat[0]] if same else np.unique(code):
            at = ... if same else code == value
            nodes, per_node = divmod(int(value), kind.n + 1)
            node_link, network_link = self.node_link, self.network_link
            if self.matrix is not None and nodes < kind.n:
                node_link = _link(node_link, inside[at])
            if self.matrix is not None and nodes > 1:
                network_link = _link(network_link, outside[at])
            group = Group.model_construct(size=kind.n, nodes=nodes, per_node=per_node, node_link=node_link, network_link=network_link)
            for j, (weight, op, nbytes) in enumerate(kind.parts):
                out[..., j][at] = weight * collectives.seconds(op, nbytes, group, self.costs)
        return out

    @cached_property
    def hop(self) -> np.ndarray:
        """Seconds of a transfer between two places, mean of both directions. [places, places]; without measured links [2]: within
        a node and between."""
        sent = self.traffic.send_bytes

        def seconds(nodes: int, bandwidth: np.ndarray | None) -> np.ndarray:
            links = [link if bandwidth is None else _link(link, bandwidth) for link in (self.node_link, self.network_link)]
            group = Group.model_construct(size=2, nodes=nodes, per_node=1, node_link=links[0], network_link=links[1])
            return collectives.send_seconds(sent, group)

        if self.matrix is None:
            return np.array([seconds(1, None), seconds(2, None)])
        one_way = np.where(self.home[:, None] == self.home, seconds(1, self.matrix), seconds(2, self.matrix))
        return np.asarray((one_way + one_way.T) / 2)

    def pair(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Seconds of a transfer between places a and b, which broadcast."""
        return self.hop[(self.home[a] != self.home[b]).astype(int)] if self.matrix is None else self.hop[a, b]

    def hops(self, orders: np.ndarray) -> np.ndarray:
        """Seconds across each border under each mapping. [k, size] -> [k, replicas, borders]"""
        t = self.traffic
        at = t.axes.index("pp")
        stages = np.moveaxis(orders.reshape(len(orders), *t.shape), at + 1, 1)
        pairs = self.pair(stages, np.roll(stages, -1, axis=1))[:, : t.shape[at] - (not t.loop)]
        others = [a for i, a in enumerate(t.axes) if i != at]
        pairs = pairs.max(axis=tuple(i + 2 for i, a in enumerate(others) if a in JOINED))
        return np.asarray(np.moveaxis(pairs.reshape(*pairs.shape[:2], -1), 1, 2))

    def chains(self, hops: np.ndarray) -> np.ndarray:
        """Seconds that a step pays for a chain of borders. [..., borders] -> [...]"""
        t = self.traffic
        before = np.roll(hops, 1, axis=-1)
        at_stage = hops + before if t.loop else (hops + before)[..., 1:] if hops.shape[-1] > 1 else hops
        return np.asarray(t.sends * hops.sum(axis=-1) + t.rounds * at_stage.max(axis=-1))


def _link(link: Link, bandwidth: np.ndarray) -> Link:
    return Link.model_construct(bandwidth_Bps=bandwidth, latency_s=link.latency_s, provenance="measured", source=link.source)


def _spread(homes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes that groups span, and ranks on the emptiest of them. [..., n] -> [...], [...]"""
    n = homes.shape[-1]
    if n == 1 or (homes == homes[..., :1]).all():
        return np.ones(homes.shape[:-1], int), np.full(homes.shape[:-1], n)
    homes = np.sort(homes, axis=-1)
    ends = np.ones(homes.shape, bool)
    ends[..., :-1] = homes[..., 1:] != homes[..., :-1]
    upto = np.where(ends, np.arange(1, n + 1), 0)
    before = np.zeros_like(upto)
    before[..., 1:] = np.maximum.accumulate(upto, axis=-1)[..., :-1]
    return ends.sum(axis=-1), np.where(ends, upto - before, n).min(axis=-1)


def _slowest(rows: np.ndarray, homes: np.ndarray, matrix: np.ndarray, every_pair: bool) -> tuple[np.ndarray, np.ndarray]:
    """Slowest link of a group's ring within nodes and between, or of all its pairs; inf where there is none. [..., n] -> [...], [...]"""
    if every_pair:
        pairs = matrix[rows[..., :, None], rows[..., None, :]]
        within = homes[..., :, None] == homes[..., None, :]
        pairs = np.where(np.eye(rows.shape[-1], dtype=bool), np.inf, pairs).reshape(*rows.shape[:-1], -1)
        within = within.reshape(pairs.shape)
    else:
        if (homes != homes[..., :1]).any():
            first = (homes[..., :, None] == homes[..., None, :]).argmax(axis=-1)  # where the ranks came to the node
            ring = np.argsort(first, axis=-1, kind="stable")
            rows, homes = np.take_along_axis(rows, ring, -1), np.take_along_axis(homes, ring, -1)
        pairs = matrix[rows, np.roll(rows, -1, axis=-1)]
        within = homes == np.roll(homes, -1, axis=-1)
    return np.where(within, pairs, np.inf).min(axis=-1), np.where(within, np.inf, pairs).min(axis=-1)
