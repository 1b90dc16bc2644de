"""Controllers as pure state machines, and the entropy collapse that they must answer."""

import math

import pytest

from kimi_rl.learner.controllers import (
    Controllers,
    KLState,
    UpdateState,
    adjust_kl,
    adjust_updates,
    possible_updates,
)
from kimi_rl.recipe import KLControl, RLVRStage, UpdateControl


def test_kl_coefficient_moves_towards_the_target():
    control = KLControl(target=0.01, min=0.01, max=1.0, rate=0.2)
    up, reason = adjust_kl(KLState(0.1), 0.05, control)
    assert up.coefficient == pytest.approx(0.12) and "above the target" in reason
    down, reason = adjust_kl(KLState(0.1), 0.0, control)
    assert down.coefficient == pytest.approx(0.08) and "below the target" in reason
    assert adjust_kl(KLState(0.1), 0.0105, control)[0].coefficient == pytest.approx(0.105)
    assert adjust_kl(KLState(1.0), 9.0, control) == (KLState(1.0), None), "held at its bound"
    assert adjust_kl(KLState(0.1), math.nan, control) == (KLState(0.1), None)


def test_kl_controller_settles_where_the_target_is():
    """A policy whose KL per step falls with the coefficient as 0.004 / coefficient meets the target at 0.4."""
    control, state = KLControl(target=0.01, rate=0.1), KLState(0.05)
    for _ in range(100):
        state, _ = adjust_kl(state, 0.004 / state.coefficient, control)
    assert state.coefficient == pytest.approx(0.4, rel=1e-3)


CONTROL = UpdateControl(min=1, max=8, max_kl=0.05, min_entropy=0.2, max_entropy=3.0, calm_steps=2)


def test_updates_are_cut_in_trouble_and_raised_when_calm():
    possible = possible_updates(8, CONTROL)
    assert possible == [1, 2, 4, 8]
    for kl, entropy, word in ((0.06, 1.0, "max_kl"), (0.0, 0.1, "min_entropy"), (0.0, 3.1, "max_entropy")):
        state, reason = adjust_updates(UpdateState(8, 1), kl, entropy, CONTROL, possible)
        assert state == UpdateState(4, 0) and word in reason
        assert adjust_updates(UpdateState(1), kl, entropy, CONTROL, possible) == (UpdateState(1, 0), None)
    state, reason = adjust_updates(UpdateState(2), 0.01, 1.0, CONTROL, possible)
    assert state == UpdateState(2, 1) and reason is None
    state, reason = adjust_updates(state, 0.01, 1.0, CONTROL, possible)
    assert state == UpdateState(4, 0) and "calm" in reason
    state, _ = adjust_updates(UpdateState(8, 5), 0.01, 1.0, CONTROL, possible)
    assert state.updates == 8


def test_odd_numbers_of_micro_batches():
    possible = possible_updates(6, CONTROL)
    assert possible == [1, 2, 3, 6]
    assert adjust_updates(UpdateState(3, 9), 0.0, 1.0, CONTROL, possible)[0].updates == 6
    assert adjust_updates(UpdateState(3), 1.0, 1.0, CONTROL, possible)[0].updates == 1


def stage(**values) -> RLVRStage:
    base = {"kind": "rlvr", "steps": 1, "prompts_per_step": 4, "group_size": 4, "scale_rewards": "none"}
    return RLVRStage.model_validate({**base, "loss_type": "k15", **values})


def test_an_entropy_collapse_is_answered():
    """Entropy that each update takes a tenth of: without control it is gone after 15 steps of 4 updates."""
    controlled = Controllers(
        stage(
            updates_per_step=4,
            tau=0.1,
            kl_control={"target": 0.01, "rate": 0.3},
            update_control={"max": 4, "min_entropy": 0.5, "max_kl": 0.02, "calm_steps": 50},
        )
    )
    entropy, changes = {"controlled": 2.0, "free": 2.0}, []
    for _ in range(15):
        entropy["free"] *= 0.9**4
        # A stronger penalty slows the collapse in proportion.
        loss = 0.1 * controlled.updates / max(1.0, controlled.kl_coefficient / 0.1)
        entropy["controlled"] *= 1 - loss
        changes += controlled.step(drift=loss / 4, reference_kl=math.nan, entropy=entropy["controlled"])
    assert entropy["free"] < 0.01 < 0.5 < entropy["controlled"]
    assert controlled.updates == 1 and controlled.kl_coefficient > 0.1
    assert any("updates per step 4 -> 2: KL" in change for change in changes)
    assert any(change.startswith("tau 0.1 -> 0.13: KL") for change in changes)


def test_state_travels():
    settings = dict(updates_per_step=2, update_control={"max": 4}, kl_control={"target": 0.1}, tau=0.5)
    first, second = Controllers(stage(**settings)), Controllers(stage(**settings))
    for drift in (0.3, 0.01, 0.0, 0.0):
        first.step(drift=drift, reference_kl=math.nan, entropy=1.0)
    second.load(first.state())
    assert (second.updates, second.kl_coefficient) == (first.updates, first.kl_coefficient)
    for controller in (first, second):
        controller.step(drift=0.0, reference_kl=math.nan, entropy=1.0)
    assert first.state() == second.state()


def test_beta_is_steered_by_the_reference_kl():
    control = Controllers(stage(loss_type="dapo", beta=0.1, kl_control={"target": 0.1}))
    assert not control.needs_drift
    (change,) = control.step(drift=math.nan, reference_kl=0.3, entropy=1.0)
    assert change.startswith("beta 0.1 -> 0.11")
