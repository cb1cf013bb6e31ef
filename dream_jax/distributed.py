"""The processes of one run: how they find each other, wait for each other and end together; CPU devices.

jax notices when a process is gone and then ends the others from a thread of its own, with a stack of its internals as the
last words. A helper process that outlives this one explains what that means and what to do.
"""

from __future__ import annotations

import atexit
import contextlib
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
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 40  # a process that has been silent for so long is taken for dead, and jax ends the others

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def provide_cpu_devices(count: int) -> None:
    """Gives the CPU backend of this process `count` devices, if it has not started yet.

    Accelerators are not touched, and a number that the user has set with JAX_NUM_CPU_DEVICES stands.
    """
    # The devices of one process share a thread pool, by default with one thread per device. A step may run two independent
    # collectives at once (a gather inside the layer loop, a sum outside it); devices that wait for different ones can then
    # hold all threads, and none finishes.
    if count > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(4 * count, os.cpu_count() or 1)))
    if jax.config.jax_num_cpu_devices > 0:  # type: ignore[attr-defined]  # options are defined at run time
        return
    with contextlib.suppress(RuntimeError):  # the backend runs already; `sharding.make_mesh` reports missing devices
        jax.config.update("jax_num_cpu_devices", count)


def join(
    *,
    num_devices: int,
    coordinator: str | None = None,
    num_processes: int = 1,
    process_id: int = 0,
    cluster: Literal["auto", "slurm", "tpu", "off"] = "auto",
) -> None:
    """Joins the other processes of the run, if there are any; call it before anything else uses jax.

    Args:
      num_devices: how many devices the mesh of the whole run has; on CPUs each process creates an equal share of them.
      coordinator: host:port of process 0. Without it, `cluster` says where the processes are found.
      num_processes: how many processes the run has; only read with a coordinator, as is
      process_id: which of them this is, from 0.
      cluster: see `find_cluster`.

    Raises:
      ValueError: the coordinator is not host:port, the process id is out of range, the processes cannot share the devices
        evenly, or the requested cluster is not there.
    """
    if coordinator is not None:
        if not re.fullmatch(r"\S+:\d+", coordinator):
            raise ValueError(f"{coordinator=} is not of the form host:port, such as 10.0.0.1:8476")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"{process_id=} is outside 0..{num_processes - 1} ({num_processes=})")
        _share_cpu_devices(num_devices, num_processes)
        jax.distributed.initialize(
            coordinator,
            num_processes=num_processes,
            process_id=process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    elif (kind := find_cluster(cluster)) is not None:
        if kind == "slurm":
            _share_cpu_devices(num_devices, int(os.environ["SLURM_NTASKS"]))
        # There are several kinds of TPU clusters, and jax looks for those first.
        method = "slurm" if kind == "slurm" else None
        jax.distributed.initialize(cluster_detection_method=method, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        _explain_a_sudden_end()


def _share_cpu_devices(num_devices: int, num_processes: int) -> None:
    if num_devices % num_processes:
        raise ValueError(
            f"the mesh has {num_devices} devices, which {num_processes} processes cannot share evenly; choose a mesh whose "
            f"size is a multiple of {num_processes}"
        )
    provide_cpu_devices(num_devices // num_processes)


def barrier(name: str) -> None:
    """Waits until every process of the run has called this with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"dream_jax.{name}")


def from_first(value: int) -> int:
    """The value that process 0 passes (an int32), in every process; all of them must call."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def which_say(value: bool) -> list[int]:
    """The processes, by number, that pass True; all of them must call."""
    if jax.process_count() == 1:
        return [0] if value else []
    return np.flatnonzero(multihost_utils.process_allgather(np.array(value))).tolist()


def find_cluster(
    wanted: Literal["auto", "slurm", "tpu", "off"],
    environment: Mapping[str, str] = os.environ,
    devices: pathlib.Path = pathlib.Path("/dev"),
) -> Literal["slurm", "tpu"] | None:
    """The kind of cluster whose processes make up the run; None when this process runs alone.

    Does not use all that jax can detect: that includes every pod of Kubernetes, where finding the other pods needs rights
    that a pod seldom has.

    Args:
      wanted: "auto" looks for Slurm and then for a TPU slice; "slurm" and "tpu" require theirs; "off" returns None.
      environment: the environment variables.
      devices: where the system lists its devices.

    Raises:
      ValueError: the cluster that is wanted is not there.
    """
    if wanted == "off":
        return None
    slurm = all(name in environment for name in _SLURM)
    # A job step with one task has no other processes, and jax would hide all GPUs but one from it.
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


# A separate program instead of a thread: jax ends the process from C++, and no Python code of the process survives that.
_HELPER = """
import os, sys
if not sys.stdin.buffer.read():
    sys.stderr.write(sys.argv[1] + "\\n")
"""


def _explain_a_sudden_end() -> None:
    """Starts a helper that writes what to do as the last words, when this process ends without telling it so."""
    me, count = jax.process_index(), jax.process_count()
    text = (
        f"error: process {me} of 0..{count - 1} ended before the run did. Unless an error of its own stands above, another "
        "process died or could not be reached: look for one whose log ends earlier, or that was killed (out of memory, "
        "preempted). Then start the same command on every host again: it resumes from the newest checkpoint"
    )
    # In its own session, so that Ctrl-C reaches this process only.
    helper = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _HELPER, text],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )

    def end() -> None:
        helper.communicate(b"normal end")

    atexit.register(end)  # runs before jax leaves the others, which may end this process as well

    def report_and_leave(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        sys.__excepthook__(kind, error, trace)
        leave(1)

    sys.excepthook = report_and_leave


def leave(code: int) -> int:
    """Returns the exit code of a command; after an error (code 1) among several processes, ends this process at once.

    Otherwise jax would wait for the other processes to end too, while they wait for this one.
    """
    if code == 1 and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
