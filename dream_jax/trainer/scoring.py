"""How good a model is on rows it has not seen: by sampling answers, and by their likelihood.

Knows rows, the sampler and the objective. Knows nothing of the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dream_jax.data import EncodedRow, Row, Source, encode_row, first_rows
from dream_jax.model import Dream
from dream_jax.objective import UniformWeight, masked_diffusion_loss
from dream_jax.sampler import SamplerConfig, bucket_length, generate
from dream_jax.tokenizer import Tokenizer
from dream_jax.trainer.settings import TrainSettings


def evaluate(
    model: Dream, tokenizer: Tokenizer, held_out: Source, settings: TrainSettings, max_length: int, mesh: Mesh
) -> dict[str, Any]:
    """Answers held-out rows by sampling (temperature 0, entropy order, a token a step), and measures their likelihood.

    Returns:
      `exact_accuracy` (share of answers equal to the row's, surrounding space aside), `rows` that were answered,
      `too_long` (documents, and rows that do not fit the model or whose answer is longer than `eval_tokens`), `forwards`
      (the most that a batch took), and `nll`: nats per masked token on a fixed grid of noise levels with fixed masks.
    """
    rows = first_rows(held_out, settings.eval_rows)
    encoding = settings.encode_options()
    encoded = [(row, one) for row in rows if (one := encode_row(row, tokenizer, max_length, encoding)) is not None]
    if not encoded:
        return {"rows": 0, "too_long": len(rows)}
    # As many rows at once as a training step holds.
    shards = dict(mesh.shape)["fsdp"]
    size = min(max(settings.batch_size // settings.accumulation, 1), -(-len(encoded) // shards) * shards)
    # A document answers nothing: it has a likelihood only.
    asked = [(row, one) for row, one in encoded if not row.document]
    short = [(row, one) for row, one in asked if one.length - one.prompt_length <= settings.eval_tokens]
    correct, forwards = 0, 0
    for part in _batches(short, size, model.config.max_position_embeddings):
        texts, used = _answers(model, tokenizer, [one for _, one in part], size)
        correct += sum(text.strip() == row.response.strip() for text, (row, _) in zip(texts, part, strict=True))
        forwards = max(forwards, used)
    tokens = np.stack([one.tokens for _, one in encoded])
    maskable = np.stack([one.maskable for _, one in encoded])
    found: dict[str, Any] = {"exact_accuracy": correct / len(short)} if short else {}
    return found | {
        "rows": len(short),
        "too_long": len(rows) - len(short),
        "forwards": forwards,
        "nll": _grid_nll(model, tokens, maskable, size, mesh),
    }


Pair = tuple[Row, EncodedRow]


def _batches(pairs: Sequence[Pair], size: int, longest: int) -> Iterator[list[Pair]]:
    """Rows of like length together. The canvas of a batch is its longest prompt and its longest answer: it must fit."""
    part: list[Pair] = []
    for pair in sorted(pairs, key=lambda pair: (bucket_length(_answer_length(pair[1])), pair[1].prompt_length)):
        wider = [*part, pair]
        width = max(one.prompt_length for _, one in wider) + max(_answer_length(one) for _, one in wider)
        if part and (len(part) == size or width > longest):
            yield part
            wider = [pair]
        part = wider
    if part:
        yield part


def _answer_length(one: EncodedRow) -> int:
    return one.length - one.prompt_length


def _answers(model: Dream, tokenizer: Tokenizer, rows: Sequence[EncodedRow], size: int) -> tuple[list[str], int]:
    """The texts that the model answers with, and the forward passes used. `size` rows are denoised, whatever is given."""
    room = max(_answer_length(one) for one in rows)
    prompts, mask = left_padded([one.tokens[: one.prompt_length] for one in rows], size, tokenizer.pad_id)
    config = SamplerConfig(
        max_new_tokens=room,
        steps=room,
        alg="entropy",
        vocab_limit=tokenizer.vocab_limit,
        forbidden_tokens=(tokenizer.mask_id,),
    )
    out = generate(model, prompts, config, prompt_mask=mask)
    answers = np.asarray(out.tokens)[: len(rows), prompts.shape[1] :]
    return [answer_text(tokenizer, answer) for answer in answers], int(out.forwards)


def left_padded(prompts: Sequence[Sequence[int] | np.ndarray], size: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of different lengths as one batch: int32 [size, P], and bool [size, P], true at their tokens.

    Rows that only fill the batch have one token, a pad.
    """
    width = max(map(len, prompts))
    tokens, mask = np.full((size, width), pad_id, np.int32), np.zeros((size, width), bool)
    mask[len(prompts) :, -1] = True
    for line, prompt in enumerate(prompts):
        tokens[line, width - len(prompt) :] = prompt
        mask[line, width - len(prompt) :] = True
    return tokens, mask


def answer_text(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """The text of an answer: up to the first end-of-text token, special tokens left out."""
    ids = [int(token) for token in tokens]
    if tokenizer.eos_id in ids:
        ids = ids[: ids.index(tokenizer.eos_id)]
    return tokenizer.decode(ids, skip_special=True)


def _grid_nll(model: Dream, tokens: np.ndarray, maskable: np.ndarray, size: int, mesh: Mesh) -> float:
    """Mean cross entropy at masked positions over t = 1/16, 3/16, ..., 15/16, each with masks of its own."""

    @jax.jit
    def sums(model: Dream, tokens: jax.Array, masked: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, aux = masked_diffusion_loss(model, tokens, masked, t, UniformWeight())
        return jnp.sum(aux["token_nll"]), aux["num_masked"]

    size = min(size, len(tokens))
    # Rows that only fill the last batch: nothing of them is masked, so nothing of them counts.
    filling = ((0, -len(tokens) % size), (0, 0))
    tokens, maskable = np.pad(tokens, filling), np.pad(maskable, filling)
    total, count = 0.0, 0.0
    generator = np.random.default_rng(0)  # the same masks for every model
    for level in (np.arange(8) + 0.5) / 8:
        masked = maskable & (generator.random(maskable.shape) < level)
        for start in range(0, len(tokens), size):
            part = slice(start, start + size)
            t = np.full(size, level, np.float32)
            with jax.set_mesh(mesh):
                nll, number = sums(model, tokens[part], masked[part], t)
            total, count = total + float(nll), count + float(number)
    return total / max(count, 1.0)
