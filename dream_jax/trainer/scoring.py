"""How good a model is on held-out rows at the end of a run: by sampling answers, and by the likelihood of the rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dream_jax.data import TokenizedRows, TokenRow
from dream_jax.inference import answer, make_sampler
from dream_jax.model import Dream
from dream_jax.sampler import bucket_length
from dream_jax.tokenizer import Tokenizer
from dream_jax.trainer.heldout import Grid, GridScore, Pair, lay_out_held_out, rows_at_once
from dream_jax.trainer.settings import TrainSettings


def evaluate(
    model: Dream,
    held_out: TokenizedRows,
    settings: TrainSettings,
    max_length: int,
    mesh: Mesh,
    score: GridScore | None = None,
) -> dict[str, Any]:
    """Answers held-out rows by sampling (temperature 0, entropy order, a token a step), and measures their likelihood.

    `score` is the model's score on the grid of noise levels, if it is known already.

    Returns:
      `exact_accuracy` (share of answers equal to the row's, surrounding space aside), `rows` that were answered,
      `too_long` (documents, and rows that do not fit the model or whose answer is longer than `eval_tokens`), `forwards`
      (the most that a batch took), and of the fixed grid of noise levels `nll` (nats per masked token), `nll_se`,
      `masked_accuracy` and `eos_accuracy`; of the last three None where there was nothing to measure.
    """
    encoded, tokenizer = held_out.first(settings.evaluation.eval_rows, max_length), held_out.tokenizer
    asked = min(settings.evaluation.eval_rows, len(held_out))
    if not encoded:
        return {"rows": 0, "too_long": asked}
    size = rows_at_once(settings, mesh, len(encoded))
    # A document has no answer to compare with, only a likelihood.
    answering = [(row, one) for row, one in encoded if not row.document]
    short = [(row, one) for row, one in answering if one.length - one.prompt_length <= settings.evaluation.eval_tokens]
    correct, forwards = 0, 0
    for part in _batches(short, size, model.config.max_position_embeddings):
        texts, used = _answers(model, tokenizer, [one for _, one in part], size)
        correct += sum(text.strip() == row.response.strip() for text, (row, _) in zip(texts, part, strict=True))
        forwards = max(forwards, used)
    rows = lay_out_held_out([one for _, one in encoded], max_length, tokenizer.pad_id, settings.batches.options())
    grid = Grid(rows, size, mesh)
    if score is None:
        score = grid.score(model)
    measured = {name: getattr(score, name) for name in ("nll_se", "masked_accuracy", "eos_accuracy")}
    found: dict[str, Any] = {"exact_accuracy": correct / len(short)} if short else {}
    return found | {
        "rows": len(short),
        "too_long": asked - len(short),
        "forwards": forwards,
        "nll": score.nll,
        **{name: None if math.isnan(value) else value for name, value in measured.items()},
        "grid": grid.digest[:12],
        "answered": _digest(short),
    }


def _digest(pairs: Sequence[Pair]) -> str | None:
    """A digest of rows: only accuracies on equal digests may be compared."""
    found = hashlib.sha256()
    for _, one in pairs:
        found.update(np.asarray(one.tokens, np.int64).tobytes() + b"end")
    return found.hexdigest()[:12] if pairs else None


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


def _answer_length(one: TokenRow) -> int:
    return one.length - one.prompt_length


def _answers(model: Dream, tokenizer: Tokenizer, rows: Sequence[TokenRow], size: int) -> tuple[list[str], int]:
    """The texts that the model answers with, and the forward passes used. `size` rows are denoised, whatever is given."""
    prompts = [one.tokens[: one.prompt_length] for one in rows]
    names = [(0, number) for number in range(len(rows))]  # their keys are not read: nothing is random
    config = make_sampler(tokenizer, max(_answer_length(one) for one in rows))
    found = answer(model, tokenizer, prompts, names, config, size)
    return [one.text for one in found], found[0].forwards
