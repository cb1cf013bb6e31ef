"""The folder of one evaluation: what was asked, one row an answer, and how long it took.

A run is a fixed sequence of units (batches), each of a known number of rows. Rows are written a unit at a time, in the
order of the plan and without anything that differs between two runs; so a run that was killed, by whatever means, goes on
to the same file as one that was not. Times lie in a file of their own.

    settings.json   what the rows depend on; another run's folder is refused
    items.jsonl     a row an answer
    seconds.jsonl   a row a unit: its wall clock, and whether a program was compiled in it

Knows files. Knows nothing of tasks and models.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

ITEMS, SECONDS, SETTINGS = "items.jsonl", "seconds.jsonl", "settings.json"

RowName = tuple[int, int]
"""(seed, number of the problem): what a row is an answer to."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """Problems that are computed together under one seed.

    Attributes:
      seed: of everything random in it.
      problems: their places in the list of problems.
      names: the rows it makes, in order.
    """

    seed: int
    problems: tuple[int, ...]
    names: tuple[RowName, ...]


class Ledger:
    """The files of a run, open for going on.

    folder: made if missing.
    recipe: everything the rows depend on, as JSON.
    plan: the units; a longer plan that begins with the old one goes on from it.
    overwrite: start anew whatever the folder holds.

    Raises: ValueError when the folder holds a run of another recipe, or a file that is not such a run's; OSError.
    """

    def __init__(
        self, folder: pathlib.Path, recipe: Mapping[str, Any], plan: Sequence[Unit], *, overwrite: bool = False
    ):
        self._folder, self._plan = folder, plan
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for name in (SETTINGS, ITEMS, SECONDS):
                (folder / name).unlink(missing_ok=True)
        self._check_recipe(json.loads(json.dumps(recipe)))
        rows, sizes = self._read_rows()
        timed = self._read_seconds()
        self.done = 0
        kept = 0
        for unit in plan:
            if self.done == len(timed) or kept + len(unit.names) > len(rows):
                break
            kept += len(unit.names)
            self.done += 1
        # Units that were cut short are computed again whole: as part of the same batch they come out the same.
        _truncate(folder / ITEMS, sum(sizes[:kept]))
        _truncate(folder / SECONDS, sum(size for _, size in timed[: self.done]))
        self.rows: list[Row] = rows[:kept]
        self.seconds: list[Row] = [row for row, _ in timed[: self.done]]

    def append(self, rows: Sequence[Row], seconds: Row) -> None:
        """Writes the rows of the next unit, to the disk. Raises ValueError for rows that are not the plan's."""
        unit = self._plan[self.done]
        if [_name(row) for row in rows] != list(unit.names):
            raise ValueError(f"unit {self.done} should make rows {unit.names}, not {[_name(row) for row in rows]}")
        _append(self._folder / ITEMS, rows)
        _append(self._folder / SECONDS, [seconds])
        self.rows.extend(rows)
        self.seconds.append(seconds)
        self.done += 1

    def _check_recipe(self, recipe: dict[str, Any]) -> None:
        path = self._folder / SETTINGS
        if not path.is_file():
            if (self._folder / ITEMS).exists():
                raise ValueError(f"{self._folder} has {ITEMS} but no {SETTINGS}; give another --out, or --overwrite")
            write_whole(path, json.dumps(recipe, indent=2) + "\n")
            return
        before = read_json(path)
        changed = [
            f"{name} was {before.get(name)!r:.80}, now {recipe.get(name)!r:.80}"
            for name in sorted(set(before) | set(recipe))
            if before.get(name) != recipe.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self._folder} holds a run with other settings ({'; '.join(changed)}); repeat them, give another --out, "
                "or --overwrite"
            )

    def _read_rows(self) -> tuple[list[Row], list[int]]:
        expected = [name for unit in self._plan for name in unit.names]
        rows, sizes = [], []
        for number, (row, size) in enumerate(read_rows(self._folder / ITEMS), 1):
            if number > len(expected):
                raise ValueError(
                    f"{self._folder / ITEMS}:{number}: more rows than this run has; repeat its --seeds and --limit, give "
                    "another --out, or --overwrite"
                )
            if _name(row) != expected[number - 1]:
                raise ValueError(
                    f"{self._folder / ITEMS}:{number}: a row of seed and number {_name(row)} where {expected[number - 1]} "
                    "should be; give another --out, or --overwrite"
                )
            rows.append(row)
            sizes.append(size)
        return rows, sizes

    def _read_seconds(self) -> list[tuple[Row, int]]:
        return read_rows(self._folder / SECONDS)


def read_rows(path: pathlib.Path) -> list[tuple[Row, int]]:
    """The objects of a file that is only ever appended to, each with its size in bytes; none if there is no file.

    A last line without its end was cut short while it was written, and is left out.
    Raises: ValueError naming file and line for anything else that is no object of JSON in UTF-8.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path}:{number}: not a row of JSON ({error}); the file was damaged or is another"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: a {type(row).__name__}, not an object; the file is another")
        found.append((row, len(line)))
    return found


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a file. Raises: ValueError naming the file when it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON in UTF-8 ({error}); remove it or give another --out") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a {type(found).__name__}, not an object; give another --out")
    return found


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file that is there whole or as it was before."""
    beside = path.with_name(f".{path.name}.incomplete")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _name(row: Row) -> tuple[Any, Any]:
    return row.get("seed"), row.get("number")


def _append(path: pathlib.Path, rows: Sequence[Row]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def _truncate(path: pathlib.Path, size: int) -> None:
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)
