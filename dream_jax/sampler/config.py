"""How a canvas is denoised: one frozen object, checked when it is made.

Knows ranges and which settings go together. Knows nothing of arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from dream_jax import decoding, masks, schedule
from dream_jax.sampler.caches import CachePolicy, FastDLLMCache, NoCache, Variant, WindowCache
from dream_jax.sampler.hooks import LogitsHook, TokenHook
from dream_jax.sampler.rules import CommitRule, Count, Threshold

Preset = Literal["exact", "balanced", "fast"]

_NO_CACHE, _COUNT = NoCache(), Count()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a canvas is denoised. The defaults are those of the published `diffusion_generate`.

    Attributes:
      max_new_tokens: mask tokens appended to the prompt.
      steps: denoising steps; each writes a share of what is still masked, the last one all of it. With blocks, each block
        takes its share of them: steps * block_length / max_new_tokens, rounded up.
      alg: order in which positions are written. "origin": at random; "maskgit_plus": highest probability first;
        "topk_margin": largest gap between the best two first; "entropy": lowest entropy first.
      temperature: of the token distribution; 0 takes the most probable token.
      top_p: nucleus size in (0, 1], None for all.
      top_k: number of tokens kept, None for all.
      alg_temp: softens the order: positions are drawn from softmax(confidence / alg_temp). None or 0 is strict.
      eps: noise level at the end of the clock, in (0, 1).
      vocab_limit: ids at or above it are never written. The checkpoint has more logits than the tokenizer has tokens:
        pass the tokenizer's number.
      forbidden_tokens: further ids that are never written, such as the mask token.
      block_length: a row is written in blocks of so many tokens, from its first mask on, each finished before the next
        begins; None for the whole row at once.
      cache: what is kept between forward passes.
      commit: how many positions a pass writes: `Count()`, what the published clock says; `Threshold`, `Factor` and
        `EntropyBound` go by the confidences instead, and `steps` and `eps` then mean nothing.
      forced_tokens: pairs (offset, token): the token stands at that offset of the new tokens from the start.
      end_penalty: subtracted from the logit of the end-of-text token, against answers that end too early (negative: too
        late).
      guidance: classifier-free guidance: logits become u + (1 + guidance) (c - u), where u are those of the same canvas
        with everything that was given masked. Doubles the rows of every pass; 0 switches it off.
      token_hook, logits_hook: see `hooks`; None for none.
      mask: who may attend to whom, beside padding, as `masks.parse` makes it; None is as the model was trained. Rows begin
        at their first real token, and the prompt is what `generate` is given, mask tokens in it too.
      stop_at_end: once a row's first end-of-text token has no mask before it, the masks after it become end-of-text too
        and the row is done.

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
        # Any sequence will do; as a tuple the config can be a key of compiled programs.
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
            raise ValueError(f"mask {self.mask} is made for certain rows; pass it as `masks.parse` makes it")
        schedule.timesteps(self.steps, self.eps)  # raises for steps and eps
        self._check_blocks()

    def _check_blocks(self) -> None:
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"{self.block_length=} must be at least 1; pass None to write the whole row at once")
        if not isinstance(self.cache, NoCache) and self.block_length is None:
            raise ValueError(f"{self.cache=} needs a block_length: what is kept is kept while a block is written")
        if self.alg not in self.commit.algs:
            raise ValueError(f"{self.commit=} needs alg to be one of {self.commit.algs}, not {self.alg!r}")
        if self.alg == "origin" and (self.block_length is not None or not isinstance(self.commit, Count)):
            raise ValueError(
                'alg="origin" writes each position with the chance that the clock gives: it has neither blocks nor '
                'commit rules; use "entropy", "maskgit_plus" or "topk_margin"'
            )

    @property
    def is_random(self) -> bool:
        """Whether the result depends on a random key."""
        return self.temperature > 0 or bool(self.alg_temp) or (self.alg == "origin" and self.steps > 1)

    @property
    def block_steps(self) -> int:
        """Steps of the clock in each block."""
        if self.block_length is None or self.max_new_tokens == 0:
            return self.steps
        return max(1, -(-self.steps * min(self.block_length, self.max_new_tokens) // self.max_new_tokens))

    @classmethod
    def preset(cls, name: Preset, *, max_new_tokens: int, **options: Any) -> SamplerConfig:
        """A configuration by what one wants of it.

        Args:
          name: "exact": entropy order, a step a token (or `steps`), everything computed in every pass. "balanced": blocks
            of 32, all tokens with a probability of 0.998 at once, windows that reach 32 tokens to both sides, a full pass
            at each block and after every fourth pass. "fast": blocks of 32, all tokens with a probability of 0.9, windows
            of the block alone, a full pass at each block. The last two stop at the end of the text.
          max_new_tokens: as in SamplerConfig, like all `options`, which come before what the preset says.
          **options: other fields of SamplerConfig.

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
        cache: Variant,
        block_length: int,
        max_new_tokens: int,
        steps: int,
        alg: decoding.Alg = "entropy",
        commit: Threshold | None = None,
        **options: Any,
    ) -> SamplerConfig:
        """The published Fast-dLLM, token for token and pass for pass: for comparisons, `preset` is better and faster.

        Its "confidence_threshold" is `alg="maskgit_plus", commit=Threshold(tau)`, for which `steps` means nothing.

        Args:
          cache: "prefix" or "dual".
          block_length: must divide max_new_tokens.
          max_new_tokens: as in SamplerConfig, like all `options`.
          steps: a multiple of the number of blocks, at least two a block (the first writes one token).
          alg: order of the positions.
          commit: None writes what the clock says.
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
