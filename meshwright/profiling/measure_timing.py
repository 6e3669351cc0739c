"""How one call is timed: CUDA events behind a sleeping stream on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Call = Callable[[], object]
FLUSH_BYTES = 256 << 20  # above the L2 of any device known
SLEEP_CYCLES_PER_S = 2e9  # of a GPU's sleeping kernel; only its order of magnitude matters
LONGEST_SLEEP_S = 2e-3


@dataclass(frozen=True)
class Timing:
    """Median seconds of a call, half of the quartiles' distance over the median, and how many windows were timed."""

    seconds: float
    spread: float
    runs: int


@dataclass(frozen=True)
class Repeats:
    """`runs` windows of `inner` calls each."""

    inner: int
    runs: int


class Clock:
    """Times calls on one device. With `flush`, a GPU's L2 is overwritten before each call, so that inputs come from memory."""

    def __init__(self, device: torch.device, flush: bool = False) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if flush and self.cuda else None

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def once(self, call: Call) -> float:
        """Seconds of one call from an idle device until it is done."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def estimate(self, call: Call, limit_s: float, most: int = 4) -> float:
        """Seconds of a call after warming up: the least of `most`, fewer once a call takes more than a quarter of `limit_s`."""
        seconds = self.once(call)
        for _ in range(most - 1):
            if seconds > limit_s / 4:
                break
            seconds = min(seconds, self.once(call))
        return seconds

    def windows(self, call: Call, repeats: Repeats, hide_launch: bool = True) -> list[float]:
        """Seconds of a call in each window. On a GPU with `hide_launch` the stream sleeps until the calls of a window are enqueued,
        so that what is timed is the device's work and not the host's."""
        if not self.cuda:
            return [self._wall(call, repeats.inner) for _ in range(repeats.runs)]
        start = time.perf_counter()
        call()
        enqueue_s = time.perf_counter() - start
        inner = 1 if self.flush is not None else repeats.inner
        pairs = []
        for _ in range(repeats.runs):
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if hide_launch:
                torch.cuda._sleep(int(SLEEP_CYCLES_PER_S * min(LONGEST_SLEEP_S, 1.5 * inner * enqueue_s)))
            if self.flush is not None:
                self.flush.zero_()
            before.record()
            for _ in range(inner):
                call()
            after.record()
            pairs.append((before, after))
        self.synchronize()
        return [before.elapsed_time(after) * 1e-3 / inner for before, after in pairs]

    def _wall(self, call: Call, inner: int) -> float:
        start = time.perf_counter()
        for _ in range(inner):
            call()
        return (time.perf_counter() - start) / inner


def repeats_for(seconds: float, limit_s: float, window_s: float, most: int) -> Repeats:
    """Windows of about `window_s`, as many as fit into `limit_s`: at least one, at most `most`."""
    seconds = max(seconds, 1e-7)
    inner = max(1, int(min(window_s, limit_s / 3) / seconds))
    return Repeats(inner, int(np.clip(limit_s / (inner * seconds), 1, most)))


def summarise(windows: list[float]) -> Timing:
    """The median and the spread of windows, all in seconds."""
    low, middle, high = np.percentile(windows, [25, 50, 75])
    middle = max(float(middle), 1e-9)
    return Timing(middle, float(high - low) / 2 / middle, len(windows))
