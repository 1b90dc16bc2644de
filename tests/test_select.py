"""Difficulty pre-selection: which problems are kept, and that what is written can be trained on."""

import json

import numpy as np
import pytest
from runs import run_inside

from kimi_rl.dataset import load_problems
from kimi_rl.errors import InputError
from kimi_rl.recipe import DataSection
from kimi_rl.rewards import Verdict, VerifierPool
from kimi_rl.rollout.engine import Completion, SamplingParams
from kimi_rl.select import check_bounds, pass_rates, write_selection
from kimi_rl.standalone import select_problems


def test_pass_rates(monkeypatch):
    """A policy that solves problem i in i of 4 samples; scored in several rounds."""
    monkeypatch.setattr("kimi_rl.select._CHUNK", 2)
    seeds, reported = [], []

    def generate(requests, params):
        assert params.temperature == 0.7
        seeds.extend(request.seed for request in requests)
        tries = [at % 4 for at in range(len(requests))]
        solved = [number < request.prompt_ids[0] for number, request in zip(tries, requests, strict=True)]
        return [Completion([int(right)], [0.0], "stop", 0) for right in solved]

    with VerifierPool() as pool:
        rates = pass_rates(
            generate,
            pool.verify_many,
            [[i] for i in range(5)] + [[0]],
            ["1"] * 5 + ["t(0,4]"],
            lambda ids: f"#### {ids[0]}",
            k=4,
            params=SamplingParams(8, temperature=0.7),
            seed=3,
            progress=reported.append,
        )
    assert rates[:5].tolist() == [0, 0.25, 0.5, 0.75, 1] and np.isnan(rates[5])
    assert len(set(seeds)) == 24 and reported == [2, 4, 6]


def test_what_is_kept_loads_as_it_was(tmp_path):
    """GSM8K-like and MATH-like rows keep their solutions, and so the instruction that goes with them."""
    for number, solution in enumerate(("6 times 7. #### {}", "So it is \\boxed{{{}}}.")):
        rows = [
            {"id": f"a{n}", "question": f"What is 6 x {n}?", "solution": solution.format(6 * n), "answer": str(6 * n)}
            for n in range(40)
        ]
        rates = np.array([n / 39 for n in range(40)])
        rates[7] = np.nan
        folder = tmp_path / str(number)
        folder.mkdir()
        found = write_selection(rows, rates, 0.2, 0.8, folder / "train.jsonl")
        low, high = sum(rates < 0.2), sum(rates > 0.8)
        assert (found.scored, found.too_hard, found.too_easy, found.unmeasured) == (40, low, high, 1)
        written = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        assert len(written) == found.kept == 39 - low - high
        assert all(0.2 <= row["pass_rate"] <= 0.8 for row in written)
        (folder / "test.jsonl").write_text('{"question": "And now?", "answer": "1"}\n')
        loaded = load_problems(DataSection(path=str(folder)))
        assert [{**row, "prompt": None} for row in loaded.train] == [
            {**{key: row[key] for key in ("id", "question", "solution", "answer")}, "prompt": None} for row in written
        ]
        assert ("####" in loaded.instruction) == (number == 0)


@pytest.mark.parametrize(
    "k,low,high,words",
    [
        (8, 0.8, 0.2, "low <= high"),
        (8, -0.1, 0.5, "low <= high"),
        (8, 0.1, 1.5, "low <= high"),
        (8, float("nan"), 0.5, "low <= high"),
        (2, 0.2, 0.4, "no pass rate of 2 samples"),
    ],
)
def test_bounds(k, low, high, words):
    with pytest.raises(InputError, match=words):
        check_bounds(k, low, high)


def test_bounds_may_touch_a_rate():
    check_bounds(8, 0.125, 0.125)


def test_nothing_kept_writes_nothing(tmp_path):
    rows = [{"id": "a", "question": "q", "solution": "#### 1", "answer": "1"}]
    with pytest.raises(InputError, match="none of 1 problems is kept .1 below 0.2"):
        write_selection(rows, np.array([0.0]), 0.2, 0.8, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_whole_command(tmp_path, tiny_models, monkeypatch):
    """A random model solves nothing, so stand-in verdicts make some problems moderately hard."""
    import kimi_rl.rewards

    class Parity(kimi_rl.rewards.VerifierPool):
        def verify_many(self, pairs, *, kind, extract):
            assert kind == "exact"
            values = [sum(completion.encode()) % 2 for completion, _ in pairs]
            return [Verdict.of("correct" if value else "wrong", "", "") for value in values]

    monkeypatch.setattr(kimi_rl.rewards, "VerifierPool", Parity)
    out, progress = tmp_path / "train.jsonl", []
    counts = select_problems(
        str(tiny_models["hybrid", "dense"]), "arithmetic", ["data.train_size=12", "data.held_out_size=1"], k=4, low=0.2,
        high=0.8, out=out, temperature=1.0, max_tokens=6, engine="transformers", kind="exact", seed=1,
        progress=lambda *args: progress.append(args),
    )  # fmt: skip
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert counts["scored"] == 12 and counts["kept"] == len(written) > 0 and progress == [(12, 12)]
    assert counts["kept"] + counts["too_hard"] + counts["too_easy"] == 12
    assert {row["pass_rate"] for row in written} <= {0.25, 0.5, 0.75}
    assert len(load_problems(DataSection(path=str(out)), evaluation=True).held_out) == len(written)


def test_mistakes_on_the_command_line(tmp_path, tiny_models):
    model = tiny_models["hybrid", "dense"]
    for arguments, words in [
        ((model, "arithmetic", "--low", "0.9"), ["--low", "0.9"]),
        ((model, "arithmetic", "data.params.levl=1"), ["levl"]),
        ((tmp_path, "arithmetic"), ["config.json"]),
    ]:
        done = run_inside("select", *arguments, "--out", tmp_path / "kept.jsonl")
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
        assert all(word in done.stderr for word in words), done.stderr
