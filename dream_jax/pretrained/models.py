"""Whole models in and out of directories: load, save, export, and conversions that hold no whole model.

Knows which kinds of directory there are and which files travel with the weights.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dream_jax import checkpoint, hf, lora
from dream_jax.atomic import new_directory
from dream_jax.attention import Backend
from dream_jax.config import PRESETS, DreamConfig
from dream_jax.model import Dream, Remat, abstract_model, merge_params, split_params
from dream_jax.pretrained.adapter import describe_adapter, put_on
from dream_jax.pretrained.merged import Named, merged_units
from dream_jax.pretrained.quantised import quantised_params, start_unit
from dream_jax.quantisation import KINDS, Kind
from dream_jax.shapes import ParamTree
from dream_jax.sharding import make_mesh, parameter_shardings
from dream_jax.tokenizer import PROMPT_FORMAT_FILE, TOKENIZER_FILES

DtypeName = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DtypeName, ...] = ("float32", "bfloat16", "float16")

# Keys of a published config.json that say nothing about the weights, and go where the weights go.
_CARRIED_KEYS = (
    "_name_or_path",
    "auto_map",
    "bos_token_id",
    "eos_token_id",
    "max_window_layers",
    "sliding_window",
    "transformers_version",
    "use_cache",
)


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
    base: Kind | None = None,
    adapter: str | os.PathLike[str] | None = None,
    any_base: bool = False,
) -> Dream:
    """Loads a model, every shard straight to its device.

    Args:
      path: a Hugging Face directory, a converted directory, a preset name ("nano": random weights), or a hub
        id ("organisation/name") to download. A directory is preferred to a preset of the same name.
      dtype: of the parameters: float32, bfloat16 or float16.
      mesh: where the parameters go, as a Mesh or "FSDPxTENSOR"; None for one device.
      seed: of a preset's random weights.
      compute_dtype, attention_backend, remat: as for `Dream`.
      ignore_config_keys: keys of config.json that are known not to change what the weights compute.
      base: "int8" or "nf4" quantises the kernels of the layers, one layer after the other: the float model is never whole
        anywhere. `dtype` is then that of all else. Such a model runs, and carries adapters; it cannot be saved.
      adapter: a directory of `save_adapter`, to put on the model. `merge_adapter` makes one model of the two.
      any_base: accepts an adapter that was trained on other weights of the same shapes.

    Returns:
      The model; its `tokenizer_dir` is the directory when that holds tokenizer files.

    Raises:
      FileNotFoundError: there is no such path, or it holds no checkpoint.
      ValueError: the checkpoint is damaged, or not one of this architecture; an unknown dtype; a mesh that
        does not fit; an adapter that does not.
      ConnectionError: a hub id that is not in the cache and cannot be downloaded.
    """
    mesh = None if mesh is None else make_mesh(mesh)
    model = describe(
        path,
        dtype,
        compute_dtype=compute_dtype,
        attention_backend=attention_backend,
        remat=remat,
        ignore_config_keys=ignore_config_keys,
    )
    found = None if adapter is None else describe_adapter(adapter)
    if found is not None:  # before minutes of reading weights
        found.check_fits(model)
    model = _weights(path, model, _as_dtype(dtype), mesh, seed, base)
    return model if found is None else put_on(model, found, any_base=any_base)


def _weights(
    path: str | os.PathLike[str], model: Dream, dtype: np.dtype, mesh: Mesh | None, seed: int, base: Kind | None
) -> Dream:
    """The model of these shapes with the weights at `path`."""
    graphdef, shapes = split_params(model)
    directory = _directory(path)
    if directory is None:
        drawn = merge_params(graphdef, _random(model.config, shapes, seed, mesh))
        return drawn if base is None else lora.with_base(drawn, base)
    if base is not None:
        quantised = split_params(lora.with_base_shapes(model, base))
        params, identity = quantised_params(directory, model.config, dtype, base, quantised[1], mesh)
        loaded = merge_params(quantised[0], params)
        loaded.base_identity = identity
        return loaded
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
) -> Dream:
    """The model of `load` with shapes in place of weights: all that can be known before reading or drawing any.

    Args:
      path, dtype, compute_dtype, attention_backend, remat, ignore_config_keys: as for `load`; of a hub id only the small
        files are downloaded.

    Returns:
      The abstract model, with its `config` and `tokenizer_dir`.

    Raises:
      As `load`, for what is wrong with the path, with `config.json` or with an option.
    """
    directory = _directory(path, weights=False)
    has_tokenizer = directory is not None and any((directory / name).is_file() for name in TOKENIZER_FILES)
    return abstract_model(
        PRESETS[str(path)] if directory is None else DreamConfig.from_file(directory, ignore=ignore_config_keys),
        param_dtype=_as_dtype(dtype),
        compute_dtype=None if compute_dtype is None else _as_dtype(compute_dtype),
        attention_backend=attention_backend,
        remat=remat,
        tokenizer_dir=str(directory) if has_tokenizer else None,
    )


def _directory(path: str | os.PathLike[str], *, weights: bool = True) -> pathlib.Path | None:
    """Where the weights lie, or None for a preset, whose weights are drawn."""
    if str(path) in PRESETS and not os.path.exists(path):
        return None
    return _find(path, f"neither a directory nor a preset; presets are {', '.join(PRESETS)}", weights=weights)


def _random(config: DreamConfig, shapes: ParamTree, seed: int, mesh: Mesh | None) -> ParamTree:
    dtype = jax.tree.leaves(shapes)[0].dtype

    def init(key: jax.Array) -> ParamTree:
        return split_params(Dream(config, rngs=nnx.Rngs(key), param_dtype=dtype))[1]

    shardings = None if mesh is None else parameter_shardings(shapes, mesh)
    params: ParamTree = jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
    return params


def _as_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise ValueError(f"{dtype=} is not one of {', '.join(DTYPES)}")
    return found


def _find(path: str | os.PathLike[str], otherwise: str = "no directory", *, weights: bool = True) -> pathlib.Path:
    directory = pathlib.Path(path).expanduser()
    if directory.is_dir():
        if (directory / "config.json").is_file():
            return directory.resolve()
        raise FileNotFoundError(
            f"{directory} holds no config.json: it is neither a Hugging Face nor a converted directory"
        )
    if not directory.exists() and hf.is_hub_id(str(path)):
        return hf.fetch(str(path), weights=weights)
    if directory.exists():
        raise FileNotFoundError(f"{path} is a file; give the directory of a checkpoint")
    raise FileNotFoundError(f"{path} is {otherwise}")


def save(
    model: Dream,
    path: str | os.PathLike[str],
    *,
    tokenizer_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a converted directory; with several hosts, all must call.

    Args:
      model: its parameters are written as they are, shard by shard.
      path: must not exist, except with `overwrite`; made whole or not at all.
      tokenizer_dir: where tokenizer files, generation_config.json and Python files come from; the model's own
        by default.
      overwrite: whether a checkpoint at `path` may be replaced (when the new one is complete).

    Raises:
      FileExistsError: `path` exists.
      ValueError: the model has an adapter or a quantised base, other parameters than its configuration says, or
        several dtypes.
      OSError: the disk is full.
    """
    params = _plain(model)
    with new_directory(path, overwrite=overwrite, needed_bytes=_nbytes(params)) as directory:
        checkpoint.save_params(directory, params, model.config)
        if jax.process_index() == 0:
            dtype = jax.tree.leaves(params)[0].dtype
            _write_companions(directory, model.config, dtype, tokenizer_dir or model.tokenizer_dir)
            checkpoint.write_description(directory, model.config, dtype)


def _plain(model: Dream) -> ParamTree:
    """The parameters of a model that is nothing but its configuration."""
    if lora.config_of(model) is not None:
        raise ValueError("the model has an adapter: save that alone with save_adapter, or merge_adapter first")
    if lora.base_of(model) in KINDS:
        raise ValueError(
            f"the base is {lora.base_of(model)}, which directories do not hold: its float weights are where it was loaded "
            "from, and merge_adapter(model, dequantised=True) makes float ones of it"
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
    """Writes a Hugging Face directory that the published code loads.

    Args:
      model, path, tokenizer_dir, overwrite: as for `save`.
      max_shard_size: bytes of weights in one file.

    Raises:
      FileExistsError, OSError: as `save`.
      ValueError: as `save`; also when parts of the model lie on other hosts.
    """
    params = _plain(model)
    with new_directory(path, overwrite=overwrite, needed_bytes=_nbytes(params)) as directory:
        hf.export(params, model.config, directory, max_shard_size)
        dtype = jax.tree.leaves(params)[0].dtype
        _write_companions(directory, model.config, dtype, tokenizer_dir or model.tokenizer_dir)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion is about to do, or has done.

    Attributes:
      source, target: the two directories.
      dtype: of the weights in the target.
      tensors, parameters, nbytes: number of tensors in the published layout, of weights, and their size in
        the target.
    """

    source: pathlib.Path
    target: pathlib.Path
    dtype: np.dtype
    tensors: int
    parameters: int
    nbytes: int


def convert_from_hf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    mesh: Mesh | str | None = None,
    overwrite: bool = False,
    ignore_config_keys: Iterable[str] = (),
    started: Callable[[Conversion], object] = lambda _: None,
    progress: Callable[[int], object] = lambda _: None,
) -> Conversion:
    """Turns a Hugging Face checkpoint into a converted directory, a few hundred megabytes at a time.

    Everything about the source is checked before anything is written.

    Args:
      source: directory or hub id.
      target: as `path` in `save`.
      dtype: of the target; the source's by default.
      mesh: every array is written as one chunk for each of its shards on this mesh; it still loads on any
        other.
      overwrite: as in `save`.
      ignore_config_keys: as in `load`.
      started: called once, when all checks have passed.
      progress: called with a number of bytes written to the target.

    Raises:
      As `load` and `save`.
    """
    mesh = None if mesh is None else make_mesh(mesh)
    directory = _find(source)
    if checkpoint.is_converted(directory):
        raise ValueError(f"{directory} is a converted directory already")
    config = DreamConfig.from_file(directory, ignore=ignore_config_keys)
    with hf.open_source(directory) as opened:
        opened.check(config)
        stored = opened.dtype if dtype is None else _as_dtype(dtype)
        conversion = _conversion(directory, pathlib.Path(target), config, stored)
        with new_directory(target, overwrite=overwrite, needed_bytes=conversion.nbytes, reads=directory) as made:
            started(conversion)
            _stream_from_hf(opened, made, config, stored, mesh, progress)
            _write_companions(made, config, stored, directory)
            checkpoint.write_description(made, config, stored)
    return conversion


def _stream_from_hf(
    source: hf.Source,
    directory: pathlib.Path,
    config: DreamConfig,
    dtype: np.dtype,
    mesh: Mesh | None,
    progress: Callable[[int], object],
) -> None:
    """Reads the next unit in threads while one is written."""
    buffers = hf.Buffers()
    pending = checkpoint.units(config, dtype, mesh)
    with ThreadPoolExecutor(hf.reading_threads()) as pool:
        start = functools.partial(start_unit, source, config, mesh=mesh, pool=pool, buffers=buffers)
        reading = start(pending[0])
        for unit, following in zip(pending, [*pending[1:], None], strict=True):
            params = hf.nested(reading.wait())
            next_reading = None if following is None else start(following)
            checkpoint.write_unit(directory, unit, params)
            del params
            if unit.layer is not None:
                buffers.give_back(reading.buffers)
            progress(unit.nbytes)
            if next_reading is not None:
                reading = next_reading


def convert_to_hf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    adapter: str | os.PathLike[str] | None = None,
    any_base: bool = False,
    card: Callable[[Conversion], str] | None = None,
    overwrite: bool = False,
    max_shard_size: int = hf.MAX_SHARD_SIZE,
    started: Callable[[Conversion], object] = lambda _: None,
    progress: Callable[[int], object] = lambda _: None,
) -> Conversion:
    """Turns a converted directory, or a base with its adapter added, into a Hugging Face one, unit by unit.

    Args:
      source: a converted directory; with an adapter a Hugging Face one (or a hub id) serves as well.
      target, dtype, overwrite, started, progress: as in `convert_from_hf`.
      adapter: a directory of `save_adapter`, to add to the weights.
      any_base: accepts an adapter that was trained on other weights of the same shapes.
      card: gives the text of the README.md that goes with the weights; called before anything is written.
      max_shard_size: bytes of weights in one file.

    Raises:
      As `load` and `save`; ValueError for an adapter that does not belong to the source, which is known when all of it
      has been read: nothing is left then.
    """
    directory = _find(source)
    found = None if adapter is None else describe_adapter(adapter)
    if found is None and not checkpoint.is_converted(directory):
        raise ValueError(f"{directory} is no converted directory: it has no {checkpoint.DESCRIPTION}")
    config = DreamConfig.from_file(directory)
    if found is not None:
        found.check_fits(abstract_model(config))
    stored = _stored_dtype(directory, config) if dtype is None else _as_dtype(dtype)
    conversion = _conversion(directory, pathlib.Path(target), config, stored)
    readme = None if card is None else card(conversion)
    with new_directory(target, overwrite=overwrite, needed_bytes=conversion.nbytes, reads=directory) as made:
        started(conversion)
        units = checkpoint.units(config, stored)

        def write(read: Callable[[checkpoint.Unit], Named]) -> None:
            with ThreadPoolExecutor(1) as pool:
                hf.export_from(_fetch_ahead(read, units, pool), config, stored, made, max_shard_size, progress)

        if found is None:
            write(functools.partial(_read_named, directory))
        else:
            with merged_units(directory, config, found) as merged:
                write(merged)
                if not any_base:
                    merged.check()
        _write_companions(made, config, stored, directory)
        if found is not None and (found.directory / PROMPT_FORMAT_FILE).is_file():
            # The adapter's prompts, not its base's.
            shutil.copyfile(found.directory / PROMPT_FORMAT_FILE, made / PROMPT_FORMAT_FILE)
        if readme is not None:
            (made / "README.md").write_text(readme, encoding="utf-8")
    return conversion


def _stored_dtype(directory: pathlib.Path, config: DreamConfig) -> np.dtype:
    if checkpoint.is_converted(directory):
        return checkpoint.read_description(directory, config).dtype
    with hf.open_source(directory) as opened:
        return opened.dtype


def _read_named(directory: pathlib.Path, unit: checkpoint.Unit) -> Named:
    return {(name, unit.layer): array for name, array in hf.flat(checkpoint.read_unit(directory, unit)).items()}


def _fetch_ahead(
    read: Callable[[checkpoint.Unit], Named], units: list[checkpoint.Unit], pool: ThreadPoolExecutor
) -> Callable[[str, int | None], np.ndarray]:
    """A function that hands out parameters in the order of the units, reading one unit ahead."""
    pending = iter(units)
    current: Named = {}

    def start() -> Future[Named] | None:
        unit = next(pending, None)
        return None if unit is None else pool.submit(read, unit)

    coming = start()

    def fetch(target: str, layer: int | None) -> np.ndarray:
        nonlocal coming
        while (target, layer) not in current:
            if coming is None:
                raise ValueError(f"{target} of layer {layer} was asked for out of order")
            current.update(coming.result())
            coming = start()
        return current.pop((target, layer))

    return fetch


def _conversion(source: pathlib.Path, target: pathlib.Path, config: DreamConfig, dtype: np.dtype) -> Conversion:
    return Conversion(
        source=source,
        target=target,
        dtype=dtype,
        tensors=len(hf.places(config)),
        parameters=config.num_parameters,
        nbytes=config.num_parameters * dtype.itemsize,
    )


def _nbytes(params: ParamTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def _write_companions(
    directory: pathlib.Path,
    config: DreamConfig,
    dtype: np.dtype,
    source: str | os.PathLike[str] | None,
) -> None:
    """Copies the files that go with the weights, and writes config.json."""
    published: dict[str, Any] = {}
    if source is not None:
        source = pathlib.Path(source)
        names = {"generation_config.json", *TOKENIZER_FILES, *(path.name for path in source.glob("*.py"))}
        for name in sorted(names):
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
        if (source / "config.json").is_file():
            published = json.loads((source / "config.json").read_text(encoding="utf-8"))
    carried = {key: published[key] for key in _CARRIED_KEYS if key in published}
    modules = {str(entry).rpartition(".")[0] for entry in carried.get("auto_map", {}).values()}
    if not all((directory / f"{module}.py").is_file() for module in modules):
        del carried["auto_map"]  # it would name code that did not come along
    # The published code's release of transformers reads torch_dtype, newer ones write dtype and read both.
    dtype_key = "dtype" if "dtype" in published else "torch_dtype"
    fields = config.to_dict() | carried | {dtype_key: jnp.dtype(dtype).name}
    (directory / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
