"""Loads, saves and exports whole models."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dream_jax import checkpoint, hf, layer_forms, lora
from dream_jax.attention import Backend
from dream_jax.bounds import SEED, check
from dream_jax.config import PRESETS, DreamConfig
from dream_jax.files import new_directory
from dream_jax.layer_forms import LayersChoice, form_of
from dream_jax.model import Dream, abstract_model, draw_layer, merge_params, split_params
from dream_jax.paths import AnyPath, local_path
from dream_jax.pretrained.adapter import describe_adapter, put_on
from dream_jax.pretrained.by_layer import apart_params, quantised_params
from dream_jax.pretrained.directories import (
    as_dtype,
    check_published_mask,
    check_sums,
    companions,
    find_directory,
    known_files,
    write_companions,
    write_sums,
)
from dream_jax.quantisation import KINDS, CodeKind
from dream_jax.remat import Remat
from dream_jax.shapes import ParamTree
from dream_jax.sharding import make_mesh, parameter_shardings
from dream_jax.tokenizer import TOKENIZER_FILES


def load(
    path: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike = "float32",
    mesh: Mesh | str | None = None,
    *,
    seed: int = 0,
    compute_dtype: jax.typing.DTypeLike | None = None,
    attention_backend: Backend = "auto",
    remat: Remat = "none",
    ignore_config_keys: Iterable[str] = (),
    base: CodeKind | None = None,
    adapter: str | os.PathLike[str] | None = None,
    any_base: bool = False,
    layers: LayersChoice = "auto",
    joined: bool = False,
) -> Dream:
    """Loads a model; the shard of each device is read directly from the files.

    Args:
      path: a Hugging Face directory, a converted directory, the name of a preset (such as "nano", with random weights), or
        a hub id ("organisation/name" or "organisation/name@revision") to download. A directory is preferred to a preset of
        the same name.
      dtype: the dtype of the parameters: float32, bfloat16 or float16.
      mesh: the devices of the parameters, as a Mesh or "FSDPxTENSOR"; None for one device.
      seed: the seed of the random weights of a preset, 0 to 2**31 - 1.
      compute_dtype, attention_backend, remat: as for `Dream`.
      ignore_config_keys: keys of config.json that are known not to change what the weights compute.
      base: "int8" or "nf4" quantises the kernels of the layers, one layer after the other, so that the whole model is never
        in memory in floating point; `dtype` is then the dtype of all other parameters. Such a model can run and have an
        adapter, but it cannot be saved.
      adapter: the directory of an adapter to attach to the model, written by `save_adapter` or by PEFT. `merge_adapter` can
        then add it to the weights.
      any_base: whether to accept an adapter that was trained on other weights with the same shapes.
      layers: "stacked" or "apart", see `Dream`; "auto" is apart on GPUs, where the model then answers faster, and stacked
        elsewhere. The weights are read directly into this form.
      joined: whether projections with one input are joined, so that the model answers faster. With stacked layers this
        needs memory for the joined projections a second time, see `layer_forms.join`.
        Such a model can do everything that another can; to attach an adapter, its projections are separated again.

    Returns:
      The model. Its `tokenizer_dir` is the directory of the model if tokenizer files are in it, else None.

    Raises:
      FileNotFoundError: the path does not exist, or it holds no checkpoint or no adapter, or one of its files is missing.
      ValueError: the checkpoint is damaged, has weights that are NaN or infinite, or is of another architecture; a dtype
        or form is unknown; the seed is out of range; the mesh or the adapter does not fit the model; a path is an
        address; the adapter was trained on other weights, and `any_base` is false.
      ConnectionError: the hub id is not in the cache and cannot be downloaded.
    """
    check("seed", seed, SEED)
    mesh = None if mesh is None else make_mesh(mesh)
    model = describe(
        path,
        dtype,
        compute_dtype=compute_dtype,
        attention_backend=attention_backend,
        remat=remat,
        ignore_config_keys=ignore_config_keys,
        layers=form_of(layers, mesh),
    )
    found = None if adapter is None else describe_adapter(adapter)
    if found is not None:  # checked first, because reading the weights may take minutes
        found.check_fits(model)
    model = _weights(path, model, as_dtype(dtype), mesh, seed, base)
    if found is not None:
        model = put_on(model, found, any_base=any_base)
    if joined:
        layer_forms.join(model)
    return model


def _weights(
    path: str | os.PathLike[str], model: Dream, dtype: np.dtype, mesh: Mesh | None, seed: int, base: CodeKind | None
) -> Dream:
    """Returns `model`, which has shapes only, with the weights at `path`, or with random ones for a preset."""
    graphdef, shapes = split_params(model)
    directory = _directory(path)
    if directory is None:
        drawn = merge_params(graphdef, _random(model, shapes, seed, mesh))
        return drawn if base is None else lora.with_base(drawn, base)
    if checkpoint.is_converted(directory):
        checkpoint.read_description(directory, model.config)  # compares sizes, which takes no time
    check_sums(directory, weights=True)
    if base is not None:
        quantised = split_params(lora.with_base_shapes(model, base))
        params, identity = quantised_params(directory, model.config, dtype, base, quantised[1], mesh)
        loaded = merge_params(quantised[0], params)
        loaded.base_identity = identity
        return loaded
    if model.is_apart:
        return merge_params(graphdef, apart_params(directory, model.config, dtype, mesh))
    read = checkpoint.load_params if checkpoint.is_converted(directory) else hf.load_params
    return merge_params(graphdef, read(directory, model.config, dtype, mesh))


def describe(
    path: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike = "float32",
    *,
    compute_dtype: jax.typing.DTypeLike | None = None,
    attention_backend: Backend = "auto",
    remat: Remat = "none",
    ignore_config_keys: Iterable[str] = (),
    layers: LayersChoice = "stacked",
) -> Dream:
    """Returns the model that `load` would return, but with shapes and dtypes instead of weights; no weights are read.

    Args:
      path, dtype, compute_dtype, attention_backend, remat, ignore_config_keys: as for `load`; for a hub id only the small
        files are downloaded.
      layers: as for `load`, but stacked by default. With "auto" jax looks for devices, and after that a CPU can no longer
        be divided for a mesh.

    Returns:
      The abstract model, with its `config`, `tokenizer_dir` and `trained_mask`.

    Raises:
      FileNotFoundError: the path does not exist or has no `config.json`.
      ValueError: `config.json` or `dream_jax.json` is damaged or of another architecture; a dtype or option is unknown.
      ConnectionError: the hub id is not in the cache and cannot be downloaded.
    """
    directory = _directory(path, weights=False)
    has_tokenizer = directory is not None and any((directory / name).is_file() for name in TOKENIZER_FILES)
    model = abstract_model(
        PRESETS[str(path)] if directory is None else DreamConfig.from_file(directory, ignore=ignore_config_keys),
        param_dtype=as_dtype(dtype),
        compute_dtype=None if compute_dtype is None else as_dtype(compute_dtype),
        attention_backend=attention_backend,
        remat=remat,
        tokenizer_dir=str(directory) if has_tokenizer else None,
        layers=form_of(layers),
    )
    if directory is not None and checkpoint.is_converted(directory):
        model.trained_mask = checkpoint.read_mask(directory)
    if directory is not None:
        check_sums(directory, weights=False)
    return model


def _directory(path: str | os.PathLike[str], *, weights: bool = True) -> pathlib.Path | None:
    """Returns the directory of the weights, or None for a preset, whose weights are random."""
    if str(path) in PRESETS and not os.path.exists(path):
        return None
    return find_directory(path, f"neither a directory nor a preset; presets are {', '.join(PRESETS)}", weights=weights)


def _random(model: Dream, shapes: ParamTree, seed: int, mesh: Mesh | None) -> ParamTree:
    """Returns random parameters of these shapes, sharded over the mesh. They do not depend on the form of the layers."""
    dtype = jax.tree.leaves(shapes)[0].dtype
    shardings = None if mesh is None else parameter_shardings(shapes, mesh)

    def init(key: jax.Array) -> ParamTree:
        return split_params(Dream(model.config, rngs=nnx.Rngs(key), param_dtype=dtype))[1]

    if not model.is_apart:
        params: ParamTree = jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
        return params

    # The layers are drawn one after the other, so that only the numbers of one layer are in memory in float32.
    def init_outside(key: jax.Array) -> ParamTree:
        return {name: value for name, value in init(key).items() if name != "layers"}

    def init_layer(key: jax.Array, number: int) -> ParamTree:
        return split_params(draw_layer(model.config, key, number, dtype=dtype))[1]

    outside = layer = None
    if shardings is not None:
        outside, layer = {**shardings}, shardings["layers"][0]
        del outside["layers"]
    key = jax.random.key(seed)
    params = jax.jit(init_outside, out_shardings=outside)(key)
    draw = jax.jit(init_layer, out_shardings=layer)
    return {**params, "layers": {number: draw(key, number) for number in shapes["layers"]}}


def save(
    model: Dream,
    path: str | os.PathLike[str],
    *,
    tokenizer_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model as a converted directory; with several processes, all of them must call.

    Args:
      model: the model, whose parameters are written in their dtype, shard by shard.
      path: the directory to write. It must not exist, except with `overwrite`; it appears only when it is complete.
      tokenizer_dir: the directory from which tokenizer files, generation_config.json and Python files are copied; by
        default `model.tokenizer_dir`.
      overwrite: whether to replace a checkpoint at `path`, when the new one is complete.

    Raises:
      FileExistsError: `path` exists and `overwrite` is false; or it is not a checkpoint, or holds a file that this program
        has not written.
      FileNotFoundError: there is no directory `tokenizer_dir`.
      ValueError: the model has an adapter or a quantised base, or its parameters do not fit its configuration or have
        several dtypes; or `path` is an address, or contains or lies in `tokenizer_dir`; or a file to copy is a link that
        leads out of `tokenizer_dir`.
      OSError: the disk is full, or the directory cannot be written.
      RuntimeError: process 0 cannot create the directory; raised in the other processes.
    """
    local_path(path)
    params = _plain(model)
    source = tokenizer_dir or model.tokenizer_dir
    with _new_directory(path, source, params, overwrite=overwrite) as directory:
        checkpoint.save_params(directory, params, model.config)
        if jax.process_index() == 0:
            dtype = jax.tree.leaves(params)[0].dtype
            write_companions(directory, model.config, dtype, source)
            checkpoint.write_description(directory, model.config, dtype, model.trained_mask)
            write_sums(directory)


def _new_directory(
    path: AnyPath, source: AnyPath | None, params: ParamTree, *, overwrite: bool
) -> contextlib.AbstractContextManager[pathlib.Path]:
    """Returns the `new_directory` for the parameters of a model and the files that are copied from `source`."""
    companions(source)  # raises its errors before anything is written
    # A model may replace the directory that it came from: its weights are in memory, and its companions are copied first.
    is_itself = source is not None and local_path(path).resolve() == local_path(source).resolve()
    reads = () if is_itself else (source,)
    return new_directory(path, overwrite=overwrite, needed_bytes=_nbytes(params), reads=reads, known=known_files)


def _plain(model: Dream) -> ParamTree:
    """Returns the parameters of a model. Raises ValueError if it has an adapter or a quantised base."""
    if lora.config_of(model) is not None:
        raise ValueError(
            "the model has an adapter: save the adapter alone with save_adapter, or call merge_adapter first"
        )
    if lora.base_of(model) in KINDS:
        raise ValueError(
            f"a base in {lora.base_of(model)} codes cannot be saved. Its float weights are in the directory that it was "
            "loaded from; merge_adapter(model, dequantised=True) converts the codes to floating point"
        )
    return split_params(model)[1]


def export_hf(
    model: Dream,
    path: str | os.PathLike[str],
    *,
    tokenizer_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    max_shard_size: int = hf.MAX_SHARD_SIZE,
) -> None:
    """Writes a model as a Hugging Face directory that the published code loads.

    Args:
      model, path, tokenizer_dir, overwrite: as for `save`.
      max_shard_size: the maximum number of bytes of weights in one file; a larger tensor gets a file of its own.

    Raises:
      FileExistsError, FileNotFoundError, OSError, RuntimeError: as for `save`.
      ValueError: as for `save`; or some parameters are on other hosts; or the model was trained under a mask other than
        the bidirectional one of the published code; or `max_shard_size` is below 1.
    """
    local_path(path)
    check_published_mask(model.trained_mask)
    params = _plain(model)
    source = tokenizer_dir or model.tokenizer_dir
    with _new_directory(path, source, params, overwrite=overwrite) as directory:
        hf.export(params, model.config, directory, max_shard_size)
        dtype = jax.tree.leaves(params)[0].dtype
        write_companions(directory, model.config, dtype, source)
        write_sums(directory)


def _nbytes(params: ParamTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
