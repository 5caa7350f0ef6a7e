"""Thumbnails for a page: pictures and strips of frames as data URIs, so that the page needs no other file."""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

_PICTURE, _FRAME = 320, 160  # longest side in pixels
_FRAMES = 5  # of a clip


class Thumbnail(NamedTuple):
    """A picture in a page."""

    uri: str
    width: int
    height: int


def thumbnail(frames: Sequence[Image.Image]) -> Thumbnail:
    """A picture, or frames of a clip from first to last, side by side."""
    strip = _strip(frames)
    buffer = io.BytesIO()
    strip.save(buffer, "PNG")
    return Thumbnail(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", *strip.size)


def _strip(frames: Sequence[Image.Image]) -> Image.Image:
    chosen = sorted({round(step * (len(frames) - 1) / (_FRAMES - 1)) for step in range(_FRAMES)})
    kept = [frames[index].convert("RGB") for index in chosen]
    side = _PICTURE if len(kept) == 1 else _FRAME
    for frame in kept:
        frame.thumbnail((side, side))
    strip = Image.new("RGB", (kept[0].width * len(kept), kept[0].height))
    for column, frame in enumerate(kept):
        strip.paste(frame, (column * frame.width, 0))
    return strip
