#!/usr/bin/env python3
"""Compare quantizers on a trained two-expert model: answers and pictures of lance-nano, and how far each is off.

    python -m benchmarks.fidelity_nano --seeds 0 1 2
    python -m benchmarks.fidelity_nano --seeds 0 1 2 --variant outliers       # or like_lance

Reads   lance_nano/checkpoint (or --model_path)
Writes  nothing that stays; prints a table in Markdown and, as the last line, JSON
Needs   1.5 GB of memory per worker; on one CPU core about 20 minutes per seed

A seed decides which samples calibrate and which are held out, and the noise of the pictures. rtn: nearest rounding,
nothing scaled. published: `--recipe published`. ours_diagonal: ours from statistics alone. ours: with --capture.
ours_even: the same, but all tokens count alike in GPTQ, and its damping is that for such (lance_quant/methods/gptq.py).

Rates are pooled over the seeds, with 95 % Wilson intervals; answers are compared with the truth, and with the float
model's. KL: nats per token, teacher-forced on the float model's own answers to `--answers` further questions and a
fourth as many requests for a description. Velocity: relative error (not squared) on the float model's own trajectories,
guidance included, mean over steps and at three of them. Both are means over the seeds, in brackets the range; `of
published` is the ratio of the means, for velocity of their squares, for KL with a 95 % interval (bootstrap: answers are
drawn anew within each seed, the same ones for both models). In the JSON also KL by kind of answer, and the share of it
that the 1 % of the tokens has that have most.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import lance_nano_harness as harness
from benchmarks.lance_nano_harness import CPU, METHODS, Distance, Plan, Request, captures_in
from lance_nano import evaluate
from lance_quant.cli import script
from lance_quant.evaluation.metrics import token_divergence
from lance_quant.formats.base import Codec
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.lance.cache import allocate
from lance_quant.lance.runtime import Runtime
from lance_quant.lance.tokens import VIT, mrope_positions

CODECS: dict[str, Codec] = {"int4": Int4(64), "nvfp4": Nvfp4()}
APART = 10_000  # between the seed of the answers that are counted and of those that are compared token by token
TOGETHER = 128  # answers that run as one call
RESAMPLED = 2000  # draws behind the intervals of KL


@dataclass(frozen=True)
class Answers:
    """The float model's answers to held-out questions, short ones first, then descriptions: requests, token ids, and
    log-probabilities in front of each token."""

    short: int
    requests: list[Request]
    ids: list[list[int]]
    logprobs: list[Tensor]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    harness.add_model(parser)
    parser.add_argument("--formats", nargs="+", choices=CODECS, default=list(CODECS), help="which to measure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="see above")
    parser.add_argument("--answers", type=int, default=3200,
                        help="held-out questions for KL per seed, and a fourth as many descriptions")
    harness.add_plan(parser, Plan(questions=1024, captions=64, n=100, traced=16))
    parser.add_argument("--workers", type=int, default=1, help="seeds measured side by side")
    args = parser.parse_args(argv)
    harness.require_some("answers", args.answers)
    harness.plan_of(args)
    return args


@torch.no_grad()
def forced_logprobs(runtime: Runtime, requests: list[Request], ids: list[list[int]]) -> list[Tensor]:
    """Runtime.forced_logprobs of many answers; those with the same lengths of prompt and answer run together."""
    found: dict[int, Tensor] = {}
    alike = defaultdict(list)
    for index, ((sequence, _), answer) in enumerate(zip(requests, ids, strict=True)):
        alike[len(sequence.ids), len(answer), sequence.visuals, sequence.splits].append(index)
    for (_, count, *_), indices in alike.items():
        for start in range(0, len(indices), TOGETHER):
            part = indices[start:start + TOGETHER]
            hidden = _hidden(runtime, [requests[index] for index in part], [ids[index][:-1] for index in part])
            logits = runtime.model.language_model.lm_head(hidden[:, -count:])[..., :len(runtime.tokenizer)]
            found.update(zip(part, logits.float().log_softmax(-1), strict=True))
    return [found[index] for index in range(len(requests))]


def _hidden(runtime: Runtime, requests: list[Request], fed: list[list[int]]) -> Tensor:
    """Final hidden states of the last calls of requests and more tokens, all of the same lengths."""
    model, (first, _) = runtime.model, requests[0]
    x = torch.stack([model.embed(torch.cat([sequence.ids, sequence.ids.new_tensor(more)]))
                     for (sequence, _), more in zip(requests, fed, strict=True)])
    length = x.shape[1]
    rope = model.rope(mrope_positions(length, first.visuals))
    rows = allocate(model.config, [length] * len(requests), model.dtype, CPU)
    *before, last = first.bounds()
    for (start, end), split in zip([*before, (last[0], length)], first.splits, strict=True):
        if split.content == VIT:
            x[:, start + 1:end - 1] = torch.stack([vit_tokens for _, vit_tokens in requests])
        hidden = model.language_model.model({"und": x[:, start:end]}, tuple(part[:, :, start:end] for part in rope),
                                            rows, split.mode == "causal")["und"]
        for row in rows:
            row.commit(end - start)
    return hidden


def answers_of(runtime: Runtime, seed: int, count: int) -> Answers:
    """The float model on `count` short questions and a fourth as many descriptions; others than in its Baseline."""
    asked = [*evaluate.held_out_questions(count, seed + APART),
             *evaluate.held_out_descriptions(max(1, count // 4), seed + APART)]
    requests = harness.requests_of(runtime, asked)
    ids = [runtime.answer(*request, evaluate.MAX_ANSWER_TOKENS).ids for request in requests]
    return Answers(count, requests, ids, forced_logprobs(runtime, requests, ids))


def divergence(runtime: Runtime, answers: Answers) -> list[np.ndarray]:
    """By answer, the KL of every token. Arrays: a tensor takes a file descriptor on its way to another process."""
    found = forced_logprobs(runtime, answers.requests, answers.ids)
    return [token_divergence(*pair).kl.numpy() for pair in zip(answers.logprobs, found, strict=True)]


@dataclass(frozen=True)
class Judged:
    """A model with one seed: its distance, and by answer the KL of every token, for short answers and descriptions."""

    distance: Distance
    short: list[np.ndarray]
    long: list[np.ndarray]

    @property
    def kl(self) -> list[np.ndarray]:
        """By answer, the KL of every token."""
        return self.short + self.long


def measure(seed: int, args: argparse.Namespace) -> dict[str, Judged]:
    """Name of a model -> how far it is off, for one seed."""
    torch.set_num_threads(1)
    plan, found = harness.plan_of(args), {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = harness.variant_of(args.model_path, args.variant, work)
        stats = harness.calibrate(model, work, seed, plan.calibration, plan.sampling)
        runtime = harness.load(model)
        baseline, answers = harness.baseline_of(runtime, seed, plan), answers_of(runtime, seed, args.answers)

        def judged(runtime: Runtime) -> Judged:
            kl = divergence(runtime, answers)
            return Judged(harness.distance(runtime, baseline, seed, plan), kl[:answers.short], kl[answers.short:])

        found["float"] = judged(runtime)
        for format_ in args.formats:
            for method in METHODS:
                name, started = f"{format_} {method}", time.perf_counter()
                packed = harness.pack(model, work / name, CODECS[format_], method, stats, captures_in(work))
                seconds = time.perf_counter() - started
                found[name] = judged(harness.load_unpacked(model, packed))
                print(f"seed {seed}  {name:<20} KL {np.concatenate(found[name].kl).mean():.3e}  "
                      f"velocity {statistics.fmean(found[name].distance.velocity):.4f}  packed in {seconds:.0f} s",
                      file=sys.stderr)
    return found


def summarize(name: str, rows: list[Judged]) -> dict[str, Any]:
    """One model over its seeds."""
    apart = [row.distance for row in rows]
    velocity = [statistics.fmean(row.velocity) for row in apart]
    kl = [float(np.concatenate(row.kl).mean()) for row in rows]
    by_kind = {"short": [row.short for row in rows], "descriptions": [row.long for row in rows]}
    tokens = np.concatenate([part for row in rows for part in row.kl])
    return {"model": name, **{key: harness.pooled([getattr(row, key) for row in apart])
                              for key in ("answers", "same", "pictures")},
            "kl": statistics.fmean(kl), "kl_by_seed": kl,
            "kl_by_kind": {kind: statistics.fmean(float(np.concatenate(parts).mean()) for parts in found)
                           for kind, found in by_kind.items()},
            "tokens": len(tokens), "kl_in_top_percent": top_percent(tokens), "velocity": statistics.fmean(velocity),
            "velocity_by_seed": velocity, "velocity_by_step": harness.mean_by_step([row.velocity for row in apart])}


def top_percent(kl: np.ndarray) -> float:
    """What share of the sum the 1 % of the tokens has that have most."""
    total = float(kl.sum())
    return float(np.sort(kl)[-max(1, len(kl) // 100):].sum()) / total if total else float("nan")


def compare(rows: list[dict[str, Any]], runs: list[dict[str, Judged]]) -> None:
    """Add each packed model's errors relative to the published recipe's in the same format."""
    by_name = {row["model"]: row for row in rows}
    for row in rows:
        name = f"{row['model'].split()[0]} published"
        if name in by_name:
            published = by_name[name]
            row["kl_of_published"] = row["kl"] / published["kl"] if published["kl"] else float("nan")
            row["kl_of_published_interval"] = ratio_interval([run[row["model"]].kl for run in runs],
                                                             [run[name].kl for run in runs])
            row["squared_of_published"] = (row["velocity"] / published["velocity"]) ** 2


def ratio_interval(ours: list[list[np.ndarray]], theirs: list[list[np.ndarray]]) -> list[float]:
    """95 % interval of the ratio of two models' KL per token by the bootstrap: by seed and answer the tokens' KL."""
    rng, means = np.random.default_rng(0), np.zeros((2, RESAMPLED))
    for pair in zip(ours, theirs, strict=True):
        sums = np.array([[float(part.sum()) for part in kl] for kl in pair])
        tokens = np.array([len(part) for part in pair[0]])
        for index in range(RESAMPLED):
            drawn = rng.integers(0, len(tokens), len(tokens))
            means[:, index] += sums[:, drawn].sum(1) / tokens[drawn].sum()
    ratios = np.divide(*means, out=np.full(RESAMPLED, np.nan), where=means[1] > 0)
    return np.quantile(ratios, [0.025, 0.975]).tolist()


def table(rows: list[dict[str, Any]]) -> str:
    """The summary in Markdown; velocity errors at the first, middle and last step."""
    steps = len(rows[0]["velocity_by_step"])
    picked = [0, (steps - 1) // 2, steps - 1]
    head = ["model", "exact answers", "as the float model", "recognised pictures", "KL per token", "of published",
            "velocity error", "of published (squared)", *(f"step {index + 1}" for index in picked)]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        rates = [f"{100 * row[key]['rate']:.1f} % ({100 * row[key]['interval'][0]:.1f} .. "
                 f"{100 * row[key]['interval'][1]:.1f})" for key in ("answers", "same", "pictures")]
        errors = [[f"{row[key]:.3g} ({min(row[f'{key}_by_seed']):.3g} .. {max(row[f'{key}_by_seed']):.3g})",
                   f"{row[ratio]:.2f}" if ratio in row else ""]
                  for key, ratio in (("kl", "kl_of_published"), ("velocity", "squared_of_published"))]
        if "kl_of_published_interval" in row:
            errors[0][1] += " ({:.2f} .. {:.2f})".format(*row["kl_of_published_interval"])
        lines.append([row["model"], *rates, *errors[0], *errors[1],
                      *(f"{row['velocity_by_step'][index]:.3f}" for index in picked)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        runs = pool.starmap(measure, [(seed, args) for seed in args.seeds], chunksize=1)
    rows = [summarize(name, [run[name] for run in runs]) for name in runs[0]]
    compare(rows, runs)
    print(table(rows))
    settings = {key: value for key, value in vars(args).items() if key not in ("model_path", "workers")}
    print(json.dumps({**settings, **harness.machine(args.model_path), "models": rows}))


if __name__ == "__main__":
    script.run(main)
