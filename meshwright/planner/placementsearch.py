"""Mappings of ranks to devices: those to start from, a local search from them, and all there are, as far as they fit into memory."""

from __future__ import annotations

import time
from itertools import permutations, product
from math import exp, lgamma, prod

import numpy as np

from meshwright.planner.placementbound import _Floor
from meshwright.planner.placementprice import JOINED, Traffic, _Pricer
from meshwright.profiling.cluster import Cluster

ROWS = 100_000  # partial mappings held at once
SEARCHED = 1024  # devices; beyond, only the starts
RUNGS, BATCH = ((32, 50), (6, 300), (2, 1500)), 32  # of the local search: walks and their rounds; moves tried in each round
HEAT = 0.1  # a round may lose so much of what is sent


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
