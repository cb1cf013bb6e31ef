"""Serves a model to a browser and to OpenAI clients: `python serve.py --model runs/demo/model`."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys

import jax
import tyro
from rich.console import Console

from dream_jax import inference
from dream_jax.bounds import MOST_ROWS, MOST_TOKENS, POSITIVE, IntegerRange, check_numbers
from dream_jax.device_memory import explained, take_memory
from dream_jax.paths import check_local
from dream_jax.sampler import Preset
from dream_jax.tokenizer import check_texts

try:
    from dream_jax.serving import app, server
    from dream_jax.serving.engine import Engine, EngineSettings
    from dream_jax.serving.requests import Limits, TaskMaker
except ModuleNotFoundError as missing:
    if (missing.name or "").startswith("dream_jax"):
        raise
    sys.exit(f"error: serve.py needs the package {missing.name}; install the extra: pip install -e '.[serve]'")

_SHORTEST_KEY = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeSettings(inference.ModelSettings):
    """The settings of `serve.py`."""

    host: str = "127.0.0.1"
    """address to listen at; every address but those of this machine needs --api-key-file or --open-to-network"""
    port: int = 8000
    """port to listen at; 0: a free one"""
    api_key_file: pathlib.Path | None = None
    """file of keys, one per line; clients must send one of them"""
    open_to_network: bool = False
    """serve anyone who can reach --host, without keys"""
    name: str | None = None
    """name of the model in the API; by default that of its directory"""
    preset: Preset = "balanced"
    """preset of requests that name none"""
    max_tokens: int = 128
    """number of new tokens of requests that name none"""
    max_length: int | None = None
    """maximum number of tokens of a prompt and its answer; by default 2048, or what the model allows if that is less"""
    max_choices: int = 16
    """maximum number of answers to one request"""
    rows: int = 8
    """number of answers that are denoised together in a batch"""
    max_batches: int = 4
    """maximum number of batches that take turns; requests with other lengths or settings need other batches"""
    max_waiting: int = 64
    """maximum number of answers that wait; further requests are refused with the time to come back"""
    max_programs: int = 64
    """maximum number of combinations of lengths and settings for which programs are compiled"""
    compile_lengths: tuple[int, ...] = ()
    """lengths of rows (prompt and answer) for which programs of the default preset are compiled before the start"""
    time_limit: float = 600.0
    """seconds within which a request must be finished, waiting included"""
    interval: float = 0.1
    """seconds after which the compiled loop returns, so that text is sent and rows are replaced"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_local(self)
        check_numbers(
            self,
            port=IntegerRange(0, 65535),
            max_tokens=IntegerRange(1, MOST_TOKENS),
            max_length=IntegerRange(2, MOST_TOKENS),
            max_choices=IntegerRange(1, MOST_ROWS),
            rows=IntegerRange(1, MOST_ROWS),
            max_batches=IntegerRange(1),
            max_waiting=IntegerRange(1),
            max_programs=IntegerRange(1),
            compile_lengths=IntegerRange(2, MOST_TOKENS),
            time_limit=POSITIVE,
            interval=POSITIVE,
        )
        if self.api_key_file is not None and self.open_to_network:
            raise ValueError("give either --api-key-file or --open-to-network")
        if self.api_key_file is None and not self.open_to_network and not server.is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} can be reached from outside this machine: pass --api-key-file FILE, or "
                "--open-to-network to serve without keys"
            )
        self.engine(self.max_length or 2048)  # raises ValueError if a setting is outside its range

    def engine(self, longest: int) -> EngineSettings:
        """Returns the settings of the engine, whose longest row has `longest` tokens."""
        return EngineSettings(
            rows=self.rows,
            most_batches=self.max_batches,
            most_waiting=self.max_waiting,
            most_programs=self.max_programs,
            longest=longest,
            interval=self.interval,
            time_limit=self.time_limit,
        )


def main() -> int:
    try:
        check_texts(sys.argv[1:])
        settings = tyro.cli(ServeSettings, description=__doc__)
        take_memory()
        return run(settings)
    except jax.errors.JaxRuntimeError as error:
        remedies = functools.partial(inference.memory_remedies, settings, "--rows", settings.rows)
        print(f"error: {explained(error, remedies)}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def run(settings: ServeSettings) -> int:
    """Serves until a signal; returns the exit code: 0, or 1 after a failure of the engine."""
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    for field in dataclasses.fields(settings):
        if (value := getattr(settings, field.name)) != field.default:
            console.print(f"{field.name}: {value!r}", markup=False)
    keys = () if settings.api_key_file is None else read_keys(settings.api_key_file)
    prepared = inference.prepare(settings)
    if prepared.note is not None:
        console.print(prepared.note, markup=False)
    longest = model_length(settings, prepared.model.config.max_position_embeddings)
    limits = Limits(longest=longest, default_tokens=settings.max_tokens, most_choices=settings.max_choices)
    maker = TaskMaker(
        tokenizer=prepared.tokenizer,
        template=prepared.template,
        preset=settings.preset,
        limits=limits,
        instruction=prepared.instruction,
        trained_mask=prepared.model.trained_mask,
    )
    with server.bind(settings.host, settings.port) as bound:
        address = f"http://{settings.host}:{bound.getsockname()[1]}"
        model = prepared.load()
        engine = Engine(model, prepared.tokenizer, settings.engine(longest))
        try:
            server.reserve_programs(engine, maker)
            server.compile_programs(engine, maker, settings.compile_lengths)
            local = server.is_loopback(settings.host) and not keys
            described = app.AppSettings(
                model=model_name(settings),
                trained_mask=model.trained_mask,
                keys=keys,
                hosts=("127.0.0.1", "localhost", "[::1]") if local else (),
            )
            application = app.make_app(engine, maker, described, settings.time_limit)
            ready = lambda: console.print(
                f"serving {described.model} at {address} (documentation: {address}/docs); Ctrl-C ends it"
            )
            fine = server.run(application, bound, engine, ready, settings.time_limit)
        finally:
            engine.drain(0.0)
    return 0 if fine else 1


def model_length(settings: ServeSettings, allowed: int) -> int:
    """Returns the maximum number of tokens of a row. Raises ValueError if the model does not allow that many."""
    if settings.max_length is None:
        return min(2048, allowed)
    if settings.max_length > allowed:
        raise ValueError(f"--max-length {settings.max_length} is more than the {allowed} tokens that the model allows")
    return settings.max_length


def model_name(settings: ServeSettings) -> str:
    """Returns the name of the model in the API."""
    if settings.name is not None:
        return settings.name
    return settings.short_name()


def read_keys(path: pathlib.Path) -> tuple[str, ...]:
    """Returns the keys in a file; empty lines and lines that begin with # are left out.

    Raises:
      ValueError: the file has no key, or a key that is too short or has spaces.
      OSError: the file cannot be read.
    """
    keys = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if len(key) < _SHORTEST_KEY or not key.isascii() or len(key.split()) > 1:
            raise ValueError(
                f"{path}:{number}: a key needs at least {_SHORTEST_KEY} ASCII characters without spaces; one can be made "
                'by: python -c "import secrets; print(secrets.token_urlsafe())"'
            )
        keys.append(key)
    if not keys:
        raise ValueError(f"{path} has no key; write one key into each line")
    return tuple(keys)


if __name__ == "__main__":
    sys.exit(main())
