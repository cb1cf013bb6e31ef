"""The folder of one evaluation: its settings, one row for each answer, and the time of each unit.

A run is a fixed sequence of units (batches), each with a known number of rows. The rows of a unit are written together,
in the order of the plan, and contain nothing that differs between two runs. So a run that was killed and resumed ends
with the same file as a run without interruption. Times differ between runs and are in a separate file.

    settings.json   the settings that the rows depend on; a run with other settings refuses the folder
    items.jsonl     one row for each answer
    seconds.jsonl   one row for each unit: its wall-clock time in seconds, and whether a program was compiled in it
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dream_jax.files import write_json
from dream_jax.inference import RowName
from dream_jax.row_file import JsonRow, RowFile, agree_on_settings

ITEMS, SECONDS, SETTINGS = "items.jsonl", "seconds.jsonl", "settings.json"

_REMEDY = "give another --out, or --overwrite"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkUnit:
    """Problems that are computed together under one seed.

    Attributes:
      seed: the seed of all random draws of the unit.
      problems: the indices of its problems in the list of problems.
      names: (seed, number of the problem) of each row of the unit, in order.
    """

    seed: int
    problems: tuple[int, ...]
    names: tuple[RowName, ...]


class Ledger:
    """Reads and writes the files of a run; a run resumes after the last complete unit in them.

    Args:
      folder: the folder of the run; it is made if it is missing.
      recipe: everything that the rows depend on, as values that JSON can hold.
      plan: all units of the run. Its first units must be those in the folder; the run resumes after them.
      overwrite: delete the files of an earlier run in the folder.

    Raises: ValueError if the folder has a run with another recipe, or rows that are not in the plan; OSError if a file
      cannot be read or written.
    """

    def __init__(
        self, folder: pathlib.Path, recipe: Mapping[str, Any], plan: Sequence[WorkUnit], *, overwrite: bool = False
    ):
        self._plan = plan
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for name in (ITEMS, SECONDS):
                (folder / name).unlink(missing_ok=True)
            # Replaced and never missing: the other files of a folder without settings count as those of somebody else.
            write_json(folder / SETTINGS, recipe)
        agree_on_settings(folder / SETTINGS, folder / ITEMS, recipe, _REMEDY)
        self._items, self._seconds = RowFile(folder / ITEMS, name=_name), RowFile(folder / SECONDS)
        self._check_rows()
        self.done, num_rows = 0, 0
        for unit in plan[: len(self.seconds)]:
            if num_rows + len(unit.names) > len(self.rows):
                break
            num_rows += len(unit.names)
            self.done += 1
        # A unit with missing rows is computed again as a whole: in the same batch, its rows get the same values.
        self._items.keep(num_rows)
        self._seconds.keep(self.done)

    @property
    def rows(self) -> list[JsonRow]:
        """The rows of items.jsonl, one for each answer so far, in the order of the plan."""
        return self._items.rows

    @property
    def seconds(self) -> list[JsonRow]:
        """The rows of seconds.jsonl, one for each complete unit: rows, seconds and compiled."""
        return self._seconds.rows

    def append(self, rows: Sequence[JsonRow], seconds: JsonRow) -> None:
        """Writes the rows and the time of the next unit to the disk. Raises ValueError if the plan has other rows."""
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
                raise ValueError(
                    f"{where}: the folder has more rows than this run makes; give the --seeds and --limit of the run that "
                    f"wrote it, {_REMEDY}"
                )
            if _name(row) != expected[number - 1]:
                raise ValueError(
                    f"{where}: (seed, number) is {_name(row)}, but this run expects {expected[number - 1]}; {_REMEDY}"
                )


def _name(row: JsonRow) -> tuple[Any, Any]:
    return row.get("seed"), row.get("number")
