"""Pictures and clips as the official code shows them to the ViT and the VAE: bucket, crop, normalise.

vllm-omni has the official bucket resize for clips at 480p and for the ViT at 672 pixels; here it is applied at every
official preset, to pictures as to clips, for both towers.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from vllm_omni.diffusion.models.lance import lance_transformer
from vllm_omni.diffusion.models.lance.lance_transformer import LanceBagel
from vllm_omni.errors import OmniClientError

# Preset -> side of the square with the bucket's area: for the ViT, for the VAE.
RESOLUTIONS = {"image_256res": (224, 256), "image_512res": (448, 512), "image_768res": (672, 768),
               "video_192p": (224, 256), "video_360p": (476, 480), "video_480p": (616, 640),
               "image_112res": (112, 112)}  # the last: lance-nano's, not official
_STRIDE = 16
_SEED = 2025  # the official global seed, which crops of a picture that is a pixel off its bucket's ratio draw from


def rgb(image: Image.Image) -> Image.Image:
    """A picture in RGB, transparency over white."""
    if image.mode == "P":
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.split()[3])
        return white
    return image.convert("RGB")


def one_picture(given: Any) -> Image.Image:
    """The picture of a request.

    Raises:
        OmniClientError: there are several, which Lance was not trained for.
    """
    if isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) != 1:
            raise OmniClientError(f"Lance takes one picture, and the request has {len(given)}: send one")
        given = given[0]
    if isinstance(given, str):
        given = Image.open(given)
    if isinstance(given, np.ndarray):
        given = Image.fromarray(given)
    return rgb(given)


def frames_of(given: Any, fps: float) -> tuple[np.ndarray, float]:
    """A clip as uint8 [frames, height, width, 3], and its frames per second.

    Args:
        given: decoded pictures, an array, a path, or a `data:video/…` URL. No other URL is fetched for a client.
        fps: where the clip does not say.
    """
    if isinstance(given, np.ndarray):
        return given, fps
    if isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) == 1 and isinstance(given[0], str):
            return _decode(given[0])
        rate = next((float(value) for value in (getattr(given, name, None) for name in ("fps", "frame_rate"))
                     if value), fps)
        return np.stack([np.asarray(rgb(frame)) for frame in given]), rate
    return _decode(given)


def from_data_url(url: str) -> tuple[np.ndarray, float]:
    """A clip out of a `data:` URL, see frames_of.

    Raises:
        OmniClientError: it is another kind of URL, or no clip.
    """
    head, _, data = url.partition(",")
    if not head.startswith("data:video") or not head.endswith(";base64"):
        raise OmniClientError("send the clip as a data:video/…;base64 URL: this server fetches no other for a client")
    try:
        return _decode(io.BytesIO(base64.b64decode(data, validate=True)))
    except (ValueError, OSError) as error:
        raise OmniClientError(f"the clip cannot be read: {error}") from error


def _decode(source: Any) -> tuple[np.ndarray, float]:
    import av

    with av.open(source) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate or 24)


def sampled(frames: np.ndarray, fps: float) -> np.ndarray:
    """The frames that the model sees of a clip: 12 a second, at most six seconds, one more than a multiple of 4."""
    return frames[LanceBagel._lance_sample_frame_indices(len(frames), round(fps) or 24)]


def _fit(frames: np.ndarray, side: int, multiple: int, mean: Any, std: Any) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return LanceBagel._lance_bucket_resize_video(frames, side, _STRIDE, multiple, mean, std)


def vit_patches(frames: np.ndarray, resolution: str) -> tuple[Tensor, Tensor]:
    """Frames uint8 [t, h, w, 3] -> the ViT's patches [n, 1176] and their grid [1, 3]."""
    pixels = _fit(frames, RESOLUTIONS[resolution][0], lance_transformer.LANCE_VIT_DIVISIBLE_CROP,
                  lance_transformer.LANCE_VIT_NORM_MEAN, lance_transformer.LANCE_VIT_NORM_STD)
    if pixels.shape[1] % 2:  # a patch spans two frames
        pixels = torch.cat([pixels, pixels[:, -1:]], 1)
    return LanceBagel._lance_patchify_vit_video(pixels)


def vae_pixels(frames: np.ndarray, resolution: str) -> Tensor:
    """Frames uint8 [t, h, w, 3] -> what the VAE takes: [3, t, height, width] in -1..1, sides multiples of 16."""
    return _fit(frames, RESOLUTIONS[resolution][1], _STRIDE, 0.5, 0.5)
