"""Judges of Dream's two planning games: 4x4 sudoku and countdown.

An answer is correct only if the whole text, without the space around it, is a solution. Any solution is accepted. Text
that a model writes after its answer must have been cut off before (`TaskFormat.cut`).
"""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

from dream_jax.data.sudoku import is_solution, solutions
from dream_jax.judges.verdict import Verdict

_GRID = re.compile(r"(?:[1-4]{4}\n){3}[1-4]{4}")
# The pattern has [0-9] because \d would match the digits of every script. It allows no leading zero: 086 is not 86.
# It allows at most 30 digits, because Python refuses to read very long numbers, and a repetitive model writes them.
_NUMBER = r"(?:0|[1-9][0-9]{0,29})"
_STEP = re.compile(rf"({_NUMBER})([-+*/])({_NUMBER})=({_NUMBER})")


def judge_sudoku(puzzle: str, answer: str) -> Verdict:
    """Returns the verdict whether `answer`, four lines of four digits, solves `puzzle`.

    The puzzle has the format of `data.sudoku`, and must be one that `check_puzzle` accepts. The verdict's `found` is
    the grid, or None if the answer is not four lines of four digits.
    """
    grid = answer.strip()
    if not _GRID.fullmatch(grid):
        return Verdict(correct=False, found=None, reason="not four lines of four digits 1..4")
    if is_solution(puzzle, grid):
        return Verdict(correct=True, found=grid, reason="solves the puzzle")
    given, written = puzzle.strip().replace("\n", ""), grid.replace("\n", "")
    changed = [cell for cell in range(16) if given[cell] not in ("0", written[cell])]
    if changed:
        row, column = divmod(changed[0], 4)
        reason = f"the given digit in row {row + 1}, column {column + 1} was changed"
        return Verdict(correct=False, found=grid, reason=reason)
    return Verdict(correct=False, found=grid, reason="a digit is repeated in a row, a column or a box")


def check_puzzle(puzzle: str, where: str) -> None:
    """Raises ValueError, which begins with `where`, if the text is not a puzzle, or if the puzzle has no solution."""
    try:
        number = len(solutions(puzzle))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not number:
        raise ValueError(f"{where}: the puzzle {puzzle!r} has no solution")


def parse_countdown(problem: str, where: str = "countdown") -> tuple[list[int], int]:
    """Returns the numbers and the target of a problem such as "86,28,13,31,96", where the target is the last number.

    Raises: ValueError, which begins with `where`, for a text of another form.
    """
    parts = problem.strip().split(",")
    if len(parts) < 3 or not all(re.fullmatch(_NUMBER, part) for part in parts):
        raise ValueError(
            f"{where}: {problem!r:.60} is no countdown problem: write two or more numbers and a target, with commas, each "
            "of at most 30 digits"
        )
    *numbers, target = map(int, parts)
    return numbers, target


def judge_countdown(problem: str, answer: str) -> Verdict:
    """Judges whether `answer` is a list of steps such as "86+28=114,31-13=18,114-18=96" that reaches the target.

    Each step must be a true equation. It takes two of the numbers that are left and puts back its result. After the
    last step only the target may be left. Numbers are nonnegative integers and are written without space, as published.

    Raises: ValueError if `parse_countdown` does not accept `problem`. The function raises for no other reason.
    """
    numbers, target = parse_countdown(problem)
    text = answer.strip()

    def wrong(reason: str) -> Verdict:
        return Verdict(correct=False, found=text or None, reason=reason)

    left = Counter(numbers)
    for step in text.split(","):
        parsed = _STEP.fullmatch(step)
        if not parsed:
            return wrong(f"{step!r:.40} is not a step of the form 3+4=7")
        first, sign, second, result = int(parsed[1]), parsed[2], int(parsed[3]), int(parsed[4])
        if sign == "/" and second == 0:
            return wrong(f"{step} divides by zero")
        value = {
            "+": Fraction(first + second),
            "-": Fraction(first - second),
            "*": Fraction(first * second),
            "/": Fraction(first, second or 1),
        }[sign]
        if value != result:
            return wrong(f"{step} is not true")
        for number in (first, second):
            if not left[number]:
                return wrong(f"{step} takes {number}, which is not in the problem or has been used")
            left[number] -= 1
        left[result] += 1
    remaining = sorted(left.elements())
    if remaining != [target]:
        return wrong(f"leaves {remaining}, not the target {target} alone")
    return Verdict(correct=True, found=text, reason="reaches the target")
