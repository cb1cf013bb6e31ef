"""Measures the server: answers a second through HTTP against `sampler.Stream`, and the waiting times under load.

    python bench/server.py [--model runs/demo/model] [--prompts FILE.jsonl] [--presets exact balanced] [--out FILE]

With the default settings and the model of `make demo` it takes about four minutes on two cores.

The server runs on this machine (uvicorn on a port of 127.0.0.1), its clients in another process. Throughput: `Stream`
and the server answer the same prompts with the same settings, in turns and in batches of the same number of rows; there
are twice as many clients as rows, so that requests wait as the prompts of `Stream` do. Load: for each number of clients,
the seconds from a request to the first text that can change no more, and to the end. Everything is compiled before it is
timed.

A forward pass of the demo model takes only about 10 ms, and an answer needs few passes, so the work for HTTP is a larger
part of the time than with the models that people serve. Therefore the throughput is also measured for a model of random
weights that is twice as deep and twice as wide, with the preset `exact`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import http_clients
import jax
import numpy as np
import report
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from dream_jax import inference
from dream_jax.bounds import MOST_ROWS, MOST_TOKENS, POSITIVE, IntegerRange, check_numbers
from dream_jax.config import DreamConfig
from dream_jax.data import numbered_records, text_field
from dream_jax.data.sources import SUDOKU_GIVENS
from dream_jax.data.sudoku import SudokuSource
from dream_jax.model import Dream
from dream_jax.sampler import Preset, Stream
from dream_jax.serving import server
from dream_jax.serving.app import AppSettings, make_app
from dream_jax.serving.engine import Engine, EngineSettings
from dream_jax.serving.requests import CompletionRequest, Limits, TaskMaker

_MOST_BUSY = 0.05  # share of the cores that other processes may use


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingSpeed(inference.ModelSettings):
    """The settings of `bench/server.py`."""

    prompts: pathlib.Path | None = None
    """.jsonl file whose rows have a `prompt` text; by default held-out sudokus, for the model of `make demo`"""
    num_prompts: int = 64
    """number of prompts, and of requests for each number of clients"""
    max_new_tokens: int = 64
    """number of new tokens of each answer"""
    presets: tuple[Preset, ...] = ("exact", "balanced")
    """presets of the sampler to measure"""
    rows: int = 8
    """number of rows of a batch, of the server and of `Stream`"""
    clients: tuple[int, ...] = (1, 8, 32)
    """numbers of clients for which waiting times are measured"""
    repeats: int = 3
    """number of times that `Stream` and the server answer all prompts, in turns"""
    interval: float = 0.1
    """seconds after which the compiled loop of the server returns"""
    larger_prompts: int = 24
    """number of prompts for the larger model with random weights; 0 leaves this model out"""
    allow_busy: bool = False
    """measure even while other processes compute; the result records their share, and should not be quoted"""
    out: pathlib.Path = report.RESULTS / "server.json"
    """file for the results"""

    def __post_init__(self) -> None:
        super().__post_init__()
        several = IntegerRange(1, MOST_ROWS)
        check_numbers(
            self,
            num_prompts=several,
            max_new_tokens=IntegerRange(1, MOST_TOKENS),
            rows=several,
            clients=IntegerRange(1, 1000),
            repeats=IntegerRange(1),
            larger_prompts=IntegerRange(0, MOST_ROWS),
            interval=POSITIVE,
        )


@dataclasses.dataclass(frozen=True)
class _Served:
    """A model, and the server that serves it in a thread of this process.

    Attributes:
      model, prepared: the model, and what belongs to it.
      engine: the engine of the server.
      maker: makes the tasks of requests.
      port: the port of the server.
    """

    model: Dream
    prepared: inference.PreparedModel
    engine: Engine
    maker: TaskMaker
    port: int


def read_prompts(settings: ServingSpeed, prepared: inference.PreparedModel) -> list[list[int]]:
    """Returns the token ids of the prompts.

    Raises:
      ValueError: a row has no prompt, or a prompt and its answer are too long for the model.
      OSError: the file cannot be read.
    """
    if settings.prompts is None:
        source = SudokuSource("test", size=settings.num_prompts, min_givens=SUDOKU_GIVENS)
        found = [(f"puzzle {index}", str(source[index].prompt)) for index in range(len(source))]
    else:
        found = [(where, text_field(row, "prompt", where)) for where, row in numbered_records(settings.prompts)]
    prompts = []
    for where, text in found[: settings.num_prompts]:
        ids = inference.encode_prompt(
            text, prepared.template, prepared.tokenizer, instruction=prepared.instruction
        )  # fmt: skip
        inference.check_length(ids, settings.max_new_tokens, prepared.model, where)
        prompts.append(ids)
    return prompts


@contextlib.contextmanager
def serving(settings: ServingSpeed, prepared: inference.PreparedModel, model: Dream) -> Iterator[_Served]:
    """Serves the model on a free port; at the end the server is stopped."""
    longest = min(2048, prepared.model.config.max_position_embeddings)
    longest = max(longest, settings.max_new_tokens)
    maker = TaskMaker(
        tokenizer=prepared.tokenizer,
        template=prepared.template,
        preset="exact",
        limits=Limits(longest=longest, default_tokens=settings.max_new_tokens, most_choices=1),
    )
    most_waiting = 2 * max(settings.rows, *settings.clients)
    engine = Engine(
        model,
        prepared.tokenizer,
        EngineSettings(
            rows=settings.rows, longest=longest, interval=settings.interval, most_waiting=most_waiting
        ),
    )  # fmt: skip
    thread = None
    try:
        app = make_app(engine, maker, AppSettings(model="model", trained_mask=model.trained_mask), 0.0)
        bound, ready = server.bind("127.0.0.1", 0), threading.Event()
        thread = threading.Thread(target=server.run, args=(app, bound, engine, ready.set, 1.0))
        thread.start()
        if not ready.wait(60):
            raise OSError("the server has not started within 60 seconds")
        yield _Served(model, prepared, engine, maker, bound.getsockname()[1])
    finally:
        engine.drain(0.0)  # the server ends with its engine
        if thread is not None:
            thread.join()


def larger(config: DreamConfig) -> Dream:
    """Returns a model of random weights that is twice as deep and twice as wide as `config` says."""
    config = dataclasses.replace(
        config,
        num_hidden_layers=2 * config.num_hidden_layers,
        hidden_size=2 * config.hidden_size,
        intermediate_size=2 * config.intermediate_size,
    )
    return Dream(config, rngs=nnx.Rngs(0))


def bodies_of(
    prompts: Sequence[Sequence[int]], settings: ServingSpeed, preset: Preset, stream: bool
) -> list[dict[str, Any]]:
    """Returns the body of a request for each prompt."""
    fields = {"model": "model", "max_tokens": settings.max_new_tokens, "seed": 0, "dream": {"preset": preset}}
    return [fields | {"prompt": list(ids), "stream": stream} for ids in prompts]


def compile_all(served: _Served, prompts: Sequence[Sequence[int]], settings: ServingSpeed, preset: Preset) -> None:
    """Compiles the programs that the server needs for the prompts."""
    families = set()
    for body in bodies_of(prompts, settings, preset, stream=True):
        (task,) = served.maker.tasks(CompletionRequest.model_validate(body))
        family = served.engine.family(task)
        if family not in families:
            families.add(family)
            served.engine.compile(task)


def throughput(
    served: _Served, prompts: Sequence[Sequence[int]], settings: ServingSpeed, preset: Preset, model: str
) -> dict[str, Any]:
    """Returns the times of `Stream` and of the server for all prompts, the ratio of their rates, and their work.

    `model` is the name of the model in the result. The programs are compiled before.
    """
    compile_all(served, prompts, settings, preset)
    tokenizer = served.prepared.tokenizer
    config = inference.make_sampler(tokenizer, settings.max_new_tokens, preset)
    keys = inference.row_keys([(0, 0)] * len(prompts))  # of the seed 0, as the server makes them
    bodies = bodies_of(prompts, settings, preset, stream=False)

    def through_stream() -> tuple[float, list[str], int]:
        begun = time.perf_counter()
        stream = Stream(served.model, prompts, config, keys, batch_size=settings.rows)
        answers = sorted(stream, key=lambda answer: answer.prompt)
        seconds = time.perf_counter() - begun
        texts = [
            inference.read_answer(
                tokenizer, prompts[answer.prompt], answer.tokens, answer.commit_step, answer.passes
            ).text
            for answer in answers
        ]
        return seconds, texts, stream.forwards

    def through_http() -> tuple[float, list[str], int]:
        before = served.engine.counts.forwards
        seconds, receptions = http_clients.ask(served.port, bodies, 2 * settings.rows)
        return seconds, [reception.text for reception in receptions], served.engine.counts.forwards - before

    ways = {"stream": through_stream, "http": through_http}
    warm = {name: way() for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(settings.repeats):
        for name in ways if number % 2 == 0 else reversed(ways):
            seconds[name].append(ways[name]()[0])
    ratios = [stream / http for stream, http in zip(seconds["stream"], seconds["http"], strict=True)]
    equal = sum(a == b for a, b in zip(warm["stream"][1], warm["http"][1], strict=True))
    return {
        "model": model,
        "preset": preset,
        "answers": len(prompts),
        "clients": 2 * settings.rows,
        "equal_texts": equal,
        "http_over_stream": statistics.median(ratios),
        "all_ratios": ratios,
        **{f"{name}_seconds": report.summarize(seconds[name]) for name in ways},
        **{f"{name}_forwards": warm[name][2] for name in ways},
    }


def load(
    served: _Served, prompts: Sequence[Sequence[int]], settings: ServingSpeed, preset: Preset, clients: int
) -> dict[str, Any]:
    """Returns the waiting times of a number of clients, which all stream their answers."""
    bodies = bodies_of(prompts, settings, preset, stream=True)
    bodies = (bodies * -(-2 * clients // len(bodies)))[: max(len(bodies), 2 * clients)]
    seconds, receptions = http_clients.ask(served.port, bodies, clients)
    return {
        "preset": preset,
        "clients": clients,
        "answers": len(receptions),
        "answers_per_s": len(receptions) / seconds,
        "first_text_s": percentiles([one.first for one in receptions if one.first is not None]),
        "end_s": percentiles([one.last for one in receptions]),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float | int | None]:
    """Returns how many times there are, their median, and the time that 95 % of them do not exceed."""
    p50, p95 = np.percentile(seconds, (50, 95)).tolist() if seconds else (None, None)
    return {"count": len(seconds), "p50": p50, "p95": p95}


def measure(settings: ServingSpeed, console: Console) -> dict[str, Any]:
    """Measures everything, prints two tables and returns the results."""
    prepared = inference.prepare(settings)
    prompts = read_prompts(settings, prepared)
    rates = Table("model", "preset", "answers", "Stream, s", "HTTP, s", "HTTP / Stream", "passes", "equal texts")
    waits = Table("preset", "clients", "answers/s", "first text p50, s", "p95", "end p50, s", "p95")
    found: dict[str, Any] = {"throughput": [], "load": []}
    other_work = report.OtherWork()

    def note_rates(row: dict[str, Any]) -> None:
        found["throughput"].append(row)
        medians = (f"{row[f'{name}_seconds']['median_s']:.2f}" for name in ("stream", "http"))
        passes = f"{row['stream_forwards']} / {row['http_forwards']}"
        equal = f"{row['equal_texts']}/{row['answers']}"
        ratio = f"{row['http_over_stream']:.3f}"
        rates.add_row(row["model"], row["preset"], str(row["answers"]), *medians, ratio, passes, equal)

    with serving(settings, prepared, prepared.load()) as served:
        for preset in settings.presets:
            note_rates(throughput(served, prompts, settings, preset, settings.short_name()))
            for clients in settings.clients:
                row = load(served, prompts, settings, preset, clients)
                found["load"].append(row)
                times = (row[name][part] for name in ("first_text_s", "end_s") for part in ("p50", "p95"))
                cells = ("" if seconds is None else f"{seconds:.3f}" for seconds in times)
                waits.add_row(preset, str(clients), f"{row['answers_per_s']:.1f}", *cells)
    if settings.larger_prompts:
        with serving(settings, prepared, larger(prepared.model.config)) as served:
            few = prompts[: settings.larger_prompts]
            note_rates(throughput(served, few, settings, "exact", "larger, random weights"))
    found["other_work_share"] = other_work.share()
    console.print(rates)
    console.print(waits)
    return found


def main() -> int:
    """Measures, writes the result, and returns the exit status."""
    console = Console()
    try:
        settings = tyro.cli(ServingSpeed, description=__doc__)
        console.print(settings)
        found = measure(settings, console)
        busy = found["other_work_share"]
        if busy > _MOST_BUSY and not settings.allow_busy:
            raise ValueError(
                f"other processes used {busy:.0%} of the cores; wait until they have ended, or pass --allow-busy"
            )
        own = {field.name for field in dataclasses.fields(settings)}
        own -= {field.name for field in dataclasses.fields(inference.ModelSettings)} | {"out", "prompts"}
        described = {name: getattr(settings, name) for name in sorted(own)}
        # Only names are stored, because a path means nothing on another machine.
        described["model"] = settings.short_name()
        described["prompts"] = None if settings.prompts is None else settings.prompts.name
        about = {
            "date": report.now(),
            "hardware": report.hardware() | {"devices": [str(device) for device in jax.devices()]},
            "versions": report.versions(["jax", "jaxlib", "flax", "numpy", "fastapi", "uvicorn"]),
        }
        report.write_json(settings.out, about | {"settings": described} | found)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(f"wrote {settings.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
