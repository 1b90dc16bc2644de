"""One decoding step through fla's Triton kernel (NVIDIA GPU, no gradient)."""

from __future__ import annotations

import torch


def kda_decode_fla(q, k, v, g, beta, state, *, scale: float | None = None, use_qk_l2norm: bool = True):
    """Same signature and shapes as `kda_decode`. Calls `fla.ops.kda.fused_recurrent_kda` (fla-core 0.6.0)."""
    from fla.ops.kda import fused_recurrent_kda

    dtype = v.dtype
    # The kernel wants a time axis: [B, 1, H, ...]. It does not write to `initial_state`.
    o, new_state = fused_recurrent_kda(
        q.to(dtype).unsqueeze(1).contiguous(),
        k.to(dtype).unsqueeze(1).contiguous(),
        v.unsqueeze(1).contiguous(),
        g.float().unsqueeze(1).contiguous(),
        beta.float().unsqueeze(1).contiguous(),
        scale=scale,
        initial_state=state.to(torch.float32).contiguous(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=use_qk_l2norm,
    )
    return o.squeeze(1), new_state
