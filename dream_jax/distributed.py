"""The processes of one run: how they find each other, wait for each other and end together; also CPU devices.

When a process has died, jax notices it and ends the other processes from one of its threads; their last output is then
a stack of jax internals. A helper process, which is not ended, explains after it what has happened and what to do.
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

MOST_CPU_DEVICES = 64  # the largest number of devices that a CPU is divided into; 10,000 took 9 GB and many minutes
HEARTBEAT_SECONDS = 40  # jax regards a process that has been silent for this time as dead, and ends the others

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def provide_cpu_devices(count: int) -> None:
    """Gives the CPU backend of this process `count` devices if the backend has not started yet.

    Accelerators are not affected. A number that the user has set with JAX_NUM_CPU_DEVICES has priority.

    Raises:
      ValueError: the number is above `MOST_CPU_DEVICES`, and the user has set none.
    """
    set_by_user = jax.config.jax_num_cpu_devices > 0  # type: ignore[attr-defined]  # options are defined at run time
    if count > MOST_CPU_DEVICES and not set_by_user:
        raise ValueError(
            f"a mesh with {count} devices for one process is too large: a CPU is divided into at most {MOST_CPU_DEVICES} "
            "devices, because each takes memory and threads; pass a smaller mesh, or start more processes"
        )
    # The devices of one process share a thread pool, by default with one thread per device. A step may run two
    # independent collectives at once (a gather inside the layer loop, a sum outside it). Devices that wait for
    # different collectives can then occupy all threads, and neither collective finishes.
    if count > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(4 * min(count, MOST_CPU_DEVICES), os.cpu_count() or 1)))
    if set_by_user:
        return
    # jax raises RuntimeError if the backend has started already; `sharding.make_mesh` then reports missing devices.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def join(
    *,
    num_devices: int,
    coordinator: str | None = None,
    num_processes: int = 1,
    process_id: int = 0,
    cluster: Literal["auto", "slurm", "tpu", "off"] = "auto",
) -> None:
    """Joins the other processes of the run, if there are any; must be called before anything else uses jax.

    Args:
      num_devices: number of devices in the mesh of the whole run; on CPUs each process creates an equal share of them.
      coordinator: host:port of process 0; None looks for the processes in a cluster.
      num_processes: number of processes of the run; like process_id, it is used only with a coordinator.
      process_id: index of this process, from 0.
      cluster: kind of cluster, used only without a coordinator; see `find_cluster`.

    Raises:
      ValueError: the coordinator is not host:port, the process id is out of range, the processes cannot share the
        devices evenly, or the requested cluster does not exist here.
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
        # None lets jax detect the cluster: it knows several kinds of TPU clusters, and looks for those first.
        method = "slurm" if kind == "slurm" else None
        jax.distributed.initialize(cluster_detection_method=method, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        _explain_a_sudden_end()


def _share_cpu_devices(num_devices: int, num_processes: int) -> None:
    """Gives this process its equal share of the CPU devices. Raises ValueError if there is no equal share."""
    if num_devices % num_processes:
        raise ValueError(
            f"the mesh has {num_devices} devices, which {num_processes} processes cannot share evenly; choose a mesh whose "
            f"size is a multiple of {num_processes}"
        )
    provide_cpu_devices(num_devices // num_processes)


def barrier(name: str) -> None:
    """Waits until every process of the run has called this function with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"dream_jax.{name}")


def from_first(value: int) -> int:
    """Returns the int32 value that process 0 passes. All processes must call it, because they wait for each other."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def smallest(size: int) -> int:
    """Returns the smallest size in bytes that a process passes; with several processes it is rounded down to whole MiB.

    All processes must call this function, because they wait for each other.
    """
    if jax.process_count() == 1:
        return size
    # jax passes int32 between processes.
    return int(np.min(multihost_utils.process_allgather(np.int32(size >> 20)))) << 20


def which_say(value: bool) -> list[int]:
    """Returns the indices of the processes that pass True. All must call it, because they wait for each other."""
    if jax.process_count() == 1:
        return [0] if value else []
    return np.flatnonzero(multihost_utils.process_allgather(np.array(value))).tolist()


def find_cluster(
    wanted: Literal["auto", "slurm", "tpu", "off"],
    environment: Mapping[str, str] = os.environ,
    devices: pathlib.Path = pathlib.Path("/dev"),
) -> Literal["slurm", "tpu"] | None:
    """Returns the kind of cluster that started the processes of the run; None if this process runs alone.

    It does not look for every kind that jax can detect. jax would detect one in every Kubernetes pod, but a pod seldom
    has the rights to find the other pods.

    Args:
      wanted: "auto" looks for Slurm and then for a TPU slice; "slurm" or "tpu" requires this kind; "off" returns None.
      environment: the environment variables, by name.
      devices: directory in which the system lists its devices.

    Raises:
      ValueError: "slurm" or "tpu" is wanted, but this process does not run in such a cluster.
    """
    if wanted == "off":
        return None
    slurm = all(name in environment for name in _SLURM)
    # A job step with one task has no other processes to join, and joining would make jax use only one of its GPUs.
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


# The helper must be a separate process: jax ends this process from C++, and with it all of its threads.
_HELPER = """
import os, sys
if not sys.stdin.buffer.read():
    sys.stderr.write(sys.argv[1] + "\\n")
"""


def _explain_a_sudden_end() -> None:
    """Starts a helper process, which writes what to do if this process ends without announcing its end."""
    me, count = jax.process_index(), jax.process_count()
    text = (
        f"error: process {me} of 0..{count - 1} ended before the run did. If no error of this process is printed above, "
        "another process died or could not be reached: look for a process whose log ends earlier, or that was killed (out "
        "of memory, preempted). Then start the same command on every host again: it resumes from the newest checkpoint"
    )
    # The helper has its own session, so that Ctrl-C does not reach it.
    helper = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _HELPER, text],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )

    def end() -> None:
        helper.communicate(b"normal end")

    atexit.register(end)  # it runs before jax disconnects from the other processes, which may end this process

    def report_and_leave(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        sys.__excepthook__(kind, error, trace)
        leave(1)

    sys.excepthook = report_and_leave


def leave(code: int) -> int:
    """Returns the exit code of a command; in a run of several processes, exits at once after an error (code 1).

    Without this exit, jax would wait for the end of the other processes, while they wait for this process.
    """
    if code == 1 and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
