"""Converts a model and its parameters between the forms in which layers can be held.

| | layers | projections with one input |
|---|---|---|
| canonical: in files, in the state of a training run | stacked, arrays [L, ...] | separate: q, k, v; gate, up |
| for sampling | apart: arrays of each layer, under its number | joined: qkv; gate_up |

The two columns are independent choices. `apart` and `stacked` convert the layers of a model, `join` and `separate` convert
its projections. `layer_params` returns the canonical parameters of one layer from the parameters of any form; code that
writes files uses it. A projection with an adapter or in nf4 is never joined; float and int8 projections can be.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from dream_jax import sharding
from dream_jax.model import (
    Dream,
    JoinedLinear,
    Layer,
    LayerForm,
    Linear,
    joined_qkv,
    merge_params,
    split_params,
    split_qkv,
)
from dream_jax.quantisation import kind_of
from dream_jax.shapes import ParamTree

LayersChoice = Literal["auto", "stacked", "apart"]


def form_of(choice: LayersChoice, mesh: sharding.AnyMesh | None = None) -> LayerForm:
    """Returns the form of the layers for sampling: "auto" is apart on GPUs, and stacked elsewhere.

    On GPUs the layers are apart because a scan copies the weights of each layer out of the stack in every forward pass,
    which takes a quarter of the time of a pass and half of the time of a pass over a window.

    Args:
      choice: the setting.
      mesh: the devices of the model; None for the default device.

    Raises:
      ValueError: the choice is unknown.
    """
    if choice not in get_args(LayersChoice):
        raise ValueError(f"layers={choice!r} is not one of {get_args(LayersChoice)}")
    if choice != "auto":
        return choice
    platform = jax.default_backend() if mesh is None else sharding.platform_of(mesh)
    return "apart" if platform == "gpu" else "stacked"


def training_form(choice: LayersChoice) -> LayerForm:
    """Returns the form in which a training step runs the layers: "auto" is stacked; docs/negative-results.md says why."""
    return "stacked" if choice == "auto" else choice


def apart(model: Dream) -> Dream:
    """Returns the model with its layers apart; a model whose layers are apart is returned as it is.

    The given model is not changed. This needs memory for the layers in both forms; `pretrained.load` does not.
    """
    if model.is_apart:
        return model
    graphdef, params = split_params(model.layers)
    with sharding.mesh_context(params):
        found = _apart(params)
    made = _copy(model)
    made.layers = nnx.List([merge_params(graphdef, one) for one in found.values()])
    return made


def stacked(model: Dream) -> Dream:
    """Returns the model with stacked layers; a model whose layers are stacked is returned as it is.

    The given model is not changed. This needs memory for the layers in both forms.
    """
    if not model.is_apart:
        return model
    halves = [split_params(layer) for layer in model.layer_modules()]
    with sharding.mesh_context(model):
        params = _stacked([params for _, params in halves])
    made = _copy(model)
    made.layers = merge_params(halves[0][0], params)
    return made


def _copy(model: Dream) -> Dream:
    """Returns a model of new modules that hold the same arrays; the arrays are not copied."""
    return merge_params(*split_params(model))


@jax.jit
def _apart(params: ParamTree) -> ParamTree:
    """Returns a dict from the number of each layer to its parameters, made from the stacked parameters."""
    leaves, structure = jax.tree.flatten(params)
    # The derivative of a split is one concatenation. That of indexing would be a sum of L arrays as large as the stack.
    pieces = [jax.lax.split(leaf, (1,) * leaf.shape[0]) for leaf in leaves]
    found = {
        number: jax.tree.unflatten(structure, [jnp.squeeze(piece, 0) for piece in one])
        for number, one in enumerate(zip(*pieces, strict=True))
    }
    layers: ParamTree = sharding.constrain_parameters({"layers": found})["layers"]
    return layers


@jax.jit
def _stacked(layers: list[ParamTree]) -> ParamTree:
    """Returns the stacked parameters of layers that are apart: the inverse of `_apart`."""
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    found: ParamTree = sharding.constrain_parameters({"layers": params})["layers"]
    return found


# ------------------------------------------------------------------------------------------ projections with one input


def join(model: Dream) -> None:
    """Joins the projections q, k and v, and gate and up, of every layer of a model; it changes the model.

    Layers that are apart are converted one after the other; if nothing else refers to the arrays of the model, this needs
    little more memory than the model. Stacked layers are converted together, which needs memory for their q, k, v, gate and
    up a second time. Projections stay separate if one of them has an adapter or is in nf4; q, k and v also stay
    separate on a mesh that can shard the heads of q but not those of k and v. Codes and scales are joined without being
    computed again, so a model in int8 computes the same numbers.
    """
    with sharding.mesh_context(model):
        for layer in model.layer_modules():
            _join_layer(layer, model.is_apart)


def _join_layer(layer: Layer, is_apart: bool) -> None:
    """Joins the projections of one layer, or of stacked layers."""
    # Without waiting, the separate and the joined projections of many layers would be in memory at the same time.
    joined = jax.block_until_ready(_joined(_separate_params(layer), is_apart))
    if "attn" in joined:
        attn = layer.attn
        attn.qkv, attn.q, attn.k, attn.v = JoinedLinear(**joined["attn"]["qkv"]), None, None, None
    if "mlp" in joined:
        mlp = layer.mlp
        mlp.gate_up, mlp.gate, mlp.up = JoinedLinear(**joined["mlp"]["gate_up"]), None, None


def _separate_params(layer: Layer) -> ParamTree:
    """Returns the parameters of the projections of a layer that can be joined."""
    found: ParamTree = {}
    attn, mlp = layer.attn, layer.mlp
    if _is_plain(attn.q, attn.k, attn.v) and _shards_joined(attn.q.out_shape[0], attn.k.out_shape[0]):
        found["attn"] = {name: _arrays(one) for name, one in (("q", attn.q), ("k", attn.k), ("v", attn.v))}
    if _is_plain(mlp.gate, mlp.up):
        found["mlp"] = {name: _arrays(one) for name, one in (("gate", mlp.gate), ("up", mlp.up))}
    return found


def _arrays(linear: Linear) -> ParamTree:
    """Returns the parameters of a projection without an adapter."""
    leaves = {name: getattr(linear, name) for name in ("kernel", "bias", "codes", "scales")}
    return {name: leaf[...] for name, leaf in leaves.items() if leaf is not None}


def _is_plain(*linears: Linear | None) -> bool:
    """Returns whether these projections can be joined: all are separate, none has an adapter, and none is in nf4."""
    return all(
        one is not None and one.lora_a is None and (one.kernel is not None or kind_of(one.codes) == "int8")
        for one in linears
    )


def _shards_joined(num_heads: int, num_kv_heads: int) -> bool:
    """Returns whether the current mesh shards the joined q, k and v as it shards q."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return True
    sharded = [
        len(sharding.partition_spec((axis,), (size,), dict(mesh.shape))) > 0
        for axis, size in (("heads", num_heads), ("kv_heads", num_kv_heads))
    ]
    return sharded[0] == sharded[1]


@functools.partial(jax.jit, static_argnums=1)
def _joined(params: ParamTree, is_apart: bool) -> ParamTree:
    """Returns the joined parameters of one layer, or of stacked layers."""
    found: ParamTree = {}
    if "attn" in params:
        q, k, v = (params["attn"][name] for name in ("q", "k", "v"))
        found["attn"] = {"qkv": jax.tree.map(joined_qkv, q, k, v)}
    if "mlp" in params:
        gate, up = params["mlp"]["gate"], params["mlp"]["up"]
        found["mlp"] = {"gate_up": jax.tree.map(lambda gate, up: jnp.stack([gate, up], axis=-2), gate, up)}
    return _constrained(found, is_apart)


def _constrained(layer: ParamTree, is_apart: bool) -> ParamTree:
    """Fixes the sharding of parameters of one layer, or of stacked layers, on the current mesh."""
    # The sharding does not depend on the number of the layer, so all layers share the compiled program of number 0.
    found: ParamTree = sharding.constrain_parameters({"layers": {0: layer} if is_apart else layer})["layers"]
    return found[0] if is_apart else found


def separate(model: Dream) -> None:
    """Separates joined projections again, layer by layer: the inverse of `join`. It changes the model."""
    with sharding.mesh_context(model):
        for layer in model.layer_modules():
            attn, mlp = layer.attn, layer.mlp
            if attn.qkv is None and mlp.gate_up is None:
                continue
            params = split_params(layer)[1]
            params = _separated(
                {"attn": {"qkv": params["attn"].get("qkv", {})}, "mlp": {"gate_up": params["mlp"].get("gate_up", {})}},
                model.is_apart,
            )
            inputs = (model.config.hidden_size,)
            if attn.qkv is not None:
                attn.q, attn.k, attn.v = (
                    _linear(inputs, params["attn"][name], model.is_apart) for name in ("q", "k", "v")
                )
                attn.qkv = None
            if mlp.gate_up is not None:
                mlp.gate, mlp.up = (_linear(inputs, params["mlp"][name], model.is_apart) for name in ("gate", "up"))
                mlp.gate_up = None


@functools.partial(jax.jit, static_argnums=1)
def _separated(params: ParamTree, is_apart: bool) -> ParamTree:
    return _constrained(separated(params), is_apart)


def separated(layer: ParamTree) -> ParamTree:
    """Returns the parameters of a layer, or of stacked layers, with every joined projection separated."""
    found = {name: dict(value) if isinstance(value, dict) else value for name, value in layer.items()}
    if qkv := found.get("attn", {}).pop("qkv", {}):
        parts = {name: split_qkv(leaf) for name, leaf in qkv.items()}
        for index, name in enumerate(("q", "k", "v")):
            found["attn"][name] = {leaf: values[index] for leaf, values in parts.items()}
    if gate_up := found.get("mlp", {}).pop("gate_up", {}):
        for index, name in enumerate(("gate", "up")):
            found["mlp"][name] = {leaf: value[..., index, :] for leaf, value in gate_up.items()}
    return found


def _linear(in_shape: tuple[int, ...], params: ParamTree, is_apart: bool) -> Linear:
    """Returns a projection that holds these parameters, of one layer or of stacked layers."""
    # Codes in int8 have the shape of their kernel.
    shape = params["kernel" if "kernel" in params else "codes"].shape
    out_shape = shape[len(in_shape) + (0 if is_apart else 1) :]
    draw = lambda: Linear(
        in_shape, out_shape, use_bias="bias" in params, stddev=1.0, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    linear: Linear = jax.eval_shape(draw)  # a module without arrays
    for name in ("kernel", "bias", "codes", "scales"):
        setattr(linear, name, nnx.Param(params[name]) if name in params else None)
    return linear


def layer_params(layers: ParamTree, number: int) -> ParamTree:
    """Returns the parameters of one layer in the canonical form, without the axis of layers.

    Args:
      layers: the value of "layers" in the parameters of a model of any form.
      number: the number of the layer, from 0.
    """
    is_apart = number in layers
    return separated(layers[number] if is_apart else jax.tree.map(lambda leaf: leaf[number], layers))


def canonical_shapes(params: ParamTree) -> ParamTree:
    """Returns the shapes and dtypes that these parameters of a model have in the canonical form."""
    return jax.eval_shape(canonical, params)


def canonical(params: ParamTree) -> ParamTree:
    """Returns the parameters of a model in the canonical form; only the arrays of the layers are copied.

    This needs memory for the layers in both forms. `layer_params` needs less memory, and `canonical_shapes` needs none.
    """
    layers = params.get("layers")
    if layers is None:
        return params
    if 0 in layers:
        with sharding.mesh_context(params):
            layers = _stacked([layers[number] for number in range(len(layers))])
    return {**params, "layers": separated(layers)}
