"""The HTTP application: OpenAI's API, health, metrics, and the page, over a scheduler."""

import asyncio
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from jaxstages.generation.serving.generation import Generation
from jaxstages.generation.serving.metrics import ServerMetrics
from jaxstages.generation.serving.protocol import ApiError, Request, parse_chat, parse_completion, parse_json
from jaxstages.generation.serving.scheduler import Scheduler
from jaxstages.generation.serving.served_model import ServedModel

PAGE = Path(__file__).parent / "page"

PAGE_POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
"""Content security policy of the page: nothing from any other server."""

PAGE_HEADERS = {
    "Content-Security-Policy": PAGE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # its modules have to be of one version; the browser asks whether its copy is current
}


@dataclass(frozen=True)
class Limits:
    """Limits of the server.

    body_bytes: largest body.
    body_seconds: longest time in which a body arrives.
    answer_seconds: longest time of a request, waiting for a slot included.
    """

    body_bytes: int = 2**20
    body_seconds: float = 20.0
    answer_seconds: float = 300.0


def make_app(
    models: Mapping[str, ServedModel],
    scheduler: Scheduler,
    *,
    key: str = "",
    hosts: list[str] | None = None,
    limits: Limits = Limits(),
) -> Starlette:
    """Make the application.

    Args:
        key: clients send `Authorization: Bearer KEY`; "" asks for none.
        hosts: names in the `Host` header to accept, against DNS rebinding; None accepts every name.
    """
    metrics = ServerMetrics(scheduler)
    handlers = _Handlers(models, scheduler, metrics, limits)

    def checked(handler: Callable[[HttpRequest], Any], needs_key: bool = True) -> Callable[[HttpRequest], Any]:
        async def handle(request: HttpRequest) -> Response:
            if needs_key and key:
                sent = request.headers.get("authorization", "").removeprefix("Bearer ")
                # Starlette reads the bytes of headers as Latin-1.
                if not hmac.compare_digest(sent.encode("latin-1"), key.encode()):
                    raise ApiError(401, "wrong API key: send it as Authorization: Bearer KEY", code="invalid_api_key")
            return await handler(request)

        return handle

    routes = [
        Route("/v1/chat/completions", checked(handlers.chat), methods=["POST"]),
        Route("/v1/completions", checked(handlers.completions), methods=["POST"]),
        Route("/v1/models", checked(handlers.list_models)),
        Route("/v1/models/{name}", checked(handlers.model)),
        Route("/health", checked(handlers.health, needs_key=False)),
        Route("/metrics", checked(handlers.metrics)),
        Mount("/", _Page(directory=PAGE, html=True)),
    ]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)] if hosts else []
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _server_error},
    )
    return app


def _error_response(error: ApiError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.to_json(), error.status, headers)


async def _api_error(_request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _http_error(_request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error_response(ApiError(error.status_code, error.detail))


async def _server_error(_request: HttpRequest, error: Exception) -> Response:
    return _error_response(ApiError(500, f"internal error: {type(error).__name__}"))


class _Handlers:
    """The handlers of the routes."""

    def __init__(
        self, models: Mapping[str, ServedModel], scheduler: Scheduler, metrics: ServerMetrics, limits: Limits
    ) -> None:
        self._models, self._scheduler, self._metrics, self._limits = models, scheduler, metrics, limits

    async def health(self, _request: HttpRequest) -> Response:
        if not self._scheduler.is_running:
            return JSONResponse({"status": "stopped"}, 503)
        busy, waiting = self._scheduler.num_busy, self._scheduler.num_waiting
        return JSONResponse({"status": "ok", "answers": busy, "waiting": waiting})

    async def metrics(self, _request: HttpRequest) -> Response:
        return PlainTextResponse(self._metrics.to_text(), media_type="text/plain; version=0.0.4")

    async def list_models(self, _request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [_model_json(model) for model in self._models.values()]})

    async def model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        if name not in self._models:
            raise ApiError(404, f"there is no model {name[:50]!r}", "model", "model_not_found")
        return JSONResponse(_model_json(self._models[name]))

    async def chat(self, request: HttpRequest) -> Response:
        return await self._answer(request, parse_chat)

    async def completions(self, request: HttpRequest) -> Response:
        return await self._answer(request, parse_completion)

    async def _answer(
        self, http: HttpRequest, parse: Callable[[dict[str, Any], Mapping[str, ServedModel]], Request]
    ) -> Response:
        try:
            content = parse_json(await self._read_body(http))
            # Tokenizing a long prompt takes time, in which other clients' tokens have to flow.
            request = await asyncio.to_thread(parse, content, self._models)
        except ApiError as error:
            self._metrics.count_request("none", error.status)
            raise
        generation = Generation(request, self._scheduler, self._metrics, self._limits.answer_seconds)
        if request.stream:
            return _EventStream(generation)
        return JSONResponse(await generation.complete(http))

    async def _read_body(self, request: HttpRequest) -> bytes:
        """Read the body, within the limits of size and time."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind != "application/json":  # another kind could be sent by any web page, without asking first
            raise ApiError(415, f"Content-Type is {kind[:50]!r}; it must be application/json")
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > self._limits.body_bytes:
                        raise ApiError(413, f"the body is larger than {self._limits.body_bytes:,} bytes")
        except TimeoutError as error:
            raise ApiError(408, f"the body did not arrive within {self._limits.body_seconds:g} s") from error
        except ClientDisconnect as error:
            raise ApiError(400, "the client went away") from error
        return bytes(body)


class _Page(StaticFiles):
    """The files of the page, with its headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS)
        return response


class _EventStream(StreamingResponse):
    """Server-sent events of a generation, which ends when the client goes away."""

    def __init__(self, generation: Generation) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(generation.events(), media_type="text/event-stream", headers=headers)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


def _model_json(model: ServedModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "jaxstages", **model.facts}
