"""The chat probe: questions of one's own, with what a good answer contains.

A row has `question` (or `messages`) and one or more of: `contains`, texts that all must occur; `any_of`, texts of which
one must; `excludes`, texts that must not; `matches`, a regular expression that must be found. Texts are compared
without regard to case and to runs of space.
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
    """What an answer must and must not contain; see the module."""

    contains: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    matches: re.Pattern[str] | None = None

    def __call__(self, answer: str) -> Verdict:
        """Judges an answer. An empty one is wrong even where nothing is asked but absences."""
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
    """The expectation of one row. Raises ValueError, opening with `where`, for one that is missing or bad."""
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
            raise ValueError(f"{where}: 'matches' is no regular expression: {error}") from error
    if not given:
        raise ValueError(f"{where}: nothing says what a good answer is; give one of {list(EXPECTATIONS)}")
    return Expectation(**given)
