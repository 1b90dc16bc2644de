"""The fused decoding step: its plain form against the parts the model runs, its Triton form against the plain one."""


import pytest
import torch
from kda_layers import copied, make_layer
from triton_interpreter import interpreted

from kimi_rl.kernels.kda_decode import kda_decode
from kimi_rl.kernels.kda_gate import kda_gate
from kimi_rl.kernels.kda_step import kda_step
from kimi_rl.kernels.short_conv import short_conv


@pytest.mark.parametrize("length", [3, 4, 6])
def test_the_parts_one_after_another_give_the_same(length):
    inputs, options = make_layer(torch.float64, length=length)
    q, k, v, raw_g, raw_beta, out_gate, conv_state, state = copied(inputs)
    before = conv_state.clone()
    o = kda_step(*inputs, **options)

    qkv = torch.cat([q, k, v], dim=-1)
    mixed, tail = short_conv(
        qkv.unsqueeze(1), options["conv_weight"], initial_state=before[..., -3:], output_final_state=True
    )
    parts = mixed.squeeze(1).split([16, 16, 12], dim=-1)
    q, k, v = (x.unflatten(-1, (2, -1)) for x in parts)
    g = kda_gate(raw_g, options["A_log"], options["dt_bias"])
    expected, new_state = kda_decode(q, k, v, g, raw_beta.sigmoid(), state.transpose(-1, -2))
    normed = torch.nn.functional.rms_norm(expected, (6,), options["norm_weight"], options["eps"])
    expected = normed * out_gate.unflatten(-1, (2, 6)).sigmoid()
    torch.testing.assert_close(o, expected.flatten(1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inputs[7], new_state.transpose(-1, -2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inputs[6][..., -3:], tail, rtol=0, atol=0)
    assert torch.equal(inputs[6][..., :-1], before[..., 1:])


def test_rows_find_their_slots_and_skipped_rows_change_nothing():
    inputs, options = make_layer(torch.float64, batch=4, states=6, slots=[5, -1, 0, 3])
    before = [x.clone() for x in inputs[6:]]
    o = kda_step(*inputs, **options)
    assert torch.equal(o[1], torch.zeros_like(o[1])) and (o[[0, 2, 3]] != 0).any(dim=1).all()
    for now, then in zip(inputs[6:], before, strict=True):
        changed = (now != then).flatten(1).any(dim=1)
        assert changed.tolist() == [True, False, False, True, False, True]
    alone, options_alone = [x[2:3] for x in inputs[:6]], {**options, "slots": None}
    again = kda_step(*alone, *(x[:1] for x in before), **options_alone)
    torch.testing.assert_close(again, o[2:3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slots", [[5, 0, 2, 0], [0, 0, 0, 0]], ids=["some", "none"])
def test_rows_below_the_first_slot_are_skipped_and_the_gates_place_may_be_the_outputs(slots):
    inputs, options = make_layer(torch.float64, batch=4, states=6, slots=slots)
    before = [x.clone() for x in inputs[6:]]
    plain = copied(inputs)
    expected = kda_step(*plain, **options | {"slots": options["slots"] - 1 + (options["slots"] > 0)})
    parts = options["conv_weight"].split([16, 16, 12])
    o = kda_step(*inputs, **options | {"first_slot": 1, "out": inputs[5], "conv_weight": tuple(parts)})
    assert o is inputs[5] and torch.equal(o, expected)
    assert (o != 0).any(dim=1).tolist() == [slot > 0 for slot in slots]
    for now, then, same in zip(inputs[6:], before, plain[6:], strict=True):
        assert torch.equal(now, same)
        assert (now != then).flatten(1).any(dim=1).tolist() == [slot > 0 and slot in slots for slot in range(6)]


def test_triton_form_in_the_interpreter(seed):
    """The kernel, interpreted on the CPU: odd sizes, padded blocks, slots, both layouts of the state, bfloat16."""
    pytest.importorskip("triton")
    code = """
        import torch
        from kda_layers import compare, make_layer
        from kimi_rl.kernels.kda_step.triton_step import kda_step_triton
        torch.manual_seed(SEED)
        compare(kda_step_triton, *make_layer(torch.float32), rtol=1e-5, atol=1e-5)
        alone = make_layer(torch.float32, batch=1, heads=1, key_dim=16, value_dim=16, width=2, length=1)
        compare(kda_step_triton, *alone, rtol=1e-5, atol=1e-5)
        inputs, options = make_layer(torch.float32, batch=4, states=6, slots=[5, -1, 0, 3], length=4)
        compare(kda_step_triton, inputs, options, rtol=1e-5, atol=1e-5)
        inputs[7] = inputs[7].contiguous()
        compare(kda_step_triton, inputs, options, rtol=1e-5, atol=1e-5)
        compare(kda_step_triton, *make_layer(torch.bfloat16), rtol=2e-2, atol=2e-2)
        # As vLLM calls it: a column of a table as slots, the first one nobody's, three weights, output over the gate.
        def as_vllm(*inputs, **options):
            table = torch.stack([options["slots"], torch.full_like(options["slots"], 77)], dim=1).int()
            parts = tuple(options["conv_weight"].split([16, 16, 12]))
            gate = inputs[5].clone()
            options |= {"slots": table[:, 0], "conv_weight": parts, "out": gate}
            return kda_step_triton(*inputs[:5], gate, *inputs[6:], **options)
        inputs, options = make_layer(torch.float32, batch=4, states=6, slots=[5, 0, 2, 0])
        compare(as_vllm, inputs, options | {"first_slot": 1}, rtol=1e-5, atol=1e-5)
        print("checked")
    """
    assert interpreted(code, seed).strip().endswith("checked")
