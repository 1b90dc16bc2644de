"""Plain form of the KDA forget gate."""

import torch

from kimi_rl.kernels.dispatch import compute_dtype


def kda_gate_reference(raw_g: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    """-exp(A_log) * log(1 + exp(raw_g + dt_bias)) as written; shapes as in `kda_gate`."""
    dtype = compute_dtype(raw_g, A_log, dt_bias)
    heads = A_log.numel()
    x = (raw_g.to(dtype) + dt_bias.to(dtype).reshape(-1)).unflatten(-1, (heads, -1))
    return -A_log.to(dtype).reshape(heads, 1).exp() * torch.logaddexp(x, torch.zeros_like(x))
