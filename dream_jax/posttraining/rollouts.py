"""Rollouts: several answers to each prompt, sampled during a run, with the record of which step wrote what."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int

from dream_jax.data import Row
from dream_jax.inference import TextAnswer, end_ids, read_answer
from dream_jax.model import Dream
from dream_jax.posttraining.policies import SampledRows
from dream_jax.posttraining.rewards import SampledAnswer, question_of
from dream_jax.sampler import SamplerConfig, generate
from dream_jax.tokenizer import Tokenizer

# Folded into the key of the seed, so that answers have other random numbers than weights, noise and adapters.
_ROLLOUT = (1 << 30) + 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """R answers, those to the same prompt next to each other.

    Attributes:
      rows: the tokens of prompts and answers.
      answers: the texts of the answers.
      passes_R: int32, number of forward passes in which each answer took part.
    """

    rows: SampledRows
    answers: tuple[TextAnswer, ...]
    passes_R: Int[np.ndarray, "R"]


def sample_rollout(
    model: Dream,
    tokenizer: Tokenizer,
    tokens_BP: Int[np.ndarray, "B P"],
    valid_BP: Bool[np.ndarray, "B P"],
    config: SamplerConfig,
    *,
    group_size: int,
    seed: int,
    number: int,
    rows_at_once: int,
) -> Rollout:
    """Samples `group_size` answers to each prompt.

    Args:
      model: the model; if its parameters are on a mesh, the answers are sharded over it.
      tokenizer: the tokenizer of the model.
      tokens_BP, valid_BP: the prompts, with padding on the left.
      config: the settings of the sampler.
      group_size: number of answers to each prompt.
      seed, number: seed of the run, and number of the rollout. Together with the index of an answer they decide its random
        numbers, so an answer does not depend on `rows_at_once`.
      rows_at_once: number of answers that are sampled together. The last batch is filled up with copies of its last row.

    Returns:
      The answers, B times `group_size` of them.
    """
    tokens_RP, valid_RP = (np.repeat(x, group_size, axis=0) for x in (tokens_BP, valid_BP))
    count = len(tokens_RP)
    base = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _ROLLOUT), number)
    keys_R = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(base, np.arange(count))
    found: list[tuple[np.ndarray, ...]] = []
    for start in range(0, count, rows_at_once):
        index = np.minimum(np.arange(start, start + rows_at_once), count - 1)
        out = generate(
            model, tokens_RP[index], config, keys_R[index], prompt_mask=valid_RP[index], record="confidences"
        )
        assert out.recorded is not None
        drawn_RT = ~np.isnan(np.asarray(out.recorded.confidence_BT))
        used = slice(0, min(rows_at_once, count - start))
        passes_R = np.asarray(out.passes)
        found.append((np.asarray(out.tokens)[used], np.asarray(out.commit_step)[used], drawn_RT[used], passes_R[used]))
    tokens_RT, step_RT, drawn_RT, passes_R = (np.concatenate(one) for one in zip(*found, strict=True))
    drawn_RT &= step_RT >= 0
    valid_RT = np.pad(valid_RP, ((0, 0), (0, config.max_new_tokens)), constant_values=True)
    rows = SampledRows(
        tokens_RT=tokens_RT,
        valid_RT=valid_RT,
        step_RT=step_RT,
        drawn_RT=drawn_RT,
        answer_RT=(step_RT >= 0) & valid_RT & _until_end(tokens_RT, step_RT, end_ids(tokenizer)),
    )
    answers = []
    for tokens_T, step_T, valid_P, passes in zip(tokens_RT, step_RT, valid_RP, passes_R.tolist(), strict=True):
        begin, width = int(np.argmax(valid_P)), valid_P.shape[0]
        answers.append(read_answer(tokenizer, tokens_T[begin:width], tokens_T[begin:], step_T[begin:], passes))
    return Rollout(rows=rows, answers=tuple(answers), passes_R=passes_R)


def sampled_answers(
    answers: Sequence[TextAnswer], rows: Sequence[Row], where: Sequence[str], limit: int
) -> tuple[SampledAnswer, ...]:
    """Returns what the rewards see.

    Args:
      answers: the answers.
      rows, where: for each answer the row of its prompt, and the origin of this row.
      limit: the largest number of tokens of an answer.
    """
    found = []
    for answer, row, origin in zip(answers, rows, where, strict=True):
        ended = answer.tokens_to_end is not None
        found.append(
            SampledAnswer(
                question=question_of(row),
                text=answer.text,
                reference=row.response,
                length=limit if answer.tokens_to_end is None else answer.tokens_to_end,
                limit=limit,
                ended=ended,
                where=origin,
                row=row,
            )
        )
    return tuple(found)


def _until_end(
    tokens_RT: Int[np.ndarray, "R T"], step_RT: Int[np.ndarray, "R T"], ends: tuple[int, ...]
) -> Bool[np.ndarray, "R T"]:
    """Returns true at the tokens up to the first written end token of each row, this token included."""
    is_end_RT = np.isin(tokens_RT, ends) & (step_RT >= 0)
    return np.cumsum(is_end_RT, axis=1) - is_end_RT == 0
