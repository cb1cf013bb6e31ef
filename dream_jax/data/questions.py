"""Reads files of questions. Each row has a number, which its answer gets too, so that the two can be matched later."""

from collections.abc import Collection, Iterator
from pathlib import Path

from dream_jax.data.chats import MESSAGE_LISTS
from dream_jax.data.fields import without_fields
from dream_jax.data.records import Record, read_records


def numbered_records(path: Path, ignored: Collection[str] = (), *, strict: bool = True) -> Iterator[Record]:
    """Yields (location, fields) for each record of a .jsonl, .json or .parquet file.

    Each location ends with a number that no other record of the file has; `record_number` returns it.

    Args:
      path: the file. A location in a file of JSON lines is "FILE:LINE", in other files "FILE:row NUMBER".
      ignored: names of fields that are left out, as if the records did not have them.
      strict: whether each name in `ignored` must be a field of some record.

    Raises:
      ValueError, FileNotFoundError: as `read_records` raises; ValueError also for a name in `ignored` of no record.
    """
    had: set[str] = set()
    for number, (where, found) in enumerate(read_records(path), start=1):
        kept, left_out = without_fields(found, ignored, MESSAGE_LISTS)
        had |= left_out
        # A list in a .json file may have several records in one line.
        yield f"{path}:row {number}" if path.suffix == ".json" else where, kept
    missing = sorted(set(ignored) - had)
    if strict and missing:
        raise ValueError(
            f"{path}: no row has the field(s) {missing} of --ignore-field; remove these names from the flag"
        )


def record_number(where: str) -> int:
    """Returns the number at the end of a location of `numbered_records`."""
    return int(where.rpartition(":")[2].removeprefix("row "))
