"""Moments at which a stage may peak: parts that are constant over its blocks, and the largest of what each block adds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Parts = dict[str, Any]  # bytes by category, numbers or arrays


@dataclass(frozen=True)
class Moment:
    """A candidate for the peak: constant parts for the stage, and parts of each block over a range of blocks."""

    name: str
    parts: Parts
    scores: Parts = field(default_factory=dict)  # [blocks]
    begin: Any = 0
    end: Any = 0  # no block if end <= begin
    needs: Any = True  # where the moment exists
    idle: bool = False  # no microbatch is in flight

    @property
    def height(self) -> Any:
        """Bytes at the fullest block."""
        total = sum(self.parts.values())
        if self.scores:
            total = total + _range_max(np.asarray(sum(self.scores.values()), float), self.begin, self.end)
        return np.where(self.needs, total, -np.inf)

    def fullest(self) -> tuple[int, Parts]:
        """The block, and bytes by category there, of a moment of one range; behind its last block where it has none."""
        at, parts = int(self.end) - 1, dict(self.parts)
        if self.scores:
            total = np.asarray(sum(self.scores.values()), float)
            at = int(self.begin) + int(np.argmax(total[int(self.begin) : int(self.end)]))
            parts = {k: parts.get(k, 0.0) + (self.scores[k][at] if k in self.scores else 0.0) for k in {*parts, *self.scores}}
        return at, parts


class RangeMax:
    """Maximum of a fixed array over ranges [a, b), for arrays of ranges; minus infinity where a range is empty."""

    def __init__(self, values: np.ndarray) -> None:
        self.rows = [np.append(values, -np.inf)]
        while (1 << len(self.rows)) <= len(values):
            last, half = self.rows[-1], 1 << (len(self.rows) - 1)
            self.rows.append(np.maximum(last, np.append(last[half:], np.full(half, -np.inf))))

    def __call__(self, a: Any, b: Any) -> Any:
        a, b = np.broadcast_arrays(a, b)
        length = np.maximum(b - a, 1)
        k = np.frexp(length)[1] - 1
        table = np.stack(self.rows)
        most = table.shape[1] - 1
        first = table[k, np.clip(a, 0, most)]
        second = table[k, np.clip(b - (1 << k), 0, most)]
        return np.where(b > a, np.maximum(first, second), -np.inf)


def _range_max(values: np.ndarray, a: Any, b: Any) -> Any:
    """Maximum of values over ranges [a, b), by the cheaper of two ways; minus infinity where a range is empty."""
    a, b = np.broadcast_arrays(a, b)
    n = len(values)
    if a.size > 2 and float(np.maximum(b - a, 0).sum()) > n * n.bit_length():
        return RangeMax(values)(a, b)
    pairs = np.stack([np.minimum(a, n).ravel(), np.minimum(b, n).ravel()], axis=1).ravel()
    found = np.maximum.reduceat(np.append(values, -np.inf), pairs)[::2]
    return np.where(b > a, found.reshape(a.shape), -np.inf)
