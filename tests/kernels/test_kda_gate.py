import pytest
import torch

from kimi_rl.kernels.kda_gate import kda_gate, kda_gate_reference


def test_matches_reference_with_gradients():
    heads, dim = 3, 5
    raw = torch.randn(2, 7, heads * dim, dtype=torch.float64) * 4
    A_log = torch.randn(1, 1, heads, 1, dtype=torch.float64)
    dt_bias = torch.randn(heads * dim, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (raw, A_log, dt_bias)]
    got, expected = kda_gate(*inputs), kda_gate_reference(*inputs)
    assert got.shape == (2, 7, heads, dim) and bool((got <= 0).all())
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), inputs),
        torch.autograd.grad(expected.sin().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_matches_fla():
    gate = pytest.importorskip("fla.ops.kda.gate")
    raw, A_log, dt_bias = torch.randn(4, 6, 2, 8), torch.randn(2), torch.randn(16)
    torch.testing.assert_close(
        kda_gate(raw.flatten(-2), A_log, dt_bias), gate.naive_kda_gate(raw, A_log, dt_bias)
    )


@pytest.mark.parametrize("value", [0.0, 19.9, 20.1, 100.0, -100.0, 1e10, -1e10, 3e38, -3e38])
@pytest.mark.parametrize("log_rate", [-300.0, 0.0, 3.0, 300.0])
def test_gradient_has_no_nan_at_any_finite_input(value, log_rate):
    raw = torch.tensor([[value, 0.5]], requires_grad=True)
    dt_bias = torch.tensor([value, 100.0], requires_grad=True)
    A_log = torch.tensor([log_rate], requires_grad=True)
    g = kda_gate(raw, A_log, dt_bias)
    assert bool(torch.isfinite(g).all())
    # What the delta rule does with g: exp of it. A NaN would come from infinity times zero.
    for gradient in torch.autograd.grad(g.exp().sum(), [raw, A_log, dt_bias]):
        assert bool(torch.isfinite(gradient).all())


def test_computed_in_float32_whatever_comes_in():
    raw, A_log, dt_bias = torch.randn(3, 8).bfloat16(), torch.randn(2), torch.randn(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        g = kda_gate(raw, A_log, dt_bias)
    assert g.dtype == torch.float32
    torch.testing.assert_close(g, kda_gate_reference(raw.float(), A_log, dt_bias))


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="kda_gate"):
        kda_gate(torch.zeros(2, 9), torch.zeros(2), torch.zeros(9))
    with pytest.raises(ValueError, match="kda_gate"):
        kda_gate(torch.zeros(2, 8), torch.zeros(2), torch.zeros(7))
