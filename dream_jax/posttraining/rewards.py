"""Rewards: objects that give each sampled answer a number, and the errors of rewards that fail.

A reward sees one answer at a time. The judges are those of the evaluation (`dream_jax.judges`), so a run is trained on what
is measured later.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dream_jax.data import Row
from dream_jax.judges.gsm8k import expected_number, judge_number
from dream_jax.judges.puzzles import check_puzzle, judge_countdown, judge_sudoku, parse_countdown
from dream_jax.tokenizer import turn_text

LARGEST = 1e30
"""The largest absolute value of a reward: sums and deviations of such numbers are finite in float32."""

_SHOWN_CHARACTERS = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledAnswer:
    """One answer that was sampled during a run: what a reward sees.

    Attributes:
      question: the prompt as text; of a chat the text of its last turn.
      text: the answer before its end.
      reference: the response of the row of the data.
      length: number of tokens of the answer before its end; `limit` if it does not end.
      limit: the largest number of tokens that the answer may have.
      ended: whether the answer has an end token.
      where: the origin of the row, such as "FILE:LINE".
      row: the row of the data.
    """

    question: str
    text: str
    reference: str
    length: int
    limit: int
    ended: bool
    where: str
    row: Row


class RewardError(ValueError):
    """A reward raised an exception, or returned something that is not a finite number; the message has the answer."""


class Reward(abc.ABC):
    """Gives a number to a sampled answer; a higher number is better.

    Attributes:
      name: the name of the reward in messages.
    """

    name: str

    @abc.abstractmethod
    def __call__(self, answer: SampledAnswer) -> float:
        """Returns the reward, a finite number."""

    def check(self, row: Row, where: str) -> None:  # noqa: B027 - most rewards can judge every row
        """Raises ValueError, which begins with `where`, if answers to this row cannot be judged."""


class SudokuReward(Reward):
    """Is 1 for a solved 4x4 sudoku, and 0 otherwise (`judges.puzzles.judge_sudoku`)."""

    name = "sudoku"

    def __call__(self, answer: SampledAnswer) -> float:
        """Returns 1 or 0."""
        return float(judge_sudoku(answer.question.strip(), answer.text).correct)

    def check(self, row: Row, where: str) -> None:
        """Raises ValueError if the prompt is no puzzle with a solution."""
        check_puzzle(question_of(row).strip(), where)


class CountdownReward(Reward):
    """Is 1 for steps that reach the target of a countdown problem, and 0 otherwise (`judges.puzzles.judge_countdown`)."""

    name = "countdown"

    def __call__(self, answer: SampledAnswer) -> float:
        """Returns 1 or 0."""
        return float(judge_countdown(answer.question.strip(), answer.text).correct)

    def check(self, row: Row, where: str) -> None:
        """Raises ValueError if the prompt is no countdown problem."""
        parse_countdown(question_of(row), where)


class Gsm8kReward(Reward):
    """Is 1 if the answer concludes with the number of the reference, and 0 otherwise (`judges.gsm8k.judge_number`)."""

    name = "gsm8k"

    def __call__(self, answer: SampledAnswer) -> float:
        """Returns 1 or 0; 0 also if the judge is not sure."""
        return float(judge_number(expected_number(answer.reference, answer.where), answer.text).correct)

    def check(self, row: Row, where: str) -> None:
        """Raises ValueError if the response does not end with "#### NUMBER"."""
        expected_number(row.response, where)


class ExactReward(Reward):
    """Is 1 if the answer is the response of its row, apart from space around it, and 0 otherwise."""

    name = "exact"

    def __call__(self, answer: SampledAnswer) -> float:
        """Returns 1 or 0."""
        return float(answer.text.strip() == answer.reference.strip())


class LengthReward(Reward):
    """Is minus the share of the tokens that the answer uses: 0 for an empty answer, -1 for one that does not end."""

    name = "length"

    def __call__(self, answer: SampledAnswer) -> float:
        """Returns a number in [-1, 0]."""
        return -answer.length / answer.limit


class FormatReward(Reward):
    """Is 1 if a regular expression matches the whole answer, in which "." also matches line ends, and 0 otherwise."""

    name = "format"

    def __init__(self, pattern: str):
        """Compiles the pattern. Raises ValueError if it is not a regular expression."""
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"reward_pattern={pattern!r:.80} is not a regular expression: {error}") from error

    def __call__(self, answer: SampledAnswer) -> float:
        """Returns 1 or 0."""
        return float(self._pattern.fullmatch(answer.text) is not None)


class FunctionReward(Reward):
    """A function of the user: it gets a `SampledAnswer` and returns a number."""

    def __init__(self, entry_point: str):
        """Imports the function `module:function`; the module may also be in the current folder.

        Raises:
          ValueError: the module cannot be imported, or has no such function.
        """
        self.name = entry_point
        module, _, name = entry_point.partition(":")
        before = list(sys.path)
        sys.path.append(os.getcwd())
        try:
            found = importlib.import_module(module)
        except Exception as error:  # A module of the user can raise an error of any type.
            raise ValueError(
                f"reward {entry_point!r:.80}: the module {module} cannot be imported ({type(error).__name__}: {error}); "
                "give MODULE:FUNCTION of a module in the current folder, or of one that is installed"
            ) from error
        finally:
            sys.path[:] = before
        function = getattr(found, name, None)
        if not callable(function):
            raise ValueError(f"reward {entry_point!r:.80}: the module {module} has no function {name!r:.60}")
        self._function: Callable[[SampledAnswer], Any] = function

    def __call__(self, answer: SampledAnswer) -> float:
        """Returns what the function returns, which `Rewards` checks."""
        value: float = self._function(answer)
        return value


BUILT_IN: Mapping[str, Callable[[], Reward]] = {
    "sudoku": SudokuReward,
    "countdown": CountdownReward,
    "gsm8k": Gsm8kReward,
    "exact": ExactReward,
    "length": LengthReward,
}
"""The rewards without settings, by name."""


def make_reward(name: str, pattern: str | None = None) -> Reward:
    """Returns a reward.

    Args:
      name: a name of `BUILT_IN`, "format", or "MODULE:FUNCTION".
      pattern: the regular expression of "format".

    Raises:
      ValueError: there is no such reward, or "format" has no pattern.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if name == "format":
        if pattern is None:
            raise ValueError("the reward format needs a regular expression: give --reward-pattern as well")
        return FormatReward(pattern)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return FunctionReward(name)
    raise ValueError(
        f"reward {name!r:.80} is not one of {', '.join([*BUILT_IN, 'format'])}, and not MODULE:FUNCTION, a function of "
        "your own that gets a SampledAnswer and returns a number"
    )


class Rewards:
    """Several rewards, and the weight of each in their sum."""

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float] | None = None):
        """Stores the rewards; without weights each counts 1.

        Raises:
          ValueError: there is no reward, or the number of weights is not the number of rewards.
        """
        if not rewards:
            raise ValueError("there is no reward; give at least one, such as --reward sudoku")
        self.rewards, self.weights = tuple(rewards), tuple(weights or (1.0,) * len(rewards))
        if len(self.weights) != len(self.rewards):
            raise ValueError(
                f"reward_weights={self.weights} must have one number for each of the {len(self.rewards)} rewards"
            )

    def __call__(self, answer: SampledAnswer) -> tuple[float, ...]:
        """Returns the value of each reward, without its weight.

        Raises:
          RewardError: a reward raised an exception, or its value is not a finite number or larger than `LARGEST`.
        """
        return tuple(_value(reward, answer) for reward in self.rewards)

    def total(self, values: Iterable[float]) -> float:
        """Returns the weighted sum of the values of the rewards."""
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))

    def check(self, row: Row, where: str) -> None:
        """Raises ValueError, which begins with `where`, if a reward cannot judge answers to this row."""
        for reward in self.rewards:
            reward.check(row, where)


def _value(reward: Reward, answer: SampledAnswer) -> float:
    """Returns the value of one reward. Raises RewardError if it fails."""

    def failed(what: str) -> RewardError:
        cut = "" if len(answer.text) <= _SHOWN_CHARACTERS else f" (the first {_SHOWN_CHARACTERS} characters)"
        return RewardError(
            f"reward {reward.name} {what} for this answer to {answer.where}: {answer.text[:_SHOWN_CHARACTERS]!r}{cut}; "
            "correct the reward, then the same command goes on from the last checkpoint"
        )

    try:
        value: Any = reward(answer)  # A function of the user can return a value of any type.
    except Exception as error:  # A function of the user can raise an error of any type.
        raise failed(f"raised {type(error).__name__}: {error}") from error
    if isinstance(value, str | bytes):  # float() would read numbers out of texts.
        raise failed(f"returned {value!r:.60}, which is not a number,")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise failed(f"returned {value!r:.60}, which is not a number,") from error
    except Exception as error:  # Such as an integer that is too large, or a class of the user.
        raise failed(
            f"returned a value of type {type(value).__name__} that is not a number ({error!s:.200}),"
        ) from error
    if not math.isfinite(number):
        raise failed(f"returned {number}")
    if abs(number) > LARGEST:
        raise failed(f"returned {number:g}, which is larger than {LARGEST:g},")
    return number


def question_of(row: Row) -> str:
    """Returns the question of a row as text: its prompt, or the text of the last turn of its chat."""
    return row.prompt if isinstance(row.prompt, str) else turn_text(row.prompt[-1])
