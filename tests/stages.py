"""An RLVR stage that tests run in their own process, with real rollout workers: see the fixture `step`."""

from __future__ import annotations

from kimi_rl.recipe import Recipe
from kimi_rl.rewards import Verdict


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
