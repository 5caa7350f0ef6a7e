"""Lance from Python: draw, ask, edit and animate with a model that is loaded once, and quantize one.

    from lance_quant import Pipeline, quantize

    quantize("downloads/Lance_3B", "Lance_3B-int4", format="int4", stats="act_stats.pt")
    pipeline = Pipeline.load("downloads/Lance_3B", packed="Lance_3B-int4")
    pipeline.draw("a paper boat on a quiet lake", seed=7).save("boat.png")
    pipeline.ask("boat.png", "What floats on the water?")

The parts are those of the scripts, and so are the defaults, which `Settings` and `Sampling` define: a seed gives here
what it gives there. Mistakes raise `InputError` with one line.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, get_args

import torch
from PIL import Image

from lance_quant.errors import InputError, require_one_of, require_real, require_whole
from lance_quant.formats import lora_file
from lance_quant.formats.base import Codec
from lance_quant.formats.int4 import Int4
from lance_quant.formats.lora_file import LoraUse
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.formats.packed_folder import PackedFolder, is_packed
from lance_quant.inference.device import device_of, dtype_of
from lance_quant.inference.request import ModelSource, PackedMode
from lance_quant.inference.tasks import denoiser_for, require_parts
from lance_quant.kernels.choices import KERNEL_CHOICES, KernelChoice, Mode
from lance_quant.lance.config import LancePaths
from lance_quant.lance.media.inputs import Picture, Video, frames_of, picture_of
from lance_quant.lance.media.video import FPS, write_video
from lance_quant.lance.runtime import Runtime
from lance_quant.lance.settings import OFFLOADS, Offload, Renorm, Sampling, Settings, Solver, TokenSampling
from lance_quant.lance.tokens import CAPTION_SYSTEMS, QUESTION_SYSTEMS, TextStream, understanding_sequence
from lance_quant.methods import convert
from lance_quant.methods.conversion import Conversion, Gptq, HeadBits, Recipe
from lance_quant.storage.atomic import whole_file

Name = str | os.PathLike[str]  # of a file or folder


class Stopped(Exception):
    """A request was ended by `Pipeline.stop` before it was done; there is no result."""


class Progress(NamedTuple):
    """How far a request is: `done` of `total` denoising steps, or of at most `total` tokens."""

    done: int
    total: int
    unit: Literal["step", "token"]


OnStep = Callable[[Progress], object]


class SamplingOptions(TypedDict, total=False):
    """What the methods that make pictures and clips pass on to `Sampling`, which says what it means and defaults to."""

    num_timesteps: int
    timestep_shift: float
    cfg_scale: float
    batch_guidance: bool
    cfg_low: float
    cfg_high: float
    cfg_renorm: Renorm
    solver: Solver
    reuse: float


class Clip(list[Image.Image]):
    """The frames of a clip, 12 a second."""

    fps = FPS

    def save(self, path: Name) -> None:
        """Write the clip as H.264 in an mp4 file, whole or not at all.

        Raises:
            InputError: another ending than .mp4.
        """
        path = _path("path", path)
        if path.suffix.lower() != ".mp4":
            raise InputError(f"path {path} must end with .mp4")
        with whole_file(path) as partial:
            write_video(partial, self)


class Pipeline:
    """A loaded Lance: make one with `Pipeline.load`.

    One request runs at a time: those of other threads wait for it, and one that is made from its own `on_step` is
    refused. `stop` ends the running one.

    Every method takes pictures as paths, PIL images or arrays (media/inputs.py), and `on_step`, which is called after
    every denoising step or token; what it raises ends the request. Those that make pictures and clips also take the
    fields of `Sampling` by name: num_timesteps, cfg_scale, ...

    runtime: the parts underneath, for what has no method here.
    prompt_tokens: of the last question that was answered, its picture's or clip's tokens included.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.prompt_tokens = 0
        self._lock, self._owner = threading.Lock(), 0
        self._stopping = threading.Event()
        self._complete: set[str] = set()  # tasks whose ViT and VAE were seen

    @classmethod
    def load(cls, model: Name, *, packed: Name | None = None, vit: Name | None = None, vae: Name | None = None,
             device: str | torch.device = "auto", dtype: str | torch.dtype = "auto", mode: Mode = "ondemand",
             kernel: KernelChoice = "auto", compile: bool = False, offload: Offload = "none",
             vae_tiling: bool = Settings.vae_tiling, fix_quirks: bool = Settings.fix_quirks,
             lora: Sequence[str | LoraUse] = ()) -> "Pipeline":
        """Load a model from its folders; ViT and VAE follow when a request first needs them.

        Args:
            model: folder with llm_config.json, tokenizer files and float weights; or a packed folder that has the
                first two as well.
            packed: packed folder whose weights are taken; of `model`, configuration and tokenizer are then enough.
            vit, vae: folder of the ViT and file of the VAE; None: in the model folder or beside it.
            device: cpu, cuda, cuda:N, mps, or auto, the fastest there is.
            dtype: float32 or bfloat16, of all that is computed; auto: bfloat16 on a GPU, float32 on a CPU.
            mode: of packed linears: "ondemand" computes on the packed bytes, "cached" unpacks them once, which is as
                fast and as large as a float model.
            kernel: what computes packed linears in mode ondemand; auto takes what suits the machine.
            compile: compile the steps that recur, which takes up to minutes at the first request.
            offload: where ViT and VAE are while not in use: "none", on the device; "cpu", in host memory; "vae_vit",
                on disk; "layers": as "cpu", and the language model's layers stream from host memory to a GPU.
            vae_tiling: let the VAE go through large frames in tiles: less memory, not quite the same pixels.
            fix_quirks: repair the official code's bugs instead of reproducing them.
            lora: LoRAs to put on the model, float or packed: "FILE", "FILE:0.8" or "FILE:und=0.8,gen=0.5"
                (docs/lora.md).

        Raises:
            InputError: a folder is none of these, or the arguments do not go together.
        """
        require_one_of("mode", mode, get_args(Mode))
        require_one_of("kernel", kernel, KERNEL_CHOICES)
        require_one_of("offload", offload, OFFLOADS)
        _require_flags(compile=compile, vae_tiling=vae_tiling, fix_quirks=fix_quirks)
        paths, weights = located(model, packed, vit, vae)
        on = device_of(str(device))
        computed = dtype_of(str(dtype).removeprefix("torch."), on)
        source = ModelSource(paths, on, computed, offload, fix_quirks, vae_tiling, compile, _loras(lora))
        if weights is None and (mode, kernel) != ("ondemand", "auto"):
            raise InputError(f"mode {mode!r} and kernel {kernel!r} are for packed weights, and {model} has none")
        if weights is None:
            return cls(source.load_to_run())
        with PackedFolder(weights) as folder:
            return cls(source.load_packed(folder, PackedMode(mode, kernel)))

    def stop(self) -> None:
        """End the running request after its current step: it raises `Stopped`. From any thread; nothing else waits."""
        self._stopping.set()

    def draw(self, prompt: str, *, height: int = Settings.height, width: int = Settings.width,
             seed: int = Settings.seed, on_step: OnStep | None = None,
             **sampling: Unpack[SamplingOptions]) -> Image.Image:
        """A picture for a prompt.

        Args:
            prompt: what is to be seen.
            height, width: pixels, 16 to 1024, floored to multiples of 16.
            seed: of the noise, from 0.

        Raises:
            InputError: an argument is out of range or of the wrong type.
            Stopped: see `stop`.
        """
        settings = self._settings("t2i", height=height, width=width, seed=seed, sampling=Sampling(**sampling))
        return self._made(settings, _text("prompt", prompt), [], on_step)[0]

    def edit(self, picture: Picture, instruction: str, *, resolution: str = "", seed: int = Settings.seed,
             on_step: OnStep | None = None, **sampling: Unpack[SamplingOptions]) -> Image.Image:
        """A picture, changed as the instruction says.

        Args:
            resolution: preset that the picture is brought to (vision.RESOLUTIONS); "": image_768res.
            Others: as for `draw`. Raises the same.
        """
        settings = self._settings("image_edit", resolution=resolution, seed=seed, sampling=Sampling(**sampling))
        frames = [picture_of(picture, settings.fix_quirks)]
        return self._made(settings, _text("instruction", instruction), frames, on_step)[0]

    def animate(self, picture: Picture | None, prompt: str, *, height: int | None = None, width: int | None = None,
                resolution: str = "", num_frames: int = Settings.num_frames, seed: int = Settings.seed,
                on_step: OnStep | None = None, **sampling: Unpack[SamplingOptions]) -> Clip:
        """A clip for a prompt, 12 frames a second, that begins with a picture or, where that is None, with anything.

        Args:
            height, width: of a clip without a picture, as for `draw`; with one, its shape decides.
            resolution: preset that the picture is brought to (vision.RESOLUTIONS); "": video_480p.
            num_frames: 1 to 121, floored to one more than a multiple of 4.
            Others: as for `draw`. Raises the same.
        """
        how = {"num_frames": num_frames, "seed": seed, "sampling": Sampling(**sampling)}
        if picture is None:
            if resolution:
                raise InputError(f"resolution {resolution!r} is for the picture that a clip begins with, and there is "
                                 "none: give height and width")
            size = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
            settings, frames = self._settings("t2v", **size, **how), []
        else:
            if height is not None or width is not None:
                raise InputError("a clip takes its size from the picture that it begins with: leave height and width "
                                 "out, and choose a resolution")
            settings = self._settings("i2v", resolution=resolution, **how)
            frames = [picture_of(picture, settings.fix_quirks)]
        return Clip(self._made(settings, _text("prompt", prompt), frames, on_step))

    def edit_video(self, video: Video, instruction: str, *, fps: float = FPS, resolution: str = "",
                   seed: int = Settings.seed, on_step: OnStep | None = None,
                   **sampling: Unpack[SamplingOptions]) -> Clip:
        """A clip, changed as the instruction says; as long as what the model sees of it, 6 seconds at most.

        Args:
            video: path, or frames (media/inputs.py). fps: of frames, per second.
            resolution: preset that the clip is brought to (vision.RESOLUTIONS); "": video_480p.
            Others: as for `draw`. Raises the same.
        """
        settings = self._settings("video_edit", resolution=resolution, seed=seed, sampling=Sampling(**sampling))
        frames = frames_of(video, fps, settings.fix_quirks)
        return Clip(self._made(settings, _text("instruction", instruction), frames, on_step))

    def ask(self, picture: Picture, question: str, *, system: str = QUESTION_SYSTEMS["image"], resolution: str = "",
            max_new_tokens: int = Settings.max_new_tokens, temperature: float = Settings.token_sampling.temperature,
            top_p: float = Settings.token_sampling.top_p, seed: int = Settings.seed, on_step: OnStep | None = None,
            on_text: Callable[[str], None] | None = None) -> str:
        """The answer to a question about a picture.

        Args:
            system: the system prompt.
            resolution: preset that the picture is brought to (vision.RESOLUTIONS); "": image_768res.
            max_new_tokens: longest answer.
            temperature: 0 takes the likeliest token; above, tokens are drawn with it, from `seed`.
            top_p: draw from the likeliest tokens that together have this probability.
            on_text: called with each piece of the answer as it comes.

        Raises:
            InputError: an argument is out of range or of the wrong type.
            Stopped: see `stop`.
        """
        settings = self._settings("x2t_image", resolution=resolution, max_new_tokens=max_new_tokens, seed=seed,
                                  token_sampling=TokenSampling(temperature, top_p))
        frames = [picture_of(picture, settings.fix_quirks)]
        return self._answer(settings, frames, _text("system", system), _text("question", question), on_step, on_text)

    def ask_video(self, video: Video, question: str, *, fps: float = FPS, system: str = QUESTION_SYSTEMS["video"],
                  resolution: str = "", max_new_tokens: int = Settings.max_new_tokens,
                  temperature: float = Settings.token_sampling.temperature,
                  top_p: float = Settings.token_sampling.top_p, seed: int = Settings.seed,
                  on_step: OnStep | None = None, on_text: Callable[[str], None] | None = None) -> str:
        """The answer to a question about a clip.

        Args:
            video: path, or frames (media/inputs.py). fps: of frames, per second.
            resolution: preset that the clip is brought to (vision.RESOLUTIONS); "": video_480p.
            Others: as for `ask`. Raises the same.
        """
        settings = self._settings("x2t_video", resolution=resolution, max_new_tokens=max_new_tokens, seed=seed,
                                  token_sampling=TokenSampling(temperature, top_p))
        frames = frames_of(video, fps, settings.fix_quirks)
        return self._answer(settings, frames, _text("system", system), _text("question", question), on_step, on_text)

    def caption(self, picture: Picture, *, resolution: str = "", max_new_tokens: int = Settings.max_new_tokens,
                on_step: OnStep | None = None) -> str:
        """A description of a picture, by the official captioning prompt; arguments as for `ask`."""
        return self.ask(picture, "", system=CAPTION_SYSTEMS[0].format("image"), resolution=resolution,
                        max_new_tokens=max_new_tokens, on_step=on_step)

    def caption_video(self, video: Video, *, fps: float = FPS, resolution: str = "",
                      max_new_tokens: int = Settings.max_new_tokens, on_step: OnStep | None = None) -> str:
        """A description of a clip, by the official captioning prompt; arguments as for `ask_video`."""
        return self.ask_video(video, "", fps=fps, system=CAPTION_SYSTEMS[0].format("video"), resolution=resolution,
                              max_new_tokens=max_new_tokens, on_step=on_step)

    def _settings(self, task: str, **given: Any) -> Settings:
        settings = Settings(task, fix_quirks=self.runtime.fix_quirks, vae_tiling=self.runtime.vae_tiling, **given)
        if task not in self._complete:
            require_parts(task, self.runtime.paths)
            self._complete.add(task)
        return settings

    def _made(self, settings: Settings, text: str, frames: Sequence[Image.Image],
              on_step: OnStep | None) -> list[Image.Image]:
        with self._request(on_step, settings.sampling.num_timesteps, "step") as count:
            denoiser = denoiser_for(self.runtime, text, frames, settings)
            return self.runtime.decode_frames(self.runtime.sample(denoiser, settings.seed, count))

    def _answer(self, settings: Settings, frames: Sequence[Image.Image], system: str, question: str,
                on_step: OnStep | None, on_text: Callable[[str], None] | None) -> str:
        with self._request(on_step, settings.max_new_tokens, "token") as count:
            stream = TextStream(self.runtime.tokenizer, on_text or (lambda _: None))

            def on_token(token: int) -> None:
                stream.add(token)
                count(token)

            tokens, grid = self.runtime.look(frames, settings.resolution)
            sequence = understanding_sequence(self.runtime.tokenizer, system, question, grid)
            self.prompt_tokens = len(sequence.ids)
            return self.runtime.answer(sequence, tokens, settings.max_new_tokens, on_token, settings.token_sampling,
                                       settings.seed).text

    @contextlib.contextmanager
    def _request(self, on_step: OnStep | None, total: int,
                 unit: Literal["step", "token"]) -> Iterator[Callable[[object], None]]:
        """The pipeline for one request; gives what is to be called after every step of it."""
        if self._owner == threading.get_ident():
            raise InputError("this Pipeline is at work: on_step and on_text must not ask it for more")
        done = 0

        def count(_: object) -> None:
            nonlocal done
            done += 1
            if on_step is not None:
                on_step(Progress(done, total, unit))
            if self._stopping.is_set():
                raise Stopped(f"stopped after {done} of {total} {unit}s")

        with self._lock:
            self._owner = threading.get_ident()
            self._stopping.clear()
            try:
                yield count
            finally:
                self._owner = 0


def quantize(src: Name, out: Name, format: Literal["int4", "nvfp4"] = "int4", *, stats: Name,
             captures: Sequence[Name] = (), group_size: int | None = None, slim: bool = False,
             recipe: Recipe = Conversion.recipe, bits_budget: float | None = Conversion.bits_budget,
             head_bits: HeadBits = Conversion.head_bits, device: str | torch.device = "auto",
             resume: bool = Conversion.resume, with_parts: bool = Conversion.with_parts,
             gptq: Gptq = Conversion.gptq) -> Path:
    """Pack a float checkpoint into 4 bits (AWQ scaling; GPTQ rounding where there are captures).

    Args:
        src: float checkpoint: a safetensors file, an index, or a folder that holds one.
        out: folder to create; never overwritten, and whole or not there at all.
        format: int4 or nvfp4.
        stats: activation statistics, from awq_merge_stats.py.
        captures: layer inputs, from awq_calibrate_single.py --capture, one file per task.
        group_size: inputs per scale of int4; None: 64. NVFP4 has blocks of 16.
        slim: of nvfp4, leave the duplicate scales out that published readers want.
        recipe: "ours"; "published" repeats Reza2kn/lance-quant tensor for tensor.
        bits_budget: of int4, stored bits per weight that group sizes, chosen per linear, may take together.
        head_bits: of the output head and the token embedding, 8 or 16.
        device: as for Pipeline.load.
        resume: keep finished layers beside `out`, so that the same call goes on after a kill.
        with_parts: also put ViT and VAE, found in or beside the folder of `src`, into `out`: links or copies.
        gptq: what is done with captures; "light" is one pass on the float model's inputs, an eighth of the time.

    Returns:
        `out`.

    Raises:
        InputError: a file that cannot be used, or arguments that do not go together.
    """
    require_one_of("recipe", recipe, get_args(Recipe))
    require_one_of("gptq", gptq, get_args(Gptq))
    if head_bits not in get_args(HeadBits):
        raise InputError(f"head_bits {head_bits!r} must be 8 or 16")
    _require_flags(slim=slim, resume=resume, with_parts=with_parts)
    if bits_budget is not None:
        require_real("bits_budget", bits_budget, 0)
    if isinstance(captures, str | os.PathLike):
        raise InputError(f"captures {captures!r} must be a list of paths: give [{os.fspath(captures)!r}]")
    conversion = Conversion(_codec(format, group_size, slim), recipe, bits_budget, head_bits, device_of(str(device)),
                            resume, with_parts, gptq=gptq)
    made = convert.run(_path("src", src), _path("stats", stats), [_path("captures", one) for one in captures],
                       _path("out", out), conversion, dry_run=False)
    return Path(made)


def _codec(format: str, group_size: int | None, slim: bool) -> Codec:
    require_one_of("format", format, ("int4", "nvfp4"))
    if format == "int4" and slim:
        raise InputError("slim is a layout of nvfp4: leave it out for int4")
    if format == "nvfp4" and group_size is not None:
        raise InputError(f"group_size {group_size!r} is for int4: NVFP4 has blocks of {Nvfp4().group_size}")
    if format == "nvfp4":
        return Nvfp4(slim)
    return Int4() if group_size is None else Int4(require_whole("group_size", group_size, 1))


def _loras(given: Sequence[str | LoraUse]) -> tuple[LoraUse, ...]:
    if isinstance(given, str | os.PathLike) or not all(isinstance(one, str | os.PathLike | LoraUse) for one in given):
        raise InputError(f"lora {given!r} must be a list of files, as [\"style.safetensors:0.8\"]")
    return tuple(one if isinstance(one, LoraUse) else lora_file.parse(os.fspath(one)) for one in given)


def _text(name: str, text: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{name} {text!r} must be a text, not a {type(text).__name__}")
    return text


def _path(name: str, path: Name) -> Path:
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise InputError(f"{name} {path!r} must be a path, not a {type(path).__name__}")
    return Path(path)


def _require_flags(**flags: bool) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise InputError(f"{name} {value!r} must be True or False")


def located(model: Name, packed: Name | None, vit: Name | None, vae: Name | None) -> tuple[LancePaths, Path | None]:
    """Where a model's parts lie, and the packed folder whose weights are taken, None for float ones; arguments as for
    `Pipeline.load`.

    Raises:
        InputError: a folder is neither, or lacks configuration or tokenizer.
    """
    where, weights = _path("model", model), None if packed is None else _path("packed", packed)
    if weights is None and is_packed(where):
        weights = where
    return _paths(where, weights, vit, vae), weights


def _paths(model: Path, packed: Path | None, vit: Name | None, vae: Name | None) -> LancePaths:
    if packed == model and not (model / "llm_config.json").is_file():
        raise InputError(f"{model} has packed weights alone, without llm_config.json and tokenizer: give the folder "
                         f"that has them too, Pipeline.load(\"downloads/Lance_3B\", packed=\"{model}\")")
    return LancePaths.find(model, None if vit is None else _path("vit", vit),
                           None if vae is None else _path("vae", vae))
