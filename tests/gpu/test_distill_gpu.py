"""The distill stage on a card: bf16 teacher, fp32 student under bf16 autocast, FLA's kernels and FlexAttention."""

import pytest
import torch
from test_distill import distil, folders  # noqa: F401 (a fixture)

from kimi_rl.kernels.distill_loss import distill_loss

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("match, column", [("layers", "layer_error_mean"), ("logits", "kl_to_teacher")])
def test_a_stage_learns_on_a_card(folders, tmp_path, match, column):  # noqa: F811
    figures, context, rows = distil(folders, tmp_path / "card", device="cuda", match=match)
    on_cpu, _, _ = distil(folders, tmp_path / "cpu", match=match)
    steps = [row[column] for row in rows if row["type"] == "train"]
    assert steps[-1] < 0.9 * steps[0]
    assert all(p.dtype == torch.float32 for p in context.model.parameters())
    assert figures["teacher_perplexity"] == pytest.approx(on_cpu["teacher_perplexity"], rel=0.05)
    assert figures["student_perplexity"] == pytest.approx(on_cpu["student_perplexity"], rel=0.1)


def test_the_loss_in_bf16_at_a_real_vocabulary_keeps_no_logits():
    torch.manual_seed(0)
    tokens, vocabulary, width = 16384, 49152, 576
    hidden = torch.randn(tokens, width, device="cuda", requires_grad=True)
    head = torch.nn.Parameter(0.05 * torch.randn(vocabulary, width, device="cuda"))
    teacher = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(vocabulary, (tokens,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = distill_loss(hidden, head, teacher, head.bfloat16(), labels, ce_weight=0.1, matmul_dtype=torch.bfloat16)
    found.loss.backward()
    # The logits of one model in float32 alone would be 3.2 GB.
    assert torch.cuda.max_memory_allocated() - before < 2.5e9
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(head.grad).all()
