"""The parts that a run was made in, a part from one start of the command to its end: how long each held the hardware.

A run that was killed has paid for steps that it takes again, perhaps on another mesh and at another price: only what is
written while it runs knows of them.

Knows a file and a clock. Knows no prices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

FILE = "parts.json"
EVERY = 10.0
"""Seconds between two looks at the clock: at most so much of a part that is killed is not counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One of them.

    Attributes:
      begun: when, in UTC (ISO 8601).
      seconds: that it lasted, or had lasted when it was last written down.
      devices: as in "8 x TPU v6 lite".
      chips: that were held.
      usd_per_chip_hour: None where no price is known.
      ended: whether it came to an end of its own; False for one that runs, or was killed.
    """

    begun: str
    seconds: float
    devices: str
    chips: int
    usd_per_chip_hour: float | None
    ended: bool = False


def read_parts(folder: pathlib.Path) -> list[Part]:
    """The parts of a run, oldest first; none where the folder says nothing of them.

    Raises:
      ValueError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        return [Part(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); move it away to go on without the cost of earlier parts"
        ) from error


class Parts:
    """The earlier parts of a run, and the present one, which is written down as it goes on."""

    def __init__(self, folder: pathlib.Path | None, present: Part, began: float):
        """Without a folder (on processes that do not lead) nothing is read or written.

        Args:
          folder: of the run.
          present: this part; its seconds do not count.
          began: `time.monotonic()` at its begin, which may be before the run had a folder.

        Raises:
          ValueError: as `read_parts`.
        """
        self._folder, self._present, self._began = folder, present, began
        self._earlier = [] if folder is None else read_parts(folder)

    def all(self, *, ended: bool = False) -> list[Part]:
        """As they are now."""
        seconds = time.monotonic() - self._began
        return [*self._earlier, dataclasses.replace(self._present, seconds=seconds, ended=ended)]

    @property
    def seconds(self) -> float:
        """Of all of them until now."""
        return sum(part.seconds for part in self.all())

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """While the block runs the file is never older than `EVERY` seconds."""
        if self._folder is None:
            yield
            return
        over = threading.Event()

        def keep() -> None:
            while not over.wait(EVERY):
                self._write(ended=False)

        self._write(ended=False)
        keeper = threading.Thread(target=keep, name="parts", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            over.set()
            keeper.join()
            self._write(ended=True)

    def _write(self, *, ended: bool) -> None:
        assert self._folder is not None
        content: list[dict[str, Any]] = [dataclasses.asdict(part) for part in self.all(ended=ended)]
        # Not `folder.write_json`: that module knows the training, this one a clock.
        temporary = self._folder / f".{FILE}.incomplete"
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self._folder / FILE)


def begun_now(*, devices: str, chips: int, usd_per_chip_hour: float | None) -> Part:
    """A part that begins now."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Part(begun=now, seconds=0.0, devices=devices, chips=chips, usd_per_chip_hour=usd_per_chip_hour)
