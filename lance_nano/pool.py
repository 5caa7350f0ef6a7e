"""Caption scenes with their latents, encoded once: the codec would cost a fifth of every training step.

Scene `index` of a pool depends on the seed and the index only, so the file holds latents alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from torch import Tensor

from lance_nano.optim import world
from lance_nano.progress import generator_for
from lance_nano.scenes import Scene, held_out, picture_scene, render
from lance_nano.vae import encode

CHUNK = 64


def pool_scene(seed: int, index: int) -> tuple[Scene, str]:
    """Scene `index` of the pool and its caption, never a held-out one."""
    rng = generator_for(seed, index)
    scene, caption = picture_scene(rng)
    while held_out(caption):
        scene, caption = picture_scene(rng)
    return scene, caption


def build_pool(path: Path, vae: AutoencoderKLWan, seed: int, count: int) -> None:
    """Write float32 latents [count, 49, 48] to `path` (.npy), all processes together, unless it is there."""
    rank, processes = world()
    partial = path.with_suffix(".partial.npy")
    if path.exists() and np.load(path, mmap_mode="r").shape[0] == count:
        return
    _wait()
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=(count, 49, 48)).flush()
    _wait()
    rows = np.lib.format.open_memmap(partial, mode="r+")
    for start in range(rank * CHUNK, count, processes * CHUNK):
        stop = min(start + CHUNK, count)
        pictures = np.stack([render(pool_scene(seed, index)[0]) for index in range(start, stop)])
        rows[start:stop] = encode(vae, torch.from_numpy(pictures)).numpy()
    rows.flush()
    _wait()
    if rank == 0:
        os.replace(partial, path)
    _wait()


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


class Pool:
    """Random (caption, latents) pairs of a built pool."""

    def __init__(self, path: Path, seed: int):
        self.latents = np.load(path, mmap_mode="r")
        self.captions = [pool_scene(seed, index)[1] for index in range(len(self.latents))]

    def draw(self, indices: list[int]) -> tuple[list[str], Tensor]:
        """The captions and latents [n, 49, 48] of some scenes."""
        return [self.captions[index] for index in indices], torch.from_numpy(self.latents[indices])
