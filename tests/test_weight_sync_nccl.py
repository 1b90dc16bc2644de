"""Weights over process groups of two: with gloo on a CPU, which runs all of the code of NCCL but making the group."""

import os
import signal
import threading
import time

import fault_engines
import pytest
import torch
from test_pool_faults import (  # noqa: F401  (make_pool is a fixture)
    REQUESTS,
    SAMPLED,
    check_all_answered,
    expected_answers,
    make_pool,
    moved_model,
    weights,
)

from kimi_rl.model.naming import to_checkpoint
from kimi_rl.rollout.engine import Request, SamplingParams
from kimi_rl.weight_sync import NcclSync, WeightSyncError, nccl, tensor_checksum, unpack

pytestmark = pytest.mark.timeout(180)


def senders():
    return [thread for thread in threading.enumerate() if thread.name.startswith(nccl._SENDER)]


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


@pytest.fixture
def sync(monkeypatch):
    """A learner's side; the worker's side is this process too."""
    monkeypatch.setattr(nccl, "_links", {})
    sync = NcclSync({"a": torch.bfloat16}, backend="gloo")
    yield sync
    for link in nccl._links.values():
        link.close()
    sync.close()
    wait_until(lambda: not senders())


def test_every_version_arrives_in_the_dtype_that_is_served(sync):
    for version in range(3):
        update, times = sync.pack(weights(version + 0.1), version)
        arrived = dict(unpack(update))
        assert torch.equal(arrived["a"], torch.full((3,), version + 0.1, dtype=torch.bfloat16))
        assert torch.equal(arrived["b"], torch.full((2,), version + 0.1))
        assert {name: tensor_checksum(t) for name, t in arrived.items()} == update.checksums
        assert times.bytes == 3 * 2 + 2 * 4 and times.transport == "gloo"
    assert len(senders()) == 1, "a worker connects once"
    (link,) = nccl._links.values()
    link.line.connection.close()
    assert dict(unpack(update)).keys() == {"a", "b"}, "opened again it needs no learner"


def test_a_worker_may_ask_on_before_the_learner_knows_that_it_has_sent(sync, monkeypatch):
    transfer, asked_early = nccl._transfer, []

    class Late:
        """Done, for the learner, only at its third look after the worker has asked for the next version."""

        def __init__(self, group, line):
            self.group, self.line, self.looks = group, line, 0

        def broadcast(self, *arguments):
            self.work = self.group.broadcast(*arguments)
            return self

        def is_completed(self):
            if self.line._words:
                asked_early.append(self.line._words[0])
                self.looks += 1
            return self.looks > 2 and self.work.is_completed()

        def wait(self):
            return self.work.wait()

    def late(group, buffer, line):
        transfer(Late(group, line) if threading.current_thread() in senders() else group, buffer, line)

    monkeypatch.setattr(nccl, "_transfer", late)
    for version in range(3):
        update, _ = sync.pack(weights(version), version)
        assert torch.equal(dict(unpack(update))["b"], torch.full((2,), float(version)))
    assert set(asked_early) == {1, 2}, "versions asked for while the one before was being sent"
    assert len(senders()) == 1


def test_a_version_that_is_gone_is_an_error_and_the_next_one_arrives(sync):
    old, _ = sync.pack(weights(0), 0)
    new, _ = sync.pack(weights(1), 1)
    with pytest.raises(WeightSyncError, match=r"version 0 did not arrive through gloo .*holds version 1.*object_store"):
        list(unpack(old))
    assert torch.equal(dict(unpack(new))["b"], torch.ones(2))


def test_a_learner_that_goes_away_is_an_error(sync, monkeypatch):
    update, _ = sync.pack(weights(0), 0)
    list(unpack(update))
    update, _ = sync.pack(weights(1), 1)
    transfer = nccl._transfer

    def breaks_off(group, buffer, line):
        if threading.current_thread() in senders():
            raise EOFError
        transfer(group, buffer, line)

    monkeypatch.setattr(nccl, "_transfer", breaks_off)
    with pytest.raises(WeightSyncError, match="version 1 did not arrive"):
        list(unpack(update))
    monkeypatch.undo()


def test_faults_on_the_way_to_a_worker(make_pool):  # noqa: F811
    """One worker dies as it joins, one while receiving, one hangs there, one gets a damaged tensor."""
    # 8 s is plenty for an update of a stub, so only the hang passes it.
    pool = make_pool(fault_engines.LosesLink, workers=2, weight_sync="gloo", timeout_s=8.0, max_restarts=4)
    for version in range(4):
        start = time.monotonic()
        assert pool.update_weights(weights(version), version).transport == "gloo"
        assert pool.restarts == version + 1 and time.monotonic() - start < 60
        check_all_answered(pool, version)
    pool.update_weights(weights(4), 4)
    check_all_answered(pool, 4)
    assert pool.restarts == 4
    pool.close()
    wait_until(lambda: not senders())


def test_the_hybrid_arrives_whole(make_pool, tiny_models):  # noqa: F811
    folder = tiny_models["hybrid", "dense"]
    pool = make_pool("transformers", folder=folder, weight_sync="gloo")
    for version in range(2):
        model = moved_model(folder, version)
        pool.update_weights(to_checkpoint(model), version)
    answers = pool.generate(REQUESTS, SAMPLED)
    assert {a.policy_version for a in answers} == {1} and pool.restarts == 0
    assert [a.token_ids for a in answers] == expected_answers(folder, model, 4)


def test_overlapped_each_worker_receives_when_it_has_time(make_pool):  # noqa: F811
    arguments = {"delay": 0.02, "last": 1040}
    pool = make_pool(fault_engines.Counts, workers=2, slice_tokens=4, weight_sync="gloo", arguments=arguments)
    pool.run_in_background()
    pool.publish(weights(0), 0)
    pool.wait_ready()
    answers = []
    requests = [Request([1000 + i], i) for i in range(8)]
    thread = threading.Thread(
        target=lambda: answers.extend(pool.generate(requests, SamplingParams(60), any_version=True))
    )
    thread.start()
    version = 0
    while thread.is_alive():
        version += 1
        pool.publish(weights(version), version)
        if version == 2:
            os.kill(pool.worker_pids()[0], signal.SIGKILL)
        time.sleep(0.1)
    for request, answer in zip(requests, answers, strict=True):
        assert answer.token_ids == list(range(request.prompt_ids[-1] + 1, 1041))
        # The engine's log-prob is what it holds in "a": each token is told to be of the version that drew it.
        assert answer.logprobs == [float(v) for v in answer.token_versions()]
    assert version > 3 and pool.restarts == 1
