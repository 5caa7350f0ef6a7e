"""Train lance-nano: next-token loss on answers and flow matching on latents, in one joint step.

    python -m lance_nano.train --vae runs/vae.pt --out runs/nano.pt --minutes 80 --processes 3
    python -m lance_nano.export --state runs/nano.pt --vae runs/vae.pt --out lance_nano/checkpoint

Every process draws its own pictures with five questions each and its own captions with two noise levels each;
gradients are averaged. Rates: Muon 3e-3 on the matrices, AdamW 3e-3 on the rest, warm-up, constant, linear to
2 %. The schedule follows --steps if given (then two runs with one seed are equal), otherwise the clock of
--minutes. The state file is written regularly and a killed run goes on from it; it holds the averaged weights
that are exported.
"""

from __future__ import annotations

import argparse
import copy
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lance_nano import optim
from lance_nano.data import IGNORE, Packer
from lance_nano.model import NanoConfig, NanoLance, NanoViT
from lance_nano.pool import Pool, build_pool
from lance_nano.progress import Clock, Means, generator_for, load_state, log, require_state, save_state, start_logging
from lance_nano.questions import description, one_per_kind
from lance_nano.scenes import Scene, held_out, layout_words, question_scene, render
from lance_nano.tokenizer import Words, learned_words
from lance_nano.vae import frame_vae
from lance_quant.cli import script
from lance_quant.errors import InputError

QUESTIONS, COPIES = 5, 2
LAGGING = ("compare", "count")  # kinds learned last: asked about every picture that allows them
DESCRIBED = 0.5  # share of pictures with one long answer among the five
DROPPED = 0.1  # share of captions left out, for guidance
TIME_SHIFT = 2.0
RATE, MUON_DECAY, ADAM_DECAY = 3e-3, 0.05, 0.01
WARMUP, HOLD = 200, 0.6
AVERAGE = 0.999
LOG_EVERY, SAVE_EVERY = 100, 250


@dataclass(frozen=True)
class Options:
    """What a training run is made of; the flags explain them.

    Raises:
        InputError: there is no codec.
    """

    vae: Path
    out: Path
    minutes: float
    steps: int
    pictures: int
    captions: int
    pool: int
    layers: int
    seed: int
    device: str

    def __post_init__(self) -> None:
        if not self.vae.is_file():
            raise InputError(f"codec not found: {self.vae}; python -m lance_nano.train_vae makes one")


class Nano(nn.Module):
    """Decoder and vision tower as one module; the two halves are exported to two files."""

    def __init__(self, config: NanoConfig):
        super().__init__()
        self.lance = NanoLance(config)
        self.vit = NanoViT(config)


def padded_vocabulary(words: Words) -> int:
    """Rows of the embedding: the tokenizer's length rounded up to a multiple of 64."""
    return -(-len(words) // 64) * 64


def training_scene(rng: random.Random) -> Scene:
    """A question scene whose layout is not held out."""
    scene = question_scene(rng)
    while held_out(layout_words(scene)):
        scene = question_scene(rng)
    return scene


def question_loss(
    nano: Nano, packer: Packer, rng: random.Random, count: int, device: str
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the answer tokens of `count` pictures, and the share predicted right."""
    scenes = [training_scene(rng) for _ in range(count)]
    rows = []
    for scene in scenes:
        asked = sorted(one_per_kind(scene, rng), key=lambda question: question.kind not in LAGGING)[:QUESTIONS]
        if rng.random() < DESCRIBED:
            asked[-1] = description(scene, rng)
        rows.append([(question.text, (*packer.words.ids(question.answer), packer.end)) for question in asked])
    batch = packer.question_batch(rows).to(device)
    pictures = torch.from_numpy(np.stack([render(scene) for scene in scenes])).to(device)
    wanted = batch.labels != IGNORE
    logits = nano.lance.logits(batch, nano.vit(pictures), wanted)
    labels = batch.labels[wanted]
    return F.cross_entropy(logits, labels), (logits.argmax(-1) == labels).float().mean()


def picture_loss(
    nano: Nano, packer: Packer, pool: Pool, rng: random.Random, count: int, device: str
) -> Tensor:
    """Mean squared velocity error over `count` captions with COPIES noise levels each."""
    captions, latents = pool.draw(rng.sample(range(len(pool.captions)), count))
    shown, shift = list(captions), [None] * count
    for index in range(count):
        if rng.random() < DROPPED:
            shown[index] = ""
            shift[index] = captions[index] if rng.random() < 0.5 else None
    batch = packer.picture_batch(shown, shift, COPIES).to(device)
    uniform = torch.sigmoid(torch.randn(count, COPIES))
    t = (TIME_SHIFT * uniform / (1 + (TIME_SHIFT - 1) * uniform)).to(device)
    clean = latents.repeat(1, COPIES, 1).to(device)
    noise = torch.randn(clean.shape).to(device)
    level = t.repeat_interleave(latents.shape[1], 1)[..., None]
    velocity = nano.lance.velocity(batch, (1 - level) * clean + level * noise, t)
    return F.mse_loss(velocity, noise - clean)


def optimiser_for(nano: Nano) -> optim.MuonAdamW:
    """Muon for the matrices inside the blocks, AdamW for embeddings, heads, norms and biases."""
    inside = ("lance.language_model.model.layers.", "vit.blocks.", "vit.merger.mlp.")
    named = list(nano.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and name.startswith(inside)]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    return optim.MuonAdamW(matrices, rest, RATE, RATE, muon_decay=MUON_DECAY, adam_decay=ADAM_DECAY)


class Run:
    """The state of one training process and its loop."""

    def __init__(self, options: Options):
        self.options = options
        self.rank, _ = optim.world()
        self.packer = Packer(learned_words())
        torch.manual_seed(options.seed)
        self.nano = Nano(NanoConfig(padded_vocabulary(self.packer.words), layers=options.layers))
        self.nano.to(options.device)
        self.average = copy.deepcopy(self.nano).requires_grad_(False)
        self.optimiser = optimiser_for(self.nano)
        self.pool = self._pool()
        self.step, spent = 0, 0.0
        if state := load_state(options.out):
            self.nano.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, spent = state["step"], state["minutes"]
        self.clock, self.means = Clock(options.minutes, spent), Means()

    def _pool(self) -> Pool:
        vae = frame_vae()
        vae.load_state_dict(require_state(self.options.vae, "codec")["model"])
        path = self.options.out.with_suffix(".latents.npy")
        build_pool(path, vae.eval(), self.options.seed, self.options.pool)
        return Pool(path, self.options.seed)

    def _fraction(self) -> float:
        """How much of the run is over, by steps or by the clock of the first process."""
        if self.options.steps:
            return self.step / self.options.steps
        shared = torch.tensor([self.clock.fraction if self.rank == 0 else 0.0])
        optim.sum_over_processes([shared])
        return shared.item()

    def train(self) -> None:
        """Train until the end of the schedule."""
        while (fraction := self._fraction()) < 1:
            self._one_step(fraction)
            if self.rank == 0 and self.step % LOG_EVERY == 0:
                log.info("step %d  %.1f min  %s", self.step, self.clock.minutes, self.means.take())
            if self.rank == 0 and self.step % SAVE_EVERY == 0:
                self.save()
        if self.rank == 0:
            self.save()
            log.info("done: %d steps in %.1f min", self.step, self.clock.minutes)

    def _one_step(self, fraction: float) -> None:
        options, rng = self.options, generator_for(self.options.seed, 1, self.step, self.rank)
        torch.manual_seed(rng.getrandbits(63))
        answer, right = question_loss(self.nano, self.packer, rng, options.pictures, options.device)
        flow = picture_loss(self.nano, self.packer, self.pool, rng, options.captions, options.device)
        (answer + flow).backward()
        norm = self.optimiser.step(optim.schedule(self.step, fraction, WARMUP, HOLD))
        self.step += 1
        optim.follow(self.average, self.nano, self.step, AVERAGE)
        self.means.add(answer=answer.item(), right=right.item(), flow=flow.item(), norm=norm)

    def save(self) -> None:
        """Write the state file, complete or not at all."""
        save_state(
            self.options.out, model=self.nano.state_dict(), average=self.average.state_dict(),
            optimiser=self.optimiser.state_dict(), config=asdict(self.nano.lance.config),
            step=self.step, minutes=self.clock.minutes, seed=self.options.seed,
        )  # fmt: skip


def train(options: Options) -> None:
    """One training process."""
    start_logging()
    Run(options).train()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    add = parser.add_argument
    add("--vae", type=Path, required=True, help="trained codec, of lance_nano.train_vae")
    add("--out", type=Path, required=True, help="state file (.pt); an existing one is continued")
    add("--minutes", type=float, default=80.0, help="training time; the last 40 %% decay")
    add("--steps", type=int, default=0, help="if given, end and decay by steps instead of minutes")
    add("--processes", type=int, default=3, help="single-thread processes, CPU only")
    add("--pictures", type=int, default=8, help="pictures to ask about per process")
    add("--captions", type=int, default=12, help="captions to draw per process")
    add("--pool", type=int, default=36000, help="caption scenes encoded beforehand")
    add("--layers", type=int, default=4, help="decoder layers")
    add("--seed", type=int, default=0, help="of weights, scenes and noise")
    add("--device", default="cpu", help="cpu or cuda (one process)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    given = vars(parse_args(argv))
    processes = given.pop("processes")
    optim.launch(train, processes, Options(**given))


if __name__ == "__main__":
    script.run(main)
