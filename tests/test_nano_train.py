"""lance-nano's trainers: packing as the templates say, an exact codec, reproducible and resumable runs."""

import random
from pathlib import Path

import pytest
import torch

from lance_nano import optim, train, vae
from lance_nano.data import IGNORE, Packer
from lance_nano.questions import one_per_kind
from lance_nano.scenes import question_scene
from lance_nano.tokenizer import learned_words
from lance_quant.errors import InputError

GOLDEN_VAE = Path(__file__).parent / "goldens" / "checkpoint" / "Wan2.2_VAE.pth"


@pytest.fixture(scope="module")
def packer():
    return Packer(learned_words())


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return vae.frame_vae(width=8).eval()


def test_codec_is_the_same_function_on_a_frame_and_in_the_video_class(codec):
    video = vae.wan_vae(width=8).eval()
    video.load_state_dict(vae.video_state(codec))
    pictures = torch.rand(2, 3, 1, 48, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        frame_latent, video_latent = (one.encode(pictures).latent_dist.mean for one in (codec, video))
        torch.testing.assert_close(frame_latent, video_latent, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            codec.decode(frame_latent).sample, video.decode(frame_latent).sample, rtol=1e-4, atol=1e-5
        )


def test_codec_has_the_official_tensor_names(codec):
    golden = torch.load(GOLDEN_VAE, weights_only=True)
    assert vae.official_state(codec).keys() == golden.keys()


def test_folding_normalises_and_changes_no_picture(codec):
    folded = vae.frame_vae(width=8).eval()
    folded.load_state_dict(codec.state_dict())
    pictures = torch.randint(0, 256, (4, 48, 64, 3), generator=torch.Generator().manual_seed(2)).byte()
    with torch.no_grad():
        raw = codec.encode(vae.to_unit(pictures)).latent_dist.mean
        before = codec.decode(raw).sample
    vae.fold_statistics(folded, raw.mean((0, 2, 3, 4)), raw.std((0, 2, 3, 4)))
    rows = vae.encode(folded, pictures)
    torch.testing.assert_close(rows.mean((0, 1)), torch.zeros(48), rtol=0, atol=1e-4)
    torch.testing.assert_close(rows.std((0, 1)), torch.ones(48), rtol=1e-3, atol=0)
    with torch.no_grad():
        distribution = folded.encode(vae.to_unit(pictures)).latent_dist
        after = folded.decode(distribution.mean).sample
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert bool((distribution.logvar == vae.LOG_VARIANCE).all())


def test_question_row_reads_as_the_official_template(packer):
    batch = packer.question_batch([[("Where is it?", packer.words.ids("left") + (packer.end,))]])
    ids = [*batch.prefix.tolist(), *batch.ids[0].tolist()]
    text = packer.words.tokenizer.decode(ids).replace("<|video_pad|>" * 16, "<|video_pad|>")
    assert text == (
        "<|im_start|>system\nLook at the image carefully and answer the question.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Where is it?<|im_end|>\n"
        "<|im_start|>assistant\nleft<|im_end|>"
    )
    predicted = batch.labels[0][batch.labels[0] != IGNORE].tolist()
    assert packer.words.tokenizer.decode(predicted) == "left<|im_end|>"


def test_branches_of_a_picture_do_not_see_each_other(packer):
    one = packer.question_batch([[("Where is it?", (5, 6)), ("What is it?", (7, 8))]])
    bias, first = one.bias[0, 0], len(one.prefix)
    length = len(packer.words.ids("Where is it?")) + len(packer.tail) + 2
    second_rows = slice(18 + length, None)
    assert bool((bias[second_rows, first + 18 : first + 18 + length] < 0).all())
    assert bool((bias[second_rows, : first + 18] == 0).all())
    assert bool((bias[:18, first : first + 18] == 0).all())


def test_a_dropped_caption_can_leave_its_tail_behind(packer):
    """The official sampler reads the unconditional tail at conditional positions, the noise at its own."""
    caption = "two red circles"
    plain, shifted = (packer.picture_batch([""], [drop], 1).positions[0] for drop in (None, caption))
    moved = shifted - plain
    assert bool((moved[: len(packer.tail)] == len(packer.words.ids(caption))).all())
    assert not bool(moved[len(packer.tail) :].any())


def test_orthogonalised_update_has_singular_values_near_one():
    stack = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(optim.orthogonalise(stack))
    assert values.min() > 0.5 and values.max() < 1.5  # the quintic trades precision for speed: 0.7 to 1.2


def test_schedule_warms_up_holds_and_decays_to_two_percent():
    shape = [optim.schedule(1000, fraction, warmup=200, hold=0.6) for fraction in (0.0, 0.59, 0.8, 1.0)]
    assert shape == pytest.approx([1, 1, 0.5, 0.02])
    assert optim.schedule(0, 0.0, warmup=200, hold=0.6) == 1 / 200


def test_training_questions_take_each_kind_once():
    rng = random.Random(4)
    kinds = [question.kind for question in one_per_kind(question_scene(rng), rng)]
    assert len(kinds) == len(set(kinds)) >= 6


def run(folder, codec_path, steps):
    out = folder / "nano.pt"
    sizes = ["--pictures", "2", "--captions", "2", "--pool", "8", "--processes", "1"]
    train.main(["--vae", str(codec_path), "--out", str(out), "--steps", str(steps), *sizes])
    return torch.load(out, weights_only=True)


@pytest.mark.slow
def test_equal_seeds_give_equal_runs_and_a_stopped_run_goes_on(tmp_path):
    codec_path = tmp_path / "vae.pt"
    torch.manual_seed(0)
    torch.save({"model": vae.frame_vae().state_dict()}, codec_path)
    first, second = (run(tmp_path / name, codec_path, steps=2) for name in "ab")
    assert all(torch.equal(first["model"][name], tensor) for name, tensor in second["model"].items())
    longer = run(tmp_path / "a", codec_path, steps=3)
    assert longer["step"] == 3
    assert not torch.equal(longer["model"]["lance.vae2llm.weight"], first["model"]["lance.vae2llm.weight"])


def test_training_without_a_codec_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match="none.pt; python -m lance_nano.train_vae makes one"):
        train.main(["--vae", str(tmp_path / "none.pt"), "--out", str(tmp_path / "nano.pt"), "--processes", "1"])
