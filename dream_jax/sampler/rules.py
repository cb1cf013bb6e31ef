"""Commit rules decide how many masked positions of a row one step writes; the most confident are written first.

A candidate is a masked position that may be written in this step. The sampler computes a token and a confidence for each.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax import decoding
from dream_jax.bounds import POSITIVE, SHARE, FloatRange, check_numbers


def short_repr(settings: Any, *later: str) -> str:
    """Returns the repr of a dataclass without the fields in `later` that have their defaults.

    Files of answers hold the repr of their settings. Fields that were added later must not change it while they are
    switched off, so that the command that wrote such a file can resume it.
    """
    default = {field.name: field.default for field in dataclasses.fields(settings)}
    shown = [name for name in default if name not in later or getattr(settings, name) != default[name]]
    return f"{type(settings).__name__}({', '.join(f'{name}={getattr(settings, name)!r}' for name in shown)})"


@dataclasses.dataclass(frozen=True)
class CommitRule(abc.ABC):
    """Decides how many candidates of a row are written, given their confidences from high to low.

    The first field of a subclass, if it has any, is its parameter. The parameter is passed to the compiled loop as an
    array, so that one program serves all its values. Every rule except `Count` writes at least one position, so that the
    loop ends.

    Attributes:
      algs: the values of `SamplerConfig.alg` whose confidences this rule can use.
    """

    algs: ClassVar[tuple[decoding.Alg, ...]] = ("maskgit_plus", "topk_margin")

    @property
    def value(self) -> float | None:
        """The parameter of the rule; None if the rule has no parameter."""
        return next(iter(dataclasses.astuple(self)), None)

    @property
    def fall_share(self) -> float | None:
        """The share by which the parameter falls until a block is full, see `fallen`; None if it does not fall."""
        return None

    @staticmethod
    @abc.abstractmethod
    def accepts(value: jax.Array, sorted_BM: Float[jax.Array, "B M"]) -> Bool[jax.Array, "B M"]:
        """Marks the confidences that are high enough for their rank; `count` stops at the first that is not marked.

        Args:
          value: the parameter of the rule, float32: a scalar, or [B, 1].
          sorted_BM: confidences, highest first; entries after those of the candidates are undefined.
        """

    @classmethod
    def count(
        cls,
        value: jax.Array | None,
        sorted_BM: Float[jax.Array, "B M"],
        candidates_B: Int[jax.Array, "B"],
        scheduled_B: Int[jax.Array, "B"],
    ) -> Int[jax.Array, "B"]:
        """Returns how many positions each row writes: at least one, but not more than the number of candidates.

        Args:
          value: the parameter of the rule; None for `Count`.
          sorted_BM: as for `accepts`.
          candidates_B: number of candidates of each row.
          scheduled_B: number of positions that the published schedule would write.
        """
        assert value is not None
        accepted_BM = cls.accepts(value, sorted_BM)
        run_B = jnp.sum(jnp.cumprod(accepted_BM.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
        return jnp.minimum(jnp.maximum(run_B, 1), candidates_B)


@dataclasses.dataclass(frozen=True)
class Count(CommitRule):
    """Writes as many positions as the published schedule, whose steps are evenly spaced over the noise levels."""

    algs: ClassVar[tuple[decoding.Alg, ...]] = ("origin", "maskgit_plus", "topk_margin", "entropy")

    @staticmethod
    def accepts(value: jax.Array, sorted_BM: Float[jax.Array, "B M"]) -> Bool[jax.Array, "B M"]:
        """Accepts every confidence, because this rule depends on the schedule only."""
        return jnp.ones(sorted_BM.shape, bool)

    @classmethod
    def count(
        cls,
        value: jax.Array | None,
        sorted_BM: Float[jax.Array, "B M"],
        candidates_B: Int[jax.Array, "B"],
        scheduled_B: Int[jax.Array, "B"],
    ) -> Int[jax.Array, "B"]:
        """Returns `scheduled_B`, the number of positions that the schedule writes in this step."""
        return scheduled_B


@dataclasses.dataclass(frozen=True)
class Threshold(CommitRule):
    """Writes every candidate whose confidence is at least `tau`, and always the most confident one.

    This is Fast-dLLM's confidence-aware decoding.

    Attributes:
      tau: the threshold.
      fall: how much lower the threshold becomes while a block is filled: where a share m of the block are mask tokens, it
        is tau (1 - fall (1 - m)), as in Streaming-dLLM. 0 keeps it at tau. Without blocks, the tokens from the first
        mask of the row on are the block.

    Raises:
      ValueError: a value is outside [0, 1].
    """

    tau: float
    fall: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self, tau=SHARE._replace(note="it is compared with probabilities"), fall=SHARE)

    def __repr__(self) -> str:
        return short_repr(self, "fall")

    @property
    def fall_share(self) -> float | None:
        """The value of `fall`; None instead of 0."""
        return self.fall or None

    @staticmethod
    def accepts(value: jax.Array, sorted_BM: Float[jax.Array, "B M"]) -> Bool[jax.Array, "B M"]:
        """Accepts confidences of at least the threshold."""
        return sorted_BM >= value


@dataclasses.dataclass(frozen=True)
class Factor(CommitRule):
    """Writes the k most confident candidates, for the largest k with (i + 1)(1 - c_i) <= factor for all i <= k.

    c_i is the i-th highest confidence, counted from 1. With factor 1 this is the condition under which writing k tokens
    in parallel gives the same tokens as writing them one by one (Fast-dLLM); a larger factor writes more tokens.

    Raises:
      ValueError: factor is not a positive number.
    """

    factor: float

    def __post_init__(self) -> None:
        check_numbers(self, factor=POSITIVE)

    @staticmethod
    def accepts(value: jax.Array, sorted_BM: Float[jax.Array, "B M"]) -> Bool[jax.Array, "B M"]:
        """Accepts c_i >= 1 - factor / (i + 1)."""
        rank_M = jnp.arange(1, sorted_BM.shape[1] + 1, dtype=jnp.float32)
        return sorted_BM >= 1.0 - value / (rank_M + 1.0)


@dataclasses.dataclass(frozen=True)
class EntropyBound(CommitRule):
    """Writes candidates of lowest entropy while the sum of their entropies, except the largest, is at most `gamma`.

    The sum, in nats, bounds the error of sampling these tokens independently (entropy-bounded unmasking).

    Raises:
      ValueError: gamma is negative or not finite.
    """

    gamma: float
    algs: ClassVar[tuple[decoding.Alg, ...]] = ("entropy",)

    def __post_init__(self) -> None:
        check_numbers(self, gamma=FloatRange(0.0, note="it is a number of nats"))

    @staticmethod
    def accepts(value: jax.Array, sorted_BM: Float[jax.Array, "B M"]) -> Bool[jax.Array, "B M"]:
        """Accepts a confidence (a negative entropy) while the sum of the entropies before it is at most the bound."""
        entropy_BM = jnp.maximum(-sorted_BM, 0.0)
        return jnp.cumsum(entropy_BM, axis=1) - entropy_BM <= value


def fallen(
    value: Float[jax.Array, "..."], fall: Float[jax.Array, "..."], open_share_B: Float[jax.Array, "B"]
) -> Float[jax.Array, "B"]:
    """Returns the parameter of a rule for each row: value (1 - fall (1 - m)), where a share m of its block are masks.

    `value` and `fall` are scalars, or one number per row.
    """
    return value * (1.0 - fall * (1.0 - open_share_B))


def choose(
    rule: type[CommitRule],
    value: jax.Array | None,
    confidence_BM: Float[jax.Array, "B M"],
    candidate_BM: Bool[jax.Array, "B M"],
    scheduled_B: Int[jax.Array, "B"],
    *,
    score_BM: Float[jax.Array, "B M"] | None = None,
    ahead_BM: Bool[jax.Array, "B M"] | None = None,
) -> Bool[jax.Array, "B M"]:
    """Returns true at the candidates that a rule writes in this step, and false elsewhere.

    The parameter of the rule (`value`) is a scalar, or one number per row. The confidences decide how many candidates
    are marked. The scores (by default the confidences) decide which: the highest are marked, and of equal scores those
    at earlier positions. Candidates in `ahead_BM` come before all others.
    """
    order_BM = decoding.most_confident_first(confidence_BM, candidate_BM)
    sorted_BM = jnp.take_along_axis(confidence_BM, order_BM, axis=1)
    if value is not None and value.ndim == 1:
        value = value[:, None]
    count_B = rule.count(value, sorted_BM, jnp.sum(candidate_BM, axis=1, dtype=jnp.int32), scheduled_B)
    if score_BM is not None or ahead_BM is not None:
        score_BM = confidence_BM if score_BM is None else score_BM
        score_BM = score_BM if ahead_BM is None else jnp.where(ahead_BM, jnp.inf, score_BM)
        order_BM = decoding.most_confident_first(score_BM, candidate_BM)
    return decoding.commit(order_BM, candidate_BM, count_B)
