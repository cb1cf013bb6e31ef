"""Trains an autoregressive model on as a diffusion model, in one of several ways, and measures it on the way.

The rows are texts of equal length whose first token is given; all other tokens may be masked. This module imports only what
a compiled program needs, so that it also runs where no other package is installed.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dream_jax import masks, sharding
from dream_jax.batch import Batch
from dream_jax.block_diffusion import block_diffusion_loss
from dream_jax.flops import FlopCounter
from dream_jax.model import Dream, mask_and_positions, merge_params, split_params
from dream_jax.objective import UniformWeight, loss_of_states, masked_diffusion_loss
from dream_jax.optimizer import OptimizerConfig, update_if
from dream_jax.train_step import StepConfig, TrainState, init_state, make_train_step, put_batch
from mask_study.variants import UnshiftedDream

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels at which models are measured: the middles of five equal parts of [0, 1]."""


def text_of(row: Any) -> tuple[str, str]:
    """Returns the text of a `dream_jax.data.Row` in two parts: all that is given, then the response.

    The given part is the prompt, or all messages of a chat, each followed by a line break; it is "" for a document.
    """
    messages = [row.prompt] if isinstance(row.prompt, str) else [message["content"] for message in row.prompt]
    return "".join(f"{message}\n" for message in messages if message), row.response


_ROWS = 8  # rows that are measured at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptationArm:
    """One way to train the weights on.

    Attributes:
      name: its name in the tables.
      mask: the mask in the first step and, except with `annealed`, in all steps; of one stream.
      shift: whether position i is predicted from the state at i - 1, as the autoregressive model does it.
      annealed: whether the mask grows from causal to bidirectional in the first half of the steps.
      sizes: sizes of the blocks for training with two streams, in equal shares of the steps; () for one stream.
      autoregressive: whether every token is learned from the clean tokens before it, as before.
      random: whether the training starts from random weights.
    """

    name: str
    mask: str = "bidirectional"
    shift: bool = True
    annealed: bool = False
    sizes: tuple[int, ...] = ()
    autoregressive: bool = False
    random: bool = False

    @property
    def trained_mask(self) -> str:
        """The mask under which the trained model is sampled and measured."""
        return f"block-diffusion:{self.sizes[-1]}" if self.sizes else self.mask


ADAPTATION_ARMS = {
    arm.name: arm
    for arm in (
        AdaptationArm(name="bidirectional"),
        AdaptationArm(name="annealed", annealed=True),
        AdaptationArm(name="unshifted", shift=False),
        AdaptationArm(name="causal", mask="causal"),
        AdaptationArm(name="two streams, blocks of 16", sizes=(16,)),
        AdaptationArm(name="two streams, growing blocks", sizes=(1, 2, 4, 8, 16)),
        AdaptationArm(name="autoregressive", mask="block-diffusion:1", autoregressive=True),
        AdaptationArm(name="random weights", random=True),
    )
}


class Adaptation(NamedTuple):
    """A trained model, with what was seen on the way.

    Attributes:
      model: the model after the last step.
      nats: the mean nats of a learned token in each step; not finite if a step was.
      seconds: time of the steps, without the first one, which compiles, and without the measurements. With blocks that
        grow it contains the time to compile the program of each further size.
    """

    model: Dream
    nats: list[float]
    seconds: float


def start_of(arm: AdaptationArm, start: Dream, seed: int) -> Dream:
    """Returns the model from which an arm starts, with the weights of `start` or random ones; `start` is not changed."""
    kind = Dream if arm.shift else UnshiftedDream
    options: dict[str, Any] = {
        "param_dtype": start.embed.embedding[...].dtype,
        "compute_dtype": start.compute_dtype,
        "attention_backend": start.attention_backend,
        "remat": start.remat,
        "tokenizer_dir": start.tokenizer_dir,
    }
    make = lambda: kind(start.config, rngs=nnx.Rngs(seed), **options)
    if arm.random:
        model: Dream = jax.jit(make)()
    else:
        model = merge_params(split_params(jax.eval_shape(make))[0], split_params(start)[1])
    model.trained_mask = arm.trained_mask
    return model


def steps_of(arm: AdaptationArm, model: Dream, width: int, batch: int, steps: int) -> int:
    """Returns the number of steps of an arm that has the FLOPs of `steps` steps with one stream, at least 1."""
    tokens = width * batch
    one = FlopCounter(model, width).step(tokens, tokens / 2)
    # An autoregressive step learns all tokens, a step of diffusion half of them on average.
    learned = tokens if arm.autoregressive else tokens / 2
    sizes = arm.sizes or (None,)
    of_arm = sum(FlopCounter(model, width, size).step(tokens, learned) for size in sizes) / len(sizes)
    return max(len(arm.sizes), 1, round(steps * one / of_arm))


def adapt(
    model: Dream,
    arm: AdaptationArm,
    rows_RT: np.ndarray,
    *,
    rate: float,
    steps: int,
    batch: int,
    seed: int,
    measure: Callable[[int, Dream], None] = lambda *_: None,
    every: int = 0,
) -> Adaptation:
    """Trains a model in the way of an arm, with AdamW and the cosine of train.py, every masked token with weight 1.

    Args:
      model: the model from `start_of`; its arrays are copied.
      arm: the way.
      rows_RT: token ids, int [rows, tokens]; the steps take them in this order, and begin again after the last one.
      rate: the highest learning rate.
      steps: number of steps.
      batch: rows of a step.
      seed: decides noise and masks.
      measure: called with the number of steps so far and the model, after every `every` steps and after the last one. The
        model must not be used after the call.
      every: number of steps between two measurements; 0 for the last one only.

    Raises:
      FloatingPointError: a loss is NaN or infinite.
    """
    mesh = sharding.make_mesh("1x1")
    graphdef, params = split_params(model)
    settings = OptimizerConfig(learning_rate=rate, total_steps=steps)
    optimizer = settings.make()
    state = init_state(params, optimizer, mesh)
    if not arm.autoregressive:
        config = StepConfig(
            global_batch=batch,
            weight=UniformWeight(),
            seed=seed,
            mask=masks.Bidirectional() if arm.sizes else masks.parse(arm.mask),
            anneal_steps=steps // 2 if arm.annealed else 0,
            block_sizes=arm.sizes,
            total_steps=steps,
        )
        step = make_train_step(graphdef, optimizer, settings.schedule(), config, mesh)
    maskable_BT = np.broadcast_to(np.arange(rows_RT.shape[1]) > 0, (batch, rows_RT.shape[1]))
    nats: list[jax.Array] = []
    seconds, begun = 0.0, time.perf_counter()
    for number in range(steps):
        chosen = np.arange(number * batch, (number + 1) * batch) % len(rows_RT)
        tokens = Batch(
            tokens_BT=rows_RT[chosen].astype(np.int32),
            maskable_BT=maskable_BT,
            row_B=np.arange(batch, dtype=np.int32),
            valid_BT=None,
        )
        if arm.autoregressive:
            state, value = autoregressive_step(graphdef, optimizer, state, put_batch(tokens, mesh))
        else:
            state, metrics = step(state, put_batch(tokens, mesh))
            value = metrics["nll"]
        nats.append(value)
        if number == 0:
            jax.block_until_ready(value)
            begun = time.perf_counter()
        if number + 1 == steps or (every and (number + 1) % every == 0):
            jax.block_until_ready(value)
            seconds += time.perf_counter() - begun
            trained = merge_params(graphdef, state.params)
            trained.trained_mask = arm.trained_mask
            measure(number + 1, trained)
            begun = time.perf_counter()
    found = [float(value) for value in jax.device_get(nats)]
    if not np.isfinite(found).all():
        raise FloatingPointError(
            f"{arm.name}, rate {rate:g}, seed {seed}: the loss of step {int(np.argmin(np.isfinite(found)))} is not finite"
        )
    return Adaptation(trained, found, seconds)


@functools.partial(jax.jit, static_argnames=("graphdef", "optimizer"), donate_argnames="state")
def autoregressive_step(
    graphdef: Any, optimizer: Any, state: TrainState, batch: Batch[jax.Array]
) -> tuple[TrainState, jax.Array]:
    """Makes one step in which every maskable token is predicted from the clean tokens before it.

    Returns:
      The new state, and the mean nats of a learned token, a float32 scalar. If they are not finite, the weights stay.
    """
    loss = lambda params: _next_token_nats(merge_params(graphdef, params), batch)[0]
    value, gradients = jax.value_and_grad(loss)(state.params)
    # optax multiplies its integer count with floats, which jax refuses under strict dtype promotion.
    with jax.numpy_dtype_promotion("standard"):
        params, opt_state = update_if(jnp.isfinite(value), optimizer, gradients, state.opt_state, state.params)
    return TrainState(params=params, opt_state=opt_state, step=state.step + 1), value


def _next_token_nats(model: Dream, batch: Batch[jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean nats of the maskable tokens, each given all tokens before it, and the values of each token."""
    tokens_BT, maskable_BT = batch.tokens_BT, batch.maskable_BT
    valid_BT = jnp.ones(tokens_BT.shape, bool) if batch.valid_BT is None else batch.valid_BT
    padding, positions_BT = mask_and_positions(tokens_BT.shape, batch.valid_BT, None)
    mask = masks.BlockDiffusion(1).for_rows(valid_BT, maskable_BT) & padding
    hidden_BTD = model.hidden(tokens_BT, mask, positions_BT)
    weight_BT = maskable_BT.astype(jnp.float32)
    return loss_of_states(model, hidden_BTD, tokens_BT, maskable_BT, weight_BT, None, shifted=False, focal=None)


_next_token_values = jax.jit(_next_token_nats)


class TokenScores(NamedTuple):
    """Sums over the masked tokens of each row.

    Attributes:
      nats_R: float64 [rows], summed cross entropies.
      right_R: int [rows], numbers of tokens whose most probable value is right.
      masked_R: int [rows], numbers of masked tokens.
    """

    nats_R: np.ndarray
    right_R: np.ndarray
    masked_R: np.ndarray

    @property
    def nats(self) -> float:
        """The mean nats of a masked token."""
        return float(self.nats_R.sum() / self.masked_R.sum())

    @property
    def accuracy(self) -> float:
        """The share of masked tokens whose most probable value is right, in [0, 1]."""
        return float(self.right_R.sum() / self.masked_R.sum())


def autoregressive_nats(model: Dream, rows_RT: np.ndarray) -> TokenScores:
    """Returns the cross entropies of all tokens but the first, each given the clean tokens before it."""
    masked_RT = np.broadcast_to(np.arange(rows_RT.shape[1]) > 0, rows_RT.shape)

    def values(tokens_BT: np.ndarray, masked_BT: np.ndarray) -> dict[str, jax.Array]:
        batch = Batch(
            tokens_BT=jnp.asarray(tokens_BT),
            maskable_BT=jnp.asarray(masked_BT),
            row_B=jnp.arange(len(tokens_BT)),
            valid_BT=None,
        )
        return _next_token_values(model, batch)[1]

    return _summed(values, rows_RT, masked_RT)


def nats_at(model: Dream, arm: AdaptationArm, rows_RT: np.ndarray, level: float, seed: int) -> TokenScores:
    """Returns the cross entropies at one noise level, under the mask of the arm.

    Args:
      model: a model from `start_of` or `adapt`.
      arm: the arm, which decides the mask. With two streams all blocks have this noise level, and clean blocks before them.
      rows_RT: token ids, int [rows, tokens]; the first token of each row is never masked.
      level: the probability with which each other token is masked.
      seed: decides which tokens are masked. A token that is masked at one level is also masked at higher levels.
    """
    uniform_RT = np.random.default_rng(seed).random(rows_RT.shape)
    masked_RT = (uniform_RT < level) & (np.arange(rows_RT.shape[1]) > 0)

    def values(tokens_BT: np.ndarray, masked_BT: np.ndarray) -> dict[str, jax.Array]:
        answer_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]) > 0, tokens_BT.shape)
        if arm.sizes:
            t_BT = np.full(tokens_BT.shape, level, np.float32)
            return block_diffusion_loss(
                model, tokens_BT, masked_BT, t_BT, UniformWeight(), size=arm.sizes[-1], answer_BT=answer_BT
            )[1]
        mask = masks.parse(arm.mask).for_rows(np.ones(tokens_BT.shape, bool), answer_BT)
        t_B = np.full(len(tokens_BT), level, np.float32)
        return masked_diffusion_loss(model, tokens_BT, masked_BT, t_B, UniformWeight(), mask=mask)[1]

    return _summed(values, rows_RT, masked_RT)


def _summed(
    values: Callable[[np.ndarray, np.ndarray], dict[str, jax.Array]], rows_RT: np.ndarray, masked_RT: np.ndarray
) -> TokenScores:
    """Calls a function for `_ROWS` rows at a time; the last rows are repeated, so that all calls have one shape."""
    number = len(rows_RT)
    order = np.minimum(np.arange(-(-number // _ROWS) * _ROWS), number - 1)
    nats: list[np.ndarray] = []
    right: list[np.ndarray] = []
    for start in range(0, len(order), _ROWS):
        chosen = order[start : start + _ROWS]
        found = values(rows_RT[chosen].astype(np.int32), masked_RT[chosen])
        nats.append(np.asarray(found["token_nll"], np.float64).sum(axis=1))
        right.append(np.asarray(found["token_correct"]).sum(axis=1))
    return TokenScores(np.concatenate(nats)[:number], np.concatenate(right)[:number], masked_RT.sum(axis=1))


def levels_of(
    model: Dream, arm: AdaptationArm, rows_RT: np.ndarray, levels: Sequence[float] = LEVELS, seed: int = 0
) -> dict[str, float]:
    """Returns the mean nats of a masked token by noise level ("0.1", ...); those of the autoregressive arm are "exact"."""
    if arm.autoregressive:
        return {"exact": autoregressive_nats(model, rows_RT).nats}
    return {f"{level:g}": nats_at(model, arm, rows_RT, level, seed).nats for level in levels}
