"""The pool in the background, with real Ray workers: weights that change between slices, slow and dying workers."""

import os
import random
import signal
import threading
import time

import fault_engines
import pytest
from test_pool_faults import make_pool, weights  # noqa: F401  (make_pool is a fixture)

from kimi_rl.dataset.prompt_order import PromptSampler
from kimi_rl.recipe import RLVRStage
from kimi_rl.rewards import Verdict
from kimi_rl.rollout.batches import BatchMaker, RolloutQueue
from kimi_rl.rollout.engine import Request, SamplingParams

pytestmark = pytest.mark.timeout(300)


def check_counted(completion, first, last):
    assert completion.token_ids == list(range(first + 1, last + 1))
    # The engine's log-prob is its version: each token is told to be of the version that drew it.
    assert completion.logprobs == [float(version) for version in completion.token_versions()]
    assert completion.policy_version == min(completion.token_versions())


def test_weights_change_while_completions_are_under_way(make_pool):  # noqa: F811
    pool = make_pool(
        fault_engines.Counts, workers=2, batch_size=4, slice_tokens=3, arguments={"delay": 0.05, "last": 30}
    )
    pool.run_in_background()
    pool.publish(weights(0), 0)
    pool.generate([Request([29], 0)], SamplingParams(40))  # all workers are up and serve version 0
    requests = [Request([7, i], i) for i in range(16)]
    answers = []
    thread = threading.Thread(
        target=lambda: answers.extend(pool.generate(requests, SamplingParams(40), any_version=True))
    )
    thread.start()
    version = 0
    while thread.is_alive():
        time.sleep(0.2)
        version += 1
        pool.publish(weights(version), version)
        # What is asked for one version is answered by it, ahead of what can wait.
        (pinned,) = pool.generate([Request([25], 0)], SamplingParams(40))
        assert pinned.token_versions() == [version] * 5
    for request, answer in zip(requests, answers, strict=True):
        check_counted(answer, request.prompt_ids[-1], 30)
        versions = answer.token_versions()
        assert versions == sorted(versions) and answer.finish_reason == "stop"
    assert any(answer.segments for answer in answers), "no completion spans two versions"
    assert pool.restarts == 0


def test_the_limit_is_kept_over_slices(make_pool):  # noqa: F811
    pool = make_pool(fault_engines.Counts, slice_tokens=4, arguments={"delay": 0.0, "last": 99})
    pool.run_in_background()
    pool.publish(weights(0), 0)
    (answer,) = pool.generate([Request([0], 0)], SamplingParams(10), any_version=True)
    assert answer.token_ids == list(range(1, 11)) and answer.finish_reason == "length"
    assert answer.segments == () and answer.policy_version == 0


def test_workers_die_at_random_times_and_every_prompt_is_trained_on_once(make_pool):  # noqa: F811
    """Five kills among three workers, while batches run ahead and weights change."""
    steps, prompts, group = 40, 4, 2
    stage = RLVRStage.model_validate(
        {
            "kind": "rlvr", "steps": steps, "prompts_per_step": prompts, "group_size": group, "max_staleness": 2,
            "rollout": {"max_tokens": 30, "slice_tokens": 5},
        }
    )  # fmt: skip
    pool = make_pool(
        fault_engines.Counts, workers=3, batch_size=2, slice_tokens=5, max_restarts=5,
        arguments={"delay": 0.02, "last": 1020},
    )  # fmt: skip
    rows = [{"answer": "", "prompt": [1000 + i % 10], "id": str(i)} for i in range(steps * prompts)]
    sampler = PromptSampler(len(rows), seed=0)
    maker = BatchMaker(
        pool, sampler, rows, stage, seed=0, tokenize=lambda row: row["prompt"], decode=str,
        verify=lambda pairs: [Verdict(1.0, "correct", "", "") for _ in pairs],
    )  # fmt: skip
    queue = RolloutQueue(maker, stage)
    pool.run_in_background()
    pool.publish(weights(0), 0)
    pool.wait_ready()
    seed = random.randrange(2**31)
    print("seed", seed)
    chance, kills, trained = random.Random(seed), 0, []
    for step in range(1, steps + 1):
        batch, _ = queue.take(step)
        trained += [group.number for group in batch.groups]
        for made in batch.groups:
            assert len(made.completions) == group
            for completion in made.completions:
                check_counted(completion, made.row["prompt"][0], 1020)
                assert 0 <= (step - 1) - completion.policy_version <= 2, "older than max_staleness"
        pool.publish(weights(step), step)
        if kills < 5 and (chance.random() < 0.4 or steps - step < 8):
            alive = [seat.info["pid"] for seat in pool._seats if seat.info is not None]
            if len(alive) > 1 and pool.restarts == kills:
                os.kill(chance.choice(alive), signal.SIGKILL)
                kills += 1
                time.sleep(chance.random() * 0.3)
    queue.close()
    assert sorted(trained) == list(range(steps * prompts)), "a prompt was lost or trained on twice"
    assert kills == 5 and pool.restarts == 5


def test_a_pool_shrinks_to_the_least_it_may(make_pool):  # noqa: F811
    pool = make_pool(fault_engines.Dies, workers=2, arguments={"times": 1}, max_restarts=0, min_workers=1)
    pool.update_weights(weights(0), 0)
    answers = pool.generate([Request([i], i) for i in range(8)], SamplingParams(4))
    assert [a.token_ids for a in answers] == [[i, i] for i in range(8)]
    assert pool.restarts == 0 and len(pool.worker_pids()) == 1
