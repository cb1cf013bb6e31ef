"""Keys and values that are kept between forward passes, so that a later pass computes only a window of each row.

Knows arrays and places. Knows nothing of when a pass is made, nor of how stale what is kept may become.
"""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What queries attend to: keys (already rotated) and values, one a token and key/value head; never repeated.

    Attributes:
      k, v: [L, B, S, K, H] each; of one layer, [B, S, K, H].
    """

    k: Float[jax.Array, "*L B S K H"]
    v: Float[jax.Array, "*L B S K H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """Queries of a few positions of each row attend to the keys kept for the whole row, and to each other's new ones.

    Attributes:
      kept: keys and values of all positions; of all layers, or of one.
      position_BW: where in `kept` those of each query belong. At S, past the end, they are not used.
    """

    kv_cache: KVCache
    position_BW: Int[jax.Array, "B W"]

    def layer(self, kv_cache: KVCache) -> Window:
        """The same places in one layer's keys and values."""
        return Window(kv_cache, self.position_BW)

    def updated(self, own: KVCache) -> KVCache:
        """`kept` with the queries' own keys and values, [..., B, W, K, H], in their places."""
        put = jax.vmap(lambda kept, own, place: kept.at[place].set(own, mode="drop"))  # over rows
        if self.kv_cache.k.ndim == 5:
            put = jax.vmap(put, in_axes=(0, 0, None))  # over layers
        return KVCache(put(self.kv_cache.k, own.k, self.position_BW), put(self.kv_cache.v, own.v, self.position_BW))
