"""Judges of the generated problems with long answers of `data.long_tasks`: chains and routes.

There is one right answer to a problem, and an answer is correct only if the whole text, without the space around it, is
this answer: a single wrong character makes it wrong.
"""

from __future__ import annotations

from collections.abc import Callable

from dream_jax.data.long_tasks import solve_chain, solve_route
from dream_jax.judges.verdict import Verdict


def judge_chain(problem: str, answer: str) -> Verdict:
    """Returns the verdict whether `answer` writes every sum of a chain, in order, with the right values.

    Raises: ValueError if `solve_chain` does not accept `problem`. The function raises for no other reason.
    """
    return _compared(solve_chain, problem, answer)


def judge_route(problem: str, answer: str) -> Verdict:
    """Returns the verdict whether `answer` follows all roads of a route, with the right totals, and lists all of them.

    Raises: ValueError if `solve_route` does not accept `problem`. The function raises for no other reason.
    """
    return _compared(solve_route, problem, answer)


def _compared(solve: Callable[[str], str], problem: str, answer: str) -> Verdict:
    """Returns the verdict, whose reason names the first line that is wrong."""
    wanted, found = solve(problem), answer.strip()
    if found == wanted:
        return Verdict(correct=True, found=found, reason="every line is right")
    right, written = wanted.split("\n"), found.split("\n")
    for number, (one, other) in enumerate(zip(right, written, strict=False), 1):
        if one != other:
            reason = f"line {number} is {other!r:.60}, not {one!r:.60}"
            return Verdict(correct=False, found=found or None, reason=reason)
    reason = f"the answer has {len(written)} lines, not {len(right)}"
    return Verdict(correct=False, found=found or None, reason=reason)
