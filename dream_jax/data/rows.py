"""What a row of training text is, and what gives rows by number.

Knows no format, no tokenizer and no array.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, SupportsIndex

from dream_jax.tokenizer import Message


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example as text.

    prompt: never masked. A string is used as it stands; a tuple of chat messages goes through the tokenizer's
    chat template.
    response: what the model learns to write, without an end token.
    meta: where the row came from and what scoring needs; never read by training.
    """

    prompt: str | tuple[Message, ...]
    response: str
    meta: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Rows by number: `source[i]` is the same row every time; IndexError outside 0 <= i < len(source)."""

    uniform_length: bool
    """Whether all rows have the same number of tokens, so that measuring one measures all."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Row: ...


class RowList:
    """A source over rows held in memory."""

    uniform_length = False

    def __init__(self, rows: Sequence[Row]):
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Row:
        return self._rows[check_index(index, len(self._rows))]


def check_index(index: SupportsIndex, length: int) -> int:
    """`index` as an int. Raises IndexError outside 0 <= index < length: negative numbers are bugs here."""
    number = operator.index(index)
    if not 0 <= number < length:
        raise IndexError(f"row {number} of a source with rows 0..{length - 1}")
    return number


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is "train" or "test"."""
    if split not in ("train", "test"):
        raise ValueError(f"{split=} must be 'train' or 'test'")
