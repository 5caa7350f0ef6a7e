"""lance-nano's data: the recogniser reads true pictures; captions and answers agree with what it reads."""

import random
import re

import numpy as np
import pytest

from lance_nano.questions import SHORT_KINDS, questions
from lance_nano.recognise import recognise, shows, shows_layout
from lance_nano.scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    Scene,
    Thing,
    full_caption,
    held_out,
    layout_words,
    listing,
    picture_scene,
    question_scene,
    render,
)

SCENES = 250
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5}
PHRASE = re.compile(
    r"\b(an?|two|three|four|five) (?:small )?([a-z]+) (circle|square|triangle|cross)(?:e?s)?\b"
)


def scenes_without_digits(seed):
    rng = random.Random(seed)
    return [question_scene(rng, digit_share=0) for _ in range(SCENES)]


@pytest.mark.slow
def test_recogniser_reads_true_pictures():
    """Places and background included, on open scenes and on caption scenes: more than 98 %."""
    rng = random.Random(1)
    drawn = [*scenes_without_digits(0), *(picture_scene(rng)[0] for _ in range(SCENES))]
    right = sum(shows_layout(scene, render(scene)) for scene in drawn)
    assert right > 0.98 * len(drawn)


def test_recogniser_refuses_half_a_shape_and_a_wrong_colour():
    scene = Scene("white", (Thing("circle", "red", "large", 4, 15.0),))
    half = render(scene).copy()
    half[:, 56:] = half[0, 0]
    assert not shows(scene, half)
    pink = np.where(render(scene) < 230, np.uint8(128), render(scene))
    assert not shows(scene, pink)


def test_scenes_are_the_same_for_the_same_seed():
    for draw in (question_scene, lambda rng: picture_scene(rng)[0]):
        first, second = draw(random.Random(7)), draw(random.Random(7))
        assert first == second
        assert np.array_equal(render(first), render(second))


@pytest.mark.parametrize("kind", ["picture", "full"])
@pytest.mark.slow
def test_captions_name_what_the_picture_shows(kind):
    rng = random.Random(3)
    for scene in scenes_without_digits(4):
        caption = full_caption(scene)
        if kind == "picture":
            scene, caption = picture_scene(rng)
        named = sorted(
            (shape, colour)
            for number, colour, shape in PHRASE.findall(caption)
            for _ in range(NUMBERS[number])
        )
        background, found = recognise(render(scene))
        assert named == sorted((thing.shape, thing.colour) for thing in found)
        assert background == (re.search(r"on a (\w+) background", caption) or ["", "white"])[1]


def test_positions_in_captions_hold():
    rng = random.Random(5)
    for scene, caption in (picture_scene(rng) for _ in range(SCENES)):
        first, last = scene.things[0], scene.things[-1]
        if " above " in caption:
            assert first.cell // 3 < last.cell // 3
        if " left of " in caption:
            assert first.cell % 3 < last.cell % 3
        places = re.findall(r"at the ((?:[a-z]+ )?[a-z]+?)(?= and| on|$)", caption)
        assert places in ([], [PLACES[thing.cell] for thing in scene.things])


def answer_from_picture(question, found):
    """The answer read off the picture, or None for a kind this oracle does not know."""
    text = question.text
    if match := re.match(r"How many (?:(\w+) )?(objects|circles|squares|triangles|crosses) are there", text):
        colour, noun = match.groups()
        fits = [
            f
            for f in found
            if colour in (None, f.colour) and noun in ("objects", f.shape + "s", f.shape + "es")
        ]
        return str(len(fits))
    if match := re.match(r"Where is the (\w+) (\w+)\?", text):
        colour, shape = match.groups()
        (thing,) = [f for f in found if f.colour == colour and shape in ("object", f.shape)]
        return PLACES[thing.cell]
    if match := re.match(r"Is the (\w+) (\w+) (left of|right of|above|below) the (\w+) (\w+)\?", text):
        (here,) = [f for f in found if (f.colour, f.shape) == match.group(1, 2)]
        (there,) = [f for f in found if (f.colour, f.shape) == match.group(4, 5)]
        axis, sign = {"left of": (1, 1), "right of": (1, -1), "above": (0, 1), "below": (0, -1)}[match[3]]
        return "yes" if sign * divmod(here.cell, 3)[axis] < sign * divmod(there.cell, 3)[axis] else "no"
    if match := re.match(r"What color is the (circle|square|triangle|cross)\?", text):
        (thing,) = [f for f in found if f.shape == match[1]]
        return thing.colour
    if match := re.match(r"What shape is the (\w+) object", text):
        (thing,) = [f for f in found if f.colour == match[1]]
        return thing.shape
    if match := re.match(r"Is there an? (\w+) (\w+)", text):
        return "yes" if any((f.colour, f.shape) == match.group(1, 2) for f in found) else "no"
    return None


def test_answers_agree_with_the_picture():
    rng, checked = random.Random(8), set()
    for scene in scenes_without_digits(6):
        _, found = recognise(render(scene))
        for question in questions(scene, rng):
            expected = answer_from_picture(question, found)
            if expected is not None:
                assert question.answer == expected, (layout_words(scene), question)
                checked.add(question.kind)
    assert checked >= {"count", "place", "compare", "colour", "shape", "exists"}


def test_digit_questions_name_the_drawn_digit():
    rng = random.Random(9)
    for _ in range(SCENES):
        scene = question_scene(rng, digit_share=1)
        (digit,) = [thing for thing in scene.things if thing.is_digit]
        answers = {q.answer for q in questions(scene, rng) if q.kind == "digit"}
        assert answers == {digit.name}
        assert f"{PLACES[digit.cell]}: {digit.colour} digit {digit.name}" in listing(scene)


def test_every_kind_of_question_is_asked():
    rng = random.Random(10)
    kinds = {question.kind for _ in range(100) for question in questions(question_scene(rng), rng)}
    assert kinds >= set(SHORT_KINDS)


def test_a_tenth_is_held_out():
    rng = random.Random(11)
    captions = {picture_scene(rng)[1] for _ in range(4000)}
    assert 0.07 < sum(map(held_out, captions)) / len(captions) < 0.13
    assert {
        colour for caption in captions if held_out(caption) for colour in COLOURS if colour in caption
    } == set(COLOURS)
    assert {
        shape for caption in captions if held_out(caption) for shape in SHAPES if shape in caption
    } == set(SHAPES)
