"""What the player needs to know about an answer: the given texts, and when each token was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dream_jax.tokenizer import Tokenizer

VERSION = 1
"""The version of the form of a record."""


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
            written.append(entry | {"step": int(commit_step[index])})
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


def _pieces(tokenizer: Tokenizer, tokens: np.ndarray, is_gap: np.ndarray) -> list[str | dict[str, int]]:
    """Returns what a canvas consists of: given texts, and gaps with their numbers of tokens."""
    borders = (np.flatnonzero(np.diff(is_gap)) + 1).tolist()
    pieces: list[str | dict[str, int]] = []
    for start, end in zip([0, *borders], [*borders, len(tokens)], strict=True):
        if start < end:
            pieces.append({"length": end - start} if is_gap[start] else tokenizer.decode(tokens[start:end].tolist()))
    return pieces
