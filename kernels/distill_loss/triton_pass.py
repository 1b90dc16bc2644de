"""The pass over a tile of logits of student and teacher in one launch (Triton).

A program has a row of both. It reads them once for the log-sum-exps and once more for the parts of the loss and the
gradient, which it writes in the dtype that its products want; the formulas are in `torch_distill.py`. PyTorch's softmax
and elementwise operations take some twenty passes over tiles in float32 for the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kimi_rl.kernels.distill_loss.torch_distill import distill_loss_torch

BLOCK = 4096  # tokens of the vocabulary that a program reads at a time
LOWEST = -1e30  # below every logit, and finite: its difference from itself is 0


@triton.jit
def _add(largest, total, z):
    """total = sum exp(z - largest) over the z so far, by lanes; z is -inf where there is none."""
    now = tl.maximum(largest, z)
    return now, total * tl.exp(largest - now) + tl.exp(z - now)


@triton.jit
def _log_sum_exp(largest, total):
    top = tl.max(largest, axis=0)
    return top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))


@triton.jit
def _kernel(
    z_ptr, teacher_ptr, labels_ptr, kl_ptr, ce_ptr, dz_ptr, inverse, of_kl, of_ce, stride, stride_teacher, stride_dz,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, LOWEST: tl.constexpr, WARM: tl.constexpr, HAS_CE: tl.constexpr,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    """WARM: the temperature is not 1, so that the cross-entropy, at 1, has a log-sum-exp of its own. HAS_CE: it has a
    part in the gradient."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    teacher_ptr += row * stride_teacher
    q_largest, q_total = tl.full([BLOCK], LOWEST, dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    p_largest, p_total = tl.full([BLOCK], LOWEST, dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    s_largest, s_total = tl.full([BLOCK], LOWEST, dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, SIZE, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + column, mask=column < SIZE, other=float("-inf")).to(tl.float32)
        teacher = tl.load(teacher_ptr + column, mask=column < SIZE, other=float("-inf")).to(tl.float32)
        q_largest, q_total = _add(q_largest, q_total, z * inverse)
        p_largest, p_total = _add(p_largest, p_total, teacher * inverse)
        if WARM:
            s_largest, s_total = _add(s_largest, s_total, z)
    log_q_sum, log_p_sum = _log_sum_exp(q_largest, q_total), _log_sum_exp(p_largest, p_total)
    log_s_sum = log_q_sum
    if WARM:
        log_s_sum = _log_sum_exp(s_largest, s_total)
    label = tl.load(labels_ptr + row)
    tl.store(ce_ptr + row, log_s_sum - tl.load(z_ptr + label).to(tl.float32))

    kl = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, SIZE, BLOCK):
        column = start + tl.arange(0, BLOCK)
        real = column < SIZE
        z = tl.load(z_ptr + column, mask=real, other=0.0).to(tl.float32)
        log_q = z * inverse - log_q_sum
        log_p = tl.load(teacher_ptr + column, mask=real, other=0.0).to(tl.float32) * inverse - log_p_sum
        p = tl.exp(log_p)
        kl += tl.where(real, p * (log_p - log_q), 0.0)
        if GRADIENT:
            q = tl.exp(log_q)
            dz = of_kl * inverse * (q - p)
            if HAS_CE:
                s = q
                if WARM:
                    s = tl.exp(z - log_s_sum)
                dz += of_ce * (s - tl.where(column == label, 1.0, 0.0))
            tl.store(dz_ptr + row * stride_dz + column, dz.to(dz_ptr.dtype.element_ty), mask=real)
    tl.store(kl_ptr + row, tl.sum(kl, axis=0))


def triton_pass(z, teacher_z, labels, kl, ce, temperature: float, scales, dtype) -> torch.Tensor | None:
    """As in `torch_distill.Pass`; logits in float32."""
    dz = None if scales is None else torch.empty(z.shape, dtype=dtype, device=z.device)
    of_kl, of_ce = scales or (0.0, 0.0)
    if len(z):
        size = z.shape[1]
        _kernel[(len(z),)](
            z, teacher_z, labels, kl, ce, z if dz is None else dz, 1.0 / temperature, float(of_kl), float(of_ce),
            z.stride(0), teacher_z.stride(0), 0 if dz is None else dz.stride(0),
            SIZE=size, BLOCK=min(BLOCK, triton.next_power_of_2(size)), LOWEST=LOWEST, WARM=temperature != 1,
            HAS_CE=bool(of_ce), GRADIENT=dz is not None, num_warps=16,
        )  # fmt: skip
    return dz


def distill_loss_triton(*inputs, **options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Same arguments as `distill_loss_torch`; below float64."""
    return distill_loss_torch(*inputs, **options, over_tile=triton_pass)
