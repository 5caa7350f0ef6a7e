"""What clients send: forms and JSON, pictures and clips as data: URLs or uploads; nothing is fetched for a client.

A server that opened the addresses it is sent would read its own network and disk for strangers (SSRF), so addresses
other than data: URLs are refused.
"""

import base64
import binascii
import contextlib
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import av
from fastapi import Request, UploadFile
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from lance_quant.errors import InputError
from lance_quant.lance.media.vision import open_image
from lance_quant.serving.engine import Limits
from lance_quant.serving.openai_schemas import Drawing
from lance_quant.serving.service import ApiError, Service

Body = TypeVar("Body", bound=BaseModel)


def bytes_of(url: str, what: str) -> bytes:
    """The content of a base64 data: URL.

    Raises:
        InputError: another address, or no base64.
    """
    if not url.startswith("data:"):
        shown = url.split(":", 1)[0][:20]
        raise InputError(f"{what} is a {shown!r} address, and this server opens no addresses: send the file itself as "
                         "data:image/png;base64,...")
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InputError(f"{what} must be a data: URL with base64, as data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{what} holds no base64") from None


def picture(content: bytes, limits: Limits, what: str) -> Image.Image:
    """A picture file's content as RGB.

    Raises:
        InputError: no picture, or more pixels than a request may send.
    """
    with _on_disk(content, ".picture") as path:
        try:
            with Image.open(path) as image:
                pixels = image.width * image.height
        except Exception:  # open_image names what is wrong
            pixels = 0
        if pixels > limits.pixels:
            raise InputError(f"{what} has {pixels / 1e6:.0f} million pixels, and {limits.pixels / 1e6:.0f} is this "
                             "server's limit: make it smaller")
        try:
            return open_image(path)
        except InputError as error:
            raise InputError(str(error).replace(str(path), what)) from None


@contextlib.contextmanager
def clip(content: bytes, limits: Limits, what: str) -> Iterator[Path]:
    """A clip's content as a file that is there while the block runs.

    Raises:
        InputError: no clip, or frames of more pixels than a request may send.
    """
    with _on_disk(content, ".clip") as path:
        try:
            with open(path, "rb") as file, av.open(file, "r") as container:
                streams = container.streams.video
                pixels = streams[0].width * streams[0].height if streams else 0
        except (av.FFmpegError, OSError):
            raise InputError(f"{what} is no video that can be read") from None
        if not 0 < pixels <= limits.pixels:
            raise InputError(f"{what} has frames of {pixels / 1e6:.0f} million pixels; up to {limits.pixels / 1e6:.0f} "
                             "are read")
        yield path


@contextlib.contextmanager
def _on_disk(content: bytes, suffix: str) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(suffix, "lance-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def as_bytes(image: Image.Image, fmt: str, settings: str) -> bytes:
    """A picture's file content in "png", "jpeg" or "webp"; PNG holds the settings as text, under "lance"."""
    out = io.BytesIO()
    if fmt == "png":
        info = PngInfo()
        info.add_itxt("lance", settings)
        image.save(out, "PNG", pnginfo=info)
    else:
        image.save(out, fmt.upper(), quality=95)
    return out.getvalue()


async def read_form(request: Request, names: Sequence[str], refused: str = "") -> tuple[dict[str, Any], list[bytes]]:
    """Fields of a form (or of JSON, with files as data: URLs), and the content of its files of these names."""
    fields: dict[str, Any] = {}
    files: list[bytes] = []
    if request.headers.get("content-type", "").startswith("application/json"):
        try:
            given = await request.json()
        except (ValueError, RecursionError):
            raise ApiError(400, "the body is no JSON") from None
        pairs = list(given.items()) if isinstance(given, dict) else []
    else:
        try:
            pairs = list((await request.form()).multi_items())
        except (HTTPException, ValueError) as error:
            raise ApiError(400, f"the body is no form: {error}") from None
    for name, value in pairs:
        if name == refused and value:
            raise ApiError(400, f"{name} is not supported: Lance edits whole pictures", param=name)
        if name in names:
            files += [await one.read() if isinstance(one, UploadFile) or hasattr(one, "read")
                      else bytes_of(str(one.get("url", "") if isinstance(one, dict) else one), name)
                      for one in (value if isinstance(value, list) else [value])]
        elif isinstance(value, str | int | float | bool | None):
            fields[name] = value
    return fields, files


def parsed(kind: type[Body], fields: dict[str, Any]) -> Body:
    """The fields as a request, checked."""
    return kind.model_validate(fields)


def require_steps(service: Service, body: Drawing) -> None:
    """Refuse more denoising steps than a request may have."""
    if body.num_inference_steps > service.limits.steps:
        raise ApiError(400, f"num_inference_steps {body.num_inference_steps} is above {service.limits.steps}, this "
                            "server's limit", param="num_inference_steps")
