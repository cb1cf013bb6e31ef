"""Computes, by enumeration, the fewest nats that a model of each kind can have on the task countdown.

    python -m mask_study.floors [--out docs/study/floors.csv]

The task draws a prompt and one of the answers that are right for it. All answers of a prompt and their probabilities can be
listed, so the probability of every set of answer tokens is known: no model has to be trained. A mask, together with the
right shift, decides which of these tokens the prediction of a token can depend on. The best model under the mask predicts
the token from exactly these, and its nats are the floor of the mask. It is a floor for every number of layers, because a
token counts as visible if any path through the layers leads to it.

What a mask costs is therefore information: the mean number of nats that the hidden tokens would tell about a token beyond
what the visible tokens tell. If the prompt alone determines the answer, all floors are 0.

Three kinds of floor are computed. The first is the bound of an answer, in nats: the integral, over the noise level t,
of the expected cross entropies of the masked tokens with the weight 1 / t. The second has the mean over the eight noise
levels of the study's grid in place of the integral. The third is the number of nats per masked token at the masked
positions of this grid; it is comparable with `nll` in the results of the study.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tyro
from jaxtyping import Bool, Float, Int

from dream_jax import masks, sharding
from dream_jax.batch import Batch
from dream_jax.bounds import IntegerRange, check_numbers
from dream_jax.objective import TIME_BUCKETS
from dream_jax.trainer.heldout import LEVELS, Grid
from mask_study.runs import write_table
from mask_study.tasks import TASKS, CountdownTask, Example
from mask_study.training import rows_of, tokenizer
from mask_study.variants import MASKS

TASK = "countdown"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """The tokens of the answer on which the prediction of one of its tokens can depend, besides the prompt.

    A set of answer tokens is an integer: bit i is set if token i of the answer is in the set.

    Attributes:
      known: the set of tokens that the prediction always sees.
      noised: the set of tokens that it sees only when they are not masked. The predicted token and those in `known` are
        not in this set.
    """

    known: int
    noised: int


def contexts(
    mask: masks.Mask, prompt_width: int, answer_width: int, *, shift: bool = True, block: int | None = None
) -> list[Context]:
    """Returns the context of each token of the answer, in their order.

    Args:
      mask: the mask of a row [prompt | answer], already bound to it. With `block`, the mask of a row that holds the text
        twice, [noised | clean].
      prompt_width, answer_width: number of tokens of the prompt and of the answer; the prompt is never masked.
      shift: whether token i is predicted from the state at i - 1, as in Dream, or from the state at i.
      block: number of tokens of a block of two streams, counted from the first token of the answer; None for one stream.
        With the shift, the first token of a block is predicted from the clean stream.

    Raises:
      ValueError: a prediction sees the token that it predicts, or the first token of a text without a prompt is shifted.
    """
    if shift and not prompt_width:
        raise ValueError("with the right shift, the first token of the answer needs a token before it; give a prompt")
    width = prompt_width + answer_width
    tokens = width if block is None else 2 * width
    dense = np.broadcast_to(np.asarray(mask.dense(tokens, tokens)), (1, tokens, tokens))[0]
    reached = dense | np.eye(tokens, dtype=bool)  # a layer adds to the state of its own token
    while True:  # Each product adds the paths through twice as many layers.
        further = reached.astype(np.int64) @ reached > 0
        if np.array_equal(further, reached):
            break
        reached = further
    found = []
    for token in range(answer_width):
        source = prompt_width + token - shift
        if block is not None and shift and token % block == 0:
            source += width
        answers = [reached[source, start + prompt_width : start + width] for start in range(0, tokens, width)]
        clean = np.zeros(answer_width, bool) if block is None else answers[1]
        if clean[token]:
            raise ValueError(f"under the mask {mask} token {token} is predicted from a state that sees its clean value")
        noised = answers[0] & ~clean
        noised[token] = False
        found.append(Context(known=_bits(clean), noised=_bits(noised)))
    return found


def _bits(members: Bool[np.ndarray, "W"]) -> int:
    return sum(1 << int(token) for token in np.flatnonzero(members))


def first_tokens_known(found: Sequence[Context], block: int) -> list[Context]:
    """Returns the contexts for an order in which the first token of each block is written before the rest of the block.

    The other tokens of the block then always see the first token. With the right shift the first token never sees the
    other tokens, in any order, so nothing is lost by this order.
    """
    changed = []
    for token, context in enumerate(found):
        first = 0 if token % block == 0 else 1 << (token - token % block)
        changed.append(Context(known=context.known | first, noised=context.noised & ~first))
    return changed


def answers(task: CountdownTask, prompt: str) -> dict[str, float]:
    """Returns the probability of each answer to a prompt of countdown, by enumeration of all draws of the task.

    Raises:
      ValueError: the task draws no such prompt.
    """
    found: defaultdict[str, float] = defaultdict(float)
    numbers = [int(digit) for digit in prompt[:3]]
    for order in itertools.permutations(numbers):
        for signs in itertools.product("+-", repeat=2):
            for between_first in (True, False):
                answer = task.answer_of(order, signs, between_first=between_first)
                if answer is not None and answer.prompt[4:] == prompt[4:]:
                    found[answer.answer] += 1.0
    if not found:
        raise ValueError(f"countdown draws no prompt {prompt!r}: no sum or difference of the numbers is the target")
    total = sum(found.values())
    return {answer: count / total for answer, count in found.items()}


def subset_nats(task: CountdownTask, examples: Sequence[Example]) -> Iterator[tuple[list[int], Float[np.ndarray, "S"]]]:
    """Yields the nats of all sets of answer tokens of each example, once for all examples that have the same nats.

    Yields:
      A list of indices of examples, and their array, float64 [2 ** answer width]. Element S of the array belongs to the
      set S of answer tokens (see `Context`): it is minus the logarithm of the probability that the tokens of this set
      have their values, given the prompt.
    """
    # The array of an example depends only on two properties of every answer to its prompt: which tokens the answer has
    # in common with the answer of the example, and its probability. Many examples agree in both, and so have the same
    # array.
    groups: defaultdict[tuple[tuple[int, float], ...], list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        shared: defaultdict[int, float] = defaultdict(float)
        for answer, probability in answers(task, example.prompt).items():
            shared[_bits(np.array([x == y for x, y in zip(answer, example.answer, strict=True)]))] += probability
        groups[tuple(sorted((bits, round(probability, 12)) for bits, probability in shared.items()))].append(index)
    for pattern, members in groups.items():
        summed = np.zeros((2,) * task.answer_width)
        flat = summed.reshape(-1)
        for bits, value in pattern:
            flat[bits] += value
        # The tokens of a set have their values in all answers that have at least these tokens in common with the
        # example. So the probability of a set is the sum over all sets that include it.
        for axis in range(task.answer_width):
            halves = np.moveaxis(summed, axis, 0)
            halves[0] += halves[1]
        yield members, -np.log(flat)


def _subsets(members: int) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Returns all subsets of a set, and the number of tokens of each."""
    found = np.zeros(1, np.int64)
    for token in range(members.bit_length()):
        if members >> token & 1:
            found = np.concatenate([found, found | 1 << token])
    return found, np.array([int(one).bit_count() for one in found])


def bound(nats_S: Float[np.ndarray, "S"], found: Sequence[Context], levels: Sequence[float] | None = None) -> float:
    """Returns the least bound, in nats an answer: the sum over tokens of the expected nats of the token in its context.

    The weight 1 / t of the bound and the probability t that a token is masked cancel, so each token has the weight 1.

    Args:
      nats_S: the mean over examples of the arrays of `subset_nats`.
      found: the context of each token.
      levels: noise levels, over which the mean is taken; None for the integral over all levels from 0 to 1.
    """
    total = 0.0
    for token, context in enumerate(found):
        seen, count = _subsets(context.noised)
        most = context.noised.bit_count()
        if levels is None:  # The integral of (1 - t)^count t^(most - count) is 1 / ((most + 1) * choose(most, count)).
            weight = 1.0 / ((most + 1) * np.array([math.comb(most, int(one)) for one in count]))
        else:
            weight = np.mean([(1 - t) ** count * t ** (most - count) for t in levels], axis=0)
        seen = seen | context.known
        total += float(np.sum(weight * (nats_S[seen | 1 << token] - nats_S[seen])))
    return total


def on_grid(
    patterns: Sequence[tuple[list[int], Float[np.ndarray, "S"]]],
    masked_LRW: Bool[np.ndarray, "L R W"],
    found: Sequence[Context],
) -> float:
    """Returns the fewest nats per masked token on a grid of noise levels with fixed masked positions.

    Args:
      patterns: all that `subset_nats` yields for the R rows.
      masked_LRW: true at the answer tokens that are masked, for each noise level and row.
      found: the context of each token.
    """
    bit_W = 1 << np.arange(masked_LRW.shape[2])
    known_W = np.array([context.known for context in found])
    noised_W = np.array([context.noised for context in found])
    total = 0.0
    for members, nats_S in patterns:
        masked_NW = masked_LRW[:, members].reshape(-1, len(bit_W))
        unmasked_N1 = (~masked_NW @ bit_W)[:, None]
        seen_NW = known_W | noised_W & unmasked_N1
        total += float(np.sum((nats_S[seen_NW | bit_W] - nats_S[seen_NW])[masked_NW]))
    return total / float(masked_LRW.sum())


def kinds(task: CountdownTask) -> dict[str, list[Context]]:
    """Returns the contexts of each kind of model, by its name in the tables."""
    prompt, width = task.prompt_width, task.answer_width
    found = {
        "bidirectional": contexts(masks.Bidirectional(), prompt, width),
        "causal": contexts(masks.Causal(), prompt, width),
        "prefix": contexts(masks.Prefix(np.array([prompt])) | masks.Causal(), prompt, width),
        "block-causal:4": contexts(masks.BlockCausal(4), prompt, width),
        "block-causal:4, unshifted": contexts(masks.BlockCausal(4), prompt, width, shift=False),
    }
    for size in (1, 2, 4, 8, 16):
        mask = masks.TwoStream(size, np.array([prompt], np.int32))
        found[f"two streams, blocks of {size}"] = contexts(mask, prompt, width, block=size)
        if size > 1:
            found[f"two streams, blocks of {size}, first token first"] = first_tokens_known(
                found[f"two streams, blocks of {size}"], size
            )
            found[f"two streams, blocks of {size}, unshifted"] = contexts(mask, prompt, width, shift=False, block=size)
    return found


def floors(task: CountdownTask, number: int = 256) -> list[dict[str, Any]]:
    """Returns the floors of each kind of model on the first `number` test rows, which a study measures on.

    Each row has the keys `model`, `nats_an_answer` (the bound of an answer), `on_eight_levels` (the same with the mean over
    the noise levels of the grid in place of the integral), `nats_a_token_on_grid`, and `grid 0.0 <= t < 0.25` and so on for
    the quarters of the grid. The last five are NaN if the first token of a block is written first, because on the grid it
    is masked like the others.
    """
    examples = task.examples("test", 0, number)
    tokens_RT = rows_of(examples, tokenizer())
    maskable_RT = np.broadcast_to(np.arange(tokens_RT.shape[1]) >= task.prompt_width, tokens_RT.shape)
    rows = Batch(tokens_BT=tokens_RT, maskable_BT=maskable_RT, row_B=np.arange(number, dtype=np.int32))
    masked_LRT = Grid(rows, number, sharding.make_mesh("1x1")).masked_LRT
    masked_LRW = masked_LRT[:, :, task.prompt_width :]
    patterns = list(subset_nats(task, examples))
    nats_S = sum((len(members) * nats_S for members, nats_S in patterns), np.zeros(1)) / number
    quarter_L = np.array([int(level * TIME_BUCKETS) for level in LEVELS])
    parts = {"nats_a_token_on_grid": masked_LRW}
    for number_of in range(TIME_BUCKETS):
        title = f"grid {number_of / TIME_BUCKETS} <= t < {(number_of + 1) / TIME_BUCKETS}"
        parts[title] = masked_LRW[quarter_L == number_of]
    return [
        {
            "model": name,
            "nats_an_answer": bound(nats_S, found),
            "on_eight_levels": bound(nats_S, found, LEVELS),
            # On the grid the first token of a block is masked like the others.
            **{
                key: math.nan if name.endswith("first") else on_grid(patterns, part, found)
                for key, part in parts.items()
            },
        }
        for name, found in kinds(task).items()
    ]


def floor_of(task: str, variant: str, of: str, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns the fewest nats per masked token on the grid that a model of this variant can have; None if not known.

    In all tasks but countdown the prompt determines the answer, so the floor is 0 where every prediction can depend on
    the whole prompt. Under a window this is not so, and its floors are not computed.

    Args:
      task, variant: a task, and a variant whose name is that of its mask; no other variant has a floor here.
      of: "all", or a quarter of the noise levels such as "0.0 <= t < 0.25".
      rows: the rows of floors.csv; () if there are none.
    """
    if variant not in MASKS or variant.startswith("window"):
        return None
    if task != TASK:
        return 0.0 if task in TASKS else None
    name = "nats_a_token_on_grid" if of == "all" else f"grid {of}"
    return next((float(row[name]) for row in rows if row["model"] == variant), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloorSettings:
    """Where the table of floors is written, and on how many test rows they are computed."""

    out: pathlib.Path = pathlib.Path("docs/study/floors.csv")
    """file of the table; an earlier one is replaced"""
    rows: int = 256
    """number of test rows, 1 to 1024; the study measures on 256"""

    def __post_init__(self) -> None:
        check_numbers(self, rows=IntegerRange(1, 1024))


def main(settings: FloorSettings) -> None:
    """Writes the table and prints it."""
    task = TASKS[TASK]
    assert isinstance(task, CountdownTask)
    found = floors(task, settings.rows)
    for row in found:
        print(f"{row['model']:48} " + " ".join(f"{value:.4f}" for value in list(row.values())[1:]))
    print("wrote", write_table(settings.out, found))


if __name__ == "__main__":
    main(tyro.cli(FloorSettings, description=__doc__))
