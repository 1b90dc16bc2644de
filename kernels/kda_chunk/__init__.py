"""Kimi Delta Attention over whole sequences: training and prefill."""

from __future__ import annotations

import functools

import torch

from kimi_rl.kernels.dispatch import choose
from kimi_rl.kernels.kda_chunk.reference import kda_reference
from kimi_rl.kernels.kda_chunk.torch_chunk import kda_chunk_torch


def kda_chunk(
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
    cu_seqlens_cpu: torch.Tensor | None = None,
    use_qk_l2norm: bool = True,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kimi Delta Attention; differentiable in q, k, v, g, beta and initial_state.

    q, k [B, T, H, K]; v [B, T, H, V]; g [B, T, H, K], the log decay (at most 0, any size: there is no
    overflow); beta [B, T, H] in [0, 1], after the sigmoid. `scale` multiplies q (default K^-0.5).
    `use_qk_l2norm` normalises q and k per head first. `cu_seqlens` [N+1] marks N sequences packed along T
    (then B is 1); nothing crosses a border; `cu_seqlens_cpu`, the same on the host, spares fla a read from the card.
    `initial_state` [N, H, K, V] (N = B without packing).
    `chunk_size`, a power of two, is an upper bound for the PyTorch form, which picks what is fastest; fla
    takes 32 or 64.
    Returns o [B, T, H, V] in v's dtype, and the state after each sequence's last token, [N,
    H, K, V] in float32 (float64 if an input is), or None.
    Source: Kimi Linear report (arXiv 2510.26692), section 3 (chunkwise form); `fla.ops.kda.naive`.
    """
    if q.shape != k.shape or g.shape != k.shape or v.shape[:3] != k.shape[:3] or beta.shape != k.shape[:3]:
        raise ValueError(
            "kda_chunk: shapes do not fit: "
            + ", ".join(
                f"{n} {tuple(x.shape)}"
                for n, x in zip(["q", "k", "v", "g", "beta"], (q, k, v, g, beta), strict=True)
            )
        )
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    expected = (sequences, k.shape[2], k.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"kda_chunk: initial_state {tuple(initial_state.shape)} must be {expected}")
    choice = choose("kda_chunk", q, has_fla=True)
    if choice == "fla":
        from kimi_rl.kernels.kda_chunk.fla import kda_chunk_fla

        run = functools.partial(kda_chunk_fla, cu_seqlens_cpu=cu_seqlens_cpu)
    else:
        run = kda_chunk_torch if choice == "torch" else kda_reference
    # Under autocast the matrix products of the delta rule would silently drop to bf16.
    with torch.autocast(q.device.type, enabled=False):
        return run(
            q,
            k,
            v,
            g,
            beta,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            use_qk_l2norm=use_qk_l2norm,
            chunk_size=chunk_size,
        )


__all__ = ["kda_chunk", "kda_chunk_torch", "kda_reference"]
