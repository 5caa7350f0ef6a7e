"""Preprocessing equals the recorded pixels and patches exactly, and the buckets of the specification."""

import numpy as np
import pytest
import torch
from PIL import Image

from lance_quant.errors import InputError
from lance_quant.lance.media import vision


@pytest.mark.parametrize("sample", [0, 1, 2])
def test_pixels_and_patches_equal_the_official_ones(x2t, questions, sample):
    """RGB, RGBA over white and palette pictures, each in another bucket."""
    official = x2t["f32"].tensors
    pixels = vision.vit_pixels([vision.open_image(questions[sample].visual)], "image_256res")
    assert torch.equal(pixels, official[f"s{sample}.vit_u8.0"])
    patches, grid = vision.vit_patches(pixels)
    assert list(grid) == official[f"s{sample}.in.vit_video_grid_thw"][0].tolist()
    assert torch.equal(patches[official[f"s{sample}.vit_patch_rows.index"]],
                       official[f"s{sample}.vit_patch_rows.value"])
    if sample == 0:
        assert torch.equal(patches, official["s0.in.packed_vit_tokens.0"])


# height x width of the six buckets (21:9, 16:9, 4:3, 1:1, 3:4, 9:16), from the specification's table
BUCKETS = {
    224: [(144, 336), (160, 288), (192, 256), (224, 224), (256, 192), (288, 160)],
    768: [(496, 1152), (576, 1024), (672, 896), (768, 768), (896, 672), (1024, 576)],
    672: [(432, 1008), (512, 912), (576, 768), (672, 672), (768, 576), (912, 512)],
    616: [(400, 928), (464, 832), (528, 704), (608, 608), (704, 528), (832, 464)],
}


@pytest.mark.parametrize("base", BUCKETS)
def test_buckets_are_those_of_the_official_table(base):
    shapes = [(21, 9), (16, 9), (4, 3), (1, 1), (3, 4), (9, 16)]
    assert [vision.bucket(100 * wide, 100 * high, base) for wide, high in shapes] == BUCKETS[base]


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (301, 300)])
def test_extreme_pictures_fill_a_bucket(size):
    pixels = vision.vit_pixels([Image.new("RGB", size, (10, 20, 30))], "image_256res", torch.Generator())
    assert pixels.shape[2] % 28 == pixels.shape[3] % 28 == 0
    assert (pixels.float().mean((1, 2, 3)).round() == torch.tensor([10.0, 20.0, 30.0])).all()


def test_near_ratio_crop_is_random_officially_and_centred_without_a_generator():
    """301 x 300 in the square bucket: a 300 x 300 crop at column 0 or 1."""
    draws = {vision.crop_box(301, 300, 1.0, torch.Generator().manual_seed(seed))[0] for seed in range(20)}
    assert draws == {0, 1}
    assert vision.crop_box(301, 300, 1.0, None) == (0, 0, 300, 300)


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert vision.open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_followed_on_request_only(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert vision.open_image(tmp_path / "turned.jpg").size == (4, 2)
    assert vision.open_image(tmp_path / "turned.jpg", exif=True).size == (2, 4)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 20])
def test_broken_image_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read the image .*broken\.png"):
        vision.open_image(path)


def test_missing_image_is_named(tmp_path):
    with pytest.raises(InputError, match=r"image not found: .*no\.png"):
        vision.open_image(tmp_path / "no.png")


def test_picture_levels_by_hand():
    """-1, 0, 1 and beyond: 0, 128 (127.5 rounds to even), 255, clamped."""
    image = vision.to_image(torch.tensor([-1.0, 0.0, 1.0, 7.0]).expand(3, 1, 4))
    assert np.array(image)[0, :, 0].tolist() == [0, 128, 255, 255]
