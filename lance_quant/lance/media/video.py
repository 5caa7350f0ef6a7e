"""Video decoding and encoding through PyAV: RGB frames at the model's rate in, H.264 out.

The model sees and makes 12 frames a second. A longer clip than 6 seconds is seen at a lower rate.
"""

import contextlib
import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, overload

import av
import numpy as np
from PIL import Image

from lance_quant.errors import InputError
from lance_quant.storage.atomic import is_file

log = logging.getLogger("lance_quant")

FPS = 12
_LONGEST = 6.0  # seconds
_UNKNOWN_FPS = 24  # taken where a file does not say
_FASTEST = 1000  # frames a second of a real clip: files without a rate give that of their clock, up to 90 000
_QUALITY = "14"  # x264's constant rate factor: no visible loss


def frame_indices(total: int, fps: float) -> list[int]:
    """Which of a clip's `total` frames the model sees; the count is one more than a multiple of four.

    The rule is the official one: a count that is a multiple of four loses three frames, all others go down to the
    next such count, and the chosen frames are spread evenly (frames of a clip below 12 per second are repeated).

    Raises:
        InputError: the clip is no longer than 1/24 second.
    """
    fps = int(round(fps)) or fps  # officially none is below 1
    count = int(round(min(total / fps, _LONGEST) * FPS)) if fps else 0
    if count == 0:
        raise InputError(f"{total} frames at {fps} per second are too few: Lance needs more than 1/24 second")
    count = count // 4 * 4 + 1 if count % 4 else count - 3
    return np.linspace(0, total - 1, count).astype(int).tolist()


class Look(NamedTuple):
    """How the frames of a clip are shown: as its display matrix says, by right angles (others are left alone).

    size: width and height; frames of another size, in files whose size changes, are scaled to it
    swap: rows and columns change places
    mirror, flip: after that, left and right do, and top and bottom
    """

    size: tuple[int, int]
    swap: bool
    mirror: bool
    flip: bool


class Clip(Sequence[Image.Image]):
    """Frames of a clip file, as RGB of one size, decoded anew whenever they are gone through: memory stays at a few
    frames, however long and large the clip is (69 frames of 4K are 1.7 GB).

    Args:
        path: of the file.
        indices: the frames' places in the file, ascending; a place may come several times.
        look: how they are shown.
    """

    def __init__(self, path: Path, indices: Sequence[int], look: Look):
        self._path, self._indices, self._look = path, indices, look

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Image.Image]:
        return self._from(0)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> "Clip": ...

    def __getitem__(self, index: int | slice) -> "Image.Image | Clip":
        if isinstance(index, slice):
            return Clip(self._path, sorted(self._indices[index]), self._look)
        return next(self._from(range(len(self))[index]))

    def _from(self, first: int) -> Iterator[Image.Image]:
        left = deque(self._indices[first:])
        with _opened(self._path) as (container, stream):
            for index, frame in enumerate(container.decode(stream)):
                image = _upright(frame, self._look) if left and left[0] == index else None
                while image is not None and left and left[0] == index:
                    yield image
                    left.popleft()
                if not left:
                    return
        raise InputError(f"video {self._path} has fewer frames than before: it changed while it was read")


def read_video(path: Path, every: bool = False) -> Clip:
    """The frames of a clip that the model sees, or `every` frame, upright as its display matrix says.

    Of clips with a variable rate, frames are chosen by their number, as in the official code.

    Raises:
        InputError: the file is missing, broken, no video, too short, or one picture.
    """
    if not is_file(path):
        raise InputError(f"video not found: {path}")
    total, fps, look = _measure(Path(path))
    if every:
        return Clip(Path(path), range(total), look)
    try:
        indices = frame_indices(total, fps)
    except InputError as error:
        raise InputError(f"video {path}: {error}") from error
    if total == 1:
        raise InputError(f"video {path} holds one frame: use a task that takes a picture, or a longer clip")
    return Clip(Path(path), indices, look)


@contextlib.contextmanager
def _opened(path: Path, **options: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A clip's file and first video stream; by an open file, since FFmpeg takes a name with a colon for a URL."""
    try:
        with open(path, "rb") as file, av.open(file, "r", options=options) as container:
            if not container.streams.video:
                raise InputError(f"video {path}: it has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"cannot read the video {path}: {error.strerror or error}") from error


def _measure(path: Path) -> tuple[int, float, Look]:
    """Frames, frames per second and look of a clip, decoded once; a file that ends early is refused."""
    total = sent = 0
    last_sent = last = first = -math.inf
    look: Look | None = None
    with _opened(path) as (container, stream):
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                sent, last_sent = sent + 1, max(last_sent, -math.inf if packet.pts is None else packet.pts)
            for frame in packet.decode():
                if look is None:
                    look, first = _look(frame), -math.inf if frame.pts is None else frame.pts
                total, last = total + 1, max(last, -math.inf if frame.pts is None else frame.pts)
        promised, rate, unit = stream.frames, float(stream.average_rate or 0), float(stream.time_base or 0)
    # An edit list may leave frames out; a file that was cut off has lost them.
    if sent < promised and (there := _packets(path)) < promised:
        raise InputError(f"video {path}: only {there} of its {promised} frames are there; encode it anew")
    if total < sent and last < last_sent or look is None:
        raise InputError(f"video {path}: only {total} of its {sent} frames can be decoded; encode it anew")
    if total < sent:
        log.warning("%s: %d of %d frames cannot be decoded and are left out", path, sent - total, sent)
    if not 0 < rate <= _FASTEST:
        rate = (total - 1) / ((last - first) * unit) if total > 1 and last > first and unit else _UNKNOWN_FPS
    return total, rate, look


def _packets(path: Path) -> int:
    """Frames in a file, shown or not."""
    with _opened(path, ignore_editlist="1") as (container, stream):
        return sum(packet.size > 0 for packet in container.demux(stream))


def _look(frame: av.VideoFrame) -> Look:
    """How frames are shown, from the first one. `side_data` ties a frame into a reference cycle: asked of every frame,
    it keeps all of them until the garbage collector runs."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    # x' = a x + c y, y' = b x + d y, in 16.16 fixed point (libavutil/display.h).
    a, b, _, c, d = (1, 0, 0, 0, 1) if matrix is None else np.frombuffer(cast(Any, matrix), np.int32)[:5].tolist()
    swap = a == d == 0 and b != 0 and c != 0
    across, down = (c, b) if swap else (a, d) if b == c == 0 else (1, 1)
    size = (frame.height, frame.width) if swap else (frame.width, frame.height)
    return Look(size, swap, across < 0, down < 0)


def _upright(frame: av.VideoFrame, look: Look) -> Image.Image:
    pixels = frame.to_ndarray(format="rgb24")
    if look.swap:
        pixels = pixels.transpose(1, 0, 2)
    pixels = pixels[:: -1 if look.flip else 1, :: -1 if look.mirror else 1]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return image if image.size == look.size else image.resize(look.size, Image.Resampling.BICUBIC)


def write_video(path: Path, frames: Sequence[Image.Image]) -> None:
    """Write frames of one size, its sides even, as H.264 (yuv420p, mp4) at 12 a second."""
    width, height = frames[0].size
    assert width % 2 == height % 2 == 0, f"H.264 in yuv420p needs even sides, not {width} x {height}"
    with open(path, "w+b") as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": _QUALITY})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
