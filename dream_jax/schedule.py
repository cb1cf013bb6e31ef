"""The sampler's schedule: the noise level of each step, and how many tokens a step writes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int


def timesteps(steps: int, eps: float = 1e-3) -> Float[np.ndarray, steps_plus_1]:
    """Noise levels 1 = t[0] > ... > t[steps] = eps, evenly spaced, float32.

    Every value is rounded exactly as by the published code, torch's float32 `linspace`: from the nearer end, with a
    float32 increment, in one fused multiply-add (this is what torch's vectorised kernels do; only its scalar loop
    rounds twice). The counts below are truncated products of these values, so a difference of one unit in the last
    place can move a token to another step.

    Raises:
      ValueError: steps below 1, or eps outside (0, 1).
    """
    if steps < 1:
        raise ValueError(f"{steps=} must be at least 1")
    if not 0.0 < eps < 1.0:
        raise ValueError(f"{eps=} is outside (0, 1)")
    start, end = np.float32(1.0), np.float32(eps)
    step = (end - start) / np.float32(steps)
    index = np.arange(steps + 1)
    # float64 holds the product of two float32 exactly, so only the last line rounds, like a fused multiply-add.
    from_start = np.float64(start) + np.float64(step) * index
    from_end = np.float64(end) - np.float64(step) * (steps - index)
    return np.where(index < (steps + 1) // 2, from_start, from_end).astype(np.float32)


@functools.cache
def write_fractions(steps: int, eps: float = 1e-3) -> Float[np.ndarray, "steps"]:
    """Share of the masked positions that each step writes: 1 - t[i+1] / t[i] in float32, and 1 at the last step."""
    t = timesteps(steps, eps)
    fractions = np.float32(1.0) - t[1:] / t[:-1]
    fractions[-1] = 1.0
    fractions.setflags(write=False)
    return fractions


def write_counts(masked_B: Int[jax.Array, "B"], fractions: Float[jax.Array, "steps"]) -> Int[jax.Array, "B steps"]:
    """The number of masked positions of each row that each step would write if it were next (a product, rounded down).

    It is computed for each row. The published code uses the mean over the batch, which overwrites finished rows when
    rows differ.
    """
    return jnp.floor(masked_B.astype(jnp.float32)[:, None] * fractions).astype(jnp.int32)
