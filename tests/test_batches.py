"""Batches on a stand-in pool: seeds, dynamic sampling, order of steps, and what a checkpoint must know."""

import threading
import time

import pytest

from kimi_rl.dataset.prompt_order import PromptSampler
from kimi_rl.learner.rlvr import length_reward_weight, shaped_rewards
from kimi_rl.recipe import RLVRStage
from kimi_rl.rewards import Verdict
from kimi_rl.rollout.batches import BatchMaker, Group, RolloutBatch, RolloutQueue
from kimi_rl.rollout.engine import Completion

ROWS = [{"answer": str(i), "prompt": [i], "id": str(i)} for i in range(40)]


class InstantPool:
    """Completes at once, with the prompt's number as its only token; remembers what it was asked."""

    def __init__(self):
        self.asked = []
        self.gate = threading.Event()
        self.gate.set()

    def generate(self, requests, params, *, any_version=False):
        self.gate.wait(10)
        self.asked.append((requests, any_version))
        return [Completion([*r.prompt_ids, r.seed % 7], [-1.0, -1.0], "stop", 0) for r in requests]


def stage(**values) -> RLVRStage:
    base = {"kind": "rlvr", "steps": 6, "prompts_per_step": 4, "group_size": 3, "scale_rewards": "none"}
    return RLVRStage.model_validate({**base, **values})


def make(chosen: RLVRStage, verdict=lambda text, gold: True, rows=ROWS):
    """Queue, sampler and pool; `verdict` says whether a completion is right."""

    def verify(pairs):
        marks = [verdict(text, gold) for text, gold in pairs]
        return [Verdict(float(mark), "correct" if mark else "wrong", None, "") for mark in marks]

    pool, sampler = InstantPool(), PromptSampler(len(rows), seed=0)
    tools = dict(tokenize=lambda row: row["prompt"], decode=lambda ids: f"{ids[0]}/{ids[1]}", verify=verify)
    return RolloutQueue(BatchMaker(pool, sampler, rows, chosen, seed=5, **tools), chosen), sampler, pool


def numbers(batch):
    return [group.number for group in batch.groups]


def test_a_batch_holds_its_groups_in_order_with_seeds_of_their_own():
    queue, _, pool = make(stage())
    batch, _ = queue.take(1)
    (requests, any_version) = pool.asked[0]
    assert not any_version
    assert [r.prompt_ids[0] for r in requests] == [n for n in numbers(batch) for _ in range(3)]
    assert len({r.seed for r in requests}) == 12
    again, _, pool2 = make(stage())
    again.take(1)
    assert pool2.asked[0] == pool.asked[0]
    assert {r.seed for r in requests}.isdisjoint(r.seed for r in again.take(2)[0] and pool2.asked[1][0])


def test_uniform_groups_are_replaced_and_counted():
    """Of the first three problems drawn, one is always right and one always wrong; later ones depend on the sample."""
    first = PromptSampler(40, seed=0).draw(4, 1)
    always = {first[0]: True, first[2]: False}

    def verdict(text, gold):
        number, sample = text.split("/")
        return always.get(int(number), int(sample) % 2 == 0)

    chosen = stage(dynamic_sampling={"max_rounds": 8})
    queue, sampler, pool = make(chosen, verdict)
    batch, _ = queue.take(1)
    assert not any(group.uniform for group in batch.groups)
    assert batch.replaced_right >= 1 and batch.replaced_wrong >= 1
    assert len(batch.seen) == sum(len(asked) for asked, _ in pool.asked) // 3 > 4
    assert not set(numbers(batch)) & set(always)
    assert len({group.number for group in batch.seen}) == len(batch.seen), "nothing is asked twice"
    assert sampler.state()["rates"][str(first[0])] == 1.0 and sampler.state()["rates"][str(first[2])] == 0.0
    seeds = [request.seed for asked, _ in pool.asked for request in asked]
    assert len(set(seeds)) == len(seeds)


def test_what_stays_uniform_after_the_last_round_is_kept():
    queue, _, pool = make(stage(dynamic_sampling={"max_rounds": 2}), lambda text, gold: False)
    batch, _ = queue.take(1)
    assert batch.rounds == 2 and len(batch.groups) == 4 and len(batch.seen) == 12
    assert batch.replaced_wrong == batch.replaced_right == 0
    assert numbers(batch) == PromptSampler(40, seed=0).draw(4, 1)


def test_steps_that_run_ahead():
    queue, _, pool = make(stage(max_staleness=2, steps=4))
    pool.gate.clear()
    threading.Timer(0.3, pool.gate.set).start()
    batch, waited = queue.take(1)
    assert batch.step == 1 and waited > 0.2
    deadline = time.monotonic() + 10
    while len(pool.asked) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(pool.asked) == 3 and all(any_version for _, any_version in pool.asked), "steps 2 and 3 are under way"
    plain, _, _ = make(stage(steps=4))
    for step in range(1, 5):
        taken = batch if step == 1 else queue.take(step)[0]
        assert numbers(taken) == numbers(plain.take(step)[0]), "the same prompts in the same order"
    assert len(pool.asked) == 4, "nothing beyond the last step"
    queue.close()


def test_after_a_restart_every_prompt_is_trained_on_once():
    chosen = stage(max_staleness=2, steps=9)
    queue, sampler, _ = make(chosen)
    trained = [n for step in (1, 2, 3) for n in numbers(queue.take(step)[0])]
    state = queue.state()
    assert len(state["pending"]) == 8, "two steps are under way"
    resumed, _, _ = make(chosen)
    resumed.load(state)
    trained += [n for step in range(4, 10) for n in numbers(resumed.take(step)[0])]
    assert sorted(trained[:36]) == sorted(set(trained[:36])) and len(trained) == 36
    for one in (queue, resumed):
        one.close()


def test_an_error_reaches_whoever_takes_the_batch():
    def broken(text, gold):
        raise RuntimeError("on purpose")

    queue, _, _ = make(stage(max_staleness=1), broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        queue.take(1)
    queue.close()


def test_length_reward_warms_up_and_prefers_short_right_answers():
    chosen = stage(length_reward={"weight": 0.4, "warmup_steps": 10})
    weights = [length_reward_weight(chosen, step) for step in (1, 10, 11, 15, 20, 99)]
    assert weights == pytest.approx([0.0, 0.0, 0.04, 0.2, 0.4, 0.4])
    assert length_reward_weight(stage(), 5) == 0.0
    completions = [Completion([1] * n, [0.0] * n, "stop", 0) for n in (2, 6, 4)]
    right, unread = Verdict(1.0, "correct", "", ""), Verdict(None, "unparseable_gold", "", "")
    verdicts = [right, right, unread]
    batch = RolloutBatch(1, [Group(0, {}, completions, verdicts)], [])
    assert shaped_rewards(batch, 0.4) == [pytest.approx(1.2), pytest.approx(0.8), None]
    assert shaped_rewards(batch, 0.0) == [1.0, 1.0, None]
