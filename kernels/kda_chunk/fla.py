"""KDA over whole sequences through fla's Triton kernels (NVIDIA GPU)."""

from __future__ import annotations

import torch


def kda_chunk_fla(
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
    """Same signature and shapes as `kda_chunk`. Calls `fla.ops.kda.chunk_kda` (fla-core 0.6.0).

    The gate is computed outside the kernel (see `kda_gate`), so none of fla's gate flags is set: `safe_gate`
    with `lower_bound` would compute another function than the one Kimi Linear was trained with.
    """
    # Imported here: fla needs Triton, and asks the driver for a GPU when imported.
    from fla.ops.kda import chunk_kda

    dtype = v.dtype
    if q.shape[-1] > 256:
        raise ValueError(f"fla's KDA kernels take head dimensions up to 256, found {q.shape[-1]}")
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()  # fla asserts float32
    o, state = chunk_kda(
        q.to(dtype),
        k.to(dtype),
        v,
        g.float(),
        beta.float(),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(device=q.device, dtype=torch.long),
        cu_seqlens_cpu=cu_seqlens_cpu,
        chunk_size=32 if chunk_size == 32 else 64,  # the two sizes that fla has
    )
    return o, state if output_final_state else None
