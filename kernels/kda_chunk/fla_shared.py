"""KDA over a row of prompts and their completions in one pass of fla's kernels (NVIDIA GPU).

Only the recurrence over chunks knows which state a sequence starts from; norms, decays, the triangular solves, the
outputs and their gradients are a chunk's own. So all of these run once over the whole row. The recurrence runs over the
prompts for their last states, and over the row with these for a start; backwards over the row, and again over the
prompts, now with what their completions' starts say. Two calls of `chunk_kda` launch each kernel twice, most of them
for the few tokens of the prompts: the host then keeps the card waiting.

Follows `fla.ops.kda.chunk.ChunkKDAFunction` of fla-core 0.6, whose parts it calls.
"""

from __future__ import annotations

import functools

import torch

from kimi_rl.kernels.dispatch import choose
from kimi_rl.kernels.segments import Segments
from kimi_rl.switches import is_on

ENV = "KIMI_RL_KDA_SHARED"  # 0: two calls of `chunk_kda`
CHUNK = 64


def runs_in_one_pass(q: torch.Tensor) -> bool:
    """Where `kda_chunk` would take fla, with the version whose parts are known here."""
    return choose("kda_chunk", q, has_fla=True) == "fla" and is_on(ENV) and _known_fla()


@functools.cache
def _known_fla() -> bool:
    import fla

    return fla.__version__.startswith("0.6.")


def kda_shared_fla(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, segments: Segments
) -> torch.Tensor:
    """o [1, T, H, V] in v's dtype for a row in which some sequences go on from others.

    q, k [1, T, H, K]; v [1, T, H, V]; g [1, T, H, K]; beta [1, T, H], as for `kda_chunk`, which normalises q and k too.
    Differentiable in all five. `segments` has a sequence with a parent.
    """
    if q.shape[-1] > 256:
        raise ValueError(f"fla's KDA kernels take head dimensions up to 256, found {q.shape[-1]}")
    with torch.autocast(q.device.type, enabled=False):
        inputs = [x.contiguous() for x in (q.to(v.dtype), k.to(v.dtype), v, g.float(), beta.float())]
        return _Shared.apply(*inputs, segments)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, segments):
        from fla.modules.norm.l2norm import l2norm_fwd
        from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h
        from fla.ops.gla.chunk import chunk_gla_fwd_o_gk
        from fla.ops.kda.chunk_intra import chunk_kda_fwd_intra
        from fla.ops.utils import chunk_local_cumsum
        from fla.ops.utils.constant import RCP_LN2

        row, prompts = _borders(segments), _borders(segments.starting)
        scale, border = q.shape[-1] ** -0.5, segments.border
        (q, q_rstd), (k, k_rstd) = l2norm_fwd(q), l2norm_fwd(k)
        g = chunk_local_cumsum(g=g, scale=RCP_LN2, chunk_size=CHUNK, **row)
        w, u, _, kg, Aqk, Akk = chunk_kda_fwd_intra(
            q=q, k=k, v=v, gk=g, beta=beta, scale=scale, chunk_size=CHUNK, **row
        )
        first = {"k": kg[:, :border], "w": w[:, :border], "u": u[:, :border], "gk": g[:, :border]}
        _, _, ends = chunk_gated_delta_rule_fwd_h(**first, output_final_state=True, chunk_size=CHUNK, **prompts)
        starts = ends.new_zeros(len(segments), *ends.shape[1:])  # [N, H, K, V]
        torch.index_select(ends, 0, segments.parent_of_continuing, out=starts[segments.roots :])
        h, v_new, _ = chunk_gated_delta_rule_fwd_h(
            k=kg, w=w, u=u, gk=g, initial_state=starts, chunk_size=CHUNK, **row
        )
        o = chunk_gla_fwd_o_gk(q=q, v=v_new, g=g, A=Aqk, h=h, scale=scale, chunk_size=CHUNK, **row)
        ctx.save_for_backward(q, q_rstd, k, k_rstd, v, g, beta, Aqk, Akk, starts)
        ctx.segments, ctx.scale = segments, scale
        return o.to(v.dtype)

    @staticmethod
    def backward(ctx, do):
        with torch.autocast(do.device.type, enabled=False):
            return _Shared._backward(ctx, do.contiguous())

    @staticmethod
    def _backward(ctx, do):
        from fla.modules.norm.l2norm import l2norm_bwd
        from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_bwd_dhu, chunk_gated_delta_rule_fwd_h
        from fla.ops.kda.chunk_bwd import chunk_kda_bwd_dAv, chunk_kda_bwd_wy_dqkg_fused
        from fla.ops.kda.chunk_intra import chunk_kda_bwd_intra
        from fla.ops.kda.wy_fast import recompute_w_u_fwd
        from fla.ops.utils import chunk_local_cumsum

        q, q_rstd, k, k_rstd, v, g, beta, Aqk, Akk, starts = ctx.saved_tensors
        segments, scale = ctx.segments, ctx.scale
        row, prompts, border = _borders(segments), _borders(segments.starting), segments.border
        w, u, qg, kg = recompute_w_u_fwd(q=q, k=k, v=v, beta=beta, A=Akk, gk=g, **row)
        h, v_new, _ = chunk_gated_delta_rule_fwd_h(
            k=kg, w=w, u=u, gk=g, initial_state=starts, chunk_size=CHUNK, **row
        )
        dAqk, dv_own = chunk_kda_bwd_dAv(q=q, k=k, v=v_new, do=do, A=Aqk, scale=scale, chunk_size=CHUNK, **row)
        back = functools.partial(chunk_gated_delta_rule_bwd_dhu, scale=scale, chunk_size=CHUNK)
        dh, d_starts, dv = back(q=qg, k=kg, w=w, gk=g, h0=starts, do=do, dv=dv_own, **row)
        # What the row's pass wrote for the prompts lacks what comes back through their completions' starts.
        d_ends = segments.sum_over_children(d_starts[segments.roots :])
        first = {"q": qg, "k": kg, "w": w, "gk": g, "do": do, "dv": dv_own}
        dh_first, _, dv_first = back(**{name: x[:, :border] for name, x in first.items()}, dht=d_ends, **prompts)
        dh[:, : dh_first.shape[1]].copy_(dh_first)
        dv[:, :border].copy_(dv_first)
        dq, dk, dv, dbeta, dg, dAkk = chunk_kda_bwd_wy_dqkg_fused(
            q=q, k=k, v=v, v_new=v_new, g=g, beta=beta, A=Akk, h=h, do=do, dh=dh, dv=dv, scale=scale,
            chunk_size=CHUNK, **row,
        )  # fmt: skip
        dq, dk, dbeta, dg = chunk_kda_bwd_intra(
            q=q, k=k, g=g, beta=beta, dAqk=dAqk, dAkk=dAkk, dq=dq, dk=dk, db=dbeta, dg=dg, chunk_size=CHUNK, **row
        )
        dg = chunk_local_cumsum(dg, chunk_size=CHUNK, reverse=True, **row)
        dq, dk = l2norm_bwd(q, q_rstd, dq), l2norm_bwd(k, k_rstd, dk)
        return dq.to(q), dk.to(k), dv.to(v), dg.to(g), dbeta.to(beta), None


def _borders(segments: Segments) -> dict[str, torch.Tensor]:
    """What every kernel gets: kept by the segments, so that no layer asks for it again."""
    return {"cu_seqlens": segments.cu_seqlens, "chunk_indices": segments.chunk_indices(CHUNK)}
