import pytest

from lance_quant.errors import InputError
from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.methods.conversion import Conversion


@pytest.mark.parametrize("asked, message", [
    ({"codec": Nvfp4(), "bits_budget": 5.0}, "a bits budget chooses INT4 group sizes, and nvfp4 has one"),
    ({"codec": Nvfp4(slim=True), "recipe": "published"}, "--slim is not part of the published layout"),
    ({"codec": Int4(), "recipe": "published", "bits_budget": 5.0}, "--bits_budget is not part of the published recipe"),
    ({"codec": Int4(), "recipe": "published", "head_bits": 8}, "--head_bits 8 is not part of the published recipe"),
])
def test_what_does_not_go_together_is_refused_before_any_file_is_opened(asked, message):
    with pytest.raises(InputError, match=message):
        Conversion(**asked)


@pytest.mark.parametrize("asked, from_captures, sizes", [
    ({}, True, {}), ({"head_bits": 8}, False, {"head_bits": 8}),
    ({"bits_budget": 5.0}, False, {"bits_budget": 5.0, "harm": "relative output error"}),
    ({"bits_budget": 5.0, "head_bits": 8}, True, {"bits_budget": 5.0, "harm": "captures", "head_bits": 8}),
])
def test_the_meta_names_only_sizes_that_were_asked_for(asked, from_captures, sizes):
    assert Conversion(Int4(), **asked).sizes(from_captures) == sizes
