"""Layers that read one input in one matrix product: the same values and gradients as one after another."""

import pytest
import torch

from kimi_rl.model.projections import JOINT_PROJECTIONS, projected_apart, projected_together

WIDTHS = (24, 24, 3)


def run(function, x, layers):
    for layer in layers:
        layer.weight.grad = None
    x = x.clone().requires_grad_()
    parts = function(x, layers)
    parts = parts.split(WIDTHS, dim=-1) if isinstance(parts, torch.Tensor) else parts
    sum((part * (number + 1)).square().sum() for number, part in enumerate(parts)).backward()
    return [*parts, x.grad, *(layer.weight.grad for layer in layers)]


@pytest.fixture
def layers():
    return [torch.nn.Linear(16, width, bias=False, dtype=torch.float64) for width in WIDTHS]


@pytest.mark.parametrize("function", [projected_together, projected_apart])
def test_one_product_gives_values_and_gradients_of_many(monkeypatch, layers, function):
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    calls = []
    for layer in layers:
        monkeypatch.setattr(layer, "forward", lambda x, f=layer.forward: calls.append(1) or f(x))
    monkeypatch.setenv(JOINT_PROJECTIONS, "0")
    plain = run(function, x, layers)
    assert len(calls) == 3
    monkeypatch.setenv(JOINT_PROJECTIONS, "1")
    joint = run(function, x, layers)
    assert len(calls) == 3
    for a, b in zip(plain, joint, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_layers_that_something_was_put_on_are_called(monkeypatch, layers):
    monkeypatch.setenv(JOINT_PROJECTIONS, "1")
    x, seen = torch.randn(1, 4, 16, dtype=torch.float64), []
    layers[1].register_forward_hook(lambda layer, inputs, output: seen.append(output) or output * 2)
    q, k, v = projected_apart(x, layers)
    assert len(seen) == 1 and torch.equal(k, 2 * seen[0])

    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    adapter = Adapter(16, 3, bias=False, dtype=torch.float64)
    together = projected_together(x, [layers[0], adapter])
    torch.testing.assert_close(together[..., 24:], torch.nn.functional.linear(x, adapter.weight) + 1)
    biased = torch.nn.Linear(16, 3, dtype=torch.float64)
    torch.testing.assert_close(projected_together(x, [layers[0], biased])[..., 24:], biased(x))
