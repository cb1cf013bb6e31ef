"""Shows how far the reading of rows has come: rows a second, and the time that is left; checks the space on the disk."""

import contextlib
import errno
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dream_jax.data.shards import ByteMeter, is_packed, shard_format

EVERY_SECONDS = 10.0
"""How often a line is printed where the output is not a terminal."""
EXPANSION = 4.0
"""How many times as large as a compressed file its content usually is; only used to estimate space on the disk."""


class RowProgress:
    """Shows how many rows are read, encoded and written: a bar on a terminal, otherwise a line now and then.

    Nothing is shown for data that take less time than `EVERY_SECONDS`, unless the output is a terminal.

    Args:
      name: the name of the data.
      total: bytes of all files of the data.
      meter: counts the bytes of the files that have been read.
      say: prints a line.
      now: returns the time in seconds.
    """

    def __init__(
        self,
        name: str,
        total: int,
        meter: ByteMeter,
        say: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
    ):
        self._name, self._total, self._meter, self._say, self._now = name, max(total, 1), meter, say, now
        self._begun = self._said = now()
        self._update: Callable[[float, str], None] | None = None

    def __call__(self, rows: int) -> None:
        """Shows that `rows` rows are written."""
        now, share = self._now(), min(self._meter.bytes / self._total, 1.0)
        seconds = now - self._begun
        rate = rows / seconds if seconds > 0 else 0.0
        left = seconds * (1 - share) / share if share else math.inf
        text = f"{rows:,} rows, {rate:,.0f} rows/s, {share:.0%} of {self._total / 1e9:.3g} GB"
        text += f", {duration(left)} left" if math.isfinite(left) else ""
        if self._update is not None:
            self._update(share, text)
        elif now - self._said >= EVERY_SECONDS:
            self._said = now
            self._say(f"reading {self._name}: {text}")

    @contextlib.contextmanager
    def shown(self) -> Iterator["RowProgress"]:
        """Shows a bar during the block if the output is a terminal; it is removed at the end."""
        if not sys.stdout.isatty():
            yield self
            return
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("reading {task.fields[name]}"), BarColumn(bar_width=20), TextColumn("{task.description}"))
        with Progress(*columns, transient=True) as bar:
            task = bar.add_task("", total=1.0, name=self._name.replace("[", "\\["))
            self._update = lambda share, text: bar.update(task, completed=share, description=text)
            try:
                yield self
            finally:
                self._update = None


def duration(seconds: float) -> str:
    """Returns a number of seconds as minutes and seconds, and hours if there are any: 0:05, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def needed_bytes(files: Sequence[Path], bytes_per_token: float) -> int:
    """Returns about how many bytes the tokens of files take, with their texts, which are kept beside them.

    bytes_per_token: how many bytes of text a token stands for. A token takes 4 bytes.
    """
    content = 0.0
    for path in files:
        packed = is_packed(path) or shard_format(path) == "parquet"
        content += path.stat().st_size * (EXPANSION if packed else 1.0)
    return int(content * (1 + 4 / bytes_per_token))


@contextlib.contextmanager
def enough_space(folder: Path, name: str, needed: int, say: Callable[[str], None]) -> Iterator[None]:
    """Compares the space that the tokens of some data need with the free space, and names it if the disk becomes full.

    Less than half of the space is refused; a little too little gets a warning, because `needed` is an estimate.
    Raises: OSError if there is too little space before the block, or if the disk becomes full in it.
    """
    disk = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free
    text = f"the tokens of {name} take about {_gigabytes(needed)} in {folder}"
    remedy = "make room, or give another --data-cache, or --data-cache off to keep all tokens in memory"
    if free < needed / 2:
        raise OSError(errno.ENOSPC, f"{text}, but only {_gigabytes(free)} are free there: {remedy}")
    if free < needed:
        say(f"warning: {text}, and {_gigabytes(free)} are free there; if it becomes full, {remedy}")
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno, f"the disk is full: {text}, and {_gigabytes(free)} were free at the start: {remedy}"
        ) from error


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.3g} GB"
