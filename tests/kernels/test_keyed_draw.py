"""Drawing tokens by seed and position: the distribution, what a draw depends on, and the Triton form."""

import numpy as np
import pytest
import torch
from triton_interpreter import interpreted

from kimi_rl.kernels.keyed_draw import keyed_draw
from kimi_rl.kernels.keyed_draw.reference import exponential, philox


def keys(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


def test_the_generator_is_philox():
    """Random123's known answer for Philox4x32-10 with counter and key of zeros."""
    zeros = philox(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))
    assert [int(word) for word in zeros] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_draws_follow_the_softmax(seed):
    """20,000 draws over 6 tokens at two temperatures: frequencies within 5 standard errors."""
    draws, logits = 20_000, torch.tensor([1.0, 0.0, -1.0, float("-inf"), 2.0, -3.0])
    for temperature in (1.0, 0.6):
        rows = logits.expand(draws, -1)
        positions, temperatures = torch.arange(draws) % 7, torch.full((draws,), temperature)
        tokens, logprobs = keyed_draw(rows, keys(draws, seed), positions, temperatures)
        expected = (logits / temperature).softmax(-1)
        found = torch.bincount(tokens.long(), minlength=6) / draws
        error = (expected * (1 - expected) / draws).sqrt()
        assert ((found - expected).abs() <= 5 * error).all()
        torch.testing.assert_close(logprobs, expected.log()[tokens.long()], rtol=1e-5, atol=1e-6)


def test_noise_is_exponential_and_resolved_where_draws_are_won(seed):
    """Kolmogorov-Smirnov against the exponential distribution, and no value near 0 that repeats."""
    noise = exponential(keys(64, seed), torch.full((64,), 3), 4096).flatten().double().sort().values.numpy()
    steps = np.arange(len(noise) + 1) / len(noise)
    distance = np.abs(-np.expm1(-noise) - steps[1:]).max()
    assert distance < 2.2 / len(noise) ** 0.5  # exceeded once in 10,000 runs
    smallest = noise[:1000]
    assert (smallest > 0).all() and len(np.unique(smallest)) >= 999


def test_a_row_depends_on_its_seed_and_position_alone(seed):
    logits, seeds, positions = torch.randn(32, 3000), keys(32, seed), torch.arange(32)
    tokens, logprobs = keyed_draw(logits, seeds, positions)
    order = torch.randperm(32)[:9]
    some, some_logprobs = keyed_draw(logits[order], seeds[order], positions[order])
    assert torch.equal(some, tokens[order])
    torch.testing.assert_close(some_logprobs, logprobs[order])
    for other in ((seeds + 1, positions), (seeds + 2**32, positions), (seeds, positions + 1)):
        assert (keyed_draw(logits, *other)[0] != tokens).sum() > 20


def test_triton_form_in_the_interpreter(seed):
    """The kernels, interpreted on the CPU: part blocks, whole blocks of -inf, strided rows, temperatures, bfloat16."""
    pytest.importorskip("triton")
    code = """

        import torch

        from kimi_rl.kernels.keyed_draw.reference import keyed_draw_reference
        from kimi_rl.kernels.keyed_draw.triton_draw import keyed_draw_triton

        torch.manual_seed(SEED)
        for vocabulary, dtype in ((37, torch.float32), (2600, torch.float32), (1024, torch.bfloat16)):
            rows = 5
            logits = (torch.randn(rows, vocabulary + 3) * 3).to(dtype)[:, :vocabulary]
            logits[1, :-5] = float("-inf")
            seeds = torch.randint(-2**63, 2**63 - 1, (rows,))
            positions = torch.tensor([0, 1, 7, 2**20, 2**31 - 1], dtype=torch.int32)
            for temperature in (None, torch.rand(rows) + 0.5):
                tokens, logprobs = keyed_draw_triton(logits, seeds, positions, temperature)
                expected, expected_logprobs = keyed_draw_reference(logits, seeds, positions, temperature)
                assert tokens.dtype == torch.int32 and torch.equal(tokens, expected), (tokens, expected)
                torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-5, atol=1e-5)
    """
    interpreted(code, seed)
