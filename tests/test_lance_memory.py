"""Using less memory changes where parts are, and nothing else; tiles change pixels a little."""

import pytest
import torch
from conftest import CPU, relative

from lance_quant.lance.runtime import Runtime
from lance_quant.lance.settings import OFFLOADS, Sampling
from lance_quant.lance.vae import load_vae

TWO = Sampling(num_timesteps=2)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.slow
def test_offloading_changes_no_result(paths, pipeline, recorded, offload):
    """An edit needs both parts, and the VAE twice."""
    sample = recorded("image_edit").sample

    def edited(one):
        request = one.editor(sample.text, one.frames(sample.visual, "image"), "image_256res", sample.named, TWO)
        latent = one.sample(request)
        return latent, one.decode(latent)

    frugal = Runtime.load(paths, CPU, torch.float32, offload=offload)
    (latent, picture), (expected, other) = edited(frugal), edited(pipeline)
    assert torch.equal(latent, expected) and picture.tobytes() == other.tobytes()
    assert ("vae" in vars(frugal)) == ("vit" in vars(frugal)) == (offload != "vae_vit")


def test_a_part_is_loaded_once_for_a_block(paths):
    frugal = Runtime.load(paths, CPU, torch.float32, offload="vae_vit")
    with frugal.using("vae") as vae:
        with frugal.using("vae") as again:
            assert again is vae
        assert frugal.vae is vae
    assert "vae" not in vars(frugal)


def test_a_part_goes_to_the_device_for_a_block_and_back(paths):
    """The meta device stands in for a GPU: values are lost there, places are not."""
    frugal = Runtime.load(paths, CPU, torch.float32, offload="cpu")
    places = []
    frugal.vae.move = lambda device: places.append(device.type)
    frugal.model.device = torch.device("meta")
    with pytest.raises(RuntimeError, match="stop"), frugal.using("vae"):
        raise RuntimeError("stop")
    assert places == ["meta", "cpu"]


@pytest.mark.slow
def test_time_goes_in_chunks_that_are_exact(pipeline, recorded):
    """Frames do not depend on those behind them: a clip cut short decodes and encodes to the same beginning."""
    latent = recorded("video_edit").tensors["s0.latent.0.1"]
    whole = pipeline.vae.decode(latent)
    assert torch.equal(pipeline.vae.decode(latent[:1]), whole[:, :1])
    assert relative(pipeline.vae.encode(whole[:, :1]).mean, pipeline.vae.encode(whole).mean[:1]) < 1e-6


@pytest.mark.slow
def test_tiles_are_off_unless_asked_for_and_keep_sizes(paths, pipeline, recorded):
    """The golden VAE's weights are random: its attention spreads over the frame, 13 % here."""
    latent = recorded("i2v").tensors["s0.latent.0.0"]
    assert not pipeline.vae.autoencoder.use_tiling
    tiled = load_vae(paths.vae, CPU, torch.float32, tiling=True).decode(latent)
    whole = pipeline.vae.decode(latent)
    assert tiled.shape == whole.shape and 0 < relative(tiled, whole) < 0.3
    small = latent[:, :, :16]  # 256 pixels: nothing to cut
    assert torch.equal(load_vae(paths.vae, CPU, torch.float32, tiling=True).decode(small), pipeline.vae.decode(small))
