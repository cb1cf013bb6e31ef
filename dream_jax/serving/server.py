"""Runs the web application on a port until a signal ends it."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn
from fastapi import FastAPI

from dream_jax import inference
from dream_jax.serving.connections import BoundedConnection, most_connections
from dream_jax.serving.engine import Engine
from dream_jax.serving.requests import TaskMaker
from dream_jax.serving.tasks import Gap, Task


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound to an address but does not accept connections yet.

    Raises:
      OSError: the address is not of this machine, or the port is in use; the message names them.
    """
    wrong = f"cannot serve at {host}, port {port}: %s; pass another --host or --port"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise OSError(wrong % error.strerror) from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(wrong % error.strerror) from error
    return bound


def run(app: FastAPI, bound: socket.socket, engine: Engine, on_ready: Callable[[], None], drain_seconds: float) -> bool:
    """Serves until SIGINT or SIGTERM, then refuses new requests and finishes the accepted ones.

    Args:
      app: the application.
      bound: the socket to listen at.
      engine: the engine; the server ends with it.
      on_ready: called without arguments when connections are accepted.
      drain_seconds: how long accepted requests are worked on after the signal.

    Returns:
      Whether the engine did not fail.
    """
    config = uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        http=BoundedConnection,
        log_level="error",  # warnings would fill the log, because every malformed request causes one
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(drain_seconds) + 1,
    )
    BoundedConnection.most = most_connections()
    server = uvicorn.Server(config)

    async def watched() -> None:
        serving = asyncio.create_task(server.serve([bound]))
        told = False
        while not serving.done():
            if server.started and not told:
                on_ready()
                told = True
            if engine.state in ("failed", "stopped"):
                server.should_exit = True
            await asyncio.wait({serving}, timeout=0.05 if not told else 0.5)
        serving.result()

    asyncio.run(watched())
    return engine.state != "failed"


def reserve_programs(engine: Engine, maker: TaskMaker) -> None:
    """Reserves the programs of the default preset for every length, see `Engine.reserve`.

    Otherwise requests with unusual settings could use up all programs.
    """
    # The shortest row has one token of a prompt and one new token.
    engine.reserve(task for length in engine.lengths if length > 1 for task in _plain_tasks(maker, length))


def compile_programs(engine: Engine, maker: TaskMaker, lengths: Sequence[int]) -> None:
    """Compiles the programs of the default preset for rows of these lengths, at temperature 0, with a temperature, and
    with a temperature and top_p.

    Raises:
      ValueError: a length is below 2, or longer than the longest row; or there are too many programs.
      jax.errors.JaxRuntimeError: a program cannot be compiled.
    """  # fmt: skip
    for length in lengths:
        if length < 2:
            raise ValueError(f"a row of {length} tokens has no place for a prompt and an answer; pass at least 2")
        for task in _plain_tasks(maker, length):
            engine.compile(task)


def _plain_tasks(maker: TaskMaker, length: int) -> Iterator[Task]:
    """Yields tasks of the default preset: at temperature 0, with a temperature, and with a temperature and top_p."""
    for temperature, top_p in ((0.0, None), (1.0, None), (1.0, 0.5)):
        config = inference.make_sampler(
            maker.tokenizer,
            length - 1,
            maker.preset,
            trained_mask=maker.trained_mask,
            temperature=temperature,
            top_p=top_p,
        )
        yield Task(prompt=(0,), config=config, seed=0, sample=0, pieces=(Gap(start=1, length=length - 1),))
