"""Reads and writes the units of a converted directory: each is a small Orbax checkpoint in `weights/`."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dream_jax.checkpoint.trees import tree_differences
from dream_jax.config import DreamConfig
from dream_jax.files import is_disk_full
from dream_jax.finite import check_parameters
from dream_jax.model import abstract_model, split_params
from dream_jax.shapes import ParamTree
from dream_jax.sharding import parameter_specs

WEIGHTS = "weights"


@dataclasses.dataclass(frozen=True)
class WeightUnit:
    """The weights that are written and read together: those of one layer, the embedding, or all others.

    Attributes:
      name: the name of the folder in `weights/`.
      layer: the number of the layer, from 0; None for the two units that are not a layer.
      shapes: nested dict of `jax.ShapeDtypeStruct`s. For a layer it is {"layers": ...}, and the shapes have no
        layer axis.
      specs: nested dict of the same keys with the PartitionSpec of each parameter; empty without a mesh.
    """

    name: str
    layer: int | None
    shapes: ParamTree
    specs: ParamTree

    @property
    def nbytes(self) -> int:
        """The size of the weights of this unit, in bytes."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.shapes))


def units(config: DreamConfig, dtype: jax.typing.DTypeLike, mesh: Mesh | None = None) -> list[WeightUnit]:
    """Returns the units of a model of this configuration, in this order: the embedding, each layer, the rest.

    `dtype` is the dtype of all shapes. `mesh` is the mesh that the `specs` are for; without it they are empty.
    """
    shapes = stacked_shapes(config, jnp.dtype(dtype).name)
    specs = {} if mesh is None else parameter_specs(shapes, mesh)
    rest = [key for key in shapes if key not in ("embed", "layers")]
    outside = [("embed", ["embed"]), ("head", rest)]
    first, last = (WeightUnit(name, None, only(shapes, keys), specs and only(specs, keys)) for name, keys in outside)
    layer_shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes["layers"])
    layer_specs = specs and map_specs(lambda spec: PartitionSpec(*spec[1:]), specs["layers"])
    middle = [
        WeightUnit(f"layer_{layer:03d}", layer, {"layers": layer_shapes}, specs and {"layers": layer_specs})
        for layer in range(config.num_hidden_layers)
    ]
    return [first, *middle, last]


@functools.lru_cache(maxsize=8)  # tracing takes a tenth of a second
def stacked_shapes(config: DreamConfig, dtype: str) -> ParamTree:
    """Returns the shapes of all parameters in this dtype, with the layers stacked."""
    return split_params(abstract_model(config, param_dtype=dtype))[1]


def only(tree: ParamTree, keys: Iterable[str]) -> ParamTree:
    """Returns a dict of these keys of `tree` only."""
    return {key: tree[key] for key in keys}


def map_specs(function: Callable[[PartitionSpec], Any], specs: ParamTree) -> ParamTree:
    """Applies a function to every PartitionSpec of a nested dict, and returns a dict of the results."""
    return jax.tree.map(function, specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def unit_shardings(unit: WeightUnit, mesh: Mesh) -> ParamTree:
    """Returns the NamedSharding of each parameter of a unit that `units` made for this mesh."""
    return map_specs(lambda spec: NamedSharding(mesh, spec), unit.specs)


# By default Orbax splits an array that is replicated over several devices, and each device writes a slice. That would
# write more files than there are shards, and compile a program for every shape.
HANDLERS = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False)),
    (np.ndarray, ocp.type_handlers.NumpyHandler()),
    *((kind, ocp.type_handlers.ScalarHandler()) for kind in (int, float, np.number)),
)


def _checkpointer() -> ocp.Checkpointer:
    # Plain zarr, with one file per shard, is written twice as fast as an OCDBT database. Weights do not become
    # smaller by compression.
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=HANDLERS)
    )


# Orbax logs useless messages: without OCDBT, a warning at every save that there is nothing to merge; the stack trace of an
# error in a background thread, although it also raises that error in the calling thread; and warnings about damaged
# metadata, which either is not needed or raises an error.
_NOISE = (
    "Skipping merge of OCDBT",
    "_SignalingThread.run() raised an exception",
    "Save Finalize thread",
    "the Commit callback in background save thread",
    "Failed to get item metadata",
    "Failed to json parse Metadata file",
)


_LATE = "Event loop is closed"
"""What tensorstore's threads report when writes end after Orbax has given up, because the disk is full."""


@functools.cache  # once in a process
def _hide_late_errors() -> None:
    """Hides errors of writes that end after Orbax has given up and raised the first error of the same full disk.

    Threads report `_LATE`. The event loop logs each write whose error nobody awaited; only those about a full disk are
    hidden. Both may come after the block of `without_noise`, so they are hidden until the process ends.
    """
    shown = sys.unraisablehook

    def show(unraisable: Any) -> None:
        if str(unraisable.exc_value) != _LATE:
            shown(unraisable)

    sys.unraisablehook = show

    def keep(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        never_awaited = record.getMessage().startswith("Task exception was never retrieved")
        return not (never_awaited and error is not None and is_disk_full(error))

    logging.getLogger("asyncio").addFilter(keep)


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Hides the messages of `_NOISE` during the block, and late errors of a full disk until the process ends."""

    def keep(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in _NOISE)

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    _hide_late_errors()
    try:
        yield
    finally:
        logger.removeFilter(keep)


def write_unit(directory: pathlib.Path, unit: WeightUnit, params: ParamTree) -> None:
    """Writes one unit of a converted directory, one file per shard, and returns when it is completely written.

    All processes must call this; a process that does not makes the others wait.

    Raises:
      ValueError: names, shapes or dtypes of `params` are not those of the unit.
      OSError: the disk is full.
    """
    if differences := tree_differences(unit.shapes, params):
        raise ValueError(f"{unit.name} cannot be written: {'; '.join(differences)}")
    path = directory.resolve() / WEIGHTS / unit.name
    try:
        with _checkpointer() as checkpointer, without_noise():
            checkpointer.save(path, args=ocp.args.PyTreeSave(params))
    except (OSError, ValueError, RuntimeError) as error:  # tensorstore raises ValueError for errors of the system
        if is_disk_full(error):
            raise OSError(errno.ENOSPC, f"the disk is full: {path} needs {unit.nbytes} bytes") from error
        raise


def read_unit(directory: pathlib.Path, unit: WeightUnit, mesh: Mesh | None = None) -> ParamTree:
    """Reads the parameters of one unit, and casts them to the dtype of `unit.shapes`.

    Returns:
      Nested dict of numpy arrays if `mesh` is None, otherwise of jax arrays with the shardings of `unit_shardings`.

    Raises:
      ValueError: the folder is damaged, or holds parameters with other names or shapes, or weights that are no numbers or
        that are infinite in the dtype of `unit.shapes`.
    """
    path = directory.resolve() / WEIGHTS / unit.name
    target = unit.shapes
    if mesh is not None:
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            unit.shapes,
            unit_shardings(unit, mesh),
        )
    args = ocp.checkpoint_utils.construct_restore_args(target)
    with _checkpointer() as checkpointer, without_noise():
        with naming_damage(path, "convert the source again"):
            found = checkpointer.metadata(path).item_metadata
            if found is None:
                raise ValueError("one of the files _METADATA, _sharding and .zarray has other contents")
            differences = tree_differences(target, found.tree, dtypes=False)
        if differences:
            raise ValueError(f"{path} does not fit config.json: {'; '.join(differences)}; convert the source again")
        with naming_damage(path, "convert the source again"):
            params: ParamTree = checkpointer.restore(path, args=ocp.args.PyTreeRestore(target, restore_args=args))
    check_parameters(str(path), params, mesh)
    return params


@contextlib.contextmanager
def naming_damage(path: pathlib.Path, remedy: str) -> Iterator[None]:
    """Raises ValueError, with the path and the remedy, for each type of error that Orbax raises for damaged files."""
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise  # for example the memory of a device is full
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, so Orbax cannot read it ({error!r:.300}); {remedy}") from error
