"""Reads an opened checkpoint into jax arrays: each device shard is filled in host memory, directly from the files."""

from __future__ import annotations

import collections
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from dream_jax.config import DreamConfig
from dream_jax.hf import table
from dream_jax.hf.source import Region, SafetensorsSource, open_source
from dream_jax.hf.table import Destination, Shape, Slices
from dream_jax.shapes import ParamTree
from dream_jax.sharding import parameter_shardings

_ALIGNMENT = 64  # bytes; on a CPU jax uses memory with this alignment without a copy

_Bounds = tuple[tuple[int, int], ...]  # (start, stop) of each axis: slices cannot be dictionary keys


class Buffers:
    """A pool of host memory for device shards. It reuses memory, because allocating takes as long as reading a file."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = collections.defaultdict(list)

    def take(self, nbytes: int) -> np.ndarray:
        """Returns a uint8 array [nbytes], aligned to 64 bytes, with undefined contents: a reused buffer or a new one."""
        if self._free[nbytes]:
            return self._free[nbytes].pop()
        padded = np.empty(nbytes + _ALIGNMENT, np.uint8)
        start = -padded.ctypes.data % _ALIGNMENT
        return padded[start : start + nbytes]

    def give_back(self, buffers: Sequence[np.ndarray]) -> None:
        """Stores buffers for the next `take` of the same size; the caller must not use them any more."""
        for buffer in buffers:
            self._free[buffer.nbytes].append(buffer)


class HostShards:
    """Host memory for the shards of one array; fill the arrays of `regions`, then call `to_array`.

    Only the shards of this host's devices are held, and a shard that several devices have is held once. With
    `sharding=None` there is one shard, the whole array, and `to_array` returns it uncommitted on the default device.
    """

    def __init__(self, shape: Shape, dtype: np.dtype, sharding: Sharding | None, buffers: Buffers):
        self._shape, self._sharding = shape, sharding
        self._device_bounds: list[tuple[jax.Device | None, _Bounds]] = [(None, tuple((0, size) for size in shape))]
        if sharding is not None:
            indices = sharding.addressable_devices_indices_map(shape)
            self._device_bounds = [(device, _bounds(index, shape)) for device, index in indices.items()]
        self.buffers: list[np.ndarray] = []
        self._arrays: dict[_Bounds, np.ndarray] = {}
        for bounds in dict.fromkeys(bounds for _, bounds in self._device_bounds):
            shard_shape = tuple(stop - start for start, stop in bounds)
            self.buffers.append(buffers.take(int(np.prod(shard_shape)) * dtype.itemsize))
            self._arrays[bounds] = self.buffers[-1].view(dtype).reshape(shard_shape)

    def regions(self, layer: int | None) -> list[Region]:
        """Returns the (slices of the parameter, array to fill) of each shard.

        Args:
          layer: index of one layer of a stacked array: only the shards that hold it are returned, and slices and arrays
            are without the layer axis. None for the whole of the array.
        """
        if layer is None:
            return [(_slices(bounds), array) for bounds, array in self._arrays.items()]
        return [
            (_slices(bounds[1:]), array[layer - bounds[0][0]])
            for bounds, array in self._arrays.items()
            if bounds[0][0] <= layer < bounds[0][1]
        ]

    def to_array(self) -> jax.Array:
        """Copies the filled shards to their devices; on a CPU the result may share their memory."""
        shards = [jax.device_put(self._arrays[bounds], device) for device, bounds in self._device_bounds]
        if self._sharding is None:
            return shards[0]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, shards)


def _bounds(index: Slices | None, shape: Shape) -> _Bounds:
    ranges = [one.indices(size) for one, size in zip(index or (), shape, strict=True)]
    return tuple((start, stop) for start, stop, _ in ranges)


def _slices(bounds: _Bounds) -> Slices:
    return tuple(slice(start, stop) for start, stop in bounds)


class Reading:
    """A handle on parameters that the threads of a pool are reading; `wait` returns them."""

    def __init__(self, shards: Mapping[str, HostShards], work: Sequence[Future[int]]):
        self._shards, self._work = shards, work

    @property
    def buffers(self) -> list[np.ndarray]:
        """The filled host buffers, for `Buffers.give_back`. On a CPU the arrays use them until they are deleted."""
        return [buffer for shards in self._shards.values() for buffer in shards.buffers]

    def wait(self) -> dict[str, jax.Array]:
        """Waits until all is read; returns dotted path -> array. Raises the ValueError or OSError of a failed read."""
        for future in self._work:
            future.result()
        return {target: shards.to_array() for target, shards in self._shards.items()}


def start_reading(
    source: SafetensorsSource,
    wanted: Mapping[str, Sequence[tuple[str, Destination]]],
    shapes: Mapping[str, Shape],
    shardings: Mapping[str, Sharding] | None,
    dtype: np.dtype,
    pool: Executor,
    buffers: Buffers,
    progress: Callable[[int], object] = lambda _: None,
) -> Reading:
    """Starts to read parameters in the threads of `pool` and returns at once; `Reading.wait` returns the arrays.

    Args:
      source: the opened checkpoint, for which `source.check` has passed.
      wanted: dotted path of a parameter -> its source tensors, as (name, destination): one, or one per layer.
      shapes: dotted path -> shape of the parameter; if it has a layer axis, the layers are read into one stacked array.
      shardings: dotted path -> sharding of the parameter; None for one device.
      dtype: the dtype of the returned parameters.
      pool: the thread pool that reads the tensors.
      buffers: the pool of host memory.
      progress: called from several threads with the number of source bytes that were just processed (not a total).
    """
    shards = {
        target: HostShards(shapes[target], dtype, None if shardings is None else shardings[target], buffers)
        for target in wanted
    }

    def jobs() -> Iterator[Callable[[], int]]:
        for target, tensors in wanted.items():
            for name, destination in tensors:
                stacked = len(shapes[target]) > len(destination.shape)
                regions = shards[target].regions(destination.layer if stacked else None)
                if regions:  # with several hosts, this layer may belong to another host
                    yield from source.fill_jobs(name, destination, regions)

    def run(job: Callable[[], int]) -> int:
        done = job()
        progress(done)
        return done

    return Reading(shards, [pool.submit(run, job) for job in jobs()])


def load_params(
    source_dir: str | pathlib.Path | SafetensorsSource,
    config: DreamConfig,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> ParamTree:
    """Reads a published checkpoint into stacked parameters; the shard of each device comes directly from the files.

    Besides the result, at most one stacked parameter is in the memory of the host.

    Args:
      source_dir: directory with safetensors, or an opened source.
      config: the configuration of the model; the checkpoint must have its tensor names and shapes.
      dtype: the dtype of the returned parameters; tensors are cast to it.
      mesh: the devices of the parameters; None for one device.
      progress: called from several threads with the number of source bytes that were just processed (not a total).

    Returns:
      A nested dict of arrays, in which the parameters of the layers are stacked on a first axis L.

    Raises:
      FileNotFoundError: as for `open_source`.
      ValueError: as for `open_source` and `SafetensorsSource.check`.
      OSError: a file cannot be read.
    """
    if not isinstance(source_dir, SafetensorsSource):
        with open_source(source_dir) as source:
            return load_params(source, config, dtype, mesh, progress)
    source_dir.check(config)
    shapes = table.parameter_shapes(config)
    shardings = None if mesh is None else flat_shardings(shapes, mesh)
    tensors: dict[str, list[tuple[str, Destination]]] = collections.defaultdict(list)
    for name, destination in table.destinations(config).items():
        tensors[destination.rule.target].append((name, destination))
    params: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(reading_threads()) as pool:
        for target, wanted in tensors.items():
            reading = start_reading(
                source_dir, {target: wanted}, shapes, shardings, np.dtype(dtype), pool, Buffers(), progress
            )
            params |= reading.wait()
            del reading
    jax.block_until_ready(params)
    return nested(params)


def reading_threads() -> int:
    """Returns the number of threads that read tensors, 2 to 8: more are not faster, as memory bandwidth is the limit."""
    return min(8, max(2, os.cpu_count() or 1))


def flat_shardings(shapes: Mapping[str, Shape], mesh: Mesh) -> dict[str, Sharding]:
    """Returns dotted path -> sharding for parameters of these shapes (dotted path -> shape)."""
    tree = nested({name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()})
    return flat(parameter_shardings(tree, mesh))


def nested(params: Mapping[str, object]) -> ParamTree:
    """Splits dotted keys into nested dicts: {"a.b": x} -> {"a": {"b": x}}. The inverse of `flat`."""
    tree: ParamTree = {}
    for name, leaf in params.items():
        *parents, last = name.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = leaf
    return tree


def flat(tree: ParamTree) -> dict:
    """Joins the keys of nested dicts with dots: {"a": {"b": x}} -> {"a.b": x}. The inverse of `nested`."""
    return {".".join(str(part.key) for part in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
