"""Makes model shapes, tokenizer, optimizer and training step from the settings, without weights and without devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dream_jax import float8, lora, masks, sharding
from dream_jax.batch import Batch
from dream_jax.data import MOST_TEXTS
from dream_jax.inference import find_tokenizer
from dream_jax.layer_forms import training_form
from dream_jax.model import Dream, split_params
from dream_jax.objective import Focal
from dream_jax.posttraining import Objective, StepMaterials
from dream_jax.step_memory import AbstractStep, StepShape, mesh_sizes
from dream_jax.tokenizer import Tokenizer
from dream_jax.train_step import AnyStep, StepConfig, abstract_state
from dream_jax.trainer import weights
from dream_jax.trainer.settings import TrainSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Build:
    """A training step with the model and the optimizer that it was made from.

    Attributes:
      objective: the objective that made the step.
      materials: what the step was made from.
      step: the step, which is compiled at its first call.
    """

    objective: Objective
    materials: StepMaterials
    step: AnyStep

    @property
    def model(self) -> Dream:
        """The model with shapes (`jax.ShapeDtypeStruct`) instead of weights."""
        return self.materials.model

    @property
    def graphdef(self) -> nnx.GraphDef[Dream]:
        """The model without its parameters, for `merge_params`."""
        return self.materials.graphdef

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The transformation from gradients to updates."""
        return self.materials.optimizer


def describe_model(settings: TrainSettings, mesh: sharding.AnyMesh) -> Dream:
    """Returns the model with shapes instead of weights; of a hub id only the small files are downloaded.

    Raises as `weights.describe`.
    """
    return weights.describe(settings, compute_dtype(settings, mesh))


def compute_dtype(settings: TrainSettings, mesh: sharding.AnyMesh) -> str:
    """Returns the dtype of the computation; "auto" depends on the devices of the mesh, which need not be present."""
    if settings.network.compute_dtype != "auto":
        return settings.network.compute_dtype
    return "float32" if settings.network.model == "nano" or sharding.platform_of(mesh) == "cpu" else "bfloat16"


def build_step(settings: TrainSettings, model: Dream, mesh: sharding.AnyMesh) -> Build:
    """Makes the training step of these settings for a model from `describe_model`.

    Raises:
      ValueError: the mesh cannot divide the batch evenly, or its devices do not support the optimizer settings
        or the products.
    """
    optimizer = settings.optimizer_config()
    optimizer.check_devices(mesh)
    float8.check_devices(mesh, settings.network.products)
    config = StepConfig(
        global_batch=settings.batches.batch_size,
        accumulation=settings.batches.accumulation,
        weight=settings.loss.loss_weight(),
        focal=Focal() if settings.loss.focal else None,
        seed=settings.run.seed,
        mask=masks.Bidirectional() if settings.loss.block_sizes else masks.parse(model.trained_mask),
        anneal_steps=settings.network.anneal_steps,
        block_sizes=settings.loss.block_sizes,
        total_steps=settings.run.steps if settings.loss.block_sizes else None,
        complementary=settings.loss.complementary,
        layers=training_form(settings.network.layers),
        products=settings.network.products,
    )
    objective = settings.objective()
    materials = StepMaterials(
        model=model,
        graphdef=split_params(model)[0],
        adapts=settings.lora.adapts,
        optimizer=optimizer.make(),
        schedule=optimizer.schedule(),
        config=config,
        mesh=mesh,
    )
    return Build(objective=objective, materials=materials, step=objective.step(materials))


def abstract_step(settings: TrainSettings, mesh: sharding.AnyMesh, max_length: int) -> AbstractStep:
    """Makes the training step of these settings, with the shapes and shardings of its arguments.

    Args:
      settings: the settings of the run. `remat` "auto" is taken as "none".
      mesh: the mesh of the run; its devices need not be present.
      max_length: length of the rows in tokens.

    Raises:
      ValueError: as for `build_step` and `weights.describe`; or `max_length` exceeds the maximum length of the model.
      FileNotFoundError, ConnectionError: as for `weights.describe`.
    """
    model = describe_model(settings, mesh)
    check_length(model, max_length)
    return with_shapes(settings, build_step(settings, model, mesh), mesh, max_length)


def with_shapes(
    settings: TrainSettings,
    built: Build,
    mesh: sharding.AnyMesh,
    max_length: int,
    most_texts: int | None = None,
) -> AbstractStep:
    """Returns the step of a `Build` with the shapes and shardings of its arguments.

    Args:
      settings, mesh, max_length: as for `abstract_step`.
      built: the step and its model.
      most_texts: `Batches.most_texts` of the run, which depends on the lengths of its texts; None if it is not known, or if
        each row is one text. If it is not known, packed rows get entries for as many texts as a row can have.
    """
    batch_sharding = sharding.batch_sharding(mesh)
    params = split_params(built.model)[1]
    trained, base = lora.split(params) if settings.lora.adapts else (params, {})
    base = jax.tree.map(
        lambda leaf, found: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=found),
        base,
        sharding.parameter_shardings(base, mesh),
    )

    def rows(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((settings.batches.batch_size, *shape), dtype, sharding=batch_sharding)

    options = settings.batches.options()
    texts = MOST_TEXTS if most_texts is None else most_texts
    batch = Batch(
        tokens_BT=rows((max_length,), jnp.int32),
        maskable_BT=rows((max_length,), jnp.bool_),
        row_B=rows((), jnp.int32),
        valid_BT=rows((max_length,), jnp.bool_) if options.hides else None,
        length_BM=rows((texts,), jnp.int32) if options.pack else None,
        text_BM=rows((texts,), jnp.int32) if options.pack else None,
    )
    return AbstractStep(
        model=built.model,
        step=built.step,
        state=abstract_state(trained, built.optimizer, mesh),
        batch=built.objective.batch_shapes(batch),
        frozen=base,
    )


def step_shape(
    settings: TrainSettings, mesh: sharding.AnyMesh, max_length: int, masked_share: float = 0.5
) -> StepShape:
    """Returns the sizes of a step of these settings; `remat` "auto" is taken as "none".

    Args:
      settings: the settings of the run.
      mesh: the mesh of the run.
      max_length: length of the rows in tokens.
      masked_share: expected number of masked positions / all positions; 0.5 is an upper bound.
    """
    sizes = settings.loss.block_sizes
    return StepShape(
        batch=settings.batches.batch_size * rows_of_each(settings),
        accumulation=settings.batches.accumulation * settings.objective().microbatches,
        length=max_length,
        mesh=mesh_sizes(mesh),
        remat=weights.remat_of(settings),
        masked_share=masked_share,
        block=sizes[-1] if sizes else None,
        forward=settings.objective().forward_rows / settings.objective().computed_rows,
    )


def rows_of_each(settings: TrainSettings) -> int:
    """Returns the number of rows that a step computes forward and backward for each row of the batch size."""
    # Complementary copies are rows too.
    return settings.objective().computed_rows * (2 if settings.loss.complementary else 1)


def check_length(model: Dream, max_length: int) -> None:
    """Raises ValueError if `max_length` is larger than the maximum length of the model."""
    if max_length > model.config.max_position_embeddings:
        raise ValueError(f"max_length={max_length} is more than the model's {model.config.max_position_embeddings=}")


def open_tokenizer(settings: TrainSettings, model: Dream) -> Tokenizer:
    """Returns the tokenizer that the settings name, or otherwise the tokenizer of the model.

    Raises:
      ValueError: there is no tokenizer, its padding token is not the model's, or it has more tokens than the model.
    """
    tokenizer, config = find_tokenizer(settings.network.tokenizer, settings.network.model, model), model.config
    if tokenizer.pad_id != config.pad_token_id:
        raise ValueError(
            f"the padding token is {tokenizer.pad_id} in the tokenizer but {config.pad_token_id} in the model: pass "
            "the tokenizer of this model with --tokenizer"
        )
    if tokenizer.vocab_limit > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_limit} tokens, but the model only {config.vocab_size}: pass the "
            "tokenizer of this model with --tokenizer"
        )
    return tokenizer
