"""Keeps the tokens of rows in files, which are memory-mapped and read at random, so that data may be larger than memory.

A store is a folder in a cache folder. Its name is a digest of its key: everything that its tokens depend on. It is built
by one process of a host while the others wait, and moved into place when it is complete:

    store = open_store(cache, key, fill, say=print)   # finds the store, or builds it with `fill`
    def fill(writer):                                 # called once, in the process that builds
        for row in rows:
            writer.add(token_row)                     # or add(token_row, row, prompt_hash): also the row as text
        return intake                                 # what was left out when the rows were read; an `Intake`

    len(store), store.lengths[i]                      # tokens of row i before any cut: int32 [n], memory-mapped
    store.row(i)                                      # the `TokenRow` of row i; its tokens are a view of the file
    store.text(i)                                     # the `Row` of row i, if the writer got it
    store.prompts, store.learned, store.traces        # int32 [n]: how many of the tokens have these kinds
    store.prompt_hashes                               # uint64 [n], by which rows are held out
    store.intake                                      # what was left out, as when the rows were read

The files are arrays without a header, whose types and lengths are in `store.json`. They are read by numpy rather than
as Arrow tables, because a column of a table is divided into batches, and a column here is one array: the tokens of any
rows are a view of it, and the lengths of all rows are one array. Every MiB of a file has a checksum, which is compared
before its items are used for the first time. The memory that a process needs does not grow with the tokens: pages that
have been read are given back to the system from time to time.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import mmap
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, SupportsIndex, get_args

import numpy as np

from dream_jax.data.encode import Kind, TokenPiece, TokenRow
from dream_jax.data.rows import Intake, Piece, Row, check_index
from dream_jax.side_files import read_json

FORMAT = 1
"""The version of the files. Stores of other versions are not read, because it is a part of every key."""
DESCRIPTION = "store.json"
"""The file that describes the columns of a store. A folder without it is not a store."""

_KINDS: tuple[Kind, ...] = get_args(Kind)
_CODES = {kind: code for code, kind in enumerate(_KINDS)}
_COLUMNS: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype("<i4"),  # the tokens of all rows, one row after the other
    "ends": np.dtype("<i8"),  # for each row the index after its last token
    "lengths": np.dtype("<i4"),
    "prompts": np.dtype("<i4"),
    "learned": np.dtype("<i4"),
    "traces": np.dtype("<i4"),
    "prompt_hashes": np.dtype("<u8"),
    "piece_ends": np.dtype("<i8"),  # for each row the index after its last piece
    "piece_kinds": np.dtype("u1"),  # indices into `kinds` of the description
    "piece_lengths": np.dtype("<i4"),
    "texts": np.dtype("u1"),  # JSON of the rows as text
    "text_ends": np.dtype("<i8"),
}
_BLOCK = 2**20  # bytes that have one checksum
_VERIFIED_AT_ONCE = 2**30  # bytes of all columns up to which every checksum is compared when a store is opened
_MAPPED = 2**25  # bytes of pages after which a column gives its pages back
_TOGETHER = 256  # rows whose tokens are copied together
_PAGES = 2**21  # bytes that the system may map for the first read of a page, if it keeps the file in large pages
_REBUILT = "it is built again"
# The folder cannot be written, is below a file, or its file system has no locks.
_UNUSABLE = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
)
_INCOMPLETE = re.compile(r"\.(?P<store>[0-9a-f]{32})\.incomplete-\d+")  # the folder in which a process builds a store

Say = Callable[[str], None]
Fill = Callable[["StoreWriter"], Intake]


class DamagedStore(ValueError):
    """A store cannot be read, or its content is not what was written."""


class TokenStore:
    """A store that is complete, for reading. It can be used by several threads.

    Args:
      folder: the folder of the store.

    Raises:
      FileNotFoundError: there is no store.
      DamagedStore: the store was changed after it was written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / DESCRIPTION
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not a store of tokens, because it has no {DESCRIPTION}")
        try:
            found = read_json(path)
            if found.pop("sum") != _sum_of(found):
                raise ValueError(f"{path} is not as it was written")
            self.key: Mapping[str, Any] = found["key"]
            self._kinds = tuple(found["kinds"])
            columns = {name: _Column(folder / name, **found["columns"][name]) for name in _COLUMNS}
            self.intake = Intake(**{**found["intake"], "bad": tuple(found["intake"]["bad"])})
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise DamagedStore(f"the store of tokens {folder} is damaged ({error!s:.300})") from error
        self._tokens, self._texts = columns["tokens"], columns["texts"]
        whole = sum(column.nbytes for column in columns.values()) <= _VERIFIED_AT_ONCE
        for column in columns.values():
            if whole or column not in (self._tokens, self._texts):
                column.verify()
        self._ends, self._piece_ends = columns["ends"].items, columns["piece_ends"].items
        self._piece_kinds, self._piece_lengths = columns["piece_kinds"].items, columns["piece_lengths"].items
        self._text_ends = columns["text_ends"].items
        self.lengths: np.ndarray = columns["lengths"].items
        """int32 [n], the number of tokens of each row before any cut."""
        self.prompts: np.ndarray = columns["prompts"].items
        """int32 [n], the number of tokens of each row before its response, including those of earlier turns."""
        self.learned: np.ndarray = columns["learned"].items
        """int32 [n], the number of tokens before the response that belong to learned earlier turns."""
        self.traces: np.ndarray = columns["traces"].items
        """int32 [n], the number of tokens of the reasoning traces of each row; -1 for a row without a trace."""
        self.prompt_hashes: np.ndarray = columns["prompt_hashes"].items
        """uint64 [n], the hash of the prompt of each row, by which rows are held out; 0 if the writer got none."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total_tokens(self) -> int:
        """The number of tokens of all rows together."""
        return len(self._tokens.items)

    def row(self, number: int) -> TokenRow:
        """Returns the tokens of a row before any cut. Raises IndexError, and `DamagedStore` for a damaged file."""
        number = check_index(number, len(self))
        tokens = self._tokens.read(self._begin(self._ends, number), int(self._ends[number]))
        pieces = slice(self._begin(self._piece_ends, number), int(self._piece_ends[number]))
        kinds, lengths = self._piece_kinds[pieces].tolist(), self._piece_lengths[pieces].tolist()
        named = (TokenPiece(self._kinds[kind], length) for kind, length in zip(kinds, lengths, strict=True))
        return TokenRow(tokens=tokens, pieces=tuple(named))

    def text(self, number: int) -> Row:
        """Returns a row as text. Raises IndexError; ValueError if the store has no texts; `DamagedStore`."""
        number = check_index(number, len(self))
        found = self._texts.read(self._begin(self._text_ends, number), int(self._text_ends[number]))
        if not len(found):
            raise ValueError(f"the store of tokens {self.folder} has no text of row {number}")
        return _row_of(json.loads(found.tobytes()))

    def framed(self, first: int, last: int) -> np.ndarray:
        """Returns int32: of the rows first, ..., last - 1 the length and then the tokens of each piece."""
        if first >= last:
            return np.zeros(0, np.int32)
        tokens = self._tokens.read(self._begin(self._ends, first), int(self._ends[last - 1]))
        lengths = self._piece_lengths[self._begin(self._piece_ends, first) : int(self._piece_ends[last - 1])]
        return np.insert(tokens, np.cumsum(lengths) - lengths, lengths)

    @staticmethod
    def _begin(ends: np.ndarray, number: int) -> int:
        return int(ends[number - 1]) if number else 0


class StoredRows:
    """A `RowSource` whose rows are in a store, or some of them: `source[i]` is row i as text.

    Args:
      store: the store.
      numbers: int64, the indices of the rows, ascending; None: all rows.
    """

    uniform_length = False

    def __init__(self, store: TokenStore, numbers: np.ndarray | None = None):
        self.store, self._numbers, self.intake = store, numbers, store.intake

    def __len__(self) -> int:
        return len(self.store) if self._numbers is None else len(self._numbers)

    def __getitem__(self, index: SupportsIndex) -> Row:
        return self.store.text(self._number(index))

    def token_row(self, index: int) -> TokenRow:
        """Returns the tokens of row `index` before any cut."""
        return self.store.row(self._number(index))

    def of(self, numbers: np.ndarray) -> "StoredRows":
        """Returns the rows with these indices, int64 and ascending."""
        if len(numbers) == len(self):
            return self
        return StoredRows(self.store, numbers if self._numbers is None else self._numbers[numbers])

    def selected(self, column: np.ndarray) -> np.ndarray:
        """Returns int64 [n]: the values of these rows in a column of the store with one value for each row."""
        return (column if self._numbers is None else column[self._numbers]).astype(np.int64)

    def framed(self) -> Iterator[np.ndarray]:
        """Yields int32 arrays: of all rows, in order, the length and then the tokens of each piece."""
        numbers = np.arange(len(self.store)) if self._numbers is None else self._numbers
        ends = np.flatnonzero(np.diff(numbers) != 1) + 1  # the rows between two of them follow one another in the store
        for start, stop in itertools.pairwise([0, *ends.tolist(), len(numbers)]):
            for first in range(start, stop, _TOGETHER):
                last = min(first + _TOGETHER, stop)
                yield self.store.framed(int(numbers[first]), int(numbers[last - 1]) + 1)

    def _number(self, index: SupportsIndex) -> int:
        number = check_index(index, len(self))
        return number if self._numbers is None else int(self._numbers[number])


class StoreWriter:
    """Writes rows into the columns of a new store. `open_store` makes it and finishes it.

    Args:
      folder: an empty folder for the columns.
      progress: called from time to time with the number of rows that are written.
    """

    def __init__(self, folder: Path, progress: Callable[[int], None] = lambda rows: None):
        self._folder, self._progress = folder, progress
        self._columns = {name: _ColumnWriter(folder / name, kind) for name, kind in _COLUMNS.items()}
        self.rows = 0
        """The number of rows so far."""

    def add(self, row: TokenRow, text: Row | None = None, prompt_hash: int = 0) -> None:
        """Writes a row: its tokens before any cut, if given the row as text, and the hash of its prompt."""
        columns = self._columns
        columns["tokens"].extend(row.tokens)
        columns["ends"].append(columns["tokens"].count)
        columns["lengths"].append(len(row.tokens))
        prompt = learned = 0
        trace = -1
        for kind, length in row.pieces:
            columns["piece_kinds"].append(_CODES[kind])
            columns["piece_lengths"].append(length)
            prompt += length if kind in ("prompt", "learned") else 0
            learned += length if kind == "learned" else 0
            trace = max(trace, 0) + length if kind == "trace" else trace
        columns["piece_ends"].append(columns["piece_lengths"].count)
        columns["prompts"].append(prompt)
        columns["learned"].append(learned)
        columns["traces"].append(trace)
        columns["prompt_hashes"].append(prompt_hash)
        if text is not None:
            columns["texts"].extend(np.frombuffer(_json_of(text), np.uint8))
        columns["text_ends"].append(columns["texts"].count)
        self.rows += 1
        if self.rows % 256 == 0:
            self._progress(self.rows)

    def finish(self, key: Mapping[str, Any], intake: Intake) -> None:
        """Writes what is buffered, and the description of the store."""
        described = {name: column.finish() for name, column in self._columns.items()}
        self._progress(self.rows)
        content = {"key": dict(key), "kinds": list(_KINDS), "columns": described, "intake": asdict(intake)}
        content = json.loads(json.dumps(content))
        with (self._folder / DESCRIPTION).open("w", encoding="utf-8") as file:
            json.dump({**content, "sum": _sum_of(content)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Closes the files."""
        for column in self._columns.values():
            column.close()


def digest_of(key: Mapping[str, Any]) -> str:
    """Returns the digest of a key, 32 hexadecimal digits: the name of the folder of its store."""
    content = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def open_store(
    cache: Path,
    key: Mapping[str, Any],
    fill: Fill,
    *,
    say: Say = lambda text: None,
    progress: Callable[[int], None] = lambda rows: None,
) -> TokenStore:
    """Returns the store of a key. If there is none, or it is damaged, this process builds it, or waits until another has.

    Args:
      cache: the folder of all stores; it is made if it is missing.
      key: everything that the tokens depend on; names and values that JSON can represent.
      fill: writes all rows, and returns what was left out when they were read.
      say: prints a line about what happens.
      progress: called from time to time with the number of rows that are written.

    Raises:
      PermissionError: there is no store of this key, and none can be written into the folder, or its file system has no
        locks.
      OSError: the disk is full.
      Exception: what `fill` raises. No part of the store then stays.
    """
    folder = cache / digest_of(key)
    try:
        with contextlib.suppress(FileNotFoundError, DamagedStore):
            return _told(TokenStore(folder), "found", say)
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(cache / f"{folder.name}.lock", say):
            try:
                return _told(TokenStore(folder), "found", say)  # another process may have built it meanwhile
            except FileNotFoundError:
                pass
            except DamagedStore as error:
                say(f"warning: {error}; {_REBUILT}")
            _remove_leftovers(cache, folder.name)
            _build(folder, key, fill, progress)
            return _told(TokenStore(folder), "built", say)
    except OSError as error:
        # `fill` may raise errors of other files.
        if error.errno in _UNUSABLE and (error.filename is None or Path(error.filename).is_relative_to(cache)):
            raise PermissionError(
                error.errno,
                f"{cache} cannot be written ({error.strerror}), and has no tokens of these rows yet: give another "
                "--data-cache, or --data-cache off to keep all tokens in memory",
            ) from error
        raise


def _told(store: TokenStore, how: str, say: Say) -> TokenStore:
    """Returns the store, after a line that says how it came about."""
    say(f"tokens of {len(store):,} rows {how} in {store.folder} ({store.total_tokens:,} tokens)")
    return store


def _build(folder: Path, key: Mapping[str, Any], fill: Fill, progress: Callable[[int], None]) -> None:
    """Builds a store beside its folder, and moves it there; this process has the lock."""
    temporary = folder.with_name(f".{folder.name}.incomplete-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        writer = StoreWriter(temporary, progress)
        try:
            writer.finish(key, fill(writer))
        finally:
            writer.close()
        if folder.exists():  # a damaged store
            folder.rename(temporary / "damaged")
        temporary.rename(folder)
        shutil.rmtree(folder / "damaged", ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        explained = error.strerror != os.strerror(error.errno or 0)  # `fill` says what takes the space
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not explained:
            raise OSError(
                error.errno,
                f"the disk is full ({error.strerror}), so the tokens were not written to {folder.parent}: free some space, "
                "or give another --data-cache",
            ) from error
        raise
    except BaseException:  # Ctrl-C (KeyboardInterrupt) must remove the folder too
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """Holds the lock of a store during the block; waits for the process that holds it. The lock leaves no file."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process reads these rows and writes their tokens to {path.parent}; waiting for it")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The process that held the lock has removed the file, and a third one may have made it again.
            if not _is_file_of(path, descriptor):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _is_file_of(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove_leftovers(cache: Path, held: str) -> None:
    """Removes the folders that killed processes have left: those of stores whose lock no other process has.

    Args:
      cache: the folder of all stores.
      held: the name of the store whose lock this process has.
    """
    for folder in cache.glob(".*.incomplete-*"):
        matched = _INCOMPLETE.fullmatch(folder.name)
        if matched is None:  # a folder of something else
            continue
        lock = cache / f"{matched['store']}.lock"
        if matched["store"] == held or not lock.exists():
            shutil.rmtree(folder, ignore_errors=True)
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                lock.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


class _Column:
    """One memory-mapped array, whose blocks are compared with their checksums before they are used."""

    def __init__(self, path: Path, dtype: str, count: int, sums: list[int]):
        self._path, self._sums, kind = path, sums, np.dtype(dtype)
        self.nbytes = count * kind.itemsize
        if kind != _COLUMNS[path.name] or len(sums) != -(-self.nbytes // _BLOCK):
            raise ValueError(f"its description of {path.name} is not that of a store")
        if path.stat().st_size != self.nbytes:
            raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {self.nbytes}")
        self._verified = np.zeros(len(sums), np.bool_)
        self._itemsize, self._mapped, self._giving = kind.itemsize, 0, threading.Lock()
        self._map: mmap.mmap | None = None
        if count:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.items = np.frombuffer(self._map or b"", kind)
        """All items of the column. Call `verify` before their use, or use `read`."""

    def verify(self, first: int = 0, last: int | None = None) -> None:
        """Compares the bytes first, ..., last - 1 with their checksums. Raises `DamagedStore`."""
        if self._map is None:
            return
        last = self.nbytes if last is None else last
        for block in range(first // _BLOCK, -(-last // _BLOCK)):
            if self._verified[block]:
                continue
            if zlib.crc32(self._map[block * _BLOCK : (block + 1) * _BLOCK]) != self._sums[block]:
                raise DamagedStore(
                    f"the store of tokens {self._path.parent} is damaged: {self._path.name} is not what was written; "
                    "remove the folder, and start again"
                )
            self._verified[block] = True
            self._give_back(_BLOCK)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the items start, ..., stop - 1 as a view of the file. Raises `DamagedStore`."""
        self.verify(start * self._itemsize, stop * self._itemsize)
        self._give_back((stop - start) * self._itemsize + _PAGES)
        return self.items[start:stop]

    def _give_back(self, nbytes: int) -> None:
        """Gives the pages back to the system if many have been read: they count as memory of this process until then."""
        self._mapped += nbytes
        if self._map is not None and self._mapped > _MAPPED:
            with self._giving:
                self._mapped = 0
                self._map.madvise(mmap.MADV_DONTNEED)


class _ColumnWriter:
    """Appends items to the file of a column, and computes the checksum of every block."""

    def __init__(self, path: Path, kind: np.dtype[Any]):
        self._kind, self._file = kind, path.open("wb", buffering=0)
        self._sums, self._pending, self._few = list[int](), bytearray(), list[int]()
        self.count = 0

    def append(self, item: int) -> None:
        """Appends one item."""
        self._few.append(item)
        self.count += 1
        if len(self._few) >= 4096:
            self._flush_few()

    def extend(self, items: np.ndarray) -> None:
        """Appends several items. Raises ValueError if they are not of the type of the column."""
        if items.dtype != self._kind:
            raise ValueError(f"items of type {items.dtype} in a column of type {self._kind}")
        self._pending += np.ascontiguousarray(items).data.cast("B")
        self.count += len(items)
        self._write(_BLOCK)

    def finish(self) -> dict[str, Any]:
        """Writes the rest to the disk, and returns the description of the column."""
        self._flush_few()
        self._write(1)
        os.fsync(self._file.fileno())
        return {"dtype": self._kind.str, "count": self.count, "sums": self._sums}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _flush_few(self) -> None:
        few, self._few = np.array(self._few, self._kind), []
        self._pending += few.tobytes()
        self._write(_BLOCK)

    def _write(self, fewest: int) -> None:
        """Writes full blocks, and with `fewest` 1 also the rest."""
        while len(self._pending) >= fewest:
            block = bytes(self._pending[:_BLOCK])
            del self._pending[:_BLOCK]
            self._sums.append(zlib.crc32(block))
            left = memoryview(block)
            while left:  # a raw file may write only a part
                left = left[self._file.write(left) :]


def _sum_of(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _json_of(row: Row) -> bytes:
    """Returns a row as JSON. Values in `meta` that JSON does not have, such as dates, become text."""
    return json.dumps({name: value for name, value in vars(row).items() if value}, default=str).encode()


def _row_of(found: dict[str, Any]) -> Row:
    prompt = found.get("prompt", "")
    return Row(
        **{
            **found,
            "prompt": prompt if isinstance(prompt, str) else tuple(prompt),
            "response": found.get("response", ""),
            "pieces": tuple(Piece(*piece) for piece in found.get("pieces", ())),
            "tools": tuple(found.get("tools", ())),
            "given_turns": tuple(found.get("given_turns", ())),
            "unread": tuple(found.get("unread", ())),
        }
    )
