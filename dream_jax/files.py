"""Writes files and directories that are either complete or absent, and checksums that show later changes of files.

`read_typed` reads JSON files that have a fixed form. Several processes may write one directory together.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import fcntl
import fnmatch
import glob
import json
import logging
import os
import pathlib
import shutil
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import jax
import msgspec

from dream_jax.distributed import barrier, from_first
from dream_jax.paths import AnyPath, check_apart, local_path
from dream_jax.side_files import REMEDY, read_json_value
from dream_jax.side_files import read_json as read_json  # beside `write_json`, for the modules that use both

T = TypeVar("T")

CHECKSUMS = "checksums.json"
_OWN_SUM = "sum"  # the key of the checksum of the other entries
_CHUNK_BYTES = 1 << 20  # each thread has one buffer of this size
_THREADS = 8  # threads run in parallel here, because reading and zlib release Python's global lock
_PATIENCE_SECONDS = 20.0  # how long a process waits for others that replace the same directory
_SPARE_BYTES = 64 * 2**20  # free space that must remain on the disk, for small files and the file system itself

_log = logging.getLogger(__name__)


_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an error says that the disk, or the part of it that this user may use, is full.

    Libraries may raise another type of error with the text of the system's error.
    """
    texts = [os.strerror(number) for number in _FULL]
    return (isinstance(error, OSError) and error.errno in _FULL) or any(text in str(error) for text in texts)


@contextlib.contextmanager
def naming_full_disk(path: pathlib.Path) -> Iterator[None]:
    """Adds the path of the file that is written in the block to the error of a full disk, which does not name it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(error.errno, f"the disk is full ({error.strerror}), so {path} was not written") from error


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`; the file written there replaces `path` if the block ends without an error.

    A reader therefore sees the old file or the complete new file, even after a power failure. After an error the
    temporary file is removed, and `path` is unchanged. A symbolic link stays, and the file that it names is replaced. A
    pipe or a device cannot be replaced: there the block writes to `path` itself.

    Raises:
      ValueError: `path` is an address (see `local_path`).
    """
    path = local_path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve() if path.is_symlink() else path
    temporary = path.with_name(f".{_short_name(path.name)}.incomplete-{os.getpid()}")
    try:
        with naming_full_disk(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # Ctrl-C (KeyboardInterrupt) must remove the file too
        temporary.unlink(missing_ok=True)
        raise


def _short_name(name: str) -> str:
    """Returns the name of a file, or a shorter one for a long name: a name may have 255 bytes, whatever is added to it."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= 200 else f"{name[:30]}-{zlib.crc32(encoded):08x}"


def write_file(path: pathlib.Path, content: str | bytes) -> None:
    """Writes text (as UTF-8) or bytes to a file; after an error the file is as it was before (see `replacing`)."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: pathlib.Path, content: Any, *, indent: int = 2) -> None:
    """Writes JSON and a newline with `write_file`. Raises ValueError for NaN and infinities, which are not JSON."""
    write_file(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def read_typed(path: pathlib.Path, kind: type[T], remedy: str = REMEDY) -> T:
    """Returns the JSON value in a file as an object of a type, as `typed` makes it. Raises as `read_json` and `typed`."""
    return typed(read_json_value(path, remedy), kind, path, remedy)


def typed(found: Any, kind: type[T], where: object, remedy: str = REMEDY) -> T:
    """Returns a value that was read from JSON as an object of a type.

    Args:
      found: lists, dicts, texts and numbers, as JSON has them.
      kind: the type: a dataclass, a msgspec.Struct, or a type such as `list[int]`. Keys that a class does not have are
        left out.
      where: the origin of the value, such as a path; the error message begins with it.
      remedy: what the user can do after an error; the message ends with it.

    Raises:
      ValueError: a value has another type, or a key without a default is missing.
    """
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        message, _, entry = str(error).partition(" - at `$")
        entry = entry.strip("`").removeprefix(".")
        raise ValueError(f"{where}: {f'{entry}: ' if entry else ''}{message}; {remedy}") from error
    except UnicodeEncodeError as error:  # msgspec cannot show such a text in its message
        raise ValueError(f"{where}: a text has half of a surrogate pair ({error}); {remedy}") from error


@contextlib.contextmanager
def new_directory(
    path: AnyPath,
    *,
    overwrite: bool = False,
    needed_bytes: int = 0,
    reads: Iterable[AnyPath | None] = (),
    marker: str = "config.json",
    known: Callable[[pathlib.Path], Collection[str]] = lambda _: ("config.json",),
) -> Iterator[pathlib.Path]:
    """Yields a temporary directory, which is renamed to `path` at the end, or removed after an error.

    Temporary directories that killed runs have left beside `path` are removed first. In a run of several processes all
    processes must enter the block, because they wait for each other; process 0 creates and renames the directory.

    Args:
      path: final path of the directory.
      overwrite: whether an existing directory of the same kind, in which nothing else lies, is replaced at the end.
      needed_bytes: number of bytes that will be written; it is compared with the free space on the disk.
      reads: paths that are read during the block (None: no path). `path` must not be one of them, contain one or lie in
        one.
      marker: name of a file that every directory of this kind has.
      known: returns, for an existing directory, which of its files may be removed; see `foreign_entries`.

    Raises:
      FileExistsError: `path` exists and `overwrite` is not set; or it is a directory of another kind, or has an entry that
        this program has not written.
      ValueError: `path` is an address, or overlaps with `reads`.
      OSError: the disk has too little free space, or the directory cannot be written.
      RuntimeError: process 0 has raised one of these errors; raised in the other processes.
    """
    target = local_path(path).resolve()
    leads = jax.process_index() == 0
    token, refusal = os.getpid(), None
    if leads:
        try:
            _prepare(target, overwrite, needed_bytes, reads, marker, known)
        except (OSError, ValueError) as error:
            token, refusal = 0, error
    token = from_first(token)
    if refusal is not None:
        raise refusal
    if not token:
        raise RuntimeError(f"process 0 cannot create {target}; its error message says why")
    directory = target.parent / f".{target.name}.incomplete-{token}"
    if not leads:
        barrier("new_directory.made")
        yield directory
        barrier("new_directory.written")
        barrier("new_directory.named")
        return
    with contextlib.ExitStack() as stack:
        with _alone(target):
            directory.mkdir()
            lock = stack.enter_context(open(directory / ".lock", "w"))
            # The system releases the lock in whatever way this process ends, so a directory whose lock is free is stale.
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            barrier("new_directory.made")
            yield directory
            barrier("new_directory.written")
            with _alone(target):
                (directory / ".lock").unlink()
                if target.exists() and overwrite:  # the user may have put a file there during the block
                    _check_replaced(target, marker, known)
                replaced = _give_name(directory, target, overwrite)
            if replaced is not None:
                _remove_tree(replaced)
        except OSError as error:
            shutil.rmtree(directory, ignore_errors=True)
            if error.errno in _FULL:
                raise OSError(errno.ENOSPC, f"the disk is full: {target} needs {needed_bytes} bytes") from error
            raise
        except BaseException:  # Ctrl-C (KeyboardInterrupt) must remove the directory too
            shutil.rmtree(directory, ignore_errors=True)
            raise
    barrier("new_directory.named")


def check_new_directory(
    path: AnyPath,
    *,
    overwrite: bool,
    reads: Iterable[AnyPath | None] = (),
    marker: str = "config.json",
    known: Callable[[pathlib.Path], Collection[str]] = lambda _: ("config.json",),
) -> None:
    """Raises the errors that `new_directory` raises for these arguments, except those of the disk; changes no file."""
    target = local_path(path).resolve()
    check_apart(target, reads)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; pass --overwrite (overwrite=True) to replace it, or give another name")
    if target.exists():
        _check_replaced(target, marker, known)


def _check_replaced(target: pathlib.Path, marker: str, known: Callable[[pathlib.Path], Collection[str]]) -> None:
    """Raises FileExistsError if `target` is not a directory of this kind, or has an entry that is not known."""
    if not target.is_dir() or (any(target.iterdir()) and not (target / marker).is_file()):
        raise FileExistsError(
            f"{target} is not a checkpoint directory (it holds no {marker}), so it is not replaced; give another name"
        )
    if foreign := foreign_entries(target, known(target)):
        raise FileExistsError(
            f"{target} holds {listed(foreign)}, not written by this program, so it is not replaced; move that away, or "
            "give another name"
        )


def listed(names: Collection[str], most: int = 5) -> str:
    """Returns the first names of a collection as text, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more


def foreign_entries(folder: pathlib.Path, known: Collection[str]) -> list[str]:
    """Returns the entries of a folder that this program has not written, as sorted paths relative to it.

    An entry is a file or a link; empty folders do not count. In a folder that has a `checksums.json`, and in the
    folders below it, an entry is known if that file lists it. In other folders an entry is known if its path matches a
    pattern.

    Args:
      folder: the folder.
      known: names that are known everywhere, and patterns for folders without a list, as for `fnmatch`. Both are paths
        relative to `folder`; a "*" matches "/" too.
    """
    found = []
    lists: dict[pathlib.Path, set[pathlib.Path]] = {}
    for here, folders, files in os.walk(folder):
        directory = pathlib.Path(here)
        if (manifest := read_checksums(directory)) is not None:
            lists[directory] = {directory / name for name in (CHECKSUMS, *manifest["files"])}
        entries = [directory / name for name in files]
        entries += [directory / name for name in folders if (directory / name).is_symlink()]
        for path in entries:
            name = path.relative_to(folder).as_posix()
            home = next((one for one in path.parents if one in lists), None)
            matches = home is None and any(fnmatch.fnmatchcase(name, pattern) for pattern in known)
            if not (matches or name in known or (home is not None and path in lists[home])):
                found.append(name)
    return sorted(found)


def _prepare(
    target: pathlib.Path,
    overwrite: bool,
    needed_bytes: int,
    reads: Iterable[AnyPath | None],
    marker: str,
    known: Callable[[pathlib.Path], Collection[str]],
) -> None:
    """Removes stale directories and checks the arguments of `new_directory`. Raises its errors."""
    with contextlib.ExitStack() as stack:
        if (overwrite and target.exists()) or _stale(target, "replaced") or _stale(target, "incomplete"):
            stack.enter_context(_alone(target))
            # Never without the lock: a directory that another process creates now would look stale.
            _remove_stale(target)
        check_new_directory(target, overwrite=overwrite, reads=reads, marker=marker, known=known)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes + _SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{target} needs {needed_bytes} bytes and {_SPARE_BYTES} to spare, but the disk has only {free}",
        )


def _give_name(directory: pathlib.Path, target: pathlib.Path, overwrite: bool) -> pathlib.Path | None:
    """Renames the complete directory to `target`; returns the new path of the directory that it replaces, if any."""
    if not (overwrite and target.exists()):
        directory.rename(target)  # raises OSError if another process has created the target in the meantime
        return None
    old = target.parent / f".{target.name}.replaced-{os.getpid()}"
    target.rename(old)
    try:
        directory.rename(target)
    except OSError:
        old.rename(target)
        raise
    return old


@contextlib.contextmanager
def _alone(target: pathlib.Path) -> Iterator[None]:
    """Waits until no other process creates, names or removes directories beside `target`, and keeps others waiting.

    The lock is a file beside `target`, which is removed at the end of the block. A process that was stopped in its block
    keeps others waiting for `_PATIENCE_SECONDS` only.
    """
    path = target.parent / f".{target.name}.lock"
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            has_lock = _locked(lock, path)
            if not has_lock and time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            try:
                yield
            finally:
                if has_lock:  # otherwise the file belongs to the process that was stopped, which may go on
                    path.unlink(missing_ok=True)
            return
        finally:
            os.close(lock)


def _locked(descriptor: int, path: pathlib.Path) -> bool:
    """Locks an open file; returns whether it has the lock, and the file is still the one at `path`."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (BlockingIOError, FileNotFoundError):  # the process that had the lock before removes the file
        return False


def _remove_tree(directory: pathlib.Path) -> None:
    """Removes a directory, which another process may be removing too. Raises OSError."""
    while directory.exists():
        with contextlib.suppress(FileNotFoundError):  # the other process has removed an entry first
            shutil.rmtree(directory)


def _stale(target: pathlib.Path, kind: Literal["incomplete", "replaced"]) -> list[pathlib.Path]:
    """Returns the directories beside `target` with names of this kind, as `new_directory` and `_give_name` make them."""
    found = target.parent.glob(f".{glob.escape(target.name)}.{kind}-*")
    return [path for path in found if path.is_dir() and path.name.rpartition("-")[2].isdigit()]


def _remove_stale(target: pathlib.Path) -> None:
    """Removes or restores the directories beside `target` that killed runs have left."""
    for old in _stale(target, "replaced"):
        if target.exists():
            _remove_tree(old)
        else:  # a run was killed between the two renames of `_give_name`
            old.rename(target)
            _log.warning("put %s back: a run that was replacing it was killed", target)
    for stale in _stale(target, "incomplete"):
        try:
            with open(stale / ".lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stale)
                _log.warning("removed %s, left by a run that was killed", stale)
        except BlockingIOError:
            _log.warning("another run is writing %s now", stale)
        except FileNotFoundError:
            _log.warning("%s was left by another run; remove it if none is writing it", stale)


def write_checksums(folder: pathlib.Path, *, leave_out: Collection[str] = (), **more: Any) -> None:
    """Writes `checksums.json` into a complete folder: the size and the CRC-32 of every file, and the entries `more`.

    Args:
      folder: a folder whose files will not change any more.
      leave_out: names of files (relative to the folder, with "/") that are not listed.
      more: further entries of the JSON object, by name.
    """
    found_names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = sorted(name for name in found_names if name != CHECKSUMS and name not in leave_out)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda name: _size_and_sum(folder / name), names))
    content = more | {"files": dict(zip(names, found, strict=True))}
    write_json(folder / CHECKSUMS, content | {_OWN_SUM: _sum_of_content(content)}, indent=1)


def _sum_of_content(content: Mapping[str, Any]) -> int:
    """Returns the CRC-32 of the entries of `checksums.json`, without the entry for this number itself."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def read_checksums(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the contents of `checksums.json`; None if the file is missing, damaged or has another form."""
    try:
        found = read_json(folder / CHECKSUMS)
    except (OSError, ValueError):
        return None
    own_sum = found.pop(_OWN_SUM, None)
    if own_sum is not None and own_sum != _sum_of_content(found):  # earlier versions did not write this entry
        return None
    files = found.get("files")
    # A damaged file may still be valid JSON, so every entry is checked.
    return found if isinstance(files, dict) and all(map(_is_entry, files.values())) else None


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(number, int) for number in entry)


def find_damage(
    folder: pathlib.Path, share: int = 0, shares: int = 1, chosen: Callable[[str], bool] = lambda _: True
) -> str | None:
    """Compares a folder with its checksums. Returns a sentence about the first difference, or None without one.

    Args:
      folder: a folder in which `write_checksums` has written its file.
      share: index of the share of the files that this call reads, so that several processes can divide the reading.
      shares: number of shares.
      chosen: returns whether the file of a name is compared.
    """
    manifest = read_checksums(folder)
    if manifest is None:
        return f"{folder / CHECKSUMS} is missing or cannot be read"
    files: Mapping[str, Any] = manifest["files"]
    # From the largest file to the smallest, the shares take a file in turn, so that all read about the same amount.
    names = sorted(filter(chosen, files), key=lambda name: (-files[name][0], name))[share::shares]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for line in pool.map(lambda name: _difference(folder / name, files[name]), names):
            if line is not None:
                return line
    return None


def _difference(path: pathlib.Path, wanted: Any) -> str | None:
    """Returns a sentence if the file has another [size, CRC-32] than `wanted`, otherwise None."""
    if not path.is_file():
        return f"{path} is missing"
    size, checksum = wanted
    if path.stat().st_size != size:
        return f"{path} has {path.stat().st_size} bytes, but {size} were written"
    found = _size_and_sum(path)[1]
    return None if found == checksum else f"{path} has CRC-32 {found:08x}, but {checksum:08x} was written"


def _size_and_sum(path: pathlib.Path) -> tuple[int, int]:
    """Returns the size of a file in bytes, and its CRC-32."""
    size = checksum = 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size, checksum = size + count, zlib.crc32(buffer[:count], checksum)
    return size, checksum
