"""Compiles a pass over one window of a cached row for an H200, so that the bytes that it reads can be counted.

The GPU need not be in this machine.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import dream_jax
from dream_jax import layer_forms, lora, masks, sharding
from dream_jax.attention import KVCache, Window
from dream_jax.model import Dream, abstract_model, merge_params, split_params
from dream_jax.plan.hardware import Hardware
from dream_jax.quantisation import CodeKind
from dream_jax.sampler.compiled import ModelProgram

LENGTH, WINDOW = 1024, 32  # tokens of the row, and of the window


def compiled_window_pass(hardware: Hardware, base: CodeKind | None, layers: int) -> tuple[str, float]:
    """Compiles a window pass of Dream-7B for one row, with the model as it samples on a GPU.

    Its layers are apart, its projections are joined, and it computes in bfloat16.

    Args:
      hardware: hardware with one GPU and with devices to compile for.
      base: the kind of the codes of the kernels; None for bfloat16.
      layers: number of layers; with all 28 layers the pass also computes the output projection.

    Returns:
      The text of the compiled program, and the number of bytes of the weights that the program multiplies with.
    """
    mesh = hardware.mesh("1x1")
    assert isinstance(mesh, jax.sharding.Mesh), "the hardware has devices to compile for"
    config = dataclasses.replace(dream_jax.PRESETS["dream-7b"], num_hidden_layers=layers)
    whole = config == dream_jax.PRESETS["dream-7b"]

    def prepared(model: Dream) -> Dream:
        if base is not None:
            model = lora.with_base(model, base)
        layer_forms.join(model)
        if base == "int8":
            lora.round_scales(model)
        return model

    model = jax.eval_shape(prepared, abstract_model(config, param_dtype=jnp.bfloat16, layers="apart"))
    graphdef, params = split_params(model)
    params = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        params,
        sharding.parameter_shardings(params, mesh),
    )

    def shape(size: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding.replicated(mesh))

    def window_pass(
        model: Dream, tokens_BW: jax.Array, position_BW: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        window = Window(KVCache(k, v), position_BW)
        hidden_BWD, kv_cache = model.hidden_window(tokens_BW, masks.Bidirectional(), position_BW, window)
        return jnp.argmax(model.unembed(hidden_BWD), axis=-1) if whole else hidden_BWD, kv_cache

    size = (layers, 1, LENGTH, config.num_key_value_heads, config.head_dim)
    cache = shape(size, jnp.bfloat16)
    of_window = shape((1, WINDOW), jnp.int32)
    step = ModelProgram(window_pass, donate_argnums=(3, 4))
    with sharding.mesh_context(params):
        text = step.lower(merge_params(graphdef, params), of_window, of_window, cache, cache).compile().as_text()
    assert text is not None, "XLA writes the text of programs for GPUs"
    multiplied = [params["layers"], params["lm_head"]] if whole else params["layers"]
    return text, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(multiplied))
