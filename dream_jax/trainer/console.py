"""The output of a run on the terminal: settings, a line per step, and warnings, which are also saved as incidents."""

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
    """Prints settings, warnings and steps: a live line on a terminal, otherwise a line every `log_every` steps.

    Attributes:
      leads: whether this is process 0, the only one that prints.
    """

    def __init__(self, settings: TrainSettings, origins: Mapping[str, str] | None = None):
        """Makes the console of a run.

        `origins` maps names of settings to texts that say where their values come from, such as "recipe"; it may lack some.
        """
        self._settings, self._origins = settings, origins or {}
        self._incidents: Incidents | None = None
        self._unkept: list[tuple[Kind, str, int | None]] = []
        self._warned: set[str] = set()
        self._keeping = threading.Lock()
        self.leads = jax.process_index() == 0
        self._console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=not self.leads)
        self._progress: Progress | None = None

    def say(self, text: str, kind: Kind = "warning", step: int | None = None) -> None:
        """Prints a line. If it contains "warning: ", the text after that is saved as an incident of this kind and step.

        `step` is the number of the step, from 1, or None if the warning does not belong to a step.
        """
        self._console.print(text, markup=False)
        _, found, warning = text.partition("warning: ")
        if found:
            self._unkept.append((kind, warning, step))
            self._keep()

    def _keep(self) -> None:
        """Saves the warnings that are not saved yet, if the run has its folder already."""
        with self._keeping:  # the lock is needed because the thread of `RunSegments` warns too
            while self._incidents is not None and self._unkept:
                kind, warning, step = self._unkept[0]
                # A resumed run repeats the warnings about its settings and about steps that it takes again.
                if warning not in self._warned:
                    try:
                        self._incidents.add(kind, warning, step)
                    except OSError:
                        return  # perhaps a full disk: the warning was printed, and the next call tries again
                    self._warned.add(warning)
                self._unkept.pop(0)

    @contextlib.contextmanager
    def kept(self, folder: pathlib.Path, ends: Mapping[type[Exception], Kind]) -> Iterator[None]:
        """Saves incidents in this folder during the block; those from before the block are saved at its start.

        `ends` maps types of exceptions that may end the block to the kind of incident that is saved for them.
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
        """Prints every setting with the origin of its value, then the devices, then warnings about the settings."""
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
        """Prints the data, the number of trained parameters, and the bytes on each device; call it before `live`.

        `whole` is the number of parameters of the model without an adapter, `done` the number of steps that are already
        taken, `data` lines of text about the data, and `max_length` the length of the rows in tokens.
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
            nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
            self.say(f"{name}: {nbytes:,} bytes, {max(sizes.values()):,} on each of {len(sizes)} device(s)")
        if done:
            self.say(f"resuming after step {done}")
            if self._incidents is not None:
                self._incidents.add("resumed", f"resuming after step {done}", done)
        self._done, self._begun, self._done_then = done, time.monotonic(), done

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Shows a live line during the block, if the output is a terminal."""
        if not (self.leads and self._console.is_terminal):
            yield
            return
        columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
        with Progress(*columns, console=self._console) as self._progress:
            self._task = self._progress.add_task("compiling", total=self._settings.run.steps, completed=self._done)
            yield

    def evaluation(self, found: Mapping[str, Any]) -> None:
        """Prints the result of `scoring.evaluate`, without the digests, which are only needed for comparisons."""
        for name, value in found.items():
            if isinstance(value, float):
                self.say(f"held-out {name.replace('_', ' ')}: {value:g}")
            elif name not in ("grid", "answered"):
                self.say(f"{name}: {value}")

    def step(self, number: int, row: Mapping[str, float], shown: str, mfu: float | None) -> None:
        """Shows the metrics of one step in the live line, or every `log_every` steps as a line.

        `number` is the number of the step, from 1; `row` has its metrics by the column names of metrics.csv; `shown` is the
        text of those that the objective shows; `mfu` is in [0, 1], or None if the peak rate of the devices is not known.
        """
        # The first step includes compilation, so the remaining time is estimated from the second step on.
        if number == self._done_then + 1:
            self._begun, self._done = time.monotonic(), number
        steps = number - self._done
        left = (self._settings.run.steps - number) * (time.monotonic() - self._begun) / steps if steps else math.nan
        last = number in (self._done_then + 1, self._settings.run.steps)
        if self._progress is None and not last and number % self._settings.logs.log_every:
            return
        text = (
            f"step {number}/{self._settings.run.steps}  loss {row['loss']:.4f}  {shown}  "
            f"lr {row['learning_rate']:.2e}  grad {row['grad_norm']:.2f}  {row['tokens_per_second']:,.0f} tok/s  "
            f"{'' if mfu is None else f'MFU {mfu:.1%}  '}ETA {'-' if math.isnan(left) else clock(left)}"
        )
        if self._progress is None:
            self.say(text)
            sys.stdout.flush()
        else:
            self._progress.update(self._task, completed=number, description=text)


def clock(seconds: float) -> str:
    """Formats a duration as minutes and seconds, with hours only if there are any: 0:05, 12:30, 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
