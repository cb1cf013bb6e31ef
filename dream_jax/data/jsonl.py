"""JSON lines: one object a line, every complaint with its file and line.

Knows no row schema.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


def read_json_lines(
    path: Path, on_bad: Callable[[ValueError], None] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("FILE:LINE", object) for every line of a UTF-8 file that is not blank.

    on_bad: is given the complaint about a line that is none, and the lines after it follow; by default the
    complaint is raised.
    Raises: FileNotFoundError; ValueError naming file and line for bytes that are not UTF-8, for a line that
    is not JSON or no object, and for a file with no line at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; it should hold one JSON object a line")
    empty = True
    with path.open("rb") as file:
        # Bytes, so that lines end at \n only and a complaint about the encoding knows its line.
        for number, raw in enumerate(file, start=1):
            if not raw.strip(b"\xef\xbb\xbf \t\r\n" if number == 1 else None):
                continue
            empty, where = False, f"{path}:{number}"
            try:
                found = _parse_line(raw, where, first=number == 1)
            except ValueError as complaint:
                if on_bad is None:
                    raise
                on_bad(complaint)
            else:
                yield where, found
    if empty:
        raise ValueError(f"{path}: no rows; it should hold one JSON object a line")


def _parse_line(raw: bytes, where: str, *, first: bool) -> dict[str, Any]:
    try:
        line = raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 ({error}); save the file as UTF-8 text, one JSON object a line"
        ) from error
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); each line must be one JSON object") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: a {type(found).__name__}, but each line must be one JSON object")
    return found


def text_field(found: Mapping[str, Any], name: str, where: str) -> str:
    """The string `found[name]`.

    Raises: ValueError, opening with `where`, if it is missing, no string, blank, or not encodable.
    """
    if name not in found:
        raise ValueError(f"{where}: no field {name!r}; it has {sorted(found)}")
    value = found[name]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name!r} must be a string, not {type(value).__name__} {value!r:.60}")
    if not value.strip():
        raise ValueError(f"{where}: {name!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name!r} has half of a surrogate pair ({error}), which is no text; repair the row"
        ) from error
    return value
