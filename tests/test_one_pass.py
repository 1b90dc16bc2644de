"""The RLVR learner without a pass for old log-probs: the same updates and figures as with it, from fewer forwards."""

import math

import pytest
import torch
from stages import COMPARED, assert_equally_moved

from kimi_rl.errors import RunError
from kimi_rl.learner.one_pass import SWITCH
from kimi_rl.learner.rlvr import RLVRLearner, fresh_mask
from kimi_rl.mismatch import importance_ratio

MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def counted(monkeypatch):
    """Forwards of the policy before and in updates: [without gradients, with]; not those that measure drift after."""
    counts = [0, 0]
    plain, drift = RLVRLearner._score, RLVRLearner._measure_drift

    def score(self, model, *args):
        counts[torch.is_grad_enabled()] += model is self.model
        return plain(self, model, *args)

    def measure_drift(self):
        before = list(counts)
        found = drift(self)
        counts[:] = before
        return found

    monkeypatch.setattr(RLVRLearner, "_score", score)
    monkeypatch.setattr(RLVRLearner, "_measure_drift", measure_drift)
    return counts


CASES = {
    "shared prompts, micro-batches": {"packing": "shared_prompt", "pack_tokens": 60, "micro_batch_size": 4},
    "padded, a reference": {"packing": "off", "beta": 0.1},
    "k15, supervised, drift": {
        "loss_type": "k15", "tau": 0.5, "pack_tokens": 60, "ptx": {"batch_size": 2, "weight": 0.5},
        "kl_control": {"target": 100.0, "rate": 0.5},
    },
    "sequences": {"importance_sampling": {"mode": "sequence_truncate", "cap": 3.0}, "pack_tokens": 60},
    "ahead": {"max_staleness": 1, "steps": 3, "importance_sampling": {"mode": "token_mask", "cap": 1.3}},
}  # fmt: skip; a weight is e^0.2 a token and, of eight tokens, e^1.6 a completion


@pytest.mark.parametrize("case", CASES)
def test_the_same_run_with_a_quarter_less_work(step, monkeypatch, case):
    """A shift makes the engine's log-probs differ from the policy's, so that weights are no ones."""
    settings = {"steps": 2, "learning_rate": 1e-3, "shift": -0.2, **CASES[case]}
    counts = counted(monkeypatch)
    rows, forwards = {}, {}
    for one in ("0", "1"):
        monkeypatch.setenv(SWITCH, one)
        counts[:] = 0, 0
        rows[one], forwards[one] = step(**settings), list(counts)
    assert len(rows["0"]) == len(rows["1"]) == settings["steps"]
    for plain, ours in zip(rows["0"], rows["1"], strict=True):
        for name in COMPARED:
            expected = plain.get(name)
            assert ours.get(name) == (None if expected is None else pytest.approx(expected, rel=2e-3, abs=2e-6)), name
        assert plain["grad_norm"] > 0 and plain.get("mismatch_mean_abs", 0.2) == pytest.approx(0.2, abs=1e-3)
    if settings.get("packing") != "off":
        assert forwards["1"] == [0, forwards["0"][1]] and forwards["0"][0] > 0
    assert_equally_moved(*step.weights)


def test_the_gate_closes_before_the_update(step, monkeypatch):
    """As with the pass of its own: the weights are those of the step before."""
    monkeypatch.setenv(SWITCH, "1")
    taken = []
    plain = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: taken.append(1) or plain(self, *a, **k))
    with pytest.raises(RunError, match="mismatch.max_kl"):
        step(shift=1.0, steps=5, mismatch={"max_kl": 0.01, "patience": 2})
    assert len(taken) == 1, "of two steps with the mismatch above the bar the second is not taken"


def test_several_updates_need_the_old_policy(step, monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    counts = counted(monkeypatch)
    step(updates_per_step=2, micro_batch_size=4)
    assert counts[0] > 0


@pytest.mark.parametrize("mode", MODES)
def test_weights_by_the_definition(mode):
    generator = torch.Generator().manual_seed(5)
    engine = -2 + torch.randn(6, 9, generator=generator, dtype=torch.float64)
    policy = engine + 0.4 * torch.randn(6, 9, generator=generator, dtype=torch.float64)
    mask = (torch.rand(6, 9, generator=generator) < 0.8).double()
    engine[2, 3] = math.nan
    found = importance_ratio(policy, engine, mask, mode=mode, low=0.7, high=1.5)
    for row in range(6):
        known = [m and not math.isnan(e) for m, e in zip(mask[row].tolist(), engine[row].tolist(), strict=True)]
        pairs = zip(policy[row].tolist(), engine[row].tolist(), known, strict=True)
        exact = [math.exp(p - e) if k else 1.0 for p, e, k in pairs]
        if mode.startswith("sequence"):
            exact = [math.prod(exact)]
        exact = [min(max(v, 0.7), 1.5) if mode.endswith("truncate") else v * (0.7 <= v <= 1.5) for v in exact]
        assert found[row].tolist() == pytest.approx(exact)
    assert (importance_ratio(policy, engine, mask, mode=mode, low=None, high=None) > 0).all()


def test_tokens_of_older_versions_are_not_fresh():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert fresh_mask(mask, [[0, 0, 0], [0, 0]]) is mask
    assert fresh_mask(mask, [[1, 0, 0], [0, 2]]).tolist() == [[0, 1, 1, 0], [1, 0, 0, 0]]
