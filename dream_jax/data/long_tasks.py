"""Generates problems with long answers, in which later text depends on earlier and on far text, and solves them.

Every token of an answer follows from the problem and from the text before it, so an answer can be written without
guessing. There are two kinds of problems. All numbers are single digits, and sums are taken modulo 10. A name is a letter,
upper or lower case.

A chain is a list of values and of sums. Each sum adds two names that are defined before it, often many lines before:

    a3b5            a is 3 and b is 5
    b+a=K           the answer writes this line as b5+a3=K8
    a+K=c           the answer writes this line as a3+K8=c1

A route is a list of roads in random order, a list of all towns, and a line with the town where the route starts and the
first total. The answer follows the roads, adds their lengths, and ends with the totals of all towns, as they were listed:

    b>c+4           there is a road from b to c, and it is 4 long
    a>b+7
    cab             the order of the towns in the last line of the answer
    x+0=5           for a route that starts in x, 5 is the first total; here it would be a+0=5

    a>b+7=2         the answer: from a to b, 5 + 7 = 12
    b>c+4=6
    c6a5b2

Each name is added once from the left and once from the right at most, and no two roads have the same start or end, so
each line that the answer copies can be found by a single name.
"""

from __future__ import annotations

import abc
import hashlib
import itertools
import re
import string
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, SupportsIndex, TypeVar

from dream_jax.data.rows import Intake, Row, check_index, check_split
from dream_jax.data.schemas import puzzle_row

ItemT = TypeVar("ItemT")

NAMES = string.ascii_letters
"""The names that problems choose from: 52 letters."""
TRAIN_SIZE = 1_000_000
TEST_SIZE = 2000
TEST_SHARE = 10
"""One of this many problems belongs to the test split; which ones depends only on their text."""

_VALUES, _SUM = re.compile(r"(?:[A-Za-z][0-9])+"), re.compile(r"([A-Za-z])\+([A-Za-z])=([A-Za-z])")
_ROAD, _START = re.compile(r"([A-Za-z])>([A-Za-z])\+([0-9])"), re.compile(r"([A-Za-z])\+0=([0-9])")


def solve_chain(problem: str) -> str:
    """Returns the answer to a chain, as the module describes it. Raises ValueError if the text is no chain."""
    first, *rest = problem.strip().split("\n")
    sums = [_SUM.fullmatch(line) for line in rest]
    if not _VALUES.fullmatch(first) or not rest or None in sums:
        raise ValueError(f"{problem!r:.60} is no chain: a line such as a3b5, then lines such as a+b=K")
    values = {name: int(digit) for name, digit in zip(first[::2], first[1::2], strict=True)}
    if 2 * len(values) != len(first):
        raise ValueError(f"{problem!r:.60} is no chain: a name has two values")
    lines = []
    for found in sums:
        assert found is not None
        left, right, result = found.groups()
        if left not in values or right not in values or result in values:
            raise ValueError(f"{problem!r:.60} is no chain: {found[0]} must add names that are defined, to a new name")
        values[result] = (values[left] + values[right]) % 10
        lines.append(f"{left}{values[left]}+{right}{values[right]}={result}{values[result]}")
    return "\n".join(lines)


def solve_route(problem: str) -> str:
    """Returns the answer to a route, as the module describes it. Raises ValueError if the text is no route."""
    text = problem.strip()
    *lines, towns, start = text.split("\n") if text.count("\n") > 1 else ("", "", "")
    roads, begins = [_ROAD.fullmatch(line) for line in lines], _START.fullmatch(start)
    if begins is None or None in roads:
        raise ValueError(f"{problem!r:.60} is no route: roads such as a>b+7, the towns, and a start such as a+0=5")
    onward = {road[1]: (road[2], int(road[3])) for road in roads if road is not None}
    town, total = begins[1], int(begins[2])
    totals, written = {town: total}, []
    while town in onward:
        after, length = onward.pop(town)
        total = (total + length) % 10
        written.append(f"{town}>{after}+{length}={total}")
        if after in totals:
            raise ValueError(f"{problem!r:.60} is no route: it comes to {after} twice")
        town, totals[after] = after, total
    if len(written) != len(lines) or sorted(towns) != sorted(totals):
        raise ValueError(
            f"{problem!r:.60} is no route: it must use all roads, and list the towns that it comes to once"
        )
    return "\n".join([*written, "".join(f"{name}{totals[name]}" for name in towns)])


class LongTaskSource(abc.ABC):
    """A source of generated problems with long answers, each a function of (split, seed, index, size of the problem).

    Rows: prompt = problem + "\\n", without a chat template, because in the nano model every character is a token;
    response = answer; meta = {"lines": number of lines that a problem has to work out}. All prompts of a source have the
    same number of characters, and so have all answers. One of ten texts of problems, which a hash chooses, is for the test
    split, so no problem is in both splits, whatever the seeds are.

    lines: number of lines to work out.
    seed: draws the problems.
    size: number of rows; by default 1,000,000 for train and 2,000 for test.
    Raises: ValueError for a setting out of its range, or if the problem would need more names than there are letters.
    """

    uniform_length = True
    intake = Intake()
    kind: ClassVar[str]

    def __init__(self, split: str, *, lines: int, seed: int = 0, size: int | None = None):
        check_split(split)
        self._size = size if size is not None else TRAIN_SIZE if split == "train" else TEST_SIZE
        if self._size < 1:
            raise ValueError(f"{size=} must be at least 1")
        if lines < 1 or self._names(lines) > len(NAMES):
            raise ValueError(
                f"{lines=} must be at least 1, and its {self._names(lines)} names at most the {len(NAMES)} letters"
            )
        self._split, self._seed, self._lines = split, seed, lines

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: SupportsIndex) -> Row:
        number = check_index(index, self._size)
        problem = self._problem(number)
        return puzzle_row(problem, self.solve(problem), {"lines": self._lines})

    def _problem(self, index: int) -> str:
        """Returns the first problem of this index that belongs to the split."""
        attempt = 0
        while True:
            problem = self._draw(_Draws(self.kind, self._split, self._seed, index, attempt))
            if (_Draws(self.kind, problem).below(TEST_SHARE) == 0) == (self._split == "test"):
                return problem
            attempt += 1

    @staticmethod
    @abc.abstractmethod
    def solve(problem: str) -> str:
        """Returns the answer to a problem of this kind. Raises ValueError if the text is no such problem."""

    @abc.abstractmethod
    def _names(self, lines: int) -> int:
        """Returns the number of names of a problem with so many lines."""

    @abc.abstractmethod
    def _draw(self, draws: _Draws) -> str:
        """Draws a problem."""


class ChainSource(LongTaskSource):
    """A source of chains, which the module describes: `lines` sums that begin with `givens` names with values.

    At each sum, `givens` names wait to be added from the left, and as many from the right, and one of each is drawn. So a
    name that waits is drawn with a probability of 1 / `givens` at each line, and some are never drawn. Further settings:
    see LongTaskSource.
    """

    kind = "chain"

    def __init__(self, split: str, *, lines: int = 28, givens: int = 11, seed: int = 0, size: int | None = None):
        if givens < 1:
            raise ValueError(f"{givens=} must be at least 1")
        self._givens = givens
        super().__init__(split, lines=lines, seed=seed, size=size)

    @staticmethod
    def solve(problem: str) -> str:
        """Returns what `solve_chain` returns."""
        return solve_chain(problem)

    def _names(self, lines: int) -> int:
        return lines + self._givens

    def _draw(self, draws: _Draws) -> str:
        names = draws.sample(NAMES, self._names(self._lines))
        given, results = names[: self._givens], names[self._givens :]
        left, right = list(given), list(given)
        text = ["".join(f"{name}{draws.below(10)}" for name in given)]
        for result in results:
            first, second = (waiting.pop(draws.below(len(waiting))) for waiting in (left, right))
            text.append(f"{first}+{second}={result}")
            left.append(result)
            right.append(result)
        return "\n".join(text)


class RouteSource(LongTaskSource):
    """A source of routes, which the module describes, with `lines` roads. Further settings: see LongTaskSource."""

    kind = "route"

    def __init__(self, split: str, *, lines: int = 24, seed: int = 0, size: int | None = None):
        super().__init__(split, lines=lines, seed=seed, size=size)

    @staticmethod
    def solve(problem: str) -> str:
        """Returns what `solve_route` returns."""
        return solve_route(problem)

    def _names(self, lines: int) -> int:
        return lines + 1

    def _draw(self, draws: _Draws) -> str:
        towns = draws.sample(NAMES, self._names(self._lines))
        roads = [f"{a}>{b}+{draws.below(10)}" for a, b in itertools.pairwise(towns)]
        return "\n".join(
            [
                *draws.sample(roads, len(roads)),
                "".join(draws.sample(towns, len(towns))),
                f"{towns[0]}+0={draws.below(10)}",
            ]
        )


class LongTask(NamedTuple):
    """A kind of problem with the size of its problems.

    make: the class of the source.
    sizes: the arguments that give the size.
    new_tokens: number of tokens that an answer is sampled with: its own, then end tokens up to a multiple of 32.
    """

    make: type[LongTaskSource]
    sizes: Mapping[str, int]
    new_tokens: int

    def source(self, split: str, *, seed: int = 0, size: int | None = None) -> LongTaskSource:
        """Returns the rows of a split; `seed` and `size` are as in LongTaskSource."""
        return self.make(split, seed=seed, size=size, **self.sizes)


LONG_TASKS: Mapping[str, LongTask] = {
    "chain": LongTask(ChainSource, {"lines": 28, "givens": 11}, 256),
    "chain-short": LongTask(ChainSource, {"lines": 7, "givens": 4}, 64),
    "chain-long": LongTask(ChainSource, {"lines": 41, "givens": 11}, 384),
    "route": LongTask(RouteSource, {"lines": 24}, 256),
    "route-short": LongTask(RouteSource, {"lines": 6}, 64),
    "route-long": LongTask(RouteSource, {"lines": 50}, 512),
}
"""The kinds and sizes that have a name, which `open_source` knows. The short ones are for the start of a training."""


class _Draws:
    """Random numbers that depend only on `key`; they are the same on every machine and with every version of Python."""

    def __init__(self, *key: object):
        digest = hashlib.shake_256("/".join(map(str, ("dream_jax.long_tasks", *key))).encode())
        # A problem needs at most about 1,000 bits: the order of 52 names and of 50 roads, and 100 further choices.
        self._bits = int.from_bytes(digest.digest(256), "little")

    def below(self, bound: int) -> int:
        """Returns a number in [0, bound), all almost equally likely."""
        self._bits, found = divmod(self._bits, bound)
        return found

    def sample(self, items: Sequence[ItemT], count: int) -> list[ItemT]:
        """Returns `count` different items in random order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]
