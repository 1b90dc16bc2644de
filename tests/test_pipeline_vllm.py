"""Whole runs on the CPU with vLLM in the rollout workers."""

import signal

import pandas as pd
import pytest
from runs import SMALL, metrics, processes_named, run, start, summary, train_steps, wait_for, write_recipe

# Completions long enough for a kill to land in the middle of generating them.
RLVR = SMALL["stages"][1]
VLLM = {"stages": [RLVR | {"steps": 4, "rollout": {"engine": "vllm", "max_tokens": 96}}]}


@pytest.fixture(scope="module")
def vllm_run(tmp_path_factory):
    """The small recipe with vLLM (CPU) in its rollout workers, undisturbed."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("vllm")
    done = run("train", write_recipe(folder, **VLLM), "--out", folder / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def test_vllm_in_ray_agrees_with_the_trainer_on_every_step(vllm_run):
    rows = [r for r in metrics(vllm_run) if r["type"] == "train" and r["stage"] == "rlvr"]
    assert [r["policy_version"] for r in rows] == [0, 1, 2, 3]
    assert all(r["grad_norm"] > 0 for r in rows), "weights must move for the agreement to mean anything"
    assert all(0 < r["mismatch_max_abs"] < 1e-4 and r["mismatch_kl"] < 1e-6 for r in rows)


def test_a_vllm_engine_killed_mid_generation_loses_no_group(vllm_run, tmp_path):
    recipe, out = write_recipe(tmp_path, **VLLM), tmp_path / "run"
    process = start("train", recipe, "--out", out)
    wait_for(lambda: len(train_steps(out, "rlvr")) >= 1, process=process)
    victims = wait_for(lambda: processes_named("ray::RolloutWorker.generate", process), process=process, pause=0.002)
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert summary(out)["stages"][0]["workers_restarted"] >= 1

    def groups(folder):
        files = sorted((folder / "rollouts" / "rlvr").glob("*.parquet"))
        return [pd.read_parquet(file)[["id", "group"]].values.tolist() for file in files]

    assert groups(out) == groups(vllm_run)
