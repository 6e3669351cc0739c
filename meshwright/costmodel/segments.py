"""Collectives on one node: three-segment alpha-beta, as NCCL changes its protocol (LL, LL128, Simple) with the size.

Between two breaks t = alpha + beta bytes, fitted on relative errors; the breaks are those that fit best. What is left is
kept at the measured sizes and interpolated in the logarithm of the size, so that a kink inside a segment is not lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np


@dataclass
class Segments:
    """`alpha` [s] and `beta` [s/B] of each segment, `breaks` [B] between them, `knots` (log2 bytes) with their log residual."""

    breaks: list[float]
    alpha: list[float]
    beta: list[float]
    knots: list[float]
    left: list[float]

    def seconds(self, nbytes: np.ndarray) -> np.ndarray:
        size = np.asarray(nbytes, float)
        i = np.searchsorted(np.array(self.breaks), size, side="right")
        line = np.array(self.alpha)[i] + np.array(self.beta)[i] * size
        if not self.knots:
            return np.asarray(line)
        return np.asarray(line * np.exp(np.interp(np.log2(np.maximum(size, 1.0)), self.knots, self.left)))

    @property
    def bandwidth_Bps(self) -> float:
        """Bytes a second of large messages."""
        return 1 / max(self.beta[-1], 1e-30)


def fit_segments(nbytes: np.ndarray, seconds: np.ndarray) -> Segments:
    """Fits up to three segments; two measured sizes a segment at least. [n], [n]"""
    sizes = np.unique(nbytes)
    best: tuple[float, tuple[float, ...], np.ndarray] | None = None
    for count in (2, 1, 0):
        for breaks in combinations(sizes[2:-2], count):
            if any(b < 4 * a for a, b in zip(breaks, breaks[1:])):
                continue
            lines = _lines(nbytes, seconds, breaks)
            if lines is None:
                continue
            error = float(np.abs(_value(nbytes, breaks, lines) / seconds - 1).mean()) * (1 + 0.05 * count)
            if best is None or error < best[0]:
                best = (error, breaks, lines)
    if best is None:  # one size only: all latency
        return Segments([], [float(np.median(seconds))], [0.0], [], [])
    _, breaks, lines = best
    left = np.log(seconds / _value(nbytes, breaks, lines))
    knots = [float(np.median(left[nbytes == s])) for s in sizes]
    return Segments(
        [float(b) for b in breaks], [float(a) for a in lines[:, 0]], [float(b) for b in lines[:, 1]], [float(x) for x in np.log2(sizes)], knots
    )


def _lines(nbytes: np.ndarray, seconds: np.ndarray, breaks: tuple[float, ...]) -> np.ndarray | None:
    """alpha and beta of each segment by least squares on relative errors, from samples up to a factor of two outside of it."""
    out = []
    for low, high in zip((0.0, *breaks), (*breaks, np.inf)):
        mask = (nbytes >= low / 2) & (nbytes <= high * 2)
        if len(np.unique(nbytes[mask])) < 2:
            return None
        a = np.stack([np.ones(mask.sum()), nbytes[mask]], axis=1) / seconds[mask, None]
        scale = np.array([1.0, 1 / nbytes[mask].max()])
        fitted = np.linalg.lstsq(a * scale, np.ones(mask.sum()), rcond=None)[0] * scale
        if fitted[1] < 0 or fitted[0] <= 0:
            fitted = np.array([np.median(seconds[mask]), 0.0]) if fitted[1] < 0 else np.array([1e-9, np.median(seconds[mask] / nbytes[mask])])
        out.append(fitted)
    return np.array(out)


def _value(nbytes: np.ndarray, breaks: tuple[float, ...], lines: np.ndarray) -> np.ndarray:
    i = np.searchsorted(np.array(breaks), nbytes, side="right")
    return np.asarray(lines[i, 0] + lines[i, 1] * nbytes)


# Where the shift of one-byte reductions is kept, log2 of bytes; between them it is interpolated.
SHIFT_AT = (13.0, 18.0, 22.0, 28.0)


def byte_shift(groups: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[float]:
    """How much longer a collective of one-byte elements takes than one of as many bytes in wider ones: a reduction adds twice as
    many elements. Log factors at SHIFT_AT, medians over the sizes that were measured in both.

    `groups` hold (bytes, seconds, whether the element has one byte) of each number of ranks.
    """
    at, ratio = [], []
    for size, seconds, single in groups:
        for b in np.intersect1d(size[single], size[~single]):
            at.append(np.log2(b))
            ratio.append(np.log(np.median(seconds[single & (size == b)]) / np.median(seconds[~single & (size == b)])))
    where, values = np.array(at), np.array(ratio)
    edges = np.array([16.0, 20.0, 24.0])
    band = np.searchsorted(edges, where, side="right")
    return [float(np.median(values[band == i])) if (band == i).sum() >= 3 else 0.0 for i in range(len(SHIFT_AT))]


def shifted(nbytes: np.ndarray, shift: list[float]) -> np.ndarray:
    """Factor of a one-byte collective at these sizes."""
    return np.asarray(np.exp(np.interp(np.log2(np.maximum(nbytes, 1.0)), SHIFT_AT, shift)))
