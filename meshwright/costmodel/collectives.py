"""Seconds of collectives: latency and bandwidth by tier, hierarchical across nodes.

A group of n ranks on N nodes, g to a node, moves a tensor of B bytes (its full size):

    all_gather      every rank's part goes round the nodes over its own network link, then round the node
                    (N - 1) a_net + B/g (N - 1)/N / bw_net  +  (g - 1) a_node + B (g - 1)/g / bw_node
    reduce_scatter  the same in reverse;  all_reduce  both;  all_to_all  B/n (n - g) / bw_net + B/n (g - 1) / bw_node

which is the ring of Thakur et al. 2005 on each tier.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from meshwright.profiling.cluster import Group

Op = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]


def seconds(op: Op, nbytes: np.ndarray | float, group: Group) -> np.ndarray:
    """Seconds of one collective of `nbytes` (the full tensor) over `group`; zero for a group of one."""
    size = np.asarray(nbytes, float)
    if group.size == 1:
        return np.zeros_like(size)
    if op == "all_reduce":
        return seconds("reduce_scatter", size, group) + seconds("all_gather", size, group)
    g, nodes = group.per_node, group.nodes
    node, net = group.node_link, group.network_link
    if op == "all_to_all":
        part = size / group.size
        inside = (g - 1) * (node.latency_s + part / node.bandwidth_Bps)
        outside = (nodes > 1) * ((nodes - 1) * net.latency_s + part * (group.size - g) / net.bandwidth_Bps)
        return np.asarray(inside + outside)
    inside = (g - 1) * node.latency_s + size * (g - 1) / g / node.bandwidth_Bps
    outside = (nodes - 1) * net.latency_s + size / g * (nodes - 1) / nodes / net.bandwidth_Bps
    return np.asarray(inside + outside)


def send_seconds(nbytes: np.ndarray | float, group: Group) -> np.ndarray:
    """Seconds to send `nbytes` between two neighbours of a group (pipeline stages)."""
    link = group.network_link if group.nodes > 1 else group.node_link
    return np.asarray(link.latency_s + np.asarray(nbytes, float) / link.bandwidth_Bps)
