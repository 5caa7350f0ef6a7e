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
import functools
import json
import multiprocessing
import platform
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

from lance_nano import evaluate, export, outliers, samples
from lance_nano.evaluate import RESOLUTION, Caption, Share
from lance_nano.questions import Question
from lance_nano.recognise import shows
from lance_nano.scenes import SIZE, Scene
from lance_quant.calibration import capture
from lance_quant.calibration.activation_stats import ActStats, Collector, merge, model_fingerprint
from lance_quant.calibration.layer_inputs import Replay, replay_of
from lance_quant.cli import script
from lance_quant.errors import InputError
from lance_quant.evaluation.metrics import step_errors, token_divergence
from lance_quant.formats import layout
from lance_quant.formats.base import Codec, Int4, Nvfp4
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.inference.tasks import Settings, load_samples, run_watched
from lance_quant.lance.cache import allocate
from lance_quant.lance.config import LancePaths
from lance_quant.lance.generation import Sampling, Step
from lance_quant.lance.runtime import Runtime
from lance_quant.lance.tokens import VIT, mrope_positions
from lance_quant.methods import convert
from lance_quant.storage.tensor_file import Checkpoint
from quantized_linear import swap_linears

MODEL = Path(__file__).parent.parent / "lance_nano" / "checkpoint" / "Lance_nano"
TASKS = ("x2t_image", "t2i")
METHODS = ("rtn", "published", "ours_diagonal", "ours_even", "ours")
CODECS: dict[str, Codec] = {"int4": Int4(64), "nvfp4": Nvfp4()}
VARIANTS = {"outliers": [], "like_lance": ["--factor", "16", "--fed_factor", "0.125", "--share", "0.005"]}
CPU = torch.device("cpu")
APART = 10_000  # between the seed of the answers that are counted and of those that are compared token by token
TOGETHER = 128  # answers that run as one call
RESAMPLED = 2000  # draws behind the intervals of KL


@dataclass
class Answers:
    """The float model's answers to held-out questions, short ones first, then descriptions: prompts, token ids, and
    log-probabilities in front of each token."""

    short: int
    prompts: list[tuple]
    ids: list[list[int]]
    logprobs: list[Tensor]


@dataclass
class Baseline:
    """What the float model did on the held-out samples of a seed.

    asked: short questions, then descriptions, with its answer's token ids and their log-probabilities
    texts: those answers, decoded
    traces: all steps of the first pictures
    """

    asked: list[tuple[Scene, Question]]
    ids: list[list[int]]
    logprobs: list[Tensor]
    texts: list[str]
    captions: list[Caption]
    traces: list[list[Step]]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--model_path", type=Path, default=MODEL, help="a lance-nano folder")
    parser.add_argument("--variant", choices=("plain", *VARIANTS), default="plain",
                        help="with outliers put in, see lance_nano/outliers.py: its defaults, or as large as Lance's")
    parser.add_argument("--formats", nargs="+", choices=CODECS, default=list(CODECS), help="which to measure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="see above")
    parser.add_argument("--questions", type=int, default=1024, help="that calibrate")
    parser.add_argument("--captions", type=int, default=64, help="that calibrate")
    parser.add_argument("--answers", type=int, default=3200,
                        help="held-out questions for KL per seed, and a fourth as many descriptions")
    parser.add_argument("--n", type=int, default=100, help="held-out questions, and captions, per seed, for rates")
    parser.add_argument("--traced", type=int, default=16, help="captions of those whose velocities are compared")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps")
    parser.add_argument("--workers", type=int, default=1, help="seeds measured side by side")
    args = parser.parse_args(argv)
    for name in ("answers", "n", "traced"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: at least one is needed")
    return args


def settings_of(task: str, seed: int, args: argparse.Namespace) -> Settings:
    """The settings of a calibration run at lance-nano's size."""
    return Settings(task, RESOLUTION, SIZE, SIZE, seed=seed, sampling=sampling_of(args))


def calibrate(model: Path, work: Path, seed: int, args: argparse.Namespace) -> ActStats:
    """Statistics of both tasks, and a capture of each in `work`."""
    samples.write(work / "samples", max(args.questions, args.captions), seed)
    pipeline = Runtime.load(LancePaths.find(model), CPU, torch.float32)
    with Checkpoint(model) as source:
        fingerprint, names = model_fingerprint(source), layout.linears(layout.num_layers(source.specs))
    parts = []
    for task, count in zip(TASKS, (args.questions, args.captions), strict=True):
        file = work / f"samples/calibrate_{task}.json"
        settings = settings_of(task, seed, args)
        wanted = load_samples(file, settings, count)
        with Collector(pipeline.model, names) as collector, \
                capture.recording(pipeline.model, work / f"{task}.safetensors", task, fingerprint) as begin:
            run_watched(pipeline, wanted, settings, range(len(wanted)), begin)
        parts.append(collector.stats(task, {"model": fingerprint}))
    return merge(parts)


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The official sampler with a number of steps."""
    return Sampling(num_timesteps=args.steps)


@torch.no_grad()
def baseline_of(pipeline: Runtime, seed: int, args: argparse.Namespace) -> Baseline:
    """The float model on the held-out samples."""
    asked = [*evaluate.held_out_questions(args.n, seed), *evaluate.held_out_descriptions(max(1, args.n // 4), seed)]
    ids, logprobs, texts = [], [], []
    for prompt in prompts_of(pipeline, asked):
        answer = pipeline.answer(*prompt, evaluate.MAX_ANSWER_TOKENS)
        ids.append(answer.ids)
        texts.append(answer.text)
        logprobs.append(pipeline.forced_logprobs(*prompt, answer.ids))
    captions, traces = evaluate.held_out_captions(args.n, seed), []
    for caption in captions[:args.traced]:
        steps: list[Step] = []
        pipeline.sample(pipeline.denoiser(caption.text, SIZE, SIZE, sampling_of(args)), seed, steps.append)
        traces.append(steps)
    return Baseline(asked, ids, logprobs, texts, captions, traces)


def prompts_of(pipeline: Runtime, asked: list[tuple[Scene, Question]]) -> list[tuple]:
    """The runtime's inputs for questions about scenes."""
    with tempfile.TemporaryDirectory() as folder:
        return [pipeline.ask(evaluate.request(scene, question, Path(folder)), RESOLUTION) for scene, question in asked]


@torch.no_grad()
def forced_logprobs(pipeline: Runtime, prompts: list[tuple], ids: list[list[int]]) -> list[Tensor]:
    """Runtime.forced_logprobs of many answers; those with the same lengths of prompt and answer run together."""
    found: dict[int, Tensor] = {}
    alike = defaultdict(list)
    for index, ((packed, _), answer) in enumerate(zip(prompts, ids, strict=True)):
        alike[len(packed.ids), len(answer), packed.visuals, packed.splits].append(index)
    for (_, count, *_), indices in alike.items():
        for start in range(0, len(indices), TOGETHER):
            part = indices[start:start + TOGETHER]
            hidden = _hidden(pipeline, [prompts[index] for index in part], [ids[index][:-1] for index in part])
            logits = pipeline.model.language_model.lm_head(hidden[:, -count:])[..., :len(pipeline.tokenizer)]
            found.update(zip(part, logits.float().log_softmax(-1), strict=True))
    return [found[index] for index in range(len(prompts))]


def _hidden(pipeline: Runtime, prompts: list[tuple], fed: list[list[int]]) -> Tensor:
    """Final hidden states of the last calls of prompts and more tokens, all of the same lengths."""
    model, (first, _) = pipeline.model, prompts[0]
    x = torch.stack([model.embed(torch.cat([packed.ids, packed.ids.new_tensor(more)]))
                     for (packed, _), more in zip(prompts, fed, strict=True)])
    length = x.shape[1]
    rope = model.rope(mrope_positions(length, first.visuals))
    rows = allocate(model.config, [length] * len(prompts), model.dtype, CPU)
    *before, last = first.bounds()
    for (start, end), split in zip([*before, (last[0], length)], first.splits, strict=True):
        if split.content == VIT:
            x[:, start + 1:end - 1] = torch.stack([vit_tokens for _, vit_tokens in prompts])
        hidden = model.language_model.model({"und": x[:, start:end]}, tuple(part[:, :, start:end] for part in rope),
                                            rows, split.mode == "causal")["und"]
        for row in rows:
            row.commit(end - start)
    return hidden


def loaded(model: Path, packed: Path | None) -> Runtime:
    """A model in float32; the weights of a packed folder are unpacked once."""
    if packed is None:
        return evaluate.load(model, None, "cpu", "float32")
    folder = PackedFolder(packed)
    prepare = functools.partial(swap_linears, folder=folder, dtype=torch.float32, device=CPU, mode="cached")
    return Runtime.load(LancePaths.find(model), CPU, torch.float32, folder.checkpoint.path, prepare)


def answers_of(pipeline: Runtime, seed: int, count: int) -> Answers:
    """The float model on `count` short questions and a fourth as many descriptions; others than in its Baseline."""
    asked = [*evaluate.held_out_questions(count, seed + APART),
             *evaluate.held_out_descriptions(max(1, count // 4), seed + APART)]
    prompts = prompts_of(pipeline, asked)
    ids = [pipeline.answer(*prompt, evaluate.MAX_ANSWER_TOKENS).ids for prompt in prompts]
    return Answers(count, prompts, ids, forced_logprobs(pipeline, prompts, ids))


def divergence(pipeline: Runtime, answers: Answers) -> list[np.ndarray]:
    """By answer, the KL of every token. Arrays: a tensor takes a file descriptor on its way to another process."""
    found = forced_logprobs(pipeline, answers.prompts, answers.ids)
    return [token_divergence(*pair).kl.numpy() for pair in zip(answers.logprobs, found, strict=True)]


def pack(model: Path, work: Path, format_: str, method: str, stats: ActStats) -> Path:
    """Quantize with one method; the folder."""
    out = work / f"{format_}-{method}"
    if method == "rtn":
        stats = ActStats({}, [], [{"run_id": "none"}], 0)
    captures, activations = [work / f"{task}.safetensors" for task in TASKS], None
    if method == "ours":
        activations = replay_of(model, captures, CPU)
    if method == "ours_even":
        config, calls, facts = capture.load_of(model, captures)
        activations = Replay(config, calls, CPU, facts)
    recipe = "published" if method == "published" else "ours"
    with Checkpoint(model) as source:
        convert.quantize_checkpoint(source, stats, CODECS[format_], out, recipe, CPU, False, activations)
    return out


@torch.no_grad()
def distance(pipeline: Runtime, baseline: Baseline, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Rates of a model, and how far it is from the baseline on the baseline's own tokens and trajectories."""
    texts, kl = [], []
    for prompt, ids, logprobs in zip(prompts_of(pipeline, baseline.asked), baseline.ids, baseline.logprobs,
                                     strict=True):
        texts.append(pipeline.answer(*prompt, evaluate.MAX_ANSWER_TOKENS).text)
        kl.append(token_divergence(logprobs, pipeline.forced_logprobs(*prompt, ids)).kl)
    right = [text == question.answer for text, (_, question) in zip(texts, baseline.asked, strict=True)][:args.n]
    errors = []
    for caption, trace in zip(baseline.captions, baseline.traces, strict=False):
        denoiser = pipeline.denoiser(caption.text, SIZE, SIZE, sampling_of(args))
        velocity = torch.stack([denoiser.velocity(step.x, step.t) for step in trace])
        errors.append(step_errors(velocity, torch.stack([step.velocity for step in trace])))
    drawn = [shows(caption.scene, np.asarray(draw(pipeline, caption.text, seed * 1_000_003 + index, args)))
             for index, caption in enumerate(baseline.captions)]
    return {"answers": Share(sum(right), len(right)), "pictures": Share(sum(drawn), len(drawn)),
            "same": Share(sum(ours == theirs for ours, theirs in zip(texts, baseline.texts, strict=True)), len(texts)),
            "kl": torch.cat(kl).mean().item(),
            "velocity": [statistics.fmean(step) for step in zip(*errors, strict=True)]}


def draw(pipeline: Runtime, text: str, seed: int, args: argparse.Namespace) -> Any:
    """A picture for a caption."""
    return pipeline.decode(pipeline.sample(pipeline.denoiser(text, SIZE, SIZE, sampling_of(args)), seed))


def measure(seed: int, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name of a model -> what `distance` found, for one seed."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work, model = Path(folder), args.model_path
        if args.variant != "plain":
            outliers.main(["--model_path", str(model), "--out", str(work / "variant"), *VARIANTS[args.variant]])
            model = work / "variant" / export.MODEL_FOLDER
        stats = calibrate(model, work, seed, args)
        pipeline = loaded(model, None)
        baseline, answers = baseline_of(pipeline, seed, args), answers_of(pipeline, seed, args.answers)

        def judged(pipeline: Runtime) -> dict[str, Any]:
            kl = divergence(pipeline, answers)
            return distance(pipeline, baseline, seed, args) | {"kl": kl[:answers.short], "kl_long": kl[answers.short:]}

        found["float"] = judged(pipeline)
        for format_ in args.formats:
            for method in METHODS:
                started = time.perf_counter()
                packed = pack(model, work, format_, method, stats)
                seconds = time.perf_counter() - started
                name = f"{format_} {method}"
                found[name] = judged(loaded(model, packed))
                print(f"seed {seed}  {name:<20} KL {np.concatenate(kl_of(found[name])).mean():.3e}  "
                      f"velocity {statistics.fmean(found[name]['velocity']):.4f}  packed in {seconds:.0f} s",
                      file=sys.stderr)
    return found


def summarize(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One model over its seeds."""
    def pooled(key: str) -> dict[str, Any]:
        share = Share(sum(row[key].right for row in rows), sum(row[key].total for row in rows))
        return {"rate": share.value, "interval": share.interval(), "n": share.total}

    velocity = [statistics.fmean(row["velocity"]) for row in rows]
    kl = [float(np.concatenate(kl_of(row)).mean()) for row in rows]
    by_kind = {kind: statistics.fmean(float(np.concatenate(row[key]).mean()) for row in rows)
               for kind, key in (("short", "kl"), ("descriptions", "kl_long"))}
    tokens = np.concatenate([part for row in rows for part in kl_of(row)])
    return {"model": name, "answers": pooled("answers"), "same": pooled("same"), "pictures": pooled("pictures"),
            "kl": statistics.fmean(kl), "kl_by_seed": kl, "kl_by_kind": by_kind, "tokens": len(tokens),
            "kl_in_top_percent": top_percent(tokens), "velocity": statistics.fmean(velocity),
            "velocity_by_seed": velocity,
            "velocity_by_step": [statistics.fmean(step) for step in zip(*(row["velocity"] for row in rows),
                                                                        strict=True)]}


def kl_of(found: dict[str, Any]) -> list[np.ndarray]:
    """By answer, the KL of every token."""
    return found["kl"] + found["kl_long"]


def top_percent(kl: np.ndarray) -> float:
    """What share of the sum the 1 % of the tokens has that have most."""
    total = float(kl.sum())
    return float(np.sort(kl)[-max(1, len(kl) // 100):].sum()) / total if total else float("nan")


def compare(rows: list[dict[str, Any]], runs: list[dict[str, dict[str, Any]]]) -> None:
    """Add each packed model's errors relative to the published recipe's in the same format."""
    by_name = {row["model"]: row for row in rows}
    for row in rows:
        name = f"{row['model'].split()[0]} published"
        if name in by_name:
            published = by_name[name]
            row["kl_of_published"] = row["kl"] / published["kl"] if published["kl"] else float("nan")
            row["kl_of_published_interval"] = ratio_interval([kl_of(run[row["model"]]) for run in runs],
                                                             [kl_of(run[name]) for run in runs])
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
    print(json.dumps({**settings, "model": args.model_path.name, "cpu": platform.processor() or platform.machine(),
                      "torch": torch.__version__, "models": rows}))


if __name__ == "__main__":
    script.run(main)
