"""What a problem of an evaluation is: a question, perhaps a model answer, and a judge of answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dream_jax.tokenizer import Message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a judge says of one answer.

    Attributes:
      correct: whether it counts.
      found: the part of the answer that was judged, or None when there was none to judge.
      reason: why it is wrong, or how the judged part was found; for people.
    """

    correct: bool
    found: str | None
    reason: str


Judge = Callable[[str], Verdict]
"""Judges the text of an answer, which ends before the first end-of-text token. Never raises."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One row of a task.

    Attributes:
      number: its line in the file (or its index in a generated set), from 1.
      where: what complaints about it begin with.
      question: text, or the messages of a chat.
      answer: a right answer as text, for examples in a prompt; empty where there is none.
      judge: of answers.
    """

    number: int
    where: str
    question: str | tuple[Message, ...]
    answer: str
    judge: Judge

    @property
    def identity(self) -> str:
        """16 hexadecimal digits that depend on question and answer alone: by them two runs know the same problem."""
        question = self.question if isinstance(self.question, str) else [dict(turn) for turn in self.question]
        return identify(question, self.answer)


def identify(*parts: Any) -> str:
    """16 hexadecimal digits that depend on what JSON can say of `parts`, and on nothing else."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()


def line_number(where: str) -> int:
    """The line in the "FILE:LINE" of `read_json_lines`."""
    return int(where.rpartition(":")[2])


def check_fields(found: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raises ValueError, opening with `where`, for a field that no reader looks at: a misspelt name is not ignored."""
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown field(s) {unknown}; this task knows {sorted(known)}")
