"""The cache of keys and values, and the window of queries that attends to it and updates it."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The keys and values of some tokens, with one copy for each key/value head.

    Attributes:
      k: keys after the rotary embedding, [L, B, S, K, H] for all layers or [B, S, K, H] for one layer.
      v: values, in the same shape.
    """

    k: Float[jax.Array, "*L B S K H"]
    v: Float[jax.Array, "*L B S K H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """W positions of each row whose tokens are the queries, and the cache of the whole row.

    First the keys and values of these tokens are written to the cache, then the queries attend to the cache.

    Attributes:
      kv_cache: keys and values of all S positions, for all layers or for one layer.
      position_BW: index of each query in the cache, in [0, S). A query with the index S does not update the cache.
    """

    kv_cache: KVCache
    position_BW: Int[jax.Array, "B W"]

    def layer(self, kv_cache: KVCache) -> Window:
        """Returns the window with the same positions in `kv_cache`, the cache of one layer."""
        return Window(kv_cache, self.position_BW)

    def updated(self, new: KVCache) -> KVCache:
        """Returns the cache after the keys and values of the queries, [..., B, W, K, H], were written to it."""
        put = jax.vmap(lambda old, new, position: old.at[position].set(new, mode="drop"))  # vmap over rows
        if self.kv_cache.k.ndim == 5:
            put = jax.vmap(put, in_axes=(0, 0, None))  # vmap over layers
        return KVCache(put(self.kv_cache.k, new.k, self.position_BW), put(self.kv_cache.v, new.v, self.position_BW))
