"""`lance-quant download`, against a hub that is a folder: the layout runs, what is there is not fetched, mistakes are
one line. The real client is tested offline only."""

import shutil

import pytest
from test_command import packed  # noqa: F401 - a fixture

from lance_nano import CHECKPOINT
from lance_quant.cli import command, download
from lance_quant.errors import InputError
from lance_quant.storage import hub as hubs

PARTS = ("Qwen2.5-VL-ViT", "Wan2.2_VAE.pth")


class Folders:
    """A hub whose repositories are folders; it keeps what was fetched, and can break off."""

    def __init__(self, root, breaks_after=None):
        self.root, self.fetched, self.left = root, [], breaks_after

    def files(self, repo):
        folder = self.root / repo
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*"))
                if path.is_file()}

    def fetch(self, repo, names, folder):
        for name in names:
            if self.left is not None and not self.left:
                raise InputError(f"{repo} cannot be reached (broken): the same command goes on from there")
            self.left = None if self.left is None else self.left - 1
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / repo / name, folder / name)
            self.fetched.append(name)


@pytest.fixture
def hub(tmp_path, packed):  # noqa: F811
    """lance-nano as both models, float and INT4, with files that nobody needs."""
    base = tmp_path / "hub" / download.BASE
    for model in download.MODELS:
        shutil.copytree(CHECKPOINT, base / model)
    for part in PARTS:
        copy = shutil.copytree if (CHECKPOINT.parent / part).is_dir() else shutil.copyfile
        copy(CHECKPOINT.parent / part, base / part)
    (base / "assets").mkdir()
    (base / "assets" / "big.mp4").write_bytes(b"x" * 1000)
    published = tmp_path / "hub" / "Reza2kn" / "Lance-3B-AWQ-INT4"
    published.mkdir(parents=True)
    for name in ("awq_meta.json", "awq_state_dict.safetensors", "README.md"):
        shutil.copyfile(packed / "int4" / name, published / name)
    return Folders(tmp_path / "hub")


def args(*flags):
    return command.parse_args(["download", *map(str, flags)])


def test_a_downloaded_packed_folder_draws_alone(tmp_path, hub, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = download.run(args("Lance_3B", "--to", "got"), hub)
    assert folder == "got/Lance-3B-AWQ-INT4" and "assets/big.mp4" not in hub.fetched
    assert not (tmp_path / "got/Lance_3B/model.safetensors").exists()
    command.main(["draw", "a red circle", "--model", folder, "--out", "a.png", "--num_timesteps", "1"])
    assert (tmp_path / "a.png").is_file()
    assert "lance-quant" in (tmp_path / folder / "README.md").read_text(encoding="utf-8")  # the published one


def test_a_downloaded_float_model_lies_as_in_the_official_download(tmp_path, hub):
    assert download.run(args("Lance_3B", "--format", "float", "--to", tmp_path / "got"), hub) == str(
        tmp_path / "got/Lance_3B")
    assert (tmp_path / "got/Lance_3B/model.safetensors").is_file() and (tmp_path / "got/Qwen2.5-VL-ViT").is_dir()


def test_the_video_model_brings_the_configuration_of_its_vit_and_not_the_weights(tmp_path, hub):
    download.run(args("Lance_3B_Video", "--format", "float", "--to", tmp_path), hub)
    assert [path.name for path in (tmp_path / "Qwen2.5-VL-ViT").iterdir()] == ["config.json"]


def test_what_broke_off_goes_on_and_what_is_there_is_left_alone(tmp_path, hub):
    hub.left = 3
    with pytest.raises(InputError, match="the same command goes on"):
        download.run(args("Lance_3B", "--to", tmp_path / "got"), hub)
    before, hub.left = list(hub.fetched), None
    download.run(args("Lance_3B", "--to", tmp_path / "got"), hub)
    assert len(before) == 3 and not set(before) & set(hub.fetched[3:])
    count = len(hub.fetched)
    download.run(args("Lance_3B", "--to", tmp_path / "got"), hub)
    assert len(hub.fetched) == count


def test_a_dry_run_says_files_and_sizes_and_fetches_nothing(tmp_path, hub):
    shown = download.run(args("Lance_3B", "--to", tmp_path / "got", "--dry_run"), hub)
    assert hub.fetched == [] and not (tmp_path / "got").exists()
    files = hub.files("Reza2kn/Lance-3B-AWQ-INT4")
    assert f"{files['awq_state_dict.safetensors'] / 1e6:.2f} MB  awq_state_dict.safetensors\n" in shown
    assert f"Reza2kn/Lance-3B-AWQ-INT4 into {tmp_path / 'got' / 'Lance-3B-AWQ-INT4'}:" in shown
    assert "big.mp4" not in shown and " in all, " in shown
    download.run(args("Lance_3B", "--to", tmp_path / "got"), hub)
    shown = download.run(args("Lance_3B", "--to", tmp_path / "got", "--dry_run"), hub)
    assert shown.count("  (there)") == len(shown.splitlines()) - 3 and shown.endswith("0.00 MB to fetch")


def test_a_file_that_came_in_part_is_noticed(tmp_path, hub, monkeypatch):
    whole = hub.fetch
    monkeypatch.setattr(hub, "fetch", lambda repo, names, folder: whole(repo, names[:-1], folder))
    with pytest.raises(InputError, match="did not arrive whole, first .*: run the same command again"):
        download.run(args("Lance_3B", "--to", tmp_path / "got"), hub)


def test_a_full_disk_and_a_moved_file_are_said_before_anything_is_fetched(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(InputError, match="are to fetch and .* has 0.00 MB free"):
        download.run(args("Lance_3B", "--to", tmp_path / "got"), hub)
    (hub.root / download.BASE / "Wan2.2_VAE.pth").unlink()
    with pytest.raises(InputError, match="bytedance-research/Lance has no Wan2.2_VAE.pth: was it moved"):
        download.run(args("Lance_3B", "--to", tmp_path / "got"), hub)
    assert hub.fetched == [] and not (tmp_path / "got").exists()


def named(name, module="huggingface_hub.errors", base=Exception):
    return type(name, (base,), {"__module__": module})


@pytest.mark.parametrize("error, message", [
    (named("GatedRepoError")("403"), "wants its terms accepted: .*hf auth login"),
    (named("RepositoryNotFoundError")("404"), "there is no a/b on the hub, or it is private: 404"),
    (named("OfflineModeIsEnabled", base=ConnectionError)("off"), "HF_HUB_OFFLINE is set"),
    (named("ConnectError", "httpx")("no route\nto host"), r"a/b cannot be reached \(no route to host\): .*HF_ENDPOINT"),
    (ConnectionError("reset"), "a/b cannot be reached"), (TimeoutError(), "a/b cannot be reached"),
])
def test_errors_of_the_network_are_one_line(error, message):
    said = hubs._said(error, "a/b")
    with pytest.raises(InputError, match=message) as caught:
        raise said
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), TypeError("a bug"), KeyError("a bug")])
def test_other_errors_stay_as_they_are(error):
    assert hubs._said(error, "a/b") is error


def test_without_a_network_the_real_client_says_so_in_a_line(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        hubs.HuggingFace().files("bytedance-research/Lance")


def test_the_real_client_asks_the_hub_for_sizes_and_files(monkeypatch, tmp_path):
    """What it calls, with the library's two functions in its place."""
    import huggingface_hub

    asked = []

    class Api:
        def model_info(self, repo, files_metadata):
            files = [huggingface_hub.hf_api.RepoSibling(rfilename="a/b.json", size=7)]
            return type("Info", (), {"siblings": files if files_metadata else None})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **how: asked.append((repo, how)))
    client = hubs.HuggingFace()
    assert client.files("a/b") == {"a/b.json": 7}
    client.fetch("a/b", ["a/b.json"], tmp_path)
    assert asked == [("a/b", {"local_dir": tmp_path, "allow_patterns": ["a/b.json"]})]
