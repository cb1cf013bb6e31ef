"""The sampler's settings: frozen dataclasses whose values are checked when they are made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

from dream_jax import decoding, masks, schedule
from dream_jax.sampler.callbacks import LogitsHook, TokenHook
from dream_jax.sampler.rules import CommitRule, Count, Threshold

Preset = Literal["exact", "balanced", "fast"]
FastDLLMVariant = Literal["prefix", "dual"]


@dataclasses.dataclass(frozen=True)
class NoCache:
    """Every pass computes all tokens, which is exact."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowCache:
    """A KV cache: most passes compute only the current block and a few tokens beside it.

    A pass is either full (all tokens of a row) or a window around the current block, whose queries attend to the keys
    and values left by the last full pass and the windows since. Full passes come at block starts, and more often if
    asked for.

    Attributes:
      left: tokens before the block that are computed with it. At least 1, because the first token of the block is
        predicted from the hidden state before it.
      right: tokens after the block that are computed with it; None for all of them.
      refresh_blocks: a full pass comes at the start of every `refresh_blocks`-th block; None for the first block only.
      refresh_passes: a row also has a full pass when this many passes have been made since its last one; None for no
        such passes. 1 makes every pass full, which is exact.

    Raises:
      ValueError: a value out of its range.
    """

    left: int = 1
    right: int | None = 0
    refresh_blocks: int | None = 1
    refresh_passes: int | None = None
    forces_first: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.left < 1:
            raise ValueError(f"{self.left=} must be at least 1: a block's first token is predicted from its left")
        for name, least in (("right", 0), ("refresh_blocks", 1), ("refresh_passes", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastDLLMCache:
    """The KV cache of the published Fast-dLLM, for comparison; see `SamplerConfig.fast_dllm`.

    The full pass at the start of each block writes the block's first token, whatever its confidence, and nothing else.
    The passes after it compute the block ("dual"), or everything from the start of the block ("prefix").

    Raises:
      ValueError: an unknown variant.
    """

    variant: FastDLLMVariant
    left: ClassVar[int] = 0
    refresh_blocks: ClassVar[int | None] = 1
    refresh_passes: ClassVar[int | None] = None
    forces_first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.variant not in get_args(FastDLLMVariant):
            raise ValueError(f"{self.variant=} is not one of {get_args(FastDLLMVariant)}")

    @property
    def right(self) -> int | None:
        """All tokens after the block (None), or no tokens."""
        return None if self.variant == "prefix" else 0


KVCachePolicy = WindowCache | FastDLLMCache
CachePolicy = NoCache | KVCachePolicy

_NO_CACHE, _COUNT = NoCache(), Count()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a canvas is denoised. The defaults are those of the published `diffusion_generate`.

    Attributes:
      max_new_tokens: number of mask tokens appended to the prompt.
      steps: denoising steps. Each writes a share of the tokens that are still masked, the last one all of them. With
        blocks, the steps are divided among them: each block takes steps * block_length / max_new_tokens, rounded up.
      alg: order in which positions are written. "origin": at random; "maskgit_plus": highest probability first;
        "topk_margin": largest gap between the two best tokens first; "entropy": lowest entropy first.
      temperature: of the token distribution; 0 takes the most probable token.
      top_p: nucleus size in (0, 1], None for all tokens.
      top_k: number of tokens to sample from, None for all tokens.
      alg_temp: randomises the order: positions are drawn from softmax(confidence / alg_temp). None or 0 is strict.
      eps: noise level at the end of the schedule, in (0, 1).
      vocab_limit: token ids at or above it are never written. The checkpoint has more logits than the tokenizer has
        tokens: pass the tokenizer's number.
      forbidden_tokens: further token ids that are never written, such as the mask token.
      block_length: a row is written in blocks of this many tokens, from its first mask on, and each block is finished
        before the next begins; None writes the whole row as one block.
      cache: what is reused between forward passes: `NoCache()` or `WindowCache(...)`.
      commit: how many positions a pass writes. `Count()` follows the published schedule. `Threshold`, `Factor` and
        `EntropyBound` decide by the confidences, and `steps` and `eps` then have no effect.
      forced_tokens: pairs (offset, token): the token is written at that offset of the new tokens before the first step.
      end_penalty: subtracted from the logit of the end-of-text token, for answers that end too early (if negative, too
        late).
      guidance: classifier-free guidance: logits become u + (1 + guidance) (c - u), where c are those of the canvas and
        u those of the canvas with everything masked that was given. It doubles the rows of every pass; 0 switches it
        off.
      token_hook, logits_hook: see `callbacks`; None for none.
      mask: the attention mask besides padding, as `masks.parse` makes it; None is the mask that the model was trained
        under. Rows begin at their first valid token, and the prompt is everything that `generate` is given, mask tokens
        included.
      stop_at_end: when no mask is left before a row's first end-of-text token, the masks after it become end-of-text
        too and the row is done.

    Raises:
      ValueError: a value out of its range, or two that do not go together.
    """

    max_new_tokens: int = 512
    steps: int = 512
    alg: decoding.Alg = "origin"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float | None = None
    eps: float = 1e-3
    vocab_limit: int | None = None
    forbidden_tokens: Sequence[int] = ()
    block_length: int | None = None
    cache: CachePolicy = _NO_CACHE
    commit: CommitRule = _COUNT
    mask: masks.Mask | None = None
    stop_at_end: bool = False
    forced_tokens: Sequence[tuple[int, int]] = ()
    end_penalty: float = 0.0
    guidance: float = 0.0
    token_hook: TokenHook | None = None
    logits_hook: LogitsHook | None = None

    def __post_init__(self) -> None:
        # Tuples, so that the config is hashable.
        object.__setattr__(self, "forbidden_tokens", tuple(int(token) for token in self.forbidden_tokens))
        object.__setattr__(self, "forced_tokens", tuple((int(at), int(token)) for at, token in self.forced_tokens))
        for at, token in self.forced_tokens:
            if not 0 <= at < self.max_new_tokens:
                raise ValueError(f"forced token {token} at offset {at} is outside the {self.max_new_tokens=}")
        for name in ("end_penalty", "guidance"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number; 0 switches it off")
        if self.max_new_tokens < 0:
            raise ValueError(f"{self.max_new_tokens=} must not be negative")
        if self.alg not in get_args(decoding.Alg):
            raise ValueError(f"{self.alg=} is not one of {get_args(decoding.Alg)}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"{self.temperature=} must be 0 (most probable token) or a positive number")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"{self.top_p=} is outside (0, 1]; pass 1.0 or None to switch it off")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"{self.top_k=} must be at least 1; pass None to switch it off")
        if self.alg_temp is not None and not 0.0 <= self.alg_temp < float("inf"):
            raise ValueError(f"{self.alg_temp=} must not be negative; pass None to switch it off")
        if self.vocab_limit is not None and self.vocab_limit < 1:
            raise ValueError(f"{self.vocab_limit=} leaves no token to write")
        if self.mask is not None and not masks.is_fixed(self.mask):
            raise ValueError(f"mask {self.mask} holds arrays for particular rows; pass it as `masks.parse` makes it")
        schedule.timesteps(self.steps, self.eps)  # raises for steps and eps
        self._check_blocks()

    def _check_blocks(self) -> None:
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"{self.block_length=} must be at least 1; pass None to write the whole row at once")
        if not isinstance(self.cache, NoCache) and self.block_length is None:
            raise ValueError(f"{self.cache=} needs a block_length: keys and values are cached while a block is written")
        if self.alg not in self.commit.algs:
            raise ValueError(f"{self.commit=} needs alg to be one of {self.commit.algs}, not {self.alg!r}")
        if self.alg == "origin" and (self.block_length is not None or not isinstance(self.commit, Count)):
            raise ValueError(
                'alg="origin" writes each position with the probability that the schedule gives, without blocks or commit '
                'rules; use "entropy", "maskgit_plus" or "topk_margin"'
            )

    @property
    def is_random(self) -> bool:
        """Whether the result depends on a random key."""
        return self.temperature > 0 or bool(self.alg_temp) or (self.alg == "origin" and self.steps > 1)

    @property
    def block_steps(self) -> int:
        """Steps of the schedule in each block."""
        if self.block_length is None or self.max_new_tokens == 0:
            return self.steps
        return max(1, -(-self.steps * min(self.block_length, self.max_new_tokens) // self.max_new_tokens))

    @classmethod
    def preset(cls, name: Preset, *, max_new_tokens: int, **options: Any) -> SamplerConfig:
        """A configuration chosen by its balance of speed and quality.

        Args:
          name: "exact": entropy order, one step per token (or `steps`), no cache. "balanced": blocks of 32, every token
            with a probability of at least 0.998 is written at once, windows that reach 32 tokens to both sides, a full
            pass at each block start and after every fourth pass. "fast": blocks of 32, a probability of at least 0.9,
            windows of the block and one token before it, a full pass at each block start. The last two stop at the end
            of the text.
          max_new_tokens: as in SamplerConfig.
          **options: other fields of SamplerConfig; they override the preset.

        Raises:
          ValueError: an unknown name.
        """
        if name not in get_args(Preset):
            raise ValueError(f"preset {name=} is not one of {get_args(Preset)}")
        if name == "exact":
            chosen: dict[str, Any] = {"alg": "entropy", "steps": max(1, max_new_tokens)}
        else:
            chosen = {"alg": "maskgit_plus", "block_length": 32, "stop_at_end": True}
            if name == "balanced":
                chosen |= {"commit": Threshold(0.998), "cache": WindowCache(left=32, right=32, refresh_passes=4)}
            else:
                chosen |= {"commit": Threshold(0.9), "cache": WindowCache()}
        return cls(max_new_tokens=max_new_tokens, **chosen | options)

    @classmethod
    def fast_dllm(
        cls,
        *,
        cache: FastDLLMVariant,
        block_length: int,
        max_new_tokens: int,
        steps: int,
        alg: decoding.Alg = "entropy",
        commit: Threshold | None = None,
        **options: Any,
    ) -> SamplerConfig:
        """The published Fast-dLLM, with the same tokens and passes. It is for comparisons: `preset` is better and
        faster.

        Its "confidence_threshold" is `alg="maskgit_plus", commit=Threshold(tau)`, with which `steps` has no effect.

        Args:
          cache: "prefix" or "dual".
          block_length: must divide max_new_tokens.
          max_new_tokens: as in SamplerConfig.
          steps: a multiple of the number of blocks, at least two per block (the first writes one token).
          alg: order of the positions.
          commit: None writes what the schedule says.
          **options: other fields of SamplerConfig.

        Raises:
          ValueError: numbers that do not divide.
        """
        if block_length < 1 or max_new_tokens % block_length:
            raise ValueError(f"{max_new_tokens=} is no multiple of {block_length=}")
        blocks = max_new_tokens // block_length
        if steps % max(blocks, 1):
            raise ValueError(f"{steps=} is no multiple of the {blocks} blocks")
        if commit is None and block_length > 1 and steps < 2 * blocks:
            raise ValueError(f"{steps=} for {blocks} blocks would leave masks: a block's first step writes one token")
        return cls(
            max_new_tokens=max_new_tokens,
            steps=steps,
            alg=alg,
            block_length=block_length,
            cache=FastDLLMCache(variant=cache),
            commit=Count() if commit is None else commit,
            **options,
        )
