"""Finds the files of a corpus, and reads their lines: plain files, and files compressed with gzip or Zstandard.

A corpus of many files is given as a folder or as a pattern such as "corpus/*.jsonl.zst"; its files are called shards. A
shard that is truncated or damaged, that expands like a decompression bomb, or that changes while it is read is refused
with its name and the number of the line.
"""

import contextlib
import glob
import gzip
import io
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

ShardFormat = Literal["json", "parquet", "text"]
"""What a data file holds: JSON (one object a line, or one list), a table of columns, or one document of plain text."""

LONGEST_LINE = 2**26
"""The largest number of bytes of one line, and of one text file. A line is held in memory as a whole."""
MOST_EXPANSION = 1000
"""How many times as large as its file the content of a compressed shard may be. DEFLATE reaches 1032 with one repeated
byte; texts reach about 10."""
FREE_EXPANSION = 2**30
"""The number of bytes of content up to which a compressed shard may expand without a limit."""

_BUFFER = 2**20  # bytes
# Decompressed bytes that are lost before a truncated end; the line in the error message is so close to it.
_ZST_BUFFER = 2**14
_PACKED = (".gz", ".zst")
_FORMATS: dict[str, ShardFormat] = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
# Files of repositories that are not data; files whose names begin with "." are not data either.
_NO_DATA = (".md", "LICENSE", "LICENSE.txt", "_SUCCESS", "checksums.json", "dataset_infos.json")
_SPLITS = ("train", "test", "valid", "validation", "dev", "eval", "heldout")


class ByteMeter:
    """Counts the bytes of files that have been read; of a compressed file, its compressed bytes."""

    def __init__(self) -> None:
        self._finished = self._current = 0

    @property
    def bytes(self) -> int:
        """The number of bytes so far."""
        return self._finished + self._current

    def at(self, position: float) -> None:
        """Notes the position in the file that is read now."""
        self._current = int(position)

    def finish(self, size: int) -> None:
        """Notes that a file of this size has been read."""
        self._finished, self._current = self._finished + size, 0


def shard_format(path: Path) -> ShardFormat | None:
    """Returns what the end of a file's name says that the file holds; None for a name without a known end.

    `.jsonl`, `.json` and `.txt` may be followed by `.gz` or `.zst`. Parquet files have a compression of their own.
    """
    ends = path.suffixes
    if ends and ends[-1] in _PACKED:
        found = _FORMATS.get(ends[-2]) if len(ends) > 1 else None
        return None if found == "parquet" else found
    return _FORMATS.get(ends[-1]) if ends else None


def is_packed(path: Path) -> bool:
    """Returns whether the name of a file says that it is compressed with gzip or Zstandard."""
    return path.suffix in _PACKED


def is_pattern(name: str) -> bool:
    """Returns whether a name has one of the characters of a pattern: "*", "?" or "["."""
    return glob.has_magic(name)


def matching_shards(pattern: str) -> list[Path]:
    """Returns the files that a pattern matches, sorted by their names; "**" matches any number of folders.

    Raises: FileNotFoundError if no file matches; ValueError as `check_shards`.
    """
    found = [Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)]
    files = sorted(path for path in found if path.is_file())
    if not files:
        raise FileNotFoundError(
            f"no file matches the pattern {pattern}; put the pattern in quotes, so that the shell does not change it"
        )
    return check_shards(files, pattern)


def folder_shards(folder: Path) -> list[Path]:
    """Returns all data files in a folder and in the folders below it, sorted by their paths; [] if there is none.

    Hidden entries, and files that accompany data such as README.md, are left out.
    Raises: ValueError as `check_shards`; also if the names of files or folders say that they belong to splits, because it
    is then not clear which of them are to be trained on.
    """
    files = list[Path]()
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [
            Path(here) / name for name in sorted(names) if not name.startswith(".") and not name.endswith(_NO_DATA)
        ]
    if not any(map(shard_format, files)):
        return []
    for path in files:
        for part in path.relative_to(folder).parts:
            if re.split(r"[-_.]", part)[0].casefold() in _SPLITS:
                raise ValueError(
                    f"{folder} has no train split, but {path} seems to belong to a split; choose one with --data-split, a "
                    "folder with --data-config, or give a pattern of the files to train on"
                )
    return check_shards(sorted(files), str(folder))


def check_shards(files: Sequence[Path], name: str) -> list[Path]:
    """Returns the files if all of them are shards of one format, each once.

    Raises: ValueError, with the names of the files, for a file that is of no known format, for files of several formats,
    and for a shard that is there both with and without compression. The message begins with `name`.
    """
    formats = defaultdict[ShardFormat, list[Path]](list)
    twice = dict[Path, Path]()
    for path in files:
        found = shard_format(path)
        if found is None:
            raise ValueError(
                f"{name}: {path} is no data file; the names of data files end in .jsonl, .json or .txt (also with .gz or "
                ".zst after it) or in .parquet. Move it away, or give a pattern of the files to read"
            )
        formats[found].append(path)
        plain = path.with_suffix("") if is_packed(path) else path
        if plain in twice:
            raise ValueError(
                f"{name}: {twice[plain]} and {path} seem to hold the same rows; move one of them away, or give a pattern"
            )
        twice[plain] = path
    if len(formats) > 1:
        examples = ", ".join(str(paths[0]) for paths in formats.values())
        raise ValueError(
            f"{name} has shards of {len(formats)} formats ({examples}); give the files of one format with a pattern as "
            "--data, and the others with --mix"
        )
    return list(files)


def read_lines(path: Path, meter: ByteMeter | None = None) -> Iterator[tuple[int, bytes]]:
    """Yields the number (from 1) and the bytes of every line of a file, which may be compressed.

    Lines end only at a newline character, which is included. `meter` counts the bytes that are read.
    Raises: ValueError, with the file and the line, for a line of more than `LONGEST_LINE` bytes, for a compressed file that
    is truncated or damaged or expands too much, and for a file that changes while it is read. OSError if the file cannot
    be read.
    """
    before, number, total = _version(path), 0, 0
    limit = max(MOST_EXPANSION * before[0], FREE_EXPANSION) if is_packed(path) else None
    with _opened(path) as (file, position):
        while True:
            try:
                raw = file.readline(LONGEST_LINE + 1)
            except (EOFError, zlib.error, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # errors of the content have no number
                    raise
                raise ValueError(
                    f"{path}: after line {number} the compressed file is truncated or damaged ({error}); get the file again"
                ) from error
            if not raw:
                break
            number, total = number + 1, total + len(raw)
            if len(raw) > LONGEST_LINE:
                raise ValueError(
                    f"{path}:{number}: the line has more than {LONGEST_LINE:,} bytes; divide it into several rows"
                )
            if limit is not None and total > limit:
                raise ValueError(
                    f"{path}:{number}: the file of {before[0]:,} bytes has expanded to more than {limit:,} bytes, as a "
                    "decompression bomb does; if it is meant so, decompress it yourself and give that file"
                )
            if meter is not None and number % 256 == 0:
                meter.at(position())
            yield number, raw
    if meter is not None:
        meter.finish(before[0])
    if _version(path) != before:
        raise ValueError(
            f"{path}:{number}: the file was changed while it was read; wait until it is complete, and start again"
        )


def read_text(path: Path, meter: ByteMeter | None = None) -> str:
    """Returns the text of a UTF-8 file, which may be compressed; a byte order mark at its start is left out.

    Raises: ValueError as `read_lines`; also, with file and line, for bytes that are not UTF-8, and for a text of more than
    `LONGEST_LINE` bytes.
    """
    parts, size = list[str](), 0
    for number, raw in read_lines(path, meter):
        size += len(raw)
        if size > LONGEST_LINE:
            raise ValueError(
                f"{path}:{number}: the text has more than {LONGEST_LINE:,} bytes; divide it into several files"
            )
        try:
            parts.append(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error}); save the file as UTF-8 text") from error
    return "".join(parts)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO | gzip.GzipFile, Callable[[], int]]]:
    """Opens a file for reading; the bytes of a compressed file are decompressed.

    Yields it, and a function that returns how many bytes of the file itself have been read.
    """
    with contextlib.ExitStack() as stack:
        if path.suffix == ".gz":
            raw = stack.enter_context(path.open("rb"))
            yield stack.enter_context(gzip.GzipFile(fileobj=raw)), raw.tell
        elif path.suffix == ".zst":
            import pyarrow

            source = stack.enter_context(pyarrow.OSFile(str(path)))
            stream: Any = stack.enter_context(pyarrow.CompressedInputStream(source, "zstd"))
            yield stack.enter_context(io.BufferedReader(stream, _ZST_BUFFER)), source.tell
        else:
            file = stack.enter_context(path.open("rb", buffering=_BUFFER))
            yield file, file.tell


def _version(path: Path) -> tuple[int, int, int]:
    """Returns the size in bytes of a file, its time of change in nanoseconds, and its number in the file system."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino
