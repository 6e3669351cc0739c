"""Ranks to devices: which device holds which rank of a layout.

Ranks are numbered with the first axis of a layout outermost (pp, dp, cp, tp). A mapping is a permutation `order`: rank r runs on device
order[r]. It costs what the step pays for its traffic: for each kind of collective the seconds of the slowest group, as all wait for
it, and for the pipeline the slowest replica's chain of stage borders.

    starts    the default, every nesting of the axes, and every share of each axis inside a node; where nodes are equal and no links
              were measured one of them is as a rule proved best
    bound     proved for any mapping (see _Floor)
    search    where a start is above the bound: all mappings if they are few, else local search, and then all mappings again under
              what was found, as far as they fit into memory

A group's ring passes each of its nodes once, as NCCL's do: nodes in the order in which its ranks come to them, the ranks of a node
in rank order. NCCL measures no links, so a slow one is avoided only if the ranks are ordered so. In an all-to-all every pair counts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, product
from math import exp, lgamma, log, prod

import numpy as np
from scipy.sparse.csgraph import connected_components

from meshwright.costmodel import collectives
from meshwright.costmodel.collectives import Op
from meshwright.costmodel.model import CostModel
from meshwright.profiling.cluster import Cluster, Group, Link
from meshwright.profiling.errors import InputError

AXES = ("pp", "dp", "cp", "tp")
JOINED = ("cp", "tp")  # ranks that compute one microbatch together: a stage starts when the last of them has its input
FEW = 50_000  # mappings that are enumerated before any search
ROWS = 100_000  # partial mappings held at once
SEARCHED = 1024  # devices; beyond, only the starts
RUNGS, BATCH = ((32, 50), (6, 300), (2, 1500)), 32  # of the local search: walks and their rounds; moves tried in each round
HEAT = 0.1  # a round may lose so much of what is sent
THRESHOLDS = 256  # that a ring's ceiling is looked for between


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
class Placement:
    """Rank r runs on device order[r]. Seconds of a step under it, under the default order, and proved for any; gap = seconds / bound - 1.
    `method`: "default", "axes ..." (nesting, outermost first), "search", or "enumeration"."""

    order: tuple[int, ...]
    seconds: float
    default_seconds: float
    bound: float
    gap: float
    method: str

    @property
    def rank_map(self) -> list[int]:
        """`order`, or nothing where it is the default: what a plan's JSON keeps."""
        return [] if self.order == tuple(range(len(self.order))) else list(self.order)


class Mapped(Cluster):
    """A cluster whose rank r is device order[r] of the original: links and nodes are those of the ranks, not in blocks."""

    order: tuple[int, ...]

    @cached_property
    def node_of(self) -> np.ndarray:
        """Node index of every rank. [size]"""
        return np.asarray(super().node_of)[list(self.order)]

    @cached_property
    def _matrix(self) -> np.ndarray | None:
        return None if self.bandwidth_Bps is None else np.asarray(self.bandwidth_Bps)

    def group(self, ranks: np.ndarray | list[int] | range, every_pair: bool = False) -> Group:
        """As Cluster.group, over rings that pass each node once, or over every pair. `per_node` counts the emptiest node, whose links
        carry most."""
        rows = np.atleast_2d(np.asarray(ranks))
        homes = self.node_of[rows]
        spans, emptiest = _spread(homes)
        worst = int(np.lexsort((emptiest, -spans))[0])
        node_link, network_link = self.node_link, self.network_link
        if self._matrix is not None and rows.shape[1] > 1:
            inside, outside = _slowest(rows, homes, self._matrix, every_pair)
            node_link, network_link = (
                link if np.isinf(b.min()) else link.model_copy(update={"bandwidth_Bps": float(b.min()), "provenance": "measured"})
                for link, b in ((node_link, inside), (network_link, outside))
            )
        nodes, per_node = int(spans[worst]), int(emptiest[worst])
        return Group(size=rows.shape[1], nodes=nodes, per_node=per_node, node_link=node_link, network_link=network_link)


def apply_order(cluster: Cluster, order: Sequence[int]) -> Mapped:
    """The cluster as the ranks of a mapping see it: what costs are to be bound to. InputError if `order` is no permutation."""
    if sorted(order) != list(range(cluster.size)):
        raise InputError(f"a rank order of this cluster must hold each of 0 to {cluster.size - 1} once")
    fields = {name: getattr(cluster, name) for name in Cluster.model_fields}
    if cluster.bandwidth_Bps is not None:
        fields["bandwidth_Bps"] = tuple(tuple(cluster.bandwidth_Bps[i][j] for j in order) for i in order)
    return Mapped(**fields, order=tuple(int(d) for d in order))


def group_of(cluster: Cluster, order: Sequence[int], ranks: np.ndarray | list[int] | range, op: Op = "all_gather") -> Group:
    """The Group that bounds a collective of these ranks under a mapping (see Mapped.group)."""
    return apply_order(cluster, order).group(ranks, every_pair=op == "all_to_all")


def border_seconds(cluster: Cluster, traffic: Traffic, order: Sequence[int] | None = None) -> np.ndarray:
    """Seconds of a transfer across each stage border for each data-parallel replica: the mean of both directions, of the slowest
    of the replica's ranks. [replicas, borders]"""
    devices = np.arange(traffic.size) if order is None else np.asarray(order)
    return np.asarray(_Pricer.of(cluster, traffic, None).hops(devices[None])[0])


def summary(placement: Placement) -> str:
    """One sentence for the terminal."""
    how = {"default": "the default", "search": "found by search", "enumeration": "the best of all"}.get(placement.method)
    if how is None:
        names = placement.method.removeprefix("axes ").split(", ")
        how = f"{names[-1]} innermost, {names[0]} outermost" if len(names) > 1 else f"{names[0]} alone"
    saved = 1 - placement.seconds / placement.default_seconds if placement.default_seconds else 0.0
    saves = "" if not placement.rank_map else f"; saves {100 * saved:.1f} % of the step against the default"
    return f"rank order: {how}{saves}; {'proved best' if placement.gap == 0 else f'within {100 * placement.gap:.1f} % of the bound'}"


def place(cluster: Cluster, traffic: Traffic, *, seconds: float = 5.0, costs: CostModel | None = None) -> Placement:
    """The best mapping found of a layout's ranks to a cluster's devices, never worse than the default, and a bound on any.

    The same on every machine, unless `seconds` (of search) cut it short. InputError: what does not fit together.
    """
    deadline = time.monotonic() + seconds
    _check(cluster, traffic)
    price = _Pricer.of(cluster, traffic, costs)
    names, starts = _starts(cluster, traffic)
    cost = price.step(starts)[0]
    default, first = float(cost[0]), int(cost.argmin())
    first = 0 if default <= cost[first] * (1 + 1e-12) else first
    order, found, method = starts[first], float(cost[first]), names[first]
    floor = _Floor(cluster, price)
    bound = min(floor.seconds, found)

    def proved() -> bool:
        return found <= bound * (1 + 1e-9)

    few = _arrangements(cluster) <= FEW
    if not proved() and cluster.size <= SEARCHED:
        if not few:
            ranked = starts[np.argsort(cost, kind="stable")]
            better, at = _search(price, ranked, bound, time.monotonic() + 0.6 * max(0.0, deadline - time.monotonic()))
            if at < found * (1 - 1e-12):
                order, found, method = better, at, "search"
        if not proved():
            all_below, low = _enumerate(cluster, price, floor, found, deadline)
            bound = min(max(bound, low), found)
            if all_below is not None:
                order, found, method = all_below, low, "enumeration"
    bound = found if proved() else bound
    return Placement(tuple(int(d) for d in order), found, default, bound, found / bound - 1 if bound else 0.0, method)


def _check(cluster: Cluster, traffic: Traffic) -> None:
    if len(traffic.shape) != len(traffic.axes) or min(traffic.shape, default=0) < 1:
        raise InputError(f"a layout's shape must be one degree of at least 1 for each of {', '.join(traffic.axes)}, not {traffic.shape}")
    if traffic.size != cluster.size:
        raise InputError(f"a layout of {traffic.size} ranks cannot be mapped to {cluster.size} devices: there must be as many")
    for c in traffic.collectives:
        unknown = [a for a in c.axes if a not in traffic.axes]
        if unknown or not c.axes:
            raise InputError(f"a group's axes must be among {', '.join(traffic.axes)}, not {', '.join(unknown) or 'none'}")
    amounts = [traffic.send_bytes, traffic.sends, traffic.rounds, traffic.rest_s]
    amounts += [x for c in traffic.collectives for x in (c.nbytes, c.times, c.exposed)]
    if not all(0 <= x < float("inf") for x in amounts):
        raise InputError("a layout's bytes, times and seconds must be numbers of at least 0")


# --- what a mapping costs -------------------------------------------------------------------------------------------------


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


# --- mappings to start from -----------------------------------------------------------------------------------------------


def _starts(cluster: Cluster, traffic: Traffic) -> tuple[list[str], np.ndarray]:
    """The default, every nesting of the axes, and, where nodes are equal, every way to fill one with shares of the axes. [k, size]"""
    shape, used = traffic.shape, [i for i, n in enumerate(traffic.shape) if n > 1]
    nestings = list(permutations(used))
    per_node = cluster.devices_per_node if len({n.devices for n in cluster.nodes}) == 1 else 1
    inner = [()] if per_node == 1 else product(*([k for k in range(1, shape[i] + 1) if shape[i] % k == 0] for i in used))
    splits = [k for k in inner if k and prod(k) == per_node]
    found: dict[bytes, tuple[str, np.ndarray]] = {}

    def add(name: str, order: np.ndarray) -> None:
        found.setdefault(order.astype(np.int32).tobytes(), (name, order))

    add("default", np.arange(traffic.size))
    for nesting in nestings:
        add("axes " + ", ".join(traffic.axes[i] for i in nesting), _nested(shape, nesting, {}))
    few = nestings if cluster.bandwidth_Bps is not None and traffic.size <= SEARCHED else [tuple(used)]
    for split, nesting in product(splits, few):
        share = {i: k for i, k in zip(used, split) if k > 1}
        inside = " and ".join(f"{k} of {traffic.axes[i]}" for i, k in share.items())
        add(f"axes {', '.join(traffic.axes[i] for i in nesting)}, {inside} in each node:", _nested(shape, nesting, share))
    names, orders = zip(*found.values())
    return [n if not n.endswith(":") else n[:-1] for n in names], np.stack(orders)


def _nested(shape: tuple[int, ...], nesting: tuple[int, ...], share: dict[int, int]) -> np.ndarray:
    """The mapping that numbers devices with the axes nested so, of which shares vary innermost."""
    split = [(n // share.get(i, 1), share.get(i, 1)) for i, n in enumerate(shape)]
    outer = [i for i in range(len(shape)) if i not in nesting] + list(nesting)
    dims = [(i, 0) for i in outer] + [(i, 1) for i in outer]
    devices = np.arange(prod(shape)).reshape([split[i][part] for i, part in dims])
    back = [dims.index((i, part)) for i in range(len(shape)) for part in (0, 1)]
    return devices.transpose(back).reshape(-1)


# --- bounds ---------------------------------------------------------------------------------------------------------------


class _Floor:
    """What any mapping costs at least.

    Let N_a be the most nodes that a line of ranks along axis a spans. Where ranks of a node are drawn at random, the entropy of a rank is
    at least the sum over axes of its entropy along the axis given the others, so that on nodes of d devices the product of all N_a is
    at least the number of nodes (of unequal ones: devices over the mean of d weighted by devices, in logarithms). The same holds with
    several axes as one. Where N_a is 1 for some axes, a node is filled by whole blocks of them: their degrees divide d, and leave a line
    along another axis d over them as places in a node. Under both, each kind of group has a floor for every N_a, and the bound is the
    least sum of floors over all N_a.

    A kind's floor: every device is in a group of the kind, and the slowest group takes as long as the best that any device could be in,
    going by how many nodes it spans and by what is fastest of its own links and of the rings through it.
    """

    def __init__(self, cluster: Cluster, price: _Pricer) -> None:
        t = price.traffic
        self.price, self.sizes = price, np.bincount(cluster.node_of)
        self.nodes = len(self.sizes)
        self._floors: dict[tuple[int, int], np.ndarray] = {}
        used = [i for i, n in enumerate(t.shape) if n > 1]
        grids = np.meshgrid(*(np.arange(1, min(t.shape[i], self.nodes) + 1) for i in used), indexing="ij")
        spans = np.stack([np.ones(1, int)] if not used else [g.ravel() for g in grids])  # [axes, ways]
        least = log(t.size) - float((self.sizes * np.log(self.sizes)).sum()) / t.size  # of the sum of log N_a
        spans = spans[:, np.log(spans).sum(axis=0) >= least - 1e-9]
        self.seconds = float("inf")
        for inside in np.unique(spans == 1, axis=1).T if used else np.zeros((1, 0), bool):
            these = spans[:, ((spans == 1) == inside[:, None]).all(axis=0)] if used else spans
            closed = {i for i, x in zip(used, inside) if x}
            if (self.sizes % prod(t.shape[i] for i in closed)).any():
                continue
            total = np.full(these.shape[1], t.rest_s)
            for j, kind in enumerate(price.kinds):
                floor = self._kind(j, prod(t.shape[i] for i in closed - set(kind.axes)))
                if len(kind.axes) == 1:
                    total = total + floor[these[used.index(kind.axes[0])]]
                    continue
                own = np.array([i in kind.axes for i in used])
                low = np.ceil(np.exp(least - np.log(these[~own]).sum(axis=0)) - 1e-6)
                onwards = np.append(np.minimum.accumulate(floor[::-1])[::-1], np.inf)
                total = total + onwards[np.minimum(np.maximum(low, these[own].max(axis=0)), len(floor)).astype(int)]
            if t.borders:
                pp = t.axes.index("pp")
                total = total + self._chain(prod(t.shape[i] for i in closed - {pp}))[these[used.index(pp)]]
            self.seconds = min(self.seconds, float(total.min()))
        # of each kind whatever the nodes are
        self.whatever = [float(self._by_device(kind, 1).min(axis=0).max()) for kind in price.kinds]

    @cached_property
    def cheapest_hop(self) -> float:
        hop = self.price.hop
        return float(hop.min() if self.price.matrix is None or len(hop) == 1 else hop[~np.eye(len(hop), dtype=bool)].min())

    def _kind(self, j: int, shared: int) -> np.ndarray:
        """Least weighted seconds of the slowest group of kind j if the most nodes that a group spans are N, where each place of a group in
        a node stands for `shared` ranks of that node. [N from 0]"""
        if (j, shared) not in self._floors:
            x = self._by_device(self.price.kinds[j], shared)
            # some group spans N, and every device is in a group that spans no more
            self._floors[j, shared] = np.maximum(np.minimum.accumulate(x).max(axis=1), x.min(axis=1))
        return self._floors[j, shared]

    def _by_device(self, kind: _Kind, shared: int) -> np.ndarray:
        """Least weighted seconds of a group of a kind that spans N nodes and holds this device. [N from 0, devices]"""
        p, n = self.price, kind.n
        devices = 1 if p.matrix is None else len(p.matrix)
        out = np.full((min(n, self.nodes) + 1, devices), np.inf)
        most = int(self.sizes.max()) // shared
        for nodes in range(1, len(out)):
            for emptiest in range(n if nodes == 1 else 1, n // nodes + 1):
                if emptiest > most or n - emptiest > (nodes - 1) * most:
                    continue
                ways = [(np.ones(1), np.ones(1))] if p.matrix is None else self._ways(kind, nodes, emptiest, shared)
                for inside, outside in ways:
                    possible = (inside > 0) & (outside > 0)
                    fast = [np.where(possible, b, 1.0) for b in (inside, outside)]
                    seconds = p.collective(kind, np.full(devices, nodes), np.full(devices, emptiest), *fast).sum(axis=-1)
                    out[nodes] = np.minimum(out[nodes], np.where(possible, seconds, np.inf))
        return out

    def _ways(self, kind: _Kind, nodes: int, emptiest: int, shared: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """What the slowest link of a device's group cannot exceed, inside nodes and between, by how the device lies in it; 0: it cannot."""
        m, n = self._measured, kind.n
        most = np.minimum(self.sizes[m.home] // shared, n - (nodes - 1) * emptiest)  # of the group on the device's node

        def where(possible: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return np.where(possible, inside, 0.0), outside

        fits = most >= emptiest
        if kind.every_pair:
            if nodes == 1:
                return [where(fits, m.inside_best(n - 1), m.unlimited)]
            inside = m.inside_best(emptiest - 1) if emptiest > 1 else m.unlimited
            return [where(fits, inside, m.outside_best(n - np.clip(most, 1, n - 1)))]
        if nodes == 1:
            return [where(fits, m.ring_inside(n), m.unlimited)]
        between = m.ring_between(nodes)
        ways = []
        if emptiest == 1:  # alone on its node
            ways.append(where(fits, m.unlimited, np.minimum(between, np.minimum(m.outside_out, m.outside_in))))
        if emptiest <= 2:  # at an end of what its node holds
            ways.append(where(most >= 2, m.inside_out, np.minimum(between, m.outside_in)))
            ways.append(where(most >= 2, m.inside_in, np.minimum(between, m.outside_out)))
        else:
            ways.append(where(fits, m.inside_out, np.minimum(between, m.outside_in)))
            ways.append(where(fits, m.inside_in, np.minimum(between, m.outside_out)))
        ways.append(where(fits & (most >= 3), np.minimum(m.inside_out, m.inside_in), between))
        return ways

    @cached_property
    def _measured(self) -> _Ceilings:
        assert self.price.matrix is not None
        return _Ceilings(self.price.home, self.price.matrix)

    def _chain(self, shared: int) -> np.ndarray:
        """Least seconds of the slowest chain of borders if the most nodes that a line along pp spans are N, where each place of a line in a
        node stands for `shared` ranks of that node. [N from 0]"""
        p, t = self.price, self.price.traffic
        stages, borders = t.shape[t.axes.index("pp")], t.borders
        most = int(self.sizes.max()) // shared
        if p.matrix is None:
            inside, outside = (float(x) for x in p.hop)
            least = nearest = outside if most == 1 else min(inside, outside) if self.nodes > 1 else inside
        else:
            apart = p.home[:, None] != p.home
            beside = ~apart & ~np.eye(len(p.home), dtype=bool)
            outside = float(np.min(p.hop, initial=np.inf, where=apart))
            inside = float(np.min(p.hop, initial=np.inf, where=beside))
            reach = np.min(p.hop, axis=1, initial=np.inf, where=apart if most == 1 else apart | beside)
            least, nearest = float(reach.min()), float(reach.max())  # nearest of the device that is worst off
        out = np.full(min(stages, self.nodes) + 1, np.inf)
        for nodes in range(1, len(out)):
            if nodes * most < stages:
                continue
            fewest = 0 if nodes == 1 else nodes - (not t.loop)
            for crossings in {borders if most == 1 else fewest, borders if nodes > 1 else 0}:
                within = borders - crossings
                if (crossings and np.isinf(outside)) or (within and np.isinf(inside)):
                    continue
                total = (crossings * outside if crossings else 0.0) + (within * inside if within else 0.0)
                at_stage = (outside if crossings else inside) if borders == 1 else 2 * least
                if borders > 1 and crossings and outside >= inside:
                    at_stage = 2 * outside if crossings > (borders + 1) // 2 else outside + inside
                out[nodes] = min(out[nodes], t.sends * total + t.rounds * at_stage)
        any_device = t.sends * ((borders - 1) * least + nearest) + t.rounds * (nearest + (least if borders > 1 else 0.0))
        return np.maximum(out, any_device)


class _Ceilings:
    """The fastest that links of a device's group can be, from the measured matrix. All [devices], bytes/s, 0 where there is none."""

    def __init__(self, home: np.ndarray, matrix: np.ndarray) -> None:
        n = len(home)
        same, alone = home[:, None] == home, np.eye(n, dtype=bool)
        self.home = home
        self.inside, self.outside = np.where(same & ~alone, matrix, 0.0), np.where(same, 0.0, matrix)
        self.unlimited = np.full(n, np.inf)
        self.inside_out, self.inside_in = self.inside.max(axis=1), self.inside.max(axis=0)
        self.outside_out, self.outside_in = self.outside.max(axis=1), self.outside.max(axis=0)
        self.fastest_inside = float(self.inside.max())
        self.devices_of_home = np.bincount(home)[home]
        count = int(home.max()) + 1
        self.between = np.zeros((count, count))
        np.maximum.at(self.between, (np.repeat(home, n), np.tile(home, n)), self.outside.ravel())
        self._best = [-np.sort(-np.minimum(m, m.T), axis=1) for m in (self.inside, self.outside)]
        self._rings: dict[tuple[bool, int], np.ndarray] = {}

    def inside_best(self, k: int) -> np.ndarray:
        """The k-th fastest pair of a device within its node, slower direction."""
        return self._best[0][:, k - 1]

    def outside_best(self, k: np.ndarray) -> np.ndarray:
        """The k-th fastest pair of each device with other nodes, slower direction."""
        return np.take_along_axis(self._best[1], k[:, None] - 1, axis=1)[:, 0]

    def ring_inside(self, n: int) -> np.ndarray:
        """Of a ring of n devices within the node."""
        if (False, n) not in self._rings:
            self._rings[False, n] = _ring_ceiling(self.inside, n)
        return self._rings[False, n]

    def ring_between(self, nodes: int) -> np.ndarray:
        """Of a ring over so many nodes, this one's among them."""
        if (True, nodes) not in self._rings:
            self._rings[True, nodes] = _ring_ceiling(self.between, nodes)
        return self._rings[True, nodes][self.home]


def _ring_ceiling(matrix: np.ndarray, n: int) -> np.ndarray:
    """For each vertex the fastest that the slowest link of a ring of n through it can be: at a faster one, the links as fast leave it
    in a strongly connected component of fewer than n. 0 where there is no such ring."""
    values = np.unique(matrix[matrix > 0])
    tried = values[np.unique(np.linspace(0, len(values) - 1, min(len(values), THRESHOLDS)).round().astype(int))]
    ceiling = np.zeros(len(matrix))
    open_ = np.ones(len(matrix), bool)
    for i in range(len(tried)):
        labels = connected_components(matrix >= tried[i], directed=True, connection="strong")[1]
        open_ &= np.bincount(labels)[labels] >= n
        if not open_.any():
            break
        # between two thresholds that were tried the truth is not above the last value before the next
        ceiling[open_] = values[-1] if i + 1 == len(tried) else values[np.searchsorted(values, tried[i + 1]) - 1]
    return ceiling


# --- search ---------------------------------------------------------------------------------------------------------------


def _search(price: _Pricer, starts: np.ndarray, bound: float, deadline: float) -> tuple[np.ndarray, float]:
    """Local search: a short walk from every start, longer ones from where the best of them ended. The best mapping met, its seconds."""
    rng = np.random.default_rng(0)
    best, least = starts[0], float("inf")
    for rung, (keep, rounds) in enumerate(RUNGS):
        begin, ends = time.monotonic(), []
        for turn, start in enumerate(starts[:keep]):
            left = (deadline - begin) / (len(RUNGS) - rung)
            end, cost = _walk(price, start, rounds, rng, bound, begin + left * (turn + 1) / len(starts[:keep]))
            ends.append((cost, turn, end))
            if cost < least:
                best, least = end, cost
            if least <= bound * (1 + 1e-9):
                return best, least
        starts = np.stack([end for _, _, end in sorted(ends, key=lambda x: x[:2])])
    return best, least


def _walk(
    price: _Pricer, start: np.ndarray, rounds: int, rng: np.random.Generator, bound: float, deadline: float
) -> tuple[np.ndarray, float]:
    """Of a batch of random moves the best, if it is better, or not worse by more than a threshold that falls to none; and so on. The
    best mapping met, its seconds."""
    cost, guide = price.step(start[None])
    best, least, now, at, fixed = start, float(cost[0]), start, float(guide[0]), price.traffic.rest_s
    for i in range(rounds):
        if least <= bound * (1 + 1e-9) or time.monotonic() > deadline:
            break
        candidates = _moves(rng, now, price.traffic.shape)
        costs, guides = price.step(candidates)
        guides[(candidates == now).all(axis=1)] = np.inf
        k = int(costs.argmin())
        if costs[k] < least * (1 - 1e-12):
            best, least = candidates[k], float(costs[k])
        k = int(guides.argmin())
        if guides[k] < at + (at - fixed) * HEAT * rng.random() * max(0.0, 1 - 1.25 * i / rounds):
            now, at = candidates[k], float(guides[k])
    return best, least


def _moves(rng: np.random.Generator, order: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Random neighbours of a mapping: two blocks of ranks (single ranks, groups, stages, chains) swapped; or ranks along one axis, in
    some or all of the lines, reversed or shifted by one. [batch, size]"""
    out = np.repeat(order[None], BATCH, axis=0)
    grids = out.reshape(BATCH, *shape)
    used = [i for i, n in enumerate(shape) if n > 1]
    longer = [i for i in used if shape[i] > 2]
    for grid, kind, draws in zip(grids, rng.random(BATCH), rng.random((BATCH, 3 * len(shape) + 3))):
        u = iter(draws.tolist())
        if kind < 0.75 or not longer:
            free = [i in used and next(u) < 0.3 for i in range(len(shape))]
            a, b = (tuple(slice(None) if f else int(next(u) * n) for f, n in zip(free, shape)) for _ in range(2))
            grid[a], grid[b] = np.copy(grid[b]), np.copy(grid[a])
        else:
            axis = longer[int(next(u) * len(longer))]
            lines = tuple(slice(None) if i == axis or next(u) < 0.4 else int(next(u) * n) for i, n in enumerate(shape))
            view = np.moveaxis(grid[lines], sum(isinstance(x, slice) for x in lines[:axis]), 0)
            first, last = sorted((int(next(u) * shape[axis]), int(next(u) * shape[axis])))
            part = view[first : last + 1]
            view[first : last + 1] = part[::-1].copy() if kind < 0.85 else np.roll(part, 1 if kind < 0.925 else -1, axis=0)
    return out


# --- all mappings ---------------------------------------------------------------------------------------------------------


def _classes(cluster: Cluster) -> np.ndarray:
    """Class of each device: of one class are those of one node that may be exchanged without any link changing. [size]"""
    if cluster.bandwidth_Bps is None:
        return cluster.node_of
    matrix, home = np.array(cluster.bandwidth_Bps), cluster.node_of
    np.fill_diagonal(matrix, 0.0)
    of = np.full(len(home), -1)
    heads: dict[tuple[int, bytes, bytes], list[int]] = {}
    for i in range(len(home)):
        key = (int(home[i]), np.sort(matrix[i]).tobytes(), np.sort(matrix[:, i]).tobytes())
        for j in heads.setdefault(key, []):
            swapped = np.arange(len(home))
            swapped[[i, j]] = j, i
            if (matrix[swapped][:, swapped] == matrix).all():
                of[i] = of[j]
                break
        else:
            of[i] = of.max() + 1
            heads[key].append(i)
    return of


def _arrangements(cluster: Cluster) -> float:
    """How many mappings differ (inf for too many to count in a float)."""
    if cluster.size > SEARCHED:
        return float("inf")
    logs = lgamma(cluster.size + 1) - sum(lgamma(int(c) + 1) for c in np.bincount(_classes(cluster)))
    return exp(logs) if logs < 700 else float("inf")


def _enumerate(cluster: Cluster, price: _Pricer, floor: _Floor, below: float, deadline: float) -> tuple[np.ndarray | None, float]:
    """All mappings under `below` seconds, rank by rank and many at once, less those that cannot come below. Returns the best and its
    seconds; or no mapping and a bound on any: `below` if there is none under it, less where the mappings were too many to hold."""
    t, of = price.traffic, _classes(cluster)
    heads = np.asarray(np.unique(of, return_index=True)[1])
    counts = np.bincount(of)
    matrix = None if price.matrix is None else price.matrix[np.ix_(heads, heads)]
    if price.matrix is not None and matrix is not None:
        for several in np.flatnonzero(counts > 1):
            one, other = np.flatnonzero(of == several)[:2]
            matrix[several, several] = price.matrix[one, other]
    classes = _Pricer(price.home[heads], matrix, price.node_link, price.network_link, t, price.kinds, price.costs)
    # without measured links equal nodes are alike: the first rank of the second comes after that of the first
    twin = np.array([next((j for j in range(c - 1, -1, -1) if counts[j] == counts[c]), -1) for c in range(len(counts))])
    twin = twin if matrix is None else np.full(len(counts), -1)
    closing: dict[int, list[tuple[int, np.ndarray]]] = {}
    for j, kind in enumerate(price.kinds):
        for row in kind.rows:
            closing.setdefault(int(row.max()), []).append((j, row))
    borders = _borders(t)
    limit = below * (1 - 1e-9)

    rows = np.zeros((1, 0), np.int16)
    slowest = np.array([[0.0] * sum(len(k.parts) for k in price.kinds)])
    first = np.cumsum([0, *(len(k.parts) for k in price.kinds)])
    hops = np.full((1, *_chains(t)), floor.cheapest_hop if t.borders else 0.0)
    least = floor.seconds
    for rank in range(t.size):
        kept = []
        for at in range(0, len(rows), max(1, ROWS // len(counts))):
            part = slice(at, at + max(1, ROWS // len(counts)))
            used = (rows[part, :, None] == np.arange(len(counts))).sum(axis=1)
            free = (used < counts) & ((twin < 0) | (used[:, twin] > 0))
            r, c = np.nonzero(free)
            new = np.concatenate([rows[part][r], c[:, None].astype(np.int16)], axis=1)
            now, hop = slowest[part][r], hops[part][r]
            for j, row in closing.get(rank, ()):
                span = slice(first[j], first[j + 1])
                now[:, span] = np.maximum(now[:, span], classes.groups(price.kinds[j], new[:, row].astype(int)))
            for a, b, chain, border in borders.get(rank, ()):
                hop[:, chain, border] = np.maximum(hop[:, chain, border], classes.pair(new[:, a].astype(int), new[:, b].astype(int)))
            total = np.full(len(new), t.rest_s)
            for j, least_of_kind in enumerate(floor.whatever):
                total += np.maximum(now[:, first[j] : first[j + 1]].sum(axis=1), least_of_kind)
            if t.borders:
                total = total + classes.chains(hop).max(axis=1)
            good = total < limit
            kept.append((new[good], now[good], hop[good], total[good]))
            if sum(len(k[0]) for k in kept) > ROWS or time.monotonic() > deadline:
                return None, min(below, least)
        rows, slowest, hops, totals = (np.concatenate(x) for x in zip(*kept))
        if not len(rows):
            return None, below
        least = max(least, float(totals.min()))
    best = int(totals.argmin())
    order = np.empty(t.size, int)
    for held in range(len(counts)):
        order[rows[best] == held] = np.flatnonzero(of == held)
    return order, float(price.step(order[None])[0][0])


def _chains(t: Traffic) -> tuple[int, int]:
    """Replicas with a chain of their own, borders of each."""
    if not t.borders:
        return 1, 1
    return prod(n for a, n in zip(t.axes, t.shape) if a != "pp" and a not in JOINED), t.borders


def _borders(t: Traffic) -> dict[int, list[tuple[int, int, int, int]]]:
    """Pairs of ranks across a border as (from, to, replica, border), by the rank that completes them."""
    found: dict[int, list[tuple[int, int, int, int]]] = {}
    if not t.borders:
        return found
    at = t.axes.index("pp")
    ranks = np.moveaxis(np.arange(t.size).reshape(t.shape), at, 0)
    own = [i for i, a in enumerate(a for a in t.axes if a != "pp") if a not in JOINED]
    for border in range(t.borders):
        following = ranks[(border + 1) % len(ranks)]
        for index in np.ndindex(following.shape):
            chain = int(np.ravel_multi_index([index[i] for i in own], [following.shape[i] for i in own])) if own else 0
            a, b = int(ranks[border][index]), int(following[index])
            found.setdefault(max(a, b), []).append((a, b, chain, border))
    return found
