"""Runs that are killed, stopped, moved to another mesh or left by one of their processes go on as if nothing had been."""

import contextlib
import csv
import os
import random
import re
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest
from commands import start_script

from dream_jax import distributed, sharding
from dream_jax.checkpoint import RunCheckpoints
from dream_jax.trainer import TrainSettings, train
from dream_jax.trainer.build import abstract_step

STEPS = 20
RUN = {"mesh": "2x1", "steps": STEPS, "batch_size": 8, "save_every": 1, "keep": STEPS, "log_every": 1}
RUN |= {"eval_rows": 4, "eval_every": 5}
FLAGS = [word for name, value in RUN.items() for word in (f"--{name.replace('_', '-')}", str(value))]
LINE = re.compile(r"step (\d+)/")


def table(path):
    """Rows as text, without the one column that is a matter of speed: floats are written so that no bit is lost."""
    with path.open(newline="") as file:
        return [
            {name: text for name, text in row.items() if name != "tokens_per_second"} for row in csv.DictReader(file)
        ]


def final_state(out):
    """All that the run carries from step to step, from its last checkpoint."""
    settings = TrainSettings.flat(out=out, **RUN)
    shapes = abstract_step(settings, sharding.make_mesh(RUN["mesh"]), 40).state
    with RunCheckpoints(out / "checkpoints", keep=STEPS) as checkpoints:
        assert checkpoints.latest_step() == STEPS
        state, meta = checkpoints.restore(shapes)
    return jax.tree.map(np.asarray, state), meta["data"]


def assert_same_run(out, wanted):
    assert table(out / "metrics.csv") == table(wanted / "metrics.csv")
    assert table(out / "eval.csv") == table(wanted / "eval.csv")
    (state, data), (wanted_state, wanted_data) = final_state(out), final_state(wanted)
    jax.tree.map(np.testing.assert_array_equal, state, wanted_state)
    assert data == wanted_data


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(TrainSettings.flat(out=out, **RUN))
    rows = table(out / "metrics.csv")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, STEPS + 1)]
    assert [row["step"] for row in table(out / "eval.csv")] == ["5", "10", "15", "20"]
    return out


@contextlib.contextmanager
def started(out, *more, **variables):
    with start_script("train.py", *FLAGS, "--out", out, *more, env=os.environ | variables) as process:
        try:
            yield process
        finally:
            process.kill()


def read_steps(process, number):
    """Reads what a process says until it has taken so many steps."""
    said = ""
    while number and (line := process.stdout.readline()):
        said += line
        number -= bool(LINE.match(line))
    return said


@pytest.mark.optimised
def test_a_kill_changes_no_bit(uninterrupted, tmp_path):
    """While it takes a step or writes a checkpoint; this process then trains on from what it finds."""
    out = tmp_path / "killed"
    with started(out) as process:
        read_steps(process, 3)
        process.kill()
    assert process.wait() == -signal.SIGKILL
    wanted, found = (table(run / "metrics.csv") for run in (uninterrupted, out))
    assert 3 <= len(found) < STEPS and found[:-1] == wanted[: len(found) - 1]
    train(TrainSettings.flat(out=out, **RUN))
    assert_same_run(out, uninterrupted)


@pytest.mark.slow
def test_kills_change_no_bit(uninterrupted, tmp_path):
    """At moments nobody has chosen: before the first step, between steps, while a checkpoint is written."""
    out, draw = tmp_path / "killed", random.Random(5)
    wanted = table(uninterrupted / "metrics.csv")
    for attempt in range(3):
        with started(out) as process:
            steps = draw.randint(1, 3) if attempt else 0
            read_steps(process, steps)
            time.sleep(draw.uniform(0, 0.3) if attempt else draw.uniform(1, 6))
            process.kill()
        assert process.wait() == -signal.SIGKILL
        if steps:
            found = table(out / "metrics.csv")
            # What it had written by then was right, but for a row that it may have been writing.
            assert found[:-1] == wanted[: len(found) - 1] and len(found) >= steps
    with started(out) as process:
        said = read_steps(process, 2)
        assert "resuming after step" in said
        process.terminate()
        said += process.stdout.read()
    assert process.returncode == 130 and "the same command resumes from there" in said
    with RunCheckpoints(out / "checkpoints", keep=STEPS) as checkpoints:
        assert f"saved after step {checkpoints.latest_step()} of" in said
    with started(out) as process:
        said = process.stdout.read()
    assert process.returncode == 0, said
    assert_same_run(out, uninterrupted)


def cut(run, out, last):
    """A copy of a finished run as it was after some step."""
    shutil.copytree(run, out)
    (out / "summary.json").unlink()
    for path in (out / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > last:
            shutil.rmtree(path)


@pytest.mark.slow
def test_going_on_with_another_mesh(uninterrupted, tmp_path):
    cut(uninterrupted, tmp_path / "moved", 12)
    train(TrainSettings.flat(out=tmp_path / "moved", **RUN | {"mesh": "2x4"}))
    found, wanted = table(tmp_path / "moved" / "metrics.csv"), table(uninterrupted / "metrics.csv")
    assert found[:12] == wanted[:12] and found[12:] != wanted[12:]
    losses = [[float(row["loss"]) for row in rows] for rows in (found, wanted)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    scores = [[float(row["nll"]) for row in table(run / "eval.csv")] for run in (tmp_path / "moved", uninterrupted)]
    np.testing.assert_allclose(*scores, rtol=1e-5)


def test_a_damaged_newest_checkpoint_costs_its_steps_only(uninterrupted, tmp_path, capsys):
    out = tmp_path / "damaged"
    cut(uninterrupted, out, 20)
    for step, harm in ((20, lambda content: content[:-1]), (19, lambda content: bytes([content[0] ^ 1]) + content[1:])):
        files = (path for path in (out / "checkpoints" / str(step)).rglob("*") if path.is_file())
        path = max(files, key=lambda path: path.stat().st_size)
        path.write_bytes(harm(path.read_bytes()))
    train(TrainSettings.flat(out=out, **RUN))
    said = capsys.readouterr().out
    assert "warning: the checkpoint of step 20 is damaged" in said and "resuming after step 18" in said
    assert_same_run(out, uninterrupted)
    assert (out / "checkpoints" / "19.damaged").is_dir()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def pair(out, *of_the_second):
    port = free_port()
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                started(
                    out,
                    *("--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", str(number)),
                    *(of_the_second if number else ()),
                )
            )
            for number in range(2)
        ]


def finish(running, limit=300):
    deadline = time.monotonic() + limit
    said = [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    return said


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "two"
    with pair(out) as running:
        finish(running)
    return out


def test_two_processes_give_the_losses_of_one(two_processes, uninterrupted):
    for name, column in (("metrics.csv", "loss"), ("eval.csv", "nll"), ("eval.csv", "nll_se")):
        values = [[float(row[column]) for row in table(run / name)] for run in (two_processes, uninterrupted)]
        np.testing.assert_allclose(*values, rtol=1e-5 if column == "loss" else 1e-4)


@pytest.mark.slow
def test_a_dead_process_ends_the_other_and_the_run_goes_on(two_processes, tmp_path):
    """The one that coordinates, then the other; whoever is left says what to do, within a minute.

    The run is taken up by two tasks of a SLURM job step, as srun would start them, without flags about processes.
    """
    out = tmp_path / "left"
    for victim in (0, 1):
        with pair(out) as running:
            said = read_steps(running[0], 4)
            assert LINE.search(said), said
            running[victim].kill()
            begun = time.monotonic()
            rest = running[1 - victim].communicate(timeout=60)[0]
            assert time.monotonic() - begun < 60
        assert running[1 - victim].returncode != 0
        last = rest.strip().splitlines()[-1]
        assert last.startswith(f"error: process {1 - victim} of 0..1 ended before the run did."), rest
        assert "start the same command on every host again" in last
    variables = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    variables |= {"JAX_COORDINATOR_PORT": str(free_port())}
    with contextlib.ExitStack() as stack:
        tasks = [variables | {"SLURM_PROCID": task, "SLURM_LOCALID": task} for task in ("0", "1")]
        said = finish([stack.enter_context(started(out, **task)) for task in tasks])
    assert "2 x cpu, 2 process(es)" in said[0] and f"step {STEPS}/{STEPS}" in said[0]
    assert "resuming after step" in said[0] and "error:" not in "".join(said)
    assert "step" not in said[1]  # one of them prints
    assert_same_run(out, two_processes)


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_other(tmp_path):
    """A file that only one host lacks: it says so and ends, and does not wait for the other, which waits for it."""
    with pair(tmp_path / "out", "--data", "gone.jsonl") as running:
        begun = time.monotonic()
        said = running[1].communicate(timeout=120)[0]
        assert "error: no file gone.jsonl" in said and running[1].returncode == 1
        ended = time.monotonic()
        rest = running[0].communicate(timeout=60)[0]
        assert time.monotonic() - ended < 60 and ended - begun < 120
    assert running[0].returncode != 0
    assert rest.strip().splitlines()[-1].startswith("error: process 0 of 0..1 ended before the run did.")


def test_which_cluster(tmp_path, monkeypatch):
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    slurm["SLURM_LOCALID"] = "0"

    def find(wanted, environment, devices=tmp_path / "none"):
        return distributed.find_cluster(wanted, environment, devices)

    assert find("auto", {}) is None
    assert find("auto", slurm) == find("slurm", slurm) == "slurm"
    assert find("off", slurm) is None
    assert find("auto", slurm | {"SLURM_NTASKS": "1"}) is None  # jax would take all GPUs but one away
    assert find("auto", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None
    with pytest.raises(ValueError, match="SLURM_PROCID is not set: start the command with srun"):
        find("slurm", {name: value for name, value in slurm.items() if name != "SLURM_PROCID"})
    with pytest.raises(ValueError, match="no TPU chips here"):
        find("tpu", {})
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()  # there on any Linux
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert find("auto", {}, tmp_path) is None
    (tmp_path / "vfio" / "0").touch()
    assert find("auto", {}, tmp_path) == find("tpu", {}, tmp_path) == "tpu"
    assert find("auto", {"JAX_PLATFORMS": "cpu"}, tmp_path) is None
    (tmp_path / "accel0").touch()
    shutil.rmtree(tmp_path / "vfio")
    assert find("auto", {}, tmp_path) == "tpu"
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    assert find("auto", {}, tmp_path) is None
