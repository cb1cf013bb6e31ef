"""Saving and loading adapters, each in a separate directory of a few megabytes.

The directory of an adapter holds `adapter.json` (the configuration of the adapter, the base that it was trained on, and the
size of every file), `weights/adapter` (Orbax) and, if the base has one, `prompt_format.json`.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil

import jax
import numpy as np
from flax import nnx

from dream_jax import checkpoint, lora, masks
from dream_jax.config import DreamConfig
from dream_jax.files import new_directory, read_json, write_json
from dream_jax.lora import LoraConfig
from dream_jax.model import Dream, abstract_model, split_params
from dream_jax.shapes import ParamTree
from dream_jax.sharding import mesh_of, parameter_specs
from dream_jax.tokenizer import PROMPT_FORMAT_FILE

ADAPTER = "adapter.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """The description of a saved adapter, as `adapter.json` contains it.

    Attributes:
      directory: the directory of the adapter.
      config: the rank, alpha, dropout and targets of the adapter.
      base: the configuration of the model that the adapter belongs to.
      identity: the digest, by `lora.identity`, of the weights that the adapter was trained on.
      mask: the name of the attention mask that the adapter was trained with, as for `masks.parse`.
    """

    directory: pathlib.Path
    config: LoraConfig
    base: DreamConfig
    identity: str
    mask: str

    def check_fits(self, model: Dream) -> None:
        """Raises ValueError if the model has another configuration than `base`; the message lists the differences."""
        ours, theirs = dataclasses.asdict(model.config), dataclasses.asdict(self.base)
        # initializer_range affects random weights only.
        different = [name for name in ours if ours[name] != theirs[name] and name != "initializer_range"]
        if different:
            lines = "; ".join(f"{name} is {ours[name]!r}, the adapter's {theirs[name]!r}" for name in different)
            raise ValueError(f"the adapter in {self.directory} belongs to another model: {lines}")

    def check_identity(self, identity: str, remedy: str) -> None:
        """Raises ValueError, with the remedy in its message, if the adapter was trained on weights of another identity."""
        if identity != self.identity:
            raise ValueError(
                f"the adapter in {self.directory} was trained on the weights with identity {self.identity[:12]}, but these "
                f"weights of the same shapes have identity {identity[:12]}: {remedy}"
            )


def save_adapter(model: Dream, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Writes the adapter of a model, without the base; with several processes, all of them must call.

    Args:
      model: a model with an adapter.
      path: the directory to write. It must not exist, except with `overwrite`; it appears only when it is complete.
      overwrite: whether to replace an adapter at `path`, when the new one is complete.

    Raises:
      FileExistsError: `path` exists and `overwrite` is false, or it is not an adapter.
      ValueError: the model has no adapter.
      OSError: the disk is full, or the directory cannot be written.
      RuntimeError: process 0 cannot create the directory; raised in the other processes.
    """
    config = lora.config_of(model)
    if config is None:
        raise ValueError("the model has no adapter; use dream_jax.save for a model without one")
    identity = lora.identity(model)
    params = lora.split(split_params(model)[1])[0]
    unit = _unit(params, None)
    with new_directory(path, overwrite=overwrite, needed_bytes=unit.nbytes, marker=ADAPTER) as directory:
        checkpoint.write_unit(directory, unit, params)
        if jax.process_index() == 0:
            template = None if model.tokenizer_dir is None else pathlib.Path(model.tokenizer_dir) / PROMPT_FORMAT_FILE
            if template is not None and template.is_file():
                shutil.copyfile(template, directory / PROMPT_FORMAT_FILE)
            fields = {
                "format": FORMAT,
                **dataclasses.asdict(config),
                "dtype": jax.tree.leaves(params)[0].dtype.name,
                "mask": model.trained_mask,
                "base": {"identity": identity, "config": model.config.to_dict()},
                "files": checkpoint.written_files(directory),
            }
            # This file is written last, because an adapter without it does not load.
            write_json(directory / ADAPTER, fields, indent=1)


def _unit(params: ParamTree, mesh: jax.sharding.Mesh | None) -> checkpoint.WeightUnit:
    """Returns the unit under which the parameters of an adapter are stored."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    return checkpoint.WeightUnit("adapter", None, shapes, {} if mesh is None else parameter_specs(shapes, mesh))


def describe_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Reads the `adapter.json` of a directory, and checks that the files it lists have the sizes that were written.

    Raises:
      FileNotFoundError: the directory has no `adapter.json`, or a file that it lists is missing.
      ValueError: `adapter.json` is damaged or of another format, or the size of a file is wrong.
    """
    directory = pathlib.Path(path).expanduser().resolve()
    file = directory / ADAPTER
    if not file.is_file():
        raise FileNotFoundError(f"{directory} holds no {ADAPTER}: it is not the directory of an adapter")
    fields = read_json(file, "save it again")
    if fields.get("format") != FORMAT:
        raise ValueError(
            f"{file} has format {fields.get('format')!r}, but this version reads format {FORMAT}; save it again"
        )
    try:
        given = {field.name: fields[field.name] for field in dataclasses.fields(LoraConfig)}
        config = LoraConfig(**given | {"targets": tuple(given["targets"])})
        base, identity = DreamConfig.from_dict(fields["base"]["config"]), str(fields["base"]["identity"])
        mask = str(fields.get("mask", "bidirectional"))
        masks.parse(mask)
        checkpoint.check_files(directory, fields["files"], "save the adapter again")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not what save_adapter writes: {error!r}; save it again") from error
    return Adapter(directory=directory, config=config, base=base, identity=identity, mask=mask)


def adapter_params(adapter: Adapter, mesh: jax.sharding.Mesh | None) -> ParamTree:
    """Returns the weights of an adapter, a nested dict of arrays sharded over the mesh; a mesh of None is one device.

    Raises ValueError if the stored weights have other names or shapes than `adapter.json` describes.
    """
    model = lora.attached_shapes(abstract_model(adapter.base), adapter.config)
    unit = _unit(lora.split(split_params(model)[1])[0], mesh)
    params: ParamTree = jax.tree.map(jax.numpy.asarray, checkpoint.read_unit(adapter.directory, unit, mesh))
    return params


def put_on(model: Dream, adapter: Adapter, *, any_base: bool = False) -> Dream:
    """Returns a model with a saved adapter attached; the given model is not changed.

    Args:
      model: a model with the configuration of the base of the adapter.
      adapter: the description of the adapter, from `describe_adapter`.
      any_base: whether to accept other weights than those that the adapter was trained on.

    Raises:
      ValueError: the model has another configuration or already an adapter; or, if `any_base` is false, it has other
        weights or is in float16, in which weights cannot be compared.
    """
    adapter.check_fits(model)
    if not any_base:
        if model.embed.embedding.dtype == np.float16:
            raise ValueError(
                "float16 rounds the weights, so they cannot be compared with those that the adapter was trained on; load "
                "float32 or bfloat16, or pass any_base=True"
            )
        adapter.check_identity(
            lora.identity(model),
            "load the weights that it was trained on, or pass any_base=True (--any-base) to use these",
        )
    adapted = lora.attach(model, adapter.config, jax.random.key(0))
    adapted.trained_mask = adapter.mask
    params = adapter_params(adapter, mesh_of(model))["layers"]
    for name, linear in lora.projections(adapted).items():
        if name in adapter.config.targets:
            leaves = params["attn" if name in params.get("attn", {}) else "mlp"][name]
            linear.lora_a, linear.lora_b = nnx.Param(leaves["lora_a"]), nnx.Param(leaves["lora_b"])
    return adapted
