"""The KDA recurrence as it is written in the paper, token by token."""

from __future__ import annotations

import torch

from kimi_rl.kernels.dispatch import compute_dtype, sequence_bounds


def l2norm(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last axis: the same epsilon, in the same place, as fla and vLLM."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def kda_step(q, k, v, g, beta, state):
    """One token: q, k, g [B, H, K], v [B, H, V], beta [B, H], state [B, H, K, V] -> (o, state)."""
    state = state * g.exp().unsqueeze(-1)
    error = v - torch.einsum("bhk,bhkv->bhv", k, state)
    state = state + torch.einsum("bhk,bhv->bhkv", k * beta.unsqueeze(-1), error)
    return torch.einsum("bhk,bhkv->bhv", q, state), state


def kda_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm: bool = True,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Same signature and shapes as `kda_chunk`; `chunk_size` has no meaning here. Any device.

    Per head: S <- Diag(exp g_t) S;  S <- S + beta_t k_t (v_t - S^T k_t)^T;  o_t = S^T q_t * scale.
    """
    out_dtype, dtype = v.dtype, compute_dtype(q, k, v, g, beta)
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    if use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    batch, length, heads, dim = k.shape
    if cu_seqlens is None:
        spans = [(slice(None), 0, length)]
    else:
        bounds = sequence_bounds(cu_seqlens, batch, length)
        spans = [(slice(n, n + 1), a, b) for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))]
    outputs, states = [], []
    for rows, start, end in spans:
        if initial_state is None:
            state = k.new_zeros(batch, heads, dim, v.shape[-1])
        else:
            state = initial_state[rows].to(dtype)
        for t in range(start, end):
            o, state = kda_step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state)
            outputs.append(o)
        states.append(state)
    return torch.stack(outputs, dim=1).to(out_dtype), torch.cat(states) if output_final_state else None
