"""Devices of published runs by the name that a run gives them: the closest known kind, or the row's own peak rates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from meshwright.profiling.errors import InputError

FILE = Path(__file__).with_name("rundevices.yaml")


@dataclass(frozen=True)
class RunDevice:
    """One accelerator of a run. Rates in FLOP/s, dense; links in bytes/s per device and direction. `table` is the device whose
    measured ops stand for it."""

    name: str
    table: str
    peak_flops: float
    memory_Bps: float
    node_link_Bps: float
    network_Bps: float
    memory_GiB: float
    sm: int
    per_node: int
    year: int
    rates: Mapping[str, float] = field(hash=False)
    source: str
    softmax: tuple[float, float] = (1.0, 1.0)  # attention forward and backward over the table's device

    def rate(self, precision: str) -> float:
        """Peak of a precision over the 16-bit peak; 1 where the device has no faster units."""
        kind = "fp4" if "4" in precision else "fp8" if "8" in precision else precision
        return self.rates.get(kind, self.rates.get("fp8", 1.0) if kind == "fp4" else 1.0)


@lru_cache
def known() -> tuple[dict[str, RunDevice], dict[str, str], dict[str, dict[str, float]]]:
    """Devices by name, the pattern that finds each, and the facts of the devices whose ops were measured."""
    data: dict[str, Any] = yaml.safe_load(FILE.read_text())
    devices, patterns = {}, {}
    for name, entry in data["devices"].items():
        fields = dict(entry)
        patterns[name] = fields.pop("match")
        fields["softmax"] = tuple(fields.get("softmax", (1.0, 1.0)))
        devices[name] = RunDevice(name=name, **fields)
    return devices, patterns, data["tables"]


def find(name: str, peak_tflops: float | None = None, memory_GiB: float | None = None) -> RunDevice:
    """The device that `name` means. A name that no pattern finds takes the known device of the nearest 16-bit peak
    (`peak_tflops`, dense), scaled to it. InputError if there is neither. A memory size in the name ("80GB") holds."""
    devices, patterns, _ = known()
    low = name.lower().replace("_", "-")
    found = []
    for kind, pattern in patterns.items():
        match = re.search(pattern, low)
        if match:
            found.append((match.end() - match.start(), kind))
    size = re.search(r"(?<!\d)(\d+) ?gi?b(?![a-z0-9])", low)
    if memory_GiB is None and size:
        memory_GiB = float(size[1])
    if found:
        device = devices[max(found)[1]]
        if peak_tflops and not 0.65 < peak_tflops * 1e12 / device.peak_flops < 1.5:  # another cut of the same part, or two dies as one
            device = replace(device, peak_flops=peak_tflops * 1e12)
    elif peak_tflops:
        nearest = min(devices.values(), key=lambda d: abs(d.peak_flops - peak_tflops * 1e12))
        scale = peak_tflops * 1e12 / nearest.peak_flops
        device = replace(nearest, name=name or nearest.name, peak_flops=peak_tflops * 1e12, memory_Bps=nearest.memory_Bps * min(max(scale, 0.5), 2.0))
    else:
        raise InputError(f"unknown GPU {name!r}: name one like {', '.join(sorted(devices))}, or give its peak_tflops_bf16")
    return replace(device, memory_GiB=memory_GiB) if memory_GiB else device
