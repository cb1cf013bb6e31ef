"""Reads an answer from a row that is being denoised: only text whose whole prefix is written, at whole characters."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from dream_jax import inference
from dream_jax.serving.tasks import Finish, Gap, RowView, Task, TokenNote, Update
from dream_jax.tokenizer import Tokenizer

_PART_OF_CHARACTER = "\ufffd"


@dataclasses.dataclass
class _GapText:
    """What can be read of a gap.

    Attributes:
      ids: tokens from the start of the gap to its first end token (`inference.end_ids`) or mask token.
      text: their text. While the gap is open, a last character that may be incomplete is left out.
      closed: whether the text can change no more.
      ended: whether an end token closed the gap.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    closed: bool = False
    ended: bool = False


class AnswerReader:
    """Turns the states of a row into updates for the client.

    Tokens that are written never change, so text can be sent as soon as all positions before it are written.

    Args:
      task: the task of the row.
      tokenizer: the tokenizer of the model.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer):
        self._task, self._tokenizer = task, tokenizer
        self._ends = inference.end_ids(tokenizer)
        self._gaps = [_GapText() for _ in task.gaps]
        self._sent = 0  # number of characters that were sent
        self._told = 0  # number of tokens of the gap whose logprobs were sent
        self._in_gap = np.zeros(task.length, bool)
        for gap in task.gaps:
            self._in_gap[gap.start : gap.end] = True
        self._written = np.zeros(task.length, bool)

    def read(self, row: RowView) -> Update:
        """Returns what has changed since the last call."""
        for gap, found in zip(self._task.gaps, self._gaps, strict=True):
            self._read_gap(gap, found, row.tokens)
        text, closed = self._readable()
        finish: Finish | None = None
        num_tokens = sum(len(found.ids) for found in self._gaps)
        stop = first_stop(text, self._task.stop)
        if stop is not None:
            num_tokens = self._tokens_up_to(stop[1])
            text, finish = text[: stop[0]], "stop"
        elif closed:
            finish = "stop" if any(found.ended for found in self._gaps) else "length"
        else:
            text = text[: len(text) - held_back(text, self._task.stop)]
        if finish is None and not self._task.streams:
            return Update(passes=row.passes, num_tokens=num_tokens)
        new, self._sent = text[self._sent :], max(self._sent, len(text))
        return Update(
            text=new,
            tokens=tuple(self._text_tokens(row, len(text), num_tokens, finish)) if self._task.has_logprobs else (),
            written=tuple(self._new_tokens(row)) if self._task.tells_tokens else (),
            passes=row.passes,
            finish=finish,
            num_tokens=num_tokens,
            gap_texts=() if finish is None else tuple(found.text for found in self._gaps),
        )

    def _read_gap(self, gap: Gap, found: _GapText, tokens: np.ndarray) -> None:
        if found.closed:
            return
        ids = tokens[gap.start : gap.end]
        stops = (self._tokenizer.mask_id, *self._ends)  # few, so that this is faster than np.isin
        stopped = np.flatnonzero(np.logical_or.reduce([ids == token for token in stops]))
        count = int(stopped[0]) if stopped.size else gap.length
        found.ended = count < gap.length and int(ids[count]) in self._ends
        found.closed = found.ended or count == gap.length
        if count > len(found.ids) or found.closed:
            found.ids = ids[:count].tolist()
            found.text = self._decode(found.ids, found.closed)

    def _decode(self, ids: Sequence[int], closed: bool) -> str:
        text = self._tokenizer.decode(ids)
        return text if closed else text.rstrip(_PART_OF_CHARACTER)

    def _readable(self) -> tuple[str, bool]:
        """Returns the text up to the first gap that is open, and whether all gaps are closed."""
        gaps, text = iter(self._gaps), ""
        for piece in self._task.pieces:
            if isinstance(piece, str):
                text += piece
                continue
            found = next(gaps)
            text += found.text
            if not found.closed:
                return text, False
        return text, True

    def _tokens_up_to(self, end: int) -> int:
        """Returns the number of tokens with which the text of the only gap reaches `end` characters."""
        ids = self._gaps[0].ids
        return bisect.bisect_left(range(len(ids)), end, key=lambda count: len(self._decode(ids[:count], False)))

    def _text_tokens(self, row: RowView, length: int, num_tokens: int, finish: Finish | None) -> Iterator[TokenNote]:
        """Yields the tokens whose text is within the first `length` characters and that were not told yet."""
        ids, start = self._gaps[0].ids, self._task.gaps[0].start
        while self._told < num_tokens:
            if finish is None and len(self._decode(ids[: self._told + 1], False)) > length:
                return
            yield self._note(row, start + self._told)
            self._told += 1

    def _new_tokens(self, row: RowView) -> Iterator[TokenNote]:
        new = np.flatnonzero(self._in_gap & (row.commit_step >= 0) & ~self._written)
        self._written[new] = True
        for position in new[np.argsort(row.commit_step[new], kind="stable")].tolist():
            yield self._note(row, position)

    def _note(self, row: RowView, position: int) -> TokenNote:
        token, text = int(row.tokens[position]), self._tokenizer.decode([int(row.tokens[position])])
        top: list[tuple[int, str, float]] = []
        if row.top_token is not None and row.top_logprob is not None:
            for other, logprob in zip(
                row.top_token[position].tolist(), row.top_logprob[position].tolist(), strict=True
            ):
                if math.isfinite(logprob):
                    top.append((other, self._tokenizer.decode([other]), logprob))
        return TokenNote(
            position=position,
            token=token,
            text=text,
            step=int(row.commit_step[position]),
            confidence=_finite(row.confidence[position]),
            logprob=None if row.logprob is None else _finite(row.logprob[position]),
            top=top,
        )


def _finite(value: np.floating) -> float | None:
    return float(value) if math.isfinite(value) else None


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """Returns where the stop string that is complete first starts and ends in the text; None if there is none.

    The result does not depend on how much text follows.
    """
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    if not found:
        return None
    end, start = min(found)
    return start, end


def held_back(text: str, stops: Sequence[str]) -> int:
    """Returns how many characters at the end of the text may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
