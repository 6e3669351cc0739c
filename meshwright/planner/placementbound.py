"""What any mapping of ranks to devices costs at least."""

from __future__ import annotations

from functools import cached_property
from math import log, prod

import numpy as np
from scipy.sparse.csgraph import connected_components

from meshwright.planner.placementprice import _Kind, _Pricer
from meshwright.profiling.cluster import Cluster

THRESHOLDS = 256  # that a ring's ceiling is looked for between


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
