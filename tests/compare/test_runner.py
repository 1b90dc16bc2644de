"""Making the runs of a comparison: order, restart, failure, and the report that follows."""

import io
import json

import pytest
import yaml
from rich.console import Console
from stand_in_runs import BASE, failing, make_run

from kimi_rl.card_share import part
from kimi_rl.compare import comparison as compare_module
from kimi_rl.compare import runner
from kimi_rl.compare.plan import load_plan
from kimi_rl.compare.runner import check_plan, is_finished, make_runs
from kimi_rl.compare.watch import Watch
from kimi_rl.errors import InputError


def plan_of(folder, **fields):
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump({"name": "test", "base": BASE, "seeds": [0, 1, 2], **fields}, sort_keys=False))
    return load_plan(path)


def test_all_runs_are_made_once(ray_local, tmp_path):
    plan, out = plan_of(tmp_path), tmp_path / "out"
    seen = []
    outcomes = make_runs(plan, out, parallel=2, make_run=make_run, on_done=lambda done: seen.append(len(done)))
    assert [o.status for o in outcomes] == ["complete"] * 6 and seen == [1, 2, 3, 4, 5, 6]
    assert all(is_finished(out / run.folder) for run in plan.runs)
    before = {run.folder: (out / run.folder / "summary.json").stat().st_mtime_ns for run in plan.runs}
    # A seed more: only its runs are made.
    longer = plan_of(tmp_path, seeds=[0, 1, 2, 3])
    again = make_runs(longer, out, make_run=make_run)
    assert sum(o.kept for o in again) == 6 and len(again) == 8
    assert before == {folder: (out / folder / "summary.json").stat().st_mtime_ns for folder in before}


def test_a_run_that_fails_does_not_stop_the_others_and_is_tried_again(ray_local, tmp_path, monkeypatch):
    plan, out, said = plan_of(tmp_path), tmp_path / "out", io.StringIO()
    monkeypatch.setattr(compare_module, "make_runs", lambda *a, **k: make_runs(*a, **k, make_run=failing))
    with Watch(plan.runs, console=Console(file=said, width=200)) as watch:
        result = compare_module.compare(plan, out, watch=watch)
    status = {(run["arm"], run["seed"]): (run["status"], run["error"]) for run in result["runs"]}
    assert status["hybrid", 1] == ("failed", "RuntimeError: no luck at all")
    assert status["hybrid", 2][0] == "failed" and "process died" in status["hybrid", 2][1]
    assert [status[arm, seed][0] for arm, seed in (("mla", 0), ("hybrid", 0), ("mla", 1), ("mla", 2))] == [
        "complete"
    ] * 4
    assert result["status"] == "failed" and "Nothing can be said" in result["comparisons"][0]["conclusion"]
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert "hybrid at seed 1 failed: RuntimeError: no luck at all" in page
    assert "hybrid seed 1: failed" in said.getvalue() and "6 of 6 runs done" in said.getvalue()

    monkeypatch.setattr(compare_module, "make_runs", lambda *a, **k: make_runs(*a, **k, make_run=make_run))
    result = compare_module.compare(plan, out)
    assert result["status"] == "complete" and result["comparisons"][0]["seeds"] == [0, 1, 2]
    assert json.loads((out / "compare.json").read_text()) == result
    assert ["GPUs", "a card elsewhere"] in result["machine"], "the machine that made the runs, not the one that reports"
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert result["comparisons"][0]["conclusion"] in page and "http://" not in page.split("<script>")[0]
    assert {"curves.csv", "curves.png", "comparison.yaml"} <= {path.name for path in out.iterdir()}


def test_what_is_wrong_shows_before_anything_is_written(tmp_path):
    out = tmp_path / "out"
    plan = plan_of(tmp_path, arms={"a": {}, "b": {"data.params": {"level": 9}}})
    with pytest.raises(InputError, match="arms.b: data.params.*level"):
        check_plan(plan, out)
    assert not out.exists()
    plan = plan_of(tmp_path)
    make_run(plan.runs[0].recipe, out / plan.runs[0].folder)
    check_plan(plan, out)
    changed = plan_of(tmp_path, overrides={"stages.sft.steps": 5})
    with pytest.raises(InputError, match="runs/mla/seed_0: was made with another recipe: stages.0.steps is 4 there"):
        check_plan(changed, out)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        check_plan(plan, tmp_path / "file")


def test_two_comparisons_in_one_folder_are_refused(tmp_path):
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another comparison is running"):
            make_runs(plan_of(tmp_path), out, make_run=make_run)


def test_runs_that_outnumber_the_cards_share_them(monkeypatch):
    groups, slots = [], []
    monkeypatch.setattr(runner.ray, "cluster_resources", lambda: {"GPU": 2.0, "CPU": 16.0})
    monkeypatch.setattr(runner, "placement_group", lambda bundles: groups.append(bundles[0]["GPU"]) or bundles)
    monkeypatch.setattr(runner._Slots, "_start", lambda self, group: slots.append(group))
    for count in range(1, 40):
        groups.clear(), slots.clear()
        assert len(runner._Slots(count)) == len(slots) == count
        per_card = -(-count // 2)
        assert all(0.99 / per_card < share <= 1 / per_card for share in groups)
        # Ray counts in steps of 1/10,000: all runs of a card fit, and so do a run's learner and rollout worker.
        assert sum(round(10_000 * share) for share in groups[:per_card]) <= 10_000
        assert all(2 * round(10_000 * part(share / 2)) <= round(10_000 * share) for share in groups)
