"""The key/value cache between forward passes, with which a later pass computes only a window of each row.

The sampler decides when a pass is made and how old cached keys and values may become.
"""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys, already rotated, and values, one for each token and key head (not repeated for the query heads).

    Attributes:
      k, v: [L, B, S, K, H] each, or [B, S, K, H] of one layer.
    """

    k: Float[jax.Array, "*L B S K H"]
    v: Float[jax.Array, "*L B S K H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """A few positions of each row whose queries attend to the cache of the whole row and to their own new keys.

    Attributes:
      kv_cache: keys and values of all positions, of all layers or of one.
      position_BW: the position in `kv_cache` of each query. Keys and values of a query at S, past the end, are not used.
    """

    kv_cache: KVCache
    position_BW: Int[jax.Array, "B W"]

    def layer(self, kv_cache: KVCache) -> Window:
        """The same positions with the cache of one layer."""
        return Window(kv_cache, self.position_BW)

    def updated(self, new: KVCache) -> KVCache:
        """`kv_cache` with the new keys and values of the queries, [..., B, W, K, H], at their positions."""
        put = jax.vmap(lambda cached, new, position: cached.at[position].set(new, mode="drop"))  # over rows
        if self.kv_cache.k.ndim == 5:
            put = jax.vmap(put, in_axes=(0, 0, None))  # over layers
        return KVCache(put(self.kv_cache.k, new.k, self.position_BW), put(self.kv_cache.v, new.v, self.position_BW))
