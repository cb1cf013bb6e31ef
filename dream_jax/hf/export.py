"""Writes a checkpoint in the published layout, one tensor at a time, so that a whole model need not be in memory."""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from dream_jax import layer_forms
from dream_jax.bounds import IntegerRange, check
from dream_jax.config import DreamConfig
from dream_jax.files import write_json
from dream_jax.finite import check_weights
from dream_jax.hf import table
from dream_jax.hf.load import flat, reading_threads
from dream_jax.hf.source import DTYPES, INDEX, SINGLE, copy_cast
from dream_jax.hf.table import Destination, Shape
from dream_jax.shapes import ParamTree

MAX_SHARD_SIZE = 5_000_000_000
SHARD_SIZE = IntegerRange(1, 2**50, "it is a number of bytes")
"""The range of the maximum number of bytes of weights in one file."""
"""Default of the maximum size of one file of weights, in bytes, as in published checkpoints."""

_BLOCK_BYTES = 8 * 2**20

# A function from the dotted path and the layer of a parameter (None outside of the layers) to its values. It is called
# once for every tensor, in the order of `table.destinations`.
Fetch = Callable[[str, int | None], np.ndarray]


def export(
    params: ParamTree,
    config: DreamConfig,
    directory: str | pathlib.Path,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Writes parameters that are in memory, in any form of `layer_forms`; for the other arguments see `export_from`.

    Raises:
      ValueError: the names or shapes of the parameters do not fit the configuration; they have several dtypes, or a dtype
        that published checkpoints do not have; some of them are on other hosts; or `max_shard_size` is below 1.
      FileExistsError, OSError: as for `export_from`.
    """
    shapes = table.parameter_shapes(config)
    given = {name: leaf.shape for name, leaf in flat(layer_forms.canonical_shapes(params)).items()}
    if given != dict(shapes):
        odd = sorted(name for name in given.keys() | shapes.keys() if given.get(name) != shapes.get(name))
        raise ValueError(f"these parameters do not fit the configuration in name or shape: {', '.join(odd)}")
    arrays = jax.tree.leaves(params)
    dtypes = sorted({str(array.dtype) for array in arrays})
    if len(dtypes) > 1:
        raise ValueError(
            f"the parameters have several dtypes, {' and '.join(dtypes)}; cast them to one before exporting"
        )
    if not all(array.is_fully_addressable for array in arrays):
        raise ValueError("some of these parameters are on other hosts; save the model, then run convert/flax_to_hf.py")

    outside = flat({name: value for name, value in params.items() if name != "layers"})

    @functools.lru_cache(maxsize=1)  # all tensors of a layer are fetched before those of the next one
    def in_layer(layer: int) -> dict[str, jax.Array]:
        return flat({"layers": layer_forms.layer_params(params["layers"], layer)})

    def fetch(target: str, layer: int | None) -> np.ndarray:
        return np.asarray(outside[target] if layer is None else in_layer(layer)[target])

    export_from(fetch, config, np.dtype(dtypes[0]), directory, max_shard_size, progress)


def export_from(
    fetch: Fetch,
    config: DreamConfig,
    dtype: np.dtype,
    directory: str | pathlib.Path,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Writes `model.safetensors`, or several files of at most `max_shard_size` bytes of weights and their index.

    A larger tensor gets a file of its own. With tied embeddings no `lm_head.weight` is written.

    Args:
      fetch: maps (dotted path, layer) to the values of a parameter, without a layer axis; the layer is None outside the
        layers. It is called once for each tensor, in the order of `table.destinations`.
      config: the configuration whose tensors are written.
      dtype: the dtype of the arrays from `fetch` and of the tensors in the files.
      directory: an existing directory without files of these names. After an error it may contain incomplete files.
      max_shard_size: the maximum number of bytes of weights in one file.
      progress: called from several threads with the number of bytes that were just written (not a total).

    Raises:
      ValueError: published checkpoints do not have this dtype; `max_shard_size` is below 1; or `fetch` returns an array of
        another shape or dtype.
      FileExistsError: the directory already has a file of one of these names.
      OSError: the disk is full, or the directory is missing or not writable. Exceptions of `fetch` are passed on.
    """
    directory = pathlib.Path(directory)
    code = next((code for code, known in DTYPES.items() if known == dtype), None)
    if code is None:
        raise ValueError(f"{dtype=} is not one of {', '.join(map(str, DTYPES.values()))}")
    check("max_shard_size", max_shard_size, SHARD_SIZE)
    destinations = table.destinations(config)
    sizes = {name: int(np.prod(destination.shape)) * dtype.itemsize for name, destination in destinations.items()}
    shards = list(_shards(sizes, max_shard_size))
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        shard = {name: destinations[name] for name in names}
        _write_shard(directory / file, shard, fetch, dtype, code, progress)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(sizes.values())
        index = {
            "metadata": {"total_parameters": total // dtype.itemsize, "total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(directory / INDEX, index)


def _shards(sizes: Mapping[str, int], max_shard_size: int) -> Iterator[list[str]]:
    """Yields the tensor names of each file; `sizes` maps names to bytes."""
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > max_shard_size:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _write_shard(
    path: pathlib.Path,
    destinations: Mapping[str, Destination],
    fetch: Fetch,
    dtype: np.dtype,
    code: str,
    progress: Callable[[int], object],
) -> None:
    """Writes one safetensors file; `code` is the name of the dtype in its header, such as "BF16"."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in sorted(destinations):  # the order inside a published file: by name
        offsets[name] = end
        end += int(np.prod(destinations[name].shape)) * dtype.itemsize
        shape = list(destinations[name].source_shape)
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [offsets[name], end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data begins at a multiple of 8 bytes
    start = 8 + len(header)
    with open(path, "xb") as file, ThreadPoolExecutor(reading_threads()) as pool:
        file.write(len(header).to_bytes(8, "little") + header)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, start + end)  # a full disk fails here, before the work
        for name, destination in destinations.items():
            source = _as_source(fetch(destination.rule.target, destination.layer), destination, dtype)
            jobs = _row_blocks(source.shape)

            def write(
                rows: slice, name: str = name, source: np.ndarray = source, offset: int = start + offsets[name]
            ) -> None:
                block = np.empty((rows.stop - rows.start, source.shape[1]), dtype)
                copy_cast(block, source[rows])
                check_weights(name, block)
                _write_at(file.fileno(), block, offset + rows.start * source.shape[1] * dtype.itemsize)
                progress(block.nbytes)

            list(pool.map(write, jobs))
        os.fsync(file.fileno())


def _as_source(array: np.ndarray, destination: Destination, dtype: np.dtype) -> np.ndarray:
    """Returns a parameter as its published tensor, with two axes: a vector gets a first axis of size 1.

    Raises ValueError for another shape or dtype than expected.
    """
    if array.shape != destination.shape or array.dtype != dtype:
        raise ValueError(
            f"{destination.rule.target}: got {array.dtype}{list(array.shape)}, expected {dtype}{list(destination.shape)}"
        )
    source = destination.rule.layout.inverse(array)
    return source if source.ndim == 2 else source[None]


def _row_blocks(shape: Shape) -> Iterator[slice]:
    """Yields slices of rows that together cover a matrix, each of about _BLOCK_BYTES in float32."""
    step = max(1, _BLOCK_BYTES // (4 * shape[1]))
    return (slice(row, min(row + step, shape[0])) for row in range(0, shape[0], step))


def _write_at(descriptor: int, block: np.ndarray, offset: int) -> None:
    data = block.reshape(-1).view(np.uint8).data
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
