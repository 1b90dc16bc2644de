"""The distillation loss in tiles of tokens: no more than one tile of logits of each model exists at any time.

With z the student's logits, q = softmax(z / T), p the teacher's and s = softmax(z), the loss of a token is

    kl_weight T^2 sum_j p_j (log p_j - log q_j) + ce_weight (log sum_j exp(z_j) - z_label)
    d loss / dz_j = kl_weight T (q_j - p_j) + ce_weight (s_j - [j = label])

which is at hand as soon as the logits are. So the forward also takes the products with the states and the head, and the
backward only scales them: each tile's logits are computed once.
"""

from __future__ import annotations

import torch

from kimi_rl.kernels.dispatch import compute_dtype
from kimi_rl.kernels.logprob.torch_logprob import default_tile, tiles
from kimi_rl.kernels.product import wide_product


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, labels, temperature, kl_weight, ce_weight, product,
                tile):  # fmt: skip
        dtype = compute_dtype(hidden, weight)
        product = product or dtype
        head, teacher_head = weight.to(product), teacher_weight.to(product)
        count = max(len(labels), 1)
        kl, ce = torch.zeros((), dtype=dtype, device=hidden.device), torch.zeros((), dtype=dtype, device=hidden.device)
        d_hidden = torch.zeros_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        for rows in tiles(len(labels), tile):
            x = hidden[rows].to(product)
            z = wide_product(x, head.T, dtype)
            teacher_z = wide_product(teacher_hidden[rows].to(product), teacher_head.T, dtype)
            log_p = (teacher_z / temperature).log_softmax(-1)
            log_s = z.log_softmax(-1)
            log_q = log_s if temperature == 1 else (z / temperature).log_softmax(-1)
            label = labels[rows, None]
            ce -= log_s.gather(-1, label).sum()
            p = log_p.exp()
            kl += log_p.sub_(log_q).mul_(p).sum()
            if d_hidden is None and d_weight is None:
                continue
            dz = log_q.exp().sub_(p).mul_(kl_weight * temperature / count)
            if ce_weight:
                dz.add_(log_s.exp(), alpha=ce_weight / count)
                dz.scatter_add_(-1, label, torch.full_like(label, -ce_weight / count, dtype=dtype))
            dz = dz.to(product)
            if d_hidden is not None:
                d_hidden[rows] = wide_product(dz, head, dtype)
            if d_weight is not None:
                d_weight += wide_product(dz.T, x, dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        kl, ce = kl / count, ce / count
        ctx.mark_non_differentiable(kl, ce)
        return kl_weight * temperature**2 * kl + ce_weight * ce, kl, ce

    @staticmethod
    def backward(ctx, d_loss, d_kl, d_ce):
        grads = [
            None if grad is None else (grad * d_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, *[None] * 8


def distill_loss_torch(
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
    tile: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Same arguments as `distill_loss`. `tile`: tokens at once; unset: by the size of the vocabulary.

    Returns loss, and kl and ce, which carry no gradient.
    """
    tile = default_tile(weight) if tile is None else tile
    return _DistillLoss.apply(
        hidden, weight, teacher_hidden, teacher_weight, labels, temperature, kl_weight, ce_weight, matmul_dtype, tile
    )
