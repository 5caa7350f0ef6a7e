"""What the nodes do. One function per node, its parameters being the node's inputs (table.py).

Pictures are ComfyUI's IMAGE: float32 [n, height, width, 3] in 0..1 on the CPU. Nothing is written to disk.
"""

import functools
import math
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from . import checks, host, models, toolkit
from .handle import LanceModel, Spec, fit_line, handle_of
from .table import MAX_SEED
from .toolkit import PackError

if TYPE_CHECKING:
    from typing import Unpack

    from PIL import Image
    from torch import Tensor

    from lance_quant.lance.generation import Denoiser, Sampling, Step
    from lance_quant.lance.settings import Renorm, Solver
    from lance_quant.lance.understanding import TokenSampling

_NANO_SIDE = 112  # lance-nano's native pictures
_SIZES = {"image": (768, 768), "video": (848, 480)}  # what size auto means for Lance
_PRESETS = {"image": "image_768res", "video": "video_480p"}
Latent = dict[str, "Tensor"]  # ComfyUI's LATENT
_BLACKWELL = 10  # compute capability from which GPUs multiply NVFP4


def load_model(flavor: str, precision: str, checkpoint: str, device: str, mode: str,
               keep_loaded: bool, offload: str, vae_tiling: bool, kernel: str,
               loras: str = "") -> tuple[LanceModel, str]:
    """Lance Model Loader."""
    toolkit.require()
    _LOADER(flavor, precision, checkpoint, device, mode, keep_loaded, offload, vae_tiling, kernel, loras)
    choice = _choice(flavor, precision, checkpoint, device)
    stamp = model_fingerprint(flavor, precision, checkpoint, device, loras=loras)
    lines = tuple(line.strip() for line in loras.splitlines() if line.strip())
    model = handle_of(Spec(choice, stamp, device, mode, keep_loaded, offload, vae_tiling, kernel, lines))
    missing = [name for name, part in (("ViT", choice.vit), ("VAE", choice.vae)) if part is None]
    info = "\n".join([f"{choice.found.label}: {choice.found.flavor}, {choice.found.precision}",
                      f"weights {choice.found.weights}", f"why: {choice.reason}",
                      *([f"not found: {', '.join(missing)}"] if missing else [])])
    host.log.info("Lance: %s", info.replace("\n", "; "))
    if choice.found.label == models.NANO_LABEL and flavor == "auto":
        host.say(choice.reason)
    with _in_words():
        model.load()
    return model, info


_LOADER = checks.of(load_model)


def validate_model(flavor: str | None = None, precision: str | None = None,
                   checkpoint: str | None = None) -> bool | str:
    """The loader's widgets, before anything runs. A linked one arrives as None and is checked when its value is known.

    ComfyUI leaves the check of combo values to a validator that names them. Which checkpoint is there is looked at when
    the node runs: ComfyUI says what a validator finds once for every node behind it, under a heading of its own.
    """
    settings = ((flavor, ("auto", *models.FLAVORS)), (precision, ("auto", "bf16", "awq_int4", "nvfp4")))
    for value, allowed in settings:
        if value is not None and value not in allowed:
            return f"{value!r} is none of {', '.join(allowed)}"
    return True


def model_fingerprint(flavor: str, precision: str, checkpoint: str, device: str = "auto", loras: str = "",
                      **_: object) -> str:
    """Changes when the loader would load something else: another file, the same path with new content, or a part that
    was missing."""
    try:
        choice = _choice(flavor, precision, checkpoint, device)
        weights = _stamp(choice.found.weights)
    except (PackError, OSError) as error:
        return str(error)
    parts = [choice.config / "llm_config.json", choice.vit and choice.vit / "vit.safetensors", choice.vae]
    return " ".join([weights, *(_stamp(part) if part and part.is_file() else "-" for part in parts),
                     *map(_lora_stamp, loras.splitlines())])


def _stamp(file: Path) -> str:
    stat = file.stat()
    return f"{file} {stat.st_size} {stat.st_mtime_ns}"


def _choice(flavor: str, precision: str, checkpoint: str, device: str) -> models.Choice:
    return models.choose(flavor, precision, checkpoint, _is_blackwell(device), host.total_memory(device))


def _lora_stamp(line: str) -> str:
    """Changes with a line of the loader's LoRAs, and with its file."""
    for text in (line.strip(), line.rpartition(":")[0].strip()):
        file = host.lora_file(Path(text)) if text else None
        if file is not None and file.is_file():
            stat = file.stat()
            return f"{line.strip()} {stat.st_size} {stat.st_mtime_ns}"
    return line.strip()


def _is_blackwell(device: str) -> bool:
    import torch

    target = host.device(device)
    return target.type == "cuda" and torch.cuda.get_device_capability(target)[0] >= _BLACKWELL


def uses(*parts: str) -> Callable[[Callable], Callable]:
    """A node that uses a model and some of its parts: "vit", "vae".

    What can be wrong with its inputs or missing of the model is said before anything runs. The model is freed
    afterwards, also after an error, where the loader says so.
    """

    def around(run: Callable) -> Callable:
        check = checks.of(run)

        @functools.wraps(run)
        def guarded(model: LanceModel, *args: Any, **inputs: Any) -> Any:
            check(model, *args, **inputs)
            try:
                model.require(*parts)
                with _in_words():
                    return run(model, *args, **inputs)
            finally:
                if not model.spec.keep_loaded:
                    model.release()

        return guarded

    return around


@contextmanager
def _in_words() -> Iterator[None]:
    """What lance_quant refuses, with a command's flags as the names that inputs have here."""
    from lance_quant.errors import InputError

    try:
        yield
    except InputError as error:
        raise PackError(re.sub(r"--(?=\w)", "", str(error))) from error


class Extra(TypedDict, total=False):
    """Widgets of the sampler that prompts of earlier versions do not have; absent, they change nothing."""

    solver: "Solver"
    reuse: float
    cfg_renorm: "Renorm"


@uses("vae")
def text_to_image(model: LanceModel, prompt: str, size: str, width: int, height: int, batch: int, steps: int,
                  cfg: float, seed: int, timestep_shift: float, cfg_start: float, cfg_end: float,
                  low_memory: bool, **extra: "Unpack[Extra]") -> tuple["Tensor", Latent]:
    """Lance Text to Image."""
    sampling = _sampling(steps, cfg, timestep_shift, cfg_start, cfg_end, low_memory, **extra)
    wide, high = _size(model, size, width, height, "image")
    with model.ready("model") as pipeline:
        denoiser = pipeline.denoiser(_text(prompt, "prompt"), high, wide, sampling)
        latents = _draw(model, pipeline, denoiser, seed, batch)
    return _decode(model, latents), _latent(latents)


@uses("vae")
def text_to_video(model: LanceModel, prompt: str, size: str, width: int, height: int, frames: int, fps: int, steps: int,
                  cfg: float, seed: int, timestep_shift: float, cfg_start: float, cfg_end: float,
                  low_memory: bool, **extra: "Unpack[Extra]") -> tuple[Any, "Tensor", Latent]:
    """Lance Text to Video."""
    _require_video(model, "Text to Video")
    sampling = _sampling(steps, cfg, timestep_shift, cfg_start, cfg_end, low_memory, **extra)
    wide, high = _size(model, size, width, height, "video")
    with model.ready("model") as pipeline:
        denoiser = pipeline.denoiser(_text(prompt, "prompt"), high, wide, sampling, frames)
        latents = _draw(model, pipeline, denoiser, seed)
    return *_clip(_decode(model, latents), fps), _latent(latents)


@uses("vae")
def image_to_video(model: LanceModel, image: "Tensor", prompt: str, resolution: str, frames: int, fps: int, steps: int,
                   cfg: float, seed: int, timestep_shift: float, cfg_start: float, cfg_end: float,
                   low_memory: bool, **extra: "Unpack[Extra]") -> tuple[Any, "Tensor", Latent]:
    """Lance Image to Video."""
    _require_video(model, "Image to Video")
    sampling = _sampling(steps, cfg, timestep_shift, cfg_start, cfg_end, low_memory, **extra)
    preset = _preset(model, resolution, "video")
    if len(image) > 1:
        host.say(f"The clip begins with the first of {len(image)} pictures; the others are not looked at.")
    with model.ready("vae", "model", pixels=_pixels(preset)) as pipeline:
        denoiser = pipeline.animator(_text(prompt, "prompt"), _pictures(image)[0], preset, frames, sampling)
        latents = _draw(model, pipeline, denoiser, seed)
    return *_clip(_decode(model, latents), fps), _latent(latents)


@uses("vit", "vae")
def image_edit(model: LanceModel, image: "Tensor", instruction: str, resolution: str, steps: int, cfg: float, seed: int,
               timestep_shift: float, cfg_start: float, cfg_end: float, low_memory: bool,
               **extra: "Unpack[Extra]") -> tuple["Tensor", Latent]:
    """Lance Image Edit."""
    sampling = _sampling(steps, cfg, timestep_shift, cfg_start, cfg_end, low_memory, **extra)
    preset, pictures = _preset(model, resolution, "image"), _pictures(image)
    latents, progress = [], None
    for picture in pictures:
        with model.ready("vit", "vae", "model", pixels=_pixels(preset)) as pipeline:
            denoiser = pipeline.editor(_text(instruction, "instruction"), [picture], preset, "image", sampling)
            progress = progress or _progress(model, denoiser, len(pictures))
            latents.append(pipeline.sample(denoiser, seed, progress.step))
    return _decode(model, latents), _latent(latents)


@uses("vit", "vae")
def video_edit(model: LanceModel, instruction: str, source_fps: float, max_frames: int, resolution: str, fps: int,
               steps: int, cfg: float, seed: int, timestep_shift: float, cfg_start: float, cfg_end: float,
               low_memory: bool, video: Any = None, frames: "Tensor | None" = None, keep_length: bool = True,
               **extra: "Unpack[Extra]") -> tuple[Any, "Tensor", Latent]:
    """Lance Video Edit."""
    _require_video(model, "Video Edit")
    sampling = _sampling(steps, cfg, timestep_shift, cfg_start, cfg_end, low_memory, **extra)
    watched, rate, audio = _watched(video, frames, source_fps, max_frames)
    if audio is not None and not keep_length:
        host.say("The sound is left out: at another rate it would not fit the pictures. Keep length keeps it.")
    preset = _preset(model, resolution, "video")
    with model.ready("vit", "vae", "model", pixels=_pixels(preset)) as pipeline:
        denoiser = pipeline.editor(_text(instruction, "instruction"), watched, preset, "video", sampling)
        latents = _draw(model, pipeline, denoiser, seed)
    edited = _decode(model, latents)
    return *(_clip(edited, rate, audio) if keep_length else _clip(edited, fps)), _latent(latents)


@uses("vit")
def image_understanding(model: LanceModel, image: "Tensor", question: str, system: str, resolution: str,
                        max_new_tokens: int, temperature: float, top_p: float, seed: int) -> dict[str, Any]:
    """Lance Image Understanding."""
    from lance_quant.lance.understanding import TokenSampling

    preset, sampling = _preset(model, resolution, "image"), TokenSampling(temperature, top_p)
    answers = [_answer(model, [picture], system, question, preset, max_new_tokens, sampling, seed)
               for picture in _pictures(image)]
    return {"ui": {"text": answers}, "result": (answers,)}


@uses("vit")
def video_understanding(model: LanceModel, question: str, system: str, source_fps: float, max_frames: int,
                        resolution: str, max_new_tokens: int, temperature: float, top_p: float, seed: int,
                        video: Any = None, frames: "Tensor | None" = None) -> dict[str, Any]:
    """Lance Video Understanding."""
    from lance_quant.lance.understanding import TokenSampling

    _require_video(model, "Video Understanding")
    watched, _, _ = _watched(video, frames, source_fps, max_frames)
    preset, sampling = _preset(model, resolution, "video"), TokenSampling(temperature, top_p)
    answer = _answer(model, watched, system, question, preset, max_new_tokens, sampling, seed)
    return {"ui": {"text": [answer]}, "result": (answer,)}


def unload(model: LanceModel, after: Any) -> tuple[Any]:
    """Lance Unload."""
    model.release()
    return (after,)


def self_check() -> dict[str, Any]:
    """Lance Self Check: says what is wrong, and never fails itself."""
    lines = [f"Python {platform.python_version()} on {platform.platform()}"]
    for name, version in host.versions().items():
        lines.append(f"{name}: {_attempt(version)}")
    for package in ("torch", *toolkit.NEEDED):
        lowest = f" (needs {toolkit.NEEDED[package]} or newer)" if package in toolkit.NEEDED else ""
        lines.append(f"{package}: {toolkit.version_of(package) or 'missing'}{lowest}")
    lines.append(f"lance_quant: {_attempt(lambda: toolkit.require() or toolkit.origin())}")
    lines.append(f"folders: {', '.join(map(str, host.roots())) or 'none'}")
    for found in models.scan():
        lines.append(f"model {found.label}: {found.flavor or 'unreadable'}, {found.precision}, {found.weights}")
        lines.append(f"  parts: {_attempt(lambda found=found: _parts(found))}")
        lines.append(f"  {_attempt(lambda found=found: _fit(found))}")
    lines.append(f"auto would load: {_attempt(lambda: _automatic())}")
    lines.append(f"official source: {_attempt(_official_source)}")
    report = "\n".join(lines)
    host.log.info("Lance self check\n%s", report)
    return {"ui": {"text": [report]}, "result": (report,)}


def _attempt(report: Any) -> str:
    """What `report` returns, or how it failed: one broken driver must not hide the rest of the report."""
    try:
        return str(report())
    except Exception as error:  # noqa: BLE001
        return f"FAILED: {error}"


def _parts(found: models.Found) -> str:
    choice = models.choose("auto", "auto", found.label, blackwell=False)
    return f"configuration {choice.config}, ViT {choice.vit or 'missing'}, VAE {choice.vae or 'missing'}"


def _fit(found: models.Found) -> str:
    return fit_line(models.choose("auto", "auto", found.label, blackwell=False), "auto")


def _official_source() -> str:
    """Where ByteDance's own code was looked for, in order; the nodes do not need it."""
    from lance_quant.official import checkout

    looked = list(checkout.candidates(None, host.source_places()))
    places = [f"  {number}. {one.via}: {one.path}: {one.rejected or 'found'}" for number, one in enumerate(looked, 1)]
    found = "none, and no node needs it" if looked[-1].rejected else f"{looked[-1].path} ({looked[-1].via})"
    return "\n".join([f"{found}; looked at", *places])


def _automatic() -> str:
    choice = models.choose("auto", "auto", "auto", _is_blackwell("auto"))
    return f"{choice.found.label}; {choice.reason}"


def _sampling(steps: int, cfg: float, timestep_shift: float, cfg_start: float, cfg_end: float, low_memory: bool,
              **extra: "Unpack[Extra]") -> "Sampling":
    from lance_quant.lance.generation import Sampling

    return Sampling(num_timesteps=steps, timestep_shift=timestep_shift, cfg_scale=cfg,
                    batch_guidance=not low_memory, cfg_low=cfg_start, cfg_high=cfg_end, **extra)


def _size(model: LanceModel, size: str, width: int, height: int, kind: str) -> tuple[int, int]:
    """Width and height that the size widgets mean."""
    if size == "custom":
        return width, height
    if size == "auto":
        return (_NANO_SIDE, _NANO_SIDE) if model.is_small else _SIZES[kind]
    wide, high = size.split()[-1].split("x")
    return int(wide), int(high)


def _preset(model: LanceModel, resolution: str, kind: str) -> str:
    if resolution != "auto":
        return resolution
    return "image_112res" if model.is_small else _PRESETS[kind]


def _pixels(preset: str) -> int:
    from lance_quant.lance.media.vision import RESOLUTIONS

    return RESOLUTIONS[preset][1] ** 2


def _text(text: str, what: str) -> str:
    if not text.strip():
        raise PackError(f"The {what} is empty. Write what the model should do.")
    return text


def _require_video(model: LanceModel, node: str) -> None:
    if model.flavor == "Lance_3B":
        raise PackError(f"{node} needs the video model, and the loaded one is the image model Lance_3B. Set the "
                        "loader's flavor to Lance_3B_Video.")


def _draw(model: LanceModel, pipeline: Any, denoiser: "Denoiser", seed: int, count: int = 1) -> list["Tensor"]:
    """Latents of `count` seeds in a row; the prompt is read once for all of them."""
    progress = _progress(model, denoiser, count)
    seeds = [(seed + index) % (MAX_SEED + 1) for index in range(count)]
    return [pipeline.sample(denoiser, each, progress.step) for each in seeds]


def _progress(model: LanceModel, denoiser: "Denoiser", count: int) -> host.Progress:
    """Of `count` results, with a live preview; lance-nano's own VAE has latents that nobody else's colours fit."""
    show = None if model.is_small else host.previewer(host.device(model.spec.device))

    def preview(step: "Step") -> Any:
        assert show is not None
        result = (step.x - step.t * step.velocity).reshape(*denoiser.grid, -1)  # where the step's direction leads to
        return show(result.movedim(-1, 0)[None])

    return host.Progress(denoiser.sampling.num_timesteps * count, None if show is None else preview)


def _latent(latents: Sequence["Tensor"]) -> Latent:
    """ComfyUI's LATENT [n, 48, frames, rows, columns] of normalised latents, as its own Wan 2.2 VAE decodes it."""
    import torch

    from lance_quant.lance.vae import MEAN, STD

    raw = torch.stack([latent.float() * torch.tensor(STD) + torch.tensor(MEAN) for latent in latents])
    return {"samples": raw.movedim(-1, 1)}


def _decode(model: LanceModel, latents: Sequence["Tensor"]) -> "Tensor":
    """IMAGE of latents, one after the other; pictures of different sizes are not for one batch."""
    import torch

    _, rows, columns, _ = latents[0].shape
    pixels = rows * columns * 16 * 16
    images = []
    with model.ready("vae", pixels=pixels) as pipeline:
        for latent in latents:
            images += [_image(frame) for frame in pipeline.decode_frames(latent)]
    return torch.stack(images)


def _image(picture: "Image.Image") -> "Tensor":
    import numpy as np
    import torch

    return torch.from_numpy(np.array(picture.convert("RGB"))).float() / 255


def _pictures(image: "Tensor") -> list["Image.Image"]:
    """The pictures of an IMAGE batch; an alpha channel is dropped, as elsewhere in ComfyUI."""
    from PIL import Image

    levels = (image[..., :3].float().clamp(0, 1) * 255).round().byte().cpu()
    return [Image.fromarray(picture.numpy()) for picture in levels]


def _clip(frames: "Tensor", fps: int | Fraction, audio: Any = None) -> tuple[Any, "Tensor"]:
    return host.video(frames, fps, audio), frames


def _watched(video: Any, frames: "Tensor | None", fps: float, most: int) -> tuple[list["Image.Image"], Fraction, Any]:
    """The frames of a clip that the model looks at, how many a second they are, and its sound."""
    from lance_quant.lance.media.video import frame_indices

    if (video is None) == (frames is None):
        raise PackError("Connect either video or frames" + (", not both." if video is not None else "."))
    audio = None
    if video is not None:
        components = video.get_components()
        frames, fps, audio = components.images, float(components.frame_rate), components.audio
        if not (math.isfinite(fps) and fps > 0):
            raise PackError(f"The video has {fps:g} frames per second: connect one with a rate.")
    assert frames is not None
    indices = frame_indices(len(frames), fps)
    if len(indices) > most:
        indices = [round(index * (len(frames) - 1) / (most - 1)) for index in range(most)]
    apart = (indices[-1] - indices[0]) / (len(indices) - 1)
    return _pictures(frames[indices]), Fraction(fps / apart).limit_denominator(1000), audio


def _answer(model: LanceModel, frames: Sequence["Image.Image"], system: str, question: str, preset: str,
            max_new_tokens: int, sampling: "TokenSampling", seed: int) -> str:
    from lance_quant.lance.tokens import understanding_sequence

    with model.ready("vit") as pipeline:
        tokens, grid = pipeline.look(frames, preset)
    with model.ready("model") as pipeline:
        packed = understanding_sequence(pipeline.tokenizer, system, _text(question, "question"), grid)
        progress = host.Progress(max_new_tokens)
        answer = pipeline.answer(packed, tokens, max_new_tokens, progress.step, sampling, seed)
    progress.reach(max_new_tokens)
    return answer.text
