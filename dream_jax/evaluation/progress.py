"""Shows progress and remaining time of an evaluation: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dream_jax.trainer.console import clock

SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int, Sequence[dict[str, Any]]], None]
"""Function that is called with the number of new rows and with all rows so far."""


@contextlib.contextmanager
def watch(console: Console, *, total: int, done: int) -> Iterator[Advance]:
    """Shows the progress from `done` to `total` rows while the block runs; the block calls the yielded function."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("rows", total=total, completed=done)
            yield lambda count, rows: bar.update(task, advance=count, description=_score(rows) or "rows")
        return
    begun = last = time.monotonic()
    finished = done

    def advance(count: int, rows: Sequence[dict[str, Any]]) -> None:
        nonlocal finished, last
        finished += count
        now = time.monotonic()
        if finished < total and now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        left = (now - begun) / (finished - done) * (total - finished)
        score = _score(rows)
        console.print(f"{finished}/{total} rows  {score + '  ' if score else ''}ETA {clock(left)}", markup=False)

    yield advance


def _score(rows: Sequence[dict[str, Any]]) -> str:
    judged = [row["correct"] for row in rows if "correct" in row]
    return f"accuracy {sum(judged) / len(judged):.3f}" if judged else ""
