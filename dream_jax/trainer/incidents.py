"""What went wrong in a run, or might have: one line each in `incidents.jsonl`, which stays through stops and kills."""

from __future__ import annotations

import datetime
import json
import pathlib
from typing import Any, Literal, get_args

Kind = Literal["warning", "resumed", "stopped", "skipped", "diverged", "unreadable"]
"""warning: about the settings or the data, before the first step. resumed, stopped: after this step. skipped: the step
changed nothing, since its loss or gradient was not finite. diverged: the run ended because of such steps. unreadable: a
line of the file was cut short by a kill, or is damaged."""

FILE = "incidents.jsonl"


class Incidents:
    """Writes incidents as they happen; without a folder (on processes other than the first) writes nothing."""

    def __init__(self, folder: pathlib.Path | None):
        self._path = None if folder is None else folder / FILE

    def add(self, kind: Kind, text: str, step: int | None = None) -> None:
        """Adds a line to the file at once, so that a kill cannot lose it. Raises ValueError for an unknown kind."""
        if kind not in get_args(Kind):
            raise ValueError(f"{kind=} is not one of {', '.join(get_args(Kind))}")
        if self._path is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with self._path.open("ab") as file:
            # A line that a kill cut short must not swallow the next one.
            begun = file.tell() > 0 and self._path.read_bytes()[-1:] != b"\n"
            line = json.dumps({"time": now, "kind": kind, "step": step, "text": text})
            file.write(f"{begun * chr(10)}{line}\n".encode())


def read_incidents(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The incidents of a run, oldest first. Each line that cannot be read is one of kind `unreadable`."""
    path = folder / FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ()
    return [_incident(line, number) for number, line in enumerate(lines, 1)]


def _incident(line: str, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if isinstance(found, dict) and found.keys() >= {"time", "kind", "step", "text"}:
        return found
    return {"time": None, "kind": "unreadable", "step": None, "text": f"line {number} of {FILE} cannot be read"}
