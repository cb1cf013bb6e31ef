"""What a folder holds, to the byte: a list of its files with sizes and checksums, and what no longer agrees with it.

Disks, copies and interrupted synchronisations change files without a word, and what reads them (zarr without compression,
say) takes a flipped bit for a number. Knows files. Knows nothing of what is in them.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import zlib
from collections.abc import Collection, Mapping
from typing import Any

FILE = "checksums.json"
_CHUNK = 1 << 24
_THREADS = 8  # both the disk and zlib work without Python's lock


def write(folder: pathlib.Path, *, leave_out: Collection[str] = (), **more: Any) -> None:
    """Writes `checksums.json` into a folder that is complete and not in use yet, with further entries, as JSON has them."""
    found_names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = sorted(name for name in found_names if name != FILE and name not in leave_out)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda name: _size_and_sum(folder / name), names))
    temporary = folder / f".{FILE}.incomplete"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(more | {"files": dict(zip(names, found, strict=True))}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / FILE)


def read(folder: pathlib.Path) -> dict[str, Any] | None:
    """What `checksums.json` says; None where it is missing or cannot be read."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    files = found.get("files") if isinstance(found, dict) else None
    # What was damaged may still be JSON.
    return found if isinstance(files, dict) and all(map(_is_entry, files.values())) else None


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(number, int) for number in entry)


def damage(folder: pathlib.Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a folder, in words; None when every file is as it was written.

    Args:
      folder: that `write` has been given.
      part: which of
      parts: equal shares of the files is read, so that several processes can divide them.
    """
    manifest = read(folder)
    if manifest is None:
        return f"{folder / FILE} is missing or cannot be read"
    files: Mapping[str, Any] = manifest["files"]
    names = sorted(files, key=lambda name: (-files[name][0], name))[part::parts]  # the largest first, dealt out
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for line in pool.map(lambda name: _difference(folder / name, files[name]), names):
            if line is not None:
                return line
    return None


def _difference(path: pathlib.Path, wanted: Any) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size, checksum = wanted
    if path.stat().st_size != size:
        return f"{path} has {path.stat().st_size} bytes, but {size} were written"
    found = _size_and_sum(path)[1]
    return None if found == checksum else f"{path} has CRC-32 {found:08x}, but {checksum:08x} was written"


def _size_and_sum(path: pathlib.Path) -> tuple[int, int]:
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return size, checksum
