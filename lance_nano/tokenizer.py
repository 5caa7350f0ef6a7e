"""A Qwen2-format byte-level BPE of lance-nano's own, learned from the templates and the scene corpus.

Every word of the corpus becomes one token, so the fixed prefix of a prompt is short (18 tokens for questions,
34 for pictures); every other text falls back to pieces and bytes. The 14 special tokens are those of Qwen2.5,
with ids that follow the vocabulary, as in the official folder. Called by train.py; the result is a pure
function of this package.
"""

from __future__ import annotations

import json
import random
import tempfile
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from lance_nano.questions import DESCRIBE, LIST, questions
from lance_nano.scenes import full_caption, listing, picture_scene, question_scene

UNDERSTANDING_SYSTEM = "Look at the image carefully and answer the question."
PICTURE_SYSTEM = (
    "Describe the image by detailing the color, quantity, text, shape, size, texture, "
    "spatial relationships of the objects and background:"
)
SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# Qwen2's own pre-tokenisation, so that the merges are learned on the pieces they will meet
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS_SCENES = 2000


def corpus() -> list[str]:
    """Every kind of text the model meets: templates, captions, questions, answers."""
    rng = random.Random(0)
    texts = [
        f"system\n{UNDERSTANDING_SYSTEM}",
        f"system\n{PICTURE_SYSTEM}",
        "user\n",
        "assistant\n",
        DESCRIBE,
        LIST,
    ]
    for _ in range(CORPUS_SCENES):
        texts.append(picture_scene(rng)[1])
        scene = question_scene(rng)
        texts += [full_caption(scene), listing(scene)]
        texts += [text for question in questions(scene, rng) for text in (question.text, question.answer)]
    return texts


@cache
def _learned() -> tuple[dict[str, int], list[list[str]]]:
    """(vocabulary without specials, merges) learned from `corpus`."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(corpus(), trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]


def write_tokenizer(folder: Path) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json into `folder`."""
    vocabulary, merges = _learned()
    folder.mkdir(parents=True, exist_ok=True)
    ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(ordered, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(len(ordered) + index): {"content": token, **flags} for index, token in enumerate(SPECIALS)
        },
        "additional_special_tokens": list(SPECIALS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Words:
    """The tokenizer of a folder, with a cache: training asks for the same few thousand texts all the time."""

    def __init__(self, folder: Path):
        self.tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        self.cache: dict[str, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self.tokenizer)

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text; special tokens written out are single tokens, nothing is added."""
        if text not in self.cache:
            self.cache[text] = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self.cache[text]

    def id(self, token: str) -> int:
        """The id of one special token."""
        return self.tokenizer.convert_tokens_to_ids(token)


def learned_words() -> Words:
    """The tokenizer as `write_tokenizer` writes it, without keeping files."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return Words(Path(folder))
