"""The cache of keys and values, and the window of queries that uses and updates it."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (already rotated) and values of some tokens, not repeated for the query heads.

    Attributes:
      k, v: [L, B, S, K, H] each; for one layer [B, S, K, H].
    """

    k: Float[jax.Array, "*L B S K H"]
    v: Float[jax.Array, "*L B S K H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """A few positions of each row as queries, which attend to the cache of the whole row, updated with their own keys.

    Attributes:
      kv_cache: keys and values of all positions, for all layers or for one.
      position_BW: position of each query in the cache. At S, past the end, a query does not update the cache.
    """

    kv_cache: KVCache
    position_BW: Int[jax.Array, "B W"]

    def layer(self, kv_cache: KVCache) -> Window:
        """The same positions in the cache of one layer."""
        return Window(kv_cache, self.position_BW)

    def updated(self, new: KVCache) -> KVCache:
        """Returns the cache with the keys and values of the queries, [..., B, W, K, H], at their positions."""
        put = jax.vmap(lambda old, new, position: old.at[position].set(new, mode="drop"))  # over rows
        if self.kv_cache.k.ndim == 5:
            put = jax.vmap(put, in_axes=(0, 0, None))  # over layers
        return KVCache(put(self.kv_cache.k, new.k, self.position_BW), put(self.kv_cache.v, new.v, self.position_BW))
