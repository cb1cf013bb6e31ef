"""Checks of paths before they are written or read: addresses, overlaps, links, kinds of files, and claims by processes.

This module changes no file, except that `claimed` locks one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dream_jax.side_files import parse_json

# A drive of Windows has one letter, so an address has at least two. `pathlib` makes "gs:/bucket" of "gs://bucket".
_ADDRESS = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
_LONGEST_RECOGNISED = 64 * 2**20  # bytes; a longer file is never one of the small files that a command replaces

AnyPath = str | os.PathLike[str]


def local_path(path: AnyPath, name: str | None = None) -> pathlib.Path:
    """Returns a path of the local file system, in which "~" is expanded.

    Every function that opens a path which a user gave calls this function first.

    Args:
      path: the path, as the user gave it.
      name: name of the setting that the path is the value of, for the error message.

    Raises:
      ValueError: the path is an address, such as gs://bucket/folder, is empty, contains a NUL character, begins with the
        home directory of a user that does not exist, or has a symbolic link that leads to itself.
    """
    text = os.fspath(path)
    told = text if name is None else f"{name}={text}"
    if not text:  # pathlib makes the working directory of it
        raise ValueError(f"{'a path' if name is None else name} is empty; give a path")
    found = _ADDRESS.match(text)
    if found:
        scheme, rest = found[1].lower(), found[2]
        remedy = "give the path of a local (or mounted) file or folder"
        if scheme == "file":
            remedy = f"give the path alone, /{rest}"
        elif scheme == "hf":
            remedy = f"give the hub id alone, {rest}"
        elif rest.startswith(("huggingface.co/", "hf.co/")):
            remedy = f"give the hub id alone, {rest.partition('/')[2]}"
        raise ValueError(f"{told} is an address (a URL), and nothing is read from or written to addresses; {remedy}")
    if "\0" in text:
        raise ValueError(f"{told!r} contains a NUL character, which no path may contain")
    try:
        local = pathlib.Path(text).expanduser()
    except RuntimeError as error:  # of a name after "~" that the system does not know
        raise ValueError(
            f"{told} begins with {text.partition('/')[0]}, which is no home directory; write ./~..."
        ) from error
    if _is_loop(local):  # `Path.resolve` raises RuntimeError for it
        raise ValueError(f"{told} has a symbolic link that leads to itself; remove the link, or give another path")
    return local


def _is_loop(path: pathlib.Path) -> bool:
    """Returns whether a path cannot be followed, because a symbolic link in it leads to itself."""
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def check_local(settings: Any, *names: str) -> None:
    """Calls `local_path` for paths in a dataclass of settings: all fields that are `pathlib.Path`s, and those of `names`.

    Args:
      settings: a dataclass. The value of a field may also be a tuple of paths, or None.
      names: names of fields with strings that may be paths.

    Raises:
      ValueError: a path is an address or contains a NUL character; the message begins with the name of the field.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, pathlib.Path) or (field.name in names and isinstance(one, str)):
                local_path(one, field.name)


def _identity(path: pathlib.Path) -> tuple[int, int] | None:
    """Returns the device and the inode of a path; None if the path cannot be read, for example because it is missing.

    Two names of one file have the same device and inode, also if they differ by links, mounts or the case of letters.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _links_in(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields all links in a folder and in its folders, except those that lead to themselves."""
    for here, folders, files in os.walk(folder):
        links = (one for name in (*folders, *files) if (one := pathlib.Path(here, name)).is_symlink())
        yield from (one for one in links if not _is_loop(one))


def check_apart(
    target: AnyPath, reads: Iterable[AnyPath | None], remedy: str = "give another directory", *, lies_in: bool = True
) -> None:
    """Checks that a directory or file which will be replaced has nothing in common with the paths that are read.

    Args:
      target: the path that will be replaced, if it exists.
      reads: paths that are read; None and paths that do not exist are left out.
      remedy: what the user can do; the error message ends with it.
      lies_in: whether to refuse also a target inside a directory that is read.

    Raises:
      ValueError: the target is one of the other paths, contains one or the target of a link in one, or lies in one.
        Links, relative paths and other names of the same directory are recognised.
    """
    replaced = local_path(target)
    mine = _identity(replaced)
    if mine is None:
        return
    above = {_identity(one) for one in replaced.resolve().parents}
    for given in reads:
        read = None if given is None else local_path(given)
        other = None if read is None else _identity(read)
        if read is None or other is None:
            continue
        if other == mine:
            raise ValueError(f"{target} is the source itself, {given}; {remedy}")
        parents = {*read.resolve().parents, read.parent.resolve(), *read.parent.resolve().parents}
        for link in _links_in(read):
            parents |= set(link.resolve().parents)
        if mine in map(_identity, parents):
            raise ValueError(f"{target} contains {given}, which is read, and would be replaced; {remedy}")
        if lies_in and other in above:
            raise ValueError(f"{target} lies in {given}, which is read, and would be replaced; {remedy}")


def copy_companion(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a small file that belongs to a checkpoint, such as a tokenizer file, to the path `target`.

    Raises:
      ValueError: the file is a link that leads out of its directory (see `check_companion`).
      OSError: the file cannot be read or written.
    """
    check_companion(source)
    shutil.copyfile(source, target)


def check_companion(source: pathlib.Path) -> None:
    """Raises ValueError if a file is a link that leads out of its directory, because its target must not be copied.

    A checkpoint from elsewhere could contain a link to any file of the user. The cache of the Hugging Face hub has links
    from `snapshots/REVISION` to `blobs` of the same repository; these are accepted.
    """
    home = source.parent.resolve()
    if home.parent.name == "snapshots" and (home.parent.parent / "blobs").is_dir():
        home = home.parent.parent
    target = source.resolve()
    if home not in target.parents:
        raise ValueError(
            f"{source} is a link to {target}, out of its directory, so it is not copied; if it belongs to the checkpoint, "
            "put a copy of the file in the place of the link"
        )


def describe_content(content: bytes) -> str:
    """Returns what the content of a file looks like, in a few words for an error message."""
    for start, kind in ((b"\x89PNG", "a PNG picture"), (b"%PDF", "a PDF"), (b"PK\x03\x04", "a zip archive")):
        if content.startswith(start):
            return kind
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return "binary data"
    try:
        found = parse_json(content, "the file")
    except ValueError:
        return f"text that begins with {text.strip().partition(chr(10))[0]!r:.60}"
    if isinstance(found, dict):
        return f"a JSON object with the keys {', '.join(map(str, list(found)[:6])) or '(none)'}"
    return f"JSON, a {type(found).__name__}"


def check_file(path: AnyPath, *, regular: bool = False) -> pathlib.Path:
    """Checks that a path can be the path of a file, which need not exist.

    Args:
      path: the path.
      regular: whether to refuse pipes and devices too, because the file will be read again or locked.

    Returns:
      The path, as `local_path` returns it.

    Raises:
      ValueError: as for `local_path`; or `regular` is true and the path is a pipe or a device.
      IsADirectoryError: the path is a directory.
      NotADirectoryError: a parent of the path is a file.
    """
    file = local_path(path)
    if file.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give the name of a file in it")
    for parent in file.parents:
        if parent.exists() and not parent.is_dir():
            raise NotADirectoryError(f"{path} cannot be a file, because {parent} is a file and not a folder")
    if regular and file.exists() and not file.is_file():
        raise ValueError(f"{path} is a pipe or a device, which cannot be read again; give the name of a file")
    return file


def check_replaceable(path: AnyPath, kind: str, is_kind: Callable[[bytes], bool]) -> pathlib.Path:
    """Checks that a file may be written: it does not exist, is empty, or already has the kind that is written.

    Args:
      path: path of the file. Pipes and devices are accepted.
      kind: the kind of file that will be written, such as "a plan", for the error message.
      is_kind: function that returns whether the content of a file is of this kind.

    Returns:
      The path, as `local_path` returns it.

    Raises:
      ValueError, IsADirectoryError, NotADirectoryError: as for `check_file`.
      FileExistsError: the file has another kind; the message says which.
    """
    file = check_file(path)
    if file.is_file() and file.stat().st_size:
        content = file.read_bytes() if file.stat().st_size <= _LONGEST_RECOGNISED else b"\xff"
        if not is_kind(content):
            raise FileExistsError(
                f"{path} exists and is not {kind}, but {describe_content(content)}, so it is not replaced; give another "
                "name, or remove it",
            )
    return file


def is_json_object(*keys: str) -> Callable[[bytes], bool]:
    """Returns a function, for `check_replaceable`, which recognises a JSON object that has all these keys."""

    def recognise(content: bytes) -> bool:
        try:
            found = parse_json(content, "the file")
        except ValueError:
            return False
        return isinstance(found, dict) and found.keys() >= set(keys)

    return recognise


def is_png(content: bytes) -> bool:
    """Returns whether a file is a PNG picture; for `check_replaceable`."""
    return content.startswith(b"\x89PNG\r\n\x1a\n")


@contextlib.contextmanager
def claimed(
    path: pathlib.Path, remedy: str = "wait for it, or give another --out", *, shared: bool = False
) -> Iterator[None]:
    """Claims an existing file or directory during the block, so that two processes do not write to it at the same time.

    This works only between processes that call this function. The operating system ends the claim when the process ends,
    also after a kill. The claim is a lock (`flock`) and leaves no file.

    Args:
      path: path of the file or directory.
      remedy: what the user can do; the error message ends with it.
      shared: whether other processes may have a shared claim at the same time.

    Raises:
      BlockingIOError: another process has claimed it; the message has the number of the process, if the system tells it.
      OSError: the path cannot be opened, or its file system has no locks.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            process = _lock_holder(descriptor)
            holder = "another process" if process is None else f"another process, {process},"
            raise BlockingIOError(f"{holder} is writing {path}; {remedy}") from error
        yield
    finally:
        os.close(descriptor)


def _lock_holder(descriptor: int) -> int | None:
    """Returns the number of the process that holds the lock of an opened file; None if the system does not tell it."""
    table = pathlib.Path("/proc/locks")
    if not table.is_file():
        return None
    status = os.fstat(descriptor)
    for line in table.read_text().splitlines():
        # A line is, for example, "1: FLOCK  ADVISORY  WRITE 21420 fe:00:2189590 0 EOF".
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(status.st_ino):
            return int(fields[4]) if int(fields[4]) > 0 else None
    return None
