"""The fused decoding step on a card: against its plain form, and inside a CUDA graph."""

import pytest
import torch
from kda_layers import compare, copied, make_layer

from kimi_rl.kernels.kda_step import kda_step, kda_step_reference

pytestmark = pytest.mark.gpu

SIZES = {"heads": 8, "key_dim": 128, "value_dim": 128}


def error_ratio(got, expected):
    return float((got.float() - expected.float()).norm() / expected.float().norm())


LAYOUTS = {"vllm": {"length": 3}, "transformers": {"length": 4}, "slots": {"slots": [7, 2, -1, 0, 9], "states": 11}}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_the_plain_form(layout):
    torch.manual_seed(0)
    inputs, options = make_layer(torch.float32, batch=5, device="cuda", **SIZES, **layout)
    compare(kda_step, inputs, options, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch", [3, 64, 300])
def test_as_vllm_calls_it(batch):
    """A column of a table as slots, the first of them nobody's, three weights, and the output over the gate."""
    torch.manual_seed(batch)
    slots = [0 if row % 5 == 2 else row + 1 for row in range(batch)]
    inputs, options = make_layer(
        torch.bfloat16, batch=batch, slots=slots, states=batch + 2, device="cuda", **SIZES | {"length": 3}
    )
    options["first_slot"], plain, held = 1, copied(inputs), copied(inputs)
    expected = kda_step_reference(*plain, **options)
    table = torch.stack([options["slots"], torch.full_like(options["slots"], 77)], dim=1).int()
    parts = tuple(options["conv_weight"].split([x.shape[-1] for x in inputs[:3]]))
    held[5] = inputs[5].clone()
    o = kda_step(*held, **options | {"slots": table[:, 0], "conv_weight": parts, "out": held[5]})
    assert o is held[5] and not o[options["slots"] == 0].any()
    assert error_ratio(o, expected) < 0.005 and error_ratio(held[7], plain[7]) < 0.005
    assert torch.equal(held[6], plain[6]) and torch.equal(held[7][0], inputs[7][0])


@pytest.mark.parametrize("batch", [1, 64, 256])
def test_bfloat16_inputs_stay_within_flas_bar(batch):
    torch.manual_seed(batch)
    inputs, options = make_layer(torch.bfloat16, batch=batch, device="cuda", **SIZES)
    ours, plain = copied(inputs), copied(inputs)
    assert error_ratio(kda_step(*ours, **options), kda_step_reference(*plain, **options)) < 0.005
    assert error_ratio(ours[7], plain[7]) < 0.005 and torch.equal(ours[6], plain[6])


def test_a_graph_moves_the_same_states():
    inputs, options = make_layer(torch.float32, batch=4, device="cuda", slots=[3, 1, -1, 0], states=4, **SIZES)
    plain, held = copied(inputs), copied(inputs)
    kda_step(*copied(inputs), **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = kda_step(*held, **options)
    for _ in range(3):  # capturing runs nothing
        graph.replay()
        expected = kda_step(*plain, **options)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(held[7], plain[7], rtol=1e-5, atol=1e-5)
