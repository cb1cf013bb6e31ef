"""Reads the first rows of a data set on the Hugging Face hub without downloading all of it.

The rows are streamed once, in batches, into a parquet file in a cache folder. From then on they are read from this file, so
that later starts, other processes and resumed runs have the same rows and do not ask the hub.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dream_jax import hub
from dream_jax.data.progress import EVERY_SECONDS, duration
from dream_jax.hub import HubId
from dream_jax.paths import local_path

CACHE_VARIABLE = "DREAM_JAX_CACHE"
"""The environment variable with the path of the default cache folder."""

_BATCH = 256  # rows that must arrive within the time limit of the hub
_REMEDY = "leave out --stream-rows to download all of it"


def stream_folder() -> Path:
    """Returns the folder for streamed rows: `streams` in $DREAM_JAX_CACHE, or in the folder of the user's caches."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return local_path(named, CACHE_VARIABLE) / "streams"
    import platformdirs

    return platformdirs.user_cache_path("dream_jax", appauthor=False) / "streams"


class HubStream:
    """The splits of a data set on the hub, of each of which the first rows are read.

    Args:
      hub_id: the data set.
      config: the name of its configuration; None: it has only one.
      rows: the number of rows of a split that are read, if it has so many.
      cache: the folder in which a file for each split is kept.

    Raises:
      ConnectionError: the hub has no such data set, or does not answer in time, and the cache does not have it.
      ValueError: it has several configurations and none is chosen, or not the one that is chosen.
    """

    def __init__(self, hub_id: HubId, config: str | None, rows: int, cache: Path):
        self._hub_id, self._config, self._rows, self._cache = hub_id, config, rows, cache
        self._found: Mapping[str, Any] | None = None

    def names(self) -> list[str]:
        """Returns the names of the splits. The hub is asked for them, unless they are in the cache."""
        path = self._path("splits").with_suffix(".json")
        if not path.is_file():
            self._write(path, lambda temporary: temporary.write_text(json.dumps(sorted(self._splits()))))
        return [str(name) for name in json.loads(path.read_text(encoding="utf-8"))]

    def file(self, split: str) -> Path:
        """Returns the parquet file with the first rows of a split, which are streamed into it if it does not exist.

        Raises: ConnectionError as the class; also if a batch of rows does not arrive in time. ValueError if the columns of
        the rows differ. OSError if the file cannot be written.
        """
        path = self._path(split)
        if not path.is_file():
            self._write(path, lambda temporary: self._stream(split, temporary))
        return path

    def _path(self, split: str) -> Path:
        key = json.dumps([str(self._hub_id), self._config, split, self._rows])
        name = self._hub_id.name.replace("/", "--")
        return self._cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.parquet"

    def _splits(self) -> Mapping[str, Any]:
        """Returns split -> the iterable data set of `datasets`."""
        if self._found is not None:
            return self._found
        import datasets

        if not hub.ask(self._hub_id, "dataset"):
            raise ConnectionError(
                f"the rows of {self._hub_id} are not in {self._cache}, and the hub cannot be reached; stream them where it "
                "can, or give a path"
            )
        name, revision = self._hub_id.name, self._hub_id.revision
        found = self._in_time(lambda: datasets.load_dataset(name, self._config, revision=revision, streaming=True))
        self._found = found if isinstance(found, Mapping) else {"train": found}
        return self._found

    def _stream(self, split: str, target: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        splits = self._splits()
        if split not in splits:
            raise ValueError(
                f"{self._hub_id} had the split {split!r} when {self._path('splits').with_suffix('.json')} was written, and "
                f"has only {sorted(splits)} now; remove this file, or give a revision that has it (NAME@REVISION)"
            )
        rows = splits[split].take(self._rows)
        batches = iter(rows.with_format("arrow").iter(batch_size=_BATCH))
        begun = said = time.monotonic()
        count = 0
        with contextlib.ExitStack() as stack:
            writer = None
            while (table := self._in_time(lambda: next(batches, None))) is not None:
                if writer is None:
                    schema = table.schema.remove_metadata()
                    writer = stack.enter_context(pyarrow.parquet.ParquetWriter(target, schema, compression="zstd"))
                try:
                    writer.write_table(table.cast(writer.schema))
                except (pyarrow.ArrowInvalid, ValueError) as error:
                    raise ValueError(
                        f"{self._hub_id}, {split}: the rows after row {count} have other columns ({error}); {_REMEDY}"
                    ) from error
                count += table.num_rows
                now = time.monotonic()
                if now - said > EVERY_SECONDS:
                    said, rate = now, count / (now - begun)
                    left = duration((self._rows - count) / rate)
                    _tell(
                        f"streaming {self._hub_id}, {split}: {count:,} of at most {self._rows:,} rows, {rate:,.0f} rows/s, "
                        f"{left} left"
                    )
        if not count:
            raise ValueError(f"{self._hub_id}, {split}: no rows")
        _tell(f"streamed {count:,} rows of {self._hub_id}, {split}, into the folder {self._cache}")

    def _in_time(self, function: Callable[[], Any]) -> Any:
        """Returns what a function returns. Raises ConnectionError for its errors, or if it takes too long."""
        seconds = hub.timeout()
        try:
            return hub.within(seconds, function)
        except TimeoutError as error:
            raise ConnectionError(
                f"the Hugging Face hub sent no rows of {self._hub_id} within {seconds:g} s; check the network, or set "
                f"{hub.TIMEOUT_VARIABLE} to wait longer. What had arrived is not kept"
            ) from error
        except Exception as error:  # The library has no common exception class for errors of hub, network and files.
            text = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, ValueError) and "config" in text.casefold():
                raise ValueError(f"{self._hub_id}: {text:.400}; choose a configuration with --data-config") from error
            raise ConnectionError(
                f"{self._hub_id} could not be streamed from the Hugging Face hub: {text:.400}; {_REMEDY}, or download it "
                "elsewhere and give the path"
            ) from error

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        """Lets `write` make a file, which gets its name when it is complete. Other processes of this host wait."""
        self._cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(self._cache):
            if path.is_file():  # another process has made it meanwhile
                return
            for left in self._cache.glob(f".{path.name}.incomplete-*"):  # of a process that was killed
                left.unlink(missing_ok=True)
            temporary = path.with_name(f".{path.name}.incomplete-{os.getpid()}")
            try:
                write(temporary)
                temporary.replace(path)
            except OSError as error:
                if error.errno is None:
                    raise
                raise OSError(error.errno, f"{path} cannot be written ({error.strerror})") from error
            finally:
                temporary.unlink(missing_ok=True)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process is in such a block for the folder. The lock ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
