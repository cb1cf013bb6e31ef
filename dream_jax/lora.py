"""Adds low-rank adapters (LoRA) to a model, merges them, and quantises the frozen base weights under them.

For an input x an adapter adds (alpha / rank) x A B to the output of a projection (Hu et al. 2021). A and B are
additional parameters of `model.Linear`, stacked over layers or apart like all others, and only they are trained. The
base weights may be stored in 8 or 4 bits (`quantisation`); that is QLoRA (Dettmers et al. 2023).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dream_jax import layer_forms, sharding
from dream_jax.bounds import MOST_RANK, POSITIVE, FloatRange, IntegerRange, check_numbers
from dream_jax.model import Dream, JoinedLinear, Layer, Linear, merge_params, split_params
from dream_jax.quantisation import KINDS, CodeKind, QuantisedKernel, dequantise, kind_of, quantise
from dream_jax.shapes import ParamTree

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
TARGETS: tuple[Target, ...] = get_args(Target)
Base = Literal["float32", "bfloat16", "int8", "nf4"]

_ADAPTER_LEAVES = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The configuration of an adapter.

    Attributes:
      rank: the number of columns of A and of rows of B, at least 1; at most the narrower side of each projection.
      alpha: A B is multiplied by alpha / rank; positive.
      dropout: the probability, in [0, 1), with which a training step sets an input of A to zero. Every element of the
        input of every projection is drawn separately.
      targets: names of the projections that have an adapter, in every layer; stored in the order of `TARGETS`.

    Raises:
      ValueError: a number is out of range, or the targets are unknown, repeated or empty.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[Target, ...] = TARGETS

    def __post_init__(self) -> None:
        check_numbers(
            self, rank=IntegerRange(1, MOST_RANK), alpha=POSITIVE, dropout=FloatRange(0.0, 1.0, open_high=True)
        )
        targets = tuple(self.targets)
        unknown = [name for name in targets if name not in TARGETS]
        if unknown or not targets or len(set(targets)) < len(targets):
            raise ValueError(f"{targets=} must be some of {', '.join(TARGETS)}, none of them twice")
        # In a fixed order, so that configurations with the same targets are equal.
        object.__setattr__(self, "targets", tuple(name for name in TARGETS if name in targets))


def parse_targets(text: str) -> tuple[Target, ...]:
    """Parses the names of target projections: "all", or names separated by commas, such as "q,k,v".

    Returns:
      The names in the order of `TARGETS`.

    Raises:
      ValueError: a name is unknown or repeated.
    """
    if text == "all":
        return TARGETS
    names = tuple(name.strip() for name in text.split(","))
    known = tuple(target for target in TARGETS if target in names)
    if len(known) != len(names):
        raise ValueError(f"targets {text!r} are neither all nor some of {','.join(TARGETS)}, none of them twice")
    return known


Projections = dict[Target, Linear]


def projections(model: Dream) -> Projections:
    """Returns the seven projections of a model with stacked layers, by the names in `TARGETS`.

    Raises:
      ValueError: the layers are apart, see `projections_by_layer`.
    """
    if model.is_apart:
        raise ValueError("the layers of this model are apart; use projections_by_layer, or layer_forms.stacked first")
    return projections_by_layer(model)[0]


def projections_by_layer(model: Dream) -> list[Projections]:
    """Returns a dict for each layer, from the names in `TARGETS` to the projections that are not joined.

    Stacked layers have one dict for all. After `layer_forms.join` a dict has fewer than seven projections.
    """
    return [_projections(layer) for layer in model.layer_modules()]


def _projections(layer: Layer) -> Projections:
    found = {name: getattr(getattr(layer, _block(name)), name) for name in TARGETS}
    return {name: linear for name, linear in found.items() if linear is not None}


def _block(name: Target) -> Literal["attn", "mlp"]:
    return "attn" if name in ("q", "k", "v", "o") else "mlp"


def config_of(model: Dream) -> LoraConfig | None:
    """Returns the configuration of a model's adapter; None if the model has no adapter.

    Raises:
      ValueError: the adapters of the projections differ in rank, alpha or dropout.
    """
    adapted = [
        (name, linear)
        for layer in projections_by_layer(model)
        for name, linear in layer.items()
        if linear.lora_a is not None
    ]
    if not adapted:
        return None
    settings = {(linear.lora_a.shape[-1], linear.lora_alpha, linear.lora_dropout) for _, linear in adapted}
    if len(settings) > 1:
        raise ValueError(f"the projections have adapters with different (rank, alpha, dropout): {sorted(settings)}")
    rank, alpha, dropout = settings.pop()
    targets = tuple(dict.fromkeys(name for name, _ in adapted))
    return LoraConfig(rank=rank, alpha=alpha, dropout=dropout, targets=targets)


def base_of(model: Dream) -> str:
    """Returns how the kernels of a model's layers are stored: "int8" or "nf4", or the name of their float dtype."""
    linear = model.layer_modules()[0].attn.o  # the projection that is never joined with others
    return str(linear.kernel.dtype) if linear.kernel is not None else kind_of(linear.codes)


def _copy(model: Dream) -> Dream:
    """Returns a model of new modules that hold the same arrays; joined projections are separated into new arrays."""
    copied = merge_params(*split_params(model))
    layer_forms.separate(copied)
    return copied


def _sharded(name: Target, leaves: Mapping[str, jax.Array], is_apart: bool = False) -> dict[str, jax.Array]:
    """Fixes the sharding of new parameters of one projection on the current mesh.

    Args:
      name: the name of the projection.
      leaves: leaf name -> array.
      is_apart: whether the arrays are those of one layer; otherwise they are those of all layers, stacked.
    """
    layer = {_block(name): {name: dict(leaves)}}
    # The sharding does not depend on the number of the layer.
    sharded = sharding.constrain_parameters({"layers": {0: layer} if is_apart else layer})["layers"]
    found: dict[str, jax.Array] = (sharded[0] if is_apart else sharded)[_block(name)][name]
    return found


# ------------------------------------------------------------------------------------------------------------- adapters


def attach(model: Dream, config: LoraConfig, key: jax.Array) -> Dream:
    """Returns the model with a new adapter, which does not change its output yet because B is zero.

    A is drawn uniformly from +-1/sqrt(number of inputs), as in PEFT, because published learning rates were chosen for
    this initialisation. (The LoRA paper says "Gaussian" without a width.) A and B are float32, whatever the dtype of the
    base is.

    Args:
      model: a model without an adapter; it is not changed. For a model of shapes see `attached_shapes`.
      config: the configuration of the adapter.
      key: the random key for A; the values do not depend on the mesh.

    Raises:
      ValueError: the model has an adapter already, or the rank is larger than the narrower side of a projection.
    """
    if config_of(model) is not None:
        raise ValueError("the model has an adapter already; merge it first, or continue training that one")
    adapted = _copy(model)
    for name, linear in projections_by_layer(adapted)[0].items():
        narrower = min(math.prod(linear.in_shape), math.prod(linear.out_shape))
        if name in config.targets and config.rank > narrower:
            raise ValueError(
                f"rank={config.rank} is more than {narrower}, the narrower side of the projection {name}, so that the "
                f"adapter would have more weights than it can use; give a rank of at most {narrower}, or other targets"
            )
    sizes = tuple(
        (name, linear.in_shape, linear.out_shape) for name, linear in projections_by_layer(adapted)[0].items()
    )
    sizes = tuple(size for size in sizes if size[0] in config.targets)
    with sharding.mesh_context(model):
        leaves = _initial(key, sizes, model.config.num_hidden_layers, config.rank)
        put_adapter(adapted, config, leaves)
    return adapted


def put_adapter(model: Dream, config: LoraConfig, leaves: Mapping[Target, Mapping[str, jax.Array]]) -> None:
    """Puts the weights of an adapter into the projections of a model; it changes the model.

    Args:
      model: the model, without joined projections. If it has an adapter, the new weights replace those of its targets.
      config: the configuration of the adapter.
      leaves: for each target the matrices `lora_a` and `lora_b` of all layers, stacked: [L, ..., rank] and [L, rank, ...].
    """
    layers = projections_by_layer(model)
    for name in config.targets:
        a, b = leaves[name]["lora_a"], leaves[name]["lora_b"]
        pairs = [(a, b)] if not model.is_apart else _pairs(name, a, b)
        for layer, (lora_a, lora_b) in zip(layers, pairs, strict=True):
            linear = layer[name]
            linear.lora_a, linear.lora_b = nnx.Param(lora_a), nnx.Param(lora_b)
            linear.lora_alpha, linear.lora_dropout = float(config.alpha), float(config.dropout)


@functools.partial(jax.jit, static_argnums=0)
def _pairs(name: Target, lora_a: jax.Array, lora_b: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Returns a pair (lora_a, lora_b) for each layer, from the stacked matrices of one projection."""
    layers = [_sharded(name, {"lora_a": a, "lora_b": b}, True) for a, b in zip(lora_a, lora_b, strict=True)]
    return [(layer["lora_a"], layer["lora_b"]) for layer in layers]


# (name, in_shape, out_shape) of each projection
Sizes = tuple[tuple[Target, tuple[int, ...], tuple[int, ...]], ...]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _initial(key: jax.Array, sizes: Sizes, layers: int, rank: int) -> dict[Target, dict[str, jax.Array]]:
    leaves_by_name = {}
    for name, in_shape, out_shape in sizes:
        bound = 1 / math.sqrt(math.prod(in_shape))
        target_key = jax.random.fold_in(key, TARGETS.index(name))
        lora_a = jax.random.uniform(target_key, (layers, *in_shape, rank), jnp.float32, -bound, bound)
        leaves = {"lora_a": lora_a, "lora_b": jnp.zeros((layers, rank, *out_shape), jnp.float32)}
        leaves_by_name[name] = _sharded(name, leaves)
    return leaves_by_name


def attached_shapes(model: Dream, config: LoraConfig) -> Dream:
    """Returns what `attach` returns for a model of shapes (`jax.ShapeDtypeStruct`), without arrays."""
    return jax.eval_shape(lambda model: attach(model, config, jax.random.key(0)), model)


def split(params: ParamTree) -> tuple[ParamTree, ParamTree]:
    """Splits parameters into (those of the adapter, all others), two nested dicts; `shapes.joined` is the inverse."""
    adapter: ParamTree = {}
    base: ParamTree = {}
    for name, value in params.items():
        if isinstance(value, dict):
            inside, outside = split(value)
            if inside:
                adapter[name] = inside
            if outside:
                base[name] = outside
        else:
            (adapter if name in _ADAPTER_LEAVES else base)[name] = value
    return adapter, base


def merge(model: Dream, *, dequantised: bool = False) -> Dream:
    """Returns the model with A B alpha / rank added to its kernels, so that it needs fewer matrix products.

    The sum is computed in float32. A kernel keeps its dtype, unless it was quantised.

    Args:
      model: the model; it is not changed. A model without an adapter is returned unchanged, unless its base is
        quantised and `dequantised` is set.
      dequantised: whether quantised kernels may be replaced by kernels in the dtype of the embedding. These contain the
        rounding error of the codes; merging the adapter into the original float base is more accurate.

    Raises:
      ValueError: the model has an adapter on a quantised base, and `dequantised` is not set.
    """
    if config_of(model) is None and (base_of(model) not in KINDS or not dequantised):
        return model
    merged = _copy(model)
    merge_inside(merged, dequantised=dequantised)
    return merged


def merge_inside(model: Dream, *, dequantised: bool = False) -> None:
    """Changes the model itself into the model that `merge` returns.

    If the layers are apart and nothing else refers to their arrays, this needs little more memory than the model.

    Raises:
      ValueError: as for `merge`.
    """
    if config_of(model) is None and (base_of(model) not in KINDS or not dequantised):
        return
    if base_of(model) in KINDS and not dequantised:
        raise ValueError(
            f"the base is {base_of(model)}, which cannot store the sum: load the float base with this adapter and "
            "merge that, or pass dequantised=True (merge_adapter) to get float kernels with the error of the codes"
        )
    if base_of(model) in KINDS:
        layer_forms.separate(model)  # joined projections may be in int8
    dtype = jnp.dtype(model.embed.embedding.dtype)
    for layer in projections_by_layer(model):
        changed = {name: linear for name, linear in layer.items() if linear.lora_a is not None or linear.kernel is None}
        with sharding.mesh_context(model):
            # Without waiting, the old and the new kernels of many layers would be in memory at the same time.
            kernels = jax.block_until_ready(_merged_kernels(changed, dtype, model.is_apart))
        for name, linear in changed.items():
            linear.kernel = nnx.Param(kernels[name])
            linear.codes = linear.scales = linear.lora_a = linear.lora_b = None
            linear.lora_alpha = linear.lora_dropout = 0.0
    model.base_identity = None


@functools.partial(jax.jit, static_argnums=(1, 2))
def _merged_kernels(linears: Projections, dtype: np.dtype, is_apart: bool) -> dict[Target, jax.Array]:
    function = functools.partial(_merged, dtype=dtype)
    if not is_apart:
        # One layer at a time, because the float32 sums of all layers would be larger than the model.
        function = functools.partial(jax.lax.map, function)
    return {name: _sharded(name, {"kernel": function(linear)}, is_apart)["kernel"] for name, linear in linears.items()}


def _merged(linear: Linear, dtype: np.dtype) -> jax.Array:
    """Returns the merged kernel of one layer; `dtype` is the dtype of the result if the kernel is quantised."""
    if linear.kernel is None:
        kernel = dequantise(QuantisedKernel(linear.codes[...], linear.scales[...]), linear.out_shape[-1])
    else:
        kernel, dtype = linear.kernel[...].astype(jnp.float32), linear.kernel.dtype
    if linear.lora_a is not None:
        rank = linear.lora_a.shape[-1]
        a_Ir = linear.lora_a[...].astype(jnp.float32).reshape(-1, rank)
        b_rO = linear.lora_b[...].astype(jnp.float32).reshape(rank, -1)
        # By default GPUs and TPUs round the inputs. Full precision is affordable here, because this runs only once.
        added = linear.lora_alpha / rank * jnp.matmul(a_Ir, b_rO, precision="highest")
        kernel = kernel + added.reshape(kernel.shape)
    return kernel.astype(dtype)


# ------------------------------------------------------------------------------------------------------ the frozen base


def with_base(model: Dream, base: CodeKind) -> Dream:
    """Returns the model with the seven kernels of each layer quantised; the other parameters are the same arrays.

    Args:
      model: a model with float kernels; it is not changed. For a model of shapes see `with_base_shapes`. For weights in
        a directory `pretrained.load(path, base=...)` needs less memory, because it quantises while it reads.
      base: how the kernels are stored, "int8" or "nf4".

    Raises:
      ValueError: `base` has another value, or the model is quantised already.
    """
    if base not in KINDS:
        raise ValueError(f"{base=} is not one of {KINDS}")
    if base_of(model) in KINDS:
        raise ValueError(f"the base is {base_of(model)} already and cannot be quantised again; load the float weights")
    quantised_model = _copy(model)
    abstract = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(model))
    quantised_model.base_identity = None if abstract else identity(model)
    for layer in projections_by_layer(quantised_model):
        with sharding.mesh_context(model):
            codes_by_name = _quantised(
                {name: linear.kernel[...] for name, linear in layer.items()}, base, model.is_apart
            )
        for name, linear in layer.items():
            linear.codes = nnx.Param(codes_by_name[name]["codes"])
            linear.scales = nnx.Param(codes_by_name[name]["scales"])
            linear.kernel = None
    return quantised_model


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantised(kernels: dict[Target, jax.Array], kind: CodeKind, is_apart: bool) -> dict[Target, dict[str, jax.Array]]:
    function = functools.partial(quantise, kind=kind)
    if not is_apart:
        # One layer at a time, because float32 intermediate values of all layers would need too much memory.
        function = functools.partial(jax.lax.map, function)
    return {name: _sharded(name, function(kernel)._asdict(), is_apart) for name, kernel in kernels.items()}


def round_scales(model: Dream) -> None:
    """Rounds the scales of an int8 base to bfloat16, which halves their bytes; it changes the model.

    This is for models that only sample on a GPU. There, products with few rows round the scales anyway
    (`quantisation.is_fused`); without this function every pass would read the scales in float32 and write them in bfloat16.
    The error of a weight grows by at most 0.4 % of the weight. Projections may be joined or separate.
    """
    for layer in model.layer_modules():
        for block in (layer.attn, layer.mlp):
            for linear in vars(block).values():
                if isinstance(linear, Linear | JoinedLinear) and linear.codes is not None:
                    linear.scales = nnx.Param(_rounded(linear.scales[...]))


@jax.jit
def _rounded(scales: jax.Array) -> jax.Array:
    return scales.astype(jnp.bfloat16)


def with_base_shapes(model: Dream, base: CodeKind) -> Dream:
    """Returns what `with_base` returns for a model of shapes (`jax.ShapeDtypeStruct`), without arrays."""
    return jax.eval_shape(lambda model: with_base(model, base), model)


def identity(model: Dream) -> str:
    """Returns a hash of the base weights of a model, 64 hexadecimal digits. Equal bases have equal hashes.

    It is computed from the weights without the adapter, rounded to bfloat16. It therefore depends neither on the
    mesh nor on whether the weights are float32 or bfloat16. For a quantised base it is the hash before quantisation.

    Raises:
      ValueError: the base is quantised, and the model does not have that hash.
    """
    if model.base_identity is not None:
        return str(model.base_identity)
    if base_of(model) in KINDS:
        raise ValueError("it is not known which weights this quantised base was made from; load it from its directory")
    params = split(split_params(model)[1])[1]
    with sharding.mesh_context(params):
        rest = _prints({name: value for name, value in params.items() if name != "layers"}, stacked=False)
        if not model.is_apart:
            return digest([*rest, *_prints(layer_forms.separated(params["layers"]), stacked=True)])
    layers = ({"layers": layer_forms.layer_params(params["layers"], number)} for number in params["layers"])
    by_layer = [found for number, layer in enumerate(layers) for found in prints(layer, number)]
    return digest([*rest, *by_layer])


# The name of a parameter, with the number of its layer in front if it has one, and the uint32 hash of its values.
Print = tuple[str, int]


def prints(params: ParamTree, layer: int | None) -> list[Print]:
    """Returns the hashes of a part of the parameters of a model, so that the whole model need not be in memory at once.

    Args:
      params: the parameters of one layer, without the layer axis, or parameters outside of the layers.
      layer: the number of the layer, or None for parameters outside of the layers.

    Returns:
      One pair of name and hash for each parameter; `digest` combines them, in any order.
    """
    with sharding.mesh_context(params):
        unit_prints = _prints(params, stacked=False)
    if layer is None:
        return unit_prints
    # The names are those that `_prints` gives to stacked weights.
    return [(f"{layer}.{name.removeprefix('layers.')}", value) for name, value in unit_prints]


def digest(hashes: list[Print]) -> str:
    """Combines the hashes of all parameters of a model, in any order, into 64 hexadecimal digits."""
    return hashlib.sha256(repr(sorted(hashes)).encode()).hexdigest()


def _prints(params: ParamTree, *, stacked: bool) -> list[Print]:
    # One parameter at a time, to limit the memory that intermediate values need.
    return list(_named(jax.tree.map(lambda leaf: jax.device_get(_sums(leaf, stacked)), params)))


@functools.partial(jax.jit, static_argnums=1)
def _sums(leaf: jax.Array, stacked: bool) -> jax.Array:
    """Returns the hashes, uint32 [L], of a stacked parameter, or the hash of another parameter; replicated."""
    found: jax.Array = jax.vmap(_sum)(leaf) if stacked else _sum(leaf)
    return sharding.constrain(found, *[None] * found.ndim)


def _named(sums: ParamTree) -> Iterator[Print]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(sums):
        name = ".".join(str(part.key) for part in path)
        if np.ndim(leaf):
            yield from ((f"{layer}.{name}", int(value)) for layer, value in enumerate(leaf))
        else:
            yield name, int(leaf)


def _sum(x: jax.Array) -> jax.Array:
    """Returns a uint32 hash of an array that depends on every bit (as bfloat16) and on the index of every element.

    It is a sum of integers, so it does not depend on the order in which the devices add.
    """
    # The sum is computed in chunks, because a CPU stores all summands at once, four bytes per weight. A chunk takes
    # every `chunks`-th index of the first axis, so that all devices that shard this axis work on every chunk.
    chunks = math.gcd(max(x.shape[0] // 2, 1), 32) if x.ndim > 1 else 1
    # bfloat16 is not rounded, so its bits are taken before the loop: inside it a CPU would convert all of x to float32.
    exact = x.dtype == jnp.bfloat16
    cut = (_bits(x) if exact else x).reshape(-1, chunks, *x.shape[1:])

    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        chunk = jax.lax.dynamic_index_in_dim(cut, number, axis=1, keepdims=False)
        bits = (chunk if exact else _bits(chunk.astype(jnp.bfloat16))).astype(jnp.uint32)
        index = jax.lax.broadcasted_iota(jnp.uint32, chunk.shape, 0) * jnp.uint32(chunks) + number.astype(jnp.uint32)
        for axis, size in enumerate(chunk.shape[1:], 1):
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, chunk.shape, axis)
        # The mixing constants are those of murmur3's finaliser.
        mixed = (index ^ (index >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B) + bits + jnp.uint32(1)
        mixed = (mixed ^ (mixed >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
        return total + jnp.sum(mixed ^ (mixed >> jnp.uint32(16)), dtype=jnp.uint32)

    return jax.lax.fori_loop(0, chunks, add, jnp.uint32(0))


def _bits(x: jax.Array) -> jax.Array:
    found: jax.Array = jax.lax.bitcast_convert_type(x, jnp.uint16)
    return found


# --------------------------------------------------------------------------------------------------- error of logits


def logit_error(exact: jax.Array, found: jax.Array) -> dict[str, float]:
    """Measures the error of logits, for example those of a quantised model.

    Args:
      exact: float [..., V], the logits to compare with.
      found: float [..., V], the logits with an error.

    Returns:
      `relative` (root mean square of the error, divided by the root mean square of the exact logits), `kl` (mean over
      positions of KL(exact || found) in nats), `same_top` (share of positions with the same most probable token).
    """
    exact, found = jnp.asarray(exact, jnp.float32), jnp.asarray(found, jnp.float32)
    log_p, log_q = jax.nn.log_softmax(exact), jax.nn.log_softmax(found)
    return {
        "relative": float(jnp.sqrt(jnp.mean(jnp.square(found - exact)) / jnp.mean(jnp.square(exact)))),
        "kl": float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))),
        "same_top": float(jnp.mean((jnp.argmax(exact, axis=-1) == jnp.argmax(found, axis=-1)).astype(jnp.float32))),
    }
