"""The ComfyUI pack without ComfyUI: its contract, and what its nodes do on the golden checkpoint over small stubs."""

import ast
import importlib
import inspect
import json
import re
import shlex
import shutil
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS
from PIL import Image
from safetensors.torch import load_file, save_file

from comfyui import build, checks, classes, handle, host, install, models, nodes, table, toolkit
from comfyui.toolkit import PackError
from lance_quant.errors import InputError
from lance_quant.kernels.choices import KERNEL_CHOICES

ROOT = Path(__file__).parent.parent
PACK = ROOT / "comfyui"
CLASSES, TITLES = classes.mappings()
ANSWER = "max_new_tokens temperature top_p seed"
SAMPLING = "steps cfg seed timestep_shift cfg_start cfg_end low_memory solver reuse cfg_renorm"
# Saved workflows hold these names, and widget values in this order: only ever add at an end.
FROZEN = {
    "LanceKitModelLoader": "flavor precision checkpoint device mode keep_loaded offload vae_tiling kernel loras",
    "LanceKitTextToImage": f"model prompt size width height batch {SAMPLING}",
    "LanceKitTextToVideo": f"model prompt size width height frames fps {SAMPLING}",
    "LanceKitImageToVideo": f"model image prompt resolution frames fps {SAMPLING}",
    "LanceKitImageEdit": f"model image instruction resolution {SAMPLING}",
    "LanceKitVideoEdit": f"model video frames instruction source_fps max_frames resolution fps {SAMPLING} keep_length",
    "LanceKitImageUnderstanding": f"model image question system resolution {ANSWER}",
    "LanceKitVideoUnderstanding": f"model video frames question system source_fps max_frames resolution {ANSWER}",
    "LanceKitUnload": "model after",
    "LanceKitSelfCheck": "",
}
by_id = pytest.mark.parametrize("node", table.NODES, ids=lambda node: node.id)
WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))


class Interrupted(BaseException):
    """As in ComfyUI: `except Exception` does not catch it."""


class Comfy:
    """Just enough ComfyUI: folders, model management, progress, Cancel."""

    def __init__(self, root: Path):
        self.root, self.loaded, self.progress, self.checks, self.cancel_at = root, [], [], 0, None

    def throw_exception_if_processing_interrupted(self) -> None:
        self.checks += 1
        if self.cancel_at is not None and self.checks >= self.cancel_at:
            self.cancel_at = None
            raise Interrupted

    def load_models_gpu(self, patchers, memory_required=0, force_full_load=False) -> None:
        assert force_full_load and memory_required > 0
        for patcher in patchers:
            patcher.model.to(patcher.load_device)
            if all(loaded.model is not patcher for loaded in self.loaded):
                self.loaded.append(types.SimpleNamespace(model=patcher, model_unload=lambda **_: None))

    def modules(self) -> dict[str, types.ModuleType]:
        comfy = self

        class ModelPatcher:
            def __init__(self, model, load_device, offload_device):
                self.model, self.load_device, self.offload_device = model, load_device, offload_device

        class ProgressBar:
            def __init__(self, total):
                self.total = total

            def update_absolute(self, value, total=None, preview=None):
                comfy.progress.append((value, total))

        made = {
            "folder_paths": {"models_dir": str(self.root), "base_path": str(self.root / "ComfyUI"),
                             "get_folder_paths": lambda name: [str(self.root / name)],
                             "add_model_folder_path": lambda *_: None,
                             "get_full_path": lambda name, file: str(self.root / name / file)
                             if (self.root / name / file).is_file() else None},
            "comfy": {}, "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
            "comfy.utils": {"ProgressBar": ProgressBar},
            "comfy.model_management": {
                "current_loaded_models": self.loaded, "load_models_gpu": self.load_models_gpu,
                "get_torch_device": lambda: torch.device("cpu"), "unet_offload_device": lambda: torch.device("cpu"),
                "soft_empty_cache": lambda: None,
                "throw_exception_if_processing_interrupted": self.throw_exception_if_processing_interrupted},
            "comfy_api": {}, "comfy_api.latest": {
                "InputImpl": types.SimpleNamespace(VideoFromComponents=lambda components: components),
                "Types": types.SimpleNamespace(VideoComponents=types.SimpleNamespace)},
        }
        modules = {name: types.ModuleType(name) for name in made}
        for name, content in made.items():
            vars(modules[name]).update(content)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(modules[parent], child, modules[name])
        return modules


@pytest.fixture
def comfy(tmp_path, monkeypatch) -> Comfy:
    """Stubs, and an empty models/lance."""
    (tmp_path / "lance").mkdir()
    stub = Comfy(tmp_path)
    for name, module in stub.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(toolkit, "nano", lambda: None)
    models._header.cache_clear()
    models._header_facts.cache_clear()
    return stub


@pytest.fixture
def tiny(comfy) -> handle.LanceModel:
    """The golden checkpoint, found and loaded like any other."""
    shutil.copytree(GOLDENS / "checkpoint", comfy.root / "lance" / "some name", dirs_exist_ok=True)
    return load()[0]


def load(**settings) -> tuple:
    return nodes.load_model(**defaults("LanceKitModelLoader") | settings)


def defaults(node_id: str) -> dict:
    (node,) = [node for node in table.NODES if node.id == node_id]
    return {entry.name: entry.default for entry in node.widgets}


def draw(model, **settings) -> torch.Tensor:
    inputs = defaults("LanceKitTextToImage") | {"steps": 4, "size": "custom", "width": 96, "height": 64} | settings
    return nodes.text_to_image(model, **inputs)[0]


# The contract

def test_importing_the_pack_is_quick_and_loads_nothing_heavy():
    program = ("import time, sys; start = time.perf_counter(); import comfyui; took = time.perf_counter() - start;"
               "print(took, [name for name in ('torch', 'transformers', 'diffusers', 'numpy', 'PIL', 'lance_quant') "
               "if name in sys.modules])")
    took, _, heavy = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                                    check=True).stdout.strip().partition(" ")
    assert heavy == "[]"
    assert float(took) < 0.5


def test_names_are_frozen():
    assert {node.id: " ".join(entry.name for entry in node.inputs) for node in table.NODES} == FROZEN
    assert set(CLASSES) == set(TITLES) == set(FROZEN)
    assert all(name.startswith("LanceKit") for name in FROZEN)


@by_id
def test_inputs_are_declared_as_comfyui_expects(node, comfy):
    declared = CLASSES[node.id].INPUT_TYPES()
    json.dumps(declared)
    for entry, (kind, options) in ((entry, (declared["required"] | declared.get("optional", {}))[entry.name])
                                   for entry in node.inputs):
        assert options["tooltip"].endswith(".")
        if isinstance(kind, list):
            assert options["default"] in kind
        elif kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"] and options["step"] > 0
        if entry.name == "seed":
            assert (options["min"], options["max"], options["control_after_generate"]) == (0, 2**64 - 1, True)


@by_id
def test_functions_take_exactly_their_inputs(node):
    run = getattr(CLASSES[node.id], CLASSES[node.id].FUNCTION)
    parameters = dict(inspect.signature(run).parameters)
    extra = set(nodes.Extra.__annotations__) if parameters.pop("extra", None) else set()
    assert set(parameters) | extra == {entry.name for entry in node.inputs}
    optional = {name for name, parameter in parameters.items() if parameter.default is not inspect.Parameter.empty}
    assert optional | extra == {entry.name for entry in node.inputs if entry.optional}


@by_id
def test_outputs_and_descriptions_are_complete(node):
    made = CLASSES[node.id]
    assert len(made.RETURN_TYPES) == len(made.RETURN_NAMES) == len(made.OUTPUT_TOOLTIPS) == len(made.OUTPUT_IS_LIST)
    assert made.DESCRIPTION and made.CATEGORY == "Lance"


def test_a_wildcard_accepts_every_type():
    kind, _ = CLASSES["LanceKitUnload"].INPUT_TYPES()["required"]["after"]
    assert kind == "*"
    assert [other for other in ("IMAGE", "STRING", "LANCE_MODEL") if kind != other or other != kind] == []


def test_the_pack_keeps_the_house_rules():
    for path in sorted(PACK.glob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        assert ast.get_docstring(tree)
        long = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
                and node.end_lineno - node.lineno >= 45]
        assert long == []


def test_only_the_host_module_knows_comfyui():
    theirs = re.compile(r"^\s*(import|from) (comfy|comfy_api|comfyui_version|folder_paths|nodes|server)\b", re.M)
    assert [path.name for path in sorted(PACK.glob("*.py")) if theirs.search(path.read_text("utf-8"))] == ["host.py"]


# Files made from the table

def test_locales_help_pages_and_workflows_are_up_to_date():
    made = build.files()
    stale = [str(path) for path, text in made.items() if not path.is_file() or path.read_text("utf-8") != text]
    assert stale == [], "run python -m comfyui.build"
    there = [path for folder in ("locales", "web", "example_workflows") for path in (PACK / folder).rglob("*")
             if path.is_file() and path.suffix != ".jpg"]
    assert set(there) == set(made)


def test_the_chinese_texts_are_chinese_and_complete():
    texts = [text for node in build.translated().values()
             for part in [node, *node["inputs"].values(), *node["outputs"].values()]
             for text in part.values() if isinstance(text, str)]
    assert len(texts) > 150
    assert all(any("\u4e00" <= character <= "\u9fff" for character in text) for text in texts)


def test_every_node_has_an_example():
    used = {node["type"] for path in WORKFLOWS for node in json.loads(path.read_text("utf-8"))["nodes"]}
    assert set(FROZEN) <= used


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_example_workflows_fit_the_nodes(path):
    workflow = json.loads(path.read_text("utf-8"))
    placed = {node["id"]: node for node in workflow["nodes"]}
    for node in workflow["nodes"]:
        if node["type"] in CLASSES:
            (declared,) = [entry for entry in table.NODES if entry.id == node["type"]]
            names = [name for entry in declared.widgets for name in (entry.name, *["control"] * (entry.name == "seed"))]
            values = dict(zip(names, node["widgets_values"], strict=True))
            for entry in declared.widgets:
                if entry.kind == "COMBO" and isinstance(entry.choices, tuple):
                    assert values[entry.name] in entry.choices
    for index, source, slot, target, socket, kind in workflow["links"]:
        output, taken = placed[source]["outputs"][slot], placed[target]["inputs"][socket]
        assert index in output["links"] and taken["link"] == index
        assert kind == output["type"] and (taken["type"] == kind or "*" in (taken["type"], kind))
    assert path.with_suffix(".jpg").is_file(), "a thumbnail of the same name"


# Finding models

def fake(folder: Path, hidden: int = 2048, positions: int = 4096, precision: str = "bf16", vit: bool = False,
         config: bool = True) -> None:
    """The headers and names of a checkpoint, without its gigabytes."""
    shapes = {"language_model.model.norm.weight": [hidden], "latent_pos_embed.pos_embed": [positions, hidden]}
    if vit:
        shapes["vit_model.patch_embed.proj.weight"] = [1]
    header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
                         for name, shape in shapes.items()}).encode()
    folder.mkdir(parents=True, exist_ok=True)
    file = {"bf16": "model.safetensors"}.get(precision) or models._PACKED[precision][1]
    (folder / file).write_bytes(struct.pack("<Q", len(header)) + header)
    if precision != "bf16":
        (folder / models._PACKED[precision][0]).write_text("{}")
    for name in models._TOKENIZER if config else ():
        (folder / name).write_text(json.dumps({"hidden_size": hidden}))


def test_models_are_known_by_their_content_at_any_depth_and_under_any_name(comfy):
    fake(comfy.root / "lance" / "a" / "My Model")
    fake(comfy.root / "lance" / "a" / "b" / "clips", positions=126976)
    fake(comfy.root / "lance" / "Lance-3B-Video-AWQ-INT4", precision="awq_int4", vit=True, config=False)
    fake(comfy.root / "lance" / ".cache" / "half", config=True)
    (comfy.root / "lance" / "a" / "loop").symlink_to(comfy.root / "lance")
    found = {one.label: (one.flavor, one.precision) for one in models.scan()}
    assert found == {"a/My Model": ("Lance_3B", "bf16"), "a/b/clips": ("Lance_3B_Video", "bf16"),
                     "Lance-3B-Video-AWQ-INT4": ("Lance_3B_Video", "awq_int4")}
    assert models.labels() == ["auto", *found]


def test_every_registered_folder_is_searched(comfy, tmp_path, monkeypatch):
    fake(tmp_path / "elsewhere" / "one")
    monkeypatch.setattr(sys.modules["folder_paths"], "get_folder_paths",
                        lambda _: [str(tmp_path / "lance"), str(tmp_path / "elsewhere"), str(tmp_path / "absent")])
    assert [found.label for found in models.scan()] == ["one"]


def test_a_packed_folder_takes_its_configuration_from_another_download(comfy):
    fake(comfy.root / "lance" / "Lance-3B-AWQ-INT4", precision="awq_int4", config=False)
    with pytest.raises(PackError, match="has no llm_config.json or tokenizer.*\n?.*hf download"):
        models.choose("auto", "auto", "auto", blackwell=False)
    fake(comfy.root / "lance" / "official" / "Lance_3B")
    choice = models.choose("auto", "auto", "auto", blackwell=False)
    assert (choice.found.precision, choice.config.name) == ("awq_int4", "Lance_3B")


@pytest.mark.parametrize(("blackwell", "taken"), [(True, "nvfp4"), (False, "awq_int4")])
def test_auto_precision_depends_on_the_gpu_and_says_why(comfy, blackwell, taken):
    for precision in ("bf16", "awq_int4", "nvfp4"):
        fake(comfy.root / "lance" / precision, precision=precision)
    choice = models.choose("auto", "auto", "auto", blackwell)
    assert choice.found.precision == taken
    assert "Blackwell" in choice.reason or "SM 10" in choice.reason


def test_parts_of_another_size_are_never_taken(comfy):
    fake(comfy.root / "lance" / "real" / "Lance_3B")
    vit = comfy.root / "lance" / "toy" / "Qwen2.5-VL-ViT"
    vit.mkdir(parents=True)
    (vit / "vit.safetensors").touch()
    (vit / "config.json").write_text('{"out_hidden_size": 128}')
    assert models.choose("auto", "auto", "auto", False).vit is None
    (vit / "config.json").write_text('{"out_hidden_size": 2048}')
    assert models.choose("auto", "auto", "auto", False).vit == vit


@pytest.mark.parametrize(("flavor", "precision", "command", "size"), [
    ("Lance_3B", "bf16", '--include "Lance_3B/*"', "28.9"), ("auto", "auto", "Reza2kn/Lance-3B-AWQ-INT4", "8.5"),
    ("Lance_3B_Video", "nvfp4", "Reza2kn/Lance-3B-Video-NVFP4", "11.1")])
def test_the_first_line_says_what_is_missing_with_command_and_size(comfy, flavor, precision, command, size):
    with pytest.raises(PackError) as raised:
        models.choose(flavor, precision, "auto", blackwell=False)
    first = str(raised.value).splitlines()[0]
    assert "is not installed. Download it" in first and f"{size} GB" in first
    assert "hf download bytedance-research/Lance" in first and command in first and str(comfy.root / "lance") in first


def test_without_any_model_the_built_in_one_is_taken_and_says_so(comfy, monkeypatch):
    monkeypatch.setattr(toolkit, "nano", lambda: GOLDENS / "checkpoint" / "Lance_3B")
    choice = models.choose("auto", "auto", "auto", blackwell=False)
    assert choice.found.label == models.NANO_LABEL and "hf download" in choice.reason
    assert (choice.vit.name, choice.vae.name) == ("Qwen2.5-VL-ViT", "Wan2.2_VAE.pth")
    with pytest.raises(PackError, match="Lance_3B .* is not installed"):
        models.choose("Lance_3B", "auto", "auto", blackwell=False)


def test_a_broken_or_contradicting_choice_is_refused(comfy):
    fake(comfy.root / "lance" / "good")
    fake(comfy.root / "lance" / "cut")
    (comfy.root / "lance" / "cut" / "model.safetensors").write_bytes(b"\x00" * 4)
    for settings, text in ((("auto", "auto", "cut"), "cannot be read.*Download it again"),
                           (("auto", "nvfp4", "good"), "is bf16, and precision says nvfp4"),
                           (("Lance_3B_Video", "auto", "good"), "is Lance_3B, and flavor says Lance_3B_Video"),
                           (("auto", "auto", "gone"), "'gone' is not in the lance folders.*Found: ")):
        with pytest.raises(PackError, match=text):
            models.choose(*settings, blackwell=False)
    assert models.choose("auto", "auto", "auto", blackwell=False).found.label == "good"


def test_a_missing_model_is_said_when_the_node_runs_and_wrong_words_before(comfy):
    """ComfyUI repeats what a validator says for every node behind it."""
    assert nodes.validate_model("Lance_3B", "auto", "auto") is True
    assert "is none of" in nodes.validate_model("Nope", "auto", "auto")
    assert nodes.validate_model(None, "auto", "auto") is True
    with pytest.raises(PackError, match="is not installed. Download it .8.5 GB., then queue again: hf download"):
        load(flavor="Lance_3B")


def test_the_fingerprint_follows_the_file(comfy):
    settings = {"flavor": "auto", "precision": "auto", "checkpoint": "auto"}
    absent = nodes.model_fingerprint(**settings)
    fake(comfy.root / "lance" / "one")
    first = nodes.model_fingerprint(**settings)
    (comfy.root / "lance" / "one" / "model.safetensors").open("ab").write(b"more")
    assert len({absent, first, nodes.model_fingerprint(**settings)}) == 3


# Running

def test_pictures_are_images_and_batches_count_the_seed_up(tiny):
    both = draw(tiny, seed=7, batch=2)
    assert (both.shape, both.dtype, both.device.type) == ((2, 64, 96, 3), torch.float32, "cpu")
    assert both.min() >= 0 and both.max() <= 1
    torch.testing.assert_close(both[1:], draw(tiny, seed=8), rtol=0, atol=0)
    assert not torch.equal(both[0], both[1])


def test_every_sampling_widget_reaches_the_sampler(tiny):
    plain = draw(tiny)
    torch.testing.assert_close(plain, draw(tiny), rtol=0, atol=0)
    for changed in ({"seed": 43}, {"cfg": 9.0}, {"steps": 5}, {"timestep_shift": 1.0}, {"cfg_start": 0.95},
                    {"cfg_end": 0.9}, {"prompt": "a digit 7"}, {"steps": 8, "solver": "ab2"}, {"cfg_renorm": "none"}):
        assert not torch.equal(plain, draw(tiny, **changed)), changed
    assert not torch.equal(draw(tiny, steps=8), draw(tiny, steps=8, reuse=0.3))
    torch.testing.assert_close(plain, draw(tiny, low_memory=True), rtol=0, atol=2 / 255)


def test_latents_are_those_that_a_wan_vae_decodes(tiny):
    """As ComfyUI passes them: not normalised, channels in front."""
    inputs = defaults("LanceKitTextToImage") | {"steps": 2, "size": "custom", "width": 96, "height": 64, "batch": 2}
    pictures, latent = nodes.text_to_image(tiny, **inputs)
    assert latent["samples"].shape == (2, 48, 1, 4, 6) and latent["samples"].dtype == torch.float32
    with tiny.ready("vae") as pipeline:
        decoded = pipeline.vae.autoencoder.decode(latent["samples"]).sample
    levels = (decoded[:, :, 0].movedim(1, -1).clamp(-1, 1) + 1) / 2
    assert (levels - pictures).abs().max() < 1.01 / 255, "rounded to 8 bits alone"


def test_a_preview_is_where_the_step_leads(comfy, tiny, monkeypatch):
    """The last step of a flow leads to the result itself; lance-nano's latents have no colours of ComfyUI's."""
    shown = []
    modules = {"latent_preview": {"get_previewer": lambda device, form: types.SimpleNamespace(
        decode_latent_to_preview_image=lambda kind, latent: shown.append((kind, latent)) or "picture")},
        "comfy.latent_formats": {"Wan22": object}}
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules["comfy"], "latent_formats", sys.modules["comfy.latent_formats"], raising=False)
    inputs = defaults("LanceKitTextToImage") | {"steps": 3, "size": "custom", "width": 96, "height": 64}
    nodes.text_to_image(tiny, **inputs)
    assert shown == []
    monkeypatch.setattr(handle.LanceModel, "is_small", False)
    _, latent = nodes.text_to_image(tiny, **inputs)
    from lance_quant.lance.vae import MEAN, STD

    assert [kind for kind, _ in shown] == ["JPEG"] * 3 and shown[0][1].shape == (1, 48, 1, 4, 6)
    last = shown[-1][1] * torch.tensor(STD).view(-1, 1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1, 1)
    torch.testing.assert_close(last, latent["samples"], rtol=1e-4, atol=1e-4)
    monkeypatch.setitem(sys.modules, "latent_preview", types.ModuleType("latent_preview"))
    assert host.previewer(torch.device("cpu")) is None


def test_the_largest_seed_wraps_within_a_batch(tiny):
    wrapped = draw(tiny, seed=2**64 - 1, batch=2)
    torch.testing.assert_close(wrapped[1:], draw(tiny, seed=0), rtol=0, atol=0)


def test_sizes_are_named_by_ratio_or_the_models_own(tiny):
    assert draw(tiny, size="auto", steps=1).shape == (1, 112, 112, 3)
    assert nodes._size(tiny, "16:9 1024x576", 64, 64, "image") == (1024, 576)
    assert nodes._size(tiny, "360p 9:16 352x640", 64, 64, "video") == (352, 640)


def test_progress_counts_every_step_to_its_end(comfy, tiny):
    comfy.progress.clear()
    draw(tiny, steps=3, batch=2)
    assert comfy.progress == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize("at", [1, 20, 90])
def test_cancel_stops_within_a_block_and_leaves_nothing(comfy, tiny, at):
    draw(tiny)
    comfy.checks, comfy.cancel_at = 0, at
    with pytest.raises(Interrupted):
        draw(tiny)
    assert comfy.checks == at
    hooks = [module for patcher in tiny._managed.values() for module in patcher.model.modules()
             if module._forward_pre_hooks]
    assert hooks == []
    assert draw(tiny).shape == (1, 64, 96, 3)


def test_loading_can_be_cancelled_and_shows_progress(comfy, tiny):
    tiny.release()
    comfy.progress.clear()
    comfy.checks, comfy.cancel_at = 0, 30
    with pytest.raises(Interrupted):
        tiny.load()
    assert tiny._pipeline is None
    tiny.load()
    assert comfy.progress[-1][0] == comfy.progress[-1][1] > 90


def test_understanding_answers_once_per_picture_as_the_pipeline_does(comfy, tiny, pipeline, questions):
    inputs, picture = defaults("LanceKitImageUnderstanding"), pipeline.frames(questions[0].visual, "image")[0]
    image = nodes._image(picture)[None]
    comfy.progress.clear()
    asked = {"question": questions[0].question, "system": questions[0].system, "resolution": "image_256res",
             "max_new_tokens": 24}
    result = nodes.image_understanding(tiny, torch.cat([image, 1 - image]), **inputs | asked)
    (answers,) = result["result"]
    packed, tokens = pipeline.prompt_of(questions[0], "image_256res")
    assert answers[0] == pipeline.answer(packed, tokens, 24).text and len(answers) == 2
    assert result["ui"]["text"] == answers
    assert comfy.progress[-1] == (24, 24)


def test_temperature_and_seed_reach_the_choice_of_tokens(tiny):
    inputs = defaults("LanceKitImageUnderstanding") | {"max_new_tokens": 16, "resolution": "image_112res"}
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))

    def answers(**changed):
        return nodes.image_understanding(tiny, picture, **inputs | changed)["result"][0]

    assert answers() == answers(seed=7) == answers(temperature=0.01, top_p=0.01)
    drawn = answers(temperature=2.0, seed=7)
    assert drawn == answers(temperature=2.0, seed=7) and drawn != answers(temperature=2.0, seed=8)


def test_an_answer_can_be_cancelled_between_tokens(comfy, tiny):
    inputs = defaults("LanceKitImageUnderstanding") | {"max_new_tokens": 20, "resolution": "image_112res"}
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    comfy.checks = 0
    nodes.image_understanding(tiny, picture, **inputs)
    comfy.cancel_at, comfy.checks = comfy.checks - 5, 0
    with pytest.raises(Interrupted):
        nodes.image_understanding(tiny, picture, **inputs)


def test_an_edit_keeps_the_batch_and_uses_the_picture(tiny):
    inputs = defaults("LanceKitImageEdit") | {"steps": 2, "resolution": "image_112res"}
    first, second = torch.zeros(1, 64, 64, 3), torch.ones(1, 64, 64, 3)
    edited, latent = nodes.image_edit(tiny, torch.cat([first, second]), **inputs)
    assert edited.shape == (2, 112, 112, 3) and not torch.equal(edited[0], edited[1])
    assert latent["samples"].shape == (2, 48, 1, 7, 7)


def test_clips_have_their_frames_rate_and_sound(tiny):
    inputs = {"steps": 1, "fps": 24}
    clip, frames, latent = nodes.text_to_video(tiny, **defaults("LanceKitTextToVideo") | inputs | {"frames": 5})
    assert frames.shape == (5, 112, 112, 3) and (clip.frame_rate, clip.audio) == (24, None)
    clip, frames, latent = nodes.image_to_video(tiny, frames[:1], **defaults("LanceKitImageToVideo") | inputs | {
        "frames": 9, "resolution": "image_112res"})
    assert frames.shape == (9, 112, 112, 3) and latent["samples"].shape == (1, 48, 3, 7, 7)
    clip.audio, clip.frame_rate = "sound", 12.0
    source = types.SimpleNamespace(get_components=lambda: clip)
    edit = defaults("LanceKitVideoEdit") | inputs | {"resolution": "image_112res"}
    edited, frames, _ = nodes.video_edit(tiny, **edit, video=source)
    assert frames.shape == (9, 112, 112, 3) and edited.audio == "sound"
    edited, frames, _ = nodes.video_edit(tiny, **edit | {"max_frames": 5}, frames=clip.images)
    assert frames.shape == (5, 112, 112, 3)
    asked = nodes.video_understanding(tiny, **defaults("LanceKitVideoUnderstanding") | {
        "max_new_tokens": 16, "resolution": "image_112res"}, frames=clip.images)
    assert isinstance(asked["result"][0], str)


def test_mistakes_are_answered_in_words(comfy, tiny, monkeypatch):
    watch = defaults("LanceKitVideoUnderstanding")
    with pytest.raises(PackError, match="The prompt is empty"):
        draw(tiny, prompt=" \n")
    with pytest.raises(PackError, match="Connect either video or frames."):
        nodes.video_understanding(tiny, **watch)
    with pytest.raises(PackError, match="not both"):
        nodes.video_understanding(tiny, **watch, video=types.SimpleNamespace(get_components=None),
                                  frames=torch.zeros(5, 16, 16, 3))
    monkeypatch.setattr(handle.LanceModel, "flavor", "Lance_3B")
    with pytest.raises(PackError, match="needs the video model.*Lance_3B_Video"):
        nodes.video_understanding(tiny, **watch, frames=torch.zeros(5, 16, 16, 3))


WHOLE = [True, 1.5, "4", None, float("nan"), [1], 10**9, -(10**9), 2**70, {}]
REAL = [float("nan"), float("inf"), -float("inf"), True, "1", None, [1.0], 1e9, -5, 1j]
PICTURES = [None, "a.png", torch.zeros(4, 4, 3), torch.zeros(0, 4, 4, 3), torch.zeros(1, 0, 4, 3),
            torch.zeros(1, 4, 4, 1), torch.zeros(1, 3, 8, 8), torch.full((1, 4, 4, 3), float("nan")),
            torch.full((1, 4, 4, 3), float("inf")),
            torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.zeros(1, 4, 4, 3, dtype=torch.int64),
            torch.zeros(1, 4, 4, 3, dtype=torch.bool)]
WRONG = {
    "LanceKitTextToImage": {
        "steps": [*WHOLE, 0, 101], "batch": [*WHOLE, 0, 9],
        "seed": [True, 1.0, "x", None, -1, 2**64, [0], float("nan")],
        "width": [*WHOLE, 63, 65, 1040], "height": [0, 48, 100, 4096], "cfg": [*REAL, 0.5, 21],
        "timestep_shift": [*REAL, 0.0], "cfg_start": [*REAL, 1.01], "cfg_end": [*REAL, -0.1],
        "low_memory": [1, 0, None, "yes", "no", 1.0, [], {}, float("nan"), -1], "reuse": [*REAL, 0.31],
        "solver": ["heun", "", None, 1, True, "EULER", ["euler"], "auto", "dpm", 0.0],
        "cfg_renorm": ["all", None, 1, "Global", "", True, [], 0, "auto", {}],
        "size": ["1x1", "", None, 768, "768x768", True, [], "1:1", "8K", "4:3"],
        "prompt": [None, 1, ["a"], b"a", True, 1.0, {}, (), float("nan"), object()]},
    "LanceKitTextToVideo": {"frames": [*WHOLE, 0, 1, 4, 6, 7, 8, 122], "fps": [*WHOLE, 0, -5, 61, float("inf"), 12.5]},
    "LanceKitImageToVideo": {"image": PICTURES, "frames": [0, 1, 6]},
    "LanceKitImageEdit": {"image": PICTURES, "resolution": ["image_1024res", "video_480p", "", None, 768, True, [], "1",
                                                            {}, "auto "]},
    "LanceKitVideoEdit": {"source_fps": [*REAL, 0], "max_frames": [*WHOLE, 1, 6, 125], "fps": [0, -5, float("nan")],
                          "frames": PICTURES[1:], "keep_length": [1, "no", 0.0],
                          "video": ["a.mp4", 1, b"", torch.zeros(5, 4, 4, 3), [], {}, True, object(), Path("a"), 0.5]},
    "LanceKitImageUnderstanding": {
        "max_new_tokens": [*WHOLE, 0, -1, 15, 2049], "temperature": [*REAL, 2.5, -0.1], "top_p": [*REAL, 0, 2, 1.1],
        "image": PICTURES, "question": [None, 1], "system": [None, 1]},
    "LanceKitVideoUnderstanding": {"max_new_tokens": [0, -1, 10**9], "temperature": [float("nan"), -1],
                                   "top_p": [0, 2]},
}


@pytest.mark.parametrize(("node_id", "name", "value"), [
    pytest.param(node_id, name, value, id=f"{node_id.removeprefix('LanceKit')}-{name}-{index}")
    for node_id, inputs in WRONG.items() for name, values in inputs.items() for index, value in enumerate(values)])
def test_an_input_that_cannot_be_is_one_line_before_anything_runs(monkeypatch, node_id, name, value):
    """As the HTTP API may bring it, which holds no widget to its range; absent optional ones are None."""
    (node,) = [node for node in table.NODES if node.id == node_id]
    if value is None and {entry.name: entry.optional for entry in node.inputs}[name]:
        value = 0.5
    model = handle.LanceModel(types.SimpleNamespace(keep_loaded=True))
    monkeypatch.setattr(handle.LanceModel, "require", lambda *_: pytest.fail("went on"))
    given = defaults(node_id) | {"size": "custom"} if "size" in defaults(node_id) else defaults(node_id)
    if node_id in ("LanceKitImageToVideo", "LanceKitImageEdit", "LanceKitImageUnderstanding"):
        given["image"] = torch.zeros(1, 4, 4, 3)
    with pytest.raises(PackError) as caught:
        getattr(nodes, node.run)(model, **given | {name: value})
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{node.title}: ")
    label = {entry.name: entry.label for entry in node.inputs}[name]
    assert f": {label} " in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [None, "auto", 1, object(), {}, [], True, torch.zeros(1), Path("x"), b""])
def test_what_is_no_model_is_named(value):
    with pytest.raises(PackError, match="is no Lance model: connect Lance Model Loader"):
        checks.require(table.NODES[1], {"model": value})


@pytest.mark.parametrize(("start", "end", "cfg", "refused"), [(0.8, 0.4, 4.0, True), (0.5, 0.5, 4.0, True),
                                                             (1.0, 0.0, 1.0, False), (0.4, 1.0, 4.0, False)])
def test_guidance_that_no_step_would_have_is_refused(start, end, cfg, refused):
    given = {"cfg_start": start, "cfg_end": end, "cfg": cfg}
    if refused:
        with pytest.raises(PackError, match="must be below guidance up to t .* set guidance .cfg. to 1"):
            checks.require(table.NODES[1], given)
    else:
        checks.require(table.NODES[1], given)


def test_custom_sizes_count_for_size_custom_alone():
    checks.require(table.NODES[1], {"size": "auto", "width": 7, "height": -1})


@pytest.mark.parametrize("settings", [{"device": "cuda:77"}, {"device": "gpu"}, {"kernel": "fast"}, {"mode": "on"},
                                      {"offload": "cpu"}, {"keep_loaded": 1}, {"vae_tiling": None}, {"device": 0},
                                      {"loras": 1}, {"flavor": "Lance"}, {"precision": "int4"}])
def test_a_loaders_settings_are_checked_as_well(comfy, settings):
    with pytest.raises(PackError, match="^Lance Model Loader: "):
        load(**settings)


def test_missing_parts_are_said_before_the_first_step_and_taken_up_once_they_are_there(comfy):
    """Queued again after the download, the loader runs again: its fingerprint covers the parts."""
    settings = {"flavor": "auto", "precision": "auto", "checkpoint": "auto"}
    folder = comfy.root / "lance" / "alone"
    shutil.copytree(GOLDENS / "checkpoint" / "Lance_3B", folder)
    model, info = load()
    assert "not found: ViT, VAE" in info
    picture, before = torch.zeros(1, 64, 64, 3), nodes.model_fingerprint(**settings)
    comfy.progress.clear()
    for run, what in ((lambda: draw(model), "VAE"),
                      (lambda: nodes.image_edit(model, picture, **defaults("LanceKitImageEdit")), "ViT"),
                      (lambda: nodes.image_understanding(model, picture, **defaults("LanceKitImageUnderstanding")),
                       "ViT")):
        with pytest.raises(PackError, match=f"has no {what} beside it.*Download it .4.2 GB.*Wan2.2_VAE.pth"):
            run()
    assert comfy.progress == []
    shutil.copy(GOLDENS / "checkpoint" / "Wan2.2_VAE.pth", folder)
    with_vae = nodes.model_fingerprint(**settings)
    shutil.copytree(GOLDENS / "checkpoint" / "Qwen2.5-VL-ViT", comfy.root / "lance" / "Qwen2.5-VL-ViT")
    assert len({before, with_vae, nodes.model_fingerprint(**settings)}) == 3
    again, info = load()
    assert again is not model and "not found" not in info and draw(again).shape == (1, 64, 96, 3)


def test_a_download_that_was_cut_off_is_passed_over_by_auto_and_named_by_name(comfy, caplog):
    fake(comfy.root / "lance" / "a", precision="awq_int4")
    fake(comfy.root / "lance" / "b")
    weights = comfy.root / "lance" / "a" / "awq_state_dict.safetensors"
    norm = {"dtype": "BF16", "shape": [2048], "data_offsets": [0, 4096]}
    header = json.dumps({"language_model.model.norm.weight": norm})
    weights.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4095))
    with caplog.at_level("WARNING", logger="lance"):
        assert models.choose("auto", "auto", "auto", blackwell=False).found.label == "b"
    assert "was cut off" in caplog.text and str(weights) in caplog.text
    with pytest.raises(PackError, match="its download was cut off. Download it again"):
        models.choose("auto", "auto", "a", blackwell=False)
    weights.write_bytes(weights.read_bytes() + b"x")
    models._is_whole.cache_clear()
    assert models.choose("auto", "auto", "auto", blackwell=False).found.label == "a"


@pytest.mark.parametrize(("memory", "taken"), [(8 * 10**9, "nvfp4"), (24 * 10**9, "nvfp4"), (40 * 10**9, "bf16"),
                                               (None, "bf16")])
def test_auto_takes_bf16_last_where_it_does_not_fit(comfy, memory, taken):
    fake(comfy.root / "lance" / "a")
    fake(comfy.root / "lance" / "b", precision="nvfp4")
    choice = models.choose("auto", "auto", "auto", blackwell=False, memory=memory)
    assert choice.found.precision == taken and ("does not fit" in choice.reason) == (taken == "nvfp4")


def test_a_precision_that_lance_nano_does_not_have_is_named(comfy):
    with pytest.raises(PackError, match="lance-nano comes in bf16 alone, and precision says awq_int4: set precision"):
        models.choose("lance_nano", "awq_int4", "auto", blackwell=False)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What nodes tell the user that is no error."""
    found: list[str] = []
    monkeypatch.setattr(host, "say", found.append)
    return found


def test_the_loader_says_that_it_took_a_toy(comfy, monkeypatch, said):
    monkeypatch.setattr(toolkit, "nano", lambda: ROOT / toolkit.NANO)
    load(flavor="lance_nano")
    assert said == [], "it was asked for"
    load()
    assert len(said) == 1
    assert said[0].startswith("no Lance is installed, so this is a toy. To get Lance_3B (8.5 GB): hf")


def test_say_shows_on_the_node_where_comfyui_can(comfy, monkeypatch, caplog):
    shown = []
    server = types.SimpleNamespace(instance=types.SimpleNamespace(send_progress_text=lambda *told: shown.append(told)))
    for name, content in {"comfy_execution": {}, "server": {"PromptServer": server}, "comfy_execution.utils": {
            "get_executing_context": lambda: types.SimpleNamespace(node_id="7")}}.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    host.say("a toy")
    assert shown == [("a toy", "7")]
    monkeypatch.setitem(sys.modules, "server", types.ModuleType("server"))
    with caplog.at_level("WARNING", logger="lance"):
        host.say("older")
    assert "older" in caplog.text and len(shown) == 1


def test_an_edited_clip_lasts_as_long_as_its_source_and_keeps_its_sound(tiny, said):
    """20 frames at 24 a second, of which every second is seen: 9 frames at 12, one frame short of the source."""
    components = types.SimpleNamespace(images=torch.rand(20, 32, 32, 3), frame_rate=24.0, audio="sound")
    source = types.SimpleNamespace(get_components=lambda: components)
    edit = defaults("LanceKitVideoEdit") | {"steps": 1, "resolution": "image_112res", "fps": 30}
    clip, frames, _ = nodes.video_edit(tiny, **edit, video=source)
    assert len(frames) == 9 and clip.audio == "sound"
    assert float(len(frames) / clip.frame_rate) == pytest.approx(20 / 24, abs=2 / 24) and said == []
    clip, frames, _ = nodes.video_edit(tiny, **edit | {"max_frames": 5}, video=source)
    assert len(frames) == 5 and float(5 / clip.frame_rate) == pytest.approx(20 / 24, abs=5 / 24)
    clip, _, _ = nodes.video_edit(tiny, **edit | {"keep_length": False}, video=source)
    assert (clip.frame_rate, clip.audio) == (30, None) and "The sound is left out" in said[0]


@pytest.mark.parametrize("rate", [0.0, -5.0, float("nan"), float("inf")])
def test_a_video_without_a_rate_is_refused(tiny, rate):
    components = types.SimpleNamespace(images=torch.rand(9, 32, 32, 3), frame_rate=rate, audio=None)
    with pytest.raises(PackError, match="frames per second: connect one with a rate"):
        nodes.video_understanding(tiny, **defaults("LanceKitVideoUnderstanding"),
                                  video=types.SimpleNamespace(get_components=lambda: components))


def test_pictures_that_a_clip_does_not_begin_with_are_mentioned(tiny, said):
    nodes.image_to_video(tiny, torch.rand(3, 64, 64, 3), **defaults("LanceKitImageToVideo") | {
        "frames": 5, "steps": 1, "resolution": "image_112res"})
    assert said == ["The clip begins with the first of 3 pictures; the others are not looked at."]


def test_the_toolkits_flags_are_inputs_here(tiny, monkeypatch):
    def refuse(*_, **__):
        raise InputError("no compiler: take --kernel auto")

    monkeypatch.setattr(handle.LanceModel, "ready", refuse)
    with pytest.raises(PackError, match="^no compiler: take kernel auto$"):
        draw(tiny)


def imported(folder: Path) -> types.ModuleType:
    """A custom node as ComfyUI imports it: by its path, under its path's name."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def forget(folder: Path) -> None:
    prefix = str(folder).replace(".", "_x_")
    for name in [name for name in sys.modules if name.startswith(prefix)]:
        del sys.modules[name]


def test_a_clone_of_the_repository_is_a_custom_node(comfy, tmp_path):
    """What "Install via Git URL" makes."""
    folder = tmp_path / "custom_nodes" / "lance-quant"
    folder.parent.mkdir()
    folder.symlink_to(ROOT, target_is_directory=True)
    try:
        module = imported(folder)
        assert list(module.NODE_CLASS_MAPPINGS) == list(CLASSES)
        assert list(module.NODE_DISPLAY_NAME_MAPPINGS) == list(TITLES)
        assert (folder / module.WEB_DIRECTORY / "docs").is_dir()
        cloned = sys.modules[f"{module.__name__}.comfyui.toolkit"]
        assert cloned.home() == ROOT and cloned.nano() == ROOT / toolkit.NANO
    finally:
        forget(folder)


def test_the_folder_of_the_nodes_alone_says_that_the_toolkit_is_missing(comfy, tmp_path, monkeypatch):
    """And not that some model is."""
    folder = tmp_path / "custom_nodes" / "lance"
    shutil.copytree(PACK, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.delitem(sys.modules, "lance_quant")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == "lance_quant" else found(name, *rest))
    try:
        module = imported(folder)
        loader = module.NODE_CLASS_MAPPINGS["LanceKitModelLoader"]
        assert loader.VALIDATE_INPUTS("auto", "auto", "auto") is True
        with pytest.raises(ValueError, match="The lance_quant package is missing. In a checkout of lance-quant run"):
            loader.load_model(**defaults("LanceKitModelLoader"))
    finally:
        forget(folder)


# Memory

def test_equal_loaders_share_weights_and_dropped_outputs_free_them(comfy, tiny):
    import gc
    import weakref

    again, _ = load()
    assert again is tiny
    other, _ = load(mode="cached")
    assert other is not tiny
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None


def test_unload_frees_the_weights_and_the_next_run_brings_them_back(comfy, tiny):
    before = draw(tiny)
    assert len(comfy.loaded) == 2
    (passed,) = nodes.unload(tiny, before)
    assert passed is before and comfy.loaded == [] and tiny._pipeline is None
    torch.testing.assert_close(draw(tiny), before, rtol=0, atol=0)


def test_offload_after_use_leaves_nothing_on_the_device(comfy, tiny):
    plain = draw(tiny)
    tiny.release()
    model, _ = load(offload="after_use", vae_tiling=True)
    assert draw(model).shape == plain.shape and comfy.loaded == []
    assert model._pipeline is not None and model._pipeline.vae_tiling


def test_without_keep_loaded_every_node_cleans_up_also_after_an_error(comfy, tiny):
    model, _ = load(keep_loaded=False)
    draw(model)
    assert model._pipeline is None and comfy.loaded == []
    with pytest.raises(PackError):
        draw(model, prompt="")
    assert model._pipeline is None


@pytest.mark.parametrize(("folder", "precision"), [("int4_g32", "awq_int4"), ("nvfp4", "nvfp4")])
def test_published_packed_folders_run_in_both_modes(comfy, tiny, folder, precision):
    shutil.copytree(GOLDENS / "published" / folder, comfy.root / "lance" / "packed")
    small, info = load(checkpoint="packed")
    assert precision in info
    ondemand = draw(small)
    torch.testing.assert_close(ondemand, draw(load(checkpoint="packed", mode="cached")[0]), rtol=0, atol=2 / 255)
    reference, _ = load(checkpoint="packed", kernel="reference")
    torch.testing.assert_close(ondemand, draw(reference), rtol=0, atol=2 / 255)
    assert {part.kernel_choice for part in reference._pipeline.model.modules()
            if hasattr(part, "kernel_choice")} == {"reference"}
    assert not torch.equal(ondemand, draw(tiny))


def test_every_kernel_of_the_toolkit_can_be_chosen():
    (offered,) = [entry.choices for node in table.NODES for entry in node.inputs if entry.name == "kernel"]
    assert offered == KERNEL_CHOICES


# The toolkit, and installing

def test_lower_bounds_are_those_of_the_toolkit():
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    bounds = dict(line.split(",")[0].split(">=") for line in lines if ">=" in line)
    assert {name: bounds[name] for name in toolkit.NEEDED} == toolkit.NEEDED


@pytest.mark.parametrize("found", ["4.57.6", None])
def test_an_old_or_missing_package_is_named_with_the_command(monkeypatch, found):
    monkeypatch.setattr(toolkit, "version_of", lambda package: found if package == "transformers" else "99")
    with pytest.raises(PackError, match='needs transformers 5.17 or newer.* -m pip install "transformers>=5.17"'):
        toolkit.require()


def test_a_missing_toolkit_is_explained(monkeypatch):
    monkeypatch.delitem(sys.modules, "lance_quant")
    monkeypatch.setattr(toolkit, "home", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PackError, match="lance_quant package is missing.*comfyui.install"):
        toolkit.require()


def test_self_check_reports_and_never_fails(comfy, tiny, monkeypatch):
    (report,) = nodes.self_check()["result"]
    assert "some name/Lance_3B: lance_nano, bf16" in report and "transformers: " in report
    assert re.search(r"\n  memory: t2i, 112 x 112: [\d.]+ [MG]B at the peak \(.*\), .* free on cpu: fits\n", report)
    monkeypatch.setattr(host, "device", lambda _: 1 / 0)
    assert "FAILED: division by zero" in nodes.self_check()["result"][0]


def source_lines() -> list[str]:
    """What the self check says of the official source, places renamed by what they are."""
    lines = nodes.self_check()["result"][0].splitlines()
    return lines[[line.startswith("official source: ") for line in lines].index(True):]


def test_self_check_lists_where_the_official_source_was_looked_for(comfy, monkeypatch):
    from lance_quant.official import checkout

    monkeypatch.delenv(checkout.ENV_SOURCE, raising=False)
    monkeypatch.setattr(checkout, "_HOME", comfy.root / "elsewhere" / "pack")
    monkeypatch.chdir(comfy.root)
    first, *places = source_lines()
    assert first == "official source: none, and no node needs it; looked at"
    assert [place.split(":")[0].strip() for place in places] == [
        "1. inside this repository", "2. beside this repository", "3. custom_nodes", "4. ComfyUI folder",
        "5. working directory", "6. working directory"]
    source = comfy.root / "custom_nodes" / "lance"
    for marker in checkout.MARKERS:
        (source / marker).parent.mkdir(parents=True, exist_ok=True)
        (source / marker).touch()
    first, *places = source_lines()
    assert first == f"official source: {source} (custom_nodes); looked at"
    assert len(places) == 3 and places[-1] == f"  3. custom_nodes: {source}: found"
    monkeypatch.setenv(checkout.ENV_SOURCE, str(comfy.root / "wrong"))
    assert source_lines()[1:] == [f"  1. LANCE_SRC_PATH: {comfy.root / 'wrong'}: does not exist"]


@pytest.fixture
def comfyui_folder(tmp_path) -> Path:
    (tmp_path / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    return tmp_path / "ComfyUI"


@pytest.mark.slow
def test_an_installed_copy_needs_nothing_of_the_checkout(comfyui_folder, capsys):
    install.main(["--comfyui_path", str(comfyui_folder)])
    target = comfyui_folder / "custom_nodes" / "lance-quant"
    assert capsys.readouterr().out.strip() == str(target)
    assert not [name for name in ("build.py", "install.py", "__pycache__") if (target / name).exists()]
    program = ("import importlib.util, sys; before = list(sys.path);"
               "spec = importlib.util.spec_from_file_location('pack', sys.argv[1] + '/__init__.py', "
               "submodule_search_locations=[sys.argv[1]]); pack = importlib.util.module_from_spec(spec);"
               "sys.modules['pack'] = pack; spec.loader.exec_module(pack);"
               "from pack import toolkit; toolkit.require(); import lance_quant.lance.runtime, quantized_linear;"
               "assert sys.path == before; print(lance_quant.__file__)")
    done = subprocess.run([sys.executable, "-c", program, str(target)], cwd=comfyui_folder, capture_output=True,
                          text=True, check=True)
    assert done.stdout.strip() == str(target / "runtime" / "lance_quant" / "__init__.py")


def test_installing_never_overwrites_unless_told_to(comfyui_folder):
    target = comfyui_folder / "custom_nodes" / "lance-quant"
    install.main(["--comfyui_path", str(comfyui_folder), "--link"])
    assert target.is_symlink() and target.resolve() == PACK
    with pytest.raises(InputError, match="exists already"):
        install.main(["--comfyui_path", str(comfyui_folder)])
    install.main(["--comfyui_path", str(comfyui_folder), "--update"])
    assert not target.is_symlink() and PACK.is_dir()
    install.main(["--comfyui_path", str(comfyui_folder), "--update"])
    shutil.rmtree(target)
    for name in ("table.py", "runtime/mine.txt"):  # somebody else's folder, which happens to have a file of that name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="exists already"):
        install.main(["--comfyui_path", str(comfyui_folder), "--update"])
    assert (target / "table.py").read_text("utf-8") == "mine"
    with pytest.raises(InputError, match="has no custom_nodes"):
        install.main(["--comfyui_path", str(target)])


def test_a_release_is_one_folder_with_its_licence_and_the_same_bytes_every_time(tmp_path):
    for name in ("one.zip", "two.zip"):
        install.main(["--zip", str(tmp_path / name)])
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        names = set(archive.namelist())
    needed = {"LICENSE", "__init__.py", "pyproject.toml", "example_workflows/lance_text_to_image.json",
              "runtime/quantized_linear.py", "runtime/lance_quant/__init__.py",
              f"runtime/{toolkit.NANO}/model.safetensors"}
    assert {f"lance-quant/{name}" for name in needed} <= names
    assert not [name for name in names if not name.startswith("lance-quant/") or "__pycache__" in name]
    with pytest.raises(InputError, match="exists"):
        install.main(["--zip", str(tmp_path / "one.zip")])
    with pytest.raises(InputError, match="--link makes none"):
        install.main(["--zip", str(tmp_path / "x.zip"), "--link"])


def test_the_documented_install_commands_parse():
    text = (PACK / "README.md").read_text("utf-8") + install.__doc__
    commands = re.findall(r"python -m comfyui\.install ([^`\n]+)", text)
    assert len(commands) >= 4
    for command in commands:
        install.parse_args(shlex.split(command))


def test_the_registry_entry_pins_nothing_that_comfyui_brings():
    text = (PACK / "pyproject.toml").read_text("utf-8")
    (dependencies,) = [line for line in text.splitlines() if line.startswith("dependencies")]
    assert "==" not in dependencies and "<" not in dependencies
    assert not [name for name in ("torch", "transformers", "numpy", "pillow") if name in dependencies]
    assert all(key in text for key in ("PublisherId", "DisplayName", "requires-comfyui", 'name = "lance-quant-nodes"'))


def test_pictures_keep_their_levels():
    levels = torch.arange(256).float() / 255
    image = levels.repeat(3, 1).T.reshape(1, 16, 16, 3)
    (picture,) = nodes._pictures(image)
    assert isinstance(picture, Image.Image)
    torch.testing.assert_close(nodes._image(picture)[None], image, rtol=0, atol=0)


def lora_of(path: Path) -> Path:
    """A LoRA of one linear of the golden model, large enough to change every picture."""
    name = "language_model.model.layers.0.self_attn.o_proj_moe_gen"
    out, width = load_file(GOLDENS / "checkpoint" / "Lance_3B" / "model.safetensors")[f"{name}.weight"].shape
    draw_of = torch.Generator().manual_seed(0)
    save_file({f"diffusion_model.{name}.lora_A.weight": torch.randn(2, width, generator=draw_of),
               f"diffusion_model.{name}.lora_B.weight": torch.randn(out, 2, generator=draw_of)}, path)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_loras_go_on_float_and_packed_models(comfy, tiny, tmp_path, packed):
    where = {}
    if packed:
        shutil.copytree(GOLDENS / "published" / "int4_g64", comfy.root / "lance" / "packed")
        where = {"checkpoint": "packed"}
    plain, _ = load(**where)
    file = lora_of(tmp_path / "style.safetensors")
    changed, _ = load(**where, loras=f"\n{file}:0.5\n")
    none, _ = load(**where, loras=f"{file}:gen=0")
    assert plain is not changed and not torch.equal(draw(plain), draw(changed))
    assert torch.equal(draw(plain), draw(none))


def test_the_loaders_fingerprint_covers_the_loras(comfy, tiny, tmp_path):
    file = lora_of(tmp_path / "style.safetensors")
    before = nodes.model_fingerprint("auto", "auto", "auto", loras=f"{file}:0.5")
    assert before != nodes.model_fingerprint("auto", "auto", "auto", loras=f"{file}:0.6")
    file.write_bytes(file.read_bytes() + b" ")
    assert before != nodes.model_fingerprint("auto", "auto", "auto", loras=f"{file}:0.5")


def test_a_lora_that_is_not_there_is_named(comfy, tiny):
    with pytest.raises(ValueError, match="LoRA not found: nowhere.safetensors"):
        load(loras="nowhere.safetensors:0.5")
