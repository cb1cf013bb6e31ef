"""A disk that is full: before a run, while it writes, and what the same command does afterwards."""

import asyncio
import errno
import gc
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest
import shared_run
from commands import run_script, start_script

from dream_jax import files
from dream_jax.checkpoint import RunCheckpoints
from dream_jax.checkpoint.weights import without_noise
from dream_jax.trainer.folder import claimed_folder, saved_steps
from dream_jax.trainer.space import check_space

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("free", "resumes", "message"),
    [
        (10**9, False, "a checkpoint takes about 0.001 GB, up to 4 at a time, and the result 0.0005 GB; 1 GB are free"),
        (4_400_000, False, "warning: the disk may become full"),
        (4_500_000, False, "a checkpoint takes"),
        (2_400_000, True, "warning: the disk may become full"),
        (2_500_000, True, "a checkpoint takes"),  # two of the four are there already
        (999_999, False, None),
        (999_999, True, None),
    ],
)
def test_space_is_estimated_before_the_first_step(
    free: int, resumes: bool, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**10, 0, free))
    settings = shared_run.settings(tmp_path / "new" / "run", steps=12, save_every=3, keep=3)
    if resumes:
        for step in ("3", "6"):
            (settings.run.out / "checkpoints" / step).mkdir(parents=True)
    try:
        line = check_space(settings, 1_000_000, 500_000, evaluates=False, resumes=resumes)
    except OSError as error:
        assert message is None and error.errno == errno.ENOSPC
        assert "not even one checkpoint fits on the disk" in str(error) and str(settings.run.out) in str(error)
        return
    assert message is not None and line.startswith(message)


def test_what_overwrite_removes_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**10, 0, 500_000))
    settings = shared_run.settings(tmp_path, steps=1, save_every=1)
    (tmp_path / "old").write_bytes(b"x" * 600_000)
    assert check_space(settings, 1_000_000, 50_000, evaluates=False, resumes=False).startswith("a checkpoint takes")


def test_a_run_that_cannot_save_one_checkpoint_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**10, 0, 1_000_000))
    done = run_script("train.py", "--out", tmp_path / "run", *shared_run.FLAGS)
    assert done.returncode == 1 and "not even one checkpoint fits on the disk" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        ValueError("RESOURCE_EXHAUSTED: Error writing [...] No space left on device"),
    ],
    ids=["ENOSPC", "EDQUOT", "tensorstore"],
)
def test_full_disk_during_a_checkpoint_names_its_size(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    state = {"w": jnp.ones((8, 8))}
    with pytest.raises(OSError, match="the disk is full: a checkpoint takes about 256 bytes") as raised:  # noqa: SIM117
        with RunCheckpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state, {})
            checkpoints.wait()

            def full(*_: object, **__: object) -> None:
                raise error

            monkeypatch.setattr(files, "write_checksums", full)
            checkpoints.save(2, state, {})
            checkpoints.wait()
    assert raised.value.errno == errno.ENOSPC and str(tmp_path) in str(raised.value)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]  # the unfinished checkpoint is gone
    assert "Traceback" not in capfd.readouterr().err
    with RunCheckpoints(tmp_path) as again:
        assert again.steps() == [1]
        again.save(2, state, {})


def test_an_error_of_another_kind_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "not yours")

    monkeypatch.setattr(files, "write_checksums", wrong)
    with pytest.raises(PermissionError, match="not yours"), RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(2)}, {})
        checkpoints.wait()


def test_late_errors_of_writes_are_hidden_only_when_the_disk_is_full(caplog: pytest.LogCaptureFixture) -> None:
    async def write(error: Exception) -> None:
        raise error

    async def give_up(error: Exception) -> None:
        # Nobody awaits this task, as when Orbax gives up after another write's error.
        task = asyncio.ensure_future(write(error))
        await asyncio.sleep(0)
        del task

    with without_noise():
        pass
    for error in (
        ValueError("RESOURCE_EXHAUSTED: Error writing [...] No space left on device"),
        ValueError("Error writing [...] Permission denied"),
    ):
        asyncio.run(give_up(error))
    gc.collect()
    reported = [str(record.exc_info[1]) for record in caplog.records if record.name == "asyncio" and record.exc_info]
    assert reported == ["Error writing [...] Permission denied"]


@pytest.mark.parametrize("steps", [(), (5, 10)])
def test_error_in_a_run_says_what_the_same_command_does(steps: tuple[int, ...], tmp_path: Path) -> None:
    then = "resumes after step 10" if steps else "starts from the beginning"
    settings = shared_run.settings(tmp_path / "run")
    with pytest.raises(OSError, match=f"No space left.*make room on the disk of .*run, then the same command {then}"):  # noqa: SIM117
        with claimed_folder(settings):
            for step in steps:
                (settings.run.out / "checkpoints" / str(step)).mkdir(parents=True)
            (settings.run.out / "checkpoints" / "11.orbax-checkpoint-tmp").mkdir(parents=True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert saved_steps(settings.run.out) == list(steps)
    with claimed_folder(settings):  # the lock is free, and what was left unfinished is removed
        assert not (settings.run.out / "checkpoints" / "11.orbax-checkpoint-tmp").exists()


def test_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("before")
    message = r"the disk is full \(No space left on device\), so .*x\.json was not written"
    with pytest.raises(OSError, match=message) as raised, files.replacing(tmp_path / "x.json") as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.errno == errno.ENOSPC
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB: room for one checkpoint of nano and a part of the second."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a disk for the test")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow  # mounts a disk and trains on it; the tests above make the same errors
def test_training_on_a_disk_that_becomes_full_and_is_enlarged(small_disk: Path) -> None:
    flags = ("--out", small_disk / "run", *shared_run.FLAGS)
    process = start_script("train.py", *flags, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 1 and "warning: the disk may become full" in out
    assert err.startswith("error: ") and err.count("\n") == 1, err
    done = saved_steps(small_disk / "run")
    assert done and "the disk is full" in err and f"then the same command resumes after step {done[-1]}" in err
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    process = start_script("train.py", *flags)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert f"resuming after step {done[-1]}" in out
