"""The schedule of the sampler: the noise level of each step, and the number of tokens that a step writes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dream_jax.bounds import MOST_TOKENS, FloatRange, IntegerRange, check
from dream_jax.shapes import Array


def timesteps(steps: int, eps: float = 1e-3) -> Float[np.ndarray, steps_plus_1]:
    """Returns the evenly spaced noise levels 1 = t[0] > ... > t[steps] = eps, float32 [steps + 1].

    The values equal those of the published code, torch's float32 `linspace`, to the last bit: torch computes from the
    nearer end, with a float32 increment, in one fused multiply-add (in its vectorised kernels; only its scalar loop
    rounds twice). `write_counts` rounds products of these values down, so a difference in the last bit can move a token
    to another step.

    Raises:
      ValueError: `steps` is outside 1..2**20, or `eps` is outside (0, 1).
    """
    check("steps", steps, IntegerRange(1, MOST_TOKENS))
    check("eps", eps, FloatRange(0.0, 1.0, open_low=True, open_high=True))
    start, end = np.float32(1.0), np.float32(eps)
    step = (end - start) / np.float32(steps)
    index = np.arange(steps + 1)
    # float64 represents these products exactly, so only the conversion in the last line rounds, as a fused multiply-add.
    from_start = np.float64(start) + np.float64(step) * index
    from_end = np.float64(end) - np.float64(step) * (steps - index)
    return np.where(index < (steps + 1) // 2, from_start, from_end).astype(np.float32)


@functools.lru_cache(maxsize=1024)  # bounded, because a server gets steps and eps from its clients
def write_fractions(steps: int, eps: float = 1e-3) -> Float[np.ndarray, "steps"]:
    """Returns the share of the masked positions that each step writes, float32 [steps], read-only.

    It is 1 - t[i+1] / t[i] for the noise levels t of `timesteps`, and 1 at the last step. Raises as `timesteps`.
    """
    t = timesteps(steps, eps)
    fractions = np.float32(1.0) - t[1:] / t[:-1]
    fractions[-1] = 1.0
    fractions.setflags(write=False)
    return fractions


def write_counts(masked_B: Int[jax.Array, "B"], fractions: Float[Array, "*rows steps"]) -> Int[jax.Array, "B steps"]:
    """Returns how many positions each step would write in each row if it were the next step, int32 [B, steps].

    `fractions` are those of `write_fractions`, the same for all rows [steps] or one list for each row [B, steps].

    It is the number of masked positions of the row times the fraction of the step, rounded down. The published code
    uses the mean number of masked positions of the batch, and so overwrites finished rows if the rows differ.
    """
    return jnp.floor(masked_B.astype(jnp.float32)[:, None] * fractions).astype(jnp.int32)
