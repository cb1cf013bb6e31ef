"""What the engine is asked to do: one `Task` is one answer, that is one row of a batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from dream_jax.sampler import SamplerConfig
from dream_jax.sampler.state import Record

Finish = Literal["stop", "length"]
"""Why an answer ended: "stop" at an end token (`inference.end_ids`) or a stop string, "length" when no
position was left."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gap:
    """Positions next to each other that the model writes.

    Attributes:
      start: the first position, counted from the first token of the prompt.
      length: number of positions, at least 1.
    """

    start: int
    length: int

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.start + self.length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One answer that the engine makes.

    Attributes:
      prompt: token ids of the prompt; mask tokens in it are filled in.
      config: the settings of the sampler, whose `max_new_tokens` mask tokens follow the prompt.
      seed: seed of the random key of the row.
      sample: number of the answer among the answers to this prompt; see `inference.row_keys`.
      pieces: what the text of the answer consists of, in order: given texts, and at least one gap.
      stop: strings at which the answer ends; the answer does not contain them. Only for an answer that is one gap.
      records_logprobs: whether the probabilities of tokens are recorded.
      has_logprobs: whether the updates have the tokens of their text. Only for an answer that is one gap.
      streams: whether every change is reported, or only the whole answer.
      tells_tokens: whether each written token is reported, in the order in which the tokens are written.
    """

    prompt: tuple[int, ...]
    config: SamplerConfig
    seed: int
    sample: int
    pieces: tuple[str | Gap, ...]
    stop: tuple[str, ...] = ()
    records_logprobs: bool = False
    has_logprobs: bool = False
    streams: bool = False
    tells_tokens: bool = False

    @property
    def length(self) -> int:
        """The number of tokens of the row: the prompt and the new tokens."""
        return len(self.prompt) + self.config.max_new_tokens

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """The gaps among the pieces."""
        return tuple(piece for piece in self.pieces if isinstance(piece, Gap))

    @property
    def num_given(self) -> int:
        """The number of tokens that the request gave; forced tokens are not counted."""
        return self.length - sum(gap.length for gap in self.gaps)

    @property
    def record(self) -> Record:
        """What the sampler notes about the tokens that it writes."""
        return "logprobs" if self.records_logprobs else "confidences"


@dataclasses.dataclass(frozen=True)
class TokenNote:
    """A written token.

    Attributes:
      position: its position, counted from the first token of the prompt.
      token: its id.
      text: its text; special tokens by name, and U+FFFD for a part of a character.
      step: id of the step that wrote it.
      confidence: the confidence of the sampler in it; None if it was written without one.
      logprob: logarithm of its probability; None if it was not recorded.
      top: the most probable tokens with their texts and logprobs, the most probable one first; empty as above.
    """

    position: int
    token: int
    text: str
    step: int
    confidence: float | None
    logprob: float | None
    top: Sequence[tuple[int, str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """What has changed in an answer since the last update. If the task does not stream, all is in the last one.

    Attributes:
      passes: number of forward passes that the row has taken part in.
      num_tokens: number of tokens of the answer that can be read: those before its end, or before the first gap in it.
      text: the text that follows the text of the earlier updates; it can change no more.
      tokens: the tokens to which this text belongs, if the task has logprobs.
      written: the tokens that were written since the last update, by step and position, if the task tells tokens.
      finish: why the answer ended; None while it is being written.
      gap_texts: the text of each gap when the answer has ended; empty before.
    """

    passes: int
    num_tokens: int
    text: str = ""
    tokens: tuple[TokenNote, ...] = ()
    written: tuple[TokenNote, ...] = ()
    finish: Finish | None = None
    gap_texts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class RowView:
    """The state of one row after some steps, without padding, as numpy arrays of the length of the row.

    Attributes:
      tokens: token ids, mask tokens included.
      commit_step: id of the step that wrote each position, -1 elsewhere.
      passes: number of forward passes that the row has taken part in.
      undefined: whether a token was written from logits that are no numbers.
      confidence: confidence in each written token.
      done: whether the sampler has finished the row.
      logprob, top_token, top_logprob: as in `propose.TokenLogprobs`; None if they were not recorded.
    """

    tokens: np.ndarray
    commit_step: np.ndarray
    passes: int
    undefined: bool
    confidence: np.ndarray
    done: bool
    logprob: np.ndarray | None = None
    top_token: np.ndarray | None = None
    top_logprob: np.ndarray | None = None

    def lengthened(self, length: int, token: int) -> RowView:
        """Returns the row with `length` tokens: `token`, which no step has written, at the positions that it lacks."""
        missing = length - len(self.tokens)
        if missing <= 0:
            return self

        def wide(x: np.ndarray, value: float) -> np.ndarray:
            return np.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1)), constant_values=value)

        return dataclasses.replace(
            self,
            tokens=wide(self.tokens, token),
            commit_step=wide(self.commit_step, -1),
            confidence=wide(self.confidence, math.nan),
            logprob=None if self.logprob is None else wide(self.logprob, math.nan),
            top_token=None if self.top_token is None else wide(self.top_token, 0),
            top_logprob=None if self.top_logprob is None else wide(self.top_logprob, math.nan),
        )
