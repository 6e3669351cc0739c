"""The ranks of a measurement: how they agree on what comes next, their groups, and the calls of collectives and pairs."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from meshwright.profiling.errors import InputError
from meshwright.profiling.measure_ops import DTYPES
from meshwright.profiling.measure_shapes import Key
from meshwright.profiling.measure_timing import Call, Clock, Repeats

ACK_ELEMENTS = 1


@dataclass
class Team:
    """This process among the ranks. `control` is a gloo group on which ranks agree; None where there is one rank."""

    rank: int = 0
    world: int = 1
    hosts: tuple[str, ...] = ("",)
    backend: str = ""
    control: Any = None
    owned: bool = False  # the process group was made here
    groups: dict[tuple[int, int], Any] = field(default_factory=dict)  # (ranks, nodes) -> this rank's group
    _acks: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        return len(set(self.hosts))

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def most(self, values: list[float]) -> list[float]:
        """The largest over ranks, element by element."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def mean(self, values: list[float]) -> list[float]:
        """The mean over ranks, element by element."""
        return [x / self.world for x in self._reduce(values, dist.ReduceOp.SUM)]

    def _reduce(self, values: list[float], op: Any) -> list[float]:
        if self.control is None:
            return values
        box = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(box, op=op, group=self.control)
        return [float(x) for x in box]

    def barrier(self) -> None:
        self.most([0.0])

    def close(self) -> None:
        if self.owned:
            dist.destroy_process_group()


def join(device: torch.device, timeout_s: float) -> Team:
    """The ranks that torchrun started, or this process alone. Ranks wait for one another
    for at most `timeout_s`. InputError if some of torchrun's variables are missing."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_initialized() and world == 1:
        return Team()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    owned = not dist.is_initialized()
    if owned:
        missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
        if missing:
            raise InputError(f"WORLD_SIZE is {world} but {missing[0]} is not set: start the ranks with torchrun")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
    backend = str(dist.get_backend())
    control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    rank, world = dist.get_rank(), dist.get_world_size()
    hosts: list[Any] = [""] * world
    dist.all_gather_object(hosts, socket.gethostname(), group=control)
    return Team(rank, world, tuple(hosts), backend, control, owned)


def placements(hosts: tuple[str, ...]) -> dict[tuple[int, int], list[list[int]]]:
    """How the ranks are cut into groups: for every divisor >= 2 of their number and every number of nodes that such a group can
    span, (ranks, nodes) -> groups. Groups are strided ranks, as meshes make them."""
    world = len(hosts)
    found: dict[tuple[int, int], list[list[int]]] = {}
    for size in (g for g in range(2, world + 1) if world % g == 0):
        for stride in (s for s in range(1, world // size + 1) if (world // size) % s == 0):
            groups = [[start + i * stride + j for i in range(size)] for start in range(0, world, size * stride) for j in range(stride)]
            nodes = max(len({hosts[r] for r in g}) for g in groups)
            found.setdefault((size, nodes), groups)
    return found


def make_groups(team: Team) -> None:
    """A process group for every placement. Collective over all ranks."""
    for place, groups in placements(team.hosts).items():
        for ranks in groups:
            made = dist.new_group(ranks)
            if team.rank in ranks:
                team.groups[place] = made


def collective(key: Key, team: Team, device: torch.device) -> Call:
    """A call of a collective on this rank's group; all groups of the placement call at once, as in a step."""
    group, n, dtype = team.groups[key["ranks"], key["nodes"]], key["ranks"], DTYPES[key["dtype"]]
    count = key["bytes"] // dtype.itemsize
    full = torch.zeros(count, dtype=dtype, device=device)
    if key["op"] == "all_reduce":
        return lambda: dist.all_reduce(full, group=group)
    if key["op"] == "all_to_all":
        received = torch.empty_like(full)
        return lambda: dist.all_to_all_single(received, full, group=group)
    part = torch.zeros(count // n, dtype=dtype, device=device)
    if key["op"] == "all_gather":
        return lambda: dist.all_gather_into_tensor(full, part, group=group)
    return lambda: dist.reduce_scatter_tensor(part, full, group=group)


def round_trip(key: Key, team: Team, device: torch.device, elements: int | None = None) -> Call:
    """Source sends bytes (or `elements` fp32), target answers with 4 bytes; other ranks do nothing."""
    source, target = key["source"], key["target"]
    if team.rank not in (source, target):
        return lambda: None
    payload = torch.zeros(elements or max(1, key["bytes"] // 4), device=device)
    ack = torch.zeros(ACK_ELEMENTS, device=device)

    def send() -> None:
        dist.send(payload, target)
        dist.recv(ack, target)

    def receive() -> None:
        dist.recv(payload, source)
        dist.send(ack, source)

    return send if team.rank == source else receive


def half_ack(key: Key, team: Team, clock: Clock, measure: Callable[[Call, Repeats], list[float]]) -> float:
    """Half a round trip of 4 bytes between two ranks, measured once per ordered pair: what an answer costs."""
    pair = (key["source"], key["target"])
    if pair not in team._acks:
        call = round_trip(key, team, clock.device, ACK_ELEMENTS)
        clock.once(call)
        windows = measure(call, Repeats(5, 5))
        team._acks[pair] = sorted(windows)[len(windows) // 2] / 2
    return team._acks[pair]
