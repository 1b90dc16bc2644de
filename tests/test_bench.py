"""The measurements behind `kimi-rl bench`, on tiny models: shapes of the answers, and that the checks can fail."""

import json

import pytest
import torch
from runs import run

from kimi_rl.bench.parity import compare


def test_compare_reads_ragged_rows():
    found = compare([torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])], [[-1.0, -2.5], [-3.0]])
    assert found.max_abs == pytest.approx(0.5)
    assert found.mean_abs == pytest.approx(0.5 / 3)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_parity(tiny_models, engine):
    if engine == "vllm":
        pytest.importorskip("vllm")
    done = run(
        "bench", "parity", tiny_models["hybrid", "dense"], "--engine", engine, "--steps", 2, "--prompts", 3,
        "--prompt-tokens", 9, "--max-tokens", 8,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["engine"] == engine and len(figures["rows"]) == 2
    assert 0 < figures["trainer_vs_engine"]["max_abs"] < 1e-4
    assert figures["trainer_vs_engine"]["kl"] < 1e-6
    assert (figures["engine_prefill_vs_decode"] is not None) == (engine == "vllm")


def test_sync(tiny_models):
    done = run(
        "bench", "sync", tiny_models["hybrid", "dense"], "--engine", "transformers", "--repeats", 2,
        "--transport", "object_store",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["transports"]["object_store"]
    assert figures["bytes"] > 3e6 and len(figures["rows"]) == 2
    assert figures["pause_s"] > 0 and figures["floor_s"] > 0
    assert figures["pause_s"] == figures["rows"][1]["pause_s"]


def test_bad_input(tmp_path, tiny_models):
    for arguments, word in [
        (("parity", tmp_path), "config.json"),
        (("parity", tiny_models["hybrid", "dense"], "--engine", "vlm"), "vlm"),
        (("sync", tiny_models["hybrid", "dense"], "--transport", "pigeon"), "pigeon"),
        (("parity", tiny_models["hybrid", "dense"], "--engine-arg", "oops"), "KEY=VALUE"),
    ]:
        done = run("bench", *arguments)
        assert done.returncode == 2 and word in done.stderr and len(done.stderr.strip().splitlines()) == 1
