"""Defines a row of training text, and sources of rows: lists and mixtures."""

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
    """One of the consecutive texts that a response consists of. Each piece is tokenised separately.

    kind: "text" is the answer, or a response of one piece. "trace" is reasoning, which a length policy may shorten or
    leave out. "mark" and "opening" are text that the answer format adds; there the name of a special token becomes that
    token. An opening is left out together with the trace.
    text: the text of the piece.
    """

    kind: Literal["text", "trace", "mark", "opening"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example of training or test data, as text.

    prompt: the text that is given and never masked. A string is encoded as it is; a tuple of chat messages goes through
    the chat template of the tokenizer.
    response: the text that the model learns to write, without an end token.
    pieces: the consecutive pieces of the response; empty if the response is one piece of the kind "text".
    tools: functions that the chat template announces, as JSON schemas.
    given_turns: indices in the prompt of assistant turns that are never learned, because the row says so.
    instruction: the text that the answer format put before the question, and that is the beginning of the first user turn;
    "" for none. A model that is trained on such rows must be asked with it.
    document: whether the response is a whole text without a question. Its prompt must be empty; `<|beginoftext|>` then
    takes the place of the prompt, because the first token is predicted from the position on its left.
    meta: "where" the row was found, and values that scoring needs; training does not read it.
    unread: names of the fields of its record that nobody has read.
    rejected: the answer that is worse than the response, in a row that is a pair of preferences; None in all other rows.
    ends_early: whether turns at the end of the chat are left out, because they are marked as not to be learned.
    Raises: ValueError if the texts of the pieces do not make up the response, or if a document has a prompt.
    """

    prompt: str | tuple[Message, ...]
    response: str
    pieces: tuple[Piece, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    given_turns: tuple[int, ...] = ()
    instruction: str = ""
    document: bool = False
    meta: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    rejected: str | None = None
    ends_early: bool = False

    def __post_init__(self) -> None:
        if self.pieces and "".join(piece.text for piece in self.pieces) != self.response:
            raise ValueError(f"the pieces {self.pieces!r:.80} do not make up the response {self.response!r:.60}")
        if self.document and self.prompt:
            raise ValueError(f"a document must have an empty prompt, but this one has {self.prompt!r:.60}")


@dataclass(frozen=True, kw_only=True)
class Intake:
    """The rows and fields of its files that a source left out.

    bad: an error message, with file and line, for each row that could not be read.
    filtered: reason for leaving rows out -> number of rows.
    unread: name of a field that was not read -> number of rows that have it; "messages.name" is a field of messages.
    ignored: name of a field that was left out on request -> number of rows that have it.
    ends_early: number of chats without their last turns, which are marked as not to be learned.
    """

    bad: tuple[str, ...] = ()
    filtered: Mapping[str, int] = field(default_factory=dict)
    unread: Mapping[str, int] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)
    ends_early: int = 0

    @property
    def left_out(self) -> int:
        """Number of rows that were left out, bad and filtered ones together."""
        return len(self.bad) + sum(self.filtered.values())

    @classmethod
    def joined(cls, intakes: "Sequence[Intake]") -> "Intake":
        """Returns the numbers of several sources together."""
        filtered, unread, ignored = Counter[str](), Counter[str](), Counter[str]()
        for one in intakes:
            filtered.update(one.filtered)
            unread.update(one.unread)
            ignored.update(one.ignored)
        return cls(
            bad=tuple(bad for one in intakes for bad in one.bad),
            filtered=dict(filtered),
            unread=dict(unread),
            ignored=dict(ignored),
            ends_early=sum(one.ends_early for one in intakes),
        )


class RowSource(Protocol):
    """A sequence of rows: `source[i]` is the same row every time. Raises IndexError unless 0 <= i < len(source)."""

    uniform_length: bool
    """Whether all rows have the same number of tokens. If so, only the first row is measured."""

    intake: Intake
    """The rows and fields of its files that the source left out."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Row: ...


def has_traces(source: RowSource) -> bool:
    """Returns whether a row of the source has a reasoning trace, so that the answer format matters."""
    if isinstance(source, Mixture):
        return any(map(has_traces, source.parts))
    number = 1 if source.uniform_length else len(source)
    return any(source[index].pieces for index in range(number))


def first_prompted(source: RowSource) -> Row:
    """Returns the first row of the first part of the source that has prompts; of a source of documents, its first row."""
    parts = source.parts if isinstance(source, Mixture) else (source,)
    return next((part[0] for part in parts if not part[0].document), source[0])


class RowList:
    """A source whose rows are held in memory."""

    uniform_length = False

    def __init__(self, rows: Sequence[Row], intake: Intake | None = None):
        self._rows = tuple(rows)
        self.intake = intake or Intake()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Row:
        return self._rows[check_index(index, len(self._rows))]


class Mixture:
    """Combines several sources into one: the rows of the first source, then those of the second, and so on.

    parts: the sources, each with at least one row.
    weights: how often each source is drawn in training, relative to the others and independent of its size. None: in
    proportion to the sizes.
    Raises: ValueError if there is no source, a source has no rows, the number of weights is not the number of sources,
    or a weight is not positive and finite.
    """

    uniform_length = False

    def __init__(self, parts: Sequence[RowSource], weights: Sequence[float] | None = None):
        if not parts or any(len(part) == 0 for part in parts):
            raise ValueError(
                f"each source of a mixture needs rows, but these have {[len(part) for part in parts]} rows; "
                "leave out the sources without rows"
            )
        weights = tuple(weights) if weights is not None else tuple(float(len(part)) for part in parts)
        if len(weights) != len(parts):
            raise ValueError(
                f"{len(weights)} weights {weights} for {len(parts)} sources; give one weight for each, or none"
            )
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"weights {weights} must be positive and finite; leave a source out instead of weight 0")
        self.parts, self.weights = tuple(parts), weights
        self.starts = tuple(itertools.accumulate((len(part) for part in parts), initial=0))
        self.intake = Intake.joined([part.intake for part in parts])

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: SupportsIndex) -> Row:
        part, number = self.part_of(index)
        return part[number]

    def part_of(self, index: SupportsIndex) -> tuple[RowSource, int]:
        """Returns the source of a row, and the index of the row in it."""
        number = check_index(index, len(self))
        part = bisect.bisect_right(self.starts, number) - 1
        return self.parts[part], number - self.starts[part]


def first_numbers(source: RowSource, count: int) -> list[int]:
    """Returns the indices of the first `count` rows, or of all rows if there are fewer.

    For a mixture the indices are evenly spaced over all rows, so that all its sources occur.
    """
    count = min(count, len(source))
    if isinstance(source, Mixture) and count > 1:
        return [number * (len(source) - 1) // (count - 1) for number in range(count)]
    return list(range(count))


def check_index(index: SupportsIndex, length: int) -> int:
    """Returns `index` as an int. Raises IndexError unless 0 <= index < length; negative indices are not supported."""
    number = operator.index(index)
    if not 0 <= number < length:
        raise IndexError(f"row {number} of a source with rows 0..{length - 1}")
    return number


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is "train" or "test"."""
    if split not in ("train", "test"):
        raise ValueError(f"{split=} must be 'train' or 'test'")
