"""Controllers: small state machines that move a setting by what they see. Pure: state in, state and reason out.

The Kimi Linear report trains with "dynamically adjusted KL penalty and number of updates per iteration" and states no
rule; the rules here are ours.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from kimi_rl.recipe import KLControl, RLVRStage, UpdateControl


@dataclass(frozen=True)
class KLState:
    """`coefficient`: the factor of the KL penalty, in units of reward per nat."""

    coefficient: float


def adjust_kl(state: KLState, kl: float, control: KLControl) -> tuple[KLState, str | None]:
    """Move the coefficient towards a measured KL of `control.target`; returns the new state and why it changed.

    Proportional, with the error clipped (the adaptive controller of Ziegler et al., arXiv 1909.08593, section 2.2):
    coefficient *= 1 + clip(kl / target - 1, -rate, rate). A KL that is not a number leaves the state as it is.
    """
    if not math.isfinite(kl):
        return state, None
    error = max(-control.rate, min(control.rate, kl / control.target - 1.0))
    moved = max(control.min, min(control.max, state.coefficient * (1.0 + error)))
    if moved == state.coefficient:
        return state, None
    word = "above" if error > 0 else "below"
    return KLState(moved), f"KL {kl:.3g} is {word} the target {control.target:g}"


@dataclass(frozen=True)
class UpdateState:
    """`updates`: optimizer steps per rollout batch. `calm`: steps inside the band since the last change."""

    updates: int
    calm: int = 0


def possible_updates(micro_batches: int, control: UpdateControl) -> list[int]:
    """Update counts that cut `micro_batches` into equal parts, ascending; holds at least `control.max`."""
    return [n for n in range(control.min, control.max + 1) if micro_batches % n == 0]


def adjust_updates(
    state: UpdateState, kl: float, entropy: float, control: UpdateControl, possible: list[int]
) -> tuple[UpdateState, str | None]:
    """Fewer updates when the policy moves too far or its entropy leaves its band, more when all is calm.

    Args:
        kl: how far the step moved the policy, in nats per token. entropy: mean entropy per token, in nats.
        possible: update counts to choose from (see `possible_updates`).

    Returns:
        The new state, and why `updates` changed (None: it did not).
    """
    trouble = None
    if kl > control.max_kl:
        trouble = f"KL {kl:.3g} is above max_kl {control.max_kl:g}"
    elif entropy < control.min_entropy:
        trouble = f"entropy {entropy:.3g} is below min_entropy {control.min_entropy:g}"
    elif control.max_entropy is not None and entropy > control.max_entropy:
        trouble = f"entropy {entropy:.3g} is above max_entropy {control.max_entropy:g}"
    if trouble is not None:
        lower = [n for n in possible if n <= state.updates / 2] or possible[:1]
        updates = min(state.updates, lower[-1])
        return UpdateState(updates, 0), trouble if updates != state.updates else None
    calm = state.calm + 1
    higher = [n for n in possible if state.updates < n <= max(2 * state.updates, state.updates + 1)]
    if calm >= control.calm_steps and higher:
        return UpdateState(higher[-1], 0), f"{calm} calm steps"
    return replace(state, calm=calm), None


class Controllers:
    """The controllers of one stage, and what they hold; the state travels in the checkpoint."""

    def __init__(self, stage: RLVRStage):
        self._stage = stage
        self._kl = KLState(stage.tau if stage.loss_type == "k15" else stage.beta)
        self._updates = UpdateState(stage.updates_per_step)
        micro_batches = stage.completions_per_step // stage.micro_batch
        control = stage.update_control
        self._possible = possible_updates(micro_batches, control) if control else [stage.updates_per_step]

    @property
    def kl_coefficient(self) -> float:
        return self._kl.coefficient

    @property
    def updates(self) -> int:
        return self._updates.updates

    @property
    def needs_drift(self) -> bool:
        """Whether somebody looks at how far a step moved the policy."""
        stage = self._stage
        return stage.update_control is not None or (stage.kl_control is not None and stage.loss_type == "k15")

    def step(self, *, drift: float, reference_kl: float, entropy: float) -> list[str]:
        """Take in what a step did; returns one sentence for every setting that changed.

        drift: KL per token from the policy before the step to the one after it. reference_kl: KL per token to the
        reference policy. entropy: per token. All in nats.
        """
        changes = []
        stage = self._stage
        if stage.kl_control is not None:
            name, kl = ("tau", drift) if stage.loss_type == "k15" else ("beta", reference_kl)
            old = self._kl.coefficient
            self._kl, reason = adjust_kl(self._kl, kl, stage.kl_control)
            if reason:
                changes.append(f"{name} {old:.4g} -> {self._kl.coefficient:.4g}: {reason}")
        if stage.update_control is not None:
            before = self._updates.updates
            self._updates, reason = adjust_updates(
                self._updates, drift, entropy, stage.update_control, self._possible
            )
            if reason:
                changes.append(f"updates per step {before} -> {self._updates.updates}: {reason}")
        return changes

    def state(self) -> dict[str, Any]:
        return {"kl": asdict(self._kl), "updates": asdict(self._updates)}

    def load(self, state: dict[str, Any]) -> None:
        self._kl, self._updates = KLState(**state["kl"]), UpdateState(**state["updates"])
