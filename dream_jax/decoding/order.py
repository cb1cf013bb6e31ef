"""Which of a row's candidates are the surest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int


def most_confident_first(
    confidence_BM: Float[jax.Array, "B M"], candidate_BM: Bool[jax.Array, "B M"]
) -> Int[jax.Array, "B M"]:
    """Each row's indices, candidates before others, then by falling confidence; equals stay in order."""
    # Candidates before others whatever their confidence: one of minus infinity must not stay masked for ever.
    return jnp.lexsort((-confidence_BM, ~candidate_BM), axis=-1).astype(jnp.int32)


def commit(
    order_BM: Int[jax.Array, "B M"], candidate_BM: Bool[jax.Array, "B M"], count_B: Int[jax.Array, "B"]
) -> Bool[jax.Array, "B M"]:
    """Marks each row's first `count` candidates in an order from `most_confident_first`."""
    rank_BM = jnp.argsort(order_BM, axis=-1)
    return candidate_BM & (rank_BM < count_B[:, None])
