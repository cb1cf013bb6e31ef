"""How the processes of one run find each other, and how they end together.

jax finds the others and notices when one is gone; it then ends this process from a thread of its own, with a stack of its
internals as the last words. A helper process that outlives this one says what that means and what to do.

Knows jax.distributed, Slurm's variables and what a TPU host looks like. Knows nothing of what the run computes.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import types
from collections.abc import Mapping
from typing import Literal

import jax

from dream_jax import sharding
from dream_jax.trainer.settings import TrainSettings

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def join(settings: TrainSettings) -> None:
    """Joins the other processes of the run, if there are any; call it before anything else touches jax.

    Raises:
      ValueError: as `sharding.join_processes`; or the settings name a cluster that is not there.
    """
    if settings.coordinator is not None:
        sharding.join_processes(settings.coordinator, settings.num_processes, settings.process_id, settings.mesh)
    elif (kind := find_cluster(settings.cluster)) is not None:
        count = int(os.environ["SLURM_NTASKS"]) if kind == "slurm" else None
        sharding.join_cluster(kind, settings.mesh, count)
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        _explain_a_sudden_end()


def find_cluster(
    wanted: Literal["auto", "slurm", "tpu", "off"],
    environment: Mapping[str, str] = os.environ,
    devices: pathlib.Path = pathlib.Path("/dev"),
) -> Literal["slurm", "tpu"] | None:
    """The cluster whose processes make up the run; None where this process runs alone.

    Not whatever jax can detect: that includes every pod of Kubernetes, where asking for the others needs rights that a
    pod seldom has.

    Raises:
      ValueError: the cluster that is wanted is not there.
    """
    if wanted == "off":
        return None
    slurm = all(name in environment for name in _SLURM)
    # Of a job step with one task there is nobody to join, and jax would hide all GPUs but one.
    if slurm and wanted in ("slurm", "auto") and (wanted == "slurm" or int(environment["SLURM_NTASKS"]) > 1):
        return "slurm"
    if wanted == "slurm":
        missing = [name for name in _SLURM if name not in environment]
        raise ValueError(f"--cluster slurm, but {', '.join(missing)} is not set: start the command with srun")
    chips = devices.is_dir() and any(
        re.fullmatch(r"accel\d+|vfio/\d+", path.relative_to(devices).as_posix())
        for path in (*devices.glob("accel*"), *devices.glob("vfio/*"))
    )
    tpu = chips and importlib.util.find_spec("libtpu") is not None and environment.get("JAX_PLATFORMS", "tpu") != "cpu"
    if tpu:
        return "tpu"
    if wanted == "tpu":
        raise ValueError(
            "--cluster tpu, but there are no TPU chips here, or libtpu is not installed: pip install '.[tpu]'"
        )
    return None


# A program of its own, not a thread: jax ends the process from C++, which no Python code of the process survives.
_HELPER = """
import os, sys
if not sys.stdin.buffer.read():
    sys.stderr.write(sys.argv[1] + "\\n")
"""


def _explain_a_sudden_end() -> None:
    """Starts a helper that, when this process ends without having said so, writes what to do as the last words."""
    me, count = jax.process_index(), jax.process_count()
    text = (
        f"error: process {me} of 0..{count - 1} ended before the run did. Unless an error of its own stands above, another "
        "process died or could not be reached: look for one whose log ends earlier, or that was killed (out of memory, "
        "preempted). Then start the same command on every host again: it goes on from the newest checkpoint"
    )
    # A session of its own: Ctrl-C is for this process.
    helper = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _HELPER, text],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )

    def end() -> None:
        helper.communicate(b"as it should")

    atexit.register(end)  # runs before jax leaves the others, which may end this process as well

    def report_and_leave(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        sys.__excepthook__(kind, error, trace)
        leave(1)

    sys.excepthook = report_and_leave


def leave(code: int) -> int:
    """What a command ends with. After an error among several processes it ends at once, and does not return.

    Otherwise jax would wait for the others to come to their end too, while they wait for this process.
    """
    if code == 1 and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
