"""A run's weights: which are trained, which are frozen, where they are read and where they are written.

Without an adapter all weights are trained. With one only the adapter is: it alone is in the state, the optimizer and the
checkpoints, and the base is read again from its own directory whenever the run is resumed.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

import jax
from jax.sharding import Mesh

from dream_jax import lora, pretrained
from dream_jax.lora import LoraConfig
from dream_jax.model import Dream, split_params
from dream_jax.quantisation import KINDS, CodeKind
from dream_jax.shapes import ParamTree
from dream_jax.trainer.settings import TrainSettings

# Makes the key of a new adapter differ from the keys of random weights and of noise, which come from the same seed.
_ADAPTER = 1 << 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen:
    """The weights that are not trained.

    Attributes:
      params: empty without an adapter.
      identity: a digest that other weights of the same shapes do not have; None without an adapter.
    """

    params: ParamTree
    identity: str | None


def describe(settings: TrainSettings, compute_dtype: str) -> Dream:
    """The model of a run in shapes: its base as it will be stored, with the adapter.

    Its `trained_mask` is the run's: that of the settings, or else of what the run begins with.

    Raises:
      As `pretrained.describe` and `pretrained.describe_adapter`; ValueError for an adapter of another model.
    """
    model = pretrained.describe(
        settings.network.model,
        _stored(settings, compute_dtype)[0],
        compute_dtype=compute_dtype,
        attention_backend=settings.network.attention,
        remat=settings.network.remat,
    )
    adapter = None if settings.lora.adapter is None else pretrained.describe_adapter(settings.lora.adapter)
    if adapter is not None:
        adapter.check_fits(model)
        model.trained_mask = adapter.mask
    if settings.network.mask is not None:
        model.trained_mask = settings.network.mask
    if not settings.lora.adapts:
        return model
    model = lora.attached_shapes(model, _adapter(settings))
    kind = _stored(settings, compute_dtype)[1]
    return model if kind is None else lora.with_base_shapes(model, kind)


def _stored(settings: TrainSettings, compute_dtype: str) -> tuple[str, CodeKind | None]:
    """The dtype in which the weights other than an adapter are stored, and the kind of codes of their kernels, if any."""
    if not settings.lora.adapts:
        return "float32", None  # master weights
    # The dtype of the computation: weights in float32 would be rounded to it in every layer anyway.
    if settings.lora.base == "auto":
        return compute_dtype, None
    for kind in KINDS:
        if settings.lora.base == kind:
            return compute_dtype, kind
    return settings.lora.base, None


def _adapter(settings: TrainSettings) -> LoraConfig:
    if settings.lora.adapter is None:
        return settings.lora.new_adapter()
    config = pretrained.describe_adapter(settings.lora.adapter).config
    if settings.lora.lora_dropout is None:
        return config
    return dataclasses.replace(config, dropout=settings.lora.lora_dropout)


def read(settings: TrainSettings, mesh: Mesh, compute_dtype: str, *, begins: bool) -> tuple[ParamTree | None, Frozen]:
    """Reads the base, and where the run begins what it begins to train.

    Args:
      settings: of the run.
      mesh: where all goes.
      compute_dtype: of the model.
      begins: false when a checkpoint holds what is trained.

    Returns:
      What is trained (None unless the run begins), and what is not.

    Raises:
      As `pretrained.load`; ValueError for an adapter that was trained on other weights.
    """
    if not settings.lora.adapts:
        frozen = Frozen(params={}, identity=None)
        return (
            split_params(pretrained.load(settings.network.model, mesh=mesh, seed=settings.run.seed))[1]
            if begins
            else None
        ), frozen
    dtype, kind = _stored(settings, compute_dtype)
    model = pretrained.load(settings.network.model, dtype, mesh, seed=settings.run.seed, base=kind)
    frozen = Frozen(params=split_params(model)[1], identity=lora.identity(model))
    if not begins:
        return None, frozen
    if settings.lora.adapter is not None:
        adapter = pretrained.describe_adapter(settings.lora.adapter)
        adapter.check_identity(lora.identity(model), "give --model those that it was trained on")
        return pretrained.adapter_params(adapter, mesh), frozen
    key = jax.random.fold_in(jax.random.key(settings.run.seed), _ADAPTER)
    return lora.split(split_params(lora.attach(model, _adapter(settings), key))[1])[0], frozen


def save(trained: Dream, settings: TrainSettings) -> dict[Literal["adapter", "model"], pathlib.Path]:
    """Writes the adapter, the model or both into the run's folder; returns their paths by kind."""
    made: dict[Literal["adapter", "model"], pathlib.Path] = {}
    if settings.lora.adapts:
        made["adapter"] = settings.run.out / "adapter"
        pretrained.save_adapter(trained, made["adapter"], overwrite=True)
    if settings.lora.merge or not settings.lora.adapts:
        made["model"] = settings.run.out / "model"
        pretrained.save(lora.merge(trained), made["model"], overwrite=True)
    return made
