"""The parts that a run was made in, a part from one start of the command to its end: how long each held the hardware.

A run that was killed has paid for steps that it takes again, perhaps on another mesh and at another price: only what is
written while it runs knows of them. A start that fails before there is a folder of the run is none of its parts.

Knows a file and a clock. Knows no prices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

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
      rmb_per_usd: the rate at which that is paid in RMB.
      ended: whether it came to an end of its own; False for one that runs, or was killed.
    """

    begun: str
    seconds: float
    devices: str
    chips: int
    usd_per_chip_hour: float | None
    rmb_per_usd: float
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
        raise ValueError(f"{path} is damaged ({error}); move it away, and with it the time of earlier parts") from error


class Parts:
    """The earlier parts of a run, and the present one, which is written down as it goes on."""

    def __init__(self, folder: pathlib.Path | None, present: Part, began: float, told: Callable[[str], None]):
        """Without a folder (on processes that do not lead) nothing is read or written.

        Args:
          folder: of the run. A damaged file in it is put aside.
          present: this part; its seconds do not count.
          began: `time.monotonic()` at its begin, which may be before the run had a folder.
          told: what cannot be read or written; a run does not end for that.
        """
        self._folder, self._present, self._began, self._told = folder, present, began, told
        self._writing = threading.Lock()
        self._earlier: list[Part] = []
        if folder is not None:
            try:
                self._earlier = read_parts(folder)
            except ValueError:
                aside = folder / f"{FILE}.damaged"
                (folder / FILE).replace(aside)
                told(f"warning: {FILE} is damaged and is {aside.name} now: the time of earlier parts is not known")

    def now(self, *, ended: bool = False) -> list[Part]:
        """As they are now."""
        seconds = time.monotonic() - self._began
        return [*self._earlier, dataclasses.replace(self._present, seconds=seconds, ended=ended)]

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """While the block runs the file is never older than `EVERY` seconds."""
        if self._folder is None:
            yield
            return
        over = threading.Event()

        def keep() -> None:
            while not over.wait(EVERY):
                self.write(self.now())

        self.write(self.now())
        keeper = threading.Thread(target=keep, name="parts", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            over.set()
            keeper.join()
            self.write(self.now(ended=True))

    def write(self, parts: Sequence[Part]) -> None:
        """Puts them on the disk; says so where it cannot, and the next time may."""
        if self._folder is None:
            return
        temporary = self._folder / f".{FILE}.incomplete"
        try:
            with self._writing, temporary.open("w", encoding="utf-8") as file:
                json.dump([dataclasses.asdict(part) for part in parts], file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())  # rewritten so often, it would be the file that a loss of power leaves empty
                temporary.replace(self._folder / FILE)
        except OSError as error:
            self._told(
                f"warning: {self._folder / FILE} was not written ({error}): the cost of the run may miss this part"
            )


def begun_at(began: float, *, devices: str, chips: int, usd_per_chip_hour: float | None, rmb_per_usd: float) -> Part:
    """A part that began at a time of `time.monotonic()`."""
    begun = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=time.monotonic() - began)
    return Part(
        begun=begun.isoformat(timespec="seconds"),
        seconds=0.0,
        devices=devices,
        chips=chips,
        usd_per_chip_hour=usd_per_chip_hour,
        rmb_per_usd=rmb_per_usd,
    )
