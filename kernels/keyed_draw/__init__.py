"""Draws one token a row, with randomness that is a function of the row's seed and position alone.

vLLM keeps a random generator per request and launches a kernel for each of them in every step. Here the noise of a row
comes from a counter-based generator (Philox; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed
by the request's seed and counted by position and token: no state, so one launch draws for all rows, and what else is in
the batch, or whether a request was preempted, changes nothing.
"""

from __future__ import annotations

import torch

from kimi_rl.kernels.dispatch import choose
from kimi_rl.kernels.keyed_draw.reference import keyed_draw_reference


def keyed_draw(
    logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, temperature: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token a row from softmax(logits / temperature), by the Gumbel-max trick.

    Args:
        logits: [N, V], any float dtype; rows may be slices of a wider tensor; -inf: never drawn.
        seeds: int64 [N]. positions: int32 or int64 [N], below 2**31: which draw of that seed this is.
        temperature: float32 [N], above 0; unset: 1.

    Returns tokens, int32 [N], and the natural log of the probability each was drawn with, float32 [N].
    """
    if choose("keyed_draw", logits, has_fla=True) == "fla":
        from kimi_rl.kernels.keyed_draw.triton_draw import keyed_draw_triton

        return keyed_draw_triton(logits, seeds, positions, temperature)
    return keyed_draw_reference(logits, seeds, positions, temperature)


__all__ = ["keyed_draw", "keyed_draw_reference"]
