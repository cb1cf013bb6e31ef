"""The order in which the axes of a kernel lie in the memory of a TPU.

By default jax stores an array on a TPU with its axes in the order that wastes the least memory on padding. That is not the
order in which the programs of the sampler read the kernels, so each call of such a program would first copy most of the
weights. `lay_out` stores the kernels once as the programs read them. The compiler said what this order is: compiled for
v6e with `jax.experimental.layout.Layout.AUTO` or with these orders, the sampler copies no weights, see
`bench/sampler_plans.py`. A jitted function takes an array as it is stored, so nothing else depends on this module.
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

# Platforms whose compilers read kernels in another order than the default one. The memory of other devices has no tiles.
_PLATFORMS = ("tpu",)


def order(path: Sequence[str]) -> tuple[int, ...] | None:
    """Returns the axes of a kernel in the order of its memory, from the slowest to the fastest; None for no kernel.

    If the outputs of a kernel have several axes, such as heads and their channels, the axis of the inputs is the fastest
    one. Then the outputs together are one axis of a matrix; in other orders each head would have tiles of its own. All
    other kernels keep the order of their axes.

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
    """Returns where every parameter is stored by `lay_out`: its sharding, or on TPUs for a kernel its `Format`.

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

    The kernels are converted one after the other, so that besides the model the memory holds one of them, if nothing else
    refers to its arrays. On devices other than TPUs nothing is done.
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
