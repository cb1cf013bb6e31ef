"""Measures time and peak memory of the conversion of a 7B checkpoint in both directions, and the time of `cp -r`.

    python bench/convert_7b.py --config DIR --work DIR       # with random weights in the published layout
    python bench/convert_7b.py --source DIR --work DIR       # with a downloaded checkpoint

A run copies the folder (to warm up), copies it (timed), runs `convert/hf_to_flax.py` (timed, memory sampled), copies the
folder (timed), runs `convert/flax_to_hf.py` (timed, memory sampled), and compares every tensor of the result bit for bit
with the source. Times include `sync`. At most three copies of the checkpoint are on the disk at once, in a new folder under
`--work` that is removed at the end, also after an error or an interrupt.

The memory of a conversion is sampled over its process and the children. `rss` includes page-cache pages of mapped files,
which the kernel can take back at any time; `anonymous` is the memory that the process has allocated. `maxrss` is the
largest `rss` of one process as the kernel records it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import make_synthetic_7b
import numpy as np
import psutil
import report
import tyro
from rich.console import Console
from rich.table import Table

CHUNK_BYTES = 64 * 2**20
SAMPLE_SECONDS = 0.1
MOST_COPIES = 3  # the source, the converted directory, and the copy of `cp` or the result of the way back
KIB = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionBenchSettings:
    """The checkpoint to convert, and the folder to work in."""

    work: pathlib.Path
    """An existing directory on a disk with free space for three copies of the checkpoint."""
    config: pathlib.Path | None = None
    """Directory with a published config.json, from which a synthetic checkpoint is made."""
    source: pathlib.Path | None = None
    """A Hugging Face checkpoint directory to use instead; it is only read."""
    layers: int | None = None
    """Number of layers of the synthetic checkpoint; by default that of the configuration."""
    out: pathlib.Path = report.RESULTS / "convert_7b.json"
    """Result file."""

    def __post_init__(self) -> None:
        if (self.config is None) == (self.source is None):
            raise ValueError("give exactly one of --config and --source")
        if self.source is not None and self.layers is not None:
            raise ValueError(f"{self.layers=} only applies to a synthetic checkpoint (--config)")
        if not self.work.is_dir():
            raise NotADirectoryError(f"{self.work} is not a directory; make it first")


@contextlib.contextmanager
def working_folder(parent: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new folder, and removes it when the block ends, also by SIGINT or SIGTERM."""

    def terminate(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    previous = signal.signal(signal.SIGTERM, terminate)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="convert-7b-", dir=parent.resolve()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, previous)


def folder_bytes(folder: pathlib.Path) -> int:
    """Returns the sum of the sizes of all files in a folder and its subfolders, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------- running


@dataclasses.dataclass(kw_only=True)
class Peak:
    """The largest sampled memory of a process together with its children, in bytes."""

    rss: int = 0
    pss: int = 0
    anonymous: int = 0
    samples: int = 0

    def sample(self, pid: int) -> None:
        """Takes one sample from /proc; a process that ends during the sample counts as 0."""
        rss = pss = anonymous = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    text = pathlib.Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                    fields = dict(line.split(":", 1) for line in text.splitlines()[1:])
                    rss += int(fields["Rss"].split()[0]) * KIB
                    pss += int(fields["Pss"].split()[0]) * KIB
                    anonymous += int(fields["Anonymous"].split()[0]) * KIB
        if rss:
            self.rss, self.pss = max(self.rss, rss), max(self.pss, pss)
            self.anonymous = max(self.anonymous, anonymous)
            self.samples += 1


def timed_copy(source: pathlib.Path, target: pathlib.Path) -> float:
    """Returns the seconds that `cp -r` and `sync` take; the copy is then removed."""
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def timed_command(command: Sequence[str]) -> dict[str, Any]:
    """Runs a command in the root of the repository; returns its seconds with `sync`, and its peak memory.

    Raises:
      subprocess.CalledProcessError: the command failed; its output on the terminal says why.
    """
    os.sync()
    peak = Peak()
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=report.REPOSITORY)
    try:
        while True:
            # wait4 returns the resource usage of this child alone; RUSAGE_CHILDREN is the largest child so far.
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak.sample(process.pid)
            time.sleep(SAMPLE_SECONDS)
        process.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    command_seconds = time.perf_counter() - start
    os.sync()
    return {
        "seconds": time.perf_counter() - start,
        "seconds_without_sync": command_seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "maxrss_bytes": usage.ru_maxrss * KIB,
        "peak_rss_bytes": peak.rss,
        "peak_pss_bytes": peak.pss,
        "peak_anonymous_bytes": peak.anonymous,
        "samples": peak.samples,
    }


# -------------------------------------------------------------------------------------------------- comparing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """The file and the byte range of a tensor."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def read_entries(folder: pathlib.Path) -> dict[str, Entry]:
    """Returns name -> entry for all safetensors files of a folder. Raises ValueError if a name occurs twice."""
    entries: dict[str, Entry] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
        header.pop("__metadata__", None)
        for name, fields in header.items():
            if name in entries:
                raise ValueError(f"{name} is in {entries[name].path} and in {path}")
            begin, end = fields["data_offsets"]
            entries[name] = Entry(
                path=path,
                dtype=fields["dtype"],
                shape=tuple(fields["shape"]),
                start=8 + header_size + begin,
                size=end - begin,
            )
    return entries


def _same_bytes(left: Entry, right: Entry) -> bool:
    """Returns whether two tensors of equal size have the same bytes."""
    with open(left.path, "rb") as left_file, open(right.path, "rb") as right_file:
        left_file.seek(left.start)
        right_file.seek(right.start)
        remaining = left.size
        while remaining > 0:
            size = min(remaining, CHUNK_BYTES)
            a, b = (np.frombuffer(file.read(size), np.uint8) for file in (left_file, right_file))
            if a.size != size or not np.array_equal(a, b):
                return False
            remaining -= size
    return True


def compare_checkpoints(source: pathlib.Path, back: pathlib.Path) -> int:
    """Returns the number of tensors, after checking that name, dtype, shape and every bit are equal.

    Raises:
      ValueError: something differs; the message says what.
    """
    ours, theirs = read_entries(source), read_entries(back)
    if not ours:
        raise ValueError(f"{source} holds no tensors")
    if ours.keys() != theirs.keys():
        raise ValueError(f"names differ: {sorted(ours.keys() ^ theirs.keys())}")
    for name, entry in ours.items():
        other = theirs[name]
        if (entry.dtype, entry.shape) != (other.dtype, other.shape):
            raise ValueError(f"{name}: {entry.dtype} {entry.shape} became {other.dtype} {other.shape}")
        if not _same_bytes(entry, other):
            raise ValueError(f"{name}: bytes differ between {entry.path} and {other.path}")
    return len(ours)


# ------------------------------------------------------------------------------------------------------- main


def measure(settings: ConversionBenchSettings, folder: pathlib.Path, console: Console) -> dict[str, Any]:
    """Returns all measurements; the caller removes the folder."""
    if settings.source is not None:
        source = settings.source.resolve()
    else:
        assert settings.config is not None, "the settings ask for --source or --config"
        source = make_synthetic_7b.make_checkpoint(
            settings.config, folder / "source", layers=settings.layers, console=console
        )
    size = folder_bytes(source)
    copies = MOST_COPIES - 1  # the source is already on the disk
    free = shutil.disk_usage(folder).free
    if free < copies * size:
        raise OSError(f"{folder} has {free / 1e9:.1f} GB free, {copies * size / 1e9:.1f} GB are needed")

    copy, converted, back = folder / "copy", folder / "converted", folder / "back"
    console.print("copying, to warm up")
    timed_copy(source, copy)
    console.print("copying")
    copies_s = [timed_copy(source, copy)]
    console.print("converting")
    to_flax = timed_command([sys.executable, "convert/hf_to_flax.py", str(source), str(converted)])
    converted_bytes = folder_bytes(converted)
    console.print("copying")
    copies_s.append(timed_copy(source, copy))
    console.print("converting back")
    to_hf = timed_command([sys.executable, "convert/flax_to_hf.py", str(converted), str(back)])
    console.print("comparing")
    tensors = compare_checkpoints(source, back)
    mean_copy = sum(copies_s) / len(copies_s)
    return {
        "source": "given" if settings.source is not None else "synthetic",
        "source_bytes": size,
        "converted_bytes": converted_bytes,
        "identical_tensors": tensors,
        "copy_s": copies_s,
        "hf_to_flax": to_flax,
        "flax_to_hf": to_hf,
        "hf_to_flax_over_copy": to_flax["seconds"] / mean_copy,
        "flax_to_hf_over_copy": to_hf["seconds"] / mean_copy,
    }


def print_table(result: dict[str, Any], console: Console) -> None:
    """Prints one row for `cp -r` and one for each direction."""
    table = Table("", "seconds", "times cp -r", "peak RSS, GB", "peak anonymous, GB")
    table.add_row("cp -r", " and ".join(f"{seconds:.1f}" for seconds in result["copy_s"]), "1", "", "")
    for name in ("hf_to_flax", "flax_to_hf"):
        way = result[name]
        table.add_row(
            name,
            f"{way['seconds']:.1f}",
            f"{result[f'{name}_over_copy']:.2f}",
            f"{max(way['maxrss_bytes'], way['peak_rss_bytes']) / 1e9:.2f}",
            f"{way['peak_anonymous_bytes'] / 1e9:.2f}",
        )
    console.print(table)
    console.print(
        f"{result['source_bytes'] / 1e9:.2f} GB; all {result['identical_tensors']} tensors came back bit for bit"
    )


def main(settings: ConversionBenchSettings) -> None:
    """Measures, writes the result and prints the table."""
    console = Console()
    console.print(settings)
    with working_folder(settings.work) as folder:
        result = measure(settings, folder, console)
    result = {
        "date": report.now(),
        "hardware": report.hardware(),
        "versions": report.versions(["jax", "flax", "orbax-checkpoint", "numpy", "safetensors"]),
        # Paths are left out, because they mean nothing on another machine.
        "settings": {"layers": settings.layers, "sample_seconds": SAMPLE_SECONDS},
        **result,
    }
    report.write_json(settings.out, result)
    print_table(result, console)
    console.print(f"wrote {settings.out}")


if __name__ == "__main__":
    main(tyro.cli(ConversionBenchSettings, description=__doc__))
