import pytest
import torch
import torch.nn.functional as F
from triton_interpreter import interpreted

from kimi_rl.kernels.kda_chunk import kda_reference
from kimi_rl.kernels.kda_decode import kda_decode, kda_decode_reference


def make_step(dtype, batch=3, heads=2, key_dim=8, value_dim=6):
    q, k = torch.randn(2, batch, heads, key_dim, dtype=dtype)
    v = torch.randn(batch, heads, value_dim, dtype=dtype)
    g = -F.softplus(torch.randn(batch, heads, key_dim, dtype=dtype))
    beta = torch.rand(batch, heads, dtype=dtype)
    state = torch.randn(batch, heads, key_dim, value_dim, dtype=dtype)
    return q, k, v, g, beta, state


@pytest.mark.parametrize("normalise", [True, False])
def test_steps_follow_the_recurrence(normalise):
    tokens = 9
    steps = [make_step(torch.float64) for _ in range(tokens)]
    start = steps[0][-1]
    stacked = [torch.stack([s[i] for s in steps], dim=1) for i in range(5)]
    expected, expected_state = kda_reference(
        *stacked, initial_state=start, output_final_state=True, use_qk_l2norm=normalise, scale=0.3
    )
    state = start
    for t, step in enumerate(steps):
        o, state = kda_decode(*step[:5], state, use_qk_l2norm=normalise, scale=0.3)
        torch.testing.assert_close(o, expected[:, t], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, expected_state, rtol=1e-10, atol=1e-10)


def test_gradients_match_the_reference():
    step = [x.requires_grad_() for x in make_step(torch.float64)]
    gradients = []
    for form in (kda_decode, kda_decode_reference):
        o, state = form(*step)
        gradients.append(torch.autograd.grad(o.sin().sum() + state.cos().sum(), step))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_given_state_is_left_alone_and_stays_float32():
    *step, state = make_step(torch.float32)
    before = state.clone()
    o, new_state = kda_decode(*(x.bfloat16() for x in step), state)
    assert torch.equal(state, before) and not torch.equal(new_state, before)
    assert (o.dtype, new_state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("gate", [-50.0, -1e30])
def test_extreme_gates_forget(gate):
    q, k, v, g, beta, state = make_step(torch.float32)
    o, new_state = kda_decode(q, k, v, torch.full_like(g, gate), beta, state)
    fresh, fresh_state = kda_decode(q, k, v, g, beta, torch.zeros_like(state))
    torch.testing.assert_close(o, fresh, rtol=0, atol=1e-6)
    torch.testing.assert_close(new_state, fresh_state, rtol=0, atol=1e-6)


def test_fla_form_in_triton_interpreter(seed):
    """fla's decoding kernel itself, interpreted on the CPU."""
    pytest.importorskip("triton")
    pytest.importorskip("fla.ops.kda")
    code = """
        import torch
        from tests.kernels.test_kda_decode import make_step
        from kimi_rl.kernels.kda_decode.fla import kda_decode_fla
        from kimi_rl.kernels.kda_decode import kda_decode_reference
        torch.manual_seed(SEED)
        step = make_step(torch.float32, batch=2, key_dim=16, value_dim=16)
        before = step[-1].clone()
        for a, b in zip(kda_decode_fla(*step), kda_decode_reference(*step)):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert torch.equal(before, step[-1])
        print("checked")
    """
    assert interpreted(code, seed).strip().endswith("checked")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
def test_fla_matches_reference_on_gpu():
    pytest.importorskip("fla.ops.kda")
    step = [x.cuda() for x in make_step(torch.float32, key_dim=64, value_dim=64)]
    for a, b in zip(kda_decode(*step), kda_decode_reference(*step), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
