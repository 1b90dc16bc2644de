"""Kimi Delta Attention for one new token per sequence: decoding."""

from __future__ import annotations

import torch

from kimi_rl.kernels.dispatch import choose
from kimi_rl.kernels.kda_decode.reference import kda_decode_reference
from kimi_rl.kernels.kda_decode.torch_decode import kda_decode_torch


def kda_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of the KDA recurrence; `kda_chunk` says what the arguments mean.

    q, k, g [B, H, K]; v [B, H, V]; beta [B, H]; state [B, H, K, V], left unchanged.
    Returns o [B, H, V] in v's dtype and the new state in float32 (float64 if an input is).
    fla's decoding kernel has no backward pass, so a step that needs a gradient always runs the PyTorch form.
    """
    inputs = (q, k, v, g, beta, state)
    choice = choose(
        "kda_decode", q, has_fla=not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))
    )
    if choice == "fla":
        from kimi_rl.kernels.kda_decode.fla import kda_decode_fla as run
    else:
        run = kda_decode_torch if choice == "torch" else kda_decode_reference
    with torch.autocast(q.device.type, enabled=False):
        return run(*inputs, scale=scale, use_qk_l2norm=use_qk_l2norm)


__all__ = ["kda_decode", "kda_decode_reference", "kda_decode_torch"]
