"""Run folders as `kimi_rl.pipeline.train` leaves them, made from a formula in milliseconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from ray import cloudpickle

from kimi_rl.recipe_load import dump_recipe, parse_recipe
from kimi_rl.run_dir import RunDir

BASE = {
    "name": "base",
    "model": {"size": "tiny"},
    "data": {"task": "arithmetic", "train_size": 100, "held_out_size": 40},
    "stages": [
        {"kind": "sft", "steps": 4},
        {"kind": "rlvr", "steps": 12, "prompts_per_step": 4, "group_size": 2, "eval": {"every": 4}},
    ],
}
PROBLEMS = 40
QUESTIONS = [f"{i}+1=?" for i in range(PROBLEMS)]


def chance(arch: str, seed: int, share: float, gain: float) -> float:
    """Accuracy of an arm at `share` of a stage: the hybrid ends `gain` higher, seeds differ a little."""
    luck = 0.03 * np.sin(7.0 * seed + (3.0 if arch == "mla" else 0.0))
    return float(np.clip(0.2 + 0.4 * share + (gain * share if arch == "hybrid" else 0.0) + luck, 0, 1))


def make_run(recipe, out: Path, *, resume: bool = False, gain: float = 0.3) -> dict:
    """A stand-in for `kimi_rl.pipeline.train`: writes metrics, evaluations, rollouts, state and summary."""
    run = RunDir.create(out, dump_recipe(recipe), resume=resume)
    run.write_environment({"python": "3.11.0", "gpus": ["a card elsewhere"]})
    arch, seed = recipe.model.arch, recipe.seed
    draw = np.random.default_rng([seed, arch == "mla"])
    results = []
    for stage in recipe.stages:
        head = {"stage": stage.name, "kind": stage.kind, "steps_total": stage.steps, "time": 1.0}
        marks = sorted({0, *range(0, stage.steps, stage.eval.every or stage.steps), stage.steps})
        for step in range(stage.steps + 1):
            if step:
                run.append_metrics({"type": "train", "step": step, **head, **_train_row(stage, arch, seed, step, gain)})
            if step in marks:
                when = "before" if step == 0 else "after" if step == stage.steps else "during"
                right = draw.random(PROBLEMS) < chance(arch, seed, step / stage.steps, gain)
                rows = [{"question": q, "status": "correct" if r else "wrong"} for q, r in zip(QUESTIONS, right,
                                                                                              strict=True)]  # fmt: skip
                run.write_rollouts(f"{stage.name}_eval_{when}", step, rows)
                run.append_metrics(
                    {"type": "eval", "step": step, **head, "when": when, "eval_s": 0.5,
                     "held_out_accuracy": float(right.mean()), "held_out_se": 0.05, "mean_length": 20.0, "k": 0}
                )  # fmt: skip
            if step and stage.kind == "rlvr":
                run.write_rollouts(stage.name, step, [{"id": f"{seed}-{step}-{i}"} for i in range(4)])
        results.append({"name": stage.name, "held_out_accuracy": float(right.mean()), "seconds": 10.0})
    run.save_state({"status": "finished", "stages": results})
    run.write_summary({"status": "complete", "stages": results, "seconds": 20.0})
    return {}


def _train_row(stage, arch: str, seed: int, step: int, gain: float) -> dict:
    evaluated = stage.eval.every and step % stage.eval.every == 0 and step < stage.steps
    step_s = 2.0 + (0.5 if evaluated else 0.0)  # as in real runs, an evaluation inside the stage counts in its step
    row = {"step_s": step_s, "tokens_per_s": 1000 / step_s, "entropy": 1.0, "loss": 0.5, "mean_token_accuracy": 0.5}
    if stage.kind == "rlvr":
        tokens = 100 if arch == "hybrid" else 150
        row |= {"accuracy": chance(arch, seed, step / stage.steps, gain), "reward": 0.1, "completion_length": 9.0,
                "mismatch_kl": 1e-6 * step, "learner_s": 1.0, "learner_tokens_per_s": tokens,
                "rollout_tokens_per_s": 50.0}  # fmt: skip
    return row


def failing(recipe, out: Path, *, resume: bool = False) -> dict:
    """As `make_run`, but seed 1 of the hybrid fails, and its process dies at seed 2."""
    if recipe.model.arch == "hybrid" and recipe.seed == 1:
        raise RuntimeError("no luck\nat all")
    if recipe.model.arch == "hybrid" and recipe.seed == 2:
        import os

        os._exit(1)
    return make_run(recipe, out, resume=resume)


def recipe(arch: str, seed: int, **fields):
    return parse_recipe(json.dumps(BASE | fields), [f"model.arch={arch}", f"seed={seed}"])


cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import the tests
