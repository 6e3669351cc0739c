"""Ranks to devices: which device holds which rank of a layout.

Ranks are numbered with the first axis of a layout outermost (pp, dp, cp, tp). A mapping is a permutation `order`: rank r runs on device
order[r]. It costs what the step pays for its traffic: for each kind of collective the seconds of the slowest group, as all wait for
it, and for the pipeline the slowest replica's chain of stage borders.

    starts    the default, every nesting of the axes, and every share of each axis inside a node; where nodes are equal and no links
              were measured one of them is as a rule proved best
    bound     proved for any mapping (placementbound.py)
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

import numpy as np

from meshwright.costmodel.collectives import Op
from meshwright.costmodel.model import CostModel
from meshwright.planner.placementbound import _Floor
from meshwright.planner.placementprice import AXES, JOINED, GroupTraffic, Traffic, _Pricer, _slowest, _spread
from meshwright.planner.placementsearch import SEARCHED, _arrangements, _enumerate, _search, _starts
from meshwright.profiling.cluster import Cluster, Group
from meshwright.profiling.errors import InputError

FEW = 50_000  # mappings that are enumerated before any search


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


__all__ = [
    "AXES", "JOINED", "GroupTraffic", "Mapped", "Placement", "Traffic", "apply_order", "border_seconds", "group_of", "place", "summary",
]  # fmt: skip
