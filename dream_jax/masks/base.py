"""The base class of masks, the combinations of masks, and the mask that hides no key.

In the drawings of this package each line is a query and each column is a key: `#` means that the query may attend to
the key, `.` that it may not. In annotations a lower-case axis (b, t, s) is the axis B, T or S, or has size 1.
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from dream_jax.shapes import Array


class Mask(abc.ABC):
    """A rule that says which query may attend to which key."""

    @abc.abstractmethod
    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns a bool array that broadcasts to [B, T, S], true where a query may attend to a key.

        Args:
          position_bT: index of each query among the keys, in [0, S). A first axis of size 1 means that the queries of
            all rows have the same indices.
          num_keys: S, the number of keys.
        """

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """Returns the mask as a bool array that broadcasts to [B, T, S], true where a query may attend to a key.

        Raises:
          ValueError: the mask depends on positions, and the numbers of queries and keys differ (`at` gives positions to
            the queries); or the mask was made for another number of tokens.
        """
        if num_queries != num_keys:
            raise ValueError(
                f"the mask {type(self).__name__} got {num_queries} queries and {num_keys} keys; if they are not the same "
                "tokens, give the positions of the queries with `at`"
            )
        return self.allowed(jnp.arange(num_queries, dtype=jnp.int32)[None], num_keys)

    def at(self, position_BT: Int[Array, "B T"]) -> Mask:
        """Returns this mask for T queries that are at the given indices among the keys, each in [0, S)."""
        return Queries(self, position_BT)

    def only(self, position_BT: Int[Array, "B T"], num_tokens: int) -> Mask:
        """Returns this mask for T of the `num_tokens` tokens of each row, as queries and as keys.

        `position_BT` holds the index of each of them among all tokens of the row, in [0, num_tokens).
        """
        return Selection(self, position_BT, num_tokens)

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Returns the mask for particular rows. Masks that do not depend on rows return themselves.

        Args:
          valid_BT: true at tokens, false at padding. A row begins at its first valid token.
          answer_BT: true at tokens of the answer. The prompt ends before the first of these tokens.
        """
        del valid_BT, answer_BT
        return self

    def positions(self, num_tokens: int) -> Int[jax.Array, "b T"]:
        """Returns the position of each token in its text, int32 [1, T] or [B, T]; 0, 1, ..., T - 1 if a row is one text."""
        return jnp.arange(num_tokens, dtype=jnp.int32)[None]

    def for_texts(self, position_BT: Int[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Returns this mask for rows that hold several texts, with positions that count from the start of each text.

        The result does not say which text a token belongs to, so the caller combines it with `Packed` by `&`. Masks that
        depend only on the distance between query and key, or on no position, return themselves.

        Args:
          position_BT: int [B, T], the position of each token in its text, from 0.
          answer_BT: true at tokens of the answers. The prompt of a text ends before the first of these tokens.
        """
        del position_BT, answer_BT
        return self

    def draw(self, num_queries: int, num_keys: int | None = None, row: int = 0) -> str:
        """Returns the mask of one row of the batch as text, with one line per query and one character per key.

        `#` means that the query may attend to the key, `.` that it may not. `num_keys` is `num_queries` by default.
        """
        num_keys = num_queries if num_keys is None else num_keys
        dense = np.asarray(self.dense(num_queries, num_keys))
        dense = np.broadcast_to(dense, (dense.shape[0], num_queries, num_keys))
        return "\n".join("".join("#" if allowed else "." for allowed in line) for line in dense[row])

    def __and__(self, other: Mask) -> Mask:
        """Returns the mask that allows what both masks allow."""
        if isinstance(other, Bidirectional):
            return self
        return other if isinstance(self, Bidirectional) else And(self, other)

    def __or__(self, other: Mask) -> Mask:
        """Returns the mask that allows what at least one of the masks allows."""
        if isinstance(self, Bidirectional) or isinstance(other, Bidirectional):
            return Bidirectional()
        return Or(self, other)

    def __invert__(self) -> Mask:
        """Returns the mask that allows exactly what this mask hides."""
        return self.mask if isinstance(self, Not) else Not(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bidirectional(Mask):
    """Every query may attend to every key, as in Dream.

    ::

        ###
        ###
        ###
    """

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool [1, 1, S], all true."""
        return jnp.ones((1, 1, num_keys), dtype=bool)

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """Returns bool [1, 1, S], all true, for any numbers of queries and keys."""
        return jnp.ones((1, 1, num_keys), dtype=bool)

    def at(self, position_BT: Int[Array, "B T"]) -> Mask:
        """Returns this same mask, which does not depend on the positions of the queries."""
        return self

    def only(self, position_BT: Int[Array, "B T"], num_tokens: int) -> Mask:
        """Returns this same mask, which hides no token."""
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class And(Mask):
    """The mask that `&` makes: it allows what both masks allow. Drawn for `Causal` and `SlidingWindow(1, 1)`:

    ::

        #..
        ##.
        .##
    """

    left: Mask
    right: Mask

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool, true where both masks allow attention."""
        return self.left.allowed(position_bT, num_keys) & self.right.allowed(position_bT, num_keys)

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """Returns bool, true where both masks allow attention."""
        return self.left.dense(num_queries, num_keys) & self.right.dense(num_queries, num_keys)

    def at(self, position_BT: Int[Array, "B T"]) -> Mask:
        """Returns the same combination, after `at` was applied to both masks."""
        return self.left.at(position_BT) & self.right.at(position_BT)

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Returns the same combination, after `for_rows` was applied to both masks."""
        return self.left.for_rows(valid_BT, answer_BT) & self.right.for_rows(valid_BT, answer_BT)

    def for_texts(self, position_BT: Int[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Returns the same combination, after `for_texts` was applied to both masks."""
        return self.left.for_texts(position_BT, answer_BT) & self.right.for_texts(position_BT, answer_BT)

    def positions(self, num_tokens: int) -> Int[jax.Array, "b T"]:
        """Returns the positions of the mask for rows of several texts, int32; 0, 1, ..., T - 1 if there is no such mask."""
        left, right = self.left.positions(num_tokens), self.right.positions(num_tokens)
        return jnp.minimum(left, right)  # a position in a text is at most the position in the row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """The mask that `|` makes: it allows what at least one mask allows. Drawn for `Causal` and `KeyLengths` of two:

    ::

        ##.
        ##.
        ###
    """

    left: Mask
    right: Mask

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool, true where at least one of the masks allows attention."""
        return self.left.allowed(position_bT, num_keys) | self.right.allowed(position_bT, num_keys)

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """Returns bool, true where at least one of the masks allows attention."""
        return self.left.dense(num_queries, num_keys) | self.right.dense(num_queries, num_keys)

    def at(self, position_BT: Int[Array, "B T"]) -> Mask:
        """Returns the same combination, after `at` was applied to both masks."""
        return self.left.at(position_BT) | self.right.at(position_BT)

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Returns the same combination, after `for_rows` was applied to both masks."""
        return self.left.for_rows(valid_BT, answer_BT) | self.right.for_rows(valid_BT, answer_BT)

    def for_texts(self, position_BT: Int[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Returns the same combination, after `for_texts` was applied to both masks."""
        return self.left.for_texts(position_BT, answer_BT) | self.right.for_texts(position_BT, answer_BT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """The mask that `~` makes: it allows what the given mask hides. Drawn for `~Causal()`:

    ::

        .##
        ..#
        ...
    """

    mask: Mask

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool, true where the given mask does not allow attention."""
        return ~self.mask.allowed(position_bT, num_keys)

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """Returns bool, true where the given mask does not allow attention."""
        return ~self.mask.dense(num_queries, num_keys)

    def at(self, position_BT: Int[Array, "B T"]) -> Mask:
        """Returns the inverse of the mask after `at` was applied to it."""
        return ~self.mask.at(position_BT)

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Returns the inverse of the mask after `for_rows` was applied to it."""
        return ~self.mask.for_rows(valid_BT, answer_BT)

    def for_texts(self, position_BT: Int[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Returns the inverse of the mask after `for_texts` was applied to it."""
        return ~self.mask.for_texts(position_BT, answer_BT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries(Mask):
    """The mask that `at` makes: its queries are some of the tokens. Drawn for `Causal` and queries at 2, 0 and 0:

    ::

        ###
        #..
        #..

    Attributes:
      mask: the mask of all tokens.
      position_BT: index of each query among the keys, in [0, S).
    """

    mask: Mask
    position_BT: Int[Array, "B T"]

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool [B, T, S] for some of the queries; `position_bT` holds their indices in `position_BT`."""
        rows = max(position_bT.shape[0], self.position_BT.shape[0])
        position_BT = jnp.broadcast_to(jnp.asarray(self.position_BT), (rows, self.position_BT.shape[1]))
        index_BT = jnp.broadcast_to(position_bT, (rows, position_bT.shape[1]))
        return self.mask.allowed(jnp.take_along_axis(position_BT, index_BT, axis=1), num_keys)

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """Returns bool [B, T, S]. Raises ValueError if `num_queries` differs from the number of positions."""
        if self.position_BT.shape[1] != num_queries:
            raise ValueError(
                f"the mask has the positions of {self.position_BT.shape[1]} queries, but there are {num_queries} queries"
            )
        return self.mask.allowed(jnp.asarray(self.position_BT), num_keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection(Mask):
    """The mask that `only` makes: queries and keys are the same tokens of a row, not all of them. Drawn for `Causal` and
    the tokens 0, 2 and 1 of a row:

    ::

        #..
        ###
        #.#

    Attributes:
      mask: the mask of all tokens.
      position_BT: index of each token among all tokens of the row, in [0, num_tokens).
      num_tokens: number of all tokens of a row.
    """

    mask: Mask
    position_BT: Int[Array, "B T"]
    num_tokens: int = dataclasses.field(metadata={"static": True})

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool [B, T, S]. Raises ValueError if `num_keys` differs from the number of selected tokens."""
        if self.position_BT.shape[1] != num_keys:
            raise ValueError(
                f"the mask is for {self.position_BT.shape[1]} tokens of each row, but there are {num_keys} keys"
            )
        rows = max(position_bT.shape[0], self.position_BT.shape[0])
        key_BS = jnp.broadcast_to(jnp.asarray(self.position_BT), (rows, num_keys))
        query_BT = jnp.take_along_axis(key_BS, jnp.broadcast_to(position_bT, (rows, position_bT.shape[1])), axis=1)
        allowed_BTS = self.mask.allowed(query_BT, self.num_tokens)
        allowed_BTS = jnp.broadcast_to(allowed_BTS, (rows, query_BT.shape[1], self.num_tokens))
        return jnp.take_along_axis(allowed_BTS, key_BS[:, None, :], axis=2)


def conjuncts(mask: Mask) -> tuple[Mask, ...]:
    """Returns the masks that `mask` combines by `&`: only `mask` if it combines none, and () for `Bidirectional`."""
    if isinstance(mask, And):
        return (*conjuncts(mask.left), *conjuncts(mask.right))
    return () if isinstance(mask, Bidirectional) else (mask,)


def is_fixed(mask: Mask) -> bool:
    """Returns whether the mask holds no arrays: it is then known at compile time, and the same in all rows."""
    return not jax.tree.leaves(mask)
