"""Clips in and out: the official choice of frames, errors that name the file, and what is written reads back."""

import av
import numpy as np
import pytest
from conftest import GOLDENS
from PIL import Image

from lance_quant.errors import InputError
from lance_quant.lance.media.video import frame_indices, read_video, write_video

CLIPS = {"ball_yuv420.mp4": [0, 2, 4, 7, 9, 11, 14, 16, 19], "box_rgb_lossless.mp4": [0, 3, 6, 9, 13]}


@pytest.mark.parametrize("total, fps, count", [
    (24, 24, 9),  # 12 frames of one second lose three
    (48, 24, 21),
    (144, 24, 69),
    (10_000, 30, 69),  # no more than six seconds
    (30, 24, 13),  # 15 frames go down to 13
    (4, 24, 1),
    (2, 24, 1),
    (6, 4, 17),  # 1.5 seconds are 18 frames, less one: frames of a slow source repeat
])
def test_count_of_frames_follows_the_official_rule(total, fps, count):
    indices = frame_indices(total, fps)
    assert len(indices) == count and count % 4 == 1
    assert indices[0] == 0 and indices[-1] == (total - 1 if count > 1 else 0)
    assert indices == sorted(indices)


def test_rates_are_rounded_to_whole_frames_per_second():
    assert frame_indices(240, 23.976) == frame_indices(240, 24)


@pytest.mark.parametrize("total, fps", [(1, 24), (1, 60), (0, 24), (0, 0.4)])
def test_clips_that_are_too_short_are_refused(total, fps):
    with pytest.raises(InputError, match="too few"):
        frame_indices(total, fps)


@pytest.mark.parametrize("name", CLIPS)
def test_the_frames_chosen_are_the_recorded_ones(name):
    path = GOLDENS / "inputs" / name
    every = read_video(path, every=True)
    chosen = read_video(path)
    assert [np.array(frame).tolist() for frame in chosen] == [np.array(every[index]).tolist() for index in CLIPS[name]]


def clip(frames=13, size=(64, 48)):
    """A square that moves to the right by four pixels a frame."""
    made = []
    for index in range(frames):
        frame = Image.new("RGB", size, (30, 60, 120))
        frame.paste((220, 200, 40), (4 * index, 8, 4 * index + 16, 24))
        made.append(frame)
    return made


def test_a_written_clip_reads_back_frame_for_frame(tmp_path):
    """Lossy where colours meet, which are kept at half the resolution: 11 squared levels here (38 dB), allow 20."""
    write_video(tmp_path / "clip.mp4", clip())
    back = read_video(tmp_path / "clip.mp4", every=True)
    assert len(back) == 13 and back[0].size == (64, 48)
    for ours, theirs in zip(back, clip(), strict=True):
        assert np.square(np.array(ours, dtype=float) - np.array(theirs)).mean() < 20


def test_a_written_clip_is_h264_at_12_frames_a_second_for_any_player(tmp_path):
    write_video(tmp_path / "clip.mp4", clip(5))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        (stream,) = container.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 12 and stream.frames == 5
        assert "mp4" in container.format.name


def test_a_clip_of_one_frame_can_be_written(tmp_path):
    write_video(tmp_path / "clip.mp4", clip(1))
    assert len(read_video(tmp_path / "clip.mp4", every=True)) == 1


def test_odd_sides_are_our_own_mistake(tmp_path):
    with pytest.raises(AssertionError, match="even sides"):
        write_video(tmp_path / "clip.mp4", clip(1, (63, 48)))


@pytest.mark.parametrize("content", [b"", b"not a video", b"\0" * 100])
def test_broken_video_is_named(tmp_path, content):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read the video .*broken\.mp4"):
        read_video(path)


def test_truncated_video_is_named(tmp_path):
    path = tmp_path / "broken.mp4"
    path.write_bytes((GOLDENS / "inputs" / "ball_yuv420.mp4").read_bytes()[:-1500])
    with pytest.raises(InputError, match=r"broken\.mp4"):
        read_video(path)


def test_missing_video_is_named(tmp_path):
    with pytest.raises(InputError, match=r"video not found: .*no\.mp4"):
        read_video(tmp_path / "no.mp4")


def test_a_sound_file_and_a_picture_are_no_clips(tmp_path):
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
    with pytest.raises(InputError, match=r"sound\.wav: it has no video stream"):
        read_video(tmp_path / "sound.wav")
    with pytest.raises(InputError, match=r"hills_16x9\.png: 1 frames at 25 per second are too few"):
        read_video(GOLDENS / "inputs" / "hills_16x9.png")
