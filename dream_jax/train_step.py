"""Defines the compiled training step, which computes the next state and the metrics from a state and a batch.

All random numbers are derived from (seed, step, row), or (seed, step, text) for rows that hold several texts, and every sum
is over the global batch. Therefore the mesh, the number of processes, the accumulation and the packing of texts change only
the order in which numbers are added.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from dream_jax import float8, layer_forms, masks, sharding, xla_flags
from dream_jax.batch import Batch, PairBatch
from dream_jax.block_diffusion import (
    block_diffusion_loss,
    check_weight,
    complement,
    draw_block_noise,
    draw_packed_block_noise,
)
from dream_jax.bounds import MOST_ROWS, MOST_STEPS, MOST_TOKENS, SEED, IntegerRange, check_numbers
from dream_jax.model import Dream, LayerForm, merge_params
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
)  # re-exported here, because every caller of `make_train_step` needs it
from dream_jax.optimizer import opt_state_shardings, update_if, updates_done
from dream_jax.packed_noise import draw_packed_noise
from dream_jax.shapes import ParamTree, joined

jax.tree_util.register_dataclass(Batch)
jax.tree_util.register_dataclass(PairBatch)

Metrics = dict[str, jax.Array]

# Names of the metrics that give the nll by noise level: nll_t_0_25 is the nll of rows with t in [0, 0.25).
NLL_BY_TIME = tuple(
    f"nll_t_{100 * bucket // TIME_BUCKETS}_{100 * (bucket + 1) // TIME_BUCKETS}" for bucket in range(TIME_BUCKETS)
)

# These numbers make the keys of noise, dropout and annealed masks differ from the key of random weights, which is made
# from the same seed.
_NOISE = 1 << 30
_DROPOUT = _NOISE + 1
_ANNEALING = _NOISE + 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run between two steps. The leaves may also be shapes, or shardings, instead of arrays.

    Attributes:
      params: nested dict of the master weights (float32 or bfloat16) of the trained parameters.
      opt_state: the state of the optimizer, as optax defines it.
      step: int32 scalar, the number of steps so far. A step whose update was skipped is counted, because its batch and
        its noise are used. The learning rate depends on the number of updates instead, which is in `opt_state`.
    """

    params: ParamTree
    opt_state: Any
    step: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """The settings of a training step.

    Attributes:
      global_batch: the number of rows of a batch, over all devices and processes.
      accumulation: the number of microbatches that the batch is split into; they are computed one after the other.
      weight: the weights of the masked positions in the loss.
      focal: the focal term of the loss; None for no such term.
      seed: the seed of noise levels, masked positions, dropout and annealed masks.
      mask: the attention mask that the model is trained with. It is combined with the padding of
        each batch, and a mask that depends on the prompts receives those of each batch.
      anneal_steps: in the first `anneal_steps` steps attention grows from causal to bidirectional (`masks.anneal`).
        These steps are slower, because they compute all attention scores. 0 switches this off.
      block_sizes: sizes of the blocks for training by block diffusion, in tokens. With several sizes the steps are divided
        into as many equal shares. () switches block diffusion off.
      total_steps: the number of steps that several `block_sizes` divide; later steps have the last size.
      complementary: under block diffusion each row is computed twice with complementary masked positions, so that each
        maskable token is masked exactly once. A step then computes 2 `global_batch` rows.
      layers: "stacked" runs the layers in a loop; "apart" writes them out one after the other, each with slices of the
        stacked parameters. The state has stacked layers in both cases.
      products: how the layers multiply their inputs with their weights, see `float8.products`.

    Raises:
      ValueError: a number is out of range, `layers` or `products` is unknown, `global_batch` is not a multiple of
        `accumulation`, or `anneal_steps` is combined with a mask that is not bidirectional; `block_sizes` is combined with
        `mask` or `anneal_steps` or a weight that has no meaning under block diffusion, or has several sizes without
        `total_steps`; `mask` is `BlockDiffusion`, or `complementary` is set, without `block_sizes`.
    """

    global_batch: int
    accumulation: int = 1
    weight: LossWeight = CartWeight(0.1)  # noqa: RUF009 - immutable
    focal: Focal | None = None
    seed: int = 0
    mask: masks.Mask = masks.Bidirectional()  # noqa: RUF009 - immutable
    anneal_steps: int = 0
    block_sizes: tuple[int, ...] = ()
    total_steps: int | None = None
    complementary: bool = False
    layers: LayerForm = "stacked"
    products: float8.Products = "compute"

    def __post_init__(self) -> None:
        check_numbers(
            self,
            global_batch=IntegerRange(1, MOST_ROWS),
            accumulation=IntegerRange(1, MOST_ROWS),
            seed=SEED,
            anneal_steps=IntegerRange(0),
            block_sizes=IntegerRange(1, MOST_TOKENS),
            total_steps=IntegerRange(1, MOST_STEPS),
        )
        if self.layers not in get_args(LayerForm):
            raise ValueError(f"layers={self.layers!r} is not one of {get_args(LayerForm)}")
        if self.products not in get_args(float8.Products):
            raise ValueError(f"products={self.products!r} is not one of {get_args(float8.Products)}")
        if self.anneal_steps and not isinstance(self.mask, masks.Bidirectional):
            raise ValueError(
                f"{self.anneal_steps=} leads to bidirectional attention, but {self.mask=}; choose one of them"
            )
        if self.global_batch % self.accumulation:
            raise ValueError(f"{self.global_batch=} must be a positive multiple of {self.accumulation=}")
        if self.block_sizes:
            check_weight(self.weight)
            if self.anneal_steps or not isinstance(self.mask, masks.Bidirectional):
                raise ValueError(
                    f"{self.block_sizes=} brings a mask of its own; leave out {self.mask=} and {self.anneal_steps=}"
                )
            if len(self.block_sizes) > 1 and self.total_steps is None:
                raise ValueError(f"{self.block_sizes=} divides the steps of a run; give their number as total_steps")
        elif self.complementary:
            raise ValueError("complementary=True is for block diffusion; give block_sizes, or leave it out")
        elif any(isinstance(one, masks.BlockDiffusion) for one in masks.conjuncts(self.mask)):
            raise ValueError(
                f"{self.mask=} is trained with two streams: give its size as block_sizes; for one stream take BlockCausal"
            )

    def block_size(self, step: int) -> int | None:
        """Returns the size of the blocks in step `step` (from 0); None without block diffusion."""
        if not self.block_sizes:
            return None
        number = 0 if self.total_steps is None else step * len(self.block_sizes) // self.total_steps
        return self.block_sizes[min(number, len(self.block_sizes) - 1)]


def state_shardings(abstract: TrainState, mesh: sharding.AnyMesh) -> Any:
    """Returns a TrainState that holds the NamedSharding of each array (or shape) of `abstract`.

    Moments have the sharding of their parameters, as `opt_state_shardings` describes; the step is replicated.
    """
    return dataclasses.replace(
        abstract,
        params=sharding.parameter_shardings(abstract.params, mesh),
        opt_state=opt_state_shardings(abstract.opt_state, abstract.params, mesh),
        step=sharding.replicated(mesh),
    )


def init_state(
    params: ParamTree, optimizer: optax.GradientTransformation, mesh: Mesh, *, donate: bool = False
) -> TrainState:
    """Returns the state before the first step, sharded over the mesh.

    Args:
      params: the parameters to train, on any devices.
      optimizer: the optimizer; its `init` makes the initial `opt_state`.
      mesh: the devices that will hold the state.
      donate: whether the state may reuse the memory of `params`; if true, `params` cannot be used afterwards.
    """

    def build(params: ParamTree) -> TrainState:
        return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0))

    shardings = state_shardings(jax.eval_shape(build, params), mesh)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings.params)
        # Without `out_shardings` XLA would replicate the moments on every device.
        return jax.jit(build, out_shardings=shardings, donate_argnums=0 if donate else ())(params)


def abstract_state(params: ParamTree, optimizer: optax.GradientTransformation, mesh: sharding.AnyMesh) -> TrainState:
    """Returns the state of `init_state` as `jax.ShapeDtypeStruct`s with shardings, for `RunCheckpoints.restore`."""
    shapes = jax.eval_shape(
        lambda params: TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0)), params
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, mesh),
    )


def put_batch(batch: Batch[np.ndarray], mesh: Mesh) -> Batch[jax.Array]:
    """Returns the global batch on the devices of the mesh; `batch` holds the rows that this process contributes."""
    rows_sharding = sharding.batch_sharding(mesh)
    put: Batch[jax.Array] = jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(rows_sharding, rows), batch
    )
    return put


class AnyStep(Protocol):
    """A step of any objective: `TrainStep`, or a `CompiledStep` of another objective."""

    def __call__(
        self, state: TrainState, batch: Batch[jax.Array], frozen: ParamTree | None = None
    ) -> tuple[TrainState, Metrics]:
        """Performs one step, as `TrainStep.__call__` describes it."""

    def lower(self, state: TrainState, batch: Batch[Any], frozen: ParamTree | None = None) -> Any:
        """Returns the `jax.stages.Lowered` of the step for these arguments, which are arrays, or shapes with shardings."""


class CompiledStep:
    """A function (state, batch, frozen) -> (state, metrics) as one compiled program on a mesh.

    The state is donated; the new state has the shardings of `state_shardings`, and the metrics are replicated.
    """

    def __init__(
        self,
        function: Callable[[TrainState, Batch[jax.Array], ParamTree], tuple[TrainState, Metrics]],
        mesh: sharding.AnyMesh,
        products: float8.Products = "compute",
    ):
        """Stores the function, which is compiled at the first call; `products` decides the options of the compiler."""
        self.mesh = mesh
        self._function, self._products = function, products
        self._jitted: Any = None

    def __call__(
        self, state: TrainState, batch: Batch[jax.Array], frozen: ParamTree | None = None
    ) -> tuple[TrainState, Metrics]:
        """Performs one step, as `TrainStep.__call__` describes it."""
        with jax.set_mesh(_with_devices(self.mesh)):
            after: tuple[TrainState, Metrics] = self._compiled_for(state)(state, batch, frozen or {})
            return after

    def lower(self, state: TrainState, batch: Batch[Any], frozen: ParamTree | None = None) -> Any:
        """Returns the `jax.stages.Lowered` of the step for these arguments, which are arrays, or shapes with shardings."""
        with jax.set_mesh(_with_devices(self.mesh)):
            return self._compiled_for(state).lower(state, batch, frozen or {})

    def _compiled_for(self, state: TrainState) -> Any:
        if self._jitted is None:
            self._jitted = _jitted_step(self._function, state, self.mesh, self._products)
        return self._jitted


class TrainStep:
    """A function that performs one optimizer step of a model on a mesh; it is compiled at its first call."""

    def __init__(
        self,
        graphdef: nnx.GraphDef[Dream],
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        config: StepConfig,
        mesh: sharding.AnyMesh,
    ):
        """Checks that fsdp divides the rows of a microbatch, and raises ValueError if not; see `make_train_step`."""
        shards = dict(mesh.shape)["fsdp"]
        if (config.global_batch // config.accumulation) % shards:
            raise ValueError(
                f"{config.global_batch=} in {config.accumulation=} microbatches gives "
                f"{config.global_batch // config.accumulation} rows, which fsdp={shards} does not divide; change the "
                "batch size, the accumulation or the mesh"
            )
        self.mesh = mesh
        self._function = functools.partial(_train_step, graphdef, optimizer, schedule, config, mesh)
        self._config = config
        self._jitted: dict[tuple[bool, int | None], Any] = {}

    def __call__(
        self, state: TrainState, batch: Batch[jax.Array], frozen: ParamTree | None = None
    ) -> tuple[TrainState, Metrics]:
        """Performs one step.

        Args:
          state: the state before the step; it is donated, so it cannot be used afterwards.
          batch: the global batch, as `put_batch` returns it.
          frozen: the parameters that are not trained; they are not donated. None if all are trained.

        Returns:
          The new state and the metrics, which `make_train_step` lists.
        """
        # Annealed steps are a separate program, because attention is faster under the mask of the later steps. The size of
        # the blocks is a constant of a program. The number of the step is only read if there are several programs.
        config, annealing, size = self._config, False, self._config.block_size(0)
        if config.anneal_steps or len(config.block_sizes) > 1:
            number = int(state.step)
            annealing, size = number < config.anneal_steps, config.block_size(number)
        with jax.set_mesh(_with_devices(self.mesh)):
            after: tuple[TrainState, Metrics] = self._compiled_for(state, annealing, size)(state, batch, frozen or {})
            return after

    def lower(self, state: TrainState, batch: Batch[Any], frozen: ParamTree | None = None) -> Any:
        """Returns the `jax.stages.Lowered` of the step for these arguments, which are arrays, or shapes with shardings.

        This is the program of the steps after the first `anneal_steps`, with the last of several `block_sizes`.
        """
        size = self._config.block_sizes[-1] if self._config.block_sizes else None
        with jax.set_mesh(_with_devices(self.mesh)):
            return self._compiled_for(state, False, size).lower(state, batch, frozen or {})

    def _compiled_for(self, state: TrainState, annealing: bool, size: int | None) -> Any:
        if (annealing, size) not in self._jitted:
            function = functools.partial(self._function, annealing, size)
            self._jitted[annealing, size] = _jitted_step(function, state, self.mesh, self._config.products)
        return self._jitted[annealing, size]


def _with_devices(mesh: sharding.AnyMesh) -> Mesh:
    if isinstance(mesh, AbstractMesh):
        raise ValueError(
            f"the mesh {mesh} has no devices, so the step cannot be compiled or run; pass a mesh of devices"
        )
    return mesh


def _jitted_step(function: Any, state: TrainState, mesh: sharding.AnyMesh, products: float8.Products) -> Any:
    """Returns the jitted function of a step, for states with the tree of `state`."""
    shardings = (state_shardings(state, mesh), sharding.replicated(mesh))
    options = xla_flags.compiler_options(sharding.platform_of(mesh), products)
    return jax.jit(function, donate_argnums=0, out_shardings=shardings, compiler_options=options or None)


def make_train_step(
    graphdef: nnx.GraphDef[Dream],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: StepConfig,
    mesh: sharding.AnyMesh,
) -> TrainStep:
    """Makes the training step for one model, optimizer and mesh.

    Args:
      graphdef: the model without its parameters, as `model.split_params` returns it.
      optimizer: the optax transformation from gradients to updates, as `OptimizerConfig.make` builds it.
      schedule: the learning rate of the optimizer by number of updates; it is used for the metric only.
      config: the batch size, the loss weights, the seed and the mask.
      mesh: the devices; the size of its axis fsdp must divide the number of rows of a microbatch.

    Returns:
      A function of the state, the global `Batch` and the frozen parameters (those that are not trained and therefore
      not in the state). It returns the new state and these metrics, float32 scalars: `loss`, `nll` (nats per masked
      token), `masked_accuracy` (share of masked tokens that the model predicts correctly), `num_masked` (at least 1),
      `grad_norm` (before clipping), `learning_rate`, `eos_accuracy` (accuracy at masked end-of-text tokens, padding
      included), the nll by noise level (`NLL_BY_TIME`), and `skipped`: 1 if the loss or its gradient was not finite, in
      which case parameters and optimizer stay unchanged, otherwise 0. `eos_accuracy` and the nll of a noise level are
      NaN if the batch has no such tokens.

    Raises:
      ValueError: fsdp does not divide the number of rows of a microbatch.
    """
    return TrainStep(graphdef, optimizer, schedule, config, mesh)


def _train_step(
    graphdef: nnx.GraphDef[Dream],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: StepConfig,
    mesh: sharding.AnyMesh,
    annealing: bool,
    size: int | None,
    state: TrainState,
    batch: Batch[jax.Array],
    frozen: ParamTree,
) -> tuple[TrainState, Metrics]:
    """Computes one step, as `make_train_step` describes it.

    `annealing` is true in the first `anneal_steps` steps. `size` is the size of the blocks, None without block diffusion.
    """
    tokens_BT, maskable_BT = batch.tokens_BT, batch.maskable_BT
    with jax.named_scope("noise"):
        key = noise_key(config.seed, state.step)
        packed = _packed(batch)
        if size is not None:
            # The noise levels [B, T] are those of the tokens, and both copies of a row are next to each other.
            batch, masked_BT, t_B = _block_noise(config, size, key, batch)
            tokens_BT, maskable_BT = batch.tokens_BT, batch.maskable_BT
        elif packed is None:
            t_B, masked_BT = draw_noise(key, batch.row_B, maskable_BT, config.global_batch)
        else:
            assert batch.text_BM is not None
            t_B, masked_BT = draw_packed_noise(key, packed, batch.text_BM, maskable_BT)  # t [B, M], one for each text
        masked_BT = sharding.constrain(masked_BT, "batch", None)
        # All microbatches and devices divide by the same number, so that their losses can be added.
        normalizer = jnp.maximum(jnp.sum(masked_BT, dtype=jnp.float32), 1.0)
    mask_of_rows, annealed = config.mask, None
    if size is not None:
        pass  # the loss makes the mask of two streams
    elif packed is None:
        valid_BT = jnp.ones(tokens_BT.shape, bool) if batch.valid_BT is None else batch.valid_BT
        mask_of_rows = config.mask.for_rows(valid_BT, maskable_BT)
    else:
        mask_of_rows = config.mask.for_texts(packed.positions(tokens_BT.shape[1]), maskable_BT)
    if annealing:
        share = state.step.astype(jnp.float32) / config.anneal_steps
        key = _step_key(config.seed, _ANNEALING, state.step)
        # One mask for all rows: its arrays must not be split into microbatches as those of `mask_of_rows` are.
        annealed = masks.Annealed(masks.anneal(key, share, tokens_BT.shape[1]))

    def loss(params: ParamTree, microbatch: tuple[Any, ...]) -> tuple[jax.Array, Metrics]:
        batch, masked_BT, t_B, mask_of_rows = microbatch
        model = merge_params(graphdef, joined(frozen, params))
        model = layer_forms.apart(model) if config.layers == "apart" else model
        packed = _packed(batch)
        arguments = (
            *(model, batch.tokens_BT, masked_BT, t_B, config.weight),
            batch.valid_BT if packed is None else packed,
        )
        # If no adapter has dropout, XLA removes these keys as unused.
        keys = dropout_keys(config.seed, state.step, batch.row_B)
        shared: dict[str, Any] = {"focal": config.focal, "normalizer": normalizer, "dropout_keys": keys}
        if size is None:
            mask = mask_of_rows if annealed is None else annealed
            value, aux = masked_diffusion_loss(*arguments, mask=mask, **shared)
        else:
            value, aux = block_diffusion_loss(*arguments, size=size, answer_BT=batch.maskable_BT, **shared)
        t = t_B
        if packed is not None and size is None:
            t = packed.spread(t_B, jnp.zeros((1, 1), jnp.float32), batch.tokens_BT.shape[1])
        nll_by_time, masked_by_time = sums_by_time(aux["token_nll"], masked_BT, t)
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

    def gradient(params: ParamTree, microbatch: tuple[Any, ...]) -> tuple[ParamTree, Metrics]:
        with float8.products(config.products):
            return jax.grad(loss, has_aux=True)(params, microbatch)

    whole = (batch, masked_BT, t_B, mask_of_rows)
    gradients, sums = summed_gradients(gradient, state.params, whole, config.accumulation)
    after, updated = updated_state(gradients, sums["loss"], state, optimizer, schedule, mesh)
    metrics = {
        "loss": sums["loss"],
        "nll": sums["nll_sum"] / normalizer,
        "masked_accuracy": sums["num_correct"] / normalizer,
        "num_masked": normalizer,
        "eos_accuracy": sums["ends_correct"] / sums["ends"],
        **dict(zip(NLL_BY_TIME, sums["nll_by_time"] / sums["masked_by_time"], strict=True)),
        **updated,
    }
    return after, metrics


def summed_gradients(
    gradient: Callable[[ParamTree, Any], tuple[ParamTree, Metrics]], params: ParamTree, rows: Any, accumulation: int
) -> tuple[ParamTree, Metrics]:
    """Returns the gradients and the metrics of a batch, summed over its microbatches, which are computed one by one.

    Args:
      gradient: function of the parameters and a microbatch, which returns gradients and metrics that can be added.
      params: the parameters that are trained.
      rows: a pytree whose arrays have the rows of the batch as their first axis.
      accumulation: number of microbatches; with 1 the function is called for the whole batch, without a loop.
    """
    if accumulation == 1:
        return gradient(params, rows)

    def accumulate(carry: Any, microbatch: Any) -> tuple[Any, None]:
        added = jax.tree.map(jnp.add, carry, gradient(params, microbatch))
        return added, None

    microbatches = jax.tree.map(_split_rows(accumulation), rows)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(gradient, params, jax.tree.map(lambda leaf: leaf[0], microbatches)),
    )
    summed: tuple[ParamTree, Metrics] = jax.lax.scan(accumulate, zeros, microbatches)[0]
    return summed


def updated_state(
    gradients: ParamTree,
    loss: jax.Array,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: sharding.AnyMesh,
) -> tuple[TrainState, Metrics]:
    """Returns the state after one update of the optimizer, and `grad_norm`, `learning_rate` and `skipped`.

    If the loss (float32 scalar) or the gradient is not finite, parameters and optimizer stay unchanged, and `skipped` is 1.
    """
    gradients = jax.lax.with_sharding_constraint(gradients, sharding.parameter_specs(gradients, mesh))
    # optax multiplies its integer count with floats, which jax refuses under strict dtype promotion.
    with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):
        grad_norm = optax.tree.norm(gradients)
        usable = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params, opt_state = update_if(usable, optimizer, gradients, state.opt_state, state.params)
        updates = updates_done(state.opt_state)
        learning_rate = jnp.asarray(schedule(state.step if updates is None else updates), jnp.float32)
    metrics = {
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "skipped": 1.0 - usable.astype(jnp.float32),
    }
    return TrainState(params=params, opt_state=opt_state, step=state.step + 1), metrics


def _packed(batch: Batch[jax.Array]) -> masks.Packed | None:
    """Returns the mask for a batch whose rows hold several texts; None if each row is one text."""
    return None if batch.length_BM is None else masks.Packed(batch.length_BM)


def _block_noise(
    config: StepConfig, size: int, key: jax.Array, batch: Batch[jax.Array]
) -> tuple[Batch[jax.Array], jax.Array, jax.Array]:
    """Draws the noise of a step by block diffusion.

    Returns:
      The batch, the masked positions, bool [B, T], and the noise levels of the tokens, float32 [B, T]. If the settings ask
      for complementary copies, every row of the batch is there twice, so that B is 2 `global_batch`.
    """
    packed, maskable_BT = _packed(batch), batch.maskable_BT
    if packed is None:
        t_BT, masked_BT = draw_block_noise(
            key, batch.row_B, maskable_BT, config.global_batch, size=size, valid_BT=batch.valid_BT
        )
    else:
        assert batch.text_BM is not None
        t_BT, masked_BT = draw_packed_block_noise(key, packed, batch.text_BM, maskable_BT, size=size)
    if not config.complementary:
        return batch, masked_BT, t_BT
    other_t_BT, other_masked_BT = complement(t_BT, masked_BT, maskable_BT)
    # The copy has a row number of its own, which gives it a dropout of its own.
    copy = dataclasses.replace(batch, row_B=batch.row_B + config.global_batch)
    interleaved: tuple[Batch[jax.Array], jax.Array, jax.Array] = jax.tree.map(
        _next_to_each_other, (batch, masked_BT, t_BT), (copy, other_masked_BT, other_t_BT)
    )
    return interleaved


def _next_to_each_other(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the rows of two arrays [B, ...] in one array [2 B, ...], equal rows side by side on the same device."""
    both = jnp.stack([x, y], axis=1).reshape(2 * x.shape[0], *x.shape[1:])
    return sharding.constrain(both, "batch", *[None] * (both.ndim - 1))


def noise_key(seed: int, step: int | jax.Array) -> jax.Array:
    """Returns the key of the noise levels and masked positions of step `step` (from 0), for `objective.draw_noise`."""
    return _step_key(seed, _NOISE, step)


def dropout_keys(seed: int, step: int | jax.Array, row_B: jax.Array) -> jax.Array:
    """Returns the keys [B] for an adapter's dropout in step `step` (from 0), one for each row number in `row_B`."""
    key = _step_key(seed, _DROPOUT, step)
    keys: jax.Array = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, row_B)
    return keys


def _step_key(seed: int, purpose: int, step: int | jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


def _split_rows(count: int) -> Callable[[jax.Array], jax.Array]:
    """Returns a function that splits an array [B, ...] into `count` microbatches [count, B / count, ...].

    Each microbatch takes the same number of rows from every device, so that no row moves to another device.
    """

    def split(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
        return sharding.constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return split
