"""Model configuration: `LanceConfig` from llm_config.json, `LancePaths` from where the parts lie.

What the official shell script passes as arguments and never writes to a file (q/k norms, untied head, one token per
latent cell, table of 31 x 64 x 64 latent positions) is part of the model and constant here.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.storage.atomic import read_json
from lance_quant.storage.schema import Positive, Schema, Size, parse

LATENT_CHANNELS = 48
LATENT_STRIDE = 16  # pixels per latent cell, each way
SMALLEST_LANCE = 1024  # a hidden size; models below it are small relatives, such as lance-nano
MAX_LATENT_SIZE = 64  # latent cells per side that the position table knows
MAX_LATENT_FRAMES = 31  # 121 frames // 4 + 1
TIME_FREQUENCIES = 256  # width of the sinusoid in front of the time embedder

_EMBEDDINGS = tuple(f"{layout.VOCABULARY[0]}.{part}" for part in ("weight", "codes_int8"))
_GATES = tuple(f"{layout.linear(0, 'und', 'gate_proj')}.{part}" for part in ("weight", "qweight"))


_LANCE = "is it the llm_config.json of a Lance checkpoint?"


class _Rope(Schema):
    """rope_scaling, in newer exports rope_parameters."""

    rope_theta: Positive | None = None
    mrope_section: Annotated[list[Size], Field(min_length=3, max_length=3)] | None = None


class DecoderSizes(Schema):
    """What the configuration of every decoder of the Qwen family states, under transformers' names."""

    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    intermediate_size: Size
    vocab_size: Size
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)]


class _LlmConfig(DecoderSizes):
    """llm_config.json. Rotary fields are flat in the official file; newer exports of the same family nest them."""

    hidden_act: Literal["silu"] = "silu"
    rope_theta: Positive | None = None
    mrope_section: Annotated[list[Size], Field(min_length=3, max_length=3)] | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None


@dataclass(frozen=True)
class LanceConfig:
    """Sizes of the language model; field names as in llm_config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def is_small(self) -> bool:
        """Whether this is a small relative of Lance, whose native pictures are 112 x 112."""
        return self.hidden_size < SMALLEST_LANCE

    @classmethod
    def load(cls, path: Path) -> "LanceConfig":
        """Read llm_config.json; InputError names a missing or impossible field."""
        return cls.of(read_json(path, "model configuration"), f"model configuration {path}")

    @classmethod
    def of(cls, raw: object, what: str) -> "LanceConfig":
        """Check the content of an llm_config.json, which `what` names in errors. See `load`."""
        found = parse(_LlmConfig, raw, what, _LANCE)
        rope = found.rope_scaling or found.rope_parameters or _Rope()
        theta, section = found.rope_theta or rope.rope_theta, found.mrope_section or rope.mrope_section
        if theta is None or section is None:
            raise InputError(f"{what} lacks {'rope_theta' if theta is None else 'mrope_section'}; {_LANCE}")
        rotary = {"rope_theta": theta, "mrope_section": (section[0], section[1], section[2])}
        config = cls(**{name: getattr(found, name) for name in cls.__dataclass_fields__} | rotary)
        config._check(what)
        return config

    def require_fits(self, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
        """Compare the sizes with a checkpoint's header, before anything of these sizes is built.

        Raises:
            InputError: names the first field that disagrees.
        """
        layers = layout.num_layers(shapes)
        embedding = next((shapes[name] for name in _EMBEDDINGS if name in shapes), ())
        gate = next((shapes[name] for name in _GATES if name in shapes), (self.intermediate_size,))
        head = shapes.get(f"{layout.head_norm(0, 'und')}.weight", (self.head_dim,))
        agree = {"num_hidden_layers": (self.num_hidden_layers, layers), "head_dim": (self.head_dim, *head),
                 "intermediate_size": (self.intermediate_size, gate[0]),
                 "vocab_size, hidden_size": ((self.vocab_size, self.hidden_size), embedding)}
        for name, (said, found) in agree.items():
            if said != found:
                raise InputError(f"llm_config.json says {name} {said}, and {what} has {found}: configuration and "
                                 "weights are of different models")

    def _check(self, what: str) -> None:
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise InputError(f"{what}: hidden_size {self.hidden_size}, num_attention_heads "
                             f"{self.num_attention_heads}, num_key_value_heads {self.num_key_value_heads} "
                             "must divide one another")
        if self.rope_theta <= 1:
            raise InputError(f"{what}: rope_theta {self.rope_theta:g} must be above 1")
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise InputError(f"{what}: mrope_section {list(self.mrope_section)} must add up to half of head_dim "
                             f"{self.head_dim}")


@dataclass(frozen=True)
class LancePaths:
    """Where the parts of a model lie.

    model: folder with llm_config.json, tokenizer files and, unless a packed folder replaces it, the checkpoint.
    vit: folder with config.json and vit.safetensors.
    vae: the file Wan2.2_VAE.pth.
    """

    model: Path
    vit: Path
    vae: Path
    VIT: ClassVar[str] = "Qwen2.5-VL-ViT"
    VAE: ClassVar[str] = "Wan2.2_VAE.pth"

    @classmethod
    def find(cls, model: Path, vit: Path | None = None, vae: Path | None = None) -> "LancePaths":
        """Complete the paths: ViT and VAE are in the model folder, or beside it as in the official download, beside the
        folder that a link points to as well.

        Parts that a task does not use may be absent; a path that was given must exist.

        Raises:
            InputError: `model` has no llm_config.json, or a given path is not there.
        """
        model = Path(model)
        if not (model / "llm_config.json").is_file():
            raise InputError(f"{model} is no Lance model folder: it has no llm_config.json")
        for given, what in ((vit, "ViT folder"), (vae, "VAE file")):
            if given is not None and not Path(given).exists():
                raise InputError(f"{what} not found: {given}")

        def part(name: str) -> Path:
            places = [model / name, Path(os.path.abspath(model)).parent / name, model.resolve().parent / name]
            return next((place for place in places if place.exists()), places[-1])

        return cls(model, Path(vit or part(cls.VIT)), Path(vae or part(cls.VAE)))
