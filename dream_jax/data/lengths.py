"""Tokenises the rows of a source, each row once, and reports how many rows fit into a given length."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dream_jax.data.encode import ALL_PROMPT, NO_ROOM, TOO_LONG, TokenRow, token_row
from dream_jax.data.options import EncodeOptions, LengthPolicy
from dream_jax.data.rows import Mixture, Row, RowSource, first_numbers
from dream_jax.data.store import StoredRows
from dream_jax.tokenizer import Tokenizer

_REASONS = ("", TOO_LONG, NO_ROOM, ALL_PROMPT)
_SHOWN = 40  # names of fields that a report prints


class TokenizedRows:
    """The rows of a source as tokens, before any cut: `rows[i]` is the `TokenRow` of row i.

    A row that was measured, or returned by `keep`, stays in memory (4 bytes per token) and is not tokenised again. Any
    other row is tokenised each time it is read: for example most rows of a source of uniform length, such as generated
    puzzles, of which only the first one is measured. The rows of `StoredRows`, also inside a mixture, are read from their
    store, whose tokens must be those of the same tokenizer and options.
    """

    def __init__(self, source: RowSource, tokenizer: Tokenizer, options: EncodeOptions = EncodeOptions()):
        self.source, self.tokenizer, self.options = source, tokenizer, options
        self._kept: dict[int, TokenRow] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> TokenRow:
        kept = self._kept.get(number)
        if kept is not None:
            return kept
        stored = _stored(self.source, number)
        return token_row(self.source[number], self.tokenizer, self.options) if stored is None else stored

    def keep(self, number: int) -> TokenRow:
        """Returns row `number` and keeps it in memory from now on, unless its tokens are in a store."""
        stored = _stored(self.source, number)
        if stored is not None:
            return stored
        self._kept[number] = self[number]
        return self._kept[number]

    def fit(self, row: TokenRow, max_length: int) -> TokenRow | str:
        """Returns the row, cut to at most `max_length` tokens by the length policy of the options.

        If the policy drops the row, returns the reason, a text.
        """
        return row.fit(max_length, self.options.length_policy)

    def fit_divided(self, row: TokenRow, max_length: int) -> TokenRow | str:
        """Returns the row like `fit`, but with the policy "split" all tokens of a document, which is divided later."""
        divides = self.options.length_policy == "split" and row.is_document
        return row if divides else self.fit(row, max_length)

    def first(self, count: int, max_length: int) -> list[tuple[Row, TokenRow]]:
        """Returns the text and the tokens of the rows of `first_numbers`, except rows that the length policy drops."""
        fitted = [(number, self.fit(self.keep(number), max_length)) for number in first_numbers(self.source, count)]
        return [(self.source[number], row) for number, row in fitted if isinstance(row, TokenRow)]


def _stored(source: RowSource, number: int) -> TokenRow | None:
    """Returns the tokens of a row whose source, or whose part of a mixture, has a store; None for another row."""
    if isinstance(source, Mixture):
        source, number = source.part_of(number)
    return source.token_row(number) if isinstance(source, StoredRows) else None


@dataclass(frozen=True, kw_only=True)
class LengthReport:
    """How the rows of a source fit into max_length tokens.

    All lengths are numbers of tokens before any cut, including the end token.

    total: number of rows of the source. measured: number of rows that were tokenised for this report. The other numbers
    count the measured rows only, except that a row of a source of uniform length counts for all rows of that source.
    kept, dropped: number of rows that the length policy keeps and drops.
    shortest, longest, mean: the smallest, the largest and the mean length of the rows.
    digest: hash of the tokens of the measured rows, in order; it changes if the text or the tokenizer changes.
    cut: number of rows that were kept but shortened.
    whole: number of rows that were kept with their complete answer and its end token.
    reasons: reason why rows were dropped -> number of rows.
    bad, filtered, unread, ignored, ends_early: rows and fields that were left out when the files were read; see `Intake`.
    histogram: range of lengths, from each power of two up to the next ("64 to 127") -> number of rows.
    """

    max_length: int
    total: int
    measured: int
    kept: int
    dropped: int
    shortest: int
    longest: int
    mean: float
    digest: str
    cut: int = 0
    whole: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    bad: tuple[str, ...] = ()
    filtered: Mapping[str, int] = field(default_factory=dict)
    unread: Mapping[str, int] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)
    ends_early: int = 0
    histogram: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        measured = "" if self.kept + self.dropped == self.total else f" of {self.measured} measured"
        return (
            f"{self.kept} rows kept, {self.dropped} dropped{measured} ({self.total} in all) "
            f"at max_length {self.max_length}; "
            f"tokens: shortest {self.shortest}, mean {self.mean:.1f}, longest {self.longest}"
        )

    def plain(self) -> dict[str, Any]:
        """Returns the report as a dict that JSON can represent."""
        return {**asdict(self), "bad": list(self.bad)}

    def lines(self, shown: int = 5) -> list[str]:
        """Returns the report as lines of text, which list at most `shown` of the bad rows."""
        found = [str(self)]
        found += [f"dropped: {count} rows {reason}" for reason, count in self.reasons.items()]
        found += [f"left out by a filter: {count} rows, {reason}" for reason, count in self.filtered.items()]
        found += [f"bad row skipped: {complaint}" for complaint in self.bad[:shown]]
        if len(self.bad) > shown:
            found.append(f"bad rows skipped: {len(self.bad)} in all")
        for what, names in (("not read", self.unread), ("left out on request (--ignore-field)", self.ignored)):
            if names:
                counts = [f"{name} ({count} rows)" for name, count in sorted(names.items())]
                rest = f" and {len(counts) - _SHOWN} others" if len(counts) > _SHOWN else ""
                found.append(f"fields of the files that are {what}: {', '.join(counts[:_SHOWN])}{rest}")
        if self.ends_early:
            found.append(
                f"chats that end at their last turn to be learned; the turns after it are left out: {self.ends_early}"
            )
        share = self.whole / self.kept
        found.append(f"answers kept whole, with their end token: {self.whole} of {self.kept} ({share:.1%})")
        if self.cut:
            found.append(f"rows that were shortened: {self.cut} of {self.kept} ({self.cut / self.kept:.1%})")
        if len(self.histogram) > 1:
            found.append("rows by tokens: " + ", ".join(f"{name}: {count}" for name, count in self.histogram.items()))
        return found


class RowLengths(NamedTuple):
    """Numbers of tokens of each of the n rows that the length policy keeps, after the cut: int64 [n] each.

    prompt: tokens before the response. response: tokens of the response, including its end token. text: tokens of the
    response without its end token. learned: tokens of the prompt that belong to learned earlier turns. whole: 1 if the
    row has its end token, else 0.
    """

    prompt: np.ndarray
    response: np.ndarray
    text: np.ndarray
    learned: np.ndarray
    whole: np.ndarray


def length_report(rows: TokenizedRows, max_length: int, limit: int | None = None) -> LengthReport:
    """Tokenises the rows, or `limit` evenly spaced ones, and reports how many of them fit.

    If the source has a uniform length, only its first row is tokenised.
    Raises: ValueError if `limit` is below 1, if the source has no rows, or if no row fits into max_length.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"{limit=} must be at least 1, or None for all rows")
    numbers, stands_for = _to_measure(rows.source)
    if limit is not None and limit < len(rows) and not rows.source.uniform_length:
        numbers, stands_for = np.linspace(0, len(rows) - 1, limit).astype(int), np.ones(limit, dtype=np.int64)
    return _measure(rows, numbers, stands_for, max_length)[2]


def longest_row(rows: TokenizedRows) -> int:
    """Returns the number of tokens of the longest row, but at most 2048. Raises like `length_report`."""
    return min(length_report(rows, 2048).longest, 2048)


def fitting_rows(rows: TokenizedRows, max_length: int) -> tuple[np.ndarray | range, RowLengths, LengthReport]:
    """Returns the indices of the rows that the length policy keeps, ascending, their lengths, and the report.

    All rows are tokenised, except that only the first row of a source of uniform length is. This holds inside a mixture
    too.
    Raises: ValueError if the source has no rows, or if no row fits into max_length.
    """
    numbers, stands_for = _to_measure(rows.source)
    kept, lengths, report = _measure(rows, numbers, stands_for, max_length)
    if len(numbers) == 1:  # A source of uniform length may have a million rows; these values need no memory per row.
        every = range(len(rows))
        return every, RowLengths(*(np.broadcast_to(column, len(rows)) for column in lengths)), report
    counts = stands_for[kept]
    lengths = RowLengths(*(np.repeat(column, counts) for column in lengths))
    if report.dropped == 0:
        return range(len(rows)), lengths, report
    # A measured row that represents several rows represents those with the indices that follow its own.
    first = np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(numbers[kept], counts) + np.arange(len(first)) - first, lengths, report


def _to_measure(source: RowSource) -> tuple[np.ndarray, np.ndarray]:
    """Returns two int64 [n]: the indices of the rows to tokenise, and how many rows each represents.

    A row represents itself and the rows whose indices follow its own.
    """
    if len(source) == 0:
        raise ValueError("the source has no rows")
    if isinstance(source, Mixture):
        each = [_to_measure(part) for part in source.parts]
        numbers = [part + start for (part, _), start in zip(each, source.starts, strict=False)]
        return np.concatenate(numbers), np.concatenate([stands_for for _, stands_for in each])
    if source.uniform_length:
        return np.zeros(1, dtype=np.int64), np.array([len(source)])
    return np.arange(len(source)), np.ones(len(source), dtype=np.int64)


def _measure(
    rows: TokenizedRows, numbers: np.ndarray, stands_for: np.ndarray, max_length: int
) -> tuple[np.ndarray, RowLengths, LengthReport]:
    """Measures the rows with the indices `numbers`, each of which represents `stands_for` rows; int64 [n] each.

    Returns the indices into `numbers` of the rows that are kept, their lengths, and the report.
    """
    digest = hashlib.blake2b(digest_size=8)
    parts = [_measure_part(rows, *part, max_length, digest) for part in _by_part(rows.source, numbers)]
    full, cut = (np.concatenate([getattr(part, name) for part in parts]) for name in ("full", "cut"))
    lengths = RowLengths(*np.concatenate([part.fitted for part in parts], axis=1))
    dropped = [reason for part in parts for reason in part.dropped]
    reasons, keeps = Counter[str](), np.ones(len(numbers), np.bool_)
    for index, reason in zip(np.flatnonzero(lengths.prompt < 0).tolist(), dropped, strict=True):
        keeps[index] = False
        reasons[reason] += int(stands_for[index])
    kept = np.flatnonzero(keeps)
    shortest, longest = int(full.min()), int(full.max())
    if not len(kept):
        raise ValueError(
            f"no row fits into {max_length=}: of {len(numbers)} measured rows the shortest has {shortest} tokens, "
            f"the longest {longest}; raise max_length to at least {shortest}, or to {longest} to keep all rows"
        )
    lengths, stand = RowLengths(*(column[kept] for column in lengths)), stands_for[kept]
    intake = rows.source.intake
    report = LengthReport(
        max_length=max_length,
        total=len(rows),
        measured=len(numbers),
        kept=int(stand.sum()),
        dropped=reasons.total(),
        shortest=shortest,
        longest=longest,
        mean=float(np.average(full, weights=stands_for)),
        digest=digest.hexdigest(),
        cut=int(stand[cut[kept]].sum()),
        whole=int((stand * lengths.whole).sum()),
        reasons=dict(reasons),
        bad=intake.bad,
        filtered=dict(intake.filtered),
        unread=dict(intake.unread),
        ignored=dict(intake.ignored),
        ends_early=intake.ends_early,
        histogram=_histogram(full, stands_for),
    )
    return kept, lengths, report


class _Measured(NamedTuple):
    """The measured rows of one source.

    full: int64 [n], the tokens of each row before any cut. fitted: int64 [5, n], the columns of `RowLengths`; of a row that
    is dropped all are -1. cut: bool [n], the rows that are kept but shortened. dropped: for each row that is dropped, in
    order, the reason.
    """

    full: np.ndarray
    fitted: np.ndarray
    cut: np.ndarray
    dropped: list[str]


def _by_part(source: RowSource, numbers: np.ndarray) -> Iterator[tuple[RowSource, int, np.ndarray]]:
    """Yields the source, or each part of a mixture, the index of its first row, and those indices in it; ascending."""
    if not isinstance(source, Mixture):
        yield source, 0, numbers
        return
    limits = np.searchsorted(numbers, source.starts)
    for part, start, first, last in zip(source.parts, source.starts, limits, limits[1:], strict=False):
        yield part, start, numbers[first:last] - start


def _measure_part(
    rows: TokenizedRows,
    source: RowSource,
    start: int,
    numbers: np.ndarray,
    max_length: int,
    digest: "hashlib.blake2b",
) -> _Measured:
    """Measures the rows with these indices in one source, which begins at `start`, and adds their tokens to the digest."""
    policy = rows.options.length_policy
    if isinstance(source, StoredRows):
        source = source.of(numbers)
        for framed in source.framed():
            digest.update(framed.tobytes())
        return _measure_stored(source, max_length, policy)
    full, fitted, dropped = np.empty(len(numbers), np.int64), np.full((5, len(numbers)), -1, np.int64), list[str]()
    cut = np.zeros(len(numbers), np.bool_)
    for index, number in enumerate(numbers.tolist()):
        uncut = rows.keep(start + number)
        full[index] = uncut.length
        begin = 0
        for piece in uncut.pieces:
            digest.update(np.int32(piece.length).tobytes() + uncut.tokens[begin : begin + piece.length].tobytes())
            begin += piece.length
        row = rows.fit_divided(uncut, max_length)
        if isinstance(row, str):
            dropped.append(row)
            continue
        cut[index] = row.length < uncut.length
        prompt = row.prompt_length
        learned = sum(piece.length for piece in row.pieces if piece.kind == "learned")
        fitted[:, index] = prompt, row.length - prompt, row.text_length, learned, row.whole
    return _Measured(full, fitted, cut, dropped)


def _measure_stored(source: StoredRows, max_length: int, policy: LengthPolicy) -> _Measured:
    """Measures rows as `TokenRow.fit` would fit them, from their numbers of tokens alone."""
    store = source.store
    full, prompt = source.selected(store.lengths), source.selected(store.prompts)
    learned, trace = source.selected(store.learned), source.selected(store.traces)
    surplus = np.maximum(full - max_length, 0)
    if policy == "split":
        surplus[prompt == 1] = 0  # documents, which are divided later
    reason = np.zeros(len(full), np.int64)  # indices into _REASONS
    long = surplus > 0
    if policy == "right":
        reason[long & (prompt >= max_length)] = _REASONS.index(ALL_PROMPT)
    elif policy == "middle":
        reason[long & (trace < surplus)] = _REASONS.index(NO_ROOM)
        reason[long & (trace < 0)] = _REASONS.index(TOO_LONG)
    else:
        reason[long] = _REASONS.index(TOO_LONG if policy in ("filter", "split") else NO_ROOM)
    whole = np.where(long & (policy == "right"), 0, 1)  # the policy "right" cuts the end token first
    response = full - surplus - prompt
    fitted = np.stack([prompt, response, response - whole, learned, whole])
    fitted[:, reason > 0] = -1
    dropped = [_REASONS[code] for code in reason[reason > 0].tolist()]
    return _Measured(full, fitted, long & (reason == 0), dropped)


def _histogram(lengths: np.ndarray, stands_for: np.ndarray) -> dict[str, int]:
    """Returns the number of rows for each range of lengths, from each power of two up to the next."""
    powers = np.floor(np.log2(lengths)).astype(int)
    return {
        f"{2**power} to {2 ** (power + 1) - 1}": int(stands_for[powers == power].sum())
        for power in range(int(powers.min()), int(powers.max()) + 1)
    }
