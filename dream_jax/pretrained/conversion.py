"""Converts between Hugging Face and converted directories, unit by unit, so that a whole model is never in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh

from dream_jax import checkpoint, hf, lora
from dream_jax.config import DreamConfig
from dream_jax.files import check_new_directory, new_directory
from dream_jax.model import abstract_model
from dream_jax.paths import AnyPath, copy_companion, local_path
from dream_jax.pretrained.adapter import Adapter, adapter_params, describe_adapter
from dream_jax.pretrained.by_layer import start_unit, unit_reader
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
from dream_jax.shapes import ParamTree
from dream_jax.sharding import make_mesh
from dream_jax.tokenizer import PROMPT_FORMAT_FILE

Named = dict[tuple[str, int | None], np.ndarray]
"""The parameters of one unit: (dotted path, layer index or None outside the layers) -> values, without a layer axis."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """The description of a conversion, before or after it.

    Attributes:
      source, target: the directories that are read and written.
      dtype: the dtype of the weights in the target.
      tensors: the number of tensors in the published layout.
      parameters: the number of weights.
      nbytes: the size of the weights in the target, in bytes.
      note: what a user should know about the adapter that is added, as one line; None for nothing.
    """

    source: pathlib.Path
    target: pathlib.Path
    dtype: np.dtype
    tensors: int
    parameters: int
    nbytes: int
    note: str | None = None


def convert_from_hf(
    source: AnyPath,
    target: AnyPath,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    mesh: Mesh | str | None = None,
    overwrite: bool = False,
    ignore_config_keys: Iterable[str] = (),
    started: Callable[[Conversion], object] = lambda _: None,
    progress: Callable[[int], object] = lambda _: None,
) -> Conversion:
    """Converts a Hugging Face checkpoint into a converted directory, unit by unit.

    At most two units (the embedding, a layer or the head) are in memory at a time: 2.3 GB for Dream-7B in bfloat16. The
    names, shapes and files of the source are checked before anything is written.

    Args:
      source: a Hugging Face directory or a hub id.
      target: the directory to write. It must not exist, except with `overwrite`; it appears only when it is complete.
      dtype: the dtype of the written weights; None for that of the source.
      mesh: a Mesh or "FSDPxTENSOR". Every array is written as one chunk for each of its shards on this mesh; any other
        mesh can load it too. None writes one chunk per array.
      overwrite: whether to replace a checkpoint at `target`, when the new one is complete.
      ignore_config_keys: keys of config.json that are known not to change what the weights compute.
      started: called once with the description of the conversion, when these checks have passed.
      progress: called with the number of bytes that were just written to the target (not a total).

    Returns:
      The description of the conversion.

    Raises:
      FileNotFoundError: `source` does not exist or is incomplete.
      FileExistsError: `target` exists and `overwrite` is false; or it is not a checkpoint, or holds a file that was not
        written by this program.
      ValueError: the source is already converted, damaged or of another architecture; it has several dtypes and `dtype`
        is None; `target` is the source, contains it or lies in it, or is an address; `dtype` or `mesh` is not valid; a file
        that would be copied is a link that leads out of the source.
      ConnectionError: the hub id cannot be downloaded.
      OSError: the disk is full, or a file cannot be read or written.
      RuntimeError: process 0 cannot create `target`; raised in the other processes.
    """
    local_path(target, "dst")
    mesh = None if mesh is None else make_mesh(mesh)  # before jax is asked for anything, because this makes CPU devices
    _check_target(target, overwrite)
    directory = find_directory(source)
    companions(directory)  # raises its errors before the weights are read
    check_sums(directory, weights=False)
    if checkpoint.is_converted(directory):
        raise ValueError(f"{directory} is already a converted directory; load it as it is")
    config = DreamConfig.from_file(directory, ignore=ignore_config_keys)
    with hf.open_source(directory) as opened:
        opened.check(config)
        stored = opened.dtype if dtype is None else as_dtype(dtype)
        conversion = _conversion(directory, pathlib.Path(target), config, stored)
        with new_directory(
            target,
            overwrite=overwrite,
            needed_bytes=conversion.nbytes,
            reads=(source, directory),
            known=known_files,
        ) as made:
            started(conversion)
            check_sums(directory, weights=True)
            _stream_from_hf(opened, made, config, stored, mesh, progress)
            write_companions(made, config, stored, directory)
            checkpoint.write_description(made, config, stored)
            write_sums(made)
    return conversion


def _check_target(target: AnyPath, overwrite: bool) -> None:
    """Raises the errors of a target that must not be written, before anything is downloaded or read."""
    local_path(target, "dst")
    if jax.process_count() == 1:  # otherwise process 0 finds them in `new_directory`, and tells the others
        check_new_directory(target, overwrite=overwrite, known=known_files)


def _stream_from_hf(
    source: hf.SafetensorsSource,
    directory: pathlib.Path,
    config: DreamConfig,
    dtype: np.dtype,
    mesh: Mesh | None,
    progress: Callable[[int], object],
) -> None:
    """Writes all units of the opened source to `directory`; threads read the next unit while one is written."""
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
    source: AnyPath,
    target: AnyPath,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    adapter: AnyPath | None = None,
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
      target, dtype, overwrite: as for `convert_from_hf`.
      adapter: the directory of an adapter to add to the weights; None for none.
      any_base: whether to accept an adapter that was trained on other weights with the same shapes.
      card: returns the text of the README.md for the weights; called before anything is written.
      max_shard_size: the maximum number of bytes of weights in one file; a larger tensor gets a file of its own.
      started: called once with the description of the conversion, before weights are read. Whether an adapter was trained
        on these weights is checked later, because all of them must be read for it.
      progress: called from several threads with the number of bytes that were just written (not a total).

    Returns:
      The description of the conversion.

    Raises:
      FileNotFoundError: `source` or the adapter does not exist or is incomplete.
      FileExistsError: as for `convert_from_hf`.
      ValueError: the source or the adapter is damaged; the source is not converted and there is no adapter; the adapter
        is for another architecture; the mask of the weights is not bidirectional; `target` is the source or the adapter,
        contains or lies in one of them, or is an address; `dtype` or `max_shard_size` is not valid. Also if the adapter was
        trained on other weights and `any_base` is false: this is raised after the whole source has been read. After an
        error no new directory is left, and an existing target is unchanged.
      ConnectionError: the hub id cannot be downloaded.
      OSError: the disk is full, or a file cannot be read or written.
      RuntimeError: process 0 cannot create `target`; raised in the other processes.
    """
    _check_target(target, overwrite)
    directory = find_directory(source)
    found = None if adapter is None else describe_adapter(adapter)
    companions(directory)  # raises its errors before the weights are read
    check_sums(directory, weights=False)
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
    if found is not None:
        conversion = dataclasses.replace(conversion, note=found.note)
    readme = None if card is None else card(conversion)
    with new_directory(
        target,
        overwrite=overwrite,
        needed_bytes=conversion.nbytes,
        reads=(source, directory, adapter),
        known=known_files,
    ) as made:
        started(conversion)
        check_sums(directory, weights=True)
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
            copy_companion(found.directory / PROMPT_FORMAT_FILE, made / PROMPT_FORMAT_FILE)
        if readme is not None:
            (made / "README.md").write_text(readme, encoding="utf-8")
        write_sums(made)
    return conversion


class _MergedUnits:
    """Reads each unit of a base once and adds the adapter to it; the whole base is never in memory."""

    def __init__(
        self,
        units: dict[str, checkpoint.WeightUnit],
        read: Callable[[checkpoint.WeightUnit], ParamTree],
        adapter: Adapter,
        config: DreamConfig,
    ):
        self._units, self._read, self._adapter = units, read, adapter
        self._hashes: list[lora.Print] = []
        stacked = hf.flat(adapter_params(adapter, None, base=config))
        self._added = {name: np.asarray(leaf, np.float32) for name, leaf in stacked.items()}

    def __call__(self, unit: checkpoint.WeightUnit) -> Named:
        """Returns the parameters of a unit with the adapter added, in the dtype of `unit.shapes`.

        The sum is computed in float32 and rounded once.
        """
        exact = self._read(self._units[unit.name])
        self._hashes += lora.prints(exact, unit.layer)
        params = {name: np.asarray(leaf) for name, leaf in hf.flat(exact).items()}
        wanted = hf.flat(unit.shapes)
        found: Named = {}
        for name, leaf in params.items():
            if unit.layer is not None and name.removesuffix("kernel") + "lora_a" in self._added:
                leaf = leaf + self._correction(name.removesuffix("kernel"), unit.layer).reshape(leaf.shape)
            with np.errstate(over="ignore"):  # the export refuses infinite weights, with the name of the tensor
                found[name, unit.layer] = leaf.astype(wanted[name].dtype)
        return found

    def _correction(self, name: str, layer: int) -> np.ndarray:
        """Returns what the adapter adds to one kernel, float32 [I, O]: I merged input axes, O merged output axes.

        `name` is the dotted path of the kernel without "kernel"; r is the rank of the adapter.
        """
        config = self._adapter.config
        a_Ir = self._added[name + "lora_a"][layer].reshape(-1, config.rank)
        b_rO = self._added[name + "lora_b"][layer].reshape(config.rank, -1)
        return np.float32(config.alpha / config.rank) * (a_Ir @ b_rO)

    def check(self) -> None:
        """Raises ValueError if the adapter was trained on another base. All units must have been read before."""
        self._adapter.check_identity(
            lora.digest(self._hashes),
            "give the weights that it was trained on, or pass any_base=True (--any-base) to use these",
        )


@contextlib.contextmanager
def _merged_units(directory: pathlib.Path, config: DreamConfig, adapter: Adapter) -> Iterator[_MergedUnits]:
    """Opens the base in `directory` and yields the reader of its units with the adapter added."""
    # The units are read in float32, whatever the dtype of the base is, so that the sum is rounded only once.
    units = {unit.name: unit for unit in checkpoint.units(config, "float32")}
    with unit_reader(directory, config, None) as read:
        yield _MergedUnits(units, read, adapter, config)


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
    """Returns a function (dotted path, layer) -> values for `hf.export_from`; it reads one unit ahead in `pool`.

    It must be called in the order of the units, once for each parameter; otherwise it raises ValueError.
    """
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
