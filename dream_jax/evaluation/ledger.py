"""The folder of one evaluation: what was asked, one row an answer, and how long it took.

A run is a fixed sequence of units (batches), each of a known number of rows. Rows are written a unit at a time, in the
order of the plan and without anything that differs between two runs; so a run that was killed, by whatever means, resumes
to the same file as one that was not. Times lie in a file of their own.

    settings.json   what the rows depend on; another run's folder is refused
    items.jsonl     a row an answer
    seconds.jsonl   a row a unit: its wall clock, and whether a program was compiled in it
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dream_jax.inference import RowName
from dream_jax.row_file import JsonRow, RowFile, agree_on_settings

ITEMS, SECONDS, SETTINGS = "items.jsonl", "seconds.jsonl", "settings.json"

_REMEDY = "give another --out, or --overwrite"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkUnit:
    """Problems that are computed together under one seed.

    Attributes:
      seed: of everything random in it.
      problems: their indices in the list of problems.
      names: (seed, number of the problem) of the rows that it makes, in order.
    """

    seed: int
    problems: tuple[int, ...]
    names: tuple[RowName, ...]


class Ledger:
    """The files of a run, which resumes where they end.

    Args:
      folder: made if missing.
      recipe: everything the rows depend on, as JSON.
      plan: the units; a longer plan that begins with the old one resumes after it.
      overwrite: start anew whatever the folder holds.

    Raises: ValueError when the folder holds a run of another recipe, or a file that is not such a run's; OSError.
    """

    def __init__(
        self, folder: pathlib.Path, recipe: Mapping[str, Any], plan: Sequence[WorkUnit], *, overwrite: bool = False
    ):
        self._plan = plan
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for name in (SETTINGS, ITEMS, SECONDS):
                (folder / name).unlink(missing_ok=True)
        agree_on_settings(folder / SETTINGS, folder / ITEMS, recipe, _REMEDY)
        self._items, self._seconds = RowFile(folder / ITEMS), RowFile(folder / SECONDS)
        self._check_rows()
        self.done, num_rows = 0, 0
        for unit in plan[: len(self.seconds)]:
            if num_rows + len(unit.names) > len(self.rows):
                break
            num_rows += len(unit.names)
            self.done += 1
        # Units that were cut short are computed again whole: as part of the same batch they come out the same.
        self._items.keep(num_rows)
        self._seconds.keep(self.done)

    @property
    def rows(self) -> list[JsonRow]:
        """The answers so far."""
        return self._items.rows

    @property
    def seconds(self) -> list[JsonRow]:
        """The times of the units so far."""
        return self._seconds.rows

    def append(self, rows: Sequence[JsonRow], seconds: JsonRow) -> None:
        """Writes the rows of the next unit, to the disk. Raises ValueError for rows that are not the plan's."""
        unit = self._plan[self.done]
        if [_name(row) for row in rows] != list(unit.names):
            raise ValueError(f"unit {self.done} should make rows {unit.names}, not {[_name(row) for row in rows]}")
        self._items.append(rows)
        self._seconds.append([seconds])
        self.done += 1

    def _check_rows(self) -> None:
        expected = [name for unit in self._plan for name in unit.names]
        for number, row in enumerate(self.rows, 1):
            where = f"{self._items.path}:{number}"
            if number > len(expected):
                raise ValueError(f"{where}: more rows than this run has; repeat its --seeds and --limit, {_REMEDY}")
            if _name(row) != expected[number - 1]:
                raise ValueError(
                    f"{where}: a row of seed and number {_name(row)} where {expected[number - 1]} should be; {_REMEDY}"
                )


def _name(row: JsonRow) -> tuple[Any, Any]:
    return row.get("seed"), row.get("number")
