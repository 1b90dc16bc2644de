"""A whole KDA layer for one new token per sequence, from the projections' outputs to the input of `o_proj`.

What `short_conv`, `kda_gate`, `kda_decode` and the gated norm do one after another, in one step that updates its two
states in place. On an NVIDIA card it is one Triton kernel instead of about two dozen launches.
"""

from __future__ import annotations

import torch

from kimi_rl.kernels.dispatch import choose
from kimi_rl.kernels.kda_step.reference import kda_step_reference


def kda_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    raw_g: torch.Tensor,
    raw_beta: torch.Tensor,
    out_gate: torch.Tensor,
    conv_state: torch.Tensor,
    state: torch.Tensor,
    *,
    conv_weight: torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    slots: torch.Tensor | None = None,
    first_slot: int = 0,
    scale: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """conv + SiLU, L2 norm of q and k, gate, beta, one step of the delta rule, read-out, gated RMSNorm.

    Args:
        q, k: [B, H*K], v: [B, H*V]: outputs of the projections; rows may be slices of a wider tensor.
        raw_g: [B, H*K], before the softplus. raw_beta: [B, H], before the sigmoid. out_gate: [B, H*V], the same.
        conv_state: [S, C, L], the last L >= W-1 inputs of the C = H*(2K+V) channels (q's, then k's, then v's), newest
            last. Updated in place.
        state: float32 [S, H, V, K]: value-major, as vLLM keeps it; any strides. Updated in place.
        conv_weight: [C, W], or a tuple of q's, k's and v's. A_log: H elements. dt_bias: H*K elements.
        norm_weight: [V]. eps: of the RMSNorm.
        slots: int [B], which of the S states each row has, no two the same. Unset: row i has state i.
        first_slot: a row whose slot is below is skipped and its output 0; any number of rows may be.
        scale: of q; unset: K ** -0.5.
        out: where the result goes, [B, H*V]; may be `out_gate`, which is then overwritten.

    Returns o [B, H*V] in v's dtype. No gradient.
    """
    inputs = (q, k, v, raw_g, raw_beta, out_gate, conv_state, state)
    options = {
        "conv_weight": conv_weight,
        "A_log": A_log,
        "dt_bias": dt_bias,
        "norm_weight": norm_weight,
        "eps": eps,
        "slots": slots,
        "first_slot": first_slot,
        "scale": scale,
        "out": out,
    }
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if choose("kda_step", q, has_fla=True) == "fla":
            from kimi_rl.kernels.kda_step.triton_step import kda_step_triton

            return kda_step_triton(*inputs, **options)
        return kda_step_reference(*inputs, **options)


__all__ = ["kda_step", "kda_step_reference"]
