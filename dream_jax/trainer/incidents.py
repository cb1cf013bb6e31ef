"""The incidents of a run (warnings, skipped steps, interruptions), one line each in `incidents.jsonl`."""

from __future__ import annotations

import datetime
import json
import pathlib
from typing import Any, Literal, get_args

from dream_jax.side_files import parse_json

Kind = Literal["warning", "resumed", "stopped", "skipped", "diverged", "unreadable"]
"""The kind of an incident. warning: about settings, data or files. resumed: the run resumed after this step. stopped:
the run was stopped by a signal. skipped: the step was skipped, because its loss or gradient was not finite. diverged:
the run ended because of skipped steps. unreadable: a line of the file is incomplete because of a kill, or damaged."""

FILE = "incidents.jsonl"


class Incidents:
    """Writes incidents to `incidents.jsonl` in a folder; with None (on processes other than 0) writes nothing."""

    def __init__(self, folder: pathlib.Path | None):
        self._path = None if folder is None else folder / FILE

    def add(self, kind: Kind, text: str, step: int | None = None) -> None:
        """Appends an incident to the file at once, so that it survives a kill.

        Raises:
          ValueError: the kind is unknown.
          OSError: the file cannot be written.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"{kind=} is not one of {', '.join(get_args(Kind))}")
        if self._path is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with self._path.open("ab") as file:
            # After an incomplete line, which a kill has left, a new line must be started.
            incomplete = file.tell() > 0 and self._path.read_bytes()[-1:] != b"\n"
            line = json.dumps({"time": now, "kind": kind, "step": step, "text": text})
            file.write(f"{incomplete * chr(10)}{line}\n".encode())


def read_incidents(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the incidents of a run, oldest first: `time` (UTC, ISO 8601), `kind`, `step` and `text` of each.

    A line that cannot be read becomes an incident of the kind "unreadable".
    """
    path = folder / FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ()
    return [_incident(line, number) for number, line in enumerate(lines, 1)]


def _incident(line: str, number: int) -> dict[str, Any]:
    try:
        found = parse_json(line.encode(), FILE)
    except ValueError:
        found = None
    if isinstance(found, dict) and found.keys() >= {"time", "kind", "step", "text"}:
        step, texts = found["step"], [found["kind"], found["text"]]
        if (step is None or (type(step) is int and abs(step) < 2**63)) and all(isinstance(text, str) for text in texts):
            return found
    return {"time": None, "kind": "unreadable", "step": None, "text": f"line {number} of {FILE} cannot be read"}
