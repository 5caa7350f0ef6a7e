"""Model configuration: `LanceConfig` from llm_config.json, `LancePaths` from where the parts lie.

What the official shell script passes as arguments and never writes to a file (q/k norms, untied head, one token per
latent cell, table of 31 x 64 x 64 latent positions) is part of the model and constant here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.storage.atomic import read_json

LATENT_CHANNELS = 48
LATENT_STRIDE = 16  # pixels per latent cell, each way
MAX_LATENT_SIZE = 64  # latent cells per side that the position table knows
MAX_LATENT_FRAMES = 31  # 121 frames // 4 + 1
_LARGEST = 1e9  # that any number of a configuration may be: Lance's largest is rope_theta, 1e6
TIME_FREQUENCIES = 256  # width of the sinusoid in front of the time embedder

_EMBEDDINGS = tuple(f"{layout.VOCABULARY[0]}.{part}" for part in ("weight", "codes_int8"))
_GATES = tuple(f"{layout.linear(0, 'und', 'gate_proj')}.{part}" for part in ("weight", "qweight"))


def _is_positive(value: object, kind: type) -> bool:
    """Whether a JSON value is a positive number that fits a field of type int or float."""
    return not isinstance(value, bool) and isinstance(value, int if kind is int else (int, float)) \
        and 0 < value < _LARGEST


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

    @classmethod
    def load(cls, path: Path) -> "LanceConfig":
        """Read llm_config.json; InputError names a missing or impossible field."""
        raw = read_json(path, "model configuration")
        if not isinstance(raw, dict):
            raise InputError(f"{path} must be a JSON object, not a {type(raw).__name__}")
        # Flat in the official file; newer exports of the same family nest both.
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise InputError(f"{path}: rope_scaling {str(rope)[:80]!r} must be an object")
        if raw.get("hidden_act", "silu") != "silu":
            raise InputError(f"{path}: hidden_act {str(raw['hidden_act'])[:80]!r}: Lance's MLP is gated SiLU (silu)")
        raw = {"rope_theta": rope.get("rope_theta"), "mrope_section": rope.get("mrope_section"), **raw}
        missing = [name for name in cls.__dataclass_fields__ if raw.get(name) is None]
        if missing:
            raise InputError(f"{path} lacks {missing}: is it the llm_config.json of a Lance checkpoint?")
        section = raw["mrope_section"]
        sizes = {name: raw[name] for name in cls.__dataclass_fields__ if name != "mrope_section"}
        kinds = cls.__annotations__
        wrong = [f"{name} {str(value)[:80]}" for name, value in sizes.items()
                 if not _is_positive(value, kinds[name])]
        if not isinstance(section, list) or len(section) != 3 or not all(_is_positive(size, int) for size in section):
            wrong.append(f"mrope_section {str(section)[:80]}")
        if wrong:
            raise InputError(f"{path}: {', '.join(wrong)}: must be positive numbers, three of them for mrope_section")
        config = cls(**sizes, mrope_section=tuple(section))
        config._check(path)
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

    def _check(self, path: Path) -> None:
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise InputError(f"{path}: hidden_size {self.hidden_size}, num_attention_heads "
                             f"{self.num_attention_heads}, num_key_value_heads {self.num_key_value_heads} "
                             "must divide one another")
        if self.rms_norm_eps >= 1 or self.rope_theta <= 1:
            raise InputError(f"{path}: rms_norm_eps {self.rms_norm_eps:g} must be below 1 and rope_theta "
                             f"{self.rope_theta:g} above 1")
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise InputError(f"{path}: mrope_section {list(self.mrope_section)} must add up to half of head_dim "
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
        """Complete the paths: ViT and VAE are in the model folder, or beside it as in the official download.

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
            return model / name if (model / name).exists() else model.resolve().parent / name

        return cls(model, Path(vit or part(cls.VIT)), Path(vae or part(cls.VAE)))
