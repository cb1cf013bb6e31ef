"""Policies: which forward passes estimate the log-probability of a sampled answer, and which tokens each of them scores.

A masked diffusion model gives no log-probability of a whole answer in one pass. A policy chooses canvases with mask tokens,
which the model sees, and for each canvas the tokens that are scored there. A canvas with the tokens to score is a view.
Every scored token of an answer is in exactly one view, so that it has one log-probability and one ratio.

Letters of axes here: R answers, X views (of all answers), M scored tokens of a view.

- "trajectory": the canvases of the sampler itself. The log-probability is the sum over its steps of log p(what the step
  wrote | the canvas before the step): the log-probability of all draws of tokens, exactly, if every step has its own view.
  With K views fewer than steps, neighbouring steps share the canvas before the first of them. (CJ-GRPO, arXiv 2509.23924,
  replays all steps; TraceRL, arXiv 2509.06949, joins neighbouring ones.)
- "coupled": two canvases with complementary random masks, at noise levels t and 1 - t, with t in [0.2, 0.8], so that both
  show some of the answer. (From coupled GRPO of DiffuCoder, Gong et al. 2025, arXiv 2506.20639. Its code also scores every
  token on the canvas with the whole answer masked, weights the other two by 1 / t and 1 / (1 - t), and takes the mean.)
- "mean-field": one canvas on which the whole answer is masked, and each token of the prompt with a small probability, as if
  the tokens of the answer were independent. (d1, Zhao et al. 2025, arXiv 2504.12216.)

The choice of positions is not counted. With the orders "entropy" and "topk_margin" the canvas decides which positions a
step writes, and with "origin" chance does, so the product over the steps is the probability of the trajectory under this
choice. With "maskgit_plus" the confidence is that of the drawn token: which draws are written depends on the draws, and the
product leaves this out, also with the commit rules Threshold and Factor.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from dream_jax.bounds import MOST_TOKENS, SHARE, IntegerRange, check_numbers

PolicyName = Literal["trajectory", "coupled", "mean-field"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledRows:
    """Answers as rows of tokens, with what the sampler noted about them.

    Attributes:
      tokens_RT: int32, prompts with padding on the left, and the answers.
      valid_RT: false at padding.
      step_RT: int32, the id of the step that wrote each token; -1 at tokens that were given.
      drawn_RT: true at tokens that were drawn from the distribution of the model. The tokens with which the sampler fills
        up a row after its end have the id of a step, but are not drawn.
      answer_RT: true at tokens of the answer up to its end, the end token included.
    """

    tokens_RT: Int[np.ndarray, "R T"]
    valid_RT: Bool[np.ndarray, "R T"]
    step_RT: Int[np.ndarray, "R T"]
    drawn_RT: Bool[np.ndarray, "R T"]
    answer_RT: Bool[np.ndarray, "R T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views:
    """The forward passes that score some answers.

    Attributes:
      row_X: int32, the answer to which each view belongs, ascending.
      masked_XT: true where the model sees a mask token.
      scored_XT: true at the tokens that are scored in this view; they are masked in it.
    """

    row_X: Int[np.ndarray, "X"]
    masked_XT: Bool[np.ndarray, "X T"]
    scored_XT: Bool[np.ndarray, "X T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """The settings of a policy.

    Attributes:
      name: which canvases are used.
      passes: for "trajectory" the largest number of views of an answer; None gives every step its own.
      prompt_masking: for "mean-field" the probability with which a token of the prompt is masked; d1 has 0.15.

    Raises:
      ValueError: a value is out of range, or has no effect on this policy.
    """

    name: PolicyName = "trajectory"
    passes: int | None = None
    prompt_masking: float = 0.15

    def __post_init__(self) -> None:
        check_numbers(
            self,
            passes=IntegerRange(1, MOST_TOKENS, "pass None to give every step a pass of its own"),
            prompt_masking=SHARE,
        )
        if self.name not in get_args(PolicyName):
            raise ValueError(f"policy={self.name!r:.40} is not one of {', '.join(get_args(PolicyName))}")
        if self.passes is not None and self.name != "trajectory":
            raise ValueError(f"{self.passes=} is for the policy trajectory, not for {self.name}; leave it out")

    def most_views(self, steps: int) -> int:
        """Returns the largest number of views of an answer that was sampled in at most `steps` steps."""
        if self.name == "trajectory":
            return steps if self.passes is None else min(steps, self.passes)
        return 2 if self.name == "coupled" else 1

    def views(self, rows: SampledRows, seed: tuple[int, ...]) -> Views:
        """Returns the views of all answers; `seed` decides the random masks of "coupled" and "mean-field".

        The masks of an answer depend on the seed and on its index. The same views must be used for all updates on these
        answers, so that ratios compare log-probabilities on the same canvases.
        """
        if self.name == "trajectory":
            return _trajectory(rows, self.passes)
        uniform_RT = np.stack([np.random.default_rng([*seed, row]).random(rows.tokens_RT.shape[1] + 1)
                               for row in range(len(rows.tokens_RT))])  # fmt: skip
        if self.name == "coupled":
            return _coupled(rows, 0.2 + 0.6 * uniform_RT[:, 0], uniform_RT[:, 1:])
        return _mean_field(rows, uniform_RT[:, 1:] < self.prompt_masking)


def _trajectory(rows: SampledRows, passes: int | None) -> Views:
    """Returns a view for each group of neighbouring steps of each answer, see the docstring of the module."""
    row_X, masked, scored = [], [], []
    for row, (step_T, drawn_T) in enumerate(zip(rows.step_RT, rows.drawn_RT, strict=True)):
        steps = np.unique(step_T[drawn_T])
        groups = len(steps) if passes is None else min(passes, len(steps))
        for index_S in np.array_split(np.arange(len(steps)), groups) if groups else ():
            first, last = steps[index_S[0]], steps[index_S[-1]]
            row_X.append(row)
            masked.append(step_T >= first)
            scored.append(drawn_T & (step_T >= first) & (step_T <= last))
    return _stacked(row_X, masked, scored, rows.tokens_RT.shape[1])


def _coupled(rows: SampledRows, t_R: Float[np.ndarray, "R"], uniform_RT: Float[np.ndarray, "R T"]) -> Views:
    """Returns two views of each answer with complementary masks, at noise levels t and 1 - t."""
    written_RT, first_RT = rows.step_RT >= 0, uniform_RT < t_R[:, None]
    row_X = np.repeat(np.arange(len(t_R)), 2)
    masked_RZT = np.stack([written_RT & first_RT, written_RT & ~first_RT], axis=1)
    scored_RZT = masked_RZT & rows.answer_RT[:, None]
    kept_X = scored_RZT.any(axis=2).reshape(-1)  # a view without a token to score needs no pass
    flat = lambda x: x.reshape(-1, x.shape[-1])[kept_X]
    return Views(row_X=row_X[kept_X].astype(np.int32), masked_XT=flat(masked_RZT), scored_XT=flat(scored_RZT))


def _mean_field(rows: SampledRows, hidden_RT: Bool[np.ndarray, "R T"]) -> Views:
    """Returns one view of each answer, on which the answer is masked, and the prompt where `hidden_RT` is true."""
    written_RT = rows.step_RT >= 0
    return Views(
        row_X=np.arange(len(written_RT), dtype=np.int32),
        masked_XT=written_RT | (hidden_RT & rows.valid_RT),
        scored_XT=written_RT & rows.answer_RT,
    )


def _stacked(row_X: list[int], masked: list[np.ndarray], scored: list[np.ndarray], length: int) -> Views:
    none = np.zeros((0, length), bool)
    return Views(
        row_X=np.array(row_X, np.int32),
        masked_XT=np.stack(masked) if masked else none,
        scored_XT=np.stack(scored) if scored else none,
    )
