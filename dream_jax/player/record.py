"""What the player needs to know about an answer: the given texts, and when each token was written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dream_jax.tokenizer import Tokenizer

VERSION = 1
"""The version of the form of a record."""


@dataclasses.dataclass(frozen=True)
class Probable:
    """The probabilities with which the tokens of a row [T] were written.

    Attributes:
      count: number of other tokens to note for each position.
      logprob: floats [T], the logarithm of the probability of each token; NaN for a token that was written without one.
      tokens: integers [T, K], the most probable tokens, the most probable one first.
      logprobs: floats [T, K], the logarithms of their probabilities.
    """

    count: int
    logprob: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray

    def of(self, index: int, token: int, tokenizer: Tokenizer) -> dict[str, Any]:
        """Returns the logprob of the token at an index, and those of the most probable other tokens."""
        others = [
            {"token": int(other), "text": tokenizer.decode([int(other)]), "logprob": _rounded(logprob)}
            for other, logprob in zip(self.tokens[index], self.logprobs[index], strict=True)
            if np.isfinite(logprob) and other != token
        ]
        return {"logprob": _rounded(self.logprob[index]), "runner_ups": others[: self.count]}


def answer_record(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    tokens: np.ndarray,
    commit_step: np.ndarray,
    *,
    model: str,
    prompt_text: str,
    text: str,
    forwards: int,
    settings: Mapping[str, Any],
    confidence: np.ndarray | None = None,
    probable: Probable | None = None,
) -> dict[str, Any]:
    """Returns the record of one row of the sampler's result, which can be written as JSON.

    If the prompt has mask tokens, the canvas of the record is the prompt and the answer. Otherwise it is the answer.

    Args:
      tokenizer: the tokenizer of the model.
      prompt: token ids [P], mask tokens included, without padding.
      tokens: integers [P + N], the prompt and the answer.
      commit_step: integers [P + N], as in `sampler.Sample`.
      model: a name for the model.
      prompt_text: the prompt as a person wrote it.
      text: the text at the end.
      forwards: number of forward passes.
      settings: the settings to list, by name.
      confidence: floats [P + N], the confidence in each written token; NaN for none. None if it was not recorded.
      probable: the most probable tokens of each position; None if they were not recorded.
    """
    infills = tokenizer.mask_id in prompt
    begin = 0 if infills else len(prompt)
    is_gap = np.array([True] * len(tokens))
    is_gap[: len(prompt)] = np.asarray(prompt, np.int64) == tokenizer.mask_id
    forced, written = [], []
    for position, index in enumerate(np.flatnonzero(is_gap).tolist()):
        token = int(tokens[index])
        entry: dict[str, Any] = {"position": position, "token": token, "text": tokenizer.decode([token])}
        if commit_step[index] >= 0:
            entry["step"] = int(commit_step[index])
            if confidence is not None:
                entry["confidence"] = _rounded(confidence[index])
            if probable is not None:
                entry |= probable.of(index, token, tokenizer)
            written.append(entry)
        elif token != tokenizer.mask_id:
            forced.append(entry)
    written.sort(key=lambda entry: (entry["step"], entry["position"]))
    return {
        "version": VERSION,
        "model": model,
        "prompt": "" if infills else prompt_text,
        "parts": _pieces(tokenizer, tokens[begin:], is_gap[begin:]),
        "forced": forced,
        "tokens": written,
        "text": text,
        "forwards": forwards,
        "settings": dict(settings),
    }


def _rounded(number: Any) -> float | None:
    """Returns a number with four digits, which are enough to show it; None if it is not finite."""
    return float(f"{number:.4g}") if np.isfinite(number) else None


def _pieces(tokenizer: Tokenizer, tokens: np.ndarray, is_gap: np.ndarray) -> list[str | dict[str, int]]:
    """Returns what a canvas consists of: given texts, and gaps with their numbers of tokens."""
    borders = (np.flatnonzero(np.diff(is_gap)) + 1).tolist()
    pieces: list[str | dict[str, int]] = []
    for start, end in zip([0, *borders], [*borders, len(tokens)], strict=True):
        if start < end:
            pieces.append({"length": end - start} if is_gap[start] else tokenizer.decode(tokens[start:end].tolist()))
    return pieces
