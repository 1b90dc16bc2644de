"""Old log-probs without a pass of their own, where a rollout batch gets one step: a mixin for `trl.GRPOTrainer`.

TRL asks for the old policy's log-probs in a forward before the update, to weigh tokens that another engine drew. Up to
the batch's only step the old policy is the policy, so the update's forward gives the same numbers, and the weights are
worked out between it and the loss. Of the work of a forward three times (a backward counts two) it spares a fourth.
`KIMI_RL_ONE_PASS=0` takes the pass before the update, as TRL does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from kimi_rl.mismatch import importance_ratio

SWITCH = "KIMI_RL_ONE_PASS"


class OnePass:
    """Trainer mixin, to stand before `PackedLogps`."""

    one_pass = False  # whether the current rollout batch is trained on without a pass before the update
    _open: dict[str, Any] | None = None  # the micro-batch whose loss is being computed

    @contextlib.contextmanager
    def scoring(self, one_pass: bool) -> Iterator[None]:
        """Around TRL's scoring of a rollout batch. With `one_pass` TRL leaves old log-probs and weights out of it."""
        before = self.vllm_importance_sampling_correction
        self.one_pass = one_pass
        self.vllm_importance_sampling_correction = before and not one_pass
        try:
            yield
        finally:
            self.vllm_importance_sampling_correction = before

    def _compute_loss(self, model, inputs) -> torch.Tensor:
        if not self.one_pass:
            return super()._compute_loss(model, inputs)
        self._open = inputs
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._open = None

    def _get_per_token_logps_and_entropies(self, model, *args: Any, **kwargs: Any):
        """As before; into the micro-batch goes what TRL's scoring left out of it, before the loss looks for it."""
        logps, entropies, balance = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._open is not None:
            self._open["old_per_token_logps"] = logps.detach()
            self._open["importance_sampling_ratio"] = importance_ratio(
                logps.detach(),
                self._open["sampling_per_token_logps"],
                self._open["completion_mask"],
                mode=self.vllm_importance_sampling_mode,
                low=self.vllm_importance_sampling_clip_min,
                high=self.vllm_importance_sampling_clip_max,
            )
        return logps, entropies, balance
