"""One real comparison on the CPU, killed in its second run and started again."""

import json

import yaml
from runs import SMALL, kill_session, metrics, run, start, train_steps, wait_for


def test_killed_and_started_again(tmp_path):
    rollout = {"engine": "transformers", "max_tokens": 16}
    base = SMALL | {
        "stages": [
            # Shuffled prompts: an order that follows the policy's success would not be the same in both arms.
            {"kind": "rlvr", "steps": 10, "prompts_per_step": 4, "group_size": 4, "checkpoint_every": 2,
             "rollout": rollout, "eval": {"every": 2}},
        ]
    }  # fmt: skip
    file, out = tmp_path / "comparison.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({"name": "whole", "base": base, "seeds": [5]}, sort_keys=False))
    first, second = out / "runs" / "mla" / "seed_5", out / "runs" / "hybrid" / "seed_5"

    process = start("compare", file, "--out", out)
    wait_for(lambda: len(train_steps(second, "rlvr")) >= 3, process=process, timeout=400)
    kill_session(process, actors=True)  # the actor that makes the runs would otherwise go on for a while
    made = (first / "summary.json").stat().st_mtime_ns
    assert not (second / "summary.json").exists()
    so_far = json.loads((out / "compare.json").read_text())
    assert so_far["status"] == "running" and so_far["complete"] == 1
    first_rows = [row["time"] for row in metrics(second) if row["step"] <= 2]

    done = run("compare", file, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "complete" and result["unequal"] == []
    assert (first / "summary.json").stat().st_mtime_ns == made, "a finished run is not repeated"
    assert [row["time"] for row in metrics(second) if row["step"] <= 2] == first_rows, "nor what its checkpoint holds"
    assert train_steps(second, "rlvr") == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    checked = {check["what"]: check["found"] for check in result["fairness"]}
    # The two arms really read the same prompts.
    for what in ("rlvr: prompts of every step", "rlvr: evaluation prompts"):
        assert checked[what] == "checked in the records of 1 pair of runs"
    assert "1 complete pair" in result["comparisons"][0]["conclusion"]
    assert (out / "compare.html").stat().st_size > 1e6
