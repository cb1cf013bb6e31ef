"""What a run prints: its settings, a live line with the speed of each step, and warnings, which are kept as incidents."""

from __future__ import annotations

import contextlib
import math
import pathlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from dream_jax import sharding
from dream_jax.model import parameter_count
from dream_jax.shapes import ParamTree
from dream_jax.train_step import TrainState
from dream_jax.trainer.incidents import Incidents, Kind, read_incidents
from dream_jax.trainer.settings import TrainSettings


class RunConsole:
    """Prints the settings, a live line on a terminal, and a line every so many steps elsewhere."""

    def __init__(self, settings: TrainSettings, origins: Mapping[str, str] | None = None):
        """For a run with these settings; `origins` says where a setting comes from, if more is known than "given"."""
        self._settings, self._origins = settings, origins or {}
        self._incidents: Incidents | None = None
        self._unkept: list[tuple[Kind, str, int | None]] = []
        self._warned: set[str] = set()
        self._keeping = threading.Lock()
        self.leads = jax.process_index() == 0
        self._console = Console(highlight=False, soft_wrap=True, quiet=not self.leads)
        self._progress: Progress | None = None

    def say(self, text: str, kind: Kind = "warning", step: int | None = None) -> None:
        """Prints a line, on one process only. A warning is kept among the run's incidents, as one of this kind."""
        self._console.print(text, markup=False)
        _, found, warning = text.partition("warning: ")
        if found:
            self._unkept.append((kind, warning, step))
            self._keep()

    def _keep(self) -> None:
        with self._keeping:  # the thread of `RunSegments` also warns
            while self._incidents is not None and self._unkept:
                kind, warning, step = self._unkept[0]
                # A run that is resumed warns of its settings again, and skips the same steps.
                if warning not in self._warned:
                    try:
                        self._incidents.add(kind, warning, step)
                    except OSError:
                        return  # a full disk, perhaps: the warning was printed, and is kept when it can be
                    self._warned.add(warning)
                self._unkept.pop(0)

    @contextlib.contextmanager
    def kept(self, folder: pathlib.Path, ends: Mapping[type[Exception], Kind]) -> Iterator[None]:
        """While the block runs, incidents are kept in this folder, which is the run's now.

        `ends` says which exceptions that end the block are incidents too, and of what kind.
        """
        self._incidents = Incidents(folder if self.leads else None)
        self._warned = {one["text"] for one in read_incidents(folder)}
        self._keep()
        try:
            yield
        except tuple(ends) as ended:
            self._incidents.add(ends[type(ended)], str(ended))
            raise
        finally:
            self._incidents = None

    def settings(self, mesh: Mesh) -> None:
        """Prints every setting and where it came from."""
        defaults = TrainSettings().values()
        for name, value in self._settings.values().items():
            origin = self._origins.get(name, "default" if value == defaults[name] else "given")
            self.say(f"{name:>16}: {value}  ({origin})")
        kind = mesh.devices.flat[0].device_kind
        self.say(
            f"{'devices':>16}: {mesh.devices.size} x {kind}, {jax.process_count()} process(es), jax {jax.__version__}"
        )
        for warning in self._settings.warnings():
            self.say(f"warning: {warning}")

    def start(
        self,
        state: TrainState,
        frozen: ParamTree,
        whole: int,
        done: int,
        data: Sequence[str],
        max_length: int,
    ) -> None:
        """Prints what is about to be trained, on what data, and how many bytes each device holds.

        `whole` is the number of the model's weights, and `data` describes the rows in lines.
        """
        for line in data:
            self.say(f"data: {line}")
        rate = self._settings.optimizer_config().learning_rate
        trained = parameter_count(state.params)
        share = f" beside {whole:,} frozen ones, {trained / whole:.2%}" if frozen else ""
        self.say(f"peak learning rate {rate:g}, {max_length} tokens a row, {trained:,} parameters{share}")
        trees = {"frozen base": frozen} if frozen else {}
        for name, tree in (trees | {"parameters": state.params, "optimizer state": state.opt_state}).items():
            sizes = sharding.bytes_per_device(tree)
            whole = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
            self.say(f"{name}: {whole:,} bytes, {max(sizes.values()):,} on each of {len(sizes)} device(s)")
        if done:
            self.say(f"resuming after step {done}")
            if self._incidents is not None:
                self._incidents.add("resumed", f"resuming after step {done}", done)
        self._done, self._begun, self._done_then = done, time.monotonic(), done

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Shows a live line while the block runs, if there is a terminal."""
        if not (self.leads and self._console.is_terminal):
            yield
            return
        columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
        with Progress(*columns, console=self._console) as self._progress:
            self._task = self._progress.add_task("compiling", total=self._settings.run.steps, completed=self._done)
            yield

    def evaluation(self, found: Mapping[str, Any]) -> None:
        """Prints what `scoring.evaluate` found, without the digests, which only serve comparisons."""
        for name, value in found.items():
            if isinstance(value, float):
                self.say(f"held-out {name.replace('_', ' ')}: {value:g}")
            elif name not in ("grid", "answered"):
                self.say(f"{name}: {value}")

    def step(self, number: int, row: Mapping[str, float], mfu: float | None) -> None:
        """Shows one step: in the live line, or as a line of its own every so often."""
        # The first step compiles; the rate is taken from the second on.
        if number == self._done_then + 1:
            self._begun, self._done = time.monotonic(), number
        steps = number - self._done
        left = (self._settings.run.steps - number) * (time.monotonic() - self._begun) / steps if steps else math.nan
        last = number in (self._done_then + 1, self._settings.run.steps)
        if self._progress is None and not last and number % self._settings.logs.log_every:
            return
        text = (
            f"step {number}/{self._settings.run.steps}  loss {row['loss']:.4f}  masked acc {row['masked_accuracy']:.3f}  "
            f"lr {row['learning_rate']:.2e}  grad {row['grad_norm']:.2f}  {row['tokens_per_second']:,.0f} tok/s  "
            f"{'' if mfu is None else f'MFU {mfu:.1%}  '}ETA {'-' if math.isnan(left) else clock(left)}"
        )
        if self._progress is None:
            self.say(text)
            sys.stdout.flush()
        else:
            self._progress.update(self._task, completed=number, description=text)


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are some: 0:05, 12:30, 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
