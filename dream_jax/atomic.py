"""A directory that appears under its name only when it is whole.

Knows file systems, and that several processes may write one directory together. Knows nothing of what is
written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

_SPARE_BYTES = 64 * 2**20  # for small files and the file system's own needs

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def new_directory(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    needed_bytes: int = 0,
    reads: pathlib.Path | None = None,
    marker: str = "config.json",
) -> Iterator[pathlib.Path]:
    """A directory to fill, which gets its name `path` when the block ends well and vanishes when it does not.

    What killed runs have left beside `path` is removed. With several processes all must enter; the first one
    makes and renames.

    Args:
      path: the name to be.
      overwrite: whether what has the name now may be replaced, at the end, if it is of the same kind.
      needed_bytes: what will be written; checked against the space left on the disk.
      reads: a directory that is read meanwhile, which must be another one.
      marker: a file that every directory of this kind holds.

    Raises:
      FileExistsError: `path` exists and `overwrite` is not set, or `path` holds something else.
      ValueError: `path` is `reads`.
      OSError: too little space.
    """
    target = pathlib.Path(path).expanduser().resolve()
    leads = jax.process_index() == 0
    token, refusal = os.getpid(), None
    if leads:
        try:
            _prepare(target, overwrite, needed_bytes, reads, marker)
        except (OSError, ValueError) as error:
            token, refusal = 0, error
    if jax.process_count() > 1:
        token = int(multihost_utils.broadcast_one_to_all(np.int32(token)))
    if refusal is not None:
        raise refusal
    if not token:
        raise RuntimeError(f"process 0 refused to make {target}; its message says why")
    directory = target.parent / f".{target.name}.incomplete-{token}"
    if not leads:
        _barrier("made")
        yield directory
        _barrier("written")
        _barrier("named")
        return
    directory.mkdir()
    with open(directory / ".lock", "w") as lock:
        # The system lets go of it however this process ends: that is how others know what is stale.
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            _barrier("made")
            yield directory
            _barrier("written")
            (directory / ".lock").unlink()
            _give_name(directory, target, overwrite)
        except OSError as error:
            shutil.rmtree(directory, ignore_errors=True)
            if error.errno == errno.ENOSPC:
                raise OSError(errno.ENOSPC, f"the disk is full: {target} needs {needed_bytes} bytes") from error
            raise
        except BaseException:  # also on Ctrl-C: half a checkpoint is worse than none
            shutil.rmtree(directory, ignore_errors=True)
            raise
    _barrier("named")


def _prepare(target: pathlib.Path, overwrite: bool, needed_bytes: int, reads: pathlib.Path | None, marker: str) -> None:
    if reads is not None and target == reads.resolve():
        raise ValueError(f"{target} is the source itself; give another directory")
    _remove_stale(target)
    if target.exists():
        if not overwrite:
            raise FileExistsError(
                f"{target} exists; pass --overwrite (overwrite=True) to replace it, or give another name"
            )
        if not target.is_dir() or (any(target.iterdir()) and not (target / marker).is_file()):
            raise FileExistsError(
                f"{target} is not a checkpoint directory (it holds no {marker}), so it is not replaced; give another name"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes + _SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{target} needs {needed_bytes} bytes and {_SPARE_BYTES} to spare, but the disk has only {free}",
        )


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"dream_jax.new_directory.{name}")


def _give_name(directory: pathlib.Path, target: pathlib.Path, overwrite: bool) -> None:
    if not (overwrite and target.exists()):
        directory.rename(target)  # raises if somebody has made the target meanwhile
        return
    old = target.parent / f".{target.name}.replaced-{os.getpid()}"
    target.rename(old)
    directory.rename(target)
    shutil.rmtree(old)


def _remove_stale(target: pathlib.Path) -> None:
    for old in target.parent.glob(f".{glob.escape(target.name)}.replaced-*"):
        if target.exists():
            shutil.rmtree(old)
        else:  # killed between the two renames of `_give_name`
            old.rename(target)
            _log.warning("put %s back: a run that was replacing it was killed", target)
    for stale in target.parent.glob(f".{glob.escape(target.name)}.incomplete-*"):
        try:
            with open(stale / ".lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stale)
                _log.warning("removed %s, left by a run that was killed", stale)
        except BlockingIOError:
            _log.warning("another run is writing %s now", stale)
        except FileNotFoundError:
            _log.warning("%s was left by another run; remove it if none is writing it", stale)
