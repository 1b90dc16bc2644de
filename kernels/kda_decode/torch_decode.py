"""One decoding step in PyTorch: the CPU's form."""

from __future__ import annotations

import torch

from kimi_rl.kernels.dispatch import compute_dtype
from kimi_rl.kernels.kda_chunk.reference import l2norm


def kda_decode_torch(q, k, v, g, beta, state, *, scale: float | None = None, use_qk_l2norm: bool = True):
    """Same signature and shapes as `kda_decode`.

    Batched products over [B*H], which a CPU runs faster than the equivalent einsum.
    """
    out_dtype, dtype = v.dtype, compute_dtype(q, k, v, g, beta)
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    if use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    batch, heads = k.shape[:2]
    decayed = (state.to(dtype) * g.exp().unsqueeze(-1)).flatten(0, 1)  # [B*H, K, V]
    row = k.flatten(0, 1).unsqueeze(1)  # [B*H, 1, K]
    error = torch.baddbmm(v.flatten(0, 1).unsqueeze(1), row, decayed, alpha=-1)  # v - k S
    new_state = torch.baddbmm(decayed, row.transpose(1, 2), error * beta.reshape(-1, 1, 1))
    o = torch.bmm(q.flatten(0, 1).unsqueeze(1), new_state)
    return o.reshape(batch, heads, -1).to(out_dtype), new_state.unflatten(0, (batch, heads))
