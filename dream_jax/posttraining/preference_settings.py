"""The settings of training on preferences."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from dream_jax.bounds import MOST_TOKENS, POSITIVE, FloatRange, IntegerRange, check_numbers

SharedDraws = Literal["all", "models", "none"]
"""Between which likelihood bounds of a pair the noise is the same.

models: for both models, but not for both answers, as in VRPO (LLaDA 1.5). all: for both models, and the same random numbers
for both answers too. none: each bound has noise of its own.
"""

Reference = Literal["auto", "adapter", "stored"]
"""Where the bounds of the reference come from.

adapter: the step computes them with the adapter switched off. stored: they are computed once, before the first step, with
the weights that the run begins with, and are kept in a file. auto: adapter if a new adapter is trained, otherwise stored.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """Training on pairs of a chosen and a rejected answer (--objective vrpo or simpo)."""

    beta: float | None = None
    """factor on the difference of the two answers in the loss; by default 0.2 for vrpo and 2 for simpo"""
    pair_draws: int = 4
    """number of noise levels, each with one mask, with which the likelihood bound of an answer is estimated"""
    shared_draws: SharedDraws = "all"
    """between what the noise is the same: both models and both answers of a pair (all), both models only (models, as in
    LLaDA 1.5), or nothing (none). The noise that both models share makes the difference of a pair vary much less"""
    reference: Reference = "auto"
    """under vrpo where the reference comes from: the model with its adapter switched off (adapter), or the weights before
    the first step, whose bounds are computed once and written to OUT/reference.npz (stored); auto: adapter if a new adapter
    is trained, otherwise stored. With stored, a pair has the same noise in every epoch"""
    target_margin: float | None = None
    """under simpo the number that is subtracted from the difference times beta; by default 1"""
    sft_weight: float = 0.0
    """weight of a further term of the loss: the negative likelihood bound of the chosen answer, in nats per token"""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            beta=POSITIVE,
            pair_draws=IntegerRange(1, MOST_TOKENS),
            target_margin=FloatRange(0.0),
            sft_weight=FloatRange(0.0),
        )
        for name, choices in (("shared_draws", SharedDraws), ("reference", Reference)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}={getattr(self, name)!r:.40} is not one of {', '.join(get_args(choices))}")
