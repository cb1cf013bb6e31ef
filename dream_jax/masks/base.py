"""What a mask is, and how masks compose."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from dream_jax.shapes import Array


class Mask(abc.ABC):
    """Which query may attend to which key."""

    @abc.abstractmethod
    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """What queries that stand at these places among the keys see: booleans that broadcast to [B, T, S].

        Args:
          position_bT: a place of the first axis 1 is that of all rows.
          num_keys: S.
        """

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """The mask as booleans that broadcast to [B, T, S]; an axis of size 1 means "the same for all".

        Raises:
          ValueError: queries that are not the keys, for a mask that goes by where they stand; or a mask that was made
            for another number of tokens.
        """
        if num_queries != num_keys:
            raise ValueError(
                f"{type(self).__name__} of {num_queries} queries and {num_keys} keys: they must be the same tokens; say "
                "with `at` where the queries stand"
            )
        return self.allowed(jnp.arange(num_queries, dtype=jnp.int32)[None], num_keys)

    def at(self, position_BT: Int[Array, "B T"]) -> Mask:
        """The same mask for queries that are not all tokens, but stand at these places among the keys."""
        return Queries(self, position_BT)

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """The same mask for rows that begin and answer at places of their own; itself where it goes by neither.

        Args:
          valid_BT: true at real tokens; a row begins at its first.
          answer_BT: true at what is answered (false in a row without an answer); the prompt ends before its first.
        """
        del valid_BT, answer_BT
        return self

    def draw(self, num_queries: int, num_keys: int | None = None, row: int = 0) -> str:
        """The mask of one batch row as text, a line a query: `#` may attend, `.` may not."""
        num_keys = num_queries if num_keys is None else num_keys
        dense = np.asarray(self.dense(num_queries, num_keys))
        dense = np.broadcast_to(dense, (dense.shape[0], num_queries, num_keys))
        return "\n".join("".join("#" if seen else "." for seen in line) for line in dense[row])

    def __and__(self, other: Mask) -> Mask:
        """What both let be seen. `Bidirectional` adds nothing."""
        if isinstance(other, Bidirectional):
            return self
        return other if isinstance(self, Bidirectional) else And(self, other)

    def __or__(self, other: Mask) -> Mask:
        """What either lets be seen."""
        if isinstance(self, Bidirectional) or isinstance(other, Bidirectional):
            return Bidirectional()
        return Or(self, other)

    def __invert__(self) -> Mask:
        """What it hides."""
        return self.mask if isinstance(self, Not) else Not(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bidirectional(Mask):
    """Every query sees every key: Dream's own mask.

    ::

        ###
        ###
        ###
    """

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """All true, [1, 1, S]."""
        return jnp.ones((1, 1, num_keys), dtype=bool)

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """All true, [1, 1, S], for any numbers."""
        return jnp.ones((1, 1, num_keys), dtype=bool)

    def at(self, position_BT: Int[Array, "B T"]) -> Mask:
        """Itself."""
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class And(Mask):
    """What both masks let be seen; made by `&`. Here the causal one and a window that looks one token back:

    ::

        #..
        ##.
        .##
    """

    left: Mask
    right: Mask

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Both."""
        return self.left.allowed(position_bT, num_keys) & self.right.allowed(position_bT, num_keys)

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """Both."""
        return self.left.dense(num_queries, num_keys) & self.right.dense(num_queries, num_keys)

    def at(self, position_BT: Int[Array, "B T"]) -> Mask:
        """Both."""
        return self.left.at(position_BT) & self.right.at(position_BT)

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Both."""
        return self.left.for_rows(valid_BT, answer_BT) & self.right.for_rows(valid_BT, answer_BT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """What either mask lets be seen; made by `|`. Here the causal one and a first token that all see, of three:

    ::

        #..
        ##.
        ###
    """

    left: Mask
    right: Mask

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Either."""
        return self.left.allowed(position_bT, num_keys) | self.right.allowed(position_bT, num_keys)

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """Either."""
        return self.left.dense(num_queries, num_keys) | self.right.dense(num_queries, num_keys)

    def at(self, position_BT: Int[Array, "B T"]) -> Mask:
        """Either."""
        return self.left.at(position_BT) | self.right.at(position_BT)

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Either."""
        return self.left.for_rows(valid_BT, answer_BT) | self.right.for_rows(valid_BT, answer_BT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """What a mask hides; made by `~`. Here the causal one: the last query sees nothing, and its attention has no meaning.

    ::

        .##
        ..#
        ...
    """

    mask: Mask

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """The opposite."""
        return ~self.mask.allowed(position_bT, num_keys)

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """The opposite."""
        return ~self.mask.dense(num_queries, num_keys)

    def at(self, position_BT: Int[Array, "B T"]) -> Mask:
        """The opposite."""
        return ~self.mask.at(position_BT)

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """The opposite."""
        return ~self.mask.for_rows(valid_BT, answer_BT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries(Mask):
    """A mask for some of the tokens as queries; made by `at`. Here the causal one, for the places 2, 0 and 0:

    ::

        ###
        #..
        #..
    """

    mask: Mask
    position_BT: Int[Array, "B T"]

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Of the queries with these numbers."""
        rows = max(position_bT.shape[0], self.position_BT.shape[0])
        position_BT = jnp.broadcast_to(jnp.asarray(self.position_BT), (rows, self.position_BT.shape[1]))
        number_BT = jnp.broadcast_to(position_bT, (rows, position_bT.shape[1]))
        return self.mask.allowed(jnp.take_along_axis(position_BT, number_BT, axis=1), num_keys)

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """[B, T, S]. Raises ValueError for another number of queries than there are places."""
        if self.position_BT.shape[1] != num_queries:
            raise ValueError(f"a mask for {self.position_BT.shape[1]} queries was given to {num_queries} queries")
        return self.mask.allowed(jnp.asarray(self.position_BT), num_keys)


def conjuncts(mask: Mask) -> tuple[Mask, ...]:
    """Masks of which `mask` is the conjunction, itself when it is none; nothing for a mask that hides nothing."""
    if isinstance(mask, And):
        return (*conjuncts(mask.left), *conjuncts(mask.right))
    return () if isinstance(mask, Bidirectional) else (mask,)


def is_fixed(mask: Mask) -> bool:
    """Whether the mask is known when a program is compiled, and the same in all rows."""
    return not jax.tree.leaves(mask)
