"""An OpenAI-compatible HTTP API on the native runtime: chat about pictures and clips, images, videos, metrics.

    GET  /health, /metrics, /v1/models, /v1/models/NAME
    POST /v1/chat/completions      a question about a picture or clip; streaming
    POST /v1/images/generations, /v1/images/edits, /v1/images/variations
    POST /v1/videos                a job; GET it, GET its /content, DELETE it

Errors have the form that OpenAI's clients turn into their exceptions. The work is done by the Engine, one request at a
time; a client that leaves ends its request.
"""

import hmac
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from lance_quant import __version__
from lance_quant.errors import InputError
from lance_quant.inference.pipeline import Stopped
from lance_quant.serving.chat import add_chat
from lance_quant.serving.engine import Engine, TookTooLong
from lance_quant.serving.guards import add_guards
from lance_quant.serving.images import add_images
from lance_quant.serving.results import Results
from lance_quant.serving.service import ApiError, Metrics, Service
from lance_quant.serving.videos import add_videos

log = logging.getLogger("lance_quant")


def create_app(engine: Engine, api_key: str | None = None, hosts: Sequence[str] | None = None,
               sizes: dict[str, dict[str, int]] | None = None, presets: dict[str, str] | None = None) -> FastAPI:
    """The application.

    Args:
        api_key: that requests must carry as a bearer token; None: none.
        hosts: names by which it may be called (a page on another site that resolves to this machine has another one);
            None: any.
        sizes, presets: see Service.
    """
    app = FastAPI(title="Lance", version=__version__, docs_url="/docs", redoc_url=None)
    service = Service(engine, engine.limits, Metrics(engine), Results(engine.limits.kept_bytes), {}, sizes or {},
                      presets or {})
    engine.observe(service.metrics.job)
    app.state.service = service
    add_guards(app, engine.limits.body_bytes, hosts)
    _add_errors(app)
    _add_key(app, api_key)
    for add in (_add_models, add_chat, add_images, add_videos):
        add(app, service)
    return app


def _add_errors(app: FastAPI) -> None:
    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def known(_: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(InputError)
    async def mistake(_: Request, error: InputError) -> JSONResponse:
        return answer(ApiError(400, str(error)))

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def invalid(_: Request, error: Any) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        said = first["msg"].removeprefix("Value error, ")
        return answer(ApiError(400, f"{place or 'the body'}: {said}", param=place or None))

    @app.exception_handler(TookTooLong)
    async def late(_: Request, error: TookTooLong) -> JSONResponse:
        return answer(ApiError(504, str(error), "timeout_error"))

    @app.exception_handler(Stopped)
    async def stopped(_: Request, error: Stopped) -> JSONResponse:
        return answer(ApiError(503, str(error), "server_error"))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return answer(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=error)
        return answer(ApiError(500, "the server failed on this request; its log says why", "server_error"))


def _add_key(app: FastAPI, api_key: str | None) -> None:
    if api_key is None:
        return

    @app.middleware("http")
    async def require_key(request: Request, go_on: Callable[[Request], Any]) -> Any:
        if request.url.path.startswith(("/v1", "/metrics")) and not request.url.path.startswith("/v1/files/"):
            given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode(), api_key.encode()):
                error = ApiError(401, "wrong or missing API key: send it as Authorization: Bearer KEY",
                                 "authentication_error", code="invalid_api_key")
                return JSONResponse(error.body, 401, headers={"WWW-Authenticate": "Bearer"})
        return await go_on(request)


def _add_models(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    def entry(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "lance-quant"}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        running = service.engine.running
        return {"status": "ok", "models": list(service.engine.models), "waiting": service.engine.waiting,
                "running": None if running is None else running.model}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=Metrics.MEDIA_TYPE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry(name) for name in service.engine.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return entry(service.model(name))

    @app.get("/v1/files/{name}")
    async def file(name: str) -> Response:
        found = service.results.get(name)
        if found is None:
            raise ApiError(404, f"no file {name[:60]!r} is kept: it was never made, or was dropped for newer ones")
        return Response(found.content, media_type=found.media_type)
