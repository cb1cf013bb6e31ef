"""The settings of training on rewards."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from dream_jax.bounds import (
    MOST_ROWS,
    MOST_STEPS,
    MOST_TOKENS,
    POSITIVE,
    SHARE,
    FloatRange,
    IntegerRange,
    check_numbers,
)
from dream_jax.inference import make_sampler
from dream_jax.posttraining.advantages import Baseline
from dream_jax.posttraining.policies import Policy, PolicyName
from dream_jax.posttraining.rewards import Rewards, make_reward
from dream_jax.sampler import Preset, SamplerConfig
from dream_jax.tokenizer import Tokenizer

Average = Literal["answers", "tokens"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Training on rewards of answers that the model samples during the run (--objective grpo)."""

    reward: tuple[str, ...] = ()
    """what an answer is rewarded for: sudoku, countdown, gsm8k (1 or 0, by the judges of the evaluation), exact (equal to
    the response of the row), length (minus the share of the tokens used), format (see --reward-pattern), or
    MODULE:FUNCTION, a function that gets a dream_jax.posttraining.SampledAnswer and returns a number; several are added"""
    reward_weights: tuple[float, ...] = ()
    """weight of each --reward in the sum; by default 1 each"""
    reward_pattern: str | None = None
    """regular expression for the reward format, which is 1 if the expression matches the whole answer"""
    group_size: int = 8
    """number of answers to each prompt; --batch-size is the number of prompts of a step"""
    advantage: Baseline = "deviation"
    """what the reward of an answer is compared with: the mean of its group, divided by the standard deviation of the group
    (deviation), or not divided (mean), or the mean of the other answers (leave-one-out)"""
    equal_groups: bool = False
    """also count groups whose rewards are all equal; their advantages are 0, so they only make the mean loss smaller and
    are held near the reference by --kl-weight"""
    policy: PolicyName = "trajectory"
    """how the log-probability of an answer is computed: by replaying the steps of the sampler (trajectory), on two
    complementary random masks (coupled), or on one canvas with the whole answer masked (mean-field)"""
    policy_passes: int | None = None
    """under --policy trajectory the largest number of forward passes of an answer, which neighbouring steps share; by
    default every step has one, which is exact"""
    prompt_masking: float = 0.15
    """under --policy mean-field the probability with which a token of the prompt is masked"""
    updates: int = 1
    """number of optimizer steps on the answers of one rollout; from the second on ratios are clipped"""
    clip_low: float = 0.2
    """a ratio of probabilities below 1 - this number has no gradient, if the answer is worse than its group"""
    clip_high: float = 0.2
    """a ratio of probabilities above 1 + this number has no gradient, if the answer is better than its group"""
    kl_weight: float = 0.0
    """weight of the divergence from the weights that the run began with; 0 switches it off"""
    average: Average = "answers"
    """whether every answer counts equally in the loss (answers), or every token (tokens)"""
    rollout_tokens: int = 256
    """number of tokens of a sampled answer"""
    rollout_steps: int | None = None
    """number of denoising steps of an answer with the preset exact; by default one for each token"""
    rollout_preset: Preset = "exact"
    """preset of the sampler: exact, or balanced or fast, which reuse keys and values; the log-probabilities are those of
    the model without a cache in all cases"""
    rollout_alg: Literal["origin", "maskgit_plus", "topk_margin", "entropy"] | None = None
    """order in which positions are written; by default that of the preset"""
    rollout_temperature: float = 1.0
    """temperature of the distribution from which tokens are drawn, which is also the one that is trained"""
    rollout_top_p: float | None = None
    """probability mass of the nucleus to which this distribution is restricted; by default all tokens"""
    rollout_rows: int | None = None
    """number of answers that are sampled together; by default all of a step"""
    rollout_samples: int = 20
    """number of steps between two that write some of their answers to OUT/rollouts.jsonl, for the report"""
    shuffle_rewards: bool = False
    """a control for studies: the rewards of a group are dealt to its answers at random, so that nothing can be learned"""

    def __post_init__(self) -> None:
        several = IntegerRange(1)
        check_numbers(
            self,
            group_size=IntegerRange(2, MOST_ROWS, "an answer is compared with the others of its group"),
            policy_passes=IntegerRange(1, MOST_TOKENS),
            prompt_masking=SHARE,
            updates=IntegerRange(1, MOST_STEPS),
            clip_low=FloatRange(0.0, 1.0, open_low=True),
            clip_high=POSITIVE,
            kl_weight=FloatRange(0.0),
            rollout_tokens=IntegerRange(1, MOST_TOKENS),
            rollout_steps=IntegerRange(1, MOST_TOKENS),
            rollout_temperature=POSITIVE._replace(note="answers must differ, so tokens are drawn at random"),
            rollout_top_p=FloatRange(0.0, 1.0, open_low=True, note="leave it out to switch it off"),
            rollout_rows=IntegerRange(1, MOST_ROWS),
            rollout_samples=several,
        )
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise ValueError(
                f"reward_weights={self.reward_weights} must have a number for each of reward={self.reward}"
            )
        if self.reward_pattern is not None and "format" not in self.reward:
            raise ValueError("--reward-pattern has no effect without --reward format: add it, or leave the pattern out")
        if "format" in self.reward:
            make_reward("format", self.reward_pattern)
        if self.rollout_steps is not None and self.rollout_preset != "exact":
            raise ValueError(
                f"--rollout-steps {self.rollout_steps} has no effect with --rollout-preset {self.rollout_preset}, which "
                "writes by confidence: leave it out"
            )
        for name, choices in (("advantage", Baseline), ("average", Average)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}={getattr(self, name)!r:.40} is not one of {', '.join(get_args(choices))}")
        self.make_policy()

    def make_policy(self) -> Policy:
        """Returns the policy. Raises ValueError if its settings do not fit together."""
        return Policy(name=self.policy, passes=self.policy_passes, prompt_masking=self.prompt_masking)

    def make_rewards(self) -> Rewards:
        """Returns the rewards; modules of the user are imported.

        Raises:
          ValueError: there is no reward, or no reward of a name.
        """
        if not self.reward:
            raise ValueError("--objective grpo needs at least one reward: give --reward sudoku, or another one")
        return Rewards([make_reward(name, self.reward_pattern) for name in self.reward], self.reward_weights or None)

    def make_sampler(self, tokenizer: Tokenizer, trained_mask: str, *, greedy: bool = False) -> SamplerConfig:
        """Returns the settings of the sampler of rollouts, or with `greedy` of answers at temperature 0.

        Raises:
          ValueError: SamplerConfig refuses the values.
        """
        return make_sampler(
            tokenizer,
            self.rollout_tokens,
            self.rollout_preset,
            trained_mask=trained_mask,
            steps=self.rollout_steps,
            alg=self.rollout_alg,
            temperature=0.0 if greedy else self.rollout_temperature,
            top_p=None if greedy else self.rollout_top_p,
        )

    @property
    def most_steps(self) -> int:
        """The largest number of steps that write tokens of an answer."""
        if self.rollout_preset != "exact" or self.rollout_steps is None:
            return self.rollout_tokens
        return min(self.rollout_steps, self.rollout_tokens)
