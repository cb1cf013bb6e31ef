"""The result of one stage: a JSON file that is written again after each measurement, and is complete at all times.

Only the standard library is imported, because the process that starts the stages must not start jax.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any


class NotAvailable(Exception):
    """Raised by a stage that cannot run on this machine; the message is the reason, which the report shows."""


class StageResult:
    """The values that a stage has measured so far. `write` and `add` store them at once.

    A stage may be ended at any moment, when its time is over. The file then holds what was measured before.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.values: dict[str, Any] = {}
        self._begun = time.monotonic()

    def write(self, **values: Any) -> None:
        """Adds values, or replaces those with the same names, and writes the file."""
        self.values |= values
        write_json(self.path, self.values)

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Appends a row to the list with this name, prints it, and writes the file."""
        print(f"{time.monotonic() - self._begun:7.1f} s  {name}: {json.dumps(row)[:600]}", flush=True)
        self.write(**{name: [*self.values.get(name, []), row]})

    def doing(self, what: str) -> None:
        """Writes what the stage does next, so that the file of a stage that is ended says where it was."""
        print(f"{time.monotonic() - self._begun:7.1f} s  {what}", flush=True)
        self.write(doing=what)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a file under another name and renames it, so that the file is complete whenever it is read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    new.replace(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the content of a result file; an empty dict if there is none."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def neighbour(path: pathlib.Path, stage: str) -> dict[str, Any]:
    """Returns the result of another stage, whose file is beside `path`; an empty dict if it has not run."""
    return read_json(path.with_name(f"{stage}.json"))


def require_accelerator(options: Mapping[str, Any], platform: str) -> None:
    """Raises NotAvailable on a CPU, which would need hours for the real shapes; `small` sets `cpu` in the options."""
    if platform == "cpu" and not options.get("cpu"):
        raise NotAvailable(
            "there is no accelerator here (only a CPU); pass --small to run everything with small shapes"
        )


def wait_for_turn() -> None:
    """Waits until the process that started this one says that the device is free. Until then only imports may run."""
    if not sys.stdin.readline():
        sys.exit("the benchmark ended before it was this stage's turn")
