"""Fills a model of shapes with random weights on its devices, without a copy of the weights on the host.

The values matter for the speed: a GPU multiplies matrices of zeros, or of few different values, faster than random ones,
because it uses less power.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dream_jax import sharding
from dream_jax.model import Dream, merge_params, split_params
from dream_jax.shapes import ParamTree

# The uniform distribution on [-_BOUND, _BOUND] has the standard deviation 0.02 of Dream's initial weights.
_BOUND = 0.02 * 3**0.5


def filled(model: Dream, mesh: jax.sharding.Mesh) -> Dream:
    """Returns the model of shapes with random arrays, sharded over the mesh.

    Floating-point weights are uniform with the standard deviation 0.02, scales of norms are 1, biases are random too. The
    codes of a quantised base are random bytes, and their scales are the largest magnitude of such weights.
    """
    graphdef, shapes = split_params(model)
    return merge_params(graphdef, random_params(shapes, mesh))


def random_params(shapes: ParamTree, mesh: jax.sharding.Mesh) -> ParamTree:
    """Returns random arrays for a tree of shapes. One program per shape is compiled, and one array is made at a time."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    shardings = jax.tree.leaves(sharding.parameter_shardings(shapes, mesh))
    # "rbg" draws large arrays faster than the default generator, and compiles faster.
    key = jax.random.key(0, impl="rbg")
    made = [
        _program(leaf.shape, jnp.dtype(leaf.dtype), str(path[-1].key), where)(jax.random.fold_in(key, number))
        for number, ((path, leaf), where) in enumerate(zip(leaves, shardings, strict=True))
    ]
    params: ParamTree = jax.tree.unflatten(structure, made)
    return params


@functools.cache
def _program(shape: tuple[int, ...], dtype: Any, name: str, where: jax.sharding.Sharding) -> Any:
    def draw(key: jax.Array) -> jax.Array:
        if name == "scale":
            return jnp.ones(shape, dtype)
        if name == "scales":
            return jnp.full(shape, _BOUND, dtype)
        if jnp.issubdtype(dtype, jnp.integer):
            return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), dtype)
        return jax.random.uniform(key, shape, dtype, -_BOUND, _BOUND)

    return jax.jit(draw, out_shardings=where)
