"""KDA of prompts and completions in one pass of FLA's kernels, on a card."""

import pytest
import torch

from kimi_rl.kernels.kda_chunk import kda_chunk, kda_reference
from kimi_rl.kernels.kda_chunk.fla_shared import kda_shared_fla
from kimi_rl.kernels.segments import Segments

pytestmark = pytest.mark.gpu


def in_two_calls(form, inputs, segments):
    sizes = [segments.border, segments.length - segments.border]
    prompts, completions = zip(*(x.split(sizes, dim=1) for x in inputs), strict=True)
    first, states = form(*prompts, output_final_state=True, cu_seqlens=segments.starting.cu_seqlens)
    states = states[segments.parent_of_continuing]
    second, _ = form(*completions, initial_state=states, cu_seqlens=segments.continuing.cu_seqlens)
    return torch.cat([first, second], dim=1)


# A prompt of several chunks, one of less than a chunk, one that nothing goes on from; a completion of one token.
@pytest.mark.parametrize("bounds, parents", [([0, 70, 90, 226, 356, 357, 500, 620], [-1, -1, -1, 0, 1, 0, 0])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_is_two_calls_and_the_reference_with_gradients(bounds, parents, dtype):
    pytest.importorskip("fla.ops.kda")
    torch.manual_seed(0)
    segments = Segments(bounds, parents, device="cuda")
    heads = (1, segments.length, 2, 64)
    q, k, v, weights = (torch.randn(heads, device="cuda", dtype=dtype) for _ in range(4))
    g = -torch.rand(heads, device="cuda") * 0.3
    beta = torch.rand(heads[:3], device="cuda")
    inputs = [x.requires_grad_() for x in (q, k, v, g, beta)]

    def results(o):
        return [o, *torch.autograd.grad((o * weights).float().sum(), inputs)]

    one = results(kda_shared_fla(*inputs, segments))
    for form, tolerance in ((kda_chunk, 1e-3), (kda_reference, 5e-3)):
        two = results(in_two_calls(form, inputs, segments))
        for name, got, expected in zip(["o", "q", "k", "v", "g", "beta"], one, two, strict=True):
            difference = float((got - expected).float().norm() / expected.float().norm())
            assert difference < (tolerance if dtype == torch.float32 else 2e-2), (name, difference)


def test_the_host_does_not_wait_for_the_card():
    """A wait in a layer's forward or backward leaves the card idle while the host prepares the next launches."""
    pytest.importorskip("fla.ops.kda")
    segments = Segments([0, 70, 90, 226, 356, 357, 500, 620], [-1, -1, -1, 0, 1, 0, 0], device="cuda")
    heads = (1, segments.length, 2, 64)
    q, k, v = (torch.randn(heads, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    inputs = [q, k, v, -torch.rand(heads, device="cuda"), torch.rand(heads[:3], device="cuda")]
    inputs = [x.requires_grad_() for x in inputs]

    def run():
        torch.autograd.grad(kda_shared_fla(*inputs, segments).float().sum(), inputs)

    run()  # compiles, tunes, and makes the tables of the segments
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
