"""Trains one variant on one task with the train step of dream_jax, and converts examples to tokens and back."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np

from dream_jax import masks, sharding
from dream_jax.batch import Batch
from dream_jax.model import Dream, merge_params, split_params
from dream_jax.optimizer import OptimizerConfig
from dream_jax.tokenizer import Tokenizer, load_tokenizer
from dream_jax.train_step import StepConfig, init_state, make_train_step, put_batch
from mask_study.tasks import END, Example, StudyTask
from mask_study.variants import Variant

BATCH = 64  # rows per step
_LEARNING_RATE = 2e-3  # the default of train.py for random weights


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained model with the curve and the time of its training.

    Attributes:
      model: the model with the weights after the last step.
      nll: negative log-likelihood of the training rows in nats per masked token, the mean of each twentieth of the run.
      seconds: time of the training without the first step, which compiles.
    """

    model: Dream
    nll: tuple[float, ...]
    seconds: float


def tokenizer() -> Tokenizer:
    """Returns the tokenizer of all tasks, which has one token per byte."""
    return load_tokenizer("bytes")


def encode(text: str, words: Tokenizer) -> list[int]:
    """Returns one token id per character; each `END` at the end of the text becomes the end-of-text token."""
    text, ends = text.rstrip(END), len(text) - len(text.rstrip(END))
    return [*words.encode(text), *[words.eos_id] * ends]


def decode(tokens: np.ndarray, words: Tokenizer) -> str:
    """Returns the text of the tokens, the inverse of `encode`. Other special tokens become their names."""
    return "".join(END if token == words.eos_id else words.decode([token]) for token in map(int, tokens))


def rows_of(examples: Sequence[Example], words: Tokenizer) -> np.ndarray:
    """Returns the tokens of the prompts and answers, int32 [rows, tokens]; all rows must have the same width."""
    return np.array([encode(f"{prompt}{answer}", words) for prompt, answer in examples], np.int32)


def learned(
    tokens_RT: np.ndarray, task: StudyTask, variant: Variant, words: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Returns which tokens may be masked and learned, and which are valid for attention: bool [rows, tokens] each."""
    answer_RT = np.broadcast_to(np.arange(tokens_RT.shape[1]) >= task.prompt_width, tokens_RT.shape)
    valid_RT = np.ones(tokens_RT.shape, bool)
    if variant.hide_pads:
        ends_RT = tokens_RT == words.eos_id
        # The first end-of-text token belongs to the answer, because with it the model ends the answer.
        valid_RT = ~(ends_RT & (np.cumsum(ends_RT, axis=1) > 1))
    return answer_RT & valid_RT, valid_RT


def train(task: StudyTask, variant: Variant, seed: int, steps: int, *, batch: int = BATCH) -> TrainedModel:
    """Trains a model with random weights on one device.

    Args:
      task: the task whose train split the model learns.
      variant: the variant, which decides the mask, the loss weight and the shift.
      seed: decides the weights, rows, noise levels and masked positions, which are the same for all variants.
      steps: number of optimizer steps.
      batch: number of rows per step.

    Raises:
      FloatingPointError: the loss of a step is not finite.
    """
    words = tokenizer()
    mesh = sharding.make_mesh("1x1")
    tokens_RT = rows_of(task.examples("train", seed, steps * batch), words)
    maskable_RT, valid_RT = learned(tokens_RT, task, variant, words)
    graphdef, params = split_params(variant.model(seed))
    settings = OptimizerConfig(learning_rate=_LEARNING_RATE, total_steps=steps)
    optimizer = settings.make()
    config = StepConfig(global_batch=batch, weight=variant.loss_weight(), seed=seed, mask=masks.parse(variant.mask))
    step = make_train_step(graphdef, optimizer, settings.schedule(), config, mesh)
    state = init_state(params, optimizer, mesh)
    nll: list[jax.Array] = []
    begun = 0.0
    for number in range(steps):
        chosen = slice(number * batch, (number + 1) * batch)
        rows = Batch(
            tokens_BT=tokens_RT[chosen],
            maskable_BT=maskable_RT[chosen],
            row_B=np.arange(batch, dtype=np.int32),
            valid_BT=valid_RT[chosen] if variant.hide_pads else None,
        )
        state, metrics = step(state, put_batch(rows, mesh))
        nll.append(metrics["nll"])
        if number == 0:
            jax.block_until_ready(nll)
            begun = time.perf_counter()
    found = np.array(jax.device_get(nll))
    seconds = time.perf_counter() - begun
    if not np.isfinite(found).all():
        raise FloatingPointError(
            f"{task.name} under {variant.name!r}, seed {seed}: a loss is not finite, the last is {found[-1]}"
        )
    model = merge_params(graphdef, state.params)
    model.trained_mask = variant.mask
    pieces = np.array_split(found, min(20, steps))
    return TrainedModel(model, tuple(float(piece.mean()) for piece in pieces), seconds)
