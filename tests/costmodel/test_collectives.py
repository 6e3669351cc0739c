"""Collectives: the ring's formulas on one tier, and what must hold on any."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.costmodel.collectives import Op, seconds, send_seconds
from meshwright.profiling.cluster import Group, Link

OPS: tuple[Op, ...] = get_args(Op)
NODE = Link(bandwidth_Bps=4e11, latency_s=3e-6)
NET = Link(bandwidth_Bps=5e10, latency_s=1e-5, provenance="measured")


def group(nodes: int, per_node: int) -> Group:
    return Group(size=nodes * per_node, nodes=nodes, per_node=per_node, node_link=NODE, network_link=NET)


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("nbytes", [0.0, 1e3, 1e9])
@pytest.mark.parametrize("network", [False, True])
def test_ring_on_one_tier(n: int, nbytes: float, network: bool) -> None:
    """On one node, or one device a node, a collective costs what the ring costs: n - 1 hops of 1/n of the tensor each."""
    flat, link = (group(n, 1), NET) if network else (group(1, n), NODE)
    ring = (n - 1) * link.latency_s + nbytes * (n - 1) / n / link.bandwidth_Bps
    assert seconds("all_gather", nbytes, flat) == pytest.approx(ring)
    assert seconds("reduce_scatter", nbytes, flat) == pytest.approx(ring)
    assert seconds("all_reduce", nbytes, flat) == pytest.approx(2 * ring)
    assert seconds("all_to_all", nbytes, flat) == pytest.approx((n - 1) * (link.latency_s + nbytes / n / link.bandwidth_Bps))


def test_a_network_that_was_not_measured_is_not_taken_at_its_nominal_bandwidth() -> None:
    """Published runs reach a share of it; a measured link is taken as it is."""
    measured = group(4, 1)
    nominal = measured.model_copy(update={"network_link": NET.model_copy(update={"provenance": "datasheet"})})

    ratio = seconds("all_gather", 1e10, nominal) / seconds("all_gather", 1e10, measured)

    assert 1.2 < ratio < 1.8
    assert send_seconds(1e10, nominal) > send_seconds(1e10, measured)


@pytest.mark.parametrize("op", OPS)
def test_alone_nothing_is_sent(op: Op) -> None:
    """A group of one device communicates for free."""
    assert seconds(op, 1e9, group(1, 1)) == 0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(op=st.sampled_from(OPS), nodes=st.integers(1, 16), per_node=st.integers(1, 8), a=st.floats(0, 1e11), more=st.floats(1e3, 1e10))
def test_more_bytes_take_longer(op: Op, nodes: int, per_node: int, a: float, more: float) -> None:
    """A larger tensor never takes less time on any group of two devices or more."""
    g = group(nodes, per_node)
    first, second = (float(x) for x in seconds(op, np.array([a, a + more]), g))
    assert second > first if g.size > 1 else second == first == 0


@pytest.mark.parametrize("op", OPS)
def test_crossing_nodes_is_never_faster(op: Op) -> None:
    """The same number of devices on two nodes, over a slower network, is no faster than on one node."""
    assert seconds(op, 1e9, group(2, 4)) >= seconds(op, 1e9, group(1, 8))


def test_sending_is_latency_and_bandwidth_of_the_tier() -> None:
    """A transfer between pipeline stages costs one latency and its bytes over the link that it crosses."""
    assert send_seconds(1e9, group(1, 2)) == pytest.approx(3e-6 + 1e9 / 4e11)
    assert send_seconds(1e9, group(2, 1)) == pytest.approx(1e-5 + 1e9 / 5e10)
