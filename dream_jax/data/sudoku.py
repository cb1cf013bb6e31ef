"""Generates 4x4 sudoku puzzles, each with exactly one solution, and checks answers exactly.

A puzzle is text: four lines of four digits, 0 for an empty cell, no newline at the end. In a solved grid every row,
column and 2x2 box has each of 1..4 once.
There are only 288 solved grids. A puzzle is therefore made from a solved grid and a set of shown cells (a 16-bit
number, bit 4 * row + column); its solutions are the grids that have the same digits in these cells.
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
FEWEST_GIVENS = 4  # No 4x4 puzzle with three givens has exactly one solution.
TRAIN_SIZE = 1_000_000
TEST_SIZE = 200


@lru_cache(maxsize=1)
def solution_grids() -> np.ndarray:
    """Returns all solved grids in lexicographic order: uint8 [288, 16], digits 1..4, row by row; read-only."""
    rows = list(itertools.permutations((1, 2, 3, 4)))

    def fits(grid: tuple[int, ...], row: tuple[int, ...]) -> bool:
        above = len(grid) // 4
        if any(grid[4 * r + c] == row[c] for r in range(above) for c in range(4)):
            return False
        # In the second row of two boxes, each 2x2 box already has two digits from the row above.
        return above % 2 == 0 or all({*grid[-4:][c : c + 2]}.isdisjoint(row[c : c + 2]) for c in (0, 2))

    grids: list[tuple[int, ...]] = [()]
    for _ in range(4):
        grids = [grid + row for grid in grids for row in rows if fits(grid, row)]
    array = np.array(grids, dtype=np.uint8)
    array.setflags(write=False)
    return array


def split_grids(split: str, *, test_share: float = 0.2, split_seed: int = 0) -> np.ndarray:
    """Returns the indices into `solution_grids()` of the grids of one split, "train" or "test": int [n], ascending.

    The test split has test_share of all grids, rounded to a whole number and drawn with split_seed. The train split has
    the other grids, so no solution, and therefore no puzzle, is in both splits.
    Raises: ValueError for an unknown split, or for a share that leaves one split empty.
    """
    check_split(split)
    grids = solution_grids()
    test_count = round(test_share * len(grids))
    if not 0 < test_count < len(grids):
        raise ValueError(
            f"{test_share=} gives {test_count} of {len(grids)} grids to the test split; each split needs at least one"
        )
    # The order comes from a hash, because the output of a random generator may change between versions of numpy.
    order = sorted(range(len(grids)), key=lambda g: _hash("split", split_seed, grids[g].tobytes().hex()))
    return np.array(sorted(order[:test_count] if split == "test" else order[test_count:]))


def solutions(puzzle: str) -> np.ndarray:
    """Returns the solved grids with the givens of `puzzle`: uint8 [n, 16]. Raises ValueError if it is not a puzzle."""
    cells = _parse_puzzle(puzzle)
    agrees = ((solution_grids() == cells) | (cells == 0)).all(axis=1)
    return solution_grids()[agrees]


def is_solution(puzzle: str, answer: str) -> bool:
    """Returns whether `answer` is four lines of four digits that solve `puzzle` and keep all its givens.

    Whitespace before and after the whole answer is allowed, but no other text. Raises ValueError for a bad `puzzle`.
    """
    answer = answer.strip()
    # The pattern is [1-4], because \d also matches digits of other scripts.
    if not re.fullmatch(r"([1-4]{4}\n){3}[1-4]{4}", answer):
        return False
    cells = np.array([int(digit) for digit in answer.replace("\n", "")])
    return bool((solutions(puzzle) == cells).all(axis=1).any())


class SudokuSource:
    """A source of generated puzzles, each a function of (split, seed, index). The module describes their text.

    Rows: prompt = puzzle + "\\n", without a chat template, because in the nano model every character is a token;
    response = solution; meta = {"givens": number of shown cells, "grid": index into `solution_grids()`}. The grid is
    drawn uniformly, then the number of givens uniformly from min_givens..max_givens, then the shown cells uniformly
    from those sets of cells that leave one solution. All test puzzles are different, and a larger test split begins
    with the puzzles of a smaller one; train puzzles may repeat.

    seed: draws the puzzles. split_seed, test_share: divide the grids between the splits, whatever the seed is, so a
    grid is in the same split for every seed.
    size: number of rows; by default 1,000,000 for train and 200 for test. Test rows are drawn in the constructor, which
    takes a few microseconds for each.
    Raises: ValueError for a setting out of its range, or for a test size above the number of different puzzles.
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
        """Returns (grid, shown cells), drawn from one 128-bit number, which has many more bits than are needed."""
        bits = _hash(self._split, self._seed, index, attempt)
        bits, choice = divmod(bits, len(self._grids))
        grid = self._grids[choice]
        by_givens = _unique_masks()[grid]
        bits, extra = divmod(bits, self._max_givens - self._min_givens + 1)
        masks = by_givens[self._min_givens + extra]
        return grid, int(masks[bits % len(masks)])

    def _draw_distinct(self) -> list[tuple[int, int]]:
        """Returns (grid, shown cells) of each test puzzle, all different; draws again if a puzzle repeats."""
        drawn: dict[tuple[int, int], None] = {}
        for index in range(self._size):
            for attempt in range(1000):
                pick = self._draw(index, attempt)
                if pick not in drawn:
                    drawn[pick] = None
                    break
            else:
                raise ValueError(
                    f"size={self._size} is more than the number of different test puzzles; only {index} were "
                    "found, use a smaller size"
                )
        return list(drawn)


def _hash(*key: object) -> int:
    """Returns an integer in [0, 2**128) that depends only on `key`; it is the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16, person=b"dream_jax.sudoku")
    return int.from_bytes(digest.digest(), "little")


def _parse_puzzle(puzzle: str) -> np.ndarray:
    if not re.fullmatch(r"([0-4]{4}\n){3}[0-4]{4}", puzzle.strip()):
        raise ValueError(f"{puzzle!r:.60} is not a 4x4 puzzle: four lines of four digits 0..4")
    return np.array([int(digit) for digit in puzzle.strip().replace("\n", "")], dtype=np.uint8)


@lru_cache(maxsize=1)
def _row_texts() -> list[list[list[str]]]:
    """Returns the text of every row of a grid for every set of shown columns: [grid][row][4-bit set] -> 4 digits."""

    def texts(row: list[int]) -> list[str]:
        return ["".join(str(digit) if mask >> c & 1 else "0" for c, digit in enumerate(row)) for mask in range(16)]

    return [[texts(row) for row in grid] for grid in solution_grids().reshape(-1, 4, 4).tolist()]


@lru_cache(maxsize=1)
def _unique_masks() -> list[list[np.ndarray]]:
    """Returns the sets of shown cells that leave one solution: [grid][givens 0..16] -> uint16 [n], ascending."""
    grids = solution_grids()
    everything = np.arange(1 << CELLS, dtype=np.uint16)
    givens = np.bitwise_count(everything)
    # Exchanging digits does not change these sets, so only the 12 grids with the first row 1234 are computed.
    patterns = [tuple(np.argsort(grid[:4])[grid - 1].tolist()) for grid in grids]
    by_pattern: dict[tuple[int, ...], list[np.ndarray]] = {}
    for grid, pattern in zip(grids, patterns, strict=True):
        if pattern in by_pattern:
            continue
        agreement = (grids == grid) @ (1 << np.arange(CELLS))
        ambiguous = np.zeros(1 << CELLS, dtype=bool)
        ambiguous[agreement[agreement != (1 << CELLS) - 1]] = True
        for bit in range(CELLS):
            # Axes: [high bits, this bit, low bits]. An ambiguous set stays ambiguous if one more cell is hidden.
            halves = ambiguous.reshape(-1, 2, 1 << bit)
            halves[:, 0] |= halves[:, 1]
        by_pattern[pattern] = [everything[~ambiguous & (givens == count)] for count in range(CELLS + 1)]
    return [by_pattern[pattern] for pattern in patterns]
