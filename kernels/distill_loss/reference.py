"""Plain form of the distillation loss: all logits of both models at once."""

from __future__ import annotations

import torch

from kimi_rl.kernels.dispatch import compute_dtype


def distill_loss_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Same arguments as `distill_loss`. Returns loss, kl and ce, all differentiable."""
    dtype = compute_dtype(hidden, weight)
    product = matmul_dtype or dtype
    hidden, weight, teacher_hidden, teacher_weight = (
        x.to(product).to(dtype) for x in (hidden, weight, teacher_hidden, teacher_weight)
    )
    z, teacher_z = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    log_p, log_q = (teacher_z / temperature).log_softmax(-1), (z / temperature).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    ce = torch.nn.functional.cross_entropy(z, labels)
    return kl_weight * temperature**2 * kl + ce_weight * ce, kl, ce
