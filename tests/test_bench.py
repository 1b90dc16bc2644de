"""The measurements behind `kimi-rl bench`, on tiny models: shapes of the answers, and that the checks can fail."""

import json

import pytest
import torch
from runs import run, run_inside

from kimi_rl.bench.learner import bench_learner
from kimi_rl.bench.parity import compare
from kimi_rl.errors import InputError


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
        done = run_inside("bench", *arguments)
        assert done.returncode == 2 and word in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_learner_without_what_is_silent():
    figures = bench_learner(
        size="tiny", vocabulary=512, groups=16, group_size=2, micro_batch_size=32, prompt_tokens=10, mean=12,
        longest=40, steps=1, effective_share=0.25, paths=["packed", "without_silent"],
    )  # fmt: skip
    packed, spoken = figures["paths"]["packed"], figures["paths"]["without_silent"]
    assert spoken["grad_norm"] == pytest.approx(packed["grad_norm"], rel=1e-3) and packed["grad_norm"] > 0
    assert spoken["flops"] < 0.8 * packed["flops"] and spoken["memory_bytes"] < packed["memory_bytes"]
    assert list(figures["ratios"]) == ["without_silent / packed"]


def test_learner():
    figures = bench_learner(
        size="tiny", vocabulary=512, groups=2, group_size=2, micro_batch_size=2, prompt_tokens=10, mean=12, longest=40,
        steps=1,
    )  # fmt: skip
    json.dumps(figures)
    paths, shape = figures["paths"], figures["shape"]
    assert list(paths) == ["padded", "packed", "shared_prompt"] and "needs a card" in figures["left_out"]["stock"]
    assert figures["ratios"]["packed / padded"] == pytest.approx(paths["padded"]["step_s"] / paths["packed"]["step_s"])
    for path in paths.values():
        assert path["grad_norm"] == pytest.approx(paths["padded"]["grad_norm"], rel=1e-3), "all paths do the same work"
        assert path["tokens_per_s"] == pytest.approx(shape["real_tokens"] / path["step_s"])
        assert 0 < path["mfu"] < 1 and path["memory_bytes"] > 0
    assert shape["tokens_with_shared_prompts"] < shape["real_tokens"] < shape["padded_tokens"]
    assert paths["packed"]["memory_bytes"] < paths["padded"]["memory_bytes"]
    assert shape["effective_share"] == 1 and "without_silent" in figures["left_out"]
    with pytest.raises(InputError, match="--micro-batch-size: 3 must divide .* = 4"):
        bench_learner(groups=2, group_size=2, micro_batch_size=3)
    with pytest.raises(InputError, match="--paths: found 'paded'"):
        bench_learner(paths=["packed", "paded"])
