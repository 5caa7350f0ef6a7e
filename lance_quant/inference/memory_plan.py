"""Memory planning: the peak memory of a request by stage, from headers and configurations alone.

The weights' bytes are those of the files' headers in the form in which they are kept. What a stage needs beside them
comes from running its code on the meta device (live_bytes.py), with two layers of the decoder: activations do not
depend on how many there are, and cache entries are added to the byte. Only the ViT's activations are a formula.

A pipeline that serves one request after the other is planned: a ViT or VAE that `--offload none` keeps counts in every
stage.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lance_quant.formats import int8, layout
from lance_quant.formats.packed_folder import PackedFolder, is_packed
from lance_quant.inference.layer_offload import SLOTS
from lance_quant.inference.live_bytes import Alive, Unpacking, counted
from lance_quant.inference.memory import free_memory, process_memory
from lance_quant.kernels.choices import Mode
from lance_quant.lance.config import LATENT_CHANNELS, LATENT_STRIDE, LanceConfig, LancePaths
from lance_quant.lance.generation import Denoiser, Given
from lance_quant.lance.loader import TorchFile
from lance_quant.lance.media.vision import MERGE, PATCH
from lance_quant.lance.merge import merge_projections
from lance_quant.lance.mot import Lance
from lance_quant.lance.settings import RESOLUTIONS, Offload, Settings
from lance_quant.lance.tokens import (
    CONDITION,
    EDIT_SYSTEM,
    QUESTION_SYSTEMS,
    T2I_SYSTEM,
    TARGET,
    VIDEO_SYSTEM,
    VIT,
    Grid,
    LanceTokenizer,
    TokenSequence,
    generation_sequence,
    understanding_sequence,
)
from lance_quant.lance.understanding import Decoding
from lance_quant.storage.atomic import read_json, size_text
from lance_quant.storage.tensor_file import Checkpoint, TensorFile, TensorSpec

MARGIN = 1.05  # measured peaks are up to 2 % above planned ones (benchmarks/plan_check.py)
# What activations take in a process beside their bytes: glibc keeps freed tensors below 32 MB, oneDNN reorders
# what it multiplies. Measured on the CPU: 1.2 to 1.6 times, least where they are large (benchmarks/plan_check.py).
CPU_SLACK = 1.4
LAYERS = 2  # of the decoder that runs on meta
LONGEST_SOURCE = 69  # frames of a clip that the model sees at most: 6 seconds
_PROMPT = "a paper boat on a quiet lake, early in the morning, with mist over the water"
# Of the official files, where they are not there: parameters of the ViT, widths of the VAE.
VIT_PARAMETERS, VAE_WIDTHS = 668_684_288, (160, 256)
_VIT_SIZES = {"hidden_size": 1280, "intermediate_size": 3420}
_GUIDED, _UNGUIDED = 0.9, 0.2  # timesteps inside and outside of the guidance interval


@dataclass(frozen=True)
class Weights:
    """Bytes of the language model as it is kept.

    layers: of each decoder layer. vocabulary: of embedding and head. rest: of all else.
    """

    layers: tuple[int, ...]
    vocabulary: int
    rest: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.layers) + self.vocabulary + self.rest

    def resident(self, offload: Offload) -> int:
        """What is on the device that computes: of streamed layers as many as there are slots."""
        kept = sum(self.layers) if offload != "layers" else SLOTS * max(self.layers)
        return kept + self.vocabulary + self.rest


@dataclass(frozen=True)
class How:
    """How a model is loaded and run, as far as it decides what memory is needed; names as on the command line.

    head_bits: None as in the file. four_bits: linears of a float file as INT4, as awq_apply.py would write them.
    """

    dtype: torch.dtype
    on_cpu: bool
    mode: Mode = "ondemand"
    offload: Offload = "none"
    batch_guidance: bool = True
    vae_tiling: bool = False
    head_bits: int | None = None
    four_bits: bool = False


@dataclass(frozen=True)
class Files:
    """Headers and configurations of a model; `missing` names parts that are not there and are planned as official."""

    config: LanceConfig
    specs: Mapping[str, TensorSpec]
    is_packed: bool
    tokenizer: LanceTokenizer
    vit_parameters: int
    vit_sizes: Mapping[str, int]
    vae_widths: tuple[int, int]
    missing: tuple[str, ...]
    known: dict[Any, dict[str, int]] = field(default_factory=dict, compare=False)  # activations that were computed

    @classmethod
    def open(cls, paths: LancePaths, weights: Path | None) -> "Files":
        """Read the headers of a model.

        Args:
            weights: folder or file whose weights are taken, packed or float; None: the model folder's.

        Raises:
            InputError: a file that is needed is missing or malformed.
        """
        where = paths.model if weights is None else weights
        packed = weights is not None and is_packed(weights)
        if packed:
            with PackedFolder(where) as folder:
                specs = dict(folder.checkpoint.specs)
        else:
            with Checkpoint(where) as source:
                specs = dict(source.specs)
        config = LanceConfig.load(paths.model / "llm_config.json")
        config.require_fits({name: spec.shape for name, spec in specs.items()}, str(where))
        vit, sizes, no_vit = _vit_facts(paths, specs)
        widths, no_vae = _vae_facts(paths)
        return cls(config, specs, packed, LanceTokenizer(paths.model), vit, sizes, widths,
                   (*no_vit, *no_vae))


def _vit_facts(paths: LancePaths, specs: Mapping[str, TensorSpec]) -> tuple[int, Mapping[str, int], tuple[str, ...]]:
    found = {name: spec for name, spec in specs.items() if name.startswith(layout.VIT_PREFIX)}
    if not found and (paths.vit / "vit.safetensors").is_file():
        with TensorFile(paths.vit / "vit.safetensors") as file:
            found = dict(file.specs)
    config = paths.vit / "config.json"
    if not found or not config.is_file():
        return VIT_PARAMETERS, _VIT_SIZES, ("ViT",)
    return sum(_count(spec) for spec in found.values()), read_json(config, "ViT configuration"), ()


def _vae_facts(paths: LancePaths) -> tuple[tuple[int, int], tuple[str, ...]]:
    if not paths.vae.is_file():
        return VAE_WIDTHS, ("VAE",)
    from lance_quant.lance.vae import widths_of

    return widths_of(TorchFile(paths.vae), paths.vae), ()


def _count(spec: TensorSpec) -> int:
    return spec.nbytes // spec.dtype.itemsize


def language_bytes(files: Files, how: How) -> Weights:
    """What the language model takes once it is loaded, to the byte."""
    layers, vocabulary = [0] * files.config.num_hidden_layers, 0
    size, rest = how.dtype.itemsize, _buffer_bytes(files.config, how.dtype)
    packable = {f"{name}.weight" for name in layout.linears(len(layers))} if how.four_bits else set()
    for name, spec in files.specs.items():
        if name == layout.IGNORED or name.startswith(layout.VIT_PREFIX):
            continue
        if name.startswith(f"{layout.LAYERS}."):
            layer = int(name.removeprefix(f"{layout.LAYERS}.").split(".")[0])
            layers[layer] += _count(spec) * 35 // 64 if name in packable else _kept_bytes(name, spec, how)  # 4.375 bits
        elif name.rpartition(".")[0] in layout.VOCABULARY:
            vocabulary += _kept_bytes(name, spec, how)
        else:
            rest += _count(spec) * size
    if how.head_bits == 8 and how.mode == "ondemand":
        rows, width = files.config.vocab_size, files.config.hidden_size
        vocabulary = 2 * sum(spec.nbytes for spec in int8.specs((rows, width)).values())
    return Weights(tuple(layers), vocabulary, rest)


def _kept_bytes(name: str, spec: TensorSpec, how: How) -> int:
    """What a tensor of a layer or of the vocabulary is kept as."""
    last, size = name.rpartition(".")[2], how.dtype.itemsize
    if last in ("qweight", "codes_int8") and how.mode == "cached":
        return _count(spec) * size * (2 if last == "qweight" else 1)
    if last in ("scales_fp8",) or (how.mode == "cached" and last in ("scales", "zeros", "scales_bf16", "scales_e4m3",
                                                                   "row_scales")):
        return 0
    if last == "scales_e4m3":
        return spec.nbytes + 4 * spec.shape[0]  # the global scale, a float32 per row
    if last in ("qweight", "scales", "zeros", "scales_bf16", "codes_int8", "row_scales"):
        return spec.nbytes
    return _count(spec) * size


def _buffer_bytes(config: LanceConfig, dtype: torch.dtype) -> int:
    """Rotary frequencies and position tables."""
    with torch.device("meta"):
        model = Lance(dataclasses.replace(config, num_hidden_layers=1), dtype, torch.device("meta"))
    model.compute_buffers(dtype)
    return sum(buffer.numel() * buffer.itemsize for buffer in model.buffers())


@functools.lru_cache(maxsize=8)
def _small(config: LanceConfig, dtype: torch.dtype, packed: bool, on_cpu: bool) -> Lance:
    """The model with LAYERS layers on meta."""
    meta = torch.device("meta")
    with meta:
        model = Lance(dataclasses.replace(config, num_hidden_layers=LAYERS), dtype, meta).to(dtype)
    merge_projections(model)
    model.compute_buffers(dtype)
    for layer in model.layers() if packed else []:
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, torch.nn.Linear):
                layer.set_submodule(name, Unpacking(linear.in_features, linear.out_features, on_cpu))
    return model.eval()


@dataclass(frozen=True)
class Plan:
    """Peak bytes by stage, in order, on the device that computes: all that is there, the `process` included.

    resident: bytes that are there all the time.
    """

    stages: Mapping[str, int]
    resident: int

    @property
    def peak(self) -> int:
        """The highest."""
        return max(self.stages.values())

    @property
    def where(self) -> str:
        """The stage of the highest."""
        return max(self.stages, key=lambda name: self.stages[name])

    def fits(self, free: int) -> bool:
        """Whether the peak fits into so many bytes, with a margin for what an allocator loses."""
        return self.peak * MARGIN <= free


def plan(files: Files, settings: Settings, how: How, process: int, frames: int = LONGEST_SOURCE) -> Plan:
    """The peaks of a task.

    Args:
        settings: task, sizes and lengths; sampling and tiling are those of `how`.
        process: bytes that the process has before it loads a model.
        frames: of a clip that is shown.
    """
    weights = language_bytes(files, how)
    spec, seen = settings.spec, _needs(settings)
    parts = {"ViT": files.vit_parameters * how.dtype.itemsize, "VAE": vae_bytes(files.vae_widths, how.dtype)}
    kept = sum(parts[name] for name in seen if how.offload == "none" or (how.offload == "cpu" and how.on_cpu))
    # What is resident changes no activation; nor does the head, whose output is small.
    run = dataclasses.replace(how, offload="none", head_bits=None)
    key = (settings, run, frames)
    if key not in files.known:
        files.known[key] = _activations(files, settings, run, frames)
    needs = files.known[key]
    model = weights.resident(how.offload)
    # Merging copies a group of linears at a time: of the largest, gate and up, at most two thirds of an expert. Layers
    # that are streamed are merged in host memory.
    stages = {"load": process + model + (0 if how.offload == "layers" else max(weights.layers) // 3)}
    slack = CPU_SLACK if how.on_cpu else 1.0
    for name, need in needs.items():
        used = {"look": "ViT", "encode": "VAE", "decode": "VAE"}.get(name)
        extra = parts[used] if used is not None and not kept else 0
        stages[name] = process + model + kept + extra + int(need * slack)
    assert spec.makes == "text" or "decode" in stages
    return Plan(stages, process + model + kept)


def describe(settings: Settings, shown: int = LONGEST_SOURCE) -> str:
    """A request in a few words; `shown`: frames of a clip that is shown."""
    task, spec = settings.task, settings.spec
    clip = f", {shown} frames" if spec.takes == "video" else \
        f", {settings.num_frames} frames" if spec.makes == "video" else ""
    size = settings.resolution if spec.takes is not None else f"{settings.height} x {settings.width}"
    return f"{task}, {size}{clip}"


def fit_line(paths: LancePaths, weights: Path | None, settings: Settings, how: How, device: torch.device) -> str:
    """What loading a model logs: the peak of a request beside what is free.

    Args:
        weights: as for `Files.open`.
    """
    found, free = plan(Files.open(paths, weights), settings, how, process_memory(device)), free_memory(device)
    need = f"{describe(settings)}: {size_text(found.peak)} at the peak ({found.where})"
    if free is None:
        return f"memory: {need} on {device}"
    verdict = "fits" if found.fits(free) else "does not fit; `lance-quant plan` names what helps"
    return f"memory: {need}, {size_text(free)} free on {device}: {verdict}"


def _needs(settings: Settings) -> list[str]:
    """The parts that a task uses."""
    task = settings.task
    return ["ViT"] * (task not in ("t2i", "t2v", "i2v")) + ["VAE"] * (settings.spec.makes != "text")


def vae_bytes(widths: tuple[int, int], dtype: torch.dtype) -> int:
    """What the VAE's weights take."""
    return sum(parameter.numel() for parameter in _autoencoder(widths).parameters()) * dtype.itemsize


@functools.lru_cache(maxsize=4)
def _autoencoder(widths: tuple[int, int]) -> Any:
    from lance_quant.lance.vae import build_autoencoder  # diffusers takes seconds to import

    with torch.device("meta"):
        return build_autoencoder(*widths)


def _activations(files: Files, settings: Settings, how: How, frames: int) -> dict[str, int]:
    """Bytes beside all weights, by stage, in order."""
    model = _small(files.config, how.dtype, (files.is_packed or how.four_bits) and how.mode == "ondemand", how.on_cpu)
    shown = frames if settings.spec.takes == "video" else 1
    base = RESOLUTIONS[settings.resolution]
    looked = (-(-shown // 2), base[0] // (PATCH * MERGE), base[0] // (PATCH * MERGE))  # merged tokens
    found: dict[str, int] = {}
    if "ViT" in _needs(settings):
        found["look"] = vit_activations(files.vit_sizes, looked, how.dtype)
    with counted() as alive, torch.no_grad():
        alive.leave_out(model)
        if settings.spec.makes == "text":
            return found | _answering(model, files, settings, looked, alive)
        source = ((shown - 1) // 4 + 1, base[1] // LATENT_STRIDE, base[1] // LATENT_STRIDE)
        if settings.spec.takes is not None:
            found["encode"] = vae_activations(files.vae_widths, source, how, "encode")
        grid = _target(settings, source)
        found |= _drawing(model, files, settings, (grid, looked, source), how, alive)
        found["decode"] = vae_activations(files.vae_widths, grid, how, "decode")
    return found


def _target(settings: Settings, source: Grid) -> Grid:
    """Latent cells of what is made."""
    if settings.task == "i2v":
        return ((settings.num_frames - 1) // 4 + 1, *source[1:])
    if settings.spec.takes is not None:
        return source
    return ((settings.num_frames - 1) // 4 + 1, settings.height // LATENT_STRIDE, settings.width // LATENT_STRIDE)


def _answering(model: Lance, files: Files, settings: Settings, looked: Grid, alive: Alive) -> dict[str, int]:
    sequence = understanding_sequence(files.tokenizer, QUESTION_SYSTEMS["image"], _PROMPT, looked)
    base, found = alive.now, dict[str, int]()
    room = len(sequence.ids) + settings.max_new_tokens
    seen = _empty((looked[0] * looked[1] * looked[2], model.config.hidden_size), model.dtype)
    with alive.rise(found, "prompt", base):
        decoding = Decoding(model, len(files.tokenizer), room, settings.max_new_tokens)
        decoding.start(sequence, seen, settings.max_new_tokens, seed=0)
    with alive.rise(found, "answer", base):
        decoding.step()
    return _with_cache(found, files.config, model.dtype, room)


def _drawing(model: Lance, files: Files, settings: Settings, grids: tuple[Grid, Grid, Grid], how: How,
             alive: Alive) -> dict[str, int]:
    """Prompt and denoising; `grids`: latent cells made, merged ViT tokens and latent cells of a source."""
    grid, looked, source = grids
    sequence, given = _request(files, settings, grid, looked, source, model)
    sampling = dataclasses.replace(settings.sampling, batch_guidance=how.batch_guidance)
    base, found = alive.now, dict[str, int]()
    with alive.rise(found, "prompt", base):
        denoiser = Denoiser(model, sequence, sampling, given)
    x = _empty((grid[0] * grid[1] * grid[2], LATENT_CHANNELS), model.dtype)
    for name, t in (("denoise, guided", _GUIDED), ("denoise", _UNGUIDED)):
        if sampling.guided(t) == name.endswith("guided"):
            with alive.rise(found, name, base):
                denoiser.velocity(x, t)
    return _with_cache(found, files.config, model.dtype, 2 * sequence.span(TARGET)[1])


def _request(files: Files, settings: Settings, grid: Grid, looked: Grid, source: Grid,
             model: Lance) -> tuple[TokenSequence, Given]:
    """The sequence of a request with an ordinary prompt, and what it shows, on meta."""
    task, hidden = settings.task, model.config.hidden_size
    if task == "i2v":
        first = _empty((1, *grid[1:], LATENT_CHANNELS), model.dtype)
        return generation_sequence(files.tokenizer, VIDEO_SYSTEM, _PROMPT, grid), Given(first=first)
    if settings.spec.takes is not None:
        sources = [(VIT, looked), (CONDITION, source)]
        system = EDIT_SYSTEM.format(settings.spec.takes)
        given = Given(_empty((looked[0] * looked[1] * looked[2], hidden), model.dtype),
                      _empty((*source, LATENT_CHANNELS), model.dtype))
        return generation_sequence(files.tokenizer, system, _PROMPT, grid, sources), given
    system = T2I_SYSTEM if task == "t2i" else VIDEO_SYSTEM
    return generation_sequence(files.tokenizer, system, _PROMPT, grid), Given()


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _with_cache(found: dict[str, int], config: LanceConfig, dtype: torch.dtype, entries: int) -> dict[str, int]:
    """With the cache of the layers that did not run."""
    layer = entries * 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return {name: need + (config.num_hidden_layers - LAYERS) * layer for name, need in found.items()}


def vae_activations(widths: tuple[int, int], grid: Grid, how: How, direction: str) -> int:
    """Bytes beside the VAE's weights while latents of a grid are made or decoded.

    The VAE goes through time in chunks, so that all frames behind the third need the same more.
    """
    frames, rows, columns = grid
    if frames <= 3:
        return _vae_activations(widths, (frames, rows, columns), how.dtype, how.vae_tiling, direction)
    two, three = (_vae_activations(widths, (count, rows, columns), how.dtype, how.vae_tiling, direction)
                  for count in (2, 3))
    return three + (frames - 3) * max(0, three - two)


@functools.lru_cache(maxsize=64)
def _vae_activations(widths: tuple[int, int], grid: Grid, dtype: torch.dtype, tiling: bool, direction: str) -> int:
    from lance_quant.lance.vae import Vae, build_autoencoder

    frames, rows, columns = grid
    with counted() as alive:
        with torch.device("meta"):
            autoencoder = build_autoencoder(*widths)
        torch.nn.Module.to(autoencoder, dtype)  # diffusers' own warns of modules that this one does not have
        vae = Vae(autoencoder.eval(), dtype, torch.device("meta"))
        if tiling:
            autoencoder.enable_tiling()
        base, found = alive.now, dict[str, int]()
        with alive.rise(found, direction, base):
            if direction == "decode":
                vae.decode(_empty((frames, rows, columns, LATENT_CHANNELS), torch.float32))
            else:
                vae.encode(_empty((3, 4 * frames - 3, rows * LATENT_STRIDE, columns * LATENT_STRIDE), torch.float32))
    return found[direction]


def vit_activations(sizes: Mapping[str, int], looked: Grid, dtype: torch.dtype) -> int:
    """Bytes beside the ViT's weights for merged tokens of a grid: a formula.

    Per patch, in the widest of two places: the feed-forward layer holds gate, its activation and up beside the
    residual and the norm; attention holds q, k and v, and q and k once more in float32 with their halves while they
    are rotated. The patches themselves [n, 1176] are there as float32 pixels and in the compute dtype.
    """
    patches = looked[0] * looked[1] * looked[2] * MERGE**2
    hidden, inner, size = sizes["hidden_size"], sizes["intermediate_size"], dtype.itemsize
    mlp = (2 * hidden + 3 * inner) * size
    attention = (2 * hidden + 3 * hidden) * size + 4 * hidden * 4
    return patches * (max(mlp, attention) + 1176 * (4 + size))


def choices(how: How, files: Files) -> Iterator[tuple[tuple[str, ...], How]]:
    """Ways to need less, the fewest changes first, streamed layers, which cost most time, last: what to say on the
    command line, and what it makes of `how`."""
    offered: dict[str, dict[str, Any]] = {"--sequential_guidance": {"batch_guidance": False},
                                          "--offload vae_vit": {"offload": "vae_vit"},
                                          "--vae_tiling": {"vae_tiling": True}}
    if not how.on_cpu:
        offered["--offload cpu"] = {"offload": "cpu"}
        offered["--offload layers"] = {"offload": "layers"}
        del offered["--offload vae_vit"]
    if how.on_cpu and how.dtype == torch.float32:
        offered["--dtype bfloat16"] = {"dtype": torch.bfloat16}
    if how.mode == "cached":
        offered["--mode ondemand"] = {"mode": "ondemand"}
    if not files.is_packed:
        offered["a 4-bit folder (awq_apply.py)"] = {"four_bits": True}
    if not any(name.endswith(".codes_int8") for name in files.specs):
        offered["--head_bits 8 (when quantizing)"] = {"head_bits": 8}
    kept = {name: fields for name, fields in offered.items()
            if any(getattr(how, field) != value for field, value in fields.items())}
    combined = [names for count in range(1, len(kept) + 1) for names in itertools.combinations(kept, count)]
    for names in sorted(combined, key=lambda names: "--offload layers" in names):
        if {"--offload cpu", "--offload layers"} <= set(names):
            continue
        changed = dict[str, Any]()
        for name in names:
            changed |= kept[name]
        if changed.get("head_bits") == 8 and not (files.is_packed or changed.get("four_bits")):
            continue
        yield names, dataclasses.replace(how, **changed)
