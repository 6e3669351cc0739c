"""Cluster: which devices there are, and how fast any group of them talks.

Ranks are numbered node by node. A `Link` is what one device can send, in one direction. The tier of a pair is `node` (both on
one node) or `network`; a measured bandwidth per pair, where it is known, replaces the tier's.
"""

from __future__ import annotations

import os
import re
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from meshwright.profiling.errors import InputError

Positive = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]
Provenance = Literal["measured", "fitted", "datasheet", "assumed"]
DEVICES = Path(__file__).parent / "devices"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Achieved(_Model):
    """The share of a datasheet rate that kernels reach, and what one kernel launch costs."""

    matmul: Annotated[float, Field(gt=0, le=1)] = 0.75
    attention: Annotated[float, Field(gt=0, le=1)] = 0.5
    memory: Annotated[float, Field(gt=0, le=1)] = 0.8
    launch_s: Annotated[float, Field(ge=0)] = 4e-6
    provenance: Provenance = "assumed"
    source: str = ""


class Link(_Model):
    """One tier of the interconnect: bandwidth of one device in one direction, latency of one hop."""

    bandwidth_Bps: Positive
    latency_s: Annotated[float, Field(ge=0)]
    provenance: Provenance = "assumed"
    source: str = ""


class Device(_Model):
    """One accelerator. `peak_flops` are dense rates by precision. `reserved_bytes` is what the driver, the CUDA context and
    communicators take before the first tensor, `allocator_overhead` what the allocator holds beyond live tensors (a share of them, of
    which p95 takes all and the median nothing), where they were measured: without either, costmodel/allocator.py says. `cores` are those
    of a CPU, which all ranks on it share."""

    name: str
    aliases: tuple[str, ...] = ()
    kind: Literal["cuda", "cpu"] = "cuda"
    memory_bytes: Positive
    compute_capability: Annotated[float, Field(gt=0)] | None = None
    reserved_bytes: Annotated[float, Field(ge=0)] | None = None
    allocator_overhead: Annotated[float, Field(ge=0)] | None = None
    memory_bandwidth_Bps: Positive
    peak_flops: dict[Literal["bf16", "fp32"], Positive]
    achieved: Achieved = Achieved()
    devices_per_node: PositiveInt = 8
    cores: PositiveInt | None = None
    node_link: Link
    network_link: Link
    source: str = ""


class Node(_Model):
    """`count` equal nodes of `devices` devices each. `device` is the name of a built-in device or a device of its own."""

    device: str | Device
    devices: PositiveInt
    count: PositiveInt = 1

    @property
    def spec(self) -> Device:
        return self.device if isinstance(self.device, Device) else load_device(self.device)


class Links(_Model):
    """Links by tier, where they differ from the device's own."""

    node: Link | None = None
    network: Link | None = None


class Host(_Model):
    """The memory of a node's host, where it may hold what its devices do not: bytes of a node, and bytes a second between one device
    and it, one way."""

    memory_bytes: Positive
    bandwidth_Bps: Positive
    provenance: Provenance = "assumed"
    source: str = ""


class Group(_Model):
    """What a collective needs to know of its ranks: how many, over how many nodes, and the slowest link of each tier."""

    size: int
    nodes: int
    per_node: int  # ranks on the fullest node
    node_link: Link
    network_link: Link


class Cluster(_Model):
    """Nodes of devices with links. `bandwidth_Bps`, if given, is the measured bandwidth of every ordered pair of devices: row i, column
    j is what i sends to j. The two directions of a pair may differ, and each is used as given. The diagonal is not read."""

    name: str = "cluster"
    nodes: Annotated[tuple[Node, ...], Field(min_length=1)]
    links: Links = Links()
    host: Host | None = None
    bandwidth_Bps: tuple[tuple[float, ...], ...] | None = None

    @field_validator("bandwidth_Bps", mode="before")
    @classmethod
    def _links_are_positive(cls, value: Any) -> Any:
        for i, row in enumerate(value if isinstance(value, list | tuple) else ()):
            for j, b in enumerate(row if isinstance(row, list | tuple) else ()):
                if i != j and isinstance(b, int | float) and not 0 < b < float("inf"):
                    raise ValueError(f"row {i}, column {j} (what device {i} sends to device {j}) must be a positive number of bytes/s, not {b}")
        return value

    @model_validator(mode="after")
    def _matrix_is_square(self) -> Cluster:
        if self.bandwidth_Bps is not None:
            n = self.size
            if len(self.bandwidth_Bps) != n or any(len(row) != n for row in self.bandwidth_Bps):
                raise ValueError(f"bandwidth_Bps must be {n} rows of {n} numbers, one per device")
        return self

    @cached_property
    def size(self) -> int:
        return sum(n.devices * n.count for n in self.nodes)

    @cached_property
    def node_of(self) -> np.ndarray:
        """Node index of every rank. [size]"""
        sizes = [n.devices for n in self.nodes for _ in range(n.count)]
        return np.repeat(np.arange(len(sizes)), sizes)

    @cached_property
    def device(self) -> Device:
        """The device that a uniform plan must assume: the slowest in the cluster, with the least memory of all."""
        devices = [n.spec for n in self.nodes]
        slowest = min(devices, key=lambda d: d.peak_flops.get("bf16", d.peak_flops["fp32"]))
        return slowest.model_copy(update={"memory_bytes": min(d.memory_bytes for d in devices)})

    @property
    def mixed(self) -> bool:
        return len({n.spec.name for n in self.nodes}) > 1

    @property
    def devices_per_node(self) -> int:
        return max(n.devices for n in self.nodes)

    @cached_property
    def node_link(self) -> Link:
        return self.links.node or min((n.spec.node_link for n in self.nodes), key=lambda x: x.bandwidth_Bps)

    @cached_property
    def network_link(self) -> Link:
        return self.links.network or min((n.spec.network_link for n in self.nodes), key=lambda x: x.bandwidth_Bps)

    @property
    def provenance(self) -> tuple[str, ...]:
        """Where the figures come from, as "what: provenance (source)"."""
        d = self.device
        return (
            f"device: datasheet ({d.source})",
            f"achieved rates: {d.achieved.provenance} ({d.achieved.source})",
            f"node link: {self.node_link.provenance} ({self.node_link.source})",
            f"network: {self.network_link.provenance} ({self.network_link.source})",
        )

    def group(self, ranks: np.ndarray | list[int] | range) -> Group:
        """The Group that bounds a collective of these ranks, in ring order; of several groups [groups, ranks] at once, the
        one that spans most nodes over the slowest links."""
        rows = np.atleast_2d(np.asarray(ranks))
        homes = self.node_of[rows]
        spans = 1 + (np.diff(np.sort(homes, axis=1), axis=1) != 0).sum(axis=1)
        worst = homes[int(spans.argmax())]
        _, counts = np.unique(worst, return_counts=True)
        node_link, network_link = self.node_link, self.network_link
        if self.bandwidth_Bps is not None and rows.shape[1] > 1:
            following = np.roll(rows, -1, axis=1)
            pairs = np.asarray(self.bandwidth_Bps)[rows, following]
            inside = homes == np.roll(homes, -1, axis=1)
            node_link = _measured(node_link, pairs[inside])
            network_link = _measured(network_link, pairs[~inside])
        return Group(size=rows.shape[1], nodes=len(counts), per_node=int(counts.max()), node_link=node_link, network_link=network_link)


def _measured(link: Link, bandwidths: np.ndarray) -> Link:
    if not bandwidths.size:
        return link
    return link.model_copy(update={"bandwidth_Bps": float(bandwidths.min()), "provenance": "measured"})


@lru_cache
def devices() -> dict[str, Device]:
    """The built-in devices by name."""
    found = {}
    for path in sorted(DEVICES.glob("*.yaml")):
        device = Device.model_validate(yaml.safe_load(path.read_text()))
        found[device.name] = device
    return found


def load_device(name: str) -> Device:
    """A built-in device by name or alias, in any case. InputError names the known ones."""
    for device in devices().values():
        if name.lower() in (device.name.lower(), *(a.lower() for a in device.aliases)):
            return _local_cpu(device) if device.kind == "cpu" else device
    raise InputError(f"unknown device {name!r}: the built-in devices are {', '.join(devices())}")


def _local_cpu(device: Device) -> Device:
    """The local machine: as much memory and as many cores as it has. Ranks on it share both (see parse_cluster)."""
    device = device.model_copy(update={"cores": os.cpu_count()})
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return device
    return device.model_copy(update={"memory_bytes": float(total)})


_SPEC = re.compile(r"^(?:(?P<nodes>-?\d+)x)?(?:(?P<devices>-?\d+)x)?(?P<device>[A-Za-z][\w.+-]*)$")


def parse_cluster(spec: str) -> Cluster:
    """A Cluster from "8xH100-SXM" (one node), "16x8xH100-SXM" (16 nodes) or a YAML file. InputError says what is wrong."""
    if spec.endswith((".yaml", ".yml")):
        return read_cluster(Path(spec))
    match = _SPEC.match(spec)
    if not match:
        raise InputError(f"cluster {spec!r} is neither like 8xH100-SXM or 16x8xH100-SXM nor a .yaml file")
    if match["nodes"] and not match["devices"]:
        nodes, per_node = 1, int(match["nodes"])
    else:
        nodes, per_node = int(match["nodes"] or 1), int(match["devices"] or 1)
    if nodes < 1 or per_node < 1:
        raise InputError(f"cluster {spec!r}: counts of nodes and devices must be at least 1")
    device = load_device(match["device"])
    if device.kind == "cpu":  # ranks of one machine share its memory and its cores
        ranks = nodes * per_node
        shared = {"memory_bytes": device.memory_bytes / ranks}
        return Cluster(name=spec, nodes=(Node(device=device.model_copy(update=shared), devices=per_node, count=nodes),))
    return Cluster(name=spec, nodes=(Node(device=device.name, devices=per_node, count=nodes),))


def read_cluster(path: Path) -> Cluster:
    """A Cluster from a YAML file. InputError names the key that is wrong."""
    if not path.exists():
        raise InputError(f"cluster file {path} does not exist")
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        where = getattr(e, "problem_mark", None)
        raise InputError(f"{path} is not YAML{f' (line {where.line + 1})' if where else ''}") from None
    except (RecursionError, ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as e:  # what PyYAML lets through
        raise InputError(f"{path} is not YAML that can be read: {type(e).__name__}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} must be a mapping with 'nodes', not {type(data).__name__}")
    data.setdefault("name", path.stem)
    try:
        cluster = Cluster.model_validate(data)
        for node in cluster.nodes:
            _ = node.spec
    except ValidationError as e:
        raise InputError(f"{path}: {first_error(e)}") from None
    return cluster


def first_error(e: ValidationError) -> str:
    """The first mistake of a validation error in words: where, what, and what would be right."""
    error: Any = e.errors()[0]
    # A union reports every branch; the mistake is the deepest one.
    error = max(e.errors(), key=lambda x: (len(x["loc"]), x["type"] == "value_error")) if any("str" in x["loc"] for x in e.errors()) else error
    where = ".".join(str(part) for part in error["loc"] if part not in ("str", "Device"))
    if error["type"] == "extra_forbidden":
        return f"{where} is not a known key"
    if error["type"] == "missing":
        return f"{where} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}" if where else message
