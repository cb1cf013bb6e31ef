"""The settings of the sampler: frozen dataclasses that check their values when they are created."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

from dream_jax import decoding, masks
from dream_jax.bounds import MOST_TOKENS, FloatRange, IntegerRange, check, check_numbers
from dream_jax.sampler.callbacks import LogitsHook, TokenHook
from dream_jax.sampler.rules import CommitRule, Count, Threshold, short_repr

Preset = Literal["exact", "balanced", "fast"]
FastDLLMVariant = Literal["prefix", "dual"]


@dataclasses.dataclass(frozen=True)
class NoCache:
    """No KV cache: every forward pass computes all tokens, so the logits are exact."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowCache:
    """Settings of a KV cache: most passes compute only the current block and a few tokens beside it.

    A full pass computes all tokens of a row. A window pass computes the tokens around the current block; its queries
    attend to the cached keys and values, which come from the last full pass and the window passes after it. Full passes
    are made at block starts, and with `refresh_passes` more often. The result is approximate.

    Attributes:
      left: number of tokens before the block that a window pass computes. At least 1, because the first token of the
        block is predicted from the hidden state of the token before it.
      right: number of tokens after the block that a window pass computes, at least 0; None computes all of them.
      refresh_blocks: a full pass is made at the start of every `refresh_blocks`-th block; None makes one at the start
        of the first block only.
      refresh_passes: inside a block, at least every `refresh_passes`-th pass of a row is a full pass; 1 makes every
        pass full, which is exact if `suffix` is None. None adds no such full passes.
      suffix: number of mask tokens after the block that a row sees. All passes see, and full passes compute, only the
        tokens that are given or written, the block, these mask tokens and the last token of the row. None: all tokens.
        If at least as many as there are, the answer is the same. (The window of DPad and Streaming-dLLM.) A mask token
        after the block is seen only if a pass has computed it: if the first pass over a block is no full pass, set
        `renew_left`, or `right` to `suffix`.
      renew_left: number of tokens before the block that the first pass over a block computes, if it is no full pass; at
        least `left`. It also computes `suffix` tokens after the block, or `right` if this is more or `suffix` is None. So
        between full passes the keys and values of the blocks just written are renewed, and those of the prompt and of
        older text are not. None: the first pass over a block is like the others. It needs block starts without a full
        pass: `refresh_blocks` above 1 or None, or `refresh_drift`.
      refresh_drift: at a block start, a full pass is made only if the tokens that were written since the last full pass
        are at least so uncertain together: the sum of 1 - confidence, or of the entropies with the order "entropy". So
        a row whose text is certain is refreshed less often. 0 makes every full pass that `refresh_blocks` asks for.

    Raises:
      ValueError: a value is outside its range, `renew_left` is less than `left`, or `renew_left` or `refresh_drift` would
        have no effect.
    """

    left: int = 1
    right: int | None = 0
    refresh_blocks: int | None = 1
    refresh_passes: int | None = None
    suffix: int | None = None
    renew_left: int | None = None
    refresh_drift: float = 0.0
    forces_first: ClassVar[bool] = False

    def __post_init__(self) -> None:
        several = IntegerRange(1, note="pass None to switch it off")
        check_numbers(
            self,
            left=IntegerRange(1, MOST_TOKENS, "the token before a block predicts its first token"),
            right=IntegerRange(0, MOST_TOKENS, "pass None for all tokens"),
            refresh_blocks=several,
            refresh_passes=several,
            suffix=IntegerRange(0, MOST_TOKENS, "pass None for all tokens"),
            renew_left=IntegerRange(1, MOST_TOKENS, "pass None to switch it off"),
            refresh_drift=FloatRange(0.0, note="0 makes a full pass at every block start"),
        )
        if self.renew_left is not None and self.renew_left < self.left:
            raise ValueError(f"{self.renew_left=} must be at least {self.left=}; pass None to switch it off")
        if self.refresh_passes == 1 and (self.renew_left is not None or self.refresh_drift):
            raise ValueError(
                f"{self.renew_left=} and {self.refresh_drift=} have no effect with {self.refresh_passes=}, which makes "
                "every pass full; pass refresh_passes=2 or more or None, or leave them out"
            )
        if self.refresh_drift and self.refresh_blocks is None:
            raise ValueError(
                f"{self.refresh_drift=} has no effect with {self.refresh_blocks=}, which makes no full passes at block "
                "starts after the first; pass refresh_blocks=1, or refresh_drift=0"
            )
        if self.renew_left is not None and self.refresh_blocks == 1 and not self.refresh_drift:
            raise ValueError(
                f"{self.renew_left=} has no effect with {self.refresh_blocks=}, which makes a full pass at each block "
                "start; pass refresh_blocks=2 or more or None, or a refresh_drift, or renew_left=None"
            )

    def __repr__(self) -> str:
        return short_repr(self, "suffix", "renew_left", "refresh_drift")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastDLLMCache:
    """Settings of the KV cache of the published Fast-dLLM, for comparison; see `SamplerConfig.fast_dllm`.

    The full pass at the start of each block writes only the first token of the block, whatever its confidence.

    Attributes:
      variant: the tokens that the later passes compute: "dual" the block, "prefix" everything from its start on.

    Raises:
      ValueError: the variant is unknown.
    """

    variant: FastDLLMVariant
    left: ClassVar[int] = 0
    refresh_blocks: ClassVar[int | None] = 1
    refresh_passes: ClassVar[int | None] = None
    suffix: ClassVar[int | None] = None
    renew_left: ClassVar[int | None] = None
    refresh_drift: ClassVar[float] = 0.0
    forces_first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.variant not in get_args(FastDLLMVariant):
            raise ValueError(f"{self.variant=} is not one of {get_args(FastDLLMVariant)}")

    @property
    def right(self) -> int | None:
        """The number of tokens after the block that a window pass computes: 0 for "dual", None (all) for "prefix"."""
        return None if self.variant == "prefix" else 0


@dataclasses.dataclass(frozen=True)
class BlockCache:
    """A KV cache for models of block diffusion: the keys and values of finished blocks, which are exact.

    Under the mask `block-diffusion:SIZE` no token sees a later block, so the keys and values of a finished block never
    change. The first pass of a row computes the tokens up to the end of its first block. The first pass of a later block
    computes the block before it, whose tokens are final now, and the block; the other passes compute the block alone. The
    answers are equal to those of `NoCache()`. `block_length` must be the SIZE of the mask.
    """


KVCachePolicy = WindowCache | FastDLLMCache
CachePolicy = NoCache | KVCachePolicy | BlockCache

_NO_CACHE, _COUNT = NoCache(), Count()

_TEMPERATURE = FloatRange(0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """The settings of the sampler. The defaults are those of the published `diffusion_generate`.

    Attributes:
      max_new_tokens: number of mask tokens that are appended to the prompt, at least 0.
      steps: number of denoising steps, at least 1; None gives each row as many steps as it has masks, those in its
        prompt and the new ones. Each step writes a share of the tokens that are still masked, and the last step writes
        the rest. With blocks, each block takes its share of the steps, see `block_steps`.
      alg: order in which positions are written. "origin": at random; "maskgit_plus": highest probability first;
        "topk_margin": largest gap between the two best tokens first; "entropy": lowest entropy first.
      temperature: temperature of the token distribution, at least 0; 0 takes the most probable token.
      top_p: probability mass of the nucleus, in (0, 1]; None or 1 for all tokens.
      top_k: number of most probable tokens to sample from, at least 1; None for all tokens.
      alg_temp: randomises the order: positions are drawn from softmax(confidence / alg_temp). None or 0 writes the most
        confident positions first.
      eps: noise level at the end of the schedule, in (0, 1).
      vocab_limit: token ids at or above it are never written; None allows all. The checkpoint has more logits than the
        tokenizer has tokens: pass `tokenizer.vocab_limit`.
      forbidden_tokens: further token ids that are never written, such as the mask token.
      block_length: each row is written in blocks of this many tokens that start at its first mask, and a block is
        finished before the next one begins; None writes the whole row as one block. Under the mask block-diffusion:SIZE,
        blocks of SIZE tokens are those of the mask: they are counted from the first token of the answer, which is the
        first mask of the row or its first new token.
      first_token_first: for a model of block diffusion, whether the first token of each block is among the tokens that the
        first pass over the block writes, whatever its confidence. Under the right shift it is predicted from what is
        before the block, so nothing is lost by writing it first; and later tokens then see it. It takes one of the
        places that the commit rule gives, so the number of tokens of the pass stays. The first token of a text without
        a prompt is predicted from its own position, and has no such place.
      cache: whether keys and values are reused between forward passes: `NoCache()`, `WindowCache(...)`, or `BlockCache()`
        for a model of block diffusion.
      commit: rule for the number of positions that a pass writes. `Count()` follows the published schedule.
        `Threshold`, `Factor` and `EntropyBound` decide by the confidences; `steps` and `eps` then have no effect.
      forced_tokens: pairs (offset, token). The token is written before the first step at this offset, which is counted
        from 0 at the first new token.
      end_penalty: number that is subtracted from the logit of the end-of-text token. A positive number helps if answers
        end too early, a negative one if they end too late.
      guidance: classifier-free guidance: logits become u + (1 + guidance) (c - u), where c are the logits of the
        canvas, and u are the logits of the same canvas with mask tokens in place of the prompt and the forced tokens.
        It doubles the number of rows of every pass; 0 switches it off.
      token_hook, logits_hook: functions that change the canvas after a step, or the logits before tokens are chosen;
        see `callbacks`.
      mask: attention mask, as `masks.parse` returns it; padding is hidden in addition. None is the mask that the model
        was trained under. The mask counts from the first valid token of a row, and takes all tokens that `generate` is
        given (mask tokens included) as the prompt; block-diffusion:SIZE counts as `block_length` says.
      stop_at_end: whether a row is done when no mask is left before the first end-of-text token that was written and
        has no given token after it. All masks after that token then become end-of-text tokens.

    Raises:
      ValueError: a value is outside its range, or two values exclude each other.
    """

    max_new_tokens: int = 512
    steps: int | None = 512
    alg: decoding.Alg = "origin"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float | None = None
    eps: float = 1e-3
    vocab_limit: int | None = None
    forbidden_tokens: Sequence[int] = ()
    block_length: int | None = None
    first_token_first: bool = False
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
        switch_off = "pass None to switch it off"
        check_numbers(
            self,
            max_new_tokens=IntegerRange(0, MOST_TOKENS),
            steps=IntegerRange(1, MOST_TOKENS, "no model has so many tokens to write"),
            temperature=_TEMPERATURE._replace(note="0 takes the most probable token"),
            top_p=FloatRange(0.0, 1.0, open_low=True, note="pass 1.0 or None to switch it off"),
            top_k=IntegerRange(1, note=switch_off),
            alg_temp=_TEMPERATURE._replace(note=switch_off),
            eps=FloatRange(0.0, 1.0, open_low=True, open_high=True),
            vocab_limit=IntegerRange(1, note="with a smaller limit no token could be written"),
            block_length=IntegerRange(1, MOST_TOKENS, "pass None to write the whole row at once"),
            end_penalty=FloatRange(note="0 switches it off"),
            guidance=FloatRange(note="0 switches it off"),
        )
        # Lists become tuples, because a static argument of jax.jit must be hashable.
        object.__setattr__(self, "forbidden_tokens", tuple(int(token) for token in self.forbidden_tokens))
        object.__setattr__(self, "forced_tokens", tuple((int(at), int(token)) for at, token in self.forced_tokens))
        for at, token in self.forced_tokens:
            if not 0 <= at < self.max_new_tokens:
                raise ValueError(f"forced_tokens: token {token} at offset {at} is outside the {self.max_new_tokens=}")
        if len({at for at, _ in self.forced_tokens}) < len(self.forced_tokens):
            raise ValueError(f"forced_tokens={self.forced_tokens!r:.200} has an offset twice; give one token for each")
        if self.alg not in get_args(decoding.Alg):
            raise ValueError(f"{self.alg=} is not one of {get_args(decoding.Alg)}")
        if self.mask is not None and not masks.is_fixed(self.mask):
            raise ValueError(f"mask {self.mask} holds arrays for particular rows; pass it as `masks.parse` makes it")
        self._check_blocks()

    def _check_blocks(self) -> None:
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
        """Whether the result depends on the random key."""
        return self.temperature > 0 or bool(self.alg_temp) or (self.alg == "origin" and self.steps != 1)

    def block_steps(self, masked: int) -> int:
        """Returns the number of steps that the schedule has for each block of a row with `masked` masks, at least 1.

        Without blocks it is `steps`, or the number of masks if `steps` is None. With blocks it is this number times the
        share of the masks that a block can hold, rounded up. A row without masks is done before its first step.
        """
        if masked == 0:
            return 1
        steps = masked if self.steps is None else self.steps
        if self.block_length is None:
            return steps
        return -(-steps * min(self.block_length, masked) // masked)

    @classmethod
    def preset(
        cls, name: Preset, *, max_new_tokens: int, trained_mask: str = "bidirectional", **options: Any
    ) -> SamplerConfig:
        """Returns a named configuration; the names differ in their balance of speed and quality.

        For a model of block diffusion (`trained_mask` or the option `mask` is `block-diffusion:SIZE`), every preset writes
        blocks of SIZE tokens with `BlockCache()`, and sets `stop_at_end`; its order and its commit rule stay. The order
        "origin", which has no blocks, is refused for such a model.

        Args:
          name: "exact": entropy order, one step per mask (or `steps`), no cache. "balanced": blocks of 32 tokens; each
            pass writes every token with a probability of at least 0.998; windows reach 32 tokens to both sides of the
            block; a full pass is made at each block start, and every fourth pass after it is full too. "fast": blocks
            of 32 tokens, a probability of at least 0.9, windows of the block and one token before it, a full pass at
            each block start. "balanced" and "fast" set `stop_at_end`.
          max_new_tokens: as in SamplerConfig.
          trained_mask: name of the mask under which the model was trained (`Dream.trained_mask`).
          **options: other fields of SamplerConfig; they override the preset.

        Raises:
          ValueError: the name is unknown, or SamplerConfig, `check_cache` or `check_first_token` refuses the values.
        """
        if name not in get_args(Preset):
            raise ValueError(f"preset {name=} is not one of {get_args(Preset)}")
        if name == "exact":
            chosen: dict[str, Any] = {"alg": "entropy", "steps": None}
        else:
            chosen = {"alg": "maskgit_plus", "block_length": 32, "stop_at_end": True}
            if name == "balanced":
                chosen |= {"commit": Threshold(0.998), "cache": WindowCache(left=32, right=32, refresh_passes=4)}
            else:
                chosen |= {"commit": Threshold(0.9), "cache": WindowCache()}
        mask = options.get("mask") or masks.parse(trained_mask)
        if isinstance(mask, masks.BlockDiffusion) and options.get("alg") != "origin":  # `check_cache` refuses "origin"
            chosen |= {"block_length": mask.size, "cache": BlockCache(), "stop_at_end": True}
        config = cls(max_new_tokens=max_new_tokens, **chosen | options)
        check_cache(config.cache, mask, config.block_length)
        check_first_token(config.first_token_first, mask, config.block_length)
        return config

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
        """Returns the configuration of the published Fast-dLLM, which gives the same tokens in the same passes.

        It is for comparisons: `preset` is better and faster. The "confidence_threshold" of Fast-dLLM is
        `alg="maskgit_plus", commit=Threshold(tau)`; `steps` then has no effect.

        Args:
          cache: the variant of `FastDLLMCache`, "prefix" or "dual".
          block_length: number of tokens of a block; it must divide max_new_tokens.
          max_new_tokens: as in SamplerConfig.
          steps: a multiple of the number of blocks, at least two per block (the first of them writes one token).
          alg: order of the positions, as in SamplerConfig.
          commit: a threshold on the confidences; None writes the numbers of the published schedule.
          **options: other fields of SamplerConfig.

        Raises:
          ValueError: block_length does not divide max_new_tokens, the blocks do not divide the steps or have too few,
            or SamplerConfig refuses the values.
        """
        check("block_length", block_length, IntegerRange(1, MOST_TOKENS))
        check("max_new_tokens", max_new_tokens, IntegerRange(0, MOST_TOKENS))
        check("steps", steps, IntegerRange(1, MOST_TOKENS))
        if max_new_tokens % block_length:
            raise ValueError(f"{max_new_tokens=} must be a multiple of {block_length=}")
        blocks = max_new_tokens // block_length
        if steps % max(blocks, 1):
            raise ValueError(f"{steps=} must be a multiple of the number of blocks, {blocks}")
        if commit is None and block_length > 1 and steps < 2 * blocks:
            raise ValueError(
                f"{steps=} for {blocks} blocks would leave masks, because the first step of a block writes one token; "
                f"pass at least {2 * blocks}"
            )
        return cls(
            max_new_tokens=max_new_tokens,
            steps=steps,
            alg=alg,
            block_length=block_length,
            cache=FastDLLMCache(variant=cache),
            commit=Count() if commit is None else commit,
            **options,
        )


def block_grid(mask: masks.Mask, block_length: int | None) -> int | None:
    """Returns the number of tokens of a block if the blocks of the sampler are the blocks of the mask, and otherwise None.

    These blocks are counted from the first token of the answer of each row. Otherwise a block of the sampler begins at
    the first mask after the block before it.
    """
    return block_length if isinstance(mask, masks.BlockDiffusion) and block_length == mask.size else None


def check_cache(cache: CachePolicy, mask: masks.Mask, block_length: int | None) -> None:
    """Raises ValueError if blocks and cache do not fit to the mask of the model.

    `BlockCache()` must be exact, and a model of block diffusion must write blocks: it has learned each block after finished
    ones, never after mask tokens.

    Args:
      cache: the cache.
      mask: the mask of the model, not bound to particular rows.
      block_length: as in SamplerConfig.
    """
    if isinstance(mask, masks.BlockDiffusion) and block_length is None:
        raise ValueError(
            f"the model has the mask block-diffusion:{mask.size}, so it writes one block after the other, but the settings "
            f'have no blocks; pass block_length={mask.size}, cache=BlockCache() and an order other than "origin", or take '
            "SamplerConfig.preset(..., trained_mask=model.trained_mask)"
        )
    if not isinstance(cache, BlockCache):
        return
    if not isinstance(mask, masks.BlockDiffusion):
        raise ValueError(
            f"{cache=} needs a model of block diffusion (mask block-diffusion:SIZE), in which no token sees a later block; "
            f"its keys and values would not be exact under the mask {mask}; pass WindowCache() or NoCache()"
        )
    if block_length != mask.size:
        raise ValueError(
            f"{block_length=} is not the block of the mask block-diffusion:{mask.size}, so {cache=} would not be exact; "
            f"pass block_length={mask.size} (the default of the presets), or cache=NoCache()"
        )


def check_first_token(first_token_first: bool, mask: masks.Mask, block_length: int | None) -> None:
    """Raises ValueError if `first_token_first` is set for blocks that are not those of block diffusion.

    In other blocks the prediction of the first token depends on the rest of its block, or on later blocks.

    Args:
      first_token_first: as in SamplerConfig.
      mask: the mask of the model, not bound to particular rows.
      block_length: as in SamplerConfig.
    """
    if first_token_first and block_grid(mask, block_length) is None:
        raise ValueError(
            f"first_token_first is for models of block diffusion that write the blocks of their mask: it needs the mask "
            f"block-diffusion:SIZE and block_length=SIZE, not {mask} and {block_length=}; leave it out"
        )
