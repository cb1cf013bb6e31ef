"""Files of JSON rows that survive a kill, and a check that all rows of a file were made with the same settings.

Rows are only appended, and are on the disk before `append` returns. If a kill has cut the last line short, that line is
ignored, so that its work is done again.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dream_jax.files import naming_full_disk, read_json, write_json
from dream_jax.paths import check_file
from dream_jax.side_files import parse_json

_DAMAGED = "the file is damaged, or it is not a file of rows"

JsonRow = dict[str, Any]


class RowFile:
    """A .jsonl file with one JSON object in each line.

    Args:
      path: path of the file, which need not exist.
      start: the first bytes of every row. A last line without a newline counts as a row that was cut short, which `keep`
        removes, only if it begins like this; anything else is refused, because somebody else has written it.
      name: returns the name of a row, which no other row may have; None if rows have no names.

    Attributes:
      path: path of the file.
      rows: the objects in the file, in order.

    Raises:
      IsADirectoryError, NotADirectoryError: `path` is a directory, or a parent of it is a file.
      ValueError: `path` is an address, a pipe or a device; a line is not a JSON object in UTF-8, or two rows have the same
        name; the message names file and line.
    """

    def __init__(self, path: pathlib.Path, start: bytes = b"", name: Callable[[JsonRow], object] | None = None):
        self.path = check_file(path, regular=True)
        first: dict[str, int] = {}
        self.rows: list[JsonRow] = []
        self._sizes: list[int] = []
        content = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                if not line.startswith(start[: len(line)]):
                    raise ValueError(f"{path}:{number}: not a row that was cut short; this is not a file of rows")
                break
            # Older versions wrote NaN into rows.
            row = parse_json(line, f"{path}:{number}: not a row of JSON: it", _DAMAGED, nan=True)
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: a {type(row).__name__}, not an object; this is not a file of rows")
            if name is not None and (before := first.setdefault(repr(name(row)), number)) != number:
                raise ValueError(
                    f"{path}:{number}: the row has the same name as the row in line {before}, {name(row)}; remove one of "
                    "these lines"
                )
            self.rows.append(row)
            self._sizes.append(len(line))

    def keep(self, count: int) -> None:
        """Keeps the first `count` rows and removes the rest of the file, including a last line that was cut short."""
        del self.rows[count:], self._sizes[count:]
        if self.path.exists() and self.path.stat().st_size > sum(self._sizes):
            os.truncate(self.path, sum(self._sizes))

    def append(self, rows: Sequence[JsonRow]) -> None:
        """Appends rows to the file, and returns when they are on the disk.

        Raises:
          ValueError: a row holds NaN or an infinity, which JSON does not have; nothing is written.
          OSError: the rows cannot be written.
        """
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        with naming_full_disk(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
        self.rows.extend(rows)
        self._sizes.extend(len(line.encode("utf-8")) for line in lines)


def agree_on_settings(path: pathlib.Path, rows: pathlib.Path, settings: Mapping[str, Any], remedy: str) -> None:
    """Writes the settings with which the rows of a file are made, or checks that earlier rows were made with the same.

    Args:
      path: path of the file of settings. It is written (completely or not at all) if it does not exist.
      rows: path of the file of rows.
      settings: values that JSON can represent, by name.
      remedy: what the user can do after an error; the message ends with it.

    Raises:
      ValueError: rows exist that were made with other settings, or that have no file of settings.
      OSError: a file cannot be read or written.
    """
    now = json.loads(json.dumps(settings, allow_nan=False))
    if not path.is_file():
        if rows.exists() and rows.stat().st_size:
            raise ValueError(f"{rows} has rows, but {path.name}, the file of their settings, is missing; {remedy}")
        write_json(path, now)
        return
    before = read_json(path, remedy)
    changed = "; ".join(
        f"{name} was {before.get(name)!r:.80}, now {now.get(name)!r:.80}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)  # a setting that is missing in an older file counts as None
    )
    if changed:
        raise ValueError(
            f"{rows} holds a run with other settings ({changed}); give the same settings again; otherwise {remedy}"
        )
