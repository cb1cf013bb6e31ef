"""Judges of Dream's two planning games: 4x4 sudoku and countdown.

An answer is right only when it is a solution from its first character to its last, the space around it aside. Which
solution does not matter. What a model writes after its answer has been cut off before (`TaskFormat.cut`).
"""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

from dream_jax.data.sudoku import is_solution, solutions
from dream_jax.evaluation.problems import Verdict

_GRID = re.compile(r"(?:[1-4]{4}\n){3}[1-4]{4}")
# [0-9], not \d, which takes the digits of every script; and no leading zero: 086 is not the 86 that was given.
_NUMBER = r"(?:0|[1-9][0-9]*)"
_STEP = re.compile(rf"({_NUMBER})([-+*/])({_NUMBER})=({_NUMBER})")
_LONGEST_NUMBER = 30  # digits; a model that repeats one digit would otherwise have us multiply for a long time


def judge_sudoku(puzzle: str, answer: str) -> Verdict:
    """Whether `answer` is four lines of four digits that keep the givens and solve `puzzle`. See `data.sudoku`."""
    grid = answer.strip()
    if not _GRID.fullmatch(grid):
        return Verdict(correct=False, found=None, reason="not four lines of four digits 1..4")
    if is_solution(puzzle, grid):
        return Verdict(correct=True, found=grid, reason="solves the puzzle")
    given, written = puzzle.strip().replace("\n", ""), grid.replace("\n", "")
    changed = [cell for cell in range(16) if given[cell] not in ("0", written[cell])]
    if changed:
        row, column = divmod(changed[0], 4)
        return Verdict(correct=False, found=grid, reason=f"the given in row {row + 1}, column {column + 1} was changed")
    return Verdict(correct=False, found=grid, reason="a digit is repeated in a row, a column or a box")


def check_puzzle(puzzle: str, where: str) -> None:
    """Raises ValueError, opening with `where`, for text that is no puzzle, or one without a solution."""
    try:
        number = len(solutions(puzzle))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not number:
        raise ValueError(f"{where}: the puzzle {puzzle!r} has no solution")


def parse_countdown(problem: str, where: str = "countdown") -> tuple[list[int], int]:
    """Numbers and target of "86,28,13,31,96": the target comes last.

    Raises: ValueError, opening with `where`, for anything else.
    """
    parts = problem.strip().split(",")
    if len(parts) < 3 or not all(re.fullmatch(_NUMBER, part) for part in parts):
        raise ValueError(
            f"{where}: {problem!r:.60} is no countdown problem: at least two numbers and a target, by commas"
        )
    *numbers, target = map(int, parts)
    return numbers, target


def judge_countdown(problem: str, answer: str) -> Verdict:
    """Whether `answer` is a chain of steps such as "86+28=114,31-13=18,114-18=96" that reaches the target.

    Each step is true, takes two numbers that are there, and leaves its result instead. At the end every number has
    been used and the target alone is left. Numbers are natural and written without space, as published.
    """
    numbers, target = parse_countdown(problem)
    text = answer.strip()

    def wrong(reason: str) -> Verdict:
        return Verdict(correct=False, found=text or None, reason=reason)

    left = Counter(numbers)
    for step in text.split(","):
        parsed = _STEP.fullmatch(step)
        if not parsed or max(map(len, parsed.groups())) > _LONGEST_NUMBER:
            return wrong(f"{step!r:.40} is no step such as 3+4=7")
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
                return wrong(f"{step} takes {number}, which is not there or has been used")
            left[number] -= 1
        left[result] += 1
    remaining = sorted(left.elements())
    if remaining != [target]:
        return wrong(f"leaves {remaining}, not the target {target} alone")
    return Verdict(correct=True, found=text, reason="reaches the target")
