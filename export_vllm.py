#!/usr/bin/env python3
"""Write a packed Lance as the folder that vllm-omni serves: INT4 as AWQ weights, NVFP4 as ModelOpt's.

    python export_vllm.py --src Lance_3B-AWQ-INT4 --model_path downloads/Lance_3B --out Lance_3B-vllm-omni

Codes and scales are carried over bit for bit; nothing is rounded anew.

Reads   a packed folder (awq_apply.py, nvfp4_apply.py, or a published one); MODEL_PATH (llm_config.json, tokenizer) with
        the ViT and the VAE beside it; the float weights are not needed
Writes  OUT, which `vllm serve OUT --omni` takes as it is (docs/serving.md): for Lance_3B in INT4 4.26 GB, in NVFP4
        4.39 GB, and links to ViT and VAE
Needs   0.2 GB of memory and the space for the output; about as long as the disk takes
Next    pip install plugins/vllm_omni_lance; vllm serve OUT --omni
"""

import argparse
from pathlib import Path

from lance_quant.cli import script
from lance_quant.errors import InputError
from lance_quant.lance.config import LancePaths
from lance_quant.serving import omni_names


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--src", type=Path, required=True, help="packed folder")
    parser.add_argument("--model_path", type=Path, required=True,
                        help="Lance folder that it was packed from: llm_config.json and tokenizer files")
    parser.add_argument("--vit_path", type=Path, help="Qwen2.5-VL-ViT folder; default: beside the Lance folder")
    parser.add_argument("--vae_path", type=Path, help="Wan2.2_VAE.pth; default: beside the Lance folder")
    parser.add_argument("--out", type=Path, help="folder to create; never overwritten; not written by --dry_run")
    parser.add_argument("--folder", choices=omni_names.FOLDERS,
                        help="what the model is to vllm-omni, which goes by this name; default: Lance_3B_Video for a "
                             "checkpoint with a ViT inside, else Lance_3B")
    parser.add_argument("--parts", choices=omni_names.PARTS, default="link",
                        help="link ViT and VAE where they are, or copy them, so that OUT can be moved elsewhere")
    parser.add_argument("--dry_run", action="store_true", help="read headers only and print what would be written")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Plan or export, and print the result."""
    args = parse_args(argv)
    from lance_quant.formats.packed_folder import PackedFolder  # late, as torch takes seconds: --help needs none of it
    from lance_quant.serving import omni_folder

    paths = LancePaths.find(args.model_path, args.vit_path, args.vae_path)
    if args.dry_run:
        with PackedFolder(args.src) as packed:
            print(omni_folder.describe(omni_folder.plan_of(packed, paths, args.folder), args.parts))
        return
    if args.out is None:
        raise InputError("--out is needed unless --dry_run is given")
    plan = omni_folder.export(args.src, paths, args.out, args.folder, args.parts)
    script.log.info("%d tensors; serve %s", len(plan.weights) + len(plan.vit), args.out / plan.folder)
    print(args.out)


def command() -> None:
    """What the console script and `python export_vllm.py` start."""
    script.run(main)


if __name__ == "__main__":
    command()
