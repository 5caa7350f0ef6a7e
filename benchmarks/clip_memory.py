#!/usr/bin/env python3
"""Measure the memory that a large clip takes before the model sees it: frames shrunk as they come, and kept whole.

    python -m benchmarks.clip_memory                                              # 6 s of 4K, a minute
    python -m benchmarks.clip_memory --width 1920 --height 1080

Reads   nothing; the clip is made in a temporary folder
Writes  nothing; the last line on stdout is the result as JSON, sizes in bytes
Needs   25 bytes per pixel of a frame, and with frames kept 3 bytes per pixel of 69 of them

Each way runs in a process of its own, which reads the clip, shrinks it for the ViT and for the VAE, and gives its peak
of resident memory, less what it had before.
"""

import argparse
import json
import tempfile
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from benchmarks.child import in_child
from lance_quant.cli import script
from lance_quant.errors import InputError, require_whole
from lance_quant.inference.memory import peak_memory, reset_peak_memory
from lance_quant.lance.media import vision
from lance_quant.lance.media.video import read_video

FPS, SECONDS = 30, 6
RESOLUTION = "video_480p"


def make_clip(path: Path, width: int, height: int) -> None:
    """A white bar that moves over a noisy ground."""
    ground = np.random.default_rng(0).integers(0, 64, (height, width, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(FPS * SECONDS):
            pixels = ground.copy()
            pixels[:, index * width // (FPS * SECONDS):][:, :width // 40] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def peak_of(path: Path, keep: bool) -> int | None:
    """Bytes by which the resident memory rises at most; None where the system does not tell."""
    device = torch.device("cpu")
    vision.vit_pixels([Image.new("RGB", (64, 64))], RESOLUTION)  # what the first use takes
    reset_peak_memory(device)
    before = peak_memory(device)["host"]
    frames = list(read_video(path)) if keep else read_video(path)
    vision.vit_pixels(frames, RESOLUTION)
    vision.vae_pixels(frames, RESOLUTION)
    after = peak_memory(device)["host"]
    return None if before is None or after is None else after - before


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--width", type=int, default=3840, help="of the clip, even")
    parser.add_argument("--height", type=int, default=2160, help="of the clip, even")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure both ways, and print them."""
    args = parse_args(argv)
    for name in ("width", "height"):
        size = require_whole(name, getattr(args, name), 64, 7680)
        if size % 2:
            raise InputError(f"--{name} {size} must be even, as H.264 needs it")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        make_clip(path, args.width, args.height)
        found = {way: in_child(peak_of, path, way == "kept") for way in ("shrunk as they come", "kept")}
    for way, size in found.items():
        print(f"frames {way}: {'unknown' if size is None else f'{size / 1e6:.0f} MB'}")
    print(json.dumps({"width": args.width, "height": args.height, **found}))


if __name__ == "__main__":
    script.run(main)
