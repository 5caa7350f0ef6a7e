import json

import pytest
from made_up_requests import REQUESTS, SRC, answer, draw

import awq_apply
from lance_quant.calibration import capture
from lance_quant.errors import InputError
from lance_quant.storage.tensor_file import Checkpoint


def test_tokens_decoded_one_by_one_are_one_causal_call(pipeline):
    with capture.CallRecorder(pipeline.model) as recorder:
        answer(pipeline.model, tokens=6)
    assert [(call.causal, call.length, call.lengths) for call in recorder.calls] == \
        [(True, 4, (0,)), (False, 8, (4,)), (True, 10, (12,))]


def test_rows_that_read_the_same_are_stored_once(captured):
    with Checkpoint(captured / "t2i.safetensors") as file:
        facts = json.loads(file.read("capture").numpy().tobytes())
        steps = [index for index, call in enumerate(facts["calls"]) if not call["causal"]]
        assert len(steps) == 4 * REQUESTS
        assert all(file.specs[f"call.{index}.gen"].shape == (1, 24, 64) for index in steps)


def test_samples_that_are_left_follow_no_period_of_the_sample_file():
    """Of 4096 samples in turns of 2 to 12 kinds, about as many of each kind; fewer are always some of the same; the
    first is left last."""
    for stride in (2, 4, 8):
        left = [sample for sample in range(4096) if capture._is_left(sample, stride)]
        assert len(left) == pytest.approx(4096 / stride, abs=2)
        for kinds in range(2, 13):
            counts = [sum(sample % kinds == kind for sample in left) for kind in range(kinds)]
            assert max(counts) <= 1.1 * min(counts) + 4, (stride, kinds, counts)
        assert set(left) >= {sample for sample in range(4096) if capture._is_left(sample, 2 * stride)}
    for last in range(300):
        stride = 1
        while stride <= capture._most_stride(last):
            stride *= 2
        assert [sample for sample in range(last + 1) if capture._is_left(sample, stride)] == [0]


@pytest.mark.parametrize("limit", [800, 250, 70])
def test_subsampling_keeps_what_later_calls_read_and_spreads_evenly(pipeline, limit):
    with capture.CallRecorder(pipeline.model, limit) as recorder:
        for seed in range(4):
            recorder.begin(seed)
            draw(pipeline.model, seed, steps=10)
    calls = recorder.calls
    assert sum(call.tokens for call in calls) <= max(limit, 90)
    for index, call in enumerate(calls):
        before = calls[:index]
        for row, length in zip(call.rows, call.lengths, strict=True):
            past = sum(other.length for other in before if row in other.rows and other.causal)
            assert past == length, "a call lost its past"
    if limit == 800:
        assert len({call.rows for call in calls if not call.causal}) == 4, "every request has some steps left"


def test_mistakes_are_named(captured, tmp_path):
    with pytest.raises(InputError, match="captured from another model"):
        capture.load(captured / "t2i.safetensors", "0" * 64)
    with pytest.raises(InputError, match="is not a capture"):
        capture.load(SRC / "model.safetensors", "")
    with pytest.raises(InputError, match="no place in the published recipe"):
        awq_apply.main(["--src", str(SRC), "--stats", str(captured / "t2i.pt"), "--out", str(tmp_path / "out"),
                        "--recipe", "published", "--capture", str(captured / "t2i.safetensors")])
    with pytest.raises(InputError, match="exists already"), \
            capture.recording(None, captured / "t2i.safetensors", "t2i", ""):
        pass


def test_nothing_is_recorded_without_a_path_and_nothing_run_is_a_mistake(pipeline, tmp_path):
    with capture.recording(pipeline.model, None, "t2i", ""):
        draw(pipeline.model, steps=1)
    with pytest.raises(InputError, match="nothing to capture"), \
            capture.recording(pipeline.model, tmp_path / "x", "t2i", ""):
        pass
    assert not list(tmp_path.iterdir())
