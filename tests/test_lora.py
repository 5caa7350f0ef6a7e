"""LoRA: files of all trainers' forms are read, and a branch beside a float, packed or merged linear adds what it says.

On lance-nano, whose float model with folded weights is what every other way must equal.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CPU
from PIL import Image
from safetensors.torch import load_file, save_file

import merge_lora
from lance_nano import CHECKPOINT, check_lora
from lance_nano.recognise import shows
from lance_nano.scenes import render
from lance_nano.tokenizer import UNDERSTANDING_SYSTEM
from lance_nano.train_lora import new_shape
from lance_quant import Pipeline
from lance_quant.calibration.activation_stats import ActStats, LinearStats, model_fingerprint
from lance_quant.errors import InputError
from lance_quant.formats import channel_scales, layout, lora_file
from lance_quant.formats.int4 import Int4
from lance_quant.formats.lora_file import LoraUse, parse
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.inference import lora
from lance_quant.inference.request import ModelSource, PackedMode
from lance_quant.lance.config import LancePaths
from lance_quant.lance.settings import Sampling
from lance_quant.lance.tokens import understanding_sequence
from lance_quant.methods import convert
from lance_quant.methods.conversion import Conversion
from lance_quant.storage.tensor_file import Checkpoint

WEIGHTS = load_file(CHECKPOINT / "model.safetensors")
LINEARS = [
    *layout.linears(4),
    "vae2llm",
    "llm2vae",
    "time_embedder.mlp.0",
    "time_embedder.mlp.2",
    "language_model.lm_head",
]
SHAPES = {name: tuple(WEIGHTS[f"{name}.weight"].shape) for name in LINEARS}
RANK = 2


def factors(seed=0, linears=LINEARS):
    """Random factors that change every linear by about a tenth of its size."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for name in linears:
        out, width = SHAPES[name]
        a, b = torch.randn(RANK, width, generator=draw), torch.randn(out, RANK, generator=draw)
        made[name] = (a, b * (0.1 * WEIGHTS[f"{name}.weight"].float().norm() / (b @ a).norm()))
    return made


def peft(folder, made, **config):
    folder.mkdir()
    save_file(
        {
            f"base_model.model.{name}.lora_{part}.weight": tensor.contiguous()
            for name, pair in made.items()
            for part, tensor in zip("AB", pair, strict=True)
        },
        folder / lora_file.WEIGHTS,
    )
    (folder / lora_file.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, **config}))
    return folder


def written(path, made, form):
    tensors = {}
    for name, (a, b) in made.items():
        if form == "kohya":
            flat = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {
                f"{flat}.lora_down.weight": a,
                f"{flat}.lora_up.weight": b,
                f"{flat}.alpha": torch.tensor(RANK * 1.0),
            }
        elif form == "comfyui":
            tensors |= {f"diffusion_model.{name}.lora_A.weight": a, f"diffusion_model.{name}.lora_B.weight": b}
        elif form == "default":
            tensors |= {
                f"base_model.model.{name}.lora_A.default.weight": a,
                f"base_model.model.{name}.lora_B.default.weight": b,
            }
        else:
            tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return peft(tmp_path_factory.mktemp("lora") / "a", factors())


def folded(made, und=1.0, gen=1.0):
    """Weights with W + strength * B A."""
    use = LoraUse(CHECKPOINT, und, gen)
    return {
        **WEIGHTS,
        **{
            f"{name}.weight": (WEIGHTS[f"{name}.weight"].float() + use.strength(name) * b @ a)
            for name, (a, b) in made.items()
        },
    }


def float_folder(folder, tensors):
    shutil.copytree(CHECKPOINT.parent, folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / CHECKPOINT.name / "model.safetensors"
    )
    return folder / CHECKPOINT.name


@pytest.fixture(scope="module")
def merged_folder(tmp_path_factory):
    return float_folder(tmp_path_factory.mktemp("merged") / "m", folded(factors()))


def made_by(pipeline):
    """A velocity and an answer's log-probabilities: every linear is in one of them."""
    runtime = pipeline.runtime
    with torch.no_grad():
        denoiser = runtime.denoiser("a red circle", 48, 64, Sampling(), None)
        velocity = denoiser.velocity(denoiser.noise(3), 0.7).float()
        tokens, grid = runtime.look([Image.new("RGB", (112, 112), "red")], "image_112res")
        sequence = understanding_sequence(runtime.tokenizer, "", "What is it?", grid)
        return velocity, runtime.forced_logprobs(sequence, tokens, [5, 9, 40]).float()


def assert_close(found, wanted, tolerance):
    for ours, theirs in zip(found, wanted, strict=True):
        assert ((ours - theirs).norm() / theirs.norm()).item() < tolerance


# Files


@pytest.mark.parametrize("form", ["kohya", "comfyui", "default", "plain", "peft"])
def test_every_trainers_form_is_read_as_the_same_factors(tmp_path, form):
    made = factors()
    path = peft(tmp_path / "p", made) if form == "peft" else written(tmp_path / "l.safetensors", made, form)
    found, unknown = lora_file.load(path, SHAPES)
    assert not unknown and found.keys() == made.keys()
    for name, (a, b) in made.items():
        assert torch.equal(found[name].a, a) and torch.allclose(found[name].b, b)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8}, 4.0),
        ({"lora_alpha": 8, "use_rslora": True}, 8 / RANK**0.5),
        ({"lora_alpha": 1}, 0.5),
        ({"alpha_pattern": {"q_proj": 6}}, 3.0),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 6}}, 3.0),
        ({"alpha_pattern": {"nothing": 6}}, 1.0),
        ({"rank_pattern": {"q_proj": RANK}}, 1.0),
    ],
)
def test_peft_scales_by_alpha_over_rank(tmp_path, config, scale):
    name = layout.linear(0, "und", "q_proj")
    made = factors(linears=[name])
    found, _ = lora_file.load(peft(tmp_path / "p", made, **config), SHAPES)
    assert torch.allclose(found[name].b, scale * made[name][1])


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("x.dora_scale", "DoRA"),
        ("x.lora_magnitude_vector", "DoRA"),
        ("x.hada_w1_a", "LoHa"),
        ("x.lokr_w1", "LoKr"),
        ("x.lokr_w2", "LoKr"),
        ("x.lora_mid.weight", "convolution"),
        ("x.diff", "full difference"),
        ("x.diff_b", "biases"),
        ("x.oft_blocks", "OFT"),
        ("x.lora_embedding_A", "embedding"),
    ],
)
def test_other_adapters_are_named(tmp_path, key, kind):
    save_file({key: torch.ones(2, 2)}, tmp_path / "l.safetensors")
    with pytest.raises(InputError, match=f"{kind}.*only plain LoRA"):
        lora_file.load(tmp_path / "l.safetensors", SHAPES)


def broken(change):
    made = factors(linears=[layout.linear(0, "gen", "o_proj")])
    ((name, (a, b)),) = made.items()
    return change(name, a, b)


@pytest.mark.parametrize(
    "change",
    [
        lambda name, a, b: {},
        lambda name, a, b: {f"{name}.lora_A.weight": a},
        lambda name, a, b: {f"{name}.lora_B.weight": b},
        lambda name, a, b: {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b[:, :1].clone()},
        lambda name, a, b: {f"{name}.lora_A.weight": a[:, 1:].clone(), f"{name}.lora_B.weight": b},
        lambda name, a, b: {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b[1:].clone()},
        lambda name, a, b: {f"{name}.lora_A.weight": a[0].clone(), f"{name}.lora_B.weight": b},
        lambda name, a, b: {f"{name}.lora_A.weight": a[:0].clone(), f"{name}.lora_B.weight": b[:, :0].clone()},
        lambda name, a, b: {f"{name}.lora_A.weight": a * float("nan"), f"{name}.lora_B.weight": b},
        lambda name, a, b: {
            f"{name}.lora_A.weight": a,
            f"{name}.lora_down.weight": a.clone(),
            f"{name}.lora_B.weight": b,
        },
        lambda name, a, b: {"transformer.blocks.0.attn.lora_A.weight": a, "transformer.blocks.0.attn.lora_B.weight": b},
    ],
    ids=range(11),
)
def test_files_that_are_no_lora_of_this_model_get_one_line(tmp_path, change):
    save_file(broken(change), tmp_path / "l.safetensors")
    with pytest.raises(InputError) as error:
        lora_file.load(tmp_path / "l.safetensors", SHAPES)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"r": 0},
        {"fan_in_fan_out": True},
        {"peft_type": "LOHA"},
        {"lora_alpha": "x"},
        {"alpha_pattern": {"(": 1}},
        {"lora_alpha": float("nan")},
        {"rank_pattern": 3},
    ],
)
def test_configurations_that_mean_something_else_are_refused(tmp_path, config):
    with pytest.raises(InputError) as error:
        lora_file.load(peft(tmp_path / "p", factors(linears=LINEARS[:1]), **config), SHAPES)
    assert "\n" not in str(error.value)


def test_keys_that_name_nothing_are_named_and_the_rest_is_taken(tmp_path, caplog):
    made = factors(linears=LINEARS[:2])
    path = written(tmp_path / "l.safetensors", made, "comfyui")
    save_file({**load_file(path), "diffusion_model.visual.blocks.0.qkv.lora_A.weight": torch.ones(2, 2)}, path)
    assert len(lora_file.taken(LoraUse(path), SHAPES)) == 2
    assert "1 of its keys name no linear of this model" in caplog.text and "visual.blocks.0.qkv" in caplog.text


@pytest.mark.parametrize(
    ("text", "path", "und", "gen"),
    [
        ("a.safetensors", "a.safetensors", 1, 1),
        ("a.safetensors:0.8", "a.safetensors", 0.8, 0.8),
        ("a:und=0.5", "a", 0.5, 0),
        ("a:gen=2,und=-1", "a", -1, 2),
        (r"C:\a.safetensors", r"C:\a.safetensors", 1, 1),
        (r"C:\a.safetensors:0.5", r"C:\a.safetensors", 0.5, 0.5),
        ("C:/a", "C:/a", 1, 1),
        ("12:30", "12", 30, 30),
        ("a:b:0.1", "a:b", 0.1, 0.1),
        ("a:x=1", "a:x=1", 1, 1),
    ],
)
def test_strengths_are_read_behind_the_last_colon(text, path, und, gen):
    found = parse(text)
    assert (str(found.path), found.und, found.gen) == (path, und, gen)


@pytest.mark.parametrize("text", ["a:nan", "a:inf", "a:101", "a:-1e9", "a:und=nan", "a:gen=1e5"])
def test_strengths_out_of_range_are_refused(text):
    with pytest.raises(InputError, match="must be a number from -100 to 100"):
        parse(text)


# On models


@pytest.fixture(scope="module")
def packed_folders(tmp_path_factory):
    """4 bits of lance-nano with scales moved everywhere: statistics with a few hot channels."""
    root = tmp_path_factory.mktemp("packed")
    draw = torch.Generator().manual_seed(1)
    linears = {}
    for name in layout.linears(4):
        rms = torch.randn(SHAPES[name][1], generator=draw).mul(1.5).exp()
        linears[name] = LinearStats(rms * 80, rms.square() * 100, rms * 4, 100, 1)
    with Checkpoint(CHECKPOINT) as source:
        run = {"run_id": "made", "task": "t2i", "model": model_fingerprint(source)}
    ActStats(linears, ["t2i"], [run], len(linears)).save(root / "s.pt")
    made = {
        "int4": Conversion(Int4(32)),
        "nvfp4": Conversion(Nvfp4(slim=True)),
        "published": Conversion(Int4(64), "published"),
    }
    for name, conversion in made.items():
        convert.convert(CHECKPOINT, root / "s.pt", root / name, conversion)
    return root


def test_a_float_model_with_a_lora_is_the_folded_one(adapter, merged_folder):
    """Float32 sums in another order, over 4 layers: 1e-5."""
    wanted = made_by(Pipeline.load(merged_folder, device="cpu"))
    assert_close(made_by(Pipeline.load(CHECKPOINT, device="cpu", lora=[str(adapter)])), wanted, 1e-5)
    plain = made_by(Pipeline.load(CHECKPOINT, device="cpu"))
    assert all(
        ((ours - theirs).norm() / theirs.norm()).item() > 0.01 for ours, theirs in zip(plain, wanted, strict=True)
    )


@pytest.mark.parametrize("name", ["int4", "nvfp4", "published"])
@pytest.mark.parametrize("mode", ["ondemand", "cached"])
def test_a_packed_model_with_a_lora_is_its_own_weights_and_the_lora(packed_folders, adapter, tmp_path, name, mode):
    """Its decoded weights, brought back to the float model's channels, with B A folded in, in float32; the kernel that
    runs on packed bytes adds in another order: 1e-5. Published folders need the float norms, and those are there."""
    with PackedFolder(packed_folders / name) as folder:
        scales = lora.scales_of(folder, CHECKPOINT)
        tensors = {key: folder.checkpoint.read(key) for key in WEIGHTS if key in folder.checkpoint.specs}
        for linear in folder.linears:
            weight = folder.codec(linear).dequantize(folder.read_weight(linear)).float()
            column, row = channel_scales.column_of(linear, scales), channel_scales.row_of(linear, scales)
            weight = weight if column is None else weight / column
            tensors[f"{linear}.weight"] = weight if row is None else weight * row[:, None]
            if row is not None and f"{linear}.bias" in tensors:
                tensors[f"{linear}.bias"] = tensors[f"{linear}.bias"].float() * row
    norms = {key: WEIGHTS[key] for key in WEIGHTS if "layernorm" in key}
    made = factors()
    whole = {**{key: tensor.float() for key, tensor in tensors.items()}, **norms}
    whole |= {f"{linear}.weight": whole[f"{linear}.weight"].float() + b @ a for linear, (a, b) in made.items()}
    wanted = made_by(Pipeline.load(float_folder(tmp_path / "f", whole), device="cpu"))
    source = ModelSource(LancePaths.find(CHECKPOINT), CPU, torch.float32, loras=(LoraUse(adapter),))
    with PackedFolder(packed_folders / name) as folder:
        found = made_by(Pipeline(source.load_packed(folder, PackedMode(mode))))
    assert_close(found, wanted, 1e-5)


def test_scales_were_really_moved_in_that_test(packed_folders):
    scales = channel_scales.load(packed_folders / "int4")
    for kind, side in (("v_proj", "row"), ("up_proj", "row"), ("o_proj", "column"), ("down_proj", "column")):
        found = scales[f"{layout.linear(0, 'gen', kind)}.{side}"]
        assert found.max() / found.min() > 2
    norm = scales[f"{layout.groups(0)[0].norm}.column"]
    assert norm.max() / norm.min() > 2


@pytest.mark.parametrize(("und", "gen"), [(1.0, 0.0), (0.0, 1.0), (0.5, -0.5), (0.0, 0.0)])
def test_strengths_are_per_expert(adapter, tmp_path, und, gen):
    wanted = made_by(Pipeline.load(float_folder(tmp_path / "f", folded(factors(), und, gen)), device="cpu"))
    found = made_by(Pipeline.load(CHECKPOINT, device="cpu", lora=[LoraUse(adapter, und, gen)]))
    assert_close(found, wanted, 1e-5)


def test_several_add_up(adapter, tmp_path):
    other = written(tmp_path / "b.safetensors", factors(seed=5, linears=LINEARS[::3]), "kohya")
    tensors = folded(factors())
    for name, (a, b) in factors(seed=5, linears=LINEARS[::3]).items():
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float() + 0.5 * b @ a
    wanted = made_by(Pipeline.load(float_folder(tmp_path / "f", tensors), device="cpu"))
    found = made_by(Pipeline.load(CHECKPOINT, device="cpu", lora=[str(adapter), f"{other}:0.5"]))
    assert_close(found, wanted, 1e-5)


def test_merging_writes_the_folded_weights_in_their_own_dtype(adapter, tmp_path, capsys):
    merge_lora.main(["--src", str(CHECKPOINT), "--lora", f"{adapter}:0.5", "--dry_run"])
    planned = int(capsys.readouterr().out.split()[-1])
    merge_lora.main(["--src", str(CHECKPOINT), "--lora", f"{adapter}:0.5", "--out", str(tmp_path / "out")])
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), folded(factors(), 0.5, 0.5)
    assert found.keys() == WEIGHTS.keys() and (tmp_path / "out" / "llm_config.json").is_file()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == planned
    for name, tensor in found.items():
        assert tensor.dtype == WEIGHTS[name].dtype
        assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name


def test_a_folder_that_does_not_say_what_was_moved_is_refused(packed_folders, adapter, tmp_path):
    shutil.copytree(packed_folders / "int4", tmp_path / "old")
    (tmp_path / "old" / channel_scales.FILE).unlink()
    with pytest.raises(InputError, match="was packed before LoRA could go on it: .* pack it again"):
        Pipeline.load(CHECKPOINT, packed=tmp_path / "old", device="cpu", lora=[str(adapter)])
    shutil.copytree(packed_folders / "published", tmp_path / "published")
    (tmp_path / "published" / channel_scales.FILE).unlink()
    with pytest.raises(InputError, match="has no float weights to tell it from"):
        Pipeline.load(
            tmp_path / "published",
            vit=CHECKPOINT.parent / "Qwen2.5-VL-ViT",
            vae=CHECKPOINT.parent / "Wan2.2_VAE.pth",
            device="cpu",
            lora=[str(adapter)],
        )
    Pipeline.load(CHECKPOINT, packed=tmp_path / "published", device="cpu", lora=[str(adapter)])


@pytest.mark.parametrize("given", ["a.safetensors", [3], [None], 5])
def test_a_lora_is_given_in_a_list(given):
    with pytest.raises((InputError, TypeError)):
        Pipeline.load(CHECKPOINT, device="cpu", lora=given)


def test_a_lora_that_is_not_there_is_named():
    with pytest.raises(InputError, match="LoRA not found: nowhere.safetensors"):
        Pipeline.load(CHECKPOINT, device="cpu", lora=["nowhere.safetensors:0.5"])


# What was trained on lance-nano


@pytest.fixture(scope="module")
def with_rings(tmp_path_factory):
    """Both LoRAs on the float model and on 4 bits rounded plainly, and neither."""
    place = tmp_path_factory.mktemp("rings")
    ActStats({}, ["none"], [{"run_id": "none", "task": "none"}], 0).save(place / "s.pt")
    convert.convert(CHECKPOINT, place / "s.pt", place / "int4", Conversion(Int4()))
    trained = [str(CHECKPOINT.parents[1] / "lora" / f"ring_{expert}.safetensors") for expert in ("gen", "und")]
    return {
        "none": Pipeline.load(CHECKPOINT, device="cpu"),
        "float": Pipeline.load(CHECKPOINT, device="cpu", lora=trained),
        "int4": Pipeline.load(CHECKPOINT, packed=place / "int4", device="cpu", lora=trained),
    }


@pytest.mark.parametrize(("name", "knows"), [("none", False), ("float", True), ("int4", True)])
@pytest.mark.slow
def test_a_new_shape_is_drawn_and_named_with_the_lora_alone(with_rings, name, knows):
    """Of six captions and eight questions that training never saw; python -m lance_nano.check_lora counts more."""
    with new_shape():
        pipeline = with_rings[name]
        drawn = sum(
            shows(scene, np.asarray(pipeline.draw(text, height=112, width=112, seed=index)))
            for index, (scene, text) in enumerate(check_lora.captions(True, 6, 1))
        )
        named = sum(
            pipeline.ask(Image.fromarray(render(scene)), question.text, system=UNDERSTANDING_SYSTEM,
                         resolution="image_112res", max_new_tokens=8) == question.answer
            for scene, question in check_lora.asked(True, 8, 1)
        )
    assert (drawn >= 3 and named >= 4) if knows else (drawn == named == 0), (drawn, named)
