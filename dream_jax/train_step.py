"""The compiled training step: from state and batch to the next state and metrics.

All randomness is derived from (seed, step, row), and every sum is over the global batch. The mesh, the number of processes
and the accumulation therefore change only the order of additions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from dream_jax import masks, sharding
from dream_jax.batch import Batch
from dream_jax.model import Dream, merge_params
from dream_jax.objective import (
    TIME_BUCKETS,
    CartWeight,
    Focal,
    LossWeight,
    draw_noise,
    masked_diffusion_loss,
    sums_by_time,
)
from dream_jax.optimizer import (
    OptimizerConfig as OptimizerConfig,
)  # re-exported: every caller that makes a step needs one
from dream_jax.optimizer import opt_state_shardings, update_if, updates_done
from dream_jax.shapes import ParamTree, joined

jax.tree_util.register_dataclass(Batch)

Metrics = dict[str, jax.Array]

# Names of the losses by noise level: nll_t_0_25 is that of rows with t in [0, 0.25).
NLL_BY_TIME = tuple(
    f"nll_t_{100 * bucket // TIME_BUCKETS}_{100 * (bucket + 1) // TIME_BUCKETS}" for bucket in range(TIME_BUCKETS)
)

# Separate the keys of noise, dropout and masks from those of random weights, which use the same seed.
_NOISE = 1 << 30
_DROPOUT = _NOISE + 1
_ANNEALING = _NOISE + 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run between steps; also used as a tree of shapes or of shardings.

    Attributes:
      params: the master weights of the trained parameters, a nested dict of arrays.
      opt_state: the state of the optimizer.
      step: int32 scalar, the number of steps so far. Steps whose update was skipped count, because their batch and noise
        are used up. The schedule of the learning rate counts updates instead, in the optimizer's state.
    """

    params: ParamTree
    opt_state: Any
    step: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """The settings of a training step.

    Attributes:
      global_batch: the number of rows over all devices and processes.
      accumulation: the number of microbatches that the batch is split into; they are computed one after the other.
      weight: the weight of the loss by noise level.
      focal: an optional focal term.
      seed: of noise levels and masks.
      mask: the attention mask, in addition to the padding of the batch; it is applied to the prompts of each batch.
      anneal_steps: the number of first steps in which attention grows from causal to bidirectional (`masks.anneal`). Such
        a step computes all attention scores.
    """

    global_batch: int
    accumulation: int = 1
    weight: LossWeight = CartWeight(0.1)  # noqa: RUF009 - immutable
    focal: Focal | None = None
    seed: int = 0
    mask: masks.Mask = masks.Bidirectional()  # noqa: RUF009 - immutable
    anneal_steps: int = 0

    def __post_init__(self) -> None:
        if self.anneal_steps < 0:
            raise ValueError(f"{self.anneal_steps=} must not be negative")
        if self.anneal_steps and not isinstance(self.mask, masks.Bidirectional):
            raise ValueError(f"{self.anneal_steps=} leads to bidirectional attention, not to {self.mask}; choose one")
        if self.global_batch < 1 or self.accumulation < 1 or self.global_batch % self.accumulation:
            raise ValueError(f"{self.global_batch=} must be a positive multiple of {self.accumulation=}")


def state_shardings(abstract: TrainState, mesh: sharding.AnyMesh) -> Any:
    """A TrainState of shardings: moments are sharded like their parameters, the rest is replicated."""
    return dataclasses.replace(
        abstract,
        params=sharding.parameter_shardings(abstract.params, mesh),
        opt_state=opt_state_shardings(abstract.opt_state, abstract.params, mesh),
        step=sharding.replicated(mesh),
    )


def init_state(
    params: ParamTree, optimizer: optax.GradientTransformation, mesh: Mesh, *, donate: bool = False
) -> TrainState:
    """The state before the first step, sharded over the mesh.

    Args:
      params: the parameters, on any devices.
      optimizer: the optimizer, whose state is initialised.
      mesh: the devices of the state.
      donate: whether the state takes over the memory of the parameters; they cannot be used afterwards.
    """

    def build(params: ParamTree) -> TrainState:
        return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0))

    shardings = state_shardings(jax.eval_shape(build, params), mesh)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings.params)
        # Under automatic sharding a jitted `init` would replicate the moments.
        return jax.jit(build, out_shardings=shardings, donate_argnums=0 if donate else ())(params)


def abstract_state(params: ParamTree, optimizer: optax.GradientTransformation, mesh: sharding.AnyMesh) -> TrainState:
    """Shapes, dtypes and shardings of the state of `init_state`, for restoring into."""
    shapes = jax.eval_shape(
        lambda params: TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0)), params
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, mesh),
    )


def put_batch(batch: Batch[np.ndarray], mesh: Mesh) -> Batch[jax.Array]:
    """Puts the global batch on the devices of the mesh; `batch` holds the rows of this process."""
    rows_sharding = sharding.batch_sharding(mesh)
    put: Batch[jax.Array] = jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(rows_sharding, rows), batch
    )
    return put


class TrainStep:
    """One optimizer step of a model on a mesh; it is compiled at its first call."""

    def __init__(
        self,
        graphdef: nnx.GraphDef[Dream],
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        config: StepConfig,
        mesh: sharding.AnyMesh,
    ):
        """See `make_train_step`."""
        shards = dict(mesh.shape)["fsdp"]
        if (config.global_batch // config.accumulation) % shards:
            raise ValueError(
                f"{config.global_batch=} in {config.accumulation=} microbatches gives "
                f"{config.global_batch // config.accumulation} rows, which fsdp={shards} does not divide; change the "
                "batch size, the accumulation or the mesh"
            )
        self.mesh = mesh
        self._function = functools.partial(_train_step, graphdef, optimizer, schedule, config, mesh)
        self._anneal_steps = config.anneal_steps
        self._jitted: dict[bool, Any] = {}

    def __call__(
        self, state: TrainState, batch: Batch[jax.Array], frozen: ParamTree | None = None
    ) -> tuple[TrainState, Metrics]:
        """Runs the step: returns the new state and the metrics. The old state is donated, `frozen` is not."""
        # There are two programs: once the mask is bidirectional, attention need not compute all scores any more.
        annealing = self._anneal_steps > 0 and int(state.step) < self._anneal_steps
        with jax.set_mesh(self._devices()):
            found: tuple[TrainState, Metrics] = self._compiled_for(state, annealing)(state, batch, frozen or {})
            return found

    def lower(self, state: TrainState, batch: Batch[Any], frozen: ParamTree | None = None) -> Any:
        """The `jax.stages.Lowered` of the step for these arguments: arrays, or shapes with shardings.

        It is the step after the first `anneal_steps`, with the configured mask.
        """
        with jax.set_mesh(self._devices()):
            return self._compiled_for(state).lower(state, batch, frozen or {})

    def _devices(self) -> Mesh:
        if isinstance(self.mesh, AbstractMesh):
            raise ValueError(
                f"a mesh without devices ({self.mesh}) is enough to describe a step, not to compile or run it"
            )
        return self.mesh

    def _compiled_for(self, state: TrainState, annealing: bool = False) -> Any:
        if annealing not in self._jitted:
            shardings = (state_shardings(state, self.mesh), sharding.replicated(self.mesh))
            function = functools.partial(self._function, annealing)
            self._jitted[annealing] = jax.jit(function, donate_argnums=0, out_shardings=shardings)
        return self._jitted[annealing]


def make_train_step(
    graphdef: nnx.GraphDef[Dream],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: StepConfig,
    mesh: sharding.AnyMesh,
) -> TrainStep:
    """Makes the training step for one model, optimizer and mesh.

    Args:
      graphdef: the model without its parameters.
      optimizer: the transformation from gradients to updates.
      schedule: the learning rate of the optimizer, which is reported.
      config: batch size, loss weights, seed and mask.
      mesh: its fsdp size must divide the rows of each microbatch.

    Returns:
      A function of the state, the global `Batch` and the frozen parameters (those that are not trained and so not in the
      state). It returns the new state and scalar metrics: `loss`, `nll` (nats per masked token), `masked_accuracy`,
      `num_masked`, `grad_norm` (before clipping), `learning_rate`, `eos_accuracy` (at masked end-of-text, which is also
      padding), the nll by noise level (`NLL_BY_TIME`), and `skipped`: 1 if the loss or its gradient was not finite, in
      which case parameters and optimizer stay unchanged, otherwise 0. A mean over no tokens is NaN.

    Raises:
      ValueError: a batch that the mesh cannot split evenly.
    """
    return TrainStep(graphdef, optimizer, schedule, config, mesh)


def _train_step(
    graphdef: nnx.GraphDef[Dream],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: StepConfig,
    mesh: sharding.AnyMesh,
    annealing: bool,
    state: TrainState,
    batch: Batch[jax.Array],
    frozen: ParamTree,
) -> tuple[TrainState, Metrics]:
    tokens_BT, maskable_BT = batch.tokens_BT, batch.maskable_BT
    with jax.named_scope("noise"):
        key = noise_key(config.seed, state.step)
        t_B, masked_BT = draw_noise(key, batch.row_B, maskable_BT, config.global_batch)
        masked_BT = sharding.constrain(masked_BT, "batch", None)
        # One denominator for the whole batch, so that the losses of microbatches and devices can simply be added.
        normalizer = jnp.maximum(jnp.sum(masked_BT, dtype=jnp.float32), 1.0)
    valid_BT = jnp.ones(tokens_BT.shape, bool) if batch.valid_BT is None else batch.valid_BT
    mask = config.mask.for_rows(valid_BT, maskable_BT)
    if annealing:
        share = state.step.astype(jnp.float32) / config.anneal_steps
        key = _step_key(config.seed, _ANNEALING, state.step)
        mask = masks.Annealed(masks.anneal(key, share, tokens_BT.shape[1]))  # the same for all rows

    def loss(params: ParamTree, microbatch: tuple[Any, ...]) -> tuple[jax.Array, Metrics]:
        batch, masked_BT, t_B, mask = microbatch
        model = merge_params(graphdef, joined(frozen, params))
        value, aux = masked_diffusion_loss(
            model,
            batch.tokens_BT,
            masked_BT,
            t_B,
            config.weight,
            batch.valid_BT,
            mask=mask,
            focal=config.focal,
            normalizer=normalizer,
            # Without an adapter that has dropout these are not used, and therefore not computed.
            dropout_keys=dropout_keys(config.seed, state.step, batch.row_B),
        )
        nll_by_time, masked_by_time = sums_by_time(aux["token_nll"], masked_BT, t_B)
        ends_BT = masked_BT & (batch.tokens_BT == model.config.pad_token_id)
        return value, {
            "loss": value,
            "nll_sum": aux["nll"] * jnp.maximum(aux["num_masked"], 1.0),
            "num_correct": aux["num_correct"],
            "nll_by_time": nll_by_time,
            "masked_by_time": masked_by_time,
            "ends": jnp.sum(ends_BT, dtype=jnp.float32),
            "ends_correct": jnp.sum(ends_BT & aux["token_correct"], dtype=jnp.float32),
        }

    gradient = jax.grad(loss, has_aux=True)
    whole = (batch, masked_BT, t_B, mask)
    if config.accumulation == 1:
        gradients, sums = gradient(state.params, whole)
    else:

        def accumulate(carry: Any, microbatch: tuple[Any, ...]) -> tuple[Any, None]:
            added = jax.tree.map(jnp.add, carry, gradient(state.params, microbatch))
            return added, None

        microbatches = jax.tree.map(_split_rows(config.accumulation), whole)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient, state.params, jax.tree.map(lambda leaf: leaf[0], microbatches)),
        )
        (gradients, sums), _ = jax.lax.scan(accumulate, zeros, microbatches)

    gradients = jax.lax.with_sharding_constraint(gradients, sharding.parameter_specs(gradients, mesh))
    # optax mixes its integer step count with floats, which strict promotion would refuse.
    with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):
        grad_norm = optax.tree.norm(gradients)
        usable = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)
        params, opt_state = update_if(usable, optimizer, gradients, state.opt_state, state.params)
        updates = updates_done(state.opt_state)
        learning_rate = jnp.asarray(schedule(state.step if updates is None else updates), jnp.float32)
    metrics = {
        "loss": sums["loss"],
        "nll": sums["nll_sum"] / normalizer,
        "masked_accuracy": sums["num_correct"] / normalizer,
        "num_masked": normalizer,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "eos_accuracy": sums["ends_correct"] / sums["ends"],
        **dict(zip(NLL_BY_TIME, sums["nll_by_time"] / sums["masked_by_time"], strict=True)),
        "skipped": 1.0 - usable.astype(jnp.float32),
    }
    return TrainState(params=params, opt_state=opt_state, step=state.step + 1), metrics


def noise_key(seed: int, step: int | jax.Array) -> jax.Array:
    """The key for the noise levels and masked positions of one step (from 0), for `objective.draw_noise`."""
    return _step_key(seed, _NOISE, step)


def dropout_keys(seed: int, step: int | jax.Array, row_B: jax.Array) -> jax.Array:
    """The keys for the dropout of an adapter in one step (from 0), one per row of the global batch."""
    key = _step_key(seed, _DROPOUT, step)
    keys: jax.Array = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_B)
    return keys


def _step_key(seed: int, purpose: int, step: int | jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


def _split_rows(count: int) -> Callable[[jax.Array], jax.Array]:
    """[B, ...] -> [count, B / count, ...], where each microbatch takes an equal share of the rows of every device."""

    def split(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
        return sharding.constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return split
