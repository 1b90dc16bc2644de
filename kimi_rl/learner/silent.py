"""Completions that cannot move the policy, and so are left out of the update.

In a group whose rewards are all equal every advantage is zero, and with it the gradient of TRL's clipped objectives. Of
a model that is seldom or nearly always right most groups are such. Their completions stay in the loss's denominators
and among the rewards; only their forward and backward are spared. `KIMI_RL_SKIP_SILENT=0` runs them too.
"""

from __future__ import annotations

import torch

SWITCH = "KIMI_RL_SKIP_SILENT"
ALWAYS = 16  # the first rows of a micro-batch, run in any case: entropy, mismatch and drift are measured on them, too


def rows_to_run(advantages: torch.Tensor, always: int = ALWAYS) -> torch.Tensor:
    """bool [B]: the rows of a micro-batch that the update has to run.

    advantages [B] or, token by token, [B, C]: those that differ from zero anywhere, and the first `always`.
    """
    run = (advantages != 0).reshape(len(advantages), -1).any(1)
    run[:always] = True
    return run


def fill_left_out(values: torch.Tensor, run: torch.Tensor, count: int) -> torch.Tensor:
    """values [B, C], zero but for `count` tokens of the rows `run` (bool [B]) -> their mean in all other rows, so that
    a mean over all tokens is close to that over those which were run."""
    return torch.where(run[:, None], values, values.sum() / max(1, count))
