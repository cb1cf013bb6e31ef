"""One row of training text, and sources that give rows by number: lists and mixtures."""

import bisect
import itertools
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, SupportsIndex

from dream_jax.tokenizer import Message


class Piece(NamedTuple):
    """One of the consecutive texts that a response consists of; each is tokenised on its own.

    kind: "text" is the answer, or a response of one piece; "trace" is reasoning, which a length policy may shorten or
    leave out. "mark" and "opening" are the format's own words, in which the name of a special token becomes that token;
    an opening is left out together with the trace.
    """

    kind: Literal["text", "trace", "mark", "opening"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example as text.

    prompt: never masked. A string is used as it is; a tuple of chat messages goes through the tokenizer's chat template.
    response: what the model learns to write, without an end token.
    pieces: what the response consists of, in order; none for a response of one piece.
    tools: functions that the chat template announces, as JSON schemas.
    document: whether the response is a whole text without a question. Its prompt is empty, and it begins with
    `<|beginoftext|>`, so that its first token has a left neighbour to be predicted from.
    meta: where the row came from and what scoring needs; never read by training.
    Raises: ValueError for pieces that are not the response, or a document with a prompt.
    """

    prompt: str | tuple[Message, ...]
    response: str
    pieces: tuple[Piece, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    document: bool = False
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pieces and "".join(piece.text for piece in self.pieces) != self.response:
            raise ValueError(f"the pieces {self.pieces!r:.80} are not the response {self.response!r:.60}")
        if self.document and self.prompt:
            raise ValueError(f"a document has no prompt, but this one has {self.prompt!r:.60}")


@dataclass(frozen=True, kw_only=True)
class Intake:
    """Which rows of its files a source left out.

    bad: a complaint for each row that could not be read, with file and line.
    filtered: reason -> rows that were left out for it.
    """

    bad: tuple[str, ...] = ()
    filtered: Mapping[str, int] = field(default_factory=dict)

    @property
    def left_out(self) -> int:
        """Their number."""
        return len(self.bad) + sum(self.filtered.values())


class RowSource(Protocol):
    """Rows by number: `source[i]` is the same row every time; IndexError outside 0 <= i < len(source)."""

    uniform_length: bool
    """Whether all rows have the same number of tokens, so that measuring one measures all."""

    intake: Intake
    """Which rows of its files were left out."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Row: ...


class RowList:
    """A source over rows held in memory."""

    uniform_length = False

    def __init__(self, rows: Sequence[Row], intake: Intake | None = None):
        self._rows = tuple(rows)
        self.intake = intake or Intake()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Row:
        return self._rows[check_index(index, len(self._rows))]


class Mixture:
    """Several sources as one: first the rows of the first source, then those of the second, and so on.

    weights: how often each source is drawn from, relative to the others and independent of its size; None draws in
    proportion to the sizes.
    Raises: ValueError for another number of weights than of sources, or a weight that is not positive.
    """

    uniform_length = False

    def __init__(self, parts: Sequence[RowSource], weights: Sequence[float] | None = None):
        if not parts or any(len(part) == 0 for part in parts):
            raise ValueError(f"a mixture needs sources with rows; they have {[len(part) for part in parts]}")
        weights = tuple(weights) if weights is not None else tuple(float(len(part)) for part in parts)
        if len(weights) != len(parts):
            raise ValueError(f"{len(weights)} weights {weights} for {len(parts)} sources; give one to each, or none")
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"weights {weights} must be positive; leave a source out rather than give it none")
        self.parts, self.weights = tuple(parts), weights
        self.starts = tuple(itertools.accumulate((len(part) for part in parts), initial=0))
        filtered: Counter[str] = Counter()
        for part in parts:
            filtered.update(part.intake.filtered)
        self.intake = Intake(bad=tuple(bad for part in parts for bad in part.intake.bad), filtered=dict(filtered))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: SupportsIndex) -> Row:
        number = check_index(index, len(self))
        part = bisect.bisect_right(self.starts, number) - 1
        return self.parts[part][number - self.starts[part]]


def first_numbers(source: RowSource, count: int) -> list[int]:
    """Numbers of the first rows, at most `count`; of a mixture as many spread evenly, so that all its sources occur."""
    count = min(count, len(source))
    if isinstance(source, Mixture) and count > 1:
        return [number * (len(source) - 1) // (count - 1) for number in range(count)]
    return list(range(count))


def check_index(index: SupportsIndex, length: int) -> int:
    """`index` as an int. Raises IndexError outside 0 <= index < length: no caller counts from the end."""
    number = operator.index(index)
    if not 0 <= number < length:
        raise IndexError(f"row {number} of a source with rows 0..{length - 1}")
    return number


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is "train" or "test"."""
    if split not in ("train", "test"):
        raise ValueError(f"{split=} must be 'train' or 'test'")
