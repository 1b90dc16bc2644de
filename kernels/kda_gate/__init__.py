"""The forget gate of KDA: raw projections to log decays."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kimi_rl.kernels.dispatch import choose, compute_dtype
from kimi_rl.kernels.kda_gate.reference import kda_gate_reference

# Arguments beyond these bounds give a decay of exp(g) = 0 already. Clamping keeps g finite, and so keeps
# "infinity times a zero gradient" (NaN) out of the backward pass.
MAX_PREACTIVATION = 1e18
MAX_A_LOG = 40.0


def kda_gate(raw_g: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    """Log decay g = -exp(A_log) * softplus(raw_g + dt_bias), at most 0, per head and channel.

    raw_g [..., H*K] of any float dtype, A_log any shape with H elements, dt_bias [H*K] (any shape with H*K
    elements).
    Returns g [..., H, K] in float32 (float64 if an input is). The gradient has no NaN at any
    finite input. Source: Kimi Linear report (arXiv 2510.26692), section 3; `fla.ops.kda.gate.naive_kda_gate`.
    """
    heads = A_log.numel()
    if raw_g.shape[-1] % heads or dt_bias.numel() != raw_g.shape[-1]:
        raise ValueError(
            f"kda_gate: raw_g {tuple(raw_g.shape)} and dt_bias {tuple(dt_bias.shape)} "
            f"do not fit {heads} heads"
        )
    with torch.autocast(raw_g.device.type, enabled=False):
        choice = choose("kda_gate", raw_g, has_fla=True)
        if choice == "fla":
            from kimi_rl.kernels.kda_gate.triton_gate import kda_gate_triton

            return kda_gate_triton(raw_g, A_log, dt_bias, limits=(MAX_PREACTIVATION, MAX_A_LOG))
        if choice == "reference":
            return kda_gate_reference(raw_g, A_log, dt_bias)
        dtype = compute_dtype(raw_g, A_log, dt_bias)
        x = (raw_g.to(dtype) + dt_bias.to(dtype).reshape(-1)).clamp(max=MAX_PREACTIVATION)
        rate = A_log.to(dtype).reshape(heads, 1).clamp(max=MAX_A_LOG).exp()
        # F.softplus is exact for small x (log1p) and linear above 20, with the gradient sigmoid(x): it never
        # evaluates exp of a large number, which `where(x > 20, x, log(1 + exp(x)))` does in its backward
        # pass.
        return -rate * F.softplus(x).unflatten(-1, (heads, -1))


__all__ = ["kda_gate", "kda_gate_reference"]
