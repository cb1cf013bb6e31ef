"""Saving and loading adapters, each in a separate directory of a few megabytes.

The directory of an adapter holds `adapter.json` (the configuration of the adapter, the base that it was trained on, and the
size of every file), `weights/adapter` (Orbax) and, if the base has one, `prompt_format.json`. A directory in the layout of
PEFT (`adapter_config.json` and `adapter_model.safetensors`) can be used in its place, and `export_peft` writes one.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import msgspec
import numpy as np

from dream_jax import checkpoint, hf, layer_forms, lora, masks
from dream_jax.config import DreamConfig
from dream_jax.files import new_directory, read_json, typed, write_json
from dream_jax.lora import LoraConfig, Target
from dream_jax.model import Dream, abstract_model, split_params
from dream_jax.paths import AnyPath, check_companion, copy_companion, local_path
from dream_jax.pretrained.directories import check_published_mask, check_sums, listed_weights, write_sums
from dream_jax.shapes import ParamTree
from dream_jax.sharding import mesh_context, mesh_of, parameter_shardings, parameter_specs
from dream_jax.tokenizer import PROMPT_FORMAT_FILE

ADAPTER = "adapter.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """The description of a saved adapter, as `adapter.json` contains it.

    Attributes:
      directory: the directory of the adapter.
      config: the rank, alpha, dropout and targets of the adapter.
      base: the configuration of the model that the adapter belongs to; None for a PEFT directory, which has none.
      identity: the digest, by `lora.identity`, of the weights that the adapter was trained on; None if it is not known.
      mask: the name of the attention mask that the adapter was trained with, as for `masks.parse`.
      peft: the adapter in a PEFT directory; None for a directory of this project.
    """

    directory: pathlib.Path
    config: LoraConfig
    base: DreamConfig | None
    identity: str | None
    mask: str
    peft: hf.PeftAdapter | None = None

    @property
    def note(self) -> str | None:
        """What a user should know about a PEFT adapter, as one line; None for an adapter of this project."""
        if self.peft is None:
            return None
        config = self.config
        about = f"PEFT adapter of rank {config.rank}, alpha {config.alpha:g} on {', '.join(config.targets)}"
        unknown = "" if self.identity else "; whether these are the weights that it was trained on cannot be checked"
        return f"{about}: {self.peft.origin}{unknown}"

    def check_fits(self, model: Dream) -> None:
        """Raises ValueError if the adapter belongs to a model of another configuration; the message has the differences."""
        if self.base is None:
            assert self.peft is not None
            self.peft.check(model.config)
            return
        ours, theirs = dataclasses.asdict(model.config), dataclasses.asdict(self.base)
        # initializer_range affects random weights only.
        different = [name for name in ours if ours[name] != theirs[name] and name != "initializer_range"]
        if different:
            lines = "; ".join(f"{name} is {ours[name]!r}, the adapter's {theirs[name]!r}" for name in different)
            raise ValueError(f"the adapter in {self.directory} belongs to another model: {lines}")

    def check_identity(self, identity: str, remedy: str) -> None:
        """Raises ValueError, with the remedy in its message, if the adapter was trained on weights of another identity.

        If the identity of those weights is not known, nothing is checked.
        """
        if self.identity is not None and identity != self.identity:
            raise ValueError(
                f"the adapter in {self.directory} was trained on the weights with identity {self.identity[:12]}, but these "
                f"weights of the same shapes have identity {identity[:12]}: {remedy}"
            )


def save_adapter(model: Dream, path: AnyPath, *, overwrite: bool = False) -> None:
    """Writes the adapter of a model, without the base; with several processes, all of them must call.

    Args:
      model: a model with an adapter.
      path: the directory to write. It must not exist, except with `overwrite`; it appears only when it is complete.
      overwrite: whether to replace an adapter at `path`, when the new one is complete.

    Raises:
      FileExistsError: `path` exists and `overwrite` is false; or it is not an adapter, or holds a file that was not
        written by this program.
      ValueError: the model has no adapter; or `path` is an address.
      OSError: the disk is full, or the directory cannot be written.
      RuntimeError: process 0 cannot create the directory; raised in the other processes.
    """
    local_path(path)
    config = lora.config_of(model)
    if config is None:
        raise ValueError("the model has no adapter; use dream_jax.save for a model without one")
    identity = lora.identity(model)
    params = layer_forms.canonical(lora.split(split_params(model)[1])[0])
    unit = _unit(params, None)
    template = None if model.tokenizer_dir is None else pathlib.Path(model.tokenizer_dir) / PROMPT_FORMAT_FILE
    if template is not None and template.is_file():
        check_companion(template)
    with new_directory(
        path,
        overwrite=overwrite,
        needed_bytes=unit.nbytes,
        reads=(model.tokenizer_dir,),
        marker=ADAPTER,
        known=known_adapter_files,
    ) as directory:
        checkpoint.write_unit(directory, unit, params)
        if jax.process_index() == 0:
            if template is not None and template.is_file():
                copy_companion(template, directory / PROMPT_FORMAT_FILE)
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
            write_sums(directory)


def known_adapter_files(directory: pathlib.Path) -> set[str]:
    """Returns names and patterns, for `files.new_directory`, of what this program writes into an adapter's directory."""
    return {ADAPTER, PROMPT_FORMAT_FILE} | listed_weights(directory / ADAPTER)


def _unit(params: ParamTree, mesh: jax.sharding.Mesh | None) -> checkpoint.WeightUnit:
    """Returns the unit under which the parameters of an adapter are stored."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    return checkpoint.WeightUnit("adapter", None, shapes, {} if mesh is None else parameter_specs(shapes, mesh))


def describe_adapter(path: AnyPath) -> Adapter:
    """Reads the description of an adapter: the `adapter.json` of this project, or the `adapter_config.json` of PEFT.

    The files that `adapter.json` lists must have the sizes that were written. For a PEFT directory the names of the tensors
    are checked.

    Raises:
      FileNotFoundError: the directory holds neither, and the message says what it holds; or a file of weights is missing.
      ValueError: the description is damaged, of another format or not implemented; or the size of a file is wrong; or the
        directory has both descriptions.
    """
    directory = local_path(path, "adapter").resolve()
    file = directory / ADAPTER
    if (directory / hf.PEFT_CONFIG).is_file():
        if file.is_file():
            raise ValueError(
                f"{directory} holds two adapters, {ADAPTER} of this project and {hf.PEFT_CONFIG} of PEFT; remove one"
            )
        return _describe_peft(directory)
    if not file.is_file():
        raise FileNotFoundError(f"{directory} {_what_is_there(directory)}")
    fields = read_json(file, "save it again")
    if fields.get("format") != FORMAT:
        raise ValueError(
            f"{file} has format {fields.get('format')!r:.80}, but this version reads format {FORMAT}; save it again"
        )
    found = typed(fields, _AdapterFile, f"{file} is not what save_adapter writes", "save it again")
    try:
        config = LoraConfig(rank=found.rank, alpha=found.alpha, dropout=found.dropout, targets=found.targets)
        base = DreamConfig.from_dict(found.base.config)
        masks.parse(found.mask)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; save it again") from error
    check_sums(directory, weights=False)
    checkpoint.check_files(directory, found.files, f"{ADAPTER} lists the sizes; save the adapter again")
    return Adapter(directory=directory, config=config, base=base, identity=found.base.identity, mask=found.mask)


class _Base(msgspec.Struct):
    identity: str
    config: dict[str, Any]


class _AdapterFile(msgspec.Struct):
    """The entries of `adapter.json`, with their types."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[Target, ...]
    base: _Base
    files: dict[str, int]
    mask: str = "bidirectional"


def _describe_peft(directory: pathlib.Path) -> Adapter:
    """Returns the description of the adapter in a PEFT directory. Raises as `hf.read_peft`."""
    found = hf.read_peft(directory)
    targets = tuple(name for name in lora.TARGETS if name in found.targets)
    try:
        config = LoraConfig(rank=found.rank, alpha=found.alpha, dropout=found.config.dropout, targets=targets)
    except ValueError as error:
        raise ValueError(f"{directory / hf.PEFT_CONFIG}: {error}") from error
    check_sums(directory, weights=False)
    # PEFT runs the published code, which has bidirectional attention only.
    return Adapter(
        directory=directory, config=config, base=None, identity=found.identity, mask="bidirectional", peft=found
    )


def _what_is_there(directory: pathlib.Path) -> str:
    """Returns what a path without an adapter is, as the rest of an error message, with what to give instead."""
    if not directory.exists():
        return "does not exist; give the directory of an adapter (adapters are not downloaded)"
    if not directory.is_dir():
        return "is a file; give the directory of an adapter"
    inside = next((name for name in ("adapter", "default") if (directory / name).is_dir()), None)
    names = sorted(path.name for path in directory.iterdir())
    if hf.PEFT_WEIGHTS in names or hf.PEFT_PICKLE in names:
        found = f"it has weights of PEFT without their {hf.PEFT_CONFIG}; copy that file there too"
    elif inside is not None:
        found = f"did you mean its folder {inside}?"
    elif "config.json" in names:
        found = "it holds config.json, so it is the directory of a model: give it as the model"
    else:
        found = f"it holds {', '.join(names[:5])}{' and more' if names[5:] else ''}" if names else "it is empty"
    return f"holds no {ADAPTER} (of this project) and no {hf.PEFT_CONFIG} (of PEFT), so it is not an adapter: {found}"


def adapter_params(adapter: Adapter, mesh: jax.sharding.Mesh | None, *, base: DreamConfig | None = None) -> ParamTree:
    """Returns the weights of an adapter, a nested dict of arrays sharded over the mesh; a mesh of None is one device.

    `base` is the configuration of the model; it is needed for an adapter in a PEFT directory, which does not have it.
    Raises ValueError if the stored weights have other names or shapes than the description says, or are not finite.
    """
    config = adapter.base or base
    if config is None:
        raise ValueError(
            f"the adapter in {adapter.directory} does not say for which model it is; pass base=model.config"
        )
    model = lora.attached_shapes(abstract_model(config), adapter.config)
    shapes = lora.split(split_params(model)[1])[0]
    if adapter.peft is None:
        unit = _unit(shapes, mesh)
        check_sums(adapter.directory, weights=True)
        params: ParamTree = jax.tree.map(jax.numpy.asarray, checkpoint.read_unit(adapter.directory, unit, mesh))
        return params
    check_sums(adapter.directory, weights=True)
    found = hf.nested(adapter.peft.read(config))
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, found)
    # Every process reads the whole adapter, and gives each of its devices the part that belongs there.
    return jax.tree.map(
        lambda array, sharding: jax.make_array_from_callback(array.shape, sharding, lambda index: array[index]),
        found,
        parameter_shardings(shapes, mesh),
    )


def export_peft(
    source: AnyPath,
    target: AnyPath,
    *,
    base_model: str | None = None,
    overwrite: bool = False,
) -> Adapter:
    """Writes the adapter in a directory of this project as a PEFT directory, in float32.

    Args:
      source: the directory of an adapter, with an `adapter.json`.
      target: the directory to write. It must not exist, except with `overwrite`; it appears only when it is complete.
      base_model: the name or path of the model that the adapter was trained on, for `base_model_name_or_path`.
      overwrite: whether to replace a PEFT directory at `target`, when the new one is complete.

    Returns:
      The description of the adapter that was written.

    Raises:
      FileNotFoundError, ValueError: as for `describe_adapter`; or the source is a PEFT directory already; or the adapter
        was trained under a mask other than the bidirectional one of the published code.
      FileExistsError: `target` exists and `overwrite` is false, or it is not a PEFT directory.
      OSError: the disk is full, or the directory cannot be written.
    """
    local_path(target)
    adapter = describe_adapter(source)
    if adapter.peft is not None:
        raise ValueError(f"{adapter.directory} is a PEFT directory already; copy it")
    check_published_mask(adapter.mask)
    params = {name: np.asarray(leaf, np.float32) for name, leaf in hf.flat(adapter_params(adapter, None)).items()}
    needed = sum(array.nbytes for array in params.values())
    with new_directory(
        target,
        overwrite=overwrite,
        needed_bytes=needed,
        reads=(adapter.directory,),
        marker=hf.PEFT_CONFIG,
        known=known_peft_files,
    ) as directory:
        if jax.process_index() == 0:
            hf.write_peft(
                directory,
                params,
                rank=adapter.config.rank,
                alpha=adapter.config.alpha,
                dropout=adapter.config.dropout,
                base_model=base_model,
                identity=adapter.identity,
            )
            if (adapter.directory / PROMPT_FORMAT_FILE).is_file():
                copy_companion(adapter.directory / PROMPT_FORMAT_FILE, directory / PROMPT_FORMAT_FILE)
            write_sums(directory)
    return describe_adapter(target)


def known_peft_files(_: pathlib.Path) -> set[str]:
    """Returns the names, for `files.new_directory`, of what this program writes into a PEFT directory."""
    return {hf.PEFT_CONFIG, hf.PEFT_WEIGHTS, PROMPT_FORMAT_FILE}


def put_on(model: Dream, adapter: Adapter, *, any_base: bool = False) -> Dream:
    """Returns a model with a saved adapter attached; the given model is not changed.

    Args:
      model: a model with the configuration of the base of the adapter.
      adapter: the description of the adapter, from `describe_adapter`.
      any_base: whether to accept other weights than those that the adapter was trained on. An adapter of PEFT does not know
        them, so it is put on any weights.

    Raises:
      ValueError: the model has another configuration or already an adapter; or, if `any_base` is false, it has other
        weights or is in float16, in which weights cannot be compared.
    """
    adapter.check_fits(model)
    if not any_base and adapter.identity is not None:
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
    params = adapter_params(adapter, mesh_of(model), base=model.config)["layers"]
    with mesh_context(model):
        lora.put_adapter(adapted, adapter.config, {**params.get("attn", {}), **params.get("mlp", {})})
    return adapted
