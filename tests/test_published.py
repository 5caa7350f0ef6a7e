import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.methods import convert, published
from lance_quant.methods.conversion import Conversion

GOLDENS = Path(__file__).parent / "goldens"
CASES = [("int4_g64", Int4(64)), ("int4_g32", Int4(32)), ("nvfp4", Nvfp4())]


@pytest.mark.parametrize("name, codec", CASES, ids=[name for name, _ in CASES])
def test_the_published_recipe_writes_the_published_tensors(tmp_path, name, codec):
    stats = GOLDENS / "published" / "act_stats.pt"
    model = GOLDENS / "checkpoint" / "Lance_3B"
    convert.convert(model, stats, tmp_path / "out", Conversion(codec, "published"))
    ours = load_file(tmp_path / "out" / codec.state_file)
    theirs = load_file(GOLDENS / "published" / name / codec.state_file)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if ours[key].dtype != theirs[key].dtype] == []
    assert [key for key in ours if not torch.equal(ours[key].view(torch.uint8), theirs[key].view(torch.uint8))] == []
    meta = json.loads((tmp_path / "out" / codec.meta_file).read_text())
    golden = json.loads((GOLDENS / "published" / name / codec.meta_file).read_text())
    assert {key: meta[key] for key in golden} == golden


@pytest.mark.parametrize("codec", [Int4(16), Nvfp4()], ids=lambda codec: codec.name)
def test_without_statistics_there_is_no_scale(codec):
    assert published.search([torch.ones(4, 16)], [], codec) is None
    assert published.search([torch.ones(4, 16)], [torch.zeros(16)], codec) is None


def test_the_index_is_an_argmin_over_eight_distances():
    ratio = torch.cat([torch.linspace(-7, 7, 3001), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])])
    distance = (ratio.abs()[:, None] - torch.tensor(published.MAGNITUDES)).abs()
    assert torch.equal(published._index(ratio).long(), distance.argmin(-1))
