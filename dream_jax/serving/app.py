"""The web application: endpoints, keys, limits, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import html
import json
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dream_jax.player import pages
from dream_jax.sampler.config import Preset
from dream_jax.serving.engine import (
    DeviceError,
    Engine,
    EngineError,
    Job,
    NotAcceptingError,
    QueueFullError,
    TimeLimitError,
)
from dream_jax.serving.metrics import CONTENT_TYPE, ServerMetrics
from dream_jax.serving.programs import TooManySettingsError
from dream_jax.serving.requests import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    InfillRequest,
    RequestError,
    TaskMaker,
    parse,
)
from dream_jax.serving.responses import Reply
from dream_jax.serving.tasks import Update

_PING_SECONDS = 10.0  # a stream without news gets a comment after this time, so that nothing on the way closes it
_SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AppSettings:
    """The settings of the web application.

    Attributes:
      model: the name of the model.
      trained_mask: name of the attention mask of the model.
      keys: the keys of which a client must send one; empty if anyone may ask.
      hosts: values of the Host header (without port) that are answered; empty for all. A page of another site can make
        a browser send requests to a local server under its own host name; they are refused.
      most_bytes: maximum number of bytes of a request body.
      body_seconds: seconds within which a body must arrive.
      most_held_bytes: maximum number of bytes of all bodies that are being received or answered.
    """

    model: str
    trained_mask: str
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    most_bytes: int = 4 * 2**20
    body_seconds: float = 20.0
    most_held_bytes: int = 128 * 2**20


def make_app(engine: Engine, maker: TaskMaker, settings: AppSettings, drain_seconds: float | None = None) -> FastAPI:
    """Returns the application of an engine.

    Args:
      engine: the engine; it is drained when the application ends.
      maker: makes tasks of requests.
      settings: the settings of the application.
      drain_seconds: how long accepted requests are worked on when the application ends; None without a limit.
    """
    metrics = ServerMetrics(engine)
    created = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.drain, drain_seconds)

    app = FastAPI(
        title="dream_jax",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        description="A diffusion language model behind OpenAI's API; see docs/serve.md.",
    )

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        return _error(error.status, str(error), param=error.param, code=error.code)

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path[:80]}"
        return _error(
            error.status_code, f"{where}: {error.detail}; GET /docs lists the endpoints", headers=error.headers
        )

    @app.get("/health", summary="Whether the server accepts requests")
    async def health() -> Response:
        ready = engine.state == "running"
        body = {
            "status": "ok" if ready else engine.state,
            "model": settings.model,
            "busy_rows": engine.counts.busy_rows,
            "waiting": engine.counts.waiting,
        }
        return JSONResponse(body, 200 if ready else 503)

    @app.get("/metrics", summary="Numbers for Prometheus")
    async def numbers() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    def described() -> dict[str, Any]:
        extension = {
            "template": maker.template,
            "instruction": maker.instruction,
            "preset": maker.preset,
            "presets": list(Preset.__args__),  # type: ignore[attr-defined]
            "max_length": maker.limits.longest,
            "max_tokens": maker.limits.default_tokens,
            "max_choices": maker.limits.most_choices,
            "mask_token": "<|mask|>",
            "trained_mask": settings.trained_mask,
        }
        return {
            "id": settings.model, "object": "model", "created": created, "owned_by": "dream_jax", "dream": extension
        }  # fmt: skip

    @app.get("/v1/models", summary="The model")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [described()]})

    @app.get("/v1/models/{name:path}", summary="The model, by its name")
    async def model(name: str) -> Response:
        _check_model(name, settings.model)
        return JSONResponse(described())

    async def answer(
        request: Request, kind: type[ChatRequest] | type[CompletionRequest] | type[InfillRequest]
    ) -> Response:
        begun = time.monotonic()
        asked: AnyRequest = parse(kind, await request.body())
        _check_model(asked.model, settings.model)
        tasks = await asyncio.to_thread(maker.tasks, asked)
        reply = Reply(asked, tasks, maker.tokenizer, settings.model)
        updates: asyncio.Queue[tuple[int, Update | EngineError]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def report(index: int, update: Update | EngineError) -> None:
            # RuntimeError: the loop has ended, and with it the client.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(updates.put_nowait, (index, update))

        try:
            jobs = engine.submit(tasks, report)
        except EngineError as error:
            return _engine_error(error)
        except ValueError as error:
            code = "too_many_settings" if isinstance(error, TooManySettingsError) else None
            raise RequestError(str(error), "dream", code=code) from error
        answering = _Answering(engine, jobs, updates, reply, metrics, begun)
        if asked.streams:
            return EventStream(answering)
        return await _unless_gone(request, answering)

    @app.post("/v1/chat/completions", summary="The answer to a chat", openapi_extra=_body(ChatRequest))
    async def chat(request: Request) -> Response:
        return await answer(request, ChatRequest)

    @app.post(
        "/v1/completions", summary="The continuation of a text, or what fits in front of a suffix",
        openapi_extra=_body(CompletionRequest),
    )  # fmt: skip
    async def completions(request: Request) -> Response:
        return await answer(request, CompletionRequest)

    @app.post("/v1/infill", summary="A text whose gaps are filled in", openapi_extra=_body(InfillRequest))
    async def infill(request: Request) -> Response:
        return await answer(request, InfillRequest)

    @app.get("/docs", include_in_schema=False)
    async def documentation() -> Response:
        return HTMLResponse(_documentation(app.openapi()), headers={"content-security-policy": "default-src 'none'"})

    page = pages.chat_page()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": page_policy(page)})

    app.add_middleware(_Guard, settings=settings, metrics=metrics)
    return app


def page_policy(page: str) -> str:
    """Returns the Content-Security-Policy of a page: its own inline scripts run, and nothing else is loaded."""
    return (
        f"default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src {pages.script_hashes(page)}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Answering:
    """The answers to a request while they are made.

    Args:
      engine: the engine.
      jobs: the jobs of the request.
      updates: the updates of the jobs, with their indices.
      reply: collects the answers.
      metrics: the numbers of the server.
      begun: the time at which the request came.
    """

    def __init__(
        self,
        engine: Engine,
        jobs: Sequence[Job],
        updates: asyncio.Queue[tuple[int, Update | EngineError]],
        reply: Reply,
        metrics: ServerMetrics,
        begun: float,
    ):
        self._engine, self._jobs, self._updates, self._reply = engine, jobs, updates, reply
        self._metrics, self._begun = metrics, begun

    def cancel(self) -> None:
        """Frees the rows of the answers that are not finished."""
        for job in self._jobs:
            job.cancel()
        self._engine.wake()

    async def whole(self) -> Response:
        """Returns the response when all answers are finished, or the error of the first answer that fails."""
        while not self._reply.finished:
            index, update = await self._updates.get()
            if isinstance(update, EngineError):
                self.cancel()
                return _engine_error(update)
            self._reply.add(index, update)
        self._metrics.last.observe(time.monotonic() - self._begun)
        return JSONResponse(self._reply.whole())

    async def events(self) -> AsyncIterator[str]:
        """Yields the server-sent events of a stream."""
        for chunk in self._reply.opening():
            yield _data(chunk)
        first = True
        while not self._reply.finished:
            try:
                index, update = await asyncio.wait_for(self._updates.get(), _PING_SECONDS)
            except TimeoutError:
                yield ": waiting\n\n"
                continue
            if isinstance(update, EngineError):
                self.cancel()
                yield _data(json.loads(bytes(_engine_error(update).body)))
                return
            self._reply.add(index, update)
            if first and update.text:
                self._metrics.first.observe(time.monotonic() - self._begun)
                first = False
            for chunk in self._reply.chunks(index, update):
                yield _data(chunk)
        self._metrics.last.observe(time.monotonic() - self._begun)
        for chunk in self._reply.closing():
            yield _data(chunk)
        yield "data: [DONE]\n\n"


class EventStream(Response):
    """A response of server-sent events that ends when the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, answering: _Answering):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        sending = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except OSError:
            pass  # the connection broke while an event was sent
        finally:
            self._answering.cancel()
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._answering.events():
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _unless_gone(request: Request, answering: _Answering) -> Response:
    """Returns the whole answer; if the client goes away before, its rows are freed."""
    made = asyncio.create_task(answering.whole())
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({made, gone}, return_when=asyncio.FIRST_COMPLETED)
        if made.done():
            return made.result()
        return Response(status_code=499)  # nobody reads it; proxies log this status for clients that went away
    finally:
        answering.cancel()
        for task in (made, gone):
            task.cancel()
        await asyncio.gather(made, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Guard:
    """Checks keys, hosts, content types and the size of bodies before a request reaches an endpoint; counts requests.

    Args:
      app: the application.
      settings: the settings of the application.
      metrics: the numbers of the server.
    """

    def __init__(self, app: ASGIApp, settings: AppSettings, metrics: ServerMetrics):
        self._app, self._settings, self._metrics = app, settings, metrics
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.keys]
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        body = bytearray()

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(name.encode(), value.encode()) for name, value in _SAFE_HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None and scope["method"] == "POST":
                try:
                    await asyncio.wait_for(self._read_body(receive, body), self._settings.body_seconds)
                    receive = _replayed(bytes(body), receive)
                except TimeoutError:
                    seconds = self._settings.body_seconds
                    refusal = _error(408, f"the body did not arrive within {seconds:g} seconds; send it at once")
                except RequestError as error:
                    again = {"retry-after": "5"} if error.status == 429 else None
                    refusal = _error(error.status, str(error), code=error.code, headers=again)
                except _GoneError:
                    return
            if refusal is not None:
                refusal.headers["connection"] = "close"  # what is left of the body is not read
            await (self._app if refusal is None else refusal)(scope, receive, send_and_note)
        finally:
            self._held_bytes -= len(body)
            known = scope["path"] if scope["path"] in _PATHS else "other"
            self._metrics.requests.labels(known, str(status)).inc()

    def _refusal(self, scope: Scope) -> Response | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1")).lower()
        if self._settings.hosts and host not in self._settings.hosts:
            return _error(403, f"the host {host[:80]!r} is not served; use {' or '.join(self._settings.hosts)}")
        path = scope["path"]
        if self._keys and (path.startswith("/v1/") or path in ("/metrics", "/openapi.json")):
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            found = hashlib.sha256(key.strip()).digest()
            # Every key is compared, so that the time tells nothing.
            matches = [hmac.compare_digest(found, known) for known in self._keys]
            if kind.lower() != b"bearer" or not any(matches):
                return _error(
                    401,
                    "the key is missing or wrong; send the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                )
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            # Pages of other sites cannot send this type without being allowed to.
            if kind != b"application/json":
                return _error(415, f"the content type is {kind[:80].decode('latin-1')!r}; send application/json")
            if headers.get(b"content-encoding", b"identity").lower() != b"identity":
                return _error(415, "compressed bodies are not read; send the JSON as it is")
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or int(length[:20]) > self._settings.most_bytes:
                return _error(413, self._too_large())
        return None

    async def _read_body(self, receive: Receive, body: bytearray) -> None:
        """Appends the arriving bytes to `body`; they count as held until the request has been answered.

        Raises:
          RequestError: this body is too large, or all bodies together are.
          _GoneError: the client has disconnected.
        """
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            piece = message.get("body", b"")
            if len(body) + len(piece) > self._settings.most_bytes:
                raise RequestError(self._too_large(), status=413)
            if self._held_bytes + len(piece) > self._settings.most_held_bytes:
                raise RequestError(
                    f"the requests that are being answered hold {self._settings.most_held_bytes} bytes; try again later",
                    status=429,
                    code="too_many_bytes",
                )
            body += piece
            self._held_bytes += len(piece)
            if not message.get("more_body", False):
                return

    def _too_large(self) -> str:
        return f"the body is larger than {self._settings.most_bytes} bytes; shorten the request"


class _GoneError(Exception):
    """The client went away before its request was complete."""


_PATHS = frozenset(
    ("/", "/docs", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/infill")
)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Returns a function that gives the body first, and then what the connection gives."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _check_model(asked: str, model: str) -> None:
    if asked != model:
        raise RequestError(
            f"model: {asked[:80]!r} is not served here; use {model!r}", "model", status=404, code="model_not_found"
        )


def _error(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = message.encode("utf-8", "replace").decode()  # a path may have half of a surrogate pair
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers=dict(headers or {}))


def _engine_error(error: EngineError) -> JSONResponse:
    """Returns the response for an error of the engine. Only a full or an ending server is worth another try."""
    if isinstance(error, QueueFullError):
        return _error(429, str(error), code="queue_full", headers={"retry-after": str(error.retry_after)})
    if isinstance(error, NotAcceptingError):
        return _error(503, str(error), code="not_accepting", headers={"retry-after": "5"})
    again = {"x-should-retry": "false"}
    if isinstance(error, TimeLimitError):
        return _error(504, str(error), code="time_limit", headers=again)
    assert isinstance(error, DeviceError)
    return _error(500, str(error), code="device_error", headers=again)


def _data(chunk: Mapping[str, Any]) -> str:
    # Escaped, because some clients take U+2028 and others for the end of a line.
    return f"data: {json.dumps(chunk, ensure_ascii=True, separators=(',', ':'))}\n\n"


def _body(kind: type[ChatRequest] | type[CompletionRequest] | type[InfillRequest]) -> dict[str, Any]:
    """Returns the description of a request body for the OpenAPI schema."""
    schema = kind.model_json_schema(ref_template=f"#/x-schemas/{kind.__name__}/{{model}}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _documentation(schema: Mapping[str, Any]) -> str:
    """Returns a page without scripts that lists the endpoints and the fields of their bodies."""
    return "<!doctype html><html lang=en><meta charset=utf-8><title>dream_jax</title>" + "".join(_listed(schema))


def _listed(schema: Mapping[str, Any]) -> Iterator[str]:
    yield "<h1>dream_jax</h1><p>A diffusion language model behind OpenAI's API. Schema: <a href=/openapi.json>"
    yield "/openapi.json</a></p>"
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield f"<h2>{method.upper()} {html.escape(path)}</h2><p>{html.escape(operation.get('summary', ''))}</p>"
            body = operation.get("requestBody")
            if body is None:
                continue
            fields = body["content"]["application/json"]["schema"]
            yield f"<p>{html.escape(fields.get('description', ''))}</p><ul>"
            for name, field in fields["properties"].items():
                needed = " (required)" if name in fields.get("required", ()) else ""
                shown = json.dumps({key: value for key, value in field.items() if key not in ("title", "default")})
                yield f"<li><b>{html.escape(name)}</b>{needed}: <code>{html.escape(shown)}</code></li>"
            yield "</ul>"
