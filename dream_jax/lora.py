"""Low-rank adapters (LoRA), and the frozen base that they correct.

An adapter adds (alpha / rank) x A B to a kernel (Hu et al. 2021). A and B are additional parameters of `model.Linear`,
stacked over layers like all others, and only they are trained. The base may be stored in 8 or 4 bits (`quantisation`),
which is QLoRA (Dettmers et al. 2023).
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

from dream_jax import sharding
from dream_jax.model import Dream, Linear, merge_params, split_params
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
      rank: the number of columns of A and rows of B.
      alpha: A B is multiplied by alpha / rank.
      dropout: the probability with which each input of A is set to zero in a training step, drawn per projection and token.
      targets: the projections of every layer that have an adapter.

    Raises:
      ValueError: a number is out of range, or the targets are unknown, repeated or empty.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[Target, ...] = TARGETS

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r} must be a positive integer")
        if not 0.0 < self.alpha < math.inf:
            raise ValueError(f"{self.alpha=} must be a positive number")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"{self.dropout=} is outside [0, 1)")
        targets = tuple(self.targets)
        unknown = [name for name in targets if name not in TARGETS]
        if unknown or not targets or len(set(targets)) < len(targets):
            raise ValueError(f"{targets=} must be some of {', '.join(TARGETS)}, each once")
        # In a fixed order, so that equal choices give equal configurations.
        object.__setattr__(self, "targets", tuple(name for name in TARGETS if name in targets))


def parse_targets(text: str) -> tuple[Target, ...]:
    """Parses "all", or names separated by commas, as in "q,k,v".

    Raises:
      ValueError: a name is unknown or repeated.
    """
    if text == "all":
        return TARGETS
    names = tuple(name.strip() for name in text.split(","))
    known = tuple(target for target in TARGETS if target in names)
    if len(known) != len(names):
        raise ValueError(f"targets {text!r} are neither all nor some of {','.join(TARGETS)}, each once")
    return known


def projections(model: Dream) -> dict[Target, Linear]:
    """The seven projections of the (stacked) layers, by name."""
    return {name: getattr(getattr(model.layers, _block(name)), name) for name in TARGETS}


def _block(name: Target) -> Literal["attn", "mlp"]:
    return "attn" if name in ("q", "k", "v", "o") else "mlp"


def config_of(model: Dream) -> LoraConfig | None:
    """The configuration of the adapter of a model, or None."""
    found = {name: linear for name, linear in projections(model).items() if linear.lora_a is not None}
    if not found:
        return None
    kinds = {(linear.lora_a.shape[-1], linear.lora_alpha, linear.lora_dropout) for linear in found.values()}
    if len(kinds) > 1:
        raise ValueError(f"the projections have adapters of several kinds (rank, alpha, dropout): {sorted(kinds)}")
    rank, alpha, dropout = kinds.pop()
    return LoraConfig(rank=rank, alpha=alpha, dropout=dropout, targets=tuple(found))


def base_of(model: Dream) -> str:
    """How the kernels of a model's layers are stored: "int8" or "nf4", or the name of their dtype."""
    linear = model.layers.attn.q
    return str(linear.kernel.dtype) if linear.kernel is not None else kind_of(linear.codes)


def _copy(model: Dream) -> Dream:
    """New modules around the same arrays."""
    return merge_params(*split_params(model))


def _sharded(name: Target, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """New parameters of one projection, sharded over the current mesh."""
    sharded = sharding.constrain_parameters({"layers": {_block(name): {name: dict(leaves)}}})
    found: dict[str, jax.Array] = sharded["layers"][_block(name)][name]
    return found


# ------------------------------------------------------------------------------------------------------------- adapters


def attach(model: Dream, config: LoraConfig, key: jax.Array) -> Dream:
    """Returns the model with a new adapter, which has no effect yet because B is zero.

    A is uniform in +-1/sqrt(inputs), as in PEFT, for which published learning rates are meant. (The LoRA paper says
    "Gaussian" without a width.) A and B are float32, whatever the dtype of the base.

    Args:
      model: a model without an adapter, of arrays, or of shapes under `jax.eval_shape` (see `attached_shapes`). It is not
        changed.
      config: of the adapter.
      key: of the random values of A, which do not depend on the mesh.

    Raises:
      ValueError: the model has an adapter.
    """
    if config_of(model) is not None:
        raise ValueError("the model has an adapter already; merge it first, or continue training that one")
    found = _copy(model)
    sizes = tuple((name, linear.in_shape, linear.out_shape) for name, linear in projections(found).items())
    sizes = tuple(size for size in sizes if size[0] in config.targets)
    with sharding.mesh_context(model):
        made = _initial(key, sizes, model.config.num_hidden_layers, config.rank)
    for name in config.targets:
        linear = projections(found)[name]
        linear.lora_a, linear.lora_b = nnx.Param(made[name]["lora_a"]), nnx.Param(made[name]["lora_b"])
        linear.lora_alpha, linear.lora_dropout = float(config.alpha), float(config.dropout)
    return found


Sizes = tuple[tuple[Target, tuple[int, ...], tuple[int, ...]], ...]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _initial(key: jax.Array, sizes: Sizes, layers: int, rank: int) -> dict[Target, dict[str, jax.Array]]:
    found = {}
    for name, in_shape, out_shape in sizes:
        bound = 1 / math.sqrt(math.prod(in_shape))
        target_key = jax.random.fold_in(key, TARGETS.index(name))
        lora_a = jax.random.uniform(target_key, (layers, *in_shape, rank), jnp.float32, -bound, bound)
        leaves = {"lora_a": lora_a, "lora_b": jnp.zeros((layers, rank, *out_shape), jnp.float32)}
        found[name] = _sharded(name, leaves)
    return found


def attached_shapes(model: Dream, config: LoraConfig) -> Dream:
    """`attach` for a model of shapes."""
    return jax.eval_shape(lambda model: attach(model, config, jax.random.key(0)), model)


def split(params: ParamTree) -> tuple[ParamTree, ParamTree]:
    """Splits parameters into those of the adapter and all others; `shapes.joined` is the inverse."""
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
    """Adds the adapter to the kernels, in float32; the result is an ordinary model, which is faster.

    Args:
      model: is not changed; a model without an adapter is returned as it is.
      dequantised: whether a quantised base may become a floating-point one with the dtype of its embedding. The result has
        the error of the codes; merging the adapter into the original floating-point base is more accurate.

    Raises:
      ValueError: the base is quantised, and `dequantised` is not set.
    """
    if config_of(model) is None and (base_of(model) not in KINDS or not dequantised):
        return model
    if base_of(model) in KINDS and not dequantised:
        raise ValueError(
            f"the base is {base_of(model)}, which cannot hold the sum: load the float base with this adapter and merge "
            "that, or pass dequantised=True (merge_adapter) to keep the error of the codes"
        )
    found = _copy(model)
    changed = {
        name: linear
        for name, linear in projections(found).items()
        if linear.lora_a is not None or linear.kernel is None
    }
    with sharding.mesh_context(model):
        kernels = _merged_kernels(changed, jnp.dtype(model.embed.embedding.dtype))
    for name, linear in changed.items():
        linear.kernel = nnx.Param(kernels[name])
        linear.codes = linear.scales = linear.lora_a = linear.lora_b = None
        linear.lora_alpha = linear.lora_dropout = 0.0
    found.base_identity = None
    return found


@functools.partial(jax.jit, static_argnums=1)
def _merged_kernels(linears: dict[Target, Linear], dtype: np.dtype) -> dict[Target, jax.Array]:
    # One layer at a time: the float32 sums of all layers would be larger than the model.
    return {
        name: _sharded(name, {"kernel": jax.lax.map(functools.partial(_merged, dtype=dtype), linear)})["kernel"]
        for name, linear in linears.items()
    }


def _merged(linear: Linear, dtype: np.dtype) -> jax.Array:
    """The merged kernel of one layer."""
    if linear.kernel is None:
        kernel = dequantise(QuantisedKernel(linear.codes[...], linear.scales[...]), linear.out_shape[-1])
    else:
        kernel, dtype = linear.kernel[...].astype(jnp.float32), linear.kernel.dtype
    if linear.lora_a is not None:
        rank = linear.lora_a.shape[-1]
        a_Ir = linear.lora_a[...].astype(jnp.float32).reshape(-1, rank)
        b_rO = linear.lora_b[...].astype(jnp.float32).reshape(rank, -1)
        # In full precision even where matrix units round their inputs, because it is done only once.
        added = linear.lora_alpha / rank * jnp.matmul(a_Ir, b_rO, precision="highest")
        kernel = kernel + added.reshape(kernel.shape)
    return kernel.astype(dtype)


# ------------------------------------------------------------------------------------------------------ the frozen base


def with_base(model: Dream, base: CodeKind) -> Dream:
    """Returns the model with the seven kernels of its layers quantised; other parameters stay unchanged.

    Args:
      model: a model with float kernels, of arrays, or of shapes under `jax.eval_shape`. It is not changed. For weights in a
        directory, `pretrained.load(path, base=...)` needs less memory, because it quantises while it reads.
      base: "int8" or "nf4".

    Raises:
      ValueError: the base is unknown, or the model is quantised already.
    """
    if base not in KINDS:
        raise ValueError(f"{base=} is not one of {KINDS}")
    if base_of(model) in KINDS:
        raise ValueError(f"the base is {base_of(model)} already; load the float weights")
    found = _copy(model)
    abstract = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(model))
    found.base_identity = None if abstract else identity(model)
    with sharding.mesh_context(model):
        made = _quantised({name: linear.kernel[...] for name, linear in projections(model).items()}, base)
    for name, linear in projections(found).items():
        linear.codes, linear.scales = nnx.Param(made[name]["codes"]), nnx.Param(made[name]["scales"])
        linear.kernel = None
    return found


@functools.partial(jax.jit, static_argnums=1)
def _quantised(kernels: dict[Target, jax.Array], kind: CodeKind) -> dict[Target, dict[str, jax.Array]]:
    # One layer at a time, because intermediate values are in float32.
    one = functools.partial(quantise, kind=kind)
    return {name: _sharded(name, jax.lax.map(one, kernel)._asdict()) for name, kernel in kernels.items()}


def with_base_shapes(model: Dream, base: CodeKind) -> Dream:
    """`with_base` for a model of shapes."""
    return jax.eval_shape(lambda model: with_base(model, base), model)


def identity(model: Dream) -> str:
    """A digest of the weights of a model, rounded to bfloat16 and without its adapter, which identifies the base.

    It does not depend on the mesh, nor on whether the weights are loaded as float32 or bfloat16. The identity of a
    quantised base is that of the weights before they were quantised.

    Raises:
      ValueError: the base is quantised and its identity is not known.
    """
    if model.base_identity is not None:
        return str(model.base_identity)
    if base_of(model) in KINDS:
        raise ValueError("it is not known which weights this quantised base was made from; load it from its directory")
    params = split(split_params(model)[1])[1]
    with sharding.mesh_context(params):
        layers = _prints(params["layers"], stacked=True)
        rest = _prints({name: value for name, value in params.items() if name != "layers"}, stacked=False)
    return digest([*rest, *layers])


Print = tuple[str, int]


def prints(params: ParamTree, layer: int | None) -> list[Print]:
    """A named hash of each parameter of one unit (without a layer axis), for `digest`; the order does not matter."""
    with sharding.mesh_context(params):
        found = _prints(params, stacked=False)
    if layer is None:
        return found
    # The names are those that `_prints` gives to stacked weights.
    return [(f"{layer}.{name.removeprefix('layers.')}", value) for name, value in found]


def digest(found: list[Print]) -> str:
    """Combines the hashes of all parameters of a model into 64 hexadecimal digits."""
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


def _prints(params: ParamTree, *, stacked: bool) -> list[Print]:
    # One parameter at a time, to limit the memory for intermediate values.
    return list(_named(jax.tree.map(lambda leaf: jax.device_get(_sums(leaf, stacked)), params)))


@functools.partial(jax.jit, static_argnums=1)
def _sums(leaf: jax.Array, stacked: bool) -> jax.Array:
    """The hash of each layer of a parameter, or of a parameter outside of the layers; replicated on every process."""
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
    """A uint32 hash that depends on every bit and its index; sums of integers do not depend on the order of the devices."""
    # In chunks, because a CPU stores the summands, four bytes per weight. Chunks are cut within the leading axis, so that
    # devices among which it is sharded have an equal share of every chunk.
    chunks = math.gcd(x.shape[0] // 2, 32) if x.ndim > 1 else 1
    # Where nothing is rounded the bits are taken before the loop: a CPU would otherwise convert all of x to float32 there.
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


# --------------------------------------------------------------------------------------------------- what it costs


def logit_error(exact: jax.Array, found: jax.Array) -> dict[str, float]:
    """Compares logits [..., V] with exact ones.

    Returns:
      `relative` (root mean square of the error over that of the exact logits), `kl` (mean KL divergence in nats from the
      exact distribution to the other), `same_top` (share of positions with the same most probable token).
    """
    exact, found = jnp.asarray(exact, jnp.float32), jnp.asarray(found, jnp.float32)
    log_p, log_q = jax.nn.log_softmax(exact), jax.nn.log_softmax(found)
    return {
        "relative": float(jnp.sqrt(jnp.mean(jnp.square(found - exact)) / jnp.mean(jnp.square(exact)))),
        "kl": float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))),
        "same_top": float(jnp.mean((jnp.argmax(exact, axis=-1) == jnp.argmax(found, axis=-1)).astype(jnp.float32))),
    }
