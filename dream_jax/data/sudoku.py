"""4x4 sudoku: an endless supply of puzzles with exactly one solution, and exact scoring.

A puzzle is text: four lines of four digits, 0 for an empty cell, no newline at the end. Rows, columns and the
four 2x2 boxes hold 1..4 once.
There are only 288 solved grids, so a puzzle is a grid and a set of cells shown (a 16-bit number, bit
4*row+column), and its solutions are the grids that agree with it on those cells.
"""

import hashlib
import itertools
import re
from functools import lru_cache
from typing import SupportsIndex

import numpy as np

from dream_jax.data.rows import Intake, Row, check_index, check_split
from dream_jax.data.schemas import puzzle_row

CELLS = 16
FEWEST_GIVENS = 4  # no 4x4 puzzle with three givens has one solution
TRAIN_SIZE = 1_000_000
TEST_SIZE = 200


@lru_cache(maxsize=1)
def solution_grids() -> np.ndarray:
    """All solved grids in lexicographic order: uint8 [288, 16], digits 1..4, row by row; read-only."""
    rows = list(itertools.permutations((1, 2, 3, 4)))

    def fits(grid: tuple[int, ...], row: tuple[int, ...]) -> bool:
        above = len(grid) // 4
        if any(grid[4 * r + c] == row[c] for r in range(above) for c in range(4)):
            return False
        # The second row of a band: each 2x2 box already has two digits from the row above it.
        return above % 2 == 0 or all({*grid[-4:][c : c + 2]}.isdisjoint(row[c : c + 2]) for c in (0, 2))

    grids: list[tuple[int, ...]] = [()]
    for _ in range(4):
        grids = [grid + row for grid in grids for row in rows if fits(grid, row)]
    array = np.array(grids, dtype=np.uint8)
    array.setflags(write=False)
    return array


def split_grids(split: str, *, test_share: float = 0.2, split_seed: int = 0) -> np.ndarray:
    """Numbers (rows of `solution_grids()`) of the grids of one split: int [n], ascending.

    The test split has the nearest whole number to test_share of all grids, drawn by split_seed; the train
    split has the others, so no solution, and hence no puzzle, is in both. Raises ValueError for an unknown
    split or a share that leaves one side empty.
    """
    check_split(split)
    grids = solution_grids()
    test_count = round(test_share * len(grids))
    if not 0 < test_count < len(grids):
        raise ValueError(
            f"{test_share=} gives {test_count} of {len(grids)} grids to the test split; each split needs at least one"
        )
    # Order by a hash rather than by a random generator: generators may change their streams between library
    # versions.
    order = sorted(range(len(grids)), key=lambda g: _hash("split", split_seed, grids[g].tobytes().hex()))
    return np.array(sorted(order[:test_count] if split == "test" else order[test_count:]))


def solutions(puzzle: str) -> np.ndarray:
    """The solved grids that agree with the givens of `puzzle`: uint8 [n, 16]. ValueError if it is none."""
    cells = _parse_puzzle(puzzle)
    agrees = ((solution_grids() == cells) | (cells == 0)).all(axis=1)
    return solution_grids()[agrees]


def is_solution(puzzle: str, answer: str) -> bool:
    """Whether `answer` is four lines of four digits that keep all givens and solve `puzzle`.

    Whitespace around the whole answer is tolerated, nothing else is. Raises ValueError if `puzzle` is none.
    """
    answer = answer.strip()
    # [1-4], not \d, which takes the digits of every script.
    if not re.fullmatch(r"([1-4]{4}\n){3}[1-4]{4}", answer):
        return False
    cells = np.array([int(digit) for digit in answer.replace("\n", "")])
    return bool((solutions(puzzle) == cells).all(axis=1).any())


class SudokuSource:
    """Puzzles by number, each a function of (split, seed, index): see the module for the text.

    Rows: prompt = puzzle + "\\n" (no chat template: in the nano model every character costs a token),
    response = solution, meta = {"givens": number of cells shown, "grid": row of `solution_grids()`}. Grids
    are drawn evenly, then the number of givens evenly over min_givens..max_givens, then the cells evenly
    among those that leave one solution. Test puzzles are all different from each other, and a larger test
    split begins with the smaller one; train puzzles may repeat.

    seed draws the puzzles. split_seed and test_share divide the grids between the splits; they do not depend on seed, so
    that no seed moves a grid from one split to the other.
    size: number of rows; by default 1,000,000 for train and 200 for test. Test rows are drawn once at the
    start (some microseconds each).
    Raises: ValueError for a bad setting, or for a test size that the distinct puzzles do not reach.
    """

    uniform_length = True
    intake = Intake()

    def __init__(
        self,
        split: str,
        *,
        seed: int = 0,
        size: int | None = None,
        min_givens: int = 4,
        max_givens: int = 12,
        test_share: float = 0.2,
        split_seed: int = 0,
    ):
        if not FEWEST_GIVENS <= min_givens <= max_givens < CELLS:
            raise ValueError(
                f"{min_givens=} and {max_givens=} must satisfy {FEWEST_GIVENS} <= min_givens <= max_givens "
                f"<= {CELLS - 1}"
            )
        self._grids = split_grids(split, test_share=test_share, split_seed=split_seed).tolist()
        self._size = size if size is not None else TRAIN_SIZE if split == "train" else TEST_SIZE
        if self._size < 1:
            raise ValueError(f"{size=} must be at least 1")
        self._split, self._seed = split, seed
        self._min_givens, self._max_givens = min_givens, max_givens
        self._distinct = self._draw_distinct() if split == "test" else None

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: SupportsIndex) -> Row:
        number = check_index(index, self._size)
        grid, shown = self._distinct[number] if self._distinct is not None else self._draw(number)
        a, b, c, d = _row_texts()[grid]
        puzzle = f"{a[shown & 15]}\n{b[shown >> 4 & 15]}\n{c[shown >> 8 & 15]}\n{d[shown >> 12]}"
        solution = f"{a[15]}\n{b[15]}\n{c[15]}\n{d[15]}"
        return puzzle_row(puzzle, solution, {"givens": shown.bit_count(), "grid": grid})

    def _draw(self, index: int, attempt: int = 0) -> tuple[int, int]:
        """(grid, shown cells), from one 128-bit number: far more bits than the three draws use up."""
        bits = _hash(self._split, self._seed, index, attempt)
        bits, choice = divmod(bits, len(self._grids))
        grid = self._grids[choice]
        by_givens = _unique_masks()[grid]
        bits, extra = divmod(bits, self._max_givens - self._min_givens + 1)
        masks = by_givens[self._min_givens + extra]
        return grid, int(masks[bits % len(masks)])

    def _draw_distinct(self) -> list[tuple[int, int]]:
        drawn: dict[tuple[int, int], None] = {}
        for index in range(self._size):
            for attempt in range(1000):
                pick = self._draw(index, attempt)
                if pick not in drawn:
                    drawn[pick] = None
                    break
            else:
                raise ValueError(
                    f"size={self._size} is more test puzzles than can be drawn distinct; only {index} were "
                    "found, ask for fewer"
                )
        return list(drawn)


def _hash(*key: object) -> int:
    """A number in [0, 2**128) that depends on `key` alone, the same on every machine and in every version."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16, person=b"dream_jax.sudoku")
    return int.from_bytes(digest.digest(), "little")


def _parse_puzzle(puzzle: str) -> np.ndarray:
    if not re.fullmatch(r"([0-4]{4}\n){3}[0-4]{4}", puzzle.strip()):
        raise ValueError(f"{puzzle!r:.60} is not a 4x4 puzzle: four lines of four digits 0..4")
    return np.array([int(digit) for digit in puzzle.strip().replace("\n", "")], dtype=np.uint8)


@lru_cache(maxsize=1)
def _row_texts() -> list[list[list[str]]]:
    """Text of every row of every grid under every choice of columns: [grid][row][4-bit mask] -> 4 digits."""

    def texts(row: list[int]) -> list[str]:
        return ["".join(str(digit) if mask >> c & 1 else "0" for c, digit in enumerate(row)) for mask in range(16)]

    return [[texts(row) for row in grid] for grid in solution_grids().reshape(-1, 4, 4).tolist()]


@lru_cache(maxsize=1)
def _unique_masks() -> list[list[np.ndarray]]:
    """The sets of shown cells that leave one solution: [grid][givens 0..16] -> uint16 [n], ascending."""
    grids = solution_grids()
    everything = np.arange(1 << CELLS, dtype=np.uint16)
    givens = np.bitwise_count(everything)
    # Renaming the digits changes no mask, so it is enough to look at the 12 grids whose first row is 1234.
    patterns = [tuple(np.argsort(grid[:4])[grid - 1].tolist()) for grid in grids]
    by_pattern: dict[tuple[int, ...], list[np.ndarray]] = {}
    for grid, pattern in zip(grids, patterns, strict=True):
        if pattern in by_pattern:
            continue
        agreement = (grids == grid) @ (1 << np.arange(CELLS))
        ambiguous = np.zeros(1 << CELLS, dtype=bool)
        ambiguous[agreement[agreement != (1 << CELLS) - 1]] = True
        for bit in range(CELLS):
            # [high bits, this bit, low bits]: what is ambiguous stays so when one more cell is hidden.
            halves = ambiguous.reshape(-1, 2, 1 << bit)
            halves[:, 0] |= halves[:, 1]
        by_pattern[pattern] = [everything[~ambiguous & (givens == count)] for count in range(CELLS + 1)]
    return [by_pattern[pattern] for pattern in patterns]
