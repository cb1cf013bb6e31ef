"""Finds the number that one sentence states: after an announcement such as "the answer is", or in plain prose.

A sentence may have several numbers, computations such as "16 - 3 - 4", and equations. What the author means is not
always sure. A `Conclusion` has the number that is meant, or None, and all other numbers that may be meant.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from fractions import Fraction

from dream_jax.judges.numerals import CURRENCY, Numeral, numerals, spelt_numbers

_MOST_TERMS = 12  # A computation with more numbers is not evaluated.
_MOST_NUMBERS = 200  # Only this many numbers of a sentence are read.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conclusion:
    """The number with which a text concludes.

    Attributes:
      value: the number; None if the text has several numbers that could be meant, or a computation without its result.
      others: further numbers that the author could have meant.
      how: where the number was found; a text for people.
      unfinished: whether the text ends in a computation without its result.
    """

    value: Fraction | None
    others: frozenset[Fraction] = frozenset()
    how: str = ""
    unfinished: bool = False

    @property
    def readings(self) -> frozenset[Fraction]:
        """All numbers that the author could have meant."""
        return self.others if self.value is None else self.others | {self.value}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """One number of a sentence, or one computation such as "16 - 3 - 4".

    Attributes:
      start, end: the term is `text[start:end]`.
      value: the value of the number; None if it is not sure, and for a computation.
      others: further readings of the number; for a computation, its numbers and its result.
      computed: whether the term is a computation.
    """

    start: int
    end: int
    value: Fraction | None
    others: frozenset[Fraction]
    computed: bool

    @property
    def readings(self) -> frozenset[Fraction]:
        """All numbers that the term may mean."""
        return self.others if self.value is None else self.others | {self.value}


_OPERATORS = re.compile(rf"[ {CURRENCY}()\[\]{{}}%]*[-+*/\u00f7\u2013x][ {CURRENCY}()\[\]{{}}]*")


def find_terms(text: str) -> list[Term]:
    """Returns the numbers and computations of a text, from left to right."""
    found: list[Term] = []
    run: list[Numeral] = []
    signs: list[str] = []
    for count, one in enumerate(numerals(text)):
        if count == _MOST_NUMBERS:
            break
        gap = text[run[-1].end : one.start] if run else ""
        if run and len(gap) < 20 and _OPERATORS.fullmatch(gap):
            signs.append(gap)
        elif run:
            found.append(_term(run, signs))
            run, signs = [], []
        run.append(one)
    if run:
        found.append(_term(run, signs))
    return found


def _term(run: Sequence[Numeral], signs: Sequence[str]) -> Term:
    start, end = run[0].start, run[-1].end
    if len(run) == 1:
        return Term(start=start, end=end, value=run[0].value, others=run[0].others, computed=False)
    result = _evaluate(run, signs)
    parts = frozenset[Fraction]().union(*(one.readings for one in run))
    return Term(start=start, end=end, value=None, others=parts if result is None else parts | {result}, computed=True)


def _evaluate(run: Sequence[Numeral], signs: Sequence[str]) -> Fraction | None:
    """Returns the result of a computation of a few numbers without brackets; None for any other one."""
    if (
        len(run) > _MOST_TERMS
        or any(one.value is None for one in run)
        or any(set(sign) & set("()[]{}") for sign in signs)
    ):
        return None
    values = [one.value or Fraction(0) for one in run]
    sums, product = Fraction(0), values[0]
    for gap, value in zip(signs, values[1:], strict=True):
        sign = gap.strip(f" %{CURRENCY}")
        if sign in "*x":
            product *= value
        elif sign in "/\u00f7":
            if not value:
                return None
            product /= value
        else:
            sums, product = sums + product, value if sign == "+" else -value
    return sums + product


# Patterns of the text around a number. RESULT matches the text before a result, up to the number. _DETAIL, _GIVEN,
# _REMARK and _WHICH match around a detail that is no result. _CHOICE and _LIST match where the author leaves a choice
# between numbers, _RESTATED between a result and the same result in other words.
EQUALS = re.compile(r"[=\u2248]| equals | is equal to ")
_THEREFORE = re.compile(r"\b(?:so|therefore|thus|hence|altogether|in total|for a total of|making|giving)\b", re.I)
RESULT = re.compile(
    r"(?:\b(?:is|are|was|were|be|been|it's|that's|makes?|made|earns?|earned|gets?|got|costs?|spends?|spent|pays?|paid|has|"
    r"have|had|needs?|needed|leaves?|left with|so|totals?|total of|equals?|gives?|gave|sells?|sold|runs?|ran|takes?|took|"
    r"travels?|scores?|scored|drives?|drove|saves?|saved|receives?|received|eats?|ate|drinks?|drank|buys?|bought|"
    r"becomes?|reach(?:es)?|answer|collects?|charges?|walks?|weighs?|owes?|profit of|use[sd]?|reads?|"
    r"(?:up|ends?) with)|[:>\u2192])"
    r"(?: (?:about|approximately|around|only|exactly|just|now|still|a|an|the|total|of|all|altogether|therefore|thus|also|"
    rf"equal|to))*[ {CURRENCY}(]*$",
    re.IGNORECASE,
)
_DETAIL = re.compile(
    r"\b(?:by|for|in|of|after|at|per|every|each|from|the|remaining|another|than|selling|other|over|within|on|these|those|"
    rf"since|first|last)(?: (?:the|about|next|first|last|remaining|other|all))* ?[{CURRENCY}]*$",
    re.IGNORECASE,
)
_REASON = re.compile(r"\b(?:because|since|as|when|if|while|where)\b", re.IGNORECASE)
_GIVEN = re.compile(
    r"\b(?:the|those|these|his|her|their|its|my|our|[a-z]+'s)(?: (?:remaining|other|first|last|next|same|initial))? "
    rf"?[{CURRENCY}]*$",
    re.IGNORECASE,
)
_REMARK = re.compile(r"(?<= )\([^()]*\)")
_WHICH = re.compile(r"\bwhich (?:is|are|was|were)(?: (?:about|only|just|exactly))? ?$", re.IGNORECASE)
_MORE = re.compile(
    r"[ \w-]{0,20}\b(?:more|less|fewer|greater|higher|lower|longer|shorter|older|younger)\b", re.IGNORECASE
)
_LIST = re.compile(r"[^.\n]{0,30}?(?:[,;/|\u00b1]|\bor\b|\band\b|\bto\b|[-\u2013~])[^.\n]{0,12}", re.IGNORECASE)
_CHOICE = re.compile(r"(?:\beither\b|\bbetween\b|\bfrom\b)[^0-9]{0,20}$", re.IGNORECASE)
_RESTATED = re.compile(r"which (?:is|are|equals|means)\b|\bthat is\b|\bi\.e\b|\bor\b|[(\[=]", re.IGNORECASE)
_MORE_TO_COMPUTE = re.compile(r"[^,;(.0-9]{0,40}[-+*/\u00f7][^,;(]*")
_LOSS = re.compile(r"\b(?:loss of|in debt|deficit|below zero|below 0|short by)\b", re.IGNORECASE)


def _all(terms: Sequence[Term]) -> frozenset[Fraction]:
    """Returns all readings of all terms."""
    return frozenset[Fraction]().union(*(term.readings for term in terms))


def _of_term(term: Term, how: str) -> Conclusion:
    return Conclusion(value=term.value, others=term.others, how=how, unfinished=term.computed)


def _after_equals(text: str, how: str) -> Conclusion | None:
    """Returns the conclusion of a text with equations, which is the result of the last one.

    None if the text has no equals sign, or if no number beside the last one can be the result. `how` is the attribute
    of the conclusion.
    """
    signs = list(EQUALS.finditer(text))
    if not signs:
        return None
    tail = text[signs[-1].end() :]
    terms = find_terms(tail)
    if not terms:  # The result is on the left of the sign, as in "18 = x".
        begin = signs[-2].end() if len(signs) > 1 else 0
        terms = find_terms(text[begin : signs[-1].start()])
        return _of_term(terms[-1], how) if len(terms) == 1 else None
    first = terms[0]
    connectives = list(_THEREFORE.finditer(tail))
    if connectives and connectives[-1].start() > first.end:
        later = stated_in_prose(tail[connectives[-1].end() :], how)
        if later is not None:
            return later
    following = [term for term in terms[1:] if re.search(r"[,;] |\band\b|\bor\b", tail[first.end : term.start])]
    if following and not tail[: first.start].strip(f" {CURRENCY}*(") and _all(following) != first.readings:
        # More numbers follow the result, as in "x = 18, and 2 more make 20": either may be meant.
        return Conclusion(value=None, others=_all([first, *following]), how=how)
    return _of_term(first, how)


def _without_details(text: str, terms: list[Term]) -> list[Term]:
    """Returns the terms without numbers that are clearly no results: "the 9 eggs", "(2 hours)", "which is 5 more".

    If nothing else remains, or only a computation, all terms are returned.
    """
    brackets = [found.span() for found in _REMARK.finditer(text)]
    kept = [
        term
        for term in terms
        if not (
            _GIVEN.search(text[max(0, term.start - 40) : term.start])
            or any(start < term.start and term.end < end for start, end in brackets)
            or (
                _WHICH.search(text[max(0, term.start - 40) : term.start])
                and _MORE.match(text[term.end : term.end + 40])
            )
        )
    ]
    return kept if any(not term.computed for term in kept) else terms


def stated_in_prose(text: str, how: str) -> Conclusion | None:
    """Returns the conclusion of a sentence that announces nothing; None if it has no number.

    In a sentence with an equation the result of the equation counts. Otherwise numbers that are clearly details are
    left out. If several numbers remain, the last one counts if the words before it lead to a result; if not, the value
    is None. `how` is the attribute of the conclusion.
    """
    terms = find_terms(text)
    if not terms:
        return None
    if (found := _after_equals(text, how)) is not None:
        return found
    others = _all(terms)
    terms = _without_details(text, terms)
    last = terms[-1]
    if len(terms) == 1:
        found = dataclasses.replace(_of_term(last, how), others=others - {last.value})
    elif len(_all(terms)) == 1:
        found = Conclusion(value=next(iter(_all(terms))), others=others - _all(terms), how=how)
    else:
        before = text[max(0, last.start - 60) : last.start]
        reason = _REASON.search(text[terms[-2].end : last.start])
        sure = RESULT.search(before) and not (_DETAIL.search(before) or reason or last.computed)
        values = {term.value for term in terms if not term.computed}
        results = frozenset().union(*(term.readings for term in terms if term.computed))
        # The only number is the result of the computations, as in "2 sets (13 - 11)".
        if len(values) == 1 and None not in values and values <= results:
            return Conclusion(value=values.pop(), how=how)
        found = Conclusion(value=last.value if sure else None, others=others, how=how)
    if found.value is not None and found.value > 0 and _LOSS.search(text):
        return Conclusion(value=None, others=found.readings | {-found.value}, how=how)
    return found


def stated_after_announcement(text: str, how: str) -> Conclusion | None:
    """Returns the conclusion of the sentence after an announcement, such as "18 dollars."; None if it has no number.

    The first number counts: an explanation may follow it. In an equation, its result counts.
    """
    spelt = next(spelt_numbers(text), None)
    terms = find_terms(text)
    if not terms:
        return None if spelt is None else Conclusion(value=spelt.value, others=spelt.others, how=how)
    first = terms[0]
    equals = EQUALS.search(text)
    if equals and (
        first.computed or equals.start() < first.start or _MORE_TO_COMPUTE.fullmatch(text, first.end, equals.start())
    ):
        return _after_equals(text, how)
    if len(terms) == 1 or first.value is None:
        found = _of_term(first, how)
    else:
        gap = text[first.end : terms[1].start]
        listed = _LIST.fullmatch(gap) and not re.search(
            r"\bnot\b|\b(?:since|because|as|per)\b|[(:]", gap, re.IGNORECASE
        )
        close = len(gap.split()) <= 3
        if _CHOICE.search(text[: first.start]) or (listed and close):
            found = Conclusion(value=None, others=_all(terms), how=how)
        else:
            restated = [
                term
                for left, term in itertools.pairwise(terms)
                if _RESTATED.search(text[left.end : term.start]) and "not" not in text[left.end : term.start].split()
            ]
            found = Conclusion(value=first.value, others=first.others | _all(restated), how=how)
    if spelt is not None and spelt.end < first.start and spelt.value not in (None, found.value) and spelt.value > 3:
        return Conclusion(value=None, others=found.readings | {spelt.value}, how=how)
    return found
