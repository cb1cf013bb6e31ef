r"""Finds the number with which an answer in words concludes.

A model may announce its conclusion: after "####", in `\boxed{...}`, after "the answer is" or after "Answer:". The last
announcement with a number counts. A worked solution may follow "Answer:"; then the conclusion of that solution counts.
Without an announcement, the conclusion is in the last sentence that has a number and is neither a question nor a check.

Often a text allows more than one reading: "18 or 20", "70.000", a sentence with several numbers, a correction after an
announcement. A `Conclusion` then has all of them. Text that a model writes after its answer as another turn
("Question:", "User:") is ignored. The time is linear in the length of the text, of which only the end is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

from dream_jax.judges.numerals import plain, spelt_numbers
from dream_jax.judges.sentences import (
    EQUALS,
    RESULT,
    Conclusion,
    find_terms,
    stated_after_announcement,
    stated_in_prose,
)

_LONGEST = 100_000  # Only this many characters at the end of an answer are read.
_LONGEST_SENTENCE = 400  # Only this many characters of a sentence are read after an announcement.

# A full stop ends a sentence, but the full stop of an abbreviation does not.
_SENTENCE_END = re.compile(
    r"\n|(?<=[.!?])(?<!\bi\.e\.)(?<!\be\.g\.)(?<!\bapprox\.)(?<!\bRs\.)(?<!\bNo\.)[\"')\]*]*\s|(?<=[.!?])$"
)
# A bullet, a number or a heading at the beginning of a sentence. Possessive repetitions (++ and *+) never give back the
# spaces that they took, so the time is linear.
_MARKER = re.compile(
    r"^\s*+(?:(?:[-*+>\u2022]|\(?[0-9]{1,2}[.)]|[a-z][.)]|#{1,6})\s++|step [0-9]{1,3}\b[.:]?)+(?=\s*+\S)", re.I
)
# The beginning of a sentence that checks or comments on a result.
_CHECK = re.compile(
    r"\W*(?:check|verif|to (?:check|verify|confirm)|double[- ]check|let(?:'s| me| us) (?:check|verify)|"
    r"proof|note|confidence|p\.?s\.?\b|we can (?:check|verify)|explanation:)",
    re.IGNORECASE,
)


def _sentences(text: str) -> list[str]:
    """Returns the sentences and lines of a text that are not blank."""
    return [one for one in _SENTENCE_END.split(text) if one and not one.isspace()]


def _unmarked(sentence: str) -> str:
    """Returns a sentence without the bullet, number or "Step 2:" at its beginning."""
    return _MARKER.sub("", sentence, count=1)


def _last_sentence(text: str, how: str) -> Conclusion | None:
    """Returns the conclusion of the last sentence with a number that is neither a question nor a check.

    Args:
      text: the text, as `numerals.plain` returns it.
      how: a description for `Conclusion.how`.

    Returns:
      The conclusion; None if there is no such sentence.
    """
    spelt: list[tuple[Fraction, bool]] = []  # numbers in words; true for one after a word such as "makes"
    for sentence in reversed(_sentences(text)):
        sentence = _unmarked(sentence)
        if sentence.rstrip(" *\"')").endswith("?") or _CHECK.match(sentence) or _denies(sentence):
            continue
        found = stated_in_prose(sentence[-_LONGEST_SENTENCE * 10 :], how)
        if found is not None:
            if spelt:  # A later sentence has a number in words.
                return Conclusion(value=None, others=found.readings | {value for value, _ in spelt}, how=how)
            return found
        for word in spelt_numbers(sentence[-_LONGEST_SENTENCE:]):
            result = RESULT.search(sentence[-_LONGEST_SENTENCE:][: word.start][-60:]) is not None
            if word.value is not None and (word.value > 3 or result or not sentence[: word.start].strip()):
                spelt.append((word.value, result))
    if not spelt:
        return None
    values = frozenset(value for value, _ in spelt)
    if len(spelt) == 1 and spelt[0][1] and spelt[0][0] > 3:  # "She makes eighteen dollars."
        return Conclusion(value=spelt[0][0], how="only in words")
    return Conclusion(value=None, others=values, how="only in words")


_TURN = re.compile(
    r"<\|(?:im_end|im_start|endoftext|eot_id|end|user)\|>|</s>|"
    r"\n[ *#]{0,6}(?:question|user|human|q|instruction|problem|prompt)[ *]{0,3}[0-9]{0,3}[ *]{0,3}:",
    re.IGNORECASE,
)
# Kinds of announcements: "####", a box, a heading "Final Answer", "the answer is not", "the answer is", and "Answer:".
_ANNOUNCEMENT = re.compile(
    r"(?P<mark>####)"
    r"|(?P<box>\\?\b(?:boxed|fbox) ?(?=[{0-9$]))"
    r"|(?P<head>^#{1,6} ?[^\n0-9:]{0,40}\banswer\b[^\n0-9:]{0,20}:?$|^(?:the )?final answer\W{0,3}$)"
    r"|(?P<not>\banswer\b[^.\n0-9=:?]{0,40}?\b(?:is not|isn't|is n't|was not|cannot be|can't be|is no longer)\b)"
    r"|(?P<is>\banswer\b(?:[^.\n0-9=:?]{0,40}?\b(?:is|be|was|comes to|equals)\b:?|[\"'\s]{0,3}=))"
    r"|(?P<label>\b(?:answer|final result)\b[\"'\s*_]{0,4}:|^\W{0,4}(?:answer|result|a)[*_ ]{0,3}(?::|[-\u2013] ))",
    re.IGNORECASE | re.MULTILINE,
)
_CONDITION = re.compile(r"\b(?:if|whether|suppose|assuming|when|unless|why)\b[^.\n]{0,30}$", re.IGNORECASE)
_INSTEAD = re.compile(r"\b(?:but|it is|it's|instead|rather)\b", re.IGNORECASE)
_DENIAL = re.compile(r"\banswer\b[^.\n0-9=:?]{0,40}?\b(?:is|was|can) ?(?:not\b|n't\b)", re.IGNORECASE)
_HEADING = re.compile(r"\s*(?:[0-9]{1,2}[.)]\s+\S|step\b)", re.IGNORECASE)
_CORRECTION = re.compile(
    r"\b(?:wait|actually|correction|sorry|mistake|oops|hold on|let me re|i was wrong|that is wrong|that's wrong|no,)",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Announcement:
    """The beginning of an announcement, its kind (the name of a group in `_ANNOUNCEMENT`), and where its text ends."""

    kind: str
    start: int
    end: int
    stop: int


def _denies(sentence: str) -> bool:
    """Returns whether a sentence only says that something is not the answer ("The answer is not 5.")."""
    denial = _DENIAL.search(sentence)
    return denial is not None and not _INSTEAD.search(sentence, denial.end())


def _announcements(text: str) -> list[_Announcement]:
    """Returns all announcements of a text in their order; the text of each ends where the next one begins."""
    found = list(_ANNOUNCEMENT.finditer(text))
    stops = [*(one.start() for one in found), len(text)][1:]
    return [
        _Announcement(kind=str(one.lastgroup), start=one.start(), end=one.end(), stop=stop)
        for one, stop in zip(found, stops, strict=True)
    ]


def _first_sentence(text: str) -> str:
    """Returns the first sentence of a text, without marks before it; empty if there is none."""
    text = text.lstrip(" \n\t:*>\"'")[:_LONGEST_SENTENCE]
    return next(iter(_sentences(text)), "")


def _announced(text: str, one: _Announcement, boxes: Sequence[_Announcement]) -> Conclusion | None:
    """Returns the conclusion of one announcement; None if no number follows it, or if it does not announce a number.

    `boxes` are all announcements of the text that are boxes, up to this one.
    """
    after = text[one.end : one.stop]
    if one.kind == "mark":
        line = after[:_LONGEST_SENTENCE].lstrip().partition("\n")[0]
        if _HEADING.match(line) or (line[:1].isalpha() and "=" not in line and not find_terms(line[:4])):
            return None  # A heading of Markdown has such marks too.
        return stated_after_announcement(line, "after ####")
    if one.kind == "box":
        found = stated_after_announcement(_braced(after), "in a box")
        return None if found is None else _with_neighbours(text, one, boxes, found)
    if _CONDITION.search(text[max(0, one.start - 60) : one.start]):
        return None
    if one.kind == "head":
        return _worked(after, "announced as the answer")
    sentence = _first_sentence(after)
    if sentence.rstrip(" *\"')").endswith("?"):
        return None
    if one.kind == "not":
        instead = _INSTEAD.search(sentence)
        return (
            None if instead is None else stated_after_announcement(sentence[instead.end() :], "announced as the answer")
        )
    if one.kind == "is":
        return stated_after_announcement(sentence, "announced as the answer")
    return _worked(after, "announced as the answer")


def _braced(text: str) -> str:
    """Returns the content of the group with which a text begins, without braces; its first line if it is not closed.

    If the text does not begin with a brace, the result is its first word.
    """
    text = text[:_LONGEST_SENTENCE]
    depth, end = 0, len(text.partition("\n")[0])
    if not text.startswith("{"):
        return re.split(r"\s", text, maxsplit=1)[0]
    for at, sign in enumerate(text):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            end = at
            break
    return re.sub(r"[{}\n]", " ", text[:end])


def _with_neighbours(text: str, one: _Announcement, boxes: Sequence[_Announcement], found: Conclusion) -> Conclusion:
    """Returns the conclusion of a box, together with those of the boxes before it in the same sentence."""
    others: frozenset[Fraction] = frozenset()
    for box in reversed(boxes[-8:]):
        if box.start >= one.start:
            continue
        between = text[box.end : one.start][-_LONGEST_SENTENCE:]
        if re.search(r"[.;!?]\s|\n", between) or len(between) >= _LONGEST_SENTENCE or not between.count("}"):
            break
        neighbour = stated_after_announcement(_braced(text[box.end : box.stop]), "in a box")
        if neighbour is not None:
            others |= neighbour.readings
    if others <= found.readings:
        return found
    return Conclusion(value=None, others=found.readings | others, how="in several boxes")


_BRACKETS = re.compile(r" \([^()]*\)")


def _worked(after: str, how: str) -> Conclusion | None:
    """Returns the conclusion of what follows "Answer:", which may be a number or a worked solution."""
    after = after.lstrip(" \n\t*>")
    line, _, rest = after.partition("\n")
    sentences = _sentences(line[:_LONGEST_SENTENCE])
    first = _unmarked(sentences[0]) if sentences else ""
    direct = stated_after_announcement(first, how) if first and not re.match(r"\s*[0-9]{1,2}[.)]\s", line) else None
    phrase = _BRACKETS.sub("", first)
    before = phrase[: terms[0].start] if (terms := find_terms(phrase)) else ""
    begins = len(before.split()) <= 1 and not before.rstrip().endswith(":")  # "Monday: 3" begins a solution
    short = len(phrase.split()) <= 6 and begins and not EQUALS.search(phrase)
    if direct is not None and short and len(sentences) == 1 and (not rest.strip() or rest.startswith("\n")):
        return direct
    if direct is not None and short and len(sentences) == 1 and _CHECK.match(rest):
        return direct
    concluded = _last_sentence(after, how)
    if direct is None or not short or concluded is None or concluded.readings == direct.readings:
        return direct if concluded is None else concluded
    return Conclusion(value=None, others=direct.readings | concluded.readings, how=how)


_REASONED = re.compile(r"</reasoning>|<\|im_start\|>answer\n")


def _turns(text: str) -> Iterator[str]:
    """Yields the parts of a text between the beginnings of turns such as "Question:"; blank parts are left out."""
    begin = 0
    for found in _TURN.finditer(text):
        if text[begin : found.start()].strip():
            yield text[begin : found.start()]
        begin = found.end()
    if text[begin:].strip():
        yield text[begin:]


def conclude(answer: str) -> Conclusion | None:
    """Returns the conclusion of an answer; None if it has no number outside of questions and checks ("Is it 5?")."""
    text = answer[-_LONGEST:].rpartition("</think>")[2]
    # In the formats of d1 and s1 the answer begins after the reasoning, which may have announced and boxed other numbers.
    reasoned = _REASONED.search(text)
    text = plain(text if reasoned is None else text[reasoned.end() :])
    # If the part after the reasoning has no digit, the whole text is read.
    text = text if any(sign.isdigit() for sign in text) else plain(answer[-_LONGEST:])
    parts = list(_turns(text.strip()))
    for part in parts:
        announcements = _announcements(part)
        boxes = [one for one in announcements if one.kind == "box"]
        while announcements:
            one = announcements.pop()
            found = _announced(part, one, boxes)
            if one.kind == "box":
                boxes.pop()
            if found is not None:
                return _corrected(part[one.end :], found)
    stated = [found for part in parts if (found := _last_sentence(part, "the last number")) is not None]
    if len(stated) > 1:
        return Conclusion(
            value=None, others=frozenset().union(*(one.readings for one in stated)), how="in several turns"
        )
    return stated[0] if stated else None


def _corrected(after: str, found: Conclusion) -> Conclusion:
    """Returns the conclusion `found`. If a correction with another number follows, its value becomes None."""
    correction = _CORRECTION.search(after)
    later = None if correction is None else _last_sentence(after[correction.end() :], found.how)
    if later is None or later.readings <= found.readings:
        return found
    return Conclusion(value=None, others=found.readings | later.readings, how="corrected later")
