"""Measures this machine's accelerator in one command of a few minutes, each stage in a process of its own.

    python bench/accelerator.py [--out DIR] [--minutes 8] [--only STAGE ...] [--small]
    python bench/accelerator.py --planned

The stages (`stages/stage.py`) measure what the device can do, the training step under several settings, the sampler under
several modes, PyTorch beside both, the attention kernels against float32, and where the time of a step and of a pass goes.
They run in order of importance. Each has its own limit of time, and writes each result at once: the results of a stage that
fails or is ended are kept, and the other stages still run. A stage for which too little time is left is skipped, and the
reason is written. DIR receives accelerator.json (everything, rewritten after each stage), table.md, and the log of each
stage. The stages, and later commands with the same DIR, share a persistent cache of compiled programs in DIR/cache.

The table shows the aims of the project beside the measurements. `--small` uses shapes for a CPU; its figures mean nothing.
`--planned` needs no accelerator: it compiles the same programs for an H200 and writes the same table from their operations
and bytes into bench/results/accelerator_planned.json (it needs the extra `plan-gpu`, and takes many minutes).

The stages need jax, flax, optax, orbax, numpy, einops and jaxtyping; those of PyTorch need torch, transformers and
safetensors, and are skipped without them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import report
from stages import tables
from stages.results import NotAvailable, StageResult, read_json, wait_for_turn, write_json
from stages.stage import STAGES, Stage, small

# Exit status of a stage that cannot run here; the last line of its output is the reason.
NOT_AVAILABLE = 3
# Seconds that are kept for ending a process and for writing the table.
RESERVE_S = 5.0


class StageProcess:
    """The process of a stage. It imports its libraries at once, and begins to measure when `begin` is called."""

    def __init__(self, command: Sequence[str], log: pathlib.Path, environment: Mapping[str, str]):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._output: IO[bytes] = log.open("wb")
        # The process gets a session of its own, so that the processes which it starts can be ended with it.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )

    def begin(self) -> None:
        """Tells the process that the device is free."""
        self._close_input(b"\n")

    def finish(self, limit_s: float) -> tuple[str, str | None]:
        """Waits for the end of the process, and ends it after `limit_s` seconds.

        Returns:
          The status, "measured", "skipped", "failed" or "ended", and the reason if it is not "measured".
        """
        try:
            code = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.end()
            return "ended", f"it took more than its {limit_s:.0f} s"
        except BaseException:  # If the user interrupts the command, no process may keep running.
            self.end()
            raise
        self._output.close()
        if code == 0:
            return "measured", None
        words = self._last_line() or f"exit status {code}"
        return ("skipped" if code == NOT_AVAILABLE else "failed"), words

    def end(self) -> None:
        """Ends the process and those that it started."""
        self._close_input(b"")
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(2.0)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._output.close()

    def _close_input(self, last: bytes) -> None:
        assert self._process.stdin is not None
        # A process that has ended does not read; `finish` reports its exit status.
        with contextlib.suppress(BrokenPipeError):
            if last:
                self._process.stdin.write(last)
            self._process.stdin.close()

    def _last_line(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:400] if lines else ""


def run_stages(
    stages: Sequence[Stage],
    out: pathlib.Path,
    deadline: float,
    start: Callable[[Stage], StageProcess],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Runs the stages one after the other, and rewrites accelerator.json in `out` after each of them.

    The process of the next stage imports its libraries while the current one measures.

    Args:
      stages: the stages in the order in which they run.
      out: the folder of the results.
      deadline: the value of `time.monotonic()` at which everything has to be finished.
      start: starts the process of a stage.
      about: the other entries of accelerator.json: date, commit, hardware and whether the shapes are small.

    Returns:
      The content of accelerator.json.
    """
    begun = time.monotonic()
    done: dict[str, Any] = {}
    found = {**about, "stages": done}
    waiting: dict[str, StageProcess] = {}
    try:
        for number, stage in enumerate(stages):
            reason: str | None
            left = deadline - time.monotonic() - RESERVE_S
            if left < stage.needs_s:
                reason = f"{max(left, 0.0):.0f} s were left, and it needs {stage.needs_s:.0f} s"
                done[stage.name] = {"status": "skipped", "reason": reason}
                if stage.name in waiting:
                    waiting.pop(stage.name).end()
            else:
                process = waiting.pop(stage.name) if stage.name in waiting else start(stage)
                if number + 1 < len(stages):
                    waiting[stages[number + 1].name] = start(stages[number + 1])
                at = time.monotonic()
                process.begin()
                status, reason = process.finish(min(stage.limit_s, left))
                values = read_json(result_path(out, stage.name))
                if reason is not None and values.get("doing"):
                    reason += f" (it was at: {values['doing']})"
                done[stage.name] = {"status": status, "seconds": round(time.monotonic() - at, 1), "values": values}
                if reason is not None:
                    done[stage.name]["reason"] = reason
            entry = done[stage.name]
            print(
                f"{time.monotonic() - begun:6.1f} s  {stage.name}: {entry['status']}"
                + (f", {entry['seconds']:.1f} s" if "seconds" in entry else "")
                + (f": {entry['reason']}" if "reason" in entry else ""),
                flush=True,
            )
            found["seconds"] = round(time.monotonic() - begun, 1)
            write_json(out / "accelerator.json", found)
    finally:
        for process in waiting.values():
            process.end()
    return found


def result_path(out: pathlib.Path, stage: str) -> pathlib.Path:
    """Returns the result file of a stage."""
    return out / "stages" / f"{stage}.json"


def environment(cache: pathlib.Path) -> dict[str, str]:
    """Returns the environment variables of the stages' processes; variables that the user has set keep their values."""
    paths = [str(report.REPOSITORY), os.environ.get("PYTHONPATH", "")]
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def run_one(stage: Stage, out: pathlib.Path) -> int:
    """Runs a stage in this process and returns its exit status."""
    try:
        module = importlib.import_module(f"stages.{stage.module}")
        importlib.import_module("dream_jax.device_memory").take_memory()
        flags = stage.options.get("flags")
        if flags is not None:
            os.environ["XLA_FLAGS"] = importlib.import_module("dream_jax.xla_flags").in_environment(flags, os.environ)
        wait_for_turn()
        module.run(stage.options, StageResult(result_path(out, stage.name)))
    except NotAvailable as reason:
        print(reason)
        return NOT_AVAILABLE
    return 0


def chosen(only: Sequence[str] | None, is_small: bool) -> tuple[Stage, ...]:
    """Returns the stages with these names, in the order of the table; all by default."""
    stages = [stage for stage in STAGES if only is None or stage.name in only]
    return tuple(map(small, stages)) if is_small else tuple(stages)


def main() -> int:
    """Reads the command line, and runs the stages, one stage or the plan; returns the exit status."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--out", type=pathlib.Path, default=report.REPOSITORY / "runs" / "accelerator", metavar="DIR")
    parser.add_argument("--cache", type=pathlib.Path, metavar="DIR", help="compiled programs; by default OUT/cache")
    parser.add_argument("--minutes", type=float, default=8.0, help="all stages end within this many minutes")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help=f"run only these: {', '.join(names)}")
    parser.add_argument("--small", action="store_true", help="shapes for a CPU")
    parser.add_argument("--planned", action="store_true", help="compile for an H200 and measure nothing")
    parser.add_argument("--stage", choices=names, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not 0.1 <= given.minutes <= 120:
        parser.error(f"--minutes {given.minutes} is outside [0.1, 120]")
    if given.stage:
        return run_one(chosen([given.stage], given.small)[0], given.out)
    if given.planned:
        return importlib.import_module("stages.planned").main(given.only)
    out = given.out.absolute()
    cache = (given.cache or out / "cache").absolute()
    for stage in chosen(given.only, given.small):
        result_path(out, stage.name).unlink(missing_ok=True)

    def start(stage: Stage) -> StageProcess:
        words = [sys.executable, __file__, "--stage", stage.name, "--out", str(out)]
        log = out / "stages" / f"{stage.name}.log"
        return StageProcess([*words, *(["--small"] if given.small else [])], log, environment(cache))

    about = {"date": report.now(), "commit": report.commit(), "hardware": report.hardware(), "small": given.small}
    found = run_stages(chosen(given.only, given.small), out, begun + 60 * given.minutes, start, about)
    text = tables.markdown(found)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwrote accelerator.json, table.md and the logs of the stages to {out}")
    return 0 if any(entry["status"] == "measured" for entry in found["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
