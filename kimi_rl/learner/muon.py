"""torch's Muon with matrices of one shape updated together.

torch takes its matrices one by one, with some thirty kernels each. A converted SmolLM2-135M has 320 of them: ten
thousand launches a step, each too small for the card, and more time for the host than a forward and backward.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

# Matrices of one shape together: on a card unless it is 0, elsewhere only if it is 1.
BATCHED_MUON = "KIMI_RL_BATCHED_MUON"

ELEMENTS = 1 << 27  # of the matrices taken together, so that a large model's need little memory beside it


def batches_matrices(device: torch.device) -> bool:
    return os.environ.get(BATCHED_MUON, "1" if device.type == "cuda" else "0") == "1"


def orthogonalised(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """[N, R, C] -> bf16 [N, R, C]: torch's Newton-Schulz iteration on each, rounded where torch rounds."""
    a, b, c = coefficients
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with updates of AdamW's size (`match_rms_adamw`). State and results are torch's, up to the
    order of sums."""

    def __init__(self, params, *, lr: float, weight_decay: float):
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        if not batches_matrices(self.param_groups[0]["params"][0].device):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[tuple, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((p.shape, p.dtype, p.grad.dtype, p.device), []).append(p)
            for alike in by_shape.values():
                count = max(1, ELEMENTS // alike[0].numel())
                for start in range(0, len(alike), count):
                    self._update(alike[start : start + count], group)
        return loss

    def _update(self, parameters: list[torch.nn.Parameter], group: dict) -> None:
        """One step of parameters of one shape."""
        lr, momentum = float(group["lr"]), group["momentum"]
        grads, buffers = [p.grad for p in parameters], []
        for p in parameters:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad, memory_format=torch.preserve_format)
            buffers.append(state["momentum_buffer"])
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        wanted = torch._foreach_lerp(grads, buffers, momentum) if group["nesterov"] else buffers
        found = orthogonalised(torch.stack(wanted), group["ns_coefficients"], group["ns_steps"], group["eps"])
        del wanted
        # In the parameters' dtype and layout, or each would be added by a launch of its own.
        updates = found.to(parameters[0].dtype).contiguous().unbind()
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, updates, alpha=-lr * 0.2 * max(parameters[0].shape) ** 0.5)
