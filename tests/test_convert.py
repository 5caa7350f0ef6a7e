import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import real_keys
import torch
from safetensors.torch import load_file, save_file

from lance_quant.calibration.activation_stats import ActStats
from lance_quant.cpu import rounding
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.formats.packed_folder import PackedFolder
from lance_quant.methods import convert, plan
from lance_quant.methods.conversion import Conversion
from lance_quant.storage.tensor_file import Checkpoint, TensorFileWriter, file_size

GOLDENS = Path(__file__).parent / "goldens"
MODEL = GOLDENS / "checkpoint" / "Lance_3B"
STATS = GOLDENS / "published" / "act_stats.pt"
CPU = torch.device("cpu")
CODECS = [Int4(64), Int4(32), Nvfp4(), Nvfp4(slim=True)]
codecs = pytest.mark.parametrize("codec", CODECS, ids=str)
GIGA = 10**9


def run(out, codec=Int4(64), stats=None, src=MODEL, recipe="ours"):  # noqa: B008 - frozen
    stats = ActStats.load(STATS) if stats is None else stats
    with Checkpoint(src) as source:
        return convert.quantize_checkpoint(source, stats, out, Conversion(codec, recipe, progress=False))


@codecs
def test_the_dry_run_promises_the_bytes_that_a_run_writes(tmp_path, codec):
    promised = int(plan.dry_run(MODEL, Conversion(codec)).splitlines()[-1].removeprefix("output_bytes: "))
    report = run(tmp_path / "out", codec)
    assert promised == report.nbytes == (tmp_path / "out" / codec.state_file).stat().st_size


@pytest.mark.parametrize("codec, model, size", [
    (Int4(64), "Lance_3B", 4_307_195_656), (Int4(64), "Lance_3B_Video", 6_147_924_272),
    (Int4(128), "Lance_3B", 4_177_139_320), (Int4(128), "Lance_3B_Video", 6_017_867_936),
    (Nvfp4(), "Lance_3B", 5_087_538_712), (Nvfp4(), "Lance_3B_Video", 6_928_267_328),
], ids=str)
def test_the_real_key_tables_land_on_the_published_sizes(tmp_path, codec, model, size):
    path = real_keys.write_headers_only(tmp_path, model)
    # To a few bytes: the order of the tensors decides how many digits their offsets have.
    assert abs(path.stat().st_size - real_keys.SOURCE_BYTES[model]) < 5000
    assert plan.dry_run(path, Conversion(codec)).splitlines()[-1] == f"output_bytes: {size}"


@pytest.mark.parametrize("model, limit", [("Lance_3B", 4.40 * GIGA), ("Lance_3B_Video", 6.24 * GIGA)])
def test_slim_saves_a_bit_per_weight(tmp_path, model, limit):
    with Checkpoint(real_keys.write_headers_only(tmp_path, model)) as source:
        assert file_size(plan.plan(source.specs, Nvfp4(slim=True))) <= limit


def decibel(w, back):
    return 10 * torch.log10(w.square().sum() / (w - back).square().sum())


def products(read, norm, layer, expert):
    """What scales leave alone: norm-fed weights times their norm, o_proj after v_proj, down_proj after up_proj."""
    def weight(kind):
        return read(layout.linear(layer, expert, kind))

    fed = {name: group.norm for group in layout.groups(layer) if group.norm for name in group.linears}
    for kind in ("q_proj", "k_proj", "gate_proj"):
        yield kind, weight(kind) * norm(fed[layout.linear(layer, expert, kind)])
    v, up = (weight(kind) * norm(fed[layout.linear(layer, expert, kind)]) for kind in ("v_proj", "up_proj"))
    o = weight("o_proj")
    width = norm(layout.head_norm(layer, expert)).shape[0]
    shared = o.shape[1] // v.shape[0]
    yield "v_proj o_proj", o @ v.unflatten(0, (-1, width)).repeat_interleave(shared, 0).flatten(0, 1)
    yield "up_proj down_proj", weight("down_proj") @ up


@codecs
def test_the_folder_opens_and_its_weights_are_the_models(tmp_path, codec):
    """4 bits leave about 20 dB: 17 dB is asked of the weakest linear, and 14 of two in a row."""
    run(tmp_path / "out", codec)
    original, written = load_file(MODEL / "model.safetensors"), load_file(tmp_path / "out" / codec.state_file)
    with PackedFolder(tmp_path / "out") as folder:
        for layer, expert in ((layer, expert) for layer in range(3) for expert in layout.EXPERTS):
            wanted = products(lambda name: original[f"{name}.weight"], lambda name: original[f"{name}.weight"],
                              layer, expert)
            packed = products(lambda name: folder.codec(name).dequantize(folder.read_weight(name)),
                              lambda name: written[f"{name}.weight"].float(), layer, expert)
            for (name, w), (_, back) in zip(wanted, packed, strict=True):
                assert decibel(w, back) > (14 if " " in name else 17), (layer, expert, name)


def test_everything_else_is_copied_in_bf16(tmp_path):
    run(tmp_path / "out")
    original, written = load_file(MODEL / "model.safetensors"), load_file(tmp_path / "out" / Int4.state_file)
    norms = {f"{group.norm}.weight" for layer in range(3) for group in layout.groups(layer)}
    biases = {f"{layout.linear(layer, expert, 'v_proj')}.bias" for layer in range(3) for expert in layout.EXPERTS}
    rest = [name for name in original if name in written and name not in norms | biases]
    assert len(rest) == 97 - 42 - 12 - 6 and layout.IGNORED in rest
    assert all(torch.equal(written[name], original[name].bfloat16()) for name in rest)


def test_the_meta_says_where_everything_comes_from(tmp_path):
    report = run(tmp_path / "out")
    meta = json.loads((tmp_path / "out" / Int4.meta_file).read_text())
    golden = json.loads((GOLDENS / "published" / "int4_g64" / Int4.meta_file).read_text())
    for key in golden.keys() - {"per_weight", "awq_linears", "plain_linears"}:
        assert meta[key] == golden[key]
    for name, entry in golden["per_weight"].items():
        ours = meta["per_weight"][name]
        assert {key: ours[key] for key in entry} == entry | {"scheme": "asym_int4_grouped_awq"}
        assert ours["error_after"] < 0.02 and ours["rounding"] == "searched"
    assert (meta["recipe"], len(meta["source_fingerprint"]), meta["without_statistics"]) == ("ours", 64, [])
    assert meta["calibration_runs"][0]["run_id"].startswith("content-")
    assert (report.searched, report.plain) == (42, 0)


@codecs
def test_every_linear_is_better_than_plainly_rounded(tmp_path, codec):
    run(tmp_path / "out", codec)
    entries = json.loads((tmp_path / "out" / codec.meta_file).read_text())["per_weight"]
    assert all(0 < entry["error_after"] < entry["error_before"] for entry in entries.values())
    assert {entry["candidate"] for entry in entries.values()} != {"s=1"}
    assert all(entry["alpha"] == (0.0 if entry["candidate"] == "s=1" else float(entry["candidate"][4:8]))
               for entry in entries.values())


def test_values_share_their_scale_between_the_experts(tmp_path):
    """Written biases tell the scale that was divided out; bfloat16 is exact to 2^-9."""
    run(tmp_path / "out")
    original, written = load_file(MODEL / "model.safetensors"), load_file(tmp_path / "out" / Int4.state_file)
    names = [f"{layout.linear(1, expert, 'v_proj')}.bias" for expert in layout.EXPERTS]
    und, gen = (original[name] / written[name].float() for name in names)
    torch.testing.assert_close(und, gen, rtol=2**-7, atol=0)
    assert und.max() > 1.2 * und.min()


def test_nvfp4_groups_share_a_global_scale_and_slim_means_the_same(tmp_path):
    run(tmp_path / "full", Nvfp4()), run(tmp_path / "slim", Nvfp4(slim=True))
    with PackedFolder(tmp_path / "full") as full, PackedFolder(tmp_path / "slim") as slim:
        for group in layout.groups(1):
            assert len({full.linears[name].global_scale for name in group.linears}) == 1
            for name in group.linears:
                a, b = (one.codec(name).dequantize(one.read_weight(name)) for one in (full, slim))
                assert torch.equal(a, b)


@codecs
def test_linears_without_statistics_are_rounded_plainly_and_named(tmp_path, codec, caplog):
    und_only = ActStats.load(GOLDENS / "published" / "x2t_image_stats.pt")
    with caplog.at_level(logging.WARNING, "lance_quant"):
        report = run(tmp_path / "out", codec, und_only)
    assert len(report.without_statistics) == 21 and report.searched == 21
    assert "21 of 42 linears have no statistics" in caplog.text
    meta = json.loads((tmp_path / "out" / codec.meta_file).read_text())
    assert len(meta["without_statistics"]) == 21 and meta["awq_linears"] == 21 and meta["plain_linears"] == 21
    gen = meta["per_weight"][f"{layout.groups(0)[1].linears[0]}.weight"]
    assert gen["scheme"] in ("asym_int4_grouped_no_awq", "nvfp4_minmax") and gen["candidate"] == "s=1"


def test_a_run_gives_the_same_bytes_twice(tmp_path):
    run(tmp_path / "a"), run(tmp_path / "b")
    assert (tmp_path / "a" / Int4.state_file).read_bytes() == (tmp_path / "b" / Int4.state_file).read_bytes()


@codecs
@pytest.mark.slow
def test_the_number_of_threads_changes_nothing(tmp_path, monkeypatch, codec):
    monkeypatch.setattr("lance_quant.formats.blocks._CPU_ROWS", 16)
    monkeypatch.setattr("lance_quant.formats.blocks._CPU_BLOCK", 16 * 64)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            run(tmp_path / str(threads), codec)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for file in (codec.state_file, codec.meta_file):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "3" / file).read_bytes()


@codecs
@pytest.mark.skipif(rounding.unavailable() is not None, reason=f"rounding: {rounding.unavailable()}")
@pytest.mark.slow
def test_files_do_not_depend_on_a_compiler(tmp_path, monkeypatch, codec):
    run(tmp_path / "with", codec)
    monkeypatch.setattr(rounding, "_library_or_reason", lambda: (None, "there is no C compiler; install gcc"))
    run(tmp_path / "without", codec)
    for file in (codec.state_file, codec.meta_file):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()


def test_bf16_and_sharded_sources_are_accepted(tmp_path):
    tensors = {name: t.bfloat16() for name, t in load_file(MODEL / "model.safetensors").items()}
    names = sorted(tensors)
    parts = {"a.safetensors": names[:40], "b.safetensors": names[40:]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run(tmp_path / "out", src=tmp_path).searched == 42


def damaged(tmp_path, change):
    tensors = {name: t.clone() for name, t in load_file(MODEL / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("recipe", ["ours", "published"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_by_name_and_leave_nothing(tmp_path, bad, recipe):
    name = layout.groups(1)[3].linears[1] + ".weight"
    src = damaged(tmp_path, lambda tensors: tensors[name][3].fill_(bad))
    with pytest.raises(InputError, match=f"{name} holds NaN or Inf"):
        run(tmp_path / "out", src=src, recipe=recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_zero_rows_and_zero_norms_convert(tmp_path):
    """A matrix that is zero but for one row: all zeros are a broken download, and refused."""
    group = layout.groups(0)[0]

    def zero(tensors):
        tensors[f"{group.norm}.weight"].zero_()
        tensors[f"{group.linears[0]}.weight"][1:] = 0

    src = damaged(tmp_path, zero)
    for index, codec in enumerate(CODECS):
        run(tmp_path / f"out{index}", codec, src=src)
        with PackedFolder(tmp_path / f"out{index}") as folder:
            name = group.linears[0]
            assert (folder.codec(name).dequantize(folder.read_weight(name))[1:] == 0).all()


def test_statistics_of_another_model_and_packed_or_partial_sources_are_refused(tmp_path):
    stats = ActStats.load(STATS)
    alien = replace(stats, runs=[{**stats.runs[0], "model": "0" * 64}])
    with pytest.raises(InputError, match="another model"):
        run(tmp_path / "out", stats=alien)
    with pytest.raises(InputError, match="packed already"):
        run(tmp_path / "out", src=GOLDENS / "published" / "int4_g64" / Int4.state_file)
    name = layout.groups(2)[7].linears[0] + ".weight"
    with pytest.raises(InputError, match=name):
        run(tmp_path / "out", src=damaged(tmp_path, lambda tensors: tensors.pop(name)))
    with pytest.raises(InputError, match="group size 48 does not divide the 64 inputs of"):
        run(tmp_path / "out2", Int4(48))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out2").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_a_full_disk_or_an_interrupt_in_the_middle_leaves_nothing(tmp_path, monkeypatch, error):
    write, count = TensorFileWriter.write_pieces, iter(range(1000))

    def failing(self, name, pieces):
        if next(count) == 50:
            raise error
        write(self, name, pieces)

    monkeypatch.setattr(TensorFileWriter, "write_pieces", failing)
    with pytest.raises(type(error)):
        run(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_one_log_line_per_group(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lance_quant"):
        run(tmp_path / "out")
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("layers.")]
    assert len(lines) == 24 and lines[0].startswith("layers.0.attn_in.und") and " dB " in lines[0]
