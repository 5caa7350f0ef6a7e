"""Video decoding and encoding through PyAV: RGB frames at the model's rate in, H.264 out.

The model sees and makes 12 frames a second. A longer clip than 6 seconds is seen at a lower rate.
"""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

from lance_quant.errors import InputError

FPS = 12
_LONGEST = 6.0  # seconds
_UNKNOWN_FPS = 24  # taken where a file does not say
_QUALITY = "14"  # x264's constant rate factor: no visible loss


def frame_indices(total: int, fps: float) -> list[int]:
    """Which of a clip's `total` frames the model sees; the count is one more than a multiple of four.

    The rule is the official one: a count that is a multiple of four loses three frames, all others go down to the
    next such count, and the chosen frames are spread evenly (frames of a clip below 12 per second are repeated).

    Raises:
        InputError: the clip is no longer than 1/24 second.
    """
    fps = int(round(fps))
    count = int(round(min(total / fps, _LONGEST) * FPS)) if fps else 0
    if count == 0:
        raise InputError(f"{total} frames at {fps} per second are too few: Lance needs more than 1/24 second")
    count = count // 4 * 4 + 1 if count % 4 else count - 3
    return np.linspace(0, total - 1, count).astype(int).tolist()


def read_video(path: Path, every: bool = False) -> list[Image.Image]:
    """The frames of a clip that the model sees, or `every` frame, as RGB.

    Raises:
        InputError: the file is missing, broken, no video, or too short.
    """
    if not Path(path).is_file():
        raise InputError(f"video not found: {path}")
    try:
        # Twice through the file: its header need not know the count, and only the chosen frames are kept.
        total, fps = _measure(path)
        wanted = list(range(total)) if every else frame_indices(total, fps)
        chosen = set(wanted)
        with av.open(str(path)) as container:
            seen = {index: Image.fromarray(frame.to_ndarray(format="rgb24"))
                    for index, frame in enumerate(container.decode(video=0)) if index in chosen}
    except av.FFmpegError as error:
        raise InputError(f"cannot read the video {path}: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"video {path}: {error}") from error
    return [seen[index] for index in wanted]


def _measure(path: Path) -> tuple[int, float]:
    """Frames and frames per second of a clip; a file that ends early is refused."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise InputError("it has no video stream")
        stream = container.streams.video[0]
        total = sum(1 for _ in container.decode(stream))
        if total < stream.frames:
            raise InputError(f"only {total} of its {stream.frames} frames can be decoded; encode it anew")
        return total, float(stream.average_rate or _UNKNOWN_FPS)


def write_video(path: Path, frames: Sequence[Image.Image]) -> None:
    """Write frames of one size, its sides even, as H.264 (yuv420p, mp4) at 12 a second."""
    width, height = frames[0].size
    assert width % 2 == height % 2 == 0, f"H.264 in yuv420p needs even sides, not {width} x {height}"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": _QUALITY})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
