"""What stands before the routes: the size of a body, the name that the server is called by, and other sites' pages.

A server on one's own machine can be reached by every page that a browser opens. Names that resolve to 127.0.0.1 (DNS
rebinding) and requests that another origin's page makes are refused.
"""

from collections.abc import Sequence
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}},
                        status)


class BodyLimit:
    """Answers 413 to bodies of more than `most` bytes, also where no length is announced."""

    def __init__(self, app: ASGIApp, most: int):
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._most:
            await _error(413, self._said())(scope, receive, send)
            return
        came = 0

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self._most:
                raise HTTPException(413, self._said())  # the application answers it
            return message

        await self._app(scope, counted, send)

    def _said(self) -> str:
        return f"the body is larger than {self._most / 1e6:.0f} MB, this server's limit"


class SameOrigin:
    """Answers 403 to what a page of another site sends; pages of this server and other programs go through."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            origin, host = headers.get(b"origin", b"").decode("latin-1"), headers.get(b"host", b"").decode("latin-1")
            if origin and scope["method"] not in ("GET", "HEAD") and urlsplit(origin).netloc != host:
                await _error(403, f"a page of {origin} must not use this server")(scope, receive, send)
                return
        await self._app(scope, receive, send)


def add_guards(app: FastAPI, body_bytes: int, hosts: Sequence[str] | None) -> None:
    """Put them in front of all routes of an application."""
    app.add_middleware(BodyLimit, most=body_bytes)
    app.add_middleware(SameOrigin)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
