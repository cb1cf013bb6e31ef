"""The judge of GSM8K: finds the final number of an answer in words, and compares it with the reference."""

from __future__ import annotations

import re
from fractions import Fraction

from dream_jax.evaluation.problems import Verdict

# Digits with or without thousands separators (a comma, or "{,}" and "\," in LaTeX), and then decimals. A group after a
# separator has three digits, so "1,2,3" is three numbers.
_DIGITS = r"(?:[0-9]{1,3}(?:(?:,|\{,\}|\\,)[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
# A minus is a sign only if no number or word stands before it: 5-3 ends in 3, not in -3. A minus with a space after it
# is a subtraction or the bullet of a list. The minus may stand before or after a currency sign.
_NUMBER = re.compile(
    r"(?<![\w.])(?<![0-9] )(?P<minus>[-\u2212])?(?:\\?[$\u20ac\u00a3])?(?P<minus2>[-\u2212])?"
    rf"(?P<digits>{_DIGITS}|\.[0-9]+)|(?P<plain>{_DIGITS})"
)
_FRACTION = re.compile(
    r"(?P<sign>-?)\s*(?:\\[dt]?frac\{(-?[0-9]+)\}\{([0-9]+)\}|([0-9]+)\s*/\s*([0-9]+))(?![0-9]|\.[0-9])"
)
_ANNOUNCED = re.compile(r"\banswer\b(?:[^.\n0-9]{0,40}?\b(?:is|be|comes to)\b|[\s*_]*[:=])", re.IGNORECASE)
_LONGEST = 100_000  # Only this many characters at the end of an answer are searched.


def to_number(text: str) -> Fraction | None:
    """Returns the value of a text that is one number, or None for any other text.

    The number may be a fraction, and may have a currency sign, thousands separators, a per cent sign and a full stop.
    """
    text = text.strip().rstrip(".").rstrip("%\\").strip()
    fraction = _FRACTION.fullmatch(text)
    if fraction:
        return _fraction_value(fraction)
    found = _NUMBER.fullmatch(text)
    return None if found is None else _value(found)


def _value(found: re.Match[str]) -> Fraction:
    digits = re.sub(r"[{}\\,]", "", found["digits"] or found["plain"])
    return Fraction(digits) * (-1 if found["minus"] or found["minus2"] else 1)


def _fraction_value(found: re.Match[str]) -> Fraction | None:
    top, bottom = int(found[2] or found[4]), int(found[3] or found[5])
    return None if bottom == 0 else Fraction(top, bottom) * (-1 if found["sign"] else 1)


def _first_number(text: str) -> Fraction | None:
    """Returns the first number of the first sentence, or that after its last "=" if it has one ("3 * 4 = 12")."""
    sentence = re.split(r"\n|\.\s", text.lstrip(), maxsplit=1)[0].rpartition("=")[2]
    numbers = _NUMBER.search(sentence)
    fraction = _FRACTION.search(sentence)
    if fraction and numbers and fraction.start() <= numbers.start():
        return _fraction_value(fraction)
    return None if numbers is None else _value(numbers)


def final_number(answer: str) -> tuple[Fraction, str] | None:
    r"""Returns the final number of an answer and a text that says where it was found; None if there is no number.

    The first of these places that has a number counts: after the last "####", in the last `\boxed{...}`, after the last
    "answer is" or "answer:", and otherwise the last number of the text.
    """
    text = answer[-_LONGEST:]
    if "####" in text and (value := _first_number(text.rpartition("####")[2])) is not None:
        return value, "after ####"
    if "\\boxed{" in text and (value := _first_number(_braced(text.rpartition("\\boxed{")[2]))) is not None:
        return value, "in a box"
    # Only an announcement with a number counts: in "The answer is 5. That answer is right." it is the first.
    for announced in reversed(list(_ANNOUNCED.finditer(text))):
        if (value := _first_number(text[announced.end() :])) is not None:
            return value, "announced as the answer"
    numbers = list(_NUMBER.finditer(text))
    return (_value(numbers[-1]), "the last number") if numbers else None


def _braced(text: str) -> str:
    """Returns `text` up to the brace that closes the group whose opening brace stands just before `text`."""
    depth = 1
    for at, sign in enumerate(text):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return text[:at]
    return text


def judge_number(expected: Fraction, answer: str) -> Verdict:
    """Judges whether the final number of `answer` is exactly `expected`; 18, 18.00 and $18 are equal."""
    found = final_number(answer)
    if found is None:
        return Verdict(correct=False, found=None, reason="no number in the answer")
    value, how = found
    shown = str(value.numerator) if value.denominator == 1 else f"{float(value):g}"
    return Verdict(correct=value == expected, found=shown, reason=how)


def expected_number(answer: str, where: str) -> Fraction:
    """Returns the number after "####" in a reference answer.

    Raises: ValueError, which begins with `where`, if there is no such number.
    """
    value = to_number(answer.rpartition("####")[2]) if "####" in answer else None
    if value is None:
        raise ValueError(f'{where}: the answer does not end with "#### NUMBER": {answer[-40:]!r}')
    return value
