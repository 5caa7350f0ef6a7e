"""Edits and clips of lance-nano's world: instructions, captions and questions that are true by construction.

Both are a change between two scenes, before and after. An edit asks for it, a clip shows it: frame 0 is the scene
before, frames 1 to 4 the scene after. The VAE gives one latent frame to frame 0 and one to the four frames behind it,
and lance-nano's repeats what it decodes from a latent frame, so a clip of two states is all that it can hold without
loss: 5 frames at 12 a second, 3 states a second.

A clip is edited by a change of the background alone, so that its motion stays as it was.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from PIL import Image

from lance_nano.questions import Question
from lance_nano.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    Scene,
    Thing,
    held_out,
    render,
    with_article,
)

FRAMES = 5
CHANGES = ("move", "recolour", "appear", "disappear")
CLIP_QUESTIONS = ("change", "where", "colour", "background")


class Change(NamedTuple):
    """`before` becomes `after`; `thing` is what changes, as it looks in the scene that has it first."""

    kind: str
    before: Scene
    after: Scene
    thing: Thing

    @property
    def changed(self) -> Thing:
        """The thing as the scene behind the change has it, or as it was if it is gone."""
        if self.kind == "disappear":
            return self.thing
        (found,) = [thing for thing in self.after.things if thing not in self.before.things] or [self.thing]
        return found

    @property
    def instruction(self) -> str:
        """What an edit asks for."""
        noun = self.thing.noun
        return {
            "move": f"Move the {noun} to the {PLACES[self.changed.cell]}",
            "recolour": f"Make the {noun} {self.changed.colour}",
            "appear": f"Place {with_article(noun)} at the {PLACES[self.changed.cell]}",
            "disappear": f"Remove the {noun}",
        }[self.kind]

    @property
    def caption(self) -> str:
        """What a clip shows; with one thing at most before and after, it fixes both scenes."""
        start, noun = PLACES[self.thing.cell], with_article(self.thing.noun)
        ground = f" on a {self.before.background} background"
        return {
            "move": f"{noun} moves from the {start} to the {PLACES[self.changed.cell]}",
            "recolour": f"{noun} at the {start} becomes {self.changed.colour}",
            "appear": f"{noun} appears at the {start}",
            "disappear": f"{noun} disappears from the {start}",
        }[self.kind] + ground


def edit(rng: random.Random) -> Change:
    """A change of a scene of one or two things of different shapes and colours."""
    count = rng.choice((1, 2))
    return _change(rng, _scene(rng, count), rng.choice(CHANGES if count > 1 else CHANGES[:3]))


def clip(rng: random.Random) -> Change:
    """A change of a scene of one thing."""
    return _change(rng, _scene(rng, 1), rng.choice(CHANGES), alone=True)


def clip_edit(rng: random.Random, kept_back: bool) -> tuple[Change, str, Change]:
    """A clip, the instruction that gives it another background, and the clip that results.

    kept_back: whether the source is held out from training (`drawn`).
    """
    source = drawn(clip, rng, kept_back)
    background = rng.choice([name for name in BACKGROUNDS if name != source.before.background])
    before, after = (replace(scene, background=background) for scene in (source.before, source.after))
    return source, f"Make the background {background}", Change(source.kind, before, after, source.thing)


def _scene(rng: random.Random, count: int) -> Scene:
    names, colours = rng.sample(SHAPES, count), rng.sample(tuple(COLOURS), count)
    places = rng.sample(range(9), count)
    things = (_thing(rng, *look) for look in zip(names, colours, places, strict=True))
    return Scene(rng.choice(tuple(BACKGROUNDS)), tuple(things))


def _thing(rng: random.Random, name: str, colour: str, cell: int) -> Thing:
    return Thing(name, colour, "large", cell, rng.uniform(13.0, 15.0), rng.uniform(-1, 1), rng.uniform(-1, 1))


def _change(rng: random.Random, scene: Scene, kind: str, alone: bool = False) -> Change:
    things, thing = scene.things, scene.things[-1]
    free = [cell for cell in range(9) if cell not in {each.cell for each in things}]
    if kind == "move":
        new = (*things[:-1], replace(thing, cell=rng.choice(free)))
    elif kind == "recolour":
        colours = [name for name in COLOURS if name not in {each.colour for each in things}]
        new = (*things[:-1], replace(thing, colour=rng.choice(colours)))
    elif kind == "disappear":
        new = things[:-1]
    elif alone:
        return Change(kind, Scene(scene.background, ()), scene, thing)
    else:
        name = rng.choice([name for name in SHAPES if name not in {each.name for each in things}])
        colour = rng.choice([colour for colour in COLOURS if colour not in {each.colour for each in things}])
        thing = _thing(rng, name, colour, rng.choice(free))
        new = (*things, thing)
    return Change(kind, scene, Scene(scene.background, new), thing)


def drawn(make: Callable[[random.Random], Change], rng: random.Random, kept_back: bool) -> Change:
    """A change whose words and scene are held out from training, or one whose are not."""
    while True:
        found = make(rng)
        if held_out(f"{found.instruction}; {found.caption}") == kept_back:
            return found


def pictures(change: Change) -> list[Image.Image]:
    """The FRAMES frames of a clip, 112 x 112."""
    first, then = (Image.fromarray(render(scene)) for scene in (change.before, change.after))
    return [first] + [then] * (FRAMES - 1)


def clip_questions(change: Change) -> list[Question]:
    """Questions about a clip, one of each kind that has an answer; three of them need both of its states."""
    thing, then = change.thing, change.changed
    what = {"move": "moves", "recolour": "becomes " + then.colour, "appear": "appears", "disappear": "disappears"}
    asked = [
        Question("change", "What is the change?", f"the {thing.noun} {what[change.kind]}"),
        Question("background", "What color is the background?", change.before.background),
    ]
    if change.kind == "move":
        asked.append(Question("where", "Where is the object at the end?", PLACES[then.cell]))
        asked.append(Question("where", "Where is the object at the start?", PLACES[thing.cell]))
    if change.kind == "recolour":
        asked.append(Question("colour", "What color is the object at the end?", then.colour))
        asked.append(Question("colour", "What color is the object at the start?", thing.colour))
    return asked
