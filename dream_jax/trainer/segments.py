"""The segments of a run, one from each start of the command to its end: how long each held the hardware, in `parts.json`.

A run that was killed has paid for steps that it takes again, perhaps on another mesh and at another price; only what is
written while it runs tells of them. A start that fails before the run has a folder is not a segment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from dream_jax.files import write_json

FILE = "parts.json"
EVERY = 10.0
"""Seconds between two writes: at most so much of a segment that is killed is not counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSegment:
    """One start of the command.

    Attributes:
      begun: when, in UTC (ISO 8601).
      seconds: how long it lasted, or had lasted when it was last written.
      devices: such as "8 x TPU v6 lite".
      chips: that were held.
      usd_per_chip_hour: None where no price is known.
      rmb_per_usd: the rate at which that is paid in RMB.
      ended: whether the command came to an end; False while it runs, and after it was killed.
    """

    begun: str
    seconds: float
    devices: str
    chips: int
    usd_per_chip_hour: float | None
    rmb_per_usd: float
    ended: bool = False


def read_segments(folder: pathlib.Path) -> list[RunSegment]:
    """The segments of a run, oldest first; none where the folder has no file of them.

    Raises:
      ValueError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        return [RunSegment(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); move it away, and with it the time of earlier segments"
        ) from error


class RunSegments:
    """The earlier segments of a run, and the present one, which is written while it lasts."""

    def __init__(
        self, folder: pathlib.Path | None, present: RunSegment, began: float, told: Callable[[str], None]
    ) -> None:
        """Without a folder (on processes other than the first) nothing is read or written.

        Args:
          folder: of the run. A damaged file in it is put aside.
          present: this segment; its seconds do not count.
          began: `time.monotonic()` at its begin, which may be before the run had a folder.
          told: is called with a warning when the file cannot be read or written; the run does not end for that.
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
                told(f"warning: {FILE} is damaged and is {aside.name} now: the time of earlier segments is not known")

    def now(self, *, ended: bool = False) -> list[RunSegment]:
        """All segments, with the seconds of the present one until now."""
        seconds = time.monotonic() - self._began
        return [*self._earlier, dataclasses.replace(self._present, seconds=seconds, ended=ended)]

    @contextlib.contextmanager
    def kept(self) -> Iterator[RunSegments]:
        """While the block runs, the file is never older than `EVERY` seconds."""
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
        """Writes the file; warns where it cannot be written, since the next write may succeed."""
        if self._folder is None:
            return
        try:
            with self._writing:
                write_json(self._folder / FILE, [dataclasses.asdict(segment) for segment in segments])
        except OSError as error:
            self._told(
                f"warning: {self._folder / FILE} was not written ({error}): the cost of the run may miss this segment"
            )
