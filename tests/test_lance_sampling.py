"""What the official scripts do not offer, off by default: drawn answers, other guidance and solvers, streaming."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import GOLDENS, relative

import run_baseline
from benchmarks import reuse, solvers
from lance_quant.cli import task_arguments
from lance_quant.errors import InputError
from lance_quant.inference.tasks import draw_all
from lance_quant.lance import generation
from lance_quant.lance.generation import Sampling
from lance_quant.lance.settings import Settings, TokenSampling
from lance_quant.lance.tokens import TextStream
from lance_quant.lance.understanding import chances, pick_token

SIZE = (96, 128)
LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0])


def picks(sampling, count=400):
    drawn = [pick_token(sampling, LOGITS, chance) for chance in chances(count, 42).split(1)]
    return torch.bincount(torch.cat(drawn), minlength=4) / count


def test_tokens_are_drawn_by_their_probabilities():
    """Four standard errors of 400 draws are below 0.1."""
    assert (picks(TokenSampling(temperature=1.0)) - LOGITS.softmax(-1)).abs().max() < 0.1
    assert (picks(TokenSampling(temperature=0.5)) - (2 * LOGITS).softmax(-1)).abs().max() < 0.1


def test_no_temperature_is_greedy():
    assert picks(TokenSampling(), 5).tolist() == [0, 1, 0, 0]


def test_top_p_keeps_the_likeliest_tokens_that_reach_it():
    """Probabilities 0.64, 0.24, 0.09, 0.03: 0.6 needs one token, 0.7 two."""
    assert picks(TokenSampling(temperature=1.0, top_p=0.6))[1] == 1
    assert (picks(TokenSampling(temperature=1.0, top_p=0.7)) > 0).tolist() == [False, True, True, False]
    assert picks(TokenSampling(temperature=1.0, top_p=1e-9))[1] == 1


@pytest.mark.parametrize("chance", [0.0, 1 - 2**-24])
def test_the_ends_of_the_range_of_chances_draw_kept_tokens(chance):
    """The least and the greatest float32 in [0, 1)."""
    token = pick_token(TokenSampling(temperature=1.0, top_p=0.7), LOGITS, torch.tensor([chance])).item()
    assert token == (1 if chance == 0 else 2)


def test_drawn_answers_follow_their_seed(pipeline, questions):
    packed, vit_tokens = pipeline.prompt_of(questions[1], "image_256res")

    def answer(seed):
        return pipeline.answer(packed, vit_tokens, 16, sampling=TokenSampling(temperature=1.5), seed=seed).ids

    assert answer(1) == answer(1) != answer(2)


def test_streamed_pieces_join_to_the_answer_and_split_no_character(pipeline, x2t):
    for ids in x2t["f32"].meta["generated_ids"]:
        pieces = []
        stream = TextStream(pipeline.tokenizer, pieces.append)
        for token in ids:
            stream.add(token)
        whole = pipeline.tokenizer.decode(ids).removesuffix("<|im_end|>")
        assert whole.startswith("".join(pieces)) or "\ufffd" in whole
    pieces.clear()
    for token in pipeline.tokenizer.encode("ein Käse für 5 € und 日本"):
        stream.add(token)
    assert "".join(pieces) == "ein Käse für 5 € und 日本"
    assert not any("\ufffd" in piece for piece in pieces) and len(pieces) > 5


class Decay:
    """A denoiser whose exact solution is known: dx/dt = 4 x, so that x(0) = x(1) exp(-4)."""

    grid = (1, 1, 1)

    def __init__(self, sampling):
        self.sampling = sampling

    def velocity(self, x, t):
        return 4 * x


def error(solver, steps):
    sampling = Sampling(num_timesteps=steps, timestep_shift=2.0, solver=solver)
    ours = generation.sample(Decay(sampling), torch.ones(1, 48, dtype=torch.float64))
    return abs(ours.flatten()[0].item() - torch.tensor(-4.0, dtype=torch.float64).exp().item())


def test_adams_bashforth_is_of_second_order_and_euler_of_first():
    """Twice the steps: a quarter of the error, and half of it, although guidance switches once on the way."""
    assert 1.8 < error("euler", 100) / error("euler", 200) < 2.2
    assert 3.4 < error("ab2", 100) / error("ab2", 200) < 4.6
    assert error("ab2", 40) < error("euler", 40) / 4


def test_adams_bashforth_begins_with_euler_and_restarts_where_guidance_is_switched():
    assert error("ab2", 1) == error("euler", 1)
    switched = {step: Sampling(cfg_low=0.4).guided(t) for step, t in enumerate((0.9, 0.5, 0.3))}
    assert switched == {0: True, 1: True, 2: False}
    times = torch.tensor([0.9, 0.5, 0.3, 0.0])
    steps = [generation.Step(k, times[k].item(), torch.zeros(1, 48), torch.full((1, 48), float(k))) for k in range(3)]
    sampling = Sampling(solver="ab2")
    assert generation._slope(2, steps[1:], times, sampling)[0, 0] == 2
    # 0.2 / (2 * 0.4) of the way from 0 to 1, beyond 1
    assert generation._slope(1, steps[:2], times, sampling)[0, 0] == pytest.approx(1.25)


class Counted(Decay):
    """A denoiser whose velocity is `slope` (t - 1) + 1, whatever x is, and that counts its calls."""

    def __init__(self, sampling, slope=0.0):
        super().__init__(sampling)
        self.slope, self.calls = slope, []

    def velocity(self, x, t):
        self.calls.append(t)
        return torch.full_like(x, self.slope * (t - 1) + 1)


def test_every_step_is_computed_unless_velocities_may_serve_longer():
    assert generation.computed_steps(Sampling()) == frozenset(range(30))
    assert len(generation.computed_steps(Sampling(reuse=1e-9))) == 30


@pytest.mark.parametrize("sampling", [Sampling(reuse=0.12), Sampling(reuse=1.0), Sampling(reuse=1.0, solver="ab2"),
                                      Sampling(reuse=0.2, num_timesteps=12, timestep_shift=1.0)])
def test_the_first_and_last_three_steps_and_the_one_behind_a_switch_of_guidance_are_computed(sampling):
    computed, times = generation.computed_steps(sampling), generation.timesteps(sampling).tolist()
    last = sampling.num_timesteps - 1
    switch = next(number for number, t in enumerate(times) if not sampling.guided(t))
    assert {0, 1, 2, switch, last - 2, last - 1, last} <= computed
    assert len(computed) < sampling.num_timesteps
    denoiser = Counted(sampling)
    steps = []
    generation.sample(denoiser, torch.ones(1, 48), steps.append)
    assert [step.number for step in steps if step.computed] == sorted(computed)
    assert len(steps) == sampling.num_timesteps and denoiser.calls == [times[number] for number in sorted(computed)]


def test_no_velocity_serves_longer_than_it_may():
    times = generation.timesteps(Sampling()).tolist()
    for span in (0.05, 0.12, 0.3):
        computed = sorted(generation.computed_steps(Sampling(reuse=span)))
        for number, later in zip(computed, [*computed[1:], 30], strict=True):
            assert later == number + 1 or times[number] - times[later] <= span


@pytest.mark.parametrize("slope", [0.0, 2.0])
@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_a_velocity_that_is_a_line_in_t_is_used_again_without_error(solver, slope):
    """float64, some 1e-16 a step; no guidance, which a line would have to stop at."""
    every, some = (Counted(Sampling(solver=solver, reuse=reuse, cfg_scale=1.0), slope) for reuse in (0.0, 0.2))
    noise = torch.ones(1, 48, dtype=torch.float64)
    torch.testing.assert_close(generation.sample(some, noise), generation.sample(every, noise), rtol=1e-6, atol=1e-6)
    assert len(some.calls) < 16 and len(every.calls) == 30


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 7])
def test_few_steps_leave_nothing_to_save_up_to_six(steps):
    count = len(generation.computed_steps(Sampling(num_timesteps=steps, reuse=1.0, cfg_scale=1.0)))
    assert count == min(steps, 6)


@pytest.mark.parametrize("task", ["t2i", "t2v", "i2v", "image_edit", "video_edit"])
def test_every_generation_task_uses_velocities_again(pipeline, recorded, task):
    """Guided steps only, so that a picture of 8 steps computes 7. The eighth moves x by an eighth of a velocity about
    as long as x: leaving it out would err by 0.12, the line through the velocities before it by a tenth of that."""
    sampling = Sampling(num_timesteps=8, timestep_shift=1.0, cfg_low=0.0)
    settings = Settings(task, "image_112res" if task == "image_edit" else "video_192p", 48, 64, 5, sampling=sampling)
    sample = recorded(task).sample
    official = next(draw_all(pipeline, [sample], settings, keep_trace=True))
    reused = next(draw_all(pipeline, [sample], replace(settings, sampling=replace(sampling, reuse=0.25)), True))
    assert len(official.steps) == 8 and [step.number for step in reused.steps] == [0, 1, 2, 4, 5, 6, 7]
    assert 0 < relative(reused.latent, official.latent) < 0.0125


def test_reuse_stands_in_run_json_only_where_it_is_on():
    assert "reuse" not in Settings("t2i").as_json()
    assert Settings("t2i", sampling=Sampling(reuse=0.12)).as_json()["reuse"] == 0.12


@pytest.mark.parametrize("renorm", ["global", "channel", "none"])
def test_guidance_is_scaled_back_as_asked(pipeline, prompts, renorm):
    sampling = Sampling(cfg_renorm=renorm)
    request = pipeline.denoiser(prompts[0].text, *SIZE, sampling)
    x = request.noise(1)
    plain = pipeline.denoiser(prompts[0].text, *SIZE, Sampling(cfg_scale=1.0)).velocity(x, 1.0)
    guided = request.velocity(x, 1.0)
    lengths = guided.norm(dim=1) / plain.norm(dim=1)
    if renorm == "none":
        assert guided.norm() > plain.norm()
    else:
        assert guided.norm() <= plain.norm() * (1 + 1e-6)
        assert (lengths.max() <= 1 + 1e-6) == (renorm == "channel")


def test_the_guidance_interval_decides_which_steps_are_guided(pipeline, prompts):
    narrow = pipeline.denoiser(prompts[0].text, *SIZE, Sampling(cfg_low=0.6, cfg_high=0.8))
    plain = pipeline.denoiser(prompts[0].text, *SIZE, Sampling(cfg_scale=1.0))
    x = plain.noise(1)
    assert torch.equal(narrow.velocity(x, 0.9), plain.velocity(x, 0.9))
    assert torch.equal(narrow.velocity(x, 0.6), plain.velocity(x, 0.6))
    assert relative(narrow.velocity(x, 0.7), plain.velocity(x, 0.7)) > 1e-2


X2T = ["--task", "x2t_image", "--model_path", str(GOLDENS / "checkpoint/Lance_3B"), "--example_json",
       str(GOLDENS / "inputs/x2t_image.json")]


@pytest.mark.parametrize("flags, message", [
    (["--temperature", "-1"], "temperature -1.0 must be at least 0"),
    (["--top_p", "0"], "top_p 0.0 must be above 0 and at most 1"),
    (["--top_p", "1.5"], "top_p 1.5 must be at least 0 and at most 1"),
    (["--reuse", "-0.1"], "reuse -0.1 must be at least 0 and at most 1"),
    (["--reuse", "nan"], "reuse nan must be at least 0 and at most 1"),
    (["--reuse", "2"], "reuse 2.0 must be at least 0 and at most 1"),
    (["--cfg_interval", "0.9", "0.4"], "cfg_interval 0.9 0.4 must be two numbers from 0 to 1"),
])
def test_impossible_values_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        task_arguments.settings_of(run_baseline.parse_args([*X2T, "--save_path_gen", "none", *flags]))


def test_settings_say_what_was_drawn_and_how():
    def settings(*flags):
        return task_arguments.settings_of(run_baseline.parse_args([*X2T, "--save_path_gen", "none", *flags])).as_json()

    assert settings()["temperature"] == 0 and "seed" not in settings("--seed", "7")
    drawn = settings("--temperature", "0.7", "--top_p", "0.9", "--seed", "7")
    assert (drawn["temperature"], drawn["top_p"], drawn["seed"]) == (0.7, 0.9, 7)


def test_streaming_shows_questions_and_answers_on_stderr(tmp_path, capsys):
    run_baseline.main([*X2T, "--resolution", "image_256res", "--limit", "2", "--max_new_tokens", "12", "--stream",
                       "--save_path_gen", str(tmp_path / "r")])
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "r")
    for row in json.loads((tmp_path / "r/result.json").read_text()):
        assert f"[{row['key']}] {row['question']}\n" in err
        assert row["answer"].rstrip("\ufffd") in err


def test_the_solver_benchmark_prints_a_table_and_a_result(capsys):
    solvers.main(["--steps", "1", "2", "--reference", "2", "--limit", "1", "--device", "cpu"])
    *_, row, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)["relative_error"]
    assert row.split()[0] == "2" and found["euler"][1] == 0  # the reference itself
    assert found["euler"][0] == found["ab2"][0] > 0


def test_the_reuse_benchmark_counts_passes_and_prints_a_table_and_a_result(capsys, monkeypatch):
    monkeypatch.setattr(reuse, "SAMPLERS", {name: reuse.SAMPLERS[name] for name in ("Euler 30, official",
                                                                                    "Euler 30, reuse 0.12")})
    reuse.main(["--captions", "1", "--reference", "8"])
    *_, result = capsys.readouterr().out.strip().splitlines()
    official, saved = json.loads(result)["samplers"].values()
    assert (official["passes"], saved["passes"]) == (56, 20)  # 26 guided steps of 30, twice each
    assert official["official"] == 0 < saved["official"] < official["exact"]
    with pytest.raises(InputError, match="--captions 0: at least one is needed"):
        reuse.main(["--captions", "0"])
