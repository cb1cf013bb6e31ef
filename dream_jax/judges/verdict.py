"""The types of a judge: a function from the text of an answer to a verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of judging one answer.

    Attributes:
      correct: whether the answer is correct.
      found: the part of the answer that was judged, or None if the answer has no such part.
      reason: why the answer is wrong, how the judged part was found, or why the judge is not sure; a text for people.
      decided: whether the judge is sure. A verdict that is not decided is never correct, and the report counts it.
    """

    correct: bool
    found: str | None
    reason: str
    decided: bool = True

    def __post_init__(self) -> None:
        if self.correct and not self.decided:
            raise ValueError("a verdict cannot be correct and undecided")


Judge = Callable[[str], Verdict]
"""Function from the text of an answer, up to its first end-of-text token, to a Verdict.

It never raises, whatever the text is, and its time is linear in the length of the text, or limited by a deadline.
"""
