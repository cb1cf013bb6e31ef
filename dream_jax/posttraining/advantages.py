"""Advantages: how much better an answer is than the other answers to the same prompt."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

Baseline = Literal["deviation", "mean", "leave-one-out"]
"""What a reward is compared with, see `advantages`."""

_EPSILON = 1e-4
# Rewards of a group that differ by no more than rounding count as equal.
_EQUAL = 1e-6


class Advantages(NamedTuple):
    """The advantages of P groups of G answers.

    Attributes:
      advantage_PG: float32, the advantage of each answer.
      signal_P: whether the rewards of the group differ; if not, its advantages are 0.
    """

    advantage_PG: Float[np.ndarray, "P G"]
    signal_P: Bool[np.ndarray, "P"]


def advantages(reward_PG: Float[np.ndarray, "P G"], baseline: Baseline) -> Advantages:
    """Returns the advantage of each answer over its group.

    Args:
      reward_PG: the rewards of the G answers to each of P prompts; G is at least 2.
      baseline: "deviation": the reward minus the mean of the group, divided by the standard deviation of the group (over
        G, not G - 1) plus 1e-4, as GRPO does (Shao et al. 2024, arXiv 2402.03300). "mean": without the division, so that
        prompts which are nearly always or nearly never answered do not count more (Liu et al. 2025, arXiv 2503.20783).
        "leave-one-out": the reward minus the mean of the other G - 1 answers, an unbiased estimate (Ahmadian et al. 2024,
        arXiv 2402.14740); it is the value of "mean" times G / (G - 1).

    Raises:
      ValueError: a group has fewer than two answers.
    """
    size = reward_PG.shape[1]
    if size < 2:
        raise ValueError(f"a group needs at least two answers to compare, not {size}")
    reward_PG = np.asarray(reward_PG, np.float64)
    centred_PG = reward_PG - reward_PG.mean(axis=1, keepdims=True)
    signal_P = np.ptp(reward_PG, axis=1) > _EQUAL
    if baseline == "deviation":
        found_PG = centred_PG / (reward_PG.std(axis=1, keepdims=True) + _EPSILON)
    elif baseline == "leave-one-out":
        found_PG = centred_PG * size / (size - 1)
    else:
        found_PG = centred_PG
    return Advantages(np.where(signal_P[:, None], found_PG, 0.0).astype(np.float32), signal_P)


def shuffled(reward_PG: Float[np.ndarray, "P G"], generator: np.random.Generator) -> Float[np.ndarray, "P G"]:
    """Returns the rewards of each group in random order: a control, from which nothing can be learned."""
    return generator.permuted(reward_PG, axis=1)
