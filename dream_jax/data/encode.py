"""Rows to tokens, the length policies, and what of a source is left under them.

Knows the order prompt, response, end token, padding. Does not know batches, time or masks: what is masked is
drawn by the objective.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from dream_jax.data.options import EncodeOptions
from dream_jax.data.rows import Mixture, Piece, Row, Source
from dream_jax.tokenizer import Tokenizer, turn_text

Kind = Literal["prompt", "learned", "text", "trace", "mark", "opening", "end"]

TOO_LONG = "longer than max_length"
NO_ROOM = "prompt, answer and end token longer than max_length"
ALL_PROMPT = "prompt alone fills max_length"


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """A row as tokens, cut to its length, before it is laid out.

    tokens: int32 [n], prompt, response and end token; the end may have been cut off.
    learned: bool [n], True on the response, and on earlier turns that are learned too.
    prompt_length: tokens before the response. text_length: of the response without its end token.
    full_length: tokens before the policy cut the row. whole: the answer and its end token are there.
    """

    tokens: np.ndarray
    learned: np.ndarray
    prompt_length: int
    text_length: int
    full_length: int
    whole: bool

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.tokens)

    def lay_out(self, width: int, region: int, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens int32 [width], what may be masked bool [width], what exists bool [width].

        The response takes `region` positions at the end: what is longer is cut, what is shorter is padded, and pads are
        maskable. What the width leaves over lies before the prompt and is hidden: behind the row the weights of the
        loss would count it as context.
        """
        start, end = width - region - self.prompt_length, width - region + min(self.length - self.prompt_length, region)
        tokens = np.full(width, pad_id, dtype=np.int32)
        maskable = np.ones(width, dtype=np.bool_)
        tokens[start:end] = self.tokens[: end - start]
        maskable[:start] = False
        maskable[start:end] = self.learned[: end - start]
        return tokens, maskable, np.arange(width) >= start


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """One row as arrays of max_length T.

    tokens: int32 [T], prompt + response + one end token, then pad ids.
    maskable: bool [T], False exactly on the prompt, but for earlier turns that are learned. Pads are attended,
    maskable and learned: that is how the model learns to stop.
    prompt_length: tokens of the prompt. length: tokens before the padding, end token included.
    """

    tokens: np.ndarray
    maskable: np.ndarray
    prompt_length: int
    length: int


@dataclass(frozen=True, kw_only=True)
class LengthReport:
    """How the rows of a source fit into max_length tokens; lengths are those before any cut, end token included.

    total: rows of the source. measured: rows that were tokenised to learn this; the other numbers speak of
    `measured` rows only, unless the source promises that all its rows have one length.
    reasons: why rows were dropped. cut: rows that were kept but shortened. whole: rows kept with their whole answer and
    its end token.
    bad, filtered: rows that never became part of the source; see `Intake`.
    histogram: rows by tokens, from each power of two up to the next.
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
    cut: int = 0
    whole: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    bad: tuple[str, ...] = ()
    filtered: Mapping[str, int] = field(default_factory=dict)
    histogram: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        of = "" if self.kept + self.dropped == self.total else f" of {self.measured} measured"
        return (
            f"{self.kept} rows kept, {self.dropped} dropped{of} ({self.total} in all) "
            f"at max_length {self.max_length}; "
            f"tokens: shortest {self.shortest}, mean {self.mean:.1f}, longest {self.longest}"
        )

    def plain(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {**asdict(self), "bad": list(self.bad)}

    def lines(self, shown: int = 5) -> list[str]:
        """The report as text; of the bad rows only the first are `shown`."""
        found = [str(self)]
        found += [f"dropped: {count} rows {reason}" for reason, count in self.reasons.items()]
        found += [f"left out by a filter: {count} rows, {reason}" for reason, count in self.filtered.items()]
        found += [f"bad row skipped: {complaint}" for complaint in self.bad[:shown]]
        if len(self.bad) > shown:
            found.append(f"bad rows skipped: {len(self.bad)} in all")
        share = self.whole / self.kept
        found.append(f"answers kept whole, with their end token: {self.whole} of {self.kept} ({share:.1%})")
        if self.cut:
            found.append(f"rows that were shortened: {self.cut} of {self.kept} ({self.cut / self.kept:.1%})")
        if len(self.histogram) > 1:
            found.append("rows by tokens: " + ", ".join(f"{name}: {count}" for name, count in self.histogram.items()))
        return found


class RowLengths(NamedTuple):
    """Tokens of each row that is kept: int64 [n] each.

    prompt; response (what is kept of it, end token included); text (the response without its end token); learned (of
    the prompt); whole (1 where the answer and its end token are there).
    """

    prompt: np.ndarray
    response: np.ndarray
    text: np.ndarray
    learned: np.ndarray
    whole: np.ndarray


def encode_row(
    row: Row, tokenizer: Tokenizer, max_length: int, options: EncodeOptions = EncodeOptions()
) -> EncodedRow | None:
    """The arrays of a row, or None if the length policy drops it.

    Prompt and response are tokenised apart, so that no token straddles them; text in either never becomes a
    special token.
    Raises: ValueError for a prompt without a token: position 0 has no left neighbour to be predicted from, so
    it must be prompt.
    """
    found = token_row(row, tokenizer, max_length, options)
    if isinstance(found, str):
        return None
    tokens, maskable, _ = found.lay_out(max_length, max_length - found.prompt_length, tokenizer.pad_id)
    return EncodedRow(tokens=tokens, maskable=maskable, prompt_length=found.prompt_length, length=found.length)


def token_row(
    row: Row, tokenizer: Tokenizer, max_length: int, options: EncodeOptions = EncodeOptions()
) -> TokenRow | str:
    """The tokens of a row under the length policy, or why it is dropped. Raises as `encode_row` does."""
    return _fit(_token_parts(row, tokenizer, options), max_length, options)


def length_report(
    source: Source,
    tokenizer: Tokenizer,
    max_length: int,
    limit: int | None = None,
    options: EncodeOptions = EncodeOptions(),
) -> LengthReport:
    """Tokenise the rows of `source`, or `limit` of them evenly spread, and say how many fit.

    Where the source promises one length, only the first row is tokenised.
    Raises: ValueError when no row fits, with the shortest, the longest and what to do; or for no rows.
    """
    total = _check_not_empty(source)
    if limit is not None and limit < 1:
        raise ValueError(f"{limit=} must be at least 1, or None for all rows")
    if limit is None or limit >= total or source.uniform_length:
        numbers, stands = _to_measure(source)
    else:
        numbers = np.linspace(0, total - 1, limit).astype(int)
        stands = np.ones(limit, dtype=np.int64)
    return _measure(source, tokenizer, numbers, stands, max_length, options)[2]


def fitting_rows(
    source: Source, tokenizer: Tokenizer, max_length: int, options: EncodeOptions = EncodeOptions()
) -> tuple[np.ndarray | range, RowLengths, LengthReport]:
    """Numbers of the rows that the policy keeps, ascending, their lengths, and the report.

    All rows are tokenised, but only the first of a source, or of a part of a mixture, that promises one length.
    Raises: as `length_report`.
    """
    total = _check_not_empty(source)
    numbers, stands = _to_measure(source)
    kept, lengths, report = _measure(source, tokenizer, numbers, stands, max_length, options)
    if len(numbers) == 1:  # neither a range nor these take the memory that a million numbers would
        return range(total), RowLengths(*(np.broadcast_to(column, total) for column in lengths)), report
    stand = stands[kept]
    lengths = RowLengths(*(np.repeat(column, stand) for column in lengths))
    if report.dropped == 0:
        return range(total), lengths, report
    # Of a measured row that stands for several, these follow it.
    first = np.repeat(np.cumsum(stand) - stand, stand)
    return np.repeat(numbers[kept], stand) + np.arange(len(first)) - first, lengths, report


def _to_measure(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows to tokenise, and for how many rows, from itself on, each of them stands: int64 [n] both."""
    if isinstance(source, Mixture):
        each = [_to_measure(part) for part in source.parts]
        numbers = [part + start for (part, _), start in zip(each, source.starts, strict=False)]
        return np.concatenate(numbers), np.concatenate([stands for _, stands in each])
    if source.uniform_length:
        return np.zeros(1, dtype=np.int64), np.array([len(source)])
    return np.arange(len(source)), np.ones(len(source), dtype=np.int64)


class _Part(NamedTuple):
    kind: Kind
    ids: list[int]


def _token_parts(row: Row, tokenizer: Tokenizer, options: EncodeOptions) -> list[_Part]:
    """The row as tokens, uncut, with the end token."""
    parts = _prompt_parts(row, tokenizer, options)
    if not any(part.ids for part in parts):
        raise ValueError(
            f"a row with an empty prompt (response {row.response!r:.60}, {dict(row.meta)}): give it at least one token"
        )
    for piece in row.pieces or (Piece("text", row.response),):
        if options.length_policy == "answer_only" and piece.kind in ("trace", "opening"):
            continue
        parts.append(_Part(piece.kind, tokenizer.encode(piece.text, piece.kind in ("mark", "opening"))))
    parts.append(_Part("end", [tokenizer.eos_id]))
    return parts


def _prompt_parts(row: Row, tokenizer: Tokenizer, options: EncodeOptions) -> list[_Part]:
    if row.document:
        return [_Part("prompt", [tokenizer.bos_id])]
    if isinstance(row.prompt, str):
        return [_Part("prompt", tokenizer.encode(row.prompt))]
    try:
        whole = tokenizer.chat(row.prompt, tools=row.tools)
        if options.learned_turns == "last":
            return [_Part("prompt", whole)]
        parts, done = list[_Part](), list[int]()
        for index, turn in enumerate(row.prompt):
            if turn["role"] != "assistant" or index == 0:
                continue
            head = tokenizer.chat(row.prompt[:index], tools=row.tools)
            closed = tokenizer.chat(row.prompt[: index + 1], add_generation_prompt=False, tools=row.tools)
            if head[: len(done)] != done or closed[: len(done)] != done:
                raise ValueError("the chat template rewrites earlier turns: learn the last turn only")
            # Apart, like the last response, so that no token straddles what is given and what is learned. What closes
            # the turn is given: the model ends its own answers with end-of-text.
            parts.append(_Part("prompt", head[len(done) :]))
            parts.append(_Part("learned", tokenizer.encode(turn_text(turn))))
            last = len(closed) - 1 - closed[::-1].index(tokenizer.im_end_id)
            parts.append(_Part("prompt", closed[last:]))
            done = closed
        if whole[: len(done)] != done:
            raise ValueError("the chat template rewrites earlier turns: learn the last turn only")
        return [*parts, _Part("prompt", whole[len(done) :])]
    except ValueError as error:
        raise ValueError(f"{row.meta.get('where', 'a row')}: {error}") from error


def _fit(parts: list[_Part], max_length: int, options: EncodeOptions) -> TokenRow | str:
    """The parts joined, cut as the policy says, or why the row is dropped."""
    full = sum(len(part.ids) for part in parts)
    whole = True
    if full > max_length and options.length_policy == "middle" and any(part.kind == "trace" for part in parts):
        surplus = full - max_length
        for place in reversed(range(len(parts))):
            kind, ids = parts[place]
            if kind == "trace" and surplus:
                kept = max(len(ids) - surplus, 0)
                surplus -= len(ids) - kept
                parts = [*parts[:place], _Part(kind, ids[:kept]), *parts[place + 1 :]]
        if surplus:
            return NO_ROOM
    prompt_length = sum(len(part.ids) for part in parts if part.kind in ("prompt", "learned"))
    tokens = np.fromiter((one for part in parts for one in part.ids), dtype=np.int32)
    if len(tokens) > max_length:
        if options.length_policy == "answer_only":
            return NO_ROOM
        if options.length_policy != "right":
            return TOO_LONG
        if prompt_length >= max_length:
            return ALL_PROMPT
        whole = False
    learned = np.repeat([part.kind != "prompt" for part in parts], [len(part.ids) for part in parts])
    text_length = min(len(tokens) - 1, max_length) - prompt_length
    return TokenRow(
        tokens=tokens[:max_length],
        learned=learned[:max_length],
        prompt_length=prompt_length,
        text_length=text_length,
        full_length=full,
        whole=whole,
    )


def _check_not_empty(source: Source) -> int:
    if len(source) == 0:
        raise ValueError("the source has no rows")
    return len(source)


def _measure(
    source: Source,
    tokenizer: Tokenizer,
    numbers: np.ndarray,
    stands: np.ndarray,
    max_length: int,
    options: EncodeOptions,
) -> tuple[np.ndarray, RowLengths, LengthReport]:
    """Of these rows, each of which counts for as many as it `stands` for: which are kept, their lengths, the report."""
    full = np.empty(len(numbers), dtype=np.int64)
    digest, reasons, cut, whole = hashlib.blake2b(digest_size=8), Counter[str](), 0, 0
    kept, lengths = list[int](), list[tuple[int, ...]]()
    for place, (number, stand) in enumerate(zip(numbers.tolist(), stands.tolist(), strict=True)):
        parts = _token_parts(source[number], tokenizer, options)
        full[place] = sum(len(part.ids) for part in parts)
        for part in parts:
            digest.update(np.array([len(part.ids), *part.ids], dtype=np.int32).tobytes())
        found = _fit(parts, max_length, options)
        if isinstance(found, str):
            reasons[found] += stand
            continue
        kept.append(place)
        cut += stand * (found.length < found.full_length)
        whole += stand * found.whole
        start = found.prompt_length
        learned = int(found.learned[:start].sum())
        lengths.append((start, found.length - start, found.text_length, learned, found.whole))
    shortest, longest = int(full.min()), int(full.max())
    if not kept:
        raise ValueError(
            f"no row fits into {max_length=}: of {len(numbers)} measured the shortest has {shortest} tokens, "
            f"the longest {longest}; raise max_length to {shortest} at the least, {longest} to keep all"
        )
    report = LengthReport(
        max_length=max_length,
        total=len(source),
        measured=len(numbers),
        kept=int(stands[kept].sum()),
        dropped=reasons.total(),
        shortest=shortest,
        longest=longest,
        mean=float(np.average(full, weights=stands)),
        digest=digest.hexdigest(),
        cut=cut,
        whole=whole,
        reasons=dict(reasons),
        bad=source.intake.bad,
        filtered=dict(source.intake.filtered),
        histogram=_histogram(full, stands),
    )
    return np.array(kept), RowLengths(*np.array(lengths, dtype=np.int64).T), report


def _histogram(lengths: np.ndarray, stands: np.ndarray) -> dict[str, int]:
    powers = np.floor(np.log2(lengths)).astype(int)
    return {
        f"{2**power} to {2 ** (power + 1) - 1}": int(stands[powers == power].sum())
        for power in range(int(powers.min()), int(powers.max()) + 1)
    }
