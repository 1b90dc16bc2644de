"""Plain form of one decoding step."""

from __future__ import annotations

from kimi_rl.kernels.dispatch import compute_dtype
from kimi_rl.kernels.kda_chunk.reference import kda_step, l2norm


def kda_decode_reference(q, k, v, g, beta, state, *, scale: float | None = None, use_qk_l2norm: bool = True):
    """Same signature and shapes as `kda_decode`: one step of the recurrence in `kda_chunk/reference.py`."""
    out_dtype, dtype = v.dtype, compute_dtype(q, k, v, g, beta)
    q, k, v, g, beta, state = (x.to(dtype) for x in (q, k, v, g, beta, state))
    if use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    o, state = kda_step(q * (q.shape[-1] ** -0.5 if scale is None else scale), k, v, g, beta, state)
    return o.to(out_dtype), state
