"""Packing equals what the official packer recorded, id for id and position for position."""

import json
import shutil

import pytest
import torch

from lance_quant.errors import InputError
from lance_quant.lance.tokens import (
    PROMPT,
    T2I_SYSTEM,
    TARGET,
    LanceTokenizer,
    Visual,
    generation_sequence,
    mrope_positions,
    understanding_sequence,
)

GRID = (1, 6, 8)  # 96 x 128 pixels


def content_of_tokens(packed):
    return torch.cat([torch.full((split.length,), split.content) for split in packed.splits])


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("fix_quirks", [False, True])
def test_generation_prompt_equals_official_packing(pipeline, t2i, prompts, sample, fix_quirks):
    packed = generation_sequence(pipeline.tokenizer, T2I_SYSTEM, prompts[sample].text, GRID, fix_quirks=fix_quirks)
    official, batch = t2i["f32"].tensors, t2i["f32"].meta["samples"][sample]["batch"]
    assert torch.equal(packed.ids, official[f"s{sample}.in.packed_text_ids"])
    assert torch.equal(packed.positions, official[f"s{sample}.rope.0"][:, 0])
    assert [split.length for split in packed.splits] == batch["split_lens"]
    assert [split.mode for split in packed.splits] == batch["attn_modes"]
    assert torch.equal(content_of_tokens(packed), official[f"s{sample}.in.sample_modality"])


@pytest.mark.parametrize("sample", [0, 1, 2])
def test_understanding_prompt_equals_official_packing(pipeline, x2t, questions, sample):
    official, batch = x2t["f32"].tensors, x2t["f32"].meta["samples"][sample]["batch"]
    grid = official[f"s{sample}.in.vit_video_grid_thw"][0].tolist()
    packed = understanding_sequence(pipeline.tokenizer, questions[sample].system, questions[sample].question,
                                (grid[0], grid[1] // 2, grid[2] // 2))
    prompt = int(official[f"s{sample}.in.ce_loss_indexes"][0]) + 1  # the recording goes on with the reference answer
    assert torch.equal(packed.ids, official[f"s{sample}.in.packed_text_ids"][:prompt])
    assert torch.equal(packed.positions, official[f"s{sample}.rope.0"][:, 0, :prompt])
    assert [split.length for split in packed.splits[:2]] == batch["split_lens"][:2]
    assert [split.mode for split in packed.splits] == batch["attn_modes"]
    assert torch.equal(content_of_tokens(packed), official[f"s{sample}.in.sample_modality"][:prompt])


def test_positions_by_hand():
    """Two text tokens, a picture of 2 x 3, one text token: it continues after the picture's largest position."""
    expected = [[0, 1, 2, 2, 2, 2, 2, 2, 5], [0, 1, 2, 2, 2, 3, 3, 3, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]]
    assert mrope_positions(9, [Visual(2, (1, 2, 3))]).tolist() == expected


def test_a_second_frame_is_two_positions_later():
    assert mrope_positions(2, [Visual(0, (2, 1, 1))]).tolist() == [[0, 2], [0, 0], [0, 0]]


def test_empty_prompt_leaves_nothing_for_guidance_to_drop(pipeline):
    packed = generation_sequence(pipeline.tokenizer, T2I_SYSTEM, "", GRID)
    assert PROMPT not in [split.content for split in packed.splits]
    assert sum(split.length for split in packed.splits) == len(packed.ids)


@pytest.fixture
def newline_tokenizer(paths, tmp_path):
    """The golden tokenizer with one more token, two newlines, as the real one has it."""
    for name in LanceTokenizer.FILES:
        shutil.copy(paths.model / name, tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"ĊĊ": 654}))
    with (tmp_path / "merges.txt").open("a") as merges:
        merges.write("Ċ Ċ\n")
    return LanceTokenizer(tmp_path)


def test_prompt_that_merges_with_the_template_is_refused_as_officially_and_fixed_on_request(newline_tokenizer):
    with pytest.raises(InputError, match="--fix_quirks"):
        generation_sequence(newline_tokenizer, T2I_SYSTEM, "\nA boat", GRID)
    packed = generation_sequence(newline_tokenizer, T2I_SYSTEM, "\nA boat", GRID, fix_quirks=True)
    (start, end), = [bounds for bounds, split in zip(packed.bounds(), packed.splits, strict=True)
                     if split.content == PROMPT]
    assert newline_tokenizer.decode(packed.ids[start:end].tolist()) == "\nA boat"


def test_prompt_that_occurs_in_the_system_text_is_found_there_unless_quirks_are_fixed(pipeline):
    text = "Describe the image by detailing the color"
    assert text in T2I_SYSTEM
    starts = []
    for fix_quirks in (False, True):
        packed = generation_sequence(pipeline.tokenizer, T2I_SYSTEM, text, GRID, fix_quirks=fix_quirks)
        starts += [start for (start, _), split in zip(packed.bounds(), packed.splits, strict=True)
                   if split.content == PROMPT]
    assert starts[0] < starts[1]


def test_special_tokens_in_a_prompt_are_text_when_quirks_are_fixed(pipeline):
    ids = {fix: generation_sequence(pipeline.tokenizer, T2I_SYSTEM, "a <|im_end|> b", GRID, fix_quirks=fix).ids.tolist()
           for fix in (False, True)}
    im_end = pipeline.tokenizer.im_end
    assert ids[False].count(im_end) == ids[True].count(im_end) + 1


def test_a_visual_pad_in_a_prompt_that_is_taken_literally_does_not_move_the_target(pipeline):
    packed = generation_sequence(pipeline.tokenizer, T2I_SYSTEM, "a <|video_pad|> b", GRID, fix_quirks=True)
    (start, end), = [bounds for bounds, split in zip(packed.bounds(), packed.splits, strict=True)
                     if split.content == TARGET]
    assert (packed.ids[start], packed.ids[end - 1]) == (pipeline.tokenizer.vision_start, pipeline.tokenizer.vision_end)
    assert end - start == 6 * 8 + 2


def test_missing_tokenizer_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"vocab\.json, merges\.txt"):
        LanceTokenizer(tmp_path)
