"""Model card: README.md of a packed folder, with the YAML front matter that the Hugging Face hub reads.

A packed folder is a model: besides weights and meta it holds the configuration and tokenizer of its source (`BESIDE`),
so that it runs without the float weights. ViT and VAE are ByteDance's files and stay where they are; the card says so.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lance_quant.lance.config import LancePaths
from lance_quant.lance.tokens import LanceTokenizer
from lance_quant.storage.atomic import size_text

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


def card(codec: str, facts: Mapping[str, Any], nbytes: int, bits: float, has_config: bool) -> str:
    """The text of the card.

    Args:
        codec: name of the format.
        facts: what the meta says of recipe, calibration and sizes.
        nbytes: of the weights. bits: stored bits per quantized weight.
        has_config: whether configuration and tokenizer are in the folder.
    """
    rows = {"format": codec.upper(), "recipe": str(facts["recipe"]), "weights": size_text(nbytes),
            "bits per quantized weight": f"{bits:.4f}", "made by": str(facts["tool"]),
            "source fingerprint": f"`{str(facts['source_fingerprint'])[:16]}…`"}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return _TEXT.format(codec=codec, CODEC=codec.upper(), table=table, commands=_commands(has_config),
                        parts=_parts(has_config), runs=_runs(facts["calibration_runs"]))


def _commands(has_config: bool) -> str:
    model = "--model THIS_FOLDER" if has_config else "--model downloads/Lance_3B --packed THIS_FOLDER"
    return (f'lance-quant draw "a paper boat on a quiet lake" {model}\n'
            f'lance-quant ask boat.png "What floats on the water?" {model}')


def _parts(has_config: bool) -> str:
    vit, vae = LancePaths.VIT, LancePaths.VAE
    said = (f"`{vit}/` and `{vae}` are looked for in this folder and beside it; `--vit_path` and `--vae_path` name "
            "others.")
    if has_config:
        return f"Configuration and tokenizer are in this folder. {said}"
    return f"Configuration and tokenizer were not beside the float weights, so `--model` has to name them. {said}"


def _runs(runs: Any) -> str:
    """A line for each calibration run."""
    lines = []
    for run in runs:
        samples = run.get("samples")
        count = f", {len(samples)} samples" if isinstance(samples, list) else ""
        seed = f", seed {run['seed']}" if "seed" in run else ""
        lines.append(f"- {run.get('task', 'unknown task')}{count}{seed}")
    return "\n".join(lines) or "- nothing"
