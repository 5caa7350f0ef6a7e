import itertools
import json
import math
import random
import shutil

import pytest
import torch
from conftest import CPU, GOLDENS
from safetensors.torch import load_file
from test_apply_cli import fails
from test_packed_folder import edit
from test_resume import contents

import awq_apply
from lance_quant.calibration.activation_stats import ActStats
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.int4 import Int4
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.lance.cache import allocate
from lance_quant.lance.config import LancePaths
from lance_quant.lance.runtime import Runtime
from lance_quant.methods import bit_allocation, convert, layer, plan, quant_report
from lance_quant.methods.bit_allocation import Option
from lance_quant.methods.conversion import Conversion
from lance_quant.storage.tensor_file import Checkpoint
from quantized_linear import swap_linears

SRC = GOLDENS / "checkpoint" / "Lance_3B"
STATS = GOLDENS / "published" / "act_stats.pt"
# Of the golden model only down_proj is 128 wide; the others start at group size 64.
LEAST = 4.3334


def total(chosen):
    return sum(option.nbytes for option in chosen.values())


def distortion(chosen):
    return sum(option.distortion for option in chosen.values())


def test_what_is_larger_and_no_better_or_beaten_by_a_mixture_is_not_on_the_hull():
    a, b, c, d = Option(128, 10, 8.0), Option(64, 12, 6.0), Option(32, 16, 1.0), Option(None, 60, 0.0)
    # 1 per byte from a to b, but 7/6 from a to c: b is never the best for its size.
    assert bit_allocation.hull([d, b, a, c]) == [a, c, d]
    assert bit_allocation.hull([a, Option(64, 12, 8.0)]) == [a] and bit_allocation.hull([a]) == [a]


OPTIONS = {"small": [Option(128, 10, 9.0), Option(64, 12, 5.0), Option(32, 16, 3.0)],  # gains 2 and 0.5 per byte
           "large": [Option(128, 100, 9.0), Option(64, 110, 4.0)]}  # 0.5 per byte too


@pytest.mark.parametrize("nbytes, sizes", [
    (110, {"small": 128, "large": 128}), (111, {"small": 128, "large": 128}), (112, {"small": 64, "large": 128}),
    (121, {"small": 32, "large": 128}), (122, {"small": 64, "large": 64}), (126, {"small": 32, "large": 64}),
    (999, {"small": 32, "large": 64}),
])
def test_allocations_by_hand(nbytes, sizes):
    """Most distortion per byte first, of equals the first name; a step that does not fit leaves room for less."""
    chosen = bit_allocation.allocate(OPTIONS, nbytes)
    assert {name: option.group_size for name, option in chosen.items()} == sizes and total(chosen) <= nbytes


def test_too_few_bytes_are_refused():
    with pytest.raises(ValueError, match="take 110 bytes, more than 109"):
        bit_allocation.allocate(OPTIONS, 109)


def test_against_every_combination():
    """Never over the budget; the best there is where steps in order end at it; elsewhere within one step of it."""
    draw = random.Random(0)
    for _ in range(30):
        options = {str(name): [Option(128, 10, draw.uniform(2, 9)),
                               Option(64, draw.randint(12, 20), draw.uniform(1, 5)),
                               Option(32, draw.randint(22, 40), draw.uniform(0, 1))] for name in range(4)}
        combinations = [dict(zip(options, found, strict=True)) for found in itertools.product(*options.values())]
        for nbytes in range(40, 161, 7):
            chosen = bit_allocation.allocate(options, nbytes)
            best = min(distortion(found) for found in combinations if total(found) <= nbytes)
            assert total(chosen) <= nbytes
            largest_step = max(old.distortion - new.distortion for found in options.values()
                               for old, new in itertools.pairwise(bit_allocation.hull(found)))
            assert distortion(chosen) <= best + largest_step
        steps = sorted((step for found in options.values() for step in itertools.pairwise(bit_allocation.hull(found))),
                       key=lambda step: -bit_allocation.gain(*step))
        nbytes = 40
        for old, new in steps:
            nbytes += new.nbytes - old.nbytes
            best = min(distortion(found) for found in combinations if total(found) <= nbytes)
            assert distortion(bit_allocation.allocate(options, nbytes)) == pytest.approx(best, abs=1e-12)


def test_sizes_are_those_of_the_codec_and_of_bfloat16():
    assert bit_allocation.options_of((16, 256)) == [(128, 16 * 128 + 16 * 2 * 3), (64, 16 * 128 + 16 * 4 * 3),
                                            (32, 16 * 128 + 16 * 8 * 3), (None, 16 * 256 * 2)]
    assert [size for size, _ in bit_allocation.options_of((16, 96))] == [32, None]


def test_a_budget_below_the_minimum_names_one_that_is_accepted():
    shapes = {"a": (16, 256), "b": (8, 96)}
    least = 8 * sum(bit_allocation.options_of(shape)[0][1] for shape in shapes.values()) / (16 * 256 + 8 * 96)
    for bits in (0, -1, 4, least - 1e-4, math.nan, -math.inf):
        with pytest.raises(InputError, match=rf"smallest choice for this model takes {least:.3f}"):
            bit_allocation.limit(shapes, bits)
    bit_allocation.limit(shapes, math.ceil(1e4 * least) / 1e4)
    assert bit_allocation.limit(shapes, 8) == 16 * 256 + 8 * 96
    for bits in (16, math.inf):  # a packed folder lists a packed linear
        with pytest.raises(InputError, match="every linear would stay in bfloat16"):
            bit_allocation.limit(shapes, bits)


def run(out, bits, resume=False):
    return convert.convert(SRC, STATS, out, Conversion(Int4(64), bits_budget=bits, resume=resume))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Some linears in bfloat16."""
    out = tmp_path_factory.mktemp("budget") / "out"
    run(out, 6.0)
    return out


@pytest.mark.parametrize("bits", [LEAST, 4.6, 15.9])
def test_the_dry_run_promises_the_bytes_and_the_budget_holds(tmp_path, bits):
    text = plan.dry_run(SRC, Conversion(Int4(64), bits_budget=bits), STATS).splitlines()
    report = run(tmp_path / "out", bits)
    file = tmp_path / "out" / Int4.state_file
    assert int(text[-1].removeprefix("output_bytes: ")) == report.nbytes == file.stat().st_size
    with PackedFolder(tmp_path / "out") as folder:
        assert folder.bits_per_weight == report.bits_per_weight <= bits
        assert len(folder.linears) + len(folder.kept) == 42 and len(folder.kept) == report.kept
        stored = sum(spec.nbytes for name, spec in folder.checkpoint.specs.items()
                     if name.rpartition(".")[0] in {*layout.linears(3)} and not name.endswith("bias"))
        weights = sum(math.prod(shape) for shape in (*(spec.shape for spec in folder.linears.values()),
                                                     *folder.kept.values()))
        assert folder.bits_per_weight == 8 * stored / weights


def test_a_larger_budget_never_distorts_more():
    with Checkpoint(SRC) as source:
        stats = ActStats.load(STATS)
        found = {}
        for index in range(3):
            weights = {name: source.read(name, torch.float32) for name in layout.of_layer(source.specs, index)}
            found |= bit_allocation.measure(index, weights, stats, Int4(64), None)
    assert list(found) == [name for index in range(3) for group in layout.groups(index) for name in group.linears]
    for options in found.values():  # finer groups, less distortion; bfloat16 next to none
        distortions = [option.distortion for option in options]
        assert distortions == sorted(distortions, reverse=True) and distortions[-1] < 1e-5 < distortions[0] < 0.1
    least = sum(options[0].nbytes for options in found.values())
    distortions = [distortion(bit_allocation.allocate(found, least + extra)) for extra in range(0, 400_000, 20_000)]
    assert distortions == sorted(distortions, reverse=True) and distortions[0] > distortions[-1]


def test_small_budgets_mix_group_sizes_and_large_ones_keep_bfloat16(tmp_path, mixed):
    run(tmp_path / "out", 4.4)
    small, large = (json.loads((folder / Int4.meta_file).read_text()) for folder in (tmp_path / "out", mixed))
    assert {entry["group_size"] for entry in small["per_weight"].values()} == {32, 64, 128} and "kept_bf16" not in small
    assert small["bits_budget"] == 4.4 and large["bits_budget"] == 6.0
    assert small["harm"] == large["harm"] == "relative output error"
    assert large["kept_bf16"] and not large["kept_bf16"].keys() & large["per_weight"].keys()
    runs_as_the_weights_it_means(tmp_path / "out")
    runs_as_the_weights_it_means(mixed)


@torch.no_grad()
def runs_as_the_weights_it_means(mixed):
    paths, written = LancePaths.find(SRC), load_file(mixed / Int4.state_file)
    with PackedFolder(mixed) as folder:
        packed = Runtime.load(paths, CPU, torch.float32, folder.checkpoint.path,
                               lambda model: swap_linears(model, folder, torch.float32, CPU))
        written |= {f"{name}.weight": folder.codec(name).dequantize(folder.read_weight(name))
                    for name in folder.linears}
    plain = Runtime.load(paths, CPU, torch.float32)
    plain.model.load_state_dict({name: written[name].float() for name in plain.model.state_dict()})
    ids, outputs = torch.arange(12), []
    for model in (packed.model, plain.model):
        outputs.append(model.read(model.embed(ids), ids.expand(3, -1), allocate(model.config, [12], model.dtype, CPU),
                                  True))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_the_report_shows_the_group_size_of_every_linear(mixed):
    page = (mixed / quant_report.FILE).read_text()
    meta = json.loads((mixed / Int4.meta_file).read_text())
    assert "inputs per scale" in page
    # Said twice in a row: as its size and as its rounding.
    assert page.count('<td data-key="bfloat16">bfloat16</td>') == 2 * len(meta["kept_bf16"])
    for size in (32, 64, 128):
        listed = sum(entry["group_size"] == size for entry in meta["per_weight"].values())
        assert page.count(f'<td data-key="{size}" class="n">{size}</td>') == listed
    assert "bits budget" in page


def test_an_interrupted_job_goes_on_without_measuring_again_and_ends_the_same(tmp_path, monkeypatch, mixed):
    quantize = layer.quantize_layer

    def stops(index, *args, **kwargs):
        if index == 1:
            raise KeyboardInterrupt
        return quantize(index, *args, **kwargs)

    monkeypatch.setattr(layer, "quantize_layer", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", 6.0, resume=True)
    monkeypatch.setattr(layer, "quantize_layer", quantize)
    for bits in (4.7, None):
        with pytest.raises(InputError, match="job with another bits_budget"):
            run(tmp_path / "out", bits, resume=True)
    monkeypatch.setattr(bit_allocation, "measure", lambda *_: pytest.fail("measured again"))
    run(tmp_path / "out", 6.0, resume=True)
    assert contents(tmp_path / "out") == contents(mixed)


def test_the_budget_on_the_command_line(tmp_path, capsys):
    rest = ["--src", SRC, "--out", tmp_path / "out", "--device", "cpu"]
    stats = ["--stats", STATS]
    for flags, message in (
        ([*stats, "--bits_budget", "4"], "takes 4.3334"),
        ([*stats, "--bits_budget", "0"], "takes 4.3334"),
        ([*stats, "--bits_budget", "4.6", "--recipe", "published"], "--bits_budget is not part of the published"),
        (["--bits_budget", "4.6", "--dry_run"], "needs --stats"),
        ([*stats, "--bits_budget", "4", "--dry_run"], "takes 4.3334"),
    ):
        assert message in fails(capsys, awq_apply, [*rest, *flags]), flags
    assert not list(tmp_path.iterdir())
    awq_apply.main([str(word) for word in [*rest, *stats, "--bits_budget", "4.6", "--dry_run"]])
    lines = capsys.readouterr().out.splitlines()
    awq_apply.main([str(word) for word in [*rest, *stats, "--bits_budget", "4.6"]])
    assert lines[-1] == f"output_bytes: {(tmp_path / 'out' / Int4.state_file).stat().st_size}"
    assert any(line.startswith("down_proj ") and "g" in line for line in lines)


@pytest.mark.parametrize("tensors, meta, message", [
    (lambda state, name: state.pop(name), lambda described, name: None, "weight is missing"),
    (lambda state, name: state.update({name: state[name].float()}), lambda described, name: None, "is float32"),
    (lambda state, name: None, lambda described, name: described["kept_bf16"].update({"x.weight": {"shape": [1]}}),
     r"has kept_bf16.x.weight.shape \[1\]"),
    (lambda state, name: None, lambda described, name: described["per_weight"].update(
        {name: {**described["kept_bf16"][name], "n_bit": 4, "group_size": 64, "scheme": Int4.SCHEMES["searched"]}}),
     "as packed and in kept_bf16"),
])
def test_what_the_meta_says_of_bf16_linears_is_checked(mixed, tmp_path, tensors, meta, message):
    copied = shutil.copytree(mixed, tmp_path / "copy")
    with PackedFolder(copied) as folder:
        name = f"{next(iter(folder.kept))}.weight"
    with pytest.raises(InputError, match=message):
        PackedFolder(edit(copied, Int4, lambda state: tensors(state, name), lambda described: meta(described, name)))


