"""Evaluation on held-out rows at the end of a run: accuracy of sampled answers, and likelihood of the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dream_jax.bounds import finite_or_none
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
    """Answers held-out rows by sampling, and measures the likelihood of the rows.

    The answers are sampled at temperature 0, in entropy order, one token per step.

    Args:
      model: the model, with its parameters on the mesh.
      held_out: the held-out rows.
      settings: the settings of the run.
      max_length: length of the rows in tokens.
      mesh: the mesh of the run.
      score: the score of the model on the fixed grid of noise levels; None if it must be computed here.

    Returns:
      A dict with `exact_accuracy` (share of answers equal to the response of their row, apart from surrounding
      whitespace; absent if no row was answered), `rows` (number of answered rows), `too_long` (number of rows without
      an answer: documents, and rows that do not fit the model or whose response is longer than `eval_tokens`),
      `forwards` (the largest number of forward passes of a batch), and the score on the fixed grid: `nll` (nats per
      masked token), `nll_se`, `masked_accuracy`, `eos_accuracy` (each is None if there was nothing to measure, or if the
      model gives no finite likelihood). The digests `grid` (of the rows in the score) and `answered` (of the rows with
      an answer) tell whether two results may be compared. If no row fits the model, the dict has only `rows` and
      `too_long`.
    """
    encoded, tokenizer = held_out.first(settings.evaluation.eval_rows, max_length), held_out.tokenizer
    asked = min(settings.evaluation.eval_rows, len(held_out))
    if not encoded:
        return {"rows": 0, "too_long": asked}
    size = rows_at_once(settings, mesh, len(encoded))
    # A document has no response to compare an answer with, so it only counts in the likelihood.
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
    measured = {name: getattr(score, name) for name in ("nll", "nll_se", "masked_accuracy", "eos_accuracy")}
    found: dict[str, Any] = {"exact_accuracy": correct / len(short)} if short else {}
    return found | {
        "rows": len(short),
        "too_long": asked - len(short),
        "forwards": forwards,
        **{name: finite_or_none(value) for name, value in measured.items()},
        "grid": grid.digest[:12],
        "answered": _digest(short),
    }


def _digest(pairs: Sequence[Pair]) -> str | None:
    """Returns a digest of the rows as 12 hexadecimal digits, or None without rows."""
    found = hashlib.sha256()
    for _, one in pairs:
        found.update(np.asarray(one.tokens, np.int64).tobytes() + b"end")
    return found.hexdigest()[:12] if pairs else None


def _batches(pairs: Sequence[Pair], size: int, longest: int) -> Iterator[list[Pair]]:
    """Yields batches of at most `size` rows of similar length.

    The canvas of a batch is as long as its longest prompt and its longest answer together, at most `longest` tokens.
    """
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
    """Returns the number of tokens of a row after its prompt."""
    return one.length - one.prompt_length


def _answers(model: Dream, tokenizer: Tokenizer, rows: Sequence[TokenRow], size: int) -> tuple[list[str], int]:
    """Returns the answers of the model as texts, and the number of forward passes. Always denoises `size` rows."""
    prompts = [one.tokens[: one.prompt_length] for one in rows]
    names = [(0, number) for number in range(len(rows))]  # not used: at temperature 0 nothing is random
    config = make_sampler(tokenizer, max(_answer_length(one) for one in rows), trained_mask=model.trained_mask)
    found = answer(model, tokenizer, prompts, names, config, size)
    return [one.text for one in found], found[0].forwards
