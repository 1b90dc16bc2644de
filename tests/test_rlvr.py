"""The RLVR learner in this process, with real rollout workers: importance sampling, losses, prompt order, the gate."""

import math

import pytest

from kimi_rl.errors import RunError


def test_truncated_importance_sampling_is_alive(step):
    (plain,) = step()
    assert plain["is_ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert plain["grad_norm"] > 0
    # The engine claims tokens to be likelier by e^0.5 than the trainer says: every token weighs e^-0.5.
    (shifted,) = step(shift=0.5, packing="shared_prompt", pack_tokens=60)
    assert shifted["is_ratio_mean"] == pytest.approx(math.exp(-0.5), rel=1e-3)
    assert shifted["mismatch_mean_abs"] == pytest.approx(0.5, abs=1e-3)
    assert shifted["grad_norm"] == pytest.approx(plain["grad_norm"] * math.exp(-0.5), rel=1e-2)
    # Ratios beyond the cap are cut to it.
    (capped,) = step(shift=-3.0, importance_sampling={"cap": 2.0})
    assert capped["is_ratio_mean"] == pytest.approx(2.0, rel=1e-6)
    assert capped["is_truncated_share"] == 1.0
    assert capped["grad_norm"] == pytest.approx(plain["grad_norm"] * 2.0, rel=1e-2)
    # Switched off, the same shift changes nothing. (Nor does it matter that this batch is padded.)
    (off,) = step(shift=-3.0, importance_sampling={"enabled": False}, packing="off")
    assert off["entropy"] == pytest.approx(plain["entropy"], rel=1e-4)
    assert off["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "bnpo", "cispo"])
def test_losses_of_trl_are_selectable(step, loss_type):
    (row,) = step(loss_type=loss_type)
    assert row["grad_norm"] > 0 and math.isfinite(row["loss"])


def test_the_k15_objective_trains(step):
    rows = step(loss_type="k15", tau=0.5, steps=2, learning_rate=1e-3)
    assert all(row["grad_norm"] > 0 and math.isfinite(row["loss"]) for row in rows)
    # Micro-batches add up to the whole batch, padded ones to a packed one: the same first gradient.
    (halves,) = step(loss_type="k15", tau=0.5, micro_batch_size=4, packing="off")
    assert halves["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-3)
    (cut,) = step(loss_type="k15", tau=0.5, pack_tokens=60)
    assert cut["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-3)
    assert cut["loss"] == pytest.approx(rows[0]["loss"], rel=1e-3, abs=1e-6)


def test_kl_penalty_against_the_starting_model(step):
    rows = step(beta=0.1, steps=2, learning_rate=1e-3, packing="shared_prompt")
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows[1]["kl"] > 1e-7


def test_several_updates_and_micro_batches_per_step(step):
    terms = [{"use": "overlong", "weight": 0.5, "params": {"cache": 8}}]
    rows = step(
        steps=2, updates_per_step=2, micro_batch_size=2, packing="shared_prompt", reward={"terms": terms}
    )  # fmt: skip
    assert [row["step"] for row in rows] == [1, 2]
    assert [row["policy_version"] for row in rows] == [0, 1]
    assert [row["updates"] for row in rows] == [2, 2]
    # The reward that TRL got is the verdict's, which is 0 or 1 here, and the recipe's terms.
    samples = step.rollouts(1)
    for sample in samples:
        assert sample["reward_overlong"] == -sample["tokens"] / 8
        assert sample["reward"] - 0.5 * sample["reward_overlong"] in (0.0, 1.0)
    mean = sum(sample["reward"] for sample in samples) / len(samples)
    assert rows[0]["reward"] == pytest.approx(mean, abs=1e-5)
    assert rows[0]["reward_overlong"] == pytest.approx(sum(s["reward_overlong"] for s in samples) / len(samples))


def test_the_mismatch_gate_stops_the_run(step):
    with pytest.raises(RunError, match="mismatch.max_kl"):
        step(shift=1.0, steps=5, mismatch={"max_kl": 0.01, "patience": 2})


TIMES = ("_s", "_per_s", "idle_share", "time", "steps_total")


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in rows]


def test_overlapped_code_without_staleness_is_the_plain_loop(step):
    settings = dict(loss_type="k15", steps=3, learning_rate=1e-3, prompt_order="prioritized")
    plain = step(**settings)
    overlapped = step(**settings, overlap="on")
    assert len(plain) == 3 and plain[2]["grad_norm"] > 0
    assert without_times(plain) == without_times(overlapped), "bit-equal metrics"


def test_a_stage_without_evaluations_trains_the_same(step, tmp_path):
    plain = step(steps=2, learning_rate=1e-3)
    without = step(steps=2, learning_rate=1e-3, eval=None)
    assert without_times(plain) == without_times(without) and plain[1]["grad_norm"] > 0
    written = [{path.name for path in (tmp_path / name / "rollouts").iterdir()} for name in ("run0", "run1")]
    assert written == [{"rlvr", "rlvr_eval_before"}, {"rlvr"}]


def test_rollouts_ahead_stay_within_their_staleness(step):
    rows = step(
        steps=5, learning_rate=1e-3, max_staleness=2, mismatch={"max_kl": 1e-6, "probe_every": 2},
        rollout={"engine": "transformers", "max_tokens": 8, "slice_tokens": 3},
    )  # fmt: skip
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(0 <= row["staleness_max"] <= min(2, row["step"] - 1) for row in rows)
    assert sum(row["staleness_tokens"].get("0", 0) for row in rows[:1]) > 0
    assert rows[-1]["staleness_max"] >= 1
    # Where no token is fresh, a probe compares engine and trainer: they agree, although the old tokens do not.
    assert all("mismatch_kl" in row for row in rows if row["step"] % 2)
    assert all(row["mismatch_max_abs"] < 1e-4 for row in rows if "mismatch_kl" in row)
    assert rows[-1]["off_policy_kl"] > 1e-6


def test_the_supervised_term(step):
    (plain,) = step(loss_type="k15")
    (small,) = step(loss_type="k15", ptx={"weight": 1e-9, "batch_size": 4})
    (large,) = step(loss_type="k15", ptx={"weight": 10.0, "batch_size": 4})
    # A random model spreads its guesses over the vocabulary of 256 bytes and a few special tokens.
    assert small["ptx_loss"] == large["ptx_loss"] == pytest.approx(math.log(260), rel=0.05)
    assert small["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
    assert large["grad_norm"] > 2 * plain["grad_norm"]


def test_controllers_change_what_the_learner_does(step):
    rows = step(
        loss_type="k15", tau=0.5, steps=4, learning_rate=1e-3, updates_per_step=1, micro_batch_size=2,
        update_control={"max": 4, "calm_steps": 1, "max_kl": 1e3, "min_entropy": 0.0},
        kl_control={"target": 100.0, "rate": 0.5},
    )  # fmt: skip
    assert [row["updates"] for row in rows] == [1, 2, 4, 4], "calm: doubled up to the bound"
    assert [row["kl_coefficient"] for row in rows] == [0.5, 0.25, 0.125, 0.0625], "too little movement: less penalty"
    assert all(row["drift_kl"] > 0 for row in rows)
    assert "updates per step 1 -> 2: 1 calm steps" in rows[0]["controller_changes"]
    assert "tau 0.5 -> 0.25: KL" in rows[0]["controller_changes"][0]
