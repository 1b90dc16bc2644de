import random

import pytest
import torch

from kimi_rl.kernels.logprob import token_logprobs, token_logprobs_reference, token_logprobs_torch, torch_logprob


def make_inputs(tokens, width, vocabulary, dtype=torch.float64):
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(vocabulary, (tokens,))


def results(form, hidden, weight, tokens, entropy_share=0.3, **kwargs):
    """Log-probs, entropies and both gradients, for a loss that weighs each token differently."""
    logps, entropies = form(hidden, weight, tokens, **kwargs)
    weights = torch.linspace(-1, 2, len(tokens), dtype=logps.dtype)
    loss = (logps * weights).sum()
    if entropy_share:
        loss = loss + entropy_share * (entropies * weights.flip(0)).sum()
    return [logps, entropies, *torch.autograd.grad(loss, [hidden, weight])]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("entropy_share", [0.0, 0.3])
def test_values_and_gradients_match_the_reference(temperature, entropy_share):
    for tokens in (1, 2, random.randint(3, 60)):
        inputs = make_inputs(tokens, random.randint(1, 20), random.randint(2, 300))
        kwargs = {"temperature": temperature, "entropy_share": entropy_share}
        expected = results(token_logprobs_reference, *inputs, **kwargs)
        for tile in (1, 7, 64):  # 7: the last tile is ragged
            got = results(token_logprobs_torch, *inputs, tile=tile, **kwargs)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    hidden, weight, tokens = make_inputs(5, 3, 11)
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs_torch(h, w, tokens, temperature=0.8, tile=2), (hidden, weight)
    )


def test_no_token_keeps_the_graph():
    hidden, weight, tokens = make_inputs(0, 4, 9)
    logps, entropies = token_logprobs(hidden, weight, tokens)
    assert logps.shape == entropies.shape == (0,)
    d_hidden, d_weight = torch.autograd.grad(logps.sum() + entropies.sum(), [hidden, weight])
    assert d_hidden.shape == (0, 4) and not bool(d_weight.any())


def test_large_logits_stay_finite():
    hidden, weight, tokens = make_inputs(6, 4, 9, dtype=torch.float32)
    got = results(token_logprobs, hidden * 1e4, weight, tokens)
    assert all(bool(torch.isfinite(x).all()) for x in got)


def test_narrow_inputs_are_computed_in_float32():
    hidden, weight, tokens = make_inputs(20, 16, 50, dtype=torch.float32)
    narrow = hidden.detach().bfloat16().requires_grad_()
    logps, _ = token_logprobs(narrow, weight, tokens)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, token_logprobs(narrow.float(), weight, tokens)[0])
    expected, _ = token_logprobs(hidden, weight, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(token_logprobs(hidden, weight, tokens)[0], expected, rtol=0, atol=0)
    assert torch.autograd.grad(logps.sum(), narrow)[0].dtype == torch.bfloat16


def test_a_backward_inside_autocast_is_that_outside():
    inputs = make_inputs(20, 16, 50, dtype=torch.float32)
    expected = results(token_logprobs, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(token_logprobs, *inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_never_more_than_one_tile_of_logits(monkeypatch):
    """Counted where tensors are made: nothing of tokens x vocabulary elements, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    hidden, weight, tokens = make_inputs(400, 4, 500, dtype=torch.float32)

    def watched(form):
        nonlocal largest
        largest = 0
        with Watch():
            results(form, hidden, weight, tokens)
        return largest

    monkeypatch.setitem(torch_logprob.TILE_ELEMENTS, "cpu", 10_000)
    assert watched(token_logprobs) <= 10_000
    assert watched(token_logprobs_reference) == 200_000, "the check can fail"


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        token_logprobs(torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long), temperature=0.0)


def test_rounded_products_are_those_of_rounded_inputs():
    """bf16 inputs multiplied exactly: the same values as rounding first and computing in float32, in every tile."""
    hidden, weight, tokens = make_inputs(41, 24, 200, dtype=torch.float32)
    expected = results(token_logprobs_reference, hidden, weight, tokens, matmul_dtype=torch.bfloat16)
    got = results(token_logprobs_torch, hidden, weight, tokens, tile=7, matmul_dtype=torch.bfloat16)
    for a, b in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    # The gradient of the logits is rounded once more here than in the reference.
    for a, b in zip(got[2:], expected[2:], strict=True):
        assert (a - b).norm() / b.norm() < 0.005
    unrounded = results(token_logprobs_torch, hidden, weight, tokens)
    assert (got[0] - unrounded[0]).abs().max() > 1e-3
    assert all(x.dtype == torch.float32 for x in got)
