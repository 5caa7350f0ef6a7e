"""Scenes of coloured shapes and digits, drawn by a program: captions and answers are known to be true.

A scene is at most five things on a jittered 3 x 3 grid of a 112 x 112 picture. 112 = 4 * 28 = 7 * 16, so the
same picture is 16 merged ViT tokens and 49 VAE latents without any resampling.

Two generators share the renderer. `question_scene` draws open scenes to ask about. `picture_scene` draws
scenes for which the caption fixes the layout: what a caption leaves open has one default (centre, a row,
white, large). Without that rule a small generator never learns how many things to draw (measured: .43 against
.94 recognised).

Nothing to run; `held_out` splits both kinds between training and evaluation by a hash of the words.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 112
COLOURS = {
    "red": (220, 35, 35),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 215, 40),
    "purple": (140, 50, 180),
    "orange": (245, 135, 25),
    "cyan": (50, 205, 220),
}
BACKGROUNDS = {"white": (245, 245, 245), "black": (15, 15, 15), "gray": (180, 180, 180)}
SHAPES = ("circle", "square", "triangle", "cross")
DIGITS = tuple("0123456789")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four", "five")
DEFAULT_CELLS = {1: (4,), 2: (3, 5), 3: (3, 4, 5)}
RADIUS = {"small": (8.0, 9.5), "large": (12.5, 16.0)}
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Thing:
    """One shape or digit: `cell` counts the 3 x 3 grid in reading order, radius and offsets are pixels."""

    name: str
    colour: str
    size: str
    cell: int
    radius: float
    dx: float = 0.0
    dy: float = 0.0

    @property
    def is_digit(self) -> bool:
        """Whether this is a digit and not a shape."""
        return self.name.isdigit()

    @property
    def noun(self) -> str:
        """`red circle`, `small red circle` or `red digit 7`."""
        name = f"digit {self.name}" if self.is_digit else self.name
        return f"{'small ' if self.size == 'small' else ''}{self.colour} {name}"

    @property
    def kind(self) -> tuple[str, str, str]:
        """What makes two things equal in a caption: name, colour, size."""
        return self.name, self.colour, self.size


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...]


def plural(noun: str) -> str:
    """The plural of a shape name, or of a phrase that ends with one."""
    return noun + ("es" if noun.endswith("s") else "s")


def with_article(noun: str) -> str:
    """`a red circle`, `an orange square`."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def held_out(words: str) -> bool:
    """True for the tenth of all captions and layouts that training never sees."""
    return zlib.crc32(words.encode()) % HELD_OUT_ONE_IN == 0


def layout_words(scene: Scene) -> str:
    """What a scene shows, without the jitter: the key of `held_out` for question scenes."""
    things = sorted(f"{thing.cell} {thing.noun}" for thing in scene.things)
    return "; ".join([scene.background, *things])


def question_scene(rng: random.Random, digit_share: float = 0.4) -> Scene:
    """An open scene of one to five things; `digit_share` of them show exactly one digit."""
    count = rng.choices(range(1, 6), (0.30, 0.28, 0.18, 0.13, 0.11))[0]
    cells = sorted(rng.sample(range(9), count))
    repeated = (rng.choice(SHAPES), rng.choice(tuple(COLOURS)))
    repeats = count >= 2 and rng.random() < 0.55
    digit_at = rng.randrange(count) if rng.random() < digit_share else None
    things = []
    for index, cell in enumerate(cells):
        name, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
        size = "small" if rng.random() < 0.25 else "large"
        if index == digit_at:
            name, size = rng.choice(DIGITS), "large"
        elif repeats and rng.random() < 0.7:
            name, colour = repeated
        things.append(_placed(rng, name, colour, size, cell, jitter=2.5))
    return Scene(rng.choice(tuple(BACKGROUNDS)), tuple(things))


def picture_scene(rng: random.Random) -> tuple[Scene, str]:
    """A scene and the caption that fixes its layout: one thing, two or three alike, or a pair."""
    draw = rng.random()
    if draw < 0.30:
        kinds, layout = [_kind(rng)], "place" if rng.random() < 0.5 else "default"
    elif draw < 0.55:
        kinds, layout = [_kind(rng)] * rng.choice((2, 3)), "same"
    else:
        kinds = [_kind(rng), _kind(rng)]
        while kinds[0][:2] == kinds[1][:2]:
            kinds[1] = _kind(rng)
        layout = rng.choices(("default", "place", "left", "above"), (0.4, 0.2, 0.2, 0.2))[0]
    cells = _cells(rng, len(kinds), layout)
    things = tuple(
        _placed(rng, *kind, cell, jitter=1.0, steady=True) for kind, cell in zip(kinds, cells, strict=True)
    )
    background = rng.choice(tuple(BACKGROUNDS)) if rng.random() < 0.6 else None
    words = _caption_of_layout(things, layout) + (f" on a {background} background" if background else "")
    return Scene(background or "white", things), words


def _kind(rng: random.Random) -> tuple[str, str, str]:
    return rng.choice(SHAPES), rng.choice(tuple(COLOURS)), "small" if rng.random() < 0.15 else "large"


def _cells(rng: random.Random, count: int, layout: str) -> Iterable[int]:
    if layout == "place":
        return rng.sample(range(9), count)
    return (1, 7) if layout == "above" else DEFAULT_CELLS[count]


def _placed(rng, name, colour, size, cell, jitter, steady=False) -> Thing:
    low, high = RADIUS[size]
    if steady and size == "large":
        low, high = 13.0, 15.0
    return Thing(
        name,
        colour,
        size,
        cell,
        rng.uniform(low, high),
        rng.uniform(-jitter, jitter),
        rng.uniform(-jitter, jitter),
    )


def _caption_of_layout(things: tuple[Thing, ...], layout: str) -> str:
    if layout == "same":
        return f"{NUMBERS[len(things)]} {plural(things[0].noun)}"
    phrases = [with_article(thing.noun) for thing in things]
    if layout == "place":
        phrases = [
            f"{phrase} at the {PLACES[thing.cell]}" for phrase, thing in zip(phrases, things, strict=True)
        ]
    return {"left": " left of ", "above": " above "}.get(layout, " and ").join(phrases)


def full_caption(scene: Scene) -> str:
    """The one canonical description: kinds in reading order of their first thing, then the background."""
    groups: dict[tuple, list[Thing]] = {}
    for thing in scene.things:
        groups.setdefault(thing.kind, []).append(thing)
    parts = [
        with_article(group[0].noun) if len(group) == 1 else f"{NUMBERS[len(group)]} {plural(group[0].noun)}"
        for group in groups.values()
    ]
    words = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{words} on a {scene.background} background"


def listing(scene: Scene) -> str:
    """Every thing with its place, in reading order: the densest answer there is."""
    return "; ".join(f"{PLACES[thing.cell]}: {thing.noun}" for thing in scene.things)


@lru_cache(maxsize=64)
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(pixels)


def render(scene: Scene, oversample: int = 2) -> np.ndarray:
    """The picture of a scene, uint8 [112, 112, 3], drawn `oversample` times larger and averaged down."""
    canvas = Image.new("RGB", (SIZE * oversample, SIZE * oversample), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw(pen, thing, oversample)
    return np.asarray(canvas.resize((SIZE, SIZE), Image.BOX))


def _draw(pen: ImageDraw.ImageDraw, thing: Thing, scale: int) -> None:
    row, column = divmod(thing.cell, 3)
    x = (SIZE / 3 * (column + 0.5) + thing.dx) * scale
    y = (SIZE / 3 * (row + 0.5) + thing.dy) * scale
    r, fill = thing.radius * scale, COLOURS[thing.colour]
    if thing.is_digit:
        font = _font(int(2.5 * r))
        left, top, right, bottom = pen.textbbox((0, 0), thing.name, font=font)
        corner = (x - (left + right) / 2, y - (top + bottom) / 2)
        pen.text(corner, thing.name, font=font, fill=fill, stroke_width=scale, stroke_fill=fill)
    elif thing.name == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.name == "square":
        half = 0.92 * r
        pen.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif thing.name == "triangle":
        pen.polygon([(x, y - r), (x - r, y + 0.9 * r), (x + r, y + 0.9 * r)], fill=fill)
    elif thing.name == "ring":  # of train_lora.py; none of SHAPES
        pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=round(r / 2))
    else:
        arm = 0.36 * r
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
