"""Faults in real Ray workers: each ends in recovery with the right version, or in one clear error; never in a hang."""

import os
import signal
import time

import fault_engines
import pytest
import torch
from ray import cloudpickle

from kimi_rl.errors import InputError, RunError
from kimi_rl.model.load_save import load_model
from kimi_rl.model.naming import to_checkpoint
from kimi_rl.recipe import RolloutSection
from kimi_rl.rollout.engine import Request, SamplingParams
from kimi_rl.rollout.pool import RolloutPool, pool_settings
from kimi_rl.rollout.transformers_engine import TransformersEngine

pytestmark = pytest.mark.timeout(180)
cloudpickle.register_pickle_by_value(fault_engines)  # the workers cannot import modules of tests

REQUESTS = [Request([10 + i, 20 + i], seed=i) for i in range(12)]
SAMPLED = SamplingParams(12)


@pytest.fixture
def make_pool(ray_local, tmp_path):
    pools = []

    def make(engine, *, workers=1, folder="", batch_size=4, marks=tmp_path, **settings):
        arguments = {"marks": str(marks)} | settings.pop("arguments", {})
        section = RolloutSection(workers=workers, batch_size=batch_size, engine_args=arguments)
        values = pool_settings(section, model_folder=str(folder), max_model_len=64, seed=0, threads=1, device="cpu")
        pools.append(RolloutPool(**(values | {"engine": engine, "timeout_s": 60.0} | settings)))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def weights(value):
    return [("a", torch.full((3,), float(value))), ("b", torch.full((2,), float(value)))]


def check_all_answered(pool, version):
    answers = pool.generate(REQUESTS, SAMPLED)
    assert [a.token_ids for a in answers] == [[r.seed, *r.prompt_ids] for r in REQUESTS]
    assert {a.policy_version for a in answers} == {version}
    assert {logprob for a in answers for logprob in a.logprobs} == {float(version)}, "answered with other weights"


@pytest.mark.parametrize("fault", ["Hangs", "Dies", "AnswersStale", "AnswersTooFew"])
def test_a_fault_while_generating(make_pool, fault):
    # 8 s is plenty for an answer of a stub and for its update, so only a hang passes it.
    pool = make_pool(getattr(fault_engines, fault), workers=2, timeout_s=8.0)
    pool.update_weights(weights(0), 0)
    pool.update_weights(weights(1), 1)
    check_all_answered(pool, 1)
    # What a hanging worker holds up, the other one answers; it is replaced when its deadline has passed.
    assert pool.restarts == (0 if fault == "Hangs" else 1)
    pool.update_weights(weights(2), 2)
    check_all_answered(pool, 2)
    assert pool.restarts == 1


@pytest.mark.parametrize("fault", ["HangsInUpdate", "KeepsOldTensor"])
def test_a_fault_while_updating(make_pool, fault):
    pool = make_pool(getattr(fault_engines, fault), workers=2, timeout_s=8.0)
    pool.update_weights(weights(0), 0)
    pool.update_weights(weights(1), 1)
    assert pool.restarts == 1
    check_all_answered(pool, 1)


def test_an_engine_that_fails_to_start_once(make_pool):
    pool = make_pool(fault_engines.DiesAtStart)
    pool.update_weights(weights(0), 0)
    assert pool.restarts == 1
    check_all_answered(pool, 0)


@pytest.mark.parametrize(
    "fault,words,limit", [("CannotStart", "out of memory", 60.0), ("HangsAtStart", "start_timeout_s", 8.0)]
)
def test_an_engine_that_never_starts_is_one_clear_error(make_pool, fault, words, limit):
    pool = make_pool(getattr(fault_engines, fault), arguments={"times": 99}, max_restarts=1, start_timeout_s=limit)
    start = time.monotonic()
    with pytest.raises(RunError, match="rollout worker 0 failed.*max_restarts") as caught:
        pool.update_weights(weights(0), 0)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert pool.restarts == 1 and time.monotonic() - start < 150


def test_bad_arguments_of_an_engine_are_not_tried_again(make_pool):
    pool = make_pool(fault_engines.RefusesArguments)
    with pytest.raises(InputError, match="rollout.engine_args.oops"):
        pool.update_weights(weights(0), 0)
    assert pool.restarts == 0


def test_several_deaths_among_three_workers(make_pool):
    pool = make_pool(fault_engines.Dies, workers=3, batch_size=2, arguments={"times": 4}, max_restarts=4)
    pool.update_weights(weights(0), 0)
    for version in range(1, 4):
        check_all_answered(pool, version - 1)
        pool.update_weights(weights(version), version)
    assert pool.restarts == 4
    assert len(set(pool.worker_pids())) == 3


def test_a_chunk_that_kills_every_worker_ends_the_run(make_pool):
    pool = make_pool(fault_engines.Dies, workers=2, arguments={"times": 99}, max_restarts=1)
    pool.update_weights(weights(0), 0)
    with pytest.raises(RunError, match="max_restarts"):
        pool.generate(REQUESTS, SAMPLED)


def test_versions_only_go_up(make_pool):
    pool = make_pool(fault_engines.Stub)
    with pytest.raises(RuntimeError, match="update_weights first"):
        pool.generate(REQUESTS, SAMPLED)
    pool.update_weights(weights(3), 3)
    for version in (3, 2):
        with pytest.raises(ValueError, match="not newer than 3"):
            pool.update_weights(weights(9), version)
    check_all_answered(pool, 3)
    assert pool.generate([], SAMPLED) == []


# --- the true engines -----------------------------------------------------------------------------------------


def moved_model(folder, version):
    torch.manual_seed(version)
    model = load_model(str(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def expected_answers(folder, model, batch_size):
    engine = TransformersEngine(str(folder), batch_size=batch_size)
    engine.load_weights(to_checkpoint(model))
    engine.finish_update(1)
    return [answer.token_ids for answer in engine.generate(REQUESTS, SAMPLED)]


@pytest.mark.parametrize("fault", ["RealDies", "RealHalfUpdate"])
def test_the_transformers_engine_recovers_with_the_right_weights(make_pool, tiny_models, fault):
    folder = tiny_models["hybrid", "dense"]
    pool = make_pool(getattr(fault_engines, fault), workers=2, folder=folder)
    pool.update_weights(to_checkpoint(moved_model(folder, 0)), 0)
    new = moved_model(folder, 1)
    pool.update_weights(to_checkpoint(new), 1)
    answers = pool.generate(REQUESTS, SAMPLED)
    assert pool.restarts == 1
    assert {a.policy_version for a in answers} == {1}
    assert [a.token_ids for a in answers] == expected_answers(folder, new, 4)


def test_a_killed_vllm_worker_is_replaced_with_the_right_weights(make_pool, tiny_models):
    pytest.importorskip("vllm")
    folder = tiny_models["mla", "dense"]
    pool = make_pool("vllm", folder=folder, batch_size=12, engine_args={})
    new = moved_model(folder, 1)
    pool.update_weights(to_checkpoint(new), 1)
    before = pool.generate(REQUESTS, SamplingParams(12, 0.0))
    os.kill(pool.worker_pids()[0], signal.SIGKILL)
    after = pool.generate(REQUESTS, SamplingParams(12, 0.0))
    assert pool.restarts == 1
    assert [a.token_ids for a in after] == [a.token_ids for a in before]
    assert {a.policy_version for a in after} == {1}
