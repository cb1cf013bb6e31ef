"""The modes of the sampler that are measured, their least number of floating-point operations, and their programs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dream_jax import layer_forms, layouts, lora, masks, sharding
from dream_jax import model as dream_model
from dream_jax.attention import KVCache, Window
from dream_jax.config import DreamConfig
from dream_jax.model import Dream, LayerForm, merge_params, split_params
from dream_jax.quantisation import CodeKind
from dream_jax.sampler import BlockCache, NoCache, SamplerConfig, WindowCache, growth
from dream_jax.sampler.compiled import ModelProgram
from dream_jax.sampler.loop import canvas_layout, denoise
from dream_jax.sampler.state import DynamicSettings, StaticSettings, bucket_length


def speed_modes(new: int, block: int) -> Mapping[str, SamplerConfig]:
    """Returns name -> configuration of each mode, for `new` tokens in blocks of `block`."""
    block = min(block, new)
    modes = {"exact": SamplerConfig.preset("exact", max_new_tokens=new)}
    for tokens in (1, 2, 4):
        modes[f"cached, {tokens} a pass"] = cached(new, block, tokens)
    if new % block == 0:
        modes["Fast-dLLM dual"] = SamplerConfig.fast_dllm(
            cache="dual", block_length=block, max_new_tokens=new, steps=new
        )
    return modes


def cached(new: int, block: int, tokens: int) -> SamplerConfig:
    """Returns cached sampling in blocks, in which a pass writes this number of tokens, whatever their confidence."""
    steps = math.ceil(block / tokens) * math.ceil(new / block)
    return SamplerConfig(max_new_tokens=new, steps=steps, alg="entropy", block_length=block, cache=WindowCache())


def block_diffusion(new: int, block: int, tokens: int) -> SamplerConfig:
    """Returns the same as `cached`, but for a model of block diffusion, whose cache is exact."""
    return dataclasses.replace(cached(new, block, tokens), cache=BlockCache(), mask=masks.BlockDiffusion(block))


def pass_flops(config: DreamConfig, tokens: int, keys: int) -> float:
    """Returns the floating-point operations of all layers for `tokens` queries, each of which attends to `keys` keys."""
    width, head = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    weights = width * head * (2 * heads + 2 * kv_heads) + 3 * width * config.intermediate_size
    attention = 2 * heads * head * keys
    return 2.0 * tokens * config.num_hidden_layers * (weights + attention)


def sample_flops(config: DreamConfig, sampler: SamplerConfig, prompt: int, steps_B: np.ndarray, passes: int) -> float:
    """Returns the least number of floating-point operations of all passes of one row: layers, and logits at masks.

    Args:
      config: the architecture.
      sampler: the configuration of the mode.
      prompt: number of prompt tokens.
      steps_B: int [new tokens], the step that wrote each new token.
      passes: number of forward passes of the row.
    """
    new, length = sampler.max_new_tokens, prompt + sampler.max_new_tokens
    order = np.unique(steps_B, return_inverse=True)[1]
    block = sampler.block_length or new
    rows = sum(
        int(np.sum(order[i : i + block] >= step)) for i in range(0, new, block) for step in {*order[i : i + block]}
    )
    head = 2.0 * rows * config.hidden_size * config.vocab_size
    if isinstance(sampler.cache, NoCache):
        return passes * pass_flops(config, length, length) + head
    full = math.ceil(new / block)
    if isinstance(sampler.cache, BlockCache):
        first, two = prompt + block, pass_flops(config, 2 * block, length)
        later = (full - 1) * two + (passes - full) * pass_flops(config, block, length)
        return pass_flops(config, first, first) + later + head
    window = sampler.cache.left + block + (sampler.cache.right or 0)
    return full * pass_flops(config, length, length) + (passes - full) * pass_flops(config, window, length) + head


def lower(model: Dream, config: SamplerConfig, *, batch: int, prompt: int, array_sharding: Any = None) -> Any:
    """Returns the `jax.stages.Lowered` of the program that `dream_jax.generate` runs for prompts without padding.

    Args:
      model: a model of arrays, or of shapes with shardings.
      config: the settings of the sampler.
      batch, prompt: number of rows, and of prompt tokens of each row, which must be one of the bucket lengths.
      array_sharding: the sharding of the other arguments; needed for a model of shapes on devices that are not here.
    """
    new = config.max_new_tokens
    masked = [new] * batch
    static = StaticSettings.of(config, min(bucket_length(new), prompt + new), masked)
    static = dataclasses.replace(static, first_width=growth.first_width(config, prompt, only_new=True))
    dynamic = DynamicSettings.of(config, static.steps, masked)
    keys = jax.eval_shape(lambda: jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(batch)))

    def shape(like: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=array_sharding)

    canvas = jax.ShapeDtypeStruct((batch, prompt + new), jnp.int32, sharding=array_sharding)
    valid = jax.ShapeDtypeStruct(canvas.shape, jnp.bool_, sharding=array_sharding)
    with sharding.mesh_context(model):
        return denoise.lower(model, canvas, valid, shape(keys), jax.tree.map(shape, dynamic), None, static=static)


def lower_window_pass(
    model: Dream, *, batch: int, length: int, window: int, array_sharding: Any = None, unembeds: bool = True
) -> Any:
    """Returns the `jax.stages.Lowered` of one window pass: its layers, and the most probable token of every position.

    Args:
      model, batch, array_sharding: as for `lower`.
      length: number of tokens of a row, whose keys and values are in the cache.
      window: number of tokens of a row that the pass computes.
      unembeds: whether the pass computes the tokens; otherwise it returns the hidden states of the last layer.
    """
    config = model.config
    static = StaticSettings.of(SamplerConfig(max_new_tokens=length), length, [length] * batch)
    cache = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)

    shape = functools.partial(jax.ShapeDtypeStruct, sharding=array_sharding)

    @functools.partial(ModelProgram, donate_argnames=("k", "v"))
    def window_pass(
        model: Dream, tokens_BW: jax.Array, position_BW: jax.Array, valid_BT: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        mask = canvas_layout(model, valid_BT, static).mask.at(position_BW)
        window = Window(KVCache(k, v), position_BW)
        hidden_BWD, kv_cache = model.hidden_window(tokens_BW, mask, position_BW, window)
        return jnp.argmax(model.unembed(hidden_BWD), axis=-1) if unembeds else hidden_BWD, kv_cache

    of_window, valid = shape((batch, window), jnp.int32), shape((batch, length), jnp.bool_)
    k, v = (shape(cache, model.compute_dtype) for _ in range(2))
    with sharding.mesh_context(model):
        return window_pass.lower(model, of_window, of_window, valid, k, v)


def abstract_model(config: DreamConfig, mesh: jax.sharding.Mesh, *, layers: LayerForm, base: CodeKind | None) -> Dream:
    """Returns the model that the commands would load for sampling in bfloat16, with shapes and shardings instead of arrays.

    Args:
      config: the architecture.
      mesh: the devices, which need not be present.
      layers: the form of the layers; the projections of layers that are apart are joined.
      base: the kind of the codes of the kernels; None for bfloat16.
    """

    platform = sharding.platform_of(mesh)

    def joined(model: Dream) -> Dream:
        if layers == "apart":
            layer_forms.join(model)
        if base == "int8" and platform == "gpu":
            lora.round_scales(model)
        return model

    model = dream_model.abstract_model(config, param_dtype=jnp.bfloat16, layers=layers)
    if base is not None:
        model = lora.with_base_shapes(model, base)
    with jax.set_mesh(mesh):
        graphdef, shapes = split_params(jax.eval_shape(joined, model))
    stored = jax.tree.map(
        lambda leaf, form: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=form),
        shapes,
        layouts.parameter_formats(shapes, mesh),
    )
    return merge_params(graphdef, stored)


def smallest_projection(model: Dream, mesh: jax.sharding.Mesh) -> int:
    """Returns the bytes that the smallest kernel of one layer takes on a device of the mesh."""
    config = model.config
    size = config.hidden_size * config.num_key_value_heads * config.head_dim * model.compute_dtype.itemsize
    return size // math.prod(mesh.shape.values())


def weights_read(model: Dream) -> int:
    """Returns the bytes of the weights that every pass reads: all but the table of token embeddings."""
    params = split_params(model)[1]
    if model.lm_head is not None:
        del params["embed"]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
