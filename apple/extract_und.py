#!/usr/bin/env python3
"""Extract Lance's understanding path as a Hugging Face folder that transformers and mlx-lm load unmodified.

    python -m apple.extract_und --src downloads/Lance_3B --out Lance_3B-und

The folder says `glm4_moe` with every layer dense: the one standard architecture that has what this path has (biased
q/k/v, a norm per query and key head before a full rotation, a separate head), so its logits are Lance's own.
`--arch qwen2` makes the published form instead, which drops the head norms and ties the head as llm_config.json says;
no Qwen2 weights can equal the original, and the script measures what that costs on a probe text.

Reads   a Lance folder: llm_config.json, tokenizer files, the float checkpoint
Writes  OUT/model.safetensors (6.79 GB for Lance_3B and Lance_3B_Video in bfloat16), config.json,
        generation_config.json, the tokenizer, extraction.json (what was kept, left out and why)
Needs   60 MB of memory beside torch and the space for the output; --arch qwen2 3.5 GB for its report
Next    apple/export_mlx.py --src OUT, apple/export_coreml.py --src OUT
"""

import argparse
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Tokenizer

from apple.decoder import DecoderConfig, DecoderLayer, causal_mask, rope_tables
from lance_quant import __version__
from lance_quant.calibration.activation_stats import model_fingerprint
from lance_quant.cli import script
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.packed_folder import require_space
from lance_quant.inference.device import DTYPES
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.mot import Lance, RMSNorm
from lance_quant.lance.tokens import LanceTokenizer
from lance_quant.lance.understanding import MAX_NEW_TOKENS
from lance_quant.storage.atomic import read_json, whole_folder, write_json
from lance_quant.storage.output_place import require_free
from lance_quant.storage.tensor_file import Checkpoint, TensorFileWriter, TensorSpec, file_size, require_finite

log = logging.getLogger("lance_quant")

ARCHS = ("glm4_moe", "qwen2")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Copied where they exist: the first three always do, the others in some downloads.
TOKENIZER_FILES = (*LanceTokenizer.FILES, "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.json", "chat_template.jinja")
PROBE = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat is the capital of France, "
         "and why is the sky blue? 1 + 1 = 2.<|im_end|>\n<|im_start|>assistant\nThe capital of France is")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--src", type=Path, required=True, help="Lance folder, float checkpoint inside")
    parser.add_argument("--out", type=Path, help="folder to create; never overwritten; not written by --dry_run")
    parser.add_argument("--arch", choices=ARCHS, default=ARCHS[0],
                        help="glm4_moe is exact; qwen2 repeats the published, lossy form")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the stored tensors")
    parser.add_argument("--dry_run", action="store_true", help="read headers only and print what would be written")
    return parser.parse_args(argv)


def why_left_out(name: str) -> str | None:
    """Why a tensor of a Lance checkpoint is not part of the understanding path; None if it is."""
    if name.startswith(layout.VIT_PREFIX):
        return "vision tower"
    if name == layout.IGNORED:
        return "latent positions, never read"
    if not name.startswith(layout.LLM_PREFIX):
        return "latent interface"
    return "generation expert" if layout.expert_of(name) == "gen" else None


def account(specs: Mapping[str, TensorSpec], config: LanceConfig, what: str) -> dict[str, str | None]:
    """Every tensor of a checkpoint -> why it is left out, or None.

    Raises:
        InputError: the names or shapes are not exactly those of a Lance with this configuration.
    """
    with torch.device("meta"):
        model = Lance(config, torch.float32, torch.device("cpu"))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: spec.shape for name, spec in specs.items()
             if name != layout.IGNORED and not name.startswith(layout.VIT_PREFIX)}
    odd = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if odd:
        raise InputError(f"{what} is not the float checkpoint of its llm_config.json: {len(odd)} tensors are missing, "
                         f"unexpected or of another shape, first {odd[:5]}")
    return {name: why_left_out(name) for name in specs}


def plan(specs: Mapping[str, TensorSpec], config: LanceConfig, arch: str, tied: bool, dtype: torch.dtype,
         what: str = "the checkpoint") -> dict[str, TensorSpec]:
    """Name in the new folder -> dtype and shape.

    Args:
        tied: the head is the embedding. mlx-lm's glm4_moe reads a head from the file in any case, so only the qwen2
            form leaves it out.
    """
    kept = [name for name, reason in account(specs, config, what).items() if reason is None]
    if arch == "qwen2":
        kept = [name for name in kept if not is_head_norm(name)]
    short = {name: name.removeprefix(layout.LLM_PREFIX) for name in kept}
    return {ours: TensorSpec(dtype, specs[name].shape) for name, ours in short.items()
            if not (arch == "qwen2" and tied and ours == HEAD)}


def is_head_norm(name: str) -> bool:
    """Whether a tensor is a norm per query or key head."""
    return name.endswith((".q_norm.weight", ".k_norm.weight"))


def heads_equal(source: Checkpoint) -> bool:
    """Whether the head and the embedding are the same bits."""
    names = layout.LLM_PREFIX + HEAD, layout.LLM_PREFIX + EMBEDDING
    if source.specs[names[0]] != source.specs[names[1]]:
        return False
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8))
               for a, b in zip(source.pieces(names[0]), source.pieces(names[1]), strict=True))


def finite_pieces(source: Checkpoint, name: str) -> Iterator[Tensor]:
    """A tensor, flat, in consecutive pieces. InputError if it holds NaN or Inf."""
    for piece in source.pieces(name):
        require_finite(piece, name)
        yield piece


def model_config(raw: Mapping[str, Any], config: LanceConfig, arch: str, tied: bool, dtype: str,
                 eos: int) -> dict[str, Any]:
    """config.json. rope_theta, rope_scaling and torch_dtype stand at the top level because mlx-lm looks there."""
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "vocab_size", "rms_norm_eps", "rope_theta")
    shared = {**{name: getattr(config, name) for name in fields}, "head_dim": config.head_dim, "rope_scaling": None,
              "max_position_embeddings": raw.get("max_position_embeddings", 128000), "hidden_act": "silu",
              "attention_dropout": 0.0, "tie_word_embeddings": tied, "torch_dtype": dtype, "use_cache": True,
              "bos_token_id": raw.get("bos_token_id"), "eos_token_id": eos, "pad_token_id": raw.get("bos_token_id")}
    if arch == "qwen2":
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **shared}
    # partial_rotary_factor defaults to one half in transformers. No layer has experts: all are before the first one.
    dense = {"attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 1.0,
             "first_k_dense_replace": config.num_hidden_layers, "n_routed_experts": 1, "n_shared_experts": 1,
             "num_experts_per_tok": 1, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1,
             "norm_topk_prob": True, "routed_scaling_factor": 1.0, "num_mtp_layers": 0, "num_nextn_predict_layers": 0}
    return {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", **shared, **dense}


def generation_config(model: Mapping[str, Any], valid: int) -> dict[str, Any]:
    """Greedy until <|im_end|>, as Lance answers; ids beyond the tokenizer are never generated."""
    ids = {name: model[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    surplus = list(range(valid, model["vocab_size"]))
    return {**ids, "do_sample": False, "max_new_tokens": MAX_NEW_TOKENS,
            **({"suppress_tokens": surplus} if surplus else {})}


@torch.no_grad()
def logit_error(source: Checkpoint, config: LanceConfig, ids: Tensor, tied: bool) -> dict[str, float]:
    """What the qwen2 form changes on some token ids [t]: largest logit difference, spread of the logits, KL in nats.

    One layer is in memory at a time, in float32, and serves both forms.
    """
    forms = [DecoderConfig.of(config, use_qk_norm=norms) for norms in (True, False)]
    rope, mask = rope_tables(forms[0], torch.arange(len(ids))), causal_mask(len(ids))
    embedding = source.read(layout.LLM_PREFIX + EMBEDDING, torch.float32)
    states = [embedding[ids][None]] * 2
    for index in range(config.num_hidden_layers):
        prefix = f"{layout.LAYERS}.{index}."
        tensors = {name.removeprefix(prefix): source.read(name, torch.float32)
                   for name in layout.of_layer(source.specs, index) if why_left_out(name) is None}
        for which, form in enumerate(forms):
            with torch.device("meta"):
                layer = DecoderLayer(form)
            wanted = layer.state_dict()
            layer.load_state_dict({name: tensors[name] for name in wanted}, assign=True)
            states[which] = layer(states[which], rope, mask)
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight = torch.nn.Parameter(source.read(f"{layout.LLM_PREFIX}model.norm.weight", torch.float32))
    head = source.read(layout.LLM_PREFIX + HEAD, torch.float32)
    exact, lossy = norm(states[0][0]) @ head.t(), norm(states[1][0]) @ (embedding if tied else head).t()
    kl = (exact.softmax(-1) * (exact.log_softmax(-1) - lossy.log_softmax(-1))).sum(-1).mean()
    return {"max_logit_error": (exact - lossy).abs().max().item(), "logit_std": exact.std().item(), "kl": kl.item(),
            "same_argmax": (exact.argmax(-1) == lossy.argmax(-1)).float().mean().item(), "tokens": len(ids)}


def copy_tokenizer(src: Path, out: Path) -> None:
    """The tokenizer as it is, and the one-file form that mlx-lm and other runtimes prefer."""
    for name in TOKENIZER_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, out / name)
    if not (out / "tokenizer.json").exists():
        Qwen2Tokenizer.from_pretrained(str(src), local_files_only=True).backend_tokenizer.save(
            str(out / "tokenizer.json"))


def extract(src: Path, out: Path, arch: str, dtype: str) -> dict[str, Any]:
    """Write the folder; returns what extraction.json says.

    Raises:
        InputError: `src` is no Lance folder, its checkpoint does not fit or holds NaN, `out` exists, or the disk is too
            small.
    """
    require_free(out)
    raw, config = read_json(src / "llm_config.json", "model configuration"), LanceConfig.load(src / "llm_config.json")
    tokenizer = LanceTokenizer(src)
    with Checkpoint(src) as source:
        reasons = account(source.specs, config, str(source.path))
        equal = heads_equal(source)
        tied = bool(raw.get("tie_word_embeddings")) if arch == "qwen2" else equal
        specs = plan(source.specs, config, arch, tied, DTYPES[dtype], str(source.path))
        require_space(out, file_size(specs))
        facts = _facts(source, reasons, specs, arch, dtype, equal, tied)
        if arch == "qwen2":
            facts["lossy"] = logit_error(source, config, torch.tensor(tokenizer.encode(PROBE)), tied)
            log.warning("the qwen2 form is lossy, and not Lance any more: %s", json.dumps(facts["lossy"]))
        with whole_folder(out) as folder:
            with TensorFileWriter(folder / "model.safetensors", specs) as writer:
                for name in specs:
                    writer.write_pieces(name, finite_pieces(source, layout.LLM_PREFIX + name))
            settings = model_config(raw, config, arch, tied, dtype, tokenizer.im_end)
            write_json(folder / "config.json", settings)
            write_json(folder / "generation_config.json", generation_config(settings, len(tokenizer)))
            copy_tokenizer(src, folder)
            write_json(folder / "extraction.json", facts)
    return facts


def _facts(source: Checkpoint, reasons: Mapping[str, str | None], specs: Mapping[str, TensorSpec], arch: str,
           dtype: str, equal: bool, tied: bool) -> dict[str, Any]:
    left_out: dict[str, int] = {}
    for name, reason in reasons.items():
        if reason is None and name.removeprefix(layout.LLM_PREFIX) not in specs:
            reason = "head norms, unknown to qwen2" if is_head_norm(name) else "head, held to be the embedding"
        if reason is not None:
            left_out[reason] = left_out.get(reason, 0) + 1
    return {"tool": f"lance-quant {__version__}", "source_fingerprint": model_fingerprint(source), "arch": arch,
            "dtype": dtype, "bytes": file_size(specs), "tensors_of_source": len(reasons), "kept": len(specs),
            "left_out": left_out, "head_equals_embedding": equal, "tie_word_embeddings": tied,
            "exact": arch != "qwen2"}


def dry_run(src: Path, arch: str, dtype: str) -> str:
    """Tensors and exact bytes of model.safetensors, from headers; the head counts as separate, see heads_equal."""
    config = LanceConfig.load(src / "llm_config.json")
    with Checkpoint(src) as source:
        raw = read_json(src / "llm_config.json", "model configuration")
        tied = arch == "qwen2" and bool(raw.get("tie_word_embeddings"))
        specs = plan(source.specs, config, arch, tied, DTYPES[dtype], str(source.path))
    return f"{len(specs)} tensors\noutput_bytes: {file_size(specs)}"


def main(argv: list[str] | None = None) -> None:
    """Plan or extract, and print the result."""
    args = parse_args(argv)
    if args.dry_run:
        print(dry_run(args.src, args.arch, args.dtype))
        return
    if args.out is None:
        raise InputError("--out is needed unless --dry_run is given")
    facts = extract(args.src, args.out, args.arch, args.dtype)
    log.info("kept %d of %d tensors; left out: %s; head equal to the embedding: %s", facts["kept"],
             facts["tensors_of_source"], facts["left_out"], facts["head_equals_embedding"])
    print(args.out)


if __name__ == "__main__":
    script.run(main)
