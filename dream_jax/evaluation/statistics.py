"""Confidence intervals and tests for the scores of one run with several seeds, or of two runs on the same problems.

Scores are float64 [problems, seeds] in 0..1. Problems are treated as independent samples. The seeds of one problem are
not independent of each other and are never treated as if they were.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import scipy.stats

Z_95 = float(scipy.stats.norm.ppf(0.975))
"""Half of the width of a 95 % interval of a normal distribution, in standard errors: 1.96."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """An estimated number `value` and its 95 % confidence interval from `low` to `high`."""

    value: float
    low: float
    high: float


def mean_score(scores: np.ndarray) -> Estimate:
    """Returns the mean of scores, float [problems, seeds] in 0..1, with Wilson's interval.

    With one seed and scores of 0 or 1 this is exactly Wilson's interval. With more seeds, the number of trials is chosen so
    that a binomial mean has the variance that the means of the problems show. The number lies between the number of
    problems (if all seeds score the same) and problems times seeds. It is not an integer, so scipy's function cannot be
    used. Unlike a normal interval, Wilson's interval has a positive width if the mean is 0 or 1.

    Raises: ValueError if there are no scores, or if a score is outside 0..1.
    """
    scores = _checked(scores)
    problems, seeds = scores.shape
    by_problem = scores.mean(axis=1)
    p = float(by_problem.mean())
    spread, trials = float(by_problem.var()), float(problems)
    if 0 < p < 1:
        max_trials = float(problems * seeds)
        trials = max_trials if spread == 0 else min(max(problems * p * (1 - p) / spread, problems), max_trials)
    centre = (p + Z_95**2 / (2 * trials)) / (1 + Z_95**2 / trials)
    half = Z_95 / (1 + Z_95**2 / trials) * math.sqrt(p * (1 - p) / trials + Z_95**2 / (4 * trials**2))
    return Estimate(value=p, low=max(0.0, min(p, centre - half)), high=min(1.0, max(p, centre + half)))


def mean_of(values: np.ndarray) -> Estimate:
    """Returns the mean of values, float [n], with a normal interval; the interval of a single value has no width.

    Raises: ValueError if there are no values.
    """
    values = np.asarray(values, np.float64)
    if values.size == 0:
        raise ValueError("no values to average")
    mean = float(values.mean())
    half = Z_95 * float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else 0.0
    return Estimate(value=mean, low=mean - half, high=mean + half)


def agreement(scores: np.ndarray) -> float:
    """Returns the share of pairs of different seeds that score a problem equally, over all problems; 1 for one seed.

    Scores are 0 or 1, float [problems, seeds]. Raises ValueError if there are none, or if one is outside 0..1.
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
    """The difference between the scores of two runs on the same problems.

    Attributes:
      difference: mean score of the second run minus mean score of the first, in -1..1.
      interval: 95 % interval of `difference`, (low, high).
      p_value: p-value of the two-sided sign-flip test: the probability of a difference at least as large, if the
        difference of each problem had either sign with equal probability. With one seed in each run this is the exact
        McNemar test.
      gained, lost: number of problems with a higher, and with a lower score in the second run.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    gained: int
    lost: int


def paired(first: np.ndarray, second: np.ndarray) -> Paired:
    """Compares the scores of two runs on the same problems.

    The interval is that of Bonett and Price: two problems are added, one gained and one lost, so that the interval has
    a positive width even if no score changed.

    Args:
      first, second: scores of 0 or 1, float [problems, seeds of the run], with the problems in the same order.

    Raises: ValueError if the numbers of problems differ or are 0, or if a score is outside 0..1.
    """
    first, second = _checked(first), _checked(second)
    if len(first) != len(second):
        raise ValueError(f"the runs have {len(first)} and {len(second)} problems; pass the problems that both have")
    # Differences of scores as integers, in units of 1 / (seeds of the first * seeds of the second).
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
    """Returns the exact probability that |sum of the changes with random signs| >= |sum of the changes|.

    The sum over the changes of one size is size * (2 * k - count) with a binomial k. Sums of different sizes are
    independent, so their distributions are convolved.
    """
    sizes, counts = np.unique(np.abs(change[change != 0]), return_counts=True)
    # All sums are multiples of the common divisor, so the arrays need no entries between the multiples.
    common = np.gcd.reduce(sizes) if len(sizes) else 1
    sizes, observed = sizes // common, abs(int(change.sum())) // common
    chance = np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        of_size = np.zeros(2 * size * count + 1)
        of_size[:: 2 * size] = scipy.stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chance = np.convolve(chance, of_size)
    sums = np.abs(np.arange(len(chance)) - len(chance) // 2)
    return float(min(1.0, chance[sums >= observed].sum()))


def _checked(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores have shape {scores.shape}; expected [problems, seeds] with at least one of each")
    if not (np.all(scores >= 0) and np.all(scores <= 1)):
        raise ValueError(f"scores lie in {scores.min()}..{scores.max()}, but must lie in 0..1")
    return scores
