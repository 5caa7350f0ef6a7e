"""Train the picture codec of lance-nano.

    python -m lance_nano.train_vae --out runs/vae.pt --minutes 20 --processes 3

Loss: MSE + 0.3 L1, a light pull of the latents to zero, and noise on them, so that the decoder forgives what
the sampler gets slightly wrong. Ends by folding the latent statistics in (see vae.py) and reporting PSNR and
how often the recogniser still reads the picture right after a round trip. Killed runs go on where they
stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from lance_nano import optim
from lance_nano.progress import Clock, Means, generator_for, load_state, log, save_state, start_logging
from lance_nano.recognise import shows_layout
from lance_nano.scenes import Scene, picture_scene, question_scene, render
from lance_nano.vae import decode, encode, fold_statistics, frame_vae, to_unit
from lance_quant.cli import script

LATENT_NOISE = 0.05
LATENT_PULL = 1e-4
MUON_LR, ADAM_LR = 2e-3, 1e-3
LOG_EVERY, SAVE_EVERY = 50, 250
STATISTICS_PICTURES, TEST_PICTURES = 1024, 256


def scenes(seed: int, step: int, rank: int, count: int) -> list[Scene]:
    """A batch of scenes, half of each kind, that depends on its arguments only."""
    rng = generator_for(seed, step, rank)
    return [picture_scene(rng)[0] if index % 2 else question_scene(rng) for index in range(count)]


def pictures(batch: list[Scene]) -> Tensor:
    """uint8 [n, 112, 112, 3]."""
    return torch.from_numpy(np.stack([render(scene) for scene in batch]))


def reconstruction_loss(vae: AutoencoderKLWan, target: Tensor) -> Tensor:
    """target: [n, 3, 1, height, width] in -1..1."""
    latent = vae.encode(target).latent_dist.mean
    output = vae.decode(latent + LATENT_NOISE * torch.randn_like(latent)).sample
    error = F.mse_loss(output, target) + 0.3 * F.l1_loss(output, target)
    return error + LATENT_PULL * latent.square().mean()


def psnr(vae: AutoencoderKLWan, pictures_u8: Tensor) -> float:
    """Mean peak signal-to-noise ratio of a round trip, dB."""
    error = decode(vae, encode(vae, pictures_u8), (7, 7)).float() - pictures_u8.float()
    return float((10 * torch.log10(255**2 / error.square().flatten(1).mean(1))).mean())


def recognised(vae: AutoencoderKLWan, count: int, seed: int) -> float:
    """Share of caption scenes the recogniser reads exactly right after a round trip."""
    rng = generator_for(seed)
    drawn = [picture_scene(rng)[0] for _ in range(count)]
    decoded = decode(vae, encode(vae, pictures(drawn)), (7, 7)).numpy()
    return sum(shows_layout(scene, picture) for scene, picture in zip(drawn, decoded, strict=True)) / count


def optimiser_for(vae: AutoencoderKLWan) -> optim.MuonAdamW:
    """Muon for the convolutions, AdamW for biases and norms."""
    matrices = [p for p in vae.parameters() if p.ndim == 4 and p.shape[1] > 1]
    chosen = {id(p) for p in matrices}
    rest = [p for p in vae.parameters() if id(p) not in chosen]
    return optim.MuonAdamW(matrices, rest, MUON_LR, ADAM_LR, betas=(0.9, 0.95))


def finish(vae: AutoencoderKLWan, seed: int, out: Path) -> None:
    """Fold the statistics, write the codec, report."""
    vae.eval()
    with torch.no_grad():
        sample = pictures(scenes(seed + 1, 0, 0, STATISTICS_PICTURES))
        raw = torch.cat([vae.encode(to_unit(part)).latent_dist.mean for part in sample.split(16)])
    fold_statistics(vae, raw.mean((0, 2, 3, 4)), raw.std((0, 2, 3, 4)))
    save_state(out, model=vae.state_dict())
    quality = psnr(vae, pictures(scenes(seed + 2, 0, 0, TEST_PICTURES)))
    share = recognised(vae, TEST_PICTURES, seed + 3)
    log.info(
        "wrote %s: %.2f dB, %.3f of %d recognised after a round trip", out, quality, share, TEST_PICTURES
    )


def train(out: Path, minutes: float, batch: int, seed: int, device: str) -> None:
    """The loop of one process; `batch` is its share."""
    start_logging()
    rank, _ = optim.world()
    torch.manual_seed(seed)
    vae = frame_vae().to(device)
    optimiser = optimiser_for(vae)
    state_path = out.with_suffix(".state")
    state = load_state(state_path) or {}
    if state:
        vae.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
    step, clock, means = state.get("step", 0), Clock(minutes, state.get("minutes", 0.0)), Means()
    torch.manual_seed(hash((seed, step, rank)))
    keep_going = torch.ones(1)
    while True:
        keep_going.fill_(float(rank == 0 and clock.fraction < 1))
        optim.sum_over_processes([keep_going])
        if not keep_going.item():
            break
        loss = reconstruction_loss(vae, to_unit(pictures(scenes(seed, step, rank, batch)).to(device)))
        loss.backward()
        norm = optimiser.step(optim.schedule(step, clock.fraction, warmup=50, hold=0.5))
        means.add(loss=loss.item(), norm=norm)
        step += 1
        if rank == 0 and step % LOG_EVERY == 0:
            log.info("step %d  %.1f min  %s", step, clock.minutes, means.take())
        if rank == 0 and step % SAVE_EVERY == 0:
            log.info("%.2f dB", psnr(vae, pictures(scenes(seed + 2, 0, 0, 32)).to(device)))
            save_state(
                state_path,
                model=vae.state_dict(),
                optimiser=optimiser.state_dict(),
                step=step,
                minutes=clock.minutes,
            )
    if rank == 0:
        finish(vae.cpu(), seed, out)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="trained codec (.pt); its .state resumes a run")
    add("--minutes", type=float, default=20.0, help="training time; the last half decays")
    add("--processes", type=int, default=3, help="single-thread processes, CPU only")
    add("--batch", type=int, default=4, help="pictures per process and step")
    add("--seed", type=int, default=0, help="of weights, scenes and noise")
    add("--device", default="cpu", help="cpu or cuda (one process)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    optim.launch(train, args.processes, args.out, args.minutes, args.batch, args.seed, args.device)


if __name__ == "__main__":
    script.run(main)
