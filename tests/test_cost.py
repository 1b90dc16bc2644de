"""Costs by configuration, against the published model's figures."""

import pytest
from transformers import KimiLinearConfig

from kimi_rl.model.cost import sequence_bytes, token_flops
from kimi_rl.model.presets import build_config, describe
from kimi_rl.recipe import ModelSection


def preset(**fields):
    return build_config(ModelSection(**fields), vocab_size=512, bos_token_id=1, eos_token_id=2, pad_token_id=3)


def released(layer_types) -> KimiLinearConfig:
    """The attention of the released 48B model, whose defaults transformers' class has."""
    return KimiLinearConfig(num_hidden_layers=len(layer_types), layer_types=layer_types)


def test_the_released_model():
    full = {4, 8, 12, 16, 20, 24, 27}
    hybrid = released(["full_attention" if i in full else "linear_attention" for i in range(1, 28)])
    mla = released(["full_attention"] * 27)
    # 8,064 and 31,104 bytes a token; 41.9 MB of state and 1.5 MB of convolution inputs.
    assert sequence_bytes(hybrid, 1).kv == 8064 and sequence_bytes(mla, 1).kv == 31104
    assert sequence_bytes(hybrid, 1).state == 41_943_040 and sequence_bytes(hybrid, 1).conv == 1_474_560
    assert sequence_bytes(mla, 1).state == sequence_bytes(mla, 1).conv == 0


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_three_to_one_keeps_a_quarter_of_the_kv_cache(size):
    length = 131072
    hybrid, mla = (sequence_bytes(preset(arch=arch, size=size), length) for arch in ("hybrid", "mla"))
    assert hybrid.kv == mla.kv / 4
    assert hybrid.total < 0.3 * mla.total
    assert sequence_bytes(preset(size=size), 10).state == sequence_bytes(preset(size=size), length).state


def test_state_and_conv_by_hand():
    # tiny: 3 KDA layers of 4 heads x 32; state 4 x 32 x 32 floats, conv 3 inputs of 3 x 128 values.
    found = sequence_bytes(preset(size="tiny"), 100, cache_bytes=4)
    assert found.state == 3 * 4 * 32 * 32 * 4 and found.conv == 3 * 3 * 3 * 128 * 4
    assert found.kv == 100 * (64 + 16) * 4
    assert found.total == found.state + found.conv + found.kv


def test_flops_by_hand():
    mla, hybrid = preset(arch="mla", size="tiny"), preset(size="tiny")
    used = describe(mla)["active"] - 512 * 128
    assert token_flops(mla, 1000).weights == 2 * used
    assert token_flops(mla, 1000).mixing == 4 * 4 * 1000 * (48 + 32)  # layers, heads, T, d_qk + d_v
    one_kda = 4 * (6 * 32**2 + 3 * 64 * 32 + 64**2)
    assert token_flops(hybrid, 1000).mixing == 3 * one_kda + 4 * 1000 * (48 + 32)
    assert token_flops(mla, 10).training == 3 * token_flops(mla, 10).forward


def test_experts_that_a_token_does_not_use_cost_nothing():
    moe = preset(size="tiny", mlp="moe")
    assert token_flops(moe, 10).weights == 2 * (describe(moe)["active"] - 512 * 128)
    assert describe(moe)["active"] < describe(moe)["total"]
