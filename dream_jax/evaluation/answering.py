"""Prompts in, answers out: batches of prompts through the sampler, each row with a key of its own.

What a row becomes depends on the model, its prompt and (seed, number of the problem), not on the batch it is in. Knows
tokens and text. Knows no task and no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from dream_jax.model import Dream
from dream_jax.sampler import SamplerConfig, bucket_length, generate
from dream_jax.tokenizer import Message, Template, Tokenizer
from dream_jax.trainer.scoring import answer_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered:
    """One answer.

    Attributes:
      text: what comes before the first end-of-text token, special tokens left out.
      tokens_to_end: tokens before the first end-of-text token, or None when there is none.
      tokens: all that were sampled.
      forwards: forward passes of its batch.
    """

    text: str
    tokens_to_end: int | None
    tokens: tuple[int, ...]
    forwards: int


def encode_prompt(prompt: str | Sequence[Message], template: Template, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a prompt; a text under "chat" is one user turn. Special tokens in it are spelled out as text."""
    if not isinstance(prompt, str):
        return tokenizer.chat(prompt)
    return tokenizer.chat([{"role": "user", "content": prompt}]) if template == "chat" else tokenizer.encode(prompt)


def check_length(ids: Sequence[int], max_new_tokens: int, model: Dream, where: str) -> None:
    """Raises ValueError, opening with `where`, for a prompt that is empty or does not fit the model with its answer."""
    total, most = len(ids) + max_new_tokens, model.config.max_position_embeddings
    if not ids or total > most:
        raise ValueError(
            f"{where}: a prompt of {len(ids)} tokens and {max_new_tokens} new ones make {total}; the model takes "
            f"prompts of at least 1 token and {most} in all: fewer --shots or --max-new-tokens may help"
        )


def batches(lengths: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Places of the prompts in batches of at most `size`; prompts of a batch share a bucket of lengths."""
    order = sorted(range(len(lengths)), key=lambda place: (bucket_length(lengths[place]), place))
    found: list[list[int]] = []
    for place in order:
        full = not found or len(found[-1]) == size
        if full or bucket_length(lengths[found[-1][0]]) != bucket_length(lengths[place]):
            found.append([])
        found[-1].append(place)
    return [tuple(part) for part in found]


def answer(
    model: Dream,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    names: Sequence[tuple[int, int]],
    config: SamplerConfig,
    size: int,
) -> list[Answered]:
    """Answers prompts that fit one batch.

    Args:
      model, tokenizer, config: see `sampler.generate`.
      prompts: token ids, none empty.
      names: (seed, number) of each: its key.
      size: rows that are computed, whatever is given; no smaller than the number of prompts.
    """
    width = bucket_length(max(map(len, prompts)))
    rows = np.full((size, width), tokenizer.pad_id, np.int32)
    real = np.zeros(rows.shape, bool)
    real[:, -1] = True  # rows that only fill the batch
    for line, ids in enumerate(prompts):
        rows[line, width - len(ids) :] = ids
        real[line, width - len(ids) :] = True
    filled = np.array([*names, *[names[-1]] * (size - len(names))])
    keys = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(filled[:, 0], filled[:, 1])
    out = generate(model, rows, config, keys, prompt_mask=real)
    forwards = int(out.forwards)
    written = np.asarray(out.tokens)[: len(prompts), width:]
    return [
        Answered(
            text=answer_text(tokenizer, tokens),
            tokens_to_end=int(np.argmax(ends)) if (ends := tokens == tokenizer.eos_id).any() else None,
            tokens=tuple(tokens.tolist()),
            forwards=forwards,
        )
        for tokens in written
    ]
