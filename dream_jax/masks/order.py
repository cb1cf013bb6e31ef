"""Masks that go by where tokens stand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from dream_jax.masks.base import Mask
from dream_jax.shapes import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Every query sees the keys up to its own position: the mask that Dream's ancestor was trained under.

    ::

        #..
        ##.
        ###
    """

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """[B, T, S]."""
        return _keys(num_keys) <= jnp.asarray(position_bT)[:, :, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """All tokens see the prompt, both ways; what is answered is causal.

    Attributes:
      end_B: place of each row's first token after the prompt; None until `for_rows` says it. With a prompt of two tokens:

    ::

        ##..
        ##..
        ###.
        ####
    """

    end_B: Int[Array, "B"] | None = None

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """[B, T, S]. Raises ValueError where nothing says how long the prompts are."""
        if self.end_B is None:
            raise ValueError("a prefix mask must be told where the prompts end: Prefix(end), or `for_rows`")
        in_prompt_B1S = _keys(num_keys) < jnp.asarray(self.end_B, jnp.int32)[:, None, None]
        return in_prompt_B1S | (_keys(num_keys) <= jnp.asarray(position_bT)[:, :, None])

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """With these rows' prompts."""
        return Prefix(_first(answer_BT))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCausal(Mask):
    """Blocks of `size` tokens, counted from the first of a row: a query sees its own block and those before it.

    Attributes:
      size: tokens a block; 1 is causal.
      start_B: place of each row's first token (what stands before it is in earlier blocks); None: 0. With blocks of two:

    ::

        ##..
        ##..
        ####
        ####

    Raises:
      ValueError: a block without tokens.
    """

    size: int = dataclasses.field(metadata={"static": True})
    start_B: Int[Array, "B"] | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"blocks of {self.size} tokens: the size must be at least 1")

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """[B, T, S]."""
        start_B11 = jnp.int32(0) if self.start_B is None else jnp.asarray(self.start_B, jnp.int32)[:, None, None]
        block_of_key, block_of_query = (
            (position - start_B11) // self.size for position in (_keys(num_keys), jnp.asarray(position_bT)[:, :, None])
        )
        return block_of_key <= block_of_query

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """With these rows' first tokens."""
        return BlockCausal(self.size, _first(valid_BT))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
    """A query sees so many tokens before it, itself, and so many after it.

    Attributes:
      left, right: how many. With one to the left and none to the right:

    ::

        #..
        ##.
        .##

    Raises:
      ValueError: a negative number.
    """

    left: int = dataclasses.field(metadata={"static": True})
    right: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        if self.left < 0 or self.right < 0:
            raise ValueError(f"a window of {self.left} and {self.right} tokens: neither may be negative")

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """[B, T, S]."""
        ahead_BTS = _keys(num_keys) - jnp.asarray(position_bT)[:, :, None]
        return (ahead_BTS >= -self.left) & (ahead_BTS <= self.right)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoStream(Mask):
    """Block diffusion's training mask (Arriola et al. 2025), for rows [noised | clean] of one text twice.

    A noised token sees the noised ones of its block and the clean ones of the blocks before it: what it will see when
    blocks are written one after the other. Clean tokens see the clean ones up to the end of their block.

    Attributes:
      size: tokens a block, counted from the start of either half. With blocks of one, for a text of two tokens:

    ::

        #...
        .##.
        ..#.
        ..##

    Raises:
      ValueError: a block without tokens.
    """

    size: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"blocks of {self.size} tokens: the size must be at least 1")

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """[B, T, S]. Raises ValueError for keys that are not two halves."""
        half, odd = divmod(num_keys, 2)
        if odd:
            raise ValueError(f"{num_keys} keys are no noised and clean half of one length")
        key, query = _keys(num_keys), jnp.asarray(position_bT)[:, :, None]
        clean_key, clean_query = key >= half, query >= half
        block_of_key, block_of_query = (key % half) // self.size, (query % half) // self.size
        noised = ~clean_query & ~clean_key & (block_of_key == block_of_query)
        before = ~clean_query & clean_key & (block_of_key < block_of_query)
        return noised | before | (clean_query & clean_key & (block_of_key <= block_of_query))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Annealed(Mask):
    """Between causal and bidirectional: keys up to the query's own position, and of the later ones those that were drawn.

    Attributes:
      drawn_TS: true at pairs that may attend although the key is later; made by `anneal`. Here the second query sees the
        third key, the first does not:

    ::

        #..
        ###
        ###
    """

    drawn_TS: Bool[Array, "T S"]

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """[B, T, S]. Raises ValueError when it was drawn for another number of tokens."""
        if self.drawn_TS.shape != (num_keys, num_keys):
            raise ValueError(f"a mask drawn for {self.drawn_TS.shape} was given to {num_keys} tokens")
        return Causal().allowed(position_bT, num_keys) | jnp.asarray(self.drawn_TS)[jnp.asarray(position_bT)]


def anneal(key: jax.Array, share: float | jax.Array, length: int) -> Bool[jax.Array, "T S"]:
    """Draws which of the later keys each query may see, each with probability `share`: for `Annealed.drawn_TS`.

    0 leaves a causal mask, 1 a bidirectional one. The annealing of DiffuLLaMA (Gong et al. 2025).
    """
    return jax.random.uniform(key, (length, length)) < share


def _keys(num_keys: int) -> Int[jax.Array, "S"]:
    return jnp.arange(num_keys, dtype=jnp.int32)


def _first(x_BT: Bool[Array, "B T"]) -> Int[jax.Array, "B"]:
    """The first true place of each row; T where there is none."""
    position_BT = jnp.where(jnp.asarray(x_BT), _keys(x_BT.shape[1]), x_BT.shape[1])
    return jnp.min(position_BT, axis=1, initial=x_BT.shape[1])
