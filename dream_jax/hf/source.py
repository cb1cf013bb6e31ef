"""Opens and reads a published checkpoint; its safetensors files are checked before the first weight is used.

The files contain numbers only: nothing in them is executed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dream_jax.config import DreamConfig
from dream_jax.finite import check_weights
from dream_jax.hf import table
from dream_jax.hf.table import Destination, Shape, Slices
from dream_jax.side_files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}

_PIECE_BYTES = 32 * 2**20  # approximate number of bytes that one job of the thread pool reads
# Number of rows that are read, cast and transposed at once. Transposed, n rows become pieces of n neighbouring numbers;
# with far fewer rows these pieces are so short that writing them takes twice as long.
_BLOCK_ROWS = 512

_LARGEST_HEADER = 100_000_000  # the limit of the safetensors library for the header of a file, in bytes

# A region of a parameter (slices of its axes without the layer axis), and an array of this shape to read the region into.
Region = tuple[Slices, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The location of one tensor: `nbytes` bytes, which start at byte `offset` of the file at `path`."""

    name: str
    path: pathlib.Path
    offset: int
    shape: Shape
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor in the file, in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class SafetensorsSource:
    """An opened checkpoint; a context manager that closes its files at the end.

    Attributes:
      directory: the directory of the checkpoint.
      tensors: name -> location of each tensor.
    """

    def __init__(self, directory: pathlib.Path, tensors: Mapping[str, Tensor]):
        self.directory = directory
        self.tensors = tensors
        self._files = {path: os.open(path, os.O_RDONLY) for path in {t.path for t in tensors.values()}}
        self._local = threading.local()

    def __enter__(self) -> SafetensorsSource:
        return self

    def __exit__(self, *exception: object) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    @property
    def dtype(self) -> np.dtype:
        """The dtype of all tensors. Raises ValueError if the tensors have several dtypes."""
        found = sorted({str(tensor.dtype) for tensor in self.tensors.values()})
        if len(found) > 1:
            raise ValueError(
                f"{self.directory} holds weights in {' and '.join(found)}; choose the one to store with dtype"
            )
        return next(iter(self.tensors.values())).dtype

    def check(self, config: DreamConfig) -> None:
        """Checks that the tensors have the names and shapes of a configuration.

        If the configuration ties the embeddings and the checkpoint has an `lm_head.weight` nevertheless, both tensors are
        read and must be equal.

        Raises:
          ValueError: a tensor is missing, unknown or of another shape, and the message has names and shapes; or tied
            tensors differ; or a file has become shorter since it was opened.
        """
        try:
            table.check_names(self.tensors, config)
        except ValueError as error:
            index = self.directory / INDEX
            split = index.is_file() and not (self.directory / SINGLE).is_file()
            raise ValueError(f"{index if split else self.directory}: {error}") from error
        for name, destination in table.destinations(config).items():
            tensor = self.tensors[name]
            if tensor.shape != destination.source_shape:
                raise ValueError(
                    f"{tensor.path}: {name} has shape {list(tensor.shape)}, but config.json asks for "
                    f"{list(destination.source_shape)}"
                )
        if config.tie_word_embeddings and table.TIED_NAMES[1] in self.tensors:
            self._check_tied(*(self.tensors[name] for name in table.TIED_NAMES))

    def _check_tied(self, embedding: Tensor, head: Tensor) -> None:
        """Raises ValueError if the two tensors are not equal bit for bit."""
        same = (embedding.shape, embedding.dtype) == (head.shape, head.dtype)
        for start in range(0, embedding.nbytes if same else 0, _PIECE_BYTES):
            size = min(_PIECE_BYTES, embedding.nbytes - start)
            first, second = np.empty(size, np.uint8), np.empty(size, np.uint8)
            self._read(embedding, start, first)
            self._read(head, start, second)
            same = same and np.array_equal(first, second)
        if not same:
            raise ValueError(
                f"{head.path}: config.json ties the embeddings, but {head.name} differs from "
                f"{embedding.name}; set tie_word_embeddings to false there if the two are separate weights"
            )

    def fill_jobs(self, name: str, destination: Destination, regions: Sequence[Region]) -> Iterator[Callable[[], int]]:
        """Yields jobs that together read one tensor into `regions`; each returns the number of source bytes it processed.

        Each job can run in its own thread. Only rows that the regions need are read, each row once, and cast to the dtype
        of the regions; with the same dtype every bit is copied.

        Args:
          name: the name of the tensor.
          destination: the parameter, or layer of a parameter, that the tensor becomes.
          regions: regions of that parameter, each with the contiguous array to fill.

        Raises:
          ValueError: an array of a region is not contiguous, or a region is no slice of the tensor. A job raises
            ValueError if the file has become shorter, or if a weight is no number or would be infinite after the cast.
        """
        tensor = self.tensors[name]
        views = []
        for slices, out in regions:
            rows, columns = [*destination.rule.layout.source_slices(slices, destination.shape), slice(0, 1)][:2]
            flat = out.reshape(destination.rule.layout.flat_shape(out.shape))
            view = flat.T if destination.rule.layout.transposed else flat
            if flat.size and not np.shares_memory(flat, out):
                raise ValueError(f"{name}: the array to fill must be contiguous")
            views.append((rows, columns, view.reshape(-1, 1) if view.ndim == 1 else view))
        first = min(rows.start for rows, _, _ in views)
        last = max(rows.stop for rows, _, _ in views)
        row_bytes = tensor.nbytes // tensor.shape[0]
        step = _BLOCK_ROWS * max(1, _PIECE_BYTES // (_BLOCK_ROWS * row_bytes))
        for start in range(first, last, step):
            yield functools.partial(self._fill, tensor, start, min(start + step, last), views)

    def read(self, name: str) -> np.ndarray:
        """Returns a whole tensor. Raises ValueError if the file has become shorter since it was opened."""
        tensor = self.tensors[name]
        values = np.empty(tensor.shape, tensor.dtype)
        if values.nbytes:
            self._read(tensor, 0, values)
        return values

    def _fill(self, tensor: Tensor, start: int, stop: int, views: Sequence[tuple[slice, slice, np.ndarray]]) -> int:
        """Reads rows [start, stop) of a tensor into the views; returns the number of source bytes.

        A view is (rows, columns, array): the region of the tensor, as slices, and the array to fill with it.
        """
        low = min(columns.start for _, columns, _ in views)
        high = max(columns.stop for _, columns, _ in views)
        row_bytes = tensor.nbytes // tensor.shape[0]
        for row in range(start, stop, _BLOCK_ROWS):
            end = min(row + _BLOCK_ROWS, stop)
            block = self._rows(tensor, row, end, low, high)
            # The block is in the cache of the CPU now, so that this takes a small part of the time of reading.
            check_weights(f"{tensor.path}: {tensor.name}", block, views[0][2].dtype)
            for rows, columns, view in views:
                top, bottom = max(row, rows.start), min(end, rows.stop)
                if top < bottom:
                    piece = block[top - row : bottom - row, columns.start - low : columns.stop - low]
                    copy_cast(view[top - rows.start : bottom - rows.start], piece)
        return (stop - start) * row_bytes

    def _rows(self, tensor: Tensor, start: int, stop: int, low: int, high: int) -> np.ndarray:
        """Returns rows [start, stop) and columns [low, high) of a tensor.

        The next call in this thread overwrites the array.
        """
        size = tensor.dtype.itemsize
        width = tensor.nbytes // tensor.shape[0] // size
        # Seeking takes as long as reading a few kilobytes, so columns are skipped only when most of them are not needed.
        if (high - low) * 4 > width:
            block = self._scratch((stop - start) * width, tensor.dtype)
            self._read(tensor, start * width * size, block)
            return block.reshape(-1, width)[:, low:high]
        block = self._scratch((stop - start) * (high - low), tensor.dtype).reshape(-1, high - low)
        for row in range(start, stop):
            self._read(tensor, (row * width + low) * size, block[row - start])
        return block

    def _scratch(self, count: int, dtype: np.dtype) -> np.ndarray:
        needed = count * dtype.itemsize
        if getattr(self._local, "scratch", np.empty(0)).nbytes < needed:
            self._local.scratch = np.empty(needed, np.uint8)
        return self._local.scratch[:needed].view(dtype)

    def _read(self, tensor: Tensor, offset: int, out: np.ndarray) -> None:
        target = out.view(np.uint8).data.cast("B")
        while target:
            count = os.preadv(self._files[tensor.path], [target], tensor.offset + offset)
            if not count:
                raise ValueError(f"{tensor.path} ends inside {tensor.name}: the file was truncated after it was opened")
            target, offset = target[count:], offset + count


def copy_cast(target: np.ndarray, source: np.ndarray) -> None:
    """Copies a matrix into `target`, of the same shape and any strides, and casts it if the dtypes differ.

    It copies block by block: an element-wise copy from rows to columns of a large matrix misses the CPU cache at every
    element, which is about six times slower.
    """
    if target.dtype == source.dtype:  # as integers: exact for every NaN, and faster than 16-bit floats
        target, source = target.view(f"u{target.itemsize}"), source.view(f"u{source.itemsize}")
    elif (source.dtype, target.dtype) == (DTYPES["BF16"], DTYPES["F32"]):
        bits = source.view(np.uint16).astype(np.uint32)  # a bfloat16 is the upper half of a float32
        bits <<= 16
        target, source = target.view(np.uint32), bits
    else:
        source = source.astype(target.dtype)
    if target.strides[0] < target.strides[1]:
        target, source = target.T, source.T
    if source.strides[1] <= source.strides[0]:
        target[...] = source
        return
    for row in range(0, target.shape[0], 128):
        for column in range(0, target.shape[1], 512):
            block = np.s_[row : row + 128, column : column + 512]
            target[block] = source[block]


def open_file(path: pathlib.Path) -> SafetensorsSource:
    """Opens a single safetensors file; raises as `open_source` does for a file."""
    return SafetensorsSource(path.parent, _read_header(path))


def read_metadata(path: pathlib.Path) -> dict[str, str]:
    """Returns the texts, by name, that the header of a safetensors file has beside its tensors."""
    with safe_open(path, framework="np") as file:
        return dict(file.metadata() or {})


def open_source(directory: str | pathlib.Path) -> SafetensorsSource:
    """Opens `model.safetensors`, or the files that its index lists, and checks that they are complete.

    Raises:
      FileNotFoundError: neither `model.safetensors` nor the index is there, or a listed file is missing.
      ValueError: the index is damaged; a file is truncated or not a safetensors file, has a dtype other than float32,
        bfloat16 or float16, or does not have exactly the tensors that the index lists for it; or two files have the same
        tensor. The message names the file and the tensor.
    """
    directory = pathlib.Path(directory)
    if (directory / SINGLE).is_file():
        return SafetensorsSource(directory, _read_header(directory / SINGLE))
    if not (directory / INDEX).is_file():
        raise FileNotFoundError(f"{directory} holds neither {SINGLE} nor {INDEX}")
    weight_map = _read_index(directory / INDEX)
    missing = sorted({file for file in weight_map.values() if not (directory / file).is_file()})
    if missing:
        raise FileNotFoundError(f"{directory / INDEX} lists files that are missing: {', '.join(missing)}")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        found = _read_header(directory / file)
        for name in found:
            if name in tensors:
                raise ValueError(f"tensor {name} is in both {tensors[name].path} and {directory / file}")
            if weight_map.get(name) != file:
                listing = f"lists it in {weight_map[name]}" if name in weight_map else "does not list it"
                raise ValueError(f"{directory / file} holds tensor {name}, but {INDEX} {listing}")
        absent = [name for name, wanted in weight_map.items() if wanted == file and name not in found]
        if absent:
            raise ValueError(f"{directory / file} lacks tensors that {INDEX} lists for it: {', '.join(sorted(absent))}")
        tensors |= found
    return SafetensorsSource(directory, tensors)


def _read_index(path: pathlib.Path) -> dict[str, str]:
    """Returns tensor name -> file name from an index. Raises ValueError if the index is damaged."""
    index = read_json(path, "restore it from the source of the checkpoint")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map that lists tensors")
    for name, file in weight_map.items():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise ValueError(f"{path} lists {name} in {file!r}, which is not the name of a file in the same directory")
    return weight_map


def _read_header(path: pathlib.Path) -> dict[str, Tensor]:
    """Returns name -> tensor of one file. Raises ValueError if it is truncated, damaged or of another dtype."""
    try:
        with safe_open(path, framework="numpy"):  # checks that lengths and offsets leave no gap and no overlap
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {_what_is_cut(path) or error}") from error
    size, header = _raw_header(path)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}")
        offset = 8 + size + entry["data_offsets"][0]
        tensors[name] = Tensor(name, path, offset, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    return tensors


def _raw_header(path: pathlib.Path) -> tuple[int, dict[str, Any]]:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return size, header


def _what_is_cut(path: pathlib.Path) -> str | None:
    """Returns the size of a truncated file and the first tensor that ends after it, as text for a message.

    Returns None if no tensor does, or if the header cannot be read.
    """
    length = path.stat().st_size
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if length < 8 or size > min(length - 8, _LARGEST_HEADER):
        return None
    try:
        header = _raw_header(path)[1]
        ends = sorted((int(entry["data_offsets"][1]), name) for name, entry in header.items())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None
    for end, name in ends:
        if 8 + size + end > length:
            return f"it has {length} bytes, but {name} ends at byte {8 + size + end}"
    return None
