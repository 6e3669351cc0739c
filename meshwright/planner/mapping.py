"""The traffic of a planned layout, for placement.py to lay over a cluster whose links were measured pair by pair."""

from __future__ import annotations

from collections import Counter

from meshwright.planner.placement import GroupTraffic, Placement, Traffic, apply_order, place
from meshwright.planner.search import Candidate, Search

MOST_DEVICES = 1024


def traffic_of(search: Search, c: Candidate) -> Traffic:
    """What a candidate's slowest rank sends in a step. Nothing is taken to hide behind compute, and all-to-all of
    experts is left out unless they take the whole stage."""
    x, row, p = c.layout, c.row, search.priced(c)
    m, slowest = int(row.microbatches[0]), max(range(len(c.cut.costs)), key=lambda r: c.cut.costs[r].c)
    blocks, modes = search.rank_blocks(c, slowest)
    batch = x.micro_batch / x.cp
    times: Counter[tuple[tuple[str, ...], str, float]] = Counter()
    tables, t, k = search.bound.tables, int(p.sharding[0]), int(p.batch[0])
    over = ("dp", "cp")
    for block, mode in zip(blocks.tolist(), modes.tolist()):
        sharded = tables.shardings[t][block]
        for g in sharded.collectives:
            repeated = 1 + (mode == 2 and g.phase == "forward")
            times[("tp",), g.op, g.amount.const + batch * g.amount.per_sample] += m * repeated
        if x.cp > 1 and (kv := float(tables.keys_values[t, block, k])):
            times[("cp",), "all_gather" if x.cp_kind == "ring" else "all_to_all", kv * (x.cp if x.cp_kind == "ring" else 1)] += 3 * m
        if x.ep == x.tp * x.cp * x.dp and (rows := float(tables.rows_out[t, block, k])):
            times[("dp", "cp", "tp"), "all_to_all", rows] += 4 * m
        local = float(p.dense[0, block])
        if local and x.dp * x.cp > 1:
            often = m if x.zero >= 2 else 1
            if x.zero == 0:
                times[over, "all_reduce", 4.0 * local] += 1
            else:
                times[over, "reduce_scatter", 4.0 * local] += often
                times[over, "all_gather", search.bound.compute_bytes * local] += 2 * m if x.zero == 3 else 1
    shape = {"pp": x.pp, "dp": x.dp, "cp": x.cp, "tp": x.tp}
    groups = tuple(
        GroupTraffic(axes=axes, op=op, nbytes=nbytes, times=float(n))  # type: ignore[arg-type]
        for (axes, op, nbytes), n in times.items()
        if any(shape[a] > 1 for a in axes)
    )
    return Traffic(
        shape=(x.pp, x.dp, x.cp, x.tp), collectives=groups, send_bytes=float(p.carry[0]) if x.pp > 1 else 0.0,
        sends=2.0 if x.pp > 1 else 0.0, rounds=float(m - 1) if x.pp > 1 else 0.0, loop=x.vpp > 1 and x.schedule not in ("zbv", "dualpipev"),
    )  # fmt: skip


def map_ranks(search: Search, candidates: tuple[Candidate, ...], seconds: float = 5.0) -> tuple[Search, Candidate, Placement] | None:
    """Of some candidates, the one that is fastest once its ranks are laid over the measured links, with the search that prices it so.

    None where links were not measured, or no order beats the default one.
    """
    cluster = search.space.cluster
    if cluster.bandwidth_Bps is None or not 1 < cluster.size <= MOST_DEVICES or not candidates:
        return None
    best: tuple[Search, Candidate, Placement] | None = None
    least = candidates[0].step_s
    for c in candidates:
        placed = place(cluster, traffic_of(search, c), seconds=seconds / len(candidates), costs=search.space.costs)
        if not placed.rank_map:
            continue
        held = {k: getattr(c.layout, k) for k in ("tp", "sp", "cp", "cp_kind", "pp", "vpp", "dp", "zero", "replicas", "ep", "etp", "micro_batch",
                                                  "schedule", "offload", "state_dtype")}  # fmt: skip
        space = search.space.like(apply_order(cluster, placed.order), search.space.workload, {**search.space.fixed, **held})
        mapped = Search(space, search.limit_bytes)
        found = mapped.evaluate(c.row)
        if found is not None and found.step_s < least:
            best, least = (mapped, found, placed), found.step_s
    return best
