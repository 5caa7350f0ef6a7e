"""Pictures and clips as a caller holds them (path, PIL image, array) to the RGB frames that the model is shown."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lance_quant.errors import InputError, require_real
from lance_quant.lance.media.video import FPS, frame_indices, read_video
from lance_quant.lance.media.vision import as_rgb, open_image

# Anything that numpy.asarray takes counts as an array, a torch tensor on the CPU for one.
Picture = str | os.PathLike[str] | Image.Image | np.ndarray
Video = str | os.PathLike[str] | Sequence[Picture] | np.ndarray


def picture_of(picture: Picture, exif: bool = False) -> Image.Image:
    """A picture as RGB.

    Args:
        picture: path of a file, PIL image, or array [height, width, 3] (RGB), [height, width, 4] (with transparency)
            or [height, width] (gray), uint8 in 0..255 or floating point in 0..1.
        exif: turn files and PIL images as their EXIF says.

    Raises:
        InputError: a file that cannot be read, an array of another shape, type or range, or a picture without pixels.
    """
    if isinstance(picture, str | os.PathLike):
        return open_image(Path(picture), exif)
    if not isinstance(picture, Image.Image):
        return as_rgb(Image.fromarray(_levels(picture)))
    if 0 in picture.size:
        raise InputError(f"a picture of {picture.width} x {picture.height} pixels: there is nothing to see")
    return as_rgb(picture, exif)


def frames_of(video: Video, fps: float = FPS, exif: bool = False) -> Sequence[Image.Image]:
    """The frames of a clip that the model sees: at most 6 seconds, 12 a second, one more than a multiple of 4.

    Args:
        video: path of a file; or the frames, as a sequence of pictures of one size or an array
            [frames, height, width, 3].
        fps: frames per second of `video`, where it is frames; a file says it itself.
        exif: as for `picture_of`.

    Raises:
        InputError: a file that cannot be read, frames of different sizes, or none of them.
    """
    if isinstance(video, str | os.PathLike):
        return read_video(Path(video))
    require_real("fps", fps, 0.5, 1000)
    if isinstance(video, Image.Image) or not hasattr(video, "__len__") or not hasattr(video, "__getitem__"):
        raise InputError(f"a video must be a path or frames, not {_named(video)}: for one frame give [picture]")
    frames = [picture_of(video[index], exif) for index in frame_indices(len(video), fps)]
    if len({frame.size for frame in frames}) > 1:
        raise InputError(f"a video's frames must be of one size, not {sorted({frame.size for frame in frames})}")
    return frames


def _named(value: object) -> str:
    return f"a {type(value).__name__}"


def _levels(picture: object) -> np.ndarray:
    """uint8 [height, width] or [height, width, 3 or 4] of an array."""
    try:
        array = np.asarray(picture)
    except (TypeError, ValueError, RuntimeError) as error:  # what is no array, or is on a GPU
        raise InputError(f"a picture must be a path, a PIL image or an array on the CPU, not {_named(picture)} "
                         f"({error})") from error
    rule = "a picture must be a path, a PIL image or an array"
    if array.ndim == 0 or array.dtype == object or array.dtype.kind not in "uf":
        raise InputError(f"{rule} of uint8 in 0..255 or floating point in 0..1, not {_named(picture)} of {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise InputError(f"{rule} [height, width, 3], not {list(array.shape)}")
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        raise InputError(f"{rule} of uint8 in 0..255 or floating point in 0..1, not of {array.dtype}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise InputError(f"{rule}; floating point must be in 0..1 and finite, and this one has values from "
                         f"{array.min():g} to {array.max():g}")
    return np.ascontiguousarray((array.astype(np.float32) * 255).round().astype(np.uint8))
