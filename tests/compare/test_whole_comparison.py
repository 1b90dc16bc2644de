"""One real comparison on the CPU, killed in its second run and started again."""

import json

import yaml
from runs import SMALL, kill_session, metrics, run, start, train_steps, wait_for


def test_killed_and_started_again(tmp_path):
    sft, rlvr = SMALL["stages"]
    base = SMALL | {"stages": [sft | {"steps": 2}, rlvr | {"steps": 4, "eval": {"every": 2}}]}
    file, out = tmp_path / "comparison.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({"name": "whole", "base": base, "seeds": [5]}, sort_keys=False))
    first, second = out / "runs" / "mla" / "seed_5", out / "runs" / "hybrid" / "seed_5"

    process = start("compare", file, "--out", out)
    wait_for(lambda: len(train_steps(second, "rlvr")) >= 3, process=process, timeout=400)
    kill_session(process)
    made = (first / "summary.json").stat().st_mtime_ns
    assert not (second / "summary.json").exists()
    so_far = json.loads((out / "compare.json").read_text())
    assert so_far["status"] == "running" and so_far["complete"] == 1
    sft_times = [row["time"] for row in metrics(second) if row["stage"] == "sft"]

    done = run("compare", file, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "complete" and result["unequal"] == []
    assert (first / "summary.json").stat().st_mtime_ns == made, "a finished run is not repeated"
    assert [row["time"] for row in metrics(second) if row["stage"] == "sft"] == sft_times, "nor a finished stage"
    assert train_steps(second, "rlvr") == [1, 2, 3, 4]
    checked = {check["what"]: check["found"] for check in result["fairness"]}
    # The two arms really read the same SFT tokens, and the same RLVR and evaluation prompts.
    for what in ("sft: tokens of every step", "rlvr: prompts of every step", "rlvr: evaluation prompts"):
        assert checked[what] == "checked in the records of 1 pair of runs"
    assert "1 complete pair" in result["comparisons"][0]["conclusion"]
    assert (out / "compare.html").stat().st_size > 1e6
