"""Questions about a scene, with the answers a program can check letter by letter.

`questions` returns every question of one scene that has exactly one right answer: no question names a thing
that is not unique, and no comparison is asked where the two things share the row or column in question.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from lance_nano.scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    Scene,
    Thing,
    full_caption,
    listing,
    plural,
    with_article,
)

SHORT_KINDS = ("count", "colour", "digit", "place", "compare", "shape", "size", "exists")
DESCRIBE = "Describe the image."
LIST = "List the objects."


class Question(NamedTuple):
    kind: str
    text: str
    answer: str


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """All kinds of short questions the scene allows, in random order."""
    asked = [
        *_count(scene, rng),
        *_colour(scene, rng),
        *_digit(scene),
        *_place(scene, rng),
        *_compare(scene, rng),
        *_look(scene, rng),
        *_exists(scene, rng),
    ]
    rng.shuffle(asked)
    return asked


def one_per_kind(scene: Scene, rng: random.Random) -> list[Question]:
    """One question of every kind, in random order: training gives rare kinds as much room as common ones."""
    chosen = list({question.kind: question for question in questions(scene, rng)}.values())
    rng.shuffle(chosen)
    return chosen


def description(scene: Scene, rng: random.Random) -> Question:
    """One of the two long questions: list the objects (70 %) or describe the image."""
    if rng.random() < 0.7:
        return Question("list", LIST, listing(scene))
    return Question("caption", DESCRIBE, full_caption(scene))


def _shapes(scene: Scene) -> list[Thing]:
    return [thing for thing in scene.things if not thing.is_digit]


def _reference(thing: Thing) -> str:
    return "digit" if thing.is_digit else f"{thing.colour} {thing.name}"


def _unique(scene: Scene) -> list[Thing]:
    """Things that `the digit` or `the red circle` names without doubt."""
    names = [_reference(thing) for thing in scene.things]
    return [thing for thing, name in zip(scene.things, names, strict=True) if names.count(name) == 1]


def _count(scene: Scene, rng: random.Random) -> list[Question]:
    shapes = _shapes(scene)
    name = rng.choice(shapes).name if shapes and rng.random() < 0.8 else rng.choice(SHAPES)
    colour = rng.choice(scene.things).colour if rng.random() < 0.8 else rng.choice(tuple(COLOURS))
    both = rng.choice(shapes) if shapes and rng.random() < 0.85 else None
    both_name, both_colour = (
        (both.name, both.colour) if both else (rng.choice(SHAPES), rng.choice(tuple(COLOURS)))
    )
    rows = [
        ("objects", len(scene.things)),
        (plural(name), sum(thing.name == name for thing in shapes)),
        (f"{colour} objects", sum(thing.colour == colour for thing in scene.things)),
        (
            f"{both_colour} {plural(both_name)}",
            sum((thing.name, thing.colour) == (both_name, both_colour) for thing in shapes),
        ),
    ]
    return [Question("count", f"How many {what} are there?", str(number)) for what, number in rows]


def _colour(scene: Scene, rng: random.Random) -> list[Question]:
    names = ["digit" if thing.is_digit else thing.name for thing in scene.things]
    single = [
        (name, thing) for name, thing in zip(names, scene.things, strict=True) if names.count(name) == 1
    ]
    asked = [Question("background", "What color is the background?", scene.background)]
    if single:
        name, thing = rng.choice(single)
        asked.append(Question("colour", f"What color is the {name}?", thing.colour))
    thing = rng.choice(scene.things)
    where = f"What color is the object at the {PLACES[thing.cell]}?"
    return [*asked, Question("colour", where, thing.colour)]


def _digit(scene: Scene) -> list[Question]:
    return [
        question
        for thing in scene.things
        if thing.is_digit
        for question in (
            Question("digit", "What digit is shown?", thing.name),
            Question("digit", f"Which digit is at the {PLACES[thing.cell]}?", thing.name),
        )
    ]


def _place(scene: Scene, rng: random.Random) -> list[Question]:
    rows = [(_reference(thing), thing) for thing in _unique(scene)]
    colours = [thing.colour for thing in scene.things]
    rows += [(f"{thing.colour} object", thing) for thing in scene.things if colours.count(thing.colour) == 1]
    chosen = rng.sample(rows, min(2, len(rows)))
    return [Question("place", f"Where is the {name}?", PLACES[thing.cell]) for name, thing in chosen]


def _compare(scene: Scene, rng: random.Random) -> list[Question]:
    unique = _unique(scene)
    if len(unique) < 2:
        return []
    first, second = rng.sample(unique, 2)
    asked = []
    for axis, low, high in ((1, "left of", "right of"), (0, "above", "below")):
        here, there = divmod(first.cell, 3)[axis], divmod(second.cell, 3)[axis]
        if here == there:
            continue
        word, is_so = rng.choice(((low, here < there), (high, here > there)))
        text = f"Is the {_reference(first)} {word} the {_reference(second)}?"
        asked.append(Question("compare", text, "yes" if is_so else "no"))
    return asked


def _look(scene: Scene, rng: random.Random) -> list[Question]:
    """Shape and size of a thing, and what stands in a cell."""
    asked = []
    shapes = _shapes(scene)
    colours = [thing.colour for thing in scene.things]
    single = [thing for thing in shapes if colours.count(thing.colour) == 1]
    if single:
        thing = rng.choice(single)
        asked.append(Question("shape", f"What shape is the {thing.colour} object?", thing.name))
    named = [thing for thing in _unique(scene) if not thing.is_digit]
    if named:
        thing = rng.choice(named)
        asked.append(Question("size", f"What size is the {_reference(thing)}?", thing.size))
    cell = rng.choice(scene.things).cell if rng.random() < 0.7 else rng.randrange(9)
    there = [with_article(thing.noun) for thing in scene.things if thing.cell == cell]
    asked.append(Question("what", f"What is at the {PLACES[cell]}?", there[0] if there else "nothing"))
    return asked


def _exists(scene: Scene, rng: random.Random) -> list[Question]:
    shapes = _shapes(scene)
    name, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
    if shapes and rng.random() < 0.8:
        thing = rng.choice(shapes)
        name, colour = rng.choice(
            ((thing.name, thing.colour),) * 2 + ((thing.name, colour), (name, thing.colour))
        )
    found = any((thing.name, thing.colour) == (name, colour) for thing in shapes)
    return [Question("exists", f"Is there {with_article(f'{colour} {name}')}?", "yes" if found else "no")]
