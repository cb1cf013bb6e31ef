"""Files of JSON rows that are only appended to, and so survive a kill, and the settings that their rows follow from.

Rows are on the disk before `append` returns. A last line that was cut short while it was written is left out, so that the
work behind it is done again.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dream_jax.files import read_json, write_json

JsonRow = dict[str, Any]


class RowFile:
    """A .jsonl file of objects, one a line.

    Attributes:
      path: of the file; it need not exist.
      rows: the objects in it, in order.

    Raises: ValueError naming file and line for whatever is no object of JSON in UTF-8.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.rows: list[JsonRow] = []
        self._sizes: list[int] = []
        content = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(content.splitlines(keepends=True), 1):
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
            self.rows.append(row)
            self._sizes.append(len(line))

    def keep(self, count: int) -> None:
        """Cuts the file off after its first `count` rows; with `count` = len(rows) only what was cut short goes."""
        del self.rows[count:], self._sizes[count:]
        if self.path.exists() and self.path.stat().st_size > sum(self._sizes):
            os.truncate(self.path, sum(self._sizes))

    def append(self, rows: Sequence[JsonRow]) -> None:
        """Writes rows at the end, to the disk."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
        self.rows.extend(rows)
        self._sizes.extend(len(line.encode("utf-8")) for line in lines)


def agree_on_settings(path: pathlib.Path, rows: pathlib.Path, settings: Mapping[str, Any], remedy: str) -> None:
    """Writes the settings that the rows of a file follow from, or checks that rows which are there follow from the same.

    Args:
      path: of the file of settings; written, whole or not at all, where there is none.
      rows: of the file of rows.
      settings: what JSON can hold.
      remedy: what to do about a refusal.

    Raises: ValueError when rows are there that follow from other settings, or nothing says from which; OSError.
    """
    now = json.loads(json.dumps(settings))
    if not path.is_file():
        if rows.exists() and rows.stat().st_size:
            raise ValueError(f"{rows} has no {path.name} beside it to say what its rows follow from; {remedy}")
        write_json(path, now)
        return
    before = read_json(path, remedy)
    changed = "; ".join(
        f"{name} was {before.get(name)!r:.80}, now {now.get(name)!r:.80}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)  # settings that did not exist yet are None
    )
    if changed:
        raise ValueError(f"{rows} holds a run with other settings ({changed}); repeat them, {remedy}")
