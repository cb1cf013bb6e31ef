"""Converts models between the two layouts of directories, unit by unit: a whole model is never in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh

from dream_jax import checkpoint, hf, lora
from dream_jax.config import DreamConfig
from dream_jax.files import new_directory
from dream_jax.model import abstract_model
from dream_jax.pretrained.adapter import Adapter, adapter_params, describe_adapter
from dream_jax.pretrained.directories import as_dtype, check_published_mask, find_directory, write_companions
from dream_jax.pretrained.quantised import start_unit, unit_reader
from dream_jax.shapes import ParamTree
from dream_jax.sharding import make_mesh
from dream_jax.tokenizer import PROMPT_FORMAT_FILE

Named = dict[tuple[str, int | None], np.ndarray]
"""(dotted path, layer) -> values of a parameter; the layer is None outside the layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """The description of a conversion, before or after it.

    Attributes:
      source, target: the directories that are read and written.
      dtype: the dtype of the weights in the target.
      tensors: the number of tensors in the published layout.
      parameters: the number of weights.
      nbytes: the size of the weights in the target, in bytes.
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
    """Converts a Hugging Face checkpoint into a converted directory, with a few hundred megabytes in memory at a time.

    Everything about the source is checked before anything is written.

    Args:
      source: a Hugging Face directory or a hub id.
      target: the directory to write. It must not exist, except with `overwrite`; it appears only when it is complete.
      dtype: the dtype of the written weights; None for that of the source.
      mesh: every array is written as one chunk for each of its shards on this mesh; any other mesh can load it too.
      overwrite: whether to replace a checkpoint at `target`, when the new one is complete.
      ignore_config_keys: keys of config.json that are known not to change what the weights compute.
      started: called once, when all checks have passed.
      progress: called with the number of bytes that were just written to the target (not a total).

    Raises:
      The exceptions of `load` and `save`.
    """
    mesh = None if mesh is None else make_mesh(mesh)
    directory = find_directory(source)
    if checkpoint.is_converted(directory):
        raise ValueError(f"{directory} is already a converted directory; load it as it is")
    config = DreamConfig.from_file(directory, ignore=ignore_config_keys)
    with hf.open_source(directory) as opened:
        opened.check(config)
        stored = opened.dtype if dtype is None else as_dtype(dtype)
        conversion = _conversion(directory, pathlib.Path(target), config, stored)
        with new_directory(target, overwrite=overwrite, needed_bytes=conversion.nbytes, reads=directory) as made:
            started(conversion)
            _stream_from_hf(opened, made, config, stored, mesh, progress)
            write_companions(made, config, stored, directory)
            checkpoint.write_description(made, config, stored)
    return conversion


def _stream_from_hf(
    source: hf.SafetensorsSource,
    directory: pathlib.Path,
    config: DreamConfig,
    dtype: np.dtype,
    mesh: Mesh | None,
    progress: Callable[[int], object],
) -> None:
    """Reads the next unit in threads while the current one is written."""
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
    """Writes the Hugging Face directory of a converted directory, or of a base with its adapter added, unit by unit.

    Args:
      source: a converted directory; with an adapter, a Hugging Face directory or a hub id is accepted too.
      target, dtype, overwrite, started, progress: as for `convert_from_hf`.
      adapter: the directory of an adapter to add to the weights; None for none.
      any_base: whether to accept an adapter that was trained on other weights with the same shapes.
      card: returns the text of the README.md for the weights; called before anything is written.
      max_shard_size: the maximum number of bytes of weights in one file.

    Raises:
      The exceptions of `load` and `save`. A ValueError for an adapter that was trained on other weights is raised after
      the whole source has been read, and the target is removed.
    """
    directory = find_directory(source)
    found = None if adapter is None else describe_adapter(adapter)
    if found is None and not checkpoint.is_converted(directory):
        raise ValueError(f"{directory} is not a converted directory: it has no {checkpoint.DESCRIPTION}")
    config = DreamConfig.from_file(directory)
    if found is not None:
        found.check_fits(abstract_model(config))
    if found is not None:
        check_published_mask(found.mask)
    elif checkpoint.is_converted(directory):
        check_published_mask(checkpoint.read_mask(directory))
    stored = _stored_dtype(directory, config) if dtype is None else as_dtype(dtype)
    conversion = _conversion(directory, pathlib.Path(target), config, stored)
    readme = None if card is None else card(conversion)
    with new_directory(target, overwrite=overwrite, needed_bytes=conversion.nbytes, reads=directory) as made:
        started(conversion)
        units = checkpoint.units(config, stored)

        def write(read: Callable[[checkpoint.WeightUnit], Named]) -> None:
            with ThreadPoolExecutor(1) as pool:
                hf.export_from(_fetch_ahead(read, units, pool), config, stored, made, max_shard_size, progress)

        if found is None:
            write(functools.partial(_read_named, directory))
        else:
            with _merged_units(directory, config, found) as merged:
                write(merged)
                if not any_base:
                    merged.check()
        write_companions(made, config, stored, directory)
        if found is not None and (found.directory / PROMPT_FORMAT_FILE).is_file():
            # The format of the prompts that the adapter was trained on, instead of the format of the base.
            shutil.copyfile(found.directory / PROMPT_FORMAT_FILE, made / PROMPT_FORMAT_FILE)
        if readme is not None:
            (made / "README.md").write_text(readme, encoding="utf-8")
    return conversion


class _MergedUnits:
    """Reads each unit of a base once and adds the adapter to it; the whole base is never in memory."""

    def __init__(
        self,
        units: dict[str, checkpoint.WeightUnit],
        read: Callable[[checkpoint.WeightUnit], ParamTree],
        adapter: Adapter,
    ):
        self._units, self._read, self._adapter = units, read, adapter
        self._prints: list[lora.Print] = []
        stacked = hf.flat(adapter_params(adapter, None))
        self._added = {name: np.asarray(leaf, np.float32) for name, leaf in stacked.items()}

    def __call__(self, unit: checkpoint.WeightUnit) -> Named:
        """Returns one unit in the dtype of its shapes. The sum is computed in float32 and rounded once."""
        exact = self._read(self._units[unit.name])
        self._prints += lora.prints(exact, unit.layer)
        params = {name: np.asarray(leaf) for name, leaf in hf.flat(exact).items()}
        wanted = hf.flat(unit.shapes)
        found: Named = {}
        for name, leaf in params.items():
            if unit.layer is not None and name.removesuffix("kernel") + "lora_a" in self._added:
                leaf = leaf + self._correction(name.removesuffix("kernel"), unit.layer).reshape(leaf.shape)
            found[name, unit.layer] = leaf.astype(wanted[name].dtype)
        return found

    def _correction(self, name: str, layer: int) -> np.ndarray:
        config = self._adapter.config
        a_Ir = self._added[name + "lora_a"][layer].reshape(-1, config.rank)
        b_rO = self._added[name + "lora_b"][layer].reshape(config.rank, -1)
        return np.float32(config.alpha / config.rank) * (a_Ir @ b_rO)

    def check(self) -> None:
        """Raises ValueError if the adapter was trained on another base. All units must have been read before."""
        self._adapter.check_identity(
            lora.digest(self._prints),
            "give the weights that it was trained on, or pass any_base=True (--any-base) to use these",
        )


@contextlib.contextmanager
def _merged_units(directory: pathlib.Path, config: DreamConfig, adapter: Adapter) -> Iterator[_MergedUnits]:
    # The units are read in float32, whatever the dtype of the base is, so that the sum is rounded only once.
    units = {unit.name: unit for unit in checkpoint.units(config, "float32")}
    with unit_reader(directory, config, None) as read:
        yield _MergedUnits(units, read, adapter)


def _stored_dtype(directory: pathlib.Path, config: DreamConfig) -> np.dtype:
    if checkpoint.is_converted(directory):
        return checkpoint.read_description(directory, config).dtype
    with hf.open_source(directory) as opened:
        return opened.dtype


def _read_named(directory: pathlib.Path, unit: checkpoint.WeightUnit) -> Named:
    return {(name, unit.layer): array for name, array in hf.flat(checkpoint.read_unit(directory, unit)).items()}


def _fetch_ahead(
    read: Callable[[checkpoint.WeightUnit], Named], units: list[checkpoint.WeightUnit], pool: ThreadPoolExecutor
) -> Callable[[str, int | None], np.ndarray]:
    """Returns a function that returns parameters in the order of the units, and reads one unit ahead."""
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
                raise ValueError(f"{target} of layer {layer} was requested out of the order of the units")
            current.update(coming.result())
            coming = start()
        return current.pop((target, layer))

    return fetch


def _conversion(source: pathlib.Path, target: pathlib.Path, config: DreamConfig, dtype: np.dtype) -> Conversion:
    return Conversion(
        source=source,
        target=target,
        dtype=dtype,
        tensors=len(hf.destinations(config)),
        parameters=config.num_parameters,
        nbytes=config.num_parameters * dtype.itemsize,
    )
