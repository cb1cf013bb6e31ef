"""Measures a trained model: likelihood by noise level, and accuracy in each order of writing and in few passes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dream_jax import masks, sharding
from dream_jax.batch import Batch
from dream_jax.model import Dream
from dream_jax.sampler import EntropyBound, Sample, SamplerConfig, Threshold, generate
from dream_jax.tokenizer import Tokenizer
from dream_jax.trainer.heldout import Grid
from mask_study.tasks import Example, StudyTask
from mask_study.training import decode, learned, rows_of, tokenizer
from mask_study.variants import Variant

ORDERS = ("random", "confidence", "left to right", "right to left")
"""Orders in which answers are written, one token per pass."""

TAU = 0.9
"""A threshold in (0, 1): a pass that may write several tokens writes those whose probability is above it."""


class Measured(NamedTuple):
    """One measured number of one model.

    Attributes:
      measure: the quantity: "nll" (nats per masked token), "masked accuracy" (share of masked tokens), "accuracy"
        (share of answers), "written at" (mean step, from 0, at which the order by confidence writes a position), or
        "kept keys" (a field of `CacheError`; result files use this name for the key/value cache).
      of: the condition: the noise levels, the order or number of passes, the position, or the field.
      passes: mean number of forward passes per row; 0 if nothing is sampled.
      value: the measured number, in the unit given at `measure`.
    """

    measure: str
    of: str
    passes: float
    value: float


def measure(
    model: Dream, task: StudyTask, variant: Variant, examples: Sequence[Example], seed: int
) -> Iterator[Measured]:
    """Yields all measured numbers of one model, except those of "kept keys".

    Args:
      model: a model that was trained on `task` with the settings of `variant`.
      task, variant: the task and the variant of the model.
      examples: examples of the test split.
      seed: the seed of the sampler and of the random order of writing.
    """
    words = tokenizer()
    if not variant.hide_pads:  # The likelihood has rows with padding, to which that model never attended in training.
        yield from _likelihood(model, task, variant, examples, words)
    width = task.answer_width
    prompts = rows_of([Example(example.prompt, "") for example in examples], words)

    def accuracy(tokens: np.ndarray) -> float:
        answers = [decode(row, words) for row in tokens[:, task.prompt_width :]]
        return float(np.mean([task.is_right(*pair) for pair in zip(examples, answers, strict=True)]))

    def sampled(**options: object) -> Sample:
        shared = {"max_new_tokens": width, "vocab_limit": words.vocab_limit, "forbidden_tokens": (words.mask_id,)}
        # mypy assumes one type for all values of the dict; SamplerConfig checks the type of each option.
        return generate(model, prompts, SamplerConfig(**shared | options), jax.random.key(seed))  # type: ignore[arg-type]

    # With an entropy bound of 0 each pass writes only the most confident token. With the published schedule some passes
    # would write no token and others two.
    out = sampled(alg="entropy", commit=EntropyBound(0.0))
    yield Measured("accuracy", "confidence", float(np.mean(out.passes)), accuracy(np.asarray(out.tokens)))
    for position, step in enumerate(np.asarray(out.commit_step)[:, task.prompt_width :].mean(axis=0)):
        yield Measured("written at", str(position), 0.0, float(step))
    generator = np.random.default_rng(seed)
    forward = np.broadcast_to(np.arange(width), (len(examples), width))
    orders = {
        "random": generator.permuted(forward, axis=1),
        "left to right": forward,
        "right to left": forward[:, ::-1],
    }
    for order, order_BN in orders.items():
        tokens = write_in_order(model, prompts, order_BN, words)
        yield Measured("accuracy", order, float(width), accuracy(tokens))
    passes = 1
    while passes < width:
        out = sampled(alg="entropy", steps=passes)
        yield Measured("accuracy", f"in {passes} passes", float(np.mean(out.passes)), accuracy(np.asarray(out.tokens)))
        passes *= 2
    out = sampled(alg="maskgit_plus", commit=Threshold(TAU), block_length=width)
    yield Measured("accuracy", f"all above {TAU}", float(np.mean(out.passes)), accuracy(np.asarray(out.tokens)))


def _likelihood(
    model: Dream, task: StudyTask, variant: Variant, examples: Sequence[Example], words: Tokenizer
) -> Iterator[Measured]:
    tokens_RT = rows_of(examples, words)
    maskable_RT, _ = learned(tokens_RT, task, variant, words)
    rows = Batch(tokens_BT=tokens_RT, maskable_BT=maskable_RT, row_B=np.arange(len(tokens_RT), dtype=np.int32))
    score = Grid(rows, min(len(tokens_RT), 256), sharding.make_mesh("1x1")).score(model)
    yield Measured("nll", "all", 0.0, score.nll)
    for number, value in enumerate(score.nll_by_time):
        yield Measured("nll", f"{number / 4} <= t < {(number + 1) / 4}", 0.0, value)
    yield Measured("masked accuracy", "all", 0.0, score.masked_accuracy)


def write_in_order(model: Dream, prompts_BP: np.ndarray, order_BN: np.ndarray, words: Tokenizer) -> np.ndarray:
    """Writes answers in a given order, one position per pass, each time the most probable token.

    Args:
      model: the model; it runs under the mask under which it was trained.
      prompts_BP: int32 [B, P], prompts without padding.
      order_BN: int [B, N], positions in the answer; each row is a permutation of range(N).
      words: the tokenizer; its mask token and ids from its vocab_limit on are never written.

    Returns:
      Prompts and answers, int32 [B, P + N].

    Raises:
      ValueError: a row of `order_BN` is not a permutation.
    """
    width = order_BN.shape[1]
    if not np.array_equal(np.sort(order_BN, axis=1), np.broadcast_to(np.arange(width), order_BN.shape)):
        raise ValueError(f"{order_BN=} must have each of {width} positions once in each row")
    canvas_BT = np.pad(prompts_BP, ((0, 0), (0, width)), constant_values=model.config.mask_token_id)
    allowed_V = np.arange(model.config.vocab_size) < words.vocab_limit
    allowed_V[words.mask_id] = False
    position_NB = (order_BN.T + prompts_BP.shape[1]).astype(np.int32)
    return np.asarray(_written(model, canvas_BT, position_NB, allowed_V, prompt_width=prompts_BP.shape[1]))


@functools.partial(jax.jit, static_argnames="prompt_width")
def _written(
    model: Dream, canvas_BT: jax.Array, position_NB: jax.Array, allowed_V: jax.Array, *, prompt_width: int
) -> jax.Array:
    mask, positions_BT = layout(model, canvas_BT.shape, prompt_width)
    row_B = jnp.arange(canvas_BT.shape[0])

    def write(canvas_BT: jax.Array, position_B: jax.Array) -> tuple[jax.Array, None]:
        hidden_BTD = model.hidden(canvas_BT, mask, positions_BT)
        logits_BV = model.unembed(hidden_BTD[row_B, position_B - 1])  # Position i is predicted at i - 1.
        token_B = jnp.argmax(jnp.where(allowed_V, logits_BV, -jnp.inf), axis=-1).astype(jnp.int32)
        return canvas_BT.at[row_B, position_B].set(token_B), None

    written_BT: jax.Array = jax.lax.scan(write, jnp.asarray(canvas_BT), position_NB)[0]
    return written_BT


def layout(model: Dream, shape: tuple[int, ...], prompt_width: int) -> tuple[masks.Mask, jax.Array]:
    """Returns the mask of the model and the positions, int32 [B, T], for rows of `shape` (B, T) without padding.

    The answers begin at `prompt_width`.
    """
    answer_BT = jnp.broadcast_to(jnp.arange(shape[1]) >= prompt_width, shape)
    mask = masks.parse(model.trained_mask).for_rows(jnp.ones(shape, bool), answer_BT)
    return mask, jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
