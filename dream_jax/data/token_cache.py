"""Opens data as rows of tokens: small data in memory, larger data from stores in a cache folder (`dream_jax.data.store`).

Both ways give the same rows with the same tokens in the same order.
"""

import contextlib
import dataclasses
import gc
import hashlib
import inspect
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dream_jax.chat_template import ChatTemplate
from dream_jax.data.encode import TokenRow, token_rows
from dream_jax.data.lengths import TokenizedRows
from dream_jax.data.options import EncodeOptions, ReadOptions
from dream_jax.data.progress import RowProgress, enough_space, needed_bytes
from dream_jax.data.rows import Intake, Row, RowSource
from dream_jax.data.sources import DataSplit, find_splits, in_split, mixed, prompt_hash
from dream_jax.data.store import Say, StoredRows, StoreWriter, TokenStore, open_store
from dream_jax.data.streams import CACHE_VARIABLE
from dream_jax.paths import local_path
from dream_jax.side_files import object_of
from dream_jax.tokenizer import ByteTokenizer, DreamTokenizer, Tokenizer

AUTO, OFF = "auto", "off"
SMALLEST = 2**20
"""Bytes of files below which "auto" keeps the tokens in memory: these files are read in about a second."""

_CHUNK = 2**24  # bytes of a file that are hashed as one piece
_BUFFER = 2**20  # bytes that are read at once
_TOGETHER = 2**16  # characters of rows that are encoded together
_MOST_THREADS = 8  # threads that encode; more would wait for Python, which runs one thread at a time
_WAITING = 2**22  # characters of rows that wait for their turn, unless three groups have more
_ALLOCATED = 100_000  # objects after which Python looks for cycles among the new ones while rows are encoded
_PARALLELISM = "TOKENIZERS_PARALLELISM"  # the setting of the library `tokenizers`


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheChoice:
    """Where the tokens of data are kept.

    folder: the folder of the stores; None: all tokens are kept in memory.
    smallest: the number of bytes of its files from which on data has a store.
    asked: whether the user asked for this folder. Otherwise tokens are kept in memory if it cannot be written.
    """

    folder: Path | None
    smallest: int = SMALLEST
    asked: bool = False


def find_cache(setting: str) -> CacheChoice:
    """Returns what the setting `--data-cache` says: "auto", "off" or a path. Raises ValueError for an address.

    auto: the folder in $DREAM_JAX_CACHE, or `dream_jax` in the folder of the user's caches, for data that takes long to
    read. A path: this folder, for all data that is read from files.
    """
    if setting == OFF:
        return CacheChoice(folder=None)
    if setting != AUTO:
        return CacheChoice(folder=local_path(setting, "data_cache"), smallest=0, asked=True)
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return CacheChoice(folder=local_path(named, CACHE_VARIABLE))
    import platformdirs

    return CacheChoice(folder=platformdirs.user_cache_path("dream_jax", appauthor=False) / "tokens")


class TokenCache:
    """Opens data for one tokenizer with one set of options.

    Args:
      choice: where the tokens are kept.
      tokenizer: the tokenizer.
      encoding: the options for turning rows into tokens.
      say: prints a line about a store that is found or built.
    """

    def __init__(
        self, choice: CacheChoice, tokenizer: Tokenizer, encoding: EncodeOptions, say: Say = lambda text: None
    ):
        self._choice, self._tokenizer, self._encoding, self._say = choice, tokenizer, encoding, say
        # The training split and the test split of one file have one store.
        self._opened: list[tuple[DataSplit, TokenStore]] = []

    def open(
        self,
        names_or_paths: Sequence[str],
        weights: Sequence[float] | None = None,
        split: str = "train",
        seed: int = 0,
        options: ReadOptions = ReadOptions(),
    ) -> TokenizedRows:
        """Returns the rows of `open_mixture`, which takes the same arguments, as tokens.

        Raises: as `open_mixture` and `token_row`; OSError as `open_store`.
        """
        found = find_splits(names_or_paths, split, seed, options)
        parts = [self._part(part) if isinstance(part, DataSplit) else part for part in found]
        return TokenizedRows(mixed(parts, weights, split, options), self._tokenizer, self._encoding)

    def _part(self, data: DataSplit) -> RowSource:
        """Returns the rows of one source, from a store if there is one or if it pays to build one."""
        if (
            self._choice.folder is None
            or not data.files
            or not all(path.is_file() for path in data.files)  # such as a pipe, which can be read only once
            or sum(path.stat().st_size for path in data.files) < self._choice.smallest
        ):
            return data.read()
        try:
            store = self._store(data, self._choice.folder)
        except PermissionError as error:
            if self._choice.asked or error.filename is not None:  # such as a file of the data that may not be read
                raise
            self._say(f"tokens are kept in memory, because {self._choice.folder} cannot be written ({error.strerror})")
            return data.read()
        if not data.divided:
            return StoredRows(store)
        chosen = in_split(store.prompt_hashes, data.split, data.name, data.options.held_out)
        return StoredRows(store, None if chosen.all() else np.flatnonzero(chosen))

    def _store(self, data: DataSplit, cache: Path) -> TokenStore:
        for opened, store in self._opened:
            if (opened.files, opened.name, _read_key(opened)) == (data.files, data.name, _read_key(data)):
                return store
        before = _states(data.files)
        key = {
            "data": {"name": data.name, "files": [str(path) for path in data.files], "content": content_of(data.files)},
            "reading": _read_key(data),
            "tokenizer": self._tokenizer.fingerprint(),
            "learned_turns": self._encoding.learned_turns,
            "without_traces": self._encoding.length_policy == "answer_only",  # the other policies cut later
            "code": _code_digest(),
        }

        size = sum(path.stat().st_size for path in data.files)
        passes = 2 if data.options.skip_bad and data.parser is None else 1  # `RowStream` then counts the kinds first
        progress = RowProgress(data.name, passes * size, data.meter, self._say)
        needed = needed_bytes(data.files, 1.0 if isinstance(self._tokenizer, ByteTokenizer) else 4.0)

        def fill(writer: StoreWriter) -> Intake:
            with enough_space(cache, data.name, needed, self._say), progress.shown():
                return fill_all(writer)

        def fill_all(writer: StoreWriter) -> Intake:
            stream = data.stream()
            with _own_threads(), _few_collections():
                for row, tokens in encoded(stream, self._tokenizer, self._encoding):
                    writer.add(tokens, row, prompt_hash(row))
            if _states(data.files) != before:
                raise ValueError(f"{data.name} was changed while it was read; start again")
            return stream.intake

        store = open_store(cache, key, fill, say=self._say, progress=progress)
        self._opened.append((data, store))
        return store


def encoded(
    rows: Iterable[Row], tokenizer: Tokenizer, options: EncodeOptions, *, threads: int | None = None
) -> Iterator[tuple[Row, TokenRow]]:
    """Yields rows with their tokens, in order. Few of them are held in memory at a time.

    Several rows are encoded together, by one of `threads` threads, while the calling thread reads further ones. By default
    there is one thread more than cores, at most `_MOST_THREADS`, because a thread waits while its chats are rendered.
    Raises: ValueError as `token_row`, for the first row that cannot be encoded, and what `rows` raises.
    """
    threads = threads or min((os.cpu_count() or 1) + 1, _MOST_THREADS)
    waiting = deque[tuple[int, Future[list[tuple[Row, TokenRow]]]]]()
    characters = 0  # of the rows that are waiting

    def encode(some: list[Row]) -> list[tuple[Row, TokenRow]]:
        return list(zip(some, token_rows(some, tokenizer, options), strict=True))

    with ThreadPoolExecutor(threads) as pool:
        try:
            for size, some in _groups(rows):
                waiting.append((size, pool.submit(encode, some)))
                characters += size
                # Long documents are groups of their own: of these, three are held in memory.
                while len(waiting) > threads or (len(waiting) > 2 and characters > _WAITING):
                    size, done = waiting.popleft()
                    characters -= size
                    yield from done.result()
            while waiting:
                yield from waiting.popleft()[1].result()
        finally:
            for _, future in waiting:
                future.cancel()


@contextlib.contextmanager
def _own_threads() -> Iterator[None]:
    """Lets the tokenizer encode each batch in the thread that asks for it, unless the user has decided this.

    The tokenizer's threads wait for one another at the end of each batch. Threads with a batch each do not, and are faster.
    """
    if _PARALLELISM in os.environ:
        yield
        return
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        if os.environ.get(_PARALLELISM) == "false":  # otherwise the program has decided it meanwhile
            del os.environ[_PARALLELISM]


@contextlib.contextmanager
def _few_collections() -> Iterator[None]:
    """Lets Python look for cycles among its objects more rarely, and only among objects that are made in the block.

    Rows consist of many objects without cycles. Looking at them, and at all modules, took a twelfth of the time.
    """
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    if not frozen:  # otherwise the program has chosen itself what is not looked at
        gc.freeze()
    if 0 < before[0] < _ALLOCATED:  # 0 switches these collections off
        gc.set_threshold(_ALLOCATED, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if not frozen:
            gc.unfreeze()


def _groups(rows: Iterable[Row]) -> Iterator[tuple[int, list[Row]]]:
    """Yields consecutive rows that are encoded together, after the number of their characters.

    A group ends with the row with which it has `_TOGETHER` characters.
    """
    some, size = list[Row](), 0
    for row in rows:
        some.append(row)
        prompt = row.prompt
        size += len(row.response) + (
            len(prompt) if isinstance(prompt, str) else sum(len(turn["content"]) for turn in prompt)
        )
        if size >= _TOGETHER:
            yield size, some
            some, size = [], 0
    if some:
        yield size, some


def content_of(files: Sequence[Path]) -> str:
    """Returns a digest of the bytes of files, which several threads read."""
    pieces = [(path, start) for path in files for start in range(0, max(path.stat().st_size, 1), _CHUNK)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as threads:
        found = hashlib.sha256()
        for (_, start), (size, digest) in zip(pieces, threads.map(_digest_of_piece, pieces), strict=True):
            found.update(f"{start} {size} {digest}\n".encode())
    return found.hexdigest()


def _digest_of_piece(piece: tuple[Path, int]) -> tuple[int, str]:
    path, start = piece
    found, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while size < _CHUNK and (content := file.read(_BUFFER)):
            found.update(content)
            size += len(content)
    return size, found.hexdigest()


def _states(files: Sequence[Path]) -> list[tuple[int, ...]]:
    """Returns what tells that a file was written: its device, inode, size and time of change."""
    found = [path.stat() for path in files]
    return [(one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for one in found]


def _read_key(data: DataSplit) -> dict[str, Any]:
    """Returns what the rows of some data depend on besides its files. The share that is held out is not part of it."""
    parser = None if data.parser is None else data.parser.__name__
    return {**dataclasses.asdict(data.options), "held_out": None, "parser": parser}


def _code_digest() -> str:
    """Returns a digest of the code that turns files into tokens, so that another version does not use its stores."""
    found = hashlib.sha256()
    for path in _code_files():
        found.update(f"{path.name}\n".encode() + path.read_bytes())
    return found.hexdigest()


def _code_files() -> Iterator[Path]:
    yield from sorted(Path(__file__).parent.glob("*.py"))
    yield Path(inspect.getfile(DreamTokenizer))
    yield Path(inspect.getfile(ChatTemplate))
    yield Path(inspect.getfile(object_of))  # reads JSON
