"""One short run of the nano model, trained once for the whole test session: tests read it, and copy it where they write."""

import fcntl
import json
import os
import pathlib

import pytest

from dream_jax.reports.record import read_record
from dream_jax.reports.run_report import write_report
from dream_jax.trainer import TrainSettings, train

# A price, and a weight that is warned of: the report speaks of both.
OPTIONS = {"steps": 12, "batch_size": 8, "save_every": 5, "eval_rows": 4, "samples": 2, "sample_tokens": 20}
OPTIONS |= {"price_per_chip_hour": 36.0, "weight": "inverse-time"}
FLAGS = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def settings(out: pathlib.Path, **changes: object) -> TrainSettings:
    """Those of the shared run, with changes."""
    return TrainSettings.flat(**(OPTIONS | {"out": out} | changes))


def make_once(session_folder: pathlib.Path) -> pathlib.Path:
    """The folder of the finished run; whichever worker comes first trains it, the others wait."""
    out = session_folder / "nano-run"
    with open(session_folder / "nano-run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "report.md").exists():
            summary = train(settings(out))
            assert summary == json.loads((out / "summary.json").read_text())
            write_report(read_record(out))
    return out


def session_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder that all workers of this session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
