"""From loaded models to an application that listens."""

import contextlib
import logging
import socket
from collections.abc import Iterator, Sequence

from fastapi import FastAPI

from lance_quant.errors import InputError, require_real, require_whole
from lance_quant.serving.api import create_app
from lance_quant.serving.engine import Engine, Limits
from lance_quant.serving.loading import Loaded

log = logging.getLogger("lance_quant")


def limits_of(waiting: int, seconds: float, body_mb: int) -> Limits:
    """Limits from the command line; InputError for numbers out of range."""
    return Limits(waiting=require_whole("--waiting", waiting, 0, 10_000),
                  seconds=require_real("--max_seconds", seconds, 1, 1e6),
                  body_bytes=require_whole("--max_body_mb", body_mb, 1, 10_000) * 1_000_000)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded.

    Raises:
        InputError: the address is none, or taken.
    """
    require_whole("--port", port, 0, 65535)
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise InputError(f"cannot listen on {host} port {port} ({error.strerror or error}): choose another --host or "
                         "--port") from None
    return listener


def announce(listener: socket.socket, loaded: Loaded, page: bool) -> None:
    """Say where the server is, and what it serves."""
    host, port = listener.getsockname()[:2]
    name = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    log.info("serving %s at http://%s:%d/v1%s", ", ".join(loaded.pipelines), name, port,
             f", the page at http://{name}:{port}/" if page else "")


@contextlib.contextmanager
def application(loaded: Loaded, limits: Limits, api_key: str | None, hosts: Sequence[str] | None,
                page: bool) -> Iterator[FastAPI]:
    """The application with its worker, which ends with the block.

    Raises:
        InputError: the page is wanted and Gradio is not installed.
    """
    engine = Engine(loaded.pipelines, limits)
    try:
        app = create_app(engine, api_key, hosts, loaded.sizes, loaded.presets)
        if page:
            app = _with_page(app, loaded, api_key)
        yield app
    finally:
        engine.close()


def _with_page(app: FastAPI, loaded: Loaded, api_key: str | None) -> FastAPI:
    try:
        import gradio
    except ImportError:
        raise InputError("gradio is not installed: pip install -r requirements-serve.txt, or serve the API alone with "
                         "--no_page") from None
    from lance_quant.serving.page import build, style

    auth = None if api_key is None else ("lance", api_key)
    return gradio.mount_gradio_app(app, build(app.state.service, loaded), path="/", auth=auth, **style())
