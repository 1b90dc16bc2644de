"""The learner's Triton kernels on a card at the sizes of `base`, beside their plain forms there."""

import pytest
import torch

from kimi_rl.kernels.distill_loss import distill_loss
from kimi_rl.kernels.kda_gate import kda_gate
from kimi_rl.kernels.logprob import token_logprobs
from kimi_rl.kernels.relative_error import relative_error
from kimi_rl.kernels.rms_norm import rms_norm
from kimi_rl.kernels.short_conv import short_conv
from kimi_rl.kernels.swiglu import swiglu

pytestmark = pytest.mark.gpu

LENGTHS = [1, 0, 2, 700, 33, 1500, 3]
T = sum(LENGTHS)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()


def bounds():
    return torch.tensor([0, *LENGTHS], device="cuda").cumsum(0)


BF16 = torch.bfloat16


def head():
    return (0.05 * torch.randn(49152, 576, device="cuda")).requires_grad_()


def distillation(temperature):
    """With a vocabulary that is no multiple of what a program reads at a time."""
    teacher, labels = (draw(T, 640, dtype=BF16), draw(49100, 640, dtype=BF16)), torch.arange(T, device="cuda")

    def run(h, w):
        options = dict(temperature=temperature, ce_weight=0.3, matmul_dtype=BF16)
        found = distill_loss(h, w[:49100], teacher[0], 0.05 * teacher[1], labels, **options)
        return [found.loss]

    return run


CASES = {
    "norm": lambda: (lambda x, w: [rms_norm(x, w, 1e-5, out_dtype=BF16)], [draw(T, 1024), draw(1024)]),
    "gated norm": lambda: (
        lambda x, w, gate: [rms_norm(x, w, 1e-5, gate=gate)],
        [draw(T, 8, 128, dtype=BF16), draw(128), draw(T, 8, 128, dtype=BF16)],
    ),
    "swiglu": lambda: (lambda a, b: [swiglu(a, b)], [draw(T, 2816, dtype=BF16), draw(T, 2816, dtype=BF16)]),
    "gate": lambda: (lambda *x: [kda_gate(*x)], [draw(1, T, 1024, dtype=BF16), draw(1, 1, 8, 1), draw(1024)]),
    "conv": lambda: (
        lambda x, w: short_conv(x, w, cu_seqlens=bounds()), [draw(1, T, 3072, dtype=BF16), draw(3072, 4)]
    ),
    "conv that goes on": lambda: (
        lambda x, w, state: short_conv(x, w, initial_state=state, output_final_state=True, cu_seqlens=bounds()),
        [draw(1, T, 3072, dtype=BF16), draw(3072, 4), draw(len(LENGTHS), 3072, 3, dtype=BF16)],
    ),
    "logprob": lambda: (
        lambda h, w: token_logprobs(
            h, w, torch.arange(T, device="cuda"), temperature=0.8, matmul_dtype=BF16
        ),
        [draw(T, 1024), (0.02 * torch.randn(32768, 1024, device="cuda")).requires_grad_()],
    ),
    "relative error": lambda: (
        lambda x: [relative_error(x, torch.ones_like(x).cumsum(0) / T)], [draw(T, 576, dtype=BF16)]
    ),
    "distillation": lambda: (distillation(1.0), [draw(T, 576), head()]),
    "distillation at a temperature": lambda: (distillation(2.0), [draw(T, 576), head()]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_form(case, monkeypatch):
    torch.manual_seed(0)
    form, inputs = CASES[case]()
    results = []
    for kernels in ("auto", "torch"):
        monkeypatch.setenv("KIMI_RL_KERNELS", kernels)
        outputs = [x for x in form(*inputs) if x is not None]
        loss = sum((x.float() * torch.linspace(-1, 1, x.numel(), device="cuda").view(x.shape)).sum() for x in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, inputs)])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert float((got.float() - expected.float()).norm() / expected.float().norm()) < 0.01
