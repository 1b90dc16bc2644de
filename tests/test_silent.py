"""Completions of groups whose rewards are all equal are left out of the update: the same step from fewer tokens."""

import pytest
import torch
from stages import COMPARED, assert_equally_moved, distance, parity_reward

from kimi_rl.learner.packed import PackedLogps
from kimi_rl.learner.silent import SWITCH, fill_left_out, rows_to_run
from kimi_rl.rewards import Verdict


def mostly_uniform(pairs):
    """Equal rewards but where the problem's answer is a multiple of three."""
    plain = parity_reward(pairs)
    no = Verdict(0.0, "wrong", None, "no")
    return [verdict if int(gold) % 3 == 0 else no for verdict, (_, gold) in zip(plain, pairs, strict=True)]


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": "shared_prompt", "pack_tokens": 60, "scale_rewards": "group"},
        {"updates_per_step": 2, "micro_batch_size": 24, "loss_type": "grpo"},
        {"ptx": {"batch_size": 2, "weight": 0.5}, "importance_sampling": {"mode": "sequence_mask", "cap": 9.0}},
        {"max_staleness": 1, "steps": 3},
    ],
    ids=["shared prompts", "several updates", "supervised", "ahead"],
)
def test_the_same_run_from_fewer_tokens(step, monkeypatch, settings):
    settings = {"steps": 2, "learning_rate": 1e-3, "prompts_per_step": 12, "group_size": 4} | settings
    tokens, plain_pack = {"0": 0, "1": 0}, PackedLogps._pack
    rows = {}
    for skip in tokens:

        def counted(self, samples, device, skip=skip):
            tokens[skip] += sum(sample.length for sample in samples or ()) if torch.is_grad_enabled() else 0
            return plain_pack(self, samples, device)

        monkeypatch.setenv(SWITCH, skip)
        monkeypatch.setattr(PackedLogps, "_pack", counted)
        rows[skip] = step(shift=-0.2, verify=mostly_uniform, **settings)
    assert len(rows["0"]) == len(rows["1"]) == settings["steps"]
    for plain, ours in zip(rows["0"], rows["1"], strict=True):
        assert 0 < plain["effective_share"] < 0.7 and plain["grad_norm"] > 0
        for name in COMPARED:
            # What is measured is now measured on the completions that were run.
            loose = name.startswith(("mismatch", "is_", "off_policy")) or name == "entropy"
            bar = {"rel": 0.1, "abs": 0.02} if loose else {"rel": 2e-3, "abs": 2e-6}
            expected = plain.get(name)
            assert ours.get(name) == (None if expected is None else pytest.approx(expected, **bar)), name
    assert tokens["1"] < 0.85 * tokens["0"]
    assert_equally_moved(*step.weights)


@pytest.mark.parametrize("settings", [{"beta": 0.1}, {"loss_type": "k15", "tau": 0.5}], ids=["reference", "k15"])
def test_where_every_completion_counts_all_are_run(step, monkeypatch, settings):
    runs = []
    plain = PackedLogps._planned
    monkeypatch.setattr(PackedLogps, "_planned", lambda self, *a: runs.append(a[3:]) or plain(self, *a))
    monkeypatch.setenv(SWITCH, "1")
    step(verify=mostly_uniform, prompts_per_step=6, **settings)
    assert runs and all(run in ((), (None,)) for run in runs)


def test_an_update_in_which_nothing_speaks(step, monkeypatch):
    """All rewards equal: no movement, and what is measured is measured on the first completions."""
    monkeypatch.setenv(SWITCH, "1")
    (row,) = step(
        shift=-0.2, verify=lambda pairs: [Verdict(0.0, "wrong", None, "no") for _ in pairs], prompts_per_step=6
    )
    ((before, after),) = step.weights
    assert row["effective_share"] == 0 and distance(before, after) == 0
    assert row["entropy"] > 0 and row["mismatch_mean_abs"] == pytest.approx(0.2, abs=1e-3)


def test_rows_to_run():
    advantages = torch.tensor([0.0, 0.0, 1.0, 0.0, -0.5, 0.0])
    assert rows_to_run(advantages, always=1).tolist() == [True, False, True, False, True, False]
    by_token = advantages[:, None] * torch.ones(6, 3)
    assert rows_to_run(by_token, always=0).tolist() == [False, False, True, False, True, False]
    assert rows_to_run(advantages).all(), "a small micro-batch is run whole"


def test_means_over_what_was_left_out():
    values = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    filled = fill_left_out(values, torch.tensor([True, False, True]), count=3)
    assert filled.tolist() == [[1.0, 3.0, 0.0], [2.0, 2.0, 2.0], [2.0, 0.0, 0.0]]
    assert fill_left_out(torch.zeros(2, 2), torch.tensor([False, True]), count=0).isfinite().all()
