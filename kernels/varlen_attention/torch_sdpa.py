"""Attention over packed sequences through PyTorch's own attention, any device.

Sequences of about one length, and all with the same parent, are laid side by side and padded at the end: under the
causal rule no real token sees that padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from kimi_rl.kernels.segments import Segments

# A CPU's fused attention, which keeps no scores, wants v as wide as q and k. Padding v pays for itself under the causal
# rule at any length; under a mask only from about this many queries on (measured with heads of 48 and 32).
PAD_V_FROM = 256
# Sequences share a call while the shortest has at least this share of the longest one's tokens.
SHORTEST_SHARE = 0.7


def batches(segments: Segments) -> list[list[int]]:
    """Sequences to attend together: same parent, about the same length, longest first."""
    lengths = segments.lengths()
    found: list[list[int]] = []
    for n in sorted(range(len(segments)), key=lambda n: (segments.parents[n], -lengths[n])):
        first = found[-1][0] if found else None
        if (
            first is not None
            and segments.parents[first] == segments.parents[n]
            and lengths[n] >= SHORTEST_SHARE * lengths[first]
        ):
            found[-1].append(n)
        elif lengths[n]:
            found.append([n])
    return found


def varlen_attention_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, *, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """Same signature and shapes as `varlen_attention`."""
    bounds, outputs = segments.bounds, {}
    for batch in batches(segments):
        # [n, H, L, .]
        rows, keys, values = (
            pad_sequence([x[bounds[n] : bounds[n + 1]] for n in batch], batch_first=True).transpose(1, 2)
            for x in (q, k, v)
        )
        parent, mask = segments.parents[batch[0]], None
        if parent >= 0:
            before = slice(bounds[parent], bounds[parent + 1])
            keys, values = (
                torch.cat([x[before].transpose(0, 1).expand(len(batch), -1, -1, -1), own], dim=2)
                for x, own in ((k, keys), (v, values))
            )
            longest, seen = rows.shape[2], keys.shape[2]
            mask = torch.ones(longest, seen, dtype=torch.bool, device=q.device).tril(seen - longest)
        width = values.shape[-1]
        if q.device.type == "cpu" and (mask is None or rows.shape[2] >= PAD_V_FROM):
            values = F.pad(values, (0, max(0, rows.shape[-1] - width)))
        o = F.scaled_dot_product_attention(
            rows, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout
        )
        o = o[..., :width].transpose(1, 2)
        outputs |= {n: o[i, : bounds[n + 1] - bounds[n]] for i, n in enumerate(batch)}
    return torch.cat([outputs[n] for n in sorted(outputs)])
