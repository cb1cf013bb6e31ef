"""The judge of task `chat`: your own questions, each with texts that a good answer must or must not contain.

A row has `question` or `messages`, and one or more of: `contains`, texts that must all occur in the answer; `any_of`,
texts of which at least one must occur; `excludes`, texts that must not occur; `matches`, a regular expression that must
be found. Texts are compared without regard to case, and any run of spaces counts as one space.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from dream_jax.evaluation.problems import Verdict

EXPECTATIONS = ("contains", "any_of", "excludes", "matches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expectation:
    """The texts that an answer must and must not contain; the docstring of the module explains the fields."""

    contains: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    matches: re.Pattern[str] | None = None

    def __call__(self, answer: str) -> Verdict:
        """Judges an answer. An empty answer is always wrong, also if the only condition is `excludes`."""
        text = _plain(answer)

        def verdict(reason: str, correct: bool = False) -> Verdict:
            return Verdict(correct=correct, found=answer.strip() or None, reason=reason)

        if not text:
            return verdict("the answer is empty")
        for wanted in self.contains:
            if _plain(wanted) not in text:
                return verdict(f"does not contain {wanted!r}")
        if self.any_of and not any(_plain(wanted) in text for wanted in self.any_of):
            return verdict(f"contains none of {list(self.any_of)}")
        for unwanted in self.excludes:
            if _plain(unwanted) in text:
                return verdict(f"contains {unwanted!r}")
        if self.matches is not None and not self.matches.search(answer):
            return verdict(f"does not match {self.matches.pattern!r}")
        return verdict("as expected", correct=True)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def parse_expectation(found: Mapping[str, Any], where: str) -> Expectation:
    """Returns the expectation of one row. Raises ValueError, which begins with `where`, if it is missing or invalid."""
    given: dict[str, Any] = {}
    for name in ("contains", "any_of", "excludes"):
        if name not in found:
            continue
        value = found[name]
        texts = [value] if isinstance(value, str) else value
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(text, str) and text.strip() for text in texts)
        ):
            raise ValueError(
                f"{where}: {name!r} must be a text or a list of texts, none of them blank, not {value!r:.60}"
            )
        given[name] = tuple(texts)
    if "matches" in found:
        if not isinstance(found["matches"], str) or not found["matches"]:
            raise ValueError(f"{where}: 'matches' must be a regular expression, not {found['matches']!r:.60}")
        try:
            given["matches"] = re.compile(found["matches"])
        except re.error as error:
            raise ValueError(f"{where}: 'matches' is not a valid regular expression: {error}") from error
    if not given:
        raise ValueError(f"{where}: the row has no condition for a good answer; give one of {list(EXPECTATIONS)}")
    return Expectation(**given)
