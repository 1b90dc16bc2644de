"""Plain form of a KDA layer's decoding step: the references of its parts, one after another."""

from __future__ import annotations

import torch

from kimi_rl.kernels.dispatch import compute_dtype
from kimi_rl.kernels.kda_decode.reference import kda_decode_reference
from kimi_rl.kernels.kda_gate.reference import kda_gate_reference
from kimi_rl.kernels.short_conv.reference import short_conv_reference


def parts_of(conv_weight: torch.Tensor | tuple[torch.Tensor, ...], qkv: tuple[torch.Tensor, ...]) -> tuple:
    """The weights of q's, k's and v's channels, [H*K, W], [H*K, W] and [H*V, W]."""
    if isinstance(conv_weight, torch.Tensor):
        return conv_weight.split([x.shape[-1] for x in qkv])
    return conv_weight


def kda_step_reference(
    q, k, v, raw_g, raw_beta, out_gate, conv_state, state, *,
    conv_weight, A_log, dt_bias, norm_weight, eps: float, slots=None, first_slot: int = 0, scale: float | None = None,
    out=None,
):  # fmt: skip
    """Same signature and shapes as `kda_step`; float64 where an input is."""
    dtype = compute_dtype(q, k, v, raw_g, raw_beta, out_gate, state)
    heads, value_dim = A_log.numel(), norm_weight.numel()
    conv_weight = torch.cat(parts_of(conv_weight, (q, k, v)))
    if slots is None:
        slots, first_slot = torch.arange(q.shape[0], device=q.device), 0
    slots = slots.long()
    rows = (slots >= first_slot).nonzero().squeeze(1)
    slots = slots[rows]
    if not len(rows):
        return torch.zeros_like(v) if out is None else out.zero_()

    new = torch.cat([q, k, v], dim=-1)[rows]
    window = conv_state[slots].to(dtype)
    history = window[..., window.shape[-1] - (conv_weight.shape[-1] - 1) :]
    mixed, _ = short_conv_reference(new.to(dtype).unsqueeze(1), conv_weight.to(dtype), initial_state=history)
    conv_state[slots] = torch.cat([window[..., 1:], new.to(dtype).unsqueeze(-1)], dim=-1).to(conv_state.dtype)

    sizes = [q.shape[-1], k.shape[-1], v.shape[-1]]
    q_, k_, v_ = (x.unflatten(-1, (heads, -1)) for x in mixed.squeeze(1).split(sizes, dim=-1))
    g = kda_gate_reference(raw_g[rows].to(dtype), A_log, dt_bias)
    beta = raw_beta[rows].to(dtype).sigmoid()
    o, new_state = kda_decode_reference(q_, k_, v_, g, beta, state[slots].transpose(-1, -2), scale=scale)
    state[slots] = new_state.transpose(-1, -2).to(state.dtype)

    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps) * norm_weight.to(dtype)
    o = o * out_gate[rows].to(dtype).unflatten(-1, (heads, value_dim)).sigmoid()
    out = v.new_zeros(v.shape) if out is None else out.zero_()
    out[rows] = o.flatten(1).to(v.dtype)
    return out
