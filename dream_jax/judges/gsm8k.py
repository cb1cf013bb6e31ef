r"""The judge of GSM8K: compares the number with which an answer concludes with the number of the reference answer.

`conclusions` finds the number. The verdict is "undecided" if the reference is only one of several numbers that the
author may have meant, or if the answer ends in a computation without its result. An undecided verdict counts as not
correct, and the report says how many verdicts are undecided.
"""

from __future__ import annotations

import re
from fractions import Fraction

from dream_jax.judges.conclusions import conclude
from dream_jax.judges.numerals import CURRENCY, MAX_DIGITS, plain
from dream_jax.judges.verdict import Verdict

_STRICT = re.compile(
    rf"(?P<minus>-)?[{CURRENCY}]?(?P<minus2>-)?(?P<digits>(?:[0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]{{1,{MAX_DIGITS}}})"
    rf"(?:\.[0-9]{{1,{MAX_DIGITS}}})?|\.[0-9]{{1,{MAX_DIGITS}}})"
)
_STRICT_FRACTION = re.compile(rf"(-?[0-9]{{1,{MAX_DIGITS}}}) ?/ ?([0-9]{{1,{MAX_DIGITS}}})")


def to_number(text: str) -> Fraction | None:
    """Returns the value of a text that is one number, or None for any other text.

    The number is a fraction of two integers ("-3/4"), or a decimal number, which may have a currency sign and commas
    between thousands ("$1,200.50"). A per cent sign and a full stop at the end are ignored: "50%" is 50. The result is
    also None for numbers with too many digits (`MAX_DIGITS`) and for a division by zero.
    """
    text = plain(text[: 4 * MAX_DIGITS]).strip().rstrip(".").rstrip("%").strip()
    if fraction := _STRICT_FRACTION.fullmatch(text):
        return Fraction(int(fraction[1]), int(fraction[2])) if int(fraction[2]) else None
    found = _STRICT.fullmatch(text)
    if found is None or len(found["digits"]) > 2 * MAX_DIGITS:
        return None
    return Fraction(found["digits"].replace(",", "")) * (-1 if found["minus"] or found["minus2"] else 1)


def expected_number(answer: str, where: str) -> Fraction:
    """Returns the number after "####" in a reference answer.

    Raises: ValueError, which begins with `where`, if there is no such number.
    """
    after = answer.rpartition("####")[2]
    value = to_number(after) if "####" in answer and len(after) <= 4 * MAX_DIGITS else None
    if value is None:
        raise ValueError(f'{where}: the answer does not end with "#### NUMBER": {answer[-40:]!r}')
    return value


def final_number(answer: str) -> tuple[Fraction, str] | None:
    """Returns the number with which an answer concludes, and a text that says where the number was found.

    The result is None if the answer has no number, or if it is not sure which number is the conclusion.
    """
    found = conclude(answer)
    return None if found is None or found.value is None else (found.value, found.how)


def judge_number(expected: Fraction, answer: str) -> Verdict:
    """Judges whether an answer concludes with exactly `expected`; 18, 18.00 and $18 are equal. It never raises."""
    found = conclude(answer)
    if found is None or not (found.readings or found.unfinished):
        return Verdict(correct=False, found=None, reason="no number in the answer")
    shown = None if found.value is None else _shown(found.value)
    if found.value == expected:
        return Verdict(correct=True, found=shown, reason=found.how)
    if expected in found.others or (found.unfinished and found.value is None):
        why = f"{found.how}, but not sure: the reference is one of several numbers that may be meant"
        return Verdict(correct=False, found=shown, reason=why, decided=False)
    return Verdict(correct=False, found=shown, reason=found.how)


def _shown(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):g}"
