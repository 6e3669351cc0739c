"""Seconds of collectives: latency and bandwidth by tier, hierarchical across nodes.

A group of n ranks on N nodes, g to a node, moves a tensor of B bytes (its full size):

    all_gather      every rank's part goes round the nodes over its own network link, then round the node
                    (N - 1) a_net + B/g (N - 1)/N / bw_net  +  (g - 1) a_node + B (g - 1)/g / bw_node
    reduce_scatter  the same in reverse;  all_reduce  both;  all_to_all  B/n (n - g) / bw_net + B/n (g - 1) / bw_node

which is the ring of Thakur et al. 2005 on each tier.

Where a compiled cost model holds measurements of the collective on one node, they replace the node's tier. NCCL's rings pass both
tiers at once in pieces, so that over several nodes the slower tier decides and the latencies add up:

    max( measured(B over g ranks),  B/g (N - 1)/N / bw_net )  +  (N - 1) a_net          (twice the second for all_reduce)
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from meshwright.costmodel import constants
from meshwright.costmodel.model import CostModel
from meshwright.profiling.cluster import Group, Link

Op = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]


def seconds(op: Op, nbytes: np.ndarray | float, group: Group, costs: CostModel | None = None) -> np.ndarray:
    """Seconds of one collective of `nbytes` (the full tensor) over `group`; zero for a group of one. `costs` holds measured
    collectives, which stand in for the datasheet's links unless the cluster names links of its own."""
    size = np.asarray(nbytes, float)
    if group.size == 1:
        return np.zeros_like(size)
    found = _measured(op, size, group, costs) if costs is not None and costs.links else None
    if found is not None:
        return found
    if op == "all_reduce":
        return seconds("reduce_scatter", size, group) + seconds("all_gather", size, group)
    g, nodes = group.per_node, group.nodes
    node, net = group.node_link, group.network_link
    if op == "all_to_all":
        part = size / group.size
        inside = (g - 1) * (node.latency_s + part / node.bandwidth_Bps)
        outside = (nodes > 1) * ((nodes - 1) * net.latency_s + part * (group.size - g) / reached_Bps(net))
        return np.asarray(inside + outside)
    inside = (g - 1) * node.latency_s + size * (g - 1) / g / node.bandwidth_Bps
    outside = (nodes - 1) * net.latency_s + size / g * (nodes - 1) / nodes / reached_Bps(net)
    return np.asarray(inside + outside)


def reached_Bps(link: Link) -> float:
    """Bandwidth of a network that collectives reach: what was measured, or the share of the nominal one that published runs show
    (constants.yaml, "inter")."""
    return link.bandwidth_Bps * (1.0 if link.provenance == "measured" else constants.value("inter"))


def _measured(op: Op, size: np.ndarray, group: Group, costs: CostModel) -> np.ndarray | None:
    if group.node_link.provenance not in ("datasheet", "fitted"):
        return None  # the cluster's own links are nearer to the truth than another machine's
    whole = costs.collective_seconds(op, size, group.size, group.nodes)
    if whole is not None:
        return whole
    g, nodes, net = group.per_node, group.nodes, group.network_link
    inside = np.zeros_like(size)
    if g > 1:
        # ranks of one node exchange with each other g / n of what an all-to-all sends
        found = costs.collective_seconds(op, size * g / group.size if op == "all_to_all" else size, g)
        if found is None:
            return None
        inside = found
    if nodes == 1:
        return inside
    if op == "all_to_all":
        outside = size / group.size * (group.size - g) / reached_Bps(net)
    else:
        outside = (2.0 if op == "all_reduce" else 1.0) * size / g * (nodes - 1) / nodes / reached_Bps(net)
    hops = (2.0 if op == "all_reduce" else 1.0) * (nodes - 1) * net.latency_s
    return np.asarray(np.maximum(inside, outside) + hops)


def send_seconds(nbytes: np.ndarray | float, group: Group) -> np.ndarray:
    """Seconds to send `nbytes` between two neighbours of a group (pipeline stages)."""
    if group.nodes > 1:
        return np.asarray(group.network_link.latency_s + np.asarray(nbytes, float) / reached_Bps(group.network_link))
    return np.asarray(group.node_link.latency_s + np.asarray(nbytes, float) / group.node_link.bandwidth_Bps)
