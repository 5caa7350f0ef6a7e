"""--with_parts: a packed folder that holds everything, moves anywhere, and shares its large files with the source."""

import os
import shutil
from pathlib import Path

import pytest

import awq_apply
import nvfp4_apply
from lance_nano import CHECKPOINT
from lance_quant import quantize
from lance_quant.calibration.activation_stats import ActStats
from lance_quant.cli import command
from lance_quant.errors import InputError
from lance_quant.formats.layout import VIT_PREFIX
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.methods import model_card
from lance_quant.storage import atomic
from lance_quant.storage.tensor_file import TensorSpec

PARTS = ("Qwen2.5-VL-ViT/config.json", "Qwen2.5-VL-ViT/vit.safetensors", "Wan2.2_VAE.pth")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """lance-nano on a disk where it may be linked to, and statistics of nothing."""
    root = tmp_path_factory.mktemp("source")
    shutil.copytree(CHECKPOINT.parent, root / "nano")
    ActStats({}, [], [{"run_id": "none", "task": "t2i", "samples": []}], 0).save(root / "stats.pt")
    return root


def flags(source, out, *more):
    return ["--src", str(source / "nano" / CHECKPOINT.name), "--stats", str(source / "stats.pt"), "--out", str(out),
            "--device", "cpu", "--with_parts", *more]


@pytest.mark.parametrize("stage", [awq_apply, nvfp4_apply], ids=lambda stage: stage.__name__)
def test_the_folder_runs_where_nothing_is_beside_it_and_takes_no_second_space(source, tmp_path, monkeypatch, stage):
    stage.main(flags(source, tmp_path / "elsewhere" / "packed"))
    packed = tmp_path / "elsewhere" / "packed"
    assert [os.path.samefile(packed / name, source / "nano" / name) for name in PARTS] == [True] * 3
    card = (packed / model_card.FILE).read_text(encoding="utf-8")
    assert "`Qwen2.5-VL-ViT/` and `Wan2.2_VAE.pth`, ByteDance's files, are in this folder." in card
    monkeypatch.chdir(tmp_path)
    command.main(["draw", "a red circle", "--model", str(packed), "--out", "a.png", "--num_timesteps", "1"])
    command.main(["ask", "a.png", "What is it?", "--model", str(packed), "--max_new_tokens", "1"])


def test_where_nothing_can_be_linked_the_parts_are_copied(source, tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(atomic.os, "link", refuses)
    quantize(source / "nano" / CHECKPOINT.name, tmp_path / "packed", stats=source / "stats.pt", device="cpu",
             with_parts=True)
    for name in PARTS:
        assert not os.path.samefile(tmp_path / "packed" / name, source / "nano" / name)
        assert (tmp_path / "packed" / name).read_bytes() == (source / "nano" / name).read_bytes()


def test_links_are_made_to_files_and_not_to_links(source, tmp_path):
    """The hub's cache holds links: a link to one would break when the cache is emptied."""
    (tmp_path / "link").symlink_to(source / "nano" / PARTS[2])
    atomic.link_or_copy(tmp_path / "link", tmp_path / "a" / "b")
    made = tmp_path / "a" / "b"
    assert not made.is_symlink() and os.path.samefile(made, source / "nano" / PARTS[2])


def test_a_resumed_job_has_them_too(source, tmp_path):
    awq_apply.main(flags(source, tmp_path / "packed", "--resume"))
    assert all((tmp_path / "packed" / name).is_file() for name in PARTS)
    with PackedFolder(tmp_path / "packed"):
        pass


def test_without_the_flag_there_are_none(source, tmp_path):
    awq_apply.main([flag for flag in flags(source, tmp_path / "packed") if flag != "--with_parts"])
    assert not any((tmp_path / "packed" / name).exists() for name in PARTS)


def test_a_dry_run_lists_them_before_the_size_of_the_file(source, tmp_path, capsys):
    awq_apply.main(flags(source, tmp_path / "packed", "--dry_run"))
    *_, vit, vae, _, last = capsys.readouterr().out.splitlines()
    assert vit.startswith("beside it Qwen2.5-VL-ViT/vit.safetensors, ") and vae.startswith("beside it Wan2.2_VAE.pth, ")
    assert last.startswith("output_bytes: ") and not (tmp_path / "packed").exists()


def test_absent_parts_are_named_before_anything_is_converted(source, tmp_path):
    model = tmp_path / "Lance_3B"
    shutil.copytree(CHECKPOINT, model)
    with pytest.raises(InputError, match=r"--with_parts: .*config.json, .*vit.safetensors, Wan2.2_VAE.pth not found"):
        awq_apply.main(["--src", str(model), "--stats", str(source / "stats.pt"), "--out", str(tmp_path / "packed"),
                        "--device", "cpu", "--with_parts"])
    assert not (tmp_path / "packed").exists()


def test_a_checkpoint_with_its_vit_inside_needs_the_configuration_alone(tmp_path):
    (tmp_path / "Qwen2.5-VL-ViT").mkdir()
    for name in (PARTS[0], PARTS[2]):
        (tmp_path / name).touch()
    inside = {f"{VIT_PREFIX}merger.ln_q.weight": TensorSpec(None, (1,))}
    assert set(model_card.parts_of(tmp_path / "Lance_3B_Video" / "model.safetensors", inside)) == {PARTS[0], PARTS[2]}


def test_too_small_a_disk_for_copies_is_said_first(source, tmp_path, monkeypatch):
    from lance_quant.methods import convert

    monkeypatch.setattr(convert, "_copied_bytes", lambda parts, out: 1 << 60 if parts else 0)
    with pytest.raises(InputError, match="GB free"):
        awq_apply.main(flags(source, tmp_path / "packed"))
    assert list(Path(tmp_path).iterdir()) == []
