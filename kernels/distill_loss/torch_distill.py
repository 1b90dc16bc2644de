"""The distillation loss in tiles of tokens: no more than one tile of logits of each model exists at any time.

With z the student's logits, q = softmax(z / T), p the teacher's and s = softmax(z), the loss of a token is

    kl_weight T^2 sum_j p_j (log p_j - log q_j) + ce_weight (log sum_j exp(z_j) - z_label)
    d loss / dz_j = kl_weight T (q_j - p_j) + ce_weight (s_j - [j = label])

which is at hand as soon as the logits are. So the forward also takes the products with the states and the head, and the
backward only scales them: each tile's logits are computed once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kimi_rl.kernels.dispatch import compute_dtype
from kimi_rl.kernels.logprob.torch_logprob import tiles
from kimi_rl.kernels.product import wide_product

# Elements of one tile of logits of one model: 16 MiB in float32 on a CPU, 512 MiB on a card. There a tile of half the
# tokens leaves half of the card without work in the product that gives the states' gradient: it has tokens x width
# numbers to share out, and few tokens make few pieces.
TILE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}

# The pass over a tile of logits of both models, in the wide dtype; it may overwrite both:
# `(z, teacher_z, labels, kl, ce, temperature, scales, dtype)` writes kl and ce [R], the parts of each token's loss in
# nats, and returns dz [R, V] in `dtype`. `scales`: what kl and ce [R] are multiplied by in the loss, or None: no
# gradient is wanted, and None returned.
Pass = Callable[..., torch.Tensor | None]


def plain_pass(z, teacher_z, labels, kl, ce, temperature, scales, dtype) -> torch.Tensor | None:
    log_p = (teacher_z / temperature).log_softmax(-1)
    log_s = z.log_softmax(-1)
    log_q = log_s if temperature == 1 else (z / temperature).log_softmax(-1)
    label = labels[:, None]
    ce.copy_(log_s.gather(-1, label).squeeze(-1).neg_())
    p = log_p.exp()
    kl.copy_(log_p.sub_(log_q).mul_(p).sum(-1))
    if scales is None:
        return None
    of_kl, of_ce = scales
    dz = log_q.exp().sub_(p).mul_(of_kl / temperature)
    if of_ce:
        dz.add_(log_s.exp(), alpha=of_ce)
        dz.scatter_add_(-1, label, torch.full_like(label, -of_ce, dtype=dz.dtype))
    return dz.to(dtype)


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, labels, temperature, kl_weight, ce_weight, product,
                tile, over_tile):  # fmt: skip
        dtype = compute_dtype(hidden, weight)
        product = product or dtype
        head, teacher_head = weight.to(product), teacher_weight.to(product)
        count = max(len(labels), 1)
        kl, ce = (torch.empty(labels.shape, dtype=dtype, device=hidden.device) for _ in range(2))
        d_hidden = torch.empty_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        wanted = d_hidden is not None or d_weight is not None
        scales = (kl_weight * temperature**2 / count, ce_weight / count) if wanted else None
        for rows in tiles(len(labels), tile):
            x = hidden[rows].to(product)
            z = wide_product(x, head.T, dtype)
            teacher_z = wide_product(teacher_hidden[rows].to(product), teacher_head.T, dtype)
            dz = over_tile(z, teacher_z, labels[rows], kl[rows], ce[rows], temperature, scales, product)
            del z, teacher_z
            if d_hidden is not None:
                d_hidden[rows] = wide_product(dz, head, dtype)
            if d_weight is not None:
                d_weight += wide_product(dz.T, x, dtype)
            del dz
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        kl, ce = kl.sum() / count, ce.sum() / count
        ctx.mark_non_differentiable(kl, ce)
        return kl_weight * temperature**2 * kl + ce_weight * ce, kl, ce

    @staticmethod
    def backward(ctx, d_loss, d_kl, d_ce):
        grads = [
            None if grad is None else (grad * d_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, *[None] * 9


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
    over_tile: Pass = plain_pass,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Same arguments as `distill_loss`. `tile`: tokens at once; unset: by the size of the vocabulary.

    Returns loss, and kl and ce, which carry no gradient.
    """
    if tile is None:
        tile = max(1, TILE_ELEMENTS.get(weight.device.type, 1 << 22) // weight.shape[0])
    return _DistillLoss.apply(
        hidden, weight, teacher_hidden, teacher_weight, labels, temperature, kl_weight, ce_weight, matmul_dtype, tile,
        over_tile,
    )  # fmt: skip
