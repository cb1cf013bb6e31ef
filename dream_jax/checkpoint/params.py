"""Writes all parameters of a model to a converted directory, and reads them back."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dream_jax import layer_forms
from dream_jax.checkpoint.description import read_description
from dream_jax.checkpoint.trees import tree_differences
from dream_jax.checkpoint.weights import (
    WEIGHTS,
    WeightUnit,
    map_specs,
    only,
    read_unit,
    stacked_shapes,
    units,
    write_unit,
)
from dream_jax.config import DreamConfig
from dream_jax.shapes import ParamTree


def load_params(
    directory: str | pathlib.Path, config: DreamConfig, dtype: jax.typing.DTypeLike, mesh: Mesh | None = None
) -> ParamTree:
    """Reads a converted directory into a nested dict of parameters whose layers are stacked.

    The peak memory is that of the result plus one unit, the largest of which is the embedding or the head. `dtype` is
    the dtype of the result and may differ from that of the files. Without a mesh the result is on the default device.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: as for `read_description`; or the stored parameters have other names or shapes than the configuration.
    """
    directory = pathlib.Path(directory)
    read_description(directory, config)
    first, *layers, last = units(config, dtype, mesh)
    missing = [unit.name for unit in layers if not (directory / WEIGHTS / unit.name).is_dir()]
    if missing:
        raise ValueError(
            f"config.json has num_hidden_layers={config.num_hidden_layers}, but {directory / WEIGHTS} holds no "
            f"{missing[0]}; convert the source again"
        )
    params: ParamTree = {}
    for unit in (first, last):  # first, because they are the largest units, and now most of the memory is free
        params |= jax.tree.map(jnp.asarray, read_unit(directory, unit, mesh))
        jax.block_until_ready(params)
    for unit in layers:
        layer = read_unit(directory, unit, mesh)["layers"]
        if unit.layer == 0:  # not earlier: the first layer in the files has the sizes of config.json, or is refused
            params["layers"] = _zeros(stacked_shapes(config, jnp.dtype(dtype).name)["layers"], unit, mesh)
        params["layers"] = set_layer(params["layers"], layer, unit.layer)
        jax.block_until_ready(params)  # otherwise the following layers accumulate in memory
    return params


def _zeros(shapes: ParamTree, layer: WeightUnit, mesh: Mesh | None) -> ParamTree:
    shardings = None
    if mesh is not None:
        shardings = map_specs(lambda spec: NamedSharding(mesh, PartitionSpec(None, *spec)), layer.specs["layers"])
    make = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.jit(make, out_shardings=shardings)()


@functools.partial(jax.jit, donate_argnums=0)
def set_layer(stacked: ParamTree, layer: ParamTree, index: int) -> ParamTree:
    """Returns the stacked parameters with those of one layer replaced, bit for bit; `stacked` is donated."""

    def bits(x: jax.Array) -> jax.Array:
        # On CPUs XLA would convert bfloat16 to float32 and back, which changes the bits of a NaN.
        return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")

    def set_one(whole: jax.Array, one: jax.Array) -> jax.Array:
        updated = jax.lax.dynamic_update_index_in_dim(bits(whole), bits(one), index, 0)
        return jax.lax.bitcast_convert_type(updated, whole.dtype)

    return jax.tree.map(set_one, stacked, layer)


def save_params(
    directory: pathlib.Path,
    params: ParamTree,
    config: DreamConfig,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Writes parameters from memory into `weights/` of a directory; each process writes the shards on its own devices.

    `params` are all parameters, in any form of `layer_forms`; the files are the same. `progress` is called after each unit
    with its size in bytes.

    Raises:
      ValueError: the names or shapes are not those of the configuration, or the parameters have several dtypes.
      OSError: the disk is full.
    """
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)})
    if len(dtypes) > 1:
        raise ValueError(f"the parameters have several dtypes, {' and '.join(dtypes)}; cast them to one before saving")
    expected = stacked_shapes(config, dtypes[0])
    if differences := tree_differences(expected, layer_forms.canonical_shapes(params)):
        raise ValueError(f"these parameters are not those of the configuration: {'; '.join(differences)}")
    for unit in units(config, dtypes[0]):
        if unit.layer is None:
            found = only(params, unit.shapes)
        else:
            found = {"layers": layer_forms.layer_params(params["layers"], unit.layer)}
        write_unit(directory, unit, found)
        progress(unit.nbytes)
