import pytest
import real_keys

from lance_quant.errors import InputError
from lance_quant.formats import layout


def test_the_real_model_has_504_linears_half_of_them_gen():
    names = layout.linears(36)
    assert len(set(names)) == 504
    assert sum(layout.expert_of(name) == "gen" for name in names) == 252
    assert {f"{name}.weight" for name in names} <= set(real_keys.shapes("Lance_3B"))


def test_the_two_spellings_of_gen():
    names = layout.linears(1)
    assert "language_model.model.layers.0.self_attn.q_proj_moe_gen" in names
    assert "language_model.model.layers.0.mlp_moe_gen.gate_proj" in names
    assert {layout.kind_of(name) for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj",
                                                        "gate_proj", "up_proj", "down_proj"}


def test_four_groups_of_a_layer_follow_a_norm():
    groups = layout.groups(7)
    assert [len(group.linears) for group in groups] == [3, 3, 2, 2, 1, 1, 1, 1]
    assert [group.norm is not None for group in groups] == [True] * 4 + [False] * 4
    assert groups[1].name == "layers.7.attn_in.gen"
    assert groups[1].norm == "language_model.model.layers.7.input_layernorm_moe_gen"


@pytest.mark.parametrize("model", ["Lance_3B", "Lance_3B_Video"])
def test_the_real_key_tables_pass_the_check(model):
    shapes = real_keys.shapes(model)
    assert layout.require_complete(shapes) == 36
    assert len(shapes) == {"Lance_3B": 1021, "Lance_3B_Video": 1411}[model]


def test_a_missing_tensor_a_gap_and_a_wrong_shape_are_named():
    shapes = real_keys.shapes("Lance_3B")
    name = "language_model.model.layers.3.mlp.up_proj.weight"
    with pytest.raises(InputError, match="layers.3.mlp.up_proj"):
        layout.require_complete({key: shape for key, shape in shapes.items() if key != name})
    with pytest.raises(InputError, match="layers.3.mlp.up_proj"):
        layout.require_complete({**shapes, name: (11008, 2047)})
    for gone in ("vae2llm.weight", "language_model.model.layers.0.self_attn.q_proj.bias",
                 "language_model.model.layers.35.self_attn.k_norm_moe_gen.weight", "language_model.lm_head.weight"):
        with pytest.raises(InputError, match=f"1 tensors are missing from this checkpoint, first .*{gone}"):
            layout.require_complete({key: shape for key, shape in shapes.items() if key != gone})
    with pytest.raises(InputError, match="1 tensors are unknown in this checkpoint, first .*extra"):
        layout.require_complete({**shapes, "extra": (1,)})
    with pytest.raises(InputError, match=r"layers.3.mlp.up_proj.weight \[64, 2048\] instead of \[11008, 2048\]"):
        layout.require_complete({**shapes, name: (64, 2048)})
    with pytest.raises(InputError, match="layer 3 is missing"):
        layout.num_layers([key for key in shapes if ".layers.3." not in key])
    with pytest.raises(InputError, match="no Lance decoder"):
        layout.num_layers(["lm_head.weight"])
