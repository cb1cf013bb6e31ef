"""Defines the settings of an optimizer, and builds the optax transformation from them."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import optax

from dream_jax import sharding
from dream_jax.bounds import MOST_STEPS, POSITIVE, FloatRange, IntegerRange, check_numbers
from dream_jax.optimizer.adam import BFLOAT16_LARGEST_DECAY, STORAGES, clipped, scale_by_adam, scale_by_float32_adam
from dream_jax.optimizer.shardings import require_host_memory
from dream_jax.optimizer.skipping import skipping
from dream_jax.shapes import ParamTree

OptimizerKind = Literal["adamw", "adafactor"]
Moments = Literal["float32", "bfloat16", "int8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of AdamW or Adafactor with clipping by the global norm, linear warm-up and cosine decay to zero.

    The defaults are those of Dream's published SFT recipe; `learning_rate` and `total_steps` have no default.

    Attributes:
      learning_rate: the peak learning rate, which is reached at the end of the warm-up; positive.
      total_steps: the number of updates from the start of the warm-up until the learning rate is zero, at least 1.
      warmup_share: the share of `total_steps` that is warm-up, in [0, 1).
      kind: "adamw" or "adafactor". Adafactor divides the gradient by the square root of a factored second moment and
        has no first moment. Here the root mean square of its direction over each (stacked) parameter is limited to 1,
        and learning rate and weight decay are absolute, as for AdamW.
      moments: how the moments of AdamW are stored. "float32" is `optax.adamw` bit for bit. "bfloat16" rounds to
        nearest, "int8" is `codes.quantise`. The update is computed in float32, from the new moments before they
        are rounded.
      moments_on_host: whether the moments of AdamW are in the pinned memory of the host and are moved to the devices
        and back in every step. On GPUs XLA limits this memory to 64 GB; XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB changes the
        limit. On CPUs it saves nothing.
      b1, b2: the decays of AdamW's first and second moment, in [0, 1); Adafactor does not use them.
      eps: is added to the square root of AdamW's second moment; at least 1e-18. Adafactor does not use it.
      weight_decay: the weight decay of matrices and of the embedding table; norms and biases have none.
      clip_norm: the maximum global norm of the gradient; a larger gradient is scaled down. None switches this off.

    Raises:
      ValueError: a number is out of range, or two settings exclude each other.
    """

    learning_rate: float
    total_steps: int
    warmup_share: float = 0.1
    kind: OptimizerKind = "adamw"
    moments: Moments = "float32"
    moments_on_host: bool = False
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        decay = FloatRange(0.0, 1.0, open_high=True)
        check_numbers(
            self,
            learning_rate=POSITIVE,
            total_steps=IntegerRange(1, MOST_STEPS),
            warmup_share=decay,
            b1=decay,
            b2=decay,
            # float32 holds no square of a number below 1e-19. A smaller eps would divide such a first moment by almost 0.
            eps=FloatRange(1e-18),
            weight_decay=FloatRange(0.0),
            clip_norm=POSITIVE._replace(note="pass None to switch it off"),
        )
        for name, choices in (("kind", get_args(OptimizerKind)), ("moments", get_args(Moments))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {choices}")
        if self.kind == "adafactor":
            for field in dataclasses.fields(self):
                if field.name in ("moments", "moments_on_host", "b1", "b2", "eps"):
                    value = getattr(self, field.name)
                    if value != field.default:
                        raise ValueError(
                            f"{field.name}={value!r} is a setting of AdamW; Adafactor does not use it: leave it out"
                        )
        if self.moments == "bfloat16":
            for name in ("b1", "b2"):
                if getattr(self, name) > BFLOAT16_LARGEST_DECAY:
                    raise ValueError(
                        f"{name}={getattr(self, name)} is too slow for bfloat16 moments: above "
                        f"{BFLOAT16_LARGEST_DECAY} rounding to nearest may remove the change of a step, so that the "
                        "moment does not change any more; use int8, which rounds without bias, or float32"
                    )

    def schedule(self) -> optax.Schedule:
        """Returns the learning rate as a function of the number of updates so far.

        The warm-up starts at peak / (warm-up steps + 1) and not at 0, so that the first update changes the parameters.
        """
        warmup = round(self.warmup_share * self.total_steps)
        return optax.warmup_cosine_decay_schedule(
            init_value=self.learning_rate / (warmup + 1),
            peak_value=self.learning_rate,
            warmup_steps=warmup,
            decay_steps=max(self.total_steps, warmup + 1),
        )

    def make(self) -> optax.GradientTransformation:
        """Builds the optax transformation from gradients to updates; it can skip updates, see `update_if`."""
        # These are the components of optax.adamw in the same order; only the first one can differ.
        method = optax.chain(
            self._direction(),
            optax.add_decayed_weights(self.weight_decay, _decayed),
            optax.scale_by_learning_rate(self.schedule()),
        )
        if self.clip_norm is not None:
            if self._has_own_moments:
                method = clipped(method, self.clip_norm)
            else:
                method = optax.chain(optax.clip_by_global_norm(self.clip_norm), method)
        return skipping(method)

    @property
    def _has_own_moments(self) -> bool:
        """Whether `scale_by_adam` stores the moments, and not the update of optax."""
        return self.kind == "adamw" and (self.moments != "float32" or self.moments_on_host)

    def _direction(self) -> optax.GradientTransformation:
        """Returns the transformation from gradients to the direction that is multiplied by the learning rate."""
        if self.kind == "adafactor":
            # optax.adafactor is not used, because it does not multiply the weight decay by the learning rate: 0.01
            # would remove one percent of every weight in every step.
            return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        if not self._has_own_moments:
            return scale_by_float32_adam(self.b1, self.b2, self.eps)
        return scale_by_adam(self.b1, self.b2, self.eps, STORAGES[self.moments], on_host=self.moments_on_host)

    def check_devices(self, mesh: sharding.AnyMesh) -> None:
        """Raises ValueError if the devices of a mesh cannot store the moments as `moments_on_host` asks."""
        if self.moments_on_host:
            require_host_memory(mesh)
            if self.moments == "int8" and sharding.platform_of(mesh) == "tpu":
                raise ValueError(
                    "moments_on_host with int8 moments does not compile for TPUs (XLA uses two different layouts for "
                    "bytes in the memory of the host); use bfloat16 or float32 moments, or do not set moments_on_host"
                )


# Weight decay of the two matrices of an adapter moves their product towards zero, and so the model towards its base.
_MATRICES = ("kernel", "embedding", "lora_a", "lora_b")


def _decayed(params: ParamTree) -> ParamTree:
    # By name and not by number of axes: norm scales and biases that are stacked over layers have two or more axes.
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _MATRICES, params)
