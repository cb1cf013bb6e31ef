"""One training step, compiled: state and batch in, state and metrics out.

Knows the objective, the optimizer and where arrays live. Knows nothing of files, logs or where batches come from.
Randomness comes from (seed, step, row) alone, and every sum is over the global batch: the mesh, the number of processes
and the accumulation change nothing but the order of additions.
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
from dream_jax.optimizer import OptimizerConfig as OptimizerConfig  # whoever makes a step makes one
from dream_jax.optimizer import opt_state_shardings, update_if, updates_done
from dream_jax.shapes import ParamTree, joined

jax.tree_util.register_dataclass(Batch)

Metrics = dict[str, jax.Array]

# Names of the losses by noise level: nll_t_0_25 is of rows with t in [0, 0.25).
NLL_BY_TIME = tuple(
    f"nll_t_{100 * bucket // TIME_BUCKETS}_{100 * (bucket + 1) // TIME_BUCKETS}" for bucket in range(TIME_BUCKETS)
)

# Keep the keys of noise, dropout and masks apart from those of random weights, which come from the same seed.
_NOISE = 1 << 30
_DROPOUT = _NOISE + 1
_ANNEALING = _NOISE + 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step; also in the form of shapes, or of shardings.

    Attributes:
      params: the master weights of what is trained, a nested dict of arrays.
      opt_state: the optimizer's.
      step: int32 scalar, the steps done; those whose update was skipped count, for their batch and noise are spent. The
        schedule of the learning rate counts updates, in the optimizer's state.
    """

    params: ParamTree
    opt_state: Any
    step: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What one step computes.

    Attributes:
      global_batch: rows over all devices and processes.
      accumulation: parts that the batch is computed in, one after the other.
      weight: of the loss.
      focal: optional focal term.
      seed: of times and masks.
      mask: who may attend to whom, beside what the batch hides; the rows' beginnings and prompts are those of each batch.
      anneal_steps: of the first steps, under attention that grows from causal to bidirectional (`masks.anneal`); such a
        step forms all attention scores.
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
    """A TrainState of shardings: moments lie beside their parameters, the rest everywhere."""
    return dataclasses.replace(
        abstract,
        params=sharding.parameter_shardings(abstract.params, mesh),
        opt_state=opt_state_shardings(abstract.opt_state, abstract.params, mesh),
        step=sharding.replicated(mesh),
    )


def init_state(
    params: ParamTree, optimizer: optax.GradientTransformation, mesh: Mesh, *, donate: bool = False
) -> TrainState:
    """The state before the first step, laid out over the mesh.

    Args:
      params: may lie anywhere.
      optimizer: whose state it is.
      mesh: where the state goes.
      donate: gives the parameters' memory to the state; they cannot be used afterwards.
    """

    def build(params: ParamTree) -> TrainState:
        return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0))

    places = state_shardings(jax.eval_shape(build, params), mesh)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, places.params)
        # Under automatic sharding a jitted `init` would leave the moments whole on every device.
        return jax.jit(build, out_shardings=places, donate_argnums=0 if donate else ())(params)


def abstract_state(params: ParamTree, optimizer: optax.GradientTransformation, mesh: sharding.AnyMesh) -> TrainState:
    """Shapes, dtypes and shardings of the state of `init_state`, for restoring into."""
    shapes = jax.eval_shape(
        lambda params: TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0)), params
    )
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        state_shardings(shapes, mesh),
    )


def put_batch(batch: Batch[np.ndarray], mesh: Mesh) -> Batch[jax.Array]:
    """The global batch on the devices of the mesh, of which `batch` holds the rows of this process."""
    rows_sharding = sharding.batch_sharding(mesh)
    put: Batch[jax.Array] = jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(rows_sharding, rows), batch
    )
    return put


class TrainStep:
    """One optimizer step of a model on a mesh; compiled at its first call."""

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
                f"{config.global_batch=} in {config.accumulation=} parts gives "
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
        """The state after the step, and its metrics; the state is donated, `frozen` is not."""
        # Two programs: once the mask is bidirectional, attention need not form all scores any more.
        annealing = self._anneal_steps > 0 and int(state.step) < self._anneal_steps
        with jax.set_mesh(self._devices()):
            found: tuple[TrainState, Metrics] = self._compiled_for(state, annealing)(state, batch, frozen or {})
            return found

    def lower(self, state: TrainState, batch: Batch[Any], frozen: ParamTree | None = None) -> Any:
        """The `jax.stages.Lowered` of the step for such arguments: arrays, or shapes that carry their shardings.

        Of the step under the mask itself, which all but the first `anneal_steps` are.
        """
        with jax.set_mesh(self._devices()):
            return self._compiled_for(state).lower(state, batch, frozen or {})

    def _devices(self) -> Mesh:
        if isinstance(self.mesh, AbstractMesh):
            raise ValueError(f"a step over sizes without devices ({self.mesh}) can be described, not compiled or run")
        return self.mesh

    def _compiled_for(self, state: TrainState, annealing: bool = False) -> Any:
        if annealing not in self._jitted:
            places = (state_shardings(state, self.mesh), sharding.replicated(self.mesh))
            function = functools.partial(self._function, annealing)
            self._jitted[annealing] = jax.jit(function, donate_argnums=0, out_shardings=places)
        return self._jitted[annealing]


def make_train_step(
    graphdef: nnx.GraphDef[Dream],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: StepConfig,
    mesh: sharding.AnyMesh,
) -> TrainStep:
    """The step for one model, optimizer and mesh.

    Args:
      graphdef: the model without its parameters.
      optimizer: what turns gradients into updates.
      schedule: its learning rate, for reporting.
      config: batch, weights and seed.
      mesh: fsdp must divide the rows of each accumulated part.

    Returns:
      A function of the state, the global `Batch` and the parameters that the state leaves out, because they are not
      trained, to the new state and scalar metrics: `loss`, `nll` (nats per masked token), `masked_accuracy`,
      `num_masked`, `grad_norm` (before clipping), `learning_rate`, `eos_accuracy` (at masked end-of-text, which is also
      padding), the nll by noise level (`NLL_BY_TIME`), and `skipped`: 1 where the loss or its gradient was infinite or
      no number, in which case parameters and optimizer are as they were, else 0. What there was nothing of is NaN.

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
        # One denominator for the whole batch: parts of it, wherever they are computed, simply add up.
        normalizer = jnp.maximum(jnp.sum(masked_BT, dtype=jnp.float32), 1.0)
    valid_BT = jnp.ones(tokens_BT.shape, bool) if batch.valid_BT is None else batch.valid_BT
    placed = config.mask.for_rows(valid_BT, maskable_BT)
    drawn = None
    if annealing:
        share = state.step.astype(jnp.float32) / config.anneal_steps
        key = _step_key(config.seed, _ANNEALING, state.step)
        drawn = masks.Annealed(masks.anneal(key, share, tokens_BT.shape[1]))  # the same for all rows

    def loss(params: ParamTree, part: tuple[Any, ...]) -> tuple[jax.Array, Metrics]:
        batch, masked_BT, t_B, placed = part
        model = merge_params(graphdef, joined(frozen, params))
        value, aux = masked_diffusion_loss(
            model,
            batch.tokens_BT,
            masked_BT,
            t_B,
            config.weight,
            batch.valid_BT,
            mask=placed if drawn is None else drawn,
            focal=config.focal,
            normalizer=normalizer,
            # Unused, and so not computed, without an adapter that drops something.
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
    whole = (batch, masked_BT, t_B, placed)
    if config.accumulation == 1:
        gradients, sums = gradient(state.params, whole)
    else:

        def accumulate(carry: Any, part: tuple[Any, ...]) -> tuple[Any, None]:
            added = jax.tree.map(jnp.add, carry, gradient(state.params, part))
            return added, None

        parts = jax.tree.map(_split_rows(config.accumulation), whole)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient, state.params, jax.tree.map(lambda leaf: leaf[0], parts)),
        )
        (gradients, sums), _ = jax.lax.scan(accumulate, zeros, parts)

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
    """The key that the times and masks of one step (from 0) are drawn from, for `objective.draw_noise`."""
    return _step_key(seed, _NOISE, step)


def dropout_keys(seed: int, step: int | jax.Array, row_B: jax.Array) -> jax.Array:
    """The keys, one a row of the global batch, that an adapter's dropout draws from in one step (from 0)."""
    key = _step_key(seed, _DROPOUT, step)
    keys: jax.Array = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_B)
    return keys


def _step_key(seed: int, purpose: int, step: int | jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


def _split_rows(parts: int) -> Callable[[jax.Array], jax.Array]:
    """[B, ...] -> [parts, B / parts, ...] such that each part takes an equal share of every device's rows."""

    def split(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
        return sharding.constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return split
