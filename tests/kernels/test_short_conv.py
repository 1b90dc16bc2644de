import random

import pytest
import torch
import torch.nn.functional as F

from kimi_rl.kernels.short_conv import short_conv, short_conv_reference

C = 5


def results(form, x, weight, state, cu_seqlens, activation):
    y, final = form(
        x, weight, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, activation=activation
    )
    loss = (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum() + final.square().sum()
    return [y, final, *torch.autograd.grad(loss, [x, weight, state])]


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("width", [2, 4])
def test_matches_reference_with_gradients(width, packed, activation):
    lengths = [1, 2, random.randint(3, 30), 3]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    shape = (1, sum(lengths), C) if packed else (4, random.randint(1, 9), C)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(C, width, dtype=torch.float64, requires_grad=True)
    state = torch.randn(4, C, width - 1, dtype=torch.float64, requires_grad=True)
    expected = results(short_conv_reference, x, weight, state, cu_seqlens, activation)
    for a, b in zip(results(short_conv, x, weight, state, cu_seqlens, activation), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_matches_conv1d():
    x, weight = torch.randn(2, 11, C), torch.randn(C, 4)
    expected = F.silu(
        F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), padding=3, groups=C)[..., :11]
    ).transpose(1, 2)
    torch.testing.assert_close(short_conv(x, weight)[0], expected)


def test_state_carries_a_sequence_on():
    x, weight = torch.randn(2, 13, C), torch.randn(C, 4)
    whole, end = short_conv(x, weight, output_final_state=True)
    pieces, state = [], None
    for part in x.split([1, 1, 5, 6], dim=1):
        y, state = short_conv(part, weight, initial_state=state, output_final_state=True)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    torch.testing.assert_close(state, end)


def test_nothing_leaks_between_packed_sequences():
    cu_seqlens, weight = torch.tensor([0, 4, 9]), torch.randn(C, 4)
    a, b = torch.randn(2, 1, 9, C)
    b = torch.cat([b[:, :4], a[:, 4:]], dim=1)
    difference = (
        short_conv(a, weight, cu_seqlens=cu_seqlens)[0] - short_conv(b, weight, cu_seqlens=cu_seqlens)[0]
    )
    assert float(difference[:, 4:].abs().max()) == 0.0
    # Without the borders the same comparison sees a difference: the check can fail.
    leaky = short_conv(a, weight)[0] - short_conv(b, weight)[0]
    assert float(leaky[:, 4:].abs().max()) > 1e-4


def test_bf16_input_with_float32_weight():
    x, weight = torch.randn(1, 9, C).bfloat16(), torch.randn(C, 4)
    y, state = short_conv(x, weight, output_final_state=True)
    assert y.dtype == state.dtype == torch.bfloat16
    torch.testing.assert_close(y, short_conv(x.float(), weight)[0].bfloat16(), rtol=0, atol=0)


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="gelu"):
        short_conv(torch.zeros(1, 2, C), torch.zeros(C, 4), activation="gelu")
