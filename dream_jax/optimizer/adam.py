"""Computes the direction of Adam, with moments stored as float32, bfloat16 or 8-bit codes, on devices or the host."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dream_jax import sharding
from dream_jax.optimizer.codes import (
    BLOCK,
    QuantisedMoment,
    block_absmax,
    block_codes,
    block_values,
    dequantise,
    from_blocks,
    is_quantised,
    quantise,
    random_bits,
    to_blocks,
)
from dream_jax.optimizer.shardings import path_names
from dream_jax.shapes import ParamTree
from dream_jax.target import current_target

# The seed of the random rounding of moments, chosen to differ from the usual seeds of runs.
_ROUNDING = 1 << 29

# Above this decay a bfloat16 moment may stop changing while it is still more than 13 % away from its target, because
# rounding to nearest removes every change of less than half of the last bit of the mantissa.
BFLOAT16_LARGEST_DECAY = 0.97


# A function that returns the new moments (m, v), float32. Each call computes them again, see `scale_by_adam`.
NewMoments = Callable[[], tuple[jax.Array, jax.Array]]
# The number 0 as a float32 scalar whose value XLA does not know, or as a float.
Zero = jax.Array | float


# The classes below store moments. `to_computed` reshapes a gradient to the shape in which `load` returns the moments, and
# `from_computed` is its inverse. `for_kernels` returns the same storage in the form that is fast on GPUs.


@dataclasses.dataclass(frozen=True)
class _FloatMoments:
    """Stores moments in a floating-point dtype, rounded to nearest.

    A bfloat16 moment with decay b that approaches a constant target stops at a relative distance of at most
    2**-8 / (1 - b): 4 % for b = 0.9 and 8 % for b = 0.95 (4 % in the square root). That is small compared with the
    noise of a gradient, so random rounding is not needed. For b = 0.99 it would be 39 %, and for b = 0.999 a moment
    would never decay; therefore `OptimizerConfig` refuses decays above `BFLOAT16_LARGEST_DECAY`.
    """

    dtype: Literal["float32", "bfloat16"]
    exact: ClassVar[bool] = True  # `store` of what `load` returned gives the same bits

    def empty(self, param: Any) -> tuple[Any, Any]:
        zeros = jnp.zeros(param.shape, self.dtype)
        return zeros, zeros

    def for_kernels(self) -> _FloatMoments:
        return self

    def to_computed(self, x: jax.Array) -> jax.Array:
        return x

    def from_computed(self, x: jax.Array, size: int) -> jax.Array:
        return x

    def load(self, mu: Any, nu: Any, zero: Zero) -> tuple[jax.Array, jax.Array]:
        return mu.astype(jnp.float32), nu.astype(jnp.float32)

    def store(self, new: NewMoments, keys_R: jax.Array, shape: tuple[int, ...], zero: Zero) -> tuple[Any, Any]:
        m, v = new()
        return m.astype(self.dtype), v.astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class _Int8Moments:
    """Stores moments as 8-bit codes (`codes.quantise`).

    The second moment is stored, not its square root: random rounding keeps the expected value of what it rounds.
    """

    exact: ClassVar[bool] = False  # `store` of what `load` returned rounds it randomly again

    def empty(self, param: Any) -> tuple[Any, Any]:
        blocks = -(-param.shape[-1] // min(BLOCK, param.shape[-1]))

        def zeros(dtype: str) -> QuantisedMoment:
            return QuantisedMoment(jnp.zeros(param.shape, dtype), jnp.zeros((*param.shape[:-1], blocks), jnp.float32))

        return zeros("int8"), zeros("uint8")

    def for_kernels(self) -> _Int8Moments:
        return _Int8Blocks()

    def to_computed(self, x: jax.Array) -> jax.Array:
        return x

    def from_computed(self, x: jax.Array, size: int) -> jax.Array:
        return x

    def load(self, mu: Any, nu: Any, zero: Zero) -> tuple[jax.Array, jax.Array]:
        return dequantise(mu), dequantise(nu)

    def store(self, new: NewMoments, keys_R: jax.Array, shape: tuple[int, ...], zero: Zero) -> tuple[Any, Any]:
        m, v = new()
        noise_m, noise_v = _noise(keys_R, shape)
        return quantise(m, noise_m, "int8"), quantise(v, noise_v, "uint8")


class _Int8Blocks(_Int8Moments):
    """Stores the same numbers as `_Int8Moments`, but computes them in the shape of the blocks.

    XLA for GPUs makes one kernel of operations that have the same shape. If some of them were in blocks and others not, XLA
    would write the values between them to memory. This class is not used on TPUs, which need four times the memory for
    arrays whose last axis is as short as a block.
    """

    def to_computed(self, x: jax.Array) -> jax.Array:
        return to_blocks(x)

    def from_computed(self, x: jax.Array, size: int) -> jax.Array:
        return from_blocks(x, size)

    def load(self, mu: Any, nu: Any, zero: Zero) -> tuple[jax.Array, jax.Array]:
        return block_values(to_blocks(mu.codes), mu.absmax, zero), block_values(to_blocks(nu.codes), nu.absmax, zero)

    def store(self, new: NewMoments, keys_R: jax.Array, shape: tuple[int, ...], zero: Zero) -> tuple[Any, Any]:
        absmax_m, absmax_v = map(block_absmax, new())
        m, v = new()
        noise_m, noise_v = map(to_blocks, _noise(keys_R, shape))
        codes_m = from_blocks(block_codes(m, absmax_m, noise_m, "int8", zero), shape[-1])
        codes_v = from_blocks(block_codes(v, absmax_v, noise_v, "uint8", zero), shape[-1])
        return QuantisedMoment(codes_m, absmax_m), QuantisedMoment(codes_v, absmax_v)


def _noise(keys_R: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns two uniform random numbers in [0, 1) for each element of an array; 16 random bits are enough for each."""
    bits = random_bits(keys_R, shape)
    low, high = bits & jnp.uint32(0xFFFF), bits >> jnp.uint32(16)
    return low.astype(jnp.float32) * 2.0**-16, high.astype(jnp.float32) * 2.0**-16


MomentStorage = _FloatMoments | _Int8Moments
STORAGES: Mapping[str, MomentStorage] = {
    "float32": _FloatMoments("float32"),
    "bfloat16": _FloatMoments("bfloat16"),
    "int8": _Int8Moments(),
}


class MomentsState(NamedTuple):
    """The state of `scale_by_adam`.

    Attributes:
      count: int32 scalar, the number of updates so far.
      mu, nu: trees like the parameters, with the stored first and second moments: float arrays or `QuantisedMoment`s.
    """

    count: Any
    mu: Any
    nu: Any


class OnHost(NamedTuple):
    """Wraps a MomentsState in the memory of the host; `opt_state_shardings` recognises it by the name of the field."""

    on_host: Any


def scale_by_adam(
    b1: float, b2: float, eps: float, kind: MomentStorage, *, on_host: bool
) -> optax.GradientTransformation:
    """Returns `optax.scale_by_adam` with moments that are stored in less memory or in the memory of the host.

    The update is computed in float32. On GPUs, XLA makes two kernels of it for each parameter, one that finds the largest
    magnitude of every block of 8-bit codes and one for the rest, and no float32 moment is ever in the memory. Elsewhere
    one chunk of one parameter is updated after the other, so that only the moments of this chunk are in the memory in
    float32; those of all parameters would take more memory than the storage saves.

    Args:
      b1, b2: the decays of the first and of the second moment, in [0, 1).
      eps: is added to the square root of the second moment.
      kind: how moments are stored, one of `STORAGES`.
      on_host: whether they are in the memory of the host.

    Returns:
      The transformation. Its `update` takes two more arguments: `usable`, see `update_if`; and `scale`, a float32 scalar
      by which the gradients are multiplied first, or None.
    """

    def state(count: jax.Array, treedef: Any, pairs: list[tuple[Any, Any]]) -> Any:
        mu, nu = ([pair[which] for pair in pairs] for which in (0, 1))
        found = MomentsState(count, jax.tree.unflatten(treedef, mu), jax.tree.unflatten(treedef, nu))
        return OnHost(found) if on_host else found

    def init(params: ParamTree) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        pairs = [kind.empty(leaf) for leaf in leaves]
        return state(jnp.int32(0), treedef, _to_host(pairs) if on_host else pairs)

    def update(
        gradients: ParamTree,
        before: Any,
        params: ParamTree | None = None,
        *,
        usable: jax.Array | None = None,
        scale: jax.Array | None = None,
        **others: Any,
    ) -> tuple[ParamTree, Any]:
        before = before.on_host if on_host else before
        count = optax.safe_increment(before.count)
        key = jax.random.fold_in(jax.random.key(_ROUNDING), count)
        steps = count.astype(jnp.float32)
        correction_m, correction_v = 1 / (1 - b1**steps), 1 / (1 - b2**steps)
        in_kernels = current_target().platform == "gpu" and not on_host
        storage = kind.for_kernels() if in_kernels else kind

        def advance(gradient: jax.Array, moments: Any, keys_R: jax.Array) -> tuple[jax.Array, Any]:
            moments = _to_device(moments) if on_host else moments
            mu, nu = moments
            computed = storage.to_computed(gradient)
            calls = itertools.count()

            def hidden_zero() -> Zero:
                # XLA does not know that this number is 0. Each call returns another expression.
                return (steps + next(calls)) * 0.0 if in_kernels else 0.0

            def new() -> tuple[jax.Array, jax.Array]:
                # The new moments are needed three times: for the direction, for the largest magnitudes and for the codes.
                # If the three were the same expression, XLA would compute it once, write it to the memory and read it
                # again, which on a GPU takes longer than computing it again. This zero makes them different. Adding it
                # changes no number.
                zero = hidden_zero()
                g = computed.astype(jnp.float32) * (1.0 if scale is None else scale + zero)
                before_m, before_v = storage.load(mu, nu, zero)
                m = b1 * before_m + (1 - b1) * g
                v = b2 * before_v + (1 - b2) * jnp.square(g)
                return select(usable, (m, v), (before_m, before_v))

            m, v = new()
            direction = m * correction_m / (jnp.sqrt(v * correction_v) + eps)
            # If moments were compared with a constant 0, XLA would keep the array of zeros to which gradients are added.
            after = storage.store(new, keys_R, gradient.shape, hidden_zero())
            if not storage.exact:
                after = select(usable, after, moments)
            direction = storage.from_computed(direction, gradient.shape[-1])
            # In the dtype of the gradient, so that XLA can reuse the memory of the gradient.
            return direction.astype(gradient.dtype), _to_host(after) if on_host else after

        leaves, treedef = jax.tree.flatten_with_path(gradients)
        moments = (jax.tree.leaves(tree, is_leaf=is_quantised) for tree in (before.mu, before.nu))
        updates, pairs = [], []
        for index, ((path, gradient), mu, nu) in enumerate(zip(leaves, *moments, strict=True)):
            keys_R = _row_keys(jax.random.fold_in(key, index), gradient.shape[0])
            chunks = 1 if in_kernels else _num_chunks(path_names(path), gradient.shape)
            update, pair = _by_chunks(advance, gradient, (mu, nu), keys_R, chunks)
            updates.append(update)
            pairs.append(pair)
        return jax.tree.unflatten(treedef, updates), state(select(usable, count, before.count), treedef, pairs)

    return optax.GradientTransformationExtraArgs(init, update)


def clipped(method: optax.GradientTransformation, max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Returns `optax.chain(optax.clip_by_global_norm(max_norm), method)`, with the same state, for `scale_by_adam`.

    With optax the scaled gradients are written to the memory if more than one kernel reads them. Here `method` gets the
    gradients as they are, and the factor as the argument `scale`.
    """
    method = optax.with_extra_args_support(method)

    def init(params: ParamTree) -> Any:
        return optax.EmptyState(), method.init(params)

    def update(
        gradients: ParamTree, before: Any, params: ParamTree | None = None, **others: Any
    ) -> tuple[ParamTree, Any]:
        norm = optax.tree.norm(gradients)
        scale = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        updates, after = method.update(gradients, before[1], params, scale=scale, **others)
        return updates, (before[0], after)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_float32_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Returns `optax.scale_by_adam`, bit for bit, whose `update` also takes `usable` and can keep the old moments.

    The lines are those of optax, except for the choice between the old and the new moments.
    """

    def update(
        gradients: ParamTree,
        before: Any,
        params: ParamTree | None = None,
        *,
        usable: jax.Array | None = None,
        **others: Any,
    ) -> tuple[ParamTree, Any]:
        mu = optax.tree.update_moment(gradients, before.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(gradients, before.nu, b2, 2)
        # Here and not after the update, because then XLA can write the new moments over the old ones. A later choice
        # would need both in memory at the same time.
        mu, nu = select(usable, (mu, nu), (before.mu, before.nu))
        count = optax.safe_increment(before.count)
        mu_hat, nu_hat = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v + 0.0) + eps), mu_hat, nu_hat)
        return updates, optax.ScaleByAdamState(count=select(usable, count, before.count), mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(b1=b1, b2=b2, eps=eps).init, update)


def select(usable: jax.Array | None, new: Any, old: Any) -> Any:
    """Returns the tree `new` if the bool scalar `usable` is true or None, otherwise the tree `old`, bit for bit."""
    return new if usable is None else jax.tree.map(lambda new, old: jnp.where(usable, new, old), new, old)


def _to_host(tree: Any) -> Any:
    return jax.device_put(tree, jax.memory.Space.Host)


def _to_device(tree: Any) -> Any:
    return jax.device_put(tree, jax.memory.Space.Device)


# Maximum number of elements of a chunk (256 MiB in float32): about one MLP kernel of one layer of Dream-7B.
_CHUNK_ELEMENTS = 1 << 26


def _row_keys(key: jax.Array, rows: int) -> jax.Array:
    """Returns a key for each index of a parameter's first axis, so that random bits do not depend on the chunks."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def _num_chunks(names: tuple[str, ...], shape: tuple[int, ...]) -> int:
    """Returns the number of equal chunks along the first axis of a parameter; 1 if the current mesh shards that axis.

    It is the smallest number whose chunks have at most `_CHUNK_ELEMENTS` elements, or else the size of the axis.
    """
    if len(shape) < 2:  # the only axis is the one along which codes form blocks
        return 1
    axes = sharding.parameter_axes(names)
    mesh = jax.sharding.get_abstract_mesh()
    if axes is not None and not mesh.empty:
        spec = sharding.partition_spec(axes, shape, dict(mesh.shape))
        if spec and spec[0] is not None:
            return 1
    enough = (
        count
        for count in range(1, shape[0] + 1)
        if shape[0] % count == 0 and math.prod(shape) <= count * _CHUNK_ELEMENTS
    )
    return next(enough, shape[0])


def _by_chunks(
    function: Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, Any]],
    gradient: jax.Array,
    moments: Any,
    keys_R: jax.Array,
    chunks: int,
) -> tuple[jax.Array, Any]:
    """Applies `function` to one chunk of rows of (gradient, moments, keys_R) after the other.

    The results overwrite their chunks, so that no second copy of the gradient and the moments is in memory.
    """
    if chunks == 1:
        return function(gradient, moments, keys_R)
    size = keys_R.shape[0] // chunks

    def visit(number: jax.Array, arrays: Any) -> Any:
        cut = lambda array: jax.lax.dynamic_slice_in_dim(array, number * size, size)
        paste = lambda array, chunk: jax.lax.dynamic_update_slice_in_dim(array, chunk, number * size, axis=0)
        gradient, moments = jax.tree.map(cut, arrays)
        return jax.tree.map(paste, arrays, function(gradient, moments, cut(keys_R)))

    found: tuple[jax.Array, Any] = jax.lax.fori_loop(0, chunks, visit, (gradient, moments))
    return found
