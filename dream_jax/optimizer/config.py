"""The settings of an optimizer, and the optax transformation that they describe."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import jax
import optax

from dream_jax import sharding
from dream_jax.optimizer.adam import BFLOAT16_LARGEST_DECAY, STORAGES, scale_by_adam, scale_by_float32_adam
from dream_jax.optimizer.shardings import require_host_memory
from dream_jax.optimizer.skipping import skipping
from dream_jax.shapes import ParamTree

OptimizerKind = Literal["adamw", "adafactor"]
Moments = Literal["float32", "bfloat16", "int8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Adafactor after clipping by the global norm, under linear warm-up and cosine decay to zero.

    Defaults are Dream's published SFT recipe, except the learning rate and the length of the run, which have none.

    Attributes:
      learning_rate: the peak, at the end of the warm-up.
      total_steps: length of the learning rate's schedule, warm-up included.
      warmup_share: the share of total_steps that is warm-up, in [0, 1).
      kind: "adamw"; or "adafactor": the direction of its factored second moment, without a first moment, at most 1 in
        root mean square over each (stacked) parameter, under the same absolute learning rate and weight decay.
      moments: how AdamW's are stored. "float32" is `optax.adamw` to the last bit. "bfloat16" rounds both to nearest,
        "int8" is `codes.quantise`. The update itself is computed in float32 from the moments before they are rounded.
      moments_on_host: keeps AdamW's moments in the pinned memory of the host, and moves them to the devices and back
        in every step. On GPUs XLA's pool of such memory is limited to 64 GB unless XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says
        otherwise. On a CPU it gains nothing.
      b1, b2, eps: of AdamW; Adafactor does not use them.
      weight_decay: applied to matrices and the embedding table, not to norms and biases.
      clip_norm: largest global norm of the gradient; None to switch off.

    Raises:
      ValueError: a number out of range, or choices that exclude each other.
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
        for name, choices in (("kind", get_args(OptimizerKind)), ("moments", get_args(Moments))):
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
        """Learning rate of each step; warm-up starts at peak / (warm-up steps + 1), so that the first step counts."""
        warmup = round(self.warmup_share * self.total_steps)
        return optax.warmup_cosine_decay_schedule(
            init_value=self.learning_rate / (warmup + 1),
            peak_value=self.learning_rate,
            warmup_steps=warmup,
            decay_steps=max(self.total_steps, warmup + 1),
        )

    def make(self) -> optax.GradientTransformation:
        """Builds the optax transformation for a parameter tree."""
        # The components of optax.adamw in its order; only the first one differs.
        method = optax.chain(
            self._direction(),
            optax.add_decayed_weights(self.weight_decay, _decayed),
            optax.scale_by_learning_rate(self.schedule()),
        )
        if self.clip_norm is not None:
            method = optax.chain(optax.clip_by_global_norm(self.clip_norm), method)
        return skipping(method)

    def _direction(self) -> optax.GradientTransformation:
        """The transformation from gradients to the direction that the learning rate multiplies."""
        if self.kind == "adafactor":
            # Not optax.adafactor: its weight decay is not multiplied by the learning rate, so that 0.01 would remove a
            # hundredth of every weight in every step.
            return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        if self.moments == "float32" and not self.moments_on_host:
            return scale_by_float32_adam(self.b1, self.b2, self.eps)
        return scale_by_adam(self.b1, self.b2, self.eps, STORAGES[self.moments], on_host=self.moments_on_host)

    def check_devices(self, mesh: sharding.AnyMesh) -> None:
        """Raises ValueError when the devices of a mesh cannot hold the state as these settings ask."""
        if self.moments_on_host:
            require_host_memory(mesh)
            if self.moments == "int8" and sharding.platform_of(mesh) == "tpu":
                raise ValueError(
                    "moments_on_host with int8 moments does not compile for TPUs (XLA lays bytes out in two ways in the "
                    "host's memory); use bfloat16 or float32 moments there, or leave int8 moments on the devices"
                )


# Both matrices of an adapter decay, and so its product decays towards zero: the model towards its base.
_MATRICES = ("kernel", "embedding", "lora_a", "lora_b")


def _decayed(params: ParamTree) -> ParamTree:
    # By name, not by rank: stacked over layers, norm scales and biases have two or more axes.
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _MATRICES, params)
