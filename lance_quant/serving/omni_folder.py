"""Export for vllm-omni: the model tree that its LancePipeline loads, from a packed folder.

    OUT/config.json                  {"model_name": "Lance", "quantization_config": …}
    OUT/Lance_3B/                    model.safetensors, llm_config.json, tokenizer, the same config.json
    OUT/Qwen2.5-VL-ViT/              config.json, vit.safetensors
    OUT/Wan2.2_VAE.pth

vllm-omni (read and run: 0.30.0) tells an image checkpoint from a video one by the folder's name, Lance_3B or
Lance_3B_Video, keeps the official tensor names, and fuses q/k/v and gate/up while it loads. Two differences between it
and the official code are settled here, in the files:

- It takes the table of latent positions from the file; the official code ignores that tensor and computes it. The
  computed one is written.
- It loads Qwen2.5-VL-ViT/ over the ViT inside a video checkpoint; officially the checkpoint's wins. The checkpoint's is
  written into Qwen2.5-VL-ViT/, and nowhere else.
"""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.int4 import Int4Weight
from lance_quant.formats.nvfp4 import Nvfp4Weight
from lance_quant.formats.packed_folder import SUFFIXES, PackedFolder, require_space
from lance_quant.lance.config import MAX_LATENT_FRAMES, MAX_LATENT_SIZE, LanceConfig, LancePaths
from lance_quant.lance.mot import LatentPositions
from lance_quant.lance.tokens import LanceTokenizer
from lance_quant.methods import model_card
from lance_quant.serving import weight_layouts
from lance_quant.serving.omni_names import Folder, Parts
from lance_quant.storage import atomic
from lance_quant.storage.output_place import require_free
from lance_quant.storage.tensor_file import Checkpoint, TensorFileWriter, TensorSpec, file_size, require_finite

log = logging.getLogger("lance_quant")

WEIGHTS, CONFIG = "model.safetensors", "config.json"
VIT_FOLDER, VIT_FILE, VAE_FILE = LancePaths.VIT, "vit.safetensors", LancePaths.VAE
_IN_PIPELINE = "bagel."  # what vllm-omni puts in front of the checkpoint's names
_TABLE = MAX_LATENT_SIZE**2  # latent positions of a frame


@dataclass(frozen=True)
class Plan:
    """What an export will hold, from headers alone.

    folder: where the model lies, which tells vllm-omni what it is
    weights, vit: tensors of the two files to write; `vit` is empty where the published file is taken as it is
    group_sizes: by linear, as vLLM will see them; INT4 only
    quantization: `quantization_config` of config.json
    beside: name in OUT -> existing file or folder, linked or copied
    """

    folder: Folder
    weights: dict[str, TensorSpec]
    vit: dict[str, TensorSpec]
    group_sizes: dict[str, int]
    quantization: dict[str, object]
    beside: dict[str, Path]

    @property
    def written(self) -> dict[str, int]:
        """Bytes of each file that holds tensors, by its path in OUT."""
        files = {f"{self.folder}/{WEIGHTS}": file_size(self.weights)}
        return {**files, f"{VIT_FOLDER}/{VIT_FILE}": file_size(self.vit)} if self.vit else files

    @property
    def copied(self) -> dict[str, int]:
        """Bytes of each part that `beside` names, by its path in OUT."""
        return {name: path.stat().st_size for name, path in self.beside.items()}


def fused_linears(layer: int) -> dict[str, tuple[str, ...]]:
    """The linears of a layer as vllm-omni runs them: its name for a fused one -> the checkpoint's linears inside.

    Both experts of an attention linear are one module there, with one quantization; the MLPs are separate.
    """
    inside = {(group.place, group.expert): group.linears for group in layout.groups(layer)}
    root = f"{_IN_PIPELINE}{layout.LAYERS}.{layer}"
    fused = {f"{root}.self_attn.{name}": sum((inside[place, expert] for expert in layout.EXPERTS), ())
             for name, place in (("qkv_proj", "attn_in"), ("o_proj", "attn_out"))}
    return fused | {f"{root}.mlp{layout.SUFFIX[expert]}.{name}": inside[place, expert]
                    for name, place in (("gate_up_proj", "mlp_in"), ("down_proj", "mlp_out"))
                    for expert in layout.EXPERTS}


def plan_of(packed: PackedFolder, paths: LancePaths, folder: Folder | None = None) -> Plan:
    """Plan an export.

    Args:
        folder: what the model is to vllm-omni; None asks the checkpoint, which holds a ViT if it is the video model's.

    Raises:
        InputError: the packed folder has 8-bit heads, is no whole Lance, does not fit `paths`, has group sizes or a
            mixture that vLLM cannot run; or a part beside it is missing.
    """
    if packed.head:
        raise InputError(f"{packed.path} has an 8-bit head and embedding (--head_bits 8), which vLLM cannot load: pack "
                         "it again without --head_bits")
    layers = _require_lance(packed, paths)
    vit = {name.removeprefix(layout.VIT_PREFIX): spec for name, spec in packed.checkpoint.specs.items()
           if name.startswith(layout.VIT_PREFIX)}
    folder = folder or ("Lance_3B_Video" if vit else "Lance_3B")
    modules = {name: linears for layer in range(layers) for name, linears in fused_linears(layer).items()}
    sizes = {name: _group_size(packed, name, linears) for name, linears in modules.items()}
    quantization = _int4_config(sizes) if packed.format == "int4" else _nvfp4_config(packed, sizes)
    by_linear = {linear: size for name, size in sizes.items() if size for linear in modules[name]}
    return Plan(folder, _weight_specs(packed, by_linear, folder), vit, by_linear if packed.format == "int4" else {},
                quantization, _beside(paths, folder, bool(vit)))


def _require_lance(packed: PackedFolder, paths: LancePaths) -> int:
    """Number of layers, if the folder holds exactly a Lance of the configuration in `paths`."""
    packed_suffixes = {f"{name}.{suffix}" for name in packed.linears for suffix in SUFFIXES}
    shapes = {name: spec.shape for name, spec in packed.checkpoint.specs.items() if name not in packed_suffixes}
    shapes |= {f"{name}.weight": linear.shape for name, linear in packed.linears.items()}
    layers = layout.require_complete(shapes)
    if layout.understands_only(shapes):
        raise InputError("vllm-omni serves whole checkpoints, and this one is for understanding alone (no vae2llm)")
    config = LanceConfig.load(paths.model / "llm_config.json")
    found = (layers, *shapes["language_model.model.embed_tokens.weight"],
             shapes[f"{layout.linear(0, 'und', 'up_proj')}.weight"][0])
    wanted = (config.num_hidden_layers, config.vocab_size, config.hidden_size, config.intermediate_size)
    if found != wanted:
        raise InputError(f"{packed.path} is not of the model in {paths.model}: layers, words, width, MLP width are "
                         f"{list(found)} here and {list(wanted)} in its llm_config.json")
    return layers


def _group_size(packed: PackedFolder, module: str, linears: Sequence[str]) -> int | None:
    """Group size of what vLLM runs as one linear; None where all of it stays in bfloat16."""
    in_bf16 = [name for name in linears if name not in packed.linears]
    if len(in_bf16) == len(linears):
        return None
    if in_bf16:
        other = next(name for name in linears if name in packed.linears)
        raise InputError(f"{in_bf16[0]} is in bfloat16 and {other} in 4 bits, but vLLM runs both as one linear, "
                         f"{module.removeprefix(_IN_PIPELINE)}: pack with --group_size instead of --bits_budget")
    sizes = [packed.linears[name].group_size for name in linears]
    return weight_layouts.awq_group_size(linears, sizes) if packed.format == "int4" else sizes[0]


def _int4_config(sizes: Mapping[str, int | None]) -> dict[str, object]:
    """auto-round's description of AWQ weights; modules that differ from the commonest group size are listed."""
    common = Counter(size for size in sizes.values() if size).most_common(1)[0][0]
    others = {name: {"bits": 16} if size is None else {"bits": 4, "group_size": size, "sym": False}
              for name, size in sizes.items() if size != common}
    shared = {"quant_method": "auto-round", "bits": 4, "group_size": common, "sym": False, "data_type": "int",
              "packing_format": "auto_round:auto_awq"}
    return {**shared, "extra_config": others} if others else shared


def _nvfp4_config(packed: PackedFolder, sizes: Mapping[str, int | None]) -> dict[str, object]:
    """ModelOpt's description of NVFP4 weights under 16-bit activations."""
    if None in sizes.values():
        module = next(name for name, size in sizes.items() if size is None)
        raise InputError(f"{packed.path} leaves {module.removeprefix(_IN_PIPELINE)} in bfloat16: NVFP4 is exported "
                         "whole or not at all; pack every linear")
    group = {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "input_activations": None,
             "targets": ["Linear"]}
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None,
            "exclude_modules": ["lm_head"], "config_groups": {"group_0": group}}


def _weight_specs(packed: PackedFolder, group_sizes: Mapping[str, int], folder: Folder) -> dict[str, TensorSpec]:
    """Every tensor of OUT's model.safetensors."""
    specs = {name: packed.checkpoint.specs[name] for name in _kept_names(packed)}
    for name, linear in packed.linears.items():
        parts = (weight_layouts.awq_specs(linear.shape, group_sizes[name]) if packed.format == "int4"
                 else weight_layouts.modelopt_specs(linear.shape))
        specs |= {f"{name}.{suffix}": spec for suffix, spec in parts.items()}
    frames = MAX_LATENT_FRAMES if folder == "Lance_3B_Video" else 1
    width = packed.checkpoint.specs["language_model.model.norm.weight"].shape[0]
    return {**specs, layout.IGNORED: TensorSpec(torch.bfloat16, (frames * _TABLE, width))}


def _kept_names(packed: PackedFolder) -> list[str]:
    """Tensors that are carried over as they are."""
    packed_parts = {f"{name}.{suffix}" for name in packed.linears for suffix in SUFFIXES}
    return [name for name in packed.checkpoint.specs
            if name not in packed_parts and name != layout.IGNORED and not name.startswith(layout.VIT_PREFIX)]


def _beside(paths: LancePaths, folder: Folder, own_vit: bool) -> dict[str, Path]:
    """What else vllm-omni reads, by its place in OUT."""
    LanceTokenizer(paths.model)
    vit = (CONFIG,) if own_vit else (CONFIG, VIT_FILE)
    needed = {**{f"{VIT_FOLDER}/{name}": paths.vit / name for name in vit}, VAE_FILE: paths.vae}
    missing = [str(path) for path in needed.values() if not path.is_file()]
    if missing:
        raise InputError(f"vllm-omni needs the ViT and the VAE beside the model, and {missing[0]} is not there: "
                         "download it, or name them with --vit_path and --vae_path")
    return {**{f"{folder}/{name}": path for name, path in model_card.beside(paths.model).items()}, **needed}


def describe(plan: Plan, parts: Parts) -> str:
    """The files of an export and their exact sizes, one a line, and the bytes that it will take."""
    config = {name: len(_config_text(plan).encode()) for name in (CONFIG, f"{plan.folder}/{CONFIG}")}
    linked = {name for name in plan.beside if parts == "link" and not name.startswith(plan.folder)}
    files = {**plan.written, **config, **plan.copied}
    width = max(map(len, files))
    lines = [f"{name:<{width}}  {size:>14}{'  linked' if name in linked else ''}" for name, size in files.items()]
    total = sum(size for name, size in files.items() if name not in linked)
    return "\n".join([*lines, f"output_bytes: {total}"])


def _config_text(plan: Plan) -> str:
    return json.dumps({"model_name": "Lance", "quantization_config": plan.quantization}, indent=2) + "\n"


def export(src: Path, paths: LancePaths, out: Path, folder: Folder | None = None, parts: Parts = "link") -> Plan:
    """Write the tree, whole or not at all; returns what was written.

    One linear is in memory at a time.

    Args:
        parts: "link" makes absolute symbolic links to ViT and VAE, "copy" copies them. What lies in the model's own
            folder is small and always copied.

    Raises:
        InputError: see plan_of; also `out` exists, its disk is too small, or a block scale cannot be stored exactly.
    """
    require_free(out)
    with PackedFolder(src) as packed:
        plan = plan_of(packed, paths, folder)
        copies = plan.copied if parts == "copy" else {}
        require_space(out, sum(plan.written.values()) + sum(copies.values()))
        with atomic.whole_folder(out) as root:
            (root / plan.folder).mkdir()
            (root / VIT_FOLDER).mkdir()
            with TensorFileWriter(root / plan.folder / WEIGHTS, plan.weights) as writer:
                _write_weights(packed, plan, writer)
            if plan.vit:
                with TensorFileWriter(root / VIT_FOLDER / VIT_FILE, plan.vit) as writer:
                    for name in plan.vit:
                        writer.write_pieces(name, _finite(packed.checkpoint, layout.VIT_PREFIX + name))
            for name in (CONFIG, f"{plan.folder}/{CONFIG}"):
                (root / name).write_text(_config_text(plan), encoding="utf-8")
            for name, path in plan.beside.items():
                _put(path, root / name, "copy" if name.startswith(plan.folder) else parts)
    return plan


def _put(path: Path, place: Path, parts: Parts) -> None:
    if parts == "copy":
        shutil.copyfile(path, place)
        return
    try:
        os.symlink(path.resolve(), place)
    except OSError as error:  # Windows without developer mode
        raise InputError(f"{place.name} cannot be linked ({error.strerror}): use --parts copy") from error


def _write_weights(packed: PackedFolder, plan: Plan, writer: TensorFileWriter) -> None:
    layers = layout.num_layers(plan.weights)
    for group in (group for layer in range(layers) for group in layout.groups(layer)):
        for name, parts in _packed_parts(packed, plan, [name for name in group.linears if name in packed.linears]):
            for suffix, tensor in parts.items():
                writer.write(f"{name}.{suffix}", tensor)
    for name in _kept_names(packed):
        writer.write_pieces(name, _finite(packed.checkpoint, name))
    rows, width = plan.weights[layout.IGNORED].shape
    writer.write_pieces(layout.IGNORED, latent_positions(width, rows // _TABLE))


def _packed_parts(packed: PackedFolder, plan: Plan,
                  linears: Sequence[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The packed linears of one group in vLLM's layout, one by one."""
    if packed.format == "int4":
        for name in linears:
            weight = packed.read_weight(name)
            assert isinstance(weight, Int4Weight)
            yield name, weight_layouts.awq_tensors(weight, plan.group_sizes[name])
        return
    weights = [weight for weight in map(packed.read_weight, linears) if isinstance(weight, Nvfp4Weight)]
    shared = weight_layouts.shared_global_scale(weights, [packed.linears[name].global_scale for name in linears])
    for name, nvfp4 in zip(linears, weights, strict=True):
        yield name, weight_layouts.modelopt_tensors(nvfp4, shared, name)


def _finite(source: Checkpoint, name: str) -> Iterator[Tensor]:
    for piece in source.pieces(name):
        require_finite(piece, name)
        yield piece


def latent_positions(width: int, frames: int) -> Iterator[Tensor]:
    """The model's table of latent positions in bfloat16, flat, a frame of 64 x 64 cells at a time."""
    positions = LatentPositions(width)
    positions.compute_buffers(torch.bfloat16, torch.device("cpu"))
    in_frame = positions((1, MAX_LATENT_SIZE, MAX_LATENT_SIZE))[:, positions.widths[0]:]
    for time in positions.t[:frames]:
        yield torch.cat([time.expand(len(in_frame), -1), in_frame], 1).flatten()
