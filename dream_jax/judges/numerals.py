r"""Finds the numbers in a text as models write it: digits of any script, currencies, fractions, LaTeX and Markdown.

`plain` turns a text into one with ASCII digits and without markup; `numerals` finds the numbers of such a text.

A number may have several readings: "70.000" is 70 for an English reader and 70,000 for others. A `Numeral` has the
reading of the English reader as its `value`, or None if that reader could not be sure, and all further readings as
`others`. Both functions take a time that is linear in the length of the text, and never raise: numbers of more than
`MAX_DIGITS` digits and exponents above `_MAX_EXPONENT` have no value.
"""

from __future__ import annotations

import dataclasses
import html
import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

MAX_DIGITS = 40
_MAX_EXPONENT = 30

CURRENCY = "$\u20ac\u00a3\u00a5\u20b9\u20a9\u20bd\u20ba\u20ab\u0e3f\u00a2"
_GROUP = "\u202f"  # A narrow space; it stands for all spaces that do not break a line.
_DASH = "\u2013"  # An en dash; it stands for all dashes that are no minus.

_NO_WIDTH = frozenset("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\u202a\u202b\u202c\u202d\u202e\ufeff")
_SAME = {
    **dict.fromkeys("\u2212\u2010\u2011\ufe63\u207b", "-"),
    **dict.fromkeys("\u2012\u2014\u2015", _DASH),
    **dict.fromkeys("\u00d7\u2715\u2716\u00b7\u22c5\u2219", "*"),
    **dict.fromkeys("\u2044\u2215", "/"),
    **dict.fromkeys("\u2018\u2019\u02bc\u2032", "'"),
    **dict.fromkeys("\u201c\u201d\u2033", '"'),
    **dict.fromkeys("\u2028\u2029\u0085\x0b\x0c\u3002", "\n"),
    "\u066b": ".",
    "\u066c": ",",
    "\u066a": "%",
    "\u3001": ",",
}
_SUPERSCRIPT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numeral:
    """One number in a text.

    Attributes:
      start, end: the number is `text[start:end]`, with its sign, exponent, scale and per cent sign. A currency before
        it is included only if a minus comes first ("-$5", but only the "5" of "$5").
      value: the number as an English reader understands it; None if that reader could not be sure.
      others: further readings of the same text.
      signed: whether a minus belongs to the number.
    """

    start: int
    end: int
    value: Fraction | None
    others: frozenset[Fraction] = frozenset()
    signed: bool = False

    @property
    def readings(self) -> frozenset[Fraction]:
        """All readings of the number; empty if it is too long to be read."""
        return self.others if self.value is None else self.others | {self.value}


def _same(character: str) -> str:
    """Returns the plain text that means the same as one character outside ASCII."""
    if character in _SAME:
        return _SAME[character]
    if character in _NO_WIDTH:
        return ""
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Zs":
        return _GROUP
    if category == "No" and "\u2044" in (spelt := unicodedata.normalize("NFKC", character)):
        return " " + spelt.replace("\u2044", "/") + " "  # A fraction such as a half in one character.
    if "\uff01" <= character <= "\uff5e":
        return chr(ord(character) - 0xFEE0)  # The full-width forms of ASCII.
    return character


_LATEX = (
    (re.compile(r"<<[^<>\n]{0,200}>>"), ""),  # the calculator notes of GSM8K
    (re.compile(r"\\\\(?=[A-Za-z])"), r"\\"),  # A backslash that was escaped twice.
    (re.compile(r"\\\\"), "\n"),  # a line break
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\,"), _GROUP),
    (re.compile(r"\\[;:> ]|\\q?quad(?![a-z])|\\[()\[\]]"), " "),
    (re.compile(r"\\(?:left|right)(?![a-z])"), ""),
    (re.compile(r"\\(?:times|cdot|ast)(?![a-z])"), "*"),
    (re.compile(r"\\div(?![a-z])"), "\u00f7"),
    (re.compile(r"\\(?:approx|sim)(?![a-z])"), "\u2248"),
    (re.compile(r"\\([$%&#_])"), r"\1"),
    (re.compile(r"(-?)\\[dtc]?frac ?\{ ?(-?[0-9]{1,40}) ?\} ?\{ ?([0-9]{1,40}) ?\}"), r" \1\2/\3 "),
    (re.compile(r"(-?)\\[dtc]?frac ?([0-9])([0-9])"), r" \1\2/\3 "),
    (re.compile(r"\\(?:text|math)[a-z]{0,8}|\\(?:emph|bf|rm)(?![a-z])"), " "),
    (re.compile(r"\$\$"), " "),
    (re.compile(r"(?<=[0-9])\*\*(?=[0-9])"), "^"),
    (re.compile(r"\*\*|__|`"), ""),
    (re.compile(r"<answer>", re.IGNORECASE), "\nAnswer: "),
    (re.compile(r"</answer>", re.IGNORECASE), "\n\n"),
    (re.compile(r"</?[A-Za-z][^<>\n]{0,80}>"), " "),
    (re.compile(r"(?<=[0-9]), (?=0[0-9]{2}(?![0-9]))"), ","),
    (re.compile(r"[ \t]+"), " "),
)


# A character of HTML by its number, which has more digits than the number of any character. Python refuses to read very
# long numbers, so `html.unescape` would raise an error.
_NO_CHARACTER = re.compile(r"&#[0-9]{20,};?")


def plain(text: str) -> str:
    """Returns the text with ASCII digits and signs, without Markdown, tags and most of LaTeX; braces remain."""
    text = html.unescape(_NO_CHARACTER.sub("\ufffd", text)).replace("\r\n", "\n").replace("\r", "\n")
    text = _SUPERSCRIPT.sub(_raised, text)
    odd = {character for character in set(text) if character > "~" or (character < " " and character not in "\n\t")}
    text = text.translate({ord(one): " " if one < " " else _same(one) for one in odd})
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def _raised(found: re.Match[str]) -> str:
    digits = unicodedata.normalize("NFKC", found[0]).replace("\u2212", "-")
    return f"^{digits}"


# A run of digits and separators. Possessive repetitions (++ and *+) never give back what they took, so the time is
# linear. A space separates thousands only before exactly three digits.
_RUN = re.compile(
    rf"(?:(?<![\w)])\.)?[0-9]++(?:[.,'_{_GROUP}][0-9]++| (?=[0-9]{{3}}(?![0-9]))[0-9]{{3}})*+",
)
_EXPONENT = re.compile(r"[eE]([+-]?[0-9]{1,9})(?!\w|\.[0-9])")
_TOO_LONG = re.compile(r"[eE][+-]?[0-9]")  # an exponent that `_EXPONENT` refuses
_POWER = re.compile(r" ?\^ ?\{? ?([+-]?[0-9]{1,9}) ?\}?")
_TIMES_TEN = re.compile(r" ?[*x] ?10 ?\^ ?\{? ?([+-]?[0-9]{1,9}) ?\}?")
_SLASH = re.compile(r" ?/ ?([0-9]{1,40})(?![0-9]|[.,][0-9]| ?/ ?[0-9])")
_MIXED = re.compile(rf"(?:[ {_GROUP}]{{1,2}}| and )([0-9]{{1,9}}) ?/ ?([0-9]{{1,9}})(?![0-9/]|[.,][0-9])")
_HYPHENED = re.compile(r"-([0-9]{1,9})/([0-9]{1,9})(?![0-9/])")
_PARTS = re.compile(r"(?:[:/][0-9]{1,40})+")
_HALF = re.compile(r" and (?:a|one)[- ]half\b", re.IGNORECASE)
_CENTS = re.compile(r" ?(?:dollars?|euros?|pounds?) and ([0-9]{1,2}) ?(?:cents?|pence)\b", re.IGNORECASE)
_PER_CENT = re.compile(r" ?(?:%|per ?cent\b)", re.IGNORECASE)
_SCALE = re.compile(
    r"[ -]?(hundred|thousand|million|billion|trillion|dozens?)\b(?: (?:and )?([0-9]{1,6})(?![\w.,]))?", re.I
)
_LETTER = re.compile(r"([kKM])(?![\w'])")
_NEGATIVE = re.compile(r"(?:(?<![0-9] )\bminus|\bnegative) $", re.IGNORECASE)
_CODE = re.compile(r"(?<![A-Za-z])(?:USD|EUR|GBP|INR|CNY|RMB|JPY|CHF|CAD|AUD|US|Rs\.?)$")
_HOUR = re.compile(r"(?::00)? ?[aApP]\.?[mM]\b")
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def numerals(text: str) -> Iterator[Numeral]:
    """Yields the numbers of a text that `plain` has made, from left to right; they do not overlap.

    Digits that are part of a name or a unit ("H2O", "m2", "m^2") are left out. The value of "5:00 PM" is 5.
    """
    end = 0
    for run in _RUN.finditer(text):
        if run.start() >= end:
            found, end = _numeral(text, run), run.end()
            if found is not None:
                end = found.end
                yield found


def _numeral(text: str, run: re.Match[str]) -> Numeral | None:
    start, end = run.span()
    before = text[start - 1] if start else ""
    # A letter before the digits makes them a part of a name. Letters without capitals ("Lo") do not, because Chinese, for
    # example, has no space between a word and a number.
    subscript = before == "_" and start > 1 and text[start - 2].isalnum()
    if before == "^" or subscript or (before.isalpha() and unicodedata.category(before) != "Lo"):
        code = _CODE.search(text[max(0, start - 8) : start])
        if code is None:
            return None
        before = ""
    value, others = _read(run[0])
    signed, currency = False, False
    at = start
    if at and text[at - 1] == "-":
        signed, at = True, at - 1
    if at and text[at - 1] in CURRENCY:
        currency, at = True, at - 1
    elif at > 1 and text[at - 1] == " " and text[at - 2] in CURRENCY:
        currency, at = True, at - 2
    if currency and at and text[at - 1] == "-":
        signed, at = True, at - 1
    if signed and at and (text[at - 1].isalnum() or text[at - 1] in ").%]}"):
        signed = False  # A subtraction, or a hyphen.
    elif signed and at > 1 and text[at - 1] == " " and (text[at - 2].isdigit() or text[at - 2] in ")}"):
        signed = False
    if signed:
        start = at
    elif at and text[at - 1] == _DASH and not (at > 1 and (text[at - 2].isalnum() or text[at - 2] == ")")):
        both = others if value is None else others | {value}
        value, others = None, both | {-one for one in both}  # The dash may be a minus.
    elif word := _NEGATIVE.search(text[max(0, at - 12) : at]):
        signed, start = True, at - len(word[0])
    whole = value is not None and value.denominator == 1 and run[0].isdigit()
    value, others, end = _suffixes(text, end, value, others, currency, whole)
    if signed:
        value, others = None if value is None else -value, frozenset(-one for one in others)
    return Numeral(start=start, end=end, value=value, others=others, signed=signed)


def _suffixes(
    text: str, end: int, value: Fraction | None, others: frozenset[Fraction], currency: bool, whole: bool
) -> tuple[Fraction | None, frozenset[Fraction], int]:
    """Returns value, further readings and end of a number, with what follows its digits: exponent, fraction, scale."""
    if value is None:
        return value, others, end
    if found := _TIMES_TEN.match(text, end) or _EXPONENT.match(text, end):
        power = int(found[1])
        return (value * Fraction(10) ** power if abs(power) <= _MAX_EXPONENT else None), others, found.end()
    if _TOO_LONG.match(text, end):
        return None, others, end
    if found := _POWER.match(text, end):
        power = int(found[1])
        small = abs(power) <= _MAX_EXPONENT and abs(value) < 10**6 and value.denominator < 10**6
        return (value**power if small and value else None), others, found.end()
    if whole and (found := _HOUR.match(text, end)):
        return value, others, found.end()
    if whole and (found := _MIXED.match(text, end)) and int(found[2]):
        part = Fraction(int(found[1]), int(found[2]))
        return value + part, others, found.end()
    if whole and (found := _HYPHENED.match(text, end)) and int(found[2]):
        part = Fraction(int(found[1]), int(found[2]))
        return None, others | {value + part, value - part}, found.end()
    if whole and (found := _SLASH.match(text, end)):
        below = int(found[1])
        return (value / below if below else None), others, found.end()
    if whole and (found := _PARTS.match(text, end)):  # a ratio, a date or a time of day
        parts = [Fraction(part) for part in re.findall("[0-9]+", found[0][:100])]
        return None, others | {value, *parts}, found.end()
    if found := _HALF.match(text, end):
        return value + Fraction(1, 2), others | {value}, found.end()
    if found := _CENTS.match(text, end):
        return value + Fraction(int(found[1]), 100), others, found.end()
    if found := _PER_CENT.match(text, end):
        return value, others | {value / 100}, found.end()
    if found := _SCALE.match(text, end):
        name = found[1].lower()
        if name.startswith("dozen"):
            return value, others | {value * 12}, end
        scaled = value * _SCALES[name]
        if found[2]:
            return None, others | {scaled, scaled + int(found[2])}, found.end()
        return scaled, others | {value}, found.end()
    if found := _LETTER.match(text, end):
        scaled = value * (10**6 if found[1] == "M" else 10**3)
        return (scaled if currency else None), others | {value, scaled}, found.end()
    return value, others, end


def _read(run: str) -> tuple[Fraction | None, frozenset[Fraction]]:
    """Returns the value and the further readings of a run of digits and separators."""
    groups = re.split(r"[^0-9]", run)
    if sum(map(len, groups)) > MAX_DIGITS:
        return None, frozenset()
    separators = re.sub(r"[0-9]", "", run)
    if not separators:
        return Fraction(run), frozenset()
    if not groups[0]:  # ".5"
        return (Fraction("0" + run), frozenset()) if separators == "." else (None, _each(groups[1:]))
    joined = Fraction("".join(groups))
    head, *rest = groups
    thousands = len(head) <= 3 and head != "0" and all(len(group) == 3 for group in rest)
    kinds = set(separators)
    if len(kinds) == 1:
        (kind,) = kinds
        if kind == "." and len(rest) == 1:
            return Fraction(run), frozenset({joined}) if thousands else frozenset()
        if kind == " ":
            sure = len(head) < 3 or set(rest) == {"000"}
            return (joined, _each(groups)) if sure else (None, _each(groups) | {joined})
        if thousands:
            return joined, frozenset()
        if kind == "," and len(rest) == 1:
            decimal = Fraction(f"{head}.{rest[0]}")
            return (decimal, frozenset()) if "0" in (head, rest[0][0]) else (None, _each(groups) | {decimal})
        # Lakhs: the grouping of India, with two digits in all groups except the last, such as 12,34,567.
        lakhs = len(head) <= 2 and all(len(group) == 2 for group in rest[:-1]) and len(rest[-1]) == 3
        if kind == "," and lakhs:
            sure = any(group.startswith("0") for group in rest)
            return (joined, frozenset()) if sure else (None, _each(groups) | {joined})
        return None, _each(groups)
    # Two kinds of separators: the last one stands before the decimals if it occurs once and the others stand before
    # groups of three digits.
    last = separators[-1]
    grouped = len(head) <= 3 and all(len(group) == 3 for group in rest[:-1])
    if len(kinds) == 2 and last in ".," and separators.count(last) == 1 and grouped:
        return Fraction("".join(groups[:-1]) + "." + groups[-1]), frozenset()
    return None, _each(groups)


def _each(groups: list[str]) -> frozenset[Fraction]:
    return frozenset(Fraction(group) for group in groups if group)


# fmt: off
_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on
_WORDS = {word: value for value, word in enumerate(_UNITS)} | {word: value * 10 for value, word in enumerate(_TENS, 2)}
_WORD = "|".join(sorted({*_WORDS, *_SCALES}, key=len, reverse=True))
_SPELT = re.compile(
    rf"\b(?:{'|'.join(_WORDS)}|an?(?= (?:{'|'.join(_SCALES)})\b))\b(?:(?:[ -]| and )(?:{_WORD})\b)*+", re.IGNORECASE
)


def spelt_numbers(text: str) -> Iterator[Numeral]:
    """Yields the numbers that are written in English words, such as "twenty-five" or "two thousand"."""
    for found in _SPELT.finditer(text):
        words = [word for word in re.split(r"[ -]", found[0].lower()) if word != "and"]
        if len(words) <= 16:
            value = _spelt(words)
            others: frozenset[Fraction] = frozenset()
            if value is not None and text[found.end() : found.end() + 6].lower() == " dozen":
                others, value = frozenset({value, value * 12}), None
            yield Numeral(start=found.start(), end=found.end(), value=value, others=others)


def _spelt(words: list[str]) -> Fraction | None:
    """Returns the value of number words; None if they are no single number, such as "one two"."""
    total, part, last = 0, 0, ""
    for word in words:
        if word in _SCALES:
            scale = _SCALES[word]
            if last in _SCALES and _SCALES[last] >= scale:
                return None
            if scale == 100:
                part *= 100
            else:
                total, part = total + part * scale, 0
        else:
            value = _WORDS.get(word, 1)  # "a hundred" is one hundred
            if last in _WORDS and not (_WORDS[last] >= 20 and 0 < value < 10):
                return None
            part += value
        last = word
    return Fraction(total + part)
