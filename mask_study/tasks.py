"""Small tasks whose answers are easiest to write in different orders, and the judges of their answers.

Prompts and answers are text of a fixed width, one byte a token, so that two runs differ in the mask and not in where rows
begin and end. All widths are multiples of four tokens, so that a block of four never holds tokens of both.
"""

from __future__ import annotations

import abc
import dataclasses
import string
from typing import NamedTuple

import numpy as np

from dream_jax.data.sudoku import SudokuSource

END = "$"
"""Stands for the end-of-text token; an answer is filled up to the task's width with it."""


class Example(NamedTuple):
    """A prompt and one right answer, each of the task's width."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True)
class StudyTask(abc.ABC):
    """A kind of problem: it draws examples and judges answers.

    Attributes:
      name: as tables show it.
      prompt_width, answer_width: in tokens.
      steps: training steps. They are few on purpose, so that masks differ in how soon the task is learned; they were chosen
        once, by trials under the bidirectional mask.
    """

    name: str
    prompt_width: int
    answer_width: int
    steps: int

    @abc.abstractmethod
    def draw(self, generator: np.random.Generator) -> Example:
        """Draws one example."""

    def is_right(self, example: Example, answer: str) -> bool:
        """Whether the text answers the prompt; what follows the first end-of-text token is ignored."""
        return answer.split(END)[0] == example.answer.split(END)[0]

    def examples(self, split: str, seed: int, number: int) -> list[Example]:
        """Draws examples of a split. The test split is the same for every seed and shares no prompt with the train split.

        Args:
          split: "train" or "test".
          seed: of the train split; the test split ignores it.
          number: how many examples.
        """
        if split == "test":
            return self._drawn(np.random.default_rng([1, 0]), number, frozenset())
        # 1024 is the most that a study may test on, so the train split does not depend on how many it does test on.
        held_out = frozenset(
            example.prompt for example in self._drawn(np.random.default_rng([1, 0]), 1024, frozenset())
        )
        return self._drawn(np.random.default_rng([0, seed]), number, held_out)

    def _drawn(self, generator: np.random.Generator, number: int, without: frozenset[str]) -> list[Example]:
        found: list[Example] = []
        while len(found) < number:
            example = self.draw(generator)
            if example.prompt not in without:
                found.append(example)
        return found


class AdditionTask(StudyTask):
    """`345+678=` -> `1023`: carries run from the last digit to the first, against the order of reading."""

    def draw(self, generator: np.random.Generator) -> Example:
        """Two numbers of three digits, and their sum with four digits."""
        first, second = generator.integers(0, 1000, 2)
        return Example(f"{first:03d}+{second:03d}=", f"{first + second:04d}")


class CopyTask(StudyTask):
    """`kqpaczmvbre>` -> `kqpaczmvbre`: each token is copied from the same distance, so no order of writing is better."""

    def draw(self, generator: np.random.Generator) -> Example:
        """Eleven letters, and the same again."""
        text = _letters(generator)
        return Example(f"{text}>", f"{text}{END}")


class ReversalTask(StudyTask):
    """`kqpaczmvbre<` -> `erbvmzcapqk`: like copying, but the first token of the answer has its source nearest."""

    def draw(self, generator: np.random.Generator) -> Example:
        """Eleven letters, and the same from the last to the first."""
        text = _letters(generator)
        return Example(f"{text}<", f"{text[::-1]}{END}")


class SudokuTask(StudyTask):
    """4x4 sudoku, its cells in a row, 0 for an empty cell: the cell that is easiest to write differs between puzzles."""

    def draw(self, generator: np.random.Generator) -> Example:
        """Not used: `examples` takes puzzles of `data.sudoku`, which keeps the solutions of its splits apart."""
        raise NotImplementedError

    def examples(self, split: str, seed: int, number: int) -> list[Example]:
        """Puzzles with 6 to 12 givens and one solution; no solution is in both splits."""
        source = SudokuSource(split, seed=0 if split == "test" else seed, size=number, min_givens=6)
        flat = lambda text: text.replace("\n", "")
        return [Example(flat(row.prompt), flat(row.response)) for row in map(source.__getitem__, range(number))]


class ScatteredSudokuTask(SudokuTask):
    """The same puzzles with the cells in another order: no block of four holds two cells of one row, column or box."""

    def examples(self, split: str, seed: int, number: int) -> list[Example]:
        """As `SudokuTask.examples`."""
        found = super().examples(split, seed, number)
        moved = lambda text: "".join(text[cell] for cell in _SCATTERED)
        return [Example(moved(prompt), moved(answer)) for prompt, answer in found]


# Cells are sorted by their value in a solved grid, because equal values never share a row, a column or a box.
_SOLVED = "0123230110323210"
_SCATTERED = sorted(range(16), key=lambda cell: (_SOLVED[cell], cell))


class CountdownTask(StudyTask):
    """`352>006:` -> `3+5=8,8-2=6`: several answers may be right, and the steps of one must agree with each other."""

    def draw(self, generator: np.random.Generator) -> Example:
        """Three numbers from 1 to 7, and a target that sums and differences of all three reach."""
        while True:
            numbers = generator.integers(1, 8, 3)
            a, b, c = (int(number) for number in generator.permutation(numbers))
            first, second = (str(sign) for sign in generator.choice(list("+-"), 2))
            between = _applied(a, first, b)
            left, right = (between, c) if generator.random() < 0.5 else (c, between)
            target = _applied(left, second, right)
            if between >= 0 and target >= 0:
                answer = f"{a}{first}{b}={between},{left}{second}{right}={target}"
                prompt = "".join(map(str, numbers)) + f">{target:03d}:"
                return Example(prompt, answer.ljust(self.answer_width, END))

    def is_right(self, example: Example, answer: str) -> bool:
        """Whether the answer reaches the target, uses each number once and has no wrong step."""
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
    """The two numbers and the result of a step like `3+5=8`, or None where the text is no step or is wrong."""
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
