"""Whole runs on the CPU: real Ray actors, real TRL trainers, killed and resumed."""

import json
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from runs import (
    ROOT,
    kill_session,
    metrics,
    processes_named,
    run,
    start,
    summary,
    train_steps,
    wait_for,
    write_recipe,
)
from safetensors.torch import load_file

from kimi_rl.run_dir import RunDir

DATA = ROOT.parent / "shared" / "data"


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """One uninterrupted run of the small recipe, to compare the disturbed ones with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run("train", write_recipe(folder), "--out", folder / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def assert_same_training(out: Path, other: Path) -> None:
    keep = ("stage", "step", "loss", "reward", "accuracy", "completion_length", "held_out_accuracy", "grad_norm",
            "updates", "kl_coefficient", "ptx_loss", "sampling_groups", "controller_changes")
    rows, others = (
        [{k: row.get(k) for k in keep} for row in metrics(path) if row["type"] != "note"] for path in (out, other)
    )
    assert rows == others
    ours, theirs = weights(out), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_is_complete_and_recorded(undisturbed):
    assert train_steps(undisturbed, "sft") == [1, 2, 3, 4, 5, 6]
    assert train_steps(undisturbed, "rlvr") == [1, 2, 3, 4, 5, 6]
    result = summary(undisturbed)
    assert result["status"] == "complete"
    assert [stage["name"] for stage in result["stages"]] == ["sft", "rlvr"]
    assert all(0 <= stage["held_out_accuracy"] <= 1 for stage in result["stages"])
    rows = [r for r in metrics(undisturbed) if r["type"] == "train" and r["stage"] == "rlvr"]
    assert all(r["grad_norm"] > 0 for r in rows), "weights must move for what follows to mean anything"
    assert [r["policy_version"] for r in rows] == [0, 1, 2, 3, 4, 5]
    # Trainer and rollout log-probs agree on every sampled token of left-padded, ragged batches.
    assert 0 < max(r["mismatch_max_abs"] for r in rows) < 1e-4
    rollouts = pd.concat(pd.read_parquet(p) for p in sorted((undisturbed / "rollouts" / "rlvr").glob("*.parquet")))
    assert len(rollouts) == 6 * 16
    assert {"question", "completion", "gold", "status", "reason", "reward", "advantage"} <= set(rollouts.columns)
    page = (undisturbed / "report.html").read_text()
    assert "small" in page and "plotly" in page.lower()
    (environment,) = RunDir(undisturbed).environments()
    assert environment["versions"]["torch"] == torch.__version__ and environment["versions"]["torch"] in page


def test_the_final_model_is_what_the_learner_trained(undisturbed):
    start_weights = load_file(undisturbed / "stages" / "start" / "model" / "model.safetensors")
    final = weights(undisturbed)
    assert start_weights.keys() == final.keys()
    assert all(not torch.equal(start_weights[n], final[n]) for n in final if n.endswith("q_proj.weight"))


def test_killed_in_sft_then_in_rlvr_then_without_its_worker_equals_undisturbed(undisturbed, tmp_path):
    recipe, out = write_recipe(tmp_path), tmp_path / "run"
    process = start("train", recipe, "--out", out)
    wait_for(lambda: len(train_steps(out, "sft")) >= 4, process=process)
    kill_session(process)
    assert not (out / "summary.json").exists()

    process = start("train", recipe, "--out", out, "--resume")
    wait_for(lambda: len(train_steps(out, "rlvr")) >= 2, process=process)
    kill_session(process)
    assert not (out / "summary.json").exists()
    killed = time.time()

    process = start("train", recipe, "--out", out, "--resume")
    wait_for(lambda: any(row["type"] == "train" and row["time"] > killed for row in metrics(out)), process=process)
    victims = processes_named("ray::RolloutWorker", process)
    assert victims
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert summary(out)["stages"][1]["workers_restarted"] >= 1
    assert train_steps(out, "sft") == [1, 2, 3, 4, 5, 6]
    assert train_steps(out, "rlvr") == [1, 2, 3, 4, 5, 6]
    assert_same_training(out, undisturbed)


@pytest.mark.skipif(not DATA.is_dir(), reason="the math data sets are not here")
def test_real_gsm8k_rows_and_the_mla_arm(tmp_path):
    out = tmp_path / "run"
    done = run(
        "train", write_recipe(tmp_path), f"data.path={DATA}/gsm8k", "data.train_size=64", "data.held_out_size=4",
        "model.arch=mla", "stages.sft.steps=2", "stages.sft.max_length=1024", "stages.rlvr.steps=2",
        "stages.rlvr.prompts_per_step=2", "stages.rlvr.group_size=2", "stages.rlvr.micro_batch_size=1", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rollouts = pd.concat(pd.read_parquet(p) for p in (out / "rollouts" / "rlvr").glob("*.parquet"))
    with (DATA / "gsm8k" / "train.jsonl").open(encoding="utf-8") as lines:
        real = {json.loads(line)["question"] for line in lines}
    assert len(rollouts) == 8 and set(rollouts["question"]) <= real
    assert rollouts["status"].notna().all() and rollouts["completion"].notna().all()
    kinds = json.loads((out / "model" / "config.json").read_text())["layer_types"]
    assert set(kinds) == {"full_attention"}
