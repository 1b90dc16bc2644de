"""Plain form of the short convolution: one token at a time, one sequence at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kimi_rl.kernels.dispatch import sequence_bounds


def short_conv_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Same signature and shapes as `short_conv`."""
    batch, length, channels = x.shape
    width = weight.shape[-1]
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if cu_seqlens is None:
        sequences = [x[b] for b in range(batch)]
    else:
        bounds = sequence_bounds(cu_seqlens, batch, length)
        sequences = [x[0, a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    outputs, states = [], []
    for n, sequence in enumerate(sequences):
        if initial_state is None:
            window = [torch.zeros(channels, dtype=dtype, device=x.device)] * (width - 1)
        else:
            window = [initial_state[n, :, i].to(dtype) for i in range(width - 1)]
        for token in sequence.to(dtype):
            window.append(token)
            y = sum(window[len(window) - width + w] * weight[:, w].to(dtype) for w in range(width))
            outputs.append(F.silu(y) if activation == "silu" else y)
        tail = window[len(window) - (width - 1) :] if width > 1 else []
        states.append(torch.stack(tail, dim=-1) if tail else x.new_zeros(channels, 0, dtype=dtype))
    y = torch.stack(outputs).reshape(batch, length, channels).to(x.dtype)
    return y, torch.stack(states).to(x.dtype) if output_final_state else None
