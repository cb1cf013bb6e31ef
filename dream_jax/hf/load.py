"""From an opened checkpoint to jax arrays: each shard is filled once on the host, directly from the file."""

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

_Bounds = tuple[tuple[int, int], ...]  # slices, in a form that can be a dictionary's key


class Buffers:
    """Host memory for shards, reused when it is given back: allocating new pages takes as long as reading into them."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = collections.defaultdict(list)

    def take(self, nbytes: int) -> np.ndarray:
        """`nbytes` aligned bytes with undefined contents."""
        if self._free[nbytes]:
            return self._free[nbytes].pop()
        padded = np.empty(nbytes + _ALIGNMENT, np.uint8)
        start = -padded.ctypes.data % _ALIGNMENT
        return padded[start : start + nbytes]

    def give_back(self, buffers: Sequence[np.ndarray]) -> None:
        """Keeps buffers for the next `take` of their size; the caller must not use them any more."""
        for buffer in buffers:
            self._free[buffer.nbytes].append(buffer)


class HostShards:
    """The distinct shards of one array on this host, to be filled.

    A shard that is replicated over several devices is held once. `sharding` None means an uncommitted array on one device.
    """

    def __init__(self, shape: Shape, dtype: np.dtype, sharding: Sharding | None, buffers: Buffers):
        self._shape, self._sharding = shape, sharding
        self._devices: list[tuple[jax.Device | None, _Bounds]] = [(None, tuple((0, size) for size in shape))]
        if sharding is not None:
            indices = sharding.addressable_devices_indices_map(shape)
            self._devices = [(device, _bounds(index, shape)) for device, index in indices.items()]
        self.buffers: list[np.ndarray] = []
        self._arrays: dict[_Bounds, np.ndarray] = {}
        for bounds in dict.fromkeys(bounds for _, bounds in self._devices):
            shard_shape = tuple(stop - start for start, stop in bounds)
            self.buffers.append(buffers.take(int(np.prod(shard_shape)) * dtype.itemsize))
            self._arrays[bounds] = self.buffers[-1].view(dtype).reshape(shard_shape)

    def regions(self, layer: int | None) -> list[Region]:
        """The shards to fill; for a stacked array, those of one layer, without the layer axis."""
        if layer is None:
            return [(_slices(bounds), array) for bounds, array in self._arrays.items()]
        return [
            (_slices(bounds[1:]), array[layer - bounds[0][0]])
            for bounds, array in self._arrays.items()
            if bounds[0][0] <= layer < bounds[0][1]
        ]

    def to_array(self) -> jax.Array:
        """The jax array, once all shards are filled."""
        shards = [jax.device_put(self._arrays[bounds], device) for device, bounds in self._devices]
        if self._sharding is None:
            return shards[0]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, shards)


def _bounds(index: Slices | None, shape: Shape) -> _Bounds:
    ranges = [one.indices(size) for one, size in zip(index or (), shape, strict=True)]
    return tuple((start, stop) for start, stop, _ in ranges)


def _slices(bounds: _Bounds) -> Slices:
    return tuple(slice(start, stop) for start, stop in bounds)


class Reading:
    """Parameters that the threads of a pool are reading."""

    def __init__(self, shards: Mapping[str, HostShards], work: Sequence[Future[int]]):
        self._shards, self._work = shards, work

    @property
    def buffers(self) -> list[np.ndarray]:
        """The memory of the arrays (on a CPU), to be given back when the arrays are no longer needed."""
        return [buffer for shards in self._shards.values() for buffer in shards.buffers]

    def wait(self) -> dict[str, jax.Array]:
        """Waits until everything is read; returns the parameters by dotted path."""
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
    """Starts to read parameters.

    Args:
      source: the checkpoint, checked.
      wanted: the source tensors of every parameter, by dotted path: one tensor, or one per layer for a stacked shape.
      shapes: the shape of each parameter; one with a layer axis is read stacked.
      shardings: the sharding of each parameter; None for one device.
      dtype: of the parameters.
      pool: runs the jobs.
      buffers: where host memory comes from.
      progress: called with the number of source bytes that were processed, from any thread.
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
                if regions:  # with several hosts this layer may be on another one
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

    Besides the result, the host holds at most one stacked parameter.

    Args:
      source_dir: directory with safetensors, or an opened source.
      config: what the checkpoint must hold.
      dtype: of the parameters.
      mesh: the devices of the parameters; None for one device.
      progress: called with the number of source bytes that were processed, from several threads.

    Raises:
      FileNotFoundError, ValueError: as `open_source` and `SafetensorsSource.check`.
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
    """How many threads read and transpose tensors: more than a few only wait for the same memory."""
    return min(8, max(2, os.cpu_count() or 1))


def flat_shardings(shapes: Mapping[str, Shape], mesh: Mesh) -> dict[str, Sharding]:
    """Sharding of every parameter by dotted path."""
    tree = nested({name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()})
    return flat(parameter_shardings(tree, mesh))


def nested(params: Mapping[str, object]) -> ParamTree:
    """{"a.b": x} -> {"a": {"b": x}}."""
    tree: ParamTree = {}
    for name, leaf in params.items():
        *folders, last = name.split(".")
        here = tree
        for folder in folders:
            here = here.setdefault(folder, {})
        here[last] = leaf
    return tree


def flat(tree: ParamTree) -> dict:
    """{"a": {"b": x}} -> {"a.b": x}."""
    return {".".join(str(part.key) for part in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
