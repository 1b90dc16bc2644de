"""An RLVR stage that tests run in their own process, with real rollout workers: see the fixture `step`."""

from __future__ import annotations

from kimi_rl.recipe import Recipe
from kimi_rl.rewards import Verdict

# Figures of a step that do not depend on how the learner computes it.
COMPARED = (
    "loss", "grad_norm", "entropy", "kl", "reward", "is_ratio_mean", "is_truncated_share", "mismatch_kl",
    "mismatch_mean_abs", "mismatch_max_abs", "mismatch_ratio_p01", "mismatch_ratio_p99", "off_policy_kl",
    "staleness_max", "staleness_tokens", "ptx_loss", "clip_share", "drift_kl", "kl_coefficient",
)  # fmt: skip


def recipe(reward=None, **stage) -> Recipe:
    return Recipe.model_validate(
        {
            "reward": reward or {},
            "data": {"task": "arithmetic", "params": {"level": 1}, "train_size": 64, "held_out_size": 4},
            "stages": [
                {
                    "kind": "rlvr",
                    "steps": 1,
                    "prompts_per_step": 2,
                    "group_size": 4,
                    "scale_rewards": "none",
                    "mismatch": {"max_kl": None},
                    "rollout": {"engine": "transformers", "max_tokens": 8},
                    **stage,
                }
            ],
        }
    )


def parity_reward(pairs):
    """A reward that varies with the completion: random models are never right, and equal rewards teach nothing."""
    return [Verdict(float(sum(text.encode()) % 2), "wrong", None, "stand-in") for text, _ in pairs]


def distance(one, other):
    """Between the weights of two models."""
    return sum((one[name] - other[name]).double().square().sum() for name in one) ** 0.5


def assert_equally_moved(plain, ours):
    """Two runs (weights before and after) moved, and by about the same."""
    (start, plain), (_, ours) = plain, ours
    moved, apart = distance(plain, start), distance(plain, ours)
    assert moved > 0 and apart < 0.02 * moved
