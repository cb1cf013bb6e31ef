"""Collects the hardware, versions and date of a benchmark, and writes results.

Only the standard library is imported at the top, because some benchmarks run on an image that lacks psutil and msgspec.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from typing import Any

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results"


def _first_value(path: str, key: str) -> str | None:
    """Returns the value of the first `key: value` line of a /proc file; None if there is no such file or line."""
    file = pathlib.Path(path)
    if not file.exists():
        return None
    values = (line.partition(":")[2].strip() for line in file.read_text().splitlines() if line.startswith(key))
    return next(values, None)


def num_cores() -> int:
    """Returns the number of cores that this process may use, which can be less than the machine has."""
    return len(os.sched_getaffinity(0))


def hardware() -> dict[str, Any]:
    """Returns the CPU model, the number of usable cores, the memory in GB (1e9 bytes) and the operating system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _first_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": num_cores(),
        "memory_gb": round(memory / 1e9, 1),
        "system": platform.platform(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of Python and the packages, and the git commit as `commit` returns it."""
    found = {"python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in packages}
    return found | {"commit": commit()}


def commit() -> str:
    """Returns the git commit, with "+" if tracked files were changed; an empty text if it is not known."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    if shutil.which("git") is None:
        return ""
    # The output is empty outside a git checkout, or before the first commit.
    found = git("rev-parse", "--verify", "--quiet", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return found + ("+" if found and changed else "")


class OtherWork:
    """Measures the share of the cores that processes other than this one and its children have used since creation."""

    def __init__(self) -> None:
        self._machine, self._own, self._wall = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        import psutil

        times = psutil.cpu_times()
        # Time stolen by other virtual machines counts, because it disturbs a measurement as much. `user` includes `guest`.
        busy = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
        ended = os.times()
        own = time.process_time() + ended.children_user + ended.children_system
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                running = child.cpu_times()
                own += running.user + running.system
        return busy, own, time.perf_counter()

    def share(self) -> float:
        """Returns a number from 0 (no other process computed) to 1 (other processes used every core)."""
        machine, own, wall = self._read()
        available = (wall - self._wall) * (os.cpu_count() or 1)
        return max(0.0, (machine - self._machine) - (own - self._own)) / available


def now() -> str:
    """Returns the current time in UTC as ISO 8601 text, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def summarize(seconds: Sequence[float]) -> dict[str, Any]:
    """Returns the median, the minimum and all of some times, in seconds."""
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "all_s": list(seconds)}


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Writes a result as JSON, and makes its folder if necessary. Raises FileExistsError if another file is there."""
    from dream_jax import files, paths

    paths.check_replaceable(path, "a file of results", _is_result)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, value)


def _is_result(content: bytes) -> bool:
    """Returns whether a file is a result with its date and hardware, or an object of results by name."""
    from dream_jax import paths

    if paths.is_json_object("date", "hardware")(content):
        return True
    return paths.is_json_object()(content) and all(isinstance(one, dict) for one in json.loads(content).values())


def add_json(path: pathlib.Path, name: str, value: dict[str, Any]) -> None:
    """Adds a result to a JSON file of results by name, or replaces the one of the same name."""
    from dream_jax import files

    write_json(path, (files.read_json(path) if path.exists() else {}) | {name: value})
