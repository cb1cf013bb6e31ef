"""Intervals and tests for scores of the same problems under several seeds, or of two runs.

Scores are float64 [problems, seeds] in 0..1. What varies from problem to problem is what makes a score uncertain; seeds
of one problem are not independent of each other, and are never counted as if they were.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import scipy.stats

Z_95 = float(scipy.stats.norm.ppf(0.975))
"""Half the width of a 95 % interval in standard errors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


def mean_score(scores: np.ndarray) -> Estimate:
    """The mean over problems and seeds with Wilson's interval.

    With one seed and right-or-wrong scores this is Wilson's interval as it stands. With more, the number of trials is the
    one that would vary as much as the means of the problems do: between problems, when seeds say nothing new, and
    problems times seeds. That is no whole number, which scipy's interval asks for. It stays honest at 0 and 1, where a
    normal interval has no width.

    Raises: ValueError for no problem, or scores outside 0..1.
    """
    scores = _checked(scores)
    problems, seeds = scores.shape
    by_problem = scores.mean(axis=1)
    p = float(by_problem.mean())
    spread, trials = float(by_problem.var()), float(problems)
    if 0 < p < 1:
        most = float(problems * seeds)
        trials = most if spread == 0 else min(max(problems * p * (1 - p) / spread, problems), most)
    centre = (p + Z_95**2 / (2 * trials)) / (1 + Z_95**2 / trials)
    half = Z_95 / (1 + Z_95**2 / trials) * math.sqrt(p * (1 - p) / trials + Z_95**2 / (4 * trials**2))
    return Estimate(value=p, low=max(0.0, min(p, centre - half)), high=min(1.0, max(p, centre + half)))


def mean_of(values: np.ndarray) -> Estimate:
    """The mean of values [n] of any range, with the normal interval; no width for a single one.

    Raises: ValueError for no value.
    """
    values = np.asarray(values, np.float64)
    if values.size == 0:
        raise ValueError("no values to average")
    mean = float(values.mean())
    half = Z_95 * float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else 0.0
    return Estimate(value=mean, low=mean - half, high=mean + half)


def agreement(scores: np.ndarray) -> float:
    """The chance that two different seeds score a problem alike, over problems and pairs; 1 for a single seed.

    Scores are 0 or 1.
    """
    scores = _checked(scores)
    seeds = scores.shape[1]
    if seeds == 1:
        return 1.0
    right = scores.sum(axis=1)
    pairs = seeds * (seeds - 1) / 2
    alike = (right * (right - 1) + (seeds - right) * (seeds - right - 1)) / 2
    return float(np.mean(alike / pairs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paired:
    """How the second of two runs differs from the first on the same problems.

    Attributes:
      difference: mean score of the second minus that of the first.
      interval: 95 % interval of it.
      p_value: of the two-sided sign-flip test: the chance of a difference at least as large if each problem's difference
        were as likely to have the other sign. With one seed a run this is the exact McNemar test.
      gained, lost: how many problems scored higher, and lower, in the second.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    gained: int
    lost: int


def paired(first: np.ndarray, second: np.ndarray) -> Paired:
    """Compares scores of the same problems, [problems, seeds of the first] and [problems, seeds of the second], 0 or 1.

    The interval is Bonett and Price's: two problems are added, one won and one lost, so that it has a width even when
    nothing changed.

    Raises: ValueError for different problems or none.
    """
    first, second = _checked(first), _checked(second)
    if len(first) != len(second):
        raise ValueError(f"the runs have {len(first)} and {len(second)} problems; pair them first")
    # Whole numbers: score differences in units of 1 / (seeds * seeds).
    unit = first.shape[1] * second.shape[1]
    change = np.rint(second.sum(axis=1) * first.shape[1] - first.sum(axis=1) * second.shape[1]).astype(np.int64)
    padded = np.concatenate([change / unit, [1.0, -1.0]])
    half = Z_95 * float(padded.std()) / math.sqrt(len(padded))
    centre = float(padded.mean())
    return Paired(
        difference=float(change.mean()) / unit,
        interval=(max(-1.0, centre - half), min(1.0, centre + half)),
        p_value=_sign_flip(change),
        gained=int(np.sum(change > 0)),
        lost=int(np.sum(change < 0)),
    )


def _sign_flip(change: np.ndarray) -> float:
    """P(|sum of the changes with random signs| >= |their sum|), exactly.

    Changes of one size add up to size * (2 * k - count) with k binomial; sizes are independent of each other.
    """
    sizes, counts = np.unique(np.abs(change[change != 0]), return_counts=True)
    chance = np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        of_size = np.zeros(2 * size * count + 1)
        of_size[:: 2 * size] = scipy.stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chance = np.convolve(chance, of_size)
    sums = np.abs(np.arange(len(chance)) - len(chance) // 2)
    return float(min(1.0, chance[sums >= abs(int(change.sum()))].sum()))


def _checked(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores have shape {scores.shape}; expected [problems, seeds] with at least one of each")
    if not (np.all(scores >= 0) and np.all(scores <= 1)):
        raise ValueError("scores must lie in 0..1")
    return scores
