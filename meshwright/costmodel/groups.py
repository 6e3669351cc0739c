"""Which ranks talk: every group of a layout is an arithmetic progression of ranks, so that its size and stride say where it lies."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from meshwright.profiling.cluster import Cluster, Group


class Progressions:
    """Groups {b + i stride : i < size} of a cluster's ranks, for all b such that they tile it; the worst of them bounds a collective."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        sizes = {n.devices for n in cluster.nodes}
        self._per_node = sizes.pop() if len(sizes) == 1 and cluster.bandwidth_Bps is None else None
        self.group = lru_cache(maxsize=None)(self._group)
        self.border = lru_cache(maxsize=None)(self._border)

    def _group(self, size: int, stride: int) -> Group:
        d = self._per_node
        if d is not None:
            found = self._closed(size, stride, d)
            if found is not None:
                nodes, per_node = found
                return Group(
                    size=size, nodes=nodes, per_node=per_node, node_link=self.cluster.node_link, network_link=self.cluster.network_link
                )  # fmt: skip
        whole = self.cluster.size // (size * stride) * (size * stride)
        return self.cluster.group(np.arange(whole).reshape(-1, size, stride).transpose(0, 2, 1).reshape(-1, size))

    @staticmethod
    def _closed(size: int, stride: int, d: int) -> tuple[int, int] | None:
        """Nodes and ranks on a node, where strides and nodes divide each other."""
        if stride % d == 0:
            return size, 1
        if d % stride:
            return None
        per = d // stride
        if per % size == 0:
            return 1, size
        return (size // per, per) if size % per == 0 else None

    def _border(self, stride: int) -> Group:
        """The worst pair of ranks that are `stride` apart: neighbours in a pipeline."""
        ranks = np.arange(self.cluster.size - stride)
        if self._per_node is not None:
            ranks = ranks[:1] if self.cluster.size <= self._per_node else ranks[-1:] if stride >= self._per_node else ranks
        return self.cluster.group(np.stack([ranks, ranks + stride], axis=1))


def by_group(size: np.ndarray, stride: np.ndarray, seconds: Callable[[int, int, np.ndarray], np.ndarray], like: np.ndarray) -> np.ndarray:
    """`seconds(size, stride, rows)` of every row, asked once for each distinct pair; zero for groups of one. -> the shape of `like`"""
    out = np.zeros(like.shape)
    key = size.astype(np.int64) * (1 << 32) + stride
    order = np.argsort(key, kind="stable")
    starts: list[int] = np.flatnonzero(np.concatenate([[True], np.diff(key[order]) != 0])).tolist() if len(order) else []
    for a, b in zip(starts, [*starts[1:], len(order)]):
        rows = order[a:b]
        n = int(size[rows[0]])
        if n > 1:
            out[rows] = seconds(n, int(stride[rows[0]]), rows)
    return out
