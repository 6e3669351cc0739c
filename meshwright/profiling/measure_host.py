"""What a measurement ran on: the device's datasheet figures, and the machine, versions and settings that its numbers depend on."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from meshwright.profiling.cluster import devices

# torch.cuda.get_device_name -> a built-in device; the first that matches
NAMES = (
    (r"\bB200\b", "B200"), (r"\bH200\b", "H200-SXM"), (r"\bH100 PCIe\b", "H100-PCIe"), (r"\bH100\b.*HBM3", "H100-SXM"),
    (r"\bA100-SXM4?-40GB\b", "A100-SXM-40GB"), (r"\bA100-SXM4?-80GB\b", "A100-SXM-80GB"), (r"\bL40S\b", "L40S"), (r"\bRTX 4090\b", "RTX-4090"),
)  # fmt: skip


def device_name(device: torch.device) -> str:
    """The built-in device that this is, or torch's name for it; "cpu" for the processor."""
    if device.type == "cpu":
        return "cpu"
    return builtin_name(torch.cuda.get_device_name(device))


def builtin_name(name: str) -> str:
    """The built-in device that a driver calls `name`, like "NVIDIA H200"; the name itself where none is known."""
    return next((known for pattern, known in NAMES if re.search(pattern, name)), name)


def device_facts(device: torch.device) -> dict[str, Any]:
    """Datasheet figures of a built-in GPU; of any GPU what torch knows, sms and memory_bytes; of a CPU its cores."""
    if device.type == "cpu":
        return {"cores": os.cpu_count()}
    properties = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {"sms": properties.multi_processor_count, "memory_bytes": properties.total_memory}
    known = devices().get(device_name(device))
    if known is not None:
        facts |= {"peak_flops": dict(known.peak_flops), "memory_bandwidth_Bps": known.memory_bandwidth_Bps, "source": known.source}
    return facts


def host(device: torch.device) -> dict[str, Any]:
    """Names and versions of device, driver and libraries; clocks and power limit where nvidia-smi answers."""
    found: dict[str, Any] = {"torch": str(torch.__version__), "python": platform.python_version(), "host_cores": os.cpu_count()}
    if device.type == "cpu":
        return {"device_name": _processor(), **found, "threads": torch.get_num_threads()}
    found = {"device_name": torch.cuda.get_device_name(device), **found, "cuda": torch.version.cuda}
    if dist.is_available() and dist.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", "")).removeprefix("GPU-")
    which = [f"--id=GPU-{uuid}"] if uuid else []
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", *which]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return found
    cells = [c.strip() for c in answer.stdout.partition("\n")[0].split(",")]
    if answer.returncode == 0 and len(cells) == len(fields):
        found |= {"driver": cells[0], **dict(zip(fields[1:], cells[1:], strict=True))}
    return found


def invocation() -> dict[str, Any]:
    """When and by which command."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": now, "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def free_bytes(device: torch.device) -> float:
    """Memory that is free now: on the device, or in this machine."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return 4e9
