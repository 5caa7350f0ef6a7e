"""lance-nano's edits and clips: true by construction, and trained in the form that the runtime runs."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lance_nano import clips, evaluate_clips, train_clips, visual_batch
from lance_nano.model import NanoConfig, NanoLance
from lance_nano.recognise import shows_layout
from lance_quant.lance import tokens
from lance_quant.lance.config import LancePaths
from lance_quant.lance.generation import Denoiser, Given, Sampling
from lance_quant.lance.runtime import Runtime

MODEL = Path(__file__).parents[1] / "lance_nano" / "checkpoint" / "Lance_nano"
RESOLUTION = "image_112res"


@pytest.fixture(scope="module")
def runtime():
    return Runtime.load(LancePaths.find(MODEL), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def lance():
    config = json.loads((MODEL / "llm_config.json").read_text())
    model = NanoLance(NanoConfig(config["vocab_size"], layers=config["num_hidden_layers"]))
    tensors = load_file(MODEL / "model.safetensors")
    del tensors["latent_pos_embed.pos_embed"]
    model.load_state_dict(tensors)
    return model.float().eval()


def prefix_of(sequence):
    """Tokens in front of the first visual or the prompt: the system text and `user`."""
    return sequence.splits[0].length


def requests(runtime):
    """One request of each generation task that shows or makes something new: sequence, what is given."""
    change = clips.clip(random.Random(2))
    frames = clips.pictures(change)
    encoded = {count: runtime.encode(frames[:count], RESOLUTION) for count in (1, 5)}
    seen = {count: runtime.look(frames[:count], RESOLUTION) for count in (1, 5)}
    grid = (2, 7, 7)
    clip = tokens.generation_sequence(runtime.tokenizer, tokens.VIDEO_SYSTEM, change.caption, grid)
    yield "t2v", clip, Given()
    yield "i2v", clip, Given(first=encoded[1])
    for task, named, count in (("image_edit", "image", 1), ("video_edit", "video", 5)):
        (vit, merged), source = seen[count], encoded[count]
        sources = [(tokens.VIT, merged), (tokens.CONDITION, tuple(source.shape[:3]))]
        sequence = tokens.generation_sequence(
            runtime.tokenizer, tokens.EDIT_SYSTEM.format(named), change.instruction, tuple(source.shape[:3]), sources
        )
        yield task, sequence, Given(vit, source)


@torch.no_grad()
def test_training_form_gives_the_velocity_of_the_runtime_with_and_without_the_prompt(runtime, lance):
    """Guided velocities reach 9 and are 2e-5 apart, float32 in another order of sums; ten times that is allowed."""
    seen = []
    for task, sequence, given in requests(runtime):
        prefix, t = prefix_of(sequence), 0.625
        rows = [visual_batch.row(sequence, prefix, given, conditional) for conditional in (True, False)]
        denoiser = Denoiser(runtime.model, sequence, Sampling(cfg_renorm="none"), given)
        noisy = denoiser.noise(3)
        packed = visual_batch.batch(rows, sequence.ids[:prefix])
        ours = visual_batch.velocity(lance, packed, noisy.expand(2, -1, -1), torch.tensor([t, t]))
        guided = ours[1] + denoiser.sampling.cfg_scale * (ours[0] - ours[1])
        guided[: rows[0].fixed] = 0
        torch.testing.assert_close(guided, denoiser.velocity(noisy, t), rtol=2e-4, atol=2e-4)
        assert float((ours[0] - ours[1]).abs().max()) > 0.01, task
        seen.append(task)
    assert seen == ["t2v", "i2v", "image_edit", "video_edit"]


@torch.no_grad()
def test_training_form_of_a_question_about_a_clip_gives_the_runtimes_log_probabilities(runtime, lance):
    change = clips.clip(random.Random(4))
    vit, merged = runtime.look(clips.pictures(change), "image_112res")
    asked = clips.clip_questions(change)[0]
    system = tokens.QUESTION_SYSTEMS["video"]
    prompt = tokens.understanding_sequence(runtime.tokenizer, system, asked.text, merged)
    answer = runtime.tokenizer.encode(asked.answer) + [runtime.tokenizer.im_end]
    whole = visual_batch.answered(prompt, answer)
    prefix = prefix_of(prompt)
    packed = visual_batch.batch([visual_batch.row(whole, prefix, Given(vit))], prompt.ids[:prefix])
    loss = visual_batch.answer_loss(lance, packed, [len(answer)])
    known = runtime.forced_logprobs(prompt, vit, answer)
    expected = -known[torch.arange(len(answer)), torch.tensor(answer)].mean()
    # The runtime leaves the vocabulary's unused rows out; they hold little of the probability.
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=1e-3)


def test_scenes_of_a_change_are_what_its_words_say_and_are_recognised():
    rng = random.Random(0)
    for make in (clips.edit, clips.clip):
        for _ in range(60):
            change = make(rng)
            assert change.before != change.after
            for scene in (change.before, change.after):
                assert shows_layout(scene, np.asarray(clips.render(scene)))
            where = clips.PLACES[change.changed.cell]
            assert where in change.caption + change.instruction or change.kind == "disappear"
            assert change.kind != "recolour" or change.instruction.endswith(change.changed.colour)


def test_held_out_changes_never_occur_in_training():
    rng = random.Random(1)
    words = {kept: {change.instruction + change.caption
                    for change in (clips.drawn(clips.clip, rng, kept) for _ in range(100))} for kept in (True, False)}
    assert not words[True] & words[False]


def test_true_clips_survive_the_codec_and_a_still_clip_is_not_taken_for_one(runtime):
    change = clips.clip(random.Random(7))
    wanted = evaluate_clips.scenes_of(change)
    decoded = runtime.decode_frames(runtime.encode(clips.pictures(change), RESOLUTION))
    assert evaluate_clips.judged(decoded, wanted) == (True, True)
    assert evaluate_clips.judged([decoded[0]] * clips.FRAMES, wanted)[1] is False


@pytest.mark.slow
def test_fine_tuning_is_reproducible_goes_on_and_is_exported_as_a_checkpoint(tmp_path):
    states = []
    for name, parts in (("whole", ("2",)), ("parts", ("1", "2"))):
        for steps in parts:
            given = ["--model_path", str(MODEL), "--out", str(tmp_path / f"{name}.pt"), "--rows", "1"]
            train_clips.main([*given, "--steps", steps])
        states.append(torch.load(tmp_path / f"{name}.pt", weights_only=True))
    whole, parts = states
    before = train_clips.trained_weights(MODEL).state_dict()
    changed = [name for name in before if not torch.equal(before[name], whole["model"][name])]
    assert len(changed) > 0.9 * len(before)  # both experts and both heads are trained
    # One schedule, but of one step's length at first: the learning rate of a first step is warm-up's in both.
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in before)
    train_clips.main([*given, "--export", str(tmp_path / "Lance_nano_Video")])
    exported = train_clips.trained_weights(tmp_path / "Lance_nano_Video").state_dict()
    assert all(torch.equal(exported[name], parts["average"][name].bfloat16().float()) for name in before)
    assert {path.name for path in (tmp_path / "Lance_nano_Video").iterdir()} == {path.name for path in MODEL.iterdir()}
