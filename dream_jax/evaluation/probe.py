"""The judge of task `chat`: your own questions, each with texts that a good answer must or must not contain.

A row has `question` or `messages`, and one or more of: `contains`, texts that must all occur in the answer; `any_of`,
texts of which at least one must occur; `excludes`, texts that must not occur; `matches`, a regular expression that must
be found. Texts are compared without regard to case, and any run of spaces counts as one space. The regular expression is
searched in the unchanged answer, so case and spaces count.

A regular expression is compiled when its file is read. Some expressions take years on some answers, and Python's `re`
cannot be interrupted. So each search runs in a process of its own, with limits of time and memory. If a limit is
reached, the verdict is "undecided".
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from dream_jax.judges.verdict import Verdict

EXPECTATIONS = ("contains", "any_of", "excludes", "matches")

LONGEST_PATTERN = 10_000  # characters
SECONDS = 1  # processor time of a search
_PATIENCE = 10.0  # seconds of wall-clock time, for a machine on which the process gets no processor
_MEMORY = 2**30  # bytes

# The program of the process: reads limits, pattern and text as JSON, and writes whether the pattern was found. Windows
# has no limits of this kind, so there only the wall-clock time is limited.
_SEARCH = """
import json, re, sys
seconds, memory, pattern, text = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
except (ImportError, OSError, ValueError):
    pass
print(json.dumps(re.search(pattern, text) is not None))
"""


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

        def verdict(reason: str, correct: bool = False, decided: bool = True) -> Verdict:
            return Verdict(correct=correct, found=answer.strip() or None, reason=reason, decided=decided)

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
        if self.matches is not None:
            found = search(self.matches.pattern, answer)
            if found is None:
                reason = f"the search for {self.matches.pattern!r:.80} was stopped: it takes too much time or memory"
                return verdict(reason, decided=False)
            if not found:
                return verdict(f"does not match {self.matches.pattern!r}")
        return verdict("as expected", correct=True)


def search(pattern: str, text: str) -> bool | None:
    """Returns whether a regular expression is found in a text; None if the search takes too much time or memory.

    The pattern must compile. The search runs in a process of its own, which has `SECONDS` of processor time.
    """
    asked = json.dumps([SECONDS, _MEMORY, pattern, text])
    # -I and -S: the process imports nothing of the user's and starts in hundredths of a second.
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _SEARCH]
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, encoding="ascii", timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() == "true" if done.returncode == 0 else None


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
        given["matches"] = _compile(found["matches"], where)
    if not given:
        raise ValueError(f"{where}: the row has no condition for a good answer; give one of {list(EXPECTATIONS)}")
    return Expectation(**given)


def _compile(pattern: Any, where: str) -> re.Pattern[str]:
    """Returns the compiled regular expression. Raises ValueError, which begins with `where`, for any that is bad."""
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"{where}: 'matches' must be a regular expression, not {pattern!r:.60}")
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(
            f"{where}: 'matches' has {len(pattern)} characters; a regular expression may have {LONGEST_PATTERN}"
        )
    try:
        with warnings.catch_warnings():
            # Python warns of patterns such as "[[a]" whose meaning may change; they are valid.
            warnings.simplefilter("ignore")
            return re.compile(pattern)
    except RecursionError as error:
        raise ValueError(f"{where}: 'matches' is not a valid regular expression: it is nested too deeply") from error
    except (re.error, ValueError, OverflowError, MemoryError) as error:
        # `re` raises these besides its own: for example OverflowError for a repetition number of 20 digits.
        raise ValueError(f"{where}: 'matches' is not a valid regular expression: {error}") from error
