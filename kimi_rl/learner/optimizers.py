"""Muon for the hidden matrices, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from kimi_rl.learner.muon import Muon


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on some parameters and `torch.optim.AdamW` on the others, under one learning rate.

    Muon's updates are scaled to the size of AdamW's (`match_rms_adamw`, as in Moonlight, arXiv 2502.16982), so that one
    rate fits both. Weight decay is for matrices. Parameters that need no gradient are left out.
    """

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        others: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
    ):
        matrices = [p for p in matrices if p.requires_grad]
        others = [p for p in others if p.requires_grad]
        self.parts: list[torch.optim.Optimizer] = []
        super().__init__([*matrices, *others], {"lr": lr})
        if matrices:
            self.parts.append(Muon(matrices, lr=lr, weight_decay=weight_decay))
        if others:
            wide, flat = [p for p in others if p.ndim > 1], [p for p in others if p.ndim <= 1]
            groups = [{"params": wide, "weight_decay": weight_decay}, {"params": flat, "weight_decay": 0.0}]
            self.parts.append(torch.optim.AdamW([g for g in groups if g["params"]], lr=lr))
        self._share_groups()

    def _share_groups(self) -> None:
        """Schedulers change `param_groups` in place: they are the parts' own."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


def muon_with_adamw(model: torch.nn.Module, *, lr: float, weight_decay: float) -> MuonWithAdamW:
    """For a `KimiLinearForCausalLM`: Muon on the 2-D weights of its layers, AdamW on the rest."""
    hidden = {id(p) for p in model.model.layers.parameters() if p.ndim == 2}
    parameters = list(model.parameters())
    return MuonWithAdamW(
        [p for p in parameters if id(p) in hidden],
        [p for p in parameters if id(p) not in hidden],
        lr=lr,
        weight_decay=weight_decay,
    )
