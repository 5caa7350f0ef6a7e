import pytest
import torch
from made_up_requests import REQUESTS, answer, draw

from lance_quant.calibration import capture
from lance_quant.calibration.decoder_calls import (
    DecoderCall,
    batched,
    requests,
    thinned,
    with_outputs,
    with_what_they_read,
)


def call(rows, length, tokens=2, gen=False, decoded=0):
    """Its hidden states are the number of its first row."""
    streams = {"und": torch.full((len(rows), tokens, 1), float(rows[0]))}
    if gen:
        streams["gen"] = torch.full((len(rows), 4, 1), float(rows[0]))
    return DecoderCall(rows, (length,) * len(rows), not gen, streams, (torch.zeros(len(rows), 1, 1, 1),) * 2, decoded)


def answered(row, prompt=2):
    return [call((row,), 0, prompt), call((row,), prompt, 1, decoded=1)]


def drawn(first, steps):
    """Two prompts, each in a row of its own, and steps on both."""
    return [call((first,), 0), call((first + 1,), 0), *(call((first, first + 1), 2, 1, gen=True) for _ in range(steps))]


def test_rows_that_meet_later_are_one_request():
    one, other = drawn(0, 2), answered(7)
    mixed = [one[0], other[0], *one[1:], other[1]]
    assert [[id(part) for part in request] for request in requests(mixed)] == \
        [[id(part) for part in request] for request in (one, other)]
    assert requests([]) == [] == batched([], 100)


def test_requests_of_the_same_shape_run_side_by_side_and_steps_together():
    found = batched([*answered(0), *answered(1), *drawn(10, 3), *answered(2, prompt=3), *drawn(20, 3)], 1000)
    assert [part.rows for part in found] == [(0, 1), (0, 1), (10, 20, 11, 21), (10, 11, 20, 21) * 3, (2,), (2,)]
    assert found[0].streams["und"].flatten().tolist() == [0, 0, 1, 1] and found[1].decoded == 1


@pytest.mark.parametrize("most, calls", [(1, 8), (6, 4), (9, 4), (12, 2)])
def test_no_more_run_side_by_side_than_the_limit_allows(most, calls):
    """Four answers of three tokens each: alone, in twos, in threes and one, all at once."""
    found = batched([part for row in range(4) for part in answered(row)], most)
    assert len(found) == calls
    assert sorted(row for part in found if part.decoded for row in part.rows) == [0, 1, 2, 3]


def test_steps_do_not_pass_a_call_that_moves_their_row_on():
    step = call((0,), 2, 1, gen=True)
    moved = [call((0,), 0), step, call((0,), 2, 1), call((0,), 3, 1, gen=True), call((0,), 3, 1, gen=True)]
    assert [(part.rows, part.lengths) for part in batched(moved, 100)] == \
        [((0,), (0,)), ((0,), (2,)), ((0,), (2,)), ((0, 0), (3, 3))]


def test_outputs_are_unread_latents_and_tokens_that_an_answer_is_read_off():
    calls = [*drawn(0, 2), *answered(5), call((6,), 0)]  # the last: a prompt that nothing came of
    assert with_outputs(calls) == {2: "gen", 3: "gen", 5: "und"}
    assert with_what_they_read(calls, [3]) == [0, 1, 3] and with_what_they_read(calls, [5]) == [4, 5]
    assert with_what_they_read(calls, []) == []


def test_every_recorded_request_has_outputs(pipeline):
    with capture.CallRecorder(pipeline.model) as recorder:
        for seed in range(REQUESTS):
            recorder.begin(seed)
            draw(pipeline.model, seed, steps=3)
        recorder.begin(REQUESTS)
        answer(pipeline.model, tokens=5)
        recorder.begin(REQUESTS + 1)
        answer(pipeline.model, tokens=1)
    outputs = with_outputs(recorder.calls)
    assert list(outputs.values()) == ["gen"] * 3 * REQUESTS + ["und"] * 2
    assert [recorder.calls[place].decoded for place, expert in outputs.items() if expert == "und"] == [5, 1]


def places(calls, most):
    """Of what thinning leaves."""
    return [index for part in thinned(calls, most) for index, own in enumerate(calls) if own is part]


def test_thinned_calls_are_spread_evenly_with_what_they_read():
    """Steps have 10 tokens on two rows, the two prompts 4; answers 1 with a prompt of 2."""
    calls = [*drawn(0, 8), *answered(5), *answered(6), call((9,), 0)]
    assert places(calls, 24) == [0, 1, 2, 6, 10, 11, 12, 13], "two of eight steps, both answers, no idle prompt"
    assert places(calls, 10**6) == list(range(14))


@pytest.mark.parametrize("most", [0, 1, 5])
def test_one_call_of_each_kind_stays_however_few_tokens_are_wanted(most):
    calls = [*drawn(0, 8), *answered(5), *answered(6)]
    assert places(calls, most) == [0, 1, 2, 10, 11]


def test_calls_that_nothing_comes_out_of_stay_all():
    calls = [call((0,), 0), call((1,), 0)]
    assert places(calls, 1) == [0, 1] and thinned([], 1) == []
