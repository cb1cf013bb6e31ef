"""Defines small tasks whose answers are easiest to write in different orders, and judges answers.

Prompts and answers are text of a fixed width with one byte per token, so runs differ in the mask and not in the
position at which rows begin and end. All widths are multiples of four tokens, so no block of four has tokens of both.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dream_jax.data.sudoku import SudokuSource

END = "$"
"""The character for the end-of-text token; answers are padded with it to the answer width of the task."""


class Example(NamedTuple):
    """A prompt and one correct answer, as text with the widths of the task."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True)
class StudyTask(abc.ABC):
    """A kind of problem, which draws examples and judges answers.

    Attributes:
      name: the name of the task in tables.
      prompt_width, answer_width: number of tokens of every prompt and of every answer.
      steps: number of training steps. It is small on purpose, so that masks differ in how soon they learn the task. It
        was chosen once, by trials with the bidirectional mask.
    """

    name: str
    prompt_width: int
    answer_width: int
    steps: int

    @abc.abstractmethod
    def draw(self, generator: np.random.Generator) -> Example:
        """Draws one example with the random generator."""

    def is_right(self, example: Example, answer: str) -> bool:
        """Returns whether the text is a correct answer; text after the first end-of-text token is ignored."""
        return answer.split(END)[0] == example.answer.split(END)[0]

    def examples(self, split: str, seed: int, number: int) -> list[Example]:
        """Draws examples of a split. The test split is the same for every seed and has no prompt of the train split.

        Args:
          split: "train" or "test".
          seed: the seed of the train split; the test split ignores it.
          number: the number of examples to draw.
        """
        if split == "test":
            return self._drawn(np.random.default_rng([1, 0]), number, frozenset())
        # 1024 is the maximum number of test rows, so the train split does not depend on the number of a study.
        held_out = frozenset(
            example.prompt for example in self._drawn(np.random.default_rng([1, 0]), 1024, frozenset())
        )
        return self._drawn(np.random.default_rng([0, seed]), number, held_out)

    @functools.cache  # noqa: B019 - there are six tasks, which live as long as the program
    def independent(self, test_rows: int) -> int:
        """Returns how many of the first test rows are independent of each other: the number of different prompts."""
        return len({example.prompt for example in self.examples("test", 0, test_rows)})

    def _drawn(self, generator: np.random.Generator, number: int, without: frozenset[str]) -> list[Example]:
        found: list[Example] = []
        while len(found) < number:
            example = self.draw(generator)
            if example.prompt not in without:
                found.append(example)
        return found


class AdditionTask(StudyTask):
    """`345+678=` -> `1023`: carries go from the last digit to the first, from right to left."""

    def draw(self, generator: np.random.Generator) -> Example:
        """Draws two numbers of three digits; the answer is their sum with four digits."""
        first, second = generator.integers(0, 1000, 2)
        return Example(f"{first:03d}+{second:03d}=", f"{first + second:04d}")


class CopyTask(StudyTask):
    """`kqpaczmvbre>` -> `kqpaczmvbre`: each token is copied from the same distance, so all orders are equally good."""

    def draw(self, generator: np.random.Generator) -> Example:
        """Draws eleven letters; the answer is the same letters."""
        text = _letters(generator)
        return Example(f"{text}>", f"{text}{END}")


class ReversalTask(StudyTask):
    """`kqpaczmvbre<` -> `erbvmzcapqk`: like copying, but the first token of the answer is nearest to its source."""

    def draw(self, generator: np.random.Generator) -> Example:
        """Draws eleven letters; the answer is the letters from the last to the first."""
        text = _letters(generator)
        return Example(f"{text}<", f"{text[::-1]}{END}")


class SudokuTask(StudyTask):
    """4x4 sudoku as 16 digits, 0 for an empty cell: the cell that is easiest to write differs between puzzles."""

    def draw(self, generator: np.random.Generator) -> Example:
        """Raises NotImplementedError: `examples` uses `data.sudoku`, whose splits have no solution in common."""
        raise NotImplementedError

    def examples(self, split: str, seed: int, number: int) -> list[Example]:
        """Returns puzzles with 6 to 12 givens and one solution each; no solution is in both splits."""
        source = SudokuSource(split, seed=0 if split == "test" else seed, size=number, min_givens=6)
        flat = lambda text: text.replace("\n", "")
        return [Example(flat(row.prompt), flat(row.response)) for row in map(source.__getitem__, range(number))]

    @functools.cache  # noqa: B019 - as above
    def independent(self, test_rows: int) -> int:
        """Returns the number of different solutions, because puzzles with the same solution are alike."""
        return len({example.answer for example in self.examples("test", 0, test_rows)})


class ScatteredSudokuTask(SudokuTask):
    """The puzzles of `SudokuTask` with the cells in another order.

    No block of four tokens contains two cells of the same row, column or box.
    """

    def examples(self, split: str, seed: int, number: int) -> list[Example]:
        """Returns the puzzles of `SudokuTask.examples` with their cells in the other order."""
        found = super().examples(split, seed, number)
        moved = lambda text: "".join(text[cell] for cell in _SCATTERED)
        return [Example(moved(prompt), moved(answer)) for prompt, answer in found]


# The cells are sorted by their value in a solved grid, because equal values are never in the same row, column or box.
_SOLVED = "0123230110323210"
_SCATTERED = sorted(range(16), key=lambda cell: (_SOLVED[cell], cell))


class CountdownTask(StudyTask):
    """`352>006:` -> `3+5=8,8-2=6`: several answers may be correct, and the two steps of an answer must fit together."""

    def draw(self, generator: np.random.Generator) -> Example:
        """Draws three numbers from 1 to 7, and a target that a sum or difference of all three gives."""
        while True:
            numbers = generator.integers(1, 8, 3)
            order = [int(number) for number in generator.permutation(numbers)]
            signs = [str(sign) for sign in generator.choice(list("+-"), 2)]
            found = self.answer_of(order, signs, between_first=bool(generator.random() < 0.5))
            if found is not None:
                return Example("".join(map(str, numbers)) + found.prompt[3:], found.answer)

    def answer_of(self, order: Sequence[int], signs: Sequence[str], *, between_first: bool) -> Example | None:
        """Returns the example with these two steps, or None if the result of a step would be negative.

        Args:
          order: the three numbers; the first step joins the first two of them, and the prompt has them in this order.
          signs: "+" or "-" of each step.
          between_first: whether the result of the first step is on the left of the second step, or on its right.
        """
        a, b, c = order
        between = _applied(a, signs[0], b)
        left, right = (between, c) if between_first else (c, between)
        target = _applied(left, signs[1], right)
        if between < 0 or target < 0:
            return None
        answer = f"{a}{signs[0]}{b}={between},{left}{signs[1]}{right}={target}"
        return Example(f"{a}{b}{c}>{target:03d}:", answer.ljust(self.answer_width, END))

    def is_right(self, example: Example, answer: str) -> bool:
        """Returns whether the answer reaches the target, uses each number once and has no wrong step."""
        steps = answer.split(END)[0].split(",")
        at_hand = list(example.prompt[:3])
        if len(steps) != 2:
            return False
        for step in steps:
            made = _step(step)
            if made is None:
                return False
            *used, result = made
            for number in used:
                if number not in at_hand:
                    return False
                at_hand.remove(number)
            at_hand.append(result)
        return at_hand == [str(int(example.prompt[4:7]))]


def _letters(generator: np.random.Generator) -> str:
    return "".join(generator.choice(list(string.ascii_lowercase), 11))


def _applied(left: int, sign: str, right: int) -> int:
    return left + right if sign == "+" else left - right


def _step(text: str) -> tuple[str, str, str] | None:
    """Returns the two numbers and the result of a step like `3+5=8`, or None if the text is not a correct step."""
    for sign in "+-":
        left, found, rest = text.partition(sign)
        right, equals, result = rest.partition("=")
        if not (found and equals):
            continue
        # A number has no sign and no leading zero.
        if all(text.isascii() and text.isdigit() and text == str(int(text)) for text in (left, right, result)):
            return (left, right, result) if _applied(int(left), sign, int(right)) == int(result) else None
    return None


TASKS = {
    task.name: task
    for task in (
        AdditionTask("addition", 8, 4, 800),
        CopyTask("copy", 12, 12, 300),
        ReversalTask("reversal", 12, 12, 300),
        SudokuTask("sudoku", 16, 16, 600),
        ScatteredSudokuTask("scattered sudoku", 16, 16, 600),
        CountdownTask("countdown", 8, 16, 600),
    )
}
