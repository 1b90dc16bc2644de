"""Weights through NCCL: the learner is this process, on a card of its own; workers are on another."""

import time

import fault_engines
import pytest
import torch
from test_pool_faults import check_all_answered
from test_weight_sync_gpu import check_versions, ray_gpu, small_model  # noqa: F401  (fixtures)

from kimi_rl.model.load_save import load_model
from kimi_rl.recipe import RolloutSection
from kimi_rl.rollout.pool import RolloutPool, pool_settings
from kimi_rl.weight_sync import card_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA cards"),
    pytest.mark.timeout(300),
]


@pytest.fixture
def make_pool(ray_gpu):  # noqa: F811
    """Pools of workers, which share a card by default, and a card for the learner that none of them has."""
    pools = []

    def make(engine, folder="", **settings):
        values = pool_settings(
            RolloutSection(batch_size=8), model_folder=str(folder), max_model_len=64, seed=0, threads=2, device="cuda"
        )
        pool = RolloutPool(**(values | {"engine": engine, "num_gpus": 0.2} | settings))
        pools.append(pool)
        cards = range(torch.cuda.device_count())
        taken = pool.worker_cards()
        torch.cuda.set_device(next((i for i in cards if card_of(f"cuda:{i}") not in taken), 0))
        return pool

    yield make
    for pool in pools:
        pool.close()
    torch.cuda.set_device(0)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_pool_on_another_card_serves_the_new_weights(make_pool, small_model, engine):  # noqa: F811
    if engine == "vllm":
        pytest.importorskip("vllm")
    pool = make_pool(engine, small_model)
    model = load_model(str(small_model), device=f"cuda:{torch.cuda.current_device()}")
    check_versions(pool, model, "nccl")


def weights(value):
    return [(name, torch.full((size,), float(value), device="cuda")) for name, size in (("a", 1 << 26), ("b", 5))]


def test_faults_on_the_way_leave_the_learner_and_its_card_in_order(make_pool, tmp_path):
    """One worker dies as it joins, one while receiving, one hangs there, one gets a damaged tensor."""
    pool = make_pool(
        fault_engines.LosesLink, workers=2, timeout_s=20.0, max_restarts=4, engine_args={"marks": str(tmp_path)}
    )
    for version in range(5):
        start = time.monotonic()
        assert pool.update_weights(weights(version), version).transport == "nccl"
        assert pool.restarts == min(version + 1, 4) and time.monotonic() - start < 90
        check_all_answered(pool, version)
        torch.cuda.synchronize()  # would wait for ever for what NCCL had left running


def test_workers_on_both_cards(make_pool, tmp_path):
    """Whoever is beside the learner maps its buffer, the other one receives it."""
    pool = make_pool(fault_engines.Stub, workers=2, num_gpus=0.6, engine_args={"marks": str(tmp_path)})
    assert len(pool.worker_cards()) == 2
    for version in range(2):
        assert pool.update_weights(weights(version), version).transport == "nccl"
        check_all_answered(pool, version)
    assert pool.restarts == 0
