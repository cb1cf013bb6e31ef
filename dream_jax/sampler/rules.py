"""Commit rules: how many of a row's masked positions one forward pass writes, the surest first.

Knows sorted confidences and what the clock says. Knows nothing of canvases, caches or models.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax import decoding


class CommitRule(abc.ABC):
    """Of a row's candidates, sorted from the surest on, a rule takes the first few.

    Every rule but the clock's takes at least one, so that a loop ends. The rule's one number is handed to `number`
    again, as an array: compiled programs are shared by all its values.
    """

    algs: ClassVar[tuple[decoding.Alg, ...]] = ("origin", "maskgit_plus", "topk_margin", "entropy")

    @property
    @abc.abstractmethod
    def value(self) -> float | None:
        """The rule's number, None when it has none."""

    @staticmethod
    @abc.abstractmethod
    def count(
        value: jax.Array | None,
        sorted_BM: Float[jax.Array, "B M"],
        candidates_B: Int[jax.Array, "B"],
        scheduled_B: Int[jax.Array, "B"],
    ) -> Int[jax.Array, "B"]:
        """How many each row writes.

        Args:
          value: the rule's number.
          sorted_BM: confidences, highest first; those past the row's candidates mean nothing.
          candidates_B: number of candidates.
          scheduled_B: how many the published clock would write.
        """


@dataclasses.dataclass(frozen=True)
class Count(CommitRule):
    """As many as the published clock says: `steps` steps, spaced evenly over the noise levels."""

    @property
    def value(self) -> None:
        """It has none."""
        return None

    @staticmethod
    def count(
        value: jax.Array | None,
        sorted_BM: Float[jax.Array, "B M"],
        candidates_B: Int[jax.Array, "B"],
        scheduled_B: Int[jax.Array, "B"],
    ) -> Int[jax.Array, "B"]:
        """The clock's number."""
        return scheduled_B


@dataclasses.dataclass(frozen=True)
class Threshold(CommitRule):
    """All whose confidence is at least `tau`, and the surest one always (Fast-dLLM's confidence-aware decoding).

    Raises:
      ValueError: tau outside [0, 1].
    """

    tau: float
    algs: ClassVar[tuple[decoding.Alg, ...]] = ("maskgit_plus", "topk_margin")

    def __post_init__(self) -> None:
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"{self.tau=} is outside [0, 1]: it is compared with probabilities")

    @property
    def value(self) -> float:
        """The threshold."""
        return self.tau

    @staticmethod
    def count(
        value: jax.Array | None,
        sorted_BM: Float[jax.Array, "B M"],
        candidates_B: Int[jax.Array, "B"],
        scheduled_B: Int[jax.Array, "B"],
    ) -> Int[jax.Array, "B"]:
        """How many reach the threshold, at least one."""
        assert value is not None
        return _prefix(sorted_BM >= value, candidates_B)


@dataclasses.dataclass(frozen=True)
class Factor(CommitRule):
    """The k surest, for the largest k at which even the last is sure enough for so many at once: (k + 1)(1 - c_k) <= f.

    The condition under which writing k tokens in parallel agrees with writing them one by one, loosened by the factor
    (Fast-dLLM).

    Raises:
      ValueError: factor not positive.
    """

    factor: float
    algs: ClassVar[tuple[decoding.Alg, ...]] = ("maskgit_plus", "topk_margin")

    def __post_init__(self) -> None:
        if not 0.0 < self.factor < float("inf"):
            raise ValueError(f"{self.factor=} must be a positive number")

    @property
    def value(self) -> float:
        """The factor."""
        return self.factor

    @staticmethod
    def count(
        value: jax.Array | None,
        sorted_BM: Float[jax.Array, "B M"],
        candidates_B: Int[jax.Array, "B"],
        scheduled_B: Int[jax.Array, "B"],
    ) -> Int[jax.Array, "B"]:
        """The length of the unbroken run of c_k >= 1 - f / (k + 1), at least one."""
        assert value is not None
        k_M = jnp.arange(1, sorted_BM.shape[1] + 1, dtype=jnp.float32)
        return _prefix(sorted_BM >= 1.0 - value / (k_M + 1.0), candidates_B)


@dataclasses.dataclass(frozen=True)
class EntropyBound(CommitRule):
    """The most certain ones while the sum of their entropies, the largest left out, is at most `gamma` nats.

    That sum bounds what is lost by writing them independently (entropy-bounded unmasking).

    Raises:
      ValueError: gamma negative.
    """

    gamma: float
    algs: ClassVar[tuple[decoding.Alg, ...]] = ("entropy",)

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma < float("inf"):
            raise ValueError(f"{self.gamma=} must not be negative")

    @property
    def value(self) -> float:
        """The bound."""
        return self.gamma

    @staticmethod
    def count(
        value: jax.Array | None,
        sorted_BM: Float[jax.Array, "B M"],
        candidates_B: Int[jax.Array, "B"],
        scheduled_B: Int[jax.Array, "B"],
    ) -> Int[jax.Array, "B"]:
        """The largest prefix within the bound: the first alone always is."""
        assert value is not None
        entropy_BM = jnp.maximum(-sorted_BM, 0.0)  # confidences are negative entropies, lowest entropy first
        return _prefix(jnp.cumsum(entropy_BM, axis=1) - entropy_BM <= value, candidates_B)


def choose(
    rule: type[CommitRule],
    value: jax.Array | None,
    confidence_BM: Float[jax.Array, "B M"],
    candidate_BM: Bool[jax.Array, "B M"],
    scheduled_B: Int[jax.Array, "B"],
    *,
    score_BM: Float[jax.Array, "B M"] | None = None,
) -> Bool[jax.Array, "B M"]:
    """Marks the candidates that a rule writes: those of highest score (by default confidence), of equals the first."""
    order_BM = decoding.most_confident_first(confidence_BM, candidate_BM)
    sorted_BM = jnp.take_along_axis(confidence_BM, order_BM, axis=1)
    count_B = rule.count(value, sorted_BM, jnp.sum(candidate_BM, axis=1, dtype=jnp.int32), scheduled_B)
    if score_BM is not None:
        order_BM = decoding.most_confident_first(score_BM, candidate_BM)
    return decoding.commit(order_BM, candidate_BM, count_B)


def _prefix(accepted_BM: Bool[jax.Array, "B M"], candidates_B: Int[jax.Array, "B"]) -> Int[jax.Array, "B"]:
    # The length of the unbroken run from the surest on, at least one, within the candidates.
    run_B = jnp.sum(jnp.cumprod(accepted_BM.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
    return jnp.minimum(jnp.maximum(run_B, 1), candidates_B)
