"""Cutting a config and placing tensors: what could end up open that must not, or cut in the wrong place."""

import pytest
from transformers import BertConfig, GPT2Config, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from semiopen.errors import UnsupportedModelError
from semiopen.model.plan import plan_for
from semiopen.model.split import Part, config_from_dict, split_config
from tests.models import FAMILIES, random_model


@pytest.mark.parametrize("prefix", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_blocks_norm_and_head_are_open(family, prefix):
    config = FAMILIES[family]
    split = split_config(config, prefix)
    for name, _ in random_model(config).state_dict().items():
        placement = split.place(name)
        opened = placement.part is Part.OPEN
        above = any(f"{split.family.layers}.{block}." in name for block in range(prefix, 4))
        top = split.family.norm in name.split(".") or "lm_head" in name
        assert opened <= (above or top), name
        if split.family.embedding in name and split.tied:
            assert placement == type(placement)(Part.TIED, "lm_head.weight")


def test_sealing_a_tied_embedding_alone_is_refused():
    with pytest.raises(UnsupportedModelError, match="would seal nothing; give --prefix 1"):
        split_config(FAMILIES["llama-tied"], 0)
    assert split_config(FAMILIES["llama"], 0).place("model.embed_tokens.weight").part is Part.SEALED


def test_open_blocks_are_numbered_from_zero():
    split = split_config(FAMILIES["llama"], 3)
    assert split.place("model.layers.3.mlp.up_proj.weight").open_name == "model.layers.0.mlp.up_proj.weight"
    assert split.place("layers.3.mlp.up_proj.weight").open_name == "layers.0.mlp.up_proj.weight"  # base model's names


@pytest.mark.parametrize(
    "name", ["model.layers.0.extra", "model.layers.1.mlp.up_proj.weight", "model.layers.02.mlp.up_proj.weight"]
)
def test_whatever_a_sealed_block_holds_is_sealed(name):
    assert split_config(FAMILIES["llama"], 3).place(name).part is Part.SEALED


@pytest.mark.parametrize(
    "name", ["model.secret", "model.embed_tokens.bias", "value_head.weight", "model.layers.4.x", ""]
)
def test_a_tensor_that_is_not_known_is_refused_not_opened(name):
    with pytest.raises(UnsupportedModelError):
        split_config(FAMILIES["llama"], 1).place(name)


def test_layer_types_are_cut_with_the_blocks():
    config = Qwen2Config(num_hidden_layers=6, use_sliding_window=True, max_window_layers=3, sliding_window=8)
    split = split_config(config, 2)
    assert split.prefix_config.layer_types == ["full_attention"] * 2
    assert split.host_config.layer_types == ["full_attention"] + ["sliding_attention"] * 3
    assert config_from_dict(split.host_config.to_dict()).layer_types == split.host_config.layer_types


def test_experts_stay_in_their_blocks():
    config = Qwen3MoeConfig(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])  # experts in 1 and 5
    split = split_config(config, 3)
    assert split.prefix_config.mlp_only_layers == [0, 2]
    assert split.host_config.mlp_only_layers == [0, 1]
    assert split.host_config.decoder_sparse_step == 1


def test_the_given_config_is_left_alone():
    config = LlamaConfig(num_hidden_layers=4, tie_word_embeddings=True)
    before = config.to_dict()
    split_config(config, 1)
    assert config.to_dict() == before


ROPE = {"rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BertConfig(), "Model type 'bert' cannot be sealed"),
        (GPT2Config(scale_attn_by_inverse_layer_idx=True), "absolute number"),
        (GPT2Config(add_cross_attention=True), "decoder-only"),
        (LlamaConfig(rope_parameters={**ROPE, "rope_type": "dynamic"}), "'dynamic' cannot be split"),
        (LlamaConfig(quantization_config={"quant_method": "awq"}), "quantised"),
    ],
)
def test_what_cannot_be_split_exactly_is_refused(config, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        split_config(config, 1)


def test_plan_from_prefix_or_preset():
    assert plan_for(32, None, None).prefix == 4
    assert plan_for(4, None, "bottom").prefix == 1
    assert plan_for(4, None, "embedding").prefix == 0
    assert plan_for(4, None, "whole").prefix == 4
    assert plan_for(4, 3, None).prefix == 3
    for prefix, preset in [(5, None), (-1, None), (1, "bottom"), (None, "nothing")]:
        with pytest.raises(ValueError, match=r"Give|out of range|unknown"):
            plan_for(4, prefix, preset)
