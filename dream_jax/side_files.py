"""Reads side files: the JSON, TOML and CSV files beside weights and data, such as config.json and metrics.csv.

A side file may be damaged, written by another program, or hostile. Its size and its depth are therefore bounded, and each
error names the file, the line or the key, and what the user can do. `files.read_typed` also checks the types of the values.
"""

from __future__ import annotations

import collections
import csv
import io
import json
import math
import os
import pathlib
import re
import stat
import tomllib
from collections.abc import Callable, Collection
from typing import Any

LARGEST = 64 * 2**20
"""The largest size of a JSON or TOML file in bytes. The largest published one, a tokenizer.json, has 11 MB."""
LARGEST_TABLE = 2**31
"""The largest size of a CSV file in bytes: metrics.csv has about 200 bytes for each step."""
DEEPEST = 100
"""The largest number of lists and objects that may lie inside one another. Published files have up to 10."""
LARGEST_INTEGER = 10**308
"""Integers must be smaller than this, so that they can be converted to float. transformers writes 10**30 for "no limit"."""
_TOO_DEEP = f"more than {DEEPEST} lists or objects inside one another"
REMEDY = "remove the file or restore it from a copy"

# A string of JSON, or one of the words that Python accepts as a number although JSON does not have them.
_STRING_OR_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity', re.DOTALL)


def read_json(path: pathlib.Path, remedy: str = REMEDY) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
      path: path of the file.
      remedy: what the user can do if the file cannot be used; the error message ends with it.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not valid JSON in UTF-8, has a key twice in one object or a number that is not finite, is
        larger than `LARGEST` or deeper than `DEEPEST`, or holds something other than an object.
    """
    found = parse_json(_read_bytes(path, LARGEST, remedy), path, remedy)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object; {remedy}")
    return found


def read_json_value(path: pathlib.Path, remedy: str = REMEDY) -> Any:
    """Returns the JSON value in a file, of any type. Arguments and errors are those of `read_json`."""
    return parse_json(_read_bytes(path, LARGEST, remedy), path, remedy)


def parse_json(content: bytes, where: object, remedy: str = REMEDY, *, nan: bool = False) -> Any:
    """Returns the value of a JSON text.

    Args:
      content: the text in UTF-8.
      where: the origin of the text, such as a path or "FILE:LINE"; error messages begin with it.
      remedy: what the user can do after an error; the message ends with it.
      nan: whether to accept NaN and infinities, which older versions of this program wrote into rows of results.

    Raises:
      ValueError: as for `read_json`.
    """
    try:
        text = content.decode("utf-8")
        # Python's reader also accepts keys that occur twice, NaN and infinities, which JSON does not have.
        constant = None if nan else _refused_constant(text)
        found = json.loads(text, object_pairs_hook=object_of, parse_constant=constant)
    except RecursionError:
        raise ValueError(f"{where} has {_TOO_DEEP}; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON in UTF-8 ({error}); {remedy}") from error
    _check_values(found, where, remedy, nan=nan)
    return found


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object of these names and values of JSON. Raises ValueError for a name that occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {twice!r:.200} occurs twice in one object")
    return found


def _refused_constant(text: str) -> Callable[[str], None]:
    """Returns a function that raises ValueError for the name of a constant, with the line on which `text` has it."""

    def refuse(name: str) -> None:
        start = next((found.start() for found in _STRING_OR_WORD.finditer(text) if found[0] == name), 0)
        raise ValueError(f"{name} is not a number of JSON: line {text.count(chr(10), 0, start) + 1}")

    return refuse


def _check_values(found: Any, where: object, remedy: str, *, nan: bool) -> None:
    """Raises ValueError for too many lists and dicts inside one another, and for numbers outside the bounds.

    Integers must be smaller than `LARGEST_INTEGER`; unless `nan` is set, floating point numbers must be finite.
    """
    level: list[tuple[Any, Any]] = [("the value", found)]  # the key or index of each value, and the value
    for _ in range(DEEPEST + 1):
        deeper: list[Any] = []
        for name, value in level:
            if isinstance(value, dict | list):
                deeper.append(value)
            elif isinstance(value, int) and abs(value) >= LARGEST_INTEGER:
                raise ValueError(
                    f"{where}: {name!s:.80} is an integer of {value.bit_length()} bits: too large; {remedy}"
                )
            elif isinstance(value, float) and not (nan or math.isfinite(value)):
                raise ValueError(f"{where}: {name!s:.80} is {value}, but must be a finite number; {remedy}")
        if not deeper:
            return
        level = [pair for one in deeper for pair in (one.items() if isinstance(one, dict) else enumerate(one))]
    raise ValueError(f"{where} has {_TOO_DEEP}; {remedy}")


def read_toml(path: pathlib.Path, remedy: str = REMEDY) -> dict[str, Any]:
    """Returns the contents of a TOML file.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not TOML in UTF-8, is larger than `LARGEST` or deeper than `DEEPEST`, or has a number that is
        not finite.
    """
    content = _read_bytes(path, LARGEST, remedy)
    try:
        found = tomllib.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path} has {_TOO_DEEP}; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not TOML ({error}); {remedy}") from error
    _check_values(found, path, remedy, nan=False)
    return found


def read_csv(path: pathlib.Path, columns: Collection[str], remedy: str = REMEDY) -> list[dict[str, str]]:
    """Returns the rows of a CSV file, each as a dict: name of the column -> text of the cell.

    The first line of the file has the names of the columns. Two kinds of incomplete rows, which a kill or a full disk can
    leave behind, are skipped: a row with fewer or more cells than the first line, and a last line without a newline.

    Args:
      path: path of the file.
      columns: names of columns that the file must have.
      remedy: what the user can do if the file cannot be used; the error message ends with it.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not a table in UTF-8, is larger than `LARGEST_TABLE`, lacks one of the columns, or has a
        column twice. An empty file lacks all columns.
    """
    content = _read_bytes(path, LARGEST_TABLE, remedy)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line} is not UTF-8; {remedy}") from error
    reader = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    try:
        head = next(reader, [])
        rows = [row for row in reader if len(row) == len(head)]
    except csv.Error as error:  # for example a cell of more than 131072 characters
        raise ValueError(f"{path}:{reader.line_num} is not a line of a table ({error}); {remedy}") from error
    missing = [name for name in columns if name not in head]
    if missing or len(set(head)) < len(head):
        shown = ",".join(head)
        what = f"has no column {', '.join(missing)}" if missing else "has a column twice"
        raise ValueError(f"{path}:1 is {shown!r:.100}, which {what}; {remedy}")
    return [dict(zip(head, row, strict=True)) for row in rows]


def _read_bytes(path: pathlib.Path, largest: int, remedy: str) -> bytes:
    """Returns the contents of a regular file. Raises ValueError for other files and for more than `largest` bytes."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe without a writer would be read for ever
        raise ValueError(f"{path} is not a regular file; {remedy}")
    with open(path, "rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"{path} has more than {largest:,} bytes, the most that such a file may have; {remedy}")
    return content
