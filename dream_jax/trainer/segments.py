"""The segments of a run: `parts.json` has one entry for each start of the command, with its hardware and its duration.

A run that was killed and resumed computes some steps twice, perhaps on other hardware and at another price. The cost
counts both times, so the file is written regularly while the run lasts. A start that fails before the run has a folder is
not a segment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from dream_jax.files import read_typed, write_json

FILE = "parts.json"
EVERY = 10.0
"""Seconds between two writes of the file: if a segment is killed, at most this much of its time is not counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSegment:
    """The time from one start of the command to its end.

    Attributes:
      begun: time of the start in UTC (ISO 8601).
      seconds: duration until the end, or until the file was last written.
      devices: number and kind of the devices, such as "8 x TPU v6 lite".
      chips: number of chips that were used.
      usd_per_chip_hour: price of a chip in US dollars per hour; None if it is not known.
      rmb_per_usd: exchange rate for the price in RMB.
      ended: True if the block of `RunSegments.kept` has ended, also by an exception or a handled SIGTERM; False while the
        command runs, and after it was killed (SIGKILL).
    """

    begun: str
    seconds: float
    devices: str
    chips: int
    usd_per_chip_hour: float | None
    rmb_per_usd: float
    ended: bool = False


def read_segments(folder: pathlib.Path) -> list[RunSegment]:
    """Returns the segments of a run, oldest first; an empty list if the folder has no `parts.json`.

    Raises:
      ValueError: the file is damaged.
      OSError: the file cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    return read_typed(path, list[RunSegment], "move it away: the time of earlier segments is then not counted")


class RunSegments:
    """The earlier segments of a run, and the present one, which is written to the file while it lasts."""

    def __init__(
        self, folder: pathlib.Path | None, present: RunSegment, began: float, told: Callable[[str], None]
    ) -> None:
        """Reads the earlier segments.

        Args:
          folder: the folder of the run; a damaged file in it is renamed. None (on processes other than 0) means that
            nothing is read or written.
          present: the present segment; its `seconds` are not used.
          began: value of `time.monotonic()` at its start, which may be before the run had a folder.
          told: function that prints or logs a warning. It is called if the file is damaged or cannot be written, perhaps
            from a background thread; the run continues.

        Raises:
          OSError: the file cannot be read, or a damaged one cannot be renamed.
        """
        self._folder, self._present, self._began, self._told = folder, present, began, told
        self._writing = threading.Lock()
        self._earlier: list[RunSegment] = []
        if folder is not None:
            try:
                self._earlier = read_segments(folder)
            except ValueError:
                aside = folder / f"{FILE}.damaged"
                (folder / FILE).replace(aside)
                told(f"warning: {FILE} is damaged and was renamed {aside.name}: the time of earlier segments is lost")

    def now(self, *, ended: bool = False) -> list[RunSegment]:
        """Returns all segments, oldest first. The last one is the present segment, with its duration so far.

        Args:
          ended: the value for `RunSegment.ended` of the present segment.
        """
        seconds = time.monotonic() - self._began
        return [*self._earlier, dataclasses.replace(self._present, seconds=seconds, ended=ended)]

    @contextlib.contextmanager
    def kept(self) -> Iterator[RunSegments]:
        """Keeps the file up to date during the block, and yields this object.

        The file is written at the start, every `EVERY` seconds, and at the end with `ended` True. If the folder is None, no
        file is written.
        """
        if self._folder is None:
            yield self
            return
        over = threading.Event()

        def keep() -> None:
            while not over.wait(EVERY):
                self.write(self.now())

        self.write(self.now())
        keeper = threading.Thread(target=keep, name="segments", daemon=True)
        keeper.start()
        try:
            yield self
        finally:
            over.set()
            keeper.join()
            self.write(self.now(ended=True))

    def write(self, segments: Sequence[RunSegment]) -> None:
        """Writes these segments to the file; an OSError only causes a warning, because the next write may succeed."""
        if self._folder is None:
            return
        try:
            with self._writing:
                write_json(self._folder / FILE, [dataclasses.asdict(segment) for segment in segments])
        except OSError as error:
            self._told(
                f"warning: {self._folder / FILE} was not written ({error}): the cost of the run may miss this segment"
            )
