"""The types of an evaluation: a problem is a question, its reference answer if there is one, and a judge of answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from dream_jax.judges.verdict import Judge
from dream_jax.tokenizer import Message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem, read from one row of a task's file or generated.

    Attributes:
      number: its line in the file, or its index in a generated set, from 1.
      where: "FILE:LINE" or "generated:NUMBER", with which error messages begin.
      question: a text, or the messages of a chat.
      tools: functions that the prompt announces, as JSON schemas.
      columns: whether the question is the text of a column of the file; then an instruction may be put before it.
      answer: a correct answer as text, for use as a worked example; empty if the file has none.
      judge: function from the text of an answer to a Verdict.
    """

    number: int
    where: str
    question: str | tuple[Message, ...]
    answer: str
    judge: Judge
    tools: tuple[Mapping[str, Any], ...] = ()
    columns: bool = False

    @property
    def identity(self) -> str:
        """16 hexadecimal digits computed from question, tools and answer, by which two runs find the same problem."""
        question = self.question if isinstance(self.question, str) else [dict(turn) for turn in self.question]
        return identify(question, self.answer, *map(dict, self.tools))


def identify(*parts: Any) -> str:
    """Returns 16 hexadecimal digits, a hash of `parts` as JSON; equal values give equal digits in every process."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()


def check_fields(found: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raises ValueError, with a message that begins with `where`, if a field of `found` is not in `known`."""
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise ValueError(
            f"{where}: unknown field(s) {unknown}; this task knows {sorted(known)}; --ignore-field "
            f"{unknown[0].rpartition('.')[2]} leaves one out"
        )
