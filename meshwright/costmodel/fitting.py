"""Fitting the constants of the step model to published runs, and judging them on sources that they were not fitted on.

A fit minimises the logarithm of predicted over published step time: robust (soft l1 at 15 %), every source with the same total
weight, a weak prior at the physical start of each constant, bounded.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.costmodel.training import CONSTANTS, START, Batch, step

Array = np.ndarray
SCALE = 0.15  # relative error beyond which a row counts linearly


def fit(batch: Batch, seconds: Array, groups: Array, keep: Array, off: Sequence[str] = (), evaluations: int = 40) -> Array:
    """The constants that fit the kept rows. `groups` are the sources that weigh the same."""
    from scipy.optimize import least_squares

    rows = np.flatnonzero(keep)
    sizes = Counter(groups[rows])
    weight = np.array([sizes[g] for g in groups[rows]], float) ** -0.5
    weight /= np.sqrt((weight**2).mean())
    low, high, sigma = (np.log([getattr(c, x) for c in CONSTANTS.values()]) for x in ("low", "high", "sigma"))
    sigma = np.exp(sigma)
    log = np.log(seconds[rows])

    def residuals(x: Array) -> Array:
        r = np.log(step(batch, np.exp(x), off=off)[rows]) - log
        robust = np.sign(r) * np.sqrt(2 * SCALE**2 * (np.sqrt(1 + (r / SCALE) ** 2) - 1))
        prior = (x - np.log(START)) / sigma * SCALE * np.sqrt(len(rows)) / 12
        return np.concatenate([weight * robust, prior])

    start = np.clip(np.log(START), low + 1e-6, high - 1e-6)
    return np.exp(least_squares(residuals, start, bounds=(low, high), max_nfev=evaluations, diff_step=1e-3).x)


def leave_one_out(
    batch: Batch, seconds: Array, groups: Array, use: Array, off: Sequence[str] = (), evaluations: int = 25
) -> tuple[Array, dict[str, Array]]:
    """Predictions of every source by constants fitted on the others, and those constants by source left out."""
    predicted, constants = np.full(len(seconds), np.nan), {}
    for group in sorted(set(groups[use])):
        theta = fit(batch, seconds, groups, use & (groups != group), off, evaluations)
        constants[group] = theta
        mine = groups == group
        predicted[mine] = step(batch, theta, off=off)[mine]
    return predicted, constants


@dataclass(frozen=True)
class JobScore:
    """How well the layouts of one job were ranked. `regret`: published time of the layout predicted fastest over the best, minus 1."""

    source: str
    job: tuple[str, ...]
    layouts: int
    spearman: float
    regret: float


def job_scores(batch: Batch, predicted: Array, seconds: Array, use: Array) -> list[JobScore]:
    """Scores of the jobs (same source, model, GPUs, sequence, precision and batch) with three layouts or more."""
    jobs: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i in np.flatnonzero(use):
        jobs[batch.runs[i].job].append(int(i))
    return list(_scores(jobs, predicted, seconds))


def _scores(jobs: dict[tuple[str, ...], list[int]], predicted: Array, seconds: Array) -> Iterator[JobScore]:
    for job, rows in jobs.items():
        y, p = seconds[rows], predicted[rows]
        if len(rows) >= 3 and len(set(y)) > 1:
            regret = float(y[p.argmin()] / y.min() - 1)
            yield JobScore(job[0], job, len(rows), spearman(p, y), regret)


def spearman(a: Array, b: Array) -> float:
    """Rank correlation, ties at their mean rank; 0 where one side is constant."""
    ra, rb = _ranks(a), _ranks(b)
    if ra.std() == 0 or rb.std() == 0:
        return 0.0
    return float(np.corrcoef(ra, rb)[0, 1])


def _ranks(x: Array) -> Array:
    values, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
