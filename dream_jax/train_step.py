"""One training step, compiled: state and batch in, state and metrics out.

Knows the objective, the optimizer and where arrays live. Knows nothing of files, logs or where batches come from.
Randomness comes from (seed, step, row) alone, and every sum is over the global batch: the mesh, the number of processes
and the accumulation change nothing but the order of additions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from dream_jax import sharding
from dream_jax.model import Dream, merge_params
from dream_jax.objective import CartWeight, Focal, LossWeight, draw_noise, masked_diffusion_loss
from dream_jax.shapes import ParamTree

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]

# Keeps the keys of the noise apart from those of random weights, which come from the same seed.
_NOISE = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to zero, after clipping the global norm.

    Defaults are Dream's published SFT recipe, except the learning rate and the length of the run, which have none.

    Attributes:
      learning_rate: at the end of the warm-up.
      total_steps: length of the schedule, warm-up included.
      warmup_share: of total_steps, in [0, 1).
      b1, b2, eps: of Adam.
      weight_decay: on matrices and the embedding table; norms and biases are left alone.
      clip_norm: largest global norm of the gradient; None to switch off.
    """

    learning_rate: float
    total_steps: int
    warmup_share: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"{self.learning_rate=} must be positive")
        if self.total_steps < 1:
            raise ValueError(f"{self.total_steps=} must be at least 1")
        if not 0.0 <= self.warmup_share < 1.0:
            raise ValueError(f"{self.warmup_share=} is outside [0, 1)")
        for name in ("b1", "b2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1)")
        if self.weight_decay < 0:
            raise ValueError(f"{self.weight_decay=} must not be negative")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"{self.clip_norm=} must be positive; pass None to switch it off")

    def schedule(self) -> optax.Schedule:
        """Learning rate of each step. The first step already moves: warm-up starts at one share of the peak, not 0."""
        warmup = round(self.warmup_share * self.total_steps)
        return optax.warmup_cosine_decay_schedule(
            init_value=self.learning_rate / (warmup + 1),
            peak_value=self.learning_rate,
            warmup_steps=warmup,
            decay_steps=max(self.total_steps, warmup + 1),
        )

    def make(self) -> optax.GradientTransformation:
        """The optax transformation for a parameter tree."""
        adamw = optax.adamw(
            self.schedule(),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            mask=_decayed,
        )
        return adamw if self.clip_norm is None else optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)


def _decayed(params: ParamTree) -> ParamTree:
    # By name, not by rank: stacked over layers, norm scales and biases have two and more axes.
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run carries from step to step; also in the form of shapes, or of shardings.

    Attributes:
      params: the master weights, a nested dict of arrays.
      opt_state: the optimizer's.
      step: int32 scalar, the steps done.
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
    """

    global_batch: int
    accumulation: int = 1
    weight: LossWeight = CartWeight(0.1)  # noqa: RUF009 - immutable
    focal: Focal | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.accumulation < 1 or self.global_batch % self.accumulation:
            raise ValueError(f"{self.global_batch=} must be a positive multiple of {self.accumulation=}")


def state_shardings(abstract: TrainState, mesh: Mesh) -> Any:
    """A TrainState of shardings: moments lie beside their parameters, the rest everywhere."""
    everywhere = sharding.replicated(mesh)
    params = sharding.parameter_shardings(abstract.params, mesh)
    # Matched by path and shape, so that a moment which is not shaped like its parameter is not split like it.
    places = {
        (_names(path), leaf.shape): place
        for (path, leaf), place in zip(
            jax.tree_util.tree_leaves_with_path(abstract.params), jax.tree.leaves(params), strict=True
        )
    }

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        names = _names(path)
        for start in range(len(names)):
            if (names[start:], leaf.shape) in places:
                return places[names[start:], leaf.shape]
        return everywhere

    opt_state = jax.tree_util.tree_map_with_path(place, abstract.opt_state)
    return dataclasses.replace(abstract, params=params, opt_state=opt_state, step=everywhere)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


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


def abstract_state(params: ParamTree, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state of `init_state`, for restoring into."""
    shapes = jax.eval_shape(
        lambda params: TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0)), params
    )
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        state_shardings(shapes, mesh),
    )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, as the arrays of the global batch."""
    place = sharding.batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(place, rows) for name, rows in batch.items()}


def make_train_step(
    graphdef: nnx.GraphDef[Dream],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: StepConfig,
    mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compiles the step for one model, optimizer and mesh; the state is donated.

    Args:
      graphdef: the model without its parameters.
      optimizer: what turns gradients into updates.
      schedule: its learning rate, for reporting.
      config: batch, weights and seed.
      mesh: fsdp must divide the rows of each accumulated part.

    Returns:
      A function of the state and a batch (`tokens` int32 [B, T], `maskable` bool [B, T], `row` int32 [B]: the index of
      each row within the global batch) to the new state and scalar metrics: `loss`, `nll` (nats per masked token),
      `masked_accuracy`, `num_masked`, `grad_norm` (before clipping), `learning_rate`.

    Raises:
      ValueError: a batch that the mesh cannot split evenly.
    """
    shards = dict(mesh.shape)["fsdp"]
    if (config.global_batch // config.accumulation) % shards:
        raise ValueError(
            f"{config.global_batch=} in {config.accumulation=} parts gives {config.global_batch // config.accumulation} "
            f"rows, which fsdp={shards} does not divide; change the batch size, the accumulation or the mesh"
        )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        tokens_BT, maskable_BT, row_B = batch["tokens"], batch["maskable"], batch["row"]
        with jax.named_scope("noise"):
            key = noise_key(config.seed, state.step)
            t_B, masked_BT = draw_noise(key, row_B, maskable_BT, config.global_batch)
            masked_BT = sharding.constrain(masked_BT, "batch", None)
            # One denominator for the whole batch: parts of it, wherever they are computed, simply add up.
            normalizer = jnp.maximum(jnp.sum(masked_BT, dtype=jnp.float32), 1.0)

        def loss(params: ParamTree, part: tuple[jax.Array, ...]) -> tuple[jax.Array, Metrics]:
            tokens_BT, masked_BT, t_B = part
            value, aux = masked_diffusion_loss(
                merge_params(graphdef, params),
                tokens_BT,
                masked_BT,
                t_B,
                config.weight,
                focal=config.focal,
                normalizer=normalizer,
            )
            nll_sum = aux["nll"] * jnp.maximum(aux["num_masked"], 1.0)
            return value, {"loss": value, "nll_sum": nll_sum, "num_correct": aux["num_correct"]}

        gradient = jax.grad(loss, has_aux=True)
        whole = (tokens_BT, masked_BT, t_B)
        if config.accumulation == 1:
            gradients, sums = gradient(state.params, whole)
        else:

            def accumulate(carry: Any, part: tuple[jax.Array, ...]) -> tuple[Any, None]:
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
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        metrics = {
            "loss": sums["loss"],
            "nll": sums["nll_sum"] / normalizer,
            "masked_accuracy": sums["num_correct"] / normalizer,
            "num_masked": normalizer,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": learning_rate,
        }
        return TrainState(params=params, opt_state=opt_state, step=state.step + 1), metrics

    jitted: Callable[[TrainState, Batch], tuple[TrainState, Metrics]] | None = None

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        nonlocal jitted
        with jax.set_mesh(mesh):
            if jitted is None:
                places = state_shardings(state, mesh)
                jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh)))
            return jitted(state, batch)

    return run


def noise_key(seed: int, step: int | jax.Array) -> jax.Array:
    """The key that the times and masks of one step (from 0) are drawn from, for `objective.draw_noise`."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _NOISE), step)


def _split_rows(parts: int) -> Callable[[jax.Array], jax.Array]:
    """[B, ...] -> [parts, B / parts, ...] such that each part takes an equal share of every device's rows."""

    def split(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
        return sharding.constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return split
