import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.kernels import quantized_linear
from lance_quant.kernels.quantized_linear import WQLinearINT4, WQLinearNVFP4, swap_linears
from lance_quant.methods import convert
from lance_quant.methods.conversion import Conversion

GOLDENS = Path(__file__).parent / "goldens"
CPU = torch.device("cpu")
Q, DOWN = layout.groups(0)[0].linears[0], layout.groups(0)[6].linears[0]
SHAPES = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64),
          "gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}


def toy(device="meta"):
    """Modules of the golden model, by their checkpoint names."""
    root = nn.Module()
    for name in layout.linears(3):
        *parents, last = name.split(".")
        here = root
        for part in parents:
            if not hasattr(here, part):
                here.add_module(part, nn.Module())
            here = getattr(here, part)
        n_out, n_in = SHAPES[layout.kind_of(name)]
        here.add_module(last, nn.Linear(n_in, n_out, layout.kind_of(name) in ("q_proj", "k_proj", "v_proj"), device))
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    for name, codec in (("int4", Int4(32)), ("nvfp4", Nvfp4()), ("slim", Nvfp4(slim=True))):
        convert.convert(GOLDENS / "checkpoint" / "Lance_3B", GOLDENS / "published" / "act_stats.pt", root / name,
                        Conversion(codec))
    return {"published_int4": GOLDENS / "published" / "int4_g64", "published_nvfp4": GOLDENS / "published" / "nvfp4",
            **{name: root / name for name in ("int4", "nvfp4", "slim")}}


NAMES = ["published_int4", "published_nvfp4", "int4", "nvfp4", "slim"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["ondemand", "cached"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_swapped_layer_is_a_linear_over_the_dequantized_weight(folders, name, mode, dtype):
    model = toy()
    with PackedFolder(folders[name]) as folder:
        swapped = swap_linears(model, folder, dtype, CPU, mode, "reference")
        expected = {site: folder.codec(site).dequantize(folder.read_weight(site)).to(dtype) for site in (Q, DOWN)}
        bias = folder.checkpoint.read(f"{Q}.bias", dtype)
    assert swapped == list(folder.linears) and len(swapped) == 42
    assert not [key for key, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    for site, own_bias in ((Q, bias), (DOWN, None)):
        layer = model.get_submodule(site)
        x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(layer(x), F.linear(x, expected[site], own_bias))
        assert torch.equal(layer.dequantize().to(dtype), expected[site])


def test_slim_and_published_nvfp4_compute_the_same(folders):
    models = {name: toy() for name in ("nvfp4", "slim")}
    for name, model in models.items():
        swap_linears(model, folders[name], torch.float32, CPU)
    assert torch.equal(*(model.get_submodule(Q).dequantize() for model in models.values()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["ondemand", "cached"])
def test_file_keys_account_for_every_tensor_of_the_linears(folders, name, mode):
    model = toy()
    swap_linears(model, folders[name], torch.bfloat16, CPU, mode)
    claimed = set().union(*(part.file_keys(prefix) for prefix, part in model.named_modules()
                            if hasattr(part, "file_keys")))
    file = set(load_file(next(folders[name].glob("*.safetensors"))))
    assert claimed <= file
    assert not [key for key in file - claimed if key.rpartition(".")[0] in set(layout.linears(3))]


def bytes_of(module):
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


@pytest.mark.parametrize("name", NAMES)
def test_neither_mode_holds_more_than_an_unquantized_layer(folders, name):
    plain = toy("cpu").bfloat16()
    for mode, share in (("ondemand", 0.4), ("cached", 1.0)):
        model = toy()
        swap_linears(model, folders[name], torch.bfloat16, CPU, mode)
        assert bytes_of(model) <= share * bytes_of(plain)


@pytest.mark.parametrize("layer", [
    lambda **kw: WQLinearINT4(64, 32, 32, **kw), lambda **kw: WQLinearNVFP4(64, 32, **kw),
    lambda **kw: WQLinearNVFP4(64, 32, slim=True, **kw),
], ids=["int4", "nvfp4", "slim"])
def test_a_layer_on_meta_costs_nothing_and_names_its_buffers_as_the_file(layer):
    made = layer(dtype=torch.bfloat16, device="meta")
    assert all(t.is_meta for t in made.buffers())
    codec = made.codec
    assert set(made.state_dict()) == (set(codec.specs((32, 64))) | {"bias"}) - {"scales_fp8"}
    assert "out_features=32" in repr(made) and "ondemand" in repr(made)
    with pytest.raises(ValueError, match="mode 'fused'"):
        layer(dtype=torch.bfloat16, mode="fused")


@pytest.mark.parametrize("name", ["int4", "nvfp4", "slim"])
def test_casting_the_model_does_not_touch_the_scales(folders, name):
    model = toy()
    swap_linears(model, folders[name], torch.float32, CPU)
    before = model.get_submodule(Q).dequantize()
    after = copy.deepcopy(model).to(torch.float16).to("cpu")
    assert torch.equal(after.get_submodule(Q).dequantize(), before)
    assert after.get_submodule(Q).bias.dtype == torch.float32


@pytest.mark.parametrize("change, message", [
    (lambda model: delattr(model.language_model.model.layers, "0"), "14 linears.*layers.0.* is not in the model"),
    (lambda model: setattr(model.get_submodule(Q.rpartition(".")[0]), "q_proj", nn.Linear(64, 65)),
     r"q_proj is \[65, 64\] in the model and \[64, 64\] in the file"),
    (lambda model: setattr(model.get_submodule(Q.rpartition(".")[0]), "q_proj", nn.Linear(64, 64, bias=False)),
     "q_proj has a bias in the file, unlike the model"),
    (lambda model: setattr(model.get_submodule(Q.rpartition(".")[0]), "q_proj", nn.Identity()), "q_proj is a Identity"),
])
def test_a_model_that_does_not_fit_is_refused_and_left_alone(folders, change, message):
    model = toy()
    change(model)
    with pytest.raises(InputError, match=message):
        swap_linears(model, folders["int4"], torch.float32, CPU)
    assert not [part for part in model.modules() if isinstance(part, WQLinearINT4)]


def test_group_sizes_may_differ_and_a_linear_may_stay_in_bf16(tmp_path):
    from test_packed_folder import Int4 as codec
    from test_packed_folder import edit, folder_of

    def tensors(state):
        for suffix in ("scales", "zeros"):
            state[f"{Q}.{suffix}"] = state[f"{Q}.{suffix}"].repeat_interleave(2, 1)
            del state[f"{DOWN}.{suffix}"]
        del state[f"{DOWN}.qweight"]
        state[f"{DOWN}.weight"] = torch.zeros(64, 128, dtype=torch.bfloat16)

    def meta(described):
        described["per_weight"][f"{Q}.weight"]["group_size"] = 32
        del described["per_weight"][f"{DOWN}.weight"]

    model, whole = toy(), toy()
    swap_linears(model, edit(folder_of(tmp_path), codec, tensors, meta), torch.float32, CPU)
    swap_linears(whole, GOLDENS / "published" / "int4_g64", torch.float32, CPU)
    assert isinstance(model.get_submodule(DOWN), nn.Linear) and model.get_submodule(DOWN).weight.is_meta
    assert torch.equal(model.get_submodule(Q).dequantize(), whole.get_submodule(Q).dequantize())


def test_a_kernel_that_cannot_run_is_refused_before_anything_is_replaced(folders):
    model = toy()
    with pytest.raises(InputError, match="kernel triton cannot run .* on cpu: it runs on CUDA"):
        swap_linears(model, folders["int4"], torch.float32, CPU, kernel="triton")
    assert not [part for part in model.modules() if isinstance(part, WQLinearINT4)]


def test_a_later_weight_whose_scales_tensor_cores_cannot_take_is_refused_when_it_is_read(folders, monkeypatch):
    monkeypatch.setattr(quantized_linear, "require_kernel", lambda *_: None)
    with pytest.raises(InputError, match="kernel nvfp4_w4a4 cannot run this weight"):
        swap_linears(toy(), folders["published_nvfp4"], torch.float32, CPU, kernel="nvfp4_w4a4")


def test_a_file_whose_scales_tensor_cores_cannot_take_is_refused_before_anything_is_replaced(folders):
    with pytest.raises(InputError, match=f"nvfp4: {layout.linears(3)[0]}: kernel nvfp4_w4a4 cannot run this weight: .*"
                                         "scales are not E4M3 times a power of two.*take --kernel auto"):
        swap_linears(model := toy(), folders["published_nvfp4"], torch.float32, CPU, kernel="nvfp4_w4a4")
    assert not [part for part in model.modules() if isinstance(part, WQLinearNVFP4)]
    for name in ("nvfp4", "slim"):
        model = toy()
        swap_linears(model, folders[name], torch.float32, CPU, kernel="nvfp4_w4a4")
        assert model.get_submodule(Q).kernel().name == "nvfp4_w4a4"
    swap_linears(toy(), folders["published_nvfp4"], torch.float32, CPU, "cached", "nvfp4_w4a4")
