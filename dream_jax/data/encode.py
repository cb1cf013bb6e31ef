"""Rows to token arrays, and which rows fit.

Knows the order prompt, response, end token, padding. Does not know batches, time or masks: what is masked is
drawn by the objective.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dream_jax.data.rows import Row, Source
from dream_jax.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """One row as arrays of max_length T.

    tokens: int32 [T], prompt + response + one end token, then pad ids.
    maskable: bool [T], False exactly on the prompt. Pads are attended, maskable and learned: that is how the
    model learns to stop.
    prompt_length: tokens of the prompt. length: tokens before the padding, end token included.
    """

    tokens: np.ndarray
    maskable: np.ndarray
    prompt_length: int
    length: int


@dataclass(frozen=True, kw_only=True)
class LengthReport:
    """How the rows of a source fit into max_length tokens; lengths include the end token.

    total: rows of the source. measured: rows that were tokenised to learn this; the other numbers speak of
    `measured` rows only, unless the source promises that all its rows have one length.
    digest: of the tokens of the measured rows, in order; another text or tokenizer has another.
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

    def __str__(self) -> str:
        of = "" if self.kept + self.dropped == self.total else f" of {self.measured} measured"
        return (
            f"{self.kept} rows kept, {self.dropped} dropped{of} ({self.total} in all) "
            f"at max_length {self.max_length}; "
            f"tokens: shortest {self.shortest}, mean {self.mean:.1f}, longest {self.longest}"
        )


def encode_row(row: Row, tokenizer: Tokenizer, max_length: int) -> EncodedRow | None:
    """The arrays of a row, or None if it has more than max_length tokens (policy `filter`: nothing is cut).

    Prompt and response are tokenised apart, so that no token straddles them; text in either never becomes a
    special token.
    Raises: ValueError for a prompt without a token: position 0 has no left neighbour to be predicted from, so
    it must be prompt.
    """
    prompt, response = _token_lists(row, tokenizer)
    start, length = len(prompt), len(prompt) + len(response)
    if length > max_length:
        return None
    tokens = np.full(max_length, tokenizer.pad_id, dtype=np.int32)
    tokens[:start] = prompt
    tokens[start:length] = response
    maskable = np.ones(max_length, dtype=np.bool_)
    maskable[:start] = False
    return EncodedRow(tokens=tokens, maskable=maskable, prompt_length=start, length=length)


def length_report(source: Source, tokenizer: Tokenizer, max_length: int, limit: int | None = None) -> LengthReport:
    """Tokenise the rows of `source`, or `limit` of them evenly spread, and say how many fit.

    Where the source promises one length, only the first row is tokenised.
    Raises: ValueError when no row fits, with the shortest, the longest and what to do; or for no rows.
    """
    total = _check_not_empty(source)
    if limit is not None and limit < 1:
        raise ValueError(f"{limit=} must be at least 1, or None for all rows")
    count = total if limit is None else min(limit, total)
    numbers: Sequence[int] = np.linspace(0, total - 1, count).astype(int).tolist() if count < total else range(total)
    if source.uniform_length:
        numbers = range(1)
    return _report(*_measure(source, tokenizer, numbers), total, max_length, uniform=source.uniform_length)


def fitting_rows(source: Source, tokenizer: Tokenizer, max_length: int) -> tuple[np.ndarray | range, LengthReport]:
    """Numbers of the rows with at most max_length tokens, ascending, and the report.

    All rows are tokenised, or only the first where the source promises one length.
    Raises: as `length_report`.
    """
    total = _check_not_empty(source)
    numbers = range(1) if source.uniform_length else range(total)
    lengths, digest = _measure(source, tokenizer, numbers)
    report = _report(lengths, digest, total, max_length, uniform=source.uniform_length)
    # Neither a range nor an array takes the memory that a list of a million numbers would.
    rows = range(total) if report.dropped == 0 else np.flatnonzero(lengths <= max_length)
    return rows, report


def _token_lists(row: Row, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    prompt = tokenizer.encode(row.prompt) if isinstance(row.prompt, str) else tokenizer.chat(row.prompt)
    if not prompt:
        raise ValueError(
            f"a row with an empty prompt (response {row.response!r:.60}, {dict(row.meta)}): give it at least one token"
        )
    response = tokenizer.encode(row.response)
    response.append(tokenizer.eos_id)
    return prompt, response


def _check_not_empty(source: Source) -> int:
    if len(source) == 0:
        raise ValueError("the source has no rows")
    return len(source)


def _measure(source: Source, tokenizer: Tokenizer, numbers: Sequence[int]) -> tuple[np.ndarray, str]:
    """Tokens of each of these rows, int64 [n], and a digest of them all."""
    lengths, digest = np.empty(len(numbers), dtype=np.int64), hashlib.blake2b(digest_size=8)
    for place, number in enumerate(numbers):
        tokens = _token_lists(source[number], tokenizer)
        lengths[place] = sum(map(len, tokens))
        for part in tokens:
            digest.update(np.array([len(part), *part], dtype=np.int32).tobytes())
    return lengths, digest.hexdigest()


def _report(lengths: np.ndarray, digest: str, total: int, max_length: int, *, uniform: bool) -> LengthReport:
    shortest, longest, mean = int(lengths.min()), int(lengths.max()), float(lengths.mean())
    fit = int((lengths <= max_length).sum())
    if fit == 0:
        raise ValueError(
            f"no row fits into {max_length=}: of {len(lengths)} measured the shortest has {shortest} tokens, "
            f"the longest {longest}; raise max_length to {shortest} at the least, {longest} to keep all"
        )
    measured = total if uniform else len(lengths)
    kept = total if uniform else fit
    return LengthReport(
        max_length=max_length,
        total=total,
        measured=len(lengths),
        kept=kept,
        dropped=measured - kept,
        shortest=shortest,
        longest=longest,
        mean=mean,
        digest=digest,
    )
