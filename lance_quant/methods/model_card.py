"""Model card: README.md of a packed folder, with the YAML front matter that the Hugging Face hub reads.

A packed folder is a model: besides weights and meta it holds the configuration and tokenizer of its source (`BESIDE`),
so that it runs without the float weights. ViT and VAE are ByteDance's files and stay where they are, or are linked to;
the card says which.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lance_quant.errors import InputError
from lance_quant.formats.layout import VIT_PREFIX
from lance_quant.lance.config import LancePaths
from lance_quant.lance.tokens import LanceTokenizer
from lance_quant.storage.atomic import size_text
from lance_quant.storage.tensor_file import TensorSpec

FILE = "README.md"
# Copied from beside the source where they exist; the first ones are what a model folder needs.
NEEDED = ("llm_config.json", *LanceTokenizer.FILES)
BESIDE = (*NEEDED, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
          "chat_template.jinja", "generation_config.json")

_TEXT = """---
license: other
license_name: that-of-the-base-model
base_model: bytedance-research/Lance
base_model_relation: quantized
library_name: lance-quant
tags: [lance, {codec}, 4-bit, text-to-image, image-text-to-text]
---

# Lance, {CODEC}

A packed [Lance](https://huggingface.co/bytedance-research/Lance), made by lance-quant. Both experts of every layer are
in 4 bits.

| | |
|---|---|
{table}

## Run it

```
{commands}
```

{parts}

## Calibrated on

{runs}

`quant_report.html` shows every linear: its scale, and its error before and after. How far the whole model is from the
float one, `run_quant_eval.py` measures.

## Licences

Lance, Qwen2.5-VL and Wan2.2 have licences of their own; these weights are derived from Lance's.
"""


def beside(source: Path) -> dict[str, Path]:
    """Configuration and tokenizer files beside a checkpoint (file or folder): name -> path of those that are there."""
    folder = source if source.is_dir() else source.parent
    return {name: folder / name for name in BESIDE if (folder / name).is_file()}


def parts_of(source: Path, specs: Mapping[str, TensorSpec]) -> dict[str, Path]:
    """Files of ViT and VAE that belong to a checkpoint (file or folder), in its folder or beside that, by their paths
    in a model folder.

    Args:
        specs: of the checkpoint, which may have a ViT inside; then only the configuration is needed.

    Raises:
        InputError: one of them is not there.
    """
    folder = (source if source.is_dir() else source.parent).resolve()
    inside = any(name.startswith(VIT_PREFIX) for name in specs)
    wanted = [f"{LancePaths.VIT}/config.json", *([] if inside else [f"{LancePaths.VIT}/vit.safetensors"]),
              LancePaths.VAE]
    found = {name: place / name for name in wanted for place in (folder.parent, folder) if (place / name).is_file()}
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(f"--with_parts: {', '.join(missing)} not found in {folder} or beside it; fetch them with "
                         "lance-quant download, or leave --with_parts out")
    return found


def card(codec: str, facts: Mapping[str, Any], nbytes: int, bits: float, has_config: bool,
         has_parts: bool = False) -> str:
    """The text of the card.

    Args:
        codec: name of the format.
        facts: what the meta says of recipe, calibration and sizes.
        nbytes: of the weights. bits: stored bits per quantized weight.
        has_config: whether configuration and tokenizer are in the folder. has_parts: whether ViT and VAE are.
    """
    rows = {"format": codec.upper(), "recipe": str(facts["recipe"]), "weights": size_text(nbytes),
            "bits per quantized weight": f"{bits:.4f}", "made by": str(facts["tool"]),
            "source fingerprint": f"`{str(facts['source_fingerprint'])[:16]}…`"}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return _TEXT.format(codec=codec, CODEC=codec.upper(), table=table, commands=_commands(has_config),
                        parts=_parts(has_config, has_parts), runs=_runs(facts["calibration_runs"]))


def _commands(has_config: bool) -> str:
    model = "--model THIS_FOLDER" if has_config else "--model downloads/Lance_3B --packed THIS_FOLDER"
    return (f'lance-quant draw "a paper boat on a quiet lake" {model}\n'
            f'lance-quant ask boat.png "What floats on the water?" {model}')


def _parts(has_config: bool, has_parts: bool) -> str:
    vit, vae = LancePaths.VIT, LancePaths.VAE
    config = "Configuration and tokenizer are in this folder." if has_config else \
        "Configuration and tokenizer were not beside the float weights, so `--model` has to name them."
    if has_parts:
        return f"{config} `{vit}/` and `{vae}`, ByteDance's files, are in this folder."
    return (f"{config} `{vit}/` and `{vae}` are looked for in this folder and beside it; `--vit_path` and `--vae_path` "
            "name others.")


def _runs(runs: Any) -> str:
    """A line for each calibration run."""
    lines = []
    for run in runs:
        samples = run.get("samples")
        count = f", {len(samples)} samples" if isinstance(samples, list) else ""
        seed = f", seed {run['seed']}" if "seed" in run else ""
        lines.append(f"- {run.get('task', 'unknown task')}{count}{seed}")
    return "\n".join(lines) or "- nothing"
