"""What a run measures, beside what the plan predicted: lines for people, and log.jsonl for programs."""

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class Log:
    """Times steps; rank 0 prints them and appends them to `file`."""

    def __init__(self, file: str | Path, predicted_step_s: float, predicted_peak_bytes: float) -> None:
        self.file, self.step_s, self.peak_bytes = Path(file), predicted_step_s, predicted_peak_bytes
        self.first = not dist.is_initialized() or dist.get_rank() == 0
        if self.first:
            self.file.write_text("")
        self.started = time.perf_counter()

    def start(self) -> None:
        """A step begins now."""
        self.started = time.perf_counter()

    def step(self, step: int, loss: torch.Tensor) -> None:
        """Reports a step that ended now. Waits for the device."""
        value, took = loss.item(), time.perf_counter() - self.started
        if self.first:
            print(f"step {step} loss {value:.6f} seconds {took:.3f} (predicted {self.step_s:.3g})", flush=True)
            self._write({"step": step, "loss": value, "seconds": took})

    def finish(self, device: torch.device) -> None:
        """Reports the peak of every rank's device memory. Collective."""
        peaks: list[Any] = [torch.cuda.max_memory_reserved() if device.type == "cuda" else None]
        if dist.is_initialized():
            mine, peaks = peaks[0], [None] * dist.get_world_size()
            dist.all_gather_object(peaks, mine)
        known = None if None in peaks else peaks
        if self.first and known:
            print(f"peak {max(known) / 2**30:.1f} GiB (predicted {self.peak_bytes / 2**30:.1f})")
        if self.first:
            self._write({"peak_bytes": known, "predicted_step_s": self.step_s, "predicted_peak_bytes": self.peak_bytes})

    def _write(self, line: dict[str, Any]) -> None:
        with self.file.open("a") as f:
            f.write(json.dumps(line) + "\n")
