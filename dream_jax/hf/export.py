"""Writing a checkpoint in the published layout, piece by piece: memory does not grow with the model.

Knows the safetensors format and the index. Knows nothing of where parameters come from: it asks for one at a
time.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from dream_jax.config import DreamConfig
from dream_jax.hf import table
from dream_jax.hf.load import flat, reading_threads
from dream_jax.hf.source import DTYPES, INDEX, SINGLE, copy_cast
from dream_jax.hf.table import Place, Shape
from dream_jax.shapes import ParamTree

MAX_SHARD_SIZE = 5_000_000_000
"""Bytes of a shard, as in published checkpoints."""

_BLOCK_BYTES = 8 * 2**20

# Called once for every source tensor, in the order of `table.places`: a parameter's path and layer -> its
# values.
Fetch = Callable[[str, int | None], np.ndarray]


def export(
    params: ParamTree,
    config: DreamConfig,
    directory: str | pathlib.Path,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Writes parameters held in memory; see `export_from`.

    Raises:
      ValueError: the parameters are not those of the configuration, have several dtypes, or lie partly on
        other hosts.
    """
    arrays: dict[str, jax.Array] = flat(params)
    shapes = table.parameter_shapes(config)
    if {name: array.shape for name, array in arrays.items()} != dict(shapes):
        odd = sorted(
            name
            for name in arrays.keys() | shapes.keys()
            if name not in arrays or name not in shapes or arrays[name].shape != shapes[name]
        )
        raise ValueError(f"these parameters are not those of the configuration: {', '.join(odd)}")
    dtypes = sorted({str(array.dtype) for array in arrays.values()})
    if len(dtypes) > 1:
        raise ValueError(
            f"the parameters have several dtypes, {' and '.join(dtypes)}; cast them to one before exporting"
        )
    if not all(array.is_fully_addressable for array in arrays.values()):
        raise ValueError("parts of these parameters lie on other hosts; save the model, then run convert/flax_to_hf.py")

    def fetch(target: str, layer: int | None) -> np.ndarray:
        return np.asarray(arrays[target] if layer is None else arrays[target][layer])

    export_from(fetch, config, np.dtype(dtypes[0]), directory, max_shard_size, progress)


def export_from(
    fetch: Fetch,
    config: DreamConfig,
    dtype: np.dtype,
    directory: str | pathlib.Path,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_size` bytes of weights and their index.

    A tensor larger than that gets a shard of its own. With tied embeddings there is no `lm_head.weight`.

    Args:
      fetch: gives each parameter (or one layer of a stacked one) when asked; not called again for the same
        one.
      config: whose tensors to write.
      dtype: that `fetch` gives and the files get.
      directory: where; must exist.
      max_shard_size: in bytes.
      progress: called with the number of bytes written, from several threads.

    Raises:
      ValueError: a dtype that published checkpoints do not have, or a `max_shard_size` below 1.
      OSError: the disk is full.
    """
    directory = pathlib.Path(directory)
    code = next((code for code, known in DTYPES.items() if known == dtype), None)
    if code is None:
        raise ValueError(f"{dtype=} is not one of {', '.join(map(str, DTYPES.values()))}")
    if max_shard_size < 1:
        raise ValueError(f"{max_shard_size=} must be at least 1 byte")
    places = table.places(config)
    sizes = {name: int(np.prod(place.shape)) * dtype.itemsize for name, place in places.items()}
    shards = list(_shards(sizes, max_shard_size))
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        shard = {name: places[name] for name in names}
        _write_shard(directory / file, shard, fetch, dtype, code, progress)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(sizes.values())
        index = {
            "metadata": {"total_parameters": total // dtype.itemsize, "total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: Mapping[str, int], max_shard_size: int) -> Iterator[list[str]]:
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
    places: Mapping[str, Place],
    fetch: Fetch,
    dtype: np.dtype,
    code: str,
    progress: Callable[[int], object],
) -> None:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in sorted(places):  # as published: by name inside a file
        offsets[name] = end
        end += int(np.prod(places[name].shape)) * dtype.itemsize
        shape = list(places[name].source_shape)
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [offsets[name], end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data begins at a multiple of 8 bytes
    start = 8 + len(header)
    with open(path, "xb") as file, ThreadPoolExecutor(reading_threads()) as pool:
        file.write(len(header).to_bytes(8, "little") + header)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, start + end)  # a full disk shows here, before the work
        for name, place in places.items():
            source = _as_source(fetch(place.rule.target, place.layer), place, dtype)
            jobs = _row_blocks(source.shape)

            def write(rows: slice, source: np.ndarray = source, offset: int = start + offsets[name]) -> None:
                block = np.empty((rows.stop - rows.start, source.shape[1]), dtype)
                copy_cast(block, source[rows])
                _write_at(file.fileno(), block, offset + rows.start * source.shape[1] * dtype.itemsize)
                progress(block.nbytes)

            list(pool.map(write, jobs))
        os.fsync(file.fileno())


def _as_source(array: np.ndarray, place: Place, dtype: np.dtype) -> np.ndarray:
    if array.shape != place.shape or array.dtype != dtype:
        raise ValueError(
            f"{place.rule.target}: got {array.dtype}{list(array.shape)}, expected {dtype}{list(place.shape)}"
        )
    source = place.rule.layout.inverse(array)
    return source if source.ndim == 2 else source[None]


def _row_blocks(shape: Shape) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // (4 * shape[1]))
    return (slice(row, min(row + step, shape[0])) for row in range(0, shape[0], step))


def _write_at(descriptor: int, block: np.ndarray, offset: int) -> None:
    data = block.reshape(-1).view(np.uint8).data
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
