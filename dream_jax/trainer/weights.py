"""The weights of a run: which are trained and which are frozen, reading them, and writing the result.

Without an adapter all weights are trained. With an adapter only the adapter is trained: state, optimizer and
checkpoints contain nothing else, and the frozen base is read again from its own directory whenever the run is resumed.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

import jax
from jax.sharding import Mesh

from dream_jax import lora, masks, pretrained
from dream_jax.lora import LoraConfig
from dream_jax.model import Dream, split_params
from dream_jax.quantisation import KINDS, CodeKind
from dream_jax.remat import Remat
from dream_jax.shapes import ParamTree
from dream_jax.trainer.settings import TrainSettings

# Folded into the key, so that a new adapter has other random numbers than weights and noise, which use the same seed.
_ADAPTER = 1 << 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen:
    """The weights that are not trained.

    Attributes:
      params: the frozen parameters; empty without an adapter.
      identity: a digest of their values (`lora.identity`), to recognise the same weights; None without an adapter.
    """

    params: ParamTree
    identity: str | None


def describe(settings: TrainSettings, compute_dtype: str) -> Dream:
    """Returns the model of a run with shapes instead of weights, with its adapter if there is one.

    Its `trained_mask` is the mask of the settings (under block diffusion that of the last size of blocks), or else that of
    the adapter or model that the run begins with. Its `remat` is that of `remat_of`.

    Raises:
      ValueError: `config.json` or the adapter is damaged, the adapter does not fit the model, or the model was trained by
        block diffusion and the settings name neither blocks nor a mask.
      FileNotFoundError: the model or the adapter does not exist.
      ConnectionError: the hub id is not in the cache and cannot be downloaded.
    """
    model = pretrained.describe(
        settings.network.model,
        _stored(settings, compute_dtype)[0],
        compute_dtype=compute_dtype,
        attention_backend=settings.network.attention,
        remat=remat_of(settings),
        layers="stacked",
    )
    adapter = None if settings.lora.adapter is None else pretrained.describe_adapter(settings.lora.adapter)
    if adapter is not None:
        adapter.check_fits(model)
        model.trained_mask = adapter.mask
    if settings.network.mask is not None:
        model.trained_mask = settings.network.mask
    if settings.loss.block_sizes:
        model.trained_mask = masks.name_of(masks.BlockDiffusion(settings.loss.block_sizes[-1]))
    elif isinstance(masks.parse(model.trained_mask), masks.BlockDiffusion):
        if settings.run.objective != "sft":
            raise ValueError(
                f"the model was trained by block diffusion, under the mask {model.trained_mask}, and cannot be trained "
                f"with --objective {settings.run.objective} under it: give another mask with --mask"
            )
        raise ValueError(
            f"the model was trained by block diffusion, under the mask {model.trained_mask}: give --block-diffusion "
            f"{model.trained_mask.partition(':')[2]} to train it further in this way, or another mask with --mask"
        )
    if not settings.lora.adapts:
        return model
    model = lora.attached_shapes(model, _adapter(settings))
    kind = _stored(settings, compute_dtype)[1]
    return model if kind is None else lora.with_base_shapes(model, kind)


def remat_of(settings: TrainSettings) -> Remat:
    """Returns the rematerialisation policy of the settings; "none" for "auto", which `remat_choice` decides later."""
    return "none" if settings.network.remat == "auto" else settings.network.remat


def _stored(settings: TrainSettings, compute_dtype: str) -> tuple[str, CodeKind | None]:
    """Returns the dtype in which the weights of the model are stored, and how its kernels are quantised (or None)."""
    if not settings.lora.adapts:
        return "float32", None  # trained weights are always float32
    # auto: the dtype of the computation, because every layer would round float32 weights to it anyway.
    if settings.lora.base == "auto":
        return compute_dtype, None
    for kind in KINDS:
        if settings.lora.base == kind:
            return compute_dtype, kind
    return settings.lora.base, None


def _adapter(settings: TrainSettings) -> LoraConfig:
    """Returns the configuration of the adapter, new or read from --adapter."""
    if settings.lora.adapter is None:
        return settings.lora.new_adapter()
    config = pretrained.describe_adapter(settings.lora.adapter).config
    if settings.lora.lora_dropout is None:
        return config
    return dataclasses.replace(config, dropout=settings.lora.lora_dropout)


def adapter_note(settings: TrainSettings) -> str | None:
    """Returns what a user should know about the adapter that the run begins with, as one line; None for nothing."""
    return None if settings.lora.adapter is None else pretrained.describe_adapter(settings.lora.adapter).note


def read(settings: TrainSettings, mesh: Mesh, compute_dtype: str, *, begins: bool) -> tuple[ParamTree | None, Frozen]:
    """Reads the frozen weights, and for a new run the weights to train.

    Args:
      settings: the settings of the run.
      mesh: the mesh on which the weights are placed.
      compute_dtype: name of the dtype of the computation.
      begins: True for a new run; False if the weights to train are in a checkpoint.

    Returns:
      The weights to train (None if `begins` is False), and the frozen weights.

    Raises:
      ValueError: the model or the adapter is damaged, or the adapter was trained on other weights.
      OSError: a file is missing or cannot be read, or (ConnectionError) the hub id cannot be downloaded.
    """
    if not settings.lora.adapts:
        frozen = Frozen(params={}, identity=None)
        return (
            split_params(pretrained.load(settings.network.model, mesh=mesh, seed=settings.run.seed, layers="stacked"))[
                1
            ]
            if begins
            else None
        ), frozen
    dtype, kind = _stored(settings, compute_dtype)
    model = pretrained.load(settings.network.model, dtype, mesh, seed=settings.run.seed, base=kind, layers="stacked")
    frozen = Frozen(params=split_params(model)[1], identity=lora.identity(model))
    if not begins:
        return None, frozen
    if settings.lora.adapter is not None:
        adapter = pretrained.describe_adapter(settings.lora.adapter)
        adapter.check_identity(lora.identity(model), "give --model the weights that it was trained on")
        return pretrained.adapter_params(adapter, mesh, base=model.config), frozen
    key = jax.random.fold_in(jax.random.key(settings.run.seed), _ADAPTER)
    return lora.split(split_params(lora.attach(model, _adapter(settings), key))[1])[0], frozen


def save(trained: Dream, settings: TrainSettings) -> dict[Literal["adapter", "model"], pathlib.Path]:
    """Writes OUT/adapter, OUT/model or both, as the settings say, and returns their paths by name.

    Existing ones are replaced. All processes must call this. Raises OSError if the disk is full.
    """
    made: dict[Literal["adapter", "model"], pathlib.Path] = {}
    if settings.lora.adapts:
        made["adapter"] = settings.run.out / "adapter"
        pretrained.save_adapter(trained, made["adapter"], overwrite=True)
    if settings.lora.merge or not settings.lora.adapts:
        made["model"] = settings.run.out / "model"
        pretrained.save(lora.merge(trained), made["model"], overwrite=True)
    return made
