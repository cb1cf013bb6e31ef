"""Reads a model from a converted or a Hugging Face directory layer by layer.

This is for models whose layers are held apart, and for quantised models: a layer is quantised before the next one is read,
so loading a 7B base in 4 bits needs no more memory than running it.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dream_jax import checkpoint, hf, lora
from dream_jax.config import DreamConfig
from dream_jax.quantisation import CodeKind, quantised_kernels
from dream_jax.shapes import ParamTree
from dream_jax.sharding import parameter_shardings


def start_unit(
    source: hf.SafetensorsSource,
    config: DreamConfig,
    unit: checkpoint.WeightUnit,
    *,
    mesh: Mesh | None,
    pool: Executor,
    buffers: hf.Buffers,
) -> hf.Reading:
    """Starts to read one unit of a published checkpoint, and returns the `hf.Reading`, whose `wait` returns the arrays.

    The arrays have the dtype of `unit.shapes`. `mesh` has the devices of the arrays (None: one device). `pool` and
    `buffers` are as for `hf.start_reading`.
    """
    tensors = {(one.rule.target, one.layer): (name, one) for name, one in hf.destinations(config).items()}
    leaves = hf.flat(unit.shapes)
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    shardings = None if mesh is None else hf.flat(checkpoint.unit_shardings(unit, mesh))
    wanted = {name: [tensors[name, unit.layer]] for name in shapes}
    dtype = np.dtype(next(iter(leaves.values())).dtype)
    return hf.start_reading(source, wanted, shapes, shardings, dtype, pool, buffers)


@contextlib.contextmanager
def unit_reader(
    directory: pathlib.Path, config: DreamConfig, mesh: Mesh | None
) -> Iterator[Callable[[checkpoint.WeightUnit], ParamTree]]:
    """Checks a converted or Hugging Face directory, and yields a function that reads one unit of its model.

    The function returns a nested dict of jax arrays in the dtype of `unit.shapes`, on the mesh (None: on one device).

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or the directory does not fit the configuration.
    """
    if checkpoint.is_converted(directory):
        checkpoint.read_description(directory, config)
        yield lambda unit: jax.tree.map(jnp.asarray, checkpoint.read_unit(directory, unit, mesh))
        return
    with hf.open_source(directory) as source, ThreadPoolExecutor(hf.reading_threads()) as pool:
        source.check(config)
        # Each unit needs new buffers, because on a CPU the arrays use the memory of the buffers.
        yield lambda unit: hf.nested(
            start_unit(source, config, unit, mesh=mesh, pool=pool, buffers=hf.Buffers()).wait()
        )


def apart_params(directory: pathlib.Path, config: DreamConfig, dtype: np.dtype, mesh: Mesh | None) -> ParamTree:
    """Reads the model in a directory into separate arrays for each layer.

    Besides the result, this needs memory for one unit of the model at a time (see `checkpoint.units`).

    Args:
      directory: a converted or a Hugging Face directory.
      config: the configuration of the model in the directory.
      dtype: the dtype of the parameters.
      mesh: the devices of the parameters; None for one device.

    Returns:
      The parameters as a nested dict; under "layers" the keys are the numbers of the layers, from 0.

    Raises:
      FileNotFoundError, ValueError: as for `unit_reader`.
    """
    params: ParamTree = {}
    layers: ParamTree = {}
    first, *middle, last = checkpoint.units(config, dtype, mesh)
    with unit_reader(directory, config, mesh) as read:
        for unit in (first, last):  # the largest units come first, while most memory is free
            params |= read(unit)
            jax.block_until_ready(params)
        for unit in middle:
            layers[unit.layer] = read(unit)["layers"]
            jax.block_until_ready(layers[unit.layer])  # otherwise the files of several layers accumulate in memory
    return params | {"layers": layers}


def quantised_params(
    directory: pathlib.Path, config: DreamConfig, dtype: np.dtype, kind: CodeKind, shapes: ParamTree, mesh: Mesh | None
) -> tuple[ParamTree, str]:
    """Reads the model in a directory and quantises the kernels of its layers.

    This needs memory for the result and for one layer in float32.

    Args:
      directory: a converted or a Hugging Face directory.
      config: the configuration of the model in the directory.
      dtype: the dtype of the parameters that are not quantised.
      kind: the kind of the codes, "int8" or "nf4".
      shapes: the shapes of all parameters of the quantised model, which `lora.with_base_shapes` returns. The layers of
        the result are apart or stacked as in these shapes.
      mesh: the devices of the parameters; None for one device.

    Returns:
      The parameters, and the identity of the float weights (see `lora.identity`).

    Raises:
      FileNotFoundError, ValueError: as for `unit_reader`.
    """
    is_apart = 0 in shapes["layers"]
    shardings = None if mesh is None else parameter_shardings(shapes, mesh)["layers"]
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["layers"])

    def quantised(layer: ParamTree) -> ParamTree:
        return quantised_kernels(layer, kind, others=lambda leaf: leaf.astype(dtype))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def put(stacked: ParamTree, layer: ParamTree, index: int) -> ParamTree:
        return checkpoint.set_layer(stacked, quantised(layer), index)

    convert = jax.jit(quantised, out_shardings=None if shardings is None or not is_apart else shardings[0])

    params: ParamTree = {}
    first, *_, last = checkpoint.units(config, dtype, mesh)
    # Layers are read in float32, whatever the dtype of the source is, so that codes and scales come from unrounded weights.
    layers = checkpoint.units(config, "float32", mesh)[1:-1]
    with unit_reader(directory, config, mesh) as read:
        for unit in (first, last):  # the largest units come first, while most memory is free
            params |= read(unit)
        prints = lora.prints(params, None)
        found: ParamTree = {} if is_apart else jax.jit(zeros, out_shardings=shardings)()
        for unit in layers:
            layer = read(unit)
            prints += lora.prints(layer, unit.layer)
            if is_apart:
                found[unit.layer] = convert(layer["layers"])
            else:
                found = put(found, layer["layers"], unit.layer)
            jax.block_until_ready(found)  # otherwise the following layers accumulate in memory
    return params | {"layers": found}, lora.digest(prints)
