"""What settings stand for before there are weights: model, tokenizer, optimizer and step, on a mesh that may be absent."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dream_jax import lora, masks, sharding
from dream_jax.batch import Batch
from dream_jax.inference import find_tokenizer
from dream_jax.model import Dream, split_params
from dream_jax.objective import Focal
from dream_jax.shapes import ParamTree
from dream_jax.tokenizer import Tokenizer
from dream_jax.train_step import StepConfig, TrainState, TrainStep, abstract_state, make_train_step
from dream_jax.trainer import weights
from dream_jax.trainer.settings import TrainSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Build:
    """A step and what it was made of.

    Attributes:
      model: shapes only.
      graphdef: the static part of the model.
      optimizer: turns gradients into updates.
      step: compiled at its first call.
    """

    model: Dream
    graphdef: nnx.GraphDef[Dream]
    optimizer: optax.GradientTransformation
    step: TrainStep


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractStep:
    """A step with the shapes and shardings of its arguments: `step.lower(state, batch, frozen).compile()` compiles it.

    Attributes:
      model: shapes only.
      step: the jitted function.
      state: what is trained, and the optimizer's state.
      batch: one global batch.
      frozen: parameters that are not trained.
    """

    model: Dream
    step: TrainStep
    state: TrainState
    batch: Batch[jax.ShapeDtypeStruct]
    frozen: ParamTree


def describe_model(settings: TrainSettings, mesh: sharding.AnyMesh) -> Dream:
    """The model as shapes, for the devices of the mesh; of a hub id only the small files are fetched."""
    return weights.describe(settings, compute_dtype(settings, mesh))


def compute_dtype(settings: TrainSettings, mesh: sharding.AnyMesh) -> str:
    """The dtype that the settings ask for; "auto" depends on the devices of the mesh, whether these are present or not."""
    if settings.network.compute_dtype != "auto":
        return settings.network.compute_dtype
    return "float32" if settings.network.model == "nano" or sharding.platform_of(mesh) == "cpu" else "bfloat16"


def build_step(settings: TrainSettings, model: Dream, mesh: sharding.AnyMesh) -> Build:
    """The step of these settings for a model of `describe_model`.

    Raises:
      ValueError: a batch that the mesh cannot split evenly, or devices that cannot do what is asked of them.
    """
    graphdef = split_params(model)[0]
    optimizer = settings.optimizer_config()
    optimizer.check_devices(mesh)
    transformation = optimizer.make()
    config = StepConfig(
        global_batch=settings.batches.batch_size,
        accumulation=settings.batches.accumulation,
        weight=settings.loss.loss_weight(),
        focal=Focal() if settings.loss.focal else None,
        seed=settings.run.seed,
        mask=masks.parse(model.trained_mask),
        anneal_steps=settings.network.anneal_steps,
    )
    step = make_train_step(graphdef, transformation, optimizer.schedule(), config, mesh)
    return Build(model=model, graphdef=graphdef, optimizer=transformation, step=step)


def abstract_step(settings: TrainSettings, mesh: sharding.AnyMesh, max_length: int) -> AbstractStep:
    """The step of these settings, with the shapes and shardings of its arguments.

    Args:
      settings: of the run.
      mesh: its devices may be absent.
      max_length: tokens a row.

    Raises:
      As `build_step`; also ValueError for rows longer than the model's positions.
    """
    model = describe_model(settings, mesh)
    check_length(model, max_length)
    built = build_step(settings, model, mesh)
    batch_sharding = sharding.batch_sharding(mesh)
    params = split_params(model)[1]
    trained, base = lora.split(params) if settings.lora.adapts else (params, {})
    base = jax.tree.map(
        lambda leaf, found: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=found),
        base,
        sharding.parameter_shardings(base, mesh),
    )

    def rows(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((settings.batches.batch_size, *shape), dtype, sharding=batch_sharding)

    batch = Batch(
        tokens_BT=rows((max_length,), jnp.int32),
        maskable_BT=rows((max_length,), jnp.bool_),
        row_B=rows((), jnp.int32),
        valid_BT=rows((max_length,), jnp.bool_) if settings.batches.options().hides else None,
    )
    return AbstractStep(
        model=model,
        step=built.step,
        state=abstract_state(trained, built.optimizer, mesh),
        batch=batch,
        frozen=base,
    )


def check_length(model: Dream, max_length: int) -> None:
    """Raises ValueError for rows that are longer than the model's positions."""
    if max_length > model.config.max_position_embeddings:
        raise ValueError(f"max_length={max_length} is more than the model's {model.config.max_position_embeddings=}")


def open_tokenizer(settings: TrainSettings, model: Dream) -> Tokenizer:
    """The tokenizer that the settings name, or else the model's own.

    Raises:
      ValueError: there is none, or the model and it do not belong together.
    """
    tokenizer, config = find_tokenizer(settings.network.tokenizer, settings.network.model, model), model.config
    if tokenizer.pad_id != config.pad_token_id:
        raise ValueError(
            f"the tokenizer's padding token is {tokenizer.pad_id}, the model's {config.pad_token_id}: they do not belong "
            "together"
        )
    if tokenizer.vocab_limit > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_limit} tokens, but the model only {config.vocab_size}")
    return tokenizer
