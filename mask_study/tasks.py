"""Small tasks whose answers are easiest to write in different orders.

Prompts and answers are text of fixed width, a byte a token: what differs between two runs is then the mask, and not where
rows begin and end. Prompts and answers are multiples of four tokens, so that blocks of four never hold some of both.

Knows text and randomness. Knows nothing of tokens or models.
"""

from __future__ import annotations

import abc
import dataclasses
import string
from typing import NamedTuple

import numpy as np

from dream_jax.data.sudoku import SudokuSource

END = "$"
"""Stands for end-of-text, which is also what follows it up to the task's width."""


class Example(NamedTuple):
    """A prompt, and an answer that would be right; both of the task's widths."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """What is asked, and what counts as an answer.

    Attributes:
      name: in tables.
      prompt_width, answer_width: tokens.
      steps: of training. Few on purpose, and chosen once by trials under the bidirectional mask: what is told apart is how
        soon something is learned.
    """

    name: str
    prompt_width: int
    answer_width: int
    steps: int

    @abc.abstractmethod
    def draw(self, generator: np.random.Generator) -> Example:
        """One example."""

    def is_right(self, example: Example, answer: str) -> bool:
        """Whether the text answers the prompt; what follows the first end-of-text counts for nothing."""
        return answer.split(END)[0] == example.answer.split(END)[0]

    def examples(self, split: str, seed: int, number: int) -> list[Example]:
        """So many examples; those of the test split are the same for every seed, and no prompt of them is in the other.

        Args:
          split: "train" or "test".
          seed: of the train split.
          number: how many.
        """
        if split == "test":
            return self._drawn(np.random.default_rng([1, 0]), number, frozenset())
        # More than any study tests on: how many it does must not change what it trains on.
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


class Addition(Task):
    """`345+678=` -> `1023`: carries run from the last digit to the first, against the direction of writing."""

    def draw(self, generator: np.random.Generator) -> Example:
        """Two numbers of three digits, and their sum with four."""
        first, second = generator.integers(0, 1000, 2)
        return Example(f"{first:03d}+{second:03d}=", f"{first + second:04d}")


class Copy(Task):
    """`kqpaczmvbre>` -> `kqpaczmvbre`: each token has one cause, at the same distance; no order is better than another."""

    def draw(self, generator: np.random.Generator) -> Example:
        """Eleven letters, and the same again."""
        text = _letters(generator)
        return Example(f"{text}>", f"{text}{END}")


class Reversal(Task):
    """`kqpaczmvbre<` -> `erbvmzcapqk`: as copying, but the first token to write has its cause nearest."""

    def draw(self, generator: np.random.Generator) -> Example:
        """Eleven letters, and the same from the last to the first."""
        text = _letters(generator)
        return Example(f"{text}<", f"{text[::-1]}{END}")


class Sudoku(Task):
    """4x4 sudoku, its cells in a row, 0 for an empty one: what is easiest to write differs from puzzle to puzzle."""

    def draw(self, generator: np.random.Generator) -> Example:
        """Not drawn here: `examples` takes those of `data.sudoku`, whose grids of the two splits differ."""
        raise NotImplementedError

    def examples(self, split: str, seed: int, number: int) -> list[Example]:
        """Puzzles with 6 to 12 givens and one solution; no solution is in both splits."""
        source = SudokuSource(split, seed=0 if split == "test" else seed, size=number, min_givens=6)
        flat = lambda text: text.replace("\n", "")
        return [Example(flat(row.prompt), flat(row.response)) for row in map(source.__getitem__, range(number))]


class ScatteredSudoku(Sudoku):
    """The same puzzles, the cells in another order: no four that follow each other share a row, a column or a box."""

    def examples(self, split: str, seed: int, number: int) -> list[Example]:
        """As `Sudoku.examples`."""
        found = super().examples(split, seed, number)
        moved = lambda text: "".join(text[cell] for cell in _SCATTERED)
        return [Example(moved(prompt), moved(answer)) for prompt, answer in found]


# Cells by their value in some solved grid: equal values never share a row, a column or a box.
_SOLVED = "0123230110323210"
_SCATTERED = sorted(range(16), key=lambda cell: (_SOLVED[cell], cell))


class Countdown(Task):
    """`352>006:` -> `3+5=8,8-2=6`: several answers may be right, and their parts must agree with each other."""

    def draw(self, generator: np.random.Generator) -> Example:
        """Three numbers up to seven, and a way from all of them to the target by sums and differences."""
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
        """Whether it gets to the target, each number used once, each step right."""
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
    """The two numbers and the result of `3+5=8`, if that is what it is and it is right."""
    for sign in "+-":
        left, found, rest = text.partition(sign)
        right, equals, result = rest.partition("=")
        if not (found and equals):
            continue
        # Written as a person would: no sign, no leading zero.
        if all(part.isascii() and part.isdigit() and part == str(int(part)) for part in (left, right, result)):
            return (left, right, result) if _applied(int(left), sign, int(right)) == int(result) else None
    return None


TASKS = {
    task.name: task
    for task in (
        Addition("addition", 8, 4, 800),
        Copy("copy", 12, 12, 300),
        Reversal("reversal", 12, 12, 300),
        Sudoku("sudoku", 16, 16, 600),
        ScatteredSudoku("scattered sudoku", 16, 16, 600),
        Countdown("countdown", 8, 16, 600),
    )
}
