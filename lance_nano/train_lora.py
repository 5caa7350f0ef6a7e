"""Train a LoRA on lance-nano: a new shape that it draws, names, or both; minutes on a CPU.

    python -m lance_nano.train_lora --out runs/ring_gen.safetensors --experts gen        # draws it
    python -m lance_nano.train_lora --out runs/ring_und.safetensors --experts und    # answers with it

Reads   lance_nano/checkpoint
Writes  OUT, a LoRA in PEFT's names with its alpha in it, and nothing else
Next    lance-quant draw "a red ring" --lora OUT; python -m lance_nano.check_lora --lora OUT

The loss is the one that lance-nano was trained with: flow matching on latents for the generation expert, next tokens
of answers for the understanding expert. Half of the scenes have the shape, so that what was known stays known; the
model's own weights do not move. Factors of rank 8 beside every linear of the expert, AdamW, a rate that falls linearly
to 0.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lance_nano import CHECKPOINT, questions, recognise, scenes
from lance_nano.data import IGNORE, Packer
from lance_nano.model import NanoConfig
from lance_nano.progress import log, start_logging
from lance_nano.questions import one_per_kind
from lance_nano.scenes import Scene, held_out, layout_words, picture_scene, question_scene, render
from lance_nano.tokenizer import learned_words
from lance_nano.train import COPIES, QUESTIONS, TIME_SHIFT, Nano, padded_vocabulary
from lance_quant.cli import script
from lance_quant.errors import InputError, require_whole
from lance_quant.formats import layout
from lance_quant.inference.pipeline import Pipeline
from lance_quant.lance.media.vision import unit_range
from lance_quant.storage.atomic import whole_file
from lance_quant.storage.output_place import require_free
from lance_quant.storage.tensor_file import write_tensors

SHAPE = "ring"  # of what the VAE can draw: it knows no other colours, and rounds a diamond off
RANK, ALPHA, RATE = 8, 8.0, 3e-3
BATCH, SCENES = 8, 256
SHARE = 0.5  # of scenes with the new shape
LOG_EVERY = 100


@contextlib.contextmanager
def new_shape() -> Iterator[None]:
    """SHAPE is one of the shapes that scenes are drawn with, and that the recogniser knows."""
    known = scenes.SHAPES
    for module in (scenes, recognise, questions):
        vars(module)["SHAPES"] = (*known, SHAPE)
    recognise._templates.cache_clear()
    try:
        yield
    finally:
        for module in (scenes, recognise, questions):
            vars(module)["SHAPES"] = known
        recognise._templates.cache_clear()


def has_shape(scene: Scene) -> bool:
    """Whether anything in a scene has the new shape."""
    return any(thing.name == SHAPE for thing in scene.things)


class LowRank(nn.Module):
    """A linear with a branch that is trained: y = W x + alpha / rank * B (A x); B begins as 0."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(RANK, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.base(x) + F.linear(F.linear(x, self.a), self.b) * (ALPHA / RANK)


def with_branches(nano: Nano, expert: str) -> dict[str, LowRank]:
    """Freeze a model and give every linear of an expert a branch; by the linear's name in a checkpoint."""
    nano.requires_grad_(False)
    found = {}
    for name, module in list(nano.lance.named_modules()):
        inside = name.startswith(f"{layout.LAYERS}.") and layout.expert_of(name) == expert
        if isinstance(module, nn.Linear) and inside:
            owner, _, last = name.rpartition(".")
            found[name] = LowRank(module)
            setattr(nano.lance.get_submodule(owner), last, found[name])
    return found


class Drawn(NamedTuple):
    """Captions, and latents float32 [n, 49, 48] of their scenes."""

    captions: list[str]
    latents: Tensor


def drawn_scenes(rng: random.Random, pipeline: Pipeline) -> Drawn:
    """SCENES captions that are not held out, and what the VAE makes of their pictures."""
    captions, latents = [], []
    while len(captions) < SCENES:
        scene, caption = picture_scene(rng)
        wanted = len(captions) < SHARE * SCENES
        if held_out(caption) or has_shape(scene) != wanted:
            continue
        pixels = torch.from_numpy(render(scene).copy()).permute(2, 0, 1)[:, None]
        latents.append(pipeline.runtime.vae.encode(unit_range(pixels)).mean.reshape(49, 48))
        captions.append(caption)
    return Drawn(captions, torch.stack(latents))


def drawing_loss(nano: Nano, packer: Packer, drawn: Drawn, rng: random.Random) -> Tensor:
    """Mean squared velocity error over BATCH captions with COPIES noise levels each."""
    chosen = rng.sample(range(len(drawn.captions)), BATCH)
    batch = packer.picture_batch([drawn.captions[index] for index in chosen], [None] * BATCH, COPIES)
    uniform = torch.sigmoid(torch.randn(BATCH, COPIES))
    t = TIME_SHIFT * uniform / (1 + (TIME_SHIFT - 1) * uniform)
    clean = drawn.latents[chosen].repeat(1, COPIES, 1)
    noise = torch.randn(clean.shape)
    level = t.repeat_interleave(drawn.latents.shape[1], 1)[..., None]
    return F.mse_loss(nano.lance.velocity(batch, (1 - level) * clean + level * noise, t), noise - clean)


def asked_scene(rng: random.Random, new: bool) -> Scene:
    """A question scene that is not held out, with or without the new shape."""
    while True:
        scene = question_scene(rng)
        if has_shape(scene) == new and not held_out(layout_words(scene)):
            return scene


def answering_loss(nano: Nano, packer: Packer, rng: random.Random) -> Tensor:
    """Mean cross-entropy over the answers to questions about BATCH pictures."""
    shown = [asked_scene(rng, index < SHARE * BATCH) for index in range(BATCH)]
    rows = [[(question.text, (*packer.words.ids(question.answer), packer.end))
             for question in list(one_per_kind(scene, rng))[:QUESTIONS]] for scene in shown]
    batch = packer.question_batch(rows)
    wanted = batch.labels != IGNORE
    logits = nano.lance.logits(batch, nano.vit(torch.from_numpy(np.stack([render(scene) for scene in shown]))), wanted)
    return F.cross_entropy(logits, batch.labels[wanted])


def train(expert: str, steps: int, seed: int) -> dict[str, Tensor]:
    """The tensors of a LoRA file, after `steps` steps."""
    rng, packer = random.Random(seed), Packer(learned_words())
    torch.manual_seed(seed)
    nano = Nano(NanoConfig(padded_vocabulary(packer.words)))
    weights = load_file(CHECKPOINT / "model.safetensors")
    nano.lance.load_state_dict({name: weight for name, weight in weights.items() if name != layout.IGNORED})
    nano.vit.load_state_dict(load_file(CHECKPOINT.parent / "Qwen2.5-VL-ViT" / "vit.safetensors"))
    branches = with_branches(nano, expert)
    optimiser = torch.optim.AdamW([p for branch in branches.values() for p in (branch.a, branch.b)], lr=RATE,
                                  weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    with new_shape():
        drawn = drawn_scenes(rng, Pipeline.load(CHECKPOINT, device="cpu")) if expert == "gen" else None
        total = 0.0
        for step in range(1, steps + 1):
            loss = answering_loss(nano, packer, rng) if drawn is None else drawing_loss(nano, packer, drawn, rng)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            falling.step()
            total += loss.item()
            if step % LOG_EVERY == 0:
                log.info("step %d  loss %.4f", step, total / LOG_EVERY)
                total = 0.0
    return tensors_of(branches)


def tensors_of(branches: dict[str, LowRank]) -> dict[str, Tensor]:
    """A LoRA file's tensors, bfloat16: lora_A [rank, in], lora_B [out, rank] and alpha by linear."""
    made: dict[str, Tensor] = {}
    for name, branch in branches.items():
        made[f"base_model.model.{name}.lora_A.weight"] = branch.a.detach().bfloat16().contiguous()
        made[f"base_model.model.{name}.lora_B.weight"] = branch.b.detach().bfloat16().contiguous()
        made[f"base_model.model.{name}.alpha"] = torch.tensor(ALPHA)
    return made


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__ or "")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--experts", choices=["und", "gen"], required=True,
                        help="und learns to name the shape, gen to draw it")
    parser.add_argument("--steps", type=int, default=800, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, noise and the first factors")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, and write the file."""
    args = parse_args(argv)
    start_logging()
    require_whole("--steps", args.steps, 1, 10**6)
    if args.out.suffix != ".safetensors":
        raise InputError(f"--out {args.out} must end with .safetensors")
    require_free(args.out)
    tensors = train(args.experts, args.steps, args.seed)
    with whole_file(args.out) as partial:
        write_tensors(partial, tensors)
    script.result(args.out)


if __name__ == "__main__":
    script.run(main)
