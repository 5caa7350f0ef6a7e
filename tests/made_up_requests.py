"""Requests to the golden checkpoint, short and without meaning, and what is made of their captures."""

import torch
from conftest import CPU, GOLDENS

from lance_quant.calibration.layer_inputs import LayerInputs
from lance_quant.formats import layout
from lance_quant.lance.cache import allocate
from lance_quant.methods.layer import PLACES
from lance_quant.storage.tensor_file import Checkpoint

SRC = GOLDENS / "checkpoint" / "Lance_3B"
TASKS = ("t2i", "x2t_image")
LAYERS, REQUESTS = 3, 4

# Flags of the scripts: one request of the golden inputs, as small as it can be.
SMALL_QUESTION = ["--task", "x2t_image", "--example_json", str(GOLDENS / "inputs" / "x2t_image.json"), "--limit", "1",
                  "--resolution", "image_112res"]
SMALL_PICTURE = ["--task", "t2i", "--example_json", str(GOLDENS / "inputs" / "t2i.json"), "--limit", "1",
                 "--video_height", "48", "--video_width", "48", "--num_timesteps", "2"]


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def positions(start, count):
    return torch.arange(start, start + count).expand(3, -1)


@torch.no_grad()
def draw(model, seed=0, steps=4, latents=24):
    """A request like t2i: a prompt in one of two cache rows, then denoising steps on both; the last hidden states."""
    rows = allocate(model.config, [20 + latents, 20 + latents], model.dtype, CPU)
    ids = torch.randint(500, (15,), generator=torch.Generator().manual_seed(seed))
    model.read(model.embed(ids[:5]), positions(0, 5), rows, True)
    model.read(model.embed(ids[5:]), positions(5, 10), rows[:1], True)
    rope = model.rope(positions(15, latents + 2))
    rope = tuple(x.expand(2, -1, -1, -1) for x in rope)
    hidden = []
    for step in range(steps):
        streams = {"und": model.embed(ids[:2]).expand(2, -1, -1),
                   "gen": rand(latents, model.config.hidden_size, seed=seed * 100 + step).expand(2, -1, -1)}
        hidden.append(model.language_model.model(streams, rope, rows, causal=False)["gen"])
    return hidden


@torch.no_grad()
def answer(model, seed=0, tokens=6):
    """A request like x2t: a bidirectional picture between causal texts, then tokens one by one."""
    (row,) = allocate(model.config, [40], model.dtype, CPU)
    ids = torch.randint(500, (16 + tokens,), generator=torch.Generator().manual_seed(seed))
    model.read(model.embed(ids[:4]), positions(0, 4), [row], True)
    model.read(model.embed(ids[4:12]), positions(4, 8), [row], False)
    model.read(model.embed(ids[12:16]), positions(12, 4), [row], True)
    for place in range(16, 16 + tokens):
        model.read(model.embed(ids[place:place + 1]), positions(place, 1), [row], True)


def weights_of(layer):
    with Checkpoint(SRC) as source:
        return {name: source.read(name, torch.float32) for name in layout.of_layer(source.specs, layer)}


def in_order(layer):
    """The groups as data flows."""
    return sorted(layout.groups(layer), key=lambda group: PLACES.index(group.place))


def failing_in(layer):
    """LayerInputs.end_layer of a job that is killed at the end of a layer."""
    end_layer = LayerInputs.end_layer

    def failing(self, current):
        if self._index == layer:
            raise KeyboardInterrupt
        end_layer(self, current)

    return failing


def captures_in(folder, tasks=TASKS):
    return [folder / f"{task}.safetensors" for task in tasks]
