"""One short run of the nano model, which is trained once per test session; a test that changes it works on a copy."""

import fcntl
import json
import os
import pathlib

import pytest

from dream_jax.reports.record import read_record
from dream_jax.reports.run_report import write_report
from dream_jax.trainer import TrainSettings, train

# The report mentions the price, and the warning about the weight.
OPTIONS = {"steps": 12, "batch_size": 8, "save_every": 5, "eval_rows": 4, "samples": 2, "sample_tokens": 20}
OPTIONS |= {"price_per_chip_hour": 36.0, "weight": "inverse-time"}
FLAGS = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def settings(out: pathlib.Path, **changes: object) -> TrainSettings:
    """Returns the settings of the shared run, with another folder and with changes."""
    return TrainSettings.flat(**(OPTIONS | {"out": out} | changes))


def make_once(session_folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the finished run, which the first worker to call this trains while the others wait."""
    out = session_folder / "nano-run"
    with open(session_folder / "nano-run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "report.md").exists():
            summary = train(settings(out))
            assert summary == json.loads((out / "summary.json").read_text())
            write_report(read_record(out))
    return out


def session_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Returns a temporary folder that all workers of this session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
