"""How long a calibration will take: by its first steps, guidance and reading included, said once, where it is long."""

import logging

import pytest
from conftest import GOLDENS

import awq_calibrate_single
from lance_quant.inference import estimate
from lance_quant.inference.estimate import Estimate, costs_of, duration
from lance_quant.lance.settings import Sampling, Settings


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run(settings, samples, reading, rate):
    """The estimate of a run whose request takes `reading` seconds to read and a pass `rate`; and what it took."""
    clock, costs, said, total = Clock(), costs_of(settings), None, 0.0
    watched = Estimate(settings, samples, costs, clock)
    for _ in range(samples):
        watched.begin()
        clock.now += reading
        for cost in costs:
            clock.now += rate * cost
            watched.step()
            said = watched.seconds() if watched._said and said is None else said
        total += reading + rate * sum(costs)
    return said, total


@pytest.mark.parametrize("settings", [
    Settings("t2i", sampling=Sampling(num_timesteps=10)), Settings("t2i", sampling=Sampling(cfg_scale=1)),
    Settings("t2i", sampling=Sampling(num_timesteps=30, reuse=0.1)),
    Settings("t2i", sampling=Sampling(num_timesteps=2)), Settings("t2i", sampling=Sampling(num_timesteps=1)),
    Settings("x2t_image", max_new_tokens=20)])
def test_the_first_steps_tell_of_all(settings):
    said, total = run(settings, 7, 0.0 if settings.sampling.num_timesteps == 1 else 3.0, 2.0)
    assert said == pytest.approx(total)


def test_guided_steps_are_two_passes_and_reused_ones_none():
    costs = costs_of(Settings("t2i", sampling=Sampling(num_timesteps=30)))
    assert len(costs) == 30 and costs[0] == 2 and costs[-1] == 1
    assert len(costs_of(Settings("t2i", sampling=Sampling(num_timesteps=30, reuse=0.1)))) < 15
    assert set(costs_of(Settings("t2i", sampling=Sampling(cfg_scale=1)))) == {1}


def test_only_what_is_long_is_said_and_once(caplog):
    caplog.set_level(logging.INFO, logger="lance_quant")
    run(Settings("t2i"), 2, 0.1, 0.01)
    assert caplog.text == ""
    run(Settings("t2i"), 68, 5.0, 20.0)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("t2i: ") and " h " in said
    assert "for 68 samples of 30 steps, by the first 3; --limit" in said
    caplog.clear()
    run(Settings("x2t_image"), 10, 5.0, 1.0)
    assert "x2t_image: at most 44 min for 10 samples of at most 256 tokens" in caplog.text


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (45, "45 s"), (600, "10 min"), (12_000, "3 h 20 min")])
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("task, flags", [
    ("t2i", ["--video_height", "48", "--video_width", "64", "--num_timesteps", "4"]),
    ("x2t_image", ["--resolution", "image_112res", "--max_new_tokens", "5"])])
def test_a_calibration_says_it(tmp_path, monkeypatch, caplog, task, flags):
    monkeypatch.setattr(estimate, "_LONG", 0.0)
    caplog.set_level(logging.INFO, logger="lance_quant")
    awq_calibrate_single.main(["--task", task, "--model_path", str(GOLDENS / "checkpoint/Lance_3B"), "--example_json",
                               str(GOLDENS / f"inputs/{task}.json"), "--device", "cpu", "--out",
                               str(tmp_path / "s.pt"), *flags])
    said = [record.getMessage() for record in caplog.records if "--limit takes fewer samples" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith(f"{task}: ")
