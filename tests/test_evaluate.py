"""evaluate() with a scripted policy: every figure can be worked out by hand."""

import json

import numpy as np
import pytest

from kimi_rl.errors import RunError
from kimi_rl.evaluate import evaluate
from kimi_rl.recipe import EvalSection
from kimi_rl.rewards import VerifierPool
from kimi_rl.rollout.engine import Completion
from kimi_rl.statistics import clustered_interval


@pytest.fixture(scope="module")
def pool():
    with VerifierPool() as verifier:
        yield verifier


class Script:
    """A policy that gives the listed answers: `greedy[i]` and `samples[i]` of problem i, whose prompt is [i]."""

    def __init__(self, greedy, samples=()):
        self.greedy, self.samples, self.requests = greedy, samples, []

    def generate(self, requests, params):
        self.requests.append((params.temperature, [(r.prompt_ids[0], r.seed) for r in requests]))
        sampled = {i: iter(texts) for i, texts in enumerate(self.samples)}
        texts = [
            self.greedy[r.prompt_ids[0]] if params.temperature == 0 else next(sampled[r.prompt_ids[0]])
            for r in requests
        ]
        return [self._completion(text, params.max_tokens) for text in texts]

    @staticmethod
    def _completion(text, limit):
        ids = [ord(sign) for sign in text][:limit]
        return Completion(ids, [0.0] * len(ids), "length" if len(text) > limit else "stop", 0)


def run(pool, golds, greedy, samples=(), *, k=0, limit=None, max_tokens=40, seed=1):
    policy, asked = Script(greedy, samples), []

    def verify(pairs):
        asked.append(list(pairs))
        return pool.verify_many(list(pairs), kind="math", extract=("boxed", "hash"))

    figures, records = evaluate(
        policy.generate,
        verify,
        [[i] for i in range(len(golds))],
        golds,
        lambda ids: "".join(map(chr, ids)),
        EvalSection(k=k, limit=limit),
        max_tokens=max_tokens,
        seed=seed,
    )
    return figures.row(), records, policy, asked


def test_greedy_only(pool):
    row, records, policy, _ = run(pool, ["1", "2", "3", "4"], ["#### 1", "#### 2", "none", "#### 4" + "0" * 60])
    assert (row["n"], row["held_out_accuracy"], row["no_answer_share"], row["truncated_share"]) == (4, 0.5, 0.25, 0.25)
    assert row["held_out_se"] == pytest.approx((0.25 / 3) ** 0.5)
    low, high = clustered_interval(np.array([[1.0, 1, 0, 0]]), 1)
    assert row["held_out_interval"] == pytest.approx((low[0], high[0]))
    assert not any(key.startswith(("avg", "pass", "maj", "sampled")) for key in row)
    assert len(policy.requests) == 1 and records[2]["status"] == "no_answer" and records[0]["solved_share"] is None
    json.dumps(row)


def test_figures_of_k_samples(pool):
    samples = [
        ["#### 1", "#### 1", "#### 5", "nothing"],  # 2 of 4 right, and the majority
        ["#### 2", "#### 9", "#### 9", "#### 9"],  # 1 of 4, outvoted
        ["#### 3", "#### 7", "#### 3", "#### 7"],  # a tie
        ["#### 8", "#### 8", "#### 8", "#### 8"],  # none
    ]
    row, records, policy, _ = run(pool, ["1", "2", "3", "4"], ["#### 0"] * 4, samples, k=4)
    assert row["avg_at_k"] == pytest.approx(5 / 16)
    assert row["pass_at_k"] == pytest.approx(3 / 4)
    assert row["maj_at_k"] == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    # 1 - C(4-c, 2) / C(4, 2) with c = 2, 1, 2, 0
    assert row["pass_at"] == pytest.approx({"1": 5 / 16, "2": (5 / 6 + 3 / 6 + 5 / 6 + 0) / 4})
    assert row["sampled_no_answer_share"] == 1 / 16 and row["sampled_truncated_share"] == 0
    for name in ("avg_at_k", "pass_at_k", "maj_at_k"):
        low, high = row[f"{name}_interval"]
        assert 0 <= low < row[name] < high <= 1 and row[f"{name}_se"] > 0
        assert row[f"{name}_bootstrap"][0] <= row[name] <= row[f"{name}_bootstrap"][1]
    assert [r["correct_count"] for r in records] == [2, 1, 2, 0]
    assert [r["majority"] for r in records] == [1.0, 0.0, 0.5, 0.0]
    assert records[0]["sample_values"] == [1.0, 1.0, 0.0, 0.0]
    assert records[0]["sample_answers"] == ["1", "1", "5", None] and records[0]["solved_share"] == 0.5
    temperature, drawn = policy.requests[1]
    assert temperature == 1.0 and len({seed for _, seed in drawn}) == 16


def test_samples_keep_their_seeds_when_problems_are_added(pool):
    seeds = []
    for n in (2, 3):
        golds = ["1"] * n
        _, _, policy, _ = run(pool, golds, ["#### 1"] * n, [["#### 1"] * 2] * n, k=2)
        seeds.append(policy.requests[1][1])
    assert seeds[1][:4] == seeds[0]


def test_equal_wrong_answers_vote_together_however_they_are_spelt(pool):
    boxed = [f"\\boxed{{{answer}}}" for answer in ("\\frac{1}{2}", "0.25", "0.5", "1/4", "0.75")]
    row, _, _, _ = run(pool, ["0.5"], [""], [boxed], k=5)
    assert row["maj_at_k"] == 0.5  # 1/2 and 0.5 against 0.25 and 1/4
    spelt = ["\\boxed{0.5}", "\\boxed{0.25}", "\\boxed{1/4}", "\\boxed{\\frac14}"]
    row, _, _, _ = run(pool, ["0.5"], [""], [spelt], k=4)
    assert row["maj_at_k"] == 0


def test_spellings_are_compared_only_where_that_could_change_the_majority(pool):
    clear = ["#### 1", "#### 1", "#### 1", "#### 1/2", "#### 0.5"]
    lost = ["#### 3", "#### 1/2", "#### 0.5", "#### 3", "#### 4"]
    _, _, _, asked = run(pool, ["1", "2"], [""] * 2, [clear, lost], k=5)
    assert [len(pairs) for pairs in asked] == [2, 10]


def test_problems_with_an_unreadable_gold_are_left_out_of_the_figures(pool):
    row, records, _, _ = run(pool, ["1", "t(0,4]"], ["#### 1", "#### 2"], [["#### 1"] * 2, ["#### 2"] * 2], k=2)
    assert (row["n"], row["unmeasured"], row["held_out_accuracy"], row["avg_at_k"]) == (1, 1, 1.0, 1.0)
    assert len(records) == 2 and records[1]["status"] == "unparseable_gold"
    with pytest.raises(RunError, match="no gold answer can be read"):
        run(pool, ["t(0,4]"], ["#### 1"])


def test_limit(pool):
    row, records, _, _ = run(pool, ["1", "2"], ["#### 1", "#### 3"], limit=1)
    assert row["n"] == len(records) == 1 and row["held_out_accuracy"] == 1


def test_records_fit_a_rollout_table(pool, tmp_path):
    import pyarrow.parquet

    from kimi_rl.run_dir import RunDir

    _, records, _, _ = run(pool, ["1", "2"], ["#### 1", "x"], [["x"] * 2, ["#### 2", "y"]], k=2)
    (tmp_path / "run").mkdir()
    path = RunDir(tmp_path / "run").write_rollouts("rlvr_eval_after", 3, records)
    assert pyarrow.parquet.read_table(path).to_pylist() == records
