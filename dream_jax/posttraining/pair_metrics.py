"""What is measured of pairs of answers: margin, order, bounds, and the divergence from the reference."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dream_jax.shapes import Array
from dream_jax.train_step import Metrics

METRICS = ("margin", "order_accuracy", "bound_chosen", "bound_rejected", "kl")
"""The further columns of `metrics.csv`; `eval.csv` has the same for held-out pairs, with "pair_" in front of them."""


def pair_margins(
    name: str,
    bound_PA: Float[Array, "P A"],
    reference_PA: Float[Array, "P A"] | None,
    size_PA: Float[Array, "P A"],
) -> Float[jax.Array, "P"]:
    """Returns by how much a pair is in the right order: what the loss of `name` multiplies by beta, in nats.

    Args:
      name: "vrpo" or "simpo".
      bound_PA: bounds of both answers of each pair, the chosen one first.
      reference_PA: those of the reference; None for simpo.
      size_PA: numbers of tokens of the answers; read by simpo.
    """
    value_PA = jnp.asarray(bound_PA / size_PA if name == "simpo" else bound_PA - cast("jax.Array", reference_PA))
    return value_PA[:, 0] - value_PA[:, 1]


def pair_sums(
    margin_P: Float[Array, "P"], bound_PA: Float[Array, "P A"], reference_PA: Float[Array, "P A"] | None
) -> Metrics:
    """Returns the sums over pairs of the metrics in `METRICS`, by name."""
    # At the reference all margins are 0, which is neither order.
    right_P = 0.5 * (jnp.sign(margin_P) + 1.0)
    kl_P = jnp.full(margin_P.shape, jnp.nan) if reference_PA is None else jnp.mean(reference_PA - bound_PA, axis=1)
    return {
        "margin": jnp.sum(margin_P),
        "order_accuracy": jnp.sum(right_P),
        "bound_chosen": jnp.sum(bound_PA[:, 0]),
        "bound_rejected": jnp.sum(bound_PA[:, 1]),
        "kl": jnp.sum(kl_P),
    }
