"""The short causal depthwise convolution in front of q, k and v."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kimi_rl.kernels.dispatch import choose, sequence_bounds
from kimi_rl.kernels.segments import Segments
from kimi_rl.kernels.short_conv.reference import short_conv_reference


def short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    parents: Segments | None = None,
    activation: str | None = "silu",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y[t, c] = activation(sum_w weight[c, w] * x[t - W + 1 + w, c]), each sequence on its own.

    x [B, T, C]; weight [C, W] (conv1d weight without its middle axis); `initial_state` [N, C, W-1] holds the
    W-1 inputs before the first token (unset: zeros), N being B, or the number of packed sequences when
    `cu_seqlens` [N+1] is given (then B is 1). `parents`, in place of `initial_state`: the same sequences as
    `cu_seqlens`; what goes on from a parent in the row finds that one's last inputs before its first token.
    `activation` is "silu" or None.
    Returns y [B, T, C] in x's
    dtype, and the last W-1 inputs of every sequence [N, C, W-1] or None. Products are accumulated in the
    wider of x's and weight's dtype.

    On an NVIDIA card Triton kernels; elsewhere W shifted multiply-adds: no transpose to channels-first, and on a CPU
    several times faster than `F.conv1d(groups=C)`, whose backward is slow for so narrow a kernel.
    """
    if activation not in ("silu", None):
        raise ValueError(f"short_conv: activation must be 'silu' or None, found {activation!r}")
    if parents is not None and (cu_seqlens is None or initial_state is not None):
        raise ValueError("short_conv: parents goes with cu_seqlens, and takes the place of initial_state")
    args = {
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
    }
    with torch.autocast(x.device.type, enabled=False):
        choice = choose("short_conv", x, has_fla=True)
        if choice == "fla":
            from kimi_rl.kernels.short_conv.triton_conv import short_conv_triton

            return short_conv_triton(x, weight, **args, parents=parents, activation=activation)
        if parents is not None:
            args["initial_state"] = rows_before(x, weight.shape[-1] - 1, parents)
        if choice == "reference":
            return short_conv_reference(x, weight, **args, activation=activation)
        return _short_conv_torch(x, weight, **args, activation=activation)


def rows_before(x: torch.Tensor, count: int, segments: Segments) -> torch.Tensor:
    """Of x [1, T, C] the `count` rows before each sequence, its parent's last or zeros: [N, C, count]."""
    places, there = segments.before(count)
    return (x[0, places] * there[..., None]).transpose(1, 2)


def _short_conv_torch(x, weight, *, initial_state, output_final_state, cu_seqlens, activation):
    batch, length, channels = x.shape
    history = weight.shape[-1] - 1
    dtype = torch.promote_types(x.dtype, weight.dtype)
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        before = x.new_zeros(sequences, history, channels)
    else:
        before = initial_state.transpose(1, 2).to(x.dtype)

    if cu_seqlens is None:
        extended = torch.cat([before, x], dim=1)
        y = _taps(extended.to(dtype), weight.to(dtype), length)
        final = extended[:, length:] if output_final_state else None
    else:
        # Lay the W-1 rows of history in front of every sequence, convolve, keep the rows of real tokens. All on the
        # device: a read of `cu_seqlens` would make the host wait for it in every layer.
        if x.device.type == "cpu" or batch != 1:
            sequence_bounds(cu_seqlens, batch, length)
        cu_seqlens = cu_seqlens.to(device=x.device, dtype=torch.long)
        numbers = torch.arange(sequences, device=x.device)
        which = torch.repeat_interleave(numbers, cu_seqlens.diff(), output_size=length)
        rows = torch.arange(length, device=x.device) + which * history  # of each token in the output of `_taps`
        starts = cu_seqlens[:-1] + numbers * history
        width = torch.arange(history, device=x.device)
        extended = x.new_empty(length + sequences * history, channels)
        extended = extended.index_copy(0, (starts[:, None] + width).flatten(), before.flatten(0, 1))
        extended = extended.index_copy(0, rows + history, x[0]).unsqueeze(0)
        y = _taps(extended.to(dtype), weight.to(dtype), extended.shape[1] - history)[:, rows]
        ends = cu_seqlens[1:] + numbers * history
        final = extended[0, ends[:, None] + width] if output_final_state else None
    y = F.silu(y) if activation == "silu" else y
    return y.to(x.dtype), None if final is None else final.transpose(1, 2)


def _taps(extended: torch.Tensor, weight: torch.Tensor, length: int) -> torch.Tensor:
    """Causal convolution of [B, length + W - 1, C] with [C, W]: [B, length, C]."""
    y = extended[:, :length] * weight[:, 0]
    for w in range(1, weight.shape[-1]):
        y = torch.addcmul(y, extended[:, w : w + length], weight[:, w])
    return y


__all__ = ["rows_before", "short_conv", "short_conv_reference"]
