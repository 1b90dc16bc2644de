"""The packed learner on a card: FLA's chunk kernels, FlexAttention with MLA's head sizes, and the whole model."""

import pytest
import torch
import torch._functorch.config
from test_packed_logps import MODES, StandIn, differences, make_model

from kimi_rl.kernels.segments import Segments
from kimi_rl.kernels.varlen_attention import varlen_attention, varlen_attention_reference
from kimi_rl.learner.warm_up import warm_up

pytestmark = pytest.mark.gpu

HEADS, KEY, VALUE = 4, 192, 128  # of the released model
LAYOUTS = {
    "plain": ([0, 33, 34, 300, 811], None),
    "shared": ([0, 100, 131, 150, 400, 401, 700], [-1, -1, 0, 1, 0, 1]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
def test_flex_attention_matches_the_reference_with_gradients(layout, dtype, tolerance):
    torch.manual_seed(0)
    segments = Segments(*LAYOUTS[layout], device="cuda")
    sizes = (KEY, KEY, VALUE)
    inputs = [torch.randn(segments.length, HEADS, s, device="cuda", dtype=dtype, requires_grad=True) for s in sizes]
    weights = torch.randn(segments.length, HEADS, VALUE, device="cuda")
    results = []
    for form in (varlen_attention, varlen_attention_reference):
        o = form(*inputs, segments, scale=KEY**-0.5)
        results.append([o, *torch.autograd.grad((o.float() * weights).sum(), inputs)])
    for got, expected in zip(*results, strict=True):
        assert float((got - expected).float().norm() / expected.float().norm()) < tolerance


@pytest.fixture
def autocast(monkeypatch):
    """The trainer's autocast, around the forward of the sample alone too."""
    monkeypatch.setattr(
        StandIn.accelerator, "autocast", lambda: torch.autocast("cuda", dtype=torch.bfloat16), raising=False
    )
    # `differences` goes back through one graph several times, which a compiled backward allows only so.
    with torch._functorch.config.patch(donated_buffer=False), torch.autocast("cuda", dtype=torch.bfloat16):
        yield


def on_card(arch, mlp):
    return make_model(arch, mlp, linear_head_dim=32, initializer_range=0.05).to("cuda")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch, mlp", [("hybrid", "dense"), ("hybrid", "moe"), ("mla", "dense")])
def test_a_sample_in_a_pack_is_the_sample_alone_in_float32(monkeypatch, arch, mlp, mode):
    monkeypatch.setenv("KIMI_RL_KERNELS", "torch")
    values, gradients = differences(on_card(arch, mlp), mode, seed=1)
    assert values < 1e-4 and gradients < 1e-4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", ["hybrid", "mla"])
def test_a_sample_in_a_pack_is_the_sample_alone_in_bf16(autocast, arch, mode):
    """FLA's own bar for its kernels. A router in bf16 may choose another expert, so dense models only."""
    values, gradients = differences(on_card(arch, "dense"), mode, seed=1)
    # A sample alone takes MLA through another kernel: gradients add up its roundings over all tokens.
    assert values < 0.005 and gradients < 0.02


def test_warm_up_says_what_it_does():
    said = []
    trainer = StandIn(on_card("hybrid", "dense"), "shared_prompt")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        seconds = warm_up(trainer, said.append)
    assert seconds > 0 and len(said) == 2 and "compiling" in said[0]
