"""Read shapes, colours and count off a picture without any model, to judge generated pictures.

Connected components of what differs from the border colour; the colour of each is the nearest palette colour
of its core, the shape is the template with the best overlap. Anything unlike every template, or of no palette
colour, is reported as `?`, so a half object never counts as right. Digits are not read (they come out as some
shape or `?`).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from lance_nano.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZE, Scene, Thing, render

UNKNOWN = "?"
FOREGROUND = 55.0  # RGB distance from the border colour; antialiased rims and codec noise stay below
MIN_PIXELS = 60  # the smallest drawn shape (a small cross) covers about 100
MIN_OVERLAP = 0.75
MAX_COLOUR_DISTANCE = 75.0
GRID = 24  # side of the shape templates


class Found(NamedTuple):
    shape: str
    colour: str
    cell: int


def recognise(picture: np.ndarray) -> tuple[str, list[Found]]:
    """The background name and the things of a uint8 [112, 112, 3] picture, in order of their first pixel."""
    pixels = picture.astype(np.float32)
    border = np.concatenate(
        [pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3), pixels[:, :3].reshape(-1, 3)]
    )
    ground = np.median(border, axis=0)
    contrast = np.linalg.norm(pixels - ground, axis=-1)
    found = [_describe(pixels, contrast, ground, points) for points in _components(contrast > FOREGROUND)]
    return _nearest(ground, BACKGROUNDS)[0], found


def shows(scene: Scene, picture: np.ndarray) -> bool:
    """True if the picture has exactly the scene's shapes in the scene's colours, wherever they stand."""
    _, found = recognise(picture)
    wanted = sorted((thing.name, thing.colour) for thing in scene.things)
    return sorted((thing.shape, thing.colour) for thing in found) == wanted


def shows_layout(scene: Scene, picture: np.ndarray) -> bool:
    """True if, in addition, every thing stands in its cell and the background is right."""
    background, found = recognise(picture)
    wanted = sorted((thing.name, thing.colour, thing.cell) for thing in scene.things)
    return background == scene.background and sorted(found) == wanted


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    distance = {name: float(np.linalg.norm(colour - np.array(rgb))) for name, rgb in palette.items()}
    name = min(distance, key=distance.__getitem__)
    return name, distance[name]


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """4-connected components of a [H, W] mask with at least MIN_PIXELS points, each int [points, 2]."""
    todo = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    components = []
    for seed in sorted(todo):
        if seed not in todo:
            continue
        todo.discard(seed)
        stack, points = [seed], []
        while stack:
            y, x = stack.pop()
            points.append((y, x))
            for neighbour in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if neighbour in todo:
                    todo.discard(neighbour)
                    stack.append(neighbour)
        if len(points) >= MIN_PIXELS:
            components.append(np.array(points))
    return components


def _describe(pixels: np.ndarray, contrast: np.ndarray, ground: np.ndarray, points: np.ndarray) -> Found:
    ys, xs = points.T
    strength = contrast[ys, xs]
    core = np.median(pixels[ys, xs][strength >= np.quantile(strength, 0.4)], axis=0)
    colour, distance = _nearest(core, COLOURS)
    half = 0.5 * float(np.linalg.norm(core - ground))
    inside = np.zeros(contrast.shape, bool)
    inside[ys, xs] = strength > half
    shape = _shape(inside)
    cell = int((ys.min() + ys.max() + 1) / 2 * 3 // SIZE) * 3 + int((xs.min() + xs.max() + 1) / 2 * 3 // SIZE)
    if distance > MAX_COLOUR_DISTANCE:
        colour = UNKNOWN
    return Found(shape, colour, cell)


def _shape(mask: np.ndarray) -> str:
    box = _crop(mask)
    if not 0.7 < box.shape[0] / box.shape[1] < 1.43:
        return UNKNOWN
    seen = _to_grid(box)
    overlap = {
        shape: np.minimum(seen, template).sum() / np.maximum(seen, template).sum()
        for shape, template in _templates().items()
    }
    best = max(overlap, key=overlap.__getitem__)
    return best if overlap[best] > MIN_OVERLAP else UNKNOWN


def _crop(mask: np.ndarray) -> np.ndarray:
    ys, xs = np.nonzero(mask)
    return mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]


def _to_grid(mask: np.ndarray) -> np.ndarray:
    return (
        np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize((GRID, GRID), Image.BILINEAR)) / 255.0
    )


@cache
def _templates() -> dict[str, np.ndarray]:
    templates = {}
    for shape in SHAPES:
        picture = render(Scene("black", (Thing(shape, "cyan", "large", 4, 16.0),)), oversample=4)
        templates[shape] = _to_grid(_crop(picture[..., 1] > 100))
    return templates
