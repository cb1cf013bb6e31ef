"""Prints the settings, progress, result and errors of the conversions on the terminal."""

import contextlib
import dataclasses
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from dream_jax import hub
from dream_jax.pretrained import Conversion
from dream_jax.tokenizer import check_texts

PLAIN_SECONDS = 5.0  # between two lines of progress when the output is not a terminal


class Meter:
    """Shows how many bytes are written: as a bar on a terminal, otherwise as a line every `PLAIN_SECONDS`."""

    def __init__(self, console: Console):
        self._console = console
        self._bar = Progress(
            BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), console=console
        )
        self._done = self._total = 0
        self._begun = self._said = time.monotonic()

    def started(self, conversion: Conversion) -> None:
        """Prints what was checked, and starts the bar."""
        self._console.print(
            f"checked {conversion.source}: {conversion.tensors} tensors, {conversion.parameters:,} parameters"
        )
        if conversion.note is not None:
            self._console.print(conversion.note, markup=False)
        self._total = conversion.nbytes
        if self._console.is_terminal:
            self._task = self._bar.add_task("", total=self._total)
            self._bar.start()

    def progress(self, size: int) -> None:
        """Adds a number of written bytes."""
        self._done += size
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self._done)
        elif (now := time.monotonic()) - self._said >= PLAIN_SECONDS or self._done == self._total:
            self._said = now
            rate = self._done / max(now - self._begun, 1e-9)
            self._console.print(
                f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s, "
                f"{(self._total - self._done) / max(rate, 1.0):.0f} s left"
            )

    def stop(self) -> None:
        """Ends the bar on a terminal."""
        if self._console.is_terminal:
            self._bar.stop()


def peak_bytes() -> int:
    """Returns the peak of the resident memory of this process, in bytes."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # getrusage would also count the program that started this process
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def errors_end_the_command() -> Iterator[None]:
    """Ends the process with exit status 1 and one line on stderr after an error that users can correct.

    These are ValueError, OSError, and ModuleNotFoundError for a package that is not installed.
    """
    try:
        check_texts(sys.argv[1:])
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def run(settings: Any, convert: Callable[..., Conversion], **options: Any) -> None:
    """Runs a conversion, and prints the settings, the progress and the result.

    Args:
      settings: a dataclass with the fields `src`, `revision` and `dst`; all its fields are printed.
      convert: `convert_from_hf` or `convert_to_hf`.
      options: keyword arguments for `convert`.

    After an error, the process ends as `errors_end_the_command` says.
    """
    # The CPU is enough, because nothing is computed; the memory of an accelerator may be too small.
    jax.config.update("jax_platforms", "cpu")
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    begun = time.monotonic()
    meter = Meter(console)
    with errors_end_the_command():
        for field in dataclasses.fields(settings):
            console.print(f"{field.name}: {getattr(settings, field.name)}", markup=False)
        try:
            source = hub.pinned(settings.src, settings.revision)
            made = convert(source, settings.dst, started=meter.started, progress=meter.progress, **options)
        finally:
            meter.stop()
    seconds = time.monotonic() - begun
    console.print(
        f"made {made.target}: {made.tensors} tensors, {made.parameters:,} parameters, {made.nbytes:,} bytes "
        f"of {made.dtype} in {seconds:.1f} s ({made.nbytes / seconds / 1e9:.2f} GB/s), "
        f"peak memory {peak_bytes() / 2**30:.2f} GiB",
        markup=False,
    )
