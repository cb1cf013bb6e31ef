"""Stores the kernels of a model on TPUs with their axes in the order in which the sampler reads them.

By default jax stores an array on a TPU with its axes in the order that wastes the least memory on padding. The programs of
the sampler read the kernels in another order, so each call of such a program would first copy most of the weights.
`lay_out` stores the kernels once in the order of the programs. The compiler chose this order: if the sampler is compiled
for v6e with `jax.experimental.layout.Layout.AUTO` or with these orders, it copies no weights, see `bench/sampler_plans.py`.
A jitted function accepts an array in any order, so nothing else depends on this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding

from dream_jax import sharding
from dream_jax.model import Dream
from dream_jax.shapes import ParamTree

# Platforms for which jax's default order is not that of the programs. Other devices do not store arrays in tiles.
_PLATFORMS = ("tpu",)


def order(path: Sequence[str]) -> tuple[int, ...] | None:
    """Returns the axes of a kernel in their order in memory, from the slowest to the fastest; None for other parameters.

    If the outputs of a kernel have several axes, such as heads and their channels, the axis of the inputs becomes the
    fastest one. Then the outputs together are one axis of a matrix; in other orders each head would have separate tiles.
    All other kernels keep the order of their axes.

    Args:
      path: the keys that lead to the parameter, such as ("layers", "attn", "q", "kernel").
    """
    axes = sharding.parameter_axes(path)
    if axes is None or path[-1] != "kernel":
        return None
    before, inputs = tuple(range(axes.index("embed"))), axes.index("embed")
    outputs = tuple(range(inputs + 1, len(axes)))
    return (*before, *outputs, inputs) if len(outputs) > 1 else (*before, inputs, *outputs)


def parameter_formats(shapes: ParamTree, mesh: sharding.AnyMesh) -> ParamTree:
    """Returns how `lay_out` stores every parameter: on TPUs the `Format` of a kernel; otherwise its sharding.

    Args:
      shapes: a nested dict of arrays or shapes.
      mesh: the devices of the parameters.
    """
    shardings = sharding.parameter_shardings(shapes, mesh)
    if sharding.platform_of(mesh) not in _PLATFORMS:
        return shardings
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _format(tuple(str(part.key) for part in path), leaf), shardings
    )


def _format(path: Sequence[str], leaf_sharding: Sharding) -> Any:
    axes = order(path)
    return leaf_sharding if axes is None else Format(Layout(axes), leaf_sharding)


def lay_out(model: Dream) -> None:
    """Stores the kernels of a model in the order in which the sampler reads them; it changes the model.

    The kernels are converted one after the other. If nothing else refers to the arrays of the model, this needs memory for
    only one more kernel. On other devices than TPUs the model is not changed.
    """
    for path, node in nnx.iter_graph(model):
        if not isinstance(node, nnx.Param):
            continue
        array = node[...]
        if {device.platform for device in array.devices()}.isdisjoint(_PLATFORMS):
            return
        axes = order(tuple(map(str, path)))
        if axes is not None:
            node.set_value(jax.device_put(array, Format(Layout(axes), array.sharding)))
            del array
            jax.block_until_ready(node[...])  # otherwise the arrays of several kernels accumulate in memory
