"""The noise of a training step for rows that hold several texts: each text has a noise level of its own.

A text gets the noise level and the masked positions that `objective.draw_noise` would give it if it were the last tokens
of a row of its own, in a batch with as many rows as there are texts. So packing changes which row computes a text, but
not what is drawn for it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dream_jax.masks import Packed
from dream_jax.shapes import Array


def draw_packed_noise(
    key: jax.Array, packed: Packed, text_BM: Int[Array, "B M"], maskable_BT: Bool[Array, "B T"]
) -> tuple[Float[jax.Array, "B M"], Bool[jax.Array, "B T"]]:
    """Draws the noise level and the masked positions of each text of one training step.

    The noise of a text depends only on the key, on the index of the text and on the number K of texts, not on the row,
    device or process that computes it. The noise levels are stratified over the K texts of the global batch. They are
    those of `draw_noise` for K rows if K is at most 1625; jax shuffles more rows in another way.

    Args:
      key: the random key of the step.
      packed: the lengths of the texts of the global batch.
      text_BM: index of each text in the global batch, in [0, K); -1 after the last text of a row.
      maskable_BT: true where a token may be masked; false in the prompts and at padding.

    Returns:
      The noise level t of each text, float32 [B, M] in [0, 1), 0 after the last text, and the masked positions, bool
      [B, T].
    """
    t_BM, u_BT = text_numbers(key, packed, text_BM, maskable_BT.shape[1])
    t_BT = packed.spread(t_BM, jnp.zeros((1, 1), jnp.float32), maskable_BT.shape[1])
    return t_BM, jnp.asarray(maskable_BT) & (u_BT < t_BT)


def text_numbers(
    key: jax.Array, packed: Packed, text_BM: Int[Array, "B M"], num_tokens: int
) -> tuple[Float[jax.Array, "B M"], Float[jax.Array, "B T"]]:
    """Returns the random numbers of `draw_packed_noise`: the noise level of each text, and a number for each token.

    The arguments are those of `draw_packed_noise`, with the number of tokens of a row. Both arrays are float32; the number
    of a token is in [0, 1), and 1 at padding.
    """
    text_BM = jnp.asarray(text_BM)
    offset_key, order_key, mask_key = jax.random.split(key, 3)
    count = jnp.sum(text_BM >= 0, dtype=jnp.int32)
    stratum_K = _permutation(order_key, text_BM.size, count).astype(jnp.float32)
    t_K = (stratum_K + jax.random.uniform(offset_key)) / count.astype(jnp.float32)
    # Rounding may make t_K equal to 1.
    t_BM = jnp.where(text_BM >= 0, jnp.minimum(t_K, 1.0 - 2.0**-24)[text_BM], 0.0)

    slot_BT = packed.slots(num_tokens)
    end_BM = jnp.cumsum(jnp.asarray(packed.length_BM, jnp.int32), axis=1)
    token_T = jnp.arange(num_tokens, dtype=jnp.int32)

    def add_text(slot: jax.Array, u_BT: jax.Array) -> jax.Array:
        """Returns the random numbers [B, T], with those of text number `slot` of each row filled in."""
        text_B, end_B = (jax.lax.dynamic_index_in_dim(x, slot, axis=1, keepdims=False) for x in (text_BM, end_BM))
        row_BT = jax.vmap(lambda text: jax.random.uniform(jax.random.fold_in(mask_key, text), (num_tokens,)))(text_B)
        # In a row of its own, the last token of the text would be the last token of the row.
        index_BT = jnp.minimum(token_T + (num_tokens - end_B)[:, None], num_tokens - 1)
        return jnp.where(slot_BT == slot, jnp.take_along_axis(row_BT, index_BT, axis=1), u_BT)

    slots = jnp.max(jnp.sum(text_BM >= 0, axis=1, dtype=jnp.int32))
    return t_BM, jax.lax.fori_loop(0, slots, add_text, jnp.ones((len(text_BM), num_tokens), jnp.float32))


def _permutation(key: jax.Array, most: int, count: Int[jax.Array, ""]) -> Int[jax.Array, "K"]:
    """Returns a random permutation of 0 .. count-1, followed by the other integers below `most`: int32 [most].

    `count` need not be known at compile time. If it is at most 1625, these are the numbers of
    `jax.random.permutation(key, count)`, because the first random bits of a longer array are those of a shorter one.
    """
    bits_K = jax.random.bits(jax.random.split(key)[1], (most,), jnp.uint32)
    number_K = jnp.arange(most, dtype=jnp.int32)
    *_, shuffled_K = jax.lax.sort((number_K >= count, bits_K, number_K), num_keys=2, is_stable=True)
    found: jax.Array = shuffled_K
    return found
