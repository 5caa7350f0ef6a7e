"""Pictures and clips as phones and tools make them: what the model is shown of each, and one line for what is none."""

import io
import struct
import weakref
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import GOLDENS
from PIL import Image, ImageCms

from lance_quant.errors import InputError
from lance_quant.lance.media import video, vision
from lance_quant.lance.media.inputs import picture_of
from lance_quant.lance.media.video import read_video, write_video
from lance_quant.lance.media.vision import open_image

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def saved(path, image, **options):
    image.save(path, **options)
    return open_image(path)


def disc(mode="L"):
    """A black picture whose corner is transparent and whose centre is not."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[2:6, 2:6] = 255
    grey = Image.merge("LA", [Image.new("L", (8, 8)), Image.fromarray(alpha)])
    return grey.convert(mode)


# Modes


@pytest.mark.parametrize(
    ("mode", "name", "options"),
    [
        ("LA", "a.png", {}),
        ("RGBA", "a.png", {}),
        ("RGBA", "a.webp", {"lossless": True}),
        ("LA", "a.tif", {}),
        ("RGBA", "a.tif", {}),
        ("RGBA", "a.tga", {}),
        ("RGBA", "a.ico", {"sizes": [(8, 8)]}),
        ("PA", "a.png", {}),
        ("RGBA", "a.gif", {}),
        ("RGBA", "a.jp2", {}),
    ],
)
def test_transparency_lies_over_white_in_every_mode_and_format(tmp_path, mode, name, options):
    image = disc("RGBA").quantize(4).convert("PA") if mode == "PA" else disc(mode)
    if mode == "PA":
        image = image.convert("LA")
    shown = saved(tmp_path / name, image, **options)
    assert shown.mode == "RGB" and shown.getpixel((0, 0)) == WHITE and max(shown.getpixel((4, 4))) < 8


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "LA"])
def test_pictures_in_memory_of_every_mode_with_opacity_lie_over_white(mode):
    image = disc("LA").convert("RGBA") if mode in ("RGBa", "PA") else disc("LA")
    image = image.convert(mode) if mode != "PA" else image.quantize(4).convert("PA")
    shown = picture_of(image)
    assert shown.getpixel((0, 0)) == WHITE and shown.getpixel((4, 4)) == BLACK


@pytest.mark.parametrize(("mode", "clear"), [("L", 0), ("RGB", (0, 0, 0)), ("1", 0), ("I;16", 0)])
def test_one_transparent_colour_becomes_white(tmp_path, mode, clear):
    image = Image.new("L", (8, 8))
    image.paste(128 if mode != "1" else 255, (2, 2, 6, 6))
    image = Image.fromarray(np.array(image).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    shown = saved(tmp_path / "a.png", image, transparency=clear)
    assert shown.getpixel((0, 0)) == WHITE
    assert shown.getpixel((4, 4)) == (WHITE if mode == "1" else (128, 128, 128))


@pytest.mark.parametrize(
    ("name", "values", "shown"),
    [
        ("a.png", np.array([[0, 32896, 65535]], np.uint16), [0, 128, 255]),  # of these kinds, PNG holds this one alone
        ("a.png", np.array([[0, 1, 257]], np.uint16), [0, 0, 1]),
        ("a.tif", np.array([[0, 32896, 65535]], np.uint16), [0, 128, 255]),
        ("a.tif", np.array([[0, 1, 257]], np.uint16), [0, 0, 1]),
        ("a.tif", np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        ("a.tif", np.array([[0.0, 128.0, 255.0]], np.float32), [0, 128, 255]),
        ("a.tif", np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
        ("a.tif", np.array([[0, 32896, 65535]], np.int32), [0, 128, 255]),
        ("a.tif", np.zeros((1, 3), np.float32), [0, 0, 0]),
    ],
)
def test_16_bits_and_floats_keep_their_levels(tmp_path, name, values, shown):
    found = saved(tmp_path / name, Image.fromarray(values))
    assert [found.getpixel((x, 0)) for x in range(3)] == [(level,) * 3 for level in shown]


@pytest.mark.parametrize("values", [[0.0, 256.0], [-0.5, 1.0], [np.nan, 1.0], [np.inf, 1.0], [0.0, 1e30]])
def test_floats_that_are_no_levels_are_refused(tmp_path, values):
    with pytest.raises(InputError, match="must be in 0..1 or 0..255"):
        saved(tmp_path / "a.tif", Image.fromarray(np.array([values], np.float32)))


@pytest.mark.parametrize("values", [[0, 65536], [-1, 5]])
def test_whole_numbers_beyond_16_bits_are_refused(tmp_path, values):
    with pytest.raises(InputError, match="must be in 0..255 or 0..65535"):
        saved(tmp_path / "a.tif", Image.fromarray(np.array([values], np.int32)))


@pytest.mark.parametrize(
    "rgb", [(255, 255, 255), (0, 0, 0), (200, 30, 30), (20, 120, 60), (40, 60, 200), (128, 128, 128)]
)
def test_lab_and_cmyk_show_the_colours_that_they_mean(tmp_path, rgb):
    """A step of Lab in 8 bits moves the least channel of a saturated colour by up to 8 levels, since the curve of sRGB
    is steep there, and grey by 1; CMYK without a profile is exact."""
    image = Image.new("RGB", (4, 4), rgb)
    lab = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert np.abs(np.subtract(saved(tmp_path / "lab.tif", lab).getpixel((0, 0)), rgb)).max() <= 8
    assert saved(tmp_path / "cmyk.tif", image.convert("CMYK")).getpixel((0, 0)) == rgb
    assert (
        np.abs(
            np.subtract(saved(tmp_path / "cmyk.jpg", image.convert("CMYK"), quality=100).getpixel((0, 0)), rgb)
        ).max()
        <= 2
    )


def test_moving_pictures_show_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        options = {"lossless": True} if name.endswith("webp") else {}
        shown = saved(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], **options)
        assert shown.getpixel((0, 0)) == (255, 0, 0), name


# What is no picture

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n"
PNG = io.BytesIO()
Image.new("RGB", (64, 64), "red").save(PNG, "PNG")
JPEG = io.BytesIO()
Image.effect_noise((64, 64), 80).convert("RGB").save(JPEG, "JPEG")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"\0" * 4096,
        EPS,
        EPS.replace(b"99 99", b"99999 99999"),
        b"GIF89a",
        b"II*\0\x08\0\0\0",
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 64,
        PNG.getvalue()[:60],
        PNG.getvalue().replace(b"IHDR\0\0\0\x40", b"IHDR\0\0\0\0"),
        JPEG.getvalue()[:200],
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"PK\x03\x04",
        b"8BPS\0\x01",
        b"P6\n99999999999999999999 1\n255\n",
        b"qoif" + b"\xff" * 10,
        b"BM" + b"\xff" * 60,
        b"#define x_width 9",
    ],
)
def test_what_is_no_picture_is_named_in_one_line(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png") as error:
        open_image(tmp_path / "a.png")
    assert "\n" not in str(error.value)


def test_a_picture_beyond_the_limit_is_refused_before_it_is_decoded(tmp_path):
    header = struct.pack(">IIBBBBB", 19000, 9500, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    (tmp_path / "p.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + b"\0\0\0\0IDAT"
        + b"\0" * 4
    )
    with pytest.raises(InputError, match="more than 178 million pixels: make it smaller"):
        open_image(tmp_path / "p.png")


def test_a_damaged_exif_is_no_traceback(tmp_path):
    image = Image.new("RGB", (8, 4))
    for index, exif in enumerate([b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]):
        image.save(tmp_path / f"{index}.jpg", exif=exif)
        try:
            assert open_image(tmp_path / f"{index}.jpg", exif=True).size == (8, 4)
        except InputError as error:
            assert "\n" not in str(error)


NAMES = [
    "a b.png",
    "12:30:45.png",
    "ä.png",
    "日本.png",
    "e\u0301.png",
    "a'b.png",
    'a"b.png',
    "%s.png",
    "-x.png",
    "a?b#c.png",
    "[1].png",
    "file:a.png",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_any_kind_are_opened_as_the_files_they_are(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    assert open_image(Path(name)).getpixel((0, 0)) == (255, 0, 0)
    clip = Path(name).with_suffix(".mp4")
    write_video(clip, [Image.new("RGB", (16, 16), "red")] * 5)
    assert len(read_video(clip)) == 5 and len(read_video(tmp_path / clip)) == 5


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 2000, "x\0.png", ""])
def test_names_that_no_file_can_have_are_not_found(name):
    for read in (open_image, read_video):
        with pytest.raises(InputError, match="not found"):
            read(Path(name))


# Clips

MARK = 24  # rows of white at the top of a clip that is black below


def marked(count=12, size=(64, 48)):
    """Frames with a white bar at the top, and a white corner that grows to the right."""
    frames = []
    for index in range(count):
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        pixels[:8] = 255
        pixels[:, : 8 + index // 4] = 128
        frames.append(Image.fromarray(pixels))
    return frames


def with_matrix(path, matrix):
    """The display matrix of an mp4's video track, set in its tkhd box."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(
        ">9i", *(value if index % 3 == 2 else value << 16 for index, value in enumerate(matrix))
    )
    path.write_bytes(data)


def unit(a, b, c, d):
    return [a, b, 0, c, d, 0, 0, 0, 1 << 30]


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        (unit(1, 0, 0, 1), lambda x: x),
        (unit(0, 1, -1, 0), lambda x: np.rot90(x, -1)),  # a phone held upright
        (unit(0, -1, 1, 0), lambda x: np.rot90(x, 1)),
        (unit(-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
        (unit(-1, 0, 0, 1), lambda x: x[:, ::-1]),  # a mirror
        (unit(1, 0, 0, -1), lambda x: x[::-1]),
        (unit(0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
        (unit(0, -1, -1, 0), lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
        (unit(1, 1, -1, 1), lambda x: x),
    ],
)  # no right angle
def test_clips_are_seen_upright_as_their_display_matrix_says(tmp_path, matrix, turned):
    path = tmp_path / "phone.mp4"
    write_video(path, marked())
    flat = [np.asarray(frame) for frame in read_video(path)]
    with_matrix(path, matrix)
    assert all(
        np.array_equal(np.asarray(frame), turned(before)) for frame, before in zip(read_video(path), flat, strict=True)
    )


def encoded(path, frames, rate=12, times=None, codec="libx264", **options):
    with (
        open(path, "w+b") as file,
        av.open(file, "w", format=options.pop("format", "mp4"), options=options) as container,
    ):
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_image(image)
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_clip_below_one_frame_a_second_is_seen(tmp_path):
    """24 frames in 60 seconds: the first 6 seconds of 12 a second, 69 frames, spread over the 24."""
    clip = read_video(encoded(tmp_path / "slow.mp4", marked(24), rate=Fraction(2, 5)))
    assert len(clip) == 69 and clip[0].size == (64, 48)


def test_frames_of_a_variable_rate_are_chosen_by_number(tmp_path):
    even = read_video(encoded(tmp_path / "even.mp4", marked(12)))
    times = [index * (1 if index < 6 else 2) for index in range(12)]
    uneven = read_video(encoded(tmp_path / "uneven.mp4", marked(12), times=times))
    assert len(uneven) >= len(even) and all(frame.size == (64, 48) for frame in uneven)


def test_frames_that_an_edit_list_leaves_out_are_not_missing(tmp_path):
    """The edit starts half a second in: ffmpeg shows 18 of 24 frames, and the rest is no damage."""
    path = encoded(tmp_path / "trimmed.mp4", marked(24))
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 4
    _, count, duration, start = struct.unpack(">IIIi", data[at : at + 16])
    assert count == 1
    scale = struct.unpack(">I", data[data.index(b"mdhd") + 16 : data.index(b"mdhd") + 20])[0]
    data[at + 8 : at + 16] = struct.pack(">Ii", duration * 3 // 4, start + scale // 2)
    path.write_bytes(data)
    assert len(read_video(path, every=True)) == 18


def test_a_clip_whose_size_changes_keeps_its_first_size(tmp_path):
    """Two MPEG transport streams, one behind the other, as broadcasters send them."""
    parts = [
        encoded(tmp_path / f"{index}.ts", marked(12, size), format="mpegts").read_bytes()
        for index, size in enumerate([(64, 48), (96, 64)])
    ]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    clip = read_video(tmp_path / "both.ts", every=True)
    assert len(clip) == 24 and {frame.size for frame in clip} == {(64, 48)}


def test_a_clip_of_one_frame_is_a_picture(tmp_path):
    with pytest.raises(InputError, match="holds one frame: use a task that takes a picture"):
        read_video(encoded(tmp_path / "one.mp4", marked(1), rate=1))


def test_a_file_that_was_cut_off_is_refused_and_not_seen_short(tmp_path):
    whole = encoded(tmp_path / "whole.mp4", marked(24), movflags="faststart").read_bytes()
    for index, kept in enumerate((0.999, 0.9, 0.7, 0.5, 0.3, 0.1, 0.01)):
        path = tmp_path / f"{index}.mp4"
        path.write_bytes(whole[: int(len(whole) * kept)])
        with pytest.raises(InputError) as error:
            read_video(path)
        assert "\n" not in str(error.value), kept


def test_a_clip_is_gone_through_again_and_again_and_by_place(tmp_path):
    write_video(tmp_path / "clip.mp4", marked(13))
    clip = read_video(tmp_path / "clip.mp4")
    first, second = ([np.asarray(frame) for frame in clip] for _ in range(2))
    assert all(map(np.array_equal, first, second)) and len(first) == len(clip) == 13
    assert np.array_equal(np.asarray(clip[7]), first[7]) and np.array_equal(np.asarray(clip[-1]), first[-1])
    assert [np.asarray(frame).tolist() for frame in clip[3:5]] == [frame.tolist() for frame in first[3:5]]
    with pytest.raises(IndexError):
        clip[13]


def test_a_clip_that_shrinks_while_it_is_read_is_named(tmp_path):
    write_video(tmp_path / "clip.mp4", marked(13))
    clip = read_video(tmp_path / "clip.mp4")
    write_video(tmp_path / "clip.mp4", marked(5))
    with pytest.raises(InputError, match="changed while it was read"):
        list(clip)


def test_what_the_model_sees_of_a_clip_is_what_it_saw_when_frames_were_kept():
    clip = read_video(GOLDENS / "inputs" / "ball_yuv420.mp4")
    assert vision.vit_pixels(clip, "image_112res").equal(vision.vit_pixels(list(clip), "image_112res"))


def test_one_whole_frame_of_a_clip_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """And the one before it, until its variable is set anew: 69 frames of 4K would be 1.7 GB."""
    alive, most = [0], [0]
    upright = video._upright

    def gone():
        alive[0] -= 1

    def counted(*given):
        image = upright(*given)
        alive[0] += 1
        weakref.finalize(image, gone)
        most[0] = max(most[0], alive[0])
        return image

    monkeypatch.setattr(video, "_upright", counted)
    write_video(tmp_path / "clip.mp4", marked(29))
    assert vision.vae_pixels(read_video(tmp_path / "clip.mp4"), "image_112res").shape[1] == 29
    assert most[0] <= 2
