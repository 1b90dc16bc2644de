"""Distillation loss from hidden states: KL to a teacher and cross-entropy, without the [tokens, vocabulary] logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kimi_rl.kernels.dispatch import choose, compute_dtype
from kimi_rl.kernels.distill_loss.reference import distill_loss_reference
from kimi_rl.kernels.distill_loss.torch_distill import distill_loss_torch


@dataclass(frozen=True)
class DistillLoss:
    """`loss` carries the gradient; `kl` and `ce`, means per token in nats without their weights, do not."""

    loss: torch.Tensor
    kl: torch.Tensor
    ce: torch.Tensor


def distill_loss(
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
) -> DistillLoss:
    """kl_weight T^2 KL(teacher || student) at temperature T, plus ce_weight times the cross-entropy of `labels`.

    ``p = softmax(z_teacher / T), q = softmax(z_student / T), KL = sum_j p_j (log p_j - log q_j)``; the factor T^2 keeps
    the size of the gradient the same at any T (Hinton, Vinyals and Dean, arXiv 1503.02531). The cross-entropy is at
    temperature 1. Means over the S tokens.

    Args:
        hidden: [S, D], the student's states that predict; weight: [V, D], its output head. Differentiable in both.
        teacher_hidden: [S, E]; teacher_weight: [V, E]; any dtype, taken as constants.
        labels: int64 [S], the tokens that follow.
        matmul_dtype: states and heads are rounded to it before they are multiplied (bf16 on a card); unset: they are
            not. Logits, softmax and sums are in float32 all the same (float64 if an input is).

    On an NVIDIA card all between the products with the heads, and the gradient of the logits, is one kernel.

    Raises `ValueError` if the shapes do not fit or the temperature is not positive.
    """
    if (
        hidden.shape[0] != teacher_hidden.shape[0]
        or labels.shape != hidden.shape[:1]
        or hidden.shape[1] != weight.shape[1]
        or teacher_hidden.shape[1] != teacher_weight.shape[1]
        or weight.shape[0] != teacher_weight.shape[0]
    ):
        shapes = [tuple(x.shape) for x in (hidden, weight, teacher_hidden, teacher_weight, labels)]
        raise ValueError(f"distill_loss: shapes do not fit: {shapes}; they must be [S, D], [V, D], [S, E], [V, E], [S]")
    if not temperature > 0:
        raise ValueError(f"distill_loss: temperature must be above 0, found {temperature}")
    choice = choose("distill_loss", hidden, has_fla=compute_dtype(hidden, weight) == torch.float32)
    if choice == "fla":
        from kimi_rl.kernels.distill_loss.triton_pass import distill_loss_triton as run
    else:
        run = distill_loss_reference if choice == "reference" else distill_loss_torch
    with torch.autocast(hidden.device.type, enabled=False):
        loss, kl, ce = run(
            hidden,
            weight,
            teacher_hidden.detach(),
            teacher_weight.detach(),
            labels,
            temperature=temperature,
            kl_weight=kl_weight,
            ce_weight=ce_weight,
            matmul_dtype=matmul_dtype,
        )
    return DistillLoss(loss, kl.detach(), ce.detach())


__all__ = ["DistillLoss", "distill_loss", "distill_loss_reference", "distill_loss_torch"]
