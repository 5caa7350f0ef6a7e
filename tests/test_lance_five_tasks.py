"""Edits, videos and animated pictures equal the official runs: packing, pixels, tokens, every step, latents, frames."""

import numpy as np
import pytest
import torch
from conftest import CPU, relative
from PIL import Image

from lance_quant.errors import InputError
from lance_quant.lance import generation
from lance_quant.lance.generation import Given, Sampling
from lance_quant.lance.media import vision
from lance_quant.lance.media.samples import TASKS
from lance_quant.lance.runtime import Runtime, latent_grid
from lance_quant.lance.tokens import (
    CONDITION,
    EDIT_SYSTEM,
    TARGET,
    VIDEO_SYSTEM,
    VIT,
    generation_sequence,
    understanding_sequence,
)

CLOSE = 1e-5  # see test_lance_mot.py
SIX = Sampling(num_timesteps=6)  # as recorded
NUM_FRAMES = 6
EDITS = ["image_edit", "video_edit"]
DRAWN = ["t2v", "i2v", *EDITS]


def resolution(task):
    return "image_256res" if TASKS[task].makes == "image" else "video_192p"


def frames(pipeline, task, official):
    return pipeline.frames(official.sample.visual, TASKS[task].takes)


def packed(pipeline, task, official, fix_quirks=False):
    """The request's packed sequence, its grids taken from the recording."""
    thw = official.tensors["s0.in.video_grid_thw"][0].tolist()
    grids = [(frames, rows // 2, columns // 2) for frames, rows, columns in thw]
    sample, words = official.sample, pipeline.tokenizer
    if task == "x2t_video":
        return understanding_sequence(words, sample.system, sample.question, grids[0])
    system = EDIT_SYSTEM.format(sample.named) if task in EDITS else VIDEO_SYSTEM
    sources = list(zip((VIT, CONDITION), grids[:-1], strict=True)) if task in EDITS else []
    return generation_sequence(words, system, sample.text, grids[-1], sources, fix_quirks)


@pytest.mark.parametrize("fix_quirks", [False, True])
@pytest.mark.parametrize("task", DRAWN)
def test_packing_equals_the_official_one(pipeline, recorded, task, fix_quirks):
    official = recorded(task)
    ours, tensors, batch = packed(pipeline, task, official, fix_quirks), official.tensors, official.meta["samples"][0]
    assert torch.equal(ours.ids, tensors["s0.in.packed_text_ids"])
    assert [split.length for split in ours.splits] == batch["batch"]["split_lens"]
    assert [split.mode for split in ours.splits] == batch["batch"]["attn_modes"]
    contents = torch.cat([torch.full((split.length,), split.content) for split in ours.splits])
    assert torch.equal(contents, tensors["s0.in.sample_modality"])


@pytest.mark.parametrize("task", DRAWN)
def test_positions_of_every_call_equal_the_official_ones(pipeline, recorded, task):
    """Conditional calls at their splits' positions, the unconditional query at those without the prompt."""
    official = recorded(task)
    whole = packed(pipeline, task, official)
    plain = whole.without_prompt()
    calls = [call for call in official.meta["calls"] if f"s0.call{call['call']}.pos" in official.tensors]
    seen = 0
    for call in calls:
        theirs = official.tensors[f"s0.call{call['call']}.pos"][:, 0]
        if call["update"]:  # the cache's calls, conditional and unconditional alike at conditional positions
            assert any(torch.equal(theirs, whole.positions[:, start:end]) for start, end in whole.bounds())
            continue
        sequence = whole if call["kv_len"] == whole.span(TARGET)[0] else plain
        assert torch.equal(theirs, sequence.positions[:, slice(*sequence.span(TARGET))])
        seen += 1
    assert seen >= 4


def test_positions_before_the_shift_of_edits_are_plain(pipeline, recorded):
    official = recorded("image_edit")
    ours, plain = packed(pipeline, "image_edit", official).positions, official.tensors["s0.rope.0"][:, 0]
    moved = (ours != plain).any(0)
    modality = official.tensors["s0.in.sample_modality"]
    assert set(modality[moved].tolist()) == {VIT, TARGET}
    assert torch.equal(ours[:, modality == TARGET], ours[:, modality == CONDITION])
    assert ours[0, modality == VIT][0] == 1000 and torch.equal(ours[1:, modality == VIT], plain[1:, modality == VIT])


def test_video_question_equals_the_official_packing(pipeline, recorded):
    official = recorded("x2t_video")
    ours = packed(pipeline, "x2t_video", official)
    length = int(official.tensors["s0.in.ce_loss_indexes"][0]) + 1
    assert torch.equal(ours.ids, official.tensors["s0.in.packed_text_ids"][:length])
    assert torch.equal(ours.positions, official.tensors["s0.rope.0"][:, 0, :length])
    assert [split.mode for split in ours.splits] == official.meta["samples"][0]["batch"]["attn_modes"]


@pytest.mark.parametrize("task", ["x2t_video", "video_edit"])
def test_frames_equal_the_official_ones(pipeline, recorded, task):
    official = recorded(task)
    ours = np.stack([np.array(frame) for frame in frames(pipeline, task, official)])
    assert (ours == official.tensors["video_frames.0"].numpy()).all()


@pytest.mark.parametrize("task", ["x2t_video", *EDITS])
def test_vit_pixels_patches_and_tokens_equal_the_official_ones(pipeline, recorded, task):
    official = recorded(task).tensors
    shown = frames(pipeline, task, recorded(task))
    pixels = vision.vit_pixels(shown, resolution(task))
    assert torch.equal(pixels, official["s0.vit_u8.0"][:, :pixels.shape[1]])  # recorded with its repeated last frame
    patches, grid = vision.vit_patches(pixels)
    assert list(grid) == official["s0.in.vit_video_grid_thw"][0].tolist()
    assert torch.equal(patches[official["s0.vit_patch_rows.index"]], official["s0.vit_patch_rows.value"])
    assert relative(pipeline.look(shown, resolution(task))[0], official["s0.vit.0"]) < CLOSE


@pytest.mark.parametrize("task", ["i2v", *EDITS])
def test_vae_pixels_and_latents_equal_the_official_ones(pipeline, recorded, task):
    official = recorded(task).tensors
    shown = frames(pipeline, task, recorded(task))
    pixels = vision.vae_pixels(shown, resolution(task))
    assert torch.equal(pixels, official["s0.vae_u8.0"])
    encoded = pipeline.vae.encode(vision.unit_range(pixels))
    # the encoders agree to 7e-7 relative; values reach 5
    assert (encoded.mean - official["s0.vae_mu.0"][0].permute(1, 2, 3, 0)).abs().max() < 1e-4
    assert (encoded.log_variance - official["s0.vae_logvar.0"][0].permute(1, 2, 3, 0)).abs().max() < 1e-4


@pytest.mark.parametrize("task", ["i2v", *EDITS])
def test_drawn_latents_follow_the_official_formula(pipeline, recorded, task):
    """The recorded draw and ours are mean + exp(logvar / 2) * noise, with unit noise; and ours are seeded."""
    official = recorded(task).tensors
    mean, log_variance = (official[f"s0.vae_{part}.0"][0].permute(1, 2, 3, 0) for part in ("mu", "logvar"))
    ours = pipeline.encode(frames(pipeline, task, recorded(task)), resolution(task))
    for latents in (official["s0.encoded.0"], ours):
        noise = (latents - mean) / torch.exp(0.5 * log_variance)
        # 12 000 to 25 000 values: four standard errors of mean and deviation
        assert abs(noise.mean()) < 0.04 and abs(noise.std() - 1) < 0.03
    assert torch.equal(ours, pipeline.encode(frames(pipeline, task, recorded(task)), resolution(task)))


def test_fixed_quirks_take_the_mean_of_the_source(paths, recorded):
    official = recorded("i2v")
    repaired = Runtime.load(paths, CPU, torch.float32, fix_quirks=True)
    mean = official.tensors["s0.vae_mu.0"][0].permute(1, 2, 3, 0)
    assert relative(repaired.encode(frames(repaired, "i2v", official), "video_192p"), mean) < CLOSE


def test_video_answer_is_identical_to_the_official_one(pipeline, recorded):
    official = recorded("x2t_video")
    answer = pipeline.answer(*pipeline.prompt_of(official.sample, "video_192p"))
    assert answer.ids == official.meta["generated_ids"][0]
    assert answer.text == official.meta["result.json"][0]["answer"]


def denoiser(pipeline, task, official, sampling=SIX):
    """The request, given the recorded random latents of its source or first frame."""
    tensors = official.tensors
    given = Given()
    if task == "i2v":
        given = Given(first=tensors["s0.encoded.0"])
    elif task in EDITS:
        tokens, _ = pipeline.look(frames(pipeline, task, official), resolution(task))
        given = Given(tokens, tensors["s0.encoded.0"])
    return generation.Denoiser(pipeline.model, packed(pipeline, task, official), sampling, given)


@pytest.mark.parametrize("batch_guidance", [True, False])
@pytest.mark.parametrize("task", DRAWN)
def test_every_step_equals_the_official_one(pipeline, recorded, task, batch_guidance):
    official = recorded(task)
    sampling, tensors = Sampling(num_timesteps=6, batch_guidance=batch_guidance), official.tensors
    request = denoiser(pipeline, task, official, sampling)
    steps, passes = [], []
    hook = pipeline.model.llm2vae.register_forward_hook(lambda _, __, out: passes.extend(out))
    latent = pipeline.sample(request, on_step=steps.append)
    hook.remove()
    assert len(passes) == sum(f"s0.v.{k}" in tensors for k in range(20)) == 12
    for k, velocity in enumerate(passes):
        assert relative(velocity, tensors[f"s0.v.{k}"][1:-1]) < CLOSE, f"pass {k}"
    cells = steps[0].x.shape[0]
    for step in steps:  # recorded with the source's cells in front
        assert relative(step.x, tensors[f"s0.x_t.{step.number + 1}"][-cells:]) < CLOSE, f"x_t {step.number}"
    spans = [key for key in tensors if key.startswith("s0.latent.0.")]
    assert relative(latent, tensors[max(spans)]) < CLOSE


@pytest.mark.parametrize("task", DRAWN)
def test_bfloat16_stays_within_the_official_spread(paths, recorded, task):
    """The specification gives 0.8 to 1.3e-2 for latents of the tiny model, bf16 against f32; allow twice."""
    half, official = Runtime.load(paths, CPU, torch.bfloat16), recorded(task)
    latent = half.sample(denoiser(half, task, official))
    assert latent.dtype == torch.bfloat16
    theirs = official.tensors[max(key for key in official.tensors if key.startswith("s0.latent.0."))]
    moved = slice(1, None) if task == "i2v" else slice(None)
    assert relative(latent[moved], theirs[moved]) < 2.6e-2


@pytest.mark.parametrize("task", DRAWN)
def test_noise_is_the_official_one(pipeline, recorded, task):
    """Exactly: an edit's target takes the draws behind those of its source, a clip's given frame replaces its own."""
    noise = denoiser(pipeline, task, recorded(task)).noise(42)
    assert torch.equal(noise, recorded(task).tensors["s0.x_t.1"][-len(noise):])


@pytest.mark.parametrize("task", DRAWN)
def test_decoded_frames_equal_the_official_ones(pipeline, recorded, goldens, task):
    tensors = recorded(task).tensors
    latent = tensors[max(key for key in tensors if key.startswith("s0.latent.0."))]
    # float16 storage of values up to 1: half a unit in the last place is 2.4e-4; the classes differ by 5e-6
    assert (pipeline.vae.decode(latent) - tensors["s0.decoded.0"].float()).abs().max() < 1e-3
    decoded = pipeline.decode_frames(latent)
    assert len(decoded) == 4 * latent.shape[0] - 3
    if task == "image_edit":
        theirs = np.array(Image.open(goldens / "outputs" / "image_edit.000001.png")).astype(int)
        assert np.abs(np.array(decoded[0]).astype(int) - theirs).max() <= 1


def test_latent_positions_of_a_second_frame_equal_the_official_ones(pipeline, recorded):
    assert relative(pipeline.model.latent_pos_embed((2, 6, 8)), recorded("t2v").tensors["s0.latpos.0"]) < CLOSE


def test_a_given_first_frame_never_moves(pipeline, recorded):
    official = recorded("i2v")
    request = denoiser(pipeline, "i2v", official)
    latent = pipeline.sample(request)
    assert torch.equal(latent[:1], official.tensors["s0.encoded.0"])
    velocity = request.velocity(torch.randn(request.noise(0).shape, generator=torch.Generator().manual_seed(1)), 0.7)
    cells = latent[0, ..., 0].numel()
    assert (velocity[:cells] == 0).all() and (velocity[cells:] != 0).all()


@pytest.mark.parametrize("task", DRAWN)
def test_whole_requests_differ_from_the_recording_by_their_source_noise_only(pipeline, recorded, task):
    """Through Runtime's own entries, with its own draw of the source's noise. t2v has none and is equal."""
    official = recorded(task)
    sample = official.sample
    if task == "t2v":
        request = pipeline.denoiser(sample.text, 100, 140, SIX, NUM_FRAMES)
    elif task == "i2v":
        request = pipeline.animator(sample.text, frames(pipeline, task, official)[0], resolution(task), NUM_FRAMES, SIX)
    else:
        request = pipeline.editor(sample.text, frames(pipeline, task, official), resolution(task), sample.named, SIX)
    latent = pipeline.sample(request)
    tensors = official.tensors
    theirs = tensors[max(key for key in tensors if key.startswith("s0.latent.0."))]
    assert latent.shape == theirs.shape
    difference = relative(latent, theirs)
    assert difference < CLOSE if task == "t2v" else 1e-3 < difference < 1.5


def test_an_instruction_that_is_found_inside_a_visual_is_refused_unless_quirks_are_fixed(pipeline):
    sources = [(VIT, (1, 2, 2)), (CONDITION, (1, 2, 2))]
    how = (pipeline.tokenizer, EDIT_SYSTEM.format("image"), "<|vision_end|>", (1, 2, 2), sources)
    with pytest.raises(InputError, match="marks the place of a picture"):
        generation_sequence(*how)
    assert len(generation_sequence(*how, fix_quirks=True).splits) == 7


@pytest.mark.parametrize("frames, latent", [(1, 1), (4, 1), (5, 2), (50, 13), (121, 31)])
def test_a_latent_frame_stands_for_four(frames, latent):
    assert latent_grid(64, 64, frames) == (latent, 4, 4)


@pytest.mark.parametrize("frames", [0, -3, 122])
def test_impossible_lengths_are_refused(frames):
    with pytest.raises(InputError, match=r"must be 1 to 121"):
        latent_grid(64, 64, frames)


def test_a_source_beyond_the_position_table_is_refused(pipeline):
    with pytest.raises(InputError, match=r"2100 x 900 becomes 1152 x 496 at image_768res, and 1024 is the longest"):
        pipeline.encode([Image.new("RGB", (2100, 900))], "image_768res")
