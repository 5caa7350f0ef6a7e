import math

import pytest

from lance_quant.formats.int4 import Int4
from lance_quant.formats.nvfp4 import Nvfp4
from lance_quant.methods.quantized_group import QuantizedGroup, QuantizedLinear, RoundingFacts


def group(*linears, scaling="searched", global_scale=0.25, label="act^0.45", alpha=0.45):
    return QuantizedGroup(linears, scaling, global_scale, label, alpha, 2.0)


GPTQ = RoundingFacts("gptq", 512, None, 0.02, 0.002, 7.0)


def test_entries_hold_the_format_the_scale_the_errors_and_how_it_was_rounded_in_that_order():
    first, second = group(QuantizedLinear({}, 0.1, 0.01, GPTQ), QuantizedLinear({}, 0.2, 0.0)).entries(
        [Nvfp4(), Nvfp4()], [(4, 16), (8, 16)])
    assert list(first.items()) == [
        ("shape", [4, 16]), ("block_size", 16), ("scheme", "nvfp4_awq"), ("global_scale", 0.25),
        ("candidate", "act^0.45"), ("alpha", 0.45), ("error_before", 0.1), ("error_after", 0.01),
        ("rounding", "gptq"), ("gram_tokens", 512), ("held_nearest", 0.02), ("held_after", 0.002),
        ("outlier_ratio", 7.0)]
    assert second["error_after"] == 0.0 and "rounding" not in second


def test_a_linear_without_a_codec_is_entered_as_bfloat16():
    (entry,) = group(QuantizedLinear({}, 0.1, 0.0, RoundingFacts("bfloat16"))).entries([None], [(4, 16)])
    assert entry == {"n_bit": 16, "scheme": "bfloat16", "shape": [4, 16], "candidate": "act^0.45", "alpha": 0.45,
                     "error_before": 0.1, "error_after": 0.0, "rounding": "bfloat16"}


def test_a_recipe_that_measures_nothing_enters_the_published_fields_only():
    done = group(QuantizedLinear({}), scaling="plain", global_scale=None, label="no scale", alpha=0.0)
    assert list(done.entries([Int4(16)], [(4, 16)])) == [
        {"shape": [4, 16], "n_bit": 4, "group_size": 16, "scheme": "asym_int4_grouped_minmax"}]
    assert str(done) == "no scale  2.0 s"


@pytest.mark.parametrize("linears, parts", [
    ([QuantizedLinear({}, 0.1, 0.001, GPTQ)], ["act^0.45", "10.0 ->  30.0 dB", "gptq", "17.0 ->  27.0 dB"]),
    ([QuantizedLinear({}, 0.1, 0.1, RoundingFacts("nearest")), QuantizedLinear({}, 0.3, 0.1, GPTQ)],
     [" 7.0 ->  10.0 dB", "gptq/nearest"]),
    ([QuantizedLinear({}, 0.0, 0.0, RoundingFacts("searched"))], [f"{math.inf:5.1f} -> {math.inf:5.1f} dB"]),
])
def test_the_log_line_averages_errors_before_it_takes_decibels(linears, parts):
    """Means of 0.1 and 0.3 are 7.0 dB; 0.02 and 0.002 on held-back tokens are 17 and 27 dB."""
    assert all(part in str(group(*linears)) for part in parts)
