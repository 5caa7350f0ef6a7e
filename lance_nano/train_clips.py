"""Fine-tune lance-nano on edits, clips and questions about clips, with its two old tasks mixed in.

    python -m lance_nano.train_clips --model_path lance_nano/checkpoint/Lance_nano --out runs/video.pt --minutes 60
    python -m lance_nano.train_clips --model_path lance_nano/checkpoint/Lance_nano --out runs/video.pt \\
        --export lance_nano/checkpoint/Lance_nano_Video

Every step draws --rows requests of each of the seven tasks, so that nothing is forgotten; ViT and VAE are those of
--model_path and stay as they are. The state file is written regularly and a killed run goes on from it; --export
writes its averaged weights, in bfloat16, and trains nothing. The schedule follows --steps if given, otherwise the clock
of --minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lance_nano import clips, optim, visual_batch
from lance_nano.evaluate import RESOLUTION, load
from lance_nano.model import LATENT_TABLE_NAME, NanoConfig, NanoLance, latent_positions
from lance_nano.progress import Clock, Means, generator_for, load_state, log, require_state, save_state, start_logging
from lance_nano.questions import one_per_kind
from lance_nano.scenes import held_out, layout_words, picture_scene, question_scene, render
from lance_quant.cli import script
from lance_quant.lance import tokens
from lance_quant.lance.generation import TEXT_ONLY, Given
from lance_quant.lance.runtime import Runtime
from lance_quant.storage.atomic import whole_folder

MADE = ("image_edit", "video_edit", "t2v", "i2v", "t2i")
ASKED = ("x2t_video", "x2t_image")
DROPPED, TIME_SHIFT = 0.1, 2.0  # as in train.py
RATE, MUON_DECAY, ADAM_DECAY = 1e-3, 0.05, 0.01  # a third of train.py's: the weights are trained already
WARMUP, HOLD, AVERAGE = 50, 0.6, 0.998
LOG_EVERY, SAVE_EVERY = 25, 100
TILE = 64  # cells per side of the official position table


@dataclass(frozen=True)
class Example:
    """A training row of a generation task with its target [cells, 48], or of a question with its answer's length."""

    row: visual_batch.Row
    prefix: Tensor
    target: Tensor | None = None
    answer: int = 0


def _encode(pipeline: Runtime, frames: list[Image.Image]) -> Tensor:
    return pipeline.encode(frames, RESOLUTION).float().clone()


def _edit(pipeline: Runtime, text: str, named: str, frames: list[Image.Image], target: Tensor, conditional: bool):
    vit, merged = pipeline.look(frames, RESOLUTION)
    source = _encode(pipeline, frames)
    grid = tuple(source.shape[:3])
    sources = [(tokens.VIT, merged), (tokens.CONDITION, grid)]
    sequence = tokens.generation_sequence(pipeline.tokenizer, tokens.EDIT_SYSTEM.format(named), text, grid, sources)
    return _made(sequence, Given(vit.float().clone(), source), target, conditional)


def _made(sequence: tokens.TokenSequence, given: Given, target: Tensor, conditional: bool) -> Example:
    prefix = sequence.splits[0].length
    row = visual_batch.row(sequence, prefix, given, conditional)
    return Example(row, sequence.ids[:prefix], target.reshape(-1, 48))


def _caption_scene(rng: random.Random) -> tuple[Image.Image, str]:
    scene, caption = picture_scene(rng)
    while held_out(caption):
        scene, caption = picture_scene(rng)
    return Image.fromarray(render(scene)), caption


@torch.no_grad()
def made(pipeline: Runtime, task: str, rng: random.Random) -> Example:
    """A request of a generation task that is not held out; a tenth comes without its prompt, for guidance."""
    conditional = rng.random() >= DROPPED
    if task == "image_edit":
        change = clips.drawn(clips.edit, rng, kept_back=False)
        first, then = clips.pictures(change)[:2]
        return _edit(pipeline, change.instruction, "image", [first], _encode(pipeline, [then]), conditional)
    if task == "video_edit":
        source, text, change = clips.clip_edit(rng, kept_back=False)
        target = _encode(pipeline, clips.pictures(change))
        return _edit(pipeline, text, "video", clips.pictures(source), target, conditional)
    if task == "t2i":
        picture, caption = _caption_scene(rng)
        target, system, first = _encode(pipeline, [picture]), tokens.T2I_SYSTEM, None
    else:
        change = clips.drawn(clips.clip, rng, kept_back=False)
        caption, system = change.caption, tokens.VIDEO_SYSTEM
        target = _encode(pipeline, clips.pictures(change))
        first = target[:1] if task == "i2v" else None
    sequence = tokens.generation_sequence(pipeline.tokenizer, system, caption, tuple(target.shape[:3]))
    return _made(sequence, TEXT_ONLY if first is None else Given(first=first), target, conditional)


@torch.no_grad()
def asked(pipeline: Runtime, task: str, rng: random.Random) -> Example:
    """A question about a clip or picture that is not held out."""
    if task == "x2t_video":
        change = clips.drawn(clips.clip, rng, kept_back=False)
        frames, questions, kind = clips.pictures(change), clips.clip_questions(change), "video"
    else:
        scene = question_scene(rng)
        while held_out(layout_words(scene)):
            scene = question_scene(rng)
        frames, questions, kind = [Image.fromarray(render(scene))], one_per_kind(scene, rng), "image"
    question = rng.choice(questions)
    vit, merged = pipeline.look(frames, RESOLUTION)
    system = tokens.QUESTION_SYSTEMS[kind]
    prompt = tokens.understanding_sequence(pipeline.tokenizer, system, question.text, merged)
    answer = [*pipeline.tokenizer.encode(question.answer), pipeline.tokenizer.im_end]
    prefix = prompt.splits[0].length
    row = visual_batch.row(visual_batch.answered(prompt, answer), prefix, Given(vit.float().clone()))
    return Example(row, prompt.ids[:prefix], answer=len(answer))


def flow_loss(lance: NanoLance, examples: list[Example]) -> Tensor:
    """Mean squared velocity error of requests of one generation task, outside a given first frame."""
    packed = visual_batch.batch([one.row for one in examples], examples[0].prefix)
    clean = torch.stack([one.target for one in examples if one.target is not None])
    uniform = torch.sigmoid(torch.randn(len(clean)))
    t = TIME_SHIFT * uniform / (1 + (TIME_SHIFT - 1) * uniform)
    noise, fixed = torch.randn(clean.shape), packed.rows[0].fixed
    noisy = (1 - t[:, None, None]) * clean + t[:, None, None] * noise
    noisy[:, :fixed] = clean[:, :fixed]
    error = visual_batch.velocity(lance, packed, noisy, t) - (noise - clean)
    return error[:, fixed:].square().mean()


def text_loss(lance: NanoLance, examples: list[Example]) -> Tensor:
    """Mean cross-entropy of answers to questions of one task."""
    packed = visual_batch.batch([one.row for one in examples], examples[0].prefix)
    return visual_batch.answer_loss(lance, packed, [one.answer for one in examples])


def trained_weights(folder: Path) -> NanoLance:
    """The decoder of an exported checkpoint, in float32, in the form that is trained."""
    config = json.loads((folder / "llm_config.json").read_text(encoding="utf-8"))
    lance = NanoLance(NanoConfig(config["vocab_size"], layers=config["num_hidden_layers"]))
    weights = load_file(folder / "model.safetensors")
    del weights[LATENT_TABLE_NAME]
    lance.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return lance


def optimiser_for(lance: NanoLance) -> optim.MuonAdamW:
    """Muon for the matrices of the layers, AdamW for the rest."""
    named = list(lance.named_parameters())
    inside = {name for name, p in named if p.ndim == 2 and name.startswith("language_model.model.layers.")}
    matrices, rest = ([p for name, p in named if (name in inside) is wanted] for wanted in (True, False))
    return optim.MuonAdamW(matrices, rest, RATE, RATE, muon_decay=MUON_DECAY, adam_decay=ADAM_DECAY)


class Run:
    """The state of a fine-tuning and its loop."""

    def __init__(self, model_path: Path, out: Path, minutes: float, steps: int, rows: int, seed: int):
        self.out, self.steps, self.rows, self.seed = out, steps, rows, seed
        self.pipeline = load(model_path, None, "cpu", "float32")
        self.lance = trained_weights(model_path)
        self.average = copy.deepcopy(self.lance).requires_grad_(False)
        self.optimiser = optimiser_for(self.lance)
        self.step, spent = 0, 0.0
        if state := load_state(out):
            self.lance.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, spent = state["step"], state["minutes"]
        self.clock, self.means = Clock(minutes, spent), Means()

    def train(self) -> None:
        """Train until the end of the schedule."""
        while (fraction := self.step / self.steps if self.steps else self.clock.fraction) < 1:
            self._one_step(fraction)
            if self.step % LOG_EVERY == 0:
                log.info("step %d  %.1f min  %s", self.step, self.clock.minutes, self.means.take())
            if self.step % SAVE_EVERY == 0:
                self.save()
        self.save()
        log.info("done: %d steps in %.1f min", self.step, self.clock.minutes)

    def _one_step(self, fraction: float) -> None:
        rng = generator_for(self.seed, 41, self.step)
        torch.manual_seed(rng.getrandbits(63))
        losses = {}
        for task in MADE:
            losses[task] = flow_loss(self.lance, [made(self.pipeline, task, rng) for _ in range(self.rows)])
            losses[task].backward()
        for task in ASKED:
            losses[task] = text_loss(self.lance, [asked(self.pipeline, task, rng) for _ in range(self.rows)])
            losses[task].backward()
        norm = self.optimiser.step(optim.schedule(self.step, fraction, WARMUP, HOLD))
        self.step += 1
        optim.follow(self.average, self.lance, self.step, AVERAGE)
        self.means.add(norm=norm, **{task: loss.item() for task, loss in losses.items()})

    def save(self) -> None:
        """Write the state file, complete or not at all."""
        save_state(
            self.out, model=self.lance.state_dict(), average=self.average.state_dict(), seed=self.seed,
            optimiser=self.optimiser.state_dict(), step=self.step, minutes=self.clock.minutes,
        )  # fmt: skip


def export(state: dict, model_path: Path, out: Path) -> None:
    """Write the averaged weights of a state with the configuration and tokenizer of `model_path` to the new `out`."""
    weights = {name: weight.bfloat16().contiguous() for name, weight in state["average"].items()}
    width = weights["vae2llm.weight"].shape[0]
    weights[LATENT_TABLE_NAME] = latent_positions(width, TILE).bfloat16()
    with whole_folder(out) as folder:
        for name in ("llm_config.json", *tokens.LanceTokenizer.FILES):
            shutil.copyfile(model_path / name, folder / name)
        facts = {"format": "pt", "steps": str(state["step"]), "seed": str(state["seed"])}
        save_file(weights, folder / "model.safetensors", metadata=facts)
        (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner only


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    add = parser.add_argument
    add("--model_path", type=Path, required=True, help="checkpoint to start from; ViT and VAE beside")
    add("--out", type=Path, required=True, help="state file (.pt); an existing one is continued")
    add("--minutes", type=float, default=60.0, help="training time; the last 40 %% decay")
    add("--steps", type=int, default=0, help="steps instead of minutes")
    add("--rows", type=int, default=4, help="requests of each of the seven tasks in a step")
    add("--seed", type=int, default=0, help="of scenes and noise")
    add("--export", type=Path, help="write the state file's averaged weights to this new folder, and do not train")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    if args.export is not None:
        export(require_state(args.out, "training state"), args.model_path, args.export)
        return
    start_logging()
    Run(args.model_path, args.out, args.minutes, args.steps, args.rows, args.seed).train()


if __name__ == "__main__":
    script.run(main)
