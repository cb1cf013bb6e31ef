"""Measures how long data takes to its first batch, and in how much memory, for data of two sizes that the script makes.

    python bench/data.py --assets DIR [--chats 50000 200000] [--gigabytes 2] [--scratch DIR] [--out bench/results/data.json]

DIR holds `data/gsm8k` and `dream-v0-instruct-7b` with the tokenizer, as for the environment variable `DREAM_JAX_ASSETS`.
Chats of about 800 tokens are put together from rows of GSM8K, and documents from the same texts. All files, and the stores
of tokens, are in a scratch folder, which is removed at the end. One process measures one start: it opens the data, builds
or finds the store, and takes the first batches, as the training does. Its parent samples the memory of the process and of
its children. The rate of the tokenizer alone is that of its own batches on the same texts, in a process of its own.

What is written: seconds of the first and of a later start beyond those of ten rows, the peak of the resident memory beyond
that of ten rows, bytes a second, and the share of the rate of the tokenizer alone that they are. All are from one run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import report
import tyro

from dream_jax.bounds import FloatRange, IntegerRange, check_numbers

CHARACTERS_OF_A_CHAT = 1820
"""Characters after which a chat ends. With its last row it then has about 800 tokens on average."""
LENGTH = 1024
"""The length of a row in tokens."""
_SAMPLED_BYTES = 20_000_000  # bytes of text on which the tokenizer alone is timed
_INTERVAL = 0.1  # seconds between two samples of the memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataBenchSettings:
    """Which data to make and to measure."""

    assets: pathlib.Path | None = None
    """folder that holds data/gsm8k and dream-v0-instruct-7b; by default $DREAM_JAX_ASSETS"""
    chats: tuple[int, ...] = (50_000, 200_000)
    """numbers of chats, ascending"""
    gigabytes: tuple[float, ...] = (0.5, 2.0)
    """sizes of the documents in GB (1e9 bytes), ascending; none: no documents"""
    batches: int = 4
    """number of batches that a start takes, of 8 rows each"""
    scratch: pathlib.Path | None = None
    """folder, outside the repository, in which a folder for the files is made; by default that for temporary files"""
    out: pathlib.Path = report.RESULTS / "data.json"
    """file of the results"""
    start: pathlib.Path | None = None
    """data of which this process makes one start and prints what it took; for the script itself"""
    cache: str = "off"
    """the --data-cache of train.py, for --start"""
    documents: bool = False
    """whether the data of --start are documents"""
    alone: pathlib.Path | None = None
    """file on whose texts this process times the tokenizer alone; for the script itself"""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            chats=IntegerRange(11, 10**8, "ten rows are measured too"),
            gigabytes=FloatRange(0.0, 1e4, open_low=True),
            batches=IntegerRange(1),
        )

    def folder(self) -> pathlib.Path:
        """Returns the folder of the assets. Raises ValueError if none is given."""
        found = self.assets or os.environ.get("DREAM_JAX_ASSETS")
        if not found:
            raise ValueError("give --assets, the folder that holds data/gsm8k and dream-v0-instruct-7b")
        return pathlib.Path(found)


# --- Data ---


def gsm8k(assets: pathlib.Path) -> list[dict[str, str]]:
    with (assets / "data" / "gsm8k" / "train.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def chats(rows: list[dict[str, str]], count: int) -> Iterator[dict[str, Any]]:
    """Yields chats of several turns, which are different because their rows are drawn at random."""
    draw = random.Random(count)
    for number in range(count):
        messages, size = list[dict[str, str]](), 0
        while size < CHARACTERS_OF_A_CHAT:
            row = rows[draw.randrange(len(rows))]
            question = f"({number}) {row['question']}" if not messages else row["question"]
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": row["answer"]}]
            size += len(question) + len(row["answer"])
        yield {"messages": messages}


def texts(rows: list[dict[str, str]], nbytes: float) -> Iterator[dict[str, str]]:
    """Yields documents of 1 to 60 rows each, until they have this number of bytes."""
    draw, done = random.Random(int(nbytes)), 0
    while done < nbytes:
        chosen = (rows[draw.randrange(len(rows))] for _ in range(draw.randint(1, 60)))
        text = "\n\n".join(f"{row['question']}\n{row['answer']}" for row in chosen)
        done += len(text)
        yield {"text": text}


def write(path: pathlib.Path, rows: Iterator[dict[str, Any]]) -> pathlib.Path:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def first_lines(path: pathlib.Path, count: int) -> pathlib.Path:
    """Writes the first lines of a file beside it."""
    few = path.with_name(f"few-{path.name}")
    with path.open(encoding="utf-8") as file:
        few.write_text("".join(line for line, _ in zip(file, range(count), strict=False)), encoding="utf-8")
    return few


# --- One process ---


def make_start(settings: DataBenchSettings) -> dict[str, Any]:
    """Opens the data as the training does, and takes batches. Returns the seconds of each part."""
    from dream_jax.data import BatchOptions, EncodeOptions, ReadOptions, TokenCache, find_cache, make_batches
    from dream_jax.tokenizer import load_tokenizer

    assert settings.start is not None
    tokenizer = load_tokenizer(settings.folder() / "dream-v0-instruct-7b")
    encoding = EncodeOptions(length_policy="split" if settings.documents else "filter")
    layout = BatchOptions(pack=True, eos_tail=0, pack_by="cut" if settings.documents else "fit")
    begun = time.perf_counter()
    opened = TokenCache(find_cache(settings.cache), tokenizer, encoding)
    rows = opened.open([str(settings.start)], options=ReadOptions(held_out=0.0))
    read = time.perf_counter()
    with make_batches(rows, batch_size=8, max_length=LENGTH, seed=0, options=layout) as batches:
        lengths = [next(batches).length_BM for _ in range(settings.batches)]
    tokens = sum(int(np.sum(one)) for one in lengths if one is not None)
    done = time.perf_counter()
    found = {"rows": len(rows), "tokens_of_the_batches": tokens, "digest": batches.report.digest}
    return {"seconds": done - begun, "open_seconds": read - begun, "batch_seconds": done - read, **found}


def time_alone(settings: DataBenchSettings) -> dict[str, Any]:
    """Times the tokenizer on texts in its own batches, without reading or writing. Returns its bytes a second."""
    from dream_jax.tokenizer import load_tokenizer

    assert settings.alone is not None
    some, size = list[str](), 0
    with settings.alone.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            parts = [row["text"]] if "text" in row else [turn["content"] for turn in row["messages"]]
            some += parts
            size += len(line.encode())
            if size > _SAMPLED_BYTES:
                break
    tokenizer: Any = load_tokenizer(settings.folder() / "dream-v0-instruct-7b")
    begun, used = time.perf_counter(), time.process_time()
    for first in range(0, len(some), 1000):
        tokenizer._backend.encode_batch_fast(some[first : first + 1000], add_special_tokens=False)
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - used
    return {
        "bytes": size,
        "seconds": seconds,
        "bytes_per_second": size / seconds,
        "bytes_per_cpu_second": size / cpu_seconds,
    }


def run(settings: DataBenchSettings, *arguments: object) -> dict[str, Any]:
    """Runs this script with other arguments in a new process. Returns what it printed, with the peak of its memory."""
    command = [sys.executable, __file__, "--assets", str(settings.folder()), *map(str, arguments)]
    begun, used, peak = time.perf_counter(), children_cpu_seconds(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        watched = psutil.Process(child.pid)
        while child.poll() is None:
            peak = max(peak, resident(watched))
            time.sleep(_INTERVAL)
        text = child.stdout.read() if child.stdout else ""
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit status {child.returncode}")
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    spent = {"process_seconds": time.perf_counter() - begun, "process_cpu_seconds": children_cpu_seconds() - used}
    return {**found, **spent, "peak_bytes": peak}


def children_cpu_seconds() -> float:
    """Returns the seconds of all cores that the children of this process, and their children, used until they ended."""
    found = os.times()
    return found.children_user + found.children_system


def resident(process: psutil.Process) -> int:
    """Returns the bytes of memory that a process and its children hold now; 0 if it has ended."""
    try:
        return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


# --- All of them ---


def measure(settings: DataBenchSettings, path: pathlib.Path, cache: pathlib.Path, *flags: str) -> dict[str, Any]:
    """Measures the first and a later start of a file and of its first ten rows, and the tokenizer alone."""
    start = ("--batches", settings.batches, *flags)
    few = first_lines(path, 10)
    found: dict[str, Any] = {"bytes": path.stat().st_size}
    for name, file in (("ten", few), ("all", path)):
        folder = cache / f"{path.stem}-{name}"
        for when in ("first", "later"):
            found[f"{name}_{when}"] = run(settings, "--start", file, "--cache", folder, *start)
        shutil.rmtree(folder)
    if found["all_first"]["digest"] != found["all_later"]["digest"]:
        raise RuntimeError(f"{path}: the first and the later start have other tokens")
    found["alone"] = run(settings, "--alone", path)
    first, later = (
        found[f"all_{when}"]["process_seconds"] - found[f"ten_{when}"]["process_seconds"] for when in ("first", "later")
    )
    cpu_seconds = found["all_first"]["process_cpu_seconds"] - found["ten_first"]["process_cpu_seconds"]
    rate, cpu_rate = found["bytes"] / first, found["bytes"] / cpu_seconds
    found["beyond_ten_rows"] = {
        "first_start_seconds": first,
        "later_start_seconds": later,
        "first_peak_bytes": found["all_first"]["peak_bytes"] - found["ten_first"]["peak_bytes"],
        "later_peak_bytes": found["all_later"]["peak_bytes"] - found["ten_later"]["peak_bytes"],
        "bytes_per_second": rate,
        "share_of_the_tokenizer_alone": rate / found["alone"]["bytes_per_second"],
        "share_in_cpu_seconds": cpu_rate / found["alone"]["bytes_per_cpu_second"],
    }
    return found


def told(name: str, found: dict[str, Any]) -> str:
    beyond = found["beyond_ten_rows"]
    return (
        f"{name}: {found['all_first']['rows']:,} rows, {found['bytes'] / 1e9:.3g} GB; beyond ten rows: first start "
        f"{beyond['first_start_seconds']:.1f} s, later start {beyond['later_start_seconds']:.1f} s, memory "
        f"{beyond['first_peak_bytes'] / 1e9:.3f} and {beyond['later_peak_bytes'] / 1e9:.3f} GB; "
        f"{beyond['bytes_per_second'] / 1e6:.2f} MB/s, {beyond['share_of_the_tokenizer_alone']:.2f} of the tokenizer alone "
        f"({beyond['share_in_cpu_seconds']:.2f} in CPU seconds, which other processes disturb less)"
    )


def main(settings: DataBenchSettings) -> int:
    try:
        run_all(settings)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_all(settings: DataBenchSettings) -> None:
    if settings.start is not None:
        print(json.dumps(make_start(settings)))
        return
    if settings.alone is not None:
        print(json.dumps(time_alone(settings)))
        return
    rows, results, others = gsm8k(settings.folder()), dict[str, Any](), report.OtherWork()
    with tempfile.TemporaryDirectory(prefix="dream_jax-data-", dir=settings.scratch) as folder:
        scratch = pathlib.Path(folder)
        for count in settings.chats:
            path = write(scratch / f"chats-{count}.jsonl", chats(rows, count))
            results[path.stem] = measure(settings, path, scratch / "cache")
            print(told(path.stem, results[path.stem]), flush=True)
            path.unlink()
        for size in settings.gigabytes:
            path = write(scratch / f"documents-{size:g}.jsonl", texts(rows, size * 1e9))
            results[path.stem] = measure(settings, path, scratch / "cache", "--documents")
            print(told(path.stem, results[path.stem]), flush=True)
            path.unlink()
    about = {
        "date": report.now(),
        "hardware": report.hardware(),
        "versions": report.versions(["tokenizers", "transformers", "numpy", "grain", "pyarrow"]),
        "other_work_share": round(others.share(), 3),
    }
    settled = {"chats": settings.chats, "gigabytes": settings.gigabytes, "batches": settings.batches, "length": LENGTH}
    report.write_json(settings.out, about | {"settings": settled, "results": results})
    print(f"wrote {settings.out}")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(DataBenchSettings, description=__doc__)))
