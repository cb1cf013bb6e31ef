"""What turns gradients into updates, how large its state is, and where that state lies.

AdamW keeps two moments a weight. In float32 they weigh twice the model; here they may also be bfloat16, 8-bit codes in
blocks, and lie in the memory of the host. Adafactor keeps rows and columns instead of a second moment, and no first.
Everything else (clipping, warm-up and cosine, weight decay by name) is the same for all.

Knows parameter trees and the sharding tables. Knows nothing of losses, steps or files.

| state, bytes a weight | mu | nu | both, of float32's |
|---|---|---|---|
| float32 | 4 | 4 | 100 % |
| bfloat16 | 2 | 2 | 50 % |
| int8 | 1 + 4/32 | 1 + 4/32 | 28 % (last axis 32 or longer) |
| Adafactor | 0 | 4/rows + 4/columns | under 1 % |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh
from jaxtyping import Float

from dream_jax import sharding
from dream_jax.shapes import ParamTree

Kind = Literal["adamw", "adafactor"]
Moments = Literal["float32", "bfloat16", "int8"]

# Keeps the keys that moments are rounded with apart from every other stream.
_ROUNDING = 1 << 29


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Linear warm-up and cosine decay to zero around AdamW or Adafactor, after clipping the global norm.

    Defaults are Dream's published SFT recipe, except the learning rate and the length of the run, which have none.

    Attributes:
      learning_rate: at the end of the warm-up.
      total_steps: length of the schedule, warm-up included.
      warmup_share: of total_steps, in [0, 1).
      kind: "adamw"; or "adafactor": the direction of its factored second moment, without a first moment, at most 1 in
        root mean square over each (stacked) parameter, under the same absolute learning rate and weight decay.
      moments: how AdamW's are stored. "float32" is `optax.adamw` to the last bit. "bfloat16" rounds both to nearest,
        "int8" is `quantise`. The update itself is float32 and uses the moments before they are rounded.
      moments_on_host: keeps AdamW's moments in the pinned memory of the host, and moves them to the devices and back
        in every step. On GPUs XLA's pool of such memory ends at 64 GB unless XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says
        otherwise. On a CPU it gains nothing.
      b1, b2, eps: of Adam; Adafactor has none of them.
      weight_decay: on matrices and the embedding table; norms and biases are left alone.
      clip_norm: largest global norm of the gradient; None to switch off.

    Raises:
      ValueError: a number out of range, or choices that exclude each other.
    """

    learning_rate: float
    total_steps: int
    warmup_share: float = 0.1
    kind: Kind = "adamw"
    moments: Moments = "float32"
    moments_on_host: bool = False
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a positive number")
        if not isinstance(self.total_steps, int) or self.total_steps < 1:
            raise ValueError(f"{self.total_steps=} must be a whole number, at least 1")
        if not 0.0 <= self.warmup_share < 1.0:
            raise ValueError(f"{self.warmup_share=} is outside [0, 1)")
        for name in ("b1", "b2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1)")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"{self.weight_decay=} must be a number that is not negative")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"{self.clip_norm=} must be positive; pass None to switch it off")
        for name, choices in (("kind", get_args(Kind)), ("moments", get_args(Moments))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {choices}")
        if self.kind == "adafactor":
            for field in dataclasses.fields(self):
                if field.name in ("moments", "moments_on_host", "b1", "b2", "eps"):
                    value = getattr(self, field.name)
                    if value != field.default:
                        raise ValueError(f"{field.name}={value!r} is AdamW's; Adafactor does not read it: leave it out")
        if self.moments == "bfloat16":
            for name in ("b1", "b2"):
                if getattr(self, name) > BFLOAT16_LARGEST_DECAY:
                    raise ValueError(
                        f"{name}={getattr(self, name)} is too slow for bfloat16 moments: above "
                        f"{BFLOAT16_LARGEST_DECAY} a step may change less than rounding to nearest can hold, and the "
                        "moment stalls; use int8, which rounds without bias, or float32"
                    )

    def schedule(self) -> optax.Schedule:
        """Learning rate of each step. The first step already moves: warm-up starts at one share of the peak, not 0."""
        warmup = round(self.warmup_share * self.total_steps)
        return optax.warmup_cosine_decay_schedule(
            init_value=self.learning_rate / (warmup + 1),
            peak_value=self.learning_rate,
            warmup_steps=warmup,
            decay_steps=max(self.total_steps, warmup + 1),
        )

    def make(self) -> optax.GradientTransformation:
        """The optax transformation for a parameter tree."""
        # The parts of optax.adamw, in its order, so that only the first differs.
        method = optax.chain(
            self._direction(),
            optax.add_decayed_weights(self.weight_decay, _decayed),
            optax.scale_by_learning_rate(self.schedule()),
        )
        if self.clip_norm is not None:
            method = optax.chain(optax.clip_by_global_norm(self.clip_norm), method)
        return _skipping(method)

    def _direction(self) -> optax.GradientTransformation:
        """What the learning rate multiplies."""
        if self.kind == "adafactor":
            # Not optax.adafactor: its weight decay is not multiplied by the learning rate, which at 0.01 would take a
            # hundredth of every weight in every step.
            return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        if self.moments == "float32" and not self.moments_on_host:
            return _scale_by_plain_adam(self.b1, self.b2, self.eps)
        storages: Mapping[Moments, _Float32 | _Bfloat16 | _Int8]
        storages = {"float32": _Float32(), "bfloat16": _Bfloat16(), "int8": _Int8()}
        storage = storages[self.moments]
        return _scale_by_adam(self.b1, self.b2, self.eps, storage, on_host=self.moments_on_host)

    def check_devices(self, mesh: sharding.AnyMesh) -> None:
        """Raises ValueError where the devices of a mesh cannot do what is asked of them."""
        if self.moments_on_host:
            _require_host_memory(mesh)
            if self.moments == "int8" and sharding.platform_of(mesh) == "tpu":
                raise ValueError(
                    "moments_on_host with int8 moments does not compile for TPUs (XLA lays bytes out in two ways in the "
                    "host's memory); use bfloat16 or float32 moments there, or leave int8 moments on the devices"
                )


# Of an adapter both: it decays towards the base.
_MATRICES = ("kernel", "embedding", "lora_a", "lora_b")


def _decayed(params: ParamTree) -> ParamTree:
    # By name, not by rank: stacked over layers, norm scales and biases have two and more axes.
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _MATRICES, params)


# ---------------------------------------------------------------------------------------------- 8-bit codes in blocks

BLOCK = 32  # small enough that up to 16 devices share the width 3584 of Dream-7B without cutting a block


class Quantised(NamedTuple):
    """An array in one byte an element.

    Attributes:
      codes: int8 (any sign) or uint8 (no number below zero), the shape of the array: it is sharded like the array.
      absmax: float32, the largest magnitude of each block of `BLOCK` along the last axis (of the whole axis where that
        is shorter); the last block may be cut short.
    """

    codes: Any
    absmax: Any


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The magnitudes that a code can mean, as shares of a block's largest: 0, then `levels` of a geometric series to 1.

    A series, not equal steps: within a block gradients differ by orders of magnitude, and Adam divides by the root of
    the second moment, so that what counts is the relative error of each element. Under equal steps small second moments
    become zero, and the step of their weight is as long as it likes.

    Attributes:
      levels: the number of codes above zero.
      octaves: powers of two from the least of them to the greatest.
    """

    levels: int
    octaves: int

    @property
    def step(self) -> float:
        """Octaves from one level to the next."""
        return self.octaves / (self.levels - 1)

    def __call__(self, code: jax.Array) -> jax.Array:
        """Level of a code that is a whole float32 in 0..levels."""
        return jnp.where(code > 0, jnp.exp2((code - self.levels) * self.step), 0.0)


# The same reach for the first moment and for the root of the second: |m| <= 1.2 sqrt(v) at decays of 0.9 and 0.95 (2.4 at
# 0.9 and 0.99). The second moment is never rounded below its floor, so that steps exceed Adam's by about the error of a
# level at most. Those of elements near the floor are shorter: where gradients are 1e-5 of their block's largest by a
# third, at 1e-6 fourteen-fold.
_GRIDS = {"int8": _Grid(127, 16), "uint8": _Grid(255, 32)}


def quantise(
    x: Float[jax.Array, "*b d"], noise: Float[jax.Array, "*b d"], dtype: Literal["int8", "uint8"]
) -> Quantised:
    """One byte an element: the nearest level below or above, by chance, so that the expectation is the number itself.

    By chance, because a moment moves by less than a level in a step: rounded to nearest it would stand still or run ahead.

    Error of an element a in a block whose largest magnitude is A, whatever the noise:

        int8    |error| <= 9.3 % |a|, and at most 2**-16 A where |a| < 2**-16 A
        uint8   |error| <= 9.2 % a, and at most 2**-32 A where a < 2**-32 A: there it is rounded up, except zero

    A itself and zeros are exact. Blocks with A below 1.2e-38 become zero, of those with A above 8e37 only A is kept, and
    infinities and NaN stay lost.

    Args:
      x: float32; blocks lie along its last axis.
      noise: float32 in [0, 1), one number an element.
      dtype: "int8" for any sign, "uint8" for numbers that are not below zero.
    """
    grid, size = _GRIDS[dtype], x.shape[-1]
    magnitude = _blocks(jnp.abs(x))
    absmax = jnp.max(magnitude, axis=-1)
    # Smaller ones are zero to some hardware and not to others; NaN passes.
    absmax = jnp.where(absmax < jnp.finfo(jnp.float32).tiny, 0.0, absmax)
    ratio = magnitude / jnp.where(absmax == 0.0, 1.0, absmax)[..., None]
    low = jnp.clip(jnp.floor(grid.levels + jnp.log2(ratio) / grid.step), 0, grid.levels - 1)
    below, above = grid(low), grid(low + 1)
    code = jnp.where(ratio - below > _blocks(noise) * (above - below), low + 1, low)
    if dtype == "uint8":
        code = jnp.where(magnitude > 0, jnp.maximum(code, 1.0), 0.0)
    code = _without_blocks(code, size)
    return Quantised((jnp.where(x < 0, -code, code)).astype(dtype), absmax)


def dequantise(x: Quantised) -> Float[jax.Array, "*b d"]:
    """The float32 numbers that the codes mean."""
    code = _blocks(x.codes.astype(jnp.float32))
    level = jnp.sign(code) * _GRIDS[x.codes.dtype.name](jnp.abs(code))
    return _without_blocks(level * x.absmax[..., None], x.codes.shape[-1])


def _is_quantised(x: Any) -> bool:
    return isinstance(x, Quantised)


def _blocks(x: jax.Array) -> jax.Array:
    """[..., d] -> [..., blocks, width], zeros at the end of the last block."""
    width = min(BLOCK, x.shape[-1])
    short = -x.shape[-1] % width
    if short:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    return x.reshape(*x.shape[:-1], -1, width)


def _without_blocks(x: jax.Array, size: int) -> jax.Array:
    return x.reshape(*x.shape[:-2], -1)[..., :size]


# --------------------------------------------------------------------------------------------- Adam with small moments


# Beyond it a moment may settle more than 13 % away from its target: rounding to nearest swallows half a unit a step.
BFLOAT16_LARGEST_DECAY = 0.97


@dataclasses.dataclass(frozen=True)
class _Float32:
    """As they are."""

    exact: ClassVar[bool] = True  # what was loaded is stored as it was

    def empty(self, param: Any) -> tuple[Any, Any]:
        return jnp.zeros(param.shape, jnp.float32), jnp.zeros(param.shape, jnp.float32)

    def load(self, mu: Any, nu: Any) -> tuple[jax.Array, jax.Array]:
        return mu, nu

    def store(self, m: jax.Array, v: jax.Array, keys_R: jax.Array) -> tuple[Any, Any]:
        return m, v


@dataclasses.dataclass(frozen=True)
class _Bfloat16:
    """Rounded to nearest.

    A moment that is drawn to a constant target stops within 2**-8 / (1 - b) of it: 4 % at 0.9, 8 % at 0.95 (4 % in the
    root), little beside the noise of a gradient. At 0.99 it would be 39 %, and at 0.999 a moment that should die away
    could not even begin to; hence `BFLOAT16_LARGEST_DECAY`, and no random bits.
    """

    exact: ClassVar[bool] = True

    def empty(self, param: Any) -> tuple[Any, Any]:
        zeros = jnp.zeros(param.shape, jnp.bfloat16)
        return zeros, zeros

    def load(self, mu: Any, nu: Any) -> tuple[jax.Array, jax.Array]:
        return mu.astype(jnp.float32), nu.astype(jnp.float32)

    def store(self, m: jax.Array, v: jax.Array, keys_R: jax.Array) -> tuple[Any, Any]:
        return m.astype(jnp.bfloat16), v.astype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class _Int8:
    """Codes in blocks, see `quantise`; the second moment itself is stored, so that it is free of bias, not its root."""

    exact: ClassVar[bool] = False  # drawn anew

    def empty(self, param: Any) -> tuple[Any, Any]:
        blocks = -(-param.shape[-1] // min(BLOCK, param.shape[-1]))

        def zeros(dtype: str) -> Quantised:
            return Quantised(jnp.zeros(param.shape, dtype), jnp.zeros((*param.shape[:-1], blocks), jnp.float32))

        return zeros("int8"), zeros("uint8")

    def load(self, mu: Any, nu: Any) -> tuple[jax.Array, jax.Array]:
        return dequantise(mu), dequantise(nu)

    def store(self, m: jax.Array, v: jax.Array, keys_R: jax.Array) -> tuple[Any, Any]:
        # 16 random bits are enough for each; they depend on the element's place, not on the mesh.
        bits = jax.vmap(lambda key: jax.random.bits(key, m.shape[1:], jnp.uint32))(keys_R)

        def uniform(bits: jax.Array) -> jax.Array:
            return (bits.astype(jnp.float32) + 0.5) / 2.0**16

        mu = quantise(m, uniform(bits & jnp.uint32(0xFFFF)), "int8")
        return mu, quantise(v, uniform(bits >> jnp.uint32(16)), "uint8")


class MomentsState(NamedTuple):
    """Steps done, and the two moments of every parameter as they are stored."""

    count: Any
    mu: Any
    nu: Any


class OnHost(NamedTuple):
    """A state whose arrays lie in the hosts' memory; `opt_state_shardings` knows it by the name of its one field."""

    on_host: Any


def _scale_by_adam(
    b1: float, b2: float, eps: float, storage: _Float32 | _Bfloat16 | _Int8, *, on_host: bool
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` in float32, with moments that are stored smaller or in the host's memory.

    Float32 moments are on the devices for a part of one parameter at a time: all at once they would weigh more than what
    is saved.
    """

    def state(count: jax.Array, treedef: Any, pairs: list[tuple[Any, Any]]) -> Any:
        mu, nu = ([pair[place] for pair in pairs] for place in (0, 1))
        found = MomentsState(count, jax.tree.unflatten(treedef, mu), jax.tree.unflatten(treedef, nu))
        return OnHost(found) if on_host else found

    def init(params: ParamTree) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        pairs = [storage.empty(leaf) for leaf in leaves]
        return state(jnp.int32(0), treedef, _to_host(pairs) if on_host else pairs)

    def update(
        gradients: ParamTree,
        before: Any,
        params: ParamTree | None = None,
        *,
        usable: jax.Array | None = None,
        **others: Any,
    ) -> tuple[ParamTree, Any]:
        before = before.on_host if on_host else before
        count = optax.safe_increment(before.count)
        key = jax.random.fold_in(jax.random.key(_ROUNDING), count)
        steps = count.astype(jnp.float32)

        def advance(gradient: jax.Array, moments: Any, keys_R: jax.Array) -> tuple[jax.Array, Any]:
            g = gradient.astype(jnp.float32)
            moments = _to_device(moments) if on_host else moments
            before_m, before_v = storage.load(*moments)
            m = b1 * before_m + (1 - b1) * g
            v = b2 * before_v + (1 - b2) * jnp.square(g)
            m, v = _select(usable, (m, v), (before_m, before_v))
            direction = m / (1 - b1**steps) / (jnp.sqrt(v / (1 - b2**steps)) + eps)
            after = storage.store(m, v, keys_R)
            if not storage.exact:
                after = _select(usable, after, moments)
            # In the gradient's dtype, so that it can take the gradient's place.
            return direction.astype(gradient.dtype), _to_host(after) if on_host else after

        leaves, treedef = jax.tree.flatten_with_path(gradients)
        moments = (jax.tree.leaves(tree, is_leaf=_is_quantised) for tree in (before.mu, before.nu))
        updates, pairs = [], []
        for index, ((path, gradient), mu, nu) in enumerate(zip(leaves, *moments, strict=True)):
            keys_R = _row_keys(jax.random.fold_in(key, index), gradient.shape[0])
            parts = _parts(_names(path), gradient.shape)
            update, pair = _by_parts(advance, gradient, (mu, nu), keys_R, parts)
            updates.append(update)
            pairs.append(pair)
        return jax.tree.unflatten(treedef, updates), state(_select(usable, count, before.count), treedef, pairs)

    return optax.GradientTransformationExtraArgs(init, update)


def _scale_by_plain_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, which it is to the last bit, of whose update it is the lines; but for the choice in them."""

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
        # Before they are used: what is stored is then what the direction is made of, and is written over the old moments.
        # Chosen afterwards, the new moments would be needed beside those that are stored.
        mu, nu = _select(usable, (mu, nu), (before.mu, before.nu))
        count = optax.safe_increment(before.count)
        mu_hat, nu_hat = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v + 0.0) + eps), mu_hat, nu_hat)
        return updates, optax.ScaleByAdamState(count=_select(usable, count, before.count), mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(b1=b1, b2=b2, eps=eps).init, update)


# ------------------------------------------------------------------------------------------------- updates that are none


class _Skipping(optax.GradientTransformationExtraArgs):
    """A transformation whose `update` takes `usable`, and where that is false returns its state as it was."""


def _skipping(method: optax.GradientTransformation) -> _Skipping:
    """`method`, of whose states those of Adam choose for themselves."""
    method = optax.with_extra_args_support(method)

    def chooses(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState | MomentsState | OnHost)

    def update(
        gradients: ParamTree,
        before: Any,
        params: ParamTree | None = None,
        *,
        usable: jax.Array | None = None,
        **others: Any,
    ) -> tuple[ParamTree, Any]:
        updates, after = method.update(gradients, before, params, usable=usable, **others)
        choose = lambda new, old: new if chooses(new) else _select(usable, new, old)
        return updates, jax.tree.map(choose, after, before, is_leaf=chooses)

    return _Skipping(method.init, update)


def _select(usable: jax.Array | None, new: Any, old: Any) -> Any:
    """The new tree where `usable`, else the old one, bit for bit; None: the new one."""
    return new if usable is None else jax.tree.map(lambda new, old: jnp.where(usable, new, old), new, old)


def update_if(
    usable: jax.Array,
    optimizer: optax.GradientTransformation,
    gradients: ParamTree,
    opt_state: Any,
    params: ParamTree,
) -> tuple[ParamTree, Any]:
    """The parameters and the optimizer's state after an update; where it is not usable, as they were, bit for bit.

    Scaling a gradient by zero would not do: NaN times zero is NaN, and weights and moments decay without a gradient. And
    not `jax.lax.cond`: a choice between two arrays is one more operation of the fusion that writes the new one over the
    old, which every backend compiles in place; a branch is a barrier to that, and to arrays in the host's memory.

    Args:
      usable: bool scalar.
      optimizer: any; one of `OptimizerConfig.make` takes no memory for it.
      gradients: anything at all, NaN included, where not usable.
      opt_state, params: before.
    """
    if isinstance(optimizer, _Skipping):
        updates, after = optimizer.update(gradients, opt_state, params, usable=usable)
    else:
        updates, after = optimizer.update(gradients, opt_state, params)
        after = _select(usable, after, opt_state)
    return _select(usable, optax.apply_updates(params, updates), params), after


def updates_done(opt_state: Any) -> jax.Array | None:
    """How many updates the learning rate's schedule has seen: int32 scalar; None of an optimizer without a schedule."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
    return next((leaf.count for leaf in leaves if isinstance(leaf, optax.ScaleByScheduleState)), None)


def _to_host(tree: Any) -> Any:
    return jax.device_put(tree, jax.memory.Space.Host)


def _to_device(tree: Any) -> Any:
    return jax.device_put(tree, jax.memory.Space.Device)


# Elements of the part of a parameter that is updated at once (256 MiB of float32): about a matrix of one layer of Dream-7B.
_PART = 1 << 26


def _row_keys(key: jax.Array, rows: int) -> jax.Array:
    """A key for each index of a parameter's first axis, whatever parts the axis is cut into."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def _parts(names: tuple[str, ...], shape: tuple[int, ...]) -> int:
    """Into how many equal parts a parameter's first axis is cut; 1 where the current mesh splits that axis already."""
    if len(shape) < 2:  # blocks lie along it
        return 1
    axes = sharding.PARAMETER_AXES.get(".".join(names))
    mesh = jax.sharding.get_abstract_mesh()
    if axes is not None and not mesh.empty:
        spec = sharding.partition_spec(axes, shape, dict(mesh.shape))
        if spec and spec[0] is not None:
            return 1
    enough = (count for count in range(1, shape[0] + 1) if shape[0] % count == 0 and math.prod(shape) <= count * _PART)
    return next(enough, shape[0])


def _by_parts(
    function: Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, Any]],
    gradient: jax.Array,
    moments: Any,
    keys_R: jax.Array,
    parts: int,
) -> tuple[jax.Array, Any]:
    """A function of a parameter's gradient, moments and row keys, a part of the rows after the other, each in its place."""
    if parts == 1:
        return function(gradient, moments, keys_R)
    size = keys_R.shape[0] // parts

    def visit(number: jax.Array, arrays: Any) -> Any:
        cut = lambda array: jax.lax.dynamic_slice_in_dim(array, number * size, size)
        paste = lambda array, part: jax.lax.dynamic_update_slice_in_dim(array, part, number * size, axis=0)
        gradient, moments = jax.tree.map(cut, arrays)
        return jax.tree.map(paste, arrays, function(gradient, moments, cut(keys_R)))

    found: tuple[jax.Array, Any] = jax.lax.fori_loop(0, parts, visit, (gradient, moments))
    return found


# ------------------------------------------------------------------------------------------------ where the state lies


def _require_host_memory(mesh: sharding.AnyMesh) -> None:
    if isinstance(mesh, AbstractMesh):  # of sizes only: nobody can be asked
        return
    # Of a topology that is only compiled for, no device is local.
    device = next(iter(mesh.local_devices), mesh.devices.flat[0])
    kinds = _memory_kinds(device)
    if "pinned_host" not in kinds:
        raise ValueError(
            f"moments_on_host needs the memory 'pinned_host', but {device.platform} devices here have {sorted(kinds)}; "
            "leave it off, or store the moments smaller (int8)"
        )


def _memory_kinds(device: jax.Device) -> set[str]:
    return {memory.kind for memory in device.addressable_memories()}


def opt_state_shardings(state: Any, params: ParamTree, mesh: sharding.AnyMesh) -> Any:
    """Where each array of an optimizer's state lies: like the parameter that its path names, else on every device.

    An array of the parameter's shape lies as it does; block maxima and Adafactor's rows and columns lie like the axes
    that they have left.

    Args:
      state: arrays or shapes, as `OptimizerConfig.make` makes them for `params`.
      params: arrays or shapes, with paths of `sharding.PARAMETER_AXES`.
      mesh: where to.

    Raises:
      ValueError: moments are to be on the host, and the devices cannot reach its memory.
    """
    shapes = {_names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        names = _names(path)
        spans = (names[start:stop] for start in range(len(names)) for stop in range(start + 1, len(names) + 1))
        name = max((span for span in spans if span in shapes), key=len, default=None)
        axes = None if name is None else _axes_left(names, leaf.shape, name, shapes[name])
        spec = sharding.partition_spec(axes or [None] * len(leaf.shape), leaf.shape, dict(mesh.shape))
        found = jax.sharding.NamedSharding(mesh, spec)
        if "on_host" in names and leaf.shape:
            _require_host_memory(mesh)
            return found.with_memory_kind("pinned_host")
        return found

    return jax.tree_util.tree_map_with_path(place, state)


def _axes_left(
    names: tuple[str, ...], shape: tuple[int, ...], name: tuple[str, ...], whole: tuple[int, ...]
) -> tuple[str, ...] | None:
    """The logical axes of an array in the state of a parameter with shape `whole`; None when it has not kept any."""
    axes = sharding.PARAMETER_AXES[".".join(name)]
    if shape == whole or (names[-1] == "absmax" and shape[:-1] == whole[:-1]):
        return axes
    # By name as well as by shape: rows and columns of a square matrix have one shape and not one place.
    for field, rank in (("v_row", -1), ("v_col", -2)):
        if field in names and len(whole) > 1:
            gone = int(
                np.argsort(whole)[rank]
            )  # optax keeps the rows without the longest axis, the columns without the next
            if shape == (*whole[:gone], *whole[gone + 1 :]):
                return (*axes[:gone], *axes[gone + 1 :])
    return None


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


def state_bytes(state: Any) -> int:
    """Bytes of all arrays (or shapes) in a state, each counted once."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
