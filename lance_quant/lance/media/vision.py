"""Image preprocessing: opening, buckets, crop, resize, normalisation, patches. PIL and torch only.

Each picture is brought to one of six aspect ratios at about the area that the resolution preset names, once for the
ViT and once for the VAE. A picture is a clip of one frame: pixels are [3, frames, height, width] throughout.
"""

import functools
import io
import math
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from lance_quant.errors import InputError
from lance_quant.lance.config import LATENT_STRIDE
from lance_quant.lance.settings import RESOLUTIONS
from lance_quant.storage.atomic import is_file

# Read of pictures. Not EPS, which runs Ghostscript, nor formats of other things (video, weather, fonts).
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "TGA", "ICO", "PSD",
           "QOI")
_RATIOS = ((21, 9), (16, 9), (4, 3), (1, 1), (3, 4), (9, 16))
_STRIDE = 16
PATCH = 14  # pixels per ViT patch
MERGE = 2  # patches per merged token, each way
_VIT_MEAN = (0.48145466, 0.4578275, 0.40821073)
_VIT_STD = (0.26862954, 0.26130258, 0.27577711)


def open_image(path: Path, exif: bool = False) -> Image.Image:
    """A picture file as RGB, see `as_rgb`; the first frame of a moving one.

    Raises:
        InputError: the file is missing, truncated, of no format in FORMATS, or larger than Pillow's limit of 178
            million pixels (537 MB as RGB).
    """
    if not is_file(path):
        raise InputError(f"image not found: {path}")
    try:
        with warnings.catch_warnings():  # from half of the limit on
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(path, formats=_known_formats())
            image.load()
        return as_rgb(image, exif)
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise InputError(f"image {path} has more than {most} million pixels: make it smaller: Lance looks at half "
                         "a million") from None
    except UnidentifiedImageError:
        raise InputError(f"cannot read the image {path}: it is none of {', '.join(_known_formats())}; save it as PNG "
                         "or JPEG") from None
    except (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, OverflowError, struct.error, EOFError,
            ImageCms.PyCMSError, MemoryError) as error:  # what Pillow's decoders raise of damaged files
        said = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot read the image {path}: {said}") from error


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """FORMATS, less what this build of Pillow lacks."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def as_rgb(image: Image.Image, exif: bool = False) -> Image.Image:
    """A picture of any Pillow mode in RGB: transparency over white, 16 bits and floats as levels of 0 to 255, CMYK and
    Lab by colour management; EXIF orientation only on request.

    Raises:
        InputError: floats that are no levels (below 0, above 255, NaN), or whole numbers beyond 16 bits.
    """
    if exif:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        image = _levels(image)
    if image.mode in ("CMYK", "LAB"):
        return _managed(image)
    if image.mode in ("La", "RGBa"):  # colours multiplied by their opacity
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode in ("P", "PA", "LA") or (image.mode != "RGBA" and "transparency" in image.info):
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.split()[3])
        return white
    return image.convert("RGB")


def _levels(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits, of whole numbers up to 255 or 65535, or of floats up to 1 or 255, in 8 bits, with its
    transparent level."""
    values, clear = np.asarray(image).astype(np.float64), image.info.get("transparency")
    ranges = {"F": (1, 255), "I": (255, 65535)}.get(image.mode, (65535,))
    low, high = values.min(initial=0), values.max(initial=0)
    most = next((most for most in ranges if low >= 0 and high <= most), None)  # NaN is below nothing
    if most is None:
        raise InputError(f"a picture of {'floats' if image.mode == 'F' else 'whole numbers'} from {low:g} to {high:g}: "
                         f"must be in {' or '.join(f'0..{most}' for most in ranges)}")
    grey = Image.fromarray((values * (255 / most)).round().astype(np.uint8))
    if isinstance(clear, int | float):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _managed(image: Image.Image) -> Image.Image:
    """CMYK or Lab in sRGB: by the profile in the file; Lab without one as D50, CMYK without one as Pillow does."""
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK" and not profile:
        return image.convert("RGB")
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None  # None is for conversions in place
    return converted


def bucket(width: int, height: int, base: int) -> tuple[int, int]:
    """Height and width of the bucket for a picture; `base` squared is the bucket's area."""
    sizes = [_bucket_size(across / down, base * base) for across, down in _RATIOS]
    return min(sizes, key=lambda size: abs(width / height - size[1] / size[0]))


def _bucket_size(ratio: float, area: int) -> tuple[int, int]:
    """The multiple of the stride nearest to `ratio` (width over height), starting from either side."""
    width_first = round(math.sqrt(area * ratio) / _STRIDE) * _STRIDE
    first = (round(width_first / ratio / _STRIDE) * _STRIDE, width_first)
    height_first = round(math.sqrt(area / ratio) / _STRIDE) * _STRIDE
    second = (height_first, round(height_first * ratio / _STRIDE) * _STRIDE)
    return min(first, second, key=lambda size: (abs(size[1] / size[0] - ratio), abs(size[0] * size[1] - area)))


def crop_box(width: int, height: int, ratio: float, generator: torch.Generator | None) -> tuple[int, int, int, int]:
    """Left, top, width and height of the part that is kept, `ratio` wide over high.

    A picture within about one pixel of the ratio is cropped at a random offset by the official code; `generator`
    draws it, None takes the centre.
    """
    wide, high = round(math.sqrt(width * height * ratio)), round(math.sqrt(width * height / ratio))
    if 0 < wide <= width and 0 < high <= height:
        room = (height - high, width - wide)
        if generator is None:
            return room[1] // 2, room[0] // 2, wide, high
        top, left = (int(torch.randint(0, spare + 1, (1,), generator=generator)) for spare in room)
        return left, top, wide, high
    if width / height < ratio:
        wide, high = width, round(width / ratio)
    else:
        wide, high = round(height * ratio), height
    return (width - wide) // 2, (height - high) // 2, wide, high


def crops_at_random(width: int, height: int, base: int) -> bool:
    """Whether `crop_box` draws the offset of a picture in its bucket, and has a choice."""
    high, wide = bucket(width, height, base)
    boxes = [crop_box(width, height, wide / high, torch.Generator().manual_seed(seed)) for seed in range(8)]
    return len(set(boxes)) > 1


def fit(image: Image.Image, base: int, multiple: int, generator: torch.Generator | None = None) -> Tensor:
    """Crop and resize to the picture's bucket, then centre-crop to a multiple: uint8 [3, height, width]."""
    high, wide = bucket(*image.size, base)
    left, top, width, height = crop_box(*image.size, wide / high, generator)
    image = image.crop((left, top, left + width, top + height)).resize((wide, high), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    kept_high, kept_wide = high // multiple * multiple, wide // multiple * multiple
    top, left = round((high - kept_high) / 2), round((wide - kept_wide) / 2)
    return pixels[:, top:top + kept_high, left:left + kept_wide].contiguous()


def vit_pixels(frames: Sequence[Image.Image], resolution: str, generator: torch.Generator | None = None) -> Tensor:
    """Frames as the ViT sees them, before normalisation: uint8 [3, frames, height, width], sides multiples of 28."""
    base = RESOLUTIONS[resolution][0]
    return torch.stack([fit(frame, base, PATCH * MERGE, generator) for frame in frames], 1)


def vae_pixels(frames: Sequence[Image.Image], resolution: str, generator: torch.Generator | None = None) -> Tensor:
    """Frames as the VAE sees them, before normalisation: uint8 [3, frames, height, width], sides multiples of 16."""
    base = RESOLUTIONS[resolution][1]
    return torch.stack([fit(frame, base, LATENT_STRIDE, generator) for frame in frames], 1)


def vit_patches(pixels: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Normalised patches float32 [patches, 1176] of frames uint8 [3, frames, height, width], and their grid.

    A patch spans two frames; the last frame of an odd count is shown twice, and so is a picture. Patches come in merge
    blocks of 2 x 2; the grid (frame pairs, rows, columns) counts single patches.
    """
    if pixels.shape[1] % 2:
        pixels = torch.cat([pixels, pixels[:, -1:]], 1)
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (_VIT_MEAN, _VIT_STD))
    frames = ((pixels.float() / 255 - mean) / std).transpose(0, 1)
    pairs, rows, columns = frames.shape[0] // 2, pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
    blocks = frames.reshape(pairs, 2, 3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    patches = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(pairs * rows * columns, -1)
    return patches, (pairs, rows, columns)


def unit_range(pixels: Tensor) -> Tensor:
    """Float32 in -1..1 of uint8 pixels, of the same shape [3, frames, height, width]: what the VAE takes."""
    return (pixels.float() / 255 - 0.5) / 0.5


def to_image(pixels: Tensor) -> Image.Image:
    """A picture from float [3, height, width] in -1..1."""
    levels = ((pixels.float().clamp(-1, 1) * 0.5 + 0.5) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
